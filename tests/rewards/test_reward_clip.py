"""CLIP rewards against the official formula, computed once more on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_reward_models import (
    OPEN_CLIP,
    clip_tokenizer,
    images_of,
    open_clip_tokens,
    tiny_clip,
    tiny_open_clip,
)
from transformers import CLIPImageProcessorPil

from dancegrpo_fast.rewards.clip import ClipScore, Hps2, PickScore, from_open_clip, load_clip
from dancegrpo_fast.rewards.combine import OnFrames
from dancegrpo_fast.rewards.interface import Samples
from dancegrpo_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

PROMPTS = ["a red cat", "two dogs & a bird", "x" * 300, ""]
#: Cosines of float32 features of 16 numbers: a few roundings of about 6e-8 each, and the towers'
#: own roundings where batch sizes differ.
TIGHT = 2e-6


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def processor(side: int) -> CLIPImageProcessorPil:
    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)


def reference_clip(model, images, prompts) -> torch.Tensor:
    """transformers' own features of transformers' own processor, one sample at a time."""
    rows = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = processor(32)(pil(image), return_tensors="pt")["pixel_values"]
        tokens = clip_tokenizer()(prompt, truncation=True, max_length=77, return_tensors="pt")
        out = model(pixel_values=pixels, **tokens)
        rows.append(F.cosine_similarity(out.image_embeds, out.text_embeds)[0])
    return torch.stack(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    return path, tiny_clip(path)


@pytest.mark.parametrize("sizes", [(48, 64), (37, 51), (33, 32), (32, 32), (65, 40)])
@torch.no_grad()
def test_clip_score_is_the_cosine_of_the_models_own_features(folder, sizes):
    images = images_of(sizes, 4)
    expected = reference_clip(folder[1], images, PROMPTS)
    reward = ClipScore(str(folder[0]))
    torch.testing.assert_close(reward(images[:, None], PROMPTS), expected, rtol=0, atol=TIGHT)
    # Floats that hold the same 8 bits score the same, bit for bit.
    floats = images[:, None].float() / 255
    assert torch.equal(reward(floats, PROMPTS), reward(images[:, None], PROMPTS))


@torch.no_grad()
def test_singles_permutations_and_batch_sizes(folder):
    images = images_of((40, 56), 4)[:, None]
    reward = ClipScore(str(folder[0]), batch_size=3)
    together = reward(images, PROMPTS)
    singles = torch.cat([ClipScore(str(folder[0]))(images[i : i + 1], PROMPTS[i : i + 1])
                         for i in range(4)])  # fmt: skip
    torch.testing.assert_close(together, singles, rtol=0, atol=TIGHT)
    order = [2, 0, 3, 1]
    moved = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(moved, together[order], rtol=0, atol=TIGHT)
    assert together.std() > 0.01  # Else the comparisons above would be empty.


@torch.no_grad()
def test_a_prompt_is_encoded_once(folder, monkeypatch):
    reward = ClipScore(str(folder[0]))
    calls: list[list[str]] = []
    encode = reward.clip._encode
    monkeypatch.setattr(reward.clip, "_encode", lambda texts: calls.append(texts) or encode(texts))
    images = images_of((32, 32), 6)[:, None]
    first = reward(images, ["a", "b"] * 3)
    assert torch.equal(reward(images, ["a", "b"] * 3), first)
    assert calls == [["a", "b"]]


@torch.no_grad()
def test_videos_are_worth_their_frames(folder):
    video = images_of((32, 40), 6).reshape(2, 3, 3, 32, 40)
    reward = ClipScore(str(folder[0]))
    single = torch.stack([reward(video[:, f], PROMPTS[:2]) for f in range(3)], dim=1)
    torch.testing.assert_close(reward(video, PROMPTS[:2]), single.mean(1), rtol=0, atol=TIGHT)
    chosen = OnFrames(reward, [0, -1])
    scored = chosen.score(Samples(video, PROMPTS[:2]))
    torch.testing.assert_close(scored.values, single[:, [0, 2]].mean(1), rtol=0, atol=TIGHT)
    with pytest.raises(ValueError, match=r"frames = \[3\]: the videos have 3"):
        OnFrames(reward, [3])(video, PROMPTS[:2])
    video = (video.float() / 255).requires_grad_()
    with torch.enable_grad():
        chosen.gradient_scores(Samples(video, PROMPTS[:2])).sum().backward()
    reached = video.grad.abs().amax(dim=(0, 2, 3, 4)) > 0
    assert reached.tolist() == [True, False, True]


@torch.no_grad()
def test_a_broken_sample_is_named_and_alone(folder):
    reward = ClipScore(str(folder[0]))
    images = images_of((32, 32), 3).float()[:, None] / 255
    whole = reward(images, PROMPTS[:3])
    images[1, 0, 0, 0, 0] = torch.nan
    scored = reward.score(Samples(images, PROMPTS[:3]))
    assert scored.errors == ("", "a pixel is not finite", "")
    assert scored.values[1].isnan()
    torch.testing.assert_close(scored.values[[0, 2]], whole[[0, 2]], rtol=0, atol=TIGHT)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        reward(images[:1] * 2 - 1, PROMPTS[:1])
    assert reward(images[:0], []).shape == (0,)


def test_pixels_get_a_gradient(folder):
    """Against central differences in float64, of the smooth path."""
    reward = ClipScore(str(folder[0]))
    reward.clip.model.double()
    images = (images_of((48, 40), 2).double() / 255).requires_grad_()
    prompts = PROMPTS[:2]
    scores = reward.gradient_scores(Samples(images, prompts))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    # Close to the exact path: 8-bit rounding moves features by about 1e-3.
    exact = reward(images.detach().float()[:, None], prompts)
    torch.testing.assert_close(scores.float().detach(), exact, rtol=0, atol=5e-3)
    step = 0.02
    direction = step * gradient / gradient.norm()
    moved = [
        reward.gradient_scores(Samples((images + way).detach().requires_grad_(), prompts)).detach()
        for way in (direction, -direction)
    ]
    slope = float((moved[0] - moved[1]).sum()) / (2 * step)
    # Cosines are float32: 1e-7 / 0.04 is 2e-5 of the slope; the third derivative leaves 3e-4.
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-3)
    with pytest.raises(ValueError, match="require no gradient"):
        reward.gradient_scores(Samples(images_of((32, 32), 1), ["a"]))


@torch.no_grad()
def test_bfloat16_towers_keep_a_float32_cosine(folder):
    images = images_of((32, 32), 4)[:, None]
    exact = ClipScore(str(folder[0]))(images, PROMPTS)
    reward = ClipScore(str(folder[0]), dtype="bfloat16")
    scores = reward(images, PROMPTS)
    assert reward.clip.model.visual_projection.weight.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, exact, rtol=0, atol=0.05)  # 2^-8 through two layers


@torch.no_grad()
def test_pickscore_is_scaled(folder, tmp_path):
    tiny_clip(tmp_path, seed=5)  # Only its tokenizer and preprocessing are read.
    images = images_of((41, 32), 4)
    cosine = reference_clip(folder[1], images, PROMPTS)
    logits = PickScore(str(folder[0]), processor=str(tmp_path))(images[:, None], PROMPTS)
    # exp(4.6) = 99.5 magnifies the cosine's error.
    torch.testing.assert_close(logits, cosine * folder[1].logit_scale.exp(), rtol=0, atol=2e-4)
    raw = PickScore(str(folder[0]), processor=str(tmp_path), scale="cosine")(
        images[:, None], PROMPTS
    )
    torch.testing.assert_close(raw, cosine, rtol=0, atol=TIGHT)


# ---- open_clip's layout --------------------------------------------------------------------------


def open_clip_cosine(model, pixels, prompts) -> torch.Tensor:
    return F.cosine_similarity(model.visual(pixels), model.encode_text(open_clip_tokens(prompts)))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@torch.no_grad()
def test_open_clip_checkpoints(tmp_path, quick, mode):
    model = tiny_open_clip(tmp_path, quick=quick, preprocess={"resize_mode": mode})
    images = images_of((45, 31), 4)
    if mode == "squash":
        resized = [pil(i).resize((28, 28), Image.Resampling.BICUBIC) for i in images]
    else:
        # 31 -> 28 wide, int(28 * 45 / 31) = 40 high, of which the middle 28 from row 6.
        resized = [
            pil(i).resize((28, 40), Image.Resampling.BICUBIC).crop((0, 6, 28, 34)) for i in images
        ]
    pixels = torch.stack([torch.tensor(list(r.tobytes())).view(28, 28, 3) for r in resized])
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    prompts = ["a red cat", "Two  DOGS &amp; a bird", "x" * 300, ""]
    cleaned = ["a red cat", "two dogs & a bird", "x" * 300, ""]
    expected = open_clip_cosine(model, (pixels - mean) / std, cleaned)
    scores = ClipScore(str(tmp_path))(images[:, None], prompts)
    torch.testing.assert_close(scores, expected, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("sizes", [(45, 31), (20, 33), (28, 28), (28, 17)])
@torch.no_grad()
def test_hpsv2_pads_and_does_not_scale(tmp_path, sizes):
    model = tiny_open_clip(tmp_path)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "HPS_v2.1_compressed.pt")
    (tmp_path / "open_clip_model.safetensors").unlink()
    images = images_of(sizes, 4)
    pixels = images.float() / 255
    scale = 28 / max(sizes)
    fitted = tuple(round(side * scale) for side in sizes)
    if fitted != sizes:
        pixels = F.interpolate(pixels, fitted, mode="bicubic", antialias=True)
    canvas = torch.zeros(4, 3, 28, 28)
    top, left = (28 - fitted[0]) // 2, (28 - fitted[1]) // 2
    canvas[:, :, top : top + fitted[0], left : left + fitted[1]] = pixels
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = open_clip_cosine(model, (canvas - mean) / std, PROMPTS)
    reward = Hps2(str(tmp_path), tokenizer=str(tmp_path))
    torch.testing.assert_close(reward(images[:, None], PROMPTS), expected, rtol=0, atol=TIGHT)
    images = (images.float() / 255).requires_grad_()
    smooth = reward.gradient_scores(Samples(images, PROMPTS))
    torch.testing.assert_close(smooth, expected, rtol=0, atol=TIGHT)


def test_conversion_leaves_nothing_over(tmp_path):
    model = tiny_open_clip(tmp_path)
    state = dict(model.state_dict())
    assert len(from_open_clip(state)) == len(state) + 4 * (2 + 2)  # q, k, v apart, twice a block
    clip = load_clip(str(tmp_path))
    assert {n for n, _ in clip.model.named_parameters()} == set(from_open_clip(state))


def test_wrong_checkpoints_are_refused(tmp_path, folder):
    model = tiny_open_clip(tmp_path)
    state = dict(model.state_dict())
    state["surplus"] = state.pop("visual.ln_pre.bias")
    torch.save(state, tmp_path / "HPS_v2.1_compressed.pt")
    missing = r"1 missing \(vision_model.pre_layrnorm.bias\); 1 left over"
    with pytest.raises(ValueError, match=missing):
        Hps2(str(tmp_path), tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="holds no HPS_v2_compressed.pt"):
        Hps2(str(tmp_path), version="2.0", tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="holds no open_clip_config.json"):
        load_clip(str(folder[0]), "open_clip")
    settings = {"model_cfg": OPEN_CLIP | {"custom_text": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="custom_text are not implemented"):
        load_clip(str(tmp_path))


def test_module_prefix_of_ddp_is_dropped(tmp_path):
    model = tiny_open_clip(tmp_path)
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(wrapped, tmp_path / "HPS_v2.1_compressed.pt")
    Hps2(str(tmp_path), tokenizer=str(tmp_path))


# ---- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(48, 64), (37, 51), (51, 37), (224, 225), (31, 90), (256, 224)])
def test_shortest_edge_equals_transformers_processor(sizes):
    images = images_of(sizes, 2)
    ours = Preprocess((32, 32), resize=32)(images)
    theirs = processor(32)([pil(i) for i in images], return_tensors="pt")["pixel_values"]
    # The same pixels; 1 / 255 is a product there and a quotient here.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_preprocessor_settings_that_would_be_ignored_are_refused():
    for settings in ({"do_resize": False}, {"resample": 2}, {"do_center_crop": False},
                     {"rescale_factor": 1.0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            Preprocess.from_transformers(settings, 32)
    with pytest.raises(ValueError, match="interpolation = bilinear"):
        Preprocess.from_open_clip({"interpolation": "bilinear"}, 32)
    with pytest.raises(ValueError, match="resize_mode = longest"):
        Preprocess.from_open_clip({"resize_mode": "longest"}, 32)
