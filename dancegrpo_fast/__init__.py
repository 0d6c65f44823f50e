"""dancegrpo_fast: GRPO for diffusion and flow models.

This module is the drop-in surface: the ops, the transitions and the schedules for use in any
trainer. It imports torch and numpy only.
"""

from dancegrpo_fast.ops import (
    POLICY_METRICS,
    PolicyLoss,
    SampledTransition,
    policy_loss,
    sample_transition,
    transition_log_prob,
)
from dancegrpo_fast.ops.noise import DrawKey, NoiseKey, keys_table, normal, normal_batch
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
    "POLICY_METRICS",
    "DrawKey",
    "NoiseKey",
    "PolicyLoss",
    "SampledTransition",
    "Schedule",
    "Transition",
    "coefficient_table",
    "dance_schedule",
    "dpmpp_2m",
    "from_scheduler",
    "from_sigmas",
    "keys_table",
    "normal",
    "normal_batch",
    "policy_loss",
    "sample_transition",
    "transition",
    "transition_log_prob",
    "x0_step",
]
