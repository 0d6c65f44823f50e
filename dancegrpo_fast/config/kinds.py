"""What the kinds of loss read of a recipe, and what they cannot do.

A part of `agreement`, which explains how checks read values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_RATIO = ("policy_gradient",)
_FORWARD = ("nft", "awm")
_REWARD = ("refl", "draft")
_SCORED = _RATIO + _FORWARD  # Kinds that weigh samples by advantages.

_READ_BY: dict[str, tuple[str, ...]] = {
    "data.skip_zero_variance": _SCORED,
    "rollout.exact_density": _RATIO,
    "rollout.train_last": _RATIO,
    "rollout.solver": _FORWARD,
    **{
        f"advantage.{name}": _SCORED
        for name in (
            "std", "eps", "scope", "combine", "clip", "zero_variance", "batch_normalise",
            "best_of_n", "keep", "running_window",
        )
    },
    "advantage.credit": _RATIO,
    "loss.clip_range": (*_RATIO, "awm"),
    "loss.kl_weight": _SCORED,
    "loss.kl": _RATIO,
    "loss.kl_target": _SCORED,
    "loss.old_log_prob": (*_RATIO, "awm"),
    "loss.max_log_prob_gap": _RATIO,
    "loss.updates": _SCORED,
    "loss.timestep_fraction": _SCORED,
    "loss.timesteps": _SCORED,
    "loss.timestep_scope": _SCORED,
    "loss.timestep_weights": _RATIO,
    "loss.ratio_norm": _RATIO,
    "loss.beta": ("nft",),
    "loss.old_decay_rate": _FORWARD,
    "loss.old_decay_start": _FORWARD,
    "loss.old_decay_limit": _FORWARD,
    "loss.old_weight": ("awm",),
    "loss.form": ("awm",),
    "loss.weighting": ("awm",),
    "loss.timestep_range": _FORWARD,
    "loss.gradient_from": _REWARD,
    "loss.reward_limit": _REWARD,
}  # fmt: skip
ONLY_WITH_KIND = tuple((path, "loss.kind", kinds) for path, kinds in _READ_BY.items())
"""(setting, its selector, the choices that read it), as `agreement` has them for other fields."""

Get = Callable[[str], Any]
Disagreement = tuple[str, str]  # dotted path, reason


def trains_every_point(kind: str) -> bool:
    """Whether a kind of loss trains at every point of the grid, the last step's too."""
    return kind in _FORWARD


def needs_group(kind: str) -> bool:
    """Whether a kind of loss compares samples with each other."""
    return kind in _SCORED


def steered_kl(get: Get) -> Iterator[Disagreement]:
    """`loss.kl_target` and its settings."""
    target, (low, high) = get("loss.kl_target"), get("loss.kl_range")
    if low > high:
        yield "loss.kl_range", "must be [least, greatest]"
    if target is None:
        still = {"kl_range": (0.0001, 1.0), "kl_horizon": 100.0, "kl_smoothing": 0.2}
        for name, default in still.items():
            value = get(f"loss.{name}")
            if (tuple(value) if isinstance(value, list) else value) != default:
                yield f"loss.{name}", "has no effect without loss.kl_target; give that a KL"
    elif get("loss.kl_weight") == 0:
        yield "loss.kl_target", "needs loss.kl_weight above 0, from where the weight is steered"
    elif low <= high and not low <= get("loss.kl_weight") <= high:
        reason = "with loss.kl_target it is where the weight begins"
        yield "loss.kl_weight", f"{reason}: must lie in loss.kl_range = [{low}, {high}]"


def fits_kind(get: Get) -> Iterator[Disagreement]:
    """What samples a kind of loss can be trained on."""
    kind, level, solver = get("loss.kind"), get("rollout.noise_level"), get("rollout.solver")
    if kind in _RATIO:
        if level == 0:
            other = "nft, awm, refl or draft"
            yield "rollout.noise_level", f"a policy gradient needs noise; or use loss.kind {other}"
        return
    if get("rollout.tree.kind") != "independent_roots":
        yield "rollout.tree.kind", f"loss.kind {kind} draws single chains; use independent_roots"
    if get("parallel.engine") == "deepspeed":
        yield "parallel.engine", f"not verified with loss.kind {kind}; use fsdp or ddp"
    if solver == "multistep" and level > 0:
        yield "rollout.solver", "is deterministic; set rollout.noise_level to 0, or use euler"


def forward_process(get: Get) -> Iterator[Disagreement]:
    """DiffusionNFT and AWM."""
    kind, steps, span = get("loss.kind"), get("rollout.steps"), get("loss.timestep_range")
    if kind not in _FORWARD:
        return
    if get("model.family") == "sd":
        yield "loss.kind", "mixes samples with noise as flow models do, and family sd is none"
    for name in ("guidance", "guidance_2"):
        if get(f"model.{name}") not in (None, 1):
            yield f"model.{name}", f"loss.kind {kind} trains the unguided velocity; use 1.0"
    if span is not None and not span[0] < span[1] <= steps:
        yield "loss.timestep_range", f"must be [first, end) inside [0, {steps}]"
    chosen = get("loss.timesteps")
    if span is not None and isinstance(chosen, list):
        yield "loss.timestep_range", "has no effect beside a list of timesteps; use null"
    if kind == "nft" and get("advantage.combine") == "loss":
        yield "advantage.combine", "nft turns one advantage into a probability; use advantage"
    if kind == "awm" and get("loss.old_log_prob") == "rollout":
        yield "loss.old_log_prob", "a rollout knows no log-prob of awm; use recompute or on_policy"
    if kind == "awm" and get("loss.old_weight") == 0:
        for name, still in (("rate", 0.001), ("start", 0), ("limit", 0.5)):
            if get(f"loss.old_decay_{name}") != still:
                yield f"loss.old_decay_{name}", "has no effect with loss.old_weight = 0"


def reward_gradient(get: Get) -> Iterator[Disagreement]:
    """ReFL and DRaFT."""
    kind, steps, span = get("loss.kind"), get("rollout.steps"), get("loss.gradient_from")
    if kind not in _REWARD:
        return
    if span is not None and not span[0] < span[1] <= steps:
        yield "loss.gradient_from", f"must be [first, end) inside [0, {steps}]"
    if get("parallel.sp") > 1:
        yield "parallel.sp", f"not verified with loss.kind {kind}; use 1"
    if kind == "refl" and get("rollout.final") != "x0":
        yield "rollout.final", "refl decodes the clean estimate; use x0"
