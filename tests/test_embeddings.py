"""Embedded prompts on disk: what names them, who makes them, that they are the encoders' bits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from embedding_cases import TEXTS, equal, make, no_encoders
from safetensors.torch import load_file
from tiny_models import PROMPTS

from dancegrpo_fast.prompt import Prompt


def test_bits_of_direct_encoding(tmp_path, tiny_wan_folder):
    """Made, read again by another process, and straight from the encoders: the same bits."""
    embeddings = make(tmp_path, tiny_wan_folder)
    direct = embeddings.family.encode(TEXTS)
    assert {"positive.text", "negative.text"} == direct.rows[0].flat().keys()
    made = embeddings.conditions(TEXTS)
    later = make(tmp_path, tiny_wan_folder)
    no_encoders(later)
    read = later.conditions(TEXTS)
    assert direct.one_forward == made.one_forward == read.one_forward is True
    for rows in zip(direct.rows, made.rows, read.rows, strict=True):
        assert equal(rows[0], rows[1]) and equal(rows[0], rows[2])
    files = sorted((tmp_path / "run" / "embeddings").rglob("*"))
    assert len([f for f in files if f.suffix == ".safetensors"]) == len(TEXTS)
    assert not [f for f in files if f.is_file() and f.suffix != ".safetensors"]


def test_repeated_prompts_are_embedded_once(tmp_path, tiny_wan_folder):
    embeddings = make(tmp_path, tiny_wan_folder)
    asked: list[int] = []
    encode = embeddings.family.encode
    embeddings.family.encode = lambda p: asked.append(len(p)) or encode(p)  # type: ignore
    found = embeddings.conditions([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert asked == [2] and equal(found.rows[0], found.rows[2])
    assert not equal(found.rows[0], found.rows[1])
    embeddings.conditions(TEXTS[:3])
    assert asked == [2, 1]


def test_folder_of_the_recipe(tmp_path, tiny_wan_folder):
    assert make(tmp_path, tiny_wan_folder).folder == tmp_path / "run" / "embeddings"
    shared = {"data.embeddings": str(tmp_path / "shared")}
    assert make(tmp_path, tiny_wan_folder, shared).folder == tmp_path / "shared"


# ---- what names a file ---------------------------------------------------------------------------


def key_of(folder: Path, model: Path, prompt=TEXTS[0], **changes) -> str:
    changes = {f"model.{name}": value for name, value in changes.items()}
    return make(folder, model, changes).key(prompt)


def test_settings_that_change_an_embedding_change_its_name(tmp_path, tiny_wan_folder):
    def key(prompt=TEXTS[0], **changes):
        return key_of(tmp_path, tiny_wan_folder, prompt, **changes)

    different = [
        key(),
        key(Prompt("another text")),
        key(max_text_length=8),
        key(dtype="bfloat16"),
        key(negative_prompt="bright"),
        key(guidance=1.0),
    ]
    assert len(set(different)) == len(different)


def test_settings_that_do_not_matter_share_a_file(tmp_path, tiny_wan_folder):
    """A text-to-video family: size, guidance scale and VAE reach no embedding."""
    keys = {
        key_of(tmp_path, tiny_wan_folder, Prompt(PROMPTS[0], metadata={"count": 3}), **changes)
        for changes in (
            {}, {"height": 32}, {"frames": 9}, {"guidance": 7.0}, {"vae_tiling": True},
        )  # fmt: skip
    }
    assert len(keys) == 1
    # Without guidance there is no negative prompt.
    plain = {"guidance": 1.0}
    keys = {key_of(tmp_path, tiny_wan_folder, **plain, negative_prompt=n) for n in ("a", "b")}
    assert len(keys) == 1


def test_which_networks_are_guided_counts(tmp_path, tiny_wan_folder):
    """A negative branch that one recipe leaves out must not be missing in the other's file."""

    def key(first, second):
        embeddings = make(tmp_path, tiny_wan_folder)
        scales = {"guidance": first, "guidance_2": second}
        embeddings.family.config = embeddings.family.config.model_copy(update=scales)
        return embeddings.key(TEXTS[0])

    different = [key(3.0, None), key(1.0, None), key(1.0, 3.0), key(3.0, 1.0), key(0.5, None)]
    assert len(set(different)) == len(different)
    assert key(3.0, None) == key(2.0, None)


def edit_json(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added": 1}))


def move_one_weight(file: Path) -> None:
    """The last byte: neither size nor header change."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("part", "edit"),
    [
        ("text_encoder/config.json", edit_json),
        ("tokenizer/tokenizer_config.json", edit_json),
        ("text_encoder/model.safetensors", move_one_weight),
    ],
)
def test_another_encoder_changes_every_name(tmp_path, tiny_wan_folder, part, edit):
    model = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, model)
    before = key_of(tmp_path, model)
    assert before == key_of(tmp_path, tiny_wan_folder), "where the folder lies does not matter"
    edit(model / part)
    assert key_of(tmp_path, model) != before


def test_networks_do_not_change_names(tmp_path, tiny_wan_folder):
    """A text-to-video family: neither its transformer nor its VAE has a part in an embedding."""
    model = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, model)
    before = key_of(tmp_path, model)
    for part in ("transformer", "vae"):
        move_one_weight(model / part / "diffusion_pytorch_model.safetensors")
    assert key_of(tmp_path, model) == before


def test_images_count_where_a_family_takes_them(tmp_path, tiny_wan_folder, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, model)
    image, same, other = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    for file, content in ((image, b"pixels"), (same, b"pixels"), (other, b"others")):
        file.write_bytes(content)

    def key(file: Path, **changes):
        embeddings = make(tmp_path, model, {f"model.{k}": v for k, v in changes.items()})
        embeddings.family.takes_image = True  # type: ignore[misc]
        return embeddings.key(Prompt("a dog", file))

    first = key(image)
    assert first == key(same), "the content counts, not the name"
    changed = [key(other), key(image, height=32), key(image, frames=9), key(image, width=32)]
    move_one_weight(model / "vae" / "diffusion_pytorch_model.safetensors")
    changed.append(key(image))
    assert len({first, *changed}) == 6


def test_what_draws_first_frames_counts_for_prompts_without_an_image(tmp_path, tiny_wan_folder):
    """By content: another place is the same, other weights or steps are not."""
    drawing, elsewhere = tmp_path / "drawing", tmp_path / "elsewhere"
    for folder in (drawing, elsewhere):
        shutil.copytree(tiny_wan_folder, folder)
    (tmp_path / "a.png").write_bytes(b"pixels")

    def key(image=None, **changes):
        embeddings = make(tmp_path, tiny_wan_folder)
        family = embeddings.family
        changes = {"first_frame": str(drawing)} | changes
        family.config, family.takes_image = family.config.model_copy(update=changes), True
        return embeddings.key(Prompt("a dog", image))

    first = key()
    assert first == key(first_frame=str(elsewhere)) != key(first_frame_steps=3)
    given = key(tmp_path / "a.png")
    move_one_weight(drawing / "transformer" / "diffusion_pytorch_model.safetensors")
    assert key() != first and key(tmp_path / "a.png") == given


# ---- durability ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_file_is_said_and_made_again(tmp_path, tiny_wan_folder, caplog, damage):
    embeddings = make(tmp_path, tiny_wan_folder)
    expected = embeddings.conditions(TEXTS[:2])
    file = embeddings.path(embeddings.key(TEXTS[1]))
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-7], "empty": b"", "noise": b"\xff" * len(whole)}[damage])
    with caplog.at_level(logging.WARNING):
        found = make(tmp_path, tiny_wan_folder).conditions(TEXTS[:2])
    assert equal(found.rows[1], expected.rows[1])
    assert [f"{file} is damaged" in record.getMessage() for record in caplog.records] == [True]
    kept = load_file(file)  # The order of the metadata's lines is safetensors' own.
    assert all(torch.equal(kept[name], t) for name, t in expected.rows[1].flat().items())


def test_file_that_goes_away_during_a_run(tmp_path, tiny_wan_folder):
    embeddings = make(tmp_path, tiny_wan_folder)
    expected = embeddings.conditions(TEXTS[:1])
    embeddings.path(embeddings.key(TEXTS[0])).unlink()
    assert equal(embeddings.conditions(TEXTS[:1]).rows[0], expected.rows[0])
    assert embeddings.path(embeddings.key(TEXTS[0])).is_file()


def test_failed_write_leaves_nothing(tmp_path, tiny_wan_folder, monkeypatch):
    embeddings = make(tmp_path, tiny_wan_folder)

    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        embeddings.conditions(TEXTS[:1])
    assert not [path for path in embeddings.folder.rglob("*") if path.is_file()]
