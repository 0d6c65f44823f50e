"""HPSv3 (Ma et al. 2025): Qwen2-VL 7B reads image and prompt; the score is a Gaussian's mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dancegrpo_fast.rewards.clip import BatchSize, Dtype
from dancegrpo_fast.rewards.interface import FrameReward, Samples, Scored, WithWeights
from dancegrpo_fast.rewards.preprocess import resize_uint8, to_uint8
from dancegrpo_fast.rewards.qwen import load_reader, smart_size, unfit
from dancegrpo_fast.rewards.templates import HPSV3, fill, load_template
from dancegrpo_fast.rewards.weights import DTYPES, State, build, need_file, read_state

HEAD = "rm_head."
PIXELS = 256 * 28 * 28  # Both bounds of an image's area.


def reward_head(state: State) -> nn.Sequential:
    """The three-layer head with its weights, in float32; its sizes are those of the weights."""
    weights = {name.removeprefix(HEAD): v for name, v in state.items() if name.startswith(HEAD)}
    try:
        sizes = [weights[f"{layer}.weight"].shape for layer in (0, 3, 5)]
    except KeyError as error:
        raise ValueError(f"the checkpoint is no HPSv3: its head lacks {error}") from None
    linear = [nn.Linear(width, outputs) for outputs, width in sizes]
    layers = [linear[0], nn.ReLU(), nn.Dropout(0.05), linear[1], nn.ReLU(), linear[2]]
    return build(lambda: nn.Sequential(*layers), weights, torch.float32)


class Hps3(WithWeights, FrameReward):
    """Human preference for an image given its prompt, about -3 to 14.

    Args:
        path: Folder or hub id that holds `HPSv3.safetensors`.
        base: Qwen2-VL whose configuration and tokenizer it uses.
        template: The authors' `data_collator_qwen.py`, or the wheel that holds it; fetched if null.
        max_pixels: Area of the image the model sees; another one is no longer the official score.
    """

    name = "hpsv3"

    def __init__(
        self,
        path: str = "MizzenAI/HPSv3",
        *,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        template: str | None = None,
        max_pixels: Annotated[int, Field(ge=28 * 28)] = PIXELS,
        dtype: Dtype = "bfloat16",
        batch_size: BatchSize = 8,
    ) -> None:
        self.text = load_template(HPSV3, template)
        state = read_state(need_file(path, ["HPSv3.safetensors"]))
        backbone = {name: v for name, v in state.items() if not name.startswith(HEAD)}
        self.reader = load_reader(base, backbone, ["<|Reward|>"], DTYPES[dtype])
        self.head = reward_head(state)
        self.batch_size, self.max_pixels = batch_size, max_pixels

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.reader.model, self.head]

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`; a prompt that the model cannot read costs no other sample."""
        errors = unfit(self.reader.tokenizer, samples.prompts)
        prompts = ["" if i in errors else prompt for i, prompt in enumerate(samples.prompts)]
        scored = super().score(replace(samples, prompts=prompts))
        known = {i: why for i, why in enumerate(scored.errors) if why}
        return Scored.of(scored.values, known | errors)

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        height, width = images.shape[-2:]
        size = smart_size(height, width, self.max_pixels, self.max_pixels)
        pictures = list(resize_uint8(to_uint8(images), size)[:, None])
        states = self.reader.states(pictures, [fill(self.text, p) for p in prompts], video=False)
        mean_and_log_sigma: Tensor = self.head(states[:, 0])
        return mean_and_log_sigma[:, 0]
