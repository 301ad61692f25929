"""Open a page in the browser to try a finished run on.

    python -m cm3leon.run demo run=runs/digits
    CM3LEON_API_KEY=... python -m cm3leon.run demo run=runs/digits host=0.0.0.0

Draw, describe, fill in, edit, and look into the memory bank; each result with what makes it again (docs/page.md).
Ctrl-C ends it. Needs the package gradio of cm3leon[demo]; nothing is sent to or fetched from the internet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cm3leon.commands.words import AskingOptions
from cm3leon.config import PositiveInt, Range
from cm3leon.types import UserError

KEPT = ("precision", "weights", "plugins", "trust")
"""Options that a result depends on, which the commands that make it again repeat."""
GRACE = 5
"""Seconds that questions have to be answered in when the page is stopped."""


@dataclass(kw_only=True)
class Options(AskingOptions):
    """Options of the command demo."""

    host: str = "127.0.0.1"
    """Address to listen at; another one than this machine's own needs a password."""
    port: Annotated[int, Range(ge=0, le=65535)] = 7860
    """Number of the port; 0 = any that is free, which is printed."""
    key_file: Path | None = None
    """File with the password of the user cm3leon; null = that of CM3LEON_API_KEY, if there is one."""
    samples: PositiveInt = 8
    """Samples in the making at a time, whose memory is taken at the start; as many may be asked for at a time."""
    queue: PositiveInt = 32
    """Questions that may wait; more are refused."""
    max_pixels: PositiveInt = 16_000_000
    """Pixels that an image may have that is given."""
    body_mb: PositiveInt = 16
    """Megabytes (2^20 bytes) that an image file may have."""


def main(options: Options) -> None:
    """Shows the page until it is stopped.

    Raises:
        UserError: for packages that are missing, a mistake in the options, or a run that cannot be served.
    """
    try:
        from cm3leon.demo.page import Page
        from cm3leon.serve.listening import listen
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cm3leon":
            raise
        raise UserError(
            f"`demo` needs the package {error.name}: pip install 'cm3leon[demo]'"
        ) from error
    from cm3leon.commands.asking import load_model
    from cm3leon.demo.asking import Asker, Limits
    from cm3leon.serve.gate import key_to_listen
    from cm3leon.serve.service import Service

    key = key_to_listen(options.host, options.key_file, "password")
    usual = Options(run=options.run)
    loading = {
        name: getattr(options, name)
        for name in KEPT
        if getattr(options, name) != getattr(usual, name)
    }
    service = Service(
        load_model(options),
        samples=options.samples,
        precision=options.precision,
        window=options.window or 1,
        execution=options.execution,
    )
    limits = Limits(pixels=options.max_pixels, samples=options.samples)
    with service:
        asker = Asker(service, options.run, loading, limits, requests=options.queue)
        page = Page(asker, key=key, queue=options.queue, body_bytes=options.body_mb * 2**20)
        listen(page, host=options.host, port=options.port, grace=GRACE)
