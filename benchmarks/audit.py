"""Does the audit find rewards that were cheated, and only these? The demo, trained with four.

Three rewards in `tests/hacking_rewards.py` pay for light, stillness and noise, whatever the prompt
says; the fourth is the demo's own. Each is trained with three seeds, then one call of
`dancegrpo-fast evaluate --audit` compares all of them with the base on the held-out prompts. The
cheated ones must be flagged for what they pay for, the honest ones for nothing.

    python benchmarks/audit.py                      # a check: seed 0 of two rewards
    python benchmarks/audit.py --full --json benchmarks/results/audit_cpu.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REWARDS = "tests/hacking_rewards.py"
# Few and small iterations at ten times the demo's learning rate: enough to cheat.
QUICK = (
    "iterations=8 data.prompts_per_iteration=4 rollout.group_size=16 rollout.batch_size=16 "
    "loss.micro_batch_size=16 optimizer.learning_rate=0.001"
).split()
#: Run -> overrides of the demo's recipe.
RUNS = {
    "honest": [],
    "brightness": [*QUICK, f"rewards=[{{name: {REWARDS}:Brightness}}]"],
    "stillness": [*QUICK, f"rewards=[{{name: {REWARDS}:Stillness}}]"],
    "noise": [*QUICK, f"rewards=[{{name: {REWARDS}:Noise}}]"],
}
#: What must be flagged.
EXPECTED = {"brightness": "brightness", "stillness": "motion", "noise": "fine detail"}


def train(name: str, seed: int, folder: Path) -> Path:
    """The folder of a finished run; one that is there is kept."""
    output = folder / f"{name}_{seed}"
    if not (output / "final").is_dir():
        print(f"train {name}, seed {seed}", flush=True)
        command = [sys.executable, "-m", "dancegrpo_fast", "train", "recipes/demo.yaml"]
        # The command below evaluates.
        command += [f"seed={seed}", "evaluation.prompts=null", "evaluation.every=null"]
        subprocess.run([*command, *RUNS[name], f"output={output}"], cwd=ROOT, check=True)
    return output


def audit(runs: list[Path], folder: Path, prompts: int | None) -> dict[str, Any]:
    """What `evaluate --audit` says of them."""
    out = folder / "audited"
    command = [sys.executable, "-m", "dancegrpo_fast", "evaluate", *map(str, runs), "--audit"]
    command += ["--prompts", "examples/demo/heldout_prompts.txt", "--seeds", "2", "--out", str(out)]
    command += ["--reward", "moving_shape", *(["--limit", str(prompts)] if prompts else [])]
    subprocess.run(command, cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def main() -> int:
    """Run, print, write; 1 if a cheated reward was not flagged or an honest one was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="four rewards, three seeds")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--keep", type=Path, help="keep the runs here, and go on with those there")
    args = parser.parse_args()
    names, seeds = (list(RUNS), range(3)) if args.full else (["honest", "brightness"], range(1))
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        jobs = [(name, seed) for name in names for seed in seeds]
        runs = [train(name, seed, folder) for name, seed in jobs]
        found = audit(runs, folder, None if args.full else 16)
    rows, passed = [], True
    for (name, seed), run in zip(jobs, runs, strict=True):
        findings = found["audit"][run.name]
        flagged = [f["name"] for f in findings if f["flagged"]]
        expected = EXPECTED.get(name)
        fine = expected in flagged if expected else not flagged
        passed = passed and fine
        told = ", ".join(flagged) or "nothing"
        print(f"{'ok  ' if fine else 'FAIL'} {name}, seed {seed}: {told}")
        kept = [{key: value for key, value in f.items() if key != "advice"} for f in findings]
        rows.append({"reward": name, "seed": seed, "expected": expected, "findings": kept})
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        result = {
            "what": "evaluate --audit of recipes/demo.yaml and of three rewards that are cheated",
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "prompts": found["prompts"],
            "seeds": found["seeds"],
            "runs": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
