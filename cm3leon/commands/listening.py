"""What the commands that listen at a port, serve and demo, have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cm3leon.commands.words import AskingOptions
from cm3leon.config import PositiveInt, Range
from cm3leon.types import UserError

Port = Annotated[int, Range(ge=0, le=65535)]


@dataclass(kw_only=True)
class ListeningOptions(AskingOptions):
    """Options of a command that listens at a port."""

    host: str = "127.0.0.1"
    """Address to listen at; another one than this machine's own needs a key."""
    port: Port
    """Number of the port; 0 = any that is free, which is printed."""
    key_file: Path | None = None
    """File with the key that whoever asks has to give; null = that of CM3LEON_API_KEY, if there is one."""
    samples: PositiveInt = 8
    """Samples in the making at a time, whose memory is taken at the start."""
    queue: PositiveInt
    """What may wait at a time, of all clients; more is refused."""
    max_pixels: PositiveInt = 16_000_000
    """Pixels that an image may have that is given."""
    body_mb: PositiveInt = 16
    """Megabytes (2^20 bytes) that a request, or a file of an image, may have."""

    @property
    def body_bytes(self) -> int:
        """Bytes that a request may have."""
        return self.body_mb * 2**20


@contextmanager
def packages_of(command: str) -> Iterator[None]:
    """Imports inside the block may miss a package of the command's extra, which has its name.

    Raises:
        UserError: that names the package, and how it is installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cm3leon":
            raise
        raise UserError(
            f"`{command}` needs the package {error.name}: pip install 'cm3leon[{command}]'"
        ) from error
