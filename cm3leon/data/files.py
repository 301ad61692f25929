"""Files of a corpus, local or remote, and what sources made of files share."""

from __future__ import annotations

import codecs
import errno
import gzip
import hashlib
import json
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cm3leon.config import Location, PositiveInt
from cm3leon.data.images import UnusableImage, decode_image, read_limited, square
from cm3leon.data.source import Skipped, Source
from cm3leon.digests import files_digest, stream_digest
from cm3leon.types import Document, ImageSegment, Role, Segment, TextSegment, UserError

CUT_STREAM = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a damaged gzip file raises."""


NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


CHECKSUMS = ("ETag", "etag", "checksum", "md5Hash", "content_md5", "blob_id", "CRC")
"""Where file systems of fsspec keep what changes with a file's content, and with nothing else."""
REMOTE_BLOCKS = 4
"""Blocks that are read of a remote file without a checksum."""


class File(NamedTuple):
    """A listed file: its name relative to the root of the listing, its bytes, and a remote one's checksum, if known."""

    name: str
    size: int
    checksum: str = ""


class Files:
    """The files that a path stands for: a file, a folder with its subfolders, or a glob (`**` = any subfolders).

    The path is local, or anything that fsspec opens (`s3://bucket/tars`, `hf://datasets/...`). Names are relative to
    the folder, to the folder of the file, or to the part of a glob before its first wildcard.

    Args:
        where: the setting that holds the path, for messages.

    Raises:
        UserError: for a path that does not exist or whose file system is not installed.
    """

    def __init__(self, path: str, where: str = "data.path") -> None:
        self.path = path
        try:
            self.system, whole = url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise UserError(f"{where}: {path} cannot be opened: {error}") from error
        self.local = isinstance(self.system, LocalFileSystem)
        whole = whole.rstrip("/")
        self._glob, self._single = "", ""
        if self.system.isdir(whole):
            self.root = whole
        elif self.system.exists(whole):
            self.root, _, self._single = whole.rpartition("/")
        elif fsspec.core.has_magic(whole):
            fixed = [*_before_magic(whole.split("/")[:-1])]
            self.root, self._glob = "/".join(fixed), whole
        else:
            raise UserError(
                f"{where}: {path} does not exist; give a file, a folder, or a glob such as DIR/**/*.tar"
            )

    @property
    def is_file(self) -> bool:
        """Whether the path is that of one file."""
        return bool(self._single)

    def list(self, suffixes: Iterable[str]) -> list[File]:
        """The files whose names end in one of the suffixes (lower case), by their paths; one file is always taken."""
        endings = tuple(suffixes)
        found: Iterable[File]
        if self._single and self.local:
            found = [_stated(self._single, os.stat(self.full(self._single)))]
        elif self._single:
            found = [
                self._remote(self.full(self._single), self.system.info(self.full(self._single)))
            ]
        elif self._glob and self.local:
            found = self._local(self.system.glob(self._glob), endings)
        elif self._glob:
            found = self._known(self.system.glob(self._glob, detail=True), endings)
        elif self.local:
            found = _walk(self.root, "", endings)
        else:
            found = self._known(self.system.find(self.root, detail=True), endings)
        return sorted(found, key=lambda file: file.name.split("/"))

    def open(self, name: str) -> BinaryIO:
        """The bytes of a file, unpacked if it is a gzip file.

        Raises:
            FileNotFoundError: for a name that is not there.
        """
        file = self._open(name)
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return _Unpacked(file) if packed else file  # type: ignore[return-value]

    def open_raw(self, name: str) -> BinaryIO:
        """The bytes of a file as they are."""
        return self._open(name)

    def image(self, name: str, max_bytes: int, beside: str = "") -> bytes:
        """The bytes of an image file.

        Args:
            beside: a file whose folder the name is relative to, instead of the root.

        Raises:
            UnusableImage: for a file that is missing, outside the folder or larger than `max_bytes`.
        """
        if leaves_folder(name):
            raise UnusableImage(f"the image {name!a} lies outside the folder")
        try:
            with self._open(str(PurePosixPath(beside).parent / name)) as file:
                return read_limited(file, max_bytes)
        except UnusableImage:
            raise
        except NOT_THERE as error:
            raise UnusableImage(
                f"unreadable: {type(error).__name__}: the image {name!a}"
            ) from error
        except OSError as error:
            if (
                error.errno not in NO_SUCH_NAME
            ):  # the disk or the network fails, which is no matter of this image
                raise
            raise UnusableImage(
                f"unreadable: {error.strerror}: the image {ascii(name)[:80]}"
            ) from error

    def _open(self, name: str) -> BinaryIO:
        full = self.full(name)
        return open(full, "rb") if self.local else self.system.open(full, "rb")

    def full(self, name: str) -> str:
        """The path of a listed file in its file system."""
        return f"{self.root}/{name}"

    def _local(self, found: Iterable[str], endings: tuple[str, ...]) -> Iterator[File]:
        for full in found:
            if full.lower().endswith(endings) and os.path.isfile(full):
                yield _stated(full[len(self.root) + 1 :], os.stat(full))

    def _known(
        self, found: Mapping[str, Mapping[str, Any]], endings: tuple[str, ...]
    ) -> Iterator[File]:
        for full, info in found.items():
            if info["type"] == "file" and full.lower().endswith(endings):
                yield self._remote(full, info)

    def remote_checksum(self, name: str) -> str:
        """What changes with the content of a remote file, as far as its file system says; its size if that is all."""
        full = self.full(name)
        try:
            found = self._remote(full, self.system.info(full))
        except NOT_THERE as error:
            return type(error).__name__
        return found.checksum or str(found.size)

    def _remote(self, full: str, info: Mapping[str, Any]) -> File:
        found = next((str(info[key]) for key in CHECKSUMS if info.get(key) is not None), "")
        return File(full[len(self.root) + 1 :], info.get("size") or 0, found)


class _Unpacked(gzip.GzipFile):
    """A gzip file that closes the file below it too."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file)
        self._below = file

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._below.close()


def _before_magic(folders: list[str]) -> Iterator[str]:
    for folder in folders:
        if fsspec.core.has_magic(folder):
            return
        yield folder


def _walk(folder: str, prefix: str, endings: tuple[str, ...]) -> Iterator[File]:
    """Files below a local folder; links to folders are not followed, since they may lead in a circle."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, f"{name}/", endings)
            elif entry.name.lower().endswith(endings) and entry.is_file():
                yield _stated(name, entry.stat())


def _stated(name: str, stat: os.stat_result) -> File:
    return File(name, stat.st_size)


def leaves_folder(name: str) -> bool:
    """Whether a name in a corpus leads outside it: absolute, through `..`, or a URL."""
    return (
        name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "://" in name
    )


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def fingerprint(files: Files, listed: Sequence[File]) -> str:
    """A checksum over the files' names and what they hold, wherever they lie, see `digests`.

    Of a remote file it is the checksum that its file system has, or else its size and a few blocks.
    """
    if files.local:
        paths = [Path(files.full(file.name)) for file in listed]
        return files_digest(paths, [file.name for file in listed])
    digest = hashlib.sha256()
    for file in listed:
        digest.update(
            f"{file.name!a}\0{file.size}\0{file.checksum or _remote_blocks(files, file)}\n".encode()
        )
    return digest.hexdigest()


def _remote_blocks(files: Files, file: File) -> str:
    with files.open_raw(file.name) as content:
        return stream_digest(content, file.size, blocks=REMOTE_BLOCKS)


def images_fingerprint(records: Iterable[Record | Skipped]) -> str:
    """A checksum over the images that records name, where these are files of their own.

    What a source draws or computes depends on its settings, and is not looked at.
    """
    names: list[str] = []
    paths: list[Path] = []
    digest = hashlib.sha256()
    for record in records:
        if isinstance(record, Skipped):
            continue
        for segment in record.segments:
            load = segment.content if isinstance(segment, MarkedImage) else segment
            found = _file_of(load)
            if found is None:
                continue
            files, name = found
            if files.local:
                names.append(record.id)
                paths.append(Path(files.full(name)))
            else:
                digest.update(f"{record.id!a}\0{files.remote_checksum(name)}\n".encode())
    return hashlib.sha256(f"{digest.hexdigest()} {files_digest(paths, names)}".encode()).hexdigest()


def _file_of(load: Any) -> tuple[Files, str] | None:
    """The file that a call of `Files.image` would read, by its name; None for anything else."""
    if not isinstance(load, partial) or getattr(load.func, "__func__", None) is not Files.image:
        return None
    files, name = load.func.__self__, load.args[0]  # type: ignore[attr-defined]
    if leaves_folder(name) or "\0" in name:
        return None
    return files, str(PurePosixPath(load.keywords.get("beside", "")).parent / name)


# ------------------------------------------------------------------------------------------------ records


@dataclass(frozen=True, eq=False)
class MarkedImage:
    """An image with a role: pixels (H, W, C), or the function that gives them or its file."""

    content: np.ndarray | Callable[[], bytes | np.ndarray]
    role: Role = ""


@dataclass(frozen=True)
class Record:
    """A document whose images are not decoded: runs of text, and for each image the function that gives its file.

    That function may raise UnusableImage.
    """

    id: str
    segments: tuple[str | TextSegment | MarkedImage | Callable[[], bytes], ...]
    label: int | None = None


class BadRecord(ValueError):
    """Why one record is left out; the message is a short reason."""


def caption_text(caption: str | bytes | None, max_bytes: int) -> str:
    """A caption, decoded and without the white space around it. Raises BadRecord if it is empty or too long."""
    if caption is None or len(caption) == 0:
        raise BadRecord("the caption is empty")
    if len(caption) > max_bytes:
        raise BadRecord(f"the caption is longer than {max_bytes} bytes")
    text = page_text(caption, "the caption").strip()
    if not text:
        raise BadRecord("the caption is empty")
    if len(text.encode()) > max_bytes:
        raise BadRecord(f"the caption is longer than {max_bytes} bytes")
    return text


def page_text(text: Any, what: str = "the text") -> str:
    """A run of text as it is. Raises BadRecord for anything but a string that UTF-8 can hold."""
    try:
        if isinstance(text, bytes):
            return text.removeprefix(codecs.BOM_UTF8).decode()
        if not isinstance(text, str):
            raise BadRecord(f"{what} is {type(text).__name__}, not a string")
        text.encode()
    except UnicodeError as error:
        raise BadRecord(f"{what} is not UTF-8") from error
    return text


def parse_object(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises BadRecord for anything else."""
    try:
        value = json.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except RecursionError as error:
        raise BadRecord(f"{what} is not usable JSON: nested too deep") from error
    except ValueError as error:
        raise BadRecord(f"{what} is not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{what} is not a JSON object")
    return value


def interleaved(
    segments: Any, image: Callable[[str], Callable[[], bytes]]
) -> tuple[str | Callable[[], bytes], ...]:
    """The segments of a page: `[{"text": "..."}, {"image": "name"}, ...]`; empty runs of text are dropped.

    Args:
        image: name -> the function that gives the image's file.

    Raises:
        BadRecord: for anything else, or a page without a segment.
    """
    if not isinstance(segments, list):
        raise BadRecord("segments is not a list")
    result: list[str | Callable[[], bytes]] = []
    for number, segment in enumerate(segments):
        text, name = (
            (segment.get("text"), segment.get("image"))
            if isinstance(segment, dict)
            else (None, None)
        )
        if text is not None and name is None:
            run = page_text(text, f"the text of segment {number}")
            result += [run] if run.strip() else []
        elif text is None and isinstance(name, str):
            result.append(image(name))
        else:
            raise BadRecord(f'segment {number} is neither {{"text": ...}} nor {{"image": ...}}')
    if not result:
        raise BadRecord("the page is empty")
    return tuple(result)


# ------------------------------------------------------------------------------------------------ sources of files


@dataclass(kw_only=True)
class FilesConfig:
    """Where the files are, and what is too much of one."""

    path: Annotated[str, Location()]
    """A file, a folder (its subfolders are searched too) or a glob (`**` for any subfolders), local or a URL."""
    max_pixels: PositiveInt = 64_000_000
    """Images of more pixels than this are skipped."""
    max_caption_bytes: PositiveInt = 10_000
    """Captions longer than this, in UTF-8 bytes, are skipped with their images."""
    max_file_bytes: PositiveInt = 256 * 2**20
    """Images, members of a tar and lines longer than this, in bytes, are skipped without being read."""


class FileSource(Source):
    """A corpus of files, each a part; a subclass reads the records of one, and gets everything else."""

    suffixes: tuple[str, ...]
    """Endings of the files, in lower case."""
    images_apart = False
    """Whether images are files of their own that the listed files name."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.files = Files(config.path)

    @abstractmethod
    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        """Every record of a part in order, also those before `start`, of which nothing but the id will be used.

        FileNotFoundError and PermissionError mean that the part cannot be opened.
        """

    def parts(self) -> list[str]:
        return [file.name for file in self._list()]

    def fingerprint(self) -> str:
        held = fingerprint(self.files, self._list())
        if not self.images_apart:
            return held
        records = (record for part in self.parts() for record in self._safe_records(part, 0))
        return f"{held} {images_fingerprint(records)}"

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        return self._read(part, start)

    def read_squared(self, part: str, start: int = 0, *, size: int) -> Iterator[Document | Skipped]:
        return self._read(part, start, size)

    def _read(self, part: str, start: int, size: int | None = None) -> Iterator[Document | Skipped]:
        for record in islice(_without_repeats(self._safe_records(part, start)), start, None):
            yield record if isinstance(record, Skipped) else self._decoded(record, size)

    def _list(self) -> list[File]:
        files = self.files.list(self.suffixes)
        if not files:
            raise UserError(
                f"data.path: {self.config.path} holds no files that end in {', '.join(self.suffixes)}"
            )
        return files

    def _safe_records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        if not is_utf8(part):
            yield Skipped(ascii(part), "the file's name is not UTF-8")
            return
        try:
            yield from self.records(part, start)
        except FileNotFoundError:
            yield Skipped(part, "deleted since the corpus was listed")
        except PermissionError:
            yield Skipped(part, "no permission to read the file")

    def _decoded(self, record: Record, size: int | None = None) -> Document | Skipped:
        """The document of a record; each image is brought to `size` before the next one is decoded."""
        segments: list[Segment] = []
        name = PurePosixPath(record.id).name
        try:
            for segment in record.segments:
                if isinstance(segment, (str, TextSegment)):
                    segments.append(TextSegment(segment) if isinstance(segment, str) else segment)
                    continue
                image = segment if isinstance(segment, MarkedImage) else MarkedImage(segment)
                content = (
                    image.content if isinstance(image.content, np.ndarray) else image.content()
                )
                if not isinstance(content, np.ndarray):
                    content = decode_image(content, self.config.max_pixels, name)
                if size is not None:
                    content = square(content, size)
                segments.append(ImageSegment(content, image.role))
        except UnusableImage as error:
            return Skipped(record.id, str(error))
        return Document(record.id, tuple(segments), record.label)


def _without_repeats(records: Iterable[Record | Skipped]) -> Iterator[Record | Skipped]:
    seen: set[str] = set()
    for record in records:
        if isinstance(record, Record):
            if record.id in seen:
                yield Skipped(record.id, "its id occurs twice in this part; the first one is kept")
                continue
            seen.add(record.id)
        yield record
