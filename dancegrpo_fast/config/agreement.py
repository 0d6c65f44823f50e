"""Which fields of a recipe must fit each other.

Each check reads values by dotted path, so that the loader can run it on a recipe whose other fields
are still wrong: a check that meets an invalid field is skipped, the others still speak.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dancegrpo_fast.config import kinds, unread
from dancegrpo_fast.config.kinds import Disagreement, Get


class NotValid(Exception):
    """A check asked for a field that has an error of its own."""


def disagreements(get: Get, default: Get) -> list[Disagreement]:
    """Returns every (path, reason) where fields that are valid alone contradict each other.

    Args:
        get: Value at a dotted path; raises NotValid where the field has an error of its own.
        default: Default at a dotted path.
    """
    found: list[Disagreement] = _without_effect(get, default)
    checks = (
        _dynamics, _last_step, _window, _branches, _group, _credit, _updates, _timesteps,
        _search, kinds.fits_kind, kinds.steered_kl, kinds.forward_process,
        kinds.reward_gradient, _reused_forwards, _pool_dtype, _suffix, *unread.CHECKS,
    )  # fmt: skip
    for check in checks:
        try:
            found.extend(check(get))
        except NotValid:
            continue  # that field's own line is reported; this check would only guess
    return found


def show(value: Any) -> str:
    """Returns a value as a recipe spells it, cut to one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Above0(tuple[str, ...]):
    """The choices of a selector that is a number: those above 0."""

    def __contains__(self, value: object) -> bool:
        return not isinstance(value, (int, float)) or value > 0


_TREE = "rollout.tree"
_WINDOWED = ("window", "branch_points")
_BRANCHED = ("branch_points", "trunk_with_branches", "search")
_ONE_STEP = ("trunk_with_branches", "search")  # Of each sample one is trained.
_ORDERED = ("progressive", "decaying", "exponential")
ONLY_WITH: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # setting, its selector, the choices that read it
    ("rollout.shift", "rollout.schedule", ("dance",)),
    ("rollout.final", "rollout.solver", ("euler",)),
    ("rollout.exact_density", "rollout.dynamics", ("cps",)),
    ("rollout.redraw", "loss.kind", ("policy_gradient",)),
    ("rollout.suffix_every", f"{_TREE}.kind", ("window", "trunk_with_branches")),
    ("loss.reuse_forwards", "loss.kind", ("policy_gradient",)),
    (f"{_TREE}.window_size", f"{_TREE}.kind", _WINDOWED),
    (f"{_TREE}.window_start", f"{_TREE}.kind", _WINDOWED),
    (f"{_TREE}.window_range", f"{_TREE}.kind", _WINDOWED),
    (f"{_TREE}.window_order", f"{_TREE}.kind", _WINDOWED),
    (f"{_TREE}.window_iterations", f"{_TREE}.kind", _WINDOWED),
    (f"{_TREE}.window_stride", f"{_TREE}.window_order", _ORDERED),
    (f"{_TREE}.window_decay", f"{_TREE}.window_order", ("exponential",)),
    (f"{_TREE}.window_decay_from", f"{_TREE}.window_order", ("exponential",)),
    (f"{_TREE}.flash", f"{_TREE}.kind", ("window",)),
    (f"{_TREE}.noise_scale", f"{_TREE}.kind", ("branch_points",)),
    (f"{_TREE}.branch_steps", f"{_TREE}.kind", _BRANCHED),
    (f"{_TREE}.branches", f"{_TREE}.kind", _BRANCHED),
    (f"{_TREE}.trunks", f"{_TREE}.kind", ("trunk_with_branches", "search")),
    ("advantage.batch_normalise", "advantage.credit", ("leaf",)),
    ("advantage.running_window", "advantage.scope", ("running",)),
    ("loss.timestep_scope", "loss.timesteps", ("random",)),
    ("loss.kl", "loss.kl_weight", _Above0(["a number above 0"])),
    ("loss.max_log_prob_gap", "loss.old_log_prob", ("auto", "on_policy", "recompute")),
    ("parallel.dp_replicate", "parallel.engine", ("fsdp",)),
    ("parallel.dp_shard", "parallel.engine", ("fsdp",)),
    ("parallel.gather_rollout", "parallel.engine", ("fsdp",)),
    ("parallel.defer_reduction", "parallel.engine", ("fsdp",)),
    ("parallel.zero_stage", "parallel.engine", ("deepspeed",)),
    ("parallel.offload_optimizer", "parallel.engine", ("deepspeed",)),
    ("policy.lora_rank", "policy.train", ("lora",)),
    ("policy.lora_alpha", "policy.train", ("lora",)),
    ("policy.lora_targets", "policy.train", ("lora",)),
    *kinds.ONLY_WITH_KIND,
)


def _without_effect(get: Get, default: Get) -> list[Disagreement]:
    """Settings that the chosen kind would ignore: nothing in a recipe may do nothing."""
    found = []
    for path, selector, choices in ONLY_WITH:
        try:
            value, choice = get(path), get(selector)
        except NotValid:
            continue
        if choice not in choices and value != default(path):
            way_out = f"set that to {' or '.join(choices)}, or leave it at {show(default(path))}"
            found.append((path, f"has no effect with {selector} = {show(choice)}; {way_out}"))
    return found


def _trained_steps(get: Get) -> int:
    """Steps 0 .. n - 1 can be trained; of ratios the last of the schedule only with train_last."""
    whole = get("rollout.train_last") or kinds.trains_every_point(get("loss.kind"))
    return get("rollout.steps") - (0 if whole else 1)


_DDIM, _DDIM_FAMILIES = ("ddim", "vp"), ("sd",)  # The others predict a flow's velocity.


def _dynamics(get: Get) -> Iterator[Disagreement]:
    dynamics, family = get("rollout.dynamics"), get("model.family")
    if (family in _DDIM_FAMILIES) != (dynamics in _DDIM):
        fitting = "ddim or vp" if family in _DDIM_FAMILIES else "dance, flow, flow_wan or cps"
        yield "rollout.dynamics", f"model.family = {show(family)} needs {fitting}"
        return
    if dynamics == "ddim" and get("rollout.noise_level") > 1:
        yield "rollout.noise_level", "ddim takes a level (eta) in (0, 1], such as 1.0"
    if dynamics in _DDIM and get("rollout.schedule") == "dance":
        yield "rollout.schedule", f"is a flow's grid; with dynamics {dynamics} use diffusers"
    if dynamics in (*_DDIM, "cps") and get("loss.kl") == "flow_image":
        yield "loss.kl", "leaves out the step length of a flow's SDE noise; use exact"


def _last_step(get: Get) -> Iterator[Disagreement]:
    if get("rollout.schedule") == "dance" and get("rollout.shift") is None:
        yield "rollout.shift", "schedule dance needs a shift, such as 3.0; 1.0 leaves it unshifted"
    if get("rollout.dynamics") == "cps" and get("rollout.noise_level") > 1:
        yield "rollout.noise_level", "cps takes a level in (0, 1], such as 0.7"
    if get("rollout.train_last") and get("rollout.final") != "sample":
        yield "rollout.train_last", "needs rollout.final = sample (the other ends have no density)"
    elif get("rollout.train_last") and get("rollout.dynamics") == "cps":
        yield "rollout.train_last", "cps adds no noise in its last step; set it to false"
    if _trained_steps(get) < 1:
        yield "rollout.steps", "the last step is not trained, so nothing is; take 2 or more steps"


def _window(get: Get) -> Iterator[Disagreement]:
    n = _trained_steps(get)
    kind = get(f"{_TREE}.kind")
    if kind not in _WINDOWED or n < 1:
        return
    size, start = get(f"{_TREE}.window_size"), get(f"{_TREE}.window_start")
    span = get(f"{_TREE}.window_range")
    if kind == "branch_points" and size is None:
        for name in ("window_start", "window_range"):
            if get(f"{_TREE}.{name}") is not None:
                yield f"{_TREE}.{name}", f"has no effect without {_TREE}.window_size"
        if get(f"{_TREE}.window_order") != "random" or get(f"{_TREE}.window_iterations") != 1:
            yield f"{_TREE}.window_size", "a moving window needs a size; or leave its fields out"
        return
    if start is not None:
        for name, still in (("window_order", "random"), ("window_iterations", 1)):
            if get(f"{_TREE}.{name}") != still:
                yield f"{_TREE}.{name}", "has no effect beside window_start, which stands still"
    if get(f"{_TREE}.flash") is not None and get("rollout.dynamics") in _DDIM:
        reason = "DPM-Solver++ is written for a flow's velocity here"
        yield f"{_TREE}.flash", f"{reason}; with dynamics {get('rollout.dynamics')} use null"
    scope = f"{n} of {get('rollout.steps')} steps can be trained"
    if size is None:
        yield f"{_TREE}.window_size", f"kind window needs a size from 1 to {n} ({scope})"
    elif size > n:
        yield f"{_TREE}.window_size", f"must be from 1 to {n} ({scope})"
    elif start is not None and start + size > n:
        yield f"{_TREE}.window_start", f"a window of {size} must start in 0 to {n - size} ({scope})"
    if start is not None and span is not None:
        yield f"{_TREE}.window_range", "has no effect beside window_start; set one of them to null"
    elif span is not None and not 0 <= span[0] < span[1] <= n:
        yield f"{_TREE}.window_range", f"must be [first, end) inside [0, {n}] ({scope})"
    elif span is not None and size is not None and span[1] - span[0] < size <= n:
        yield f"{_TREE}.window_range", f"must hold at least window_size = {size} steps"


def _branches(get: Get) -> Iterator[Disagreement]:
    kind, n = get(f"{_TREE}.kind"), _trained_steps(get)
    if kind not in _BRANCHED or n < 1:
        return
    steps, branches = get(f"{_TREE}.branch_steps"), get(f"{_TREE}.branches")
    if branches is None:
        yield f"{_TREE}.branches", f"kind {kind} needs the number of children, such as 4"
    if not steps:
        yield f"{_TREE}.branch_steps", f"kind {kind} needs a list of steps, such as [0]"
        return
    if list(steps) != sorted(set(steps)) or steps[-1] >= n:
        scope = f"{n} of {get('rollout.steps')} steps can be trained"
        yield f"{_TREE}.branch_steps", f"must ascend from 0 to at most {n - 1} ({scope})"
        return
    if branches is None:
        return
    trunks, size = get(f"{_TREE}.trunks"), get("rollout.group_size")
    if kind == "branch_points":
        leaves, formula = branches ** len(steps), f"branches ** steps = {branches} ** {len(steps)}"
    else:
        leaves = trunks * len(steps) * branches
        formula = f"trunks * steps * branches = {trunks} * {len(steps)} * {branches}"
    if size != leaves:
        yield "rollout.group_size", f"must be {leaves}, the leaves of this tree ({formula})"


def _group(get: Get) -> Iterator[Disagreement]:
    size, scope = get("rollout.group_size"), get("advantage.scope")
    kept = get("advantage.best_of_n")
    from_group = scope in ("group", "batch_std")  # Both take its mean.
    if size == 1 and from_group and kinds.needs_group(get("loss.kind")):
        reason = "one sample has no group to compare with; use 2 or more"
        yield "rollout.group_size", f"{reason}, or advantage.scope = batch or running"
    elif size == 1 and scope == "batch" and get("data.prompts_per_iteration") == 1:
        if kinds.needs_group(get("loss.kind")):
            reason = "one sample of one prompt has nothing in its iteration to compare with"
            yield "rollout.group_size", f"{reason}; use 2 or more, or more prompts"
    if kept is not None and kept >= size:
        yield "advantage.best_of_n", f"must be below rollout.group_size = {size}, or null for all"
    if kept is None and get("advantage.keep") != "extremes":
        yield "advantage.keep", "has no effect without advantage.best_of_n; give that a number"
    if kept is None and get("rollout.redraw"):
        yield "rollout.redraw", "needs advantage.best_of_n: without it all samples are trained"


def _credit(get: Get) -> Iterator[Disagreement]:
    credit, kind = get("advantage.credit"), get(f"{_TREE}.kind")
    if credit != "leaf" and get("advantage.scope") != "group":
        yield "advantage.scope", f"credit {credit} normalises inside one prompt's tree; use group"
    if credit != "siblings":
        return
    branches = get(f"{_TREE}.branches")
    if kind not in _BRANCHED:
        reason = f"needs {_TREE}.kind = trunk_with_branches, branch_points or search"
        yield "advantage.credit", f"{reason}; with {kind} use leaf or depth"
    elif branches is not None and branches < 3:
        reason = f"needs {_TREE}.branches of 3 or more, here {branches}"
        yield "advantage.credit", f"{reason} (two children only ever get +a and -a)"
    if kind != "branch_points":
        return
    unsplit = sorted(_first_steps(get) - set(get(f"{_TREE}.branch_steps")))
    if unsplit:
        reason = f"needs states that branch at the first trained step, which may be {unsplit[0]}"
        yield "advantage.credit", f"{reason}; add it to {_TREE}.branch_steps, or use leaf or depth"


def _first_steps(get: Get) -> set[int]:
    """The first trained step of `branch_points` in any iteration: a window moves."""
    size, start = get(f"{_TREE}.window_size"), get(f"{_TREE}.window_start")
    if size is None or start is not None:
        return {start or 0}
    low, high = get(f"{_TREE}.window_range") or (0, _trained_steps(get))
    drawn = get(f"{_TREE}.window_order") == "random"
    return set(range(low, high - size + 1, 1 if drawn else get(f"{_TREE}.window_stride")))


def _search(get: Get) -> Iterator[Disagreement]:
    """What a search of the rollout cannot do."""
    if get(f"{_TREE}.kind") != "search" or get("loss.kind") != "policy_gradient":
        return
    still: tuple[tuple[str, Any, str], ...] = (
        ("advantage.best_of_n", None, "samples would be previews of different steps"),
        ("rollout.redraw", False, "which candidate goes on is known only by its rewards"),
        ("rollout.chunk", None, "scores its candidates between the steps"),
        ("parallel.groups", "together", "each process searches whole trees"),
        ("loss.reuse_forwards", False, "candidates are drawn from evaluations without gradients"),
    )
    for path, value, reason in still:
        if get(path) != value:
            yield path, f"not with {_TREE}.kind = search: {reason}; use {show(value)}"
    if get("advantage.credit") != "siblings":
        reason = "candidates of one state are compared with each other"
        yield "advantage.credit", f"not with {_TREE}.kind = search: {reason}; use siblings"
    if get("rollout.final") == "sample":
        yield "rollout.final", f"not with {_TREE}.kind = search, which ends without noise; use x0"
    if get("loss.ratio_norm") and get("loss.old_log_prob") == "rollout":
        reason = "ratio_norm needs the rollout's outputs, which a search does not keep"
        yield "loss.old_log_prob", f"{reason}; use recompute, or ratio_norm = false"


def _updates(get: Get) -> Iterator[Disagreement]:
    updates, source = get("loss.updates"), get("loss.old_log_prob")
    if updates > 1 and source == "on_policy":
        reason = f"with loss.updates = {updates} the later updates are off-policy"
        yield "loss.old_log_prob", f"{reason}; use recompute (or auto), or updates = 1"
    samples = get("advantage.best_of_n") or get("rollout.group_size")
    if updates > samples:
        yield "loss.updates", f"a group has {samples} trained samples, so at most {samples} updates"


def _reused_forwards(get: Get) -> Iterator[Disagreement]:
    if not get("loss.reuse_forwards") or get("loss.kind") != "policy_gradient":
        return
    if get("loss.updates") > 1:
        yield "loss.updates", "later updates need forwards of their own, reuse_forwards has none"
    if get("loss.old_log_prob") not in ("auto", "on_policy"):
        yield "loss.old_log_prob", "with reuse_forwards both log-probs are one; use on_policy"
    size = get("rollout.batch_size")
    if get("loss.micro_batch_size") != size:
        reason = "with reuse_forwards the rollout's forwards are differentiated"
        yield "loss.micro_batch_size", f"{reason}; set it to rollout.batch_size = {size}"
    if get("parallel.offload_activations"):
        reason = "with reuse_forwards every kept forward would take a copy of the weights along"
        yield "parallel.offload_activations", f"{reason}; use parallel.checkpointing"
    if get("parallel.compile") == "graphs":
        reason = "with reuse_forwards many outputs wait, and a graph's replay overwrites its last"
        yield "parallel.compile", f"{reason}; use true"
    if get("parallel.sp") > 1:
        yield "parallel.sp", "not verified with loss.reuse_forwards; use one of the two"


def _pool_dtype(get: Get) -> Iterator[Disagreement]:
    dtype = get("rollout.pool_dtype")
    if dtype is None:
        return
    if not get("rollout.redraw"):
        reason = "no sample of it may be trained on; it needs rollout.redraw"
        yield "rollout.pool_dtype", f"{reason} (and advantage.best_of_n), or leave it at null"
    if dtype == get("model.dtype"):
        yield "rollout.pool_dtype", "has no effect: it is model.dtype; use null, or float8_e4m3"
    if get("parallel.compile"):
        yield "rollout.pool_dtype", "not verified with parallel.compile; use one of the two"
    if get("parallel.sp") > 1:
        yield "rollout.pool_dtype", "not verified with parallel.sp above 1; use one of the two"
    if get("parallel.engine") == "deepspeed":
        yield "rollout.pool_dtype", "not verified with parallel.engine = deepspeed; use fsdp or ddp"


def _suffix(get: Get) -> Iterator[Disagreement]:
    kind = get(f"{_TREE}.kind")
    if get("rollout.suffix_every") == 1 or kind not in ("window", "trunk_with_branches"):
        return
    if kind == "window":
        span, size = get(f"{_TREE}.window_range"), get(f"{_TREE}.window_size")
        start = get(f"{_TREE}.window_start")
        if start is None:
            start = span[0] if span is not None else 0
        last, share = start + (size or 0), get(f"{_TREE}.flash")
    else:
        last, share = min(get(f"{_TREE}.branch_steps"), default=0) + 1, None
    left = get("rollout.steps") - last
    left = left if share is None else max(1, int(left * share))
    if left < 2:
        reason = f"has no effect: after the trained steps {left} of {get('rollout.steps')} are left"
        yield "rollout.suffix_every", f"{reason}, and the first is always evaluated; use 1"


def _spread_of_steps(get: Get) -> int:
    """How many steps of a prompt's tree are trained in an iteration."""
    kind, span = get(f"{_TREE}.kind"), get("loss.timestep_range")
    if kind in _ONE_STEP:
        return len(get(f"{_TREE}.branch_steps"))
    if span is not None:
        return span[1] - span[0]
    size = get(f"{_TREE}.window_size") if kind in _WINDOWED else None
    return _trained_steps(get) if size is None else size


def _timesteps(get: Get) -> Iterator[Disagreement]:
    n, dynamics = _trained_steps(get), get("rollout.dynamics")
    scope = f"{n} of {get('rollout.steps')} steps can be trained"
    chosen, whole = get("loss.timesteps"), get("loss.timestep_fraction") == 1
    if isinstance(chosen, list):
        kind = get(f"{_TREE}.kind")
        if kind in ("window", "trunk_with_branches", "search"):
            field = "window_start" if kind == "window" else "branch_steps"
            yield "loss.timesteps", f"kind {kind} trains the steps of {_TREE}.{field}; use that"
        elif chosen[-1] >= n:
            yield "loss.timesteps", f"must be steps from 0 to {n - 1} ({scope})"
        elif get(f"{_TREE}.window_size") is not None:
            yield "loss.timesteps", f"{_TREE}.window_size chooses the trained steps already"
        if not whole:
            yield "loss.timestep_fraction", "has no effect beside a list of timesteps; set it to 1"
    elif whole and chosen == "first":
        yield "loss.timesteps", "with timestep_fraction = 1 every step is used; lower that"
    elif whole and get("loss.timestep_scope") == "group":
        yield "loss.timestep_scope", "with timestep_fraction = 1 every step is used; lower that"
    elif not whole and _spread_of_steps(get) == 1:
        yield "loss.timestep_fraction", "has no effect where one step is trained; use 1"
    elif not whole and get(f"{_TREE}.kind") in _ONE_STEP and get("loss.timestep_scope") == "sample":
        reason = f"of kind {get(f'{_TREE}.kind')} each sample has one trained step"
        yield "loss.timestep_fraction", f"{reason}; use 1, or loss.timestep_scope = group"
    weights = get("loss.timestep_weights")
    if isinstance(weights, list) and len(weights) != n:
        yield "loss.timestep_weights", f"has {len(weights)} values: must be {n} ({scope})"
    if weights == "inverse_dt" and dynamics in _DDIM:
        yield "loss.timestep_weights", f"dynamics {dynamics} has no step length; use std or uniform"
    if get("loss.ratio_norm") and dynamics == "cps" and not get("rollout.exact_density"):
        reason = "needs a Gaussian log-prob, which cps has with rollout.exact_density = true"
        yield "loss.ratio_norm", f"{reason}; or leave it at false"
