"""Compute what a training takes: memory of each GPU by part, time and disk.

    python -m cm3leon.run plan experiment=pretrain_7b launcher.nodes=64 gpu=h200

Nothing is run, and no data is needed. docs/planning.md has the arithmetic, and what it was checked
against.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from cm3leon.commands.words import ExperimentOptions
from cm3leon.config import PositiveFloat, PositiveInt, choices
from cm3leon.registry import LAUNCHERS
from cm3leon.types import UserError

if TYPE_CHECKING:
    from cm3leon.decoders.footprint import Footprint
    from cm3leon.experiment import Experiment
    from cm3leon.training.config import ActivationCheckpointing
    from cm3leon.training.memory import Memory
    from cm3leon.training.traffic import Links, ModelLayout

PAPER_TOKENS = {"cm3leon_350m": 1.4e12, "cm3leon_760m": 1.9e12, "cm3leon_7b": 2.4e12}
"""Training tokens of the paper's models (Table 3)."""
BYTES_PER_DOCUMENT = {"tokens": 2145, "vectors": 2048, "index": 72, "neighbours": 65}
"""On disk, for a caption and an image of 1,024 codes: docs/scale.md."""
PAPER_DOCUMENTS = 340_000_000


@dataclass(kw_only=True)
class Options(ExperimentOptions):
    """Options of the command plan."""

    gpu: str = "h100"
    """Name of the GPU to plan for."""
    mfu: PositiveFloat = 0.4
    """Share of the GPU's peak that the training reaches: model FLOPs utilisation."""
    across: PositiveFloat = 50.0
    """GB (1e9 bytes) a second that a GPU sends to other nodes, one way; 50 is one network card of
    400 Gbit/s for each GPU."""
    inside: PositiveFloat | None = None
    """GB a second that a GPU sends to others of its node, one way; null = as its datasheet says."""
    documents: PositiveInt = PAPER_DOCUMENTS
    """Documents of the corpus, for the disk."""
    format: Literal["text", "json"] = "text"
    """Text for people, or JSON for programs."""

    def check(self) -> None:
        from cm3leon.training.costs import GPUS

        if self.gpu not in GPUS:
            raise UserError(f"gpu is {self.gpu}, which is not known; {choices(self.gpu, GPUS)}")
        if self.mfu > 1:
            raise UserError(
                f"mfu is {self.mfu:g}; it must be a share of the peak, above 0 and at most 1"
            )


def main(options: Options) -> None:
    """Print the plan. Raises UserError as `plan` does."""
    from cm3leon.experiment import load_experiment

    made = plan(load_experiment(options.experiment, options.overrides), options)
    if options.format == "json":
        print(json.dumps(asdict(made), indent=2))
    else:
        print("\n".join(as_text(made)))


@dataclass(frozen=True)
class Plan:
    """The figures of a plan, in bytes, seconds and counts."""

    model: str
    vocabulary: int
    parameters: int
    parameters_without_embeddings: int
    trained_parameters: int
    gpu: str
    gpus: int
    gpu_bytes: float
    usable_bytes: float
    nodes: int
    replicas: int
    """Copies of the model."""
    blocks_per_step: int
    micro_batch: int
    activation_checkpointing: str
    memory: Memory
    fits: bool
    largest_micro_batch: dict[str, int]
    """By checkpointing choice; 0 where even one block does not fit."""
    least_memory: float
    """Bytes of one block at a time with full checkpointing."""
    flops_per_token: float
    mfu: float
    tokens_per_second: float
    links: Links
    compute_seconds: float
    """Computation of a step, at this MFU."""
    layouts: list[ModelLayout]
    """Ways to split the model over the GPUs, by replicas; empty on one GPU."""
    best_replicas: int
    """Replicas of the best layout that fits (`training/traffic.py`); 1 if none fits."""
    steps: int
    tokens: float
    days: float
    gpu_hours: float
    paper_tokens: float | None
    paper_days: float | None
    paper_gpu_hours: float | None
    checkpoint_bytes: float
    checkpoints: int
    """Kept at the end: the newest, and those kept for good."""
    documents: int
    data_bytes: dict[str, float]
    drawing: Footprint
    """What drawing images with the trained model takes, on one such GPU."""


def plan(experiment: Experiment, options: Options) -> Plan:
    """The plan of an experiment's training.

    Raises:
        UserError: for a model that does not say what its layers hold, a training in float32, or a
            batch or replicas that the GPUs cannot share evenly.
    """
    import torch

    from cm3leon.decoders.footprint import footprint
    from cm3leon.stages.run_folder import RunFolder
    from cm3leon.training.config import ActivationCheckpointing
    from cm3leon.training.costs import GPUS, flops_per_token
    from cm3leon.training.memory import (
        USABLE,
        lora_parameters,
        optimizer_bytes,
        parameters,
        training_memory,
    )
    from cm3leon.training.traffic import Links, best, layout, possible_replicas, traffic

    # The model without memory for its weights: only shapes are counted.
    run = RunFolder(experiment, Path(), torch.device("cpu"))
    with torch.device("meta"):
        model = run.empty_model()
    if model.layer_bytes(sharded=False, frozen=False) is None:
        raise UserError(
            f"model.name is {experiment.model.name}, which cannot be planned for: it does not say "
            "what its layers hold in a training"
        )

    launcher = LAUNCHERS.build(experiment.launcher)
    training, gpus, nodes = experiment.training, launcher.gpus, launcher.nodes
    gpu = GPUS[options.gpu]
    replicas = training.copies(nodes)
    if gpus % replicas:
        raise UserError(
            f"launcher has {gpus} GPUs, which training.replicas {replicas} does not divide; choose "
            "a divisor of the number of GPUs"
        )
    if training.precision == "float32":
        raise UserError(
            "training.precision is float32, which cannot be planned for; set "
            "training.precision=bf16"
        )
    if gpus > 1 and training.optimizer == "adamw_8bit":
        raise UserError(
            "training.optimizer is adamw_8bit, which is for one GPU; choose another, such as "
            "training.optimizer=adamw"
        )
    blocks = training.blocks(model.seq_len)
    if blocks % gpus:
        raise UserError(
            f"a step has {blocks} blocks of {model.seq_len} tokens, which {gpus} GPUs cannot share "
            "evenly; change training.batch_size (or training.batch_tokens, if it is set) or the "
            "number of GPUs"
        )

    # Memory: with the settings as they are, and the most blocks at a time by checkpointing.
    share = blocks // gpus
    micro_batch = training.blocks_at_once(model.seq_len, share)

    def memory(
        choice: ActivationCheckpointing, blocks_at_once: int, copies: int = replicas
    ) -> Memory:
        settings = replace(training, activation_checkpointing=choice, replicas=copies)
        return training_memory(model, settings, gpus=gpus, micro_batch=blocks_at_once)

    held = memory(training.activation_checkpointing, micro_batch)
    largest = {}
    for choice in get_args(ActivationCheckpointing):
        fitting = (size for size in range(1, share + 1) if memory(choice, size).fits(gpu.memory))
        largest[choice] = max(fitting, default=0)

    # With LoRA, only its matrices are trained, all of which lie in the layers.
    count = parameters(model)
    trained, in_layers = count.total, count.blocks
    if training.lora_rank:
        trained = in_layers = lora_parameters(model, training.lora_rank)

    # Time: computation at the given MFU, and the traffic of each way to split the model.
    flops = flops_per_token(model)
    rate = gpus * gpu.peak * options.mfu / flops
    links = Links((options.inside or gpu.link / 1e9) * 1e9, options.across * 1e9)
    compute_seconds = blocks * model.seq_len / rate
    layouts = []
    possible = possible_replicas(gpus, nodes) if gpus > 1 else []
    for copies in possible:
        settings = replace(training, replicas=copies)
        made = traffic(
            model,
            settings,
            gpus=gpus,
            nodes=nodes,
            micro_batches=-(-share // micro_batch),
        )
        needed = memory(training.activation_checkpointing, micro_batch, copies)
        layouts.append(
            layout(
                made,
                links,
                compute_seconds,
                replicas=copies,
                shards=gpus // copies,
                memory=needed.total,
                fits=needed.fits(gpu.memory),
            )
        )
    best_layout = best(layouts)

    tokens = float(training.steps) * blocks * model.seq_len
    paper = None
    if training.start is None:
        paper = PAPER_TOKENS.get(experiment.model.name)

    # Disk: a checkpoint has the weights in float32, their average if there is one, and the
    # optimizer's state.
    weight_bytes = 8 if training.average_decay else 4
    state_bytes = optimizer_bytes(training, in_layers, trained - in_layers)
    checkpoint_bytes = weight_bytes * trained + state_bytes
    kept_for_good = 0
    if training.keep_every:
        kept_for_good = training.steps // training.keep_every
    data_bytes = {}
    for name, size in BYTES_PER_DOCUMENT.items():
        data_bytes[name] = float(size * options.documents)

    return Plan(
        model=experiment.model.name,
        vocabulary=model.vocab_size,
        parameters=count.total,
        parameters_without_embeddings=count.blocks,
        trained_parameters=trained,
        gpu=options.gpu,
        gpus=gpus,
        nodes=nodes,
        replicas=replicas,
        gpu_bytes=gpu.memory,
        usable_bytes=USABLE * gpu.memory,
        blocks_per_step=blocks,
        micro_batch=micro_batch,
        activation_checkpointing=training.activation_checkpointing,
        memory=held,
        fits=held.fits(gpu.memory),
        largest_micro_batch=largest,
        least_memory=memory("full", 1).total,
        flops_per_token=flops,
        mfu=options.mfu,
        tokens_per_second=rate,
        links=links,
        compute_seconds=compute_seconds,
        layouts=layouts,
        best_replicas=best_layout.replicas if best_layout else 1,
        steps=training.steps,
        tokens=tokens,
        days=tokens / rate / 86_400,
        gpu_hours=gpus * tokens / rate / 3600,
        paper_tokens=paper,
        paper_days=paper and paper / rate / 86_400,
        paper_gpu_hours=paper and gpus * paper / rate / 3600,
        checkpoint_bytes=checkpoint_bytes,
        checkpoints=training.keep_checkpoints + kept_for_good,
        documents=options.documents,
        data_bytes=data_bytes,
        drawing=footprint(model, run.vocab.layout.image_length(run.grid), gpu.bandwidth),
    )


def as_text(plan: Plan) -> Iterator[str]:
    """The plan as lines for a terminal, by the part that they are about."""
    yield f"{plan.model}, vocabulary {plan.vocabulary:,}"
    yield _row(
        "parameters",
        f"{plan.parameters:,} ({plan.parameters_without_embeddings:,} without embeddings)",
    )
    if plan.trained_parameters != plan.parameters:
        yield _row("trained", f"{plan.trained_parameters:,} (LoRA)")
    yield ""

    yield from _memory_as_text(plan)
    yield ""

    yield f"time, at {plan.mfu:.0%} of the peak (a run writes down what it reaches, as mfu)"
    yield _row("FLOPs a token", f"{plan.flops_per_token:.4g}")
    rate = plan.tokens_per_second
    yield _row("tokens a second", f"{rate:,.0f} ({rate / plan.gpus:,.0f} a GPU)")
    yield _row(f"{plan.steps:,} steps", _span(plan.tokens, plan.days, plan.gpu_hours))
    if plan.paper_tokens and plan.paper_days and plan.paper_gpu_hours:
        span = _span(plan.paper_tokens, plan.paper_days, plan.paper_gpu_hours)
        yield _row("the paper's tokens", span)
    yield ""

    if plan.layouts:
        yield from _traffic_as_text(plan)
        yield ""

    yield "disk"
    one, kept = plan.checkpoint_bytes, plan.checkpoints * plan.checkpoint_bytes
    yield _row(
        "checkpoints",
        f"{_gb(one)} each, {_gb(kept)} for the {plan.checkpoints} that are kept",
    )
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in plan.data_bytes.items())
    yield _row(f"{plan.documents:,} pairs", f"{_gb(sum(plan.data_bytes.values()))}: {parts}")
    yield ""

    yield from _drawing_as_text(plan)


def _row(name: str, value: str) -> str:
    """A line with its value from column 28."""
    return f"  {name}".ljust(28) + value


def _memory_as_text(plan: Plan) -> Iterator[str]:
    """The memory of a GPU by what holds it, and whether the training fits."""
    held = plan.memory
    gpus = f"each of {plan.gpus} {plan.gpu}" if plan.gpus > 1 else f"one {plan.gpu}"
    blocks = "1 block" if plan.micro_batch == 1 else f"{plan.micro_batch} blocks"
    yield (
        f"memory of {gpus}, {blocks} at a time, "
        f"activation checkpointing {plan.activation_checkpointing}"
    )
    for name, size in asdict(held).items():
        if name != "total":
            yield _row(name, _aligned_gb(size))

    verdict = "fits" if plan.fits else "DOES NOT FIT"
    usable = f"{_gb(plan.usable_bytes)} of {_gb(plan.gpu_bytes)} can be used"
    yield _row("at the fullest moment", f"{_aligned_gb(held.total)}   {verdict}: {usable}")

    by_choice = plan.largest_micro_batch.items()
    sizes = ", ".join(f"{choice} {size or 'none'}" for choice, size in by_choice)
    share = plan.blocks_per_step // plan.gpus
    yield _row("largest micro-batch", f"{sizes} (of {share} blocks that a GPU has in a step)")
    if not plan.fits:
        yield f"  {_advice(plan)}"


def _drawing_as_text(plan: Plan) -> Iterator[str]:
    """What one of the GPUs needs to draw images with guidance."""
    drawing = plan.drawing
    yield f"drawing an image of {drawing.ids:,} ids with guidance, on one {plan.gpu}"
    weights = ", ".join(f"{kind} {_gb(size)}" for kind, size in drawing.weights.items())
    yield _row("weights", weights)
    cache, full = _gb(drawing.cache), _gb(drawing.full_cache)
    yield _row("keys and values", f"{cache}, with documents that fill the context {full}")
    seconds = ", ".join(f"{kind} {size:.1f} s" for kind, size in drawing.seconds.items())
    yield _row("at least, one code a step", seconds)


def _traffic_as_text(plan: Plan) -> Iterator[str]:
    """A row for each layout; that of the settings has a star, and the best one is named below."""
    inside, across = plan.links.inside / 1e9, plan.links.across / 1e9
    yield (
        f"traffic of a GPU and step, beside {plan.compute_seconds:.2f} s of computation; "
        f"{inside:g} GB/s inside a node, {across:g} GB/s to others"
    )
    yield "  replicas  shards    inside    across   traffic  not overlapped      step    memory"
    for each in plan.layouts:
        mark = "*" if each.replicas == plan.replicas else " "
        room = "" if each.fits else "  does not fit"
        yield (
            f"{mark} {each.replicas:8,}  {each.shards:6,}  "
            f"{_gb(each.inside_bytes):>8}  {_gb(each.across_bytes):>8}  "
            f"{each.traffic_seconds:6.3f} s  {each.exposed_seconds:12.3f} s  "
            f"{each.step_seconds:6.3f} s  {_gb(each.memory):>8}{room}"
        )

    if not any(each.fits for each in plan.layouts):
        yield "  none of them fits"
    elif plan.best_replicas == plan.replicas:
        yield "  the settings' layout (*) is the best that fits"
    else:
        as_nodes = ", one a node" if plan.best_replicas == plan.nodes else ""
        yield f"  best that fits            training.replicas={plan.best_replicas}{as_nodes}"


def _advice(plan: Plan) -> str:
    """What to change for a training that does not fit."""
    if any(plan.largest_micro_batch.values()):
        return "take a smaller training.micro_batch, or another training.activation_checkpointing"
    return (
        f"one block at a time with full checkpointing takes {_gb(plan.least_memory)}, of "
        f"{_gb(plan.usable_bytes)} that can be used: take more GPUs, larger ones, or "
        "training.lora_rank"
    )


def _span(tokens: float, days: float, gpu_hours: float) -> str:
    return f"{tokens / 1e9:,.1f}B tokens, {days:,.1f} days, {gpu_hours:,.0f} GPU-hours"


def _gb(size: float) -> str:
    return _aligned_gb(size).strip()


def _aligned_gb(size: float) -> str:
    """Bytes in GB or TB (powers of ten), in a column of 11 characters."""
    if size >= 1e12:
        return f"{size / 1e12:8.2f} TB"
    return f"{size / 1e9:8.2f} GB"
