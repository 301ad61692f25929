"""Copies of runs and exports at an address of an object store, pushed again and again, pulled
anywhere.

A run is made on a disk, because it needs locks and renames, which object stores do not have. What
is finished of it is copied:

    s3://bucket/runs/tars/cm3leon-files.json              the list: files with sizes and SHA-256
    s3://bucket/runs/tars/pretraining/step_00000040/...   each file under its own name
    s3://bucket/runs/tars/pretraining/log.jsonl.3         a changed file, under a new name
    s3://bucket/runs/tars/cm3leon-unlisted.json           objects that no list may name

The list is written last, and no object that it names is ever overwritten, so that a killed push
leaves the previous copy as it was. Push number 3 of a run whose log has grown:

    1  write cm3leon-unlisted.json    names all objects, with the new log.jsonl.3
    2  upload log.jsonl.3
    3  write cm3leon-files.json       from here on, log.jsonl is the object log.jsonl.3
    4  delete log.jsonl.2             the list names it no more
    5  delete cm3leon-unlisted.json

Killed before 3, the old list still names log.jsonl.2, and the next push, which finds log.jsonl.3 in
the file of unlisted objects, writes over it, or deletes it if its own list does not name it. Files
are copied block by block, and never held in memory whole.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cm3leon.hub.store import FILES, UNLISTED, Copy, Gone, Store, StoredFile, reading
from cm3leon.io import digest_of, read_json, sha256, write_json
from cm3leon.locks import LOCK, locked
from cm3leon.paths import check_folder, make_folder
from cm3leon.stages.folders import SUPERSEDED
from cm3leon.training.steps import MANIFEST, numbered, step_of
from cm3leon.types import UserError

STATE = ".copied.json"
"""File in the local folder: which lists at the address are its own, and when each file was
copied."""
LEFT_OUT = (SUPERSEDED, "decoded")
"""Folders that are of use only on the disk where the run was made."""
WALKS = 3
"""How often a folder is walked through while a training deletes its checkpoints."""


class ForeignCopy(UserError):
    """A copy at an address that was made from another folder than the one being pushed."""


Times = dict[str, list[int]]
"""The bytes and the modification time, in nanoseconds, that each file had when it was copied."""


@dataclass
class CopyState:
    """What a local folder knows of its copy at an address."""

    lists: dict[str, Times] = field(default_factory=dict)
    """By the digest of each list that may be there: that of the last push or pull, and the one
    before."""

    @classmethod
    def read(cls, folder: Path, address: str) -> CopyState:
        """The folder's state for one of its addresses; empty if it was never copied there."""
        file = folder / STATE
        known: dict[str, dict[str, Times]] = {}
        if file.is_file():
            known = read_json(file, {str: {str: dict}})
        return cls(known.get(digest_of(address), {}))

    def write(self, folder: Path, address: str) -> None:
        """Write the state, beside those for other addresses."""
        file = folder / STATE
        known: dict[str, Any] = {}
        if file.is_file():
            known = read_json(file)
        write_json(file, {**known, digest_of(address): self.lists}, indent=None)


@dataclass(frozen=True)
class Copied:
    """How much a push or a pull has moved, and how many files were there already."""

    files: int
    bytes: int
    unchanged: int

    def __str__(self) -> str:
        return f"{self.files} files of {self.bytes:,} bytes, {self.unchanged} were there already"


# -------------------------------------------------------------------------------- the folder here


def _is_complete(checkpoint: Path, files: list[str]) -> bool:
    """Whether a checkpoint has all files of its manifest; one being written or deleted does not."""
    if MANIFEST not in files:
        return False
    try:
        return set(read_json(checkpoint / MANIFEST, {str: str})) <= set(files)
    except (OSError, UserError):
        return False


def kept_files(folder: Path) -> Iterator[str]:
    """The names of a folder's files that are copied: without hidden files and unfinished
    checkpoints.

    Files with the names of a copy's own lists are left out at the top, where they would overwrite
    those at the address.

    Raises:
        UserError: for a folder in it that cannot be read.
    """
    for path, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        within = Path(path)
        if step_of(within) is not None and not _is_complete(within, files):
            folders.clear()
            continue

        # What is left in `folders` is walked through next, in this order.
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in LEFT_OUT
        )
        for name in sorted(files):
            if within == folder and name in (FILES, UNLISTED):
                continue
            # The index of a checkpoint is a hidden file, .metadata.
            if not name.startswith(".") or step_of(within) is not None:
                yield (within / name).relative_to(folder).as_posix()


def _refuse_unreadable(error: OSError) -> None:
    # Files of an unreadable folder would count as deleted, and be deleted at the address too. A
    # folder that vanished is deleted.
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"folder: {error.filename} cannot be read here ({error.strerror})")


def _check_there(folder: Path) -> None:
    check_folder(folder, "folder")
    if not folder.is_dir():
        raise UserError(f"folder: {folder} does not exist; give the folder of a run or an export")


def kept_sizes(folder: Path) -> dict[str, int]:
    """The files of a folder that a push would copy, with their bytes.

    Raises:
        UserError: for a folder that does not exist or cannot be read.
    """
    _check_there(folder)
    sizes: dict[str, int] = {}
    for name in kept_files(folder):
        with suppress(FileNotFoundError):  # a training deletes checkpoints meanwhile
            sizes[name] = (folder / name).stat().st_size
    return sizes


def _is_of_checkpoint(name: str) -> bool:
    return step_of(Path(name).parent) is not None


def _trainings(names: Iterable[str]) -> set[str]:
    """The training folders that have a checkpoint among the files."""
    return {str(Path(name).parent.parent) for name in names if _is_of_checkpoint(name)}


# --------------------------------------------------------------------------------- there and back


@dataclass
class _Pushing:
    """A push in progress."""

    folder: Path
    store: Store
    number: int
    """Number of the list that will be written."""
    files: dict[str, StoredFile]
    """What this list will name: at first the files of the previous copy, then those of the last
    walk."""
    times: Times
    objects: set[str]
    """Objects of the previous copy and of this push; none of them is overwritten."""
    killed: set[str]
    """Objects that killed pushes may have left."""

    def walk(self) -> bool:
        """Copy what has changed in the folder since the last walk.

        A training may delete the checkpoint that is being copied, before this walk could find its
        next one. The checkpoints of the previous copy are then kept.

        Returns:
            Whether a training was left without a new checkpoint, so that it is worth walking again.
        """
        found, gone = self._found()

        # A changed file gets a new object, so that the previous list stays true until the next one
        # is written. Points of a study link to the stages that they share; these are copied once.
        paths: dict[str, str] = {}
        chosen: dict[str, str] = {}
        for name, now in found.items():
            if name not in self.files or self.times.get(name) != now:
                path = paths[name] = os.path.realpath(self.folder / name)
                if path not in chosen:
                    chosen[path] = self._object_for(name, found)

        # Before anything is uploaded, it is written down what must be deleted after a kill.
        if chosen or found.keys() != self.files.keys():
            self.killed.add(UNLISTED)  # it is deleted with what it names
            self.store.write_unlisted(self.objects | self.killed)

        files: dict[str, StoredFile] = {}
        uploaded: dict[str, StoredFile] = {}
        for name in found:
            if name not in paths:
                files[name] = self.files[name]
                continue
            path = paths[name]
            try:
                if path not in uploaded:
                    uploaded[path] = self.store.upload(self.folder / name, chosen[path])
            except Gone:
                gone.add(name)
                continue
            files[name] = uploaded[path]

        # A checkpoint of which a file was deleted meanwhile is left out whole.
        broken = {Path(name).parent for name in gone if _is_of_checkpoint(name)}
        files = {name: stored for name, stored in files.items() if Path(name).parent not in broken}
        times = {name: found[name] for name in files}

        # Trainings that had checkpoints, and would have none in the new list.
        lost: set[str] = set()
        for training in (_trainings(self.files) | _trainings(gone)) - _trainings(files):
            if numbered(self.folder / training):  # else someone deleted them all on purpose
                lost.add(training)
        for name, stored in self.files.items():
            if _trainings([name]) & lost:
                files[name], times[name] = stored, self.times.get(name, [])
        self.files, self.times = files, times
        return bool(lost)

    def _found(self) -> tuple[Times, set[str]]:
        """The files of the folder with their times, and the names of files that vanished
        meanwhile."""
        found: Times = {}
        gone: set[str] = set()
        for name in kept_files(self.folder):
            try:
                with reading(self.folder / name):
                    status = (self.folder / name).stat()
            except Gone:
                gone.add(name)
                continue
            found[name] = [status.st_size, status.st_mtime_ns]
        return found, gone

    def _object_for(self, name: str, found: Times) -> str:
        """An object for a file: its own name, or NAME.3 if that is taken.

        The name is that of no object of the previous copy and of this push, and of no other file.
        """
        chosen = name
        if name in self.files or name in self.objects:
            numbers = itertools.count(self.number)
            while (chosen := f"{name}.{next(numbers)}") in self.objects or chosen in found:
                pass
        self.objects.add(chosen)
        return chosen


def push_copy(folder: Path, address: str, where: str = "to") -> Copied:
    """Make the copy at an address equal to the folder: upload what has changed, delete what is
    gone.

    A training may write into the folder meanwhile. A checkpoint that vanishes is left out, and a
    log is copied as far as it went.

    Args:
        where: the option that names the address, for messages.

    Raises:
        ForeignCopy: for an address that holds a copy of another folder.
        UserError: for an address that cannot be written to.
    """
    _check_there(folder)
    with locked(folder, ".copying", where="folder"):
        return _push(folder, Store(address, where))


def _push(folder: Path, store: Store) -> Copied:
    # Only a folder that knows the list at the address may replace it.
    before, state = store.copy(), CopyState.read(folder, store.address)
    if before.number and before.digest not in state.lists:
        raise ForeignCopy(
            f"{store.where}: {store.address} holds a copy that was not made from {folder} as it "
            "is, or that another machine has pushed to since; pull it into a new folder, or give "
            "another address"
        )
    objects = {stored.object for stored in before.files.values()}
    copied_before = state.lists.get(before.digest, {})

    push = _Pushing(
        folder,
        store,
        number=before.number + 1,
        files=before.files,
        times=copied_before,
        objects=set(objects),
        killed=store.unlisted(),
    )
    for _ in range(WALKS):
        if not push.walk():
            break

    after = Copy(push.number, push.files)
    if after.files != before.files or not before.number:
        # After a kill between the two writes, the old list is still there; the folder knows both.
        lists = {before.digest: copied_before, after.digest: push.times}
        CopyState(lists).write(folder, store.address)
        store.write_list(after)

    # Everything but the objects of the new list goes, the file that names them last.
    left = {stored.object: stored.bytes for stored in after.files.values()}
    listing = {UNLISTED} & push.killed
    store.remove(sorted((push.objects | push.killed) - left.keys() - listing))
    store.remove(listing)

    uploaded = sum(before.files.get(name) != stored for name, stored in after.files.items())
    size = sum(size for name, size in left.items() if name not in objects)
    return Copied(uploaded, size, len(after.files) - uploaded)


def pull_copy(address: str, folder: Path, where: str = "address") -> Copied:
    """Copy what lies at an address into a new folder, which appears whole.

    The files are collected in a hidden folder beside it, in which a stopped pull is continued.

    Args:
        where: the option that names the address, for messages.

    Raises:
        UserError: for an address without a copy, a damaged copy, or a folder that is not empty.
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
    """Make a folder equal to the copy, whatever a stopped pull has left in it."""
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
            # A push that replaced the list has deleted objects of the old one.
            if store.copy().digest != copy.digest:
                return _pull(store, partial)
            raise UserError(
                f"{store.where}: {store.full(stored.object)} is missing or not as it was pushed; "
                "push the run again"
            ) from error
        moved, size = moved + 1, size + stored.bytes

    # With these times, the new folder can itself push to the address.
    times: Times = {}
    for name in copy.files:
        status = (partial / name).stat()
        times[name] = [status.st_size, status.st_mtime_ns]
    CopyState({copy.digest: times}).write(partial, store.address)
    return Copied(moved, size, len(copy.files) - moved)
