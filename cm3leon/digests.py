"""Checksums of the contents of files, which stay the same when the files are moved or copied.

Files of up to 64 MiB are read whole. Of a larger file the size and 64 blocks are read, spread
evenly over it, so that a terabyte of tars takes minutes:

    |#.........#.........#.........#...  ...#.........#|     # = 64 KiB that are read

A change of such a file is not noticed if it changes neither the size nor one of these blocks.

Files that have not changed are not read a second time: `remembered` keeps checksums in a file, by
the paths, sizes and times of the files that were read.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cm3leon.io import digest_of_parts, read_json, write_json
from cm3leon.types import UserError

WHOLE = 64 * 2**20
"""Bytes up to which a file is read whole."""
BLOCKS, BLOCK = 64, 64 * 2**10
"""Number of blocks that are read of a larger file, and the bytes of a block."""
SETTLED = 2.0
"""Seconds after which a further change of a file is certain to change its times."""
READERS = 8
"""Number of files that are read at the same time."""
MANY = 1000
"""Number of kept checksums from which on unused ones are dropped."""

_known: dict[str, str] = {}
"""Checksums of this process, by the `_key` of their files."""
_used: set[str] = set()
"""Keys that this process has asked for."""


def path_digest(path: str | Path) -> str:
    """Return a checksum of a file's or a folder's contents.

    Anything else, such as a name or a file that no longer exists, is returned as it is.
    """
    place = Path(path)
    if place.is_file():
        return files_digest([place], [place.suffix])
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file())
        return files_digest(files, [file.relative_to(place).as_posix() for file in files])
    return str(path)


def files_digest(files: Sequence[Path], names: Sequence[str]) -> str:
    """Return a checksum of local files' names and contents; unreadable files count by name.

    Args:
        files: the files.
        names: their names in the checksum, which do not depend on where the files are.
    """
    # Files that have not changed since they were last read have a known checksum.
    key = _key(files)
    if key is not None and key in _known:
        _used.add(key)
        return _known[key]

    with ThreadPoolExecutor(READERS) as readers:
        contents = readers.map(_content, files)
        lines = zip(names, contents, strict=True)
        found = digest_of_parts(f"{name!a}\0{content}\n" for name, content in lines)
    if key is not None:
        _known[key] = found
        _used.add(key)
    return found


def stream_digest(file: BinaryIO, size: int, *, blocks: int = BLOCKS) -> str:
    """Return a checksum of an open, seekable file: of all of it, or of blocks of a large one."""
    whole = size <= WHOLE and blocks == BLOCKS
    content = iter(lambda: file.read(2**20), b"") if whole else _blocks_of(file, size, blocks)
    return digest_of_parts(itertools.chain([str(size)], content))


def _blocks_of(file: BinaryIO, size: int, count: int) -> Iterator[bytes]:
    """Read `count` blocks, spread evenly over a file of that size."""
    for number in range(count):
        file.seek(max(0, size - BLOCK) * number // (count - 1))
        yield file.read(BLOCK)


@contextmanager
def remembered(file: Path) -> Iterator[Callable[[], None]]:
    """Keep checksums in a file, from one process to the next.

    The file is written at the end if nothing fails, and whenever the yielded function is called.
    """
    kept: dict[str, str] = {}

    # The first time there is no file, and a full disk may have cut it. All files are read then.
    with suppress(OSError, UserError):
        kept = read_json(file, {str: str})
    _known.update(kept)

    def write() -> None:
        used = {key: _known[key] for key in sorted(_used)}
        wanted = used if len(kept) > MANY else kept | used
        if wanted != kept:
            write_json(file, wanted, indent=1, shared=True)

    yield write
    write()


def _content(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return stream_digest(content, os.fstat(content.fileno()).st_size)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return type(error).__name__


def _key(files: Sequence[Path]) -> str | None:
    """Return a text that changes whenever one of the files changes.

    None if a file has changed within the last seconds, because its times might not show another
    change.
    """
    lines = []
    newest = time.time() - SETTLED
    for file in files:
        try:
            status = file.stat()
        except OSError:
            return None
        if max(status.st_mtime, status.st_ctime) > newest:
            return None
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        lines.append(f"{os.path.abspath(file)!a}\0{state}\n")
    return digest_of_parts(lines)
