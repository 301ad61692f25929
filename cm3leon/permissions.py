"""Permissions: modes of written files, and files that may not be read.

Some libraries and copies set modes of their own: safetensors writes files that only their owner can
read (0600), and a copied tree keeps the modes of its original. All files of a run or an export get
the modes that `open` and `mkdir` give, so the umask alone decides who else can read them.
"""

from __future__ import annotations

from pathlib import Path

from cm3leon.types import UserError


def check_readable(path: Path) -> None:
    """Raise UserError if this user may not read a file or a folder.

    Other errors, such as a missing file, are left to the reader. Libraries report them well, but
    report a lack of permission as a missing or a damaged file.
    """
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except PermissionError as error:
        raise UserError(
            f"no permission to read {path}; its owner can allow it: chmod -R a+rX {path}"
        ) from error
    except OSError:
        return


def check_folder_readable(folder: Path) -> None:
    """Raise UserError if this user may not read a folder or one of the files in it."""
    check_readable(folder)
    for file in folder.glob("*"):
        check_readable(file)


def use_umask(path: Path) -> None:
    """Give a file, or a folder and everything in it, the modes that new files get by the umask."""
    # Reading the umask means setting it, also for other threads. A new file shows it as well.
    probe = path.with_name(f".{path.name}.mode")
    probe.mkdir()
    try:
        (probe / "file").touch()
        of_folders = probe.stat().st_mode & 0o777
        of_files = (probe / "file").stat().st_mode & 0o777
    finally:
        (probe / "file").unlink(missing_ok=True)
        probe.rmdir()

    for each in (path, *path.rglob("*")):
        if not each.is_symlink():
            each.chmod(of_folders if each.is_dir() else of_files)
