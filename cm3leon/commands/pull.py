"""Copy a run or an export from an address of a store into a new folder.

    python -m cm3leon.run pull address=s3://bucket/runs/tars folder=runs/tars

What `push folder=runs/tars to=s3://bucket/runs/tars` has copied there appears here whole, each file compared with its
SHA-256; the run's own command then goes on from its newest checkpoint. The same command goes on where it was stopped.
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
    """Copies, and prints what was copied.

    Raises:
        UserError: for an address without a copy or that cannot be read, or a folder that holds something.
    """
    from cm3leon.hub.copies import pull_copy

    copied = pull_copy(options.address, options.folder)
    print(f"pulled to {options.folder}: {copied}")
