"""What all sources of files share: records, their checks, reading, skipping and fingerprints.

A subclass turns a file into records; everything that follows is done here:

    file (a part)     a.jsonl
    records           a.jsonl/1: "a dog", <function that reads dog.jpg>       images not read yet
                      a.jsonl/2: left out, "the caption is empty"        one bad line, not fatal
    documents         a.jsonl/1: "a dog", pixels (H, W, 3)                    decoded in threads

Every record is counted, also one that is left out, so that reading can go on from any of them.
"""

from __future__ import annotations

import codecs
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MethodType
from typing import Annotated, Any, BinaryIO

import numpy as np

from cm3leon.config import Location, PositiveInt
from cm3leon.data.ahead import worked_ahead
from cm3leon.data.files import File, Files, Listing, is_utf8
from cm3leon.data.images import UnusableImage, decode_image, square
from cm3leon.data.remote import reaching
from cm3leon.data.source import Skipped, Source
from cm3leon.digests import files_digest, stream_digest
from cm3leon.io import digest_of, digest_of_parts
from cm3leon.secrets import masked_url
from cm3leon.types import Document, ImageSegment, Role, Segment, TextSegment, UserError

REMOTE_BLOCKS = 4
"""Blocks that are read of a remote file that has no checksum."""


def fingerprint(files: Files, listed: Sequence[File]) -> str:
    """A checksum over the names and contents of files, wherever they lie (see `digests`).

    A remote file counts by the checksum that its file system has, or else by its size and a few
    blocks.
    """
    if files.local:
        paths = [Path(files.full(file.name)) for file in listed]
        return files_digest(paths, [file.name for file in listed])
    return digest_of_parts(
        f"{file.name!a}\0{file.size}\0{file.checksum or _remote_blocks(files, file)}\n"
        for file in listed
    )


def _remote_blocks(files: Files, file: File) -> str:
    with files.open_raw(file.name) as content:
        return stream_digest(content, file.size, blocks=REMOTE_BLOCKS)


def images_fingerprint(records: Iterable[Record | Skipped]) -> str:
    """A checksum over the images that records name, where these are files of their own.

    What a source draws or computes follows from its settings, and is left out here.
    """
    names: list[str] = []
    paths: list[Path] = []
    remote: list[str] = []
    for record in records:
        if isinstance(record, Skipped):
            continue
        for segment in record.segments:
            load = segment.content if isinstance(segment, MarkedImage) else segment
            found = _file_of(load)
            if found is None:
                continue
            files, name = found

            # Local files are digested together in the end, remote ones asked for their checksums.
            if files.local:
                names.append(record.id)
                paths.append(Path(files.full(name)))
            else:
                remote.append(f"{record.id!a}\0{files.remote_checksum(name)}\n")
    return digest_of(f"{digest_of_parts(remote)} {files_digest(paths, names)}")


def _file_of(load: Any) -> tuple[Files, str] | None:
    """The file that a call of `Files.image` would read, by its name; None for any other call."""
    if not isinstance(load, partial) or not isinstance(load.func, MethodType):
        return None
    files, name = load.func.__self__, load.args[0]
    if load.func.__func__ is not Files.image or not isinstance(files, Files):
        return None
    try:
        return files, files.located(name, load.keywords.get("beside", ""))
    except UnusableImage:
        return None


# ---------------------------------------------------------------------------------------- records


@dataclass(frozen=True, eq=False)
class MarkedImage:
    """An image with a role: its pixels (H, W, C), or a function that returns them or its file."""

    content: np.ndarray | Callable[[], bytes | np.ndarray]
    role: Role = ""


@dataclass(frozen=True)
class Record:
    """A document whose images are not read yet: runs of text, and for each image a function that
    returns its file.

    Such a function may raise UnusableImage.
    """

    id: str
    segments: tuple[str | TextSegment | MarkedImage | Callable[[], bytes], ...]
    label: int | None = None
    picture: int = 0
    """Index of the image that the document is about; documents about the same image fall on the
    same side of a split."""


class BadRecord(ValueError):
    """Why a record is left out; the message is a short reason."""


def caption_text(caption: str | bytes | None, max_bytes: int) -> str:
    """Decode a caption and strip the white space around it.

    Raises:
        BadRecord: for a caption that is empty, longer than `max_bytes` in UTF-8, or no text.
    """
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
    """Decode a run of text, otherwise unchanged. Raises BadRecord unless it is a string that UTF-8
    can hold."""
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
    """Parse a JSON object. Raises BadRecord for anything else."""
    try:
        value = json.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except RecursionError as error:
        raise BadRecord(f"{what} is not usable JSON: nested too deep") from error
    except ValueError as error:
        raise BadRecord(f"{what} is not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{what} is not a JSON object")
    return value


def id_key(value: Any) -> int | str | None:
    """The form in which ids of published files are compared; None for a value that is no id.

    A whole number is the same id however it is written: 7, 7.0, "7" and "0007" are equal.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 30:
        return int(value)
    return value if isinstance(value, (int, str)) else None


def json_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that are not blank, with their numbers from 1; for a line that is too long,
    None in its place. Such a line is never held in memory as a whole."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        whole = len(line) <= max_bytes or line.endswith(b"\n")
        while not whole:
            rest = file.readline(max_bytes)
            whole = not rest or rest.endswith(b"\n")
            line = b""
        if not line:
            yield number, None
        elif line.strip():
            yield number, line


def interleaved(
    segments: Any, image: Callable[[str], Callable[[], bytes]]
) -> tuple[str | Callable[[], bytes], ...]:
    """Read the segments of a page, `[{"text": "..."}, {"image": "name"}, ...]`, without empty runs
    of text.

    Args:
        image: name -> the function that gives the image's file.

    Raises:
        BadRecord: for anything else, or a page without a segment.
    """
    if not isinstance(segments, list):
        raise BadRecord("segments is not a list")
    result: list[str | Callable[[], bytes]] = []
    for number, segment in enumerate(segments):
        # A segment is either a text or the name of an image, never both.
        text, name = None, None
        if isinstance(segment, dict):
            text, name = segment.get("text"), segment.get("image")

        if text is not None and name is None:
            run = page_text(text, f"the text of segment {number}")
            if run.strip():
                result.append(run)
        elif text is None and isinstance(name, str):
            result.append(image(name))
        else:
            raise BadRecord(f'segment {number} is neither {{"text": ...}} nor {{"image": ...}}')

    if not result:
        raise BadRecord("the page is empty")
    return tuple(result)


# -------------------------------------------------------------------------------- sources of files


UNREADABLE = "what cannot be read"
"""The part of a source that lists folders, links and devices that cannot be read, if there are
any."""


@dataclass(kw_only=True)
class FilesConfig:
    """Where the files are, and the limits on what is read of one."""

    path: Annotated[str | list[str], Location()]
    """A file, a folder (its subfolders are searched too) or a glob (`**` for any subfolders), local
    or a URL. Several are given as a list, with braces or as a.tar::b.tar."""
    max_pixels: PositiveInt = 64_000_000
    """Images of more pixels are skipped."""
    max_caption_bytes: PositiveInt = 10_000
    """Captions longer than this, in UTF-8 bytes, are skipped together with their images."""
    max_file_bytes: PositiveInt = 256 * 2**20
    """Images, members of a tar and lines longer than this, in bytes, are skipped unread."""


class FileSource(Source):
    """A corpus of files, each of which is a part. A subclass reads the records of a file."""

    suffixes: tuple[str, ...]
    """Endings of the files that are read, in lower case."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.files = Files(config.path)

    @abstractmethod
    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        """Yield every record of a part in order. Of those before `start` only the id is used.

        FileNotFoundError and PermissionError mean that the part cannot be opened.
        """

    def parts(self) -> list[str]:
        listing = self._found()
        names = [file.name for file in listing.files]
        return [*names, UNREADABLE] if listing.left_out else names

    @property
    def images_apart(self) -> bool:
        """Whether images are files of their own, named by the listed files."""
        return False

    def fingerprint(self) -> str:
        held = fingerprint(self.files, self._list())
        if not self.images_apart:
            return held
        records = (record for part in self.parts() for record in self._safe_records(part, 0))
        return f"{held} {images_fingerprint(records)}"

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        for record in self._read(part, start):
            yield self._decoded(record)

    def read_squared(self, part: str, start: int = 0, *, size: int) -> Iterator[Document | Skipped]:
        return worked_ahead(self._read(part, start), partial(self._decoded, size=size))

    def _read(self, part: str, start: int) -> Iterator[Record | Skipped]:
        return islice(_without_repeats(self._safe_records(part, start)), start, None)

    def _list(self) -> list[File]:
        return self._found().files

    def _found(self) -> Listing:
        listing = self.files.listing(self.suffixes)
        if not listing.files:
            # Something of that name may be there, but unreadable: then say so.
            more = ""
            if listing.left_out:
                first = listing.left_out[0]
                more = f" but {first.file}, {first.reason}"
            raise UserError(
                f"data.path: {self.files.path} holds no files that end in "
                f"{', '.join(self.suffixes)}{more}"
            )
        return listing

    def _safe_records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        if part == UNREADABLE:
            yield from self.files.listing(self.suffixes).left_out
            return
        if not is_utf8(part):
            yield Skipped(ascii(part), "the file's name is not UTF-8")
            return
        try:
            with reaching(f"{part} of {self.files.path}", "data.path", local=self.files.local):
                yield from self.records(part, start)
        except FileNotFoundError:
            yield Skipped(part, "deleted since the corpus was listed")
        except PermissionError:
            yield Skipped(part, "no permission to read the file")

    def _decoded(self, record: Record | Skipped, size: int | None = None) -> Document | Skipped:
        """Turn a record into a document; each image is brought to `size` before the next is
        decoded."""
        if isinstance(record, Skipped):
            return record
        segments: list[Segment] = []
        digests: list[str] = []
        name = PurePosixPath(record.id).name
        try:
            for segment in record.segments:
                if isinstance(segment, (str, TextSegment)):
                    if isinstance(segment, str):
                        segment = TextSegment(segment)
                    segments.append(segment)
                    continue

                image = segment if isinstance(segment, MarkedImage) else MarkedImage(segment)
                content = (
                    image.content if isinstance(image.content, np.ndarray) else image.content()
                )
                digests.append(_digest(content))
                if not isinstance(content, np.ndarray):
                    content = decode_image(content, self.config.max_pixels, name, size=size)
                elif size is not None:
                    content = square(content, size)
                segments.append(ImageSegment(content, image.role))
        except UnusableImage as error:
            return Skipped(record.id, str(error))

        # Documents about the same image, known by the bytes of its file, share a split.
        group = digests[record.picture] if digests else ""
        return Document(record.id, tuple(segments), record.label, group)


def _digest(content: bytes | np.ndarray) -> str:
    """SHA-256 of an image's file, or of its pixels if it has no file."""
    held = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
    return digest_of(held)


def _without_repeats(records: Iterable[Record | Skipped]) -> Iterator[Record | Skipped]:
    """Leave out records whose id was there before, and mask secrets in ids that are addresses."""
    seen: set[str] = set()
    for record in records:
        if isinstance(record, Record):
            # The query of a signed URL would otherwise be written into every shard.
            if "?" in record.id:
                record = replace(record, id=masked_url(record.id))
            if record.id in seen:
                yield Skipped(record.id, "its id occurs twice in this part; the first one is kept")
                continue
            seen.add(record.id)
        yield record
