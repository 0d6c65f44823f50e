"""Plants one-line defects, one at a time, and requires that the tests notice.

    scripts/mutants --list          the defects
    scripts/mutants NAME ...        some of them
    scripts/mutants --all           all of them

`table.toml` holds them. A defect is planted in a temporary copy of the tree, never in the checkout;
then only the tests that should notice it are run. A line is found by its text, not its number:
one that is not there exactly once is an error, so the table cannot rot in silence.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("table.toml")
COPIED = ("dancegrpo_fast", "tests", "examples", "recipes", "pyproject.toml")
LIMIT_SECONDS = 300  # A defect that makes the tests hang is not a defect that they name.


@dataclass(frozen=True)
class Mutant:
    """One defect.

    Attributes:
        name: What the command line calls it.
        file: Path below the root.
        line: The whole line that is replaced, without its indentation.
        becomes: What stands there instead.
        tests: Test files, or `file::test`, that must turn red.
    """

    name: str
    file: str
    line: str
    becomes: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the defect.

        Raises:
            ValueError: The line is not there exactly once.
        """
        lines = text.split("\n")
        found = [number for number, line in enumerate(lines) if line.strip() == self.line]
        if len(found) != 1:
            raise ValueError(
                f"mutant {self.name}: {self.file} holds this line {len(found)} times, not once: "
                f"{self.line!r}; bring {TABLE.name} up to date"
            )
        old = lines[found[0]]
        lines[found[0]] = old.replace(self.line, self.becomes)
        return "\n".join(lines)


def load_table() -> list[Mutant]:
    """The mutants of `table.toml`, in its order."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


@dataclass(frozen=True)
class Result:
    """How a run of some test files ended: "green", "red", "broken" or "hung"."""

    outcome: str
    detail: str
    seconds: float


class Copy:
    """A temporary copy of the tree in which tests are run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # No bytecode: a defect of the same length, written in the same second, would not be seen.
        self.environment = os.environ | {
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "2",
        }
        ignored = shutil.ignore_patterns("__pycache__")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=ignored)
            elif source.is_file():
                shutil.copy2(source, root / name)
        program = "import dancegrpo_fast; print(dancegrpo_fast.__file__)"
        found = self.python(["-c", program]).stdout.strip()
        if not Path(found).is_relative_to(root):
            raise RuntimeError(f"the copy in {root} is not what Python imports: {found}")

    def python(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root, env=self.environment, text=True, timeout=LIMIT_SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def test(self, files: Sequence[str]) -> Result:
        """Run test files up to the first failure."""
        started = time.perf_counter()
        try:
            done = self.python(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files])
        except subprocess.TimeoutExpired:
            return Result("hung", f"over {LIMIT_SECONDS} s", time.perf_counter() - started)
        # Only 1 means "tests ran and some failed"; the others are a copy in which none could run.
        outcome = {0: "green", 1: "red"}.get(done.returncode, "broken")
        failed = re.search(r"^(?:FAILED|ERROR) \S*::(\w+)", done.stdout, re.MULTILINE)
        detail = failed.group(1) if failed else done.stdout.strip().split("\n")[-1]
        return Result(outcome, detail, time.perf_counter() - started)

    @contextlib.contextmanager
    def with_defect(self, mutant: Mutant) -> Iterator[None]:
        path = self.root / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.planted(text), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")


def hunt(mutants: Sequence[Mutant]) -> bool:
    """Print one row per mutant; True if every one was noticed."""
    for mutant in mutants:  # Before the first test run: a stale line should not cost minutes.
        mutant.planted((ROOT / mutant.file).read_text(encoding="utf-8"))
    width = max(len(mutant.name) for mutant in mutants)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder))
        healthy: dict[tuple[str, ...], Result] = {}
        survivors = 0
        for mutant in mutants:
            if mutant.tests not in healthy:
                healthy[mutant.tests] = copy.test(mutant.tests)
            if healthy[mutant.tests].outcome != "green":
                # Tests that are red without the defect prove nothing about it.
                result = healthy[mutant.tests]
                verdict = f"UNKNOWN, without it: {result.outcome}"
            else:
                with copy.with_defect(mutant):
                    result = copy.test(mutant.tests)
                verdict = "killed" if result.outcome == "red" else f"SURVIVED: {result.outcome}"
            survivors += verdict != "killed"
            row = f"{mutant.name:<{width}}  {verdict:<8}  {result.seconds:5.1f} s  {result.detail}"
            print(row, flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} killed")
    return survivors == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try")
    parser.add_argument("--all", action="store_true", help="try every mutant")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    args = parser.parse_args()
    table = load_table()
    known = {mutant.name: mutant for mutant in table}
    if args.list:
        for mutant in table:
            print(f"{mutant.name}  ({mutant.file}; {', '.join(mutant.tests)})")
            print(f"  - {mutant.line}\n  + {mutant.becomes}")
        return 0
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no mutant {', '.join(unknown)}; known: {', '.join(known)}")
    if args.all == bool(args.names):
        parser.error("give names, or --all, or --list")
    return 0 if hunt(table if args.all else [known[name] for name in args.names]) else 1


if __name__ == "__main__":
    sys.exit(main())
