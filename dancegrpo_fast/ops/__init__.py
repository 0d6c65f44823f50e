"""The ops: noise, transitions and losses on plain tensors. Needs torch and numpy only."""

from dancegrpo_fast.ops.forward_loss import (
    NFT_METRICS,
    ForwardLoss,
    awm_loss,
    awm_weighting,
    nft_loss,
)
from dancegrpo_fast.ops.packing import implementations
from dancegrpo_fast.ops.packing import resolve as selected
from dancegrpo_fast.ops.policy_loss import POLICY_METRICS, PolicyLoss, policy_loss
from dancegrpo_fast.ops.transition import (
    SampledTransition,
    sample_transition,
    transition_log_prob,
    transition_mean,
    x0_estimate,
)

__all__ = [
    "NFT_METRICS",
    "POLICY_METRICS",
    "ForwardLoss",
    "PolicyLoss",
    "SampledTransition",
    "awm_loss",
    "awm_weighting",
    "implementations",
    "nft_loss",
    "policy_loss",
    "sample_transition",
    "selected",
    "transition_log_prob",
    "transition_mean",
    "x0_estimate",
]
