"""Networks from safetensors with little host memory: built empty, filled tensor by tensor.

`build` makes a module whose parameters are on the meta device, `fill` reads one tensor after the
other from the memory map of its file, straight to the device. Between the two a module may be
sharded: a parameter that is a DTensor receives this process's part of the stored tensor.
On the CPU a tensor that needs no conversion stays a private view of the file: no copy at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dancegrpo_fast.config import UserError
from dancegrpo_fast.placing import assign

STEMS = ("diffusion_pytorch_model", "model")  # As diffusers and transformers name weight files.


def load(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A frozen diffusers model of a component's folder, in evaluation mode; see `fill`."""
    module = build(cls, folder)
    fill(module, folder, dtype, device)
    return module


def build(cls: Any, folder: Path) -> nn.Module:
    """A frozen diffusers model of a folder's `config.json`: parameters on meta, buffers real.

    Buffers that no file holds (rope tables) are computed by the constructor, in float32.
    """
    with _parameters_on_meta():
        module: nn.Module = cls.from_config(cls.load_config(folder))
    return module.eval().requires_grad_(False)


def fill(module: nn.Module, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Load a built module's weights.

    Args:
        module: From `build`, perhaps adapted and sharded since: DTensor parameters keep mesh and
            placements, and every process reads its own part without communication.
        folder: Holds one safetensors file, or several and their index.
        dtype: Of floating-point weights, except what is trained, or what the class keeps in float32
            (`_keep_in_fp32_modules`).
        device: Where the weights go; DTensors go to the device of their mesh.

    Raises:
        UserError: A file cannot be read, or a tensor is missing, left over or of another shape.
            Nothing has been loaded then.
    """
    files = weight_files(folder)
    state = module.state_dict()
    # Adapters wrap the layers they adapt, and come from no file of the folder's.
    names = {name.replace(".base_layer.", "."): name for name in state if ".lora_" not in name}
    _check(module, {stored: state[name] for stored, name in names.items()}, files)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    exact = set(getattr(module, "_keep_in_fp32_modules", None) or [])
    for stored, tensor in stored_tensors(files):
        if name := names.get(stored):
            keep = name in trained or not exact.isdisjoint(stored.split("."))
            assign(module, name, tensor, torch.float32 if keep else dtype, device)
    for name, buffer in list(module.named_buffers()):
        if name not in state:
            assign(module, name, buffer, buffer.dtype, device)


def stored_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything in some safetensors files, one at a time."""
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (a safetensors handle, no dict)
                yield name, stored.get_tensor(name)


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's tensors by name, from its header.

    Raises:
        UserError: It is none, or was cut short.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); it was cut short or is no safetensors file: "
            "fetch or save it again"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder, in the order of their names.

    Raises:
        UserError: There are none, an index names files that are not there, or only other formats.
    """
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed(index)
        if single.is_file():
            return [single]
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".ckpt"))
    if others:
        raise UserError(
            f"{folder}: holds {others[0]} and no safetensors; only safetensors are loaded: convert "
            "it once with diffusers (from_pretrained, then save_pretrained)"
        )
    names = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise UserError(
        f"{folder}: holds no {names}; fetch it again (`dancegrpo-fast fetch RECIPE`) or complete "
        "the folder"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: is no index of safetensors files; fetch it again") from None
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names {outside[0]!r}, which is not a file of its folder")
    files = [index.parent / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{index.parent}: {', '.join(absent[:3])} is missing ({len(absent)} of {len(files)} "
            "files of its index); fetch it again (`dancegrpo-fast fetch RECIPE`)"
        )
    return files


def _check(module: nn.Module, wanted: dict[str, Tensor], files: list[Path]) -> None:
    """Compare names and shapes with the files' headers."""
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []
    problems: list[str] = []
    found: set[str] = set()
    for file in files:
        shapes = stored_shapes(file)
        found |= shapes.keys()
        for name, shape in shapes.items():
            if name not in wanted:
                if not any(re.search(pattern, name) for pattern in ignored):
                    problems.append(f"{file.name}: {name} has no place in the model")
            elif shape != tuple(wanted[name].shape):
                expected = list(wanted[name].shape)
                problems.append(f"{file.name}: {name} has shape {list(shape)}, not {expected}")
    files_named = ", ".join(file.name for file in files[:2]) + (", ..." if files[2:] else "")
    problems += [f"{files_named}: {name} is missing" for name in sorted(wanted.keys() - found)]
    if problems:
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        raise UserError(
            f"{files[0].parent}: the weights do not fit its config.json "
            f"({type(module).__name__}): {'; '.join(problems[:3])}{more}; fetch both again, from "
            "one revision"
        )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules that are constructed keep their buffers and drop their parameters' storage.

    Each parameter lives for a moment, uninitialised: initialisers then run on meta, which is free.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()
