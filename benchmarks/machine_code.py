"""Compiles the Triton kernels for GPUs that are not here, and reads the machine code.

The kernels are compiled for exactly the arguments with which their launchers launch them: launches
are recorded, on tensors without memory, and compiled for a named architecture.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

# ------------------------------------------------------------------ recording and compiling


class Launch(NamedTuple):
    """One recorded launch."""

    function: Any
    args: tuple[object, ...]
    grid: tuple[int, ...]
    options: dict[str, object]


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Kernels launched inside are recorded instead of run."""
    assert not knobs.runtime.interpret, "compiling needs TRITON_INTERPRET unset"
    launches: list[Launch] = []

    def record(self: Any, *args: object, grid: Any, warmup: bool, **options: object) -> None:
        launches.append(Launch(self, args, grid, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compiled(launch: Launch, arch: int) -> Any:
    """The launch compiled for sm_`arch`, specialised as Triton's own launch would."""
    function = launch.function
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    options = {**launch.options, "debug": False}
    bound, specialised, _ = bind(*launch.args, **options)
    parsed, signature, constants, attributes = function._pack_args(
        backend, options, bound, specialised, None
    )
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


# ------------------------------------------------------------------ reading machine code


@dataclass(frozen=True)
class Code:
    """What a kernel compiled to.

    Attributes:
        registers: Per thread.
        spill_bytes: Local memory and stack per thread.
        shared_bytes: Per program.
        instructions: Along the path of a full chunk whose loop over children runs once.
        per_child: Of which one more child repeats; 0 without a loop.
        elements: That a thread handles.
        loads: Global loads in the PTX, by width in bits.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    per_child: int
    elements: int
    loads: dict[str, int]

    def per_element(self, children: int = 1) -> float:
        """Instructions of one thread for an element of one child."""
        count = self.instructions + (children - 1) * self.per_child
        return count / self.elements / children


def tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def analyse(kernel: Any, tile: int) -> Code:
    """Reads a compiled kernel that takes `tile` elements per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    whole, body = hot_path(sass)
    return Code(
        registers=registers,
        spill_bytes=stack + local,
        shared_bytes=max(shared, kernel.metadata.shared),
        instructions=whole,
        per_child=body,
        elements=tile // (32 * kernel.metadata.num_warps),
        loads=loads_by_width(kernel.asm["ptx"]),
    )


def loads_by_width(ptx: str) -> dict[str, int]:
    """{"128": count, ...} of global loads."""
    counts: dict[str, int] = {}
    for vector, bits in re.findall(r"ld\.global(?:\.[a-z_:0-9]+)*?(?:\.v(\d))?\.b(\d+)\b", ptx):
        width = str(int(vector or 1) * int(bits))
        counts[width] = counts.get(width, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -int(item[0])))


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def hot_path(sass: str) -> tuple[int, int]:
    """(instructions from entry to exit with each loop run once, those of the loop's body).

    Of all paths the one that draws most, then loads and stores most, then is shortest: a full chunk
    of a child with noise, past the rare branches (slow square roots lie behind a backward jump).
    """
    code = [(int(at, 16), bool(guard), op, rest) for at, guard, op, rest in _LINE.findall(sass)]
    index = {address: i for i, (address, *_) in enumerate(code)}

    def target(i: int) -> int | None:
        if not code[i][2].startswith("BRA"):
            return None
        found = re.search(r"(0x[0-9a-f]+)\s*$", code[i][3])
        return index[int(found[1], 16)] if found else None

    def best(start: int, end: int | None) -> tuple[int, int, int] | None:
        """(draws, accesses, -instructions) of the best path from start to end (None: EXIT)."""
        value: dict[int, tuple[int, int, int] | None] = {}
        for i in range(len(code) - 1 if end is None else end, start - 1, -1):
            _, guarded, op, _ = code[i]
            own = (op.startswith("MUFU.RSQ"), bool(re.match("LDG|STG", op)), -(op != "NOP"))
            after: list[tuple[int, int, int] | None] = []
            if i == end or (op == "EXIT" and end is None):
                after.append((0, 0, 0))
            jump = target(i)
            if jump is not None and jump > i:
                after.append(value.get(jump))
            if i != end and (guarded or op not in ("EXIT", "BRA", "RET.REL.NODEC")):
                after.append(value.get(i + 1))
            rest = max((v for v in after if v is not None), default=None)
            value[i] = None if rest is None else tuple(map(sum, zip(own, rest, strict=True)))  # type: ignore
        return value[start]

    whole = best(0, None)
    assert whole is not None, "no path from entry to exit"
    bodies = [
        body
        for i in range(len(code))
        if (head := target(i)) is not None and head < i and (body := best(head, i)) is not None
    ]
    return -whole[2], -max(bodies, default=(0, 0, 0))[2]
