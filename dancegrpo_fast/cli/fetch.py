"""`dancegrpo-fast fetch`: download what a recipe needs into the local hub cache."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo_fast.config import RewardConfig, RunConfig

# Of a reward's repository: the same weights once more, in formats that nothing here reads.
_OTHER_FORMATS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.gguf", "*.mlpackage/*"]


@dataclass(frozen=True)
class Fetched:
    """One thing that is now here.

    Attributes:
        field: Configuration field that asks for it.
        name: Hub id, or folder.
        folder: Where it lies.
        size: Bytes of what the recipe needs of it.
    """

    field: str
    name: str
    folder: Path
    size: int


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "fetch",
        description=(
            "Downloads into the local hub cache what a recipe names by hub id: the pipeline "
            "(model.path at model.revision: configurations, vocabularies and safetensors of the "
            "components that are used), model.first_frame, and the weights of rewards. Folders are "
            "only checked. Training downloads no pipeline. For a machine without internet, fetch "
            "elsewhere and copy the cache that is printed at the end; set HF_HUB_CACHE there to "
            "where it lies."
        ),
        epilog="""\
examples:
  dancegrpo-fast fetch recipes/flux_hps.yaml
  dancegrpo-fast fetch recipes/flux_hps.yaml model.revision=main
  HF_HUB_CACHE=/shared/hub dancegrpo-fast fetch recipes/flux_hps.yaml

A model behind a licence: accept it on its page, then log in with `hf auth login`.
""",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe, by dotted path"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import load_config

    config = load_config(args.recipe, args.overrides)
    from dancegrpo_fast.cli.quiet import quiet_libraries

    quiet_libraries()
    from huggingface_hub import constants

    total = 0
    for thing in fetch(config):
        total += thing.size
        print(f"{thing.field:<18} {thing.name}: {thing.size / 1e6:.1f} MB in {thing.folder}")
    print(f"{total / 1e6:.1f} MB in all; the hub cache is {constants.HF_HUB_CACHE}")
    return 0


def fetch(config: RunConfig) -> Iterator[Fetched]:
    """Bring everything that a recipe names to this machine, one thing after the other.

    Raises:
        UserError: Something cannot be downloaded, or what came (or the folder) is incomplete.
    """
    from dancegrpo_fast.models import family_class

    model = config.model
    unused = family_class(model.family).unused
    yield _pipeline(model.path, model.revision, "model.path", unused)
    if model.first_frame is not None:
        yield _pipeline(model.first_frame, None, "model.first_frame")
    for index, reward in enumerate(config.rewards):
        for name in reward_sources(reward, f"rewards.{index}"):
            folder = _download(name, None, f"rewards.{index}", ignored=_OTHER_FORMATS)
            yield Fetched(f"rewards.{index}", name, folder, _size(folder, ["*"]))


def reward_sources(reward: RewardConfig, field: str) -> list[str]:
    """Hub ids of a reward's weights: the texts among its arguments that are one."""
    from dancegrpo_fast.models.source import is_hub_id
    from dancegrpo_fast.rewards import REWARDS
    from dancegrpo_fast.rewards.loading import arguments

    entry = REWARDS.get(reward.name.partition(".")[0])
    if entry is None:  # A class of the user's own, which need not say what it loads.
        given: dict[str, Any] = {"path": reward.path, **reward.options}
    else:
        make = entry.load()
        defaults = {k: p.default for k, p in inspect.signature(make).parameters.items()}
        given = defaults | arguments(make, reward, field)
    return [value for value in given.values() if isinstance(value, str) and is_hub_id(value)]


def _pipeline(path: str, revision: str | None, field: str, unused: tuple[str, ...] = ()) -> Fetched:
    from dancegrpo_fast.models.source import (
        INDEX,
        Source,
        is_hub_id,
        locate,
        needed_files,
        read_index,
    )

    where = f"{field} = {path!r}"
    if is_hub_id(path):
        index = read_index(_download(path, revision, field, [INDEX]), where)
        _download(path, revision, field, needed_files(index, unused))
    folder = locate(path, revision, field)
    source = Source(folder, read_index(folder, where))
    source.check(unused)
    return Fetched(field, path, folder, _size(folder, needed_files(source.index, unused)))


def _download(
    name: str,
    revision: str | None,
    field: str,
    allowed: list[str] | None = None,
    ignored: list[str] | None = None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from dancegrpo_fast.config import UserError

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{field} = {name!r}: cannot be downloaded ({type(error).__name__}: {reason}); check "
            "the name, the connection, HF_HUB_OFFLINE, and for a model behind a licence that you "
            "accepted it and ran `hf auth login`"
        ) from None
    return Path(folder)


def _size(folder: Path, patterns: list[str]) -> int:
    """Bytes of the files that match, through the cache's links."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = ((path, path.relative_to(folder).as_posix()) for path in files)
    return sum(p.stat().st_size for p, n in named if any(fnmatch(n, x) for x in patterns))
