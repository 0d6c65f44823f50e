"""`dancegrpo-fast embed`: prompts ahead of a run, and those of a DanceGRPO folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from embedding_cases import GUIDED, make, no_encoders
from tiny_models import CPU, PROMPTS, tiny_recipe

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import UserError, load_config
from dancegrpo_fast.models import open_family
from dancegrpo_fast.models.dance_embeddings import import_entry
from dancegrpo_fast.models.dance_embeddings import read_index as entries_of
from dancegrpo_fast.models.embeddings import Embeddings, embeddings_folder
from dancegrpo_fast.prompt import Prompt


def recipe(folder: Path, model: Path, changes=None) -> str:
    held_out = folder / "held_out.txt"
    held_out.write_text("a held-out dot\n" + PROMPTS[0])
    values = tiny_recipe(folder, model, {"evaluation.prompts": str(held_out)} | (changes or {}))
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_embed_command(tmp_path, tiny_wan_folder, capsys):
    """Training and held-out prompts, once each; what is there is left alone."""
    file = recipe(tmp_path, tiny_wan_folder, GUIDED)
    assert main(["embed", file]) == 0
    folder = tmp_path / "run" / "embeddings"
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6
    said = capsys.readouterr().out
    assert said.startswith(f"4 prompts embedded, 0 were there; {size:.1f} MB in {folder}, ")
    next(folder.rglob("*.safetensors")).unlink()
    assert main(["embed", file]) == 0
    assert capsys.readouterr().out.startswith("1 prompts embedded, 3 were there; ")
    elsewhere = tmp_path / "shared"
    assert main(["embed", file, f"data.embeddings={elsewhere}"]) == 0
    assert len(list(elsewhere.rglob("*.safetensors"))) == 4


def dance_folder(folder: Path, entries: list[dict], negative: bool = True) -> Path:
    """What preprocess_wan_2_1_embeddings.py writes; 16 tokens of 16 channels."""
    names = ["prompt_embed"] + ["negative_prompt_embeds"] * negative
    for name in names:
        (folder / name).mkdir(parents=True)
    index = []
    for number, entry in enumerate(entries):
        for name in names:
            torch.save(draw(16, 16, number, name), folder / name / f"{number}.pt")
        index.append({f"{name}_path": f"{number}.pt" for name in names} | entry)
    (folder / "videos2caption.json").write_text(json.dumps(index))
    return folder


def draw(rows: int, columns: int, number: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number + 100 * (name == "prompt_embed"))
    return torch.randn(rows, columns, generator=generator).bfloat16()


IMPORT = {"model.guidance": 3.0}


def test_import_of_a_dancegrpo_folder(tmp_path, tiny_wan_folder, capsys):
    """A recipe's prompts then come from the imported tensors, bit for bit."""
    captions = [f" {PROMPTS[0]}\r", "of no recipe", PROMPTS[2]]
    entries = [{"caption": caption} for caption in captions]
    folder = dance_folder(tmp_path / "rl_embeddings", entries)
    file = recipe(tmp_path, tiny_wan_folder, IMPORT)
    assert main(["embed", file, "--import", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 imported, 0 without one prompt of the recipe left out; ")
    assert "2 of the recipe's 4 prompts are there; " in said
    config = load_config(file, [])
    embeddings = Embeddings(open_family(config.model), embeddings_folder(config), CPU)
    no_encoders(embeddings)
    for number in (0, 2):
        (row,) = embeddings.conditions([Prompt(PROMPTS[number])]).rows
        for branch, name in (("positive", "prompt_embed"), ("negative", "negative_prompt_embeds")):
            tensor = row.flat()[f"{branch}.text"]
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, draw(16, 16, number, name).float())


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["embed", *arguments]) == 2
    lines = [x for x in capsys.readouterr().err.strip().split("\n") if not x.startswith("import")]
    assert len(lines) == 1
    return lines[0]


def test_import_that_does_not_fit(tmp_path, tiny_wan_folder, capsys):
    one = [{"caption": "a dot"}]
    good = str(dance_folder(tmp_path / "good", one))
    file = recipe(tmp_path, tiny_wan_folder, IMPORT)
    assert "holds no videos2caption.json" in refused(capsys, file, "--import", str(tmp_path))
    line = refused(capsys, file, "model.max_text_length=8", "--import", good)
    assert "model.max_text_length = 8: the folder's embeddings have 16 tokens; set it to 16" in line
    line = refused(capsys, file, "model.negative_prompt=dull", "--import", good)
    assert "model.negative_prompt = 'dull': the folder's is empty" in line
    other = str(dance_folder(tmp_path / "other", one, negative=False))
    line = refused(capsys, file, "--import", other)
    assert "has no 'negative_prompt_embeds', only prompt_embed; it was made for another" in line
    (tmp_path / "outside.pt").write_bytes(b"")
    bad = [{"caption": "a", "prompt_embed_path": "../../outside.pt"}]
    line = refused(capsys, file, "--import", str(dance_folder(tmp_path / "out", bad)))
    assert "prompt_embed/../../outside.pt: lies outside the folder" in line
    bad = [{"caption": "a", "prompt_embed_path": "gone.pt"}]
    line = refused(capsys, file, "--import", str(dance_folder(tmp_path / "gone", bad)))
    assert "prompt_embed/gone.pt: videos2caption.json names it, and it is not there" in line
    assert not (tmp_path / "run" / "embeddings").exists()


def test_import_where_images_are_taken(tmp_path, tiny_wan_folder):
    """By the recipe's only prompt of that text; a condition without an image is refused."""
    entries = [{"caption": "a dog"}, {"caption": "twice"}, {"caption": "of no recipe"}]
    folder = dance_folder(tmp_path / "e", entries)
    image = tmp_path / "a.png"
    image.write_bytes(b"pixels")
    dog, *others = (Prompt(text, image) for text in ("a dog", "twice", "twice"))
    prompts = [dog, *others]
    embeddings = make(tmp_path, tiny_wan_folder, IMPORT | {"model.negative_prompt": ""})
    family = embeddings.family
    family.takes_image = True  # type: ignore[misc]
    with pytest.raises(UserError, match="holds no images, from which family wan starts"):
        import_entry(embeddings, folder, entries_of(folder)[0], prompts)
    text_only = family.from_dance
    shared = {"image": torch.ones(2)}
    family.from_dance = lambda record: replace(text_only(record), shared=shared)  # type: ignore
    taken = [import_entry(embeddings, folder, e, prompts) for e in entries_of(folder)]
    assert taken == [True, False, False]
    found = embeddings.read(embeddings.key(dog))
    assert found is not None and torch.equal(found.shared["image"], shared["image"])
    assert embeddings.read(embeddings.key(Prompt("a dog"))) is None


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("content", ["pickle", "list", "cut"])
def test_import_unpickles_nothing(tmp_path, tiny_wan_folder, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = dance_folder(tmp_path / "e", [{"caption": "a dot"}])
    file = folder / "prompt_embed" / "0.pt"
    if content == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        torch.save(Evil() if content == "pickle" else [1, 2], file)
    line = refused(capsys, recipe(tmp_path, tiny_wan_folder, IMPORT), "--import", str(folder))
    expected = "holds a list, no tensor" if content == "list" else "no tensor that can be read"
    assert f"prompt_embed/0.pt: {expected}" in line or f"prompt_embed/0.pt: is {expected}" in line
    assert not Path("touched").exists()
