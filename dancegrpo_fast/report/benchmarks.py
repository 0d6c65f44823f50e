"""Prompt sets that people evaluate with, from files that the user brings.

Nothing is downloaded and no set is part of this package. Where the number of prompts, or their very
texts, are publicly known they stand here, and a set that differs is said to: a part of a set is no
mistake, but its numbers are not comparable with published ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dancegrpo_fast.config import UserError
from dancegrpo_fast.data import read_prompts
from dancegrpo_fast.prompt import Prompt

FIELD = "--prompts"
STYLES = ("anime", "concept-art", "paintings", "photo")


@dataclass(frozen=True)
class Benchmark:
    """How a set is written, and what is known of it.

    Attributes:
        title: Its name.
        shape: What the file looks like.
        column: Key or column of the prompt.
        group: Metadata that results are also listed by; empty for none.
        count: Number of prompts of the published set; None where it is not one known number.
        sha256: Of its texts, joined by line feeds, as UTF-8; None where it was not looked up.
        check: Returns why a prompt is none of this set; empty if it may be.
        unique: Equal texts are one prompt (tables of pairs repeat them).
    """

    title: str
    shape: str
    column: str = "prompt"
    group: str = ""
    count: int | None = None
    sha256: str | None = None
    check: Callable[[Prompt], str] = lambda prompt: ""
    unique: bool = False


def _geneval(prompt: Prompt) -> str:
    include = prompt.metadata.get("include")
    if not isinstance(prompt.metadata.get("tag"), str):
        return 'has no text under "tag"'
    if not isinstance(include, list) or not all(
        isinstance(thing, dict) and "class" in thing for thing in include
    ):
        return 'has no list of objects with "class" under "include"'
    return ""


def _quotes(prompt: Prompt) -> str:
    there = re.search('"[^"]+"|\u201c[^\u201d]+\u201d', prompt.text) or "text" in prompt.metadata
    return "" if there else 'quotes no text and has none under "text"'


#: GenEval: evaluation_metadata.jsonl of djghosh13/geneval. OCR: test.txt of Flow-GRPO's data set.
#: DrawBench: a public copy with all 200 (data/drawbench.csv of brianfitzgerald/smolmodels).
BENCHMARKS: dict[str, Benchmark] = {
    "plain": Benchmark("prompts", "any file that data.prompts takes"),
    "hpsv2": Benchmark(
        "HPSv2 benchmark",
        f"a folder with {', '.join(f'{style}.json' for style in STYLES)}, lists of texts; or one "
        ".json file, an object from style to list",
        group="style",
        count=3200,
    ),
    "pickapic": Benchmark(
        "Pick-a-Pic", "a table with the column caption; equal ones count once",
        column="caption", count=500, unique=True,
    ),
    "geneval": Benchmark(
        "GenEval", "a .jsonl with tag, include and prompt", group="tag", count=553,
        sha256="4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b", check=_geneval,
    ),
    "drawbench": Benchmark(
        "DrawBench", "a table with the columns Prompts and Category", column="Prompts",
        group="Category", count=200,
        sha256="4056f6f1125417b3964a1623200158d7de26ee5869d2be8661737297ddca0dd1",
    ),
    "videoalign": Benchmark(
        "VideoAlign prompts", "a table with the column prompt, or text; equal ones count once",
        unique=True,
    ),
    "ocr": Benchmark(
        "OCR", "text with one prompt a line, each quoting what is to be read", count=1018,
        sha256="4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc", check=_quotes,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class BenchmarkPrompts:
    """A set that was read.

    Attributes:
        prompts: The prompts.
        groups: The group of each; empty without groups.
        note: How many there are, and whether they are the published ones.
        sha256: Of the texts, joined by line feeds, as UTF-8.
    """

    prompts: tuple[Prompt, ...]
    groups: tuple[str, ...]
    note: str
    sha256: str


def load_benchmark(
    name: str,
    source: str,
    *,
    column: str | None = None,
    limit: int | None = None,
    expect: str | None = None,
) -> BenchmarkPrompts:
    """Read a set.

    Args:
        name: A key of `BENCHMARKS`.
        source: File, folder (hpsv2) or hub id.
        column: Of the prompt, if it is not the set's own.
        limit: Keep the first so many only (hpsv2: of each style).
        expect: What `BenchmarkPrompts.sha256` must be, or begin with.

    Raises:
        UserError: It cannot be read, is not of this shape, or not what is expected.
    """
    about = BENCHMARKS[name]
    if name == "hpsv2":
        prompts = _styles(Path(source), limit)
    else:
        prompts = read_prompts(source, field=FIELD, column=column or about.column)
    bad = [(n, why) for n, prompt in enumerate(prompts, 1) if (why := about.check(prompt))]
    if bad:
        raise UserError(
            f"{FIELD} = {source!r}: prompt {bad[0][0]} of {len(prompts)} {bad[0][1]} ({len(bad)} "
            f"such); --format {name} takes {about.shape}"
        )
    if about.unique:
        first: dict[str, Prompt] = {}
        for prompt in prompts:
            first.setdefault(prompt.text, prompt)
        prompts = list(first.values())
    if limit is not None and name != "hpsv2":
        prompts = prompts[:limit]
    texts = "\n".join(prompt.text for prompt in prompts).encode("utf-8", "surrogatepass")
    found = hashlib.sha256(texts).hexdigest()
    if expect is not None and not found.startswith(expect.lower()):
        raise UserError(
            f"--expect = {expect}: the {len(prompts)} prompts of {source} have the SHA-256 "
            f"{found}; bring the file that is meant, or leave --expect out"
        )
    groups = tuple(str(prompt.metadata.get(about.group, "")) for prompt in prompts)
    note = _note(about, prompts, found)
    return BenchmarkPrompts(tuple(prompts), groups if about.group else (), note, found)


def _note(about: Benchmark, prompts: Sequence[Prompt], sha256: str) -> str:
    found = f"{about.title}: {len(prompts)}"
    if about.count is None:
        return f"{found} prompts" if about.title != "prompts" else f"{len(prompts)} prompts"
    if len(prompts) != about.count:
        return f"{found} prompts, while the published set has {about.count}"
    if about.sha256 is None:
        return f"{found} prompts, as many as the published set"
    same = "the published ones" if sha256 == about.sha256 else "not the published texts"
    return f"{found} prompts, {same}"


def _styles(source: Path, limit: int | None) -> list[Prompt]:
    """HPSv2's four styles, in their order."""
    where, about = f"{FIELD} = {str(source)!r}", BENCHMARKS["hpsv2"]
    try:
        if source.is_dir():
            files = {style: source / f"{style}.json" for style in STYLES}
            lists = {style: json.loads(file.read_bytes()) for style, file in files.items()}
        else:
            lists = json.loads(source.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{where}: {error.filename}: no such file; give {about.shape}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}; give {about.shape}") from None
    if not isinstance(lists, dict) or not all(
        isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)
        for texts in lists.values()
    ):
        raise UserError(f"{where}: holds something else than lists of texts; give {about.shape}")
    return [
        Prompt(text.strip(), None, {"style": style})
        for style, texts in lists.items()
        for text in texts[:limit]
    ]
