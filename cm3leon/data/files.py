"""Files of a corpus, local or remote: listed, opened, and found by the names in its records."""

from __future__ import annotations

import builtins
import errno
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, Literal, NamedTuple
from unicodedata import normalize

import fsspec
from fsspec.implementations.local import LocalFileSystem, make_path_posix

from cm3leon.data.images import UnusableImage, read_limited
from cm3leon.data.paths import all_paths
from cm3leon.data.remote import (
    CHECKSUMS,
    file_system,
    kind_of,
    missing_path,
    open_remote,
    persistently,
    reaching,
)
from cm3leon.data.source import Skipped
from cm3leon.permissions import check_readable
from cm3leon.types import UserError

CUT_STREAM = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a damaged gzip file may raise."""

NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


class File(NamedTuple):
    """A listed file: its name relative to the root of the listing, its size in bytes, and the
    checksum of a remote file, if known."""

    name: str
    size: int
    checksum: str = ""


class Listing(NamedTuple):
    """The files under some paths, and what lies there but cannot be read, with reasons."""

    files: list[File]
    left_out: list[Skipped]


class Files:
    """The files under paths: files, folders with their subfolders, or globs.

    A path is local, or anything that fsspec opens (`s3://bucket/tars`, `hf://datasets/...`).
    Several are given as in `paths.py`. Names are relative to a root:

        path                      root               a name
        data/cats                 data/cats          sub/7.jpg
        data/cats/sub/7.jpg       data/cats/sub      7.jpg
        data/*/sub                data               cats/sub/7.jpg     before the first wildcard
        data/cats, data/dogs      data               cats/sub/7.jpg     the deepest folder of both

    Args:
        where: the setting that holds the path, for messages.

    Raises:
        UserError: for a path that does not exist, lies in a folder that this user may not read, or
            whose file system is not installed, and for paths on different file systems.
    """

    def __init__(self, path: str | Sequence[str], where: str = "data.path") -> None:
        self.path = path if isinstance(path, str) else ", ".join(path)
        self._where = where
        places = [_Place.of(each, where) for each in all_paths(path, where)]
        self.system = places[0].system
        for place in places:
            if place.system != self.system:
                raise UserError(
                    f"{where}: {places[0].path} and {place.path} lie on different file systems; "
                    "make a corpus of each"
                )
        self.local = isinstance(self.system, LocalFileSystem)
        self._places = places
        self.root = places[0].root
        for place in places[1:]:
            self.root = _common_folder(self.root, place.root)

    @property
    def is_file(self) -> bool:
        """Whether one of the paths is a single file."""
        return any(place.kind == "file" for place in self._places)

    def list(self, suffixes: Iterable[str]) -> list[File]:
        """The files with one of the suffixes (lower case), by path; a single file always counts."""
        return self.listing(suffixes).files

    def listing(self, suffixes: Iterable[str]) -> Listing:
        """As `list`, and what cannot be read. Links are followed, each folder is read once.

        Raises:
            UserError: for a local folder that may not be read, and if one of several paths holds no
                such file.
        """
        endings = tuple(suffixes)
        found: dict[str, File] = {}
        left_out: dict[str, Skipped] = {}
        for place in self._places:
            with reaching(place.path, self._where, local=self.local):
                here = persistently(partial(self._listing_of, place, endings))
            if not here.files and len(self._places) > 1:
                raise UserError(
                    f"{self._where}: {place.path} holds no files that end in {', '.join(endings)}"
                )
            found |= {file.name: file for file in here.files}
            left_out |= {item.file: item for item in here.left_out}
        return Listing(
            sorted(found.values(), key=lambda file: file.name.split("/")),
            sorted(left_out.values(), key=lambda item: item.file),
        )

    def _listing_of(self, place: _Place, endings: tuple[str, ...]) -> Listing:
        if place.kind == "file":
            if self.local:
                return Listing([self._stated(place.whole, os.stat(place.whole))], [])
            return Listing([self._remote(place.whole, self.system.info(place.whole))], [])

        # Remote file systems list everything below a path in one go.
        if not self.local:
            list_all = self.system.glob if place.kind == "glob" else self.system.find
            try:
                found = list_all(place.whole, detail=True)
            except FileNotFoundError as error:
                raise missing_path(place.path, self._where) from error
            return Listing([*self._known(found, endings)], [])

        full_names: Iterable[str]
        told: dict[str, str]
        if place.kind == "glob":
            full_names, told = self.system.glob(place.whole), {}
        else:
            full_names, told = _walk(place.whole, endings, self._where)

        # A link may lead nowhere, and the size is needed.
        files = []
        for full in full_names:
            if not full.lower().endswith(endings):
                continue
            try:
                stat = os.stat(full)
            except OSError as error:
                told[full] = _reason_of(error)
            else:
                if S_ISREG(stat.st_mode):
                    files.append(self._stated(full, stat))
                elif not S_ISDIR(stat.st_mode):
                    told[full] = "not a file, but a pipe, a socket or a device"

        left_out = []
        for full, reason in told.items():
            name = self._relative(full) or "."
            left_out.append(Skipped(name if is_utf8(name) else ascii(name), reason))
        return Listing(files, left_out)

    def open(self, name: str) -> BinaryIO:
        """Open a file; a gzip file is unpacked.

        Raises:
            FileNotFoundError: for a name that does not exist.
        """
        file = self._open(name)
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return _Unpacked(file) if packed else file  # type: ignore[return-value]  # read as one

    def open_raw(self, name: str) -> BinaryIO:
        """Open a file as it is."""
        return self._open(name)

    def image(self, name: str, max_bytes: int, beside: str = "", advice: str = "") -> bytes:
        """Read an image file.

        The name may be spelled differently from the file's: with backslashes, or with accents
        composed or decomposed. An absolute path is accepted if it lies in the folder.

        Args:
            beside: the file whose folder the name is relative to, instead of the root.
            advice: what to do if the file does not exist, appended to the reason.

        Raises:
            UnusableImage: for a file that is missing, outside the folder or larger than
                `max_bytes`.
        """
        missing: OSError | None = None
        try:
            for spelled in self._spelled(name, beside):
                try:
                    with self._open(spelled) as file:
                        return read_limited(file, max_bytes)
                except FileNotFoundError as error:
                    missing = missing or error
        except UserError:  # the network or the credentials fail, which is not this image's fault
            raise
        except UnusableImage as error:
            outside = missing is None and advice and not str(error).startswith("too large")
            raise UnusableImage(f"{error}; {advice}" if outside else str(error)) from error
        except NOT_THERE as error:
            reason = f"unreadable: {type(error).__name__}: the image {name!a}"
            raise UnusableImage(reason) from error
        except OSError as error:
            # Any other error is one of the disk or the network, not of this image.
            if error.errno not in NO_SUCH_NAME:
                raise
            reason = f"unreadable: {error.strerror}: the image {ascii(name)[:80]}"
            raise UnusableImage(reason) from error
        reason = f"unreadable: FileNotFoundError: the image {name!a}"
        raise UnusableImage(f"{reason}; {advice}" if advice else reason) from missing

    def located(self, name: str, beside: str = "") -> str:
        """The name of the file that `image` would read, as it is spelled on the disk.

        Raises:
            UnusableImage: for a name that leads outside the folder.
        """
        spelled = self._spelled(name, beside)
        if not self.local or "\0" in name:
            return spelled[0]
        return next((each for each in spelled if os.path.exists(self.full(each))), spelled[0])

    def _spelled(self, name: str, beside: str) -> builtins.list[str]:
        """Spellings of an image's name from the root. Raises UnusableImage outside the folder."""
        if "://" in name:
            raise UnusableImage(
                f"the image {name!a} is an address; images are not downloaded, img2dataset does so"
            )
        if self.local and name.startswith(f"{self.root}/"):
            name, beside = self._relative(name), ""
        if leaves_folder(name):
            raise UnusableImage(f"the image {name!a} lies outside the folder")
        return [str(PurePosixPath(beside).parent / each) for each in spellings(name)]

    def _open(self, name: str) -> BinaryIO:
        full = self.full(name)
        if not self.local:
            return open_remote(self.system, full, self._where)
        mode = os.stat(full).st_mode
        if not S_ISREG(mode) and not S_ISDIR(mode):  # opening a pipe could block forever
            raise FileNotFoundError(errno.ENOENT, "not a file", full)
        return open(full, "rb")

    def full(self, name: str) -> str:
        """The path of a listed file in its file system."""
        return f"{self.root}/{name}" if self.root or self.local else name

    def _relative(self, full: str) -> str:
        """The name of a file by its path in the file system."""
        return full[len(self.root) + 1 :] if self.root or full.startswith("/") else full

    def _known(
        self, found: Mapping[str, Mapping[str, Any]], endings: tuple[str, ...]
    ) -> Iterator[File]:
        for full, info in found.items():
            if info["type"] == "file" and full.lower().endswith(endings):
                yield self._remote(full, info)

    def remote_checksum(self, name: str) -> str:
        """A remote file's checksum or, if its file system has none, its size."""
        full = self.full(name)
        try:
            with reaching(full, self._where):
                found = self._remote(full, persistently(partial(self.system.info, full)))
        except UserError:
            raise
        except NOT_THERE as error:
            return type(error).__name__
        return found.checksum or str(found.size)

    def _remote(self, full: str, info: Mapping[str, Any]) -> File:
        found = next((str(info[key]) for key in CHECKSUMS if info.get(key) is not None), "")
        return File(self._relative(full), info.get("size") or 0, found)

    def _stated(self, full: str, stat: os.stat_result) -> File:
        return File(self._relative(full), stat.st_size)


class _Place(NamedTuple):
    """One path: its file system, the path in it, its kind, and the root of its names."""

    path: str
    system: Any
    whole: str
    kind: Literal["folder", "file", "glob"]
    root: str

    @classmethod
    def of(cls, path: str, where: str) -> _Place:
        """Find out what a path stands for. Raises UserError for one that does not exist."""
        try:
            if os.path.lexists(path):  # even if its name looks like a URL or a glob
                system, whole = LocalFileSystem(), make_path_posix(path)
            else:
                system, whole = file_system(path)
        except (ImportError, ValueError) as error:
            raise UserError(f"{where}: {path} cannot be opened: {error}") from error
        whole = whole.rstrip("/")
        with reaching(path, where, local=isinstance(system, LocalFileSystem)):
            try:
                kind = persistently(partial(kind_of, system, whole))
            except FileNotFoundError as error:
                raise missing_path(path, where, error) from error

        # Names are relative to the folder, the file's folder, or the folders before a wildcard.
        if kind == "folder":
            return cls(path, system, whole or "/", "folder", whole)
        if kind == "file":
            return cls(path, system, whole, "file", whole.rpartition("/")[0])
        if fsspec.core.has_magic(whole):
            root = "/".join(_before_magic(whole.split("/")[:-1]))
            return cls(path, system, whole, "glob", root)
        if isinstance(system, LocalFileSystem):
            check_readable(Path(whole))
        raise missing_path(path, where)


class _Unpacked(gzip.GzipFile):
    """A gzip file that also closes the file below it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file)
        self._below = file

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._below.close()


def _before_magic(folders: list[str]) -> Iterator[str]:
    """The folders of a glob before its first wildcard."""
    for folder in folders:
        if fsspec.core.has_magic(folder):
            return
        yield folder


def _common_folder(one: str, other: str) -> str:
    """The deepest folder that is or holds both."""
    same = []
    for left, right in zip(one.split("/"), other.split("/"), strict=False):
        if left != right:
            break
        same.append(left)
    return "/".join(same)


def _walk(root: str, endings: tuple[str, ...], where: str) -> tuple[list[str], dict[str, str]]:
    """Find the files below a local folder whose names have one of the endings, and the reasons why
    other files and folders are left out, by their paths.

    Links to folders are followed after all real folders, by name, so that a file is known by its
    own path rather than by that of a link. A folder that was already read, or that contains the
    root, is left out, so that no link leads in a circle.
    """
    found: list[str] = []
    told: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    above = {_identity(str(folder)) for folder in Path(os.path.realpath(root)).parents}

    waiting: list[str] = [root]
    links: list[str] = []
    while waiting or links:
        if not waiting:
            # No real folder is left: follow the first link by name.
            links.sort(reverse=True)
            waiting.append(links.pop())
        folder = waiting.pop()
        try:
            identity = _identity(folder)
            if identity in above:
                told[folder] = "a link to a folder that this one lies in"
                continue
            if identity in seen:
                told[folder] = "a link to a folder that is read already"
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(entry.path)
                    elif entry.name.lower().endswith(endings):
                        found.append(entry.path)
                    elif _is_broken_link_to_a_folder(entry):
                        told[entry.path] = "a link to what is not there"
        except OSError as error:
            if folder == root:
                raise UserError(f"{where}: {root} cannot be read: {error.strerror}") from error
            told[folder] = f"the folder cannot be read: {error.strerror}"
    return found, told


def _is_broken_link_to_a_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a broken link with a name like a folder's."""
    return entry.is_symlink() and "." not in entry.name and not os.path.exists(entry.path)


def _identity(path: str) -> tuple[int, int]:
    """What makes a folder the same one under any path: its device and inode."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _reason_of(error: OSError) -> str:
    """Why a listed name is not a file that can be read."""
    if error.errno == errno.ENOENT:
        return "a link to what is not there"
    if error.errno == errno.ELOOP:
        return "a link that leads in a circle"
    return f"cannot be read: {error.strerror}"


def spellings(name: str) -> list[str]:
    """A file's name as it is, with slashes, and with composed or decomposed accents."""
    slashes = name.replace("\\", "/")
    forms = [normalize(form, slashes) for form in ("NFC", "NFD")] if is_utf8(name) else []
    return list(dict.fromkeys([name, slashes, *forms]))


def leaves_folder(name: str) -> bool:
    """Whether a name leads outside the corpus: absolute, through `..`, or as a URL."""
    return (
        name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "://" in name
    )


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
