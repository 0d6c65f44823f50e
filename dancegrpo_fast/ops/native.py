"""The native module `dancegrpo_fast._native`: whether it is here, and if not, why.

It is built by `setup.py` from `csrc/` without torch, and reads tensors through DLPack's C exchange
API or, where torch has none (below 2.10), through their attributes: it fits every torch. It is
optional: each op has a reference in Python. The noise has the same bits there; the sums of the
other ops run in another order.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_HOW = (
    "install a C++17 compiler (apt install g++, or xcode-select --install) and reinstall with "
    "DANCEGRPO_FAST_NATIVE=ON pip install ."
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("dancegrpo_fast._native"), None
    except ModuleNotFoundError as error:
        if error.name != "dancegrpo_fast._native":
            raise
        return None, f"the native module is not built: {_HOW}"
    except ImportError as error:
        return None, f"the native module does not load ({error}): {_HOW}"


def why_not() -> str | None:
    """None if the native module can be used, else one line: the reason and the way out."""
    return _load()[1]


def module() -> ModuleType:
    """The native module.

    Raises:
        ValueError: It is not available; the message is `why_not()`.
    """
    loaded, reason = _load()
    if loaded is None:
        raise ValueError(reason)
    return loaded


def check_plain(tensor: torch.Tensor) -> None:
    """Refuses tensors whose memory is not what `data_ptr()` says (DTensor, FakeTensor, ...).

    Raises:
        ValueError: Not exactly a `torch.Tensor` or a `Parameter`, or one of functionalize.
    """
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or torch._is_functional_tensor(tensor):
        name = "a tensor of torch.func.functionalize" if plain else type(tensor).__name__
        raise ValueError(
            f"{name} has no plain memory for the native module; "
            "pass a local torch.Tensor, or implementation='reference'"
        )
