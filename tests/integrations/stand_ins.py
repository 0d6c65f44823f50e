"""Stand-ins of host packages, written for the tests, and checks that several hosts share."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import formulas
import torch
from formulas import normal
from torch import Tensor

from dancegrpo_fast.integrations import patching

# float32 values of the size 4: three roundings for mean and x0; the log-prob's residual is one
# rounding of x' against s >= 0.03, then squared and averaged.
ATOL = 4e-6
# Per output: a gradient is rounded to the dtype of the prediction, and so is its sum with others.
BOUND = {torch.bfloat16: 2**-8, torch.float32: 2e-5}


@contextlib.contextmanager
def packages(
    folder: Path, files: Mapping[str, str], patches: Iterable[patching.Patch]
) -> Iterator[None]:
    """Python files of a host, importable with our patches waiting for them; undone afterwards."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
        path.write_text(text)
    tops = {Path(name).parts[0].removesuffix(".py") for name in files}

    def held() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in tops]

    before = {name: sys.modules.pop(name) for name in held()}
    path_before, meta_before, finder = list(sys.path), list(sys.meta_path), patching._FINDER
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
    patching._FINDER = patching._Finder()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        patching.install(patches)
        yield
    finally:
        patching._FINDER = finder
        sys.path[:], sys.meta_path[:] = path_before, meta_before
        for name in held():
            del sys.modules[name]
        sys.modules.update(before)


class Truth:
    """What a step must return, in float64, from the mathematics; `m` takes its gradient."""

    def __init__(
        self,
        dynamics: str,
        level: float,
        m: Tensor,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        sigma_max: float = 0.99,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.m = m.detach().to(dtype).requires_grad_()
        x = x.detach().to(dtype)
        here, there = (formulas.column(s.double(), x).to(dtype) for s in (sigma, sigma_next))
        if dynamics == "cps":
            self.mean, self.std = formulas.cps_step(self.m, x, here, there, level)
        elif dynamics in ("ode", "euler_noise"):
            self.mean, self.std = x + (there - here) * self.m, level * (here - there).sqrt()
        else:
            rate = formulas.rate(dynamics, here, level, sigma_max, 0.0)
            self.mean, self.std = formulas.flow_step(self.m, x, here, there, rate)
        self.x0 = x - here * self.m
        self.dt = there - here

    def log_prob(self, y: Tensor, *, normaliser: bool = True) -> Tensor:
        found = formulas.log_density(y.to(self.m.dtype), self.mean, self.std)
        if normaliser:
            return found
        return found - formulas.log_density(self.mean, self.mean, self.std)

    def square_log_prob(self, y: Tensor) -> Tensor:
        return -(y.to(self.m.dtype) - self.mean).square().flatten(1).mean(1)


def check(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], m: Tensor, m64: Tensor
) -> None:
    """Values, dtypes, and the gradients through each output and through their sum."""
    weights = {name: normal(*value.shape, seed=11) for name, value in found.items()}
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.requires_grad, name
        assert value.shape == wanted[name].shape, name
        scale = wanted[name].detach().abs().max().clamp(min=4.0) / 4.0
        torch.testing.assert_close(
            value.double(), wanted[name], rtol=0, atol=ATOL * float(scale), msg=name
        )
    for names in (*([name] for name in found), list(found)):
        got = sum((found[n] * weights[n].float()).sum() for n in names)
        true = sum((wanted[n] * weights[n]).sum() for n in names)
        (gradient,) = torch.autograd.grad(got, m, retain_graph=True)
        (exact,) = torch.autograd.grad(true, m64, retain_graph=True)
        assert gradient.dtype == m.dtype
        error = float((gradient.double() - exact).abs().max() / exact.abs().max())
        assert error <= BOUND[m.dtype] * len(names), (names, error)
