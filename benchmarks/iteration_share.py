"""Which share of a training iteration are the fused ops? Timers around them in a real run.

    python benchmarks/iteration_share.py                         3 iterations of recipes/demo.yaml
    python benchmarks/iteration_share.py RECIPE.yaml --iterations 5 --json PATH

The run itself is that of `dancegrpo-fast train`, without evaluation; the first iteration is left
out. On the CPU the ops run where they are called, so wall time around them is their time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing

from dancegrpo_fast import rollout
from dancegrpo_fast.config import load_config
from dancegrpo_fast.losses import policy_gradient
from dancegrpo_fast.ops import native
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.trainer import Trainer

OPS = (
    (rollout, "sample_transition"),
    (policy_gradient, "policy_loss"),
    (policy_gradient, "transition_log_prob"),
)


def timed(call: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """The same call, its time added to seconds[name]."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - started

    return wrapper


def main() -> None:
    parser = timing.arguments(__doc__)
    default = timing.ROOT / "recipes" / "demo.yaml"
    parser.add_argument("recipe", nargs="?", type=Path, default=default)
    parser.add_argument("--iterations", type=int, default=3)
    args = parser.parse_args()
    if native.why_not() is not None or args.device != "cpu":
        raise SystemExit("times the native ops on the CPU; a GPU needs a profiler")
    seconds: dict[str, float] = defaultdict(float)
    for module, name in OPS:
        setattr(module, name, timed(getattr(module, name), name, seconds))
    backward = native.module().transition_gradient
    setattr(native.module(), "transition_gradient", timed(backward, "gradient", seconds))  # noqa: B010
    os.chdir(timing.ROOT)  # where the recipe's paths count from
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.recipe, [f"output={folder}", f"iterations={args.iterations + 1}"])
        trainer = Trainer(config, World.from_environment())
        total = 0.0
        for iteration in range(args.iterations + 1):
            if iteration == 1:
                seconds.clear()
            started = time.perf_counter()
            trainer.iteration()
            total += (time.perf_counter() - started) if iteration else 0.0
    rows = [(name, value / args.iterations, value / total) for name, value in seconds.items()]
    rows.append(("all of them", sum(seconds.values()) / args.iterations, sum(r[2] for r in rows)))
    environment = timing.environment("cpu")
    print(timing.headline(environment))
    print(f"{args.recipe.name}: {total / args.iterations:.2f} s an iteration")
    timing.print_table(
        ("op", "ms an iteration", "share"), [(n, f"{1e3 * s:.2f}", f"{r:.3%}") for n, s, r in rows]
    )
    result = {
        "environment": environment, "recipe": args.recipe.name,
        "iteration_seconds": total / args.iterations,
        "ops": [{"op": n, "seconds": s, "share": r} for n, s, r in rows],
    }  # fmt: skip
    timing.write_json(args.json, result)


if __name__ == "__main__":
    main()
