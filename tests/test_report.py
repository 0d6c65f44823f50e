"""The run's page, read back by an independent parser, and what is kept on disk for it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_config import RECIPE
from test_metrics import decode, moving_dot

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import RunConfig, UserError, dump
from dancegrpo_fast.report import page
from dancegrpo_fast.report.evaluate import Evaluation
from dancegrpo_fast.report.metrics import gif_bytes
from dancegrpo_fast.report.record import Record, read_records, save_small, spread, write_record
from dancegrpo_fast.report.run_page import RunFiles, write_page

PROMPTS = [f"prompt {n}" for n in range(7)] + ['a "red" <dot>']
SECONDS = {"time/sample": 2.0, "time/update": 1.0}


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that are not closed in order."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def images(self) -> dict[str, bytes]:
        """Bytes of each picture by its description."""
        found = [attributes for tag, attributes in self.tags if tag == "img"]
        return {
            str(a["alt"]): base64.b64decode(str(a["src"]).partition(";base64,")[2]) for a in found
        }


def evaluation(scores: np.ndarray, seed: int = 0, size: int = 8) -> Evaluation:
    """Of two rewards, the second one's scores 10 times the first's, and one part."""
    clips = np.random.default_rng(seed).integers(0, 256, (len(scores), 2, 3, size, size), np.uint8)
    return Evaluation(
        scores=np.stack([scores, 10 * scores], axis=-1), names=("a", "b"),
        parts=scores[..., None] / 2, part_names=("a.half",),
        distances=scores.mean(axis=1), clips=clips,
    )  # fmt: skip


# First seed: prompt 7 is the best in the end, 0 the worst, 3 changed most.
BASE = np.tile([[0.5, 0.5]], (8, 1))
END = BASE + np.array([-0.05, 0.01, 0.02, -0.04, 0.03, 0.02, 0.01, 0.045])[:, None]
BASE[3] += 0.4
END[3] += 0.1


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run of two rewards that was killed after 4 of 5 iterations."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    config = RunConfig.model_validate({**RECIPE, "output": str(folder)})
    (folder / "recipe.yaml").write_text(dump(config), encoding="utf-8")
    lines: list[dict] = [{"iteration": 0, "evaluation/reward": 3.0, "evaluation/standard_error": 0}]
    for i in (1, 2, 3, 4):
        told = {"reward/mean": 3 + i / 10, "reward/a": 0.5, "reward/b": 5.0, "reward/failed": 0.0}
        ratios = {"policy/ratio_deviation": i / 100, "steps/ratio_deviation/02": i / 100}
        gate = {"gate/max_gap": None if i == 2 else 1e-7, "update/grad_norm": 0.1 * i}
        lines.append({"iteration": i, **told, **ratios, **gate})
    found = {"evaluation/reward": 3.2, "evaluation/standard_error": 0.04}
    lines.append({"iteration": 4, **found})
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "times.jsonl", [{"iteration": i, **SECONDS} for i in (1, 2, 3, 4)])
    for iteration, scores in ((0, BASE), (2, BASE), (4, END)):
        found = evaluation(scores, seed=iteration)
        write_record(folder, iteration, found, PROMPTS, [1.0, 0.5], fps=8)
    return folder


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


# --- what is kept of evaluations


def test_a_record_is_what_was_measured(tmp_path):
    scores = END.copy()
    scores[1, 1] = np.nan
    found = evaluation(scores)
    folder = write_record(tmp_path, 5, found, PROMPTS, [1.0, 0.0], fps=8)
    assert folder == tmp_path / "evaluations" / "000005"
    (record,) = read_records(tmp_path)
    assert (record.iteration, record.prompts, record.names) == (5, tuple(PROMPTS), ("a", "b"))
    for name in ("scores", "parts", "distances"):
        np.testing.assert_array_equal(getattr(record, name), getattr(found, name))
    # A reward of weight 0 enters nothing.
    np.testing.assert_array_equal(record.totals, scores)
    # Small clips are kept without loss.
    assert torch.equal(decode(record.clips[3].read_bytes()), torch.from_numpy(found.clips[3]))


def test_differences_are_those_of_the_summary(tmp_path):
    for iteration, scores in ((0, BASE), (5, END)):
        write_record(tmp_path, iteration, evaluation(scores), PROMPTS, [1, 1], fps=8)
    base, last = read_records(tmp_path)
    found = last.differences(base)
    assert list(found) == ["a", "b", "a.half", "diversity"]
    gains = (END - BASE).mean(axis=1)
    assert found["b"].gain == pytest.approx(10 * gains.mean())
    assert found["b"].standard_error == pytest.approx(10 * gains.std(ddof=1) / np.sqrt(8))


def test_an_evaluation_that_is_repeated_replaces_the_first(tmp_path):
    write_record(tmp_path, 5, evaluation(BASE), PROMPTS, [1, 1], fps=8)
    write_record(tmp_path, 5, evaluation(END[:2]), PROMPTS[:2], [1, 1], fps=8)
    (record,) = read_records(tmp_path)
    assert record.prompts == ("prompt 0", "prompt 1") and len(record.clips) == 2
    assert [p.name for p in (tmp_path / "evaluations").iterdir()] == ["000005"]


def test_a_record_that_was_cut_off_is_not_read(tmp_path):
    (tmp_path / "evaluations" / "000005.partial").mkdir(parents=True)
    (tmp_path / "evaluations" / "000005.partial" / "scores.json").write_text("{")
    assert read_records(tmp_path) == []


@pytest.mark.parametrize("damage", ["{", "[]", '{"iteration": 5}'])
def test_a_damaged_record_is_named(tmp_path, damage):
    folder = write_record(tmp_path, 5, evaluation(END), PROMPTS, [1, 1], fps=8)
    (folder / "scores.json").write_text(damage)
    with pytest.raises(UserError, match=r"000005/scores\.json: is not what a run writes"):
        read_records(tmp_path)


@pytest.mark.parametrize(("name", "damage"), [("summary.json", "{}"), ("audit.json", '{"a": 1}')])
def test_a_file_of_something_else_is_named(run, name, damage):
    (run / name).write_text(damage)
    with pytest.raises(UserError, match=rf"{name}: is not what a run writes; write it again or"):
        write_page(run)


def test_a_clip_that_was_cut_off_costs_itself_only(run):
    (run / "evaluations" / "000004" / "0007.webp").write_bytes(b"RIFF")
    found = read(write_page(run))
    assert "unreadable" in found.text and 'before: a "red" <dot>' in found.images()
    assert 'after: a "red" <dot>' not in found.images()


def test_a_large_clip_is_made_small_and_keeps_its_length(tmp_path):
    clip = np.zeros((40, 3, 300, 512), np.uint8)
    clip[20:] = 200
    clip[:, :, :30] = np.arange(0, 200, 5, dtype=np.uint8)[:, None, None, None]  # No two alike.
    save_small(tmp_path / "a.webp", clip, fps=10)
    small = decode((tmp_path / "a.webp").read_bytes())
    assert small.shape == (16, 3, 150, 256)
    lower = small[:, :, 20:].float().mean(dim=(1, 2, 3))
    assert lower[7] < 5 < 195 < lower[8]  # Frames 18 and 21.
    # 40 frames at 10 per second are 4 s: 16 of 250 ms.
    image = Image.open(tmp_path / "a.webp")
    image.seek(1)
    image.load()
    assert image.info["duration"] == 250


@pytest.mark.parametrize(
    ("total", "count", "places"), [(0, 4, []), (1, 4, [0]), (3, 4, [0, 1, 2]), (9, 3, [0, 4, 8])]
)
def test_spread(total, count, places):
    assert spread(total, count) == places


# --- the page


def test_the_page_of_a_killed_run_says_what_happened(run):
    text = read(write_page(run)).text
    for part in (
        "shapes: models/x",
        "Mean a + b on 8 held-out prompts x 2 seeds: 3.000 before, 3.200 after; gain +0.200 ± "
        "0.040 (5.0 standard errors).",
        "4 of 5 iterations; the run goes on or was interrupted.",
        "Gradient norm", "Rollout against training", "Ratio by step", "Seconds of an iteration",
        "sample8.0 s67%update4.0 s33%all12.0 s",
        "a.half0.2750.259",
        "group_size: 12",
    ):  # fmt: skip
        assert part in text, part
    assert "Load it" not in text and "Every ratio was exactly 1" not in text


def test_best_worst_and_most_changed_are_these(run):
    write_page(run)
    html = (run / "report.html").read_text()
    parts = re.split("<h3>", html.partition("<h2>Samples</h2>")[2].partition("<h2>")[0])
    titles = {part.partition("</h3>")[0]: part for part in parts[1:]}
    # 8 prompts: two of each. Totals are 6 times a's score.
    best, worst, changed = (
        re.findall(r'alt="after: ([^"]*)"', titles[name])
        for name in ("Highest reward", "Lowest reward", "Most changed")
    )
    assert best == ["prompt 3", "a &quot;red&quot; &lt;dot&gt;"]
    assert worst == ["prompt 0", "prompt 1"]
    assert changed == ["prompt 3", "prompt 0"]
    assert "before <b>5.400</b>" in titles["Most changed"]
    assert "after <b>3.360</b>" in titles["Most changed"]


def test_fixed_prompts_are_shown_over_time_in_the_very_pixels(run):
    images = read(write_page(run)).images()
    for iteration in (0, 2, 4):
        clip = evaluation(BASE, seed=iteration).clips[0]
        shown = decode(images[f"iteration {iteration}: prompt 0"])
        assert torch.equal(shown, torch.from_numpy(clip))


def test_page_is_self_contained(run):
    html = write_page(run).read_text()
    found = Page(html)
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object"}
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), (tag, target)
    assert "@import" not in html and "url(" not in html
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.S)
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_a_finished_run_says_how_to_load_it(run):
    config = RunConfig.model_validate({**RECIPE, "output": str(run), "iterations": 4})
    (run / "recipe.yaml").write_text(dump(config))
    summary = {"iterations": 4, "weights_sha256": {"base": "ab" * 32}, "seconds": {"load": 3.0},
               "load": "pipe = WanPipeline.from_pretrained()\n"}  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    text = read(write_page(run)).text
    for part in ("4 of 4 iterations. Written", "WanPipeline.from_pr", "ab" * 32, "load3.0 s100%"):
        assert part in text, part
    # The same run resumed, from an earlier snapshot or to go further: its old end is no end.
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("".join(lines.splitlines(keepends=True)[:3]))
    assert "Load it" not in read(write_page(run)).text
    (run / "metrics.jsonl").write_text(lines)
    (run / "recipe.yaml").write_text(dump(config.model_copy(update={"iterations": 9})))
    assert "Load it" not in read(write_page(run)).text


def test_audit_findings_are_shown_with_their_advice(run):
    finding = {"name": "saturation", "base": 0.25, "trained": 0.5, "threshold": "above 1.5 <x>",
               "flagged": True, "advice": "use loss.kl_weight"}  # fmt: skip
    quiet = {**finding, "name": "grid", "base": None, "flagged": False}
    (run / "audit.json").write_text(json.dumps([finding, quiet]))
    text = read(write_page(run)).text
    assert "saturationlook at it0.250.5above 1.5 <x>use loss.kl_weight" in text
    assert "gridquiet0.5above 1.5 <x>" in text and text.count("use loss.kl_weight") == 1
    # Of the end that the run had before it was resumed to go further.
    (run / "summary.json").write_text(json.dumps({"iterations": 3}))
    assert "saturation" not in read(write_page(run)).text


def test_evaluations_that_cannot_be_compared_are_left_out(run):
    """Of a resumed run: one after its snapshot, and others of prompts that were exchanged."""
    write_record(run, 9, evaluation(END), PROMPTS, [1.0, 0.5], fps=8)
    assert [r.iteration for r in RunFiles.read(run).records] == [0, 2, 4]
    write_record(run, 4, evaluation(END), [*PROMPTS[:7], "another"], [1.0, 0.5], fps=8)
    found = RunFiles.read(run)
    assert [r.iteration for r in found.records] == [4] and found.pair is None
    assert "prompt 0" in read(write_page(run)).text


def test_failed_rewards_are_said_and_rank_nowhere(run):
    scores = END.copy()
    scores[7, 0] = np.nan
    write_record(run, 4, evaluation(scores), PROMPTS, [1.0, 0.5], fps=8)
    found = read(write_page(run))
    assert 'after: a "red" <dot>' not in found.images()
    assert "4: failed" in found.text


def test_a_run_without_held_out_prompts_shows_training_samples(run):
    for folder in sorted((run / "evaluations").rglob("*"), reverse=True):
        folder.unlink() if folder.is_file() else folder.rmdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [line for line in lines if "reward/mean" in line])
    (run / "clips").mkdir()
    small, large = gif_bytes(moving_dot()), gif_bytes(torch.rand(5, 3, 200, 300))
    (run / "clips" / "a_dot_000001.gif").write_bytes(small)
    (run / "clips" / "a_storm_000004.gif").write_bytes(large)
    (run / "clips" / "a_later_one_000005.gif").write_bytes(small)  # of before a resume
    found = read(write_page(run))
    assert "Trained on a + b." in found.text and "4: a storm" in found.text
    assert found.images()["a dot"] == small
    assert decode(found.images()["a storm"]).shape == (5, 3, 171, 256)
    assert "a later one" not in found.images()


@pytest.mark.parametrize("kept", ["recipe", "cut line"])
def test_a_run_that_has_hardly_begun_has_a_page(run, kept):
    for name in ("metrics.jsonl", "times.jsonl"):
        (run / name).write_text('{"iteration": 1, "rew' if kept == "cut line" else "")
        if kept == "recipe":
            (run / name).unlink()
    text = read(write_page(run)).text
    assert "0 of 5 iterations" in text and "group_size: 12" in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no recipe.yaml; give the folder of a run"):
        write_page(tmp_path)


def test_pictures_beyond_the_limit_are_counted_and_said(run, monkeypatch):
    monkeypatch.setattr(page.Pictures.__init__, "__defaults__", (3_000,))
    found = read(write_page(run))
    assert re.search(r"\d+ pictures were left out to keep this page small", found.text)
    assert "no room" in found.text
    shown = [len(picture) for picture in found.images().values()]
    assert 1 < len(shown) and sum(shown) * 4 / 3 <= 3_000


def test_the_page_of_a_long_run_stays_small(run):
    """10,000 iterations of 40 metrics: thinned out, not drawn point by point."""
    lines = [
        {"iteration": i, **{f"reward/r{n}": np.sin(i / 500) + n for n in range(40)},
         "reward/mean": i / 1e4, **{f"steps/clipped/{s:02d}": 0.1 for s in range(20)},
         "policy/ratio_deviation": 0.1}
        for i in range(1, 10_001)
    ]  # fmt: skip
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "times.jsonl", [{"iteration": i, **SECONDS} for i in range(1, 10_001)])
    path = write_page(run)
    assert path.stat().st_size < 2_000_000
    assert "Each point is the mean of 42 iterations." in read(path).text


def test_the_command_writes_the_page(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert "4 of 5 iterations" in (tmp_path / "a.html").read_text()
    assert not (run / "report.html").exists()
    assert main(["report", str(run), "--out", str(tmp_path / "none" / "a.html")]) == 2
    assert "make it first" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file, such as" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2


def test_a_page_is_replaced_whole(run, monkeypatch):
    """Who reads the page while it is written sees the old one."""
    path = write_page(run)
    before = path.read_text()

    def torn(source, target):
        assert Path(target).read_text() == before
        raise KeyboardInterrupt

    monkeypatch.setattr("dancegrpo_fast.report.page.os.replace", torn)
    with pytest.raises(KeyboardInterrupt):
        write_page(run)
    assert path.read_text() == before


def test_records_compare_by_what_was_measured():
    def record(**changes) -> Record:
        values = {
            "iteration": 0, "prompts": ("p",), "names": ("a",), "weights": (1.0,),
            "scores": np.zeros((1, 2, 1)), "part_names": (), "parts": np.zeros((1, 2, 0)),
            "distances": np.zeros(1), "clips": {},
        }  # fmt: skip
        return Record(**(values | changes))

    assert record().comparable(record(iteration=5))
    for change in ({"prompts": ("q",)}, {"weights": (2.0,)}, {"scores": np.zeros((1, 1, 1))}):
        assert not record().comparable(record(**change))
