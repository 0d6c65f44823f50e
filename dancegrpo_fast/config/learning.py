"""Sections of a recipe on what is learned: rewards, advantages, loss, policy, optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from dancegrpo_fast.config.section import Section
from dancegrpo_fast.config.values import check_timestep_weights, check_timesteps


class RewardConfig(Section):
    name: str
    """A reward of ours, or `path/to/file.py:ClassName` for your own."""
    weight: float = 1.0
    """Weight in the advantage; negative minimises, 0 only logs."""
    path: str | None = None
    """Folder or hub id of its weights; null is the reward's own."""
    options: dict[str, Any] = {}
    """Further settings of the reward, named in docs/rewards.md."""
    frames: list[int] | None = Field(default=None, min_length=1)
    """Frames of a video that it sees, negative from the end; null is all."""
    win_rate: Literal["balanced", "both"] | None = None
    """Turn it into the share of the prompt's other samples that a sample beats; null does not."""
    threshold: float | None = None
    """Turn it into 1 above this value and 0 elsewhere; null does not."""
    offload: bool = False
    """Keep its weights in CPU memory outside scoring."""
    max_failed: float = Field(default=1.0, ge=0, le=1)
    """Share of an iteration's samples without a score beyond which the run saves and stops; it
    always does if all have none."""


class AdvantageConfig(Section):
    std: Literal["unbiased", "biased"] = "unbiased"
    """Standard deviation over n - 1 or n rewards."""
    eps: float = Field(default=1e-8, ge=0)
    """Added to the standard deviation."""
    scope: Literal["group", "batch", "batch_std", "running"] = "group"
    """Rewards that are normalised together: a prompt's group, the iteration, a prompt's history;
    batch_std takes the mean from the group and the deviation from the iteration (Flow-GRPO)."""
    combine: Literal["advantage", "loss", "reward"] = "advantage"
    """Where several rewards meet: summed advantages, separately clipped losses, summed rewards."""
    clip: float = Field(default=5.0, gt=0)
    """Advantages are clamped to [-clip, clip]."""
    zero_variance: float = Field(default=1e-6, ge=0)
    """A spread below this fraction of the rewards' magnitude gives advantage 0."""
    batch_normalise: bool = False
    """GDPO: the combined advantages are normalised once more, over the iteration."""
    credit: Literal["leaf", "depth", "siblings"] = "leaf"
    """How rewards reach edges: from the leaves below, per depth, or among one state's children."""
    best_of_n: int | None = Field(default=None, ge=2, multiple_of=2)
    """Leaves of a group that are trained; null trains all."""
    keep: Literal["extremes", "best"] = "extremes"
    """`best_of_n`: half the best and half the worst, or the best only."""
    running_window: int = Field(default=32, ge=2)
    """`scope: running`: rewards of a prompt that are remembered."""


Steps = Annotated[
    tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]], Field(strict=False)
]


class LossConfig(Section):
    kind: Literal["policy_gradient", "nft", "awm", "refl", "draft"] = "policy_gradient"
    """What is differentiated: the clipped ratio; the forward process (DiffusionNFT, AWM); the
    reward itself, through the decoder (ReFL from one clean estimate, DRaFT through last steps)."""
    clip_range: float = Field(default=1e-4, gt=0, le=1)
    """Ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL term to the untrained model; 0 leaves it out."""
    kl: Literal["exact", "flow_image", "x", "v"] = "exact"
    """Form of the KL term; nft and awm take the model output's mean square, which is v."""
    kl_target: float | None = Field(default=None, gt=0)
    """KL that the weight is steered to (Pref-GRPO); null keeps `kl_weight`."""
    kl_range: Annotated[
        tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], Field(strict=False)
    ] = (0.0001, 1.0)
    """`kl_target`: least and greatest weight."""
    kl_horizon: float = Field(default=100.0, gt=0)
    """`kl_target`: iterations in which a KL of twice the target multiplies the weight by e."""
    kl_smoothing: float = Field(default=0.2, gt=0, le=1)
    """`kl_target`: share of the newest KL in the average that is compared."""
    old_log_prob: Literal["auto", "on_policy", "recompute", "rollout"] = "auto"
    """Source of the old log-prob; auto is on_policy with one update and recompute with several."""
    max_log_prob_gap: float = Field(default=1e-3, gt=0)
    """Largest allowed |rollout - training| log-prob outside `old_log_prob: rollout`."""
    updates: int = Field(default=1, ge=1)
    """Optimizer steps per iteration."""
    reuse_forwards: bool = False
    """One update: differentiate the rollout's own forwards, whose graphs are kept until then."""
    timestep_fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the trained steps used for each sample."""
    timesteps: Annotated[str | list[int], PlainValidator(check_timesteps)] = "random"
    """Which these are: `random` ones, the `first`, or a list of steps instead of a fraction."""
    timestep_scope: Literal["sample", "group"] = "sample"
    """`timesteps: random`: drawn for each sample, or once for all samples of a prompt."""
    timestep_weights: Annotated[str | list[float], PlainValidator(check_timestep_weights)] = (
        "uniform"
    )
    """Factor of the policy term at each step: 1, `std` of the step's noise over its mean
    (TempFlow-GRPO), `inverse_dt` (GRPO-Guard), or a list for the trainable steps."""
    ratio_norm: bool = False
    """GRPO-Guard's ratio exp(mean(change of the mean x noise)), free of the plain one's bias."""
    beta: float = Field(default=1.0, gt=0)
    """`nft`: how far the two branches lie from the old policy; 1: the positive one is the model."""
    old_decay_rate: float = Field(default=0.001, ge=0)
    """`nft`, `awm`: the old policy keeps min(limit, rate (updates - start)) of itself after each
    iteration and takes the rest from the weights."""
    old_decay_start: int = Field(default=0, ge=0)
    """`nft`, `awm`: updates before which it keeps nothing."""
    old_decay_limit: float = Field(default=0.5, ge=0, le=1)
    """`nft`, `awm`: the most that it keeps."""
    old_weight: float = Field(default=0.0, ge=0)
    """`awm`: weight of the distance to the old policy's output; 0 keeps no old policy."""
    form: Literal["linear", "huber", "ghuber"] = "ghuber"
    """`awm`: shape of the log-prob in the squared error."""
    weighting: Literal["uniform", "t", "t^2"] = "t"
    """`awm`: weight of a noise level in the log-prob."""
    timestep_range: Steps | None = None
    """`nft`, `awm`: [first, end) of the grid's points at which samples are noised; null is all."""
    gradient_from: Steps | None = None
    """`refl`, `draft`: [first, end) of the steps of which each iteration draws one: the clean
    estimate is taken there (`refl`), or the gradient goes back to there (`draft`); null is the last
    quarter of the steps, or the last one."""
    reward_limit: float | None = None
    """`refl`, `draft`: the loss is max(0, limit - reward); null takes minus the reward."""
    micro_batch_size: int = Field(ge=1)
    """States per forward and backward in training; memory and speed only."""


class PolicyConfig(Section):
    train: Literal["full", "lora"] = "full"
    """Train every weight of the transformer, or a low-rank adapter."""
    lora_rank: int = Field(default=16, ge=1)
    """`train: lora`: rank of the adapter."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """`train: lora`: the adapter is scaled by lora_alpha / lora_rank."""
    lora_targets: list[str] | None = Field(default=None, min_length=1)
    """`train: lora`: names of the adapted layers; null is the family's list."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an averaged copy that is evaluated and exported; null keeps none."""


class OptimizerConfig(Section):
    learning_rate: float = Field(gt=0)
    """AdamW's learning rate."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.999)
    """AdamW's averaging factors."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator term."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
