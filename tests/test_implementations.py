"""Which implementation runs, what it refuses, and what the core imports."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch
from ops_cases import F64, each_implementation, randn, table  # noqa: F401
from torch import Tensor

from dancegrpo_fast.ops import (
    implementations,
    nft_loss,
    packing,
    policy_loss,
    sample_transition,
    selected,
    transition_log_prob,
)
from dancegrpo_fast.ops.noise import NoiseKey, normal

M = randn(2, 6)

# ------------------------------------------------------------------ which implementation


def test_the_choice_can_be_asked_for(implementation: str) -> None:
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    assert selected("auto", cpu) == implementation
    assert selected("reference", cpu) == "reference"
    assert selected("auto", meta) == "reference"
    assert implementations()["reference"] is None
    assert (implementations()["native"] is None) == (implementation == "native")


def test_a_requested_implementation_is_never_replaced(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = torch.zeros(1, device="meta")
    with pytest.raises(ValueError, match="implementation = 'native': .*; or use 'auto'"):
        selected("native", meta)  # Not built, or not for this device.
    if implementation == "reference":
        with pytest.raises(ValueError, match="'native': hidden by a test; or use 'auto'"):
            transition_log_prob(M, M, M, table(3, 4), implementation="native")
    monkeypatch.setitem(packing._MISSING, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton': it takes CUDA tensors, and these are on cpu"):
        selected("triton", torch.zeros(1))
    with pytest.raises(ValueError, match="computes in float32, and an input is float64"):
        selected("triton", torch.zeros(1), torch.zeros(1, dtype=F64))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert selected("triton", torch.zeros(1)) == "triton"


@pytest.mark.parametrize(
    ("version", "usable"), [("3.1.0", False), ("3.10.0+git1a2b", True), ("3.6.0", True)]
)
def test_an_old_triton_is_not_taken(
    version: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModuleSpec("triton", None, origin="triton/__init__.py")
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(packing.importlib.metadata, "version", lambda name: version)
    reason = packing._triton_missing()
    assert reason is None if usable else f"Triton {version} is older than" in reason


def test_a_folder_named_triton_is_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("triton", None)  # of a namespace package, any such folder on the path
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: spec)
    assert "not installed" in packing._triton_missing()


def test_auto_says_once_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(packing._MISSING, "native", "no compiler (said by a test)")
    packing._warn_once.cache_clear()
    for _ in range(2):
        transition_log_prob(M, M, M, table(3, 4))
    assert [record.message for record in caplog.records].count(
        "the ops run their slower reference in plain torch: no compiler (said by a test)"
    ) == 1


# ------------------------------------------------------------------ Triton

THROUGH_TRITON = """
import torch
import dancegrpo_fast as core
randn = lambda *shape: torch.randn(*shape, generator=generator)
generator = torch.Generator().manual_seed(0)
m, x, y, ref, old = (randn(3, 5, 7) for _ in range(5))
m.requires_grad_()
schedule = core.dance_schedule(16, 3.0)
kind = {"dynamics": "dance", "kind": "sde", "level": 0.3}
rows = core.coefficient_table([core.transition(schedule, i, i + 1, **kind) for i in (2, 5, 9)])
a, t = randn(3), torch.tensor([0.0, 0.4, 1.0])
keys = core.keys_table([core.NoiseKey.from_seed(i).draw() for i in range(3)])

def results(name):
    drawn = core.sample_transition(m, x, rows, keys=keys, implementation=name)
    y, before = drawn
    losses = [
        core.transition_log_prob(m, x, y, rows, implementation=name).sum(),
        core.policy_loss(m, x, y, rows, a, old_log_prob=before + 1e-3, clip_range=0.1,
            old_output=old, reference_output=ref, kl_weight=0.1, implementation=name).loss,
        core.nft_loss(m, x, y, t, a, old_output=old, beta=0.3, implementation=name).loss,
        core.awm_loss(m, x, y, a, weighting=t + 0.1, form="huber", ema_output=old,
            ema_weight=0.3, implementation=name).loss,
    ]
    return [*drawn, *losses, *(torch.autograd.grad(loss, m)[0] for loss in losses)]

for ours, exact in zip(results("triton"), results("reference"), strict=True):
    scale = exact.abs().max()
    assert (ours - exact).abs().max() <= 2e-6 * scale, (ours, exact)
try:
    core.policy_loss(m.double(), x, y, rows, a, implementation="triton")
except ValueError as error:
    assert "an input is float64" in str(error)
else:
    raise AssertionError("float64 went to Triton")
print("same")
"""


def test_triton_behind_the_public_functions(implementation: str) -> None:
    """Forward and backward through its interpreter: a dozen float32 roundings of sums of 35."""
    if implementation == "reference":
        pytest.skip("once is enough")
    if implementations()["triton"] is not None:
        pytest.skip(implementations()["triton"])
    done = subprocess.run(
        [sys.executable, "-c", THROUGH_TRITON], capture_output=True, text=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


# ------------------------------------------------------------------ tensors without plain memory


def fake(tensor: Tensor) -> Tensor:
    return torch._subclasses.FakeTensorMode().from_tensor(tensor)


def distributed(tensor: Tensor) -> Tensor:
    distributed_tensor = pytest.importorskip("torch.distributed.tensor")
    return distributed_tensor.DTensor.from_local(tensor, one_process_mesh())


@functools.cache
def one_process_mesh() -> object:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return torch.distributed.init_device_mesh("cpu", (1,))


@pytest.fixture
def no_process_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        one_process_mesh.cache_clear()


@pytest.mark.parametrize(("make", "kind"), [(fake, "FakeTensor"), (distributed, "DTensor")])
def test_tensors_without_plain_memory_are_refused_by_name(
    make: Callable[[Tensor], Tensor], kind: str, implementation: str, no_process_group_left: None
) -> None:
    if implementation == "reference":
        pytest.skip("the reference takes what torch takes")
    m, x, rows = randn(2, 6), randn(2, 6, seed=1), table(3, 4)
    strange = make(m)
    calls = (
        lambda t: transition_log_prob(t, x, x, rows),
        lambda t: sample_transition(x, t, rows, noise=x),
        lambda t: policy_loss(t.requires_grad_(), x, x, rows, torch.ones(2)),
        lambda t: nft_loss(x, x, t, torch.ones(2), torch.ones(2), old_output=x),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"{kind} .*; pass a local torch.Tensor, or impl"):
            call(strange.detach())


def test_function_transforms_are_refused_not_ignored(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference takes what torch takes")
    m, x, rows = randn(2, 6), randn(2, 6, seed=1), table(3, 4)
    transforms = (
        torch.func.grad,
        torch.func.vmap,
        torch.func.functionalize,  # its tensors say they have memory, and have none
        lambda function: lambda m: torch.func.jvp(function, (m,), (m,)),
    )
    calls = (
        lambda t: transition_log_prob(t, x, x, rows).sum(),
        lambda t: policy_loss(t, x, x, rows, torch.ones(2)).loss,
        lambda t: nft_loss(t, x, x, torch.ones(2), torch.ones(2), old_output=x).loss,
        lambda t: sample_transition(t[1:], x[1:], rows[1:], noise=x[1:]).log_prob.sum(),
    )
    for transform in transforms:
        for call in calls:
            with pytest.raises(ValueError, match="under a torch.func transform"):
                transform(call)(m)


def test_noise_under_functionalize_is_refused(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference does not look at addresses")
    key = NoiseKey.from_seed(0).draw()
    with pytest.raises(ValueError, match="functionalize has no plain memory"):
        torch.func.functionalize(lambda m: m + normal((6,), key))(randn(2, 6))


def test_forward_mode_tangents_are_refused_not_dropped(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference takes what torch takes")
    m, x, rows = randn(2, 6), randn(2, 6, seed=1), table(3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(m, torch.ones_like(m))
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(NotImplementedError, match="jvp"):
                transition_log_prob(dual, x, x, rows)


# ------------------------------------------------------------------ the core's imports

GUARD = """
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"the core imported {name}", name=name)

allowed = {"dancegrpo_fast", "torch", "numpy", "triton"}  # triton is looked for only
import numpy, torch  # what these import themselves is theirs
before = set(sys.modules)
sys.meta_path.insert(0, Guard())
import dancegrpo_fast as core
rows = core.coefficient_table(
    [core.transition(core.dance_schedule(8, 3.0), 2, 3, dynamics="dance", kind="sde", level=0.3)]
)
m = torch.ones(1, 4, 4, requires_grad=True)
keys = [core.NoiseKey.from_seed(0).draw()]
y, old = core.sample_transition(m, torch.ones(1, 4, 4), rows, keys=keys)
core.policy_loss(m, torch.ones(1, 4, 4), y, rows, torch.ones(1), old_log_prob=old).loss.backward()
assert m.grad.abs().sum() > 0
import importlib, pkgutil
import dancegrpo_fast.integrations as hosts
for found in pkgutil.iter_modules(hosts.__path__):
    importlib.import_module(f"{hosts.__name__}.{found.name}")
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"dancegrpo_fast", "torch", "numpy"} - sys.stdlib_module_names))
"""


def test_the_core_imports_torch_and_numpy_only() -> None:
    done = subprocess.run([sys.executable, "-c", GUARD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
