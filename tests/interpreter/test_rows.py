"""Coefficient rows on the device: the kernel against the torch form of the same formulas."""

from __future__ import annotations

import pytest
import torch

from dancegrpo_fast.integrations.pairs import _kernel_rows, pair_rows
from dancegrpo_fast.integrations.tables import FLOW_DYNAMICS
from dancegrpo_fast.ops.kernels.rows import DYNAMICS, flow_rows

SIGMA = torch.tensor([1.0, 0.9, 0.5, 0.02, 0.3, 0.0, 0.4, 0.7], dtype=torch.float64)
NEXT = torch.tensor([0.9, 0.5, 0.02, 0.0, 0.3, 0.0, 0.6, float("nan")], dtype=torch.float64)


def test_every_dynamics_is_there() -> None:
    assert set(DYNAMICS) == set(FLOW_DYNAMICS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the rows that must be NaN
@pytest.mark.parametrize("normaliser", [True, False])
@pytest.mark.parametrize("exact_density", [True, False])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_rows_are_those_of_the_tables(dynamics, exact_density, normaliser) -> None:
    level = torch.tensor([0.7], dtype=torch.float64)
    low, high = (torch.tensor([value], dtype=torch.float64) for value in (0.01, 0.95))
    published = dynamics == "cps" and not exact_density
    found = flow_rows(
        SIGMA, NEXT, level, low, high,
        dynamics=dynamics, normaliser=normaliser, published=published,
    )  # fmt: skip
    # 0.4 to 0.6 rises: the host's check is for CPU values, the kernel gives a row of NaN.
    assert found[6:].isnan().all()
    for i in range(6):
        wanted = pair_rows(
            float(SIGMA[i]), float(NEXT[i]), dynamics=dynamics, batch=1, level=0.7,
            normaliser=normaliser, exact_density=exact_density, sigma_min=0.01, sigma_max=0.95,
        )  # fmt: skip
        # Both are float64 rounded once; a last bit of log, sin or cos may turn one rounding.
        torch.testing.assert_close(found[i], wanted[0], rtol=1.2e-7, atol=0, equal_nan=True)


def test_levels_of_each_row_other_dtypes_and_strides() -> None:
    level = torch.tensor([0.2, 0.5, 0.7, 0.9])
    sigma = torch.linspace(0.9, 0.3, 8)[::2]
    following = (sigma - 0.1).clone()
    found = flow_rows(
        sigma, following, level, None, torch.tensor([0.95]),
        dynamics="flow", normaliser=True, published=False,
    )  # fmt: skip
    wanted = pair_rows(sigma, following, dynamics="flow", batch=4, level=level, sigma_max=0.95)
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)


def test_more_rows_than_one_program_takes() -> None:
    sigma = torch.linspace(1, 0.1, 300, dtype=torch.float64)
    args = (sigma, sigma * 0.9, torch.tensor([0.3], dtype=torch.float64))
    found = flow_rows(*args, None, None, dynamics="dance", normaliser=True, published=False)
    wanted = pair_rows(sigma, sigma * 0.9, dynamics="dance", batch=300, level=0.3)
    torch.testing.assert_close(found, wanted, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_host_gets_them_where_its_sigmas_are_on_a_gpu(dynamics: str) -> None:
    sigma, following = SIGMA[1:4], NEXT[1:4].float()
    values = (sigma, following, 0.7, 0.01, 0.95)
    found = _kernel_rows(values, (dynamics, True, False), torch.device("cpu"))
    wanted = pair_rows(
        sigma, following, dynamics=dynamics, batch=3, level=0.7, sigma_min=0.01, sigma_max=0.95
    )
    torch.testing.assert_close(found, wanted, rtol=1.2e-7, atol=0)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 1, 2, 2\] elements: must be 1 or 3"):
        _kernel_rows((SIGMA[:2], NEXT[:3], 0.3, None, None), ("dance", True, False), SIGMA.device)
