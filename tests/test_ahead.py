"""Work in threads ahead of the reader: the order of results, bounds, errors, and an early end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch

from cm3leon.data import ahead, images
from cm3leon.data.ahead import share_processors, worked_ahead
from cm3leon.stages import sharing

usable_threads = ahead.threads


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "threads", lambda: 4)


def test_results_come_in_order_and_are_made_at_the_same_time() -> None:
    together = threading.Barrier(4, timeout=30)

    def work(item: int) -> int:
        together.wait()  # passes only if four are worked on at once
        return item * item

    assert list(worked_ahead(range(16), work)) == [n * n for n in range(16)]


def test_little_is_done_for_who_takes_little_and_no_more_than_the_most() -> None:
    done: list[int] = []
    results = worked_ahead(range(1000), lambda n: done.append(n) or n, most=20)

    for count in range(1, 101):
        assert next(results) == count - 1
        # Twice the threads at first, one more for each result taken, and 20 at the most.
        assert len(done) <= count + min(8 + count, 20)

    results.close()
    assert len(done) <= 120


@pytest.mark.parametrize("where", ["items", "work"])
def test_an_error_is_raised_in_its_place(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        if where == "items":
            raise ValueError("five")
        yield 5

    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    results = worked_ahead(items(), work)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="five"):
        next(results)


def test_threads_see_the_context_of_who_reads_and_end_with_it() -> None:
    message: ContextVar[str] = ContextVar("message", default="")
    message.set("heard")
    before = threading.active_count()

    results = worked_ahead(range(50), lambda _: message.get())
    assert next(results) == "heard"
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


def test_processes_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    monkeypatch.setattr(ahead, "_share", 1)
    assert usable_threads() == 24

    share_processors(5)
    assert usable_threads() == 4
    share_processors(100)
    assert usable_threads() == 1


def test_pixels_that_are_decoded_at_once_are_bounded() -> None:
    room, most, held = images._Room(100), [0], [0]
    lock = threading.Lock()

    def work(amount: int) -> None:
        with room.taken(amount):
            with lock:
                held[0] += amount
                most[0] = max(most[0], held[0])
            with lock:
                held[0] -= amount

    list(worked_ahead([40, 30, 70, 20, 60] * 40, work))
    assert most[0] <= 100

    # What is larger than the room is let in alone.
    list(worked_ahead([300, 50] * 20, work))
    assert held == [0]
    assert most[0] == 300


def test_workers_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(ahead, "_share", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    # Here the run folder of a worker is just its device, which its work notes.
    monkeypatch.setattr(sharing, "from_mapping", lambda kind, mapping: mapping)
    monkeypatch.setattr(sharing, "RunFolder", lambda experiment, folder, device: device)

    used: list[torch.device] = []
    for number in range(8):
        arguments = ({"plugins": []}, Path("run"), Path("stage"))
        sharing._work(*arguments, lambda device, folder, part: used.append(device), (number, 8))

    assert [str(device) for device in used] == [f"cuda:{n % 3}" for n in range(8)]
    assert current == used
    assert ahead._share == 8
