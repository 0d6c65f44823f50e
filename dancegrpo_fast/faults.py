"""What an exception means for a run, where libraries do not say it by a class of their own."""

from __future__ import annotations

import errno
import os

import torch.distributed as dist


def is_full_disk(error: Exception) -> bool:
    """Whether something could not be written for want of room."""
    # Libraries that write in Rust raise no OSError.
    full = (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return getattr(error, "errno", None) in full or any(os.strerror(n) in text for n in full)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    if not isinstance(error, RuntimeError) or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    text = str(error).lower()
    signs = ("gloo", "nccl", "timed out", "connection closed")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)
