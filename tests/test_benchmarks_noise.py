"""benchmarks/noise.py runs, writes what it measured, and measures nothing where bits are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """The module, imported as running the file does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("noise", "timing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import noise

    yield noise
    for name in ("noise", "timing"):
        sys.modules.pop(name, None)


def test_it_writes_what_it_measured(benchmark, native_module, tmp_path, capsys) -> None:
    path = tmp_path / "results" / "noise.json"
    arguments = ["--elements", "4099", "--device", "cpu", "--json", str(path)]
    assert benchmark.main([*arguments, "--plot", str(tmp_path / "noise.png")]) == 0
    result = json.loads(path.read_text())
    for key in ("date", "commit", "torch", "cpu", "cores", "native", "cuda_noise"):
        assert result["environment"][key], key
    providers = {record["provider"] for record in result["results"]}
    assert {"native, 1", "native, 2", "torch normal_, 2", "NumPy reference, 1"} <= providers
    for record in result["results"]:
        seconds = record["seconds"]
        assert 0 < seconds["q20"] <= seconds["median"] <= seconds["q80"]
        size = 4 if record["dtype"] == "float32" else 2
        assert record["bytes_written_per_second"] == pytest.approx(
            4099 * size / seconds["median"], rel=1e-12
        )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(result["results"])
    assert (tmp_path / "noise.png").stat().st_size > 1000


def test_wrong_bits_end_it_before_a_table(benchmark, monkeypatch, capsys) -> None:
    def biased(*args, **options) -> torch.Tensor:
        return original(*args, **options) * (1 + 2**-23)

    original = benchmark.normal_batch
    monkeypatch.setattr(benchmark, "normal_batch", biased)
    with pytest.raises(RuntimeError, match="reference does not give the golden bits"):
        benchmark.main(["--elements", "64", "--device", "cpu"])
    assert capsys.readouterr().out == ""


def test_quantiles_and_units_of_work(benchmark) -> None:
    timing = sys.modules["timing"]
    times = timing.Times.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (times.low, times.median, times.high, times.samples) == (2.0, 3.5, 5.0, 6)
    calls = {"one": 0, "three": 0}

    def count(name: str) -> None:
        calls[name] += 1

    # A case that does three units of work a call takes a third of its time for one.
    cases = {
        "one": timing.Case(lambda: (count("one"), torch.ones(1 << 16).sum())),
        "three": timing.Case(
            lambda: (count("three"), [torch.ones(1 << 16).sum() for _ in range(3)]), calls=3
        ),
    }
    found = timing.interleaved(cases, rounds=2, sample_seconds=1e-4)
    assert list(found) == ["one", "three"] and all(t.samples == 2 for t in found.values())
    assert calls["one"] > 2 and calls["three"] > 2
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


SASS = """
        /*0000*/  S2R R0, SR_TID.X ;  /* 0x1 */
        /*0010*/  MUFU.RSQ R1, R0 ;  /* 0x2 */
        /*0020*/  @!P0 BRA 0x0050 ;  /* 0x3 */
        /*0030*/  MOV R4, 0x50 ;  /* 0x4 */
        /*0040*/  CALL.REL.NOINC 0x00a0 ;  /* 0x5 */
        /*0050*/  STG.E [R2], R1 ;  /* 0x6 */
        /*0060*/  @P1 BRA 0x0050 ;  /* 0x7 */
        /*0070*/  @P2 BRA 0x0010 ;  /* 0x8 */
        /*0080*/  @P3 BRA 0x0000 ;  /* 0x9 */
        /*0090*/  EXIT ;  /* 0xa */
        /*00a0*/  RET.REL.NODEC R4 0x0 ;  /* 0xb */
"""


def test_static_count_is_the_drawing_loop_without_rare_branches(benchmark) -> None:
    """From the square root at 10 to the jump at 70: seven, less the two that lead to the call."""
    import noise_static

    assert noise_static.loop_instructions(SASS) == 5
