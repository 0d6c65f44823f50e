"""Embedded prompts on disk: what names them, who makes them, that they are the encoders' bits."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import CPU, PROMPTS, tiny_config, tiny_recipe

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import UserError, load_config
from dancegrpo_fast.models import Condition, open_family
from dancegrpo_fast.models.dance_embeddings import import_entry
from dancegrpo_fast.models.dance_embeddings import read_index as entries_of
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


# ---- several processes ---------------------------------------------------------------------------


_LOADING = threading.Lock()


class Thread:
    """One of several processes, as a thread: reductions and barriers meet in shared memory."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, seen: dict) -> None:
        self.rank, self.size, self._barrier, self._seen = rank, size, barrier, seen

    def barrier(self) -> None:
        self._barrier.wait(60)

    def all_reduce(self, values: torch.Tensor, op: str) -> None:
        assert op == "max"
        self._seen[self.rank] = values.clone()
        self.barrier()
        values.copy_(torch.stack([self._seen[rank] for rank in range(self.size)]).amax(0))
        self.barrier()


def make_on(world: Thread, folder: Path, model: Path) -> Embeddings:
    """`make`, with the encoders loaded by one thread at a time: diffusers loads for processes."""
    with _LOADING:
        embeddings = make(folder, model, world=world)
        with embeddings.family.encoder_pipeline():
            return embeddings


def on_threads(size: int, job) -> list:
    barrier, seen, found, errors = threading.Barrier(size), {}, [None] * size, []

    def work(rank: int) -> None:
        try:
            found[rank] = job(Thread(rank, size, barrier, seen))
        except BaseException as error:  # A thread's error must not hang the others.
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def test_two_ranks_share_the_work_and_read_the_same(tmp_path, tiny_wan_folder):
    """Rank 0 cannot see one of the two files that are there: both must agree on what is not."""
    alone = make(tmp_path / "alone", tiny_wan_folder)
    expected = alone.conditions(TEXTS)
    make(tmp_path, tiny_wan_folder).conditions(TEXTS[:2])
    asked: dict[int, list[str]] = {0: [], 1: []}

    def job(world):
        embeddings = make_on(world, tmp_path, tiny_wan_folder)
        encode, readable = embeddings.family.encode, embeddings._readable
        hidden = embeddings.key(TEXTS[0])

        def noted(prompts):
            asked[world.rank] += [prompt.text for prompt in prompts]
            return encode(prompts)

        embeddings.family.encode = noted
        embeddings._readable = lambda key: (world.rank or key != hidden) and readable(key)
        found = embeddings.conditions(TEXTS)
        del embeddings._readable
        return found, embeddings.conditions(TEXTS)

    for pair in on_threads(2, job):
        for conditions in pair:
            rows = zip(conditions.rows, expected.rows, strict=True)
            assert all(equal(row, reference) for row, reference in rows)
    assert asked == {0: [PROMPTS[0], PROMPTS[3]], 1: [PROMPTS[2]]}


def test_prompts_of_one_rank(tmp_path, tiny_wan_folder):
    """Evaluation: each rank has prompts of its own, so nobody may wait for the others."""

    def job(world):
        embeddings = make_on(world, tmp_path, tiny_wan_folder)
        if world.rank:
            return embeddings.alone(TEXTS[:1])
        return embeddings.alone([TEXTS[1], TEXTS[2], TEXTS[1]])

    expected = make(tmp_path / "alone", tiny_wan_folder).conditions(TEXTS)
    first, second = on_threads(2, job)
    for rows, numbers in ((first.rows, (1, 2, 1)), (second.rows, (0,))):
        for row, number in zip(rows, numbers, strict=True):
            assert equal(row, expected.rows[number])
    later = make(tmp_path, tiny_wan_folder)
    no_encoders(later)
    assert equal(later.alone(TEXTS[2:3]).rows[0], expected.rows[2])


def test_ahead_of_a_run(tmp_path, tiny_wan_folder):
    """`embed`: split over ranks, once per prompt; a second time there is nothing to do."""

    def job(world):
        embeddings = make_on(world, tmp_path, tiny_wan_folder)
        planned: list[int] = []
        done: list[int] = []
        prompts = {embeddings.key(prompt): prompt for prompt in [*TEXTS, TEXTS[0]]}
        missing = embeddings.embed(prompts, planned.append, done.append)
        return missing, planned, len(done)

    assert on_threads(2, job) == [(4, [2], 2), (4, [2], 2)]
    assert on_threads(2, job) == [(0, [0], 0), (0, [0], 0)]
    later = make(tmp_path, tiny_wan_folder)
    expected = later.family.encode(TEXTS)
    no_encoders(later)
    found = later.conditions(TEXTS)
    assert all(equal(a, b) for a, b in zip(found.rows, expected.rows, strict=True))


def test_training_and_evaluation_run_without_encoders(tmp_path, tiny_wan_folder, monkeypatch):
    from dancegrpo_fast.run import train

    (tmp_path / "held_out.txt").write_text(PROMPTS[3])
    held_out = {"evaluation.prompts": str(tmp_path / "held_out.txt"), "iterations": 1}
    config = tiny_config(tmp_path, tiny_wan_folder, GUIDED | held_out)
    before = Embeddings(open_family(config.model), embeddings_folder(config), CPU)
    before.embed({before.key(prompt): prompt for prompt in TEXTS})

    def refuse(*arguments):
        raise AssertionError("the encoders were asked for")

    monkeypatch.setattr("dancegrpo_fast.models.Family.encoder_pipeline", refuse)
    train(config)
    assert (tmp_path / "run" / "report.html").is_file()


# ---- the command -------------------------------------------------------------------------------


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
