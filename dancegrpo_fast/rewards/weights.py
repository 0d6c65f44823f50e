"""Weights of reward models: from a folder or a hub id, by name, with nothing missing or left over.

Files are safetensors, or PyTorch files read with `weights_only=True`: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

State = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_Model = TypeVar("_Model", bound=nn.Module)


def find_file(source: str, names: Sequence[str]) -> Path | None:
    """The first of some files that a folder or a hub repository holds.

    Raises:
        OSError: No such folder, and no such repository in the cache or on the hub.
    """
    for name in names:
        if Path(source).is_dir():
            found: str | None = str(Path(source) / name)
            found = found if Path(str(found)).is_file() else None
        else:
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found)
    return None


def need_file(source: str, names: Sequence[str]) -> Path:
    """As `find_file`.

    Raises:
        ValueError: The source holds none of the files.
    """
    found = find_file(source, names)
    if found is None:
        hint = (
            ""
            if Path(source).is_dir()
            else "; it is no folder here, and the hub (its cache, if offline) has no such file"
        )
        raise ValueError(f"{source!r} holds no {' or '.join(names)}{hint}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or hub id."""
    return AutoTokenizer.from_pretrained(source)


def read_state(path: Path) -> State:
    """The tensors of a checkpoint, without the wrappings that trainers leave around them.

    Raises:
        ValueError: The file cannot be read, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not named tensors")
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    if state and all(name.startswith("module.") for name in state):  # Left by DDP.
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def rename(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> State:
    """Names with each prefix replaced, by the first rule that fits; others stay."""
    renamed = {}
    for name, value in state.items():
        for old, new in rules:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = value
    return renamed


def build(make: Callable[[], _Model], state: Mapping[str, Tensor], dtype: torch.dtype) -> _Model:
    """A module with all of its weights from `state`, frozen and in evaluation mode.

    Buffers are cast like weights, as `module.to(dtype)` does in the official code: a Qwen2-VL in
    bfloat16 has rotary frequencies of 8 bits, and was trained with them.

    Raises:
        ValueError: A weight is missing, left over or of another shape; the message names some.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # A large model must not exist in float32 even for a moment.
    try:
        with no_init_weights():
            module = make()
    finally:
        torch.set_default_dtype(default)
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    left_over = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    named = {"missing": missing, "left over": left_over, "of another shape": sorted(shapes)}
    if problems := [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in named.items()
        if names
    ]:
        raise ValueError(f"the weights do not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=True)
    return module.to(dtype).eval().requires_grad_(False)


def from_folder(kind: Any, source: str, dtype: torch.dtype) -> Any:
    """transformers' `kind.from_pretrained`, frozen, with every weight found and none left over.

    Unlike `build` it reads checkpoints of several files and old names of the class's own.

    Raises:
        ValueError: Weights that do not fit; the message names some.
    """
    model, found = kind.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    problems = []
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found.get(what) or ())):
            problems.append(f"{len(names)} {what.replace('_', ' ')} ({names[0]}, ...)")
    if problems:
        raise ValueError(
            f"the weights of {source!r} do not fit {kind.__name__}: {'; '.join(problems)}"
        )
    return model.eval().requires_grad_(False)
