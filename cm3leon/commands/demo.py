"""Open a page in the browser to try a finished run on.

    python -m cm3leon.run demo run=runs/digits
    CM3LEON_API_KEY=... python -m cm3leon.run demo run=runs/digits host=0.0.0.0

Draw, describe, fill in, edit, and look into the memory bank; each result with what makes it again (docs/page.md).
Ctrl-C ends it. Needs the package gradio of cm3leon[demo]; nothing is sent to or fetched from the internet.
"""

from __future__ import annotations

from dataclasses import dataclass

from cm3leon.commands.listening import ListeningOptions, Port, packages_of
from cm3leon.config import PositiveInt

KEPT = ("precision", "weights", "plugins", "trust")
"""Options that a result depends on, which the commands that make it again repeat."""
GRACE = 5
"""Seconds that questions have to be answered in when the page is stopped."""


@dataclass(kw_only=True)
class Options(ListeningOptions):
    """Options of the command demo."""

    port: Port = 7860
    """Number of the port; 0 = any that is free, which is printed."""
    queue: PositiveInt = 32
    """Questions that may wait; more are refused."""


def main(options: Options) -> None:
    """Shows the page until it is stopped.

    Raises:
        UserError: for packages that are missing, a mistake in the options, or a run that cannot be served.
    """
    with packages_of("demo"):
        from cm3leon.demo.page import Page
        from cm3leon.serve.listening import listen
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
        page = Page(asker, key=key, queue=options.queue, body_bytes=options.body_bytes)
        listen(page, host=options.host, port=options.port, grace=GRACE)
