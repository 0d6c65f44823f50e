"""Fenced blocks of the documentation, and the fresh project that their commands run in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_RUN = re.compile(r'(bash|python) title="run(?:, exit code (\d+))?"')
_SHOWN = ('text title="prints"', 'text title="message"')


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    info: str
    body: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["info"].strip(), match["body"])


def runnable(page: Path) -> list[tuple[Block, str, int, str]]:
    """Blocks to run: with their shell command, exit code and what they must print.

    Python blocks of a page continue each other, so each runs with those before it.
    """
    found: list[tuple[Block, str, int, str]] = []
    python = ""
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if match := _RUN.fullmatch(block.info):
            command = block.body
            if match[1] == "python":
                python += block.body
                command = f"python - <<'END_OF_BLOCK'\n{python}END_OF_BLOCK\n"
            found.append((block, command, int(match[2] or 0), ""))
        elif block.info == _SHOWN[0]:
            assert found, f"{where}: prints, but nothing was run before"
            found[-1] = (*found[-1][:3], block.body)
        else:
            assert "title=" not in block.info or block.info in _SHOWN, f"{where}: {block.info}?"
    return found


def fresh_copy(target: Path) -> Path:
    """The project as a clone has it, with the native module that an installation would build."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    built = [str(p.relative_to(ROOT)) for p in (ROOT / "dancegrpo_fast").glob("_native*.so")]
    for name in [*listed.split("\0"), *built]:
        source = ROOT / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    return target


def environment(project: Path) -> dict[str, str]:
    """The shell's after `source .venv/bin/activate`, with the package of the copy."""
    scripts = project / ".commands"
    scripts.mkdir()
    run = "-m torch.distributed.run"
    calls = {"python": "", "dancegrpo-fast": "-m dancegrpo_fast", "torchrun": run}
    for name, module in calls.items():
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (scripts / name).chmod(0o755)
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}
