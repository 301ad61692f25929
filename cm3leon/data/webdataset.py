"""Tar shards, as img2dataset and the webdataset library write them."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from cm3leon.data.files import (
    CUT_STREAM,
    BadRecord,
    FilesConfig,
    FileSource,
    Record,
    caption_text,
    interleaved,
    is_utf8,
    leaves_folder,
    parse_object,
)
from cm3leon.data.images import SUFFIXES, UnusableImage
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES

IMAGES = tuple(suffix.removeprefix(".") for suffix in sorted(SUFFIXES))


@SOURCES.register("webdataset")
class WebDatasetSource(FileSource):
    """Tars whose members share a key: `000.jpg` with its caption in `000.txt`, or under `caption` in `000.json`.

    An interleaved page is `000.json` with `{"segments": [{"text": "..."}, {"image": "0.jpg"}]}` and the images
    `000.0.jpg`, `000.1.jpg` ... Members of a key lie next to each other, and what has other suffixes is left alone.
    Tars are read as streams and never unpacked to disk; they may be packed by gzip.
    """

    @dataclass(kw_only=True)
    class Config(FilesConfig):
        """Where the tars are."""

    suffixes = (".tar", ".tar.gz", ".tgz")

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        with self.files.open(part) as file:
            group = _Group("")
            for member in tar_members(file, _is_wanted, self.config.max_file_bytes):
                if isinstance(member, Problem):
                    group.add_problem(part, member)
                    continue
                key, suffix = _key_and_suffix(member.name)
                if key != group.key:
                    yield from self._finished(group, part)
                    group = _Group(key)
                if suffix in group.members:
                    group.add_problem(
                        part, Problem(member.name, "occurs twice in the tar; the first one is kept")
                    )
                else:
                    group.members[suffix] = member.content
            yield from self._finished(group, part)

    def _finished(self, group: _Group, part: str) -> Iterator[Record | Skipped]:
        """The one item of a group, then the members in it that are not usable."""
        if group.members:
            id_ = f"{part}/{group.key}"
            try:
                yield self._record(group.members, id_)
            except BadRecord as error:
                if not group.cut:  # what it lacks lies behind the cut, which is told already
                    yield Skipped(id_, str(error))
        yield from group.problems

    def _record(self, members: dict[str, bytes | int], id_: str) -> Record:
        images = [suffix for suffix in IMAGES if suffix in members]
        if "json" in members and not (images and "txt" in members):
            described = parse_object(self._content(members, "json"), "the member .json")
        else:
            described = {}
        if "segments" in described:
            return Record(
                id_, interleaved(described["segments"], lambda name: self._image(members, name))
            )
        if not images:
            raise BadRecord(
                f"no image: the key has only {', '.join(f'.{suffix}' for suffix in sorted(members))}"
            )
        if "txt" in members:
            caption: str | bytes = self._content(members, "txt")
        elif isinstance(described.get("caption"), str):
            caption = described["caption"]
        else:
            raise BadRecord("no caption: neither a member .txt nor a caption in a member .json")
        return Record(
            id_,
            (caption_text(caption, self.config.max_caption_bytes), self._image(members, images[0])),
        )

    def _content(self, members: dict[str, bytes | int], suffix: str) -> bytes:
        content = members[suffix]
        if isinstance(content, int):
            raise BadRecord(
                f"the member .{suffix} has {content} bytes, more than {self.config.max_file_bytes}"
            )
        return content

    def _image(self, members: dict[str, bytes | int], suffix: str) -> Callable[[], bytes]:
        def load() -> bytes:
            try:
                return self._content(members, suffix.lower())
            except KeyError as error:
                raise UnusableImage(f"no image: the key has no member .{suffix}") from error
            except BadRecord as error:
                raise UnusableImage(f"too large: {error}") from error

        return load


@dataclass
class _Group:
    """Members of one key by suffix, the members met on the way that are not usable, and whether the tar is cut here."""

    key: str
    members: dict[str, bytes | int] = field(default_factory=dict)
    problems: list[Skipped] = field(default_factory=list)
    cut: bool = False

    def add_problem(self, part: str, problem: Problem) -> None:
        self.cut = self.cut or not problem.name
        self.problems.append(
            Skipped(f"{part}/{problem.name}" if problem.name else part, problem.reason)
        )


def _is_wanted(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, ".txt", ".json")) and _key_and_suffix(name)[0][
        -1:
    ] not in ("", "/")


def _key_and_suffix(name: str) -> tuple[str, str]:
    """`sub/000.0.jpg` -> (`sub/000`, `0.jpg`)."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


# ------------------------------------------------------------------------------------------------ tar streams

BLOCK = 512
MAX_HEADER = 2**20
"""Bytes of a long name or of a pax header; more than that is damage."""

KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class Member(NamedTuple):
    """A file of a tar: its name, and its bytes, or their number where `read` is limited to fewer."""

    name: str
    content: bytes | int


class Problem(NamedTuple):
    """What cannot be used in a tar: the member's name, "" for the tar itself, and a short reason."""

    name: str
    reason: str


def tar_members(
    file: BinaryIO, wanted: Callable[[str], bool], max_bytes: int
) -> Iterator[Member | Problem]:
    """The wanted files of a tar in order, read once from front to back; nothing is held but one member.

    The standard library's reader takes a damaged or cut tar for one that ends there; here both are told, and reading
    goes on at the next header behind the damage.

    Args:
        wanted: name -> whether the member is of interest; links, devices and names that leave the tar are told anyway.
        max_bytes: of larger members only the size is given.
    """
    try:
        yield from _members(file, wanted, max_bytes)
    except CUT_STREAM as error:
        yield Problem("", f"the tar ends early: {type(error).__name__}: {error}")


def _members(
    file: BinaryIO, wanted: Callable[[str], bool], max_bytes: int
) -> Iterator[Member | Problem]:
    offset, damaged_at, ended = 0, -1, False
    extended: dict[str, str] = {}  # name and size from the headers before a member's own
    while block := file.read(BLOCK):
        ended = not any(block)
        header = None if ended else _header(block, searching=damaged_at >= 0)
        if header is None:
            if not ended and offset == 0:
                yield Problem("", "not a tar file")
                return
            if not ended and damaged_at < 0:
                damaged_at = offset
            offset += len(block)
            continue
        if damaged_at >= 0:
            yield Problem(
                "",
                f"the tar is damaged from byte {damaged_at} to {offset}; what lies there is lost",
            )
            damaged_at = -1
        offset += BLOCK
        size = int(extended.get("size", header.size)) if header.isreg() else header.size
        if header.type in _EXTENSIONS and size <= MAX_HEADER:
            content = file.read(size)
            extended |= _extension(header.type, content)
        elif header.type in KINDS:
            yield Problem(
                ascii(extended.get("path", header.name))[1:-1], f"{KINDS[header.type]}, not a file"
            )
            extended = {}
        elif header.isreg():
            name = extended.get("path", header.name)
            reason = _unusable(name)
            if reason:
                yield Problem(ascii(name)[1:-1], reason)
            elif wanted(name) and size <= max_bytes:
                content = file.read(size)
                if len(content) < size:
                    break
                yield Member(name, content)
            elif wanted(name):
                yield Member(name, size)
            extended = {}
        else:
            extended = {}
        if (
            header.isreg()
            or header.type not in tarfile.SUPPORTED_TYPES
            or header.type in _EXTENSIONS
        ):
            offset += -(-size // BLOCK) * BLOCK
            file.seek(offset)
    if damaged_at >= 0:
        yield Problem("", f"the tar is damaged from byte {damaged_at} on; what follows is lost")
    elif not ended:
        yield Problem("", f"the tar ends early, at byte {offset}" if offset else "the tar is empty")


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _header(block: bytes, *, searching: bool) -> tarfile.TarInfo | None:
    """The header that a block holds, None if it holds none."""
    if searching and block[257:262] != b"ustar":  # the checksum of every block would take long
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # type: ignore[attr-defined]
        return None
    return header if 0 <= header.size < 2**50 else None


def _extension(kind: bytes, content: bytes) -> dict[str, str]:
    """What a header before a member's own says of its `path` and `size`."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found = {}
    while kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and (
        match := re.match(rb"(\d{1,7}) ", content)
    ):
        length = int(match[1])
        key, _, value = content[match.end() : length - 1].partition(b"=")
        if key == b"path" or (key == b"size" and re.fullmatch(rb"\d{1,15}", value)):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[max(length, 1) :]
    return found


def _unusable(name: str) -> str:
    """Why a member of that name is left alone, "" if it is not."""
    if not is_utf8(name):
        return "the member's name is not UTF-8"
    return "the member's name leads outside the tar" if leaves_folder(name) else ""
