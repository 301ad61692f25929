"""Upload an exported folder to the Hugging Face Hub.

    python -m cm3leon.run push folder=exported to=org/name dry_run=true    # what would be uploaded
    python -m cm3leon.run push folder=exported to=org/name

The folder is one that `export to=hf` or `export to=peft` wrote. A model that is not there yet is made, private unless
private=false; one that is there stays as visible as it is. The token is the one of HF_TOKEN or of `hf auth login`: it
is never written nor shown. CM3Leon.load("org/name") reads the model again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Options:
    """Options of the command push."""

    folder: Path
    """A folder to upload, made by export."""
    to: str
    """A name on the Hub, as org/name."""
    private: bool = True
    """Whether a model that is made is private."""
    revision: str | None = None
    """A branch to upload to, made where it is not there; null = the main one."""
    message: str = "Upload a CM3Leon model"
    """A text for the commit."""
    dry_run: bool = False
    """Show files and sizes, and upload nothing."""


def main(options: Options) -> None:
    """Prints the files with their sizes, and uploads them.

    Raises:
        UserError: for a folder that no export wrote, or a Hub that refuses it or cannot be reached.
    """
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
