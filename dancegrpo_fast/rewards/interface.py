"""What is scored, what comes back, and the base of our own rewards.

A reward needs a `name` and a call from clips and prompts to scores: that is all a file of your own
has to define. Ours also read frame rates, metadata and groups, and say why a score is missing; they
do so in `score(samples)`, which is used instead of the call wherever a reward has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Samples:
    """Images or videos in memory, with what belongs to them.

    Attributes:
        videos: [N, F, 3, H, W], any device, uint8 or floating point in [0, 1]. Images [N, 3, H, W]
            may be given and become videos of one frame.
        prompts: N prompts.
        fps: Frames per second of the videos; None where nobody said.
        metadata: N mappings from the prompts' file, or empty.
        groups: N numbers, equal for the samples of one prompt; empty means equal prompts.
    """

    videos: Tensor
    prompts: Sequence[str]
    fps: float | None = None
    metadata: Sequence[Mapping[str, Any]] = ()
    groups: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.videos.ndim == 4:
            object.__setattr__(self, "videos", self.videos[:, None])
        shape, n = tuple(self.videos.shape), len(self.prompts)
        if len(shape) != 5 or shape[2] != 3 or 0 in shape[1:]:
            raise ValueError(f"samples have shape {shape}; need [N, F, 3, H, W] or [N, 3, H, W]")
        if not (self.videos.is_floating_point() or self.videos.dtype == torch.uint8):
            raise ValueError(f"samples have dtype {self.videos.dtype}; need floats or uint8")
        if shape[0] != n:
            raise ValueError(f"{shape[0]} samples for {n} prompts")
        for field in ("metadata", "groups"):
            if len(getattr(self, field)) not in (0, n):
                raise ValueError(f"{len(getattr(self, field))} {field} for {n} samples")
        if not self.groups:
            first: dict[str, int] = {}
            numbers = tuple(first.setdefault(prompt, len(first)) for prompt in self.prompts)
            object.__setattr__(self, "groups", numbers)

    def __len__(self) -> int:
        return len(self.prompts)

    def of(self, rows: Sequence[int]) -> Samples:
        """The samples at some positions."""
        return replace(
            self,
            videos=self.videos[list(rows)],
            prompts=[self.prompts[i] for i in rows],
            metadata=[self.metadata[i] for i in rows] if self.metadata else (),
            groups=[self.groups[i] for i in rows],
        )


@dataclass(frozen=True)
class Scored:
    """Scores of N samples.

    Attributes:
        values: [N] float32 on the CPU, NaN where scoring failed.
        errors: N texts: why a value is NaN, and empty where it is a number.
    """

    values: Tensor
    errors: tuple[str, ...]

    @classmethod
    def of(cls, values: Tensor, errors: Mapping[int, str] | None = None) -> Scored:
        """From scores, NaN where they failed, and the reasons that are known, by position."""
        values, known = values.detach().to("cpu", torch.float32).clone(), errors or {}
        if known:
            values[list(known)] = torch.nan
        failed = (not_a_number(value) for value in values.flatten().tolist())
        reasons = (known.get(i, bad) if bad else "" for i, bad in enumerate(failed))
        values[~values.isfinite()] = torch.nan
        return cls(values, tuple(reasons))


def not_a_number(value: float) -> str:
    """Why a score cannot be used; empty if it can."""
    return "" if value - value == 0 else f"it returned {value}"


@runtime_checkable
class Reward(Protocol):
    """Scores samples. Called without gradients, on batches, on the process's device."""

    name: str

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] float32 of videos [B, F, 3, H, W] float32 in [0, 1]; NaN where it failed."""
        ...


@runtime_checkable
class HasParts(Reward, Protocol):
    """A reward that also reports what its score is made of."""

    part_names: tuple[str, ...]

    def parts(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[B, len(part_names)]."""
        ...


@runtime_checkable
class Placeable(Reward, Protocol):
    """A reward with weights.

    Attributes:
        offload: They are needed on the device while scoring only.
    """

    offload: bool

    def place(self, device: torch.device | str) -> None:
        """Move the weights."""
        ...


class SampleReward(ABC):
    """Base of our rewards.

    Attributes:
        name: Of its metric and in recipes.
        groupwise: It compares the samples of one prompt, so it needs all of them in one call.
        differentiable: `gradient_scores` works.
    """

    name: str
    groupwise: bool = False
    differentiable: bool = False

    @abstractmethod
    def score(self, samples: Samples) -> Scored:
        """Scores N samples; a sample that cannot be scored is NaN with its reason."""

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[N] float32 on the CPU."""
        return self.score(Samples(videos, prompts)).values

    def gradient_scores(self, samples: Samples) -> Tensor:
        """Scores [N] float32 on the samples' device, differentiable in the pixels (for ReFL)."""
        raise NotImplementedError(f"reward {self.name} has no gradient with respect to pixels")


class WithWeights:
    """For rewards that are models: what there is to place, and whether it stays on the device."""

    offload: bool = False

    def modules(self) -> Sequence[nn.Module]:
        """What holds weights."""
        raise NotImplementedError

    def place(self, device: torch.device | str) -> None:
        """See `Placeable.place`."""
        for module in self.modules():
            module.to(device)


def checked_pixels(videos: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Pixels that are safe to compute with, and the samples that are not.

    Args:
        videos: [N, ...] uint8 or floating point in [0, 1].

    Returns:
        The same, uint8 or float32, with non-finite samples set to 0; reasons by sample.

    Raises:
        ValueError: Values outside [0, 1], such as a decoder's [-1, 1].
    """
    if videos.dtype == torch.uint8 or not len(videos):
        return videos, {}
    # Extremes carry NaN and infinity, so no mask of a video's size is needed.
    pixels = tuple(range(1, videos.ndim))
    low, high = videos.amin(dim=pixels), videos.amax(dim=pixels)
    finite = low.isfinite() & high.isfinite()
    if bool((finite & ((low < -0.001) | (high > 1.001))).any()):
        raise ValueError(
            f"samples have values in [{float(low[finite].min()):.3f}, "
            f"{float(high[finite].max()):.3f}], outside [0, 1]; map the decoder's [-1, 1] to "
            "[0, 1] first"
        )
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        videos = videos.clone()
        videos[bad] = 0
    return videos.float(), {index: "a pixel is not finite" for index in bad}


class FrameReward(SampleReward):
    """Scores images; a video is worth the mean over its frames (`combine.OnFrames` chooses some).

    Attributes:
        batch_size: Images at once.
    """

    batch_size: int = 32

    @abstractmethod
    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[M] float32 of images [M, 3, H, W], uint8 or float32 in [0, 1], all finite."""

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        videos, errors = checked_pixels(samples.videos)
        frames = videos.shape[1]
        values = torch.zeros(len(samples) * frames)
        for start in range(0, len(values), self.batch_size):
            stop = min(start + self.batch_size, len(values))
            rows, times = zip(*(divmod(i, frames) for i in range(start, stop)), strict=True)
            # Gathered a batch at a time: decoded videos are transposed, flattening would copy all.
            scores = self.score_images(
                videos[list(rows), list(times)], [samples.prompts[row] for row in rows]
            )
            values[start:stop] = scores.float().cpu()
        return Scored.of(values.reshape(-1, frames).mean(dim=1), errors)

    def gradient_scores(self, samples: Samples) -> Tensor:
        """See `SampleReward.gradient_scores`; all frames go through the model at once."""
        if not self.differentiable:
            return super().gradient_scores(samples)
        if not samples.videos.requires_grad:
            raise ValueError("samples require no gradient; give floats that do, in [0, 1]")
        frames = samples.videos.shape[1]
        prompts = [prompt for prompt in samples.prompts for _ in range(frames)]
        scores = self.score_images(samples.videos.float().flatten(0, 1), prompts)
        return scores.reshape(-1, frames).mean(dim=1)


class SpecReward(SampleReward):
    """Checks images against what the prompt (or its metadata) says in so many words.

    A prompt that says nothing of the kind gives no score, with the reason. Videos are worth the
    mean over their frames.
    """

    @abstractmethod
    def spec(self, prompt: str, metadata: Mapping[str, Any]) -> Any:
        """What is asked for.

        Raises:
            ValueError: Nothing that this reward can check.
        """

    @abstractmethod
    def score_frames(self, images: Tensor, spec: Any) -> Tensor:
        """[F] of one sample's images [F, 3, H, W], uint8 or float32 in [0, 1], all finite."""

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        videos, errors = checked_pixels(samples.videos)
        metadata = samples.metadata or [{}] * len(samples)
        values = torch.full((len(samples),), torch.nan)
        for index, prompt in enumerate(samples.prompts):
            try:
                spec = self.spec(prompt, metadata[index])
            except ValueError as error:
                errors[index] = str(error)
                continue
            values[index] = self.score_frames(videos[index], spec).float().mean()
        return Scored.of(values, errors)


class PartsReward(SampleReward):
    """A reward of several measures, each of which may be used alone as `NAME.PART`."""

    part_names: tuple[str, ...]

    @abstractmethod
    def score_parts(self, samples: Samples) -> tuple[Tensor, dict[int, str]]:
        """[N, parts] float32 on the CPU, and why samples (by position) have none."""

    @abstractmethod
    def total(self, parts: Tensor) -> Tensor:
        """[N] the score made of parts [N, parts]."""

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        parts, errors = self.score_parts(samples)
        return Scored.of(self.total(parts), errors)

    @torch.no_grad()
    def parts(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[N, parts] float32 on the CPU."""
        return self.score_parts(Samples(videos, prompts))[0]


def score(reward: Reward, samples: Samples) -> Scored:
    """Scores of any reward: ours, or a class that has a name and a call.

    Raises:
        Exception: Whatever the reward raises.
    """
    if isinstance(reward, SampleReward):
        return reward.score(samples)
    # A list or an array of numbers says as much as a tensor.
    return Scored.of(torch.as_tensor(reward(_float(samples.videos), list(samples.prompts))))


def score_parts(reward: HasParts, samples: Samples) -> tuple[Tensor, dict[int, str]]:
    """Parts [N, K] on the CPU, and reasons by position, of any reward that has parts."""
    if isinstance(reward, PartsReward):
        return reward.score_parts(samples)
    return reward.parts(_float(samples.videos), list(samples.prompts)).float().cpu(), {}


def _float(videos: Tensor) -> Tensor:
    return videos.float() / 255 if videos.dtype == torch.uint8 else videos


@contextmanager
def placed(rewards: Sequence[Reward], device: torch.device | str) -> Iterator[None]:
    """Hold the weights on a device; afterwards those with `offload` go back to CPU memory."""
    movable = [reward for reward in rewards if isinstance(reward, Placeable)]
    for reward in movable:
        reward.place(device)
    try:
        yield
    finally:
        for reward in movable:
            if reward.offload:
                reward.place("cpu")
