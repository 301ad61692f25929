"""Settings of a training: fields for every stage that trains, and those of the decoder alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cm3leon.config import (
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    result_settings,
)
from cm3leon.types import TrainingPrecision, UserError, refuse

ActivationCheckpointing = Literal["none", "selective", "full"]

HOW = NoEffect("how a step is computed; the sum is the same up to rounding")
KEPT = NoEffect("what is kept and written down, and when")
CARE = NoEffect("when a training in trouble is given up or written about")
"""Fields with one of these marks may change while a training goes on: they say how it is computed
and watched, not what it computes."""


TOKENS_AT_ONCE = 2**17
"""Tokens that a rank computes at a time unless `micro_batch` sets the number of blocks; what the
backward pass needs of them must fit the memory."""


@dataclass(kw_only=True)
class TrainingConfig:
    """Optimization of one module. The paper does not state AdamW's betas, weight decay and
    clipping; these are OPT's."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: Annotated[int, Range(ge=1, le=65_536)] = 32
    """Items of a step, of all ranks: blocks of tokens in pretraining, images or pairs elsewhere."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up to the peak."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """The rate after the warm-up. linear: falls on a line. cosine: falls on half a cosine. wsd
    (warm-up, stable, decay): stays at the peak,
    then falls on a line in the last `decay_share` of the steps."""
    final_rate: Probability = 0.0
    """Learning rate after the last step, as a share of the peak."""
    decay_share: Probability = 0.2
    """Schedule wsd: share of the steps in which the rate falls."""
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit keeps both moments in 8 bits a number, with torchao, which must be installed; one
    process only. muon is for the decoder: Muon for the matrices of its layers, at AdamW's rate, and
    AdamW for the rest."""
    beta1: Probability = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: Probability = 0.95
    """Decay of AdamW's mean of squared gradients."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decoupled weight decay, for matrices only."""
    undecayed: list[str] = field(default_factory=list)
    """Parameters whose names contain one of these words do not decay either: [embedding, positions]
    spares both tables."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient of all parameters together."""
    average_decay: Probability | None = None
    """Decay of a moving average of the weights, which is then the result; None:
    the last weights are."""
    precision: TrainingPrecision = "auto"
    """Precision of matrix products: bf16; float32; float8 (the decoder's layers in float8 with
    torchao on an H100 or newer, the rest in bf16); auto: bf16 if the processor computes in it and
    the model is wide enough to gain."""
    log_every: Annotated[PositiveInt, KEPT] = 20
    """Steps between two records of the figures."""
    checkpoint_every: Annotated[PositiveInt, KEPT] = 200
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[PositiveInt, KEPT] = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Annotated[PositiveInt, KEPT] | None = None
    """Checkpoints of steps that are multiples of this are kept for good; None: none are."""
    callback_every: Annotated[PositiveInt, KEPT] = 500
    """Steps between two validations, which also draw samples for the loggers."""
    bad_steps: Annotated[PositiveInt, CARE] = 10
    """Steps in a row that may be skipped, as their loss or gradient is not finite,
    before the run stops."""
    spike: Annotated[PositiveFloat, CARE] = 6.0
    """Standard deviations above the mean of the last 100 losses
    from which a loss is logged as a spike."""

    def check(self) -> None:
        refuse(self._mistakes())

    def _mistakes(self) -> list[str]:
        """Settings that do not go together, one sentence each."""
        mistakes = []
        if self.warmup_steps >= self.steps:
            mistakes.append(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")

        # A checkpoint falls on a record, so that a resumed run records the same means.
        if self.checkpoint_every % self.log_every:
            mistakes.append(
                f"log_every {self.log_every} must divide checkpoint_every {self.checkpoint_every}"
            )
        if self.keep_every and self.keep_every % self.checkpoint_every:
            mistakes.append(
                f"checkpoint_every {self.checkpoint_every} must divide keep_every {self.keep_every}"
            )

        # A step subtracts this share of each weight: 1 would leave nothing, more flips its sign.
        if self.learning_rate * self.weight_decay >= 1:
            mistakes.append(
                f"learning_rate {self.learning_rate:g} times weight_decay {self.weight_decay:g} "
                "must be below 1"
            )
        if not isinstance(self, DecoderTrainingConfig):
            for name, value in (("optimizer", "muon"), ("precision", "float8")):
                if getattr(self, name) == value:
                    mistakes.append(
                        f"{name} is {value}, which only the model's own training can use "
                        "(the section training); choose another"
                    )
        return mistakes


@dataclass(kw_only=True)
class DecoderTrainingConfig(TrainingConfig):
    """Optimization of the model, on any number of processes."""

    batch_tokens: PositiveInt | None = None
    """Tokens of a step, of all ranks, instead of `batch_size`; a multiple of model.seq_len. None:
    `batch_size` counts."""
    micro_batch: Annotated[PositiveInt, HOW] | None = None
    """Blocks that a rank computes at a time; their gradients are added up. None: its whole share of
    the batch, or as many blocks as have 131,072 tokens."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared log of the softmax's denominator, which keeps logits small (PaLM:
    1e-4); 0 turns it off."""
    activation_checkpointing: Annotated[ActivationCheckpointing, HOW] = "none"
    """What the backward pass computes again to save memory. none: nothing. selective: everything
    but matrix products and attention. full: everything inside a layer."""
    compile: Annotated[bool, HOW] = False
    """Whether torch.compile compiles each layer."""
    replicas: Annotated[PositiveInt, HOW] | Literal["nodes"] = 1
    """Copies of the model that share the batches; each is sharded over ranks / replicas (hybrid
    sharding). nodes: one copy a node, so that weights travel inside a node
    and only gradients between nodes."""
    timeout_seconds: Annotated[PositiveInt, CARE] = 600
    """A rank that waits longer for the others gives up and ends the job."""
    lora_rank: NonNegativeInt = 0
    """Rank of the small matrices that are trained instead of the layers' weights (LoRA); 0 trains
    all weights."""
    lora_alpha: PositiveFloat = 16.0
    """LoRA: the small matrices' output is multiplied by this over the rank."""
    start: Path | None = None
    """Run folder whose finished pretraining this training starts from; None: random weights."""
    start_with: Literal["weights", "everything"] = "weights"
    """weights: optimizer, data and steps start anew (fine-tuning). everything: they continue where
    that training ended, for another `steps` under this schedule, as when the paper raised the
    learning rate again after an epoch."""

    def copies(self, nodes: int) -> int:
        """Copies of the model on so many nodes."""
        return nodes if self.replicas == "nodes" else self.replicas

    def blocks_at_once(self, seq_len: int, share: int) -> int:
        """Blocks that a rank computes at a time, of its `share` of a step."""
        return min(share, self.micro_batch or max(1, TOKENS_AT_ONCE // seq_len))

    def blocks(self, seq_len: int) -> int:
        """Blocks of a step, of all ranks. Raises UserError for tokens that are not whole blocks."""
        if self.batch_tokens is None:
            return self.batch_size
        if self.batch_tokens % seq_len:
            raise UserError(
                f"training.batch_tokens is {self.batch_tokens}; it must be a multiple of "
                f"model.seq_len {seq_len}"
            )
        return self.batch_tokens // seq_len

    def _mistakes(self) -> list[str]:
        mistakes = super()._mistakes()
        if self.start_with == "everything" and self.start is None:
            mistakes.append(
                "start_with is everything, but start names no run folder; give one, for example "
                "training.start=runs/digits"
            )
        if self.lora_rank and (self.start is None or self.start_with == "everything"):
            mistakes.append(
                "lora_rank adapts trained weights: set start to a run folder, and "
                "start_with=weights"
            )
        if self.lora_rank and self.precision == "float8":
            mistakes.append(
                "precision is float8, which cannot train adapters; take bf16, or leave lora_rank "
                "out"
            )
        return mistakes


def training_settings(config: TrainingConfig, seq_len: int = 0) -> dict[str, Any]:
    """The fields that the trained weights depend on, without those that have no effect here.

    Args:
        seq_len: tokens of a block, if batches may be given in tokens.
    """
    settings = result_settings(config)
    unused = []
    if config.schedule != "wsd":
        unused.append("decay_share")

    if isinstance(config, DecoderTrainingConfig):
        settings["batch_size"] = config.blocks(seq_len)
        unused.append("batch_tokens")
        if not config.lora_rank:
            unused.append("lora_alpha")
        if not config.start:
            unused.append("start_with")
    return {name: value for name, value in settings.items() if name not in unused}
