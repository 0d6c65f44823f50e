"""Families of users: found by file and class, checked part by part, and the example's own rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from case_custom import CASES, FAMILY, SCHEDULER, tiny_ltx
from conformance import CPU, family_of
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

from dancegrpo_fast.cli.fetch import fetch
from dancegrpo_fast.config import ModelConfig, UserError
from dancegrpo_fast.config.sampling import FAMILY_NAMES
from dancegrpo_fast.models import _TUPLES, FAMILIES, Family, _faults, family_class, open_family
from dancegrpo_fast.models.embeddings import Embeddings
from dancegrpo_fast.prompt import Prompt

(CASE,) = CASES
EXAMPLE = FAMILY.rpartition(":")[0]
STATED = ("pipelines", "encoders", "blocks", "lora_targets", "text_length")
WRITTEN = ("read_latent_shape", "embed", "network", "vae_latents", "call_arguments")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_ltx(tmp_path_factory.mktemp("models") / "ltx")


def user_file(tmp_path: Path, lines: str) -> str:
    """A user's file that starts from the example's class; returns the family's name."""
    start = "import runpy\nfrom dancegrpo_fast.models import Family\n"
    start += f"LTX = runpy.run_path({EXAMPLE!r})['LTXFamily']\n"
    (tmp_path / "mine.py").write_text(f"{start}{lines}\n")
    return f"{tmp_path / 'mine.py'}:Mine"


def refused(name: str, folder: Path = Path("nowhere")) -> str:
    """The error line of opening a family."""
    config = ModelConfig(family=name, path=str(folder), height=32, width=32)
    with pytest.raises(UserError) as caught:
        open_family(config)
    (line,) = str(caught.value).split("\n")
    return line


# ---- which family --------------------------------------------------------------------------------


def test_names_of_ours_are_one_list():
    assert set(FAMILY_NAMES) == set(FAMILIES) and list(FAMILY_NAMES) == sorted(FAMILY_NAMES)


@pytest.mark.parametrize(
    ("lines", "name", "expected"),
    [
        ("", "missing.py:Mine", "missing.py is not a file; paths count from "),
        ("", None, "mine.py defines no Mine"),
        ("Mine = 3", None, "Mine is no family; write class Mine(Family)"),
        ("class Mine: pass", None, "Mine is no family; write class Mine(Family)"),
    ],
)
def test_what_is_no_family_is_refused(tmp_path, lines, name, expected):
    line = refused(name or user_file(tmp_path, lines))
    assert line.startswith("model.family = '") and expected in line


def test_paths_count_from_the_working_directory(folder, tmp_path, monkeypatch):
    user_file(tmp_path, "class Mine(LTX): pass")
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(family="mine.py:Mine", path=str(folder), height=32, width=32, frames=5)
    assert open_family(config).latent_shape == (4, 2, 8, 8)


def test_a_file_may_hold_dataclasses(tmp_path):
    """dataclasses look the module of a class up by its name."""
    name = user_file(tmp_path, "class Mine(LTX): pass")
    file = Path(name.rpartition(":")[0])
    text = "from dataclasses import dataclass\n@dataclass\nclass Size:\n    side: int\n"
    file.write_text(f"from __future__ import annotations\n{text}{file.read_text()}")
    assert family_class(name).text_length == 128


# ---- its parts -----------------------------------------------------------------------------------


def test_the_parts_tested_here_are_all_parts():
    assert set(WRITTEN) == Family.__abstractmethods__
    assert set(STATED) == {name for name in Family.__annotations__ if not hasattr(Family, name)}


@pytest.mark.parametrize("part", [*STATED, *WRITTEN])
def test_a_forgotten_part_is_named(tmp_path, part):
    kept = f"{{k: v for k, v in vars(LTX).items() if k != {part!r} and k[:2] != '__'}}"
    name = user_file(tmp_path, f"Mine = type('Mine', (Family,), {kept})")
    missing = f"does not state {part}" if part in STATED else f"does not write {part}()"
    assert refused(name) == f"model.family = {name!r}: Mine {missing} (docs/families.md)"


def test_all_forgotten_parts_come_together(tmp_path):
    line = refused(user_file(tmp_path, "class Mine(Family): pass"))
    assert f"Mine does not state {', '.join(STATED)}; it does not write " in line
    assert all(f"{name}()" in line for name in WRITTEN)


@pytest.mark.parametrize(
    ("part", "value", "example"),
    [
        ("blocks", "('transformer_blocks')", "names such as ('a', 'b')"),
        ("pipelines", "['LTXPipeline']", "names such as ('a', 'b')"),
        ("networks", "'transformer'", "names such as ('a', 'b')"),
        ("encoders", "(None,)", "names such as ('a', 'b')"),
        ("lora_targets", "'to_q'", "names such as ['a', 'b']"),
        ("text_length", "None", "a number of tokens"),
        ("text_length", "0", "a number of tokens"),
    ],
)
def test_a_part_of_the_wrong_kind_is_named(tmp_path, part, value, example):
    line = refused(user_file(tmp_path, f"class Mine(LTX): {part} = {value}"))
    assert f"Mine has {part} = " in line and f"must be {example}" in line


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_have_all_parts_too(name):
    assert _faults(FAMILIES[name]) == []


def test_tuples_are_the_attributes_declared_as_such():
    hints = get_type_hints(Family)
    assert all(get_origin(hint) is ClassVar for hint in hints.values())
    kinds = {name: get_origin(get_args(hint)[0]) for name, hint in hints.items()}
    assert {name for name, kind in kinds.items() if kind is tuple} == set(_TUPLES)


# ---- the example ---------------------------------------------------------------------------------


def test_its_names_are_those_of_the_network(folder, tmp_path):
    family = family_of(CASE.recipe(tmp_path, folder))
    (network,) = family.modules.values()
    for name in family.blocks:
        assert isinstance(getattr(network, name), torch.nn.ModuleList)
    names = [name for name, _ in network.named_modules()]
    assert all(any(n.endswith(f".{t}") for n in names) for t in family.lora_targets)


def test_grid_of_the_published_scheduler(folder, tmp_path):
    """161 frames of 512 x 704 through the published VAE: 21 x 16 x 22 tokens, 8 steps."""
    family = open_family(CASE.recipe(tmp_path, folder).model)
    family.latent_shape = (128, 21, 16, 22)
    config = CASE.recipe(tmp_path, folder, {"rollout.steps": 8}).rollout
    found = family.read_grid().schedule(config).sigmas
    mu = calculate_shift(21 * 16 * 22, 1024, 4096, 0.95, 2.05)
    assert mu == pytest.approx(3.2302, abs=1e-4)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=mu)
    assert list(found) == scheduler.sigmas.tolist()
    # Exponential shift, then stretched so that the last sigma is the published terminal 0.1. The
    # scheduler computes in float32: a few roundings of values up to 1.
    shifted = [math.exp(mu) / (math.exp(mu) + 8 / k - 1) for k in range(8, 0, -1)]
    expected = [1 - (1 - sigma) * 0.9 / (1 - shifted[-1]) for sigma in shifted]
    assert found == pytest.approx([*expected, 0], abs=1e-6)
    assert expected[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"height": 48}, "model.height = 48: must be a multiple of 32 here; use 32 or 64"),
        ({"width": 8}, "model.width = 8: must be a multiple of 32 here; use 32"),
        ({"frames": 6}, "(frames - 1) must be divisible by 4 here; use 5 or 9"),
        ({"guidance": 0.5}, "the stock pipeline guides only above 1"),
        ({"guidance_2": 2.0}, "it is for the second expert of a Wan2.2 folder"),
        ({"embedded_guidance": 2.0}, "has no such input; use model.guidance"),
    ],
)
def test_what_the_model_cannot_do_is_refused(folder, tmp_path, change, expected):
    changes = {f"model.{key}": value for key, value in change.items()}
    with pytest.raises(UserError) as caught:
        open_family(CASE.recipe(tmp_path, folder, changes).model)
    assert expected in str(caught.value)


def test_a_vae_that_decodes_with_noise_is_refused(tmp_path):
    folder = tiny_ltx(tmp_path / "later", timestep_conditioning=True)
    with pytest.raises(UserError, match="takes a timestep or draws noise to decode"):
        open_family(CASE.recipe(tmp_path, folder).model)


def test_a_changed_file_makes_other_embeddings(folder, tmp_path):
    """What `embed` gives may have changed with it."""

    def key() -> str:
        name = user_file(tmp_path, f"class Mine(LTX): text = {len(keys)}")
        config = CASE.recipe(tmp_path, folder, {"model.family": name})
        return Embeddings(open_family(config.model), tmp_path, CPU).key(Prompt("a red square"))

    keys: list[str] = []
    keys.append(key())
    assert key() != keys[0]
    keys.clear()
    assert key() == key()


def test_fetch_asks_the_class_what_it_never_uses(folder, tmp_path):
    (model,) = fetch(CASE.recipe(tmp_path, folder))
    assert model.folder == folder
    with pytest.raises(UserError, match="defines no Other"):
        list(fetch(CASE.recipe(tmp_path, folder, {"model.family": f"{EXAMPLE}:Other"})))
