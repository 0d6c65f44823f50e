"""Writes the README's tables "What is verified" and "Measured" from benchmarks/results/.

    python scripts/readme.py            after scripts/test --record, scripts/gpu or a benchmark
    python scripts/readme.py --check    exit code 1 if the README is not what it would write

A row without its file says "not measured"; one without a recorded run says "never run".
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from results_table import measured, table

from dancegrpo_fast.report.verification import (
    CPU,
    FILE,
    PASSED,
    REAL,
    ROOT,
    STOCK,
    TWIN,
    Key,
    Row,
    content_hash,
    newest_rows,
    when,
)

# Name in the recipes, and of the test file; what a reader calls it.
FAMILIES = {
    "sd": "Stable Diffusion 1.4, 1.5",
    "sd3": "Stable Diffusion 3, 3.5",
    "flux": "FLUX.1",
    "qwen_image": "Qwen-Image",
    "qwen_image_edit": "Qwen-Image-Edit",
    "hunyuan_video": "HunyuanVideo, videos and images",
    "skyreels_i2v": "SkyReels-V1 image-to-video",
    "wan": "Wan2.1, Wan2.2 (two experts), TI2V-5B text-to-video",
    "wan_i2v": "Wan2.1, Wan2.2, TI2V-5B image-to-video",
    "custom_family": "your own ([LTX-Video 0.9.0](examples/custom_family.py))",
}


# ---------------------------------------------------------------------------- what is verified


def verified(root: Path) -> str:
    """The table of families, and what has run on a GPU."""
    rows = newest_rows(root / FILE)
    recipes: dict[str, list[Path]] = {}
    for path in sorted((root / "recipes").glob("*.yaml")):
        named = re.search(r"^  family: (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        recipes.setdefault(named[1] if named else "", []).append(path)
    lines = []
    for family, title in FAMILIES.items():
        subject = f"family:{family}"
        ours = recipes.get(family, [])
        subjects = {subject, *(f"recipe:{path.stem}" for path in ours)}
        about = [row for key, row in rows.items() if key[0] in subjects]
        lines.append(
            (
                title,
                f"[{_tests(rows.get((subject, TWIN, CPU)))}](tests/families/test_{family}.py)",
                _tests(rows.get((subject, STOCK, CPU))),
                _recipes(ours, rows) if ours else "none",
                _elsewhere(row for row in about if row["what"] == REAL),
                _elsewhere(row for row in about if row["hardware"] != CPU),
            )
        )
    head = ("family", "its tests", "as the stock pipeline", "recipes", "real weights", "GPU")
    return f"{table(head, lines)}\n\n{_provenance(rows.values())}\n\n{_gpu(rows)}"


def _tests(row: Row | None) -> str:
    if row is None:
        return "no record"
    count = row["tests"]
    if row["result"] != PASSED:
        return f"**{count['failed']} failed**"
    skipped = f", {count['skipped']} skipped" if "skipped" in count else ""
    return f"{count['passed']} passed{skipped}"


def _recipes(paths: Sequence[Path], rows: dict[Key, Row]) -> str:
    """How many trained their twin as they stand now."""
    good = 0
    for path in paths:
        row = rows.get((f"recipe:{path.stem}", TWIN, CPU))
        good += row is not None and (row["result"], row["content"]) == (PASSED, content_hash(path))
    return f"{good} of {len(paths)}"


def _elsewhere(rows: Iterable[Row]) -> str:
    said = [f"{row['result']}, {row['hardware']} ({when(row)})" for row in rows]
    return "; ".join(said) or "never run"


def _provenance(rows: Iterable[Row]) -> str:
    places = sorted({(row["date"], when(row)) for row in rows if row["hardware"] == CPU})
    if not places:
        return "Nothing is recorded yet (`scripts/test --record`)."
    return f"Recorded by `scripts/test --record` on a CPU: {'; '.join(w for _, w in places)}."


def _gpu(rows: dict[Key, Row]) -> str:
    steps = [row for (subject, _, _), row in rows.items() if subject == "scripts/gpu"]
    if not steps:
        return "**No part has run on a GPU** (`scripts/gpu` runs what needs one)."
    head = ("step of `scripts/gpu`", "GPU", "result", "at")
    cells = [(row["what"], row["hardware"], row["result"], when(row)) for row in steps]
    return table(head, cells)


# ---------------------------------------------------------------------------- the page

PARTS: dict[str, Callable[[Path], str]] = {"verified": verified, "measured": measured}


def page(root: Path) -> str:
    """The text of the README with both tables written anew.

    Raises:
        ValueError: Of a file that cannot be read.
    """
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, write in PARTS.items():
        pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md: must hold one part from <!-- {name}: ... --> to its end")
        made = write(root)
        text = pattern.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
    return text


def write(root: Path) -> None:
    """Write the README with both tables written anew."""
    made = page(root)
    (root / "README.md").write_text(made, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args(arguments)
    try:
        if not args.check:
            write(args.root)
        elif page(args.root) != (args.root / "README.md").read_text(encoding="utf-8"):
            print("README.md is stale: run python scripts/readme.py", file=sys.stderr)
            return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
