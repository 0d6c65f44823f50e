"""Inputs for the tests of the ops, and the loss written out as a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops import packing, policy_loss, sample_transition, transition_log_prob
from dancegrpo_fast.ops.noise import NoiseKey, keys_table
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.transitions import coefficient_table, transition

GRID = dance_schedule(16, 3.0)
DIMS = (3, 2, 5, 7)
F64 = torch.float64


@pytest.fixture(name="implementation", params=["native", "reference"], autouse=True)
def each_implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs every test of a module that imports it once with each choice of "auto" on the CPU."""
    if request.param == "native":
        request.getfixturevalue("native_module")
    else:
        monkeypatch.setitem(packing._MISSING, "native", "hidden by a test")
    return request.param


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def table(*steps: int, dtype: torch.dtype = F64, dynamics: str = "flow", kind: str = "sde"):
    level = 0.3 if dynamics == "dance" else 0.7
    rows = [transition(GRID, i, i + 1, dynamics=dynamics, kind=kind, level=level) for i in steps]
    return coefficient_table(rows, dtype=dtype)


def draw_keys(count: int, seed: int = 7) -> Tensor:
    return keys_table([NoiseKey.from_seed(seed).fold_in(i).draw() for i in range(count)])


# ------------------------------------------------------------------ loops written out


def loop_log_prob(m: Tensor, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
    a, b, _, w, c, *_ = row
    return c - w * ((y - a * x - b * m) ** 2).mean()


def loop_loss(m, x, y, rows, parts, old, weights, offsets, u, low, high, kl_weight, m_ref, divisor):
    """One sample at a time, as the papers write it."""
    total = m.new_zeros(())
    for state in range(len(m)):
        for child in range(int(offsets[state]), int(offsets[state + 1])):
            log_prob = loop_log_prob(m[state], x[state], y[child], rows[child])
            rho = torch.exp(log_prob - old[child])
            for r in range(parts.shape[1]):
                for advantage in parts[child, r]:
                    clipped = rho.clamp(1 - low, 1 + high)
                    total = total + u[r] * torch.maximum(-advantage * rho, -advantage * clipped)
            distance = ((m[state] - m_ref[state]) ** 2).mean()
            total = total + kl_weight * weights[child] * rows[child, 5] * distance
    return total / divisor


class Ragged:
    """States with 0, 1, 3, 24 and 2 children, ratios on both sides of the clip range."""

    def __init__(self, rewards: int = 2, seed: int = 0) -> None:
        counts = [0, 1, 3, 24, 2]
        self.offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        children = sum(counts)
        self.m = randn(5, *DIMS, seed=seed).requires_grad_()
        self.x = randn(5, *DIMS, seed=seed + 1)
        self.rows = table(*[2 + i % 11 for i in range(children)])
        self.y = sample_transition(
            self.m, self.x, self.rows, keys=draw_keys(children), child_offsets=self.offsets
        ).next_latents
        self.m_ref = self.m.detach() + 0.05 * randn(5, *DIMS, seed=seed + 2)
        spread = torch.linspace(-3e-3, 3e-3, children, dtype=F64)[randn(children).argsort()]
        log_prob = transition_log_prob(
            self.m, self.x, self.y, self.rows, child_offsets=self.offsets
        )
        self.old = (log_prob - spread).detach()
        advantages = randn(children, rewards, 4, seed=seed + 3)  # four leaves each
        self.parts = torch.stack(
            (advantages.clamp(min=0).sum(-1), advantages.clamp(max=0).sum(-1)), -1
        )
        self.weights = torch.arange(1.0, children + 1, dtype=F64)
        self.u = torch.linspace(0.5, 1.5, rewards, dtype=F64)

    def call(self, **changes: object):
        args = {
            "old_log_prob": self.old, "weights": self.weights, "child_offsets": self.offsets,
            "reward_weights": self.u, "clip_range": (1e-3, 2e-3), "kl_weight": 0.04,
            "reference_output": self.m_ref,
        }  # fmt: skip
        return policy_loss(self.m, self.x, self.y, self.rows, self.parts, **{**args, **changes})
