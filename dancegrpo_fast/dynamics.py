"""The formulas of every sampler step: floats in, one affine Gaussian transition out, in float64.

    x' = a x + b m + s eps,   log p(x'|x) = -w mean((x' - a x - b m)^2) + c,   x0 = p x + q m

where m is the model output after guidance. Flow models: x = (1 - sigma) x0 + sigma eps,
m = eps - x0, sigma falls from 1 to 0, and D = sigma - sigma' is the length of a step. DDIM models:
x = sqrt(A) x0 + sqrt(1 - A) eps with A = alphas_cumprod.

Arguments in common: sigma and sigma_next (alpha and alpha_next) are the noise levels (A) of x and
x'; noise_scale multiplies s and nothing else, and the density is that of the scaled noise. All
raise ValueError for a value out of range and where the step is undefined.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# UniPC starts its flow grid at 1 - 1e-6 instead of 1: that is "sigma = 1" too.
_AT_ONE = 1.0 - 2e-6


class Transition(NamedTuple):
    """One step as eight float64 numbers; the order is that of the coefficient tables.

    Attributes:
        a: Factor of the state x in the mean.
        b: Factor of the model output m in the mean.
        s: Standard deviation of the noise; 0 means deterministic.
        w: Weight of the mean squared residual in the log-prob; 0 where there is no density.
        c: Constant of the log-prob; 0 where there is no density.
        k: The KL to a reference policy is k * mean((m - m_ref)^2).
        p: Factor of x in the estimate of x0.
        q: Factor of m in the estimate of x0.
    """

    a: float
    b: float
    s: float
    w: float
    c: float
    k: float
    p: float
    q: float


def gaussian(a: float, b: float, s: float, p: float, q: float) -> Transition:
    """Log-prob (mean over elements) and KL of N(a x + b m, s^2); no density where s = 0."""
    if s == 0.0:
        return Transition(a, b, 0.0, 0.0, 0.0, 0.0, p, q)
    precision = 1.0 / (2.0 * s * s)
    c = -math.log(s) - 0.5 * math.log(2.0 * math.pi)
    return Transition(a, b, s, precision, c, b * b * precision, p, q)


# ---------------------------------------------------------------------------- flow models


def _check_sigmas(sigma: float, sigma_next: float) -> None:
    if not 0.0 <= sigma_next <= sigma <= 1.0:
        raise ValueError(
            f"sigma = {sigma}, sigma_next = {sigma_next}: "
            "must satisfy 0 <= sigma_next <= sigma <= 1"
        )


def _check_level(name: str, value: float, high: float = math.inf) -> None:
    if not 0.0 <= value <= high or math.isinf(value):
        limit = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} = {value}: must be a finite number, at least 0{limit}")


def ode(sigma: float, sigma_next: float) -> Transition:
    """Euler step of the probability-flow ODE: x' = x - D m."""
    _check_sigmas(sigma, sigma_next)
    return gaussian(1.0, sigma_next - sigma, 0.0, 1.0, -sigma)


def _reverse_sde(sigma: float, sigma_next: float, rate: float, noise_scale: float) -> Transition:
    """Euler-Maruyama step of dx = [m - rate^2 score / 2] dt + rate dW.

    score = -(x + (1 - sigma) m) / sigma (Flow-GRPO, arXiv 2505.05470, appendix A).
    """
    _check_sigmas(sigma, sigma_next)
    _check_level("noise_scale", noise_scale)
    if sigma == 0.0:
        raise ValueError(
            "sigma = 0.0: the score is infinite there and the SDE step undefined; use kind = 'ode'"
        )
    length = sigma - sigma_next
    pull = rate * rate / (2.0 * sigma)
    return gaussian(
        1.0 - pull * length,
        -length * (1.0 + pull * (1.0 - sigma)),
        rate * math.sqrt(length) * noise_scale,
        1.0,
        -sigma,
    )


def dance_sde(
    sigma: float, sigma_next: float, eta: float, *, noise_scale: float = 1.0
) -> Transition:
    """DanceGRPO's SDE for flow models: diffusion coefficient eta, constant.

    Args:
        eta: Noise level, about 0.3.

    Source: DanceGRPO, arXiv 2505.07818.
    """
    _check_level("eta", eta)
    return _reverse_sde(sigma, sigma_next, eta, noise_scale)


def flow_sde(
    sigma: float, sigma_next: float, level: float, sigma_max: float, *, noise_scale: float = 1.0
) -> Transition:
    """Flow-GRPO's SDE: diffusion coefficient level * sqrt(sigma / (1 - sigma)).

    Args:
        level: Noise level a, about 0.7.
        sigma_max: Replaces sigma in the denominator where sigma = 1; the schedule's second sigma.

    Source: Flow-GRPO, arXiv 2505.05470.
    """
    _check_level("level", level)
    denominator = 1.0 - (sigma_max if sigma > _AT_ONE else sigma)
    if not denominator > 0.0:
        raise ValueError(
            f"sigma = {sigma} with sigma_max = {sigma_max}: the noise is infinite there; "
            "sigma_max, the second sigma of the schedule, must be below 1"
        )
    return _reverse_sde(sigma, sigma_next, level * math.sqrt(sigma / denominator), noise_scale)


def flow_sde_wan(
    sigma: float,
    sigma_next: float,
    level: float,
    sigma_min: float,
    sigma_max: float,
    *,
    noise_scale: float = 1.0,
) -> Transition:
    """Flow-GRPO's SDE for Wan: coefficient from sigma_min to sigma_max.

    The diffusion coefficient is level * (sigma_min + (sigma_max - sigma_min) sigma).

    Args:
        level: 1 is the published form, which has no such factor.
        sigma_min: Last sigma of the schedule.
        sigma_max: Second sigma of the schedule.

    Source: Flow-GRPO `wan_pipeline_with_logprob`.
    """
    _check_level("level", level)
    rate = level * (sigma_min + (sigma_max - sigma_min) * sigma)
    return _reverse_sde(sigma, sigma_next, rate, noise_scale)


def cps(
    sigma: float,
    sigma_next: float,
    level: float,
    *,
    exact_density: bool = False,
    noise_scale: float = 1.0,
) -> Transition:
    """Coefficient-preserving step: total noise after it is exactly sigma_next.

    mean = (1 - sigma') x0 + sigma' cos(level pi / 2) x1, s = sigma' sin(level pi / 2), with x0 and
    x1 the estimates of data and noise. The published log-prob is -mean(r^2): w = 1, c = 0.

    Args:
        level: 0 (ODE) to 1 (all noise renewed), about 0.8.
        exact_density: The true Gaussian w and c instead.

    Source: Flow-CPS, FlowCPS code.
    """
    _check_sigmas(sigma, sigma_next)
    _check_level("level", level, high=1.0)
    _check_level("noise_scale", noise_scale)
    kept = sigma_next * math.cos(level * math.pi / 2)
    s = sigma_next * math.sin(level * math.pi / 2) * noise_scale
    a = (1.0 - sigma_next) + kept
    b = kept * (1.0 - sigma) - (1.0 - sigma_next) * sigma
    step = gaussian(a, b, s, 1.0, -sigma)
    if s == 0.0 or exact_density:
        return step
    return step._replace(w=1.0, c=0.0)


def dpmpp_2m(
    sigma: float, sigma_next: float, sigma_parent: float | None = None
) -> tuple[Transition, float]:
    """DPM-Solver++ 2M (midpoint) step of a flow model; deterministic.

    x' = a x + b m + h x0_parent, where x0_parent is the x0 estimate at the parent's state.

    Args:
        sigma_next: Noise level of x', in [0, sigma); 0 returns the x0 estimate.
        sigma_parent: Noise level of the state before x, in (sigma, 1]. None: first order, which is
            due after an SDE step or a change of expert.

    Returns:
        The transition (s = 0, no density) and the history factor h (0 at first order).

    Source: DPM-Solver++, arXiv 2211.01095, algorithm 2; MixGRPO-Flash, arXiv 2507.21802.
    """
    _check_sigmas(sigma, sigma_next)
    if sigma_next == sigma or (sigma_parent is not None and not sigma < sigma_parent <= 1.0):
        raise ValueError(
            f"sigma_parent = {sigma_parent}, sigma = {sigma}, sigma_next = {sigma_next}: must be "
            "strictly falling within [0, 1]"
        )
    # (1 - sigma') (1 - e^-h) with h the step in log((1 - sigma) / sigma): finite at 1 and at 0.
    gain = (1.0 - sigma_next) - sigma_next * (1.0 - sigma) / sigma
    ratio = 0.0
    if sigma_parent is not None and sigma_parent < 1.0 and sigma_next > 0.0:
        step = _half_log_snr(sigma_next) - _half_log_snr(sigma)
        before = _half_log_snr(sigma) - _half_log_snr(sigma_parent)
        ratio = step / (2.0 * before)
    a = sigma_next / sigma + gain * (1.0 + ratio)
    b = -gain * (1.0 + ratio) * sigma
    return gaussian(a, b, 0.0, 1.0, -sigma), -gain * ratio


def _half_log_snr(sigma: float) -> float:
    return math.log((1.0 - sigma) / sigma)


# ---------------------------------------------------------------------------- DDIM models


class Estimates(NamedTuple):
    """x0 = p x + q m and eps = e x + f m."""

    p: float
    q: float
    e: float
    f: float


def vp_estimates(alpha: float, prediction: str) -> Estimates:
    signal, noise = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    if prediction == "v_prediction":
        return Estimates(signal, -noise, noise, signal)
    if prediction == "epsilon":
        if alpha == 0.0:
            raise ValueError("alpha = 0.0: an epsilon prediction says nothing about x0 there")
        return Estimates(1.0 / signal, -noise / signal, 0.0, 1.0)
    if prediction == "sample":
        if alpha == 1.0:
            raise ValueError("alpha = 1.0: a sample prediction says nothing about the noise there")
        return Estimates(0.0, 1.0, 1.0 / noise, -signal / noise)
    raise ValueError(
        f"prediction = {prediction!r}: must be 'epsilon', 'v_prediction' or 'sample' here"
    )


def _check_alphas(alpha: float, alpha_next: float) -> None:
    if not 0.0 <= alpha <= alpha_next <= 1.0:
        raise ValueError(
            f"alpha = {alpha}, alpha_next = {alpha_next}: "
            "must satisfy 0 <= alpha <= alpha_next <= 1"
        )


def ddim(
    alpha: float,
    alpha_next: float,
    eta: float,
    prediction: str = "epsilon",
    *,
    noise_scale: float = 1.0,
) -> Transition:
    """DDIM step; eta = 0 is the ODE, eta = 1 the ancestral sampler.

    s = eta sqrt((1 - A') / (1 - A) (1 - A / A')), mean = sqrt(A') x0 + sqrt(1 - A' - s^2) eps.

    Args:
        eta: Noise level.
        prediction: "epsilon", "v_prediction" or "sample".

    Source: DDIM, arXiv 2010.02502, equation 16; DDPO, arXiv 2305.13301.
    """
    _check_alphas(alpha, alpha_next)
    _check_level("eta", eta)
    _check_level("noise_scale", noise_scale)
    if alpha == 1.0 or alpha_next == 0.0:
        raise ValueError(
            f"alpha = {alpha}, alpha_next = {alpha_next}: the step is undefined where "
            "x has no noise or x' no signal"
        )
    variance = (1.0 - alpha_next) / (1.0 - alpha) * (1.0 - alpha / alpha_next) * eta * eta
    rest = 1.0 - alpha_next - variance
    if rest < -1e-12:
        raise ValueError(
            f"eta = {eta}: its variance {variance} exceeds 1 - alpha_next = {1.0 - alpha_next}; "
            "use eta <= 1"
        )
    estimate = vp_estimates(alpha, prediction)
    signal, noise = math.sqrt(alpha_next), math.sqrt(max(rest, 0.0))
    return gaussian(
        signal * estimate.p + noise * estimate.e,
        signal * estimate.q + noise * estimate.f,
        math.sqrt(variance) * noise_scale,
        estimate.p,
        estimate.q,
    )


def vp_sde(
    alpha: float,
    alpha_next: float,
    eps_t: float,
    prediction: str = "epsilon",
    *,
    noise_scale: float = 1.0,
) -> Transition:
    """DanceGRPO's reverse SDE of a variance-preserving model, one Euler-Maruyama step.

    dz = (f z - (1 + eps_t^2) / 2 g^2 score) dt + eps_t g dw, with f = -beta / 2, g^2 = beta and
    score = -eps / sqrt(1 - A). The integral of beta over the step is B = log(A' / A), so
    x' = x + B x / 2 - (1 + eps_t^2) / 2 B eps / sqrt(1 - A) + eps_t sqrt(B) noise. eps_t = 0 is the
    Euler step of the probability-flow ODE.

    Args:
        eps_t: Noise level.
        prediction: "epsilon", "v_prediction" or "sample".

    Source: DanceGRPO, arXiv 2505.07818, the reverse SDE for diffusion models.
    """
    _check_alphas(alpha, alpha_next)
    _check_level("eps_t", eps_t)
    _check_level("noise_scale", noise_scale)
    if alpha == 0.0 or alpha == 1.0:
        raise ValueError(f"alpha = {alpha}: the step is undefined at 0 and at 1")
    beta = math.log(alpha_next / alpha)
    estimate = vp_estimates(alpha, prediction)
    pull = 0.5 * (1.0 + eps_t * eps_t) * beta / math.sqrt(1.0 - alpha)
    return gaussian(
        1.0 + 0.5 * beta - pull * estimate.e,
        -pull * estimate.f,
        eps_t * math.sqrt(beta) * noise_scale,
        estimate.p,
        estimate.q,
    )
