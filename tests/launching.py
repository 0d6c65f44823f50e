"""Starts a script of the tests under torchrun, on one thread a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch(
    script: Path, *arguments: Path, processes: int = 2, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; what it wrote is shown if it failed."""
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={processes}", str(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-6000:])
    return done
