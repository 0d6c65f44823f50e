"""A process of a run that comes to harm on purpose: `test_kills` starts it under torchrun.

    torchrun --max-restarts N tests/kill_worker.py RECIPE HARMS.json OUT

The n-th start suffers HARMS[n]: {"what", "place", "count", "rank"}. `what` is kill (SIGKILL; rank
-1: all processes at once), stop (SIGTERM to torchrun itself) or hang (sleep 12 s); it comes in the
`count`-th call of a place, or `count` milliseconds after the run began to listen to signals.
OUT/starts.jsonl gets what each start found and resumed from, OUT/code-RANK the exit code. A run
that reached its end is made once more in OUT/whole, undisturbed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast import checkpoint
from dancegrpo_fast.cli import main
from dancegrpo_fast.parallel.stopping import Stopping
from dancegrpo_fast.report.metrics import read_metrics
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.updating.policy_gradient import Updater

PLACES = {
    "ask": (Stopping, "ask"),  # Every denoising step, scoring and micro-batch.
    "rollout": (Trainer, "sample"),
    "scoring": (Trainer, "score"),
    "step": (Updater, "_step"),  # Between the updates of an iteration.
    "save": (checkpoint.Saver, "save"),
    "finish": (checkpoint.Saver, "finish"),
    "complete": (checkpoint.Saver, "_complete"),
    "clock": (Stopping, "listening"),
}


def suffer(what: str, everybody: bool) -> None:
    if what == "hang":
        time.sleep(12)
    elif what == "stop":
        os.kill(os.getppid(), signal.SIGTERM)
    else:
        parent = os.getppid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for child in map(int, children if everybody else []):
            if child != os.getpid():
                os.kill(child, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def plant(harm: dict[str, Any]) -> None:
    """Have it happen in the `count`-th call of a place, if it is this process's turn."""
    owner, name = PLACES[harm["place"]]
    original, calls = getattr(owner, name), []
    mine = harm["rank"] in (-1, int(os.environ["RANK"]))
    happens = lambda: suffer(harm["what"], harm["rank"] == -1)  # noqa: E731

    def harmed(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if mine and harm["place"] == "clock":
            threading.Timer(harm["count"] / 1000, happens).start()
        elif mine and len(calls) == harm["count"]:
            happens()
        return original(self, *arguments, **options)

    setattr(owner, name, harmed)


def record(start: int, out: Path) -> None:
    """What this start of the main process finds in the run's folder, and goes on from."""
    original = Trainer.resume

    def resume(self: Trainer, named: Path | None = None) -> bool:
        found = original(self, named)
        if self.world.is_main:
            path = Path(self.config.output) / "metrics.jsonl"
            lines = read_metrics(path) if path.is_file() else []
            logged = max((line["iteration"] for line in lines), default=0)
            saved = max(self.saved_iterations(), default=0)
            values = {"start": start, "logged": logged, "saved": saved, "resumed": self.done}
            with (out / "starts.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")
        return found

    Trainer.resume = resume  # type: ignore[method-assign]


if __name__ == "__main__":
    from dancegrpo_fast.parallel.world import leave

    torch.set_num_threads(1)
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    recipe, harms, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    record(start, out)
    if start < len(harms):
        plant(harms[start])
    code = main(["train", recipe])
    (out / f"code-{os.environ['RANK']}").write_text(str(code))
    if code == 0:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
        code = main(["train", recipe, f"output={out / 'whole'}"])
    leave(code)
    sys.exit(code)
