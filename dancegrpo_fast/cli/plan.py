"""`dancegrpo-fast plan`: the denoising tree of a recipe, what it costs, and what it needs."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo_fast.config import RunConfig
    from dancegrpo_fast.models import Family
    from dancegrpo_fast.trees.tree import TreePlan


HARDWARE: dict[str, tuple[str, float, str]] = {
    # option: unit, default, what it is
    "machine_gpus": ("N", 8, "GPUs of a machine"),
    "memory": ("GB", 80, "memory of a GPU"),
    "efficiency": ("SHARE", 0.4, "share of the peak that is reached"),
    "peak": ("TFLOPS", 989, "peak of a GPU in the recipe's arithmetic, an H100's"),
    "link": ("GB/s", 50, "what a GPU receives from other machines"),
}


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "plan",
        description=(
            "Prints the tree that every prompt of an iteration follows, level by level, and counts "
            "network evaluations with and without sharing. With --gpus, also memory by phase, "
            "products, bytes on the wire and projected time, a mesh to choose and the largest "
            "batches that fit there. Loads nothing."
        ),
        epilog="""\
examples:
  dancegrpo-fast plan recipes/demo.yaml
  dancegrpo-fast plan recipes/demo.yaml --iteration 3
  dancegrpo-fast plan recipes/demo.yaml rollout.group_size=12 rollout.tree.window_size=4
  dancegrpo-fast plan recipes/flux_hps.yaml --gpus 16
  dancegrpo-fast plan recipes/flux_hps.yaml --gpus 16 --memory 141 --efficiency 0.3 --json
""",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe, by dotted path"
    )
    parser.add_argument(
        "--iteration",
        type=int,
        default=0,
        metavar="N",
        help="iteration that is planned: a window moves (default 0)",
    )
    gpus = parser.add_argument_group("projected")
    gpus.add_argument("--gpus", type=int, metavar="N", help="GPUs of the run; the others need it")
    for name, (unit, default, text) in HARDWARE.items():
        kind = int if unit == "N" else float
        option = f"--{name.replace('_', '-')}"
        gpus.add_argument(option, type=kind, metavar=unit, help=f"{text} (default {default:g})")
    gpus.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import load_config

    config = load_config(args.recipe, args.overrides)
    from dancegrpo_fast.cli.quiet import quiet_libraries

    quiet_libraries()
    from dancegrpo_fast.config import UserError
    from dancegrpo_fast.models import open_family
    from dancegrpo_fast.rollout import plan_iteration
    from dancegrpo_fast.trees.candidates import visited

    _check_options(args)
    family = open_family(config.model)
    try:
        plan = plan_iteration(config, family.grid, args.iteration)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not args.json:
        modules = family.grid.module_names(plan.schedule)
        walked = visited(config.rollout, plan.schedule) if _searches(config) else plan
        print("\n".join([*tree_lines(walked, modules), "", *cost_lines(plan, config)]))
    if args.gpus is not None:
        _plan_run(config, family, args)
    return 0


def _searches(config: RunConfig) -> bool:
    return config.rollout.tree.kind == "search"


def _check_options(args: argparse.Namespace) -> None:
    from dancegrpo_fast.config import UserError

    if args.iteration < 0:
        raise UserError(f"--iteration = {args.iteration}: must be at least 0")
    for name in ("json", *HARDWARE):
        if args.gpus is None and getattr(args, name) not in (None, False):
            option = name.replace("_", "-")
            raise UserError(f"--{option}: is about a number of GPUs; give --gpus N")
    for name, (_, default, _) in HARDWARE.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus = {args.gpus}: must be at least 1")
    if args.efficiency > 1:
        raise UserError(f"--efficiency = {args.efficiency:g}: is a share of the peak, at most 1")
    for name in HARDWARE:
        if not getattr(args, name) > 0:
            option = name.replace("_", "-")
            raise UserError(f"--{option} = {getattr(args, name):g}: must be above 0")


def _plan_run(config: RunConfig, family: Family, args: argparse.Namespace) -> None:
    """The planner's part: the recipe's own mesh, then the one to choose."""
    from dancegrpo_fast.planner import (
        Hardware,
        Planner,
        batch_lines,
        compared_text,
        largest_batches,
        mesh_text,
        plan_lines,
        plan_values,
    )
    from dancegrpo_fast.planner.batches import image_tokens
    from dancegrpo_fast.planner.meshes import engines
    from dancegrpo_fast.updating import old_log_prob_mode

    hardware = Hardware(
        args.gpus, args.machine_gpus, args.memory * 1e9, args.efficiency, args.peak * 1e12,
        args.link * 1e9,
    )  # fmt: skip
    planner = Planner(config, family, iteration=args.iteration)
    own = planner.estimate(hardware)  # A mesh that does not fit the GPUs ends here.
    best = planner.recommend(hardware)
    if args.json:
        found = None
        if best is not None:
            largest = largest_batches(planner, best[0], hardware)
            found = plan_values(best[0], hardware) | {"largest_batches": largest}
        print(json.dumps({"recipe": plan_values(own, hardware), "recommended": found}))
        return
    lines = ["", *plan_lines(own, hardware), ""]
    if best is None:
        nearest = planner.smallest(hardware)
        tried = " and ".join(p.engine for p in engines(config.parallel, hardware))
        lines.append(
            f"recommended: no mesh of engine {tried} that was compared fits; use more or larger "
            "GPUs"
        )
        if nearest is not None:
            need = nearest.memory.total(nearest.memory.peak) / 1e9
            lines.append(f"nearest ({need:.1f} GB): {mesh_text(nearest, config.parallel)}")
    else:
        estimate, reasons = best
        lines += [
            f"recommended: {mesh_text(estimate, config.parallel)}",
            compared_text(estimate, config.parallel),
            f"{estimate.total:.1f} s instead of {own.total:.1f} s, projected; because",
            *(f"  {reason}" for reason in reasons),
            *batch_lines(
                largest_batches(planner, estimate, hardware),
                image_tokens(family),
                compared=old_log_prob_mode(config) == "rollout",
            ),
        ]
    print("\n".join(lines))


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
    from dancegrpo_fast.config.kinds import trains_every_point
    from dancegrpo_fast.trees.candidates import visited
    from dancegrpo_fast.trees.chains import trained_at

    if trains_every_point(config.loss.kind):
        plan = trained_at(plan, config.loss.timestep_range)
    cost, prompts = plan.cost(), config.data.prompts_per_iteration
    # A guided forward evaluates the network for two texts.
    scale = prompts * (1 if config.model.guidance == 1 else 2)
    rows = [
        ("shared (what runs)", cost.rollout, cost.training),
        ("rollout shared only", cost.rollout, cost.training_unshared),
        ("nothing shared", cost.rollout_unshared, cost.training_unshared),
    ]
    if _searches(config):
        drawn = visited(config.rollout, plan.schedule).cost().rollout
        rows = [(rows[0][0], drawn, cost.training), (rows[1][0], drawn, cost.training_unshared)]
    lines = [
        f"network evaluations an iteration, {prompts} prompts"
        + (", guidance doubles each" if scale > prompts else ""),
        f"{'':<22}{'rollout':>9}{'training':>10}",
    ]
    lines += [f"{name:<22}{a * scale:>9}{b * scale:>10}" for name, a, b in rows]
    if _searches(config):
        lines.append(
            f"decoded and scored: {len(plan.leaves) * prompts} previews, which are trained on, and "
            f"{config.rollout.tree.trunks * prompts} finished samples"
        )
    each = "one backward each, of the rollout's forwards"
    if not config.loss.reuse_forwards:
        each = "one forward and backward each"
    lines.append(
        f"training: {each}, all trained steps, one update; "
        "on several processes a state is evaluated by each process that holds it"
    )
    return lines
