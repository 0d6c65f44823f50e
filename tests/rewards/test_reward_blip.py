"""LAION aesthetic and ImageReward against the official code's formula on tiny weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_reward_models import images_of, randomise, tiny_clip
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPImageProcessorPil

from dancegrpo_fast.rewards.aesthetic import Aesthetic
from dancegrpo_fast.rewards.image_reward import ImageReward, split_state
from dancegrpo_fast.rewards.interface import Samples
from dancegrpo_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD

PROMPTS = ["a red cat", "two dogs", "x" * 300, ""]


class Head(nn.Module):
    """The head as the authors wrote it (both projects use the same one)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width, 1024, 128, 64, 16, 1]
        linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        drops = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
        self.layers = nn.Sequential(
            linear[0], drops[0], linear[1], drops[1], linear[2], drops[2], *linear[3:]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.no_grad()
def test_aesthetic(tmp_path):
    clip = tiny_clip(tmp_path / "clip")
    head = Head(16).eval()
    randomise(head, 1, scale=0.1)
    torch.save(head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    images = images_of((37, 50), 4)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    pixels = processor(
        [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], return_tensors="pt"
    )["pixel_values"]
    features = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    expected = head(features / features.norm(dim=-1, keepdim=True))[:, 0]
    for path in (tmp_path, tmp_path / "sac+logos+ava1-l14-linearMSE.pth"):
        reward = Aesthetic(str(path), clip=str(tmp_path / "clip"))
        scores = reward(images[:, None], PROMPTS)
        # The five linear maps sum up to 1024 terms: a few ulps of the largest partial sum.
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        singles = torch.cat([reward(images[i : i + 1], [""]) for i in range(4)])
        torch.testing.assert_close(singles, scores, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3  # 100 times the tolerance


# ---- ImageReward, with the names and the forward of the authors' BLIP ----------------------------

WIDTH, TEXT, HEADS = 128, 24, 3
MED = {
    "vocab_size": 59, "hidden_size": TEXT, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": 40, "max_position_embeddings": 40, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu", "encoder_width": 768, "add_cross_attention": True, "type_vocab_size": 2,
}  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    bias = None if mask is None else (1 - mask[:, None, None].float()) * -1e9
    return F.scaled_dot_product_attention(*split, attn_mask=bias).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VitAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), heads=x.shape[-1] // 64))


class VitBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = VitAttention(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.blocks = nn.ModuleList(VitBlock(WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertAttention(nn.Module):
    def __init__(self, source: int) -> None:
        super().__init__()
        self.self, self.output = nn.Module(), nn.Module()
        self.self.query = nn.Linear(TEXT, TEXT)
        self.self.key, self.self.value = nn.Linear(source, TEXT), nn.Linear(source, TEXT)
        self.output.dense = nn.Linear(TEXT, TEXT)
        self.output.LayerNorm = nn.LayerNorm(TEXT, 1e-12)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        seen = attend(
            self.self.query(x), self.self.key(source), self.self.value(source), HEADS, mask
        )
        return self.output.LayerNorm(self.output.dense(seen) + x)


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.crossattention = BertAttention(TEXT), BertAttention(WIDTH)
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense = nn.Linear(TEXT, 40)
        self.output.dense = nn.Linear(40, TEXT)
        self.output.LayerNorm = nn.LayerNorm(TEXT, 1e-12)

    def forward(self, x: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), image, None)
        hidden = F.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(self.output.dense(hidden) + x)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(59, TEXT)
        self.embeddings.position_embeddings = nn.Embedding(40, TEXT)
        self.embeddings.LayerNorm = nn.LayerNorm(TEXT, 1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder.layer = nn.ModuleList(BertLayer() for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        e = self.embeddings
        x = e.word_embeddings(ids) + e.position_embeddings(torch.arange(ids.shape[1]))
        x = e.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer(x, image, mask)
        return x


class Official(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blip = nn.Module()
        self.blip.visual_encoder, self.blip.text_encoder = Vit(), Bert()
        self.mlp = Head(TEXT)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image = self.blip.visual_encoder(pixels)
        return self.mlp(self.blip.text_encoder(ids, mask, image)[:, 0].float())[:, 0]


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[Path, Official]:
    folder = tmp_path_factory.mktemp("imagereward")
    letters = [chr(c) for c in range(97, 123)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    BertTokenizer(vocab={t: i for i, t in enumerate(vocab)}).save_pretrained(folder)
    model = Official().eval()
    randomise(model, 2, scale=0.1)
    vit = model.blip.visual_encoder
    with torch.no_grad():  # So small that the norms' epsilon, 1e-6, shows in the scores.
        for parameter in (vit.cls_token, vit.pos_embed, *vit.patch_embed.parameters()):
            parameter.mul_(2e-3)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    return folder, model


@pytest.mark.parametrize("sizes", [(45, 32), (37, 60), (32, 32), (33, 34)])
@torch.no_grad()
def test_image_reward(official, sizes):
    folder, model = official
    reward = ImageReward(str(folder), tokenizer=str(folder))
    images = images_of(sizes, 4)
    # torchvision's Resize and CenterCrop: odd cuts round half to even.
    height, width = sizes
    if height <= width:
        target = (32, int(32 * width / height))
    else:
        target = (int(32 * height / width), 32)
    top, left = (round((have - 32) / 2) for have in target)
    cut = [
        Image.fromarray(i.permute(1, 2, 0).numpy())
        .resize(target[::-1], Image.Resampling.BICUBIC)
        .crop((left, top, left + 32, top + 32))
        for i in images
    ]
    pixels = torch.stack([torch.tensor(list(c.tobytes())).view(32, 32, 3) for c in cut])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    tokens = BertTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    raw = model(pixels, tokens["input_ids"], tokens["attention_mask"])
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    scores = reward(images[:, None], PROMPTS)
    # Scores of size 1 after 7 layers in float32, summed in another order: some 10 ulps.
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3  # 100 times the tolerance
    singles = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(singles, scores, rtol=1e-5, atol=1e-5)
    order = [3, 1, 0, 2]
    moved = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(moved, scores[order], rtol=1e-5, atol=1e-5)


def test_image_reward_converts_every_name(official):
    folder, model = official
    vision, text, head = split_state(model.state_dict())
    # All but the positions 0, 1, 2, ... of the text encoder.
    assert len(vision) + len(text) + len(head) == len(model.state_dict()) - 1
    reward = ImageReward(str(folder), tokenizer=str(folder))
    assert set(vision) == set(reward.vision.state_dict())
    assert set(text) == set(reward.text.state_dict())
    with pytest.raises(ValueError, match="no ImageReward: it holds other.weight"):
        split_state({"other.weight": torch.zeros(1)})


def test_image_reward_has_gradients(official):
    folder, _ = official
    reward = ImageReward(str(folder), tokenizer=str(folder))
    images = (images_of((40, 36), 2).float() / 255).requires_grad_()
    scores = reward.gradient_scores(Samples(images, PROMPTS[:2]))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    step = 0.02 * gradient / gradient.norm()
    with torch.enable_grad():
        moved = [
            reward.gradient_scores(
                Samples((images + way).detach().requires_grad_(), PROMPTS[:2])
            ).sum()
            for way in (step, -step)
        ]
    slope = float((moved[0] - moved[1]).detach()) / 0.04
    # Scores of size 1 in float32: 1e-6 / 0.04 beside a slope of order 0.1 and the curvature.
    assert slope == pytest.approx(float(gradient.norm()), rel=5e-3)
