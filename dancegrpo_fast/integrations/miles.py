"""Miles-diffusion (radixark/miles_diffusion): its step backends, and its loss in one fused pass.

Flags of the launch script; each works alone, the first is the one that saves most:

    --custom-loss-function-path dancegrpo_fast.integrations.miles.flow_grpo_loss_formula
    --sde-step-backend-path dancegrpo_fast.integrations.miles.FusedSdeStepBackend
    --sde-step-backend-path dancegrpo_fast.integrations.miles.FusedCpsStepBackend

Nothing is patched: Miles imports what the flags name. Miles gives its loss the velocity, so the
fused pass goes from there to the loss, and its gradient back, without a tensor of latent size in
between; the reference enters as its velocity too. Trainers of before the backends (2929e491,
2026-05-10) import `miles.utils.sde_log_prob.sde_step_with_logprob`; ours has the same name.

Rollouts are SGLang's: the first ratio is 1 up to rounding, exactly 1 with
`--diffusion-recompute-old-log-prob`. Later versions whose backends return a fifth field (2ccb4511)
take the loss only; their `--diffusion-score-centering` is refused. The steps take
`exact_order=True`, which has the bits of Miles' own backends, for comparing.

Written against commits cba30e02 (backends) and e72cc0a9 (loss), mid 2026.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    flow_table,
    noise_table,
    pair_rows,
    per_sample,
    rows,
    step,
    timestep_index,
)
from dancegrpo_fast.ops import POLICY_METRICS, policy_loss, transition_log_prob

Scored = tuple[Tensor, Tensor, Tensor, Tensor]


class FusedSdeStepBackend:
    """Flow-GRPO's SDE over the scheduler's sigmas: `DiffusersSdeStepBackend`."""

    sde_type: ClassVar[str] = "sde"

    def __init__(self, scheduler: Any = None, *, sde_timestep_divisor: float = 1.0) -> None:
        """scheduler: With `sigmas` and `timesteps`. sde_timestep_divisor: Timesteps per sigma."""
        self.scheduler = scheduler
        self.sde_timestep_divisor = sde_timestep_divisor

    def sde_step_logprob(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        next_timesteps: Tensor,
        sample: Tensor,
        *,
        prev_sample: Tensor,
        noise_level: float,
        exact_order: bool = False,
    ) -> Scored:
        """Scores recorded transitions; Miles' signature and results.

        Args:
            model_output: v, [B, ...], any floating dtype.
            timesteps, next_timesteps: [B]. "sde" looks the first up in the scheduler, exactly; for
                "cps" both are sigma times the divisor.
            sample: x, the same shape as v.
            prev_sample: x', the same shape.
            noise_level: a.
            exact_order: Miles' own order of operations in plain torch (slow): its bits.

        Returns:
            (x', log_prob [B], mean, std_dev_t [B, 1, ...]), float32. For "sde" std_dev_t lacks
            sqrt(-dt).

        Raises:
            ValueError: On the CPU, a timestep that is not in the schedule, or sigmas that rise.
        """
        if exact_order:
            return self._exact(
                model_output.float(), timesteps, next_timesteps, sample.float(),
                prev_sample.float(), noise_level,
            )  # fmt: skip
        row, std_dev_t = _coefficients(
            self, self.sde_type, timesteps, next_timesteps, sample, noise_level
        )
        stored = prev_sample.float()
        out = step(model_output, sample, row, prev_sample=stored, x0=False)
        assert out.log_prob is not None and out.mean is not None
        return stored, out.log_prob, out.mean, per_sample(std_dev_t, sample)

    def _exact(
        self, v: Tensor, timesteps: Tensor, next_timesteps: Tensor, x: Tensor, y: Tensor, a: float
    ) -> Scored:
        sigmas = self.scheduler.sigmas
        index = timestep_index(self.scheduler.timesteps, timesteps, second=True)
        here, there = (per_sample(sigmas[i], x) for i in (index, index + 1))
        rate = exact.flow_rate(here, a, sigmas[1].item())
        moments = exact.reverse_sde(v, x, here, there, rate)
        return y, exact.log_prob(y, moments), moments.mean, rate


class FusedCpsStepBackend(FusedSdeStepBackend):
    """Coefficient-preserving sampling: `CpsSdeStepBackend`; log_prob = -mean((x' - mean)^2)."""

    sde_type = "cps"

    def _exact(
        self, v: Tensor, timesteps: Tensor, next_timesteps: Tensor, x: Tensor, y: Tensor, a: float
    ) -> Scored:
        divisor = float(self.sde_timestep_divisor)
        here, there = (per_sample(t.float() / divisor, x) for t in (timesteps, next_timesteps))
        moments = exact.cps(v, x, here, there, a, least=1e-12)
        assert isinstance(moments.std, Tensor)
        return y, exact.square_log_prob(y, moments), moments.mean, moments.std


def sde_step_with_logprob(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    noise_level: float = 0.7,
    *,
    exact_order: bool = False,
) -> Scored:
    """The function of before the backends; its signature and results."""
    return FusedSdeStepBackend(scheduler).sde_step_logprob(
        model_output, timestep, timestep, sample, prev_sample=prev_sample,
        noise_level=noise_level, exact_order=exact_order,
    )  # fmt: skip


def _coefficients(
    backend: Any,
    sde_type: str,
    timesteps: Tensor,
    next_timesteps: Tensor,
    sample: Tensor,
    level: float,
) -> tuple[Tensor, Tensor]:
    """(rows [B, 8], std_dev_t [B]) of a backend, ours or Miles' own."""
    batch, device = len(sample), sample.device
    if sde_type == "cps":
        pair = (t.float() / backend.sde_timestep_divisor for t in (timesteps, next_timesteps))
        row = pair_rows(*pair, dynamics="cps", level=level, batch=batch, device=device)
        return row, row[:, 2]
    if sde_type != "sde":
        raise ValueError(f"sde_type = {sde_type!r}: must be 'sde' or 'cps', which have a density")
    scheduler = backend.scheduler
    index = timestep_index(scheduler.timesteps, timesteps, second=True)
    options: Any = {"dynamics": "flow", "level": level, "device": device}
    row = rows(flow_table(scheduler.sigmas, **options), index, batch)
    return row, rows(noise_table(scheduler.sigmas, **options), index, batch)[:, 0]


# ------------------------------------------------------------------ the loss


def flow_grpo_loss_formula(
    ctx: Any,
    batch: list[dict[str, Any]],
    prepared: Any,
    *,
    new_pred: Tensor,
    ref_pred: Tensor | None,
    metrics: Any,
    old_pred: Tensor | None = None,
    write_old_log_prob: bool = False,
    old_log_prob_from_new: bool = False,
) -> Tensor | None:
    """Log-prob, clipped objective and KL: Miles' formula, its signature, results and metrics.

    The KL is Miles': mean((mu - mu_ref)^2) / (2 std_dev_t^2), from the two velocities.

    Args:
        ctx: `args`, `models`, `device` and `sde_backend` are read.
        batch: B pairs, for their recorded tensors of a debug run.
        prepared: `latents`, `timesteps`, `advantage` (clamped), `component_name`, and in `extras`
            next_latents, next_timesteps and log_prob_old.
        new_pred: v, [B, ...].
        ref_pred: v_ref, needed with a KL.
        metrics: `emit_mean(name, total=, count=)` is called with device tensors.
        old_pred: Not used by Flow-GRPO; later versions pass it.
        write_old_log_prob: Only stores the log-probs in the pairs, on the CPU.
        old_log_prob_from_new: On-policy: the ratio is 1, its gradient is not 0.

    Returns:
        The sum over the pairs, which Miles divides; None with write_old_log_prob.

    Raises:
        ValueError: A KL without reference; score centering; as `ops.policy_loss`.
    """
    args, extras = ctx.args, prepared.extras
    if getattr(args, "diffusion_score_centering", False):
        raise ValueError("diffusion_score_centering = True: not in this loss; drop the flag")
    kl_beta, clip_range = float(args.diffusion_kl_beta), args.diffusion_clip_range
    if kl_beta > 0 and ref_pred is None:
        raise ValueError(f"diffusion_kl_beta = {kl_beta}: needs a reference; set --ref-mode")
    x, y = prepared.latents, extras["next_latents"]
    row, std_dev_t = _coefficients(
        ctx.sde_backend, args.diffusion_sde_type, prepared.timesteps, extras["next_timesteps"], x,
        args.diffusion_noise_level,
    )  # fmt: skip
    if write_old_log_prob:
        found = transition_log_prob(new_pred.detach(), x, y, row).cpu()
        for pair, value in zip(batch, found.unbind(), strict=True):
            pair["log_prob_old"] = value
        return None
    if kl_beta > 0:
        a, b, s, w, c, _, p, q = row.unbind(1)
        row = torch.stack((a, b, s, w, c, 0.5 * (b / std_dev_t) ** 2, p, q), dim=1)
    out = policy_loss(
        new_pred, x, y, row, prepared.advantage,
        old_log_prob=None if old_log_prob_from_new else extras["log_prob_old"],
        clip_range=clip_range, divisor=1.0, kl_weight=kl_beta,
        reference_output=ref_pred if kl_beta > 0 else None,
    )  # fmt: skip
    with torch.no_grad():
        old = out.log_prob if old_log_prob_from_new else extras["log_prob_old"]
        totals = _totals(out.loss, out.log_prob, old, out.metrics, prepared.advantage, clip_range)
        for name, total in totals.items():
            metrics.emit_mean(name, total=total, count=1 if name.endswith("_idx_0") else len(batch))
        gap = "log_prob_mean_abs_diff"
        component = prepared.component_name if len(ctx.models) > 1 else None
        if component is not None:
            metrics.emit_mean(f"{gap}_{component}", total=totals[gap], count=len(batch))
        if getattr(args, "diffusion_debug_mode", False):
            _record_outputs(metrics, batch, new_pred, component)
    return out.loss


def _totals(
    loss: Tensor,
    log_prob: Tensor,
    old: Tensor,
    sums: Tensor,
    advantage: Tensor,
    clip_range: float,
) -> dict[str, Tensor]:
    """Miles' metrics as sums over the pairs."""
    of = dict(zip(POLICY_METRICS, sums.unbind(), strict=True))
    difference = log_prob - old
    ratio = torch.exp(difference)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    each = torch.stack((
        torch.maximum(-advantage * ratio, -advantage * clipped).abs(), advantage.abs(),
        0.5 * difference * difference, difference.abs(),
    ))  # fmt: skip
    loss_size, advantage_size, approximate_kl, gap = each.sum(1).unbind()
    return {
        "loss": loss.detach(),
        "policy_loss": of["policy"],
        "kl_loss": of["kl"],
        "loss_abs_mean": loss_size,
        "adv_abs_mean": advantage_size,
        "ratio_abs_minus_1": of["ratio_deviation"],
        "approx_kl": approximate_kl,
        "clipfrac": of["clipped_low"] + of["clipped_high"],
        "log_prob_new_idx_0": log_prob[0],
        "log_prob_old_idx_0": old[0],
        "log_prob_mean_abs_diff": gap,
    }


def _record_outputs(
    metrics: Any, batch: list[dict[str, Any]], new_pred: Tensor, component: str | None
) -> None:
    """The debug mode's comparison with the engine's velocities, by Miles' own functions."""
    pairs = importlib.import_module("miles.utils.train_data_utils")
    record = importlib.import_module("miles.backends.fsdp_utils.metrics")
    rollout = pairs.stack_train_pair_rollout_debug(batch, "rollout_step_model_output")
    if rollout is not None:
        record.record_rollout_train_abs_diff(
            metrics, "model_output", new_pred.float(),
            rollout.to(device=new_pred.device, dtype=torch.float32), component=component,
        )  # fmt: skip
