"""What a sample costs outside the network, in model evaluations: the prices of the learning table.

Three times per sample and group of `algorithm_groups.py`, interleaved: one evaluation of the
network without gradients; decoding and scoring; and decoding and scoring with gradients, back to
the latent, as ReFL and DRaFT need it. CPU seconds of one thread, as in the table: medians.

    python benchmarks/algorithm_prices.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timing
import torch
from algorithm_groups import GROUPS, Group
from torch import Tensor

from dancegrpo_fast.losses.reward_gradient import reward_gradient
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.rewards import Samples
from dancegrpo_fast.rewards.scoring import attempt
from dancegrpo_fast.trainer import Trainer

ROUNDS = 15


def cpu_seconds(cases: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each case, one call a round after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS + 1):
        for name, call in cases.items():
            started = time.process_time()
            call()
            found[name].append(time.process_time() - started)
    return {name: float(np.median(seconds[1:])) for name, seconds in found.items()}


def price(group: Group, scratch: str) -> dict[str, Any]:
    """Seconds of each case for one batch, and the two prices (None without a gradient)."""
    config = group.config(next(iter(group.algorithms)), 0, scratch)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    family, (reward, *_), count = trainer.family, trainer.rewards, config.rollout.batch_size
    texts = [trainer.prompts.prompts[0].text] * count
    latents = torch.randn(count, *family.latent_shape)
    conditions = family.encode(texts[:1]).select([0] * count)
    schedule = family.grid.schedule(config.rollout)
    timesteps = torch.full((count,), float(schedule.timesteps[5]))
    (module,) = trainer.engine.modules.values()

    def evaluation() -> None:
        with torch.no_grad():
            family.model_output(module, latents, timesteps, conditions)

    def gradient_score(pixels: Tensor) -> Tensor:
        return reward.gradient_scores(Samples(pixels, texts))  # type: ignore[attr-defined]

    with family.vae() as vae:
        cases: dict[str, Callable[[], object]] = {
            "evaluation": evaluation,
            "scoring": lambda: attempt(reward, Samples(family.decode(latents), texts)),
        }
        if group.gradient:
            cases["gradient"] = lambda: reward_gradient(latents, family, vae, gradient_score)
        seconds = cpu_seconds(cases)
    one = seconds["evaluation"]
    return {
        "group": group.title,
        "batch": count,
        "cpu_seconds": seconds,
        "scoring": seconds["scoring"] / one,
        "gradient": seconds["gradient"] / one if group.gradient else None,
    }


def main() -> int:
    """Measure all groups and print the prices beside those in use."""
    args = timing.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    record = timing.environment()
    print(timing.headline(record))
    with tempfile.TemporaryDirectory() as scratch:
        found = [price(group, scratch) for group in GROUPS]
    rows = [
        [
            group.title, f"{one['scoring']:.2f}", f"{group.scoring:g}",
            f"{one['gradient']:.2f}" if group.gradient else "", f"{group.gradient or ''}",
        ]
        for group, one in zip(GROUPS, found, strict=True)
    ]  # fmt: skip
    timing.print_table(("group", "scoring", "in use", "gradient", "in use"), rows)
    timing.write_json(args.json, {"environment": record, "prices": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
