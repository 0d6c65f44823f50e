"""What search buys on the demo's model: reward against model evaluations.

Brute force, greedy and beam search draw samples of the demo's base model for its held-out prompts,
in groups of about equal numbers of model evaluations. What is scored must be decoded first, so a
second column counts decoding and scoring too, in units of one evaluation (timed here). Search steps
are noisy, and noise alone changes samples: so brute force is also run on chains with the same
noise, and the gains of searching are paired with that. Every seed is a search of its own. Rewards
are averaged per prompt, and standard errors are over prompts.

    python benchmarks/search.py                      # a check: few prompts, nothing claimed
    python benchmarks/search.py --full --json benchmarks/results/search_cpu.json
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import timing
import torch
from torch import Tensor

from dancegrpo_fast.config import EvaluationConfig, RewardConfig, load_config
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.models import load_family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.evaluate import Difference
from dancegrpo_fast.rewards import Samples, load_rewards
from dancegrpo_fast.rewards.scoring import attempt
from dancegrpo_fast.search import Found, Sampler, SearchSettings, search

RECIPE = timing.ROOT / "recipes" / "demo.yaml"
EARLY, ALL = (0, 2, 4), tuple(range(9))

def brute(n: int) -> SearchSettings:
    """Best of n deterministic samples, as `sample --best-of` draws them."""
    return SearchSettings("brute", n, (-1,))


# One candidate a step is no search: its noise, drawn. Best of n of these is brute force for what
# greedy search draws, and tells the search from the noise.
NOISY = SearchSettings("greedy", 1, ALL)

# Budget in model evaluations -> searches that need about as many on 10 steps; each is repeated so
# often, from other noise, and the best result counts.
GROUPS: dict[int, dict[str, tuple[SearchSettings, int]]] = {
    10: {
        "plain sample": (brute(1), 1),
        "plain noisy sample": (NOISY, 1),
    },
    20: {
        "best of 2": (brute(2), 1),
        "best of 2 noisy": (NOISY, 2),
        "greedy, 4 at 3 steps": (SearchSettings("greedy", 4, EARLY), 1),
        "greedy, 2 at 9 steps": (SearchSettings("greedy", 2, ALL), 1),
    },
    40: {
        "best of 4": (brute(4), 1),
        "best of 4 noisy": (NOISY, 4),
        "greedy, 11 at 3 steps": (SearchSettings("greedy", 11, EARLY), 1),
        "greedy, 4 at 9 steps": (SearchSettings("greedy", 4, ALL), 1),
        "beam of 2, 6 at 3 steps": (SearchSettings("beam", 6, EARLY, 2), 1),
    },
    80: {
        "best of 8": (brute(8), 1),
        "best of 8 noisy": (NOISY, 8),
        "greedy, 24 at 3 steps": (SearchSettings("greedy", 24, EARLY), 1),
        "greedy, 9 at 9 steps": (SearchSettings("greedy", 9, ALL), 1),
        "beam of 4, 6 at 3 steps": (SearchSettings("beam", 6, EARLY, 4), 1),
        "beam of 3, 3 at 9 steps": (SearchSettings("beam", 3, ALL, 3), 1),
    },
    160: {
        "best of 16": (brute(16), 1),
        "best of 16 noisy": (NOISY, 16),
        "greedy, 18 at 9 steps": (SearchSettings("greedy", 18, ALL), 1),
        "beam of 4, 15 at 3 steps": (SearchSettings("beam", 15, EARLY, 4), 1),
    },
}


@dataclass(frozen=True)
class Result:
    """One kind of search over all prompts and seeds.

    Attributes:
        budget: Group of about equal evaluations.
        reward: [P] mean over seeds of the samples that were found.
        evaluations, previews, reward_calls: A sample, mean.
    """

    budget: int
    reward: np.ndarray
    evaluations: float
    previews: float
    reward_calls: float


class Demo:
    """The demo's model and reward."""

    def __init__(self, device: str) -> None:
        config = load_config(str(RECIPE), [])
        self.family = load_family(config.model, torch.device(device))
        rollout = config.rollout
        self.sampler = Sampler(
            self.family, self.family.modules, self.family.grid.schedule(rollout),
            rollout.dynamics, rollout.noise_level, batch_size=64,
        )  # fmt: skip
        (self.reward,) = load_rewards([RewardConfig(name="moving_shape")], self.family.device)
        self.root = NoiseKey.from_seed(EvaluationConfig().seed)

    def search(
        self, prompt: Prompt, number: int, settings: SearchSettings, seeds: int
    ) -> list[Found]:
        """One search of a prompt for every seed."""
        return search(
            self.sampler,
            self.family.encode([prompt]).select([0] * seeds),
            [self.root.fold_in(number).fold_in(seed) for seed in range(seeds)],
            lambda latents, trees: self.score(latents, prompt),
            settings,
        )

    def score(self, latents: Tensor, prompt: Prompt) -> np.ndarray:
        """[n, 1] rewards of the 8-bit pixels of latents."""
        pixels = (self.family.decode(latents) * 255).round() / 255
        samples = Samples(pixels, [prompt.text] * len(pixels))
        return attempt(self.reward, samples).values.double().numpy()[:, None]

    def check(self, prompt: Prompt) -> None:
        """Special cases that must hold before anything is measured."""
        greedy, beam, brute, wide = (
            self.search(prompt, 0, settings, 2)
            for settings in (
                SearchSettings("greedy", 3, (0, 4)),
                SearchSettings("beam", 3, (0, 4), 1),
                SearchSettings("brute", 3, (0, 4)),
                SearchSettings("beam", 3, (0, 4), 9),
            )
        )
        for one, other in (*zip(greedy, beam, strict=True), *zip(brute, wide, strict=True)):
            assert one.plan == other.plan and torch.equal(one.sample, other.sample)
        for one, all_of_them in zip(greedy, brute, strict=True):
            best = all_of_them.scores[all_of_them.ranked[0]][0]
            assert one.scores[one.ranked[0]][0] <= best
            assert one.cost.evaluations == 10 + 2 * 2 and one.cost.previews == 6

    def price(self, prompt: Prompt, count: int = 24) -> float:
        """Time to decode and score a sample, over that of one model evaluation.

        Of the 20% quantiles: other work on the machine only ever adds time.
        """
        latents = torch.randn(count, *self.family.latent_shape, device=self.family.device)
        conditions = self.family.encode([prompt]).select([0] * count)
        front = {(tree, 0): latents[tree] for tree in range(count)}
        cases = {
            "evaluation": lambda: self.sampler.outputs(front, 5, conditions),
            "scoring": lambda: self.score(latents, prompt),
        }
        device = str(self.family.device)
        with torch.no_grad():
            times = timing.interleaved(
                {name: timing.Case(call, device=device) for name, call in cases.items()}, rounds=41
            )
        return times["scoring"].low / times["evaluation"].low

    def measure(self, prompts: list[Prompt], seeds: int, group: int, name: str) -> Result:
        """All searches of one kind."""
        settings, repeats = GROUPS[group][name]
        trees = [self.search(p, n, settings, seeds * repeats) for n, p in enumerate(prompts)]
        rewards = np.array([[t.scores[t.ranked[0]][0] for t in of_prompt] for of_prompt in trees])
        best = rewards.reshape(len(prompts), seeds, repeats).max(axis=2)
        costs = [list(asdict(tree.cost).values()) for of_prompt in trees for tree in of_prompt]
        return Result(group, best.mean(axis=1), *(repeats * np.mean(costs, axis=0)).tolist())


def row(name: str, result: Result, noisy: Result, price: float) -> list[str]:
    """One line of the table; the difference is paired by prompt."""
    error = result.reward.std(ddof=1) / len(result.reward) ** 0.5
    gain = ""
    if result is not noisy:
        paired = Difference.of(noisy.reward, result.reward)
        gain = f"{paired.gain:+.3f} +- {paired.standard_error:.3f}"
    whole = result.evaluations + price * result.reward_calls
    counts = (result.evaluations, result.previews, result.reward_calls, whole)
    return [
        name, *(f"{count:.0f}" for count in counts),
        f"{result.reward.mean():.3f} +- {error:.3f}", gain,
    ]  # fmt: skip


def main() -> int:
    """Check, measure, print the table, write the results."""
    args = timing.arguments(__doc__).parse_args()
    file = timing.ROOT / "examples" / "demo" / "heldout_prompts.txt"
    demo, prompts = Demo(args.device), list(PromptSet.load(str(file)).prompts)
    demo.check(prompts[0])
    price = demo.price(prompts[0])
    chosen, seeds = prompts[:: 3 if args.full else 10], 2
    print(timing.headline(record := timing.environment(args.device)))
    print(f"{len(chosen)} held-out prompts, {seeds} seeds, 10 steps; counts are per sample")
    print(f"to decode and score a sample takes {price:.2f} of one model evaluation")
    rows, measured = [], dict[str, dict[str, Any]]()
    for group, searches in GROUPS.items():
        results = {name: demo.measure(chosen, seeds, group, name) for name in searches}
        noisy = results[next(name for name in searches if "noisy" in name)]
        rows += [row(name, result, noisy, price) for name, result in results.items()]
        for name, result in results.items():
            measured[name] = asdict(result) | {"reward": result.reward.tolist()}
    head = (
        "search", "evaluations", "previews", "reward calls", "all in evaluations", "reward",
        "against best of n noisy",
    )  # fmt: skip
    timing.print_table(head, rows)
    print("A toy says little: its previews are easy to judge, and nothing can fool its reward.")
    result = {
        "what": "search on the demo's base model: reward (by prompt) against model evaluations",
        "environment": record,
        "prompts": [prompt.text for prompt in chosen],
        "seeds": seeds,
        "steps": 10,
        "price_of_scoring_in_evaluations": price,
        "results": measured,
    }
    timing.write_json(args.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
