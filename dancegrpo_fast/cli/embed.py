"""`dancegrpo-fast embed`: embed the prompts of a recipe ahead of its run."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo_fast.config import RunConfig
    from dancegrpo_fast.models.embeddings import Embeddings
    from dancegrpo_fast.parallel.world import World
    from dancegrpo_fast.prompt import Prompt


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "embed",
        description=(
            "Embeds the training and held-out prompts of a recipe (and their images), over all "
            "processes, so that training loads no text encoder. What is there already is left "
            "alone: an interrupted command is continued by starting it again. Files are named by "
            "all they depend on (encoder, text, length, dtype, negative prompt, image), so several "
            "recipes may share a folder (data.embeddings). Training embeds what is missing itself."
        ),
        epilog="""\
examples:
  dancegrpo-fast embed recipes/demo.yaml
  dancegrpo-fast embed recipes/demo.yaml data.embeddings=/shared/embeddings
  torchrun --nproc-per-node 8 -m dancegrpo_fast embed recipes/flux_hps.yaml
  dancegrpo-fast embed recipes/flux_hps.yaml --import data/rl_embeddings
""",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe, by dotted path"
    )
    parser.add_argument(
        "--import",
        dest="folder",
        metavar="FOLDER",
        help="take the .pt embeddings of a DanceGRPO folder (videos2caption.json) instead",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import load_config

    config = load_config(args.recipe, args.overrides)
    from dancegrpo_fast.cli.quiet import quiet_libraries

    quiet_libraries()
    from dancegrpo_fast.models import open_family
    from dancegrpo_fast.models.embeddings import Embeddings, embeddings_folder
    from dancegrpo_fast.parallel.world import World

    world = World.from_environment()
    try:
        family = open_family(config.model, world.device)
        family.source.check((*family.unused, *family.networks))
        embeddings = Embeddings(family, embeddings_folder(config), world)
        started = time.perf_counter()
        prompts = {embeddings.key(prompt): prompt for prompt in recipe_prompts(config)}
        if args.folder is None:
            what = _embed(embeddings, prompts, world)
        else:
            what = _import(embeddings, Path(args.folder), prompts, world)
        if world.is_main:
            seconds = time.perf_counter() - started
            files = [file for key in prompts if (file := embeddings.path(key)).is_file()]
            size = sum(file.stat().st_size for file in files)
            print(f"{what}; {size / 1e6:.1f} MB in {embeddings.folder}, {seconds:.1f} s")
    finally:
        world.close()
    return 0


def recipe_prompts(config: RunConfig) -> list[Prompt]:
    """Training prompts, then held-out ones."""
    from dancegrpo_fast.data import PromptSet

    prompts = list(PromptSet.of(config.data).prompts)
    if config.evaluation.prompts:
        prompts += PromptSet.held_out(config).prompts
    return prompts


def _embed(embeddings: Embeddings, prompts: dict[str, Prompt], world: World) -> str:
    from tqdm import tqdm

    # The main process shows its own share, which is as long as the others'.
    with tqdm(desc="embed", unit="prompt", disable=not world.is_main) as bar:
        made = embeddings.embed(prompts, lambda count: bar.reset(count), bar.update)
    return f"{made} prompts embedded, {len(prompts) - made} were there"


def _import(embeddings: Embeddings, folder: Path, prompts: dict[str, Prompt], world: World) -> str:
    import torch
    from tqdm import tqdm

    from dancegrpo_fast.models.dance_embeddings import import_entry, read_index

    entries = read_index(folder)
    own = entries[world.rank :: world.size]
    skipped = torch.zeros(1, dtype=torch.int64)
    for entry in tqdm(own, desc="import", unit="prompt", disable=not world.is_main):
        skipped += not import_entry(embeddings, folder, entry, prompts.values())
    world.all_reduce(skipped, "sum")
    taken = len(entries) - int(skipped)
    found = sum(embeddings.path(key).is_file() for key in prompts)
    return (
        f"{taken} imported, {int(skipped)} without one prompt of the recipe left out; "
        f"{found} of the recipe's {len(prompts)} prompts are there"
    )
