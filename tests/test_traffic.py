"""What ranks send each other in a step of training, computed by hand."""

from __future__ import annotations

import pytest
import torch

from cm3leon.models.transformer import Transformer
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.memory import parameters
from cm3leon.training.traffic import (
    HOP_ACROSS,
    HOP_INSIDE,
    LAUNCH,
    Collective,
    Links,
    ModelLayout,
    Traffic,
    best,
    exposed,
    possible_replicas,
    traffic,
)

with torch.device("meta"):
    SEVEN_B = Transformer(
        Transformer.Config(layers=32, width=4096, head_size=128), vocab_size=65_536
    )
LINKS = Links(inside=100.0, across=10.0)


def sent_bytes(made: Traffic) -> tuple[float, float]:
    """Bytes that a rank sends in a step: inside its node, and to other nodes."""
    each_sent = [each.sent for each in made.everything()]
    return sum(inside for inside, _ in each_sent), sum(across for _, across in each_sent)


def test_a_ring_by_hand() -> None:
    """Each of four ranks sends three quarters of the bytes; two of four hops are between nodes."""
    gather = Collective("gather", 400.0, ranks=4, nodes=2)
    assert gather.sent == (150.0, 150.0)
    waits = LAUNCH + HOP_ACROSS + 2 * HOP_INSIDE
    assert gather.seconds(LINKS) == pytest.approx(waits + 15.0)

    # A sum is gathered and scattered: twice the bytes and twice the hops, three times.
    inside = Collective("sum", 400.0, ranks=4, nodes=1, times=3)
    assert inside.sent == (1800.0, 0.0)
    assert inside.seconds(LINKS) == pytest.approx(3 * (LAUNCH + 6 * HOP_INSIDE) + 18.0)

    # Alone on their nodes, ranks send nothing inside one.
    alone_on_their_nodes = Collective("sum", 400.0, ranks=4, nodes=4)
    assert alone_on_their_nodes.sent == (0.0, 600.0)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_7b_by_hand(micro_batches: int) -> None:
    """With a copy on each node, weights are gathered and gradients scattered inside it.

    Across nodes, an eighth of the gradients is summed. With one copy in all, every byte is sent
    around all ranks.
    """
    count = parameters(SEVEN_B)
    config = DecoderTrainingConfig(replicas="nodes")
    made = traffic(SEVEN_B, config, gpus=512, nodes=64, micro_batches=micro_batches)
    inside, across = sent_bytes(made)

    # The root is gathered once and the blocks twice, in two bytes; gradients have four.
    gathered = 2 * count.root + 2 * 2 * count.blocks
    assert inside == pytest.approx(7 / 8 * micro_batches * (gathered + 4 * count.total))
    assert across == pytest.approx(2 * 63 / 64 * 4 * count.total / 8)

    flat = DecoderTrainingConfig(replicas=1)
    made = traffic(SEVEN_B, flat, gpus=512, nodes=64, micro_batches=micro_batches)
    inside, across = sent_bytes(made)
    sent = 511 / 512 * micro_batches * (gathered + 4 * count.total)
    assert (inside, across) == (pytest.approx(7 / 8 * sent), pytest.approx(sent / 8))
    assert not made.sums


def test_adapters_alone_are_scattered_and_added_up() -> None:
    config = DecoderTrainingConfig(
        replicas="nodes",
        lora_rank=16,
        start="run",  # type: ignore[arg-type]
    )
    made = traffic(SEVEN_B, config, gpus=16, nodes=2, micro_batches=1)
    assert not made.last

    # Rank 16 in 32 layers; the sides of their four matrices add up to 4, 2, 5 and 5 times 4096.
    adapters = 32 * 16 * 4096 * (4 + 2 + 5 + 5)
    scattered = sum(each.size * each.times for each in made.backward if each.kind == "scatter")
    assert scattered == pytest.approx(4 * adapters)


def test_muon_gathers_each_matrix_and_sends_its_step_to_all() -> None:
    """Muon gathers each matrix inside a node, which holds a copy, and sends its step to all ranks.

    Both are sent in bf16. Around all ranks, 63 of 511 hops go from node to node.
    """
    plain = DecoderTrainingConfig(replicas="nodes")
    muon = DecoderTrainingConfig(replicas="nodes", optimizer="muon")
    without = traffic(SEVEN_B, plain, gpus=512, nodes=64, micro_batches=1)
    made = traffic(SEVEN_B, muon, gpus=512, nodes=64, micro_batches=1)

    gathered, sent = made.last[-2:]
    assert made.last[:-2] == without.last
    assert (gathered.kind, gathered.ranks, gathered.nodes) == ("gather", 8, 1)

    whole = 2 * parameters(SEVEN_B).blocks
    for each in (gathered, sent):
        assert each.times == 4 * 32
        assert each.size * each.times == pytest.approx(whole)
    assert sent.sent == (pytest.approx(whole * 448 / 512), pytest.approx(whole * 63 / 512))
    assert sent.seconds(LINKS) > gathered.seconds(LINKS)


def test_one_gpu_sends_nothing() -> None:
    made = traffic(SEVEN_B, DecoderTrainingConfig(), gpus=1, nodes=1, micro_batches=1)
    assert not made.everything()
    assert exposed(made, LINKS, 1.0) == 0


def test_what_the_computation_is_too_short_for_is_exposed() -> None:
    made = traffic(SEVEN_B, DecoderTrainingConfig(), gpus=8, nodes=1, micro_batches=1)

    # A second of computation hides all that is not at its ends; no computation hides nothing.
    links = Links(450e9, 50e9)
    ends = sum(each.seconds(links) for each in [*made.first, *made.last])
    everything = sum(each.seconds(links) for each in made.everything())
    assert exposed(made, links, 1e9) == pytest.approx(ends)
    assert exposed(made, links, 0.0) == pytest.approx(everything)


def test_copies_fill_nodes_or_equal_parts_of_one() -> None:
    assert possible_replicas(8, 1) == [1, 2, 4, 8]
    assert possible_replicas(24, 3) == [1, 3, 6, 12, 24]


def test_the_best_layout() -> None:
    def layout(
        replicas: int, step: float, awaited: float, memory: float, fits: bool = True
    ) -> ModelLayout:
        """A layout of which only these figures count."""
        return ModelLayout(
            replicas=replicas,
            shards=1,
            inside_bytes=0,
            across_bytes=0,
            awaited_bytes=awaited,
            traffic_seconds=0,
            exposed_seconds=0,
            step_seconds=step,
            memory=memory,
            fits=fits,
        )

    slow, fast = layout(1, 2.0, 0, 1), layout(2, 1.0, 9, 1)
    close, large = layout(4, 1.009, 0, 2), layout(8, 1.0, 0, 3)
    too_large = layout(16, 0.1, 0, 9, fits=False)

    # Of those that fit and are fast to within a percent, the one that is waited for least.
    assert best([slow, fast]) is fast
    assert best([slow, fast, large, close, too_large]) is close
    assert best([too_large]) is None
