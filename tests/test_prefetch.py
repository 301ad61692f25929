"""Batches are made ahead and in order; state and errors are those of the batch that is taken."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest
import torch
from counted import Collectives, HostReads, difference, seen
from torch import nn

from cm3leon.training.config import TrainingConfig
from cm3leon.training.prefetch import AHEAD, WHOLE, BatchSplit, Prefetch
from cm3leon.training.trainer import train
from cm3leon.types import UserError

CPU = torch.device("cpu")


class Counting:
    """Batches 1, 2, 3 and so on; `made` is the number of batches so far."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.made = 0
        self.fails_at = fails_at
        self.changed = threading.Condition()

    def next(self) -> int:
        if self.made + 1 == self.fails_at:
            raise UserError("data: a document is too long")
        with self.changed:
            self.made += 1
            self.changed.notify_all()
        return self.made

    def wait_for(self, made: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.made >= made, timeout=30)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_batches_are_made_ahead_and_the_state_is_that_of_the_one_taken() -> None:
    stream = Counting()
    with closing(Prefetch(stream, WHOLE, count=10, device=CPU)) as source:
        assert source.state == {"made": 0}
        for number in range(1, 11):
            assert source.coming_weight() == 1.0
            assert source.state == {"made": number - 1}
            assert source.next().parts == [number]
            assert source.state == {"made": number}

            # The thread goes on unasked: two batches wait, and one is being made.
            stream.wait_for(min(10, number + AHEAD))
            assert stream.made <= number + AHEAD + 1
    assert stream.made == 10
    assert "batches" not in threads()


def test_what_goes_wrong_is_raised_in_its_place() -> None:
    with closing(Prefetch(Counting(fails_at=3), WHOLE, count=10, device=CPU)) as source:
        assert [source.next().parts for _ in range(2)] == [[1], [2]]
        assert source.coming_weight() == 0.0
        for _ in range(2):
            with pytest.raises(UserError, match=r"^data: a document is too long$"):
                source.next()
    assert "batches" not in threads()


def test_parts_and_weights_are_made_in_the_thread() -> None:
    names = []

    def parts(batch: int) -> list[int]:
        names.append(threading.current_thread().name)
        return [batch, 10 * batch]

    split = BatchSplit(parts=parts, weight=lambda part: part / 2)
    with closing(Prefetch(Counting(), split, count=1, device=CPU)) as source:
        ready = source.next()
    assert (ready.parts, ready.weights, names) == ([1, 10], [0.5, 5.0], ["batches"])


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_it_is_closed_whatever_the_thread_is_at(taken: int) -> None:
    stream = Counting()
    source = Prefetch(stream, WHOLE, count=10**9, device=CPU)
    for _ in range(taken):
        source.next()

    stream.wait_for(taken + 1)
    source.close()
    assert "batches" not in threads()
    assert stream.made <= taken + AHEAD + 2


def test_nothing_is_drawn_while_it_is_idle() -> None:
    stream = Counting()
    with closing(Prefetch(stream, WHOLE, count=100, device=CPU)) as source:
        stream.wait_for(1)

        with source.idle():
            made = stream.made
            while not source._made.empty():
                source.next()
            assert stream.made == made
        stream.wait_for(made + 1)


def test_an_error_of_the_data_ends_a_training_with_its_sentence(tmp_path: Any) -> None:
    module = nn.Linear(1, 1)

    def loss(module: nn.Module, batch: int) -> Any:
        return module(torch.full((1, 1), float(batch))).square().mean(), {}

    config = TrainingConfig(steps=10, warmup_steps=1, precision="float32")
    where: dict[str, Any] = {"folder": tmp_path, "device": CPU, "seed": 0, "title": "tiny"}

    with pytest.raises(UserError, match=r"^data: a document is too long$"):
        train(module, loss, Counting(fails_at=4), config, **where)
    assert "batches" not in threads()


def test_a_step_reads_the_one_before_and_nothing_else(tmp_path: Any) -> None:
    """One process trains two modules that are clipped separately, and averages weights."""
    module = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    reads, collectives, counts = HostReads(), Collectives(), []

    def loss(module: Any, batch: int) -> Any:
        counts.append(seen(reads, collectives))
        x = torch.full((1, 1), float(batch))
        value = sum(part(x).square().mean() for part in module)
        return value, {"tokens": 1.0, "figure": (value.detach(), value.detach() ** 0)}

    config = TrainingConfig(
        steps=12, warmup_steps=1, log_every=6, checkpoint_every=6, average_decay=0.9
    )
    where: dict[str, Any] = {"folder": tmp_path, "device": CPU, "seed": 0, "title": "tiny"}

    with reads, collectives:
        train(module, loss, Counting(), config, **where, clipped=list(module))

    # The first step reads nothing; later ones read the figures of the step before, all in one read.
    found = [difference(counts[k + 1]["reads"], counts[k]["reads"]) for k in range(5)]
    assert found == [{}, *[{"tolist": 1}] * 4]
    assert not counts[-1]["collectives"]
