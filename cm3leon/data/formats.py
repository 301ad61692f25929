"""Which source reads what lies under a path, told by the endings of the files there."""

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
"""Sources that are told by the endings of the files under a path."""
FAR_MORE = 10
"""A kind of files with so many times the bytes of any other is taken, whatever their numbers."""


def with_source_name(data: Any) -> Any:
    """A section `data` with the name of the source that reads the files under its path, unless it
    has one.

    Prints which kind of files was taken where there are others.
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
    """The source that reads most of what lies under a path, and what lies there for other sources,
    in words.

    The kind of files with ten times the bytes of any other is taken, or else the one with the most
    files. Tables of captions and texts beside images belong to these.

    Raises:
        UserError: if no file has a known ending.
    """
    files = Files(path)
    kinds: dict[str, list[int]] = {}
    for file in files.list(tuple(ending for endings in FORMATS.values() for ending in endings)):
        if file.name.rpartition("/")[2] in TABLES:
            continue
        # A path that names one file lists it whatever its ending.
        for kind, ends in FORMATS.items():
            if file.name.lower().endswith(ends):
                kinds.setdefault(kind, []).append(file.size)
                break
    if not kinds:
        known = ", ".join(ending for endings in FORMATS.values() for ending in endings)
        raise UserError(
            f"data.path: {files.path} holds no files that end in {known}; say what it is with data.name=NAME"
        )

    by_bytes = sorted(kinds, key=lambda kind: -sum(kinds[kind]))
    rest = max((sum(kinds[kind]) for kind in by_bytes[1:]), default=0)
    chosen = by_bytes[0]
    if sum(kinds[chosen]) < FAR_MORE * rest:
        chosen = max(by_bytes, key=lambda kind: len(kinds[kind]))
    others = [
        f"{len(sizes):,} {'file' if len(sizes) == 1 else 'files'} for data.name={kind} "
        f"({in_bytes(sum(sizes))})"
        for kind, sizes in kinds.items()
        if kind != chosen
    ]
    return chosen, others


def in_bytes(number: float) -> str:
    """A number of bytes with its unit, in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
