"""`exact_order=True`: the bits of each host's order of operations, which is in `host_orders.py`.

diffusers: in `test_diffusers.py`, where the scheduler's own `step` is the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from formulas import normal
from host_orders import (
    ALPHAS,
    ENDS,
    MIXED,
    SHAPE,
    SIGMAS,
    TIMES,
    Found,
    Host,
    T,
    batched_host,
    factory_host,
    indexed_host,
    miles_host,
    trl_host,
    unirl_host,
)
from torch import Tensor

from dancegrpo_fast.integrations import (
    dancegrpo,
    flow_factory,
    flow_grpo,
    miles,
    mixgrpo,
    pref_grpo,
    trl,
    unirl,
    verl_omni,
)
from dancegrpo_fast.integrations import diffusion_nft as nft


def indexed(step: Callable[..., Found], level: float, i: int, *more: bool) -> Callable[..., Found]:
    """The first three results: x', x0 estimate, log-prob."""
    return lambda m, x, y, **exact: step(m, x, level, SIGMAS, i, y, *more, **exact)[:3]


def batched(host: str, kind: str) -> Callable[..., Found]:
    """x', log-prob, mean, std_dev_t."""
    own: Any = SimpleNamespace(sigmas=SIGMAS, timesteps=TIMES[:-1])
    times, level = own.timesteps[MIXED], {"sde": 0.7, "cps": 0.8, "dance": 0.3, "wan": 1.0}[kind]
    if kind == "wan":
        return lambda m, x, y, **exact: flow_grpo.wan_sde_step_with_logprob(
            own, m, times, x, y, **exact
        )
    if host == "flow_grpo":
        return lambda m, x, y, **exact: flow_grpo.sde_step_with_logprob(
            own, m, times, x, level, y, sde_type=kind, **exact
        )
    name = "dance_sde" if kind == "dance" else kind
    return lambda m, x, y, **exact: verl_omni.sample_previous_step(
        own, x.float(), m.float(), times, noise_level=level, sde_type=name,
        prev_sample=None if y is None else y.float(), **exact,
    )  # fmt: skip


def factory_ours(kind: str, level: float | Tensor) -> Callable[..., Found]:
    scheduler: Any = SimpleNamespace(
        sigmas=SIGMAS, timesteps=TIMES[:-1], dynamics_type=kind, is_eval=False
    )
    return lambda m, x, y, **exact: flow_factory.step(
        scheduler, m, TIMES[MIXED], x, y, TIMES[MIXED + 1], noise_level=level, return_dict=False,
        **exact,
    )  # fmt: skip


def unirl_ours(kind: str, eta: float) -> Callable[..., Found]:
    strategies: Any = {
        "flow": unirl.FlowSDEStrategy, "dance": unirl.DanceSDEStrategy, "cps": unirl.CPSSDEStrategy
    }  # fmt: skip
    strategy = strategies[kind]()
    return lambda m, x, y, **exact: strategy.denoise(
        m, x, SIGMAS[MIXED], SIGMAS[MIXED + 1], eta=eta, prev_sample=y, sigma_max=SIGMAS[1], **exact
    )


def miles_ours(kind: str) -> Callable[..., Found]:
    scheduler = SimpleNamespace(sigmas=SIGMAS, timesteps=TIMES[:-1])
    sde = miles.FusedSdeStepBackend(scheduler)
    other = miles.FusedCpsStepBackend(scheduler, sde_timestep_divisor=1000.0)
    backend, level = (sde, 0.7) if kind == "sde" else (other, 0.8)
    return lambda m, x, y, **exact: backend.sde_step_logprob(
        m, TIMES[ENDS], TIMES[ENDS + 1], x, prev_sample=y, noise_level=level, **exact
    )


def trl_ours(prediction: str, rederived: bool) -> Callable[..., Found]:
    config = SimpleNamespace(
        num_train_timesteps=1000, prediction_type=prediction, clip_sample=False, thresholding=False
    )
    scheduler = SimpleNamespace(alphas_cumprod=ALPHAS, num_inference_steps=50, config=config)

    def step(m: Tensor, x: Tensor, y: Tensor | None, **exact: bool) -> Found:
        out = trl.scheduler_step(scheduler, m, T, x, 0.9, rederived, None, y, **exact)
        return out.latents, out.log_probs

    return step


# ------------------------------------------------------------------ the comparison

LEVELS = torch.tensor([0.7, 0.3, 0.5]).reshape(3, 1, 1, 1)
CASES: dict[str, tuple[Host, Callable[..., Found]]] = {
    **{
        f"{host} by index, step {i}":
            (indexed_host(kind, i, normal), indexed(step, level, i, *more))
        for host, kind, normal, step, level, more in (
            ("DanceGRPO", "dance", True, dancegrpo.flux_step, 0.3, (True, True)),
            ("DiffusionNFT flow", "flow", True, nft.flow_grpo_step, 0.7, ()),
            ("DiffusionNFT dance", "dance", False, nft.dance_grpo_step, 0.3, ()),
            ("DiffusionNFT ddim", "ddim", True, nft.ddim_step, 0.6, ()),
            ("MixGRPO flow", "flow", True, mixgrpo.flow_grpo_step, 0.7, ()),
            ("MixGRPO dance", "dance", False, mixgrpo.dance_grpo_step, 0.3, (True, True)),
            ("Pref-GRPO flow", "flow", True, pref_grpo.flow_grpo_step, 0.7, ()),
            ("Pref-GRPO dance", "dance", True, pref_grpo.dance_grpo_step, 0.3, (True, True)),
        )
        for i in (0, 3)
    },
    **{
        f"{host} {kind}": (batched_host(kind), batched(host, kind))
        for host, kind in (
            ("flow_grpo", "sde"), ("flow_grpo", "cps"), ("flow_grpo", "wan"),
            ("verl-omni", "sde"), ("verl-omni", "cps"), ("verl-omni", "dance"),
        )
    },
    **{
        f"Flow-Factory {kind}{' by row' * isinstance(level, Tensor)}":
            (factory_host(kind, level), factory_ours(kind, level))
        for kind in ("Flow-SDE", "Dance-SDE", "CPS", "ODE") for level in (0.7, LEVELS)
    },
    **{
        f"UniRL {kind}": (unirl_host(kind, eta), unirl_ours(kind, eta))
        for kind, eta in (("flow", 0.7), ("dance", 0.3), ("cps", 0.8))
    },
    **{f"Miles {kind}": (miles_host(kind), miles_ours(kind)) for kind in ("sde", "cps")},
    **{
        f"TRL {kind}{' rederived' * again}": (trl_host(kind, again), trl_ours(kind, again))
        for kind in ("epsilon", "v_prediction", "sample") for again in (False, True)
    },
}  # fmt: skip


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """m, x, x' near its mean; hosts that index a schedule keep latents in float32."""
    m = normal(*SHAPE, seed=1, dtype=dtype)
    kept = torch.float32 if "index" in name else dtype
    x = normal(*SHAPE, seed=2, dtype=kept)
    torch.manual_seed(4)
    y = CASES[name][0](m, x, x if "Miles" in name else None)[0]
    assert y is not None
    return m.requires_grad_(), x, y.detach().to(kept)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits(name: str, dtype: torch.dtype) -> None:
    m, x, y = inputs(name, dtype)
    host, ours = CASES[name]
    assert_same_bits(host(m, x, y), ours(m, x, y, exact_order=True))
    if "Miles" in name:
        return  # It only scores.
    torch.manual_seed(5)
    wanted, state = host(m, x, None), torch.get_rng_state()
    torch.manual_seed(5)
    assert_same_bits(wanted, ours(m, x, None, exact_order=True))
    assert torch.equal(state, torch.get_rng_state())


def assert_same_bits(wanted: Found, found: Found) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a is not None and b is not None
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_close_to_the_fused_step_with_its_gradient(name: str) -> None:
    m, x, y = inputs(name, torch.float32)
    _, ours = CASES[name]
    both = [ours(m, x, y, exact_order=exact) for exact in (True, False)]
    for a, b in zip(*both, strict=True):
        assert a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape
        # A rounding of x' of up to 4 against s >= 0.1. TRL's last step has s = 0.02, and its
        # 1 - alpha' - s^2 cancels: a relative error of 1e-5 of a term of up to 5.
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-4 if "TRL" in name else 8e-6)
    weights = [normal(*a.shape, seed=11, dtype=torch.float32) for a in both[0] if a is not None]
    gradients = []
    for found in both:
        parts = [
            (a * w).sum() for a, w in zip(found, weights, strict=True)
            if a is not None and a.requires_grad
        ]  # fmt: skip
        assert parts
        gradients.append(torch.autograd.grad(torch.stack(parts).sum(), m)[0])
    scale = gradients[1].abs().max()
    assert scale > 0
    # Relative to the largest: the log-prob's gradient is a residual that was rounded as above.
    bound = 5e-4 if "TRL" in name else 1e-4
    assert (gradients[0] - gradients[1]).abs().max() <= bound * scale


@pytest.mark.parametrize("step", [nft.flow_grpo_step, nft.dance_grpo_step, nft.ddim_step])
def test_a_host_with_one_step_for_all_rows_has_no_other_order(step: Any) -> None:
    m, x = (normal(*SHAPE, seed=s, dtype=torch.float32) for s in (1, 2))
    with pytest.raises(ValueError, match="exact_order = True: the host has one index"):
        step(m, x, 0.3, SIGMAS, MIXED, None, exact_order=True)
    one, other = (step(m, x, 0.3, SIGMAS, i, x, exact_order=True) for i in (3, torch.tensor(3)))
    assert all(map(torch.equal, one, other))


def test_flow_factory_by_timestep_and_in_evaluation() -> None:
    """The schedule's own pairs and levels; all is computed, as there, whatever is returned."""
    m, x, y = (normal(*SHAPE, seed=s, dtype=torch.float32) for s in (1, 2, 3))
    scheduler: Any = SimpleNamespace(
        sigmas=SIGMAS, timesteps=TIMES[:-1], dynamics_type="Flow-SDE", is_eval=False,
        get_noise_level_for_sigma=lambda sigma: torch.full_like(sigma, 0.7),
    )  # fmt: skip
    options: Any = {"return_dict": False, "exact_order": True}
    wanted = flow_factory.step(
        scheduler, m, TIMES[3], x, y, TIMES[4], noise_level=0.7, **options
    )
    for timestep in (TIMES[3], float(TIMES[3]), 3, TIMES[3].expand(3)):
        found = flow_factory.step(scheduler, m, timestep, x, y, **options)
        # SIGMAS[3] is TIMES[3] / 1000 up to its last bit.
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    scheduler.is_eval = True
    still = flow_factory.step(scheduler, m, TIMES[3], x, None, TIMES[4], **options)
    assert torch.equal(still[0], still[1]) and still[3].isnan().all()  # as in the original
    assert not torch.equal(before, torch.get_rng_state())


def test_unirl_without_noise_draws_all_the_same() -> None:
    m, x = (normal(*SHAPE, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    strategy = unirl.FlowSDEStrategy()
    torch.manual_seed(3)
    out = strategy.denoise(m, x, SIGMAS[3], SIGMAS[4], eta=0.0, exact_order=True)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randn(SHAPE)
    assert torch.equal(state, torch.get_rng_state())
    assert out[1] is None and torch.equal(out[0], out[2])
    assert torch.equal(out[0], x.float() * 1.0 + m.float() * (SIGMAS[4] - SIGMAS[3]))
