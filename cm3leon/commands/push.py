"""Upload an exported folder to the Hugging Face Hub, or a run or an export to an object store.

    python -m cm3leon.run push folder=exported to=org/name dry_run=true    # lists the files
    python -m cm3leon.run push folder=exported to=org/name
    python -m cm3leon.run push folder=runs/tars to=s3://bucket/runs/tars
    python -m cm3leon.run push folder=runs/tars to=s3://bucket/runs/tars every=300    # seconds

For the Hub, the folder is one that `export to=hf` or `export to=peft` wrote. A new model is private
unless private=false; a model that exists keeps its visibility. The token comes from HF_TOKEN or
`hf auth login`, and is neither written nor printed. CM3Leon.load("org/name") reads the model again.

An address of an object store takes the folder of any run, sweep, study or export. Finished files
are copied, and what is there already is not copied again. `pull` makes a folder of the copy on
another machine, where the run can go on (docs/data.md).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cm3leon.config import PositiveInt
from cm3leon.secrets import masked
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Options:
    """Options of the command push."""

    folder: Path
    """A folder to upload, made by export; for an address also that of a run."""
    every: PositiveInt | None = None
    """Seconds between two copies to an address, until Ctrl-C; null = a single copy."""
    to: str
    """A name on the Hub, as org/name, or an address of a store, such as s3://bucket/runs/tars."""
    private: bool = True
    """Whether a new model on the Hub is private."""
    revision: str | None = None
    """A branch to upload to, created if it does not exist; null = the main one."""
    message: str = "Upload a CM3Leon model"
    """A text for the commit."""
    dry_run: bool = False
    """Show files and sizes, and upload nothing."""

    def check(self) -> None:
        if self.every is not None and "://" not in self.to:
            raise UserError(
                f"every is given, which is for an address such as s3://bucket/runs/tars, but to is "
                f"{self.to}; leave it out"
            )
        if self.revision is not None and "://" in self.to:
            raise UserError(
                f"revision is given, which only the Hub has, but to is {self.to}; leave it out"
            )


def main(options: Options) -> None:
    """Print the files with their sizes, and upload them.

    Raises:
        UserError: for a folder that no export wrote, or a Hub or a store that refuses the upload or
            cannot be reached.
    """
    if "://" in options.to:
        _push_to_address(options)
        return

    from cm3leon.hub.repository import Upload, push

    print("\n".join(Upload(options.folder).listed()))
    if options.dry_run:
        print(f"nothing was uploaded to {options.to}, as dry_run is true")
        return
    address = push(
        options.folder,
        options.to,
        private=options.private,
        revision=options.revision,
        message=options.message,
    )
    print(f"uploaded: {address}")


def _push_to_address(options: Options) -> None:
    """Copy a folder to a store, once or every `every` seconds."""
    from cm3leon.hub.copies import ForeignCopy, kept_sizes, push_copy

    # An address may hold a password, as in sftp://me:password@host/runs.
    address = masked(options.to)
    if options.dry_run:
        sizes = kept_sizes(options.folder)
        print("\n".join(f"{size:>16,} bytes  {name}" for name, size in sizes.items()))
        print(f"{sum(sizes.values()):>16,} bytes in {len(sizes)} files")
        print(f"nothing was uploaded to {address}, as dry_run is true")
        return

    while True:
        try:
            print(f"pushed to {address}: {push_copy(options.folder, options.to)}", flush=True)
        except ForeignCopy:
            raise
        except UserError as error:
            if options.every is None:
                raise
            # Next time the network may be back, or the training have made its folder.
            print(masked(f"{error}; trying again in {options.every} s"), flush=True)
        if options.every is None:
            return
        time.sleep(options.every)
