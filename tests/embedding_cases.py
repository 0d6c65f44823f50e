"""Embedded prompts of the tiny pipeline, for the tests of `models/embeddings.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import CPU, PROMPTS, tiny_config

from dancegrpo_fast.models import Condition, open_family
from dancegrpo_fast.models.embeddings import Embeddings, embeddings_folder
from dancegrpo_fast.prompt import Prompt

GUIDED = {"model.guidance": 3.0, "model.negative_prompt": "dull"}
TEXTS = [Prompt(text) for text in PROMPTS]


def make(folder: Path, model: Path, changes=None, world=CPU) -> Embeddings:
    config = tiny_config(folder, model, GUIDED | (changes or {}))
    return Embeddings(open_family(config.model), embeddings_folder(config), world)


def no_encoders(embeddings: Embeddings) -> None:
    """From here on, asking for the encoders is an error."""

    def refuse(*arguments):
        raise AssertionError("the encoders were asked for")

    embeddings.family.encoder_pipeline = refuse  # type: ignore[method-assign]


def equal(first: Condition, second: Condition) -> bool:
    one, two = first.flat(), second.flat()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
