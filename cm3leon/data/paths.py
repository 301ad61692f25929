"""Several paths in one setting: a list, a.tar::b.tar, and braces as a shell expands them.

    tars/{00..12}.tar            13 paths; zeros are kept
    {train,test}/*.tar           two globs
    a.tar::b.tar                 two paths
    zip://*.tar::pack.zip        one path, in fsspec's notation: *.tar inside of a zip file

A path that exists exactly as it is written is taken as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from cm3leon.types import UserError

MOST_PATHS = 100_000
"""Most paths that braces may stand for."""

ARCHIVES, CACHES = ("zip", "tar", "libarchive"), ("simplecache", "filecache", "blockcache")
THROUGH = frozenset((*ARCHIVES, *CACHES, "cached", "dir", "reference", "async_wrapper"))
"""Protocols of fsspec that open what follows their `::`."""

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([a-zA-Z])\.\.([a-zA-Z])")


def all_paths(given: str | Iterable[str], where: str) -> list[str]:
    """List the paths that a setting stands for, each once, in order. A path that exists exactly as
    written is not expanded.

    Args:
        where: the setting, for messages.

    Raises:
        UserError: for an empty list, an empty path, or braces that stand for too many paths.
    """
    listed = [given] if isinstance(given, str) else list(given)
    if not listed or not all(listed):
        raise UserError(f"{where} has an empty path; give a file, a folder or a glob")

    paths: dict[str, None] = {}
    for path in listed:
        written = [path] if os.path.lexists(path) else split_paths(path)
        for each in written:
            for expanded in _expanded(each, where):
                paths[expanded] = None
                if len(paths) > MOST_PATHS:
                    raise UserError(
                        f"{where}: {path} stands for more than {MOST_PATHS:,} paths; give a folder "
                        "or a glob instead"
                    )
    return list(paths)


def _expanded(path: str, where: str) -> Iterator[str]:
    """Yield a path that exists as it is, or what its braces stand for. Raises UserError for a range
    of too many."""
    if os.path.lexists(path):
        yield path
        return
    try:
        yield from expand(path)
    except OverflowError as error:
        raise UserError(
            f"{where}: {error} in {path} stands for more than {MOST_PATHS:,} paths; give a folder "
            "or a glob instead"
        ) from error


def split_paths(path: str) -> list[str]:
    """Split a path at each `::` that is not fsspec's, which reads one thing through another."""
    paths = [""]
    for piece in path.split("::"):
        before = paths[-1].rpartition("::")[2]
        if not before:
            paths[-1] = piece
        elif before.partition("://")[0] in THROUGH:
            paths[-1] += f"::{piece}"
        else:
            paths.append(piece)
    return paths


def expand(path: str) -> Iterator[str]:
    """Yield the paths that `{a,b}` and `{1..3}` in a path stand for, as in a shell; other braces
    stay as they are.

    Raises:
        OverflowError: for a range of more than `MOST_PATHS`; its text is the range.
    """
    for start, end in _braces(path):
        inner = path[start + 1 : end]
        choices = list(_in_range(inner)) or _alternatives(inner)
        if len(choices) < 2 and not _RANGE.fullmatch(inner):
            continue  # as in a shell, {a} is no choice

        rests = list(expand(path[end + 1 :]))
        for choice in choices:
            for middle in expand(choice):
                yield from (f"{path[:start]}{middle}{rest}" for rest in rests)
        return
    yield path


def _braces(path: str) -> Iterator[tuple[int, int]]:
    """Where each outermost pair of braces begins and ends."""
    depth, start = 0, 0
    for index, letter in enumerate(path):
        if letter == "{":
            if not depth:
                start = index
            depth += 1
        elif letter == "}" and depth:
            depth -= 1
            if not depth:
                yield start, index


def _alternatives(inner: str) -> list[str]:
    """Split at the commas that stand in no braces of their own."""
    choices, depth = [""], 0
    for letter in inner:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and not depth:
            choices.append("")
        else:
            choices[-1] += letter
    return choices


def _in_range(inner: str) -> Iterator[str]:
    """The choices in `1..3`, `08..11`, `10..0..-5` or `a..c`; none for anything else. Raises
    OverflowError for too many."""
    match = _RANGE.fullmatch(inner)
    if match is None:
        return
    first, last, step, first_letter, last_letter = match.groups()

    # Letters are counted by their code points.
    if first_letter:
        begin, end = ord(first_letter), ord(last_letter)
    else:
        begin, end = int(first), int(last)
    by = abs(int(step or 1)) or 1
    if abs(end - begin) // by >= MOST_PATHS:
        raise OverflowError(f"{{{inner}}}")

    # As in a shell, all numbers are as wide as the widest if one begins with a zero.
    padded = not first_letter and any(re.match(r"-?0\d", number) for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    numbers = range(begin, end + 1, by)
    if end < begin:
        numbers = range(begin, end - 1, -by)
    for number in numbers:
        yield chr(number) if first_letter else f"{number:0{width}d}"
