"""Which source reads the files under a path, recognised by their endings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cm3leon.config import settled
from cm3leon.data.files import Files
from cm3leon.data.folder import TABLES
from cm3leon.data.images import SUFFIXES
from cm3leon.types import UserError

FORMATS = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "folder": tuple(sorted(SUFFIXES)),
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
}
"""The sources that are recognised, and the endings of their files."""
FAR_MORE = 10
"""Files of one kind with this many times the bytes of any other are read, whatever their number."""


def with_source_name(data: Any) -> Any:
    """Add to a `data` section the name of the source that reads the files under its path, unless it
    has one.

    If files of other kinds lie there too, prints which kind was chosen.
    """
    if not isinstance(data, Mapping) or "name" in data:
        return data
    path = settled(str | list[str], data.get("path"), "data.path")
    if not path or not isinstance(path, (str, list)):
        return data
    name, others = told_source(path)
    if others:
        print(f"data.name  {name}, whose files fill data.path; not read: {'; '.join(others)}")
    return {"name": name, **data}


def told_source(path: str | list[str]) -> tuple[str, list[str]]:
    """Choose the source for the files under a path, and describe the files of other kinds there.

    Files of one kind with ten times the bytes of any other decide, else the most numerous kind.
    Tables of captions and texts beside images do not count. For example

        40 images of 2 MB, 90 .jsonl of 1 kB          folder: 80 MB are far more than 90 kB
        40 images of 2 MB, 3 .parquet of 100 MB       folder: 300 MB are not far more, so 40 > 3

    Raises:
        UserError: if no file has a known ending.
    """
    files = Files(path)
    endings = [ending for ends in FORMATS.values() for ending in ends]
    kinds: dict[str, list[int]] = {}
    for file in files.list(endings):
        if file.name.rpartition("/")[2] in TABLES:
            continue
        # A path to a single file lists it whatever its ending, so it may be of no kind.
        for kind, ends in FORMATS.items():
            if file.name.lower().endswith(ends):
                kinds.setdefault(kind, []).append(file.size)
                break
    if not kinds:
        raise UserError(
            f"data.path: {files.path} holds no files that end in {', '.join(endings)}; name the "
            "source with data.name, for example data.name=parquet"
        )

    # Only bytes that are far more than any other kind's outweigh the number of files.
    by_bytes = sorted(kinds, key=lambda kind: -sum(kinds[kind]))
    rest = max((sum(kinds[kind]) for kind in by_bytes[1:]), default=0)
    chosen = by_bytes[0]
    if sum(kinds[chosen]) < FAR_MORE * rest:
        chosen = max(by_bytes, key=lambda kind: len(kinds[kind]))

    others = []
    for kind, sizes in kinds.items():
        if kind != chosen:
            noun = "file" if len(sizes) == 1 else "files"
            size = in_bytes(sum(sizes))
            others.append(f"{len(sizes):,} {noun} for data.name={kind} ({size})")
    return chosen, others


def in_bytes(number: float) -> str:
    """A number of bytes in a readable unit, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
