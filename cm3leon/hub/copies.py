"""Copies of runs and exports at an address (s3://bucket/runs/tars): pushed as often as wished, pulled on any machine.

A run is made on a disk, because it needs locks and renames, which an object store has not. What is finished there is
copied:

    s3://bucket/runs/tars/cm3leon-files.json              the files of the copy, with sizes and SHA-256
    s3://bucket/runs/tars/pretraining/step_00000040/...   each under its name
    s3://bucket/runs/tars/pretraining/log.jsonl.3         one that has changed since, under another

The list is written last, and an object that it names is never written over: a push that is killed leaves the copy
before as it was. Nothing of a file that is larger than a block is held in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cm3leon.data.remote import BLOCK_BYTES, file_system, open_remote, persistently, reaching
from cm3leon.io import atomic, digest_of, read_json, sha256, write_json
from cm3leon.locks import LOCK, locked
from cm3leon.paths import check_folder, make_folder
from cm3leon.stages.folders import SUPERSEDED
from cm3leon.stages.stage import lies_inside
from cm3leon.training.steps import MANIFEST, step_of
from cm3leon.types import UserError

FILES = "cm3leon-files.json"
STATE = ".copied.json"
"""In the folder here: the lists of the copy that are its own, and what of it was copied when."""
LEFT_OUT = (SUPERSEDED, "decoded")
"""Folders that only serve the run on the disk where it lies."""
MAX_PARTS = 9000
"""Parts of an object; S3 has room for 10,000."""
MAX_LIST_BYTES = 2**30


class Gone(Exception):
    """A file of the folder here that vanished, or became shorter, while it was copied."""


class ForeignCopy(UserError):
    """A copy at an address that was not made from the folder which is pushed there."""


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


Times = dict[str, list[int]]
"""The bytes and the time, in nanoseconds, that each file had when it was copied."""


@dataclass
class State:
    """What a folder here knows of its copy at an address."""

    lists: dict[str, Times] = field(default_factory=dict)
    """By the digest of each list that may lie there: the one of the last push or pull, and the one before it."""

    @classmethod
    def read(cls, folder: Path, address: str) -> State:
        """Of the folder, which may have copies at several addresses; an empty one where it knows nothing."""
        file = folder / STATE
        known = read_json(file, {str: {str: dict}}) if file.is_file() else {}
        return cls(known.get(digest_of(address), {}))

    def write(self, folder: Path, address: str) -> None:
        file = folder / STATE
        known = read_json(file) if file.is_file() else {}
        write_json(file, {**known, digest_of(address): self.lists}, indent=None)


@dataclass(frozen=True)
class Copied:
    """What a push or a pull has moved, and what was there already."""

    files: int
    bytes: int
    unchanged: int

    def __str__(self) -> str:
        return f"{self.files} files of {self.bytes:,} bytes, {self.unchanged} were there already"


# ------------------------------------------------------------------------------------------------ the address


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
        file = self.full(FILES)
        try:
            with open_remote(self._place[0], file, self.where) as opened:
                text = opened.read(MAX_LIST_BYTES)
        except FileNotFoundError:
            return Copy()
        try:
            content = json.loads(text)
            files = {name: Stored(**entry) for name, entry in content["files"].items()}
            copy = Copy(int(content["number"]), files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.where}: {file} is damaged ({error})") from error
        inside = Path("/copy")
        for name, stored in files.items():
            if not (lies_inside(inside, name) and lies_inside(inside, stored.object)):
                raise UserError(f"{self.where}: {file} names {name!a}, which lies outside the copy")
        return copy

    def write_list(self, copy: Copy) -> None:
        """Make a copy the one that lies there, the last step of a push."""
        file, content = self.full(FILES), copy.text.encode()
        with self._writing(file):
            persistently(lambda: self._place[0].pipe_file(file, content))

    def upload(self, path: Path, name: str) -> Stored:
        """Copy a file as long as it is now, block by block.

        Raises:
            Gone: for a file that is not there any more.
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
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise Gone from error
        with file:
            size = left = os.fstat(file.fileno()).st_size
            part_bytes = max(2 * BLOCK_BYTES, size // MAX_PARTS)
            out = system.open(full, "wb", block_size=part_bytes)
            try:
                while left:
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
        """Delete objects that the list does not name any more."""
        for name in names:
            with reaching(self.full(name), self.where):
                persistently(functools.partial(self._place[0].rm_file, self.full(name)))


# ------------------------------------------------------------------------------------------------ there and back


def _is_complete(checkpoint: Path, files: list[str]) -> bool:
    """Whether a checkpoint's folder holds all of it: one that is being written or deleted does not."""
    if MANIFEST not in files:
        return False
    try:
        return set(read_json(checkpoint / MANIFEST, {str: str})) <= set(files)
    except (OSError, UserError):
        return False


def kept_files(folder: Path) -> Iterator[str]:
    """Names of the files of a folder that are copied: no hidden ones, and of checkpoints those that are complete."""
    for place, folders, files in os.walk(folder, followlinks=True):
        within = Path(place)
        if step_of(within) is not None and not _is_complete(within, files):
            folders.clear()
            continue
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in LEFT_OUT
        )
        for name in sorted(files):
            # The index of a checkpoint is called .metadata.
            if not name.startswith(".") or step_of(within) is not None:
                yield (within / name).relative_to(folder).as_posix()


def push_copy(folder: Path, address: str, where: str = "to") -> Copied:
    """Copy what a folder holds and the address has not, and delete there what it holds no more.

    A training may write into the folder meanwhile: a checkpoint that vanishes is left out, a log is copied as far as
    it went.

    Raises:
        ForeignCopy: for an address that holds a copy of another folder.
        UserError: for one that cannot be written to.
    """
    check_folder(folder, "folder")
    if not folder.is_dir():
        raise UserError(f"folder: {folder} does not exist; give the folder of a run or an export")
    with locked(folder, ".copying", where="folder"):
        return _push(folder, Store(address, where))


def _push(folder: Path, store: Store) -> Copied:
    before, state = store.copy(), State.read(folder, store.address)
    if before.number and before.digest not in state.lists:
        raise ForeignCopy(
            f"{store.where}: {store.address} holds a copy that was not made from {folder} as it is, or that another "
            "machine has pushed to since; pull it into a new folder, or give another address"
        )

    # What has changed gets another name there, so that the list before stays true until the next one is written.
    after = Copy(before.number + 1)
    times: Times = {}
    copied_before = state.lists.get(before.digest, {})
    gone: set[Path] = set()
    moved = 0
    for name in kept_files(folder):
        path = folder / name
        known = before.files.get(name)
        try:
            status = path.stat()
            now = [status.st_size, status.st_mtime_ns]
            if known is None or copied_before.get(name) != now:
                known = store.upload(path, name if known is None else f"{name}.{after.number}")
                moved += known.bytes
        except (FileNotFoundError, Gone):
            gone.add(path.parent)
            continue
        after.files[name], times[name] = known, now
    # Of a checkpoint that was deleted meanwhile no part is of use.
    for name in [name for name in after.files if (folder / name).parent in gone]:
        if step_of((folder / name).parent) is not None:
            del after.files[name]

    uploaded = sum(before.files.get(name) != stored for name, stored in after.files.items())
    if after.files == before.files and before.number:
        return Copied(0, 0, len(after.files))
    # A kill between the two leaves either list there, and both are known as this folder's.
    State({before.digest: copied_before, after.digest: times}).write(folder, store.address)
    store.write_list(after)
    left = {stored.object for stored in after.files.values()}
    store.remove(sorted({stored.object for stored in before.files.values()} - left))
    return Copied(uploaded, moved, len(after.files) - uploaded)


def pull_copy(address: str, folder: Path, where: str = "address") -> Copied:
    """Copy what lies at an address into a new folder, which appears whole; a pull that was stopped is gone on with.

    Raises:
        UserError: for an address without a copy, one that is damaged, or a folder that holds something.
    """
    store, folder = Store(address, where), folder.absolute()
    check_folder(folder, "folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"folder: {folder} holds files; give a new or empty folder to pull into")
    make_folder(folder.parent, "folder")
    partial = folder.with_name(f".{folder.name}.pulled")
    make_folder(partial, "folder")
    with locked(partial, where="folder"):
        moved = _pull(store, partial)
        (partial / LOCK).unlink()
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    return moved


def _pull(store: Store, partial: Path) -> Copied:
    """Bring a folder to what the copy holds, whatever a pull that was stopped has left in it."""
    copy = store.copy()
    if not copy.number:
        raise UserError(f"{store.where}: {store.address} holds no copy that `push` has made")
    for name in kept_files(partial):
        if name not in copy.files:
            (partial / name).unlink()

    moved, size = 0, 0
    for name, stored in copy.files.items():
        path = partial / name
        if path.is_file() and path.stat().st_size == stored.bytes and sha256(path) == stored.sha256:
            continue
        try:
            store.download(stored, path)
        except FileNotFoundError as error:
            if store.copy().digest != copy.digest:  # it was pushed again meanwhile
                return _pull(store, partial)
            raise UserError(
                f"{store.where}: {store.full(stored.object)} is missing or not as it was pushed; push the run again"
            ) from error
        moved, size = moved + 1, size + stored.bytes

    times: Times = {}
    for name in copy.files:
        status = (partial / name).stat()
        times[name] = [status.st_size, status.st_mtime_ns]
    State({copy.digest: times}).write(partial, store.address)
    return Copied(moved, size, len(copy.files) - moved)
