"""Pillow without its own limit on pixels, and with warnings that name the file, in any number of
threads."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from tqdm import tqdm

SHOWN_WARNINGS = 5
"""How many files are named for each of Pillow's warnings, which may be about every file of a
corpus."""
_warned: Counter[str] = Counter()
_counting = threading.Lock()


class _GatheredWarnings:
    """Stands in for the module `warnings` inside of Pillow, and gathers its warnings by thread.

    Python's own filters and hooks belong to the whole process, and any thread may change them and
    put them back at any time (`warnings.catch_warnings`). So they are left alone, and do not apply
    while an image is decoded. Elsewhere Pillow warns as usual.
    """

    def __init__(self) -> None:
        self._own = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    def warn(
        self,
        message: Warning | str,
        category: type[Warning] | None = None,
        stacklevel: int = 1,
        **more: Any,
    ) -> None:
        caught = getattr(self._own, "caught", None)
        if caught is None:
            warnings.warn(message, category, max(stacklevel, 1) + 1, **more)
        else:
            caught.append(message)

    @contextmanager
    def gathered(self) -> Iterator[list[Warning | str]]:
        """Inside the block, Pillow's warnings in this thread go into the list."""
        outer, self._own.caught = getattr(self._own, "caught", None), []
        try:
            yield self._own.caught
        finally:
            self._own.caught = outer


_gathered = _GatheredWarnings()
for _module in (Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin):
    # These are the modules that warn among those that read `FORMATS`. They are never restored.
    vars(_module)["warnings"] = _gathered


class _NoLimit:
    """Pillow without its limit on pixels, which belongs to the whole process: the first thread that
    enters removes it, the last one that leaves restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._limit


_no_limit = _NoLimit()


@contextmanager
def bare_pillow(name: str) -> Iterator[None]:
    """Pillow without its own limit on pixels, which the caller checks, and with warnings that name
    the file."""
    with _no_limit, _gathered.gathered() as caught:
        try:
            yield
        finally:
            for warning in caught:
                _warn(" ".join(str(warning).split()), name)


def _warn(warning: str, name: str) -> None:
    """Print a warning of Pillow beside a progress bar, for the first few files that it is about."""
    with _counting:
        _warned[warning] += 1
        count = _warned[warning]
    if count <= SHOWN_WARNINGS:
        more = "; further files are not named" if count == SHOWN_WARNINGS else ""
        tqdm.write(f"{name!a}: Pillow warns: {warning}{more}", file=sys.stderr)
