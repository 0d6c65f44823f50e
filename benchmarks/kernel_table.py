"""What the compiler makes of the Triton kernels, without a GPU: registers, loads, instructions.

    python benchmarks/kernel_table.py                  writes results/kernels_static.json and .md
    python benchmarks/kernel_table.py --arch 90        one architecture, to the terminal

Nothing here is a measurement: instructions are counted in the machine code along the path of a full
chunk, bytes from the tensors, and the roofline is their arithmetic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from machine_code import Launch, analyse, compiled, recording
from torch import Tensor

from dancegrpo_fast.ops import kernels

RESULTS = Path(__file__).resolve().parent / "results"
ARCHITECTURES = (80, 90, 100)
BF16, FP32 = torch.bfloat16, torch.float32

# Of the roofline. H200: 132 multiprocessors, 4 x 32 lanes each, at a clock it holds under load;
# copy bandwidth as PyTorch's device-to-device copy gave it (bytes read plus written).
LANES_PER_SECOND = 132 * 128 * 1.755e9
COPY_BYTES_PER_SECOND = 4.3e12


# ------------------------------------------------------------------ what is compiled


@dataclass(frozen=True)
class Variant:
    """A launch that the table reports.

    Attributes:
        kernel: Its function's name.
        name: What is special about it.
        launch: Records it.
        bytes_per_element: Each tensor read or written once, per element of one child; children
            share what their state holds.
    """

    kernel: str
    name: str
    launch: Callable[[], object]
    bytes_per_element: float
    children: int = 1


HUNYUAN = (16, 14, 60, 80)  # 480 x 640, 53 frames


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rollout(
    model: torch.dtype = BF16, latent: torch.dtype = FP32, children: int = 1, box: Any = None,
    dims: tuple[int, ...] = HUNYUAN, given: bool = False, states: int = 2,
) -> object:  # fmt: skip
    """Records a rollout step."""
    count = states * children
    keys, noise = empty(count, 2, dtype=torch.int64), None
    offsets = None if children == 1 else empty(states + 1, dtype=torch.int64)
    if given:
        noise = empty(count, *dims)
    m, x = empty(states, *dims, dtype=model), empty(states, *dims, dtype=latent)
    table = empty(count, 8)
    return kernels.sample_transition(
        m, x, table, None if given else keys, noise, offsets, box, latent
    )


def loss(
    model: torch.dtype = BF16, latent: torch.dtype = FP32, children: int = 1, box: Any = None,
    dims: tuple[int, ...] = HUNYUAN, extra: bool = False, states: int = 2,
) -> object:  # fmt: skip
    """Records the policy loss and its gradient; `extra`: with a reference and an old output."""
    count = states * children
    m, x = empty(states, *dims, dtype=model), empty(states, *dims, dtype=latent)
    y, table = empty(count, *dims, dtype=latent), empty(count, 8)
    offsets = None if children == 1 else empty(states + 1, dtype=torch.int64)
    other = empty(states, *dims, dtype=model) if extra else None
    kernels.policy_loss(
        m, x, y, table, empty(count), empty(count), None, offsets, None, other, other,
        1e-4, 1e-4, 1.0, 0.1 if extra else 0.0, box, 1.0, None, True,
    )  # fmt: skip
    return kernels.transition_gradient(
        empty(), empty(count, 3), m, x, y, table, offsets, other, other, box
    )


def nft() -> object:
    """Records the forward-process loss."""
    m, x = empty(2, *HUNYUAN, dtype=BF16), empty(2, *HUNYUAN)
    return kernels.nft_loss(
        m, x, empty(2, *HUNYUAN), empty(2), empty(2), None, m, m,
        1.0, 5.0, 1.0, 1e-4, 1e-5, None, True,
    )  # fmt: skip


FRAMES = ((0, 16), (1, 14), (0, 60), (0, 80))  # image-to-video: the first latent frame is given
VARIANTS = (
    Variant("rollout_kernel", "bf16 m, fp32 x", rollout, 2 + 4 + 4),
    Variant("rollout_kernel", "all bf16", lambda: rollout(latent=BF16), 2 + 2 + 2),
    Variant("rollout_kernel", "all fp32", lambda: rollout(model=FP32), 4 + 4 + 4),
    Variant(
        "rollout_kernel", "bf16 m, fp32 x, 4 children", lambda: rollout(children=4),
        (2 + 4) / 4 + 4, 4,
    ),
    Variant("rollout_kernel", "bf16 m, fp32 x, frame box", lambda: rollout(box=FRAMES), 10),
    Variant("rollout_kernel", "bf16 m, fp32 x, given noise", lambda: rollout(given=True), 14),
    Variant("residual_kernel", "bf16 m, fp32 x", loss, 2 + 4 + 4),
    Variant("residual_kernel", "all bf16", lambda: loss(latent=BF16), 2 + 2 + 2),
    Variant("residual_kernel", "all fp32", lambda: loss(model=FP32), 4 + 4 + 4),
    Variant(
        "residual_kernel", "bf16 m, fp32 x, 4 children", lambda: loss(children=4),
        (2 + 4) / 4 + 4, 4,
    ),
    Variant("residual_kernel", "bf16 m, fp32 x, ref, old", lambda: loss(extra=True), 14),
    Variant("residual_kernel", "bf16 m, fp32 x, frame box", lambda: loss(box=FRAMES), 10),
    Variant("gradient_kernel", "bf16 m, fp32 x", loss, 2 + 4 + 4 + 2),
    Variant("gradient_kernel", "all bf16", lambda: loss(latent=BF16), 8),
    Variant("gradient_kernel", "all fp32", lambda: loss(model=FP32), 16),
    Variant(
        "gradient_kernel", "bf16 m, fp32 x, 4 children", lambda: loss(children=4),
        (2 + 4 + 2) / 4 + 4, 4,
    ),
    Variant("gradient_kernel", "bf16 m, fp32 x, ref, old", lambda: loss(extra=True), 16),
    Variant("gradient_kernel", "bf16 m, fp32 x, frame box", lambda: loss(box=FRAMES), 12),
    Variant("nft_sums_kernel", "bf16 m, fp32 x", nft, 2 + 4 + 4 + 2 + 2),
    Variant("policy_kernel", "bf16 m, fp32 x", loss, 0),
    Variant("log_prob_kernel", "bf16 m, fp32 x", rollout, 0),
    Variant("nft_kernel", "bf16 m, fp32 x", nft, 0),
)  # fmt: skip


def launch_of(variant: Variant) -> Launch:
    """The recorded launch of the variant's kernel."""
    with recording() as launches:
        variant.launch()
    return next(each for each in launches if each.function.fn.__name__ == variant.kernel)


def tile_of(launch: Launch) -> int:
    """Elements that one program takes; 0 for a finalising kernel."""
    return int(launch.options.get("TILE", 0))  # type: ignore[call-overload]


def row(variant: Variant, arch: int) -> dict[str, object]:
    """One line of the table."""
    launch = launch_of(variant)
    code = analyse(compiled(launch, arch), tile_of(launch))
    line: dict[str, object] = {"kernel": variant.kernel, "variant": variant.name, "arch": arch}
    line |= {**asdict(code), "children": variant.children}
    line["threads_per_multiprocessor"] = occupancy(code.registers, launch)
    if tile_of(launch):
        line["instructions_per_element"] = round(code.per_element(variant.children), 1)
        line["bytes_per_element"] = variant.bytes_per_element
        if arch == 90:
            line |= roofline(code.per_element(variant.children), variant.bytes_per_element)
    return line


def occupancy(registers: int, launch: Launch) -> int:
    """Threads that fit a multiprocessor of 65536 registers (2048 at most)."""
    threads = 32 * int(launch.options["num_warps"])  # type: ignore[call-overload]
    per_program = -(-registers // 8) * 8 * threads
    return min(2048 // threads, 65536 // per_program) * threads


def roofline(instructions: float, bytes_: float) -> dict[str, object]:
    """H200: elements per second by memory and by issue, and what the lower is of the copy rate."""
    memory, issue = COPY_BYTES_PER_SECOND / bytes_, LANES_PER_SECOND / instructions
    return {
        "h200_memory_elements_per_second": float(f"{memory:.3g}"),
        "h200_issue_elements_per_second": float(f"{issue:.3g}"),
        "h200_bound": "memory" if memory <= issue else "issue",
        "h200_share_of_copy_at_most": round(min(1.0, issue / memory), 2),
    }


# ------------------------------------------------------------------ writing


def document(rows: list[dict[str, Any]]) -> dict[str, object]:
    return {
        "what": "compiled, not run: counted in machine code; no figure here is a measurement",
        "triton": triton.__version__,
        "roofline": {
            "lane_instructions_per_second": LANES_PER_SECOND,
            "copy_bytes_per_second": COPY_BYTES_PER_SECOND,
        },
        "rows": rows,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of one architecture after the other."""
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Written by `benchmarks/kernel_table.py` with Triton {triton.__version__}. Counted in the "
        "machine code, not run: GPU times are **not measured**. *instr.* is per element of one "
        "child, *bytes* likewise; *bound* and *share* are the roofline of an H200 (sm_90; copy 4.3 "
        "TB/s, 132 x 128 lanes at 1.755 GHz): the lower limit, and the part of the copy bandwidth "
        "it allows.",
        "",
        "| arch | kernel | variant | registers | spills | shared | threads/SM | instr. | bytes | "
        "bound | share | loads by bits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        loads = ", ".join(f"{count} x {width}" for width, count in r["loads"].items())
        cells = (
            f"sm_{r['arch']}", r["kernel"].removesuffix("_kernel"), r["variant"], r["registers"],
            r["spill_bytes"], r["shared_bytes"], r["threads_per_multiprocessor"],
            r.get("instructions_per_element", "-"), r.get("bytes_per_element", "-"),
            r.get("h200_bound", "-"), r.get("h200_share_of_copy_at_most", "-"), loads,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, help="only this one, printed and not written")
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels_static.json")
    args = parser.parse_args()
    architectures = ARCHITECTURES if args.arch is None else (args.arch,)
    rows = [row(variant, arch) for arch in architectures for variant in VARIANTS]
    if args.arch is None:
        args.json.write_text(json.dumps(document(rows), indent=1) + "\n", encoding="utf-8")
        args.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
