"""dancegrpo_fast: GRPO for diffusion and flow models.

This module is the drop-in surface: the ops, the transitions and the schedules for use in any
trainer. It imports torch and numpy only, and those at the first use of a name: the command line can
say what is missing where they are not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo_fast.ops import (
        NFT_METRICS,
        POLICY_METRICS,
        ForwardLoss,
        PolicyLoss,
        SampledTransition,
        awm_loss,
        awm_weighting,
        nft_loss,
        policy_loss,
        sample_transition,
        transition_log_prob,
        transition_mean,
        x0_estimate,
    )
    from dancegrpo_fast.ops.noise import (
        DrawKey,
        NoiseKey,
        add_normal_,
        keys_table,
        normal,
        normal_batch,
    )
    from dancegrpo_fast.schedules import Schedule, dance_schedule, from_scheduler, from_sigmas
    from dancegrpo_fast.transitions import (
        Transition,
        coefficient_table,
        dpmpp_2m,
        transition,
        x0_step,
    )

__version__ = "0.1.0"

__all__ = [
    "NFT_METRICS",
    "POLICY_METRICS",
    "DrawKey",
    "ForwardLoss",
    "NoiseKey",
    "PolicyLoss",
    "SampledTransition",
    "Schedule",
    "Transition",
    "add_normal_",
    "awm_loss",
    "awm_weighting",
    "coefficient_table",
    "dance_schedule",
    "dpmpp_2m",
    "from_scheduler",
    "from_sigmas",
    "keys_table",
    "nft_loss",
    "normal",
    "normal_batch",
    "policy_loss",
    "sample_transition",
    "transition",
    "transition_log_prob",
    "transition_mean",
    "x0_estimate",
    "x0_step",
]

# Where the names live that are not in `ops`.
_HOMES = {
    "ops.noise": {"DrawKey", "NoiseKey", "add_normal_", "keys_table", "normal", "normal_batch"},
    "schedules": {"Schedule", "dance_schedule", "from_scheduler", "from_sigmas"},
    "transitions": {"Transition", "coefficient_table", "dpmpp_2m", "transition", "x0_step"},
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "ops")
    globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)  # The next use is direct.
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
