"""Reads torch's sharded files (DCP) without running what a pickle says.

Tensors are loaded with `weights_only`; the table of what lies where is a plain pickle in torch
2.13, and a snapshot may come from somebody else. Only what torch writes there is let through.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dancegrpo_fast.config import UserError

_DCP = "torch.distributed.checkpoint"
_TABLES = {
    "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
}  # fmt: skip
# Not BytesStorageMetadata: torch unpickles what such an entry names, and a snapshot holds tensors.
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
_ALLOWED = (
    {(f"{_DCP}.metadata", name) for name in _TABLES}
    # Python 3.13 has another module for paths.
    | {(module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS}
    | {("torch", "Size"), ("torch.serialization", "_get_layout")}
    | {(f"{_DCP}.filesystem", "_StorageInfo")}
)


class _Tables(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class Reader(dcp.FileSystemReader):
    """torch's reader, for folders that nobody vouches for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of the folder.

        Raises:
            UserError: It is none, or names something that torch does not write there.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                found = _Tables(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise UserError(
                f"--resume: {path} is not torch's ({error}): nothing of it was run; take another "
                "snapshot"
            ) from None
        assert isinstance(found, Metadata)
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id  # As torch's own does with what it unpickled.
        return found
