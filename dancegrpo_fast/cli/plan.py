"""`dancegrpo-fast plan`: the denoising tree of a recipe, and what it costs."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo_fast.config import RunConfig
    from dancegrpo_fast.tree import TreePlan


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "plan",
        help="print the denoising tree of a recipe and what it costs",
        description=(
            "Prints the tree that every prompt of an iteration follows, level by level, and counts "
            "network evaluations with and without sharing. Loads no network."
        ),
        epilog="""\
examples:
  dancegrpo-fast plan recipes/demo.yaml
  dancegrpo-fast plan recipes/demo.yaml --iteration 3
  dancegrpo-fast plan recipes/demo.yaml rollout.group_size=12 rollout.tree.window_size=4
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe")
    parser.add_argument(
        "--iteration", type=int, default=0, help="a drawn window differs by iteration (default 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import load_config

    config = load_config(args.recipe, args.overrides)
    from dancegrpo_fast.quiet import quiet_libraries

    quiet_libraries()
    from dancegrpo_fast.config import UserError
    from dancegrpo_fast.models import open_family
    from dancegrpo_fast.rollout import plan_iteration

    grid = open_family(config.model).grid
    try:
        plan = plan_iteration(config, grid, args.iteration)
    except ValueError as error:
        raise UserError(str(error)) from error
    modules = grid.module_names(plan.schedule)
    print("\n".join([*tree_lines(plan, modules), "", *cost_lines(plan, config)]))
    return 0


def tree_lines(plan: TreePlan, modules: tuple[str, ...]) -> list[str]:
    """One line per step: sigma, network, states, and the edges out of them."""
    lines = [f"{'step':>4}  {'sigma':>7} -> {'sigma':<7}  {'states':>6}  edges"]
    for step in range(plan.schedule.steps):
        sources = [s.index for s in plan.states if s.step == step and plan.children[s.index]]
        edges = [plan.states[c] for s in sources for c in plan.children[s]]
        kinds = Counter(f"{e.kind}{' trained' if e.trained else ''}" for e in edges)
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        widest = max(len(plan.children[s]) for s in sources)
        split = f" (up to {widest} children a state)" if widest > 1 else ""
        sigma, following = plan.schedule.sigmas[step : step + 2]
        module = f"  [{modules[step]}]" if len(set(modules)) > 1 else ""
        grid = f"{step:>4}  {sigma:7.4f} -> {following:<7.4f}"
        lines.append(f"{grid}  {len(sources):>6}  {text}{split}{module}")
    lines.append(f"{len(plan.leaves)} leaves a prompt")
    return lines


def cost_lines(plan: TreePlan, config: RunConfig) -> list[str]:
    """Network evaluations of one iteration over all prompts."""
    cost, prompts = plan.cost(), config.data.prompts_per_iteration
    # A guided forward evaluates the network for two texts.
    scale = prompts * (1 if config.model.guidance == 1 else 2)
    rows = [
        ("shared (what runs)", cost.rollout, cost.training),
        ("rollout shared only", cost.rollout, cost.training_unshared),
        ("nothing shared", cost.rollout_unshared, cost.training_unshared),
    ]
    lines = [
        f"network evaluations an iteration, {prompts} prompts"
        + (", guidance doubles each" if scale > prompts else ""),
        f"{'':<22}{'rollout':>9}{'training':>10}",
    ]
    lines += [f"{name:<22}{a * scale:>9}{b * scale:>10}" for name, a, b in rows]
    lines.append(
        "training: one forward and backward each, all trained steps, one update; "
        "on several processes a state is evaluated by each process that holds it"
    )
    return lines
