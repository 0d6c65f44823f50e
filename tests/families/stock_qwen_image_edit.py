"""The stock Qwen-Image-Edit pipeline, its own processor included, against ours.

Run by test_qwen_image_edit.py in a process that has torchvision, which the stock processor needs
and this project does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# torchvision's wheel may be built for another torch (CUDA beside CPU): its compiled operators are
# then missing, and importing it fails unless these two are at least declared. None is called.
LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
from case_qwen_image import CASES  # noqa: E402
from conformance import TOLERANCE, family_of, initial, rolled_out  # noqa: E402
from diffusers import QwenImageEditPipeline  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_qwen_image import tiny_qwen_image_edit  # noqa: E402
from transformers import Qwen2VLProcessor  # noqa: E402

from dancegrpo_fast.models.qwen_image_edit import ImageTextProcessor, read_picture  # noqa: E402

SIZES = [(1024, 1024), (1184, 896), (640, 1664), (40, 300), (57, 55), (28, 28), (3000, 200)]
TEXT = "before <|vision_start|><|image_pad|><|vision_end|> after"


def processors_agree(folder: Path) -> None:
    """Bit for bit, over sizes that are kept, shrunk and enlarged; alone and in one padded batch."""
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]
    ours = ImageTextProcessor.of(folder / "processor")
    stock = Qwen2VLProcessor.from_pretrained(folder / "processor")
    stock.save_pretrained(folder.parent / "rewritten")  # As transformers 5 writes it: one file.
    again = ImageTextProcessor.of(folder.parent / "rewritten")
    assert (again.least, again.most) == (ours.least, ours.most) == (56 * 56, 84 * 84)
    assert torch.equal(again.mean, ours.mean) and torch.equal(again.std, ours.std)
    texts = [TEXT + " and more" * (number % 3) for number in range(len(SIZES))]
    for most in (84 * 84, 12845056):  # The twin's, and the published one.
        ours.most = most
        stock.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": most}
        calls = [([text], picture) for text, picture in zip(texts, pictures, strict=True)]
        for text, given in [*calls, (texts, pictures)]:
            expected = stock(text=text, images=given, padding=True, return_tensors="pt")
            found = ours(text=text, images=given, padding=True, return_tensors="pt")
            assert set(found) == set(expected), set(found) ^ set(expected)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (name, most)


def pipelines_agree(folder: Path) -> None:
    """Latents after a deterministic rollout, at the published image area."""
    case = next(case for case in CASES if case.name == "qwen_image_edit")
    prompts = case.made_prompts(folder.parent / "images")
    # 32 pixels to a latent: at 8 the images would be 4096 patches each.
    config = case.recipe(folder.parent, folder, {"model.height": 128, "model.width": 192})
    family = family_of(config)
    pipeline = QwenImageEditPipeline.from_pretrained(folder)
    assert isinstance(pipeline.processor, Qwen2VLProcessor)
    pipeline.set_progress_bar_config(disable=True)
    expected = torch.cat(
        [
            pipeline(
                image=read_picture(prompt),
                prompt=prompt.text,
                negative_prompt=config.model.negative_prompt,
                true_cfg_scale=config.model.guidance,
                height=128,
                width=192,
                num_inference_steps=config.rollout.steps,
                latents=family.stock_latents(noise[None]),
                output_type="latent",
            ).images
            for prompt, noise in zip(prompts, initial(family, len(prompts)), strict=True)
        ]
    )
    found = family.stock_latents(rolled_out(config, family, prompts))
    assert (found - expected).abs().max() < TOLERANCE
    # The same with each prompt's image swapped: the images matter.
    swapped = [type(p)(p.text, q.image) for p, q in zip(prompts, prompts[::-1], strict=True)]
    other = family.stock_latents(rolled_out(config, family, swapped))
    assert (other - expected).abs().max() > 100 * TOLERANCE


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = tiny_qwen_image_edit(Path(sys.argv[1]) / "model", compressions=5)
    processors_agree(model)
    pipelines_agree(model)
    print("stock and ours agree")
