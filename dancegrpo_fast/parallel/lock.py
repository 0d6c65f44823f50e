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

    A folder that is there is locked at once; one that is not stays so until `take`, since a recipe
    with a mistake must write nothing. `field` is what names it.
    """

    def __init__(self, folder: Path, world: World, *, field: str = "output") -> None:
        self._folder, self._writes, self._field = folder, world.is_main, field
        self._handle: int | None = None
        if folder.is_dir():
            self.take()

    def take(self) -> None:
        """Make the folder and lock it, if that is not done.

        Raises:
            UserError: Another run holds the folder.
        """
        if self._handle is not None or not self._writes:
            return
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise UserError(
                f"{self._field} = {str(folder)!r}: another run is writing here "
                f"({holder or 'unknown'}); wait for it, stop it, or give another folder"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._handle = handle

    def release(self) -> None:
        """Let another run in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
