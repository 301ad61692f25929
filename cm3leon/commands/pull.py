"""Copy a run or an export from an object store into a new folder.

    python -m cm3leon.run pull address=s3://bucket/runs/tars folder=runs/tars

The address is one that `push folder=runs/tars to=s3://bucket/runs/tars` has copied to. Each file is
compared with its SHA-256. The run's own command then goes on from its newest checkpoint. A copy
that was interrupted goes on with the same command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Options:
    """Options of the command pull."""

    address: str
    """An address that push has copied to, such as s3://bucket/runs/tars."""
    folder: Path
    """A folder to make; it must not exist, or be empty."""


def main(options: Options) -> None:
    """Copy the files, and print how many there were.

    Raises:
        UserError: for an address that cannot be read or has no copy, or a folder that is not empty.
    """
    from cm3leon.hub.copies import pull_copy

    copied = pull_copy(options.address, options.folder)
    print(f"pulled to {options.folder}: {copied}")
