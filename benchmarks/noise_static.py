"""What the CUDA noise kernels cost, read from their machine code: no GPU is needed or used.

Counts the instructions of the loop that draws two Philox blocks (8 elements) in `whole_kernel`, for
one copy and past the branches that no normal takes. The H200's two limits follow: how many elements
a second it can issue, and how many it could write at the speed of a copy. Projections, not
measurements.

    python benchmarks/noise_static.py --json benchmarks/results/noise_static.json

Needs nvcc, and cuobjdump from its toolkit or from the triton package.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import timing

DTYPES = {"0": ("float32", 4), "1": ("bfloat16", 2), "2": ("float16", 2), "3": ("float64", 8)}
ARCHITECTURES = (80, 90, 100, 120)
ELEMENTS = 8  # of one turn of the loop
# An H200: 132 multiprocessors x 128 lanes at its sustained 1.755 GHz, and the copy measured on one.
LANE_INSTRUCTIONS, COPY_BYTES = 132 * 128 * 1.755e9, 4.3e12
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
_JUMP = re.compile(r"^(?:@!?U?P\d )?BRA (?:U?P\d, )?0x([0-9a-f]+)")


def flags() -> list[str]:
    """The flags of the build, from CMakeLists.txt."""
    text = (timing.ROOT / "CMakeLists.txt").read_text()
    values = dict(re.findall(r"set\((DG_NVCC_EXACT|DG_NVCC_FLAGS) ([^)]*)\)", text))
    return values["DG_NVCC_FLAGS"].replace("${DG_NVCC_EXACT}", values["DG_NVCC_EXACT"]).split()


def cuobjdump() -> str:
    """Its path."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec is not None else None
    places = [Path(folder) / "backends" / "nvidia" / "bin" for folder in folders or ()]
    for name in ["cuobjdump", *(str(place / "cuobjdump") for place in places)]:
        if found := shutil.which(name):
            return found
    raise SystemExit("no cuobjdump: install the CUDA toolkit, or pip install triton")


def loop_instructions(sass: str) -> int:
    """Instructions of one turn of the drawing loop of one kernel, without its rare branches.

    The loop is the smallest backward jump around the square roots. A rare branch is a short forward
    jump over a call: the square root of a number that is 0 or out of range.
    """
    lines = [(int(address, 16), text) for address, text in _LINE.findall(sass)]
    index = {address: i for i, (address, _) in enumerate(lines)}
    found = ((i, _JUMP.match(text)) for i, (_, text) in enumerate(lines))
    jumps = {i: index[int(match[1], 16)] for i, match in found if match}
    loops = [
        (start, end)
        for end, start in jumps.items()
        if start < end and any("MUFU.RSQ" in text for _, text in lines[start:end])
    ]
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    rare: set[int] = set()
    for i in range(start, end):
        over = range(i + 1, jumps.get(i, 0))
        if len(over) < 9 and any("CALL" in lines[j][1] for j in over):
            rare.update(over)
    return end - start + 1 - len(rare)


def rows(arch: int) -> list[dict[str, Any]]:
    """One record for each kernel that fills or adds to whole draws."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "noise.cubin"
        source = timing.ROOT / "csrc" / "noise_cuda.cu"
        command = ["nvcc", *flags(), "-cubin", "-Xptxas=-v", f"-arch=sm_{arch}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(cubin)], check=True, capture_output=True, text=True
        )
        entry = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        usage = re.findall(entry, done.stdout + done.stderr, re.S)
        dump = subprocess.run(
            [cuobjdump(), "--dump-sass", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    code = {part.split()[0]: part for part in dump.split("Function : ")[1:]}
    for name, spills, registers in usage:
        match = re.search(r"whole_kernel.*DtypeE(\d)ELb(\d)", name)
        if match is None:
            continue
        dtype, size = DTYPES[match[1]]
        instructions = loop_instructions(code[name]) / ELEMENTS
        bytes_moved = size * (2 if match[2] == "1" else 1)
        issue, memory = LANE_INSTRUCTIONS / instructions, COPY_BYTES / bytes_moved
        found.append(
            {
                "arch": arch, "kernel": "x += s * eps" if match[2] == "1" else "fill",
                "dtype": dtype, "registers": int(registers), "spill_bytes": int(spills),
                "instructions_per_element": instructions, "bytes_per_element": bytes_moved,
                "h200_issue_elements_per_second": issue,
                "h200_memory_elements_per_second": memory,
                "h200_projected_share_of_copy": min(1.0, issue / memory),
            }
        )  # fmt: skip
    return sorted(found, key=lambda row: (row["kernel"], row["dtype"]))


def main() -> int:
    """Compile, count, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    release = re.search(r"release ([\d.]+)", version.stdout)
    found = [row for arch in ARCHITECTURES for row in rows(arch)]
    head = ("sm", "kernel", "dtype", "registers", "spills", "instr./el.", "bytes", "of copy, H200")
    timing.print_table(
        head,
        [
            (
                row["arch"], row["kernel"], row["dtype"], row["registers"], row["spill_bytes"],
                f"{row['instructions_per_element']:.1f}", row["bytes_per_element"],
                f"{row['h200_projected_share_of_copy']:.0%}" if row["arch"] == 90 else "",
            )
            for row in found
        ],
    )  # fmt: skip
    what = "read from machine code and projected; nothing here was measured"
    toolkit = release[1] if release else "unknown"
    timing.write_json(args.json, {"what": what, "nvcc": toolkit, "rows": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
