"""Parquet files of captioned images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.data.files import BadRecord, FilesConfig, FileSource, Record, caption_text, page_text
from cm3leon.data.images import UnusableImage
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.types import UserError

ROWS = 32
"""Rows held at a time."""
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What reading a damaged file raises; pyarrow's OSErrors have no number, those of the disk have one."""


@SOURCES.register("parquet")
class ParquetSource(FileSource):
    """Parquet files with a column of image files and one of captions, as img2dataset or HF datasets write them.

    Images are bytes, or the struct {bytes, path}. A file is read a few rows at a time.
    """

    @dataclass(kw_only=True)
    class Config(FilesConfig):
        """Where the files are, and their columns."""

        image_column: str = "jpg"
        """Column of the images' files; `image` in HF datasets."""
        caption_column: str = "caption"
        """Column of the captions; often `text` in HF datasets."""
        id_column: str | None = None
        """Column of ids, unique within a file; null numbers the rows."""

    suffixes = (".parquet",)

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        with self.files.open_raw(part) as raw:
            try:
                file = pq.ParquetFile(
                    raw, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
                )
                wrong = self._wrong_columns(file.schema_arrow)
                rows = _rows_of_groups(file.metadata)
            except DAMAGE as error:
                yield Skipped(part, f"not a readable parquet file: {_told(error)}")
                return
            # In the first file it is a mistake in the config, in a later one a matter of that file.
            if wrong and part == self.parts()[0]:
                raise UserError(f"data: {part} {wrong}")
            if wrong:
                yield Skipped(part, wrong)
                return
            row = 0
            for group, number in enumerate(rows):
                yield from self._group(
                    file, group, row, row + number, part, skip=row + number <= start
                )
                row += number

    def _group(
        self, file: pq.ParquetFile, group: int, row: int, end: int, part: str, *, skip: bool
    ) -> Iterator[Record | Skipped]:
        """An item for every row of a row group, damaged or not; `skip` leaves images and captions unread."""
        columns = [self.config.image_column, self.config.caption_column]
        columns = ([] if skip else columns) + (
            [self.config.id_column] if self.config.id_column else []
        )
        if not columns:
            yield from (Record(f"{part}/{number}", ()) for number in range(row, end))
            return
        told = "it holds fewer rows than the footer says"
        try:
            for batch in file.iter_batches(
                batch_size=ROWS, row_groups=[group], columns=list(dict.fromkeys(columns))
            ):
                values = {name: _values(batch.column(name)) for name in batch.schema.names}
                for index in range(min(batch.num_rows, end - row)):
                    yield self._record(
                        {name: column[index] for name, column in values.items()}, row, part
                    )
                    row += 1
        except DAMAGE as error:
            told = _told(error)
        for number in range(row, end):
            yield Skipped(f"{part}/{number}", f"row group {group} is damaged: {told}")

    def _record(self, values: dict[str, Any], row: int, part: str) -> Record | Skipped:
        config = self.config
        try:
            key: Any = row if config.id_column is None else values[config.id_column]
            if key is None:
                raise BadRecord("the id is missing")
            id_ = f"{part}/{page_text(key, 'the id') if isinstance(key, bytes) else key}"
        except BadRecord as error:
            return Skipped(f"{part}/{row}", str(error))
        if config.image_column not in values:
            return Record(id_, ())
        try:
            image = values[config.image_column]
            image = image["bytes"] if isinstance(image, dict) else image
            if not image:
                raise BadRecord("no image: the row has no bytes of one")
            caption = caption_text(values[config.caption_column], config.max_caption_bytes)
            return Record(id_, (caption, partial(_checked_size, image, config.max_file_bytes)))
        except BadRecord as error:
            # Its id is taken all the same, as it is where the row is passed over.
            return Record(id_, (partial(_unusable, str(error)),))

    def _wrong_columns(self, schema: pa.Schema) -> str:
        """What is wrong with the columns of a file, "" if nothing is."""
        config = self.config
        for key in ("image_column", "caption_column", "id_column"):
            name = getattr(config, key)
            if name is not None and name not in schema.names:
                return f"has no column {name} for data.{key}; its columns are {', '.join(schema.names)}"
        image, caption = (
            schema.field(config.image_column).type,
            schema.field(config.caption_column).type,
        )
        if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
            image = image.field("bytes").type
        if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
            return f"has {image} in column {config.image_column}; data.image_column must hold bytes of image files"
        if not (pa.types.is_string(caption) or pa.types.is_large_string(caption)):
            return f"has {caption} in column {config.caption_column}; data.caption_column must hold strings"
        return ""


def _rows_of_groups(metadata: pq.FileMetaData) -> list[int]:
    """Rows of each row group. Raises ArrowInvalid where they do not make the rows of the file."""
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise pa.ArrowInvalid(
            f"its row groups hold {sum(rows)} rows, its footer says {metadata.num_rows}"
        )
    return rows


def _values(column: pa.Array) -> list[Any]:
    """The column as Python values; strings as bytes, since not all files hold UTF-8 where they say so."""
    if pa.types.is_string(column.type):
        column = column.view(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.view(pa.large_binary())
    elif pa.types.is_struct(column.type):  # the path beside the bytes may be anything
        column = pa.StructArray.from_arrays(
            [column.field("bytes")],
            names=["bytes"],
            mask=column.is_null() if column.null_count else None,
        )
    return column.to_pylist()


def _unusable(reason: str) -> bytes:
    raise UnusableImage(reason)


def _checked_size(image: bytes, max_bytes: int) -> bytes:
    if len(image) > max_bytes:
        raise UnusableImage(f"too large: more than {max_bytes} bytes")
    return image


def _told(error: Exception) -> str:
    """The first line of an error of pyarrow; one of the disk is raised again."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return str(error).strip().partition("\n")[0]
