"""The index of a checkpoint's shards, which torch pickles,
read without running what a pickle might hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta

UNREADABLE = (OSError, EOFError, pickle.UnpicklingError)
"""What is raised for an index that is missing, cut or something else."""


class IndexReader(dcp.FileSystemReader):
    """Reads the index of the shards without running what a pickle might hold.

    At once: torch 2.9 passes over what goes wrong when it asks for the index.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with (path / ".metadata").open("rb") as file:
            self._index = IndexUnpickler(file).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata = self._index
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index of shards, and no other."""

    _PLAIN = frozenset(
        (
            ("pathlib", "Path"),
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
        )
    )
    _INDEX = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self._PLAIN or module in self._INDEX:
            found = super().find_class(module, name)
            if module not in self._INDEX or (
                isinstance(found, type) and found.__module__ == module
            ):
                return found
        raise pickle.UnpicklingError(
            f"the index of a checkpoint names {module}.{name}, which is not read"
        )
