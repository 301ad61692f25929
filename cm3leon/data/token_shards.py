"""Documents of ids in shards: read at random, in any order, each checked as it is read.

A shard holds its documents one after the other. Here are two: a caption of 3 ids with an image of
4, and an image of 4 alone:

    row          0                       1
    ids          a red dog I7 I2 I9 I4   I5 I1 I1 I8        without breaks, in the smallest type
    lengths      3 4                     4                  of the segments
    image        0 1                     1                  + 2 if joined, + 4 * index of the role
    label        -1                      3                  only if a document has one
    varied       I7 I3 I9 I4 ...         I5 I1 I2 I8 ...    only with varied versions of images
    crc          of all of the above and the id             compared when the row is read
"""

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
    """The tokenizers that made the ids: their digests, and the sizes of the vocabulary's ranges."""

    text: str
    image: str
    text_size: int
    image_size: int
    sentinels: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The type in which ids are stored."""
        return Vocab(self.text_size, self.image_size, self.sentinels).id_dtype


def write_token_shard(
    path: Path,
    documents: Sequence[TokenDocument],
    tokenizers: Tokenizers,
    *,
    varied: Sequence[np.ndarray] | None = None,
) -> None:
    """Write a shard of documents.

    Its columns are `id`, `ids` (of all segments in a row, without breaks), `lengths` (of the
    segments), `image` (1 for a segment of image codes, plus 2 for a joined one, plus 4 times the
    index of its role), `label` if any document has one (-1 for those without), `varied` if it is
    given, and `crc` (CRC-32 over the bytes of all other columns).

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

    # Columns that say nothing are left out, and do not count in the checksum.
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
    """A segment's modality, joining and role as one number."""
    return (
        (segment.modality == "image") + JOINED * segment.joined + ROLE * ROLES.index(segment.role)
    )


def _concatenated(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """All values as one array of a type that must hold them."""
    values = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    assert values.max(initial=0) <= np.iinfo(dtype).max, "an id of no tokenizer named"
    return values.astype(dtype, copy=False)


def _list_array(rows: Sequence[np.ndarray], dtype: type) -> pa.Array:
    """A column of lists."""
    offsets = np.cumsum([0, *map(len, rows)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(_concatenated(rows, dtype)))


def _crc(*contents: Any) -> int:
    """The checksum over several buffers."""
    value = 0
    for content in contents:
        value = zlib.crc32(content, value)
    return value


def finish_tokens(folder: Path, count: int, layout: Layout = PAPER) -> None:
    """Check all shards, and write the index with each one's tokens and its longest document.

    Args:
        layout: the tokens around and between segments, which count in a document's length.

    Raises:
        DamagedShard: naming the first shard that is missing or damaged.
    """

    def summary(shard: Shard) -> dict[str, int]:
        counts = TokenShard(shard, layout).token_counts(np.arange(len(shard)))
        return {"tokens": len(shard.lists("ids")[0]), "longest": int(counts.max(initial=0))}

    finish(folder, count, summary)


def _beside(kind: np.ndarray, layout: Layout, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Count the tokens around and before each of a shard's segments.

    Args:
        kind: of each segment, as in the column `image`.
        ids: of all segments in a row; only read if the number of tokens around an image depends on
            its size.
        lengths: of each segment.
    """
    before = np.where(kind & JOINED, 0, len(layout.between_segments))
    around = layout.around_any_image
    if around is not None:
        return before + np.where(kind & 1, around, 0)

    # The number depends on the image's size, which its ids tell.
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    for segment in np.flatnonzero(kind & 1):
        grid = layout.grid_of(ids[starts[segment] : starts[segment + 1]])
        before[segment] += layout.around_image(grid)
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
        """Tokens around and before all segments in front of each; computed once lengths are asked
        for."""
        return np.concatenate(
            [[0], np.cumsum(_beside(self._image, self._layout, self._ids, self._lengths))]
        )

    def __len__(self) -> int:
        return len(self._crc)

    def id(self, row: int) -> str:
        """The id of a document, without comparing its checksum."""
        return self._id[self._id_at[row] : self._id_at[row + 1]].tobytes().decode()

    def document(self, row: int, version: int = 0) -> TokenDocument:
        """Read a document. Raises DamagedShard, naming it, if its bytes have changed.

        Args:
            version: 0 for the document itself, or the number of a varied version of its images.
        """
        id_ = self._id[self._id_at[row] : self._id_at[row + 1]].tobytes()
        ids_T = self._ids[self._ids_at[row] : self._ids_at[row + 1]]
        first, last = self._lengths_at[row], self._lengths_at[row + 1]
        lengths, image = self._lengths[first:last], self._image[first:last]
        checked: list[Any] = [id_, ids_T, lengths, image]

        # The columns that are there only if something needs them.
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

        # A varied version has other image codes in the same positions.
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
        """Labels of documents, -1 for those without; checksums are not compared."""
        return np.full(len(rows), NO_LABEL) if self._label is None else self._label[rows]

    def token_counts(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of tokens of documents, breaks between segments included. Neither are their ids
        read nor their checksums compared."""
        first, last = self._lengths_at[rows], self._lengths_at[rows + 1]
        beside = self._beside_before[last] - self._beside_before[first]
        # Nothing stands before the first segment.
        beside -= np.where(last > first, len(self._layout.between_segments), 0)
        return self._ids_at[rows + 1] - self._ids_at[rows] + beside


class TokenShards:
    """The documents of a finished folder of token shards, numbered from 0 in the order of shards
    and rows.

    Raises:
        UserError: for an unfinished folder, and for tokenizers other than `expect`.
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
        """Varied versions of each document, besides the document itself."""
        self.shared_maps: str | None = plan.get("shared_maps")
        """Equal for folders in which versions of the same number are made by the same map; None =
        each image has maps of its own."""
        for name, wanted in asdict(expect).items() if expect else ():
            if self._made_by[name] != wanted:
                raise UserError(
                    f"{folder} was made by other tokenizers: {name} is {self._made_by[name]} "
                    f"there and {wanted} here; use that run's tokenizers, or make the shards again"
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
        """Read a document, see `TokenShard.document`."""
        shard, row = self._shards.locate(number)
        return self._shards.shard(shard).document(row, version)

    def drawn(self, number: int, rng: np.random.Generator) -> TokenDocument:
        """Read a document in a version that is drawn, if it has several."""
        return self.document(number, self.drawn_version(rng))

    def drawn_version(self, rng: np.random.Generator) -> int:
        """Draw the number of a version, 0 for the document itself; nothing is drawn if that is the
        only one."""
        return int(rng.integers(self.versions + 1)) if self.versions else 0

    def shard(self, number: int) -> TokenShard:
        """The documents of one shard."""
        return self._shards.shard(number)

    def first(self, number: int) -> int:
        """The number of the first document of a shard."""
        return self._shards.first(number)

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """The labels (Q,) of documents `numbers` (Q,), in any order; -1 for those without."""
        labels = np.full(len(numbers), NO_LABEL)
        for shard, places, rows in self._shards.by_shard(numbers):
            labels[places] = self._shards.shard(shard).labels(rows)
        return labels

    def token_counts(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers of tokens (Q,) of documents `numbers` (Q,), in any order, breaks between
        segments included.

        Only the positions at which documents begin are read, not their ids, so that no checksum is
        compared.

        Raises:
            IndexError: for a document that does not exist.
        """
        counts = np.zeros(len(numbers), np.int64)
        for shard, places, rows in self._shards.by_shard(numbers):
            counts[places] = self._shards.shard(shard).token_counts(rows)
        return counts

    def __iter__(self) -> Iterator[TokenDocument]:
        return (self.document(number) for number in range(len(self)))
