"""Iterations of recipes that search, as a process of `torchrun`, recorded.

    torchrun --nproc-per-node 2 tests/search_worker.py MODELS OUT

writes OUT/CASE-RANK.pt. `test_search_processes` runs the same cases on one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from distributed_worker import CASES, LIMIT, Case, run_case
from tiny_models import Bright
from torch import Tensor

from dancegrpo_fast.config import ParallelConfig
from dancegrpo_fast.parallel.world import World, leave

HERE = Path(__file__)
SEARCH = {
    "rollout.group_size": 12, "rollout.tree.kind": "search", "rollout.tree.branches": 3,
    "rollout.tree.branch_steps": [0, 2], "rollout.tree.trunks": 2, "rollout.batch_size": 5,
    "advantage.credit": "siblings",
}  # fmt: skip
TOGETHER = {"parallel.sp": 2}
SEARCHES = {
    "search": Case(SEARCH),
    # every forward gathers, and the prompts' texts share none: each process asks for as many
    "search_gathering": Case(
        SEARCH | {"parallel.gather_rollout": False, "data.prompts_per_iteration": 4},
        prompts="red\na red square\na red square on a table\na blue dot",
    ),
    "search_ddp": Case(SEARCH | {"parallel.engine": "ddp"}),
    "search_sp": Case(SEARCH | TOGETHER),
    "search_moody": Case(SEARCH | TOGETHER | {"rewards": [{"name": f"{HERE}:Moody"}]}),
}
CASES |= SEARCHES


class Moody(Bright):
    """A reward that does not say the same to every process."""

    name = "moody"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        values = super().__call__(videos, prompts)
        return torch.sin(1e4 * values * (1 + int(os.environ["RANK"])))


def main(models: Path, out: Path) -> None:
    """Run every case as one process of several."""
    torch.set_num_threads(1)
    for name, case in SEARCHES.items():
        sp = case.overrides.get("parallel.sp", 1)
        world = World.from_environment(ParallelConfig(timeout_seconds=LIMIT, sp=sp))
        found = run_case(name, world, models, out / name)
        torch.save(found, out / f"{name}-{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
