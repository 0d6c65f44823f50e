"""Two runs must not write into one folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from dancegrpo_fast.config import UserError
from dancegrpo_fast.parallel.world import World


class FolderLock:
    """Held by the main process for as long as it lives: a killed run leaves nothing behind.

    Raises:
        UserError: Another run holds the folder.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._handle: int | None = None
        if not world.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise UserError(
                f"output = {str(folder)!r}: another run is writing here ({holder or 'unknown'}); "
                "wait for it, stop it, or give another folder"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._handle = handle

    def release(self) -> None:
        """Let another run in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
