"""Shards: immutable, checksummed, memory-mapped columns in Arrow files, written completely or not
at all.

A folder of shards holds `plan.json`, which fixes what every shard is made from, one file for each
shard and, once all are there, `index.json`:

    plan.json  shard-00000-of-00004.arrow  shard-00001-of-00004.arrow  ...  index.json

A shard is an Arrow IPC file with one record batch. Its schema holds a JSON header and two SHA-256:

    frame     header, column names and types, number of rows       compared whenever it is opened
    values    the frame's checksum and all values                  compared once in a process

A shard appears by a single rename, and a flipped bit anywhere is found. Any Arrow reader (pyarrow,
Polars, DuckDB, HF datasets) opens the files.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from cm3leon.io import (
    atomic,
    digest_of,
    digest_of_parts,
    partial_name,
    read_json,
    state_of,
    write_json,
)
from cm3leon.permissions import check_readable
from cm3leon.types import UserError

T = TypeVar("T")

PLAN, INDEX = "plan.json", "index.json"
ABANDONED_AFTER = 86_400
"""Seconds without a change after which another host's partial file counts as abandoned."""
_HEADER, _FRAME, _CHECKSUM = b"cm3leon.header", b"cm3leon.frame_sha256", b"cm3leon.sha256"
_verified: set[tuple[int, ...]] = set()


class DamagedShard(UserError):
    """A shard that differs from what was written; the message names the file."""


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
        """A column of lists as views: all values one after the other, and the M + 1 offsets at
        which the lists begin."""
        column = self.columns[name]
        return column.values.to_numpy(), column.offsets.to_numpy()

    def strings(self, name: str) -> list[str]:
        """A column of strings."""
        return self.columns[name].to_pylist()

    def utf8(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of large strings as views: all bytes one after the other, and the M + 1 offsets
        at which the strings begin."""
        _, begins, content = self.columns[name].buffers()
        return np.frombuffer(content or b"", np.uint8), np.frombuffer(
            begins, np.int64, len(self) + 1
        )


def shard_path(folder: Path, number: int, count: int) -> Path:
    """The file of shard `number` (from 0) of `count`."""
    return folder / f"shard-{number:05d}-of-{count:05d}.arrow"


def write_shard(path: Path, columns: Mapping[str, pa.Array], header: Mapping[str, Any]) -> None:
    """Write a shard under a name of this process, then rename it: nobody ever sees half of one.

    Two writers of the same shard do no harm: the last rename wins, and both wrote the same bytes.

    Raises:
        OSError: for a full disk, on which no file is left behind.
    """
    content = json.dumps(header, sort_keys=True)
    given = pa.record_batch(list(columns.values()), names=list(columns))

    # Serializing first brings the buffers into the form in which they will be read: a slice is cut
    # to the part it shows, and a bitmap without nulls is dropped. The checksum is over these.
    batch = pa.ipc.read_record_batch(given.serialize(), given.schema)
    frame = _frame_checksum(content, batch)
    metadata = {_HEADER: content, _FRAME: frame, _CHECKSUM: _checksum(frame, batch)}
    schema = batch.schema.with_metadata(metadata)

    with (
        atomic(path, shared=True, sync=True) as partial,
        partial.open("wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        writer.write_batch(batch.replace_schema_metadata(metadata))


def open_shard(path: Path, *, verify: bool = True, scattered: bool = False) -> Shard:
    """Map a shard into memory. `verify` also reads it, once in a process, to compare its checksum.

    Without `verify` only its frame is checked: header, names, types and rows.

    Args:
        scattered: a few rows here and there will be read. The system then reads only their pages,
            whereas it otherwise reads ahead around each, up to megabytes for a row of kilobytes.

    Raises:
        DamagedShard: for a missing, cut or changed file.
        UserError: for a file that this user may not read.
        OSError: if the system refuses to map it (a failing disk, too many open files or maps).
    """
    check_readable(path)
    try:
        state = state_of(path)
        mapped = pa.memory_map(str(path)).read_buffer()
    except FileNotFoundError as error:
        raise DamagedShard(f"{path} is missing; make the shard again") from error

    try:
        batch = pa.ipc.open_file(pa.BufferReader(mapped)).get_batch(0)
        batch.validate()
        metadata = {key: value.decode() for key, value in (batch.schema.metadata or {}).items()}
        content, frame = metadata[_HEADER], metadata[_FRAME]

        # The values take long to read, so an unchanged file is read only once.
        intact = _frame_checksum(content, batch) == frame
        unread = verify and state not in _verified
        intact = intact and (not unread or _checksum(frame, batch) == metadata[_CHECKSUM])
        header = json.loads(content)

    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise DamagedShard(
            f"{path} cannot be read as a shard ({error}); delete it and make it again"
        ) from error
    if not intact:
        raise DamagedShard(
            f"{path} is damaged: its checksum does not match; delete it and make it again"
        )
    if verify and state is not None:
        _verified.add(state)
    if scattered:
        _do_not_read_ahead(mapped)
    return Shard(path, header, dict(zip(batch.schema.names, batch.columns, strict=True)))


@cache
def _madvise() -> Any:
    """The function of the C library, looked up once, since shards may be opened again and again."""
    return ctypes.CDLL(None).madvise


def _do_not_read_ahead(mapped: pa.Buffer) -> None:
    """Tell the system that a mapped file is read here and there; not all systems heed it."""
    if hasattr(mmap, "MADV_RANDOM"):
        _madvise()(ctypes.c_void_p(mapped.address), ctypes.c_size_t(mapped.size), mmap.MADV_RANDOM)


def _frame_checksum(content: str, batch: pa.RecordBatch) -> str:
    """Checksum of all but the values: the header, and the columns' names, types and rows."""
    frame = [content, [[field.name, str(field.type)] for field in batch.schema], batch.num_rows]
    return digest_of(json.dumps(frame))


def _checksum(frame: str, batch: pa.RecordBatch) -> str:
    """Checksum of the frame and all values."""
    buffers = (buffer for column in batch.columns for buffer in column.buffers())
    return digest_of_parts([frame, *(buffer for buffer in buffers if buffer is not None)])


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Fix what a folder's shards are made from. Every worker calls this with the same plan, and the
    first one writes it.

    Raises:
        UserError: if the folder belongs to another plan, naming the first entry that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    text = json.dumps(plan, indent=2, sort_keys=True)
    partial = partial_name(path)
    try:
        partial.write_text(text)
        os.link(partial, path)  # fails if another worker was first, unlike a rename
    except FileExistsError:
        there = read_plan(folder)
        wanted = json.loads(text)
        # Another worker wrote the same plan, or the folder belongs to another run.
        for key in sorted({*there, *wanted}):
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"{folder} was begun with another {key}: {_short(there.get(key))} instead of "
                    f"{_short(wanted.get(key))}; choose another folder, or delete this one"
                ) from None
    finally:
        partial.unlink(missing_ok=True)


def read_plan(folder: Path) -> dict[str, Any]:
    """Read the plan of a folder of shards. Raises UserError without one."""
    try:
        return read_json(folder / PLAN)
    except UserError as error:
        raise UserError(f"{folder} holds no shards: its {PLAN} is missing or unreadable") from error


def _short(value: Any) -> str:
    """A value as JSON, cut off if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def make_missing(
    folder: Path, count: int, make: Callable[[int], None], *, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, bool]]:
    """Make those shards of this worker that do not exist yet. Yields the number of each shard, and
    whether it was made now.

    Partial files of killed writers are removed first.

    Args:
        count: number of shards in the folder.
        make: writes the shard of a given number.
        part: (worker, workers); worker w of n makes the shards w, w + n, w + 2n ...
    """
    for file in folder.glob(".*.partial"):
        if _is_abandoned(file):
            file.unlink(missing_ok=True)

    for number in range(part[0], count, part[1]):
        missing = not shard_path(folder, number, count).is_file()
        if missing:
            make(number)
        yield number, missing


def _is_abandoned(partial: Path) -> bool:
    """Whether the writer of a partial file is dead: on this host by its process, on another after a
    day."""
    process = partial.name.removesuffix(".partial").rpartition(f".{socket.gethostname()}-")[2]
    try:
        if not process.isdecimal():
            return partial.stat().st_mtime < time.time() - ABANDONED_AFTER
        os.kill(int(process), 0)  # sends nothing, but fails if there is no such process
    except ProcessLookupError:
        return True
    except (FileNotFoundError, PermissionError):
        # The writer has renamed it meanwhile, or is alive as another user.
        return False
    return False


def finish(
    folder: Path, count: int, summary: Callable[[Shard], Mapping[str, Any]] = lambda shard: {}
) -> None:
    """Check that all `count` shards exist and are intact, and write index.json with their numbers
    of rows.

    Args:
        summary: further entries about each shard, by key.

    Raises:
        DamagedShard: naming the first shard that is missing or damaged.
    """
    entries = []
    for number in range(count):
        shard = open_shard(shard_path(folder, number, count))
        entries.append({"rows": len(shard), **summary(shard)})
    content = {key: [entry[key] for entry in entries] for key in entries[0]} if entries else {}
    write_json(folder / INDEX, content, indent=None, shared=True)


@cache
def most_open() -> int:
    """How many shards of a folder stay mapped. Linux grants a process a number of maps, and a run
    reads several folders.

    A mapped shard keeps no file open, so the limit on open files does not matter.
    """
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        most = 65_530  # Linux's default; other systems have no limit
    return most // 8


class ShardFolder(Generic[T]):
    """The rows of a finished folder of shards, numbered from 0 in the order of shards and rows.

    Only 16 bytes per shard and the maps of the shards in use are held; the rest is left to the page
    cache.

    Args:
        columns: returns the views of a shard that are read.
        verify: compare each shard's checksum when it is first opened. Rows that have a checksum of
            their own do without.
        scattered: rows are read in any order, see `open_shard`.

    Raises:
        UserError: for a folder that is not finished.
    """

    def __init__(
        self,
        folder: Path,
        columns: Callable[[Shard], T],
        *,
        verify: bool = False,
        scattered: bool = False,
    ) -> None:
        self.folder = folder
        self._verify, self._scattered = verify, scattered
        check_readable(folder / INDEX)
        try:
            self.index = read_json(folder / INDEX, {"rows": [int]})
            self.rows = np.array(self.index["rows"], np.int64)
        except (UserError, OverflowError) as error:
            raise UserError(
                f"{folder} is not a finished folder of shards: {INDEX} is missing or unreadable"
            ) from error
        self.ends = np.cumsum(self.rows)
        self._columns = columns
        self._most_open = most_open()
        self._open: OrderedDict[int, T] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def path(self, number: int) -> Path:
        """The file of shard `number`."""
        return shard_path(self.folder, number, len(self.rows))

    def first(self, number: int) -> int:
        """The first row of shard `number`."""
        return int(self.ends[number] - self.rows[number])

    def shard(self, number: int) -> T:
        """The views of shard `number`, mapped. Raises DamagedShard if it is missing, or differs
        from index.json."""
        columns = self._open.get(number)
        if columns is None:
            # The map that has been open the longest makes room.
            columns = self._open[number] = self._map(number, scattered=self._scattered)
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return columns

    def whole(self, number: int) -> T:
        """The views of shard `number` by a map of their own, to be read from front to back. Raises
        DamagedShard as `shard` does."""
        return self._map(number, scattered=False)

    def _map(self, number: int, *, scattered: bool) -> T:
        """Open a shard, and compare its rows with index.json."""
        shard = open_shard(self.path(number), verify=self._verify, scattered=scattered)
        if len(shard) != self.rows[number]:
            raise DamagedShard(
                f"{shard.path} has {len(shard)} rows, {INDEX} says {self.rows[number]}; make it "
                "again"
            )
        return self._columns(shard)

    @property
    def all_stay_mapped(self) -> bool:
        """Whether this process has maps for all shards, so that each is opened only once, whatever
        the order of the rows."""
        return len(self.rows) <= self._most_open

    def locate(self, row: int) -> tuple[int, int]:
        """The shard of a row, and the row's index in it. Raises IndexError for a row that does not
        exist."""
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {row}: {self.folder} has {len(self)}")
        number = int(np.searchsorted(self.ends, row, side="right"))
        return number, row - self.first(number)

    def by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Go through rows (Q,), given in any order, shard by shard.

        Yields:
            The shard's number, the indices in `rows` of its rows, and those rows counted from the
            shard's first.

        Raises:
            IndexError: for a row that does not exist.
        """
        order = np.argsort(rows, kind="stable")
        if len(rows) and not (rows[order[0]] >= 0 and rows[order[-1]] < len(self)):
            raise IndexError(
                f"rows {rows[order[0]]} to {rows[order[-1]]} are not all there: {self.folder} has "
                f"{len(self)}"
            )

        # Sorted, the rows of a shard lie together, from begins[number] to begins[number + 1].
        begins = np.searchsorted(rows[order], np.concatenate([[0], self.ends]))
        for number in np.flatnonzero(np.diff(begins)).tolist():
            places = order[begins[number] : begins[number + 1]]
            yield number, places, rows[places] - self.first(number)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # maps do not travel to other processes
