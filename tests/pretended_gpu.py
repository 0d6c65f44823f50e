"""Whole iterations on a GPU that there is not: tensors of two devices fail as they do on one.

A tensor of the pretended device is a CPU tensor in disguise. Every operation runs on what is
inside, after it was looked at: do all tensors lie on one device, but for numbers (0-d), indices and
copies? Kernels, streams and capture are not pretended. Run by test_device_placement.py in a process
of its own, because torch keeps a registered device for good:

    python tests/pretended_gpu.py '{"loss.updates": 2}' ...

prints, for each set of changes to a tiny recipe, the metrics of an iteration on both devices.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_models import CPU, tiny_config, tiny_wan
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.trainer import Trainer


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.zeros(1)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend(
    rename="pretended", backend_module=Backend()
)
GPU = torch.device("pretended", 0)
ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN._to_copy.default, ATEN._foreach_copy_.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default,
           ATEN._index_put_impl_.default, ATEN._unsafe_index.Tensor}  # fmt: skip
JOINED = {ATEN.cat.default, ATEN.stack.default}  # These take no 0-d tensor of another device.
plain_tensor = torch.tensor


class OnGpu(torch.Tensor):
    """A tensor of the pretended device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=GPU,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} after its device was gone")

    # What torch does in C++, out of reach of the mode.

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_index(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_index(key), value)

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": GPU} | kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on a GPU has no numpy array: use cpu()")

    __array__ = numpy


def _index(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(map(_index, key))
    return plain_tensor(key).to(GPU) if isinstance(key, list) else key


class Pretended(TorchDispatchMode):
    """Runs operations of `OnGpu` on the CPU, and refuses tensors of two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in tensors if isinstance(t, OnGpu)]
        here = [t for t in tensors if not isinstance(t, OnGpu)]
        gpu = bool(there)
        if func in INDEXED:
            gpu = isinstance(args[0], OnGpu)
            if there and not gpu:
                raise RuntimeError(f"{func}: indices on {GPU} of a tensor on the CPU")
        elif there and func not in COPIES and (any(t.dim() for t in here) or func in JOINED):
            if here:
                raise RuntimeError(f"{func}: some tensors are on {GPU} and some on the CPU")
        if kwargs.get("device") is not None:
            gpu = torch.device(kwargs["device"]).type == GPU.type
            kwargs["device"] = torch.device("cpu") if gpu else kwargs["device"]
        if func is ATEN._fused_sdp_choice.default:
            return 0  # Plain operations, whose devices are seen.
        known = {id(t.inner): t for t in there}
        args, kwargs = tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
        out = func(*args, **kwargs)
        if not gpu:
            return out
        return tree_map_only(Tensor, lambda t: known.get(id(t), _disguised(t)), out)


def _disguised(tensor: Tensor) -> Tensor:
    return OnGpu(tensor)


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    made = plain_tensor(data, **kwargs)
    return made if device is None else made.to(device)


@contextmanager
def pretended() -> Iterator[None]:
    """Inside, there is a pretended GPU."""
    overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    overwrite(True)  # A module's `to` would put an `OnGpu` into a plain parameter.
    try:
        with mock.patch.object(torch, "tensor", _tensor), Pretended():
            yield
    finally:
        overwrite(False)


def main() -> None:
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_wan(Path(folder) / "model")
        for number, changes in enumerate(map(json.loads, sys.argv[1:])):
            config = tiny_config(Path(folder) / str(number), model, changes)
            metrics = [Trainer(config, CPU).iteration()]
            with pretended():
                metrics.append(Trainer(config, World(0, 1, GPU)).iteration())
            found.append(metrics)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
