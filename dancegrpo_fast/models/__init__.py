"""One file per diffusers model family; your own is `path/to/file.py:ClassName`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast.config import ModelConfig, UserError
from dancegrpo_fast.models.conditions import Condition, Conditions
from dancegrpo_fast.models.export import export, load_lines
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.flux import FluxFamily
from dancegrpo_fast.models.hunyuan_video import HunyuanVideoFamily
from dancegrpo_fast.models.qwen_image import QwenImageFamily
from dancegrpo_fast.models.qwen_image_edit import QwenImageEditFamily
from dancegrpo_fast.models.sd import StableDiffusionFamily
from dancegrpo_fast.models.sd3 import StableDiffusion3Family
from dancegrpo_fast.models.skyreels_i2v import SkyReelsFamily
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.models.wan import WanFamily
from dancegrpo_fast.models.wan_i2v import WanImageToVideoFamily

FAMILIES: dict[str, type[Family]] = {
    "flux": FluxFamily,
    "hunyuan_video": HunyuanVideoFamily,
    "qwen_image": QwenImageFamily,
    "qwen_image_edit": QwenImageEditFamily,
    "sd": StableDiffusionFamily,
    "sd3": StableDiffusion3Family,
    "skyreels_i2v": SkyReelsFamily,
    "wan": WanFamily,
    "wan_i2v": WanImageToVideoFamily,
}


def open_family(config: ModelConfig, device: torch.device | None = None) -> Family:
    """The family that `config` names, from configurations alone: no weights are read."""
    return family_class(config.family)(config, device)


def load_family(config: ModelConfig, device: torch.device) -> Family:
    """`open_family`, with its networks on the device."""
    return open_family(config, device).load()


def family_class(name: str) -> type[Family]:
    """The class of a family: one of ours, or of a user's file (which is run).

    Args:
        name: `model.family`. Paths count from the working directory.

    Raises:
        UserError: There is no such file or class, or the class lacks something that a family must
            have: all that is missing is named.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    where = f"model.family = {name!r}"
    path, _, class_name = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{where}: {path} is not a file; paths count from {Path.cwd()}")
    module_name = f"user_family_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # Dataclasses and inspect.getfile look their module up.
    spec.loader.exec_module(module)
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"{where}: {path} defines no {class_name}")
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise UserError(
            f"{where}: {class_name} is no family; write class {class_name}(Family) with Family of "
            "dancegrpo_fast.models (docs/families.md)"
        )
    if faults := _faults(found):
        raise UserError(f"{where}: {class_name} {'; it '.join(faults)} (docs/families.md)")
    return found


_TUPLES = ("pipelines", "networks", "encoders", "unused", "replaced", "blocks")


def _faults(cls: type[Family]) -> list[str]:
    """What a family class lacks or has wrong."""
    stated = [name for name in Family.__annotations__ if not hasattr(cls, name)]
    written = [name for name in dir(Family) if name in cls.__abstractmethods__]
    faults = []
    if stated:
        faults.append(f"does not state {', '.join(stated)}")
    if written:
        faults.append(f"does not write {', '.join(f'{name}()' for name in written)}")
    for name in (*_TUPLES, "lora_targets"):
        value: Any = getattr(cls, name, ())
        # A tuple of one name without its comma is that name, letter by letter.
        kinds = (tuple,) if name in _TUPLES else (list, tuple)
        if not isinstance(value, kinds) or not all(isinstance(part, str) for part in value):
            example = "('a', 'b')" if name in _TUPLES else "['a', 'b']"
            faults.append(f"has {name} = {value!r}, which must be names such as {example}")
    length = getattr(cls, "text_length", 1)
    if type(length) is not int or length < 1:
        faults.append(f"has text_length = {length!r}, which must be a number of tokens")
    return faults


__all__ = [
    "FAMILIES",
    "Condition",
    "Conditions",
    "Family",
    "Grid",
    "export",
    "family_class",
    "load_family",
    "load_lines",
    "open_family",
]
