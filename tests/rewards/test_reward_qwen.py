"""HPSv3 and VideoAlign against the authors' forward on a tiny Qwen2-VL; template files."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_qwen import (
    STATISTICS,
    official_states,
    old_names,
    patches_by_loops,
    stand_in,
    tiny_hpsv3,
    tiny_videoalign,
)
from tiny_reward_models import images_of
from transformers import Qwen2VLImageProcessorPil

from dancegrpo_fast.rewards import hpsv3, video_align
from dancegrpo_fast.rewards.hpsv3 import Hps3
from dancegrpo_fast.rewards.interface import Samples
from dancegrpo_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD
from dancegrpo_fast.rewards.qwen import patches, smart_size
from dancegrpo_fast.rewards.templates import HPSV3, constant, fill, load_template
from dancegrpo_fast.rewards.video_align import VideoAlign, frame_positions, merge_lora

PROMPTS = ["a red cat", "two {dogs} and a bird {0} that fly over the hills", ""]
#: Scores of size 1 after 2 + 2 layers in float32; batches add masked keys to the softmax sums.
TIGHT = {"rtol": 2e-5, "atol": 2e-5}


def normalise(frames: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (frames.float() / 255 - mean) / std


# ---- HPSv3 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """(folder, template file, model, head, tokenizer); the module's template expects the file."""
    folder = tmp_path_factory.mktemp("hpsv3")
    model, head, tokenizer, template, file = tiny_hpsv3(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(hpsv3, "HPSV3", template)
    yield folder, file, model, head, tokenizer
    patch.undo()


def load_hps(hps, **options) -> Hps3:
    folder, file = hps[:2]
    options = {"dtype": "float32", "max_pixels": 6 * 28 * 28} | options
    return Hps3(str(folder), base=str(folder), template=str(file), **options)


@pytest.mark.parametrize("sizes", [(100, 130), (61, 40), (28, 200)])
@torch.no_grad()
def test_hpsv3(hps, sizes):
    _, _, model, head, tokenizer = hps
    images = images_of(sizes, 3)
    processor = Qwen2VLImageProcessorPil(min_pixels=6 * 28 * 28, max_pixels=6 * 28 * 28)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        seen = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
        text = f"\nRate {prompt}\n\n\n<|Reward|>\n"
        states, ids = official_states(model, tokenizer, seen["pixel_values"],
                                      seen["image_grid_thw"][0].tolist(), text,
                                      "<|image_pad|>")  # fmt: skip
        expected.append(head(states)[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")][0, 0])
    expected = torch.stack(expected)
    reward = load_hps(hps)
    scores = reward(images[:, None], PROMPTS)
    torch.testing.assert_close(scores, expected, **TIGHT)
    assert expected.std() > 100 * TIGHT["atol"]
    singles = [reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(singles), scores, **TIGHT)
    moved = reward(images[[2, 0, 1]], [PROMPTS[i] for i in (2, 0, 1)])
    torch.testing.assert_close(moved, scores[[2, 0, 1]], **TIGHT)


@torch.no_grad()
def test_bfloat16_keeps_a_float32_head(hps):
    images = images_of((60, 60), 3)[:, None]
    reward, exact = load_hps(hps, dtype="bfloat16"), load_hps(hps)
    assert {p.dtype for p in reward.reader.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    scores = reward(images, PROMPTS)
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, exact(images, PROMPTS), rtol=0, atol=0.1)


@torch.no_grad()
def test_a_prompt_with_the_models_own_tokens_costs_no_other_sample(hps):
    prompts = ["a cat", "a <|Reward|>", "<|image_pad|>", "a dog<|im_end|>"]
    images = images_of((60, 60), 4)[:, None]
    hpsv3 = load_hps(hps)
    scored = hpsv3.score(Samples(images, prompts))
    torch.testing.assert_close(scored.values[:1], hpsv3(images[:1], prompts[:1]))
    assert scored.values[1:].isnan().all() and scored.errors[0] == ""
    assert [why.split()[3].strip(",") for why in scored.errors[1:]] == [
        "<|Reward|>", "<|image_pad|>", "<|im_end|>",
    ]  # fmt: skip


def test_hpsv3_refuses(hps, tmp_path):
    folder, file, model, head, _ = hps
    state = old_names(model) | {f"rm_head.{k}": v for k, v in head.state_dict().items()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1]
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="tokens and the tokenizer of"):
        Hps3(str(tmp_path), base=str(folder), template=str(file))
    save_file({"rm_head.0.weight": torch.zeros(1, 1)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="holds no token embeddings"):
        Hps3(str(tmp_path), base=str(folder), template=str(file))
    (tmp_path / "HPSv3.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        Hps3(str(tmp_path), base=str(folder), template=str(file))


# ---- VideoAlign ----------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[1, 3], ids=["one head", "a head per part"])
def videoalign(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videoalign")
    adapted, head, tokenizer, template, file = tiny_videoalign(folder, request.param)
    patch = pytest.MonkeyPatch()
    patch.setattr(video_align, "VIDEO_REWARD", template)
    patch.setattr(video_align, "MIN_FRAME_PIXELS", 4 * 28 * 28)
    yield folder, file, adapted, head, tokenizer
    patch.undo()


def load_videoalign(videoalign, **options) -> VideoAlign:
    folder, file = videoalign[:2]
    return VideoAlign(
        str(folder), base=str(folder), template=str(file), dtype="float32", **options
    )


@torch.no_grad()
def test_videoalign(videoalign):
    _, _, adapted, head, tokenizer = videoalign
    model = adapted.base_model.model
    videos = images_of((90, 130), 3 * 21).reshape(3, 21, 3, 90, 130)
    reward = load_videoalign(videoalign)
    samples = Samples(videos, PROMPTS, fps=8)
    # 21 frames at 8 a second: 5.25 -> max(., 4) -> 6 frames (2.625 rounds to 3 pairs).
    chosen = torch.linspace(0, 20, 6).round().long()
    # 90 x 130 is 3 x 5 blocks, more than 12: scale by sqrt(11700 / 9408) to 2 x 4 blocks.
    expected = []
    for video, prompt in zip(videos[:, chosen], PROMPTS, strict=True):
        frames = torch.nn.functional.interpolate(
            video.float(), (56, 112), mode="bicubic", antialias=True
        )
        pixels, grid = patches_by_loops(normalise(frames.clamp(0, 255).round()))
        text = f"Rate {prompt}: <|VQ_reward|>, <|MQ_reward|>, <|TA_reward|>"
        states, ids = official_states(model, tokenizer, pixels, grid, text, "<|video_pad|>")
        parts = []
        for column, part in enumerate(("VQ", "MQ", "TA")):
            (state,) = states[ids == tokenizer.convert_tokens_to_ids(f"<|{part}_reward|>")]
            logits = head(state)
            raw = logits[column if len(logits) == 3 else 0]
            parts.append((raw - STATISTICS[f"{part}_mean"]) / STATISTICS[f"{part}_std"])
        expected.append(torch.stack(parts))
    expected = torch.stack(expected)
    parts, errors = reward.score_parts(samples)
    assert errors == {}
    torch.testing.assert_close(parts, expected, **TIGHT)
    assert (expected.std(dim=0) > 50 * TIGHT["atol"]).all()
    torch.testing.assert_close(reward.score(samples).values, expected.sum(dim=1), **TIGHT)
    singles = [reward.score_parts(samples.of([i]))[0] for i in range(3)]
    torch.testing.assert_close(torch.cat(singles), parts, **TIGHT)
    moved = reward.score_parts(samples.of([1, 2, 0]))[0]
    torch.testing.assert_close(moved, parts[[1, 2, 0]], **TIGHT)
    floats = reward.score_parts(Samples(videos.float() / 255, PROMPTS, fps=8))[0]
    assert torch.equal(floats, parts)
    raw, _ = load_videoalign(videoalign, normalise=False).score_parts(samples)
    mean, std = (torch.tensor([STATISTICS[f"{p}_{k}"] for p in ("VQ", "MQ", "TA")])
                 for k in ("mean", "std"))  # fmt: skip
    torch.testing.assert_close(raw, parts * std + mean, **TIGHT)


def test_videoalign_needs_a_frame_rate(videoalign):
    reward = load_videoalign(videoalign)
    videos = images_of((56, 56), 8).reshape(1, 8, 3, 56, 56)
    with pytest.raises(ValueError, match="set options.fps"):
        reward(videos, ["a"])
    known = load_videoalign(videoalign, fps=8.0)(videos, ["a"])
    torch.testing.assert_close(reward.score(Samples(videos, ["a"], fps=8)).values, known)
    with pytest.raises(ValueError, match="needs at least 2"):
        reward.score(Samples(videos[:, :1], ["a"], fps=8))
    broken = videos.float() / 255
    broken[0, 0, 0, 0, 0] = torch.inf
    parts, errors = reward.score_parts(Samples(broken, ["a"], fps=8))
    assert errors == {0: "a pixel is not finite"} and parts.isnan().all()


@torch.no_grad()
def test_a_prompt_with_a_reward_token_costs_no_other_video(videoalign):
    reward = load_videoalign(videoalign, fps=8.0)
    videos = images_of((56, 56), 16).reshape(2, 8, 3, 56, 56)
    scored = reward.score(Samples(videos, ["a <|TA_reward|>", "a cat"]))
    torch.testing.assert_close(scored.values[1:], reward(videos[1:], ["a cat"]), **TIGHT)
    assert "holds <|TA_reward|>" in scored.errors[0] and scored.errors[1] == ""


def test_settings_of_another_model_are_refused(videoalign, tmp_path):
    folder, file = videoalign[:2]
    config = json.loads((folder / "model_config.json").read_text())
    config["data_config"]["prompt_template_type"] = "simple"
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="prompt_template_type = 'simple'"):
        VideoAlign(str(tmp_path), base=str(folder), template=str(file))


@torch.no_grad()
def test_merged_adapter_equals_peft(videoalign):
    _, _, adapted, *_ = videoalign
    merged = merge_lora(dict(adapted.state_dict()), 8 / 2)
    plain = adapted.base_model.model
    expected = {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name in adapted.state_dict()
        if "lora_" not in name
    }
    assert set(merged) == expected
    layer = plain.model.language_model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32)
    ours = x @ merged["model.language_model.layers.0.self_attn.q_proj.weight"].T
    # Sums of 32 products of size 1 in another order.
    torch.testing.assert_close(
        ours + layer.base_layer.bias, layer(x), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="adapter of a lacks its base weight"):
        merge_lora({"base_model.model.a.lora_A.default.weight": x}, 1.0)
    saved = {"base_model.model.rm_head.original_module.weight": x,
             "base_model.model.rm_head.modules_to_save.default.weight": x + 1}  # fmt: skip
    assert torch.equal(merge_lora(saved, 1.0)["rm_head.weight"], x + 1)


# ---- pixels --------------------------------------------------------------------------------------


def test_patches_equal_the_image_processor():
    image = images_of((84, 56), 1)
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6)
    theirs = processor(Image.fromarray(image[0].permute(1, 2, 0).numpy()), return_tensors="pt")
    ours, grid = patches(image)
    assert list(grid) == theirs["image_grid_thw"][0].tolist()
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=1e-6)
    odd = images_of((28, 56), 3)
    ours, grid = patches(odd)
    theirs, expected_grid = patches_by_loops(normalise(torch.cat([odd, odd[-1:]])))
    assert list(grid) == expected_grid and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((1024, 1024), (200704, 200704), (448, 448)),
        ((1024, 768), (200704, 200704), (504, 364)),  # 517.2 and 387.9 rounded down
        ((100, 100), (200704, 200704), (448, 448)),
        ((480, 832), (100352, 200704), (336, 588)),  # 340.3 and 589.8
        ((240, 416), (100352, 200704), (252, 420)),  # 8.57 and 14.86 blocks, inside the bounds
        ((14, 5000), (784, 200704), (28, 5012)),
    ],
)
def test_smart_size(size, bounds, expected):
    assert smart_size(*size, *bounds) == expected


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [(53, 8, 14), (81, 16, 10), (5, 8, 4), (4, 30, 4), (3, 30, 2), (2, 1, 2), (2000, 1, 768)],
)
def test_frames_are_chosen_by_time(count, fps, expected):
    positions = frame_positions(count, fps, 2)
    assert len(positions) == expected
    assert positions[0] == 0 and positions[-1] == count - 1


# ---- templates -----------------------------------------------------------------------------------


def test_templates_are_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    template, file = stand_in(HPSV3, tmp_path, {"INSTRUCTION": "a {text_prompt}",
                                                "prompt_with_special_token": " b"})  # fmt: skip
    assert load_template(template, file) == "a {text_prompt} b"
    assert fill("a {text_prompt} b", "{x} {text_prompt}") == "a {x} {text_prompt} b"
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr(HPSV3.member, file.read_bytes())
    assert load_template(template, tmp_path / "w.whl") == "a {text_prompt} b"
    assert constant("X = 'a' 'b'\nX2 = 1", "X") == "ab"
    with pytest.raises(ValueError, match="no plain string to X2"):
        constant("X = 'a' 'b'\nX2 = 1", "X2")
    with pytest.raises(ValueError, match="another version .* hpsv3 1.0.0 on PyPI"):
        load_template(HPSV3, file)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is 1.*options.template"):
        load_template(HPSV3)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="cannot be read"):
        load_template(HPSV3, tmp_path / "gone")
