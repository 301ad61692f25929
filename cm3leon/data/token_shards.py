"""Documents of ids in shards: read at random, in any order, each checked as it is read."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3leon.data.shards import DamagedShard, Shard, ShardFolder, finish, read_plan, write_shard
from cm3leon.tokenizers.layout import PAPER, Layout
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Role, TokenDocument, TokenSegment, UserError

JOINED, ROLE = 2, 4
ROLES: tuple[Role, ...] = ("", "answer", "instruction", "condition")
NO_LABEL = -1


@dataclass(frozen=True)
class Tokenizers:
    """What made the ids: digests of the two tokenizers, and the sizes of the vocabulary's
    ranges."""

    text: str
    image: str
    text_size: int
    image_size: int
    sentinels: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """What ids are stored as."""
        return Vocab(self.text_size, self.image_size, self.sentinels).id_dtype


def write_token_shard(
    path: Path,
    documents: Sequence[TokenDocument],
    tokenizers: Tokenizers,
    *,
    varied: Sequence[np.ndarray] | None = None,
) -> None:
    """Writes a shard of documents.

    Its columns are `id`, `ids` (all segments one after the other, without breaks), `lengths` (of
    the segments), `image` (1 for a segment of image codes, 2 added for a joined one, and 4 times
    the number of its role), `label` if any document has one (-1 for those without), `varied` if it
    is given, and `crc` (CRC-32 over the bytes of all others).

    Args:
        varied: for each document the ids of its images in each varied version (V, N), see
            `TokenShard.document`.
    """
    ids = [
        _concatenated([s.ids_T for s in document.segments], tokenizers.dtype)
        for document in documents
    ]
    lengths = [
        np.array([len(s.ids_T) for s in document.segments], np.uint32) for document in documents
    ]
    image = [np.array([_kind(s) for s in document.segments], np.uint8) for document in documents]
    names = [document.id.encode() for document in documents]
    checked: list[Iterable[Any]] = [names, ids, lengths, image]
    columns = {
        "id": pa.array([document.id for document in documents], pa.large_string()),
        "ids": _list_array(ids, tokenizers.dtype),
        "lengths": _list_array(lengths, np.uint32),
        "image": _list_array(image, np.uint8),
    }
    labels = [NO_LABEL if d.label is None else d.label for d in documents]
    if any(label != NO_LABEL for label in labels):
        columns["label"] = pa.array(np.array(labels, np.int32))
        checked.append(np.array(labels, np.int32)[:, None])
    if varied is not None:
        flat = [_concatenated([ids_VN.ravel()], tokenizers.dtype) for ids_VN in varied]
        columns["varied"] = _list_array(flat, tokenizers.dtype)
        checked.append(flat)

    crc = [_crc(*of_document) for of_document in zip(*checked, strict=True)]
    columns["crc"] = pa.array(np.array(crc, np.uint32))
    write_shard(path, columns, asdict(tokenizers))


def _kind(segment: TokenSegment) -> int:
    return (
        (segment.modality == "image") + JOINED * segment.joined + ROLE * ROLES.index(segment.role)
    )


def _concatenated(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    values = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    assert values.max(initial=0) <= np.iinfo(dtype).max, "an id of no tokenizer named"
    return values.astype(dtype, copy=False)


def _list_array(rows: Sequence[np.ndarray], dtype: type) -> pa.Array:
    offsets = np.cumsum([0, *map(len, rows)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(_concatenated(rows, dtype)))


def _crc(*contents: Any) -> int:
    value = 0
    for content in contents:
        value = zlib.crc32(content, value)
    return value


def finish_tokens(folder: Path, count: int, layout: Layout = PAPER) -> None:
    """Checks all shards, and writes down how many documents and tokens each has, and its longest
    document.

    Args:
        layout: what stands around and between the segments, which counts in a document's length.

    Raises:
        DamagedShard: naming the first shard that is missing or not as it was written.
    """

    def summary(shard: Shard) -> dict[str, int]:
        counts = TokenShard(shard, layout).token_counts(np.arange(len(shard)))
        return {"tokens": len(shard.lists("ids")[0]), "longest": int(counts.max(initial=0))}

    finish(folder, count, summary)


def _beside(kind: np.ndarray, layout: Layout, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens around and before each of a shard's segments.

    Args:
        kind: of each segment.
        ids: of all segments, one after the other; read where sizes are written in unequal numbers
            of tokens.
        lengths: of each segment.
    """
    before = np.where(kind & JOINED, 0, len(layout.between_segments))
    around = layout.around_any_image
    if around is not None:
        return before + np.where(kind & 1, around, 0)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    for place in np.flatnonzero(kind & 1):
        grid = layout.grid_of(ids[starts[place] : starts[place + 1]])
        before[place] += layout.around_image(grid)
    return before


class TokenShard:
    """The documents of an open shard."""

    def __init__(self, shard: Shard, layout: Layout = PAPER) -> None:
        self.path = shard.path
        self._id, self._id_at = shard.utf8("id")
        self._ids, self._ids_at = shard.lists("ids")
        self._lengths, self._lengths_at = shard.lists("lengths")
        self._image = shard.lists("image")[0]
        self._crc = shard.numbers("crc")
        self._layout = layout
        self._label = shard.numbers("label") if "label" in shard.columns else None
        self._varied = shard.lists("varied") if "varied" in shard.columns else None

    @cached_property
    def _beside_before(self) -> np.ndarray:
        """Tokens around and before the segments in front of each place; made where lengths are
        asked for alone."""
        return np.concatenate(
            [[0], np.cumsum(_beside(self._image, self._layout, self._ids, self._lengths))]
        )

    def __len__(self) -> int:
        return len(self._crc)

    def id(self, row: int) -> str:
        """The id of a document, which is not checked."""
        return self._id[self._id_at[row] : self._id_at[row + 1]].tobytes().decode()

    def document(self, row: int, version: int = 0) -> TokenDocument:
        """One document. Raises DamagedShard, naming it, if its bytes are not as they were written.

        Args:
            version: 0 for the document as it is, or the number of a varied version of its images.
        """
        id_ = self._id[self._id_at[row] : self._id_at[row + 1]].tobytes()
        ids_T = self._ids[self._ids_at[row] : self._ids_at[row + 1]]
        first, last = self._lengths_at[row], self._lengths_at[row + 1]
        lengths, image = self._lengths[first:last], self._image[first:last]
        checked: list[Any] = [id_, ids_T, lengths, image]
        label = None
        if self._label is not None:
            checked.append(self._label[row : row + 1])
            label = int(self._label[row])
        varied = ids_T[:0]
        if self._varied is not None:
            values, begins = self._varied
            varied = values[begins[row] : begins[row + 1]]
            checked.append(varied)
        if _crc(*checked) != self._crc[row]:
            raise DamagedShard(
                f"{self.path}: document {row} is damaged, its checksum does not match; "
                "delete the file and make it again"
            )

        if version and len(varied):
            is_image_T = np.repeat(image & 1, lengths).astype(bool)
            ids_T = ids_T.copy()
            ids_T[is_image_T] = varied.reshape(-1, is_image_T.sum())[version - 1]
        ends = np.cumsum(lengths)
        segments = tuple(
            TokenSegment(
                "image" if kind & 1 else "text",
                ids_T[end - length : end].astype(np.int64),
                ROLES[kind // ROLE],
                bool(kind & JOINED),
            )
            for end, length, kind in zip(
                ends.tolist(), lengths.tolist(), image.tolist(), strict=True
            )
        )
        return TokenDocument(id_.decode(), segments, None if label == NO_LABEL else label)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Labels of documents, -1 for those without; they are not checked."""
        return np.full(len(rows), NO_LABEL) if self._label is None else self._label[rows]

    def token_counts(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of documents, breaks between segments included; their ids are neither read nor
        checked."""
        first, last = self._lengths_at[rows], self._lengths_at[rows + 1]
        beside = self._beside_before[last] - self._beside_before[first]
        # Nothing stands before the first segment.
        beside -= np.where(last > first, len(self._layout.between_segments), 0)
        return self._ids_at[rows + 1] - self._ids_at[rows] + beside


class TokenShards:
    """The documents of a finished folder of token shards, numbered from 0 in order of shards and
    rows.

    Raises:
        UserError: for an unfinished folder, or tokenizers other than `expect`, naming what differs.
    """

    def __init__(
        self, folder: Path, expect: Tokenizers | None = None, layout: Layout = PAPER
    ) -> None:
        self.folder, self._layout = folder, layout
        self._shards = ShardFolder(folder, self._open)
        self.rows = self._shards.rows
        self.tokens = sum(self._shards.index["tokens"])
        self.longest = max(self._shards.index["longest"], default=0)
        plan = read_plan(folder)
        self._made_by = plan["tokenizers"]
        self.versions: int = plan.get("versions", 0)
        """Varied versions of each document, besides itself."""
        self.shared_maps: str | None = plan.get("shared_maps")
        """Equal for folders whose versions of one number are made by the same map; None = each
        image has maps of its own."""
        for name, wanted in asdict(expect).items() if expect else ():
            if self._made_by[name] != wanted:
                raise UserError(
                    f"{folder} was made by other tokenizers: {name} is {self._made_by[name]} there and {wanted} here; "
                    "use that run's tokenizers, or make the shards again"
                )

    def _open(self, shard: Shard) -> TokenShard:
        if shard.header != self._made_by:
            raise DamagedShard(
                f"{shard.path} was made by other tokenizers than its folder; make it again"
            )
        return TokenShard(shard, self._layout)

    def __len__(self) -> int:
        return len(self._shards)

    def document(self, number: int, version: int = 0) -> TokenDocument:
        """One document, see `TokenShard.document`."""
        place, row = self._shards.locate(number)
        return self._shards.shard(place).document(row, version)

    def drawn(self, number: int, rng: np.random.Generator) -> TokenDocument:
        """One document in a version that is drawn, if it has several."""
        return self.document(number, self.drawn_version(rng))

    def drawn_version(self, rng: np.random.Generator) -> int:
        """The number of a version, 0 for documents as they are; none is drawn if there is one."""
        return int(rng.integers(self.versions + 1)) if self.versions else 0

    def shard(self, number: int) -> TokenShard:
        """The documents of one shard."""
        return self._shards.shard(number)

    def first(self, number: int) -> int:
        """The number of the first document of a shard."""
        return self._shards.first(number)

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """Labels (Q,) of documents `numbers` (Q,), in any order, -1 for those without."""
        labels = np.full(len(numbers), NO_LABEL)
        for shard, places, rows in self._shards.by_shard(numbers):
            labels[places] = self._shards.shard(shard).labels(rows)
        return labels

    def token_counts(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens (Q,) of documents `numbers` (Q,), in any order, breaks between segments included.

        Only where documents begin is read: not their ids, of which the checksum is therefore not
        compared.

        Raises:
            IndexError: for a document that is not there.
        """
        counts = np.zeros(len(numbers), np.int64)
        for shard, places, rows in self._shards.by_shard(numbers):
            counts[places] = self._shards.shard(shard).token_counts(rows)
        return counts

    def __iter__(self) -> Iterator[TokenDocument]:
        return (self.document(number) for number in range(len(self)))
