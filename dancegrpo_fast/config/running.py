"""Sections of a recipe on how a run goes: processes, evaluation, logs, snapshots."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dancegrpo_fast.config.section import Section


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
    compile: Literal[False, True, "graphs"] = False
    """torch.compile each block; `graphs` also replays each as a CUDA graph: one GPU, unverified."""
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


class LoggingConfig(Section):
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Where numbers and clips are shown; `metrics.jsonl` and the report are always written."""
    project: str | None = None
    """`wandb`: the project; null is dancegrpo-fast."""
    name: str | None = None
    """`wandb`: name of the run; null is that of the output folder."""
    offline: bool = False
    """`wandb`: write to the run's folder only; `wandb sync` sends it later."""

    @field_validator("trackers")
    @classmethod
    def _once_each(cls, trackers: list[str]) -> list[str]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("names a tracker twice; each once is enough")
        return trackers


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
