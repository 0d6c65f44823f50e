"""GenEval: its rules on things of ours, its detector on a tiny Mask2Former of the real class."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_reward_models import images_of, randomise, tiny_clip
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from dancegrpo_fast.config import RewardConfig
from dancegrpo_fast.rewards import Samples, load_rewards, score
from dancegrpo_fast.rewards.geneval import (
    COLOURS,
    MOST,
    GenEval,
    Thing,
    box_of,
    clauses,
    colours_of,
    correct,
    relations,
)

LABELS = ["person", "mouse", "remote"]


def thing(left: int, top: int, right: int, bottom: int, sure: float = 0.95) -> Thing:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return Thing((left, top, right, bottom), mask, sure)


def no_colours(some, name):
    raise AssertionError("colours were asked for")


CUP = {"class": "cup", "count": 1}


@pytest.mark.parametrize(
    ("found", "count", "exclude", "values", "benchmark"),
    [
        (0, 2, [], [0.0], False),
        (1, 2, [], [0.5], False),
        (2, 2, [], [1.0], True),
        (3, 2, [], [0.5], True),
        (3, 2, [{"class": "cup", "count": 3}], [0.5], False),
        (5, 1, [], [-3.0], True),
        (1, 1, None, [1.0], True),  # As a table without a value in its column is read.
    ],
)
def test_counts(found, count, exclude, values, benchmark):
    things = {"cup": [thing(0, 0, 9, 9)] * found} if found else {}
    spec = {"include": [{"class": "cup", "count": count}], "exclude": exclude}
    assert clauses(things, spec, no_colours) == pytest.approx(values)
    assert correct(things, spec, no_colours) is benchmark


def test_colours_are_looked_at_where_the_count_holds():
    spec = {"include": [{"class": "cup", "count": 2, "color": "red"}]}
    cups = [thing(0, 0, 9, 9), thing(20, 0, 29, 9)]
    for colours, values, benchmark in (
        (["red", "red"], [1.0, 1.0], True),
        (["red", "blue"], [1.0, 0.5], False),
        (["blue", "pink"], [1.0, 0.0], False),
    ):
        assert clauses({"cup": cups}, spec, lambda some, name, c=colours: c) == values
        assert correct({"cup": cups}, spec, lambda some, name, c=colours: c) is benchmark
    assert clauses({"cup": cups[:1]}, spec, no_colours) == [0.5, 0.0]


def test_positions_are_relations_to_an_earlier_clause():
    spec = {"include": [CUP, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    left, right = thing(0, 40, 20, 60), thing(60, 40, 80, 60)
    assert clauses({"cup": [right], "dog": [left]}, spec, no_colours) == [1, 1, 1]
    assert clauses({"cup": [left], "dog": [right]}, spec, no_colours) == [1, 1, 0]
    assert clauses({"dog": [left]}, spec, no_colours) == [0, 1, 0]  # Nothing to be left of.
    assert clauses({"cup": [right], "dog": [left, left]}, spec, no_colours) == [1, 0, 0]
    assert correct({"cup": [right, left], "dog": [left]}, spec, no_colours)  # The surest counts.
    assert not correct({"cup": [left], "dog": [right]}, spec, no_colours)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((0, 40, 20, 60), (60, 40, 80, 60), {"left of"}),
        ((60, 40, 80, 60), (0, 40, 20, 60), {"right of"}),
        ((40, 0, 60, 20), (40, 60, 60, 80), {"above"}),
        ((40, 60, 60, 80), (40, 0, 60, 20), {"below"}),
        ((0, 0, 20, 20), (60, 60, 80, 80), {"left of", "above"}),
        ((0, 0, 20, 20), (3, 3, 23, 23), set()),  # 3 apart, and 0.1 * (20 + 20) = 4.
        ((0, 0, 20, 20), (0, 0, 20, 20), set()),
        # Offset (30, 10); less 4: (26, 6) of a length of 31.6: 0.82 and 0.19.
        ((0, 0, 20, 20), (30, 10, 50, 30), {"left of"}),
    ],
)
def test_where_things_lie(a, b, said):
    assert relations(thing(*a), thing(*b)) == said


def test_boxes_hold_all_of_a_mask():
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[2, 3] = mask[4, 8] = True
    assert box_of(mask) == (3, 2, 9, 5)


# ---- with models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    detector, clip = tmp_path_factory.mktemp("detector"), tmp_path_factory.mktemp("clip")
    swin = SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2],
        window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=32, num_queries=6, id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    randomise(model, 3, scale=0.25)
    model.save_pretrained(detector)
    processor = {
        "image_processor_type": "Mask2FormerImageProcessor", "size": {"height": 64, "width": 64},
        "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (detector / "preprocessor_config.json").write_text(json.dumps(processor))
    tiny_clip(clip)
    return model, str(detector), str(clip)


@torch.no_grad()
def test_detections_are_those_of_the_model(folders):
    model, detector, clip = folders
    reward = GenEval(detector, clip=clip)
    assert reward.classes == ["person", "computer mouse", "tv remote"]
    pictures, least = images_of((48, 80), 2), 0.15
    found = reward.detect(pictures, least)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                         (0.229, 0.224, 0.225)))  # fmt: skip
    total = 0
    for picture, things in zip(pictures, found, strict=True):
        small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((64, 64), 2)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        seen = model(pixel_values=((pixels / 255 - mean) / std)[None])
        expected: dict[str, list[tuple[float, int]]] = {}
        for query in range(6):
            chances = seen.class_queries_logits[0, query].exp()
            chances /= chances.sum()
            shape = seen.masks_queries_logits[:, query : query + 1]
            shape = F.interpolate(F.interpolate(shape, (64, 64), mode="bilinear"), (48, 80),
                                  mode="bilinear")[0, 0]  # fmt: skip
            inside = [1 / (1 + math.exp(-v)) for v in shape.flatten().tolist() if v > 0]
            for label, name in enumerate(reward.classes):
                sure = float(chances[label]) * (sum(inside) / len(inside) if inside else 0)
                if sure > least:
                    expected.setdefault(name, []).append((sure, len(inside)))
        total += sum(map(len, expected.values()))
        assert things.keys() == expected.keys()
        for name, some in things.items():
            wanted = sorted(expected[name], reverse=True)
            # float32 through 7 layers, in a batch of another size; a pixel on the border may flip.
            assert [t.sure for t in some] == pytest.approx([s for s, _ in wanted], abs=1e-4)
            assert [int(t.mask.sum()) for t in some] == pytest.approx([n for _, n in wanted], abs=2)
            assert all(t.box == box_of(t.mask) and t.mask.shape == (48, 80) for t in some)
            assert len(some) <= MOST
    assert total > 3  # There was something to compare.


@torch.no_grad()
def test_colours_are_clips_choice_on_the_masked_crop(folders):
    _, detector, clip = folders
    reward = GenEval(detector, clip=clip)
    picture, some = images_of((40, 60), 1)[0], [thing(5, 3, 30, 33), thing(31, 8, 57, 39)]
    some = [Thing(t.box, t.mask[:40, :60], t.sure) for t in some]
    found = colours_of(reward.clip, picture, some, "cup")
    for one, colour in zip(some, found, strict=True):
        left, top, right, bottom = one.box
        alone = picture.clone()
        alone[:, ~one.mask] = 153
        seen = reward.clip.image_features(alone[None, :, top:bottom, left:right])[0]
        likely = {}
        for name in COLOURS:
            texts = [f"a photo of a {name} cup", f"a photo of a {name}-colored cup",
                     f"a photo of a {name} object"]  # fmt: skip
            mean = torch.stack([reward.clip.text_features([t])[0] for t in texts]).mean(dim=0)
            likely[name] = float(seen @ mean) / float(mean.norm())
        assert colour == max(likely, key=lambda name: likely[name])


def test_metadata_say_what_is_asked(folders, monkeypatch):
    _, detector, clip = folders
    options = {"clip": clip, "measure": "strict"}
    (reward,) = load_rewards([RewardConfig(name="geneval", path=detector, options=options)])
    asked = []

    def detect(pictures, least):
        asked.append((len(pictures), least))
        return [{"person": [thing(0, 0, 9, 9)] * (2 if f else 1)} for f in range(len(pictures))]

    monkeypatch.setattr(reward, "detect", detect)
    one = {"tag": "single_object", "include": [{"class": "person", "count": 1}]}
    metadata = [
        one, one | {"tag": "counting"}, {}, {"include": [{"class": "cat", "count": 1}]},
        {"include": [{"class": "person", "count": 1, "position": ["above", 0]}]},
        {"include": [{"class": "person", "count": 1, "color": "mauve"}]},
        {"include": [{"class": "person", "count": 0}]}, {"include": {"class": "person"}},
    ]  # fmt: skip
    videos = torch.zeros(8, 2, 3, 8, 8)
    scored = score(reward, Samples(videos, ["a"] * 8, metadata=metadata))
    assert scored.values[:2].tolist() == [0.5, 0.5] and scored.values[2:].isnan().all()
    assert asked == [(2, 0.3), (2, 0.9)]
    for why, part in zip(scored.errors[2:], ("no GenEval", "'cat'", "earlier", "mauve", "count 0",
                          "no mapping"),
                         strict=True):  # fmt: skip
        assert part in why
