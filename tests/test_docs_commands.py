"""Commands of the documentation are run as they stand; messages that it quotes are the code's.

A fenced block whose info string has `title="run"` is run in a fresh copy of the project, all blocks
of a page in order in one folder; `title="run, exit code N"` must end so. The lines of a block
titled "prints" after it must occur in what it printed.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_blocks import ROOT, environment, fresh_copy, runnable

from dancegrpo_fast import cli
from dancegrpo_fast.config import load_config

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.stem)
def test_runnable_commands_run(page: Path, tmp_path: Path) -> None:
    project = fresh_copy(tmp_path / "clone")
    env = environment(project)
    for block, command, code, printed in runnable(page):
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=project, env=env, timeout=600, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        where = f"{page.name}:{block.line}"
        assert ran.returncode == code, f"{where}: exit code {ran.returncode}\n{ran.stdout}"
        assert "Traceback" not in ran.stdout, f"{where}\n{ran.stdout}"
        for line in printed.splitlines():
            assert line in ran.stdout, f"{where}: does not print {line!r}\n{ran.stdout}"


def written_commands(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of code blocks and inline code that call our command, without the call itself."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\s*\\\n\s*", " ", text).replace('"..."', '"text"')
    for number, line in enumerate(text.split("\n"), 1):
        for match in re.finditer(r"`dancegrpo-fast ([^`\n]+)`", line):
            yield number, match[1]
        if "`" not in line and (match := re.search(r"(?:^|\s)" + _CALL + r"\s+(.*)", line)):
            yield number, re.split(r"\s{2,}|\s#", match[1])[0]  # Behind it stands what it does.


_CALL = r"(?:dancegrpo-fast|(?:torchrun|python)\b.* -m dancegrpo_fast)"
_SHELL = {"&", "|", ">", "&&", ";", "...", "where"}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the pages as words; lines of grammar ([key=value ...]) are left out."""
    pages = [*PAGES, ROOT / "README.md", *sorted((ROOT / "examples").rglob("README.md"))]
    for page in pages:
        for line, text in written_commands(page):
            try:
                words = shlex.split(text)
            except ValueError:
                continue  # An apostrophe: prose.
            words = words[: next((i for i, word in enumerate(words) if word in _SHELL), None)]
            grammar = any(word.startswith("[") for word in words)
            if len(words) > 1 and words[0] in cli.COMMANDS and not grammar:
                yield f"{page.name}:{line}", ["8" if word == "N" else word for word in words]


COMMANDS = list(commands())


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 40
    assert {words[0] for _, words in COMMANDS} == set(cli.COMMANDS) - {"doctor"}


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[w for w, _ in COMMANDS])
def test_every_command_is_one_that_we_have(
    where: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Options and arguments are the command's; recipes in recipes/ take the overrides. A name in
    # capitals stands for any recipe; what a page makes itself (mine.yaml) only runs in its test.
    parser = argparse.ArgumentParser(exit_on_error=False)
    command = importlib.import_module(f"dancegrpo_fast.cli.{words[0].replace('-', '_')}")
    command.add_parser(parser.add_subparsers(dest="command"))
    args, more = parser.parse_known_args(words)
    overrides = [*getattr(args, "overrides", []), *more]
    overrides = [word for word in overrides if not word.startswith("$")]
    assert all("=" in word and not word.startswith("-") for word in overrides), overrides
    recipe = getattr(args, "recipe", None)
    if recipe in ("RECIPE", "RECIPE.yaml"):
        recipe = "recipes/demo.yaml"
    monkeypatch.chdir(ROOT)
    if recipe and Path(recipe).is_file():
        load_config(recipe, [word for word in overrides if "$" not in word])
