"""Decoded texts and images of a part, kept on disk for whoever reads the same part next.

A file is an Arrow stream of a part's documents, in order:

    id       string
    text     string
    image    size * size * 3 bytes, or null for a document without one
    crc      checksum of text and image

Its last batch is empty: a file without one was cut off. The file is a cache and may be deleted at
any time; the images are then decoded again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from cm3leon.data.shards import DamagedShard
from cm3leon.io import partial_name
from cm3leon.types import Document, ImageSegment, TextSegment

Keep = Callable[[Sequence[Document]], None]


def kept_file(folder: Path, number: int, count: int) -> Path:
    """The file of part `number` (from 0) of `count`."""
    return folder / f"part-{number:05d}-of-{count:05d}.arrows"


@contextmanager
def keeping(path: Path, *, size: int, limit: int) -> Iterator[Keep]:
    """Yield a function that keeps the next documents of a part; the file appears once the block has
    ended without an error.

    All text of a document is kept, and its first image, which must be (size, size, 3). There is no
    file if it would be longer than `limit` bytes, or if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file has another name until it is complete.
    partial = partial_name(path)
    schema = pa.schema(
        {
            "id": pa.large_string(),
            "text": pa.large_string(),
            "image": pa.binary(size * size * 3),
            "crc": pa.uint32(),
        }
    )

    fits = limit > 0
    try:
        with partial.open("wb", buffering=0) as file:
            writer = pa.ipc.new_stream(file, schema)

            def write(documents: Sequence[Document], *, last: bool = False) -> None:
                """Append a batch; if it does not fit, give the disk its space back."""
                nonlocal fits
                try:
                    writer.write_batch(_batch(documents, schema))
                    if last:
                        writer.close()
                    fits = file.tell() <= limit
                except OSError:
                    fits = False
                if not fits:
                    file.truncate(0)

            def keep(documents: Sequence[Document]) -> None:
                if fits and documents:
                    write(documents)

            yield keep
            if fits:
                write((), last=True)
        if fits:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _batch(documents: Sequence[Document], schema: pa.Schema) -> pa.RecordBatch:
    rows = []
    for document in documents:
        text, pixels_HWC = document.text, document.image
        image = None if pixels_HWC is None else pixels_HWC.tobytes()
        rows.append({"id": document.id, "text": text, "image": image, "crc": _crc(text, image)})
    return pa.RecordBatch.from_pylist(rows, schema)


def kept_documents(path: Path) -> Iterator[Document] | None:
    """Read the documents of a file, each with its text as one run and its first image; None without
    the file.

    The file is open when this returns, and may be deleted from then on.

    Raises:
        DamagedShard: for a file that was changed or cut off; also while the documents are read.
    """
    try:
        return _read(pa.memory_map(str(path)), path)
    except FileNotFoundError:
        return None


def _read(file: pa.MemoryMappedFile, path: Path) -> Iterator[Document]:
    """Yield the documents of an open file. Raises DamagedShard."""
    ended = False
    try:
        with file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                ended = not batch.num_rows
                yield from _documents(batch, path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path) from error
    if not ended:
        raise _damaged(path)


def _documents(batch: pa.RecordBatch, path: Path) -> Iterator[Document]:
    """Yield the documents of a batch, each compared with its checksum."""
    side = round((batch.schema.field("image").type.byte_width / 3) ** 0.5)
    for row in range(batch.num_rows):
        id_, text, crc = (batch.column(name)[row].as_py() for name in ("id", "text", "crc"))
        held = batch.column("image")[row]
        image = memoryview(held.as_buffer()) if held.is_valid else None
        if _crc(text, image) != crc:
            raise _damaged(path)
        segments: list[TextSegment | ImageSegment] = [TextSegment(text)]
        if image is not None:
            segments.append(ImageSegment(np.frombuffer(image, np.uint8).reshape(side, side, 3)))
        yield Document(id_, tuple(segments))


def _crc(text: str, image: bytes | memoryview | None) -> int:
    return zlib.crc32(image or b"", zlib.crc32(text.encode()))


def _damaged(path: Path) -> DamagedShard:
    return DamagedShard(
        f"{path} is damaged; delete it, and the same command decodes its images again"
    )
