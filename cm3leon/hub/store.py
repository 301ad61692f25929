"""What lies at the address of a copy: objects, the list that names them, and the files that they hold.

    Store("s3://bucket/runs/tars", "to").copy().files["config.json"].sha256

The folder that is copied is a matter of cm3leon/hub/copies.py.
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
"""Names objects that the list may not name: of a push that is under way, or was killed."""
MAX_PARTS = 9000
"""Parts of an object; S3 has room for 10,000."""
MAX_LIST_BYTES = 2**30

_LIST = {"number": int, "files": {str: {"object": str, "bytes": int, "sha256": str}}}


class Gone(Exception):
    """A file of the folder here that vanished, or became shorter, while it was copied."""


@dataclass(frozen=True)
class Stored:
    """A file of a copy: its object below the address, and what it holds."""

    object: str
    bytes: int
    sha256: str


@dataclass
class Copy:
    """What the list at an address says; of number 0 where there is none."""

    number: int = 0
    """How many times it was pushed."""
    files: dict[str, Stored] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The list as it is written."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        return json.dumps({"number": self.number, "files": files})

    @property
    def digest(self) -> str:
        """Changes with every push."""
        return digest_of(self.text)


@dataclass(frozen=True)
class Store:
    """An address where a copy lies or is to lie."""

    address: str
    where: str
    """The option that names it, for messages."""

    @functools.cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path in it. Raises UserError for an address that is none."""
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
        """The copy that lies there, an empty one for none.

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

        files: dict[str, Stored] = {}
        for name, entry in content["files"].items():
            files[name] = Stored(entry["object"], entry["bytes"], entry["sha256"])
        _check_names(files, said)
        return Copy(content["number"], files)

    def unlisted(self) -> set[str]:
        """Objects that a push which was killed may have left there; none if their list is damaged."""
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
        """What an object holds; None where there is none."""
        try:
            with open_remote(self._place[0], self.full(name), self.where) as file:
                return file.read(MAX_LIST_BYTES)
        except FileNotFoundError:
            return None

    def write_list(self, copy: Copy) -> None:
        """Make a copy the one that lies there, the last step of a push."""
        self._write(FILES, copy.text)

    def write_unlisted(self, names: Iterable[str]) -> None:
        """Name the objects that are to go unless the next list names them, the first step of a push."""
        self._write(UNLISTED, json.dumps(sorted(names)))

    def _write(self, name: str, text: str) -> None:
        file, content = self.full(name), text.encode()
        with self._writing(file):
            persistently(lambda: self._place[0].pipe_file(file, content))

    def upload(self, path: Path, name: str) -> Stored:
        """Copy a file as long as it is now, block by block.

        Raises:
            Gone: for a file that is not there any more.
            UserError: for one that cannot be read, or an address that cannot be written to.
        """
        with self._writing(self.full(name)):
            return persistently(lambda: self._uploaded(path, name))

    @contextmanager
    def _writing(self, full: str) -> Iterator[None]:
        """Say that an object could not be written. Raises UserError."""
        with reaching(full, self.where):
            try:
                yield
            except FileNotFoundError as error:
                raise UserError(
                    f"{self.where}: {full} cannot be written ({error}); make the bucket first, or give another address"
                ) from error

    def _uploaded(self, path: Path, name: str) -> Stored:
        system, full = self._place[0], self.full(name)
        digest = hashlib.sha256()
        with reading(path):
            file = path.open("rb")
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
                # To close it would make an object of the half.
                out.discard()
                out.closed = True
                raise
            out.close()
        if (arrived := system.info(full)["size"]) != size:
            raise ConnectionError(f"{arrived} of {size} bytes arrived")
        return Stored(name, size, digest.hexdigest())

    def download(self, stored: Stored, path: Path) -> None:
        """Copy an object into a file, which appears whole.

        Raises:
            FileNotFoundError: where the object is gone, or holds something else than the list says.
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
        """Delete objects that the list does not name any more; some may be gone already."""
        for name in names:
            with reaching(self.full(name), self.where), suppress(FileNotFoundError):
                persistently(functools.partial(self._place[0].rm_file, self.full(name)))


def _is_inside(name: str) -> bool:
    """Whether a name is one that a file below a folder, or an object below an address, can have."""
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return lies_inside(Path("/copy"), name)


def _check_names(files: dict[str, Stored], said: str) -> None:
    """Raises UserError if a list's files cannot lie in one folder, or their objects below the address."""
    for name, stored in files.items():
        if not (_is_inside(name) and _is_inside(stored.object)):
            raise UserError(f"{said} names {name!a}, which lies outside the copy")
        for parent in PurePosixPath(name).parents:
            if str(parent) in files:
                raise UserError(f"{said} is damaged: {str(parent)!a} is a file and a folder there")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell trouble with a file here from that of the address.

    Raises:
        Gone: for a file that is not there any more.
        UserError: for one that cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Gone from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"folder: {path} cannot be read here ({reason})") from error
