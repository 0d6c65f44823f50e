"""Files of prompts: text, JSON lines, CSV, parquet, or a data set of the hub.

Every malformed line is looked for before anything is said, so that one call names all of them.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from PIL import Image

from dancegrpo_fast.config import UserError
from dancegrpo_fast.prompt import Prompt

logger = logging.getLogger(__name__)

Malformed = Literal["refuse", "skip"]
_EXPLAINED, _NUMBERED = 50, 200  # Lines of an error message, line numbers in its last.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", re.ASCII)


class _Bad(Exception):
    """A line that is no prompt.

    Args:
        what: The mistake.
        detail: What exactly, if that differs from line to line.
        kind: Tells mistakes apart where `what` does not.
    """

    def __init__(self, what: str, detail: str = "", *, kind: str = "") -> None:
        super().__init__(what + detail)
        self.kind = kind or what


Found = tuple[int, Any]  # Number of a line or row from 1, and its record or _Bad.


def read_prompts(
    source: str | Path,
    *,
    field: str,
    column: str = "prompt",
    malformed: Malformed = "refuse",
) -> list[Prompt]:
    """All prompts of a file, or of a data set of the hub, in order.

    Args:
        source: A file; its ending says what it holds: .jsonl, .csv, .tsv, .parquet, and anything
            else but .json is UTF-8 text with one prompt a line. Blank lines are skipped. Or
            `organisation/name[:split]` of a data set of the hub (split train if none is named).
        field: Configuration field that named the source, for error messages.
        column: Key or column of the prompt's text. A column "image" names a file in the folder of
            `source` or below, or holds the image itself (parquet, data sets of the hub), which is
            kept as a file of the user's cache; all others are what rewards are told.
        malformed: Refuse a file with malformed lines, or go on without these, with a warning.

    Raises:
        UserError: The source cannot be read, lines are malformed, or there is no prompt.
    """
    where, path = f"{field} = {str(source)!r}", Path(source)
    found: Iterator[Found]
    folder: Path | None
    suffix = path.suffix.lower()
    if suffix == ".json":  # As text its brackets and quotes would be prompts.
        raise UserError(f"{where}: is JSON in one piece; give a .jsonl file, one object a line")
    if not path.exists() and suffix not in _READERS and _HUB_ID.fullmatch(str(source)):
        found, folder = _hub(str(source), where), None
    else:
        reader = _READERS.get(suffix, _text)
        found, folder = reader(_bytes(path, where), where, column), path.parent
    unit = "row" if folder is None or suffix == ".parquet" else "line"
    prompts: list[Prompt] = []
    bad: list[tuple[int, _Bad]] = []
    for number, record in found:
        try:
            if isinstance(record, _Bad):
                raise record
            prompts.append(_prompt(record, folder, column))
        except _Bad as reason:
            bad.append((number, reason))
    if bad:
        told = _told(bad, where, unit)
        if malformed == "refuse":
            raise UserError(told)
        logger.warning("%s\ngoing on without %d of them", told, len(bad))
    if not prompts:
        raise UserError(f"{where}: holds no prompt; write one a line")
    return prompts


def _bytes(path: Path, where: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{where}: no such file; give a text file with one prompt a line, a .jsonl, .csv or "
            f".parquet file, or a data set of the hub (relative paths count from {Path.cwd()})"
        ) from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where}: cannot be read as UTF-8 text: it is UTF-16; save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def _prompt(record: Any, folder: Path | None, column: str) -> Prompt:
    """One record as a prompt; raises _Bad."""
    if not isinstance(record, dict):
        raise _Bad(f'must be an object with a text under "{column}"')
    if not isinstance(record.get(column), str):
        there = f"it has {', '.join(map(str, record))[:80] or 'nothing'}"
        if column in record:
            there = f"that is {str(record[column])[:40]!r}, a {type(record[column]).__name__}"
        raise _Bad(f'must be an object with a text under "{column}"', f"; {there}")
    text = _clean(record.pop(column))
    image = record.pop("image", None)
    return Prompt(text, None if image is None else _image(image, folder), record)


def _clean(text: str) -> str:
    """A prompt without the space around it; raises _Bad for what no encoder or file takes."""
    text = text.strip()
    if not text:
        raise _Bad("the prompt is empty")
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            escaped = 0xDC80 <= ord(character) <= 0xDCFF
            raise _Bad("is not UTF-8 text" if escaped else "holds half of a surrogate pair")
        if kind == "Cc" and character not in "\t\n\r\x85":
            raise _Bad("holds a control character", f", U+{ord(character):04X}")
    return text


def clean_text(text: str, field: str) -> str:
    """A prompt that is given as it is, held to what a line of a file is.

    Raises:
        UserError: It is empty or holds what is no text.
    """
    try:
        return _clean(text)
    except _Bad as reason:
        raise UserError(f"{field} = {text[:40]!r}: {reason}") from None


def _image(image: Any, folder: Path | None) -> Path:
    if isinstance(image, dict):  # As parquet files hold images.
        if not isinstance(image.get("bytes"), bytes):
            raise _Bad("image is not in the table itself; save it beside a .jsonl file")
        return _kept(image["bytes"])
    if not isinstance(image, str) or not image or "\0" in image:
        raise _Bad("image must be the name of a file")
    if folder is None:
        raise _Bad("image is only a name, without a folder; save it beside a .jsonl file")
    file = folder / image
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            told = f"{image!r} lies outside {folder}; move it there"
            raise _Bad("image ", told, kind="outside")
        if not file.is_file():
            raise _Bad("image ", f"{image!r}: no such file in {folder}", kind="missing")
    except OSError as error:  # Such as a name that is too long.
        raise _Bad("image ", f"{image[:40]!r}...: {error.strerror}") from None
    return file


def _kept(data: bytes) -> Path:
    """The file of an image that a table holds, in the user's cache, named by its content."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    file = Path(root) / "dancegrpo_fast" / "images" / hashlib.sha256(data).hexdigest()
    if file.is_file():
        return file
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise _Bad("image cannot be read", f": {error}") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")  # Other processes may read the same set.
    partial.write_bytes(data)
    os.replace(partial, file)
    return file


def _told(bad: list[tuple[int, _Bad]], where: str, unit: str) -> str:
    """A line on each of the first malformed ones and on one of each kind; the rest by number."""
    kinds = Counter(reason.kind for _, reason in bad)
    first = {reason.kind: number for number, reason in reversed(bad)}
    spare = max(0, _EXPLAINED - len(kinds))
    lines, rest = [], []
    for number, reason in bad:
        if first[reason.kind] == number or spare > 0:
            spare -= first[reason.kind] != number
            lines.append(f"{where}: {unit} {number}: {reason}")
        else:
            rest.append(str(number))
    if rest:
        more = f" and {len(rest) - _NUMBERED} more" if len(rest) > _NUMBERED else ""
        shown = ", ".join(rest[:_NUMBERED])
        lines.append(f"{where}: malformed too, {len(bad)} in all: {unit}s {shown}{more}")
    return "\n".join(lines)


# ---- the formats ---------------------------------------------------------------------------------


def _lines(data: bytes) -> Iterator[tuple[int, str | _Bad]]:
    # Not splitlines(): a prompt may hold U+2028 and its kin.
    for number, raw in enumerate(data.split(b"\n"), 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            bad = raw[error.start]
            yield number, _Bad("is not UTF-8 text", f": byte {error.start + 1} is 0x{bad:02x}")
            continue
        if line:
            yield number, line


def _text(data: bytes, where: str, column: str) -> Iterator[Found]:
    for number, line in _lines(data):
        yield number, line if isinstance(line, _Bad) else {column: line}


def _jsonl(data: bytes, where: str, column: str) -> Iterator[Found]:
    for number, line in _lines(data):
        yield number, line if isinstance(line, _Bad) else _json(line)


def _json(line: str) -> Any:
    def constant(name: str) -> Any:
        raise _Bad("holds a number that JSON has not", f", {name}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise _Bad("has a key twice", f", {twice[0]!r}")
        return dict(pairs)

    try:
        return json.loads(line, parse_constant=constant, object_pairs_hook=once)
    except _Bad as reason:
        return reason
    except (ValueError, RecursionError) as error:
        return _Bad("is not JSON", f": {error}")


def _csv(
    data: bytes, where: str, column: str, *, delimiter: str = ","
) -> Iterator[Found]:
    """A record at a time, each with a reader of its own.

    A quote that nothing closes would otherwise swallow the lines below it: a bad record costs its
    first line, and reading goes on at the next.
    """
    # Bytes that are no UTF-8 become half surrogates, which `_prompt` names.
    lines = data.decode("utf-8", errors="surrogateescape").split("\n")
    header: list[str] = []
    at = 0
    while at < len(lines):
        number = at + 1
        if not lines[at].strip():
            at += 1
            continue
        rest = (f"{lines[i]}\n" for i in range(at, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        try:
            row = next(reader)
        except csv.Error as error:
            if not header:
                told = f"{where}: line {number}: the header is malformed: {error}"
                raise UserError(told) from None
            yield number, _Bad("is not CSV", f": {error}")
            at += 1
            continue
        if not header:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                names = ", ".join(header)
                told = f"{where}: line {number}: the header names a column twice: {names}"
                raise UserError(told)
        elif len(row) != len(header):
            yield number, _Bad("has another number of fields", f" than the header: {len(row)}")
            at += 1
            continue
        else:
            pairs = zip(header, row, strict=True)
            yield number, {name: value for name, value in pairs if value != ""}
        at += reader.line_num


def _tsv(data: bytes, where: str, column: str) -> Iterator[Found]:
    return _csv(data, where, column, delimiter="\t")


def _parquet(data: bytes, where: str, column: str) -> Iterator[Found]:
    arrow = _optional("pyarrow", where)
    parquet = _optional("pyarrow.parquet", where)
    try:
        file = parquet.ParquetFile(arrow.BufferReader(data))
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        yield from enumerate(map(_without_nulls, rows), 1)
    except arrow.ArrowException as error:
        raise UserError(f"{where}: is no readable parquet file: {error}") from None


def _hub(source: str, where: str) -> Iterator[Found]:
    datasets = _optional("datasets", where)
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
        if isinstance(rows.features.get("image"), datasets.Image):  # Bytes, not decoded pixels.
            rows = rows.cast_column("image", datasets.Image(decode=False))
    except (OSError, ValueError) as error:  # Among them: offline and not in the cache, no split.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{where}: is no file, and cannot be loaded as a data set of the hub: {reason}"
        ) from None
    return enumerate(map(_without_nulls, map(dict, rows)), 1)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _optional(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(
            f"{where}: needs the package {package} (pip install {package}); or give a .jsonl file"
        ) from None


_READERS: dict[str, Callable[[bytes, str, str], Iterator[Found]]] = {
    ".txt": _text, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet,
}  # fmt: skip
