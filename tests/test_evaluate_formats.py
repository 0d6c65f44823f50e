"""Prompt sets: eight prompts of our own in each format, what is known of each set, refusals."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from recipe_cases import RECIPE

from dancegrpo_fast.cli.evaluate import _rewards, add_parser
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.evaluating import Model
from dancegrpo_fast.report import benchmarks
from dancegrpo_fast.report.benchmarks import BENCHMARKS, STYLES, load_benchmark
from dancegrpo_fast.rewards import REWARDS
from dancegrpo_fast.rewards.loading import arguments

PLACES = ("desk", "hill", "roof", "pier")
EIGHT = [f"a {thing} on a {place}" for thing in ("cup", "fox") for place in PLACES]


def write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_plain(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(EIGHT))
    found = load_benchmark("plain", str(tmp_path / "p.txt"), limit=5)
    assert [p.text for p in found.prompts] == EIGHT[:5] and found.groups == ()
    assert found.note == "5 prompts"


@pytest.mark.parametrize("one_file", [False, True])
def test_hpsv2(tmp_path, one_file):
    """Two prompts of each of four styles, from a folder of lists or from one object."""
    lists = {style: EIGHT[2 * i : 2 * i + 2] for i, style in enumerate(STYLES)}
    source = tmp_path
    if one_file:
        source = tmp_path / "all.json"
        source.write_text(json.dumps(lists))
    else:
        for style, texts in lists.items():
            (tmp_path / f"{style}.json").write_text(json.dumps(texts))
    found = load_benchmark("hpsv2", str(source))
    assert [p.text for p in found.prompts] == EIGHT
    assert found.groups == tuple(style for style in STYLES for _ in range(2))
    assert found.note == "HPSv2 benchmark: 8 prompts, while the published set has 3200"
    assert len(load_benchmark("hpsv2", str(source), limit=1).prompts) == 4


def test_pickapic(tmp_path):
    """A table of pairs repeats captions."""
    rows = [[text, str(n)] for n, text in enumerate([*EIGHT, EIGHT[0], EIGHT[3]])]
    found = load_benchmark("pickapic", write_csv(tmp_path / "p.csv", ["caption", "id"], rows))
    assert [p.text for p in found.prompts] == EIGHT and found.prompts[0].metadata == {"id": "0"}


def test_geneval(tmp_path):
    records = [
        {"tag": "counting" if n % 2 else "colors", "include": [{"class": "cup", "count": n + 1}]}
        | {"prompt": text}
        for n, text in enumerate(EIGHT)
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    found = load_benchmark("geneval", str(path))
    assert [p.text for p in found.prompts] == EIGHT and found.groups[:2] == ("colors", "counting")
    assert found.prompts[2].metadata["include"] == [{"class": "cup", "count": 3}]
    assert "8 prompts, while the published set has 553" in found.note
    broken = (({"tag": 3}, 'has no text under "tag"'), ({"include": "cup"}, "has no list"))
    for change, reason in broken:
        path.write_text("\n".join(map(json.dumps, [*records[:4], records[4] | change])))
        with pytest.raises(UserError, match=f"prompt 5 of 5 .*{reason}.*--format geneval takes"):
            load_benchmark("geneval", str(path))


def test_drawbench(tmp_path):
    rows = [[text, "Counting" if n < 3 else "Text"] for n, text in enumerate(EIGHT)]
    source = write_csv(tmp_path / "d.csv", ["Prompts", "Category"], rows)
    found = load_benchmark("drawbench", source)
    assert found.groups == ("Counting",) * 3 + ("Text",) * 5
    with pytest.raises(UserError, match='a text under "Prompts"; it has prompt'):
        load_benchmark("drawbench", write_csv(tmp_path / "e.csv", ["prompt", "Category"], rows))
    found = load_benchmark(
        "drawbench", write_csv(tmp_path / "e.csv", ["prompt", "Category"], rows), column="prompt"
    )
    assert len(found.prompts) == 8


def test_videoalign(tmp_path):
    rows = [[text, "a.mp4"] for text in [*EIGHT, *EIGHT]]
    source = write_csv(tmp_path / "v.csv", ["prompt", "path_A"], rows)
    found = load_benchmark("videoalign", source)
    assert [p.text for p in found.prompts] == EIGHT
    assert found.note == "VideoAlign prompts: 8 prompts"  # No published number: only counted.


def test_ocr(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text("\n".join(f'{text}, a sign says "{n}"' for n, text in enumerate(EIGHT)))
    assert len(load_benchmark("ocr", str(path)).prompts) == 8
    path.write_text(f'{EIGHT[0]} "A"\n{EIGHT[1]}\n{EIGHT[2]} ""')
    with pytest.raises(UserError, match="prompt 2 of 3 quotes no text .* .2 such."):
        load_benchmark("ocr", str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), ("{", "cannot be read"), ("[]", "something else than lists of texts"),
     ('{"anime": []}', "something else"), ('{"anime": ["a", 3]}', "something else")],
)  # fmt: skip
def test_hpsv2_of_another_shape(tmp_path, content, reason):
    path = tmp_path / "all.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"--prompts = .*all.json.*{reason}.*give a folder with"):
        load_benchmark("hpsv2", str(path))


def test_other_prompts_than_expected_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\n".join(EIGHT) + "\n")
    found = load_benchmark("plain", str(path)).sha256
    assert found == hashlib.sha256("\n".join(EIGHT).encode()).hexdigest()
    for expect in (found, found[:8].upper()):
        assert load_benchmark("plain", str(path), expect=expect).sha256 == found
    with pytest.raises(UserError, match=f"the 7 prompts of .*p.txt have the SHA-256 (?!{found})"):
        load_benchmark("plain", str(path), limit=7, expect=found)


def documented() -> list[argparse.Namespace]:
    """The commands of docs/evaluation.md that name a set or what is measured on it."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    lines = [line for line in text.split("\n") if line.startswith("dancegrpo-fast evaluate ")]
    found = [parser.parse_args(shlex.split(line)[1:]) for line in lines]
    return [args for args in found if args.reward]


def test_every_set_has_a_documented_command():
    """Each names rewards of ours, with settings that their constructors take."""
    commands = documented()
    assert {args.format for args in commands} == set(BENCHMARKS)
    model = Model("base", RunConfig.model_validate(RECIPE), None)
    measured = set()
    for args in commands:
        for config in _rewards(args, [model]):
            name = config.name.partition(".")[0]
            arguments(REWARDS[name].load(), config, "rewards.0")
            measured.add((args.format, config.name))
    assert {
        ("hpsv2", "hpsv2"), ("pickapic", "pickscore"), ("plain", "clip_score"),
        ("geneval", "geneval"), ("videoalign", "videoalign.VQ"), ("videoalign", "videoalign.MQ"),
        ("videoalign", "videoalign.TA"), ("drawbench", "deqa"), ("drawbench", "imagereward"),
        ("ocr", "ocr"),
    } <= measured  # fmt: skip


def test_published_sets_are_told_from_others(tmp_path, monkeypatch):
    """By number, and where the texts are known by their hash."""
    about = BENCHMARKS["ocr"]
    texts = [f'"{n}"' for n in range(8)]
    known = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    path = tmp_path / "p.txt"
    for changes, written, note in (
        ({"count": 8, "sha256": known}, texts, "8 prompts, the published ones"),
        ({"count": 8, "sha256": known}, texts[::-1], "8 prompts, not the published texts"),
        ({"count": 8, "sha256": None}, texts, "8 prompts, as many as the published set"),
        ({"count": 9, "sha256": known}, texts, "8 prompts, while the published set has 9"),
    ):
        path.write_text("\n".join(written))
        changed = {"ocr": replace(about, **changes)}
        monkeypatch.setattr(benchmarks, "BENCHMARKS", changed)
        assert load_benchmark("ocr", str(path)).note == f"OCR: {note}"
