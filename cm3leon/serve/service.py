"""A model that many callers ask at a time, each as it would ask it alone; it knows nothing of HTTP.

    with Service(CM3Leon.load("runs/digits"), samples=8) as service:
        with service.asking(service.caller("me")) as model:
            model.generate("a seven", n=4)

Callers are threads. What a model does beside its decoder (encoding and decoding images, searching the memory bank) is
done by one of them at a time; while its samples are in the making another one has its turn.
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
    """A model behind a shared engine, whose room is taken at the start and stays as it is.

    Args:
        model: of which the tokenizers, the memory bank and the decoder are used.
        samples: in the making at a time.
        rows: of a sample: guidance's streams, or beams; None = as many as the run's own decoders need.
        tokens: that a prompt and its answer may have together; None = the model's positions.
        waiting: samples that may wait at a time.
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
        """Tokens of a row of an image's codes."""
        return self.model.run.vocab.layout.row_length(self.model.run.grid[1])

    def caller(
        self, client: str, *, on_tokens: OnTokens | None = None, every: int | None = None
    ) -> Caller:
        """One who is to ask; its `cancel` may be called from another thread.

        Args:
            client: callers of one client share its turns.
            on_tokens: is shown the samples as they grow, see `Caller`.
            every: tokens after which it is; None = a row of an image's codes.
        """
        return Caller(self.engine, client, on_tokens=on_tokens, every=every or self.row_tokens)

    @contextmanager
    def asking(self, caller: Caller, notices: list[Notice] | None = None) -> Iterator[CM3Leon]:
        """The model, as this caller's thread may ask it inside the block.

        Args:
            notices: is given what would be warned of.
        """
        with self._beside:
            aside = _Aside(caller, self._beside)
            yield asked_through(self.model, aside, [] if notices is None else notices)


class _Aside:
    """Lets others work beside the engine while a caller waits for its answers."""

    def __init__(self, caller: Caller, beside: threading.Lock) -> None:
        self._caller, self._beside = caller, beside

    def answers(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        self._beside.release()
        try:
            return self._caller.answers(requests)
        finally:
            self._beside.acquire()


def is_tuned(model: CM3Leon) -> bool:
    """Whether it was fine-tuned on instructions."""
    return model.run.experiment.objective.name == TUNED


def takes_questions(model: CM3Leon) -> bool:
    """Whether it was tuned on instructions, here or for chat by its publisher."""
    return is_tuned(model) or bool(model.run.vocab.layout.turn)


def rows_of(model: CM3Leon) -> int:
    """Rows that a sample takes by the run's own decoders, with those of edits where it was tuned on instructions."""
    experiment = model.run.experiment
    names: list[Component | str] = [experiment.decoder, experiment.text_decoder]
    if is_tuned(model):
        names.append("edit")
    decoders = [DECODERS.build(each) for each in names]
    # Two are what guidance takes, which a caller may ask for where the run's decoders go without.
    return max(2, *(max(each.streams, each.beams) for each in decoders))


def _check_room(model: CM3Leon, shape: Shape) -> None:
    wanted = model.run.model.cache_bytes(
        groups=shape.groups, width=shape.width, prefix=shape.prefix, tail=shape.tail
    )
    free = free_memory(model.run.device)
    if wanted > 0.9 * free:
        raise UserError(
            f"{shape.groups} samples of {shape.width} rows and {shape.tail} tokens take {wanted / 1e9:.3g} GB of keys "
            f"and values, {free / 1e9:.3g} GB are free; serve fewer samples at a time (samples=), or shorter ones "
            "(tokens=)"
        )


def _read_all(model: CM3Leon) -> None:
    """Reads from the run what requests need, so that the first of them does not wait and memory does not grow."""
    run = model.run
    _ = run.text_tokenizer, run.image_tokenizer
    if run.has_retriever:
        _ = run.retriever
        if run.has_bank:
            _ = run.bank, run.bank_tokens
