"""Appends to benchmarks/results/verification.jsonl what a run has shown.

`scripts/test --record` registers `Recorder` with pytest: one row for each pair of a mark
`verifies(subject, what)`, "passed" if all its tests passed. `scripts/gpu` calls this file after
each of its steps:

    python scripts/record.py FILE STEP EXIT_CODE

A row must name the code that was run: with changes in the tree, or without git, nothing is written
(COMMIT names the commit of a copy without git). The results themselves and the README, which is
made from them, are no changes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dancegrpo_fast.report.verification import CPU, FILE, PASSED, ROOT, Row, content_hash

_PACKAGES = ("torch", "numpy", "triton", "diffusers", "transformers", "peft")
_ELSEWHERE = (".", ":(exclude)benchmarks/results", ":(exclude)README.md")


class NotRecorded(Exception):
    """Why nothing is written, in one line."""


def clean_commit(root: Path = ROOT, *, untracked: str = "normal") -> str:
    """The commit that the files of a checkout are.

    Args:
        root: The checkout.
        untracked: "no" allows new files: after a run they may be what its tests left behind.

    Raises:
        NotRecorded: They are none, or nobody can tell.
    """

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            raise NotRecorded("no git checkout; COMMIT=... names the commit of a copy") from None
        return done.stdout.rstrip()

    named = os.environ.get("COMMIT")
    if named and not (root / ".git").exists():
        return named
    commit = git("rev-parse", "HEAD")
    kinds = ("--porcelain", f"--untracked-files={untracked}")
    changed = git("status", *kinds, "--", *_ELSEWHERE).splitlines()
    if changed:
        first = changed[0][3:]
        raise NotRecorded(f"the tree has {len(changed)} changes ({first} ...); commit them first")
    return commit


def row_of(
    subject: str, what: str, *, hardware: str, result: str, command: str, commit: str,
    root: Path = ROOT,
) -> Row:  # fmt: skip
    """A row, with today's date and the versions of this environment."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # A row lists what is there.
    row: Row = {
        "subject": subject, "what": what, "hardware": hardware, "result": result,
        "command": command, "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions,
    }  # fmt: skip
    kind, _, name = subject.partition(":")
    if kind == "recipe":
        row["content"] = content_hash(root / "recipes" / f"{name}.yaml")
    return row


def append(file: Path, rows: Iterable[Row]) -> None:
    """Add rows to the end of a file, in one write."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with file.open("a", encoding="utf-8") as out:
        out.write(lines)


class Recorder:
    """A pytest plugin: rows for the marks `verifies(subject, what)` of what was run in full.

    A pair some of whose tests were left out (by -k, or as -x or Ctrl-C ended the run) gets no row;
    nor does one whose tests were all skipped. Tests marked gpu and slow are no part of it.
    """

    def __init__(self, command: Sequence[str], root: Path = ROOT) -> None:
        words = [word.replace(f"{root}/", "") for word in command if word != "-q"]
        self.command, self.root = shlex.join(["scripts/test", *words]), root
        self.tests: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.left_out: set[tuple[str, str]] = set()
        self.outcomes: dict[str, str] = {}
        self.commit, self.why_not, self.said = "", "", ""
        try:
            if any("::" in argument for argument in command):
                raise NotRecorded("tests were chosen by name (::)")
            self.commit = clean_commit(root)
        except NotRecorded as reason:
            self.why_not = str(reason)

    def pytest_deselected(self, items: Sequence[Any]) -> None:
        for item in items:
            if not any(item.get_closest_marker(mark) for mark in ("gpu", "slow")):
                self.left_out |= _pairs(item)

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            for pair in _pairs(item):
                self.tests[pair].add(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped or report.when == "call":
            self.outcomes.setdefault(report.nodeid, report.outcome)

    def rows(self) -> list[Row]:
        """One for each pair that was run in full."""
        rows = []
        for pair, tests in sorted(self.tests.items()):
            count = Counter(self.outcomes.get(test, "not run") for test in tests)
            if pair in self.left_out or count["not run"] or not count["passed"] + count["failed"]:
                continue
            result = "failed" if count["failed"] else PASSED
            row = row_of(
                *pair, hardware=CPU, result=result, command=self.command, commit=self.commit,
                root=self.root,
            )  # fmt: skip
            rows.append(row | {"tests": dict(count)})
        return rows

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Writes the rows and the README's tables, or says why not: the tests' result stands."""
        try:
            if self.why_not:
                raise NotRecorded(self.why_not)
            if clean_commit(self.root, untracked="no") != self.commit:
                raise NotRecorded("another commit was checked out meanwhile")
            rows = self.rows()
            if not rows:
                raise NotRecorded("no mark `verifies` was run in full")
            append(self.root / FILE, rows)
            import readme  # A sibling: it draws on the row that was just written.

            readme.write(self.root)
            self.said = f"recorded: {len(rows)} rows in {FILE}, and README.md made from them"
        except (NotRecorded, OSError, ValueError) as error:
            self.said = f"NOT RECORDED: {error}"
        terminalreporter.write_line(self.said)


def _pairs(item: Any) -> set[tuple[str, str]]:
    if any(item.get_closest_marker(mark) for mark in ("gpu", "slow")):
        return set()
    return {(mark.args[0], mark.args[1]) for mark in item.iter_markers("verifies")}


def main(arguments: Sequence[str]) -> int:
    """A step of scripts/gpu; says why if nothing is recorded, which is no failure of the step."""
    parser = argparse.ArgumentParser(description="Records a step of scripts/gpu.")
    parser.add_argument("file", type=Path, help="verification.jsonl; a row is appended")
    parser.add_argument("step", help="what was run")
    parser.add_argument("code", help="its exit code")
    args = parser.parse_args(arguments)
    import torch

    result = PASSED if args.code == "0" else f"exit code {args.code}"
    try:
        row = row_of(
            "scripts/gpu", args.step, hardware=torch.cuda.get_device_name(), result=result,
            command="scripts/gpu", commit=clean_commit(),
        )  # fmt: skip
        append(args.file, [row])
    except NotRecorded as reason:
        print(f"{args.step}: NOT RECORDED: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
