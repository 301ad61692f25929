"""The files of a tar as a stream that reports damage and goes on behind it.

    byte 0      header of 0.jpg, its bytes          Member("0.jpg", b"...")
    byte 1536   overwritten                         Problem("", "the tar is damaged from byte ...")
    byte 3072   header of 2.jpg, its bytes          Member("2.jpg", b"...")
    the end     no empty block                      Problem("", "the tar ends early, at byte ...")

A header takes a block of 512 bytes, and the content behind it is padded to whole blocks.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from cm3leon.data.files import CUT_STREAM, is_utf8, leaves_folder

BLOCK = 512
MAX_NAME = 4096
"""Most characters of a member's name."""
MAX_HEADER = 2**20
"""Most bytes of a long name or a pax header; anything longer is damage."""

KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class Member(NamedTuple):
    """A file of a tar: its name, and its bytes or, if these are not wanted or too many, their
    number."""

    name: str
    content: bytes | int


class Problem(NamedTuple):
    """What cannot be used in a tar: the member's name ("" for the tar itself) and a short reason."""

    name: str
    reason: str


def tar_members(
    file: BinaryIO, wanted: Callable[[str], bool], max_bytes: int
) -> Iterator[Member | Problem]:
    """Yield the files of a tar in order, read once from front to back; only one member is held.

    The standard library's reader takes a damaged or cut tar for one that ends there. Here both are
    reported, and reading goes on at the next header behind the damage.

    Args:
        wanted: whether the content of a member of that name is of interest; of others only the size
            is yielded.
        max_bytes: of larger members only the size is yielded.
    """
    try:
        yield from _members(file, wanted, max_bytes)
    except CUT_STREAM as error:
        yield Problem("", f"the tar ends early: {type(error).__name__}: {error}")


def _members(
    file: BinaryIO, wanted: Callable[[str], bool], max_bytes: int
) -> Iterator[Member | Problem]:

    offset, damaged_at, ended = 0, -1, False
    extended: dict[str, str] = {}  # name and size, from the headers before a member's own
    while block := file.read(BLOCK):
        ended = not any(block)
        header = None
        if not ended:
            header = _header(block, searching=damaged_at >= 0)

        # A block that is no header begins the end of the tar, or a damage to be searched through.
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

        # The block is a header; what follows it depends on its kind.
        offset += BLOCK
        size = header.size
        if header.isreg():
            size = int(extended.get("size", size))
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
                yield Problem(ascii(name[:MAX_NAME])[1:-1], reason)
            elif wanted(name) and size <= max_bytes:
                content = file.read(size)
                if len(content) < size:
                    break
                yield Member(name, content)
            else:
                yield Member(name, size)
            extended = {}
        else:
            extended = {}

        # Content is padded to whole blocks. Kinds that have none are followed by the next header.
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
        if not offset:
            yield Problem("", "the tar is empty")
        else:
            yield Problem("", f"the tar ends early, at byte {offset}")


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _header(block: bytes, *, searching: bool) -> tarfile.TarInfo | None:
    """Read a block as a header; None if it is none."""
    if searching and block[257:262] != b"ustar":  # the checksum of every block would take too long
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return header if 0 <= header.size < 2**50 else None


def _extension(kind: bytes, content: bytes) -> dict[str, str]:
    """The `path` and `size` that a header before a member's own states."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}

    # A pax header is a list of "length key=value\n", the length including itself.
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
    """Why a member of that name is left out; "" if it is not."""
    if not is_utf8(name):
        return "the member's name is not UTF-8"
    if len(name) > MAX_NAME:
        return f"the member's name is longer than {MAX_NAME} characters"
    return "the member's name leads outside the tar" if leaves_folder(name) else ""
