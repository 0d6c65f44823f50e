"""`evaluate`: the table, what a second call leaves alone, processes, prompt sets, refusals."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_models import tiny_recipe

from dancegrpo_fast import evaluating
from dancegrpo_fast.cli import main
from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.models import Family
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.compare import best_of, paired
from dancegrpo_fast.report.comparison import Results
from dancegrpo_fast.report.store import Asked, Store, initial_latents, reward_digest

PROMPTS = ["a red dot", "a blue dot", "a red dot", "two dots", "a line"]
MINE = '''
import torch

class Red:
    name = "red"
    def __call__(self, videos, prompts):
        return videos[:, :, 0].mean(dim=(1, 2, 3))

class FailsOnLine(Red):
    name = "fails"
    def __call__(self, videos, prompts):
        failed = torch.tensor(["line" in prompt for prompt in prompts])
        return super().__call__(videos, prompts).masked_fill(failed, torch.nan)

class Rank(Red):
    name = "rank"
    groupwise = True
    def __call__(self, videos, prompts):
        scores = super().__call__(videos, prompts)
        return (scores[:, None] > scores).float().sum(dim=1)
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_wan_folder) -> Path:
    """A folder with a finished LoRA run of images (`run`), prompts and rewards."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluate")
    changes = {"model.frames": 1, "policy.train": "lora", "optimizer.learning_rate": 0.1}
    changes["evaluation.batch_size"] = 3
    recipe = folder / "r.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(folder, tiny_wan_folder, changes)))
    assert main(["train", str(recipe)]) == 0
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(MINE)
    return folder


def call(made: Path, out: Path, *options: str, source: str = "run", prompts: str = "p.txt") -> dict:
    """The command's JSON."""
    arguments = [str(made / source), "--prompts", str(made / prompts), "--out", str(out)]
    assert main(["evaluate", *arguments, *options]) == 0
    return json.loads((out / "evaluation.json").read_text())


def reward(made: Path, name: str) -> tuple[str, str]:
    return "--reward", f"{made}/mine.py:{name}"


def array(found: dict, model: str) -> np.ndarray:
    """[P, S, R]"""
    rows = [row[model] for row in found["scores"]]
    return np.array(rows, dtype=float)


def test_numbers_table_and_page(made, tmp_path, capsys):
    """JSON, terminal and page say what the stored samples and scores say."""
    options = ("--seeds", "2", "--best-of", "2,1", *reward(made, "Red"))
    found = call(made, tmp_path / "out", *options, *reward(made, "FailsOnLine"))
    text = capsys.readouterr().out
    assert "20 samples drawn and 40 scores computed now" in text  # 5 prompts, 2 seeds, 2 models
    assert found["models"] == ["base", "run"] and found["rewards"] == ["Red", "FailsOnLine"]
    assert found["prompts_sha256"] == hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()
    base, trained = array(found, "base"), array(found, "run")
    assert base.shape == (5, 2, 2) and np.isnan(base[4, :, 1]).all() and np.isfinite(base[:4]).all()
    told = paired(base[..., 0], trained[..., 0])
    first, second = found["comparisons"]
    assert first["difference"] == pytest.approx(told.difference) and told.difference != 0
    assert (first["low"], first["high"]) == pytest.approx((told.low, told.high))
    assert second["prompts"] == 4 and second["missing"] == 2
    curve = best_of(trained[..., 0], trained[..., 0], (1, 2))
    points = [p for p in found["best_of_n"] if (p["model"], p["measured"]) == ("run", "Red")]
    assert [p["n"] for p in points] == [1, 2]
    assert [p["mean"] for p in points] == pytest.approx([p.mean for p in curve])
    for number in (f"{told.base:.4g}", f"{told.difference:+.4g}", f"[{told.low:+.4g}"):
        assert number in text
    page = (tmp_path / "out" / "page.html").read_text()
    assert f"{told.difference:+.4g}" in page and page.count("<img ") == 10
    check_html(page)
    # Equal prompts at two places have noise of their own.
    assert not np.array_equal(base[0, :, 0], base[2, :, 0])


def check_html(page: str) -> None:
    """Every tag is closed, nothing is loaded from elsewhere, no script."""
    stack: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag != "script"
            for name, value in attributes:
                assert name not in ("src", "href") or value.startswith("data:")
            if tag not in ("meta", "link", "img"):
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Checker().feed(page)
    assert stack == []


def nothing_is_computed(monkeypatch) -> None:
    def refuse(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(evaluating.Evaluating, "_draw", refuse)
    monkeypatch.setattr(evaluating, "load_rewards", refuse)
    monkeypatch.setattr(evaluating, "traits", refuse)


def test_a_second_call_computes_nothing(made, tmp_path, monkeypatch, capsys):
    """Not even weights are loaded; and the result is the same to the byte."""
    options = ("--seeds", "2", "--audit", *reward(made, "Red"), *reward(made, "Rank"))
    call(made, tmp_path / "out", *options)
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    nothing_is_computed(monkeypatch)
    call(made, tmp_path / "out", *options)
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    assert "\n0 samples drawn and 0 scores computed now" in capsys.readouterr().out
    # Fewer seeds, other prompts in another order: part of what is there.
    (made / "other.txt").write_text("\n".join([PROMPTS[4], PROMPTS[1]]))
    capsys.readouterr()
    found = call(made, tmp_path / "out", *reward(made, "Red"), prompts="other.txt")
    whole = json.loads(before)
    for place, old in ((0, 4), (1, 1)):
        for model in ("base", "run"):
            expected = whole["scores"][old][model][0][0]
            assert found["scores"][place][model] == [[expected]]


def test_an_interrupted_call_goes_on(made, tmp_path, capsys):
    """Two samples gone, a score line cut in two: only these are made again, to the same bytes."""
    out, options = tmp_path / "out", ("--seeds", "2", *reward(made, "Red"))
    call(made, out, *options)
    before = (out / "evaluation.json").read_bytes()
    pixels = {file: file.read_bytes() for file in (out / "samples").rglob("*.png")}
    assert len(pixels) == 20
    for file in sorted(pixels)[::11]:
        file.unlink()
    scores = out / "scores" / "rank-0.jsonl"
    scores.write_bytes(scores.read_bytes()[:-9])
    capsys.readouterr()
    call(made, out, *options)
    # The cut score's batch of three is scored again.
    assert "\n2 samples drawn and" in capsys.readouterr().out
    assert (out / "evaluation.json").read_bytes() == before
    assert {file: file.read_bytes() for file in (out / "samples").rglob("*.png")} == pixels


def test_failed_scores_are_tried_again(made, tmp_path, capsys):
    call(made, tmp_path / "out", *reward(made, "FailsOnLine"))
    call(made, tmp_path / "out", *reward(made, "FailsOnLine"))
    # Of two batches of the five prompts (3 and 2) the one with the failure, for two models.
    assert "\n0 samples drawn and 4 scores computed now" in capsys.readouterr().out


def test_a_reward_that_compares_sees_the_whole_group(made, tmp_path):
    """Batches of three cut groups of two apart; with another number of seeds it is scored anew."""
    found = call(made, tmp_path / "out", "--seeds", "2", *reward(made, "Rank"))
    assert (np.sort(array(found, "base")[..., 0], axis=1) == [0, 1]).all()
    found = call(made, tmp_path / "out", "--seeds", "3", *reward(made, "Rank"))
    assert (np.sort(array(found, "base")[..., 0], axis=1) == [0, 1, 2]).all()


def test_two_processes_give_the_table_of_one(made, tmp_path):
    """The same JSON to the byte, and each has drawn something."""
    options = ["--seeds", "2", "--audit", *reward(made, "Red"), *reward(made, "Rank")]
    call(made, tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "dancegrpo_fast", "evaluate", str(made / "run")]
    command += ["--prompts", str(made / "p.txt"), "--out", str(tmp_path / "two"), *options]
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "evaluation.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    lines = {f.name: len(f.read_text().split("\n")) for f in (two.parent / "scores").iterdir()}
    assert lines.keys() == {"rank-0.jsonl", "rank-1.jsonl"} and min(lines.values()) > 1


def test_every_recipe_is_a_model(made, tmp_path):
    """Also the second one, which was dropped without a word."""
    other = yaml.safe_load((made / "r.yaml").read_text())
    other["rollout"]["steps"] += 1
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    sources = [str(made / "r.yaml"), str(tmp_path / "other.yaml")]
    options = ["--prompts", str(made / "p.txt"), "--out", str(tmp_path / "out")]
    assert main(["evaluate", *sources, *options, *reward(made, "Red")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["models"] == ["base", "other"]
    assert not np.array_equal(array(found, "base"), array(found, "other"))


def test_a_sample_that_is_no_number_has_no_score(made, tmp_path, monkeypatch):
    """Its file is black, which is a fine picture to a reward."""
    draw = Family.draw

    def broken(self, pipeline, prompts, latents, steps):
        pixels = draw(self, pipeline, prompts, latents, steps).clone()
        for video, prompt in zip(pixels, prompts, strict=True):
            if prompt.text == "a line":
                video[:] = torch.nan
        return pixels

    monkeypatch.setattr(Family, "draw", broken)
    for _ in range(2):  # The second call finds the samples on disk.
        found = call(made, tmp_path / "out", *reward(made, "Red"), *reward(made, "Rank"))
        for model in ("base", "run"):
            assert np.isnan(array(found, model)[4]).all()
            assert np.isfinite(array(found, model)[:4]).all()


def test_prompts_without_a_group_are_no_second_total():
    scores = np.arange(8.0).reshape(2, 4, 1, 1)
    groups = ("", "b", "", "b")
    found = Results("", tuple("wxyz"), groups, ("m", "n"), ("r",), scores, (), {}, {}).pairs()
    assert [(group, told.prompts) for _, _, group, told in found] == [("", 4), ("b", 2)]


def test_videos_and_the_audit(made, tmp_path, tiny_wan_folder, capsys):
    """A base against itself: videos on disk are the pixels, and nothing is flagged."""
    recipe = made / "video.yaml"
    changes = {"model.fps": 7.0, "evaluation.batch_size": 4}
    recipe.write_text(yaml.safe_dump(tiny_recipe(made / "video", tiny_wan_folder, changes)))
    options = ("--seeds", "2", "--audit", "--weights", str(tiny_wan_folder))
    found = call(made, tmp_path / "out", *options, source="video.yaml")
    (told,) = found["comparisons"]
    assert found["models"] == ["base", "wan"]
    assert told["difference"] == 0 and told["win_rate"] == 0.5 and told["verdict"] == "unclear"
    checks = found["audit"]["wan"]
    assert len(checks) == 9 and not any(check["flagged"] for check in checks)
    assert "audit of wan against base" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [1, 4])
def test_samples_are_kept_without_loss(tmp_path, frames):
    """Odd sizes, every level; PNG and lossless video."""
    store = Store(tmp_path, 0)
    video = torch.randint(0, 256, (frames, 3, 17, 33), dtype=torch.uint8)
    file = store.file("model" * 8, "sample", frames)
    store.write(file, video.transpose(2, 3).contiguous().transpose(2, 3), 8)
    assert torch.equal(store.read(file), video)
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_what_names_prompts_and_rewards(tmp_path):
    """Content, not place: text, image, metadata, and how often it stood before."""
    image = tmp_path / "a.png"
    image.write_bytes(b"1")
    plain, again, with_image, told = Asked.all_of(
        [Prompt("a"), Prompt("a"), Prompt("a", image), Prompt("b", None, {"n": 1})]
    )
    assert len({a.drawn for a in (plain, again, with_image, told)}) == 4
    assert plain.told == again.told != told.told
    (alone,) = Asked.all_of([Prompt("b", None, {"n": 2})])
    assert alone.drawn == told.drawn and alone.told != told.told
    image.write_bytes(b"2")
    assert Asked.all_of([Prompt("a", image)])[0].drawn != with_image.drawn
    noise = [
        initial_latents([(asked, seed)], 0, (2, 1, 3, 3), torch.device("cpu"))
        for asked, seed in ((plain, 0), (plain, 1), (again, 0))
    ]
    assert not any(torch.equal(noise[0], other) for other in noise[1:])
    both = initial_latents([(again, 0), (plain, 0)], 0, (2, 1, 3, 3), torch.device("cpu"))
    assert torch.equal(both, torch.cat([noise[2], noise[0]]))
    file = tmp_path / "mine.py"
    file.write_text("a = 1")
    named = RewardConfig(name=f"{file}:Mine")
    before = reward_digest(named)
    assert reward_digest(RewardConfig(name=f"{file}:Mine", weight=3.0)) == before
    assert reward_digest(RewardConfig(name=f"{file}:Mine", threshold=0.5)) != before
    file.write_text("a = 2")
    assert reward_digest(named) != before


def test_failed_scores_are_not_kept_and_a_cut_line_is_dropped(tmp_path):
    Store(tmp_path, 0).add({"a": 1.5, "b": math.nan, "c": 2.0})
    path = tmp_path / "scores" / "rank-0.jsonl"
    path.write_bytes(path.read_bytes() + b'["d", 1')
    other = Store(tmp_path, 1)  # Another process reads, and leaves the file as it is.
    assert other.values == {"a": 1.5, "c": 2.0} and path.read_bytes().endswith(b'["d", 1')
    own = Store(tmp_path, 0)
    own.add({"e": 3.0})
    assert Store(tmp_path, 1).values == {"a": 1.5, "c": 2.0, "e": 3.0}


def test_damage_in_the_store_is_named(tmp_path):
    store = Store(tmp_path, 0)
    for name in ("a.png", "a.mkv"):
        (tmp_path / name).write_bytes(b"cut off")
        with pytest.raises(UserError, match=rf"{name}: cannot be read .*remove it, and it is draw"):
            store.read(tmp_path / name)
    store.add({"a": 1.0})
    with (tmp_path / "scores" / "rank-0.jsonl").open("a") as file:
        file.write("garbage\n")
    with pytest.raises(UserError, match=r"rank-0\.jsonl: line 2 is not what `evaluate` writes"):
        Store(tmp_path, 0)


def test_refusals_are_one_line(made, tmp_path, capsys):
    run, prompts, out = str(made / "run"), str(made / "p.txt"), str(tmp_path / "out")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_bytes((made / "run" / "recipe.yaml").read_bytes())
    cases = {
        (run, "--seeds", "0"): "--seeds = 0: must be at least 1",
        (run, "--best-of", "1,4", "--seeds", "2"): "--best-of = 1,4: must be numbers from 1 to",
        (run, "--best-of", "few"): "--best-of = few: must be numbers",
        (run, "--expect", "abc"): "--expect = 'abc': must be 8 to 64 hex digits",
        (run, "--expect", "12345678"): "--expect = 12345678: the 5 prompts of ",
        (run, "--format", "hps"): "--format = 'hps': no such format; known: plain, hpsv2",
        (run, "--weights", run): "goes with one recipe as SOURCE",
        (str(made / "r.yaml"), "--weights", str(tmp_path)): "holds neither model_index.json nor",
        (str(tmp_path),): "is neither a recipe nor the folder of a run",
        (str(unfinished),): "is not finished; write what it has with `dancegrpo-fast export",
        (run, "--reward", "nicest"): "no such reward",
        (run, "--out", str(made / "p.txt")): "p.txt': is a file; name a folder",
        (run, "--reward", "{name: hpsv2, size: 3}"): "is no reward of a recipe: size: Extra",
        (run, "--reward", "{name: hpsv2, name: red}"): "--reward: name: given twice",
        (run, "--reward", "{name: hpsv2"): "line 1: not valid YAML: expected ',' or '}'",
        # As in a recipe 1e-2 is a number: the next mistake is named.
        (run, "--reward", "{name: nicest, threshold: 1e-2}"): "no such reward",
        (run, *reward(made, "Red"), *reward(made, "Red")): "is given twice",
    }
    for arguments, message in cases.items():
        capsys.readouterr()
        assert main(["evaluate", "--prompts", prompts, "--out", out, *arguments]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert not (tmp_path / "out" / "samples").exists()
