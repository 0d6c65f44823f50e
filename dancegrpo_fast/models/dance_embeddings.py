"""Reads the embedding folders that DanceGRPO's preprocess scripts write.

A folder holds `videos2caption.json`, a list of {"caption": ..., "NAME_path" or "NAME": "0.pt", ...,
perhaps numbers}, and a subfolder NAME for each kind of tensor. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.embeddings import Embeddings
from dancegrpo_fast.prompt import Prompt

INDEX = "videos2caption.json"


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's index; each has a caption."""
    file = folder / INDEX
    where = f"--import = {str(folder)!r}"
    if not file.is_file():
        raise UserError(f"{where}: holds no {INDEX}; give a folder that DanceGRPO's scripts wrote")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(entries, list)
        assert all(isinstance(entry["caption"], str) for entry in entries)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{where}: {INDEX} is no list of objects with a caption") from None
    if not entries:
        raise UserError(f"{where}: {INDEX} holds no prompt")
    return entries


def read_record(folder: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """One entry's tensors by the names of their subfolders; numbers as tensors without axes."""
    record: dict[str, Tensor] = {}
    for field, value in entry.items():
        if isinstance(value, int | float):
            record[field] = torch.tensor(value)
        elif field != "caption" and isinstance(value, str) and value.endswith(".pt"):
            name = field.removesuffix("_path")
            record[name] = _tensor(folder, f"{name}/{value}")
    return record


def import_entry(
    embeddings: Embeddings, folder: Path, entry: Mapping[str, Any], prompts: Iterable[Prompt]
) -> bool:
    """Write one entry as the family's own embedding of its caption; False if that is not clear.

    Args:
        embeddings: Where it goes.
        folder: Of the entry's tensors.
        entry: Of the folder's index.
        prompts: The recipe's. Where a family takes images, which no index names, an entry belongs
            to the one of them that has its caption as text.
    """
    family, prompt = embeddings.family, Prompt(entry["caption"].strip())
    if family.takes_image:
        same = [other for other in prompts if other.text == prompt.text]
        if len(same) != 1:
            return False
        (prompt,) = same
    record = read_record(folder, entry)
    try:
        row: Condition = family.from_dance(record)
    except KeyError as error:
        raise UserError(
            f"--import = {str(folder)!r}: the entry {prompt.text[:40]!r} has no {error}, only "
            f"{', '.join(record) or 'nothing'}; it was made for another family than "
            f"{family.config.family}"
        ) from None
    if family.takes_image and not row.shared:
        raise UserError(
            f"--import = {str(folder)!r}: it holds no images, from which family "
            f"{family.config.family} starts; embed the prompts anew"
        )
    embeddings.write(embeddings.key(prompt), row, prompt.text)
    return True


def _tensor(folder: Path, relative: str) -> Tensor:
    file = folder / relative
    where = f"--import = {str(folder)!r}: {relative}"
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: lies outside the folder; move it there")
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{where}: {INDEX} names it, and it is not there") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: is no tensor that can be read safely: {reason}") from None
    if not isinstance(value, Tensor):
        raise UserError(f"{where}: holds a {type(value).__name__}, no tensor")
    return value
