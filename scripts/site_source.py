"""Prepares the sources of the documentation site: python scripts/site_source.py FOLDER.

Pages of docs/ link to recipes, examples and sources beside docs/, which a site does not hold. Each
file that is linked to becomes a page of its own, and the links are turned to it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(([^)#\s]+)((?:#[^)\s]*)?)\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".cu": "cpp"}


def prepare(target: Path, root: Path = ROOT) -> list[str]:
    """Write the site's sources to a folder, which is emptied; returns the links that lead nowhere.

    Args:
        target: Gets `mkdocs.yml`, `docs/`, and the package, which the API page is made from.
        root: The project.

    Raises:
        ValueError: The folder holds the project.
    """
    if root.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"FOLDER = {target}: is emptied, and holds the project; name another")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "docs", target / "docs")
    shutil.copy(root / "mkdocs.yml", target)
    (target / "dancegrpo_fast").symlink_to((root / "dancegrpo_fast").resolve())
    broken: list[str] = []
    for page in sorted((root / "docs").rglob("*.md")):
        copy = target / "docs" / page.relative_to(root / "docs")
        text = page.read_text(encoding="utf-8")
        copy.write_text(_turned(text, page, copy, target / "docs", root, broken), encoding="utf-8")
    return broken


def _turned(
    text: str, page: Path, copy: Path, site: Path, root: Path, broken: list[str]
) -> str:
    """The page with links that leave docs/ turned to pages made for what they name."""

    def turn(match: re.Match[str]) -> str:
        link, anchor = match.groups()
        if "://" in link or not link.startswith("../"):
            return match.group(0)
        linked = (page.parent / link).resolve()
        if linked.is_relative_to(root / "docs"):
            return match.group(0)
        if not linked.exists() or not linked.is_relative_to(root):
            broken.append(f"{page.relative_to(root)}: {link}")
            return match.group(0)
        name = linked.relative_to(root).as_posix()
        if name == "README.md":
            return f"]({_up(copy, site)}index.md)"
        made = site / "source" / f"{name}.md"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(_page_of(linked, name), encoding="utf-8")
        # Anchors name places of the file that its page does not have.
        return f"]({_up(copy, site)}source/{name}.md)"

    return _LINK.sub(turn, text)


def _up(page: Path, site: Path) -> str:
    return "../" * (len(page.relative_to(site).parts) - 1)


def _page_of(path: Path, name: str) -> str:
    if path.is_dir():
        hidden = ("__pycache__", ".")
        text = "\n".join(sorted(p.name for p in path.iterdir() if not p.name.startswith(hidden)))
        language = "text"
    else:
        text = path.read_text(encoding="utf-8").rstrip("\n")
        language = _LANGUAGES.get(path.suffix, "text")
    return (
        f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
        f"~~~~~~{language}\n{text}\n~~~~~~\n"
    )


def main() -> int:
    """Run from the command line; 1 and one line each if links lead nowhere."""
    parser = argparse.ArgumentParser(description="Prepares the documentation's sources.")
    parser.add_argument("folder", type=Path, help="where they go; it is emptied")
    broken = prepare(parser.parse_args().folder)
    for line in broken:
        print(f"{line}: no such file", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
