"""The remote side of a copy: its objects, and the list of the files that they hold.

    Store("s3://bucket/runs/tars", "to").copy().files["config.json"].sha256

The local side is in cm3leon/hub/copies.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cm3leon.data.remote import BLOCK_BYTES, file_system, open_remote, persistently, reaching
from cm3leon.io import atomic, check_shape, digest_of
from cm3leon.stages.stage import lies_inside
from cm3leon.types import UserError

FILES = "cm3leon-files.json"
UNLISTED = "cm3leon-unlisted.json"
"""Names the objects of a push in progress, or of a killed one, which the list may not name."""
MAX_PARTS = 9000
"""Parts of an object; S3 has room for 10,000."""
MAX_LIST_BYTES = 2**30

_LIST = {"number": int, "files": {str: {"object": str, "bytes": int, "sha256": str}}}


class Gone(Exception):
    """A local file that vanished or became shorter while it was copied."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a copy: its object, relative to the address, and its content's size and digest."""

    object: str
    bytes: int
    sha256: str


@dataclass
class Copy:
    """The content of the list at an address; number 0 if there is no list."""

    number: int = 0
    """How many times it was pushed."""
    files: dict[str, StoredFile] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The list as JSON, in the order of names."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        return json.dumps({"number": self.number, "files": files})

    @property
    def digest(self) -> str:
        """Digest of the list; it changes with every push."""
        return digest_of(self.text)


@dataclass(frozen=True)
class Store:
    """An address that holds a copy, or will."""

    address: str
    where: str
    """The option that names the address, for messages."""

    @functools.cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path in it. Raises UserError for a text that is not an
        address."""
        try:
            system, root = file_system(self.address)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.where}: {self.address} cannot be opened: {error}") from error
        root = root.rstrip("/")
        if isinstance(system, LocalFileSystem) or not root:
            raise UserError(
                f"{self.where} is {self.address}; give an address such as s3://bucket/runs/tars"
            )
        return system, root

    def full(self, name: str) -> str:
        """The path of an object in its file system."""
        return f"{self._place[1]}/{name}"

    def copy(self) -> Copy:
        """The copy that lies there; an empty one if there is none.

        Raises:
            UserError: for a list that is damaged, or names files outside the folder or the address.
        """
        text = self._text(FILES)
        if text is None:
            return Copy()
        said = f"{self.where}: {self.full(FILES)}"
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{said} is damaged ({error})") from error
        check_shape(content, _LIST, said)

        files: dict[str, StoredFile] = {}
        for name, entry in content["files"].items():
            files[name] = StoredFile(entry["object"], entry["bytes"], entry["sha256"])
        _check_names(files, said)
        return Copy(content["number"], files)

    def unlisted(self) -> set[str]:
        """Objects that a killed push may have left there; none if their list is damaged."""
        text = self._text(UNLISTED)
        if text is None:
            return set()
        try:
            names = json.loads(text)
            check_shape(names, [str], UNLISTED)
        except (ValueError, RecursionError, UserError):
            return set()
        return {name for name in names if _is_inside(name) and name != FILES}

    def _text(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""
        try:
            with open_remote(self._place[0], self.full(name), self.where) as file:
                return file.read(MAX_LIST_BYTES)
        except FileNotFoundError:
            return None

    def write_list(self, copy: Copy) -> None:
        """Replace the list: the step of a push by which the new copy counts."""
        self._write(FILES, copy.text)

    def write_unlisted(self, names: Iterable[str]) -> None:
        """Name the objects to delete unless the next list names them: the first step of a push."""
        self._write(UNLISTED, json.dumps(sorted(names)))

    def _write(self, name: str, text: str) -> None:
        file, content = self.full(name), text.encode()
        with self._writing(file):
            persistently(lambda: self._place[0].pipe_file(file, content))

    def upload(self, path: Path, name: str) -> StoredFile:
        """Copy a file up to its present length, block by block; a log may grow meanwhile.

        Raises:
            Gone: for a file that does not exist any more.
            UserError: for a file that cannot be read, or an address that cannot be written to.
        """
        with self._writing(self.full(name)):
            return persistently(lambda: self._uploaded(path, name))

    @contextmanager
    def _writing(self, full: str) -> Iterator[None]:
        """Explain why an object could not be written. Raises UserError."""
        with reaching(full, self.where):
            try:
                yield
            except FileNotFoundError as error:
                raise UserError(
                    f"{self.where}: {full} cannot be written ({error}); make the bucket first, or "
                    "give another address"
                ) from error

    def _uploaded(self, path: Path, name: str) -> StoredFile:
        system, full = self._place[0], self.full(name)
        digest = hashlib.sha256()
        with reading(path):
            file = path.open("rb")

        # Larger files have larger parts, as their number is limited.
        with file:
            size = left = os.fstat(file.fileno()).st_size
            part_bytes = max(2 * BLOCK_BYTES, size // MAX_PARTS)
            out = system.open(full, "wb", block_size=part_bytes)
            try:
                while left:
                    with reading(path):
                        piece = file.read(min(left, BLOCK_BYTES))
                    if not piece:
                        raise Gone
                    digest.update(piece)
                    out.write(piece)
                    left -= len(piece)
            except BaseException:
                # Closing it would make an object of the first half.
                out.discard()
                out.closed = True
                raise
            out.close()

        if (arrived := system.info(full)["size"]) != size:
            raise ConnectionError(f"{arrived} of {size} bytes arrived")
        return StoredFile(name, size, digest.hexdigest())

    def download(self, stored: StoredFile, path: Path) -> None:
        """Copy an object into a file, which appears whole.

        Raises:
            FileNotFoundError: if the object is gone, or its content is not that of the list.
        """
        digest = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        full = self.full(stored.object)
        with atomic(path) as partial, open_remote(self._place[0], full, self.where) as file:
            with partial.open("wb") as out:
                while piece := file.read(BLOCK_BYTES):
                    digest.update(piece)
                    out.write(piece)
            if digest.hexdigest() != stored.sha256:
                raise FileNotFoundError(f"{full} is not as it was pushed")

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects that the list does not name any more; it is no error if some are gone."""
        for name in names:
            with reaching(self.full(name), self.where), suppress(FileNotFoundError):
                persistently(functools.partial(self._place[0].rm_file, self.full(name)))


def _is_inside(name: str) -> bool:
    """Whether a name stays below its folder or address: not absolute, and without `..`."""
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return lies_inside(Path("/copy"), name)


def _check_names(files: dict[str, StoredFile], said: str) -> None:
    """Check that a list's files can lie in one folder, and its objects below the address.

    Raises:
        UserError: if not.
    """
    for name, stored in files.items():
        if not (_is_inside(name) and _is_inside(stored.object)):
            raise UserError(f"{said} names {name!a}, which lies outside the copy")
        for parent in PurePosixPath(name).parents:
            if str(parent) in files:
                raise UserError(f"{said} is damaged: {str(parent)!a} is a file and a folder there")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report errors of a local file as such, and not as errors of the address.

    Raises:
        Gone: for a file that does not exist any more.
        UserError: for a file that cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Gone from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"folder: {path} cannot be read here ({reason})") from error
