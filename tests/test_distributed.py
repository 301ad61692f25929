"""Several processes train as one does.

Checkpoints fit any number of processes, and a lost process ends the job.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import difference
from processes import Forked, finish, group
from rank_worker import SHAPE, VOCAB
from safetensors.torch import load_file

from cm3leon.data import ahead
from cm3leon.models.transformer import Transformer
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.distributed import Rank, Ranks, current_rank, joined
from cm3leon.training.steps import checkpoints
from cm3leon.training.traffic import traffic
from cm3leon.weights import save_weights

pytestmark = pytest.mark.stack
ONCE = pytest.mark.once

NAMES = ("loss", "loss_text", "loss_image", "gradient_norm")


def start(folder: Path, ranks: int | None, **options: Any) -> list[Forked]:
    """Start the processes of a training; `ranks` None is one without a process group."""
    return group("rank_worker", [json.dumps({"folder": str(folder), **options})], ranks)


def trained(folder: Path, ranks: int | None, **options: Any) -> dict[str, torch.Tensor]:
    """Train, and return the weights at the end."""
    assert set(finish(start(folder, ranks, **options))) == {0}
    return load_file(folder / "model.safetensors")


def figures(folder: Path) -> dict[int, list[float]]:
    """Loss of each step, also by modality, and the gradient's norm."""
    found = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["step"]] = [record[name] for name in NAMES]
    return found


def assert_alike(found: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    """The figures of all eight steps agree to the rounding of float32."""
    assert found.keys() == expected.keys() == set(range(1, 9))
    for step, numbers in found.items():
        assert numbers == pytest.approx(expected[step], rel=2e-5), step


def wait_for(folder: Path, count: int) -> None:
    """Wait for so many checkpoints."""
    limit = time.monotonic() + 120
    while len(checkpoints(folder)) < count:
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted training by one process."""
    folder = tmp_path_factory.mktemp("alone")
    trained(folder, None)
    return folder


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        pytest.param(None, {"micro_batch": 1}, marks=ONCE),
        pytest.param(
            None, {"micro_batch": 3, "batch_size": 32, "batch_tokens": 4 * 48}, marks=ONCE
        ),
        pytest.param(1, {}, marks=ONCE),
        (2, {}),
        (2, {"micro_batch": 1, "activation_checkpointing": "full"}),
        pytest.param(2, {"micro_batch": 1, "replicas": 2}, marks=ONCE),
        pytest.param(4, {}, marks=ONCE),
        (4, {"replicas": 2, "activation_checkpointing": "selective"}),
    ],
)
def test_any_number_of_ranks_and_parts_gives_the_same_losses(
    tmp_path: Path, alone: Path, ranks: int | None, fields: dict[str, Any]
) -> None:
    weights = trained(tmp_path, ranks, fields=fields)
    assert_alike(figures(tmp_path), figures(alone))
    for name, weight in load_file(alone / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=ONCE)])
def test_a_checkpoint_of_two_ranks_goes_on_on_any_number(
    tmp_path: Path, alone: Path, ranks: int
) -> None:
    """One of two ranks is asked to stop; the steps after it are as if nothing had happened."""
    processes = start(tmp_path, 2, pause=0.2)
    wait_for(tmp_path, 1)
    processes[1].send_signal(signal.SIGUSR1)
    assert finish(processes) == [75, 75]
    assert 2 <= int(checkpoints(tmp_path)[-1].name[5:]) < 8

    trained(tmp_path, ranks)
    assert_alike(figures(tmp_path), figures(alone))


@pytest.mark.once
def test_the_same_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 2)
    processes = start(tmp_path / "stopped", 2, pause=0.2)
    wait_for(tmp_path / "stopped", 1)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes) == [75, 75]

    again = trained(tmp_path / "stopped", 2)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(("ranks", "fields"), [(None, {}), (1, {}), (3, {}), (4, {"replicas": 2})])
def test_first_weights_are_those_of_one_process_that_builds_the_model(
    tmp_path: Path, ranks: int | None, fields: dict[str, Any]
) -> None:
    """Bit for bit, though each rank draws its own shards; three ranks share no matrix evenly."""
    torch.manual_seed(1)
    expected = Transformer(Transformer.Config(**SHAPE), vocab_size=VOCAB.size).state_dict()
    fields = {"batch_size": 12, **fields}

    found = trained(tmp_path, ranks, fields=fields, only_first=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("ranks", [None, 3])
def test_first_weights_that_are_a_file_are_read_by_each_rank(
    tmp_path: Path, ranks: int | None
) -> None:
    torch.manual_seed(5)
    expected = Transformer(Transformer.Config(**SHAPE), vocab_size=VOCAB.size).state_dict()
    file = tmp_path / "start.safetensors"
    save_weights(file, expected)
    fields = {"batch_size": 12}

    found = trained(tmp_path, ranks, fields=fields, only_first=True, weights=str(file))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_all_ranks_end_with_the_fault_of_a_shard_that_one_reads(tmp_path: Path) -> None:
    """A number that is NaN in the last rows of a matrix, which only the second rank reads."""
    state = Transformer(Transformer.Config(**SHAPE), vocab_size=VOCAB.size).state_dict()
    state["blocks.1.up.weight"][-1, 0] = torch.nan
    save_weights(file := tmp_path / "start.safetensors", state)
    processes = start(tmp_path, 2, only_first=True, weights=str(file))
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert "the tensor blocks.1.up.weight holds numbers that are NaN or infinite" in said
        assert process.returncode


def test_a_step_reduces_once_and_reads_once(tmp_path: Path) -> None:
    """Two ranks and two micro-batches: one sum over the ranks, and one read, of the last loss."""
    fields = {"micro_batch": 1, "log_every": 8, "checkpoint_every": 8}
    trained(tmp_path, 2, fields=fields, counts=True)

    for rank in range(2):
        counts = json.loads((tmp_path / f"counts_{rank}.json").read_text())[::2]
        for number, (before, after) in enumerate(pairwise(counts[:-1])):
            reads = difference(Counter(after["reads"]), Counter(before["reads"]))
            assert reads == ({"tolist": 1} if number else {})
            sent = difference(Counter(after["collectives"]), Counter(before["collectives"]))

            # In each micro-batch FSDP gathers three groups forward and two backward, and scatters
            # three.
            expected = {"allreduce_": 1, "_allgather_base_": 10, "_reduce_scatter_base_": 6}
            assert sent == expected


@pytest.mark.parametrize(
    ("ranks", "replicas", "nodes", "optimizer"),
    [
        (2, 1, 1, "adamw"),
        pytest.param(4, 2, 2, "adamw", marks=ONCE),
        pytest.param(2, 1, 1, "muon", marks=ONCE),
        pytest.param(4, 2, 2, "muon", marks=ONCE),
    ],
)
def test_bytes_of_a_step_are_those_that_a_plan_counts(
    tmp_path: Path, ranks: int, replicas: int, nodes: int, optimizer: Any
) -> None:
    """In two micro-batches; replicas add up their gradients only in the last one."""
    fields = {"micro_batch": 1, "batch_size": 2 * ranks, "replicas": replicas, "steps": 3}
    fields |= {"log_every": 3, "checkpoint_every": 3, "optimizer": optimizer}
    trained(tmp_path, ranks, fields=fields, counts=True)

    counts = json.loads((tmp_path / "counts_0.json").read_text())[::2]

    # The bytes from the beginning of the second step to that of the third.
    second, third = (Counter(counts[step]["bytes"]) for step in (1, 2))
    counted = difference(third, second)
    planned = traffic(
        Transformer(Transformer.Config(**SHAPE), vocab_size=VOCAB.size),
        DecoderTrainingConfig(replicas=replicas, optimizer=optimizer),
        gpus=ranks,
        nodes=nodes,
        micro_batches=2,
        weight_bytes=4,
    )

    whole: Counter[str] = Counter()
    for each in planned.everything():
        whole[each.kind] += int(each.size * each.times)

    # FSDP gathers weights by one operator, and the optimizer gathers matrices by another.
    gathered = counted["_allgather_base_"], counted.get("all_gather_into_tensor", 0)
    assert sum(gathered) == whole["gather"] > 0
    assert counted.get("broadcast_", 0) == whole["broadcast"]
    assert (gathered[1] > 0) == (whole["broadcast"] > 0) == (optimizer == "muon")

    assert counted["_reduce_scatter_base_"] == whole["scatter"] > 0
    own_sum = 4 * 8  # the step's own reduction: four numbers in float64
    assert counted["allreduce_"] - own_sum == whole["sum"]
    assert (whole["sum"] > 0) == (replicas > 1)


@pytest.mark.once
def test_muon_does_the_same_on_any_number_of_ranks_and_when_it_goes_on(tmp_path: Path) -> None:
    """Muon makes matrices orthogonal in bf16, so rounding shows more than elsewhere."""
    fields = {"optimizer": "muon", "learning_rate": 0.003}
    trained(tmp_path / "alone", None, fields=fields)

    processes = start(tmp_path / "shared", 2, pause=0.2, fields=fields)
    wait_for(tmp_path / "shared", 1)
    processes[1].send_signal(signal.SIGUSR1)
    assert finish(processes) == [75, 75]
    trained(tmp_path / "shared", 2, fields=fields)

    alone, shared = figures(tmp_path / "alone"), figures(tmp_path / "shared")
    assert alone.keys() == shared.keys() == set(range(1, 9))
    for step, numbers in shared.items():
        assert numbers == pytest.approx(alone[step], rel=2e-3), step


@pytest.mark.once
def test_kills_at_any_instant_change_nothing(tmp_path: Path, alone: Path) -> None:
    """kill -9 again and again, a little after another checkpoint or while it is written."""
    for delay in (0.0, 0.05, 0.1, 0.0):
        # Wait for a checkpoint that was not there before, unless the training has ended.
        before = {path.name for path in checkpoints(tmp_path)}
        processes = start(tmp_path, None, pause=0.05)
        limit = time.monotonic() + 60
        while {path.name for path in checkpoints(tmp_path)} <= before and time.monotonic() < limit:
            if processes[0].poll() is not None:
                break
            time.sleep(0.002)

        time.sleep(delay)
        processes[0].kill()
        finish(processes)

    weights = trained(tmp_path, None)
    assert figures(tmp_path) == figures(alone)
    expected = load_file(alone / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    assert not list(tmp_path.glob(".partial_*"))


def test_a_dead_rank_ends_the_job(tmp_path: Path) -> None:
    processes = start(tmp_path, 2, pause=0.2)
    wait_for(tmp_path, 1)
    processes[1].kill()
    assert processes[0].wait(timeout=90) not in (0, 75)
    finish(processes)
    assert checkpoints(tmp_path)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    processes = start(tmp_path, 2, fields={"batch_size": 3})
    said = [process.communicate(timeout=120)[1] for process in processes]
    # The rank that finds it first says so; the other may find that rank gone before.
    sentence = "training.batch_size is 3; it must be a multiple of the 2 ranks"
    assert any(sentence in each for each in said)
    assert 0 not in [process.returncode for process in processes]


STEP_OF_SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu03",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node",
    "MASTER_PORT": "29401",
}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, None),
        (TORCHRUN, Rank(3, 4, 1, "node", 29401)),
        (STEP_OF_SLURM, Rank(5, 16, 1, "gpu03", 20_219)),
    ],
)
def test_ranks_by_the_environment(environment: dict[str, str], rank: Rank | None) -> None:
    """Ranks of torchrun and of a SLURM step; a batch script of SLURM is one process."""
    assert current_rank(environment) == rank


def test_ranks_on_the_same_processors_share_them_for_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of four ranks share this one's processors: one is on another node, one has its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    ours = frozenset(range(24))
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: set(ours), raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu03")
    hosts = [("gpu03", ours), ("gpu03", ours), ("gpu04", ours), ("gpu03", frozenset({24, 25}))]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: hosts)

    counts: list[int] = []

    def count() -> None:
        counts.append(ahead.threads())

    with joined(Rank(0, 1, 0, "127.0.0.1", port), 60, before=count):
        count()
    # The rank is alone before and after: the others wait for it or have ended.
    count()
    assert counts == [24, 12, 24]
