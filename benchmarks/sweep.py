"""Which settings are fastest for a model on this machine: attention, recomputation, compile, batch.

    python benchmarks/sweep.py                      a small Wan on the CPU
    python benchmarks/sweep.py --model flux         FLUX.1-dev's size, random weights, one GPU
    ... --batches 1,2,4 --json PATH

Every setting runs the same iteration (the first ones are compared, as in throughput.py); what does
not fit, is refused or would end after --seconds is listed with its reason. Prints the settings from
fastest to slowest.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import timing
import torch
from ladder import MODELS, OURS, WINDOW, Subject

from dancegrpo_fast.config import UserError
from dancegrpo_fast.parallel.world import World


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS))
    parser.add_argument("--batches", default="1,4,12", help="states per call, comma separated")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=540.0)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    name = args.model or ("sd15" if cuda else "small_wan")
    grid = itertools.product(
        (False, True, "graphs") if cuda and args.full else (False,),  # The quick ones first.
        ("default", "cudnn", "flash", "flash_3", "xformers") if cuda else ("default",),
        ("none", "selective", "full"),
        [int(size) for size in args.batches.split(",")],
    )
    world, rows, refused, first = World.from_environment(), [], [], None
    started, longest = time.perf_counter(), 0.0
    for compiled, attention, checkpointing, batch in grid:
        subject = None
        gc.collect()  # A subject and its hooks hold each other.
        torch._dynamo.reset()  # Graphs are kept by the blocks' class, also those of networks gone.
        begun = time.perf_counter()
        setting = f"attention {attention}, {checkpointing}, compile {compiled}, batch {batch}"
        if begun - started + longest > args.seconds:
            refused.append((setting, f"it might not end within {args.seconds:.0f} s"))
            continue
        rung = replace(OURS, name=setting, checkpointing=checkpointing, compile=compiled)
        model = MODELS[name] | {"batch": batch, "attention": attention}
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(MODELS, {name: model}):
            try:
                subject = Subject(name, rung, Path(folder), world, **WINDOW)
                for _ in range(args.rounds + 1):
                    subject.iteration()
            except (UserError, torch.cuda.OutOfMemoryError) as error:
                refused.append((setting, str(error).splitlines()[0][:100]))
                continue
            except RuntimeError as error:  # The other settings still say what they cost.
                refused.append((setting, f"FAILED: {error}"[:400]))
                continue
            finally:
                longest = max(longest, time.perf_counter() - begun)
        found = subject.found
        first = first or found
        apart = abs(found["norm"] - first["norm"]) / first["norm"]
        row: dict[str, Any] = {
            "attention": attention, "checkpointing": checkpointing, "compile": compiled,
            "batch": batch, "seconds": subject.median("sample", "update"),
            "gradient_norm_apart": apart,
        }  # fmt: skip
        rows.append(row)
        print(f"{setting}: {row['seconds']:.2f} s")
    rows.sort(key=lambda row: row["seconds"])
    environment = timing.environment(args.device)
    print(timing.headline(environment))
    timing.print_table(
        ("attention", "recomputed", "compile", "batch", "s", "gradient norm apart"),
        [
            (r["attention"], r["checkpointing"], r["compile"], r["batch"], f"{r['seconds']:.2f}",
             f"{r['gradient_norm_apart']:.1e}")
            for r in rows
        ],
    )  # fmt: skip
    for setting, why in refused:
        print(f"not run: {setting}: {why}")
    result = {"environment": environment, "model": name, "rows": rows, "refused": refused}
    timing.write_json(args.json, result)
    if any(why.startswith("FAILED") for _, why in refused):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
