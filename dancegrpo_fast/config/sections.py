"""What a recipe holds: frozen, strict sections with bounds, defaults and a line on every field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)  # fmt: skip
from pydantic.fields import FieldInfo

from dancegrpo_fast.config.agreement import disagreements, show
from dancegrpo_fast.config.values import check_timestep_weights, check_timesteps


class Section(BaseModel):
    """One section of the recipe. Frozen and strict: no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


FAMILY_NAMES = (
    "flux", "hunyuan_video", "qwen_image", "qwen_image_edit", "sd", "sd3", "skyreels_i2v",
    "wan", "wan_i2v",
)  # fmt: skip


def _one_family(name: str) -> str:
    """A name of ours, or a file and a class; that the file exists is asked when it is loaded."""
    if name in FAMILY_NAMES or re.fullmatch(r".+\.py:\w+", name):
        return name
    if name.endswith(".py"):
        raise ValueError(f"which class of the file? write {name}:ClassName")
    ours = f"{', '.join(map(repr, FAMILY_NAMES[:-1]))} or {FAMILY_NAMES[-1]!r}"
    near = difflib.get_close_matches(name, FAMILY_NAMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"must be {ours}, or path/to/file.py:ClassName for your own{hint}")


class ModelConfig(Section):
    family: Annotated[str, AfterValidator(_one_family)]
    """A model family of ours, or `path/to/file.py:ClassName` for your own (docs/families.md)."""
    path: str
    """Folder of a diffusers pipeline (relative to the working directory), or its hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its main branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of frozen weights and of the network's arithmetic; trained weights are float32."""
    height: int = Field(ge=1)
    """Height of the samples in pixels."""
    width: int = Field(ge=1)
    """Width of the samples in pixels."""
    frames: int = Field(default=1, ge=1)
    """Frames of one sample; 1 draws images."""
    fps: float | None = Field(default=None, gt=0)
    """Frames per second of the samples: for rewards on motion and for video files."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance scale in rollout and training; 1 means one forward, no guidance."""
    guidance_2: float | None = Field(default=None, ge=0)
    """Guidance scale of the second expert (Wan2.2); null is `guidance`."""
    embedded_guidance: float | None = Field(default=None, ge=0)
    """Scale that a distilled model takes as an input (FLUX, HunyuanVideo); null is its default."""
    negative_prompt: str = ""
    """Prompt of the unconditional branch; read when guidance is not 1."""
    max_text_length: int | None = Field(default=None, ge=1)
    """Text tokens given to the network, longer prompts are cut; null is the stock pipeline's."""
    first_frame: str | None = None
    """Image-to-video: text-to-image pipeline that draws the first frame of prompts without one."""
    first_frame_steps: int | None = Field(default=None, ge=1)
    """Steps of that pipeline; null is its own default."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage and arithmetic of the VAE."""
    vae_tiling: bool = False
    """Decode in tiles: less memory, slower, faint seams."""


class DataConfig(Section):
    prompts: str
    """Text file with one training prompt a line (relative to the working directory)."""
    prompts_per_iteration: int = Field(ge=1)
    """Prompts drawn for one iteration, over all processes."""
    embeddings: str | None = None
    """Folder of embedded prompts, shared by runs; null is `embeddings` in the output folder."""


class TreeConfig(Section):
    kind: Literal[
        "shared_root", "independent_roots", "window", "branch_points", "trunk_with_branches"
    ] = "shared_root"
    """Shape of one prompt's denoising tree."""
    window_size: int | None = Field(default=None, ge=1)
    """`window`: stochastic, trained steps in a row, the others are deterministic; `branch_points`:
    the steps that are trained (depth pruning), the others stay stochastic."""
    window_start: int | None = Field(default=None, ge=0)
    """First step of the window; null lets it move inside window_range."""
    window_range: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """[first, end) that a moving window stays inside; null is every trainable step."""
    window_order: Literal["random", "progressive", "decaying", "exponential"] = "random"
    """How the window moves: drawn, or from the first place to the last and again, staying equally
    long at each, or ever shorter (MixGRPO's four strategies)."""
    window_iterations: int = Field(default=1, ge=1)
    """Iterations at one place; `decaying`: at the first."""
    window_stride: int = Field(default=1, ge=1)
    """Steps from one place to the next."""
    window_decay: float = Field(default=0.1, gt=0)
    """`exponential`: rate at which the stay shortens."""
    window_decay_from: int = Field(default=13, ge=0)
    """`exponential`: start of the window from which on it shortens."""
    flash: float | None = Field(default=None, gt=0, le=1)
    """`window`: share of the steps after the window that are kept, as DPM-Solver++ 2M steps
    (MixGRPO-Flash); null keeps them all, as Euler steps."""
    branch_steps: list[Annotated[int, Field(ge=0)]] = []
    """Steps at which states branch, ascending."""
    branches: int | None = Field(default=None, ge=1, le=1024)
    """Children of a state at each branch step."""
    noise_scale: float = Field(default=1.0, gt=0)
    """`branch_points`: multiplies the noise of steps that branch; their log-prob knows of it."""
    trunks: int = Field(default=1, ge=1)
    """`trunk_with_branches`: deterministic trunks per prompt, each with its own initial noise."""


class RolloutConfig(Section):
    group_size: int = Field(ge=1)
    """Samples of one prompt (leaves of its tree)."""
    steps: int = Field(ge=1, le=1000)
    """Denoising steps."""
    schedule: Literal["diffusers", "dance"] = "diffusers"
    """Sigma grid: the model's own scheduler, or DanceGRPO's shifted one."""
    shift: float | None = Field(default=None, gt=0)
    """Time shift of the `dance` schedule (DanceGRPO: 3 for FLUX, 5 for HunyuanVideo)."""
    dynamics: Literal["dance", "flow", "flow_wan", "cps", "ddim", "vp"] = "dance"
    """Kind of stochastic step; `ddim` and `vp` for family sd, the others for flow models."""
    noise_level: float = Field(gt=0)
    """Strength of the stochastic step (dance: eta, about .3; flow and cps: about .7; ddim: 1)."""
    exact_density: bool = False
    """`cps`: the true Gaussian density instead of FlowCPS's -mean(r^2)."""
    final: Literal["x0", "sample", "ode"] = "x0"
    """The last step: decode the clean estimate, take the noisy sample, or a deterministic step."""
    train_last: bool = False
    """Also train the last step; needs `final: sample`."""
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of latents between steps; log-probs are those of the stored values."""
    batch_size: int = Field(ge=1)
    """States per forward in rollout; memory and speed only."""
    tree: TreeConfig = TreeConfig()


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


class LossConfig(Section):
    clip_range: float = Field(default=1e-4, gt=0, lt=1)
    """Ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL term to the untrained model; 0 leaves it out."""
    kl: Literal["exact", "flow_image", "x", "v"] = "exact"
    """Form of the KL term."""
    old_log_prob: Literal["auto", "on_policy", "recompute", "rollout"] = "auto"
    """Source of the old log-prob; auto is on_policy with one update and recompute with several."""
    max_log_prob_gap: float = Field(default=1e-3, gt=0)
    """Largest allowed |rollout - training| log-prob outside `old_log_prob: rollout`."""
    updates: int = Field(default=1, ge=1)
    """Optimizer steps per iteration."""
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


class ParallelConfig(Section):
    engine: Literal["fsdp", "ddp", "deepspeed"] = "fsdp"
    """How weights and gradients are spread over processes; one process needs none."""
    dp_replicate: int = Field(default=1, ge=1)
    """`fsdp`: copies of the sharded model; one per machine keeps weight traffic inside it."""
    dp_shard: int | None = Field(default=None, ge=1)
    """`fsdp`: processes that share one copy; null is what dp_replicate and sp leave."""
    sp: int = Field(default=1, ge=1)
    """Processes that share the tokens of one forward (sequence parallelism)."""
    groups: Literal["together", "spread"] = "together"
    """A prompt's samples on as few processes as possible, or evenly over all of them."""
    gather_rollout: bool = True
    """`fsdp`: gather each network's weights once per rollout; false gathers in every forward."""
    defer_reduction: bool = False
    """`fsdp`: exchange gradients once per update: less traffic, whole gradients in memory."""
    zero_stage: Literal[1, 2, 3] = 2
    """`deepspeed`: what is sharded: optimizer, gradients too, weights too."""
    offload_optimizer: bool = False
    """`deepspeed`: optimizer state and step in host memory."""
    attention: Literal[
        "default", "native", "cudnn", "flash", "flash_3", "flash_3_hub", "xformers"
    ] = "default"  # fmt: skip
    """Attention backend of the trained networks; default leaves the model's own."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """Activations recomputed in the backward: none, all of a block, or all but its costliest."""
    offload_activations: bool = False
    """Keep activations that wait for their backward in host memory."""
    compile: bool = False
    """torch.compile each block."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """Processes that do not answer in a collective for so long end the run."""


class EvaluationConfig(Section):
    prompts: str | None = None
    """Text file with one held-out prompt a line; null evaluates nothing."""
    seeds: int = Field(default=2, ge=1)
    """Samples per held-out prompt, from fixed noise."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of that noise; apart from the run's seed, so that runs are compared on the same samples."""
    every: int | None = Field(default=None, ge=1)
    """Iterations between evaluations; null evaluates the base and the end only."""
    batch_size: int = Field(default=32, ge=1)
    """Samples drawn at once in evaluation."""


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=1)
    """Iterations between snapshots."""
    keep: int = Field(default=2, ge=1)
    """Newest snapshots that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep snapshots of iterations that are multiples of this, for good."""
    background: bool = True
    """Write while the next iteration runs; false waits for the disk."""
    on_failure: Literal["continue", "stop"] = "continue"
    """A snapshot that cannot be written (disk full): go on without it, or stop the run."""
    grace_seconds: float = Field(default=60.0, ge=0)
    """After a signal: how long a begun update phase may go on; then the last snapshot stands."""


class RunConfig(Section):
    """A whole run. Construct it with `load_config`, or directly from its sections."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every random number of the run derives from it."""
    output: str
    """Folder of the run (relative to the working directory)."""
    iterations: int = Field(ge=1)
    """Rounds of sampling, scoring and updating."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    """Rewards that score each sample."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("rewards")
    @classmethod
    def _rewards_train_something(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        if all(reward.weight == 0 for reward in rewards):
            raise ValueError("every weight is 0, so nothing is trained; give one another weight")
        names = [reward.name for reward in rewards]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is listed twice; keep one and add the weights")
        return rewards

    @model_validator(mode="after")
    def _fields_agree(self) -> RunConfig:
        def get(path: str) -> Any:
            value: Any = self
            for key in path.split("."):
                value = getattr(value, key)
            return value

        if problems := disagreements(get, default_at):
            lines = (f"{path} = {show(get(path))}: {reason}" for path, reason in problems)
            raise ValueError("\n".join(lines))
        return self


def section_at(keys: Sequence[str]) -> type[Section]:
    """Returns the section class at a path; list indices are passed over."""
    section: Any = RunConfig
    for key in keys:
        if not key.isdecimal():
            annotation = section.model_fields[key].annotation
            section = next(iter(get_args(annotation)), annotation)
    return section


def field_at(path: str) -> FieldInfo:
    """Returns the declaration of the field at a dotted path."""
    *parents, key = path.split(".")
    return section_at(parents).model_fields[key]


def default_at(path: str) -> Any:
    """Returns the default of the field at a dotted path."""
    return field_at(path).get_default(call_default_factory=True)
