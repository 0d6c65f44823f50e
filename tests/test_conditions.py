"""Which prompts share a forward, and how many forwards guidance takes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config

from dancegrpo_fast.batching import micro_batches
from dancegrpo_fast.models import Condition, Conditions, open_family


def condition(length: int, negative: int | None = None) -> Condition:
    text = torch.arange(2.0 * length).reshape(length, 2)
    none = None if negative is None else {"text": -torch.ones(negative, 2)}
    return Condition({"text": text}, none, {"image": torch.full((3,), float(length))})


def test_flat_and_back():
    one = condition(4, 2)
    assert sorted(one.flat()) == ["negative.text", "positive.text", "shared.image"]
    again = Condition.from_flat(one.flat())
    assert again.flat().keys() == one.flat().keys() and again.shape == one.shape
    assert Condition.from_flat(condition(3).flat()).negative is None


def test_prompts_of_unequal_length_are_of_unequal_kind():
    rows = Conditions.of([condition(n) for n in (3, 5, 3, 4, 5)])
    assert rows.kinds == (0, 1, 0, 3, 1)
    batch = rows.select([2, 0, 2])
    assert batch.positive()["text"].shape == (3, 3, 2)
    assert batch.positive()["image"].shape == (3, 3)
    assert batch.negative() is None


@pytest.mark.parametrize(
    ("lengths", "one"),
    [([(3, 3), (5, 5)], True), ([(3, 3), (5, 3)], False), ([(3, None)], True)],
)
def test_one_forward_is_one_decision_for_the_iteration(lengths, one):
    """A rank whose own prompts agree must still make the calls of the others."""
    rows = Conditions.of([condition(*pair) for pair in lengths])
    assert rows.one_forward is one and rows.select([0]).one_forward is one


def test_micro_batches_keep_order_and_never_mix_kinds():
    items = [0, 0, 0, 1, 1, 0, 2]
    batches = micro_batches(items, 2, lambda item: item)
    assert batches == [[0, 0], [0], [1, 1], [0], [2]]
    assert micro_batches([], 2, lambda item: item) == []


@pytest.mark.parametrize("one_forward", [True, False])
def test_guidance_in_one_forward_or_two(tmp_path, tiny_wan_folder, one_forward):
    """u + g (c - u), whichever way; a network that returns its text tells the branches apart."""
    config = tiny_config(tmp_path, tiny_wan_folder, {"model.guidance": 3.0})
    family = open_family(config.model)
    calls = []

    def network(module, latents, timesteps, inputs):
        calls.append(len(latents))
        return latents * inputs["text"].mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    family.network = network
    rows = Conditions((condition(3, 3), condition(3, 3)), one_forward)
    latents = torch.ones(2, 4, 1, 2, 2)
    found = family.model_output(None, latents, torch.ones(2), rows)
    guided, unguided = 2.5, -1.0
    assert torch.equal(found, torch.full_like(latents, unguided + 3.0 * (guided - unguided)))
    assert calls == ([4] if one_forward else [2, 2])
