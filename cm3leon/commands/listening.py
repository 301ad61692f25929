"""What the commands that listen at a port share: serve and demo."""

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
    """Address to listen at; any but this machine's own (127.0.0.1) needs a key."""
    port: Port
    """Number of the port; 0 = any that is free, which is printed."""
    key_file: Path | None = None
    """File with the key that clients have to give; null = the environment's CM3LEON_API_KEY, if it
    is set."""
    samples: PositiveInt = 8
    """Samples that are drawn at a time; memory for them is taken at the start."""
    queue: PositiveInt
    """How many may wait at a time, of all clients; more are refused."""
    max_pixels: PositiveInt = 16_000_000
    """Pixels that a client's image may have."""
    body_mb: PositiveInt = 16
    """Megabytes (2^20 bytes) that a request, or an image file, may have."""

    @property
    def body_bytes(self) -> int:
        """Bytes that a request may have."""
        return self.body_mb * 2**20


@contextmanager
def packages_of(command: str) -> Iterator[None]:
    """Explain imports that fail inside the block: the package belongs to the command's extra.

    Raises:
        UserError: for a missing package, with how it is installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cm3leon":
            raise
        raise UserError(
            f"`{command}` needs the package {error.name}: pip install 'cm3leon[{command}]'"
        ) from error
