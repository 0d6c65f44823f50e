"""What the compiler makes of the kernels as they are launched, for sm_80, sm_90 and sm_100."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import kernel_table as table
import pytest
import torch
import triton
from kernel_table import ARCHITECTURES, RESULTS, VARIANTS, Variant, launch_of, tile_of
from machine_code import Code, analyse, compiled

from dancegrpo_fast.ops import kernels
from dancegrpo_fast.ops.kernels.layout import layout

BY_NAME = {f"{v.kernel}: {v.name}": v for v in VARIANTS}
ELEMENTWISE = {k: v for k, v in BY_NAME.items() if tile_of(launch_of(v))}


@functools.cache
def build(name: str, arch: int) -> Any:
    return compiled(launch_of(BY_NAME[name]), arch)


@functools.cache
def code(name: str, arch: int) -> Code:
    return analyse(build(name, arch), tile_of(launch_of(BY_NAME[name])))


every = pytest.mark.parametrize("name", BY_NAME)
architectures = pytest.mark.parametrize("arch", ARCHITECTURES)


def float_operations(ptx: str) -> set[str]:
    """Every float instruction that rounds, and every fused, approximate or flushing one."""
    names = r"fma|mad|div|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh|mul|add|sub|cvt"
    found = re.findall(rf"\b((?:{names})\.[\w.]*f(?:16|32|64)[\w.]*)", ptx)
    return {op for op in found if not re.fullmatch(r"cvt\.f32\.(bf16|f16)", op)}  # exact


# sm_100 widens a bfloat16 operand (exactly) within the addition, and adds two pairs at once.
EXACT = re.compile(
    r"(mul|add|sub|div|sqrt)\.rn\.f32(x2|\.b?f16)?|cvt\.rn\.(f32\.[us](32|64)|f16\.f32)"
)


@architectures
@every
def test_arithmetic_is_rounded_operation_by_operation(name: str, arch: int) -> None:
    # All kernels: rollout and training must agree, and the interpreter with both.
    ptx = build(name, arch).asm["ptx"]
    exponent = {"cvt.rzi.s32.f32"}  # of exp: of a whole number
    wrong = {op for op in float_operations(ptx) - exponent if not EXACT.fullmatch(op)}
    assert wrong == set()
    assert "f64" not in ptx and ".ftz" not in ptx and ".approx" not in ptx and "fma." not in ptx
    draws = name.startswith("rollout") and "given" not in name
    assert ("sqrt.rn.f32" in ptx) == draws


def test_the_gate_sees_what_it_must() -> None:
    bad = (
        "fma.rn.f32 a; div.full.f32 b; sqrt.approx.ftz.f32 c; mul.f32 d; add.ftz.f32 e; "
        "ex2.approx.f32 f;"
    )
    assert len({op for op in float_operations(bad) if not EXACT.fullmatch(op)}) == 6


@architectures
@every
def test_sums_have_one_order_whatever_the_registers_hold(name: str, arch: int) -> None:
    # Of two elements there is one sum, so no layout decides bits; tt.reduce of more would let one.
    ir = build(name, arch).asm["ttgir"]
    operands = re.findall(
        r'"tt\.reduce"\(.*?\) <\{axis = (\d+) : i32.*?\}\) : \(tensor<([\dx]+)xf32', ir, re.S
    )
    assert len(operands) == ir.count('"tt.reduce"')
    assert operands or name.startswith("gradient")
    for axis, shape in operands:
        assert shape.split("x")[int(axis)] == "2", (axis, shape)


@architectures
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_vector_loads_and_no_spills(name: str, arch: int) -> None:
    found = code(name, arch)
    assert found.spill_bytes == 0
    # Per-child scalars are 32 and 64 bits wide; a latent that is loaded narrower would show as 16
    # bits, or as many more. The rollout takes four elements a thread: 64 bits of bfloat16.
    assert "16" not in found.loads and "8" not in found.loads
    assert found.loads.get("32", 0) <= 6 and found.loads.get("64", 0) <= 10
    assert found.loads.get("128", 0) > 0 or name == "rollout_kernel: all bf16"
    assert found.registers <= 128


@architectures
@pytest.mark.parametrize("name", [n for n in BY_NAME if n not in ELEMENTWISE])
def test_finalising_kernels_do_not_spill(name: str, arch: int) -> None:
    assert code(name, arch).spill_bytes == 0


def test_no_shared_memory_moves_between_layouts_in_the_rollout() -> None:
    # Joining four vectors and storing them must not change who holds what.
    ir = build("rollout_kernel: bf16 m, fp32 x", 90).asm["ttgir"]
    assert "ttg.convert_layout" not in ir


@pytest.mark.parametrize(
    ("kernel", "tile_loads"), [("residual_kernel", 10), ("gradient_kernel", 5)]
)
def test_a_row_that_is_no_multiple_of_16_keeps_vector_loads_in_the_body(
    kernel: str, tile_loads: int
) -> None:
    # One state: the row starts aligned. (Rows of odd length after the first start at any address:
    # their loads are narrow, and that is the layout's price.)
    odd = Variant(kernel, "odd", lambda: table.loss(dims=(3, 1235), states=1), 0)
    launch = launch_of(odd)
    found = analyse(compiled(launch, 90), tile_of(launch))
    assert found.loads["128"] == tile_loads and found.spill_bytes == 0
    rows = Variant(kernel, "odd rows", lambda: table.loss(dims=(3, 1235), states=2), 0)
    launch = launch_of(rows)
    assert "128" not in analyse(compiled(launch, 90), tile_of(launch)).loads


@pytest.mark.parametrize("kernel", ["rollout_kernel", "residual_kernel", "gradient_kernel"])
def test_elements_that_are_not_neighbours_are_not_loaded_as_such(kernel: str) -> None:
    # x is every 16th element, each aligned: only m and y may be loaded as vectors.
    def launches() -> None:
        m = table.empty(2, 8192)
        x = table.empty(2, 16 * 8192)[:, ::16]
        rows, keys = table.empty(2, 8), table.empty(2, 2, dtype=torch.int64)
        kernels.sample_transition(m, x, rows, keys, None, None, None, torch.float32)
        kernels.transition_log_prob(m, x, m, rows, None, None)
        one, scales = table.empty(), table.empty(2, 3)
        kernels.transition_gradient(one, scales, m, x, m, rows, None, None, None, None)

    launch = launch_of(Variant(kernel, "", launches, 0))
    found = analyse(compiled(launch, 90), tile_of(launch))
    per_tensor = found.elements // 4
    others = 1 if kernel == "rollout_kernel" else 2
    assert found.loads["128"] <= per_tensor * others
    assert found.loads["32"] >= found.elements and found.loads.get("64", 0) <= 2  # the key


@pytest.mark.parametrize("kernel", ["rollout_kernel", "residual_kernel", "gradient_kernel"])
def test_latents_beyond_32_bits_and_many_dimensions_compile(kernel: str) -> None:
    def launches(dims: tuple[int, ...], box: object) -> None:
        table.rollout(dims=dims, box=box)
        table.loss(dims=dims, box=box, extra=True)

    for dims, box in (
        ((3, 1 << 30), None),
        ((4, 5, 6, 7, 8), ((1, 3), (0, 4), (2, 5), (0, 6), (1, 8))),
        ((3, 5, 7), ((0, 2), (1, 4), (2, 5))),
    ):
        launch = launch_of(Variant(kernel, "", functools.partial(launches, dims, box), 0))
        assert launch.options["WIDE"] is (1 << 30 in dims)
        assert compiled(launch, 90).asm["cubin"]


def test_interpreted_python_scalars_are_float32() -> None:
    # A Python float would become float64 in a kernel that Inductor launches.
    for name in ("policy_kernel: bf16 m, fp32 x", "nft_kernel: bf16 m, fp32 x"):
        launch = launch_of(BY_NAME[name])
        floats = [
            parameter.annotation_type
            for parameter, value in zip(launch.function.params, launch.args, strict=False)
            if isinstance(value, float)
        ]
        assert floats and set(floats) == {"fp32"}


# ------------------------------------------------------------------ the committed table


def test_the_committed_table_is_current() -> None:
    committed = json.loads((RESULTS / "kernels_static.json").read_text(encoding="utf-8"))
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is Triton {committed['triton']}'s, here is {triton.__version__}")
    rows = {(r["kernel"], r["variant"], r["arch"]): r for r in committed["rows"]}
    assert set(rows) == {(v.kernel, v.name, arch) for v in VARIANTS for arch in ARCHITECTURES}
    some = ("rollout_kernel: bf16 m, fp32 x", "residual_kernel: all bf16")
    for name in (*some, "policy_kernel: bf16 m, fp32 x"):
        variant = BY_NAME[name]
        line = json.loads(json.dumps(table.row(variant, 90)))
        assert line == rows[variant.kernel, variant.name, 90], "run benchmarks/kernel_table.py"


def test_the_table_says_it_is_not_measured() -> None:
    assert "not measured" in (RESULTS / "kernels_static.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------ layouts (no kernel)


def test_dimensions_merge_as_far_as_all_tensors_allow() -> None:
    x = torch.empty(2, 4, 6, 8)
    assert layout(x, x, box=None).extents == (4 * 6 * 8,)
    assert layout(torch.empty(3, 2, 4, 6, 8)[1], box=None).extents == (192,)
    assert layout(x, x.transpose(1, 3).contiguous().transpose(1, 3), box=None).extents == (4, 6, 8)
    frames = layout(x, box=((0, 4), (1, 6), (0, 8)))
    assert frames.extents == (4, 40) and frames.strides[0] == (8, 192, 48, 1)
    assert frames.index == (8, 0, 48, 1) and frames.aligned and frames.vector == 4
    whole = layout(x, box=((0, 4), (1, 6), (0, 8)), whole=True)
    assert whole.extents == (4, 48) and whole.bounds == (0, 4, 8, 48) and whole.cut == 0b10
    assert not layout(x, box=((0, 4), (0, 6), (1, 5))).aligned
    assert layout(x[:, :1, :1, :1], box=None).extents == (1,)
    assert layout(x, x, box=None).fours == 4 and layout(x[..., ::2], box=None).fours == 16
    expanded = torch.empty(1, 4, 1, 8).expand(2, 4, 6, 8)
    assert layout(expanded, x, box=None).strides[0] == (0, 0, 8, 0, 1)


def test_the_package_is_not_imported_by_the_ops() -> None:
    import subprocess
    import sys

    look = "import sys, dancegrpo_fast; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True)
    assert set(kernels.__all__) == {
        "nft_loss", "policy_loss", "sample_transition", "transition_gradient",
        "transition_log_prob",
    }  # fmt: skip
