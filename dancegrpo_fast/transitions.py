"""Every sampler step as one affine Gaussian transition, computed on the host.

    x' = a x + b m + s eps,   log p(x'|x) = -w mean((x' - a x - b m)^2) + c,   x0 = p x + q m

Kernels, rollout and losses see only these eight numbers, never a sigma, an eta or a scheduler.
`transition` is the entry; `dynamics.py` holds the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dancegrpo_fast.dynamics import (
    Transition,
    cps,
    dance_sde,
    ddim,
    dpmpp_2m,
    flow_sde,
    flow_sde_wan,
    gaussian,
    ode,
    vp_estimates,
    vp_sde,
)
from dancegrpo_fast.schedules import Schedule

__all__ = [
    "DYNAMICS",
    "KINDS",
    "KL_FORMS",
    "LOG_PROBS",
    "Transition",
    "coefficient_table",
    "cps",
    "dance_sde",
    "ddim",
    "dpmpp_2m",
    "flow_sde",
    "flow_sde_wan",
    "ode",
    "transition",
    "vp_sde",
    "x0_step",
]

KINDS = ("sde", "ode", "x0")
KL_FORMS = ("exact", "flow_image", "x", "v")
LOG_PROBS = ("mean", "sum")


def coefficient_table(
    transitions: Sequence[Transition],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Packs transitions for the ops.

    Args:
        transitions: n of them.
        dtype: Of the table; each float64 number of the host is rounded once. float32 is what the
            ops compute in; give float64 for float64 latents.
        device: Of the table.

    Returns:
        [n, 8]: a, b, s, w, c, k, p, q.
    """
    table = torch.tensor([tuple(row) for row in transitions], dtype=torch.float64)
    return table.reshape(-1, 8).to(device=device, dtype=dtype)


Build = Callable[[Schedule, int, int, str, float, float], Transition]


def _on_sigmas(sde: Callable[..., Transition], *grid_points: int) -> Build:
    """A flow dynamics: `sde(sigma, sigma', level, *sigmas at grid_points)`; its ODE is Euler's."""

    def build(s: Schedule, i: int, j: int, kind: str, level: float, scale: float) -> Transition:
        if s.prediction != "flow_prediction":
            raise ValueError(
                f"prediction = {s.prediction!r}: dance, flow, flow_wan and cps are for flow "
                "models; use dynamics = 'ddim' or 'vp'"
            )
        if kind == "ode":
            return ode(s.sigmas[i], s.sigmas[j])
        more = [s.sigmas[point] for point in grid_points]
        return sde(s.sigmas[i], s.sigmas[j], level, *more, noise_scale=scale)

    return build


def _on_alphas(step: Callable[..., Transition]) -> Build:
    """A DDIM dynamics: `step(A, A', level, prediction)`; level 0 is its ODE."""

    def build(s: Schedule, i: int, j: int, kind: str, level: float, scale: float) -> Transition:
        if s.alphas_cumprod is None:
            raise ValueError(
                "alphas_cumprod = None: ddim and vp need a schedule that has them; for flow models "
                "use dynamics = 'dance', 'flow', 'flow_wan' or 'cps'"
            )
        points = s.alphas_cumprod[i], s.alphas_cumprod[j]
        return step(*points, 0.0 if kind == "ode" else level, s.prediction, noise_scale=scale)

    return build


DYNAMICS: dict[str, Build] = {
    "dance": _on_sigmas(dance_sde),
    "flow": _on_sigmas(flow_sde, 1),
    "flow_wan": _on_sigmas(flow_sde_wan, -1, 1),
    "cps": _on_sigmas(cps),
    "ddim": _on_alphas(ddim),
    "vp": _on_alphas(vp_sde),
}


def x0_step(schedule: Schedule, i: int) -> Transition:
    """The step that returns the x0 estimate at point i: a = p, b = q, no noise, no density.

    Args:
        schedule: The grid.
        i: Its point, 0 .. steps - 1.

    Raises:
        ValueError: i outside the schedule, or a prediction undefined there.
    """
    _check_point("i", i, 0, schedule.steps)
    if schedule.alphas_cumprod is None:
        p, q = 1.0, -schedule.sigmas[i]
    else:
        p, q, _, _ = vp_estimates(schedule.alphas_cumprod[i], schedule.prediction)
    return gaussian(p, q, 0.0, p, q)


def transition(
    schedule: Schedule,
    i: int,
    j: int,
    *,
    dynamics: str,
    kind: str,
    level: float,
    noise_scale: float = 1.0,
    kl: str = "exact",
    log_prob: str = "mean",
    numel: int | None = None,
    exact_density: bool = False,
) -> Transition:
    """The transition from point i to point j of a schedule.

    Args:
        schedule: The grid.
        i: Index of the point that x is at.
        j: Index of the point that x' is at, above i.
        dynamics: "dance", "flow", "flow_wan", "cps" (flow models), "ddim" or "vp" (DDIM models).
        kind: "sde"; "ode", the deterministic Euler or DDIM step (no density: s = w = c = 0); or
            "x0", the x0 estimate at i.
        level: Noise level of the dynamics: eta, a or eps_t.
        noise_scale: Multiplies s; the log-prob is that of the scaled noise.
        kl: Form of k. "exact": b^2 / (2 s^2), 0 where s = 0. "flow_image": exact times
            (sigma - sigma'), Flow-GRPO's for images. "x": b^2. "v": 1.
        log_prob: "mean" over elements, or "sum", which multiplies w and c (not k) by `numel`.
        numel: Elements of one latent's action box; needed with "sum" only.
        exact_density: The Gaussian density also where the dynamics define another log-prob ("cps").

    Raises:
        ValueError: An unknown name, a point outside the schedule, or a step that is undefined.
    """
    _check_choice("dynamics", dynamics, tuple(DYNAMICS))
    _check_choice("kind", kind, KINDS)
    _check_choice("kl", kl, KL_FORMS)
    _check_choice("log_prob", log_prob, LOG_PROBS)
    _check_point("i", i, 0, schedule.steps - 1)
    _check_point("j", j, i + 1, schedule.steps)
    if kind == "x0":
        step = x0_step(schedule, i)
    else:
        step = DYNAMICS[dynamics](schedule, i, j, kind, level, noise_scale)
    if exact_density:
        step = gaussian(step.a, step.b, step.s, step.p, step.q)
    if kl == "flow_image":
        if dynamics not in ("dance", "flow", "flow_wan"):
            raise ValueError(
                f"kl = 'flow_image' with dynamics = {dynamics!r}: it leaves out the step length of "
                "an SDE's noise, which this step does not have; use kl = 'exact'"
            )
        step = step._replace(k=step.k * (schedule.sigmas[i] - schedule.sigmas[j]))
    elif kl != "exact":
        step = step._replace(k=step.b * step.b if kl == "x" else 1.0)
    if log_prob == "sum":
        if numel is None or numel < 1:
            raise ValueError(
                f"numel = {numel}: log_prob = 'sum' needs the number of elements, >= 1"
            )
        step = step._replace(w=step.w * numel, c=step.c * numel)
    return step


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")


def _check_point(name: str, index: int, low: int, high: int) -> None:
    if not low <= index <= high:
        raise ValueError(f"{name} = {index}: must be a point from {low} to {high} of the schedule")
