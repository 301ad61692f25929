"""Open a page in the browser on which a finished run can be tried.

    python -m cm3leon.run demo run=runs/digits
    CM3LEON_API_KEY=... python -m cm3leon.run demo run=runs/digits host=0.0.0.0

The page draws, describes, fills in and edits images, and looks into the memory bank. Beside each
result stands the command that makes it again (docs/page.md). Ctrl-C ends it. It needs the package
gradio of cm3leon[demo]; nothing is sent to the internet or fetched from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cm3leon.commands.listening import ListeningOptions, Port, packages_of
from cm3leon.config import PositiveInt

KEPT = ("precision", "weights", "plugins", "trust")
"""Options that a result depends on; the command shown beside it repeats them."""
GRACE = 5
"""Seconds that open questions have to be answered in when the page is stopped."""


@dataclass(kw_only=True)
class Options(ListeningOptions):
    """Options of the command demo."""

    port: Port = 7860
    """Number of the port; 0 = any that is free, which is printed."""
    queue: PositiveInt = 32
    """Questions that may wait; more are refused."""


def main(options: Options) -> None:
    """Show the page until it is stopped.

    Raises:
        UserError: for missing packages, a mistake in the options, or a run that cannot be served.
    """
    with packages_of("demo"):
        from cm3leon.demo.page import Page
        from cm3leon.serve.listening import listen
    from cm3leon.commands.asking import load_model
    from cm3leon.demo.asking import Asker, AskLimits
    from cm3leon.serve.gate import key_to_listen
    from cm3leon.serve.service import Service

    key = key_to_listen(options.host, options.key_file, "password")

    # Of the options for loading, a command that makes a result again names those that were given.
    usual = Options(run=options.run)
    loading = {}
    for name in KEPT:
        if getattr(options, name) != getattr(usual, name):
            loading[name] = getattr(options, name)

    service = Service(
        load_model(options),
        samples=options.samples,
        precision=options.precision,
        window=options.window or 1,
        execution=options.execution,
    )
    limits = AskLimits(pixels=options.max_pixels, samples=options.samples)
    with service:
        asker = Asker(service, options.run, loading, limits, requests=options.queue)
        page = Page(asker, key=key, queue=options.queue, body_bytes=options.body_bytes)
        listen(page, host=options.host, port=options.port, grace=GRACE)
