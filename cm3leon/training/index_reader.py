"""Read the index of a checkpoint's shards, which torch pickles, without running code in it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta

UNREADABLE = (OSError, EOFError, pickle.UnpicklingError)
"""Raised for an index that is missing, cut off or something else."""


class IndexReader(dcp.FileSystemReader):
    """Reads the index of the shards without running code that its pickle may hold.

    It is read in the constructor, as torch 2.9 swallows errors raised when it asks for the index.
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
    """Loads the classes that an index of shards is made of, and no others."""

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
            # Only classes that these modules define, not what they import.
            if module not in self._INDEX or (
                isinstance(found, type) and found.__module__ == module
            ):
                return found
        raise pickle.UnpicklingError(
            f"the index of a checkpoint names {module}.{name}, which is not read"
        )
