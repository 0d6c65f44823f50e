"""The ops: noise, transitions and losses on plain tensors. Needs torch and numpy only."""

from dancegrpo_fast.ops.policy_loss import POLICY_METRICS, PolicyLoss, policy_loss
from dancegrpo_fast.ops.transition import SampledTransition, sample_transition, transition_log_prob

__all__ = [
    "POLICY_METRICS",
    "PolicyLoss",
    "SampledTransition",
    "policy_loss",
    "sample_transition",
    "transition_log_prob",
]
