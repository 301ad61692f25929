"""One engine for many callers: their bits, their turns, who has to wait, and who may leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_decoders import SEQ_LEN, VOCAB, model
from test_engine import built, request

from cm3leon.decoders.choosing import NotFiniteLogits
from cm3leon.decoders.engine import Engine
from cm3leon.decoders.generate import answers
from cm3leon.decoders.request import Request, Shape
from cm3leon.serve.engine import Busy, Caller, Cancelled, SharedEngine, Stopped
from cm3leon.training.device import autocast
from cm3leon.types import NotFinite, UserError

pytestmark = pytest.mark.stack

SHAPE = Shape(groups=5, width=4, prefix=SEQ_LEN, tail=SEQ_LEN)
DECODERS = (
    built("top_p", cfg=1, top_p=0.8),
    built("top_p", cfg=3),
    built("cd_k"),
    built("edit"),
    built("beam", beams=3),
    built("top_p", cfg=2, no_repeat=2),
    built("greedy"),
)


def some_request(random: np.random.Generator) -> Request:
    """A request with a random prompt, for a text or an image, by any of the decoders."""
    ids = [VOCAB.eos, *random.integers(4, VOCAB.text_size, random.integers(1, 20))]
    others = [
        np.array([*ids[: random.integers(1, len(ids))], VOCAB.sentinel(0), VOCAB.brk])
        for _ in range(2)
    ]
    return request(
        ids,
        DECODERS[random.integers(len(DECODERS))],
        length=int(random.integers(1, 20)),
        modality=("image", "text")[random.integers(2)],
        others=tuple(others),
        seed=int(random.integers(1000)),
    )


@contextmanager
def shared(waiting: int = 100, **fields: Any) -> Iterator[SharedEngine]:
    """Run an engine in its own thread until the block ends."""
    engine = Engine(model(), VOCAB, SHAPE, batch_invariant=True, **fields)
    found = SharedEngine(engine, nullcontext, waiting)
    try:
        yield found
    finally:
        found.stop(finish=False)


# --------------------------------------------------------------------------------------------- bits


class Kept(Engine):
    """Keeps the logits that each ticket's next tokens were chosen from."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.kept: dict[int, list[bytes]] = {}
        choose = self._chooser.logits

        def logits(kind: Any, lanes: Any, *others: Any) -> torch.Tensor:
            made_CBWV = choose(kind, lanes, *others)
            for number, lane in enumerate(lanes):
                made = made_CBWV[:, number].contiguous().numpy().tobytes()
                self.kept.setdefault(lane.ticket, []).append(made)
            return made_CBWV

        self._chooser.logits = logits  # type: ignore[method-assign]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("window", [1, 3])
def test_bits_do_not_depend_on_neighbours(precision: Any, window: int) -> None:
    """Every logit is the same alone and beside requests that come, go and are cancelled."""
    module, random = model(2), np.random.default_rng(window)
    room = Shape(SHAPE.groups, SHAPE.width, SHAPE.prefix, SHAPE.tail + window - 1)
    asked = [some_request(random) for _ in range(12)]

    def new() -> Kept:
        return Kept(module, VOCAB, room, batch_invariant=True, window=window)

    with autocast(torch.device("cpu"), precision):
        # Alone, a request runs in the first group of a new engine.
        expected = []
        for each in asked:
            engine = new()
            ticket = engine.submit(each)
            (found,) = engine.run()
            expected.append((found.tokens, engine.kept[ticket]))

        # Among others, it runs in any group; some of its neighbours are cancelled halfway.
        engine, tokens, tickets = new(), {}, {}
        for number in random.permutation(len(asked)).tolist():
            neighbours = [engine.submit(some_request(random)) for _ in range(random.integers(3))]

            tickets[engine.submit(asked[number])] = number
            for _ in range(random.integers(6)):
                tokens.update({found.ticket: found.tokens for found in engine.step()})
            for neighbour in neighbours[:1]:
                engine.cancel(neighbour)
        tokens.update({found.ticket: found.tokens for found in engine.run()})

    for ticket, number in tickets.items():
        assert (tokens[ticket], engine.kept[ticket]) == expected[number]


def test_a_batch_invariant_engine_answers_as_another() -> None:
    random = np.random.default_rng(3)
    asked = [some_request(random) for _ in range(10)]
    with shared() as engine:
        found = Caller(engine, "a").answers(asked)
    assert found == answers(model(), asked, vocab=VOCAB, window=1)


def test_logits_that_are_no_numbers_end_their_own_request_alone() -> None:
    module = model()

    class Broken(type(DECODERS[6])):  # type: ignore[misc]
        def logits(self, conditional_BV: Any, unconditional_BV: Any = None) -> Any:
            return conditional_BV * torch.nan

    bad, good = Broken(None), built("top_p", cfg=1)
    fine = [request([VOCAB.eos, 7], good, seed=seed, length=9) for seed in range(3)]
    ((expected,), *_) = answers(module, fine, vocab=VOCAB)

    # The engine itself names the request that broke, and finishes the other one.
    engine = Engine(module, VOCAB, SHAPE, batch_invariant=True)
    first = engine.submit(fine[0])
    engine.step()
    ticket = engine.submit(request([VOCAB.eos, 7], bad))
    with pytest.raises(NotFiniteLogits) as caught:
        engine.step()
    assert caught.value.ticket == ticket

    ((found,),) = [list(engine.run())]
    assert (found.ticket, found.tokens) == (first, expected)

    # The shared one gives the error to the caller whose request it was, and to no other.
    with shared() as several:
        with pytest.raises(NotFinite, match="NaN or infinite"):
            Caller(several, "a").answers([*fine, request([VOCAB.eos, 7], bad)])
        assert Caller(several, "a").answers(fine[:1]) == [[expected]]


# --------------------------------------------------------------------------------- turns and bounds


class Paused(Engine):
    """An engine that waits before each step until it is released, and keeps the seeds it got."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.may_step = threading.Semaphore(0)
        self.came: list[int] = []

    def submit(self, request: Request) -> int:
        self.came.append(request.seeds[0])
        return super().submit(request)

    def step(self) -> Any:
        assert self.may_step.acquire(timeout=20)
        return super().step()


@contextmanager
def paused(groups: int = 1, waiting: int = 100) -> Iterator[tuple[SharedEngine, Paused]]:
    """Run an engine that makes no step before `may_step` is released."""
    room = Shape(groups, 2, SEQ_LEN, SEQ_LEN)
    engine = Paused(model(), VOCAB, room, batch_invariant=True)
    found = SharedEngine(engine, nullcontext, waiting)
    try:
        yield found, engine
    finally:
        engine.may_step.release(10_000)
        found.stop(finish=False)


def asked_of(seeds: Sequence[int], length: int = 4) -> list[Request]:
    """One request for the samples of these seeds."""
    (whole,) = [request([VOCAB.eos, 7], built("top_p", cfg=1), samples=100, length=length)]
    return [whole.part(seeds)]


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call a function in a thread; the list has what it returned or raised once it has ended."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_clients_take_turns_sample_by_sample() -> None:
    with paused() as (engine, inner):
        threads = []
        for client, seeds in (("a", range(5)), ("b", range(10, 12)), ("a", [5]), ("c", [20])):
            count = engine.waiting + engine.running + len(seeds)
            caller = Caller(engine, client)
            threads.append(in_thread(lambda c=caller, s=seeds: c.answers(asked_of(s))))

            # The next client comes when seed 0 runs and all others that were asked for wait.
            def all_wait(waiting: int = count - 1) -> bool:
                return engine.running == 1 and engine.waiting == waiting

            until(all_wait)

        inner.may_step.release(1000)
        for thread, _ in threads:
            thread.join(20)

        # After seed 0, one sample of each client in turn: a, b, c, a, b, then what a has left.
        assert inner.came == [0, 1, 10, 20, 2, 11, 3, 4, 5]
        expected = answers(model(), [*asked_of(range(5)), *asked_of(range(10, 12))], vocab=VOCAB)
        assert [threads[0][1][0], threads[1][1][0]] == [expected[:1], expected[1:]]


def test_what_waits_is_bounded_and_a_refusal_says_when_to_come_again() -> None:
    with paused(waiting=3) as (engine, inner):
        with pytest.raises(
            UserError, match="4 samples are asked for at a time; it must be at most 3"
        ):
            Caller(engine, "a").answers(asked_of(range(4)))
        with pytest.raises(UserError, match="does not fit the engine"):
            Caller(engine, "a").answers(
                [request([VOCAB.eos, 7], built("beam", beams=3), modality="text")]
            )

        # One sample runs and three wait: the engine is full.
        thread, _ = in_thread(lambda: Caller(engine, "a").answers(asked_of([0])))
        until(lambda: engine.running == 1)
        others = in_thread(lambda: Caller(engine, "a").answers(asked_of(range(3))))
        until(lambda: engine.waiting == 3)

        with pytest.raises(Busy, match=r"try again in \d+ seconds") as caught:
            Caller(engine, "b").answers(asked_of([7]))
        assert 1 <= caught.value.seconds <= 600

        # When these are finished, there is room again.
        inner.may_step.release(1000)
        thread.join(20)
        others[0].join(20)
        assert engine.waiting == engine.running == 0
        assert Caller(engine, "b").answers(asked_of([7])) == answers(
            model(), asked_of([7]), vocab=VOCAB
        )


def test_who_leaves_frees_rows_and_places() -> None:
    with paused(groups=2) as (engine, inner):
        leaving, staying = Caller(engine, "a"), Caller(engine, "b")
        gone = in_thread(lambda: leaving.answers(asked_of(range(6))))
        until(lambda: engine.waiting + engine.running == 6)
        stays = in_thread(lambda: staying.answers(asked_of([8])))
        until(lambda: engine.waiting + engine.running == 7)

        # Six samples leave, whether they run or wait.
        leaving.cancel()
        gone[0].join(20)
        assert isinstance(gone[1][0], Cancelled)
        until(lambda: engine.waiting + engine.running == 1)

        # The one that stays gets its answer, and nothing of the others is left in the engine.
        inner.may_step.release(1000)
        stays[0].join(20)
        assert stays[1][0] == answers(model(), asked_of([8]), vocab=VOCAB)
        until(lambda: not inner.busy)
        assert inner.free == 2
        assert (engine.stats.cancelled, engine.stats.finished) == (6, 1)

        with pytest.raises(Cancelled):
            leaving.answers(asked_of([1]))


def test_samples_are_shown_as_they_grow_and_a_callers_fault_is_its_own() -> None:
    shown: list[tuple[int, int, list[int]]] = []

    def broken(*_: object) -> None:
        raise RuntimeError("nobody listens")

    with shared() as engine:
        caller = Caller(engine, "a", on_tokens=lambda *each: shown.append(each), every=4)
        found = caller.answers([*asked_of([3, 4], length=12), *asked_of([5], length=3)])

        bad = in_thread(lambda: Caller(engine, "b", on_tokens=broken).answers(asked_of([1], 9)))
        fine = Caller(engine, "c").answers(asked_of([1], 9))
        bad[0].join(20)
        assert isinstance(bad[1][0], RuntimeError)
        assert fine == answers(model(), asked_of([1], 9), vocab=VOCAB)

    # Told of after 4 and 8 of 12 tokens; a sample of 3 tokens is finished before that.
    assert sorted((each[1], len(each[2])) for each in shown) == [(0, 4), (0, 8), (1, 4), (1, 8)]
    for each, sample, tokens in shown:
        assert found[each][sample][: len(tokens)] == tokens


def test_stopping_finishes_what_it_has_and_takes_no_more() -> None:
    with paused() as (engine, inner):
        thread, result = in_thread(lambda: Caller(engine, "a").answers(asked_of(range(3))))
        until(lambda: engine.waiting + engine.running == 3)
        stopping, _ = in_thread(engine.stop)
        until(lambda: engine._stopping)
        with pytest.raises(Stopped):
            Caller(engine, "b").answers(asked_of([1]))

        inner.may_step.release(1000)
        stopping.join(20)
        thread.join(20)
        assert result[0] == answers(model(), asked_of(range(3)), vocab=VOCAB)
        assert not engine.alive

    # What is not finished in time is cancelled.
    with paused() as (engine, inner):
        thread, result = in_thread(lambda: Caller(engine, "a").answers(asked_of(range(3))))
        until(lambda: engine.waiting + engine.running == 3)
        stopping, _ = in_thread(lambda: engine.stop(timeout=0.01))
        thread.join(20)
        assert isinstance(result[0], Cancelled)

        inner.may_step.release(1000)
        stopping.join(20)
        assert not engine.alive


def test_a_bug_in_a_step_is_told_to_all_who_wait_and_the_next_ones_are_answered() -> None:
    with shared() as engine:
        step, left = engine.engine.step, [1]

        def breaks() -> Any:
            if left:
                left.pop()
                raise RuntimeError("out of order")
            return step()

        engine.engine.step = breaks  # type: ignore[method-assign]

        with pytest.raises(RuntimeError, match="out of order"):
            Caller(engine, "a").answers(asked_of([1]))
        assert Caller(engine, "a").answers(asked_of([1])) == answers(
            model(), asked_of([1]), vocab=VOCAB
        )


@pytest.mark.parametrize("name", ["submit", "cancel", "growing"])
def test_an_engine_that_breaks_leaves_nobody_waiting(name: str) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("out of order")

    with paused() as (engine, inner):
        # Either it breaks at once, or when one sample runs and three wait.
        if name == "submit":
            setattr(inner, name, breaks)
        first = Caller(engine, "a")

        threads = [in_thread(lambda: first.answers(asked_of([0])))]
        until(lambda: engine.running == 1 or not engine.alive)
        threads.append(in_thread(lambda: Caller(engine, "b").answers(asked_of(range(3)))))

        if name != "submit":
            until(lambda: engine.running == 1 and engine.waiting == 3)
            setattr(inner, name, breaks)
        if name == "cancel":
            first.cancel()

        inner.may_step.release(1000)
        for thread, result in threads:
            thread.join(20)
            assert isinstance(result[0], (Stopped, Cancelled))

        until(lambda: not engine.alive)
        with pytest.raises(Stopped, match="stopped because of an error"):
            Caller(engine, "a").answers(asked_of([1]))
