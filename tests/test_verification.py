"""Labels: a row is written of what was run in full at a known commit, read, and shown as it is."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from verification_cases import MARKED, RECIPE, checkout, git, readme, record, row

from dancegrpo_fast import run
from dancegrpo_fast.cli import main
from dancegrpo_fast.report import verification
from dancegrpo_fast.report.verification import (
    FILE,
    ROOT,
    TWIN,
    content_hash,
    newest_rows,
    recipe_label,
)

pytest_plugins = ["pytester"]


# ---- reading ------------------------------------------------------------------------------------


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    checkout(tmp_path)
    assert newest_rows(tmp_path / FILE) == {}
    old, other, new = row(tmp_path, result="failed"), row(tmp_path, hardware="G"), row(tmp_path)
    record.append(tmp_path / FILE, [old])
    record.append(tmp_path / FILE, [other, new])
    found = newest_rows(tmp_path / FILE)
    assert found == {("recipe:one", TWIN, "CPU"): new, ("recipe:one", TWIN, "G"): other}


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "{}", "[1]", ""])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"subject": "a", "what": "b", "hardware": "c"}) + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 = .*: must be a row of .*; delete"):
        newest_rows(file)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("# other words\nmodel: {family: 'wan'}\n\nseed: 42\n", True),
        ("seed: 43\nmodel:\n  family: wan\n", False),
        ("seed: 42\nmodel:\n  family: wan_i2v\n", False),
        (RECIPE + "  frames: 5\n", False),
    ],
)
def test_the_content_of_a_recipe_is_its_values(tmp_path: Path, text: str, same: bool) -> None:
    for name, content in (("a", RECIPE), ("b", text)):
        (tmp_path / name).write_text(content)
    assert (content_hash(tmp_path / "a") == content_hash(tmp_path / "b")) == same


AT = "(commit 0123456, 2026-01-02)"
LABELS: list[tuple[list[dict[str, Any]], str]] = [
    ([], "never run"),
    ([{"subject": "recipe:other"}], "never run"),
    ([{}], f"verified with a tiny twin on CPU {AT}; never run with real weights, never on a GPU"),
    (
        [{"result": "failed"}],
        f"failed with a tiny twin on CPU {AT}; never run with real weights, never on a GPU",
    ),
    (
        [{"content": "other"}, {"hardware": "NVIDIA X", "what": "real weights"}],
        f"changed since it was verified with a tiny twin on CPU {AT}; "
        f"verified with real weights on NVIDIA X {AT}",
    ),
    (
        [{"content": "other", "result": "failed", "what": "real weights"}],
        f"changed since it failed with real weights on CPU {AT}; never on a GPU",
    ),
]


@pytest.mark.parametrize(("changes", "label"), LABELS, ids=[label for _, label in LABELS])
def test_label_of_a_recipe(tmp_path: Path, changes: list[dict[str, Any]], label: str) -> None:
    checkout(tmp_path)
    record.append(tmp_path / FILE, [row(tmp_path, **change) for change in changes])
    assert recipe_label(tmp_path / "recipes/one.yaml", tmp_path) == f"recipes/one.yaml: {label}"


def test_only_our_recipes_have_labels_and_a_damaged_file_stops_no_run(tmp_path: Path) -> None:
    checkout(tmp_path)
    mine = tmp_path / "one.yaml"
    mine.write_text(RECIPE)
    assert recipe_label(mine, tmp_path) is None
    assert recipe_label(tmp_path / "recipes/one.yaml") is None  # Of another checkout.
    (tmp_path / FILE).write_text("damaged\n")
    label = recipe_label(tmp_path / "recipes/one.yaml", tmp_path)
    assert label is not None and "not known whether it ever ran: verification.jsonl, line" in label


@pytest.mark.parametrize(
    ("rank", "overrides", "end"),
    [
        ("0", [], "never on a GPU"),
        ("0", ["seed=1"], "never on a GPU; the overrides were not part of it"),
        ("1", [], None),
    ],
)
def test_train_begins_with_the_label(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, rank: str,
    overrides: list[str], end: str | None,
) -> None:  # fmt: skip
    checkout(tmp_path)
    record.append(tmp_path / FILE, [row(tmp_path)])
    ours = (ROOT / "recipes/flux_lora.yaml").read_text()
    (tmp_path / "recipes/one.yaml").write_text(ours)
    known = partial(recipe_label, root=tmp_path)
    monkeypatch.setattr(verification, "recipe_label", known)
    monkeypatch.setattr(run, "train", lambda *args, **settings: logging.info("training"))
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO):
        assert main(["train", str(tmp_path / "recipes/one.yaml"), *overrides]) == 0
    *labels, last = caplog.messages
    assert last == "training" and len(labels) == (end is not None)
    for label in labels:
        assert label.startswith("recipes/one.yaml: changed since it was verified with a tiny twin")
        assert end is not None and label.endswith(end)


# ---- recording ----------------------------------------------------------------------------------

TESTS = """
import pytest
good = pytest.mark.verifies("family:good", "tiny twin")
bad = pytest.mark.verifies("family:bad", "tiny twin")
broken = pytest.mark.verifies("family:broken", "stock pipeline")
gone = pytest.mark.verifies("family:gone", "tiny twin")
half = pytest.mark.verifies("family:half", "tiny twin")

@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.verifies("recipe:one", "tiny twin"))])
def recipe(request): return request.param

@pytest.fixture
def fails(): raise OSError

def test_recipe(recipe): pass
@good
def test_a(): pass
@good
def test_b():
    open("left_behind", "w").close()
    pytest.skip("no compiler")
@good
@pytest.mark.slow
def test_slow(): assert False
@half
def test_b_of_half(): pass
@bad
def test_c(): pass
@bad
def test_d(): assert False
@broken
def test_e(fails): pass
@gone
def test_f(): pytest.skip("no CUDA")
@half
def test_h_left_out(): pass
"""
WORDS = ("-q", "-m", "not slow", "-k", "not left_out")


@pytest.fixture
def project(pytester: pytest.Pytester) -> Path:
    """A committed checkout whose tests carry marks."""
    pytester.makefile(".ini", pytest="[pytest]\nmarkers =\n  slow: a\n  verifies: b\n")
    pytester.makepyfile(test_it=TESTS)
    (pytester.path / ".gitignore").write_text("__pycache__/\n.pytest_cache/\n")
    checkout(pytester.path)
    return pytester.path


def recorded(pytester: pytest.Pytester, *words: str) -> tuple[int, str]:
    """Exit code and last lines of a run in the project, recorded."""
    plugin = record.Recorder(words, pytester.path)
    result = pytester.inline_run("-p", "no:cacheprovider", *words, plugins=[plugin])
    reprec = result.getfailures()
    assert len(reprec) in (0, 2)  # test_d and test_e: recording changes no result.
    return int(result.ret), plugin.said


def test_what_was_run_in_full_is_recorded(pytester: pytest.Pytester, project: Path) -> None:
    commit = git(project, "rev-parse", "HEAD")
    code, said = recorded(pytester, *WORDS)
    assert code == 1 and said.startswith("recorded: 4 rows")
    found = newest_rows(project / FILE)
    results = {key[:2]: (r["result"], r["tests"]) for key, r in found.items()}
    assert results == {
        ("recipe:one", "tiny twin"): ("passed", {"passed": 1}),
        ("family:good", "tiny twin"): ("passed", {"passed": 1, "skipped": 1}),
        ("family:bad", "tiny twin"): ("failed", {"passed": 1, "failed": 1}),
        ("family:broken", "stock pipeline"): ("failed", {"failed": 1}),
    }
    one = found["recipe:one", "tiny twin", "CPU"]
    assert one["commit"] == commit and one["content"] == content_hash(project / "recipes/one.yaml")
    assert one["command"] == "scripts/test -m 'not slow' -k 'not left_out'"
    assert {"python", "torch"} <= one["versions"].keys()
    label = recipe_label(project / "recipes/one.yaml", project)
    assert label is not None and label.startswith("recipes/one.yaml: verified with a tiny twin")
    assert f"commit {commit[:7]}" in (project / "README.md").read_text()
    # The rows and the README are what a run writes: they do not stand in the way of the next.
    (project / "left_behind").unlink()
    assert recorded(pytester, *WORDS)[1].startswith("recorded: 4 rows")


def test_a_run_that_was_cut_short_records_what_it_finished(
    pytester: pytest.Pytester, project: Path
) -> None:
    plugin = record.Recorder((), project)
    pytester.inline_run("-p", "no:cacheprovider", "-q", "-x", "-m", "not slow", plugins=[plugin])
    found = newest_rows(project / FILE)
    # Stopped at test_d, whose pair is complete; those after it are not, nor is half's.
    subjects = {subject for subject, _, _ in found}
    assert subjects == {"recipe:one", "family:good", "family:bad"}


@pytest.mark.parametrize("change", ["untracked", "changed", "by name", "no git", "during the run"])
def test_nothing_is_recorded_of_an_unknown_state(
    pytester: pytest.Pytester, project: Path, change: str
) -> None:
    words, reason = WORDS, "NOT RECORDED: the tree has 1 changes ("
    match change:
        case "untracked":
            (project / "new.py").write_text("")
        case "changed":
            (project / "recipes/one.yaml").write_text(RECIPE + "output: a\n")
        case "by name":
            words, reason = ("-q", "test_it.py::test_a"), "NOT RECORDED: tests were chosen by name"
        case "no git":
            (project / ".git").rename(project / "gone")
            reason = "NOT RECORDED: no git checkout"
        case "during the run":
            extra = "\ndef test_z():\n    open('recipes/one.yaml', 'a').write('output: a\\n')\n"
            (project / "test_z.py").write_text(extra)
            git(project, "add", ".")
            git(project, "commit", "--quiet", "--message", "two")
    code, said = recorded(pytester, *words)
    assert code == (0 if change == "by name" else 1) and said.startswith(reason)
    assert not (project / FILE).exists() and (project / "README.md").read_text() == MARKED


def test_a_copy_without_git_is_named_by_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("COMMIT", "abc")
    assert record.clean_commit(tmp_path) == "abc"
    commit = checkout(tmp_path)
    assert record.clean_commit(tmp_path) == commit  # Git knows better.


def test_steps_on_a_gpu_are_recorded_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout(tmp_path)
    assert "**No part has run on a GPU**" in readme.verified(tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(record, "clean_commit", lambda: "0123456789")
    for step, code in (("tests", "0"), ("memcheck", "9")):
        assert record.main([str(tmp_path / FILE), step, code]) == 0
    shown = readme.verified(tmp_path)
    assert "| tests | NVIDIA X | passed | commit 0123456, " in shown
    assert "| memcheck | NVIDIA X | exit code 9 | commit 0123456, " in shown
    assert "No part has run" not in shown

    def unknown() -> str:
        raise record.NotRecorded("no git checkout")

    before = (tmp_path / FILE).read_text()
    monkeypatch.setattr(record, "clean_commit", unknown)
    assert record.main([str(tmp_path / FILE), "noise", "0"]) == 0
    assert "noise: NOT RECORDED: no git checkout" in capsys.readouterr().out
    assert (tmp_path / FILE).read_text() == before
