"""`sample --search`: its options, and the samples that a search finds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from dancegrpo_fast.config import RunConfig
    from dancegrpo_fast.models import Family
    from dancegrpo_fast.prompt import Prompt
    from dancegrpo_fast.rewards import Reward
    from dancegrpo_fast.search import SearchCost, SearchSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        choices=("greedy", "beam"),
        help="at some steps draw several candidates, score their previews and go on with the best "
        "one, or with the best --beam (brute force is --best-of)",
    )
    group.add_argument("--search-width", type=int, metavar="K", help="candidates drawn of a state")
    group.add_argument(
        "--search-steps", type=_steps, metavar="I,J,...", help="steps at which to search, from 0"
    )
    group.add_argument("--beam", type=int, metavar="B", help="beam: candidates that go on")


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(step) for step in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give steps such as 2,4,6") from None


def settings_of(args: argparse.Namespace) -> SearchSettings | None:
    """The search that was asked for, if any.

    Raises:
        UserError: Options that do not belong together, or a value out of range.
    """
    from dancegrpo_fast.config import UserError
    from dancegrpo_fast.search import SearchSettings

    options = ("search_width", "search_steps", "beam")
    given = [name for name in options if getattr(args, name) is not None]
    if args.search is None:
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: needs --search greedy or beam")
        return None
    if args.best_of is not None:
        raise UserError("--best-of: is brute force; leave it out beside --search")
    for name in options[:2]:
        if name not in given:
            raise UserError(f"--search = {args.search}: needs --{name.replace('_', '-')}")
    if args.search_steps[0] < 0:
        raise UserError("--search-steps: begin at 0; the initial noise is that of --seed")
    try:
        return SearchSettings(args.search, args.search_width, args.search_steps, args.beam)
    except ValueError as error:
        raise UserError(f"--search: {error}") from error


def pixel_values(
    rewards: Sequence[Reward],
    videos: Tensor,
    prompt: Prompt,
    fps: float | None,
    device: torch.device,
) -> np.ndarray:
    """[n, R] rewards of a prompt's samples [n, F, 3, H, W] uint8, NaN where one failed."""
    import numpy as np

    from dancegrpo_fast.report.evaluate import as_in_training

    if not rewards:
        return np.zeros((len(videos), 0))

    from dancegrpo_fast.rewards import Samples
    from dancegrpo_fast.rewards.scoring import attempt

    n, rate = len(videos), None if videos.shape[1] == 1 else fps
    # Scored from the 8-bit pixels that are written.
    samples = Samples(
        videos.float() / 255, [prompt.text] * n, fps=rate, metadata=[prompt.metadata] * n
    )
    columns = [
        attempt(reward, there).values.double().numpy()
        for reward, there in zip(rewards, as_in_training(rewards, samples, device), strict=True)
    ]
    return np.stack(columns, axis=1)


def search_all(
    family: Family,
    pipeline: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    config: RunConfig,
    settings: SearchSettings,
    *,
    weights: Sequence[float],
    seeds: int,
    seed: int,
    steps: int,
    fps: float,
) -> Iterator[tuple[Tensor, np.ndarray, SearchCost]]:
    """One search for each prompt and seed, from the initial noise of a plain sample.

    Returns:
        Prompt by prompt: samples [seeds, F, 3, H, W] uint8, their rewards [seeds, R], and what the
        searches of the prompt cost together.

    Raises:
        UserError: Before anything is drawn: a reward that compares samples, or steps outside the
            schedule. Later: nothing that could be chosen.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from dancegrpo_fast.config import EvaluationConfig, UserError
    from dancegrpo_fast.ops.noise import NoiseKey
    from dancegrpo_fast.report.evaluate import initial_latents
    from dancegrpo_fast.roles import Role
    from dancegrpo_fast.search import Sampler, SearchCost, search

    for reward in rewards:
        if getattr(reward, "groupwise", False):
            raise UserError(
                f"--search: reward {reward.name} compares the samples of a prompt, so values of "
                "different steps are no one scale; use --best-of"
            )
    rollout, size = config.rollout.model_copy(update={"steps": steps}), config.evaluation.batch_size
    networks = {name: getattr(pipeline, name) for name in family.grid.networks}
    sampler = Sampler(
        family, networks, family.grid.schedule(rollout), rollout.dynamics, rollout.noise_level, size
    )
    try:
        settings.check(sampler.schedule)
    except ValueError as error:
        raise UserError(f"--search: {error}") from error
    numbers = EvaluationConfig(seeds=seeds, seed=seed)
    root = NoiseKey.from_seed(seed).fold_in(Role.EVALUATION)

    conditions = family.encode(prompts)

    def pixels(latents: Tensor) -> tuple[Tensor, Tensor]:
        """Samples as they are written, [n, F, 3, H, W] uint8, and which were finite; on the CPU."""
        decoded = [family.decode(part) for part in latents.split(size)]
        finite = [part.isfinite().flatten(1).all(dim=1).cpu() for part in decoded]
        parts = [(part * 255).round().to("cpu", torch.uint8) for part in decoded]
        return torch.cat(parts), torch.cat(finite)

    def found() -> Iterator[tuple[Tensor, np.ndarray, SearchCost]]:
        for p, prompt in enumerate(tqdm(prompts, desc="search")):
            jobs = [(p, s) for s in range(seeds)]
            noise = initial_latents(numbers, jobs, family.latent_shape, family.device)

            def score(latents: Tensor, trees: Sequence[int], prompt: Prompt = prompt) -> np.ndarray:
                videos, finite = pixels(latents)
                values = pixel_values(rewards, videos, prompt, fps, family.device)
                values[~finite.numpy()] = np.nan  # 8 bits have none: it would be a black sample.
                return values

            try:
                trees = search(
                    sampler,
                    conditions.select([p] * seeds),
                    [root.fold_in(p).fold_in(s) for s in range(seeds)],
                    score,
                    settings,
                    weights=weights,
                    roots=noise[:, None],
                )
            except ValueError as error:
                raise UserError(f"--search: {prompt.text!r}: {error}") from error
            videos, _ = pixels(torch.stack([tree.sample for tree in trees]))
            values = np.stack([tree.scores[tree.ranked[0]] for tree in trees])
            yield videos, values, SearchCost.total([tree.cost for tree in trees])

    return found()
