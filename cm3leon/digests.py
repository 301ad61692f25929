"""What files hold, as checksums that do not change when the files are moved or copied.

Files of up to 64 MiB are read whole; of a larger one, its size and 64 blocks spread evenly over it are, so that a
terabyte of tars takes minutes. A change of such a file that leaves its size and all those blocks alone goes unnoticed.

A second look at files that have not changed since costs no reading: `remembered` keeps checksums in a file, by the
paths, sizes and times of what was read.
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
"""Blocks read of a larger file, and the bytes of one."""
SETTLED = 2.0
"""Seconds after which a further change of a file is sure to show in its times."""
READERS = 8
MANY = 1000
"""Kept checksums from which on those that were not asked for are dropped."""

_known: dict[str, str] = {}
"""Checksums by what `_key` says of the files, kept while the process lives."""
_used: set[str] = set()


def path_digest(path: str | Path) -> str:
    """A checksum of what a file or a folder holds; of anything else, a name or a file that is gone, the text itself."""
    place = Path(path)
    if place.is_file():
        return files_digest([place], [place.suffix])
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file())
        return files_digest(files, [file.relative_to(place).as_posix() for file in files])
    return str(path)


def files_digest(files: Sequence[Path], names: Sequence[str]) -> str:
    """A checksum over local files' names and what they hold. One that cannot be read counts by its name.

    Args:
        names: what stands for each in the checksum, which does not say where it lies.
    """
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
    """A checksum of an open file of that size: of all of it, or of blocks of a large one. It must be seekable."""
    whole = size <= WHOLE and blocks == BLOCKS
    content = iter(lambda: file.read(2**20), b"") if whole else _blocks_of(file, size, blocks)
    return digest_of_parts(itertools.chain([str(size)], content))


def _blocks_of(file: BinaryIO, size: int, count: int) -> Iterator[bytes]:
    """So many blocks, spread evenly over a file of that size."""
    for number in range(count):
        file.seek(max(0, size - BLOCK) * number // (count - 1))
        yield file.read(BLOCK)


@contextmanager
def remembered(file: Path) -> Iterator[Callable[[], None]]:
    """Keep checksums in a file, from one process to the next. What it yields writes the file, as a good end does."""
    kept: dict[str, str] = {}
    # There is none the first time, and a full disk may have cut it: everything is read again then.
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
    """What changes with every change of the files; None if one has changed within the last seconds, when another change
    might not show."""
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
