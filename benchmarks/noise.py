"""How fast is exact noise? Against torch's own normals and against a copy of the same bytes.

First the bits: published words and golden values, native against NumPy, and on a GPU CUDA against
native. If one differs, nothing is measured. A share of a copy compares the bytes written per second
with the bytes read and written per second of a float32 `copy_` of the largest size in the table, on
as many threads, but at least of 16M. A size that fits in a cache can write faster than that copy.

    python benchmarks/noise.py                   # on a GPU if there is one
    python benchmarks/noise.py --full --json benchmarks/results/noise_cpu.json --device cpu
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from timing import Case, Times

from dancegrpo_fast.ops import noise
from dancegrpo_fast.ops.noise import DrawKey, add_normal_, keys_table, normal_batch

SIZES = {
    "FLUX 720x720": (16, 90, 90),
    "HunyuanVideo 480x640, 53 frames": (16, 14, 60, 80),
    "Wan 480x832, 81 frames": (16, 21, 60, 104),
    "HunyuanVideo 720x1280, 129 frames": (16, 33, 90, 160),
    "64M elements": (1 << 26,),
}
NUMPY_LIMIT = 1 << 21  # elements; above it the reference would take most of the time
HOST_LIMIT = 1 << 23  # likewise for drawing on the CPU and copying to the GPU
COPIES = 8
KEY = DrawKey(0x0123456789ABCDEF, 3)
# Philox block 0 and 1 of key 0 (Random123's words through the exact Box-Muller).
GOLDEN = [
    0x3F7DBB31, 0xBF6CB6B0, 0xBF1E1BA0, 0xBEF6D1B3, 0xBE1D5354, 0x3E392A68, 0x3F54EC98, 0x3E4A2DA3,
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def check(device: torch.device) -> None:
    """Raises RuntimeError unless every implementation that is timed gives the same bits."""
    names = ["reference"] + ["native"] * (noise.implementations()["native"] is None)
    cuda = device.type == "cuda" and noise.implementations(device)["cuda"] is None
    for name in [*names, *(["cuda"] if cuda else [])]:
        where = device if name == "cuda" else "cpu"
        drawn = normal_batch((8,), [DrawKey(0, 0)], device=where, implementation=name)
        if drawn.cpu().numpy().view(np.uint32).reshape(-1).tolist() != GOLDEN:
            raise RuntimeError(f"{name} does not give the golden bits")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = normal_batch((1 << 18,), [KEY], dtype=dtype, implementation="reference")
            drawn = normal_batch(
                (1 << 18,), [KEY], dtype=dtype, device=where, implementation=name
            ).cpu()
            integer = torch.int32 if dtype == torch.float32 else torch.int16
            if not torch.equal(drawn.view(integer), expected.view(integer)):
                raise RuntimeError(f"{name} differs from the reference in {dtype}")


def cpu_cases(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Case]:
    """Name -> case; a number of threads ends the name."""
    out = torch.empty(1, *shape, dtype=dtype)

    def ours(name: str) -> Callable[[], object]:
        return lambda: normal_batch(shape, [KEY], out=out, implementation=name)

    cases = {}
    for threads in (1, 2):
        if noise.implementations()["native"] is None:
            cases[f"native, {threads}"] = Case(ours("native"), threads=threads)
        cases[f"torch normal_, {threads}"] = Case(lambda: out.normal_(), threads=threads)
        cases[f"torch randn, {threads}"] = Case(
            lambda: torch.randn(1, *shape, dtype=dtype), threads=threads
        )
    if math.prod(shape) <= NUMPY_LIMIT:
        cases["NumPy reference, 1"] = Case(ours("reference"), threads=1)
    return cases


def cuda_cases(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Case, int]]:
    """Name -> (case, tensors of this size written); each in a graph, and as wall time."""
    out = torch.empty(1, *shape, dtype=dtype, device=device)
    x = torch.zeros_like(out)
    table = keys_table([KEY]).to(device)
    work: dict[str, tuple[Callable[[], object], int]] = {
        "torch normal_": (lambda: out.normal_(), 1),
        "torch x += .5 * randn_like(x)": (lambda: x.add_(torch.randn_like(x), alpha=0.5), 1),
    }
    if noise.implementations(device)["cuda"] is None:
        work["CUDA"] = (lambda: normal_batch(shape, table, out=out), 1)
        work["CUDA x += .5 * eps"] = (lambda: add_normal_(x, table, 0.5), 1)
        if math.prod(shape) < 1 << 24:
            many = torch.empty(1, COPIES, *shape, dtype=dtype, device=device)
            work[f"CUDA, {COPIES} copies"] = (
                lambda: normal_batch(shape, table, copies=COPIES, out=many), COPIES,
            )  # fmt: skip
            work[f"torch randn, expanded to {COPIES}"] = (
                lambda: many.copy_(torch.randn_like(out).unsqueeze(1)), COPIES,
            )  # fmt: skip
    cases = {}
    for name, (call, tensors) in work.items():
        cases[f"{name}, graph"] = (timing.graph_case(call), tensors)
        cases[f"{name}, wall"] = (Case(call, device="cuda"), tensors)
    if math.prod(shape) <= HOST_LIMIT:
        by = "native" if noise.implementations()["native"] is None else "reference"
        host = Case(lambda: normal_batch(shape, [KEY], out=out, implementation=by), device="cuda")
        cases["drawn on the CPU and copied, wall"] = (host, 1)
    return cases


def measure(
    sizes: dict[str, tuple[int, ...]], device: torch.device, rounds: int, sample_seconds: float
) -> list[dict[str, Any]]:
    """One record per size, dtype and provider."""
    biggest = max(math.prod(shape) for shape in sizes.values())
    copy, copied = timing.copy_call(max(biggest, 1 << 24), device)
    if device.type == "cuda":
        copies = {"graph": timing.graph_case(copy), "wall": Case(copy, device="cuda")}
    else:
        copies = {str(n): Case(copy, threads=n) for n in (1, 2)}
    records = []
    for size, shape in sizes.items():
        for dtype in DTYPES:
            if device.type == "cuda":
                cases = cuda_cases(shape, dtype, device)
            else:
                cases = {name: (case, 1) for name, case in cpu_cases(shape, dtype).items()}
            timed = {name: case for name, (case, _) in cases.items()}
            timed |= {f"copy, {kind}": case for kind, case in copies.items()}
            found = timing.interleaved(timed, rounds=rounds, sample_seconds=sample_seconds)
            for name, (_, tensors) in cases.items():
                against = found[f"copy, {name.rsplit(', ', 1)[1]}"]
                elements = math.prod(shape) * tensors
                written = elements * dtype.itemsize / found[name].median
                records.append(
                    {
                        "size": size, "elements": elements, "dtype": str(dtype).split(".")[1],
                        "provider": name, "seconds": found[name].record(),
                        "elements_per_second": elements / found[name].median,
                        "bytes_written_per_second": written,
                        "copy_bytes_per_second": copied / against.median,
                        "share_of_copy": written / (copied / against.median),
                    }
                )  # fmt: skip
    return records


def row(record: dict[str, Any]) -> tuple[object, ...]:
    """One line of the table."""
    seconds = record["seconds"]
    times = Times(seconds["median"], seconds["q20"], seconds["q80"], seconds["samples"])
    return (
        record["size"], record["dtype"], record["provider"], times.milliseconds(),
        f"{record['elements_per_second'] / 1e6:.0f}",
        f"{record['bytes_written_per_second'] / 1e9:.3g}", f"{record['share_of_copy']:.0%}",
    )  # fmt: skip


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Elements per second over size, a line per provider, float32. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for provider in dict.fromkeys(record["provider"] for record in records):
        own = [r for r in records if r["provider"] == provider and r["dtype"] == "float32"]
        own.sort(key=lambda record: record["elements"])
        rates = [record["elements_per_second"] / 1e9 for record in own]
        axes.loglog([record["elements"] for record in own], rates, marker="o", label=provider)
    axes.set_xlabel("elements written")
    axes.set_ylabel("10^9 normals per second, float32")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print, write; wrong bits end it before anything is measured."""
    parser = timing.arguments(__doc__)
    parser.add_argument("--elements", type=int, help="one size of this many elements only")
    parser.add_argument("--plot", type=Path, help="write a plot here (needs matplotlib)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    check(device)
    sizes = SIZES if args.elements is None else {f"{args.elements} elements": (args.elements,)}
    record = timing.environment(device)
    records = measure(sizes, device, 25 if args.full else 7, 0.02 if args.full else 0.01)
    print(timing.headline(record))
    head = ("size", "dtype", "provider", "ms, median (20% to 80%)", "M/s", "GB/s", "of copy")
    timing.print_table(head, [row(record) for record in records])
    what = "exact noise against torch's normals and a copy"
    timing.write_json(args.json, {"what": what, "environment": record, "results": records})
    if args.plot is not None:
        plot(records, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
