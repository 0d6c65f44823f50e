"""One training iteration, stage by stage, and what each lever is worth at identical maths.

    python benchmarks/throughput.py                          small Wan and FLUX on the CPU
    python benchmarks/throughput.py --model wan --full       real sizes, random weights, one GPU
    python benchmarks/throughput.py --scaling [--figure F]   time against G, steps, frames, size
    python benchmarks/throughput.py --slices                 a whole composed from a slice; measured
    ... --json PATH

The ladder begins at the call pattern of public code (ladder.py) and adds one lever after the other;
each lever also stands alone. All rungs draw the same samples and make the same update: before any
time is printed, samples, loss and gradient norm of the first iteration are compared (1e-4 in
float32; in bfloat16 by what it rounds). On a GPU one rung after the other is in memory; one that
does not fit, or would end after --seconds, is listed as not run.
"Predicted" is counts of network calls times the time of such a call, measured alone after the
rounds: what the sum misses are latents, noise, losses, the optimizer and Python. On a CPU all times
are CPU seconds of one thread: what else the machine does is none of the iteration's.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import timing
import torch
from ladder import LEVERS, MODELS, PUBLIC, TREE, WINDOW, ladder
from measuring import measure
from scaling import draw, scaling
from slices import WHOLE, compared, composed


def show(result: dict[str, Any]) -> None:
    """Print a model's tables: the ladder, and what its iterations consist of."""
    rows = result["rows"]
    for rung, why in result["not_run"]:
        print(f"not run: {rung}: {why}")
    if not rows:
        return
    first = rows[0]
    print(f"\n{result['model']} {result['rollout'] or ''}: {result['agreement'][0]}")
    timing.print_table(
        ("", "states drawn", "trained", "calls", "predicted", "measured", "s", "of peak"),
        [
            (
                row["rung"], row["forwards"], row["trained"], row["calls"],
                f"{first['predicted_seconds'] / row['predicted_seconds']:.2f}x",
                f"{first['seconds'] / row['seconds']:.2f}x",
                f"{row['seconds']:.2f}", f"{row['share_of_peak']:.0%}",
            )
            for row in rows
        ],
    )  # fmt: skip
    print()
    timing.print_table(
        ("s", "sample", "score", "update", "of it the optimizer", "samples/s", "TFLOP", "fused ops",
         "launches", "values asked for", "collectives", "GB at most"),
        [
            (
                row["rung"], f"{row['sample_seconds']:.2f}", f"{row['score_seconds']:.2f}",
                f"{row['update_seconds']:.2f}", f"{row['step_seconds']:.3f}",
                f"{row['samples_per_second']:.3g}", f"{row['flops'] / 1e12:.3g}",
                f"{row['fused_share']:.3%}", "-" if row["launches"] is None else row["launches"],
                row["values_asked_for"], row["collectives"],
                f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "-",
            )
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), action="append")
    parser.add_argument("--rounds", type=int, default=None, help="default: 3, on a GPU 2")
    parser.add_argument("--seconds", type=float, default=540.0, help="of a model, on a GPU")
    parser.add_argument("--tree", action="store_true", help="only the branching tree")
    parser.add_argument("--scaling", action="store_true", help="time against G, steps, sizes")
    parser.add_argument("--figure", type=Path, help="draw that here (.svg or .png)")
    parser.add_argument("--slices", action="store_true", help="a whole composed, and measured")
    args = parser.parse_args()
    if args.figure and not args.scaling:
        parser.error("--figure draws what --scaling measures")
    cuda = args.device == "cuda"
    args.rounds = args.rounds or (2 if cuda else 3)
    names = args.model or (["sd15", "flux", "wan", "hunyuan"] if cuda else
                           ["small_wan", "small_flux"])  # fmt: skip
    environment = timing.environment(args.device)
    print(timing.headline(environment))
    results: list[dict[str, Any]] = []
    if not cuda:
        torch.set_num_threads(1)
    clock = mock.patch.object(time, "perf_counter", time.process_time)
    with nullcontext() if cuda else clock:
        for name in names:
            started = time.perf_counter()
            if args.scaling:
                results.append(scaling(name, args.rounds))
            elif args.slices:
                results.append(compared(name, args.rounds))
            else:
                results += _ladders(name, args)
            print(f"{time.perf_counter() - started:.0f} s")
            # Now: the next model may fail, or be cut off.
            timing.write_json(args.json, {"environment": environment, "results": results})
    if args.figure:
        draw(results, args.figure)
    if any(why.startswith("FAILED") for r in results for _, why in r.get("not_run", [])):
        raise SystemExit(1)


def _ladders(name: str, args: Any) -> list[dict[str, Any]]:
    """The ladder on a window (whole chains where only a slice is run), and on a branching tree."""
    cuda, found = args.device == "cuda", []
    if not args.tree:
        rungs = ladder(compiled=cuda and args.full, kept=MODELS[name].get("kept", "none"))
        window = {} if name == "hunyuan" else WINDOW
        found.append(measure(name, rungs, args.rounds, seconds=args.seconds, **window))
        show(found[-1])
        if name in WHOLE and found[-1]["rows"]:
            ran = {row["rung"] for row in found[-1]["rows"]}
            rungs = [rung for rung in rungs if rung.name in ran]
            found.append(composed(name, rungs, found[-1], WHOLE[name]))
    if not cuda:
        rungs = ladder(compiled=False)
        tree = [PUBLIC, rungs[2], rungs[len(LEVERS)]]
        found.append(measure(name, tree, args.rounds, **TREE))
        show(found[-1])
    return found


if __name__ == "__main__":
    main()
