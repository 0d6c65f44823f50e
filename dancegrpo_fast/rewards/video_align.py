"""VideoAlign's VideoReward (Liu et al. 2025): Qwen2-VL 2B rates a video's quality, motion and text.

Videos stay in memory: the official code reads them from compressed files, so that scores differ a
little from it. Frames are chosen by time, therefore the frames per second matter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards.clip import BatchSize, Dtype
from dancegrpo_fast.rewards.interface import PartsReward, Samples, WithWeights, checked_pixels
from dancegrpo_fast.rewards.preprocess import resize_float, to_uint8
from dancegrpo_fast.rewards.qwen import load_reader, smart_size, unfit
from dancegrpo_fast.rewards.templates import VIDEO_REWARD, fill, load_template
from dancegrpo_fast.rewards.weights import DTYPES, State, build, need_file, read_json, read_state

PARTS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
CHECKPOINT = "checkpoint-11352/model.pth"
MIN_FRAME_PIXELS = 128 * 28 * 28
MIN_FRAMES, MAX_FRAMES = 4, 768
_LORA = re.compile(r"(.+)\.lora_([AB])\.default\.weight")


def frame_positions(count: int, fps: float, wanted: float) -> list[int]:
    """Positions of the frames the model sees: `wanted` a second, an even number, evenly spread.

    Raises:
        ValueError: Fewer than 2 frames.
    """
    largest = min(MAX_FRAMES, count) // 2 * 2
    chosen = round(min(max(count / fps * wanted, MIN_FRAMES), largest) / 2) * 2
    if chosen < 2:
        raise ValueError(f"a video of {count} frame is no video; VideoAlign needs at least 2")
    return [int(i) for i in torch.linspace(0, count - 1, chosen).round().tolist()]


def merge_lora(state: State, scale: float) -> State:
    """PEFT's state dict as that of the plain model: W + scale * B A, in float32, names cleaned.

    Raises:
        ValueError: An adapter without its base weight or its other half.
    """
    merged: State = {}
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        plain = name.removeprefix("base_model.model.")
        if match := _LORA.fullmatch(plain):
            halves.setdefault(match[1], {})[match[2]] = value
        elif ".original_module." not in plain:  # Replaced by `modules_to_save`.
            plain = plain.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            merged[plain] = value
    for name, half in halves.items():
        weight = merged.get(f"{name}.weight")
        if weight is None or set(half) != {"A", "B"}:
            raise ValueError(f"the adapter of {name} lacks its base weight or one of its halves")
        change = scale * (half["B"].float() @ half["A"].float())
        merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged


class VideoAlign(WithWeights, PartsReward):
    """Visual quality (VQ), motion quality (MQ) and fit to the prompt (TA); the score is their sum.

    Each part is shifted and scaled by the statistics in the model's own configuration.

    Args:
        path: Folder or hub id that holds `model_config.json` and the checkpoint.
        base: Qwen2-VL whose configuration and tokenizer it uses.
        template: The authors' `prompt_template.py`; fetched if null.
        fps: Frames per second of the videos, where the caller does not know.
        normalise: Use the statistics; false gives the raw outputs.
    """

    name = "videoalign"
    part_names = PARTS

    def __init__(
        self,
        path: str = "KlingTeam/VideoReward",
        *,
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        template: str | None = None,
        fps: Annotated[float, Field(gt=0)] | None = None,
        normalise: bool = True,
        dtype: Dtype = "bfloat16",
        batch_size: BatchSize = 4,
    ) -> None:
        self.text = load_template(VIDEO_REWARD, template)
        config = read_json(need_file(path, ["model_config.json"]))
        data, lora = _settings(config)
        state = read_state(need_file(path, [_newest(path)]))
        state = merge_lora(state, lora["lora_alpha"] / lora["lora_r"])
        head = state.pop("rm_head.weight", None)
        if head is None:
            raise ValueError(f"{path!r} holds no rm_head: it is no VideoReward")
        self.reader = load_reader(base, state, TOKENS, DTYPES[dtype])
        outputs, width = head.shape
        # Officially bfloat16, whose steps near 4 are 1/64: float32 keeps what the states hold.
        self.head = build(
            lambda: nn.Linear(width, outputs, bias=False), {"weight": head}, torch.float32
        )
        self.frame_pixels, self.wanted_fps = data["max_frame_pixels"], data["fps"]
        self.shift, self.spread = _statistics(config if normalise else {})
        self.fps, self.batch_size = fps, batch_size

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.reader.model, self.head]

    @torch.no_grad()
    def score_parts(self, samples: Samples) -> tuple[Tensor, dict[int, str]]:
        """See `PartsReward.score_parts`."""
        fps = samples.fps or self.fps
        if fps is None:
            raise UserError(
                "videoalign: nobody says how many frames a second the videos have; set options.fps "
                "(DanceGRPO saved its videos with 8)"
            )
        chosen = frame_positions(samples.videos.shape[1], fps, self.wanted_fps)
        videos, errors = checked_pixels(samples.videos[:, chosen])
        errors = errors | unfit(self.reader.tokenizer, samples.prompts)
        prompts = ["" if i in errors else prompt for i, prompt in enumerate(samples.prompts)]
        rows = []
        for start in range(0, len(videos), self.batch_size):
            stop = min(start + self.batch_size, len(videos))
            texts = [fill(self.text, prompt) for prompt in prompts[start:stop]]
            pictures = [self._resized(video) for video in videos[start:stop]]
            rows.append(self._read(pictures, texts).cpu())
        raw = torch.cat(rows) if rows else torch.zeros(0, len(PARTS))
        parts = (raw - self.shift) / self.spread
        parts[list(errors)] = torch.nan
        return parts, errors

    def total(self, parts: Tensor) -> Tensor:
        """See `PartsReward.total`."""
        return parts.sum(dim=1)

    def _resized(self, video: Tensor) -> Tensor:
        height, width = video.shape[-2:]
        size = smart_size(height, width, MIN_FRAME_PIXELS, self.frame_pixels)
        # torchvision resizes 8-bit videos as floats and rounds back.
        return resize_float(to_uint8(video).float(), size).clamp(0, 255).round()

    def _read(self, pictures: list[Tensor], texts: list[str]) -> Tensor:
        """[N, 3] float32 raw outputs."""
        logits: Tensor = self.head(self.reader.states(pictures, texts, video=True))
        if logits.shape[2] == 1:  # One head read at three tokens (the published model).
            return logits[:, :, 0]
        return logits.diagonal(dim1=1, dim2=2)  # One output per token (the training script).


def _newest(path: str) -> str:
    """The checkpoint's file: the one published, or in a folder of your own the latest."""
    found = sorted(
        Path(path).glob("checkpoint-*/model.pth"), key=lambda p: int(p.parent.name.split("-")[-1])
    )
    return str(found[-1].relative_to(path)) if found else CHECKPOINT


def _settings(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data and adapter settings that this file implements.

    Raises:
        ValueError: A model that was trained on another prompt, frame choice or head.
    """
    data, model = config.get("data_config", {}), config.get("model_config", {})
    lora = config.get("peft_lora_config", {})
    for section, name, wanted in (
        (data, "prompt_template_type", "detailed_special"),
        (data, "sample_type", "uniform"),
        (data, "num_frames", None),
        (model, "reward_token", "special"),
        (model, "use_special_tokens", True),
        (lora, "use_rslora", False),
    ):
        if section.get(name, wanted) != wanted:
            raise ValueError(f"model_config.json: {name} = {section[name]!r}; only {wanted!r}")
    if missing := [name for name in ("lora_alpha", "lora_r") if name not in lora]:
        raise ValueError(f"model_config.json: peft_lora_config lacks {', '.join(missing)}")
    defaults = {"max_frame_pixels": 448 * 448, "fps": 2.0}
    return {name: data.get(name) or value for name, value in defaults.items()}, lora


def _statistics(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[3] mean and standard deviation of the parts, 0 and 1 where the configuration has none."""
    found = config.get("inference_config") or {}
    means = [float(found.get(f"{part}_mean", 0.0)) for part in PARTS]
    return torch.tensor(means), torch.tensor([float(found.get(f"{p}_std", 1.0)) for p in PARTS])
