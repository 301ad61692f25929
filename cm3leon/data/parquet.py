"""Parquet files of captioned images.

A file is read one row group after the other, a few rows at a time. A damaged group is left out row
by row, so that the rows behind it keep their numbers:

    row group 0     rows 0 .. 99        a record each
    row group 1     rows 100 .. 199     damaged: `Skipped` 100 times
    row group 2     rows 200 .. 299     a record each
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.config import Location
from cm3leon.data.fields import IMAGE_KEYS, TEXT_KEYS, first_text
from cm3leon.data.file_source import (
    BadRecord,
    FilesConfig,
    FileSource,
    Record,
    caption_text,
    page_text,
)
from cm3leon.data.files import Files
from cm3leon.data.images import UnusableImage
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.types import UserError

ROWS = 32
"""Most rows held at a time."""
HELD = 512 * 2**20
"""Most bytes of images in the rows held at a time, by the file's footer; fewer rows are held if
they would have more."""
ADVICE = (
    "the row has only the image's path: give the folder of the images as data.images, or write the "
    "bytes into the file (embed_table_storage of datasets)"
)
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What reading a damaged file raises. An OSError of pyarrow has no number, one of the disk has."""


@SOURCES.register("parquet")
class ParquetSource(FileSource):
    """Parquet files with a column of images and one of captions, as img2dataset and HF datasets
    write them.

    Images are bytes, paths of image files, or structs {bytes, path}, of which the path is used if
    there are no bytes. Captions are strings, or lists of strings, of which the first that is not
    blank is used. Columns that are not named in the settings are found by their usual names (see
    `fields.py`), columns of bytes before columns of paths.
    """

    @dataclass(kw_only=True)
    class Config(FilesConfig):
        """Where the files are, and the names of their columns."""

        image_column: str | None = None
        """Column of the images; null = the usual names, such as jpg and image."""
        caption_column: str | None = None
        """Column of the captions; null = the usual names, such as caption and text."""
        id_column: str | None = None
        """Column of ids, unique within a file; null = the rows' numbers."""
        images: Annotated[str, Location()] | None = None
        """Folder or URL that paths of images are relative to; null = the folder of each file."""

    suffixes = (".parquet",)

    @property
    def images_apart(self) -> bool:
        """Whether the rows of the first readable file hold paths of images but no bytes."""
        for file in self._list():
            try:
                with self.files.open_raw(file.name) as raw:
                    content = pq.ParquetFile(raw)
                    columns = self._columns(content.schema_arrow)
                    return columns.has_paths or _has_no_bytes(content.metadata, columns.image)
            except (*DAMAGE, BadRecord):
                continue
        return False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._images = Files(config.images, "data.images") if config.images else None

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        with self.files.open_raw(part) as raw:
            try:
                file = pq.ParquetFile(
                    raw, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
                )
                columns = self._columns(file.schema_arrow)
                rows = _rows_of_groups(file.metadata)
            except DAMAGE as error:
                yield Skipped(part, f"not a readable parquet file: {_told(error)}")
                return
            except BadRecord as error:
                # In the first file this is a mistake in the config, in a later one one in the file.
                if part == self.parts()[0]:
                    raise UserError(f"data: {part} {error}") from error
                yield Skipped(part, str(error))
                return

            row = 0
            for group, number in enumerate(rows):
                yield from self._group(
                    file, columns, group, row, row + number, part, skip=row + number <= start
                )
                row += number

    def _group(
        self,
        file: pq.ParquetFile,
        columns: _Columns,
        group: int,
        row: int,
        end: int,
        part: str,
        *,
        skip: bool,
    ) -> Iterator[Record | Skipped]:
        """Yield an item for every row of a row group, damaged or not. `skip` leaves images and
        captions unread."""
        names = [] if skip else [columns.image, columns.caption]
        if columns.id:
            names.append(columns.id)
        # Rows that are skipped and have no ids are just counted.
        if not names:
            yield from (Record(f"{part}/{number}", ()) for number in range(row, end))
            return

        told = "it holds fewer rows than the footer says"
        try:
            for batch in file.iter_batches(
                batch_size=_rows_at_a_time(file.metadata.row_group(group), columns.image),
                row_groups=[group],
                columns=list(dict.fromkeys(names)),
            ):
                values = {name: _values(batch.column(name)) for name in batch.schema.names}
                for index in range(min(batch.num_rows, end - row)):
                    found = {name: column[index] for name, column in values.items()}
                    yield self._record(found, columns, row, part)
                    row += 1
        except DAMAGE as error:
            told = _told(error)

        # Every row that was not read counts all the same.
        for number in range(row, end):
            yield Skipped(f"{part}/{number}", f"row group {group} is damaged: {told}")

    def _record(
        self, values: dict[str, Any], columns: _Columns, row: int, part: str
    ) -> Record | Skipped:
        """The record of a row, or why it is skipped."""
        try:
            key: Any = row if columns.id is None else values[columns.id]
            if key is None:
                raise BadRecord("the id is missing")
            id_ = f"{part}/{page_text(key, 'the id') if isinstance(key, bytes) else key}"
        except BadRecord as error:
            return Skipped(f"{part}/{row}", str(error))

        # Only the id of a row that is passed over is read.
        if columns.image not in values:
            return Record(id_, ())
        try:
            load = self._image(values[columns.image], columns, part)
            caption = first_text(values[columns.caption])
            return Record(id_, (caption_text(caption, self.config.max_caption_bytes), load))
        except BadRecord as error:
            # The id counts as taken, exactly as if the row was passed over.
            return Record(id_, (partial(_unusable, str(error)),))

    def _image(self, value: Any, columns: _Columns, part: str) -> Callable[[], bytes]:
        """The function that reads a row's image. Raises BadRecord for a row without one."""
        content: Any = None
        path: Any = None
        if columns.has_paths:
            path = value
        elif columns.has_struct:
            fields = value if isinstance(value, dict) else {}
            content, path = fields.get("bytes"), fields.get("path")
        else:
            content = value

        if content:
            return partial(_checked_size, content, self.config.max_file_bytes)
        if not path:
            raise BadRecord("no image: the row has neither bytes nor a path of one")
        # A path is relative to the folder that is set, or else to that of the parquet file.
        files, beside = (self.files, part) if self._images is None else (self._images, "")
        path = page_text(path, "the path of the image")
        max_bytes = self.config.max_file_bytes
        return partial(files.image, path, max_bytes, beside=beside, advice=ADVICE)

    def _columns(self, schema: pa.Schema) -> _Columns:
        """Find the columns of a file. Raises BadRecord if one is missing or ambiguous."""
        config = self.config
        # Columns named in the settings must be there.
        asked_for = {
            "image_column": config.image_column,
            "caption_column": config.caption_column,
            "id_column": config.id_column,
        }
        for key, name in asked_for.items():
            if name is not None and name not in schema.names:
                raise BadRecord(
                    f"has no column {name} for data.{key}; its columns are "
                    f"{', '.join(schema.names)}"
                )

        # All others are found by their usual names.
        image = config.image_column or _image_column(schema)
        caption = config.caption_column or _caption_column(schema)
        for name, what in ((image, "image"), (caption, "caption")):
            if name is None:
                raise BadRecord(
                    f"has no column of {what}s under a usual name; name one of its columns with "
                    f"data.{what}_column: {', '.join(schema.names)}"
                )
        assert image is not None
        assert caption is not None

        # Their types must fit what they are read as.
        kind = _image_kind(schema.field(image).type)
        if not kind:
            raise BadRecord(
                f"has {schema.field(image).type} in column {image}; data.image_column must hold "
                "bytes or paths of image files"
            )
        if not _holds_texts(schema.field(caption).type):
            raise BadRecord(
                f"has {schema.field(caption).type} in column {caption}; data.caption_column must "
                "hold strings or lists of them"
            )
        return _Columns(image, caption, config.id_column, kind == "struct", kind == "paths")


class _Columns(NamedTuple):
    """The names of a file's columns, and the form of its images."""

    image: str
    caption: str
    id: str | None
    has_struct: bool
    """Images are structs of bytes and a path."""
    has_paths: bool
    """Images are paths."""


def _by_usual_name(schema: pa.Schema, names: tuple[str, ...]) -> list[str]:
    """The columns with these names, in the order of the names; case does not matter."""
    return [column for name in names for column in schema.names if column.lower() == name]


def _image_column(schema: pa.Schema) -> str | None:
    """The column of images by its usual name; None without one. Raises BadRecord for several."""
    usual = _by_usual_name(schema, IMAGE_KEYS)
    kinds = {name: _image_kind(schema.field(name).type) for name in usual}
    # Beside its bytes an image often has a path, under another of the usual names.
    holding_bytes = [name for name in usual if kinds[name] in ("bytes", "struct")]
    found = holding_bytes or [name for name in usual if kinds[name] == "paths"]
    if len(found) > 1:
        raise BadRecord(
            f"has several columns of images, {', '.join(found)}; say which with data.image_column"
        )
    return found[0] if found else None


def _caption_column(schema: pa.Schema) -> str | None:
    """The column of captions by its usual name; None without one."""
    usual = _by_usual_name(schema, TEXT_KEYS)
    return next((name for name in usual if _holds_texts(schema.field(name).type)), None)


def _stored(type_: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary or extension type; any other type as it is."""
    while pa.types.is_dictionary(type_) or isinstance(type_, pa.BaseExtensionType):
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_.storage_type
    return type_


def _image_kind(type_: pa.DataType) -> Literal["bytes", "paths", "struct", ""]:
    """How a column of that type holds images; "" if it cannot."""
    type_ = _stored(type_)
    if pa.types.is_struct(type_):
        names = [type_.field(index).name for index in range(type_.num_fields)]
        return "struct" if "bytes" in names or "path" in names else ""
    if pa.types.is_fixed_size_binary(type_) or any(
        check(type_) for check in (pa.types.is_binary, pa.types.is_large_binary, _is_binary_view)
    ):
        return "bytes"
    return "paths" if _is_string(type_) else ""


def _holds_texts(type_: pa.DataType) -> bool:
    """Whether a column of that type may hold captions; a column of nothing but nulls may."""
    type_ = _stored(type_)
    if _is_list(type_):
        type_ = _stored(type_.value_type)
    return pa.types.is_null(type_) or _is_string(type_)


def _is_string(type_: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(type_) for check in checks)


def _is_binary_view(type_: pa.DataType) -> bool:
    return pa.types.is_binary_view(type_)


def _is_list(type_: pa.DataType) -> bool:
    checks = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(check(type_) for check in checks)


def _has_no_bytes(metadata: pq.FileMetaData, image: str) -> bool:
    """Whether all `bytes` of a column of structs are null, according to the footer."""
    seen = False
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            if column.path_in_schema == f"{image}.path":
                seen = True
            if column.path_in_schema == f"{image}.bytes" and not (
                column.statistics is not None and column.statistics.null_count == row_group.num_rows
            ):
                return False
    return seen


def _rows_at_a_time(group: pq.RowGroupMetaData, image: str) -> int:
    """How many rows of a row group are read together: fewer if their images may be large."""
    sizes = [0]
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.split(".")[0] == image:
            # A dictionary's values may be repeated: each row could have all of its bytes.
            repeated = any("DICTIONARY" in encoding for encoding in column.encodings)
            rows = 1 if repeated else max(group.num_rows, 1)
            sizes.append(column.total_uncompressed_size // rows)
    return max(1, min(ROWS, HELD // max(1, *sizes)))


def _rows_of_groups(metadata: pq.FileMetaData) -> list[int]:
    """The rows of each row group. Raises ArrowInvalid if their sum is not the file's rows."""
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise pa.ArrowInvalid(
            f"its row groups hold {sum(rows)} rows, its footer says {metadata.num_rows}"
        )
    return rows


def _values(column: pa.Array) -> list[Any]:
    """A column as Python values. Strings become bytes, since not all files hold UTF-8 where they
    claim to."""
    if isinstance(column, pa.ExtensionArray):
        return _values(column.storage)
    if pa.types.is_dictionary(column.type):
        known = _values(column.dictionary)
        return [None if index is None else known[index] for index in column.indices.to_pylist()]
    if _is_list(column.type):
        return [_values(each.values) if each.is_valid else None for each in column]
    if pa.types.is_struct(column.type):
        names = [name for name in ("bytes", "path") if column.type.get_field_index(name) >= 0]
        fields = {name: _values(column.field(name)) for name in names}
        valid = column.is_valid().to_pylist()
        rows: list[Any] = [None] * len(column)
        for index, is_valid in enumerate(valid):
            if is_valid:
                rows[index] = {name: fields[name][index] for name in names}
        return rows
    # What is declared as text is read as bytes.
    if pa.types.is_string(column.type):
        column = column.view(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.view(pa.large_binary())
    elif pa.types.is_string_view(column.type):
        column = column.cast(pa.binary())
    return column.to_pylist()


def _unusable(reason: str) -> bytes:
    """Raise a reason that was found earlier, in the place where the image is read."""
    raise UnusableImage(reason)


def _checked_size(image: bytes, max_bytes: int) -> bytes:
    if len(image) > max_bytes:
        raise UnusableImage(f"too large: more than {max_bytes} bytes")
    return image


def _told(error: Exception) -> str:
    """The first line of an error of pyarrow; an error of the disk is raised again."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return str(error).strip().partition("\n")[0]
