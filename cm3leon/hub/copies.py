"""Copies of runs and exports at an address (s3://bucket/runs/tars): pushed as often as wished, pulled on any machine.

A run is made on a disk, because it needs locks and renames, which an object store has not. What is finished there is
copied:

    s3://bucket/runs/tars/cm3leon-files.json              the files of the copy, with sizes and SHA-256
    s3://bucket/runs/tars/pretraining/step_00000040/...   each under its name
    s3://bucket/runs/tars/pretraining/log.jsonl.3         one that has changed since, under another

The list is written last, and an object that it names is never written over: a push that is killed leaves the copy
before as it was. What it has uploaded is named by a file beside the list, which is written first, and goes with the
next push. Nothing of a file that is larger than a block is held in memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cm3leon.hub.store import FILES, UNLISTED, Copy, Gone, Store, Stored, reading
from cm3leon.io import digest_of, read_json, sha256, write_json
from cm3leon.locks import LOCK, locked
from cm3leon.paths import check_folder, make_folder
from cm3leon.stages.folders import SUPERSEDED
from cm3leon.training.steps import MANIFEST, numbered, step_of
from cm3leon.types import UserError

STATE = ".copied.json"
"""In the folder here: the lists of the copy that are its own, and what of it was copied when."""
LEFT_OUT = (SUPERSEDED, "decoded")
"""Folders that only serve the run on the disk where it lies."""
WALKS = 3
"""Times that a folder is walked through while the checkpoints of a training vanish from it."""


class ForeignCopy(UserError):
    """A copy at an address that was not made from the folder which is pushed there."""


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


# ------------------------------------------------------------------------------------------------ the folder here


def _is_complete(checkpoint: Path, files: list[str]) -> bool:
    """Whether a checkpoint's folder holds all of it: one that is being written or deleted does not."""
    if MANIFEST not in files:
        return False
    try:
        return set(read_json(checkpoint / MANIFEST, {str: str})) <= set(files)
    except (OSError, UserError):
        return False


def kept_files(folder: Path) -> Iterator[str]:
    """Names of the files of a folder that are copied: no hidden ones, and of checkpoints those that are complete.

    The names of a copy's own lists are left out at the top, where they would lie at the address.

    Raises:
        UserError: for a folder in it that cannot be read.
    """
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        within = Path(place)
        if step_of(within) is not None and not _is_complete(within, files):
            folders.clear()
            continue
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in LEFT_OUT
        )
        for name in sorted(files):
            if within == folder and name in (FILES, UNLISTED):
                continue
            # The index of a checkpoint is called .metadata.
            if not name.startswith(".") or step_of(within) is not None:
                yield (within / name).relative_to(folder).as_posix()


def _refuse_unreadable(error: OSError) -> None:
    # Its files would count as deleted, and be deleted at the address. One that vanished is deleted.
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"folder: {error.filename} cannot be read here ({error.strerror})")


def _check_there(folder: Path) -> None:
    check_folder(folder, "folder")
    if not folder.is_dir():
        raise UserError(f"folder: {folder} does not exist; give the folder of a run or an export")


def kept_sizes(folder: Path) -> dict[str, int]:
    """The files of a folder that are copied, with their bytes.

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
    """The folders of the trainings to whose checkpoints some of the files belong."""
    return {str(Path(name).parent.parent) for name in names if _is_of_checkpoint(name)}


# ------------------------------------------------------------------------------------------------ there and back


@dataclass
class _Pushing:
    """A push under way."""

    folder: Path
    store: Store
    number: int
    """Of the list that is to be written."""
    files: dict[str, Stored]
    """What that list is to name: at first the files of the copy before, then what the last walk found."""
    times: Times
    objects: set[str]
    """Objects of the copy before and of this push, none of which is written over."""
    killed: set[str]
    """Objects that pushes which were killed may have left."""

    def walk(self) -> bool:
        """Copy what has changed in the folder since `files` was made.

        A training may have deleted the checkpoint that was being copied, and its next one is not among those that were
        found: then the checkpoints of the copy before are kept.

        Returns:
            Whether a training was left without a new checkpoint, so that another walk is worth while.
        """
        found, gone = self._found()

        # What has changed gets another name there, so that the list before stays true until the next one is written.
        # Points of a study link the stages that they share, which are copied once.
        paths: dict[str, str] = {}
        chosen: dict[str, str] = {}
        for name, now in found.items():
            if name not in self.files or self.times.get(name) != now:
                path = paths[name] = os.path.realpath(self.folder / name)
                if path not in chosen:
                    chosen[path] = self._object_for(name, found)
        if chosen or found.keys() != self.files.keys():
            self.killed.add(UNLISTED)  # It goes with what it names.
            self.store.write_unlisted(self.objects | self.killed)

        files: dict[str, Stored] = {}
        uploaded: dict[str, Stored] = {}
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

        # Of a checkpoint that was deleted meanwhile no part is of use.
        broken = {Path(name).parent for name in gone if _is_of_checkpoint(name)}
        files = {name: stored for name, stored in files.items() if Path(name).parent not in broken}
        times = {name: found[name] for name in files}

        lost: set[str] = set()
        for training in (_trainings(self.files) | _trainings(gone)) - _trainings(files):
            if numbered(self.folder / training):  # else they were all deleted on purpose
                lost.add(training)
        for name, stored in self.files.items():
            if _trainings([name]) & lost:
                files[name], times[name] = stored, self.times.get(name, [])
        self.files, self.times = files, times
        return bool(lost)

    def _found(self) -> tuple[Times, set[str]]:
        """The files of the folder with their times, and the names of those that vanished since they were listed."""
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
        """A name that no object of the copy before and of this push has, nor any file that may get its own."""
        chosen = name
        if name in self.files or name in self.objects:
            numbers = itertools.count(self.number)
            while (chosen := f"{name}.{next(numbers)}") in self.objects or chosen in found:
                pass
        self.objects.add(chosen)
        return chosen


def push_copy(folder: Path, address: str, where: str = "to") -> Copied:
    """Copy what a folder holds and the address has not, and delete there what it holds no more.

    A training may write into the folder meanwhile: a checkpoint that vanishes is left out, a log is copied as far as
    it went.

    Raises:
        ForeignCopy: for an address that holds a copy of another folder.
        UserError: for one that cannot be written to.
    """
    _check_there(folder)
    with locked(folder, ".copying", where="folder"):
        return _push(folder, Store(address, where))


def _push(folder: Path, store: Store) -> Copied:
    before, state = store.copy(), State.read(folder, store.address)
    if before.number and before.digest not in state.lists:
        raise ForeignCopy(
            f"{store.where}: {store.address} holds a copy that was not made from {folder} as it is, or that another "
            "machine has pushed to since; pull it into a new folder, or give another address"
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
        # A kill between the two leaves either list there, and both are known as this folder's.
        lists = {before.digest: copied_before, after.digest: push.times}
        State(lists).write(folder, store.address)
        store.write_list(after)

    left = {stored.object: stored.bytes for stored in after.files.values()}
    listing = {UNLISTED} & push.killed
    store.remove(sorted((push.objects | push.killed) - left.keys() - listing))
    store.remove(listing)

    uploaded = sum(before.files.get(name) != stored for name, stored in after.files.items())
    size = sum(size for name, size in left.items() if name not in objects)
    return Copied(uploaded, size, len(after.files) - uploaded)


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
