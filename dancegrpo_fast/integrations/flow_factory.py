"""Flow-Factory (X-GenGroup/Flow-Factory): `FlowMatchEulerDiscreteSDEScheduler.step`.

One line, before the trainer is made:

    import dancegrpo_fast.integrations.flow_factory

Importing this module patches `flow_factory.scheduler.flow_match_euler_discrete`, now or as soon as
it is imported (`patching.install`). `python -m dancegrpo_fast.integrations.run SCRIPT` does the
same with no edit. The UniPC scheduler has a step of its own, which is left alone.

The host's models pass `timestep_next`, and its pairs need not be in the present schedule: their
coefficients are computed in every step, in about as many launches as the original's but on [B]
numbers. By timestep alone they are looked up.

Differences that can be seen: only what is asked for is computed, so the trainers that want
`noise_pred` alone pay for nothing; a step without noise draws none, and its log-prob is 0 where the
original's is NaN; integer timesteps, which are indices, give no warning. `exact_order=True` has
the original's bits.

Written against commit a0b2bc5a (2026-05-02; torch >= 2.6).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.integrations import common, exact
from dancegrpo_fast.integrations.common import (
    Generators,
    flow_table,
    noise_table,
    pair_rows,
    per_sample,
    rows,
    timestep_index,
)
from dancegrpo_fast.integrations.patching import Patch, install
from dancegrpo_fast.integrations.tables import TABLES
from dancegrpo_fast.ops import transition_mean

__all__ = ["PATCHES", "step"]

_DYNAMICS = {"Flow-SDE": "flow", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}
_TUPLE = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")


def step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Generators = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = (
        "next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred",
    ),
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
    *,
    exact_order: bool = False,
) -> Any:  # fmt: skip
    """One sampler step; the host's signature and results.

    The original waits for the device once per row without `timestep_next`, and in Flow-SDE for
    `sigmas[1].item()`. This does so only where the host itself must look a noise level up:
    `timestep_next` without `noise_level`.

    Args:
        self: The scheduler, after `set_timesteps`.
        noise_pred: v, [B, ...], any floating dtype.
        timestep: A number, 0-d or [B]: without `timestep_next` a member of `self.timesteps`, or an
            index if integer; else 1000 sigma.
        latents: x, [B, ...], in the dtype that the trajectory is stored in.
        next_latents: x', or None to draw it; a drawn one is rounded to the dtype of `latents`
            before its log-prob is taken.
        timestep_next: 1000 sigma'.
        generator: For x'.
        noise_level: A number, 0-d or [B]; None: the scheduler's for this step.
        compute_log_prob: False: log_prob is None.
        return_dict: False: a tuple.
        return_kwargs: What is wanted; other names are left out, as there.
        dynamics_type: "Flow-SDE", "Dance-SDE", "CPS" or "ODE"; None: the scheduler's.
        sigma_max: In place of sigma = 1 in Flow-SDE's denominator; None: the second sigma.
        exact_order: The original's order of operations in plain torch (slow): its bits, also those
            of the noise; all results are computed, whatever is asked for.

    Returns:
        `SDESchedulerOutput`, or (next_latents, next_latents_mean, noise_pred, log_prob, std_dev_t,
        dt): float32; log_prob [B]; std_dev_t and dt [B, 1, ...], std_dev_t without sqrt(-dt) for
        Flow-SDE and Dance-SDE.

    Raises:
        ValueError: An unknown dynamics; on the CPU, a timestep that is not in the schedule, or
            sigmas that rise.
    """
    wanted = set(return_kwargs if return_dict else _TUPLE)
    if not compute_log_prob:
        wanted.discard("log_prob")
    found: dict[str, Tensor] = {}
    if "noise_pred" in wanted:
        found["noise_pred"] = noise_pred.float()
    dynamics = dynamics_type or self.dynamics_type
    if dynamics not in _DYNAMICS:
        raise ValueError(f"dynamics_type = {dynamics!r}: must be one of {', '.join(_DYNAMICS)}")
    level = 0.0 if self.is_eval or dynamics == "ODE" else noise_level
    args = (
        self, noise_pred, timestep, latents, next_latents, timestep_next, generator, level,
        dynamics, sigma_max,
    )  # fmt: skip
    if exact_order:
        found |= {name: value for name, value in _exact_step(*args).items() if name in wanted}
    elif wanted.intersection(_TUPLE) - {"noise_pred"}:
        found |= _fused_step(*args, wanted)
    if not return_dict:
        return tuple(found.get(name) for name in _TUPLE)
    host = importlib.import_module("flow_factory.scheduler.abc")
    return host.SDESchedulerOutput(**found)


def _fused_step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None,
    timestep_next: float | Tensor | None,
    generator: Generators,
    level: float | Tensor | None,
    dynamics: str,
    sigma_max: float | None,
    wanted: set[str],
) -> dict[str, Tensor]:
    row, dt, still = _rows(self, timestep, timestep_next, level, dynamics, sigma_max, latents)
    found = _statistics(row, dt, dynamics, latents, wanted)
    if wanted.intersection(("next_latents", "log_prob")):
        out = common.step(
            noise_pred, latents, row, prev_sample=next_latents, deterministic=still,
            generator=None if still else generator, x0=False,
            log_prob="log_prob" in wanted, mean="next_latents_mean" in wanted,
            latent_dtype=None if dynamics == "ODE" else latents.dtype,
        )  # fmt: skip
        drawn = {
            "next_latents": out.prev_sample.float(),
            "next_latents_mean": out.mean,
            "log_prob": out.log_prob,
        }
        found |= {k: v for k, v in drawn.items() if k in wanted and v is not None}
    elif "next_latents_mean" in wanted:
        found["next_latents_mean"] = transition_mean(noise_pred, latents, row)
    return found


def _rows(
    self: Any,
    timestep: float | Tensor,
    timestep_next: float | Tensor | None,
    level: float | Tensor | None,
    dynamics: str,
    sigma_max: float | None,
    latents: Tensor,
) -> tuple[Tensor, Tensor, bool]:
    """(rows [B, 8], dt [B] or [1], whether it is known that there is no noise)."""
    kind, device, batch = _DYNAMICS[dynamics], latents.device, len(latents)
    still = not isinstance(level, Tensor) and level == 0
    if timestep_next is None:
        index = _index(self, timestep)
        dts = noise_table(self.sigmas, dynamics="ode", level=0.0, device=device)
        dt = rows(dts, index, batch)[:, 2]
        if not isinstance(level, Tensor):
            table = _table(self, kind, level, sigma_max, device)
            return rows(table, index, batch), dt, still
        here = self.sigmas[index]
        there = self.sigmas[index + 1]
    else:
        here, there = timestep / 1000, timestep_next / 1000
        length = there - here
        if isinstance(length, Tensor):
            dt = length.to(device, torch.float32, non_blocking=True).reshape(-1)
        else:  # Filled in on the device, for copying it there would wait.
            dt = torch.full((1,), length, device=device)
        if level is None:
            level = self.get_noise_level_for_sigma(here)
    highest = sigma_max or self.sigmas[1] if kind == "flow" else None
    found = pair_rows(
        here, there, dynamics=kind, batch=batch, level=level, sigma_max=highest, device=device
    )
    return found, dt, still


def _exact_step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None,
    timestep_next: float | Tensor | None,
    generator: Generators,
    level: float | Tensor | None,
    dynamics: str,
    sigma_max: float | None,
) -> dict[str, Tensor]:
    """All that the original returns but noise_pred."""
    v, x = noise_pred.float(), latents.float()
    if timestep_next is None:
        index = _index(self, timestep)
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
    else:
        sigma, sigma_next = timestep / 1000, timestep_next / 1000
    if level is None:
        level = self.get_noise_level_for_sigma(sigma)
    highest = sigma_max or self.sigmas[1].item()
    here, there, noise, high = (
        per_sample(torch.as_tensor(value, device=x.device).float().reshape(-1).expand(len(x)), x)
        for value in (sigma, sigma_next, level, highest)
    )
    moments, std_dev_t = _exact_moments(dynamics, v, x, here, there, noise, high)
    if next_latents is not None:
        stored = next_latents.float()
    elif dynamics == "ODE":
        stored = moments.mean
    else:
        stored = exact.draw(moments, common.randn(v, generator)).to(latents.dtype).float()
    if dynamics == "ODE":
        log_prob = torch.zeros(len(x), device=x.device)
    else:
        density = exact.square_log_prob if dynamics == "CPS" else exact.log_prob
        log_prob = density(stored, moments)
    return {
        "next_latents": stored, "next_latents_mean": moments.mean, "log_prob": log_prob,
        "std_dev_t": std_dev_t, "dt": there - here,
    }  # fmt: skip


def _exact_moments(
    dynamics: str, v: Tensor, x: Tensor, here: Tensor, there: Tensor, level: Tensor, high: Tensor
) -> tuple[exact.Moments, Tensor]:
    """Moments and std_dev_t; all but v and x are [B, 1, ...]."""
    if dynamics == "CPS":
        moments = exact.cps(v, x, here, there, level)
        return moments, torch.as_tensor(moments.std)
    if dynamics == "Flow-SDE":
        rate = exact.flow_rate(here, level, high)
        return exact.reverse_sde(v, x, here, there, rate), rate
    dt, x0 = there - here, x - here * v
    if dynamics == "ODE":
        return exact.Moments(x + v * dt, 0.0, x0), torch.zeros_like(here)
    pull = 0.5 * level**2 * (x - x0 * (1 - here)) / here**2
    return exact.Moments(x + (v + pull) * dt, level * torch.sqrt(-1 * dt), x0), level


def _index(self: Any, timestep: float | Tensor) -> int | Tensor:
    if isinstance(timestep, Tensor):
        whole = not timestep.is_floating_point()
        return timestep if whole else timestep_index(self.timesteps, timestep, second=True)
    if isinstance(timestep, int):
        return timestep
    return timestep_index(self.timesteps, timestep, second=True)


def _table(
    self: Any, kind: str, level: float | None, sigma_max: float | None, device: torch.device
) -> Tensor:
    """[T, 8]; level None: the scheduler's own levels, which depend on its seed."""
    if level is not None:
        return flow_table(
            self.sigmas, dynamics=kind, level=level, sigma_max=sigma_max or None, device=device
        )
    sigmas = self.sigmas
    steps = None if self._sde_steps is None else tuple(torch.as_tensor(self._sde_steps).tolist())
    key = (kind, self.noise_level, steps, self._num_sde_steps, self.seed, sigma_max, device)

    def build() -> Tensor:
        return pair_rows(
            sigmas[:-1], sigmas[1:], dynamics=kind, batch=len(sigmas) - 1,
            level=self.get_noise_levels(), sigma_max=sigma_max or sigmas[1], device=device,
        )  # fmt: skip

    return TABLES.get(sigmas, ("flow_factory", *key), build)


def _statistics(
    row: Tensor, dt: Tensor, dynamics: str, latents: Tensor, wanted: set[str]
) -> dict[str, Tensor]:
    found = {}
    dt = dt.expand(len(latents))
    if "dt" in wanted:
        found["dt"] = per_sample(dt, latents)
    if "std_dev_t" in wanted:
        std = row[:, 2] if dynamics in ("CPS", "ODE") else row[:, 2] / torch.sqrt(-dt)
        found["std_dev_t"] = per_sample(std, latents)
    return found


PATCHES = (
    Patch(
        "flow_factory.scheduler.flow_match_euler_discrete",
        "FlowMatchEulerDiscreteSDEScheduler.step",
        step,
    ),
)
install(PATCHES)
