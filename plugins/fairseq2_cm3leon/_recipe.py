"""Pretraining with fairseq2's trainer: our batches and our loss, with its loop, its parallelism and
its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from fairseq2.logging import log
from fairseq2.metrics import Mean, MetricBag
from fairseq2.metrics.common import (
    add_nll_loss_metric,
    add_seq_batch_metrics,
    update_seq_batch_metrics,
)
from fairseq2.metrics.formatters import format_as_float
from fairseq2.metrics.recorders import MetricDescriptor
from fairseq2.models.transformer_lm import TransformerLM
from fairseq2.optim.lr_schedulers import LRScheduler
from fairseq2.recipe import Recipe, RecipeContext
from fairseq2.recipe.cli import register_cli_error
from fairseq2.recipe.component import register_component
from fairseq2.recipe.config import (
    ADAMW_OPTIMIZER,
    ActivationCheckpointingConfig,
    AdamWConfig,
    AdamWGroupConfig,
    CommonSection,
    DatasetSection,
    FSDPConfig,
    GangSection,
    GradAccumulationConfig,
    LRSchedulerSection,
    MixedPrecisionConfig,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    TrainerSection,
)
from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver
from fairseq2.task import Task
from fairseq2.trainer import TrainUnit
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cm3leon.data.shards import DamagedShard
from cm3leon.models.transformer import Transformer
from cm3leon.plugins.fairseq2_cm3leon._dataset import Blocks, PackedBlocks
from cm3leon.plugins.fairseq2_cm3leon._families import FAMILY, register_families
from cm3leon.plugins.fairseq2_cm3leon._sdpa import XformersSDPA
from cm3leon.plugins.fairseq2_cm3leon.convert import to_fairseq2
from cm3leon.training.config import TrainingConfig
from cm3leon.training.device import best_device, uses_bf16
from cm3leon.training.schedule import learning_rate
from cm3leon.types import UserError

if TYPE_CHECKING:
    from cm3leon.stages.run_folder import RunFolder

MODALITIES = ("text", "image")


@dataclass(kw_only=True)
class BlocksSection(DatasetSection):
    """The blocks to train on, and how many of them a step takes."""

    batch_size: int | None = None
    """Blocks of an optimizer step on all ranks together; None = as many as in the run's own
    training."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Our schedule of the learning rate, see `cm3leon.training.schedule`."""

    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """The rate after the warm-up."""
    num_warmup_steps: int = 100
    """Steps of linear warm-up; the first one already has a rate above 0."""
    final_lr_scale: float = 0.0
    """Learning rate after the last step, as a share of the peak."""
    decay_share: float = 0.2
    """Schedule wsd: share of the steps in which the rate falls."""


def _optimizer(**fields: Any) -> OptimizerSection:
    """AdamW with the defaults of our own pretraining, other than the given fields."""
    config = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "impl": "fused", **fields}
    return OptimizerSection(name=ADAMW_OPTIMIZER, config=AdamWConfig(**config))


@dataclass(kw_only=True)
class PretrainConfig:
    """The sections of fairseq2's recipes. Where our own pretraining has a default, it is used."""

    model: ModelSection = field(
        default_factory=lambda: ModelSection(family=FAMILY, arch="cm3leon_350m")
    )
    dataset: BlocksSection = field(default_factory=lambda: BlocksSection(family=FAMILY))
    z_loss: float = 0.0
    """Weight in the loss of the mean squared logarithm of the softmax's denominator."""
    gang: GangSection = field(default_factory=GangSection)
    trainer: TrainerSection = field(
        default_factory=lambda: TrainerSection(data_parallelism="fsdp", max_grad_norm=1.0)
    )
    optimizer: OptimizerSection = field(default_factory=_optimizer)
    lr_scheduler: LRSchedulerSection = field(
        default_factory=lambda: LRSchedulerSection(name=FAMILY, config=ScheduleConfig())
    )
    regime: RegimeSection = field(
        default_factory=lambda: RegimeSection(
            num_steps=1000,
            checkpoint_every_n_steps=200,
            keep_last_n_checkpoints=2,
            publish_metrics_every_n_steps=20,
        )
    )
    common: CommonSection = field(default_factory=lambda: CommonSection(no_sweep_dir=True))


class PretrainRecipe(Recipe):
    """Pretrain a model of the family on the blocks of a run."""

    def register(self, container: DependencyContainer) -> None:
        # In a clone that is not installed, fairseq2 finds no entry point.
        register_families(container)
        register_component(
            container, LRScheduler, FAMILY, config_kls=ScheduleConfig, factory=_new_schedule
        )
        for kind in (UserError, DamagedShard):
            register_cli_error(container, kind, _say)
        for modality in MODALITIES:
            descriptor = MetricDescriptor(
                f"nll_loss_{modality}", f"NLL Loss ({modality})", 101, format_as_float
            )
            container.collection.register_instance(MetricDescriptor, descriptor)

    def setup_model(
        self, context: RecipeContext, model: TransformerLM, newly_initialized: bool
    ) -> TransformerLM:
        """Use xformers instead of fairseq2's default, whose mask for packed samples compares all
        tokens of a batch with each other."""
        if context.get_config_as(PretrainConfig).common.torch.default_sdpa == "torch":
            for layer in model.decoder.layers:
                layer.self_attn.sdpa = XformersSDPA(layer.self_attn.sdpa.bias)
        return model

    def create_task(self, context: RecipeContext) -> Task:
        config = context.get_config_as(PretrainConfig)
        blocks = context.get_dataset_as(Blocks)
        reader = blocks.create_reader(
            context.gangs,
            batch_size=config.dataset.batch_size,
            num_accumulate=config.trainer.grad_accumulation.num_batches,
        )
        model = context.get_model_as(TransformerLM)
        _check_model(model, blocks)
        unit = PretrainUnit(
            model, context.get_data_parallel_model(), blocks.run.objective, z_loss=config.z_loss
        )
        return context.create_trainer(unit, reader)

    @property
    def config_kls(self) -> type[object]:
        return PretrainConfig


def _check_model(model: TransformerLM, blocks: Blocks) -> None:
    """Check that a model has positions and ids for the blocks. Raises UserError if not."""
    if model.max_seq_len < blocks.seq_len:
        raise UserError(
            f"model: it has {model.max_seq_len} positions, the blocks of {blocks.run.folder} "
            f"{blocks.seq_len}; set model.config_overrides.seq_len to {blocks.seq_len}"
        )
    if model.final_proj.output_dim < blocks.vocab_size:
        raise UserError(
            f"model: it has {model.final_proj.output_dim} ids, the vocabulary of "
            f"{blocks.run.folder} {blocks.vocab_size}; set model.config_overrides.vocab_size to "
            f"{blocks.vocab_size}"
        )


class PretrainUnit(TrainUnit[PackedBlocks]):
    """The objective's loss, computed inside the model's forward pass: with sharded weights, the
    head exists only there.

    Args:
        wrapped: the model under fairseq2's data parallelism.
    """

    def __init__(
        self, model: TransformerLM, wrapped: nn.Module, objective: Any, *, z_loss: float
    ) -> None:
        self._model = model
        self._wrapped = wrapped
        self._objective = objective
        self._z_loss = z_loss

    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        add_nll_loss_metric(metric_bag)
        add_seq_batch_metrics(metric_bag)
        for modality in MODALITIES:
            metric_bag.add(f"nll_loss_{modality}", Mean())

    def process_batch(self, batch: PackedBlocks, metric_bag: MetricBag) -> tuple[Tensor, None]:
        # The trainer's model calls this on its last hidden states.
        def loss(hidden_ND: Tensor, targets: Tensor, **_: Any) -> Any:
            return self._objective.loss(
                hidden_ND[None], self._model.final_proj, batch.batch, z_loss=self._z_loss
            )

        self._model.compute_fused_loss = loss
        ids_N, layout = batch.as_input()
        mean, figures = self._wrapped(ids_N, layout, targets=batch.batch.target_BT[0])

        # Means over ranks weigh each rank by its targets, as the loss does.
        with torch.inference_mode():
            metric_bag.get("nll_loss", Mean).update(mean.detach(), weight=batch.weight)
            for modality in MODALITIES:
                total, count = figures[f"loss_{modality}"]
                metric_bag.get(f"nll_loss_{modality}", Mean).update(
                    total / count.clamp(min=1), weight=count
                )
            update_seq_batch_metrics(metric_bag, batch)
        return mean * batch.share, None


def _new_schedule(resolver: DependencyResolver, config: ScheduleConfig) -> LRScheduler:
    """fairseq2's scheduler by our learning rate, as a share of the peak."""
    steps = resolver.resolve(RegimeSection).num_steps
    if steps is None:
        raise UserError(f"regime.num_steps is missing; lr_scheduler.name={FAMILY} needs it")
    shape = TrainingConfig(
        steps=steps,
        warmup_steps=config.num_warmup_steps,
        schedule=config.schedule,
        final_rate=config.final_lr_scale,
        decay_share=config.decay_share,
        learning_rate=1.0,
    )
    shape.check()
    return ScheduleLR(resolver.resolve(Optimizer), lambda step: learning_rate(step, shape))


class ScheduleLR(LambdaLR, LRScheduler):
    """A LambdaLR that also derives from torch's former base class, by which fairseq2 recognises
    schedulers."""


def _say(error: Exception) -> int:
    """Log a user's mistake as one sentence; return the exit code."""
    log.error("{}", error)
    return 2


# --------------------------------------------------------------------------- from an experiment


def recipe_of(run: RunFolder) -> PretrainConfig:
    """The recipe that trains on one process as a run's own pretraining does.

    Raises:
        UserError: for a training that fairseq2's trainer cannot do.
    """
    # Rather than leaving out what a run asks for, say that it cannot be done.
    training, model = run.experiment.training, run.experiment.model.config
    for name, asked in (
        ("average_decay", training.average_decay is not None),
        ("lora_rank", training.lora_rank > 0),
        ("optimizer", training.optimizer != "adamw"),
        ("precision", training.precision == "float8"),
        ("start_with", training.start_with != "weights"),
    ):
        if asked:
            raise UserError(
                f"training.{name} is {getattr(training, name)}, which fairseq2's trainer cannot do"
            )

    batch_size = training.blocks(run.seq_len)
    bf16 = uses_bf16(best_device(), training.precision)
    # Attention is left out, since fairseq2 has a setting of its own for it.
    shape = {
        name: getattr(model, name) for name in vars(Transformer.Config()) if name != "attention"
    }
    return PretrainConfig(
        model=ModelSection(
            family=FAMILY,
            config_overrides={**shape, "vocab_size": run.vocab.size},
            path=training.start and training.start / "pretraining",
            compile=training.compile,
        ),
        dataset=BlocksSection(
            family=FAMILY,
            config_overrides={"run": str(run.folder.resolve())},
            batch_size=batch_size,
        ),
        z_loss=training.z_loss,
        trainer=TrainerSection(
            data_parallelism="fsdp",
            fsdp=FSDPConfig(hybrid=training.replicas != 1),
            mixed_precision=MixedPrecisionConfig(mode="static" if bf16 else "off"),
            grad_accumulation=GradAccumulationConfig(
                num_batches=batch_size // (training.micro_batch or batch_size)
            ),
            activation_checkpointing=ActivationCheckpointingConfig(
                mode="off" if training.activation_checkpointing == "none" else "layerwise"
            ),
            max_grad_norm=training.clip,
        ),
        optimizer=_optimizer(
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
            groups=_undecayed(training.undecayed, model.layers),
        ),
        lr_scheduler=LRSchedulerSection(
            name=FAMILY,
            config=ScheduleConfig(
                schedule=training.schedule,
                num_warmup_steps=training.warmup_steps,
                final_lr_scale=training.final_rate,
                decay_share=training.decay_share,
            ),
        ),
        regime=RegimeSection(
            num_steps=training.steps,
            checkpoint_every_n_steps=training.checkpoint_every,
            keep_last_n_checkpoints=training.keep_checkpoints,
            keep_checkpoint_every_n_steps=training.keep_every,
            publish_metrics_every_n_steps=training.log_every,
        ),
        common=CommonSection(no_sweep_dir=True, seed=run.experiment.seed),
    )


def _undecayed(words: Sequence[str], layers: int) -> list[AdamWGroupConfig]:
    """The group of matrices without weight decay: by fairseq2's names, all those whose names in our
    model contain one of the words."""
    if not words:
        return []
    # The smallest model with that many layers has all names; marks are renamed with its weights.
    smallest = Transformer(
        Transformer.Config(layers=layers, width=1, head_size=1, seq_len=1), vocab_size=1
    )
    marked = {}
    for name, weight in smallest.state_dict().items():
        marked[name] = torch.full_like(weight, any(word in name for word in words))
    names = [re.escape(name) for name, mark in to_fairseq2(marked).items() if mark.any()]
    return [AdamWGroupConfig(params=names, weight_decay=0.0)]
