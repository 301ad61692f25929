"""Serve a finished run to many clients, by the endpoints of OpenAI's API.

    python -m cm3leon.run serve run=runs/digits port=8000
    CM3LEON_API_KEY=... python -m cm3leon.run serve run=runs/digits host=0.0.0.0

Texts to images, edits, conversations with images, and the memory bank (docs/serving.md). Ctrl-C and SIGTERM end it when
what was accepted is finished. Needs the packages of cm3leon[serve].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cm3leon.commands.words import AskingOptions
from cm3leon.config import PositiveInt, Range
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Options(AskingOptions):
    """Options of the command serve."""

    host: str = "127.0.0.1"
    """Address to listen at; another one than this machine's own needs an API key."""
    port: Annotated[int, Range(ge=0, le=65535)] = 8000
    """Number of the port; 0 = any that is free, which is printed."""
    key_file: Path | None = None
    """File with the API key that requests have to bear; null = that of CM3LEON_API_KEY, if there is one."""
    samples: PositiveInt = 8
    """Samples in the making at a time, whose memory is taken at the start."""
    rows: PositiveInt | None = None
    """Number of rows of a sample, for guidance or beams; null = as many as the run's own decoders need."""
    tokens: PositiveInt | None = None
    """Number of tokens that a prompt and its answer may have together; null = model.seq_len."""
    queue: PositiveInt = 256
    """Samples that may wait, of all clients; more are refused with the status 429."""
    requests: PositiveInt = 256
    """Requests in work at a time; more are refused with the status 429."""
    max_samples: PositiveInt = 16
    """Images that a request may ask for."""
    max_pixels: PositiveInt = 16_000_000
    """Pixels that an image of a request may have."""
    body_mb: PositiveInt = 16
    """Megabytes (2^20 bytes) that a request may have."""
    grace: PositiveInt = 120
    """Seconds that accepted requests have to be finished in, when the server is stopped."""


def main(options: Options) -> None:
    """Serves until it is stopped.

    Raises:
        UserError: for packages that are missing, a mistake in the options, or a run that cannot be served.
    """
    try:
        from cm3leon.serve.listening import listen
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cm3leon":
            raise
        raise UserError(
            f"`serve` needs the package {error.name}: pip install 'cm3leon[serve]'"
        ) from error
    from cm3leon.commands.asking import load_model
    from cm3leon.serve.app import Server
    from cm3leon.serve.gate import key_to_listen
    from cm3leon.serve.service import Service
    from cm3leon.serve.setting import Limits

    key = key_to_listen(options.host, options.key_file, "API key")
    service = Service(
        load_model(options),
        samples=options.samples,
        rows=options.rows,
        tokens=options.tokens,
        waiting=options.queue,
        precision=options.precision,
        window=options.window or 1,
        execution=options.execution,
    )
    limits = Limits(
        body_bytes=options.body_mb * 2**20,
        pixels=options.max_pixels,
        samples=options.max_samples,
        requests=options.requests,
    )
    with service:
        server = Server(service, limits=limits, key=key)
        listen(server, host=options.host, port=options.port, grace=options.grace, path="/v1")
