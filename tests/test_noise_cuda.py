"""Noise on GPUs: its kernels compiled for the host, and the device itself (marked gpu).

The comparisons are the same for the host build of the kernels, which runs everywhere, and for the
GPU: the bits of `normal_batch` on the CPU. All of them are exact.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dancegrpo_fast.ops import noise, noise_cuda
from dancegrpo_fast.ops.keys import as_table
from dancegrpo_fast.ops.noise import DrawKey, add_normal_, keys_table, normal, normal_batch
from dancegrpo_fast.ops.noise_reference import Runs, collapse

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ADDED = (torch.float32, torch.bfloat16, torch.float16)
# Both halves of the counter, a carry between them, and the wrap at 2**64.
KEYS = [DrawKey(0, 0), DrawKey(2**64 - 1, 2**64 - 3), DrawKey(0x123456789ABCDEF, 2**32 - 2)]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(INTEGER[x.element_size()])


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; a NaN may carry another payload."""
    ours, expected = ours.cpu(), expected.cpu()
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    assert torch.equal(ours.isnan(), expected.isnan())
    different = (bits(ours) != bits(expected)) & ~expected.isnan()
    assert not different.any(), f"{int(different.sum())} of {different.numel()} differ"


# ---------------------------------------------------------------------------- two executors


class OnHost:
    """The kernels compiled by the C++ compiler, on memory of the CPU."""

    device = torch.device("cpu")

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def fill(self, out, keys, shape, box, copies) -> None:
        self._call("dg_normal", out, keys, collapse(shape, box), [ctypes.c_int64(copies)], [])

    def add(self, x, keys, scale) -> None:
        shape = x.shape[1:]
        scales = scale.data_ptr() if isinstance(scale, torch.Tensor) else None
        number = 1.0 if isinstance(scale, torch.Tensor) else scale
        tail = [ctypes.c_float(number), ctypes.c_void_p(scales)]
        self._call("dg_add_normal", x, keys, collapse(shape, [(0, s) for s in shape]), [], tail)

    def _call(self, name: str, memory, keys, runs: Runs, middle: list, tail: list) -> None:
        table = as_table(keys)
        array = ctypes.c_int64 * len(runs.extents)
        getattr(self.library, name)(
            ctypes.c_void_p(memory.data_ptr()), DTYPES[memory.dtype],
            ctypes.c_void_p(table.data_ptr()), ctypes.c_int64(len(table)), *middle,
            ctypes.c_int64(runs.base), len(runs.extents), array(*runs.extents),
            array(*runs.strides), *tail,
        )  # fmt: skip


class OnDevice:
    """The GPU, through the public functions."""

    device = torch.device("cuda")

    def fill(self, out, keys, shape, box, copies) -> None:
        normal_batch(shape, keys, box=box, copies=copies, out=out, implementation="cuda")

    def add(self, x, keys, scale) -> None:
        add_normal_(x, keys, scale, implementation="cuda")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    if not shutil.which("c++"):
        pytest.skip("CUDA KERNELS ON THE HOST NOT RUN: no C++ compiler (apt install g++)")
    library = tmp_path_factory.mktemp("host") / "noise.so"
    folder = Path(__file__).with_name("cuda_on_host")
    command = ["c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
    command += ["-Wall", "-Wextra", f"-I{folder}", str(folder / "noise.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return OnHost(ctypes.CDLL(str(library)))


@pytest.fixture(params=["host", pytest.param("device", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> OnHost | OnDevice:
    if request.param == "host":
        return request.getfixturevalue("host")
    assert noise_cuda.why_not(torch.device("cuda")) is None
    return OnDevice()


def guarded(count: int, dtype: torch.dtype, device: torch.device, shift: int):
    """(`count` elements of memory, a check that nothing around them was written)."""
    memory = torch.full((count + 64,), 3.0, dtype=dtype, device=device)
    inside = memory[32 + shift : 32 + shift + count]

    def untouched() -> bool:
        around = torch.cat([memory[: 32 + shift], memory[32 + shift + count :]])
        return bool((around == 3.0).all())

    return inside, untouched


# ---------------------------------------------------------------------------- the same bits

BOXES = [
    ((64, 16), None),  # whole, aligned: vectors only
    ((130, 1030), None),  # more work than one turn of the grid
    ((7, 9), None),  # 63 elements: the second key's row starts off a boundary
    ((1,), None),
    ((3, 5, 8), ((1, 3), (0, 5), (4, 8))),  # rows of four, aligned
    ((3, 5, 9), ((0, 3), (1, 4), (2, 9))),
    ((3, 5, 9), ((2, 3), (1, 4), (0, 9))),  # one run, starting off a boundary
    ((4, 3, 2, 11, 3), ((1, 4), (0, 2), (1, 2), (3, 10), (0, 3))),
    ((2, 6, 6), ((0, 2), (2, 4), (3, 3))),  # empty
    ((40,), ((2, 34),)),  # one run of whole blocks, starting off a boundary
    ((40,), ((8, 40),)),  # and on one
    ((1 << 20, 1 << 20, 1 << 18), (((1 << 20) - 1, 1 << 20), (7, 8), ((1 << 18) - 10, 1 << 18))),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "box"), BOXES)
@pytest.mark.parametrize(("copies", "shift"), [(1, 0), (3, 0), (1, 1), (2, 2)])
def test_fill_gives_the_bits_of_the_cpu(where, shape, box, copies, shift, dtype) -> None:
    box = box or tuple((0, size) for size in shape)
    expected = normal_batch(shape, KEYS, dtype=dtype, box=box, copies=copies)
    memory, untouched = guarded(expected.numel(), dtype, where.device, shift)
    out = memory.view(expected.shape)
    where.fill(out, KEYS, shape, box, copies)
    assert_same(out, expected)
    assert untouched()


@pytest.mark.parametrize("dtype", ADDED)
@pytest.mark.parametrize("shape", [(64, 16), (7, 9), (3,)])
@pytest.mark.parametrize("shift", [0, 1])
def test_addition_gives_the_bits_of_the_cpu(where, shape, shift, dtype) -> None:
    """Also where x is tiny, huge or NaN, and where a scale is 0 or NaN."""
    start = normal_batch(shape, [DrawKey(5, i) for i in range(3)]).mul_(3)
    start.view(3, -1)[:, 0] = torch.tensor([1e-7, 6.0e4, float("nan")])
    start.view(3, -1)[:, 1:9] = -0.0  # which + 0 would make 0
    start = start.to(dtype)
    for scale in (0.7, 1e6, torch.tensor([0.1, 0.0, -2.5]), torch.tensor([float("nan"), 1e-9, 0])):
        expected = add_normal_(start.clone(), KEYS, scale)
        memory, untouched = guarded(start.numel(), dtype, where.device, shift)
        x = memory.view(start.shape).copy_(start)
        where.add(x, KEYS, scale.to(where.device) if isinstance(scale, torch.Tensor) else scale)
        assert_same(x, expected)
        assert untouched()


# ---------------------------------------------------------------------------- the CPU's own


@pytest.fixture(params=["reference", "native"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("native_module")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_repeat_each_draw(dtype, implementation) -> None:
    box = ((1, 4), (0, 3))
    options = {"dtype": dtype, "box": box, "implementation": implementation}
    drawn = normal_batch((5, 3), KEYS, **options)
    copied = normal_batch((5, 3), KEYS, copies=4, **options)
    assert copied.shape == (3, 4, 3, 3)
    assert_same(copied, drawn.unsqueeze(1).expand(3, 4, 3, 3).contiguous())
    assert_same(normal((5, 3), KEYS[1], copies=2, **options), copied[1, :2])
    assert normal_batch((5, 3), KEYS, copies=0, **options).shape == (3, 0, 3, 3)


@pytest.mark.parametrize("dtype", ADDED)
def test_addition_is_one_product_one_sum_one_rounding(dtype, implementation) -> None:
    x = normal_batch((6, 7), [DrawKey(8, i) for i in range(3)]).to(dtype)
    eps = normal_batch((6, 7), KEYS)
    scales = torch.tensor([0.3, 0.0, -1.7])
    # float64 holds the product of two float32 exactly, and here, where sizes differ by less than
    # 2^29, also the sum: each conversion to float32 below is one rounding.
    product = (scales.double().view(3, 1, 1) * eps.double()).float()
    expected = (x.double() + product.double()).float().to(dtype)
    expected[1] = x[1]
    changed = x.clone()
    assert add_normal_(changed, KEYS, scales, implementation=implementation) is changed
    assert_same(changed, expected)


def test_a_zero_scale_leaves_its_row_alone(implementation) -> None:
    x = torch.tensor([[float("nan"), -0.0, 1.0]])
    before = bits(x).clone()
    add_normal_(x, KEYS[:1], 0.0, implementation=implementation)
    assert torch.equal(bits(x), before)


def test_addition_to_nothing_and_to_scalars(implementation) -> None:
    for shape in ((0, 3), (2, 0), (2,)):
        x = torch.ones(shape)
        add_normal_(x, KEYS[: shape[0]], 0.5, implementation=implementation)
        assert_same(x, 1 + 0.5 * normal_batch(shape[1:], KEYS[: shape[0]]))


@pytest.mark.parametrize(
    ("x", "keys", "scale", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), KEYS[:2], 1.0, r"x = torch.float64 \[2, 3\]"),
        (torch.zeros(3, 2).t(), KEYS[:2], 1.0, r"must be contiguous float32, bfloat16 or float16"),
        (torch.zeros(2, 3), KEYS, 1.0, "keys has 3 rows: must be 2, one per row of x"),
        (torch.zeros(2, 3), KEYS[:2], torch.ones(3), r"scale = torch.float32 \[3\]: must be a nu"),
        (torch.zeros(1, 3), KEYS[:1], torch.ones(1, dtype=torch.int64), r"must be a number or flo"),
        (torch.zeros(1, 3, requires_grad=True), KEYS[:1], 1.0, r"x requires grad: .* x.detach\(\)"),
    ],
)
def test_bad_additions_are_refused(x, keys, scale, message) -> None:
    with pytest.raises(ValueError, match=message):
        add_normal_(x, keys, scale)


def test_bad_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="copies = -1: must not be negative"):
        normal_batch((2,), KEYS, copies=-1)
    with pytest.raises(ValueError, match=r"out = \[3, 2\].*must be contiguous \[3, 4, 2\]"):
        normal_batch((2,), KEYS, copies=4, out=torch.empty(3, 2))


def test_choice_for_a_gpu_without_kernels_is_inspectable(monkeypatch, caplog) -> None:
    monkeypatch.setattr(noise_cuda, "why_not", lambda device: "built without CUDA: do this")
    monkeypatch.setattr(noise, "_warn_once", noise._warn_once.__wrapped__)
    assert noise.implementations("cuda")["cuda"] == "built without CUDA: do this"
    assert "cuda" not in noise.implementations()
    assert noise.selected("auto", "cuda") in ("native", "reference")
    assert "noise for cuda is drawn on the CPU and copied: built without CUDA: do" in caplog.text
    with pytest.raises(ValueError, match="implementation = 'cuda': built without CUDA: do this"):
        noise.selected("cuda", "cuda")
    monkeypatch.setattr(noise_cuda, "why_not", lambda device: None)
    assert noise.selected("auto", "cuda:1") == "cuda"
    assert noise.selected("reference", "cuda") == "reference"


# ---------------------------------------------------------------------------- the device


@pytest.fixture
def cuda() -> torch.device:
    reason = noise_cuda.why_not(torch.device("cuda"))
    assert reason is None, reason
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_gives_the_bits_of_the_cpu_in_16m_draws(cuda, dtype) -> None:
    keys = [*KEYS, DrawKey(0xDEADBEEF, 7)]
    ours = normal_batch((1 << 22,), keys, dtype=dtype, device=cuda)
    assert noise.selected("auto", cuda) == "cuda"
    assert_same(ours, normal_batch((1 << 22,), keys, dtype=dtype))


@pytest.mark.gpu
def test_device_counts_elements_in_64_bits(cuda) -> None:
    """More than 2**32 elements: the last ones are those of the CPU."""
    count = (1 << 32) + 24
    out = normal((count,), KEYS[1], dtype=torch.bfloat16, device=cuda)
    for start in (0, (1 << 31) - 5, (1 << 32) - 5, count - 9):
        box = ((start, start + 9),)
        expected = normal((count,), KEYS[1], dtype=torch.bfloat16, box=box)
        assert_same(out[start : start + 9], expected)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.gpu
def test_replays_follow_the_table_of_keys(cuda) -> None:
    table = keys_table(KEYS).to(cuda)
    scales = torch.ones(3, device=cuda)
    out = torch.empty(3, 2, 4096, dtype=torch.bfloat16, device=cuda)
    x = torch.zeros(3, 4096, device=cuda)

    def call() -> None:
        normal_batch((4096,), table, copies=2, out=out)
        add_normal_(x, table, scales)

    graph = captured(call)
    seen = []
    for keys, scale in ((KEYS, 1.0), ([DrawKey(9, i) for i in range(3)], 0.25)):
        table.copy_(keys_table(keys))
        scales.fill_(scale)
        x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(out, normal_batch((4096,), keys, dtype=torch.bfloat16, copies=2))
        assert_same(x, add_normal_(torch.zeros(3, 4096), keys, scale))
        seen.append(bits(out).clone())
    assert not torch.equal(*seen)


@pytest.mark.gpu
def test_a_capture_refuses_what_it_would_freeze(cuda) -> None:
    out = torch.empty(3, 8, device=cuda)
    with pytest.raises(ValueError, match="keys on cpu: must be on cuda:. while a CUDA graph is"):
        captured(lambda: normal_batch((8,), KEYS, out=out))


@pytest.mark.gpu
def test_work_goes_to_the_current_stream_and_waits_for_nothing(cuda) -> None:
    table = keys_table(KEYS).to(cuda)
    out = torch.zeros(3, 1 << 16, device=cuda)
    expected = normal_batch((1 << 16,), KEYS)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        normal_batch((1 << 16,), table, out=out)
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "the call waited for the GPU"
    torch.cuda.default_stream().synchronize()
    assert not out.any(), "the work went to another stream"
    stream.synchronize()
    assert_same(out, expected)


@pytest.mark.gpu
def test_nothing_synchronises(cuda) -> None:
    table, x = keys_table(KEYS).to(cuda), torch.zeros(3, 4096, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        normal_batch((4096,), table, device=cuda)
        normal_batch((4096,), KEYS, device=cuda)  # uploads, and still waits for nothing
        add_normal_(x, table, torch.ones(3, device=cuda))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_current_device_is_left_as_it_was(cuda) -> None:
    for index in range(torch.cuda.device_count()):
        before = torch.cuda.current_device()
        ours = normal_batch((1000,), KEYS, device=f"cuda:{index}")
        assert torch.cuda.current_device() == before
        assert_same(ours, normal_batch((1000,), KEYS))


@pytest.mark.gpu
def test_errors_are_in_the_words_of_cuda(cuda) -> None:
    from dancegrpo_fast.ops import native

    with pytest.raises(RuntimeError, match="on device 99: cudaErrorInvalidDevice: invalid device"):
        native.module().normal_cuda(0, 0, 0, 1, 1, 0, [4], [1], 99, 0)
    # And the next call is not affected.
    assert_same(normal_batch((8,), KEYS, device=cuda), normal_batch((8,), KEYS))
