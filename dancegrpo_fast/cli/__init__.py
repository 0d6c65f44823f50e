"""The command line. One file per command, each with `add_parser(subparsers)` and `run(args)`.

A command's file is imported only when that command is asked for, and this one needs the standard
library alone: help comes at once, and `doctor` works where training's dependencies are missing.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "train": "train a model with a recipe, on one process or under torchrun",
    "sample": "draw samples of a model or of a run",
    "evaluate": "compare models on held-out prompts, with intervals",
    "embed": "embed the prompts of a recipe ahead of its run",
    "fetch": "download what a recipe needs, for machines without internet",
    "score": "score images or videos on disk; --list says which rewards there are",
    "serve-reward": "serve rewards to runs in other processes and on other machines",
    "report": "write the report of a run, also of one that is running or was killed",
    "plan": "print the denoising tree of a recipe and what it costs",
    "export": "write a run's weights as a diffusers pipeline or LoRA",
    "doctor": "say what this installation can do and what is missing",
}
_ALONE = ("sample", "score", "export")  # Every process would do all of it, into the same files.
_PACKAGES = {
    "train": (
        "PIL", "av", "diffusers", "ftfy", "huggingface_hub", "matplotlib", "numpy", "peft",
        "pydantic", "safetensors", "tensorboard", "torch", "tqdm", "transformers", "yaml",
    ),
    "serve": ("httpx2", "starlette", "uvicorn"),
    "deepspeed": ("deepspeed",),
}  # fmt: skip

_EPILOG = """\
examples:
  dancegrpo-fast train recipes/demo.yaml
  dancegrpo-fast train recipes/demo.yaml rollout.group_size=12 output=runs/small
  dancegrpo-fast train recipes/demo.yaml --resume latest
  torchrun --nproc-per-node 8 -m dancegrpo_fast train recipes/demo.yaml
  dancegrpo-fast plan recipes/demo.yaml
  dancegrpo-fast COMMAND --help

exit codes: 0 done, 1 defect (with a traceback), 2 your mistake (one line each),
3 interrupted and resumable (continue with --resume latest)
"""


class _Help(argparse.HelpFormatter):
    """Fills descriptions, and leaves examples as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _UsageError(Exception):
    exit_code = 2


class _Parser(argparse.ArgumentParser):
    """argparse that reports a mistake like every other: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see {self.prog} --help")


def program() -> NoReturn:
    """The console script, and `python -m dancegrpo_fast`."""
    # Prompts are any text, whatever the locale: a terminal shows what it can, files hold UTF-8.
    if isinstance(sys.stdout, io.TextIOWrapper):
        there = sys.stdout.isatty()
        sys.stdout.reconfigure(encoding=None if there else "utf-8", errors="backslashreplace")
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # A second Ctrl-C finds Python clearing up.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from dancegrpo_fast.parallel.world import leave

        leave(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    An exception with an `exit_code` (`config.UserError`, `config.Interrupted`) ends in its message
    and that code; so do a file that cannot be had, a package that is missing and Ctrl-C. Any other
    is a defect and is left to Python: traceback, exit code 1.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()  # Here, where a reader that has left is no defect.
        return code
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        # Such as `| head`. What is buffered has nowhere to go when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _told("interrupted", 3)
    except Exception as error:
        known: int | None = getattr(error, "exit_code", None)
        text = str(error) if known is not None else _of_the_machine(error)
        if text is None and _lost_peer(error):
            known, why = 3, " ".join(str(error).split())[:200]
            text = (
                f"{arguments[0]}: no answer from another process: {why}; its own output says more; "
                "start the command again, it goes on"
            )
        if text is None:
            raise
        return _told(text, known or 2)


def _told(text: str, code: int) -> int:
    # Under torchrun every process may meet the same mistake; say which one speaks.
    rank = os.environ.get("RANK", "0")
    print(text if rank == "0" else f"[rank {rank}] {text}", file=sys.stderr)
    return code


def _of_the_machine(error: Exception) -> str | None:
    """One line on a file that cannot be had or a package that is not there; None for a defect."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, names in _PACKAGES.items() if package in names), None)
        way = f"pip install 'dancegrpo-fast[{extra}]'; `dancegrpo-fast doctor` says what is missing"
        return None if extra is None else f"the package {package} is missing: {way}"
    if not isinstance(error, OSError) or error.filename is None or error.errno is None:
        return None
    no_right = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way = "give a place that you may use" if no_right else "name another place"
    return f"{os.fsdecode(error.filename)}: {error.strerror}; {'make room' if full else way}"


def _lost_peer(error: Exception) -> bool:
    """Whether another process is gone: that one tells why."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    from dancegrpo_fast.faults import is_lost_peer  # Of several processes: torch is there.

    return is_lost_peer(error)


def _run(arguments: list[str]) -> int:
    parser = _Parser(
        prog="dancegrpo-fast",
        description="GRPO post-training for diffusion and flow models.",
        epilog=_EPILOG,
        formatter_class=_Help,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    module = None
    for name, summary in COMMANDS.items():
        if name == command:
            module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
            module.add_parser(subparsers)
            subparsers.choices[name].formatter_class = _Help
        else:
            subparsers.add_parser(name, help=summary)
    # argparse stops collecting overrides at the first option; take those after it too.
    args, more = parser.parse_known_args(arguments)
    overrides = [word for word in more if not word.startswith("-") and "=" in word]
    if len(overrides) < len(more) or (more and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.overrides = [*args.overrides, *overrides]
    assert module is not None  # parse_args has left with help or an error otherwise
    size = os.environ.get("WORLD_SIZE", "1")
    if command in _ALONE and size != "1":
        raise _UsageError(
            f"WORLD_SIZE = {size}: {command} runs on one process; start it without torchrun "
            "(train, evaluate and embed take several)"
        )
    code: int = module.run(args)
    return code
