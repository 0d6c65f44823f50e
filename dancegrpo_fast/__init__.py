"""dancegrpo_fast: GRPO for diffusion and flow models.

This module is the drop-in surface: the ops, the transitions and the schedules for use in any
trainer. It imports torch and numpy only.
"""

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
