"""Memory of a training, by arithmetic: what each GPU holds at its fullest, part by part.

The model says what autograd keeps of a layer (`layer_bytes`). Under FSDP, weights are gathered in
bf16 and layers hand on bf16; on a GPU, their norms read a float32 copy of it. Three moments are
compared: the end of the forward pass, when all that is kept and the loss are there; the start of
the backward pass, when a layer is computed again and its gradients are on their way; and its end,
when all gradients are there.

               weights, moments   kept of layers   gradients
    forward    ############       ..######         (of earlier micro-batches)
    backward   ############       ######..         ..######
    end        ############                        ########
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cm3leon.models.base import Model
from cm3leon.objectives.loss import tokens_at_once
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.types import UserError

USABLE = 0.92
"""Share of a GPU's memory that tensors can use; CUDA's context, libraries and fragmentation take
the rest."""
IN_FLIGHT = 3
"""Layers whose gathered weights are in memory at a time under FSDP: the current one, the next one,
and its buffer."""


@dataclass(frozen=True)
class Parameters:
    """Number of weights, by part."""

    embedding: int
    other: int
    """Positions, and norms outside the layers."""
    blocks: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.other + self.blocks + self.head

    @property
    def root(self) -> int:
        """Weights outside the layers, which FSDP gathers together."""
        return self.total - self.blocks


def parameters(model: Model) -> Parameters:
    """Number of a model's weights; the model may be on the meta device, without memory for them."""

    def count(part: nn.Module) -> int:
        return sum(weight.numel() for weight in part.parameters())

    blocks, head, embedding = count(model.blocks), count(model.head), model.embedding.weight.numel()
    other = count(model) - blocks - head - embedding
    return Parameters(embedding, other, blocks, head)


def lora_parameters(model: Model, rank: int) -> int:
    """Number of weights of the adapters in all layers."""
    return model.config.layers * rank * sum(map(sum, model.matrix_sizes.values()))


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    """Kept in float32, sharded; frozen ones in bf16 on one GPU."""
    gradients: float
    optimizer: float
    """Moments, and the average of the weights if there is one."""
    copies: float
    """Weights in bf16: autocast's on one GPU; under FSDP gathered ones, with gradients on their
    way."""
    activations: float
    output: float
    """What the output layer and the loss hold besides the weights."""
    total: float
    """The most that is held at a time; the parts need not add up to it, as they peak at different
    moments."""

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a GPU has room for it."""
        return self.total <= USABLE * gpu_bytes


def optimizer_bytes(training: DecoderTrainingConfig, in_layers: int, outside: int) -> float:
    """Bytes of the moments of this many trained weights.

    AdamW keeps two float32 numbers a weight. Muon keeps one for those in layers. adamw_8bit keeps
    one byte for each moment, and a float32 scale for every 256.
    """
    if training.optimizer == "muon":
        return 4 * in_layers + 8 * outside
    return (8 if training.optimizer == "adamw" else 2 + 8 / 256) * (in_layers + outside)


def training_memory(
    model: Model,
    training: DecoderTrainingConfig,
    *,
    gpus: int,
    micro_batch: int,
    nodes: int = 1,
) -> Memory:
    """What each of `gpus` GPUs on `nodes` nodes holds at its fullest, in bf16.

    Args:
        micro_batch: blocks that a GPU computes at a time.

    Raises:
        UserError: for a model that does not say what its layers hold.
    """
    layers, seq_len = model.config.layers, model.seq_len
    count, shards = parameters(model), gpus // training.copies(nodes)
    adapters = lora_parameters(model, training.lora_rank) if training.lora_rank else 0
    trained = adapters or count.total
    tokens = micro_batch * seq_len

    # Weights, gradients and moments in float32, sharded. On one GPU, weights that LoRA freezes are
    # kept in bf16.
    weights: float = 4 * (count.total + adapters) / shards
    if adapters and gpus == 1:
        weights = 4 * (count.root + adapters) + 2 * count.blocks
    gradients: float = 4 * trained / shards
    in_layers = adapters or count.blocks
    moments: float = optimizer_bytes(training, in_layers, trained - in_layers) / shards
    if training.average_decay:
        moments += 4 * trained / shards

    # Copies of weights in bf16: of all layers on one GPU, of a few under FSDP.
    layer = (count.blocks + adapters) / layers
    if gpus == 1:
        copies = 2.0 * (adapters or count.blocks)
        late = 2 * layer
        gradients_on_way = 0.0
    else:
        copies = 2 * count.root + IN_FLIGHT * 2 * layer
        late = copies
        root = 0 if adapters else count.root
        gradients_on_way = (2 + 4) * max(root, adapters / layers if adapters else layer)

    # The three moments. Gradients of earlier micro-batches are there from the start.
    kept, again, on_way = _activations(model, training, tokens, sharded=gpus > 1)
    output = _output(model, tokens, trained_head=not adapters, sharded=gpus > 1)
    many = training.blocks(seq_len) > gpus * micro_batch
    steady = weights + moments + (gradients if many else 0)
    moment = max(
        steady + copies + kept + output,
        steady + copies + kept + again + on_way + gradients_on_way,
        weights + moments + gradients + late + gradients_on_way + again + on_way,
    )
    return Memory(
        weights, gradients, moments, max(copies, late + gradients_on_way), kept, output, moment
    )


def _activations(
    model: Model, training: DecoderTrainingConfig, tokens: int, *, sharded: bool
) -> tuple[float, float, float]:
    """Bytes kept of all layers until the backward pass, computed again of one layer, and taken by
    its gradients."""
    layer = model.layer_bytes(sharded=sharded, frozen=bool(training.lora_rank))
    if layer is None:
        raise UserError(
            f"a {type(model).__name__} does not say what its layers hold in a training, so it "
            "cannot be planned for"
        )
    choice = training.activation_checkpointing
    kept = getattr(layer, choice)
    if choice == "selective" and training.lora_rank:
        # The adapters' products are kept beside those of the weights.
        kept += 2 * sum(outputs for outputs, _ in model.matrix_sizes.values())
    of_final_norm = 4 * model.head.weight.shape[1]
    again = 0 if choice == "none" else max(0, layer.none - kept)
    held = model.config.layers * kept + of_final_norm
    return tokens * held, tokens * again, tokens * layer.backward


def _output(model: Model, tokens: int, *, trained_head: bool, sharded: bool) -> float:
    """Bytes of the output layer and the loss.

    A chunk's logits in bf16 and float32; the head in bf16, unless it was gathered, its gradient and
    the chunk's share of that; hidden states in float32 and bf16, and their gradient.
    """
    vocab_size, width = model.head.weight.shape
    rows, head = tokens_at_once(vocab_size), vocab_size * width
    copy = 0 if sharded else 2 * head
    if tokens <= rows:
        return tokens * (12 * vocab_size + 6 * width) + copy
    return rows * vocab_size * 6 + copy + (6 * head if trained_head else 0) + tokens * 8 * width
