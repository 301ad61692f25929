"""Documents of ids in shards: read at random, in any order, each checked as it is read."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cm3leon.data.corpus import Split
from cm3leon.data.shards import DamagedShard, Shard, open_shard, read_plan, replace_json, shard_path, write_shard
from cm3leon.types import TokenDocument, TokenSegment, UserError

INDEX = "index.json"
OPEN_SHARDS = 512
"""Shards that are mapped at a time: far below the usual limit of 1,024 open files."""


@dataclass(frozen=True)
class Tokenizers:
    """What made the ids: digests of the two tokenizers, and the sizes of the vocabulary's ranges."""

    text: str
    image: str
    text_size: int
    image_size: int
    sentinels: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """16 bits an id where all ids fit, 32 bits otherwise."""
        return np.uint16 if self.text_size + self.image_size + self.sentinels <= 1 << 16 else np.uint32


def split_of_id(id_: str, *, validation: float, held_out: float) -> Split:
    """The split of a document by the SHA-256 of its id, whatever else the corpus holds."""
    place = int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") / 2**64
    if place < held_out:
        return "held_out"
    return "validation" if place < held_out + validation else "train"


def write_token_shard(path: Path, documents: Sequence[TokenDocument], tokenizers: Tokenizers) -> None:
    """Writes a shard of documents.

    Its columns are `id`, `ids` (all segments one after the other, without breaks), `lengths` (of the segments), `image`
    (1 for a segment of image codes) and `crc` (CRC-32 over the bytes of the three).
    """
    ids = [_concatenated([s.ids_T for s in document.segments], tokenizers.dtype) for document in documents]
    lengths = [np.array([len(s.ids_T) for s in document.segments], np.uint32) for document in documents]
    image = [np.array([s.modality == "image" for s in document.segments], np.uint8) for document in documents]
    crc = [_crc(*columns) for columns in zip(ids, lengths, image, strict=True)]
    columns = {
        "id": pa.array([document.id for document in documents], pa.large_string()),
        "ids": _list_array(ids, tokenizers.dtype),
        "lengths": _list_array(lengths, np.uint32),
        "image": _list_array(image, np.uint8),
        "crc": pa.array(np.array(crc, np.uint32)),
    }
    write_shard(path, columns, asdict(tokenizers))


def _concatenated(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)


def _list_array(rows: Sequence[np.ndarray], dtype: type) -> pa.Array:
    offsets = np.cumsum([0, *map(len, rows)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(_concatenated(rows, dtype)))


def _crc(ids_T: np.ndarray, lengths: np.ndarray, image: np.ndarray) -> int:
    return zlib.crc32(image.tobytes(), zlib.crc32(lengths.tobytes(), zlib.crc32(ids_T.tobytes())))


def finish(folder: Path, count: int) -> None:
    """Checks that all `count` shards are there and whole, and writes down how many documents and tokens each has.

    Raises:
        DamagedShard: naming the first shard that is missing or not as it was written.
    """
    rows, tokens = [], []
    for path in _paths(folder, count):
        shard = open_shard(path)
        rows.append(len(shard))
        tokens.append(len(shard.lists("ids")[0]))
    replace_json(folder / INDEX, {"rows": rows, "tokens": tokens})


def _paths(folder: Path, count: int) -> list[Path]:
    return [shard_path(folder, number, count) for number in range(count)]


class TokenShards:
    """The documents of a finished folder of shards, numbered from 0 in order of shards and rows.

    Resident are only 8 bytes a shard and the maps of the shards in use; the rest is in the page cache.

    Raises:
        UserError: for an unfinished folder, or tokenizers other than `expect`, naming what differs.
    """

    def __init__(self, folder: Path, expect: Tokenizers | None = None) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} is no finished folder of token shards: {INDEX} is missing or unreadable"
            ) from error
        self.rows = np.array(index["rows"], np.int64)
        self.tokens = int(sum(index["tokens"]))
        self._ends = np.cumsum(self.rows)
        self._paths = _paths(folder, len(self.rows))
        self._open: OrderedDict[int, _Columns] = OrderedDict()
        made_by = read_plan(folder)["tokenizers"]
        for name, wanted in asdict(expect).items() if expect else ():
            if made_by[name] != wanted:
                raise UserError(
                    f"{folder} was made by another tokenizer: {name} is {made_by[name]} there and {wanted} here; "
                    "use that run's tokenizers, or make the shards again"
                )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def document(self, number: int) -> TokenDocument:
        """One document. Raises DamagedShard, naming it, if its bytes are not as they were written."""
        columns, row = self._locate(number)
        ids_T = columns.ids[columns.ids_at[row] : columns.ids_at[row + 1]]
        first, last = columns.lengths_at[row], columns.lengths_at[row + 1]
        lengths, image = columns.lengths[first:last], columns.image[first:last]
        if _crc(ids_T, lengths, image) != columns.crc[row]:
            raise DamagedShard(
                f"{columns.shard.path}: document {row} is damaged, its checksum does not match; "
                "delete the file and make it again"
            )
        ends = np.cumsum(lengths)
        segments = tuple(
            TokenSegment("image" if is_image else "text", ids_T[end - length : end].astype(np.int64))
            for end, length, is_image in zip(ends.tolist(), lengths.tolist(), image.tolist(), strict=True)
        )
        return TokenDocument(columns.shard.columns["id"][row].as_py(), segments)

    def __iter__(self) -> Iterator[TokenDocument]:
        return (self.document(number) for number in range(len(self)))

    def _locate(self, number: int) -> tuple[_Columns, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no document {number}: {self.folder} has {len(self)}")
        place = int(np.searchsorted(self._ends, number, side="right"))
        columns = self._open.get(place)
        if columns is None:
            columns = self._open[place] = _Columns(open_shard(self._paths[place], verify=False))
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return columns, number - int(self._ends[place] - self.rows[place])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # maps do not travel to other processes


class _Columns:
    """The columns of an open shard as numpy views."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.ids, self.ids_at = shard.lists("ids")
        self.lengths, self.lengths_at = shard.lists("lengths")
        self.image = shard.lists("image")[0]
        self.crc = shard.numbers("crc")
