"""A store that only the processes of this start share.

torchrun keeps one store over its restarts. A restarted process may then read the address or the
NCCL id that a killed one left there under the same name, and wait for a dead process. Restart
counts do not tell the starts apart: with several machines each torchrun counts its own.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

import torch.distributed as dist


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of this start, and this process's rank and their number.

    Args:
        timeout: Of meeting the others, and of the store.

    Raises:
        torch.distributed.DistStoreError: Not all processes came in time.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(agree(store, rank, size, timeout), store), rank, size


def agree(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that rank 0 drew for this start, equal on all processes.

    What another rank reads may be the name of an earlier start: it answers there, in vain, and
    reads again until rank 0 has confirmed the answer, which is a name of its own.
    """
    own = f"start-{secrets.token_hex(8)}"
    if rank == 0:
        store.set("start", own)
        answers = [f"{own}/{other}" for other in range(1, size)]
        store.wait(answers, timeout)
        for answer in answers:
            store.set(f"{own}/{store.get(answer).decode()}", "met")
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", own)
        if store.check([f"{name}/{own}"]):
            return name
        time.sleep(0.02)
    raise dist.DistStoreError(f"timed out: rank 0 did not meet rank {rank} in {timeout}")
