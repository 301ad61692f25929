"""A model that many callers ask at a time, each as if it were alone. It knows nothing of HTTP.

    with Service(CM3Leon.load("runs/digits"), samples=8) as service:
        with service.asking(service.caller("me")) as model:
            model.generate("a seven", n=4)

Callers are threads. What is done beside generating tokens (encoding and decoding images, searching
the memory bank) is done by one of them at a time, under a lock. A caller releases the lock while it
waits for the engine:

    caller 1   encode │ waits for its samples ............ │ decode
    caller 2          │ encode │ waits for its samples ........... │ decode
    engine            │ steps of caller 1's samples, then of both
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self

from cm3leon.api import CM3Leon, asked_through
from cm3leon.config import Component
from cm3leon.decoders.engine import Engine
from cm3leon.decoders.memory import free_memory
from cm3leon.decoders.request import Request, Shape
from cm3leon.registry import DECODERS
from cm3leon.serve.engine import Caller, OnTokens, SharedEngine
from cm3leon.stages.opening import TUNED
from cm3leon.training.device import autocast
from cm3leon.types import Execution, Notice, Precision, UserError


class Service:
    """A model behind a shared engine, whose memory is taken at the start and never grows.

    Args:
        model: its network, tokenizers and memory bank are used.
        samples: how many are generated at a time.
        rows: rows of a sample, for guidance's streams or for beams; None = as many as the run's own
            decoders need.
        tokens: the most tokens of a prompt and its answer together; None = the model's positions.
        waiting: how many samples may wait at a time.
        window: as in `CM3Leon.load`; a window of one serves many callers best.
        execution: as in `CM3Leon.load`.

    Raises:
        UserError: for more room than the device has.
    """

    def __init__(
        self,
        model: CM3Leon,
        *,
        samples: int = 8,
        rows: int | None = None,
        tokens: int | None = None,
        waiting: int = 256,
        precision: Precision = "auto",
        window: int = 1,
        execution: Execution = "eager",
    ) -> None:
        self.model = model
        run = model.run

        # The prefix may be as long as the positions, and the tail too, with drafts behind it.
        longest = min(tokens or run.seq_len, run.seq_len)
        shape = Shape(samples, rows or rows_of(model), longest, longest + window - 1)
        computing = partial(autocast, run.device, precision)
        with computing():
            _check_room(model, shape)
            engine = Engine(
                run.model,
                run.vocab,
                shape,
                window=window,
                execution=execution,
                batch_invariant=True,
            )
        self.engine = SharedEngine(engine, computing, waiting)
        self._beside = threading.Lock()
        _read_all(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.engine.stop(finish=False)

    @property
    def row_tokens(self) -> int:
        """Tokens of one row of an image's codes."""
        return self.model.run.vocab.layout.row_length(self.model.run.grid[1])

    def caller(
        self, client: str, *, on_tokens: OnTokens | None = None, every: int | None = None
    ) -> Caller:
        """A caller, whose `cancel` may be called from another thread.

        Args:
            client: whose turns the caller takes; callers of one client share its turns.
            on_tokens: is shown the samples as they grow, see `Caller`.
            every: tokens after which it is shown them; None = a row of an image's codes.
        """
        return Caller(self.engine, client, on_tokens=on_tokens, every=every or self.row_tokens)

    @contextmanager
    def asking(self, caller: Caller, notices: list[Notice] | None = None) -> Iterator[CM3Leon]:
        """The model, which the caller's thread may ask inside the block.

        Args:
            notices: receives what would otherwise be warnings.
        """
        with self._beside:
            aside = _Aside(caller, self._beside)
            yield asked_through(self.model, aside, [] if notices is None else notices)


class _Aside:
    """Releases the lock for work beside the engine while a caller waits for its answers."""

    def __init__(self, caller: Caller, beside: threading.Lock) -> None:
        self._caller, self._beside = caller, beside

    def answers(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        self._beside.release()
        try:
            return self._caller.answers(requests)
        finally:
            self._beside.acquire()


def is_tuned(model: CM3Leon) -> bool:
    """Whether a model was fine-tuned on instructions."""
    return model.run.experiment.objective.name == TUNED


def takes_questions(model: CM3Leon) -> bool:
    """Whether a model was tuned on instructions here, or for chat by its publisher."""
    return is_tuned(model) or bool(model.run.vocab.layout.turn)


def rows_of(model: CM3Leon) -> int:
    """Rows that a sample needs for the run's own decoders, and for edits if the model is tuned."""
    experiment = model.run.experiment
    names: list[Component | str] = [experiment.decoder, experiment.text_decoder]
    if is_tuned(model):
        names.append("edit")
    decoders = [DECODERS.build(each) for each in names]
    # A caller may ask for guidance, which takes two, even if the run's decoders have none.
    return max(2, *(max(each.streams, each.beams) for each in decoders))


def _check_room(model: CM3Leon, shape: Shape) -> None:
    """Raise UserError if keys and values of this shape do not fit into the free memory."""
    wanted = model.run.model.cache_bytes(
        groups=shape.groups, width=shape.width, prefix=shape.prefix, tail=shape.tail
    )
    free = free_memory(model.run.device)
    if wanted > 0.9 * free:
        raise UserError(
            f"{shape.groups} samples of {shape.width} rows and {shape.tail} tokens take "
            f"{wanted / 1e9:.3g} GB of keys and values, {free / 1e9:.3g} GB are free; serve fewer "
            "samples at a time (samples=), or shorter ones (tokens=)"
        )


def _read_all(model: CM3Leon) -> None:
    """Read what requests need, so that the first one does not wait for it and memory is taken
    now."""
    run = model.run
    _ = run.text_tokenizer, run.image_tokenizer
    if run.has_retriever:
        _ = run.retriever
        if run.has_bank:
            _ = run.bank, run.bank_tokens
