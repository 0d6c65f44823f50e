"""The kernel of coefficient rows, the only one in float64, compiles and spills nothing."""

from __future__ import annotations

import kernel_table as table
import pytest
import torch
from kernel_table import ARCHITECTURES, Variant, launch_of
from machine_code import analyse, compiled

from dancegrpo_fast.ops.kernels.rows import DYNAMICS, flow_rows

F64 = torch.float64


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_rows_compile_without_spills(dynamics: str, arch: int) -> None:
    def launch() -> None:
        flow_rows(
            table.empty(6), table.empty(6, dtype=F64), table.empty(1, dtype=F64),
            table.empty(1), table.empty(1, dtype=F64),
            dynamics=dynamics, normaliser=True, published=dynamics == "cps",
        )  # fmt: skip

    built = compiled(launch_of(Variant("flow_rows_kernel", dynamics, launch, 0)), arch)
    # cos and sin keep a few words of 2 / pi on the stack for huge arguments, which never come.
    assert analyse(built, 0).spill_bytes <= (64 if dynamics == "cps" else 0)
    assert "div.rn.f64" in built.asm["ptx"]
