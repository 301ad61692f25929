"""Shards: immutable, checksummed, memory-mapped columns in Arrow files, written whole or not at all.

A folder of shards holds `plan.json`, which fixes what every shard is made from, and one file for each shard:

    plan.json  shard-00000-of-00004.arrow  shard-00001-of-00004.arrow  ...

A shard is an Arrow IPC file with one record batch. Its schema carries a JSON header and a SHA-256 over the header and
every column's buffers, so that one rename makes the shard appear, and a flipped bit anywhere is found. Any Arrow reader
(pyarrow, Polars, DuckDB, HF datasets) opens the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3leon.types import UserError

PLAN = "plan.json"
_HEADER, _CHECKSUM = b"cm3leon.header", b"cm3leon.sha256"


class DamagedShard(UserError):
    """A shard that is not as it was written; the message names the file."""


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard: its file, header, and columns (memory-mapped, read only)."""

    path: Path
    header: dict[str, Any]
    columns: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers (M,), or of fixed-size lists (M, size), as a view without a copy."""
        column = self.columns[name]
        if isinstance(column, pa.FixedSizeListArray):
            return column.values.to_numpy().reshape(len(column), column.type.list_size)
        return column.to_numpy()

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of lists as views: all values one after the other, and the M + 1 places where the lists begin."""
        column = self.columns[name]
        return column.values.to_numpy(), column.offsets.to_numpy()

    def strings(self, name: str) -> list[str]:
        """A column of strings."""
        return self.columns[name].to_pylist()


def shard_path(folder: Path, number: int, count: int) -> Path:
    """The file of shard `number` (from 0) of `count`."""
    return folder / f"shard-{number:05d}-of-{count:05d}.arrow"


def write_shard(path: Path, columns: Mapping[str, pa.Array], header: Mapping[str, Any]) -> None:
    """Writes a shard under a name of this process, then renames it: nobody ever sees half of one.

    Two writers of the same shard do no harm: the last rename wins, and both have written the same.
    """
    content = json.dumps(header, sort_keys=True)
    metadata = {_HEADER: content.encode(), _CHECKSUM: _checksum(content, columns.values()).encode()}
    schema = pa.schema([(name, column.type) for name, column in columns.items()], metadata)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_shard(path: Path, *, verify: bool = True) -> Shard:
    """Maps a shard into memory; `verify` reads it once and compares its checksum.

    Raises:
        DamagedShard: for a missing, cut or changed file.
    """
    try:
        batches = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = batches.get_batch(0)
        metadata = batches.schema.metadata or {}
        content, checksum = metadata[_HEADER].decode(), metadata[_CHECKSUM].decode()
        shard = Shard(path, json.loads(content), dict(zip(batch.schema.names, batch.columns, strict=True)))
        intact = not verify or _checksum(content, shard.columns.values()) == checksum
    except FileNotFoundError as error:
        raise DamagedShard(f"{path} is missing; make the shard again") from error
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise DamagedShard(f"{path} is no readable shard ({error}); delete it and make it again") from error
    if not intact:
        raise DamagedShard(f"{path} is damaged: its checksum does not match; delete it and make it again")
    return shard


def _checksum(content: str, columns: Iterable[pa.Array]) -> str:
    digest = hashlib.sha256(content.encode())
    for column in columns:
        for buffer in column.buffers():
            if buffer is not None:
                digest.update(buffer)
    return digest.hexdigest()


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Fixes what the folder's shards are made from; every worker calls it with the same plan, the first one writes.

    Raises:
        UserError: if the folder belongs to another plan, naming the first entry that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    text = json.dumps(plan, indent=2, sort_keys=True)
    partial = folder / f".{PLAN}.{socket.gethostname()}-{os.getpid()}.partial"
    try:
        partial.write_text(text)
        os.link(partial, path)  # fails if another worker was first, unlike a rename
    except FileExistsError:
        there = read_plan(folder)
        wanted = json.loads(text)
        for key in sorted({*there, *wanted}):
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"{folder} was begun with another {key}: {_short(there.get(key))} instead of "
                    f"{_short(wanted.get(key))}; choose another folder, or delete this one"
                ) from None
    finally:
        partial.unlink(missing_ok=True)


def replace_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all, over what is there."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a folder of shards. Raises UserError where there is none."""
    try:
        return json.loads((folder / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no shards: its {PLAN} is missing or unreadable") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def make_missing(
    folder: Path, count: int, make: Callable[[int], None], *, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, bool]]:
    """Makes the shards of this worker that are not there yet; yields each number, and whether it was made now.

    Args:
        count: shards in all.
        make: number -> writes that shard.
        part: this worker's number (from 0) and the number of workers; it has every such shard.
    """
    for number in range(part[0], count, part[1]):
        missing = not shard_path(folder, number, count).is_file()
        if missing:
            make(number)
        yield number, missing
