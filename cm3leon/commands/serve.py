"""Serve a finished run to many clients, by the endpoints of OpenAI's API.

    python -m cm3leon.run serve run=runs/digits port=8000
    CM3LEON_API_KEY=... python -m cm3leon.run serve run=runs/digits host=0.0.0.0

The endpoints make images from texts, edit images, hold conversations with images, and search the
memory bank (docs/serving.md). After Ctrl-C or SIGTERM, accepted requests are finished first. It
needs the packages of cm3leon[serve].
"""

from __future__ import annotations

from dataclasses import dataclass

from cm3leon.commands.listening import ListeningOptions, Port, packages_of
from cm3leon.config import PositiveInt


@dataclass(kw_only=True)
class Options(ListeningOptions):
    """Options of the command serve."""

    port: Port = 8000
    """Number of the port; 0 = any that is free, which is printed."""
    rows: PositiveInt | None = None
    """Number of rows of the batch for a sample, for guidance or beams; null = as many as the run's
    own decoders need."""
    tokens: PositiveInt | None = None
    """Number of tokens that a prompt and its answer may have together; null = model.seq_len."""
    queue: PositiveInt = 256
    """Samples that may wait, of all clients; more are refused with the status 429."""
    requests: PositiveInt = 256
    """Requests that are open at a time; more are refused with the status 429."""
    max_samples: PositiveInt = 16
    """Images that a request may ask for."""
    grace: PositiveInt = 120
    """Seconds in which accepted requests can finish when the server is stopped."""


def main(options: Options) -> None:
    """Serve until stopped.

    Raises:
        UserError: for missing packages, a mistake in the options, or a run that cannot be served.
    """
    with packages_of("serve"):
        from cm3leon.serve.listening import listen
    from cm3leon.commands.asking import load_model
    from cm3leon.serve.app import Server
    from cm3leon.serve.gate import key_to_listen
    from cm3leon.serve.service import Service
    from cm3leon.serve.setting import Limits

    # Without a key the model is not even loaded, unless only this machine can ask.
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
        body_bytes=options.body_bytes,
        pixels=options.max_pixels,
        samples=options.max_samples,
        requests=options.requests,
    )
    with service:
        server = Server(service, limits=limits, key=key)
        listen(server, host=options.host, port=options.port, grace=options.grace, path="/v1")
