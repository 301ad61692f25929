"""What the ranks of a training send each other in a step, by arithmetic, and the time it takes.

FSDP gathers each layer's weights for the forward and again for the backward pass, embeddings and
head once, and scatters their gradients, in every micro-batch; replicas add up their shards of the
gradients in the last one. Muon gathers each matrix of the layers for its step, and the rank that
has computed the step sends it to all. Collectives are rings: of g ranks each sends (g - 1) / g of
the bytes, twice for a sum, in as many hops. Where a ring goes over n nodes, n of its g hops are
between nodes; NCCL makes as many rings as a node has network cards, so that these share the bytes.
What one rank sends to all takes a ring's hops but the one that would lead back to it.

    4 ranks on 2 nodes      0 -> 1 => 2 -> 3 => 0          -> inside a node, => between nodes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cm3leon.models.base import Model
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.memory import lora_parameters, parameters

LAUNCH, HOP_INSIDE, HOP_ACROSS = 8.4e-6, 3.4e-6, 14.0e-6
"""Seconds that a collective takes to begin, and that a hop takes: NCCL's own table for rings in its
protocol for large messages (src/graph/tuning.cc: Ring and Simple, NVLINK and NET)."""


@dataclass(frozen=True)
class Links:
    """Bytes a second that a GPU sends in one direction."""

    inside: float
    """To the other GPUs of its node."""
    across: float
    """To other nodes."""


@dataclass(frozen=True)
class Collective:
    """A collective that ranks make `times` a step."""

    kind: Literal["gather", "scatter", "sum", "broadcast"]
    size: float
    """Bytes of the whole tensor: gathered, or before it is scattered, summed or broadcast."""
    ranks: int
    nodes: int
    times: float = 1

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes that a rank sends a step, inside its node and between nodes;
        a mean over the ranks."""
        passes = 2 if self.kind == "sum" else 1
        sent = self.times * passes * self.size * (self.ranks - 1) / self.ranks
        between = self.nodes / self.ranks if self.nodes > 1 else 0.0
        if self.kind == "broadcast":
            between = (self.nodes - 1) / (self.ranks - 1)
        return sent * (1 - between), sent * between

    def seconds(self, links: Links) -> float:
        """Time of all of them, one after the other; both kinds of links work at once."""
        passes = 2 if self.kind == "sum" else 1
        hops = passes * (self.ranks - 1)
        across = passes * (self.nodes - 1)
        waits = LAUNCH + across * HOP_ACROSS + (hops - across) * HOP_INSIDE
        inside_bytes, across_bytes = self.sent
        return self.times * waits + max(inside_bytes / links.inside, across_bytes / links.across)


@dataclass(frozen=True)
class Traffic:
    """The collectives of a step, by when they are made; one rank alone makes none."""

    first: list[Collective]
    """Before the first layer of a micro-batch can be computed."""
    forward: list[Collective]
    """While layers are computed: the following ones are gathered."""
    backward: list[Collective]
    """While gradients are computed: layers are gathered again, and gradients scattered."""
    sums: list[Collective]
    """Of replicas, while gradients are computed; over other links than what is scattered inside a
    node."""
    last: list[Collective]
    """After the last gradient: of weights outside layers, and Muon's."""

    def everything(self) -> list[Collective]:
        """All of them."""
        return [*self.first, *self.forward, *self.backward, *self.sums, *self.last]


@dataclass(frozen=True)
class ModelLayout:
    """A way to lay a model out over the GPUs, and what a step takes with it."""

    replicas: int
    shards: int
    """GPUs that share one copy of the model."""
    inside_bytes: float
    """Bytes that a GPU sends a step to others of its node."""
    across_bytes: float
    """Bytes that it sends to other nodes, as a mean over the GPUs of a node."""
    awaited_bytes: float
    """Those of them that a layer waits for, weights and gradients: all but the sums over
    replicas."""
    traffic_seconds: float
    """Time of all collectives, one after the other."""
    exposed_seconds: float
    """The part of that time that does not overlap with the computation."""
    step_seconds: float
    memory: float
    """Bytes of a GPU at its fullest."""
    fits: bool


def traffic(
    model: Model,
    training: DecoderTrainingConfig,
    *,
    gpus: int,
    nodes: int,
    micro_batches: int,
    weight_bytes: int = 2,
) -> Traffic:
    """The collectives of a step.

    Args:
        micro_batches: of a rank, in a step.
        weight_bytes: of a weight as it is gathered; gradients are scattered and added up in 4.
    """
    if gpus == 1:
        return Traffic([], [], [], [], [])
    replicas = training.copies(nodes)
    shards, a_node = gpus // replicas, gpus // nodes
    count, layers, k = parameters(model), model.config.layers, micro_batches
    adapters = lora_parameters(model, training.lora_rank) if training.lora_rank else 0
    layer = (count.blocks + adapters) / layers
    trained_layer = (adapters or count.blocks) / layers
    trained_root = 0 if adapters else count.root

    # Ranks are numbered node by node. The shards of a copy are neighbours; the replicas of a shard
    # are `shards` ranks apart.
    shard = Collective("gather", 0, shards, max(1, shards // a_node))
    replica = Collective("sum", 0, replicas, min(replicas, nodes))

    def gather(weights: float, times: float) -> Collective:
        return replace(shard, size=weight_bytes * weights, times=times)

    def scatter(weights: float, times: float) -> Collective:
        return replace(shard, kind="scatter", size=4.0 * weights, times=times)

    def add_up(weights: float, times: float) -> Collective:
        return replace(replica, size=4.0 * weights / shards, times=times)

    # In bf16, one matrix of the layers after the other (`muon.py`); adapters are two beside each.
    muon: list[Collective] = []
    if training.optimizer == "muon":
        weights = [each.numel() for each in model.blocks.parameters() if each.ndim == 2]
        size = 2.0 * (adapters or sum(weights))
        matrices = 2 * layers * len(model.matrix_sizes) if adapters else len(weights)
        to_all = Collective("broadcast", size / matrices, gpus, nodes, matrices)
        muon = [replace(shard, size=size / matrices, times=matrices), to_all]

    made = Traffic(
        first=[gather(count.root, k), gather(layer, k)],
        forward=[gather(layer, k * (layers - 1))],
        backward=[gather(layer, k * layers), scatter(trained_layer, k * layers)],
        sums=[add_up(trained_layer, layers)],
        last=[scatter(trained_root, k), add_up(trained_root, 1), *muon],
    )
    return Traffic(
        first=_needed(made.first),
        forward=_needed(made.forward),
        backward=_needed(made.backward),
        sums=_needed(made.sums),
        last=_needed(made.last),
    )


def _needed(collectives: Sequence[Collective]) -> list[Collective]:
    """Those that send anything."""
    return [each for each in collectives if each.ranks > 1 and each.size and each.times]


def exposed(made: Traffic, links: Links, compute_seconds: float) -> float:
    """Seconds of a step's traffic that do not overlap with its computation, a third of which is the
    forward pass."""

    def seconds(collectives: list[Collective]) -> float:
        return sum(each.seconds(links) for each in collectives)

    forward = max(0.0, seconds(made.forward) - compute_seconds / 3)
    # Scattering inside a node and summing between nodes use different links; the slower one counts.
    backward = max(seconds(made.backward), seconds(made.sums)) - 2 * compute_seconds / 3
    return seconds(made.first) + forward + max(0.0, backward) + seconds(made.last)


def layout(
    made: Traffic,
    links: Links,
    compute_seconds: float,
    *,
    replicas: int,
    shards: int,
    memory: float,
    fits: bool,
) -> ModelLayout:
    """What a step takes with a layout of the model."""
    everything = made.everything()
    late = exposed(made, links, compute_seconds)
    return ModelLayout(
        replicas=replicas,
        shards=shards,
        inside_bytes=sum(each.sent[0] for each in everything),
        across_bytes=sum(each.sent[1] for each in everything),
        awaited_bytes=sum(each.sent[1] for each in everything if each.kind != "sum"),
        traffic_seconds=sum(each.seconds(links) for each in everything),
        exposed_seconds=late,
        step_seconds=compute_seconds + late,
        memory=memory,
        fits=fits,
    )


def best(layouts: Sequence[ModelLayout]) -> ModelLayout | None:
    """The best layout that fits; None if none does.

    Steps within 1 % of the shortest one count as equally short: this arithmetic cannot tell them
    apart. Of these, the layout counts whose layers wait for the fewest bytes from other nodes,
    whose links are shared and often slower than they should be; and of these the one that takes the
    least memory.
    """
    fitting = [each for each in layouts if each.fits]
    if not fitting:
        return None
    shortest = min(each.step_seconds for each in fitting)
    short = [each for each in fitting if each.step_seconds <= 1.01 * shortest]
    return min(short, key=lambda each: (each.awaited_bytes, each.memory))


def possible_replicas(gpus: int, nodes: int) -> list[int]:
    """Numbers of copies whose shards fill whole nodes, or equal parts of one,
    in ascending order."""
    a_node = gpus // nodes
    found = []
    for replicas in range(1, gpus + 1):
        shards = gpus // replicas
        if gpus % replicas == 0 and (shards % a_node == 0 or a_node % shards == 0):
            found.append(replicas)
    return found
