"""Coefficient tables of host schedules, built once per sigmas tensor and gathered without a sync.

Coefficients are computed in float64 tensor maths where the sigmas lie (`dynamics.py` has the same
formulas for numbers), rounded once and moved to the latents' device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.dynamics import _AT_ONE
from dancegrpo_fast.transitions import ddim

FLOW_DYNAMICS = ("dance", "flow", "flow_wan", "cps", "ode", "euler_noise")
Device = torch.device | str | None


class _Tables:
    """Values derived from a tensor, kept until the tensor dies or is written to."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], int, dict[Any, Tensor]]] = {}

    def get(self, source: Tensor, key: Any, build: Callable[[], Tensor]) -> Tensor:
        # Made in a rollout's inference mode, a table could not be saved for training's backward.
        with torch.inference_mode(False), torch.no_grad():
            if source.is_inference():  # Writes to it are not counted: nothing may be kept.
                return build()
            return self._get(source, key, build)

    def _get(self, source: Tensor, key: Any, build: Callable[[], Tensor]) -> Tensor:
        name, version = id(source), source._version
        entry = self._kept.get(name)
        if entry is None or entry[0]() is not source or entry[1] != version:
            entry = (weakref.ref(source, lambda _: self._kept.pop(name, None)), version, {})
            self._kept[name] = entry
        if key not in entry[2]:
            value = build()
            if value.is_cuda and torch.cuda.is_current_stream_capturing():
                return value  # the graph's own: it holds nothing before a replay
            entry[2][key] = value
        return entry[2][key]


TABLES = _Tables()


def flow_table(
    sigmas: Tensor,
    *,
    dynamics: str,
    level: float = 0.0,
    normaliser: bool = True,
    exact_density: bool = False,
    sigma_max: float | None = None,
    device: Device = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Coefficient rows (a, b, s, w, c, k, p, q) of all steps of a flow schedule.

    Built once per (sigmas, its version, the other arguments) and dropped with `sigmas`.

    Args:
        sigmas: [T + 1], falling from at most 1 to at least 0, any floating dtype and device.
        dynamics: "dance", "flow", "flow_wan", "cps" (`dynamics.py`); "ode"; or "euler_noise", the
            Euler step plus DanceGRPO's noise (DanceGRPO with sde_solver = False).
        level: eta or a; 0 gives rows without noise and density. A tensor is read in every call.
        normaliser: False drops c = -log s - log(2 pi) / 2.
        exact_density: The Gaussian density for "cps", which is published with w = 1 and c = 0 (also
            where s = 0, as hosts have it; `transition` says w = 0 there).
        sigma_max: For "flow" and "flow_wan" in place of the second sigma.
        device: Where the table is wanted; None: where `sigmas` lies.
        dtype: What the float64 results are rounded to.

    Returns:
        [T, 8]. A step that is undefined (sigma = 0; "flow" where sigma and sigma_max are 1) is a
        row of NaN. Do not write to it.

    Raises:
        ValueError: An unknown dynamics, level or shape out of range; on the CPU also sigmas that
            are out of range or rise. On a device values are not read: such rows are NaN.
    """
    level = float(level)  # the key of what is kept
    check_flow(dynamics, level)
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {list(sigmas.shape)}: must be [steps + 1]")
    device = torch.device(sigmas.device if device is None else device)
    key = (dynamics, level, normaliser, exact_density, sigma_max, device, dtype)

    def build() -> Tensor:
        points = sigmas.detach().to(torch.float64)
        pairs = points[:-1], points[1:]
        check_sigmas(*pairs)
        high = points[1] if sigma_max is None else sigma_max
        rows, _ = flow_rows(*pairs, dynamics, level, points[-1], high, exact_density)
        return finish(rows, normaliser, device, dtype)

    return TABLES.get(sigmas, key, build)


def noise_table(
    sigmas: Tensor,
    *,
    dynamics: str,
    level: float,
    sigma_max: float | None = None,
    device: Device = None,
) -> Tensor:
    """Per step what hosts return beside the mean: (std without sqrt(-dt), sqrt(-dt), dt).

    The std with sqrt(-dt) is s, column 2 of `flow_table`. "cps" has no such factor: its std is s.

    [T, 3] float32, cached; dt = sigma' - sigma < 0. Arguments and errors as `flow_table`.
    """
    level = float(level)
    check_flow(dynamics, level)
    device = torch.device(sigmas.device if device is None else device)

    def build() -> Tensor:
        points = sigmas.detach().to(torch.float64)
        high = points[1] if sigma_max is None else sigma_max
        _, rate = flow_rows(points[:-1], points[1:], dynamics, level, points[-1], high, False)
        dt = points.diff()
        columns = torch.stack((rate.expand_as(dt), torch.sqrt(-dt), dt), dim=1)
        return columns.to(torch.float32).to(device, non_blocking=True)

    return TABLES.get(sigmas, ("noise", dynamics, level, sigma_max, device), build)


def check_flow(dynamics: str, level: float) -> None:
    if dynamics not in FLOW_DYNAMICS:
        raise ValueError(f"dynamics = {dynamics!r}: must be one of {', '.join(FLOW_DYNAMICS)}")
    if not 0.0 <= level < math.inf or (dynamics == "cps" and level > 1):
        limit = "from 0 to 1" if dynamics == "cps" else "a finite number, at least 0"
        raise ValueError(f"level = {level}: must be {limit}")


def check_sigmas(sigma: Tensor, sigma_next: Tensor) -> None:
    if sigma.device.type != "cpu":
        return
    if not bool(((sigma_next >= 0) & (sigma_next <= sigma) & (sigma <= 1)).all()):
        raise ValueError(
            f"sigmas = {sigma.tolist()} to {sigma_next.tolist()}: must fall within [0, 1]"
        )


def flow_rows(
    sigma: Tensor,
    sigma_next: Tensor,
    dynamics: str,
    level: Any,
    low: Any,
    high: Any,
    exact_density: bool,
) -> tuple[Tensor, Tensor]:
    """`dynamics.py` for tensors: ([n, 8], std without sqrt(-dt) [n]), NaN where undefined.

    low and high are the last and the second sigma of the schedule ("flow_wan"; "flow" at 1).
    """
    length = sigma - sigma_next
    one = torch.ones_like(length)
    valid = (sigma_next >= 0) & (length >= 0) & (sigma <= 1)
    if dynamics == "cps":
        angle, of = level * (math.pi / 2), torch if isinstance(level, Tensor) else math
        kept, rate = sigma_next * of.cos(angle), sigma_next * of.sin(angle)
        a = (1 - sigma_next) + kept
        b = kept * (1 - sigma) - (1 - sigma_next) * sigma
        s = rate
    else:
        rate = level * one
        if dynamics == "flow":
            room = 1 - torch.where(sigma > _AT_ONE, high, sigma)
            rate = level * torch.sqrt(sigma / room)
        elif dynamics == "flow_wan":
            rate = level * (low + (high - low) * sigma)
        elif dynamics == "ode":
            rate = 0 * one
        pull = 0 * one
        if dynamics not in ("ode", "euler_noise"):
            pull = rate * rate / (2 * sigma)
            valid = valid & torch.isfinite(pull)
        a = 1 - pull * length
        b = -length * (1 + pull * (1 - sigma))
        s = rate * torch.sqrt(length)
    rows = _gaussian(a, b, s, one, -sigma, published=dynamics == "cps" and not exact_density)
    return torch.where(valid[:, None], rows, math.nan), rate


def _gaussian(a: Tensor, b: Tensor, s: Tensor, p: Tensor, q: Tensor, published: bool) -> Tensor:
    """`dynamics.gaussian` for tensors: [n, 8]; published: CPS' w = 1, c = 0 in every row."""
    dense = s != 0  # True for NaN
    precision = torch.where(dense, 1 / (2 * s * s), 0.0)
    k = b * b * precision
    w = torch.ones_like(s) if published else precision
    c = torch.where(dense, -torch.log(s) - 0.5 * math.log(2 * math.pi), 0.0)
    c = 0 * c if published else c
    return torch.stack(torch.broadcast_tensors(a, b, s, w, c, k, p, q), dim=1)


def finish(rows: Tensor, normaliser: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not normaliser:
        rows[:, 4] *= 0  # NaN stays
    return rows.to(dtype).to(device, non_blocking=True)


def ddim_table(
    alphas_cumprod: Tensor,
    *,
    stride: int,
    eta: float,
    prediction: str = "epsilon",
    normaliser: bool = True,
    device: Device = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Coefficient rows of DDIM steps, one for every training timestep: index it by timestep.

    Row t is the step from timestep t to max(t - stride, 0), DDPO's and DanceGRPO's rule, which
    keeps the noise of the last step above zero. Cached like `flow_table`; the first call reads
    `alphas_cumprod` (a scheduler keeps it on the CPU).

    Args:
        alphas_cumprod: [N], all training timesteps.
        stride: N // number of inference steps.
        eta: 0 to 1.
        prediction: "epsilon", "v_prediction" or "sample".
        normaliser, device, dtype: As in `flow_table`.

    Returns:
        [N, 8].

    Raises:
        ValueError: A value out of range.
    """
    eta = float(eta)
    device = torch.device(alphas_cumprod.device if device is None else device)
    key = ("ddim", stride, eta, prediction, normaliser, device, dtype)

    def build() -> Tensor:
        alphas = alphas_cumprod.detach().tolist()
        ends = [alphas[max(t - stride, 0)] for t in range(len(alphas))]
        pairs = zip(alphas, ends, strict=True)
        steps = [tuple(ddim(here, there, eta, prediction)) for here, there in pairs]
        made = torch.tensor(steps, dtype=torch.float64, device="cpu")
        return finish(made, normaliser, device, dtype)

    return TABLES.get(alphas_cumprod, key, build)


# ------------------------------------------------------------------ gathering


def rows(table: Tensor, index: int | Tensor, batch: int) -> Tensor:
    """The rows of a batch, without waiting for a device.

    Args:
        table: [T, columns], on the device of the latents.
        index: A number, or an integer tensor, 0-d or [batch], on any device.
        batch: B.

    Returns:
        [batch, columns]; one index for all is a view with equal rows.

    Raises:
        ValueError: A number or shape out of range.
        IndexError: A tensor's value out of range on the CPU; on a device that is an assertion of
            the device.
    """
    if not isinstance(index, Tensor):
        if not 0 <= index < len(table):
            raise ValueError(f"index = {index}: must be a step from 0 to {len(table) - 1}")
        return table[index].expand(batch, -1)
    if index.dim() > 1 or index.numel() not in (1, batch):
        raise ValueError(f"index has shape {list(index.shape)}: must be 0-d or [{batch}]")
    index = index.to(table.device, non_blocking=True)
    found = table.index_select(0, index.reshape(-1))
    return found if len(found) == batch else found.expand(batch, -1)


def timestep_index(timesteps: Tensor, timestep: float | Tensor, *, second: bool = False) -> Tensor:
    """Where timesteps stand in a scheduler's list, by exact equality, without waiting for a device.

    Args:
        timesteps: [T], the scheduler's.
        timestep: A number, 0-d or [B].
        second: diffusers' rule: of a value that stands there twice, the second.

    Returns:
        int64, 0-d or [B] like `timestep`, on the device of `timesteps`. For a timestep that is not
        in the list T, one past the end, which `rows` does not find; on the CPU it is refused here.

    Raises:
        ValueError: On the CPU, a timestep that is not in the list.
    """
    if not isinstance(timestep, Tensor):
        dtype = timesteps.dtype if timesteps.is_floating_point() else torch.float64
        timestep = torch.full((), timestep, dtype=dtype, device=timesteps.device)
    wanted = timestep.to(timesteps.device, non_blocking=True)
    found, index = (wanted[..., None] == timesteps).max(-1)  # of equals the first
    if index.device.type == "cpu" and False in found.reshape(-1).tolist():
        raise ValueError(
            f"timestep = {timestep.tolist()}: not among the scheduler's {timesteps.tolist()}"
        )
    if second:
        # take: indexing with a 0-d tensor would read it.
        index = TABLES.get(timesteps, "second", lambda: _second(timesteps)).take(index)
    return torch.where(found, index, len(timesteps))


def _second(timesteps: Tensor) -> Tensor:
    """[T]: for each first place of a timestep its second, or itself."""
    hits = (timesteps[:, None] == timesteps).to(torch.int64)
    return (hits * (1 + (hits.cumsum(-1) == 2))).max(-1).indices


def per_sample(column: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as `like`."""
    return column.reshape(-1, *(1 for _ in like.shape[1:]))
