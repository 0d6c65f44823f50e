"""`dancegrpo-fast serve-reward`: rewards for other processes and machines."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "serve-reward",
        description=(
            "Serves rewards over HTTP until SIGTERM or SIGINT; a recipe uses them as "
            "{name: remote, path: http://HOST:PORT}. Only this machine can reach it unless --host "
            "says otherwise, which needs a token."
        ),
        epilog="""\
examples:
  dancegrpo-fast serve-reward hpsv2 path=weights/hpsv2
  dancegrpo-fast serve-reward --recipe recipes/flux_hps_clip.yaml --devices cuda:0 cuda:1
  dancegrpo-fast serve-reward hpsv3 --host 0.0.0.0 --token-file token.txt

The token may stand in the environment instead, as DANCEGRPO_FAST_TOKEN.
""",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a reward, or key=value for all of them (path=..., options.NAME=...)",
    )
    parser.add_argument("--recipe", metavar="FILE", help="serve the rewards of a recipe")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to serve on (default 127.0.0.1: this machine only)",
    )
    parser.add_argument("--token-file", metavar="FILE", help="holds the token that clients send")
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="a copy of the rewards on each (default: every GPU, or cpu)",
    )
    for name, kind, unit, default, text in (
        ("--port", int, "N", 8000, "port; 0 takes a free one"),
        ("--batch-size", int, "N", 32, "samples that a reward scores at once"),
        ("--body-mb", int, "MB", 512, "largest request"),
        ("--pending-mb", int, "MB", 4096, "most of all requests that wait together"),
        ("--body-seconds", float, "S", 60, "longest time for a client to send a request"),
        ("--stop-seconds", float, "S", 30, "time to finish requests after a signal"),
    ):
        parser.add_argument(
            name, type=kind, metavar=unit, default=default, help=f"{text} (default {default})"
        )
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import UserError

    for field in ("batch_size", "body_mb", "pending_mb", "body_seconds", "stop_seconds"):
        if not getattr(args, field) > 0:
            option = field.replace("_", "-")
            raise UserError(f"--{option} = {getattr(args, field)}: must be positive")
    if not 0 <= args.port < 2**16:  # The system would take it modulo that.
        raise UserError(f"--port = {args.port}: must be from 0 to {2**16 - 1}")
    args.overrides += [word for word in args.names if "=" in word]
    args.reward = [word for word in args.names if "=" not in word]
    if bool(args.reward) == (args.recipe is not None):
        raise UserError("serve-reward needs NAMEs or --recipe; see dancegrpo-fast serve-reward -h")
    _need_packages()

    from dancegrpo_fast.cli.quiet import quiet_libraries
    from dancegrpo_fast.rewards.server import Limits, Service, bound_socket, serve
    from dancegrpo_fast.rewards.transport import read_token

    try:
        token = read_token(args.token_file)
    except ValueError as error:
        raise UserError(str(error).replace("token_file", "--token-file")) from None
    # Before the weights load: a taken port should not cost minutes.
    listening = bound_socket(args.host, args.port, has_token=token is not None)
    quiet_libraries()
    engines, devices = _engines(args)
    limits = Limits(
        args.body_mb * 2**20, args.pending_mb * 2**20, args.body_seconds, args.stop_seconds
    )
    port = listening.getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    where = f"serving {', '.join(engines)} on http://{host}:{port} ({', '.join(devices)})"
    serve(Service(engines, limits, token), listening, ready=[where])
    print("stopped")
    return 0


def _need_packages() -> None:
    from importlib.util import find_spec

    from dancegrpo_fast.config import UserError

    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; pip install 'dancegrpo-fast[serve]'")


def _engines(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The rewards by name, each on every device, and the devices."""
    import torch

    from dancegrpo_fast.cli.score import reward_configs
    from dancegrpo_fast.config import UserError
    from dancegrpo_fast.rewards import load_rewards
    from dancegrpo_fast.rewards.engine import Engine

    names = args.devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    try:
        devices = [torch.device(name) for name in names]
    except RuntimeError as error:
        raise UserError(f"--devices = {' '.join(names)}: {str(error).splitlines()[0]}") from None
    for device in devices:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--devices: {device}: there are {torch.cuda.device_count()} GPUs")
    configs = reward_configs(args)
    replicas = [load_rewards(configs, device) for device in devices]
    columns = [list(copies) for copies in zip(*replicas, strict=True)]
    size = args.batch_size
    return {c[0].name: Engine(c, devices, largest_batch=size) for c in columns}, names
