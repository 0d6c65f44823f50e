"""Published settings by the name of their algorithm: `algorithm: flow_grpo_fast` in a recipe.

A preset stands beneath the recipe: what the recipe gives wins, field by field. Where the recipe
makes another choice that leaves a setting of the preset without effect (another kind of tree), that
setting is dropped. Model, data, rewards and batch sizes are the recipe's own.

Settings are those of the papers' or repositories' main configuration; the recipes folder names the
places where ours differs. Steps, groups and learning rates belong to the model they were published
for, which is named beside each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Values = dict[str, Any]

_FLOW_GRPO: Values = {  # Stable Diffusion 3.5 medium, LoRA.
    "rollout": {
        "group_size": 24, "steps": 10, "dynamics": "flow", "noise_level": 0.7, "final": "sample",
        "tree": {"kind": "independent_roots"},
    },
    "advantage": {"std": "biased", "eps": 1e-4, "scope": "batch_std", "clip": 5.0},
    "loss": {"clip_range": 1e-4, "updates": 2, "kl_weight": 0.04, "kl": "flow_image"},
    "policy": {"train": "lora", "lora_rank": 32, "lora_alpha": 64.0, "ema_decay": 0.9},
    "optimizer": {"learning_rate": 3e-4, "weight_decay": 1e-4, "max_grad_norm": 1.0},
}  # fmt: skip
_MIX_GRPO: Values = {  # FLUX.1-dev, all weights.
    "rollout": {
        "group_size": 12, "steps": 25, "schedule": "dance", "shift": 3.0, "dynamics": "flow",
        "noise_level": 0.7, "final": "ode",
        "tree": {
            "kind": "window", "window_size": 4, "window_order": "progressive",
            "window_iterations": 25,
        },
    },
    "loss": {"clip_range": 1e-4, "updates": 4, "old_log_prob": "rollout"},
    "optimizer": {"learning_rate": 1e-5, "weight_decay": 1e-4, "max_grad_norm": 1.0},
}  # fmt: skip
_DDIM: Values = {  # Stable Diffusion 1.5, LoRA.
    "rollout": {
        "steps": 50, "dynamics": "ddim", "noise_level": 1.0, "tree": {"kind": "independent_roots"},
    },
    "policy": {"train": "lora", "lora_rank": 4, "lora_alpha": 4.0},
}  # fmt: skip


def _changed(base: Values, changes: Values) -> Values:
    """`base` with some values replaced; None takes a key away."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _changed(merged[key], value)
        else:
            merged[key] = value
    return merged


_NO_KL: Values = {"kl_weight": None, "kl": None}
PRESETS: dict[str, Values] = {
    "dance_grpo": {  # arXiv 2505.07818; FLUX.1-dev, all weights.
        "rollout": {
            "group_size": 12, "steps": 16, "schedule": "dance", "shift": 3.0, "dynamics": "dance",
            "noise_level": 0.3, "final": "x0", "tree": {"kind": "shared_root"},
        },
        "advantage": {"std": "unbiased", "eps": 1e-8, "scope": "group", "clip": 5.0},
        "loss": {
            "clip_range": 1e-4, "timestep_fraction": 0.6, "updates": 3, "old_log_prob": "rollout",
        },
        "optimizer": {"learning_rate": 1e-5, "weight_decay": 1e-4, "max_grad_norm": 1.0},
    },
    "flow_grpo": _FLOW_GRPO,  # arXiv 2505.05470.
    "flow_grpo_fast": _changed(
        _FLOW_GRPO,
        {
            "rollout": {
                "noise_level": 0.8, "final": "ode",
                "tree": {"kind": "window", "window_size": 2, "window_range": [0, 6]},
            },
            "loss": {"clip_range": 1e-5, **_NO_KL},
        },
    ),
    "flow_cps": _changed(  # FlowCPS' repository, without guidance.
        _FLOW_GRPO,
        {
            "rollout": {
                "dynamics": "cps", "noise_level": 0.8, "final": "ode",
                "tree": {"kind": "window", "window_size": 3, "window_range": [0, 5]},
            },
            "loss": {"clip_range": 1e-5, **_NO_KL},
        },
    ),
    # arXiv 2510.22319. The clip range is ours: the published one could not be read.
    "grpo_guard": _changed(
        _FLOW_GRPO,
        {
            "loss": {
                "clip_range": 2e-6, "ratio_norm": True, "timestep_weights": "inverse_dt", **_NO_KL,
            }
        },
    ),
    "mix_grpo": _MIX_GRPO,  # arXiv 2507.21802.
    "mix_grpo_flash": _changed(
        _MIX_GRPO, {"rollout": {"tree": {"window_iterations": 20, "flash": 0.4}}}
    ),
    "tempflow_grpo": _changed(  # Its repository; K = 6 branches of 4 trunks at every step.
        _FLOW_GRPO,
        {
            "rollout": {
                "group_size": 216, "final": "ode",
                "tree": {
                    "kind": "trunk_with_branches", "trunks": 4, "branches": 6,
                    "branch_steps": [0, 1, 2, 3, 4, 5, 6, 7, 8],
                },
            },
            "advantage": {"scope": None, "credit": "siblings"},
            "loss": {"timestep_weights": "std", "kl_weight": 0.001, "kl": "exact"},
        },
    ),
    "branch_grpo": {  # Its repository; FLUX.1-dev, all weights.
        "rollout": {
            "group_size": 16, "steps": 20, "schedule": "dance", "shift": 3.0, "dynamics": "dance",
            "noise_level": 0.3,
            "tree": {
                "kind": "branch_points", "branch_steps": [0, 3, 6, 9], "branches": 2,
                "noise_scale": 4.0,
            },
        },
        "advantage": {"credit": "depth"},
        "loss": {"clip_range": 1e-3},
        "optimizer": {"learning_rate": 1e-5, "weight_decay": 1e-4, "max_grad_norm": 1.0},
    },
    "ddpo": _changed(  # arXiv 2305.13301, ddpo-pytorch.
        _DDIM,
        {
            "rollout": {"group_size": 2},
            "advantage": {"scope": "running", "running_window": 32, "std": "biased", "eps": 1e-6},
            "loss": {"clip_range": 1e-4, "updates": 2},
            "optimizer": {"learning_rate": 3e-4, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        },
    ),
    "dpok": _changed(  # arXiv 2305.16381, without its value network.
        _DDIM,
        {
            "rollout": {"group_size": 10},
            "loss": {"clip_range": 1e-4, "kl_weight": 1e-4, "kl": "v", "updates": 5},
            "optimizer": {"learning_rate": 1e-5, "max_grad_norm": 0.1},
        },
    ),
    "diffusion_nft": _changed(  # arXiv 2509.16117; old policy's schedule: type 1.
        _FLOW_GRPO,
        {
            "rollout": {"dynamics": None, "noise_level": 0, "final": None, "solver": "multistep"},
            "loss": {
                "kind": "nft", "clip_range": None, "kl": None, "kl_weight": 1e-4, "updates": 1,
                "timestep_fraction": 0.99, "beta": 1.0, "old_decay_rate": 0.001,
                "old_decay_start": 0, "old_decay_limit": 0.5,
            },
        },
    ),
    "awm": _changed(  # arXiv 2509.25050; its settings for PickScore.
        _FLOW_GRPO,
        {
            "rollout": {
                "dynamics": None, "noise_level": 0, "final": None, "solver": "multistep",
                "steps": 14,
            },
            "loss": {
                "kind": "awm", "clip_range": 1.0, "kl": None, "kl_weight": 1e-4, "updates": 1,
                "timestep_range": [0, 12], "timestep_fraction": 0.5, "form": "ghuber",
                "weighting": "t", "old_weight": 1.0, "old_decay_rate": 0.001,
                "old_decay_start": 0, "old_decay_limit": 0.3,
            },
            "policy": {"ema_decay": 0.99},
        },
    ),
    "refl": {  # ImageReward, arXiv 2304.05977; Stable Diffusion 1.4, all weights.
        "rollout": {
            "group_size": 1, "steps": 40, "dynamics": "ddim", "noise_level": 0, "final": "x0",
            "tree": {"kind": "independent_roots"},
        },
        "loss": {"kind": "refl", "gradient_from": [30, 40], "reward_limit": 2.0},
        "optimizer": {"learning_rate": 1e-5},
    },
    "draft": _changed(  # DRaFT-1, arXiv 2309.17400, with AlignProp's sampler and learning rate.
        _DDIM,
        {
            "rollout": {"group_size": 1},
            "loss": {"kind": "draft", "gradient_from": [49, 50]},
            "optimizer": {"learning_rate": 1e-3},
        },
    ),
}  # fmt: skip

Rule = tuple[str, str, tuple[str, ...]]


def known_algorithm(name: str | None) -> str | None:
    """The name of a preset; for a field's validator."""
    if name is None or name in PRESETS:
        return name
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"must be one of {', '.join(PRESETS)}, or null{hint}")


def with_preset(raw: Any, rules: Sequence[Rule]) -> tuple[Any, set[str]]:
    """A recipe over the preset that it names, and the paths that the preset set.

    Args:
        raw: The recipe as it was read; one that names no preset is returned as it is.
        rules: (setting, its selector, the choices that read it): what would have no effect with the
            recipe's choices is left out.
    """
    name = raw.get("algorithm") if isinstance(raw, Mapping) else None
    if not isinstance(name, str) or name not in PRESETS:
        return raw, set()
    merged = _beneath(raw, PRESETS[name])
    from_preset = {p for p, _ in leaves(PRESETS[name]) if _at(raw, p) is _MISSING}
    for path, selector, choices in rules:
        choice = _at(merged, selector)
        if path in from_preset and choice is not _MISSING and choice not in choices:
            *parents, key = path.split(".")
            del _at(merged, ".".join(parents))[key]
            from_preset.discard(path)
    return merged, from_preset


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything below."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def preset_lines(config: Any) -> list[str]:
    """What the preset of a checked recipe set, a line each, and what the recipe has instead."""
    lines = []
    for path, value in leaves(PRESETS[config.algorithm] if config.algorithm else {}):
        now: Any = config
        for key in path.split("."):
            now = getattr(now, key)
        same = (list(now) if isinstance(now, tuple) else now) == value
        lines.append(f"{path} = {now}" + ("" if same else f" (preset: {value})"))
    return lines


_MISSING = object()


def _beneath(given: Mapping[str, Any], preset: Values) -> Values:
    merged = dict(given)
    for key, value in preset.items():
        if not isinstance(value, dict):
            merged.setdefault(key, value)
            continue
        own = merged.get(key, {})
        merged[key] = _beneath(own, value) if isinstance(own, Mapping) else own
    return merged


def _at(values: Any, path: str) -> Any:
    """The value at a dotted path; a section that is no mapping was given whole, by its caller."""
    for key in path.split("."):
        if values is _MISSING or not isinstance(values, Mapping):
            return values
        values = values.get(key, _MISSING)
    return values
