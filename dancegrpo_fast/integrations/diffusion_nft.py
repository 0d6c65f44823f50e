"""DiffusionNFT (NVlabs/DiffusionNFT): the steps of its samplers, and its two-branch loss.

One line, among the first imports of `scripts/train_nft_sd3.py`:

    import dancegrpo_fast.integrations.diffusion_nft

Importing this module patches `flow_grpo.diffusers_patch.solver`, where `run_sampling` looks the
steps up: now or as soon as it is imported (`patching.install`).
`python -m dancegrpo_fast.integrations.run SCRIPT` does the same with no edit. `dpm_step` is left
alone: multistep, without noise and log-prob. The loss is inline in the script: `two_branch_loss`
replaces the lines from `advantages_clip = ` to `loss_terms["total_loss"] = `.

Differences that can be seen: with eta = 0 nothing is drawn, and the log-prob is 0 where the
original's is NaN (or an error); `ddim_step` takes the log-prob of `prev_sample` if that is given,
where the original draws anew. `exact_order=True` has the original's bits.

Written against commit 24af5554 (2025-09-22; torch 2.6.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    Generators,
    flow_table,
    pair_rows,
    randn,
    rows,
    step,
)
from dancegrpo_fast.integrations.patching import Patch, install
from dancegrpo_fast.integrations.tables import TABLES
from dancegrpo_fast.ops import NFT_METRICS, nft_loss

__all__ = ["PATCHES", "dance_grpo_step", "ddim_step", "flow_grpo_step", "two_branch_loss"]


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Generators = None,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Flow-GRPO's sampler; the host's signature and results.

    The original waits for the device for `sigmas[1].item()` in each step; this never does.

    Args:
        model_output: v, [B, ...], any floating dtype.
        latents: x, the same shape.
        eta: Noise level a.
        sigmas: [T + 1], on any device.
        index: i: a number, 0-d, or [B], one step per row (which the original cannot).
        prev_sample: x', or None to draw it.
        generator: For x'.
        exact_order: The original's order of operations in plain torch (slow): its bits, also those
            of the noise. Not for [B] indices.

    Returns:
        (x', x0 estimate, log_prob [B]), float32.

    Raises:
        ValueError: Both prev_sample and generator; arguments out of range.

    Source: Flow-GRPO, arXiv 2505.05470, equation 9.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator and prev_sample are both given: pass one of them")
    if exact_order:
        here, there = exact.sigma_pair(sigmas, index, model_output)
        rate = exact.flow_rate(here, eta, sigmas[1].item())
        moments = exact.reverse_sde(model_output, latents, here, there, rate)
        if prev_sample is None:
            noise = randn(model_output, generator, dtype=model_output.dtype)
            prev_sample = exact.draw(moments, noise)
        return prev_sample, moments.x0, exact.log_prob(prev_sample, moments)
    table = flow_table(sigmas, dynamics="flow", level=eta, device=latents.device)
    return _step(model_output, latents, table, index, prev_sample, eta, generator)


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of DanceGRPO's sampler; the host's signature and results.

    As there, the log-prob lacks its normaliser: it is -mean((x' - mean)^2) / (2 s^2). Arguments and
    results as `flow_grpo_step`.

    Source: DanceGRPO, arXiv 2505.07818.
    """
    if exact_order:
        moments = exact.dance_sde(model_output, latents, *exact.sigma_pair(sigmas, index), eta)
        if prev_sample is None:
            prev_sample = exact.draw(moments, torch.randn_like(moments.mean))
        wide = moments._replace(mean=moments.mean.float())
        log_prob = exact.log_prob(prev_sample.float(), wide, normaliser=False)
        return prev_sample, moments.x0, log_prob
    table = flow_table(
        sigmas, dynamics="dance", level=eta, normaliser=False, device=latents.device
    )
    return _step(model_output, latents, table, index, prev_sample, eta)


def ddim_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of DDIM for a flow model; the host's signature and results.

        mean = (1 - sigma') x0 + sqrt(sigma'^2 - s^2) x1,
        s = eta sigma' sqrt(1 - (sigma' (1 - sigma) / (sigma (1 - sigma')))^2)

    with x0 and x1 the estimates of data and noise. Arguments and results as `flow_grpo_step`, with
    eta from 0 to 1.

    Source: DDIM, arXiv 2010.02502, equations 12 and 16, for x = (1 - sigma) x0 + sigma x1 divided
    by its norm sqrt((1 - sigma)^2 + sigma^2).
    """
    if exact_order:
        moments = _exact_ddim(model_output, latents, eta, sigmas, index)
        if prev_sample is None:
            prev_sample = exact.draw(moments, torch.randn_like(moments.x0))
        return prev_sample, moments.x0, exact.log_prob(prev_sample, moments)
    table = _ddim_table(sigmas, eta, latents.device)
    return _step(model_output, latents, table, index, prev_sample, eta)


def _ddim_table(sigmas: Tensor, eta: float, device: torch.device) -> Tensor:
    """[T, 8]: CPS' step is this one at the level at which its s = sigma' sin(level pi / 2) is s."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta = {eta}: must be from 0 to 1")

    def build() -> Tensor:
        points = sigmas.detach().to(torch.float64)
        here, there = points[:-1], points[1:]
        kept = there * (1 - here) / (here * (1 - there))
        level = torch.asin(eta * torch.sqrt(1 - kept * kept)) * (2 / math.pi)
        return pair_rows(
            here, there, dynamics="cps", batch=len(here), level=level, exact_density=True,
            device=device,
        )  # fmt: skip

    return TABLES.get(sigmas, ("diffusion_nft.ddim", eta, device), build)


def _exact_ddim(
    model_output: Tensor, latents: Tensor, eta: float, sigmas: Tensor, index: int | Tensor
) -> exact.Moments:
    """The original's order: x0 with the sigma it is given, all else with sigmas in float64."""
    x0 = latents - exact.sigma_pair(sigmas, index)[0] * model_output
    here, there = exact.sigma_pair(sigmas.to(torch.float64), index)
    kept = there**2 * (1 - here) ** 2 / (here**2 * (1 - there) ** 2)
    std = eta * there * torch.sqrt(1.0 - kept)
    x1 = (latents - (1 - here) * x0) / here
    return exact.Moments((1 - there) * x0 + torch.sqrt(there**2 - std**2) * x1, std, x0)


def _step(
    model_output: Tensor,
    latents: Tensor,
    table: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    eta: float,
    generator: Generators = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = step(
        model_output, latents, rows(table, index, len(latents)), prev_sample=prev_sample,
        generator=None if eta == 0 else generator, deterministic=eta == 0, mean=False,
    )  # fmt: skip
    assert out.x0 is not None and out.log_prob is not None
    return out.prev_sample, out.x0, out.log_prob


_MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda advantages: advantages,
    "positive_only": lambda advantages: advantages.clamp(min=0),
    "negative_only": lambda advantages: advantages.clamp(max=0),
    "one_only": lambda advantages: (advantages > 0).to(advantages.dtype),
    "binary": torch.sign,
}


def two_branch_loss(
    forward_prediction: Tensor,
    old_prediction: Tensor,
    xt: Tensor,
    x0: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    adv_clip_max: float,
    ref_forward_prediction: Tensor | None = None,
    train_beta: float = 0.0,
    adv_mode: str = "all",
    loss_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that `train_nft_sd3.py` has inline, in one fused pass each way.

    Computed in float32 though the predictions are bf16 or fp16; the adaptive weights, a float64
    mean there, too.

    Args:
        forward_prediction: v, [B, ...], the only input that is differentiated.
        old_prediction: v_old, the same shape.
        xt: The noised latents.
        x0: The clean latents, `latents_clean`.
        t: [B], 0 to 1: `timesteps[:, j_idx] / 1000`.
        advantages: [B], `advantages[:, j_idx]`, clipped here.
        beta: `config.beta`.
        adv_clip_max: `config.train.adv_clip_max`.
        ref_forward_prediction: v_ref; needed if train_beta is not 0.
        train_beta: `config.train.beta`, the weight of the KL.
        adv_mode: `config.train.adv_mode`: "all", "positive_only", "negative_only", "one_only" or
            "binary".
        loss_scale: The loss is the mean over the rows of this call times this; the script divides
            by its accumulation steps itself.

    Returns:
        The loss, and the script's loss_terms `policy_loss`, `unweighted_policy_loss`,
        `kl_div_loss`, `kl_div` and `total_loss` (before loss_scale), on the device, detached. Its
        statistics of x0 and of old_prediction are not among them.

    Raises:
        ValueError: An unknown adv_mode; as `ops.nft_loss`.

    Source: DiffusionNFT, arXiv 2509.16117, equation 5, with its adaptive weighting.
    """
    if adv_mode not in _MODES:
        raise ValueError(f"adv_mode = {adv_mode!r}: must be one of {', '.join(_MODES)}")
    if not 0.0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale = {loss_scale}: must be a positive number")
    advantages = _MODES[adv_mode](advantages.clamp(-adv_clip_max, adv_clip_max))
    batch = len(forward_prediction)
    loss, metrics = nft_loss(
        forward_prediction, xt, x0, t, advantages, old_output=old_prediction, beta=beta,
        advantage_clip=adv_clip_max, kl_weight=train_beta,
        reference_output=ref_forward_prediction, divisor=batch / loss_scale,
    )  # fmt: skip
    means = metrics / batch
    policy, kl = means[NFT_METRICS.index("policy")], means[NFT_METRICS.index("kl")]
    return loss, {
        "policy_loss": policy,
        "unweighted_policy_loss": policy / adv_clip_max,
        "kl_div_loss": kl,
        "kl_div": kl,
        "total_loss": policy + train_beta * kl,
    }


_MODULE = "flow_grpo.diffusers_patch.solver"
PATCHES = (
    Patch(_MODULE, "flow_grpo_step", flow_grpo_step),
    Patch(_MODULE, "dance_grpo_step", dance_grpo_step),
    Patch(_MODULE, "ddim_step", ddim_step),
)
install(PATCHES)
