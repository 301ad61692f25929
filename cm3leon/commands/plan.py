"""Say what a training takes: memory of each GPU by part, time and disk.

    python -m cm3leon.run plan experiment=pretrain_7b launcher.nodes=64 gpu=h200

Nothing is run, and no data need be there. docs/planning.md has the arithmetic, and what it was checked against.
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
"""On disk, of a pair of a caption and 1,024 codes: docs/scale.md."""
PAPER_DOCUMENTS = 340_000_000


@dataclass(kw_only=True)
class Options(ExperimentOptions):
    """Options of the command plan."""

    gpu: str = "h100"
    """Name of the GPU that is counted with."""
    mfu: PositiveFloat = 0.4
    """Share of its peak that is counted on: model FLOPs utilisation."""
    across: PositiveFloat = 50.0
    """GB (1e9 bytes) a second that a GPU sends to other nodes, one way: 50 is a network card of 400 Gbit/s for each."""
    inside: PositiveFloat | None = None
    """GB a second that it sends to the others of its node, one way; null = as the datasheet of the GPU says."""
    documents: PositiveInt = PAPER_DOCUMENTS
    """Documents of the corpus, for the disk."""
    format: Literal["text", "json"] = "text"
    """For people, or for programs."""

    def check(self) -> None:
        from cm3leon.training.costs import GPUS

        if self.gpu not in GPUS:
            raise UserError(f"gpu is {self.gpu}, which is not known; {choices(self.gpu, GPUS)}")
        if self.mfu > 1:
            raise UserError(f"mfu is {self.mfu:g}; it is a share of the peak, from above 0 to 1")


def main(options: Options) -> None:
    """Prints the plan. Raises UserError as `plan` does."""
    from cm3leon.experiment import load_experiment

    made = plan(load_experiment(options.experiment, options.overrides), options)
    if options.format == "json":
        print(json.dumps(asdict(made), indent=2))
    else:
        print("\n".join(as_text(made)))


@dataclass(frozen=True)
class Plan:
    """Figures of a plan; bytes, seconds, and numbers of things."""

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
    """Of a step, at that MFU."""
    layouts: list[ModelLayout]
    """Ways to lay the model out that the GPUs allow, by replicas; empty on one GPU."""
    best_replicas: int
    """Of the best layout that fits (`training/traffic.py`); 1 where none does."""
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
    """Of the trained model, when one such GPU draws images."""


def plan(experiment: Experiment, options: Options) -> Plan:
    """The plan of an experiment's training.

    Raises:
        UserError: for a model that does not say what its layers hold, a training in float32, or settings that GPUs and
            batches do not divide into.
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

    run = RunFolder(experiment, Path(), torch.device("cpu"))
    with torch.device("meta"):
        model = run.empty_model()
    if model.layer_bytes(sharded=False, frozen=False) is None:
        raise UserError(
            f"model {experiment.model.name} cannot be planned for: it does not say what its layers hold in a training"
        )
    launcher = LAUNCHERS.build(experiment.launcher)
    training, gpus, nodes = experiment.training, launcher.gpus, launcher.nodes
    gpu = GPUS[options.gpu]
    replicas = training.copies(nodes)
    if gpus % replicas:
        raise UserError(
            f"launcher has {gpus} GPUs, which training.replicas {replicas} does not divide"
        )
    if training.precision == "float32":
        raise UserError("training.precision is float32, which cannot be planned for; only bf16 can")
    if gpus > 1 and training.optimizer == "adamw_8bit":
        raise UserError("training.optimizer is adamw_8bit, which is for one GPU")
    blocks = training.blocks(model.seq_len)
    if blocks % gpus:
        raise UserError(
            f"a step has {blocks} blocks of {model.seq_len} tokens, which the {gpus} GPUs of launcher do not divide; "
            "change training.batch_tokens"
        )
    share = blocks // gpus
    micro_batch = training.blocks_at_once(model.seq_len, share)

    def memory(
        choice: ActivationCheckpointing, blocks_at_once: int, copies: int = replicas
    ) -> Memory:
        settings = replace(training, activation_checkpointing=choice, replicas=copies)
        return training_memory(model, settings, gpus=gpus, micro_batch=blocks_at_once)

    held = memory(training.activation_checkpointing, micro_batch)
    largest = {
        choice: max(
            (size for size in range(1, share + 1) if memory(choice, size).fits(gpu.memory)),
            default=0,
        )
        for choice in get_args(ActivationCheckpointing)
    }
    count = parameters(model)
    trained = lora_parameters(model, training.lora_rank) if training.lora_rank else count.total
    in_layers = trained if training.lora_rank else count.blocks
    flops = flops_per_token(model)
    rate = gpus * gpu.peak * options.mfu / flops
    links = Links((options.inside or gpu.link / 1e9) * 1e9, options.across * 1e9)
    compute_seconds = blocks * model.seq_len / rate
    layouts = []
    for copies in possible_replicas(gpus, nodes) if gpus > 1 else []:
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
    paper = PAPER_TOKENS.get(experiment.model.name) if training.start is None else None
    kept_for_good = training.steps // training.keep_every if training.keep_every else 0
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
        checkpoint_bytes=(8 if training.average_decay else 4) * trained
        + optimizer_bytes(training, in_layers, trained - in_layers),
        checkpoints=training.keep_checkpoints + kept_for_good,
        documents=options.documents,
        data_bytes={
            name: float(size * options.documents) for name, size in BYTES_PER_DOCUMENT.items()
        },
        drawing=footprint(model, run.vocab.layout.image_length(run.grid), gpu.bandwidth),
    )


def as_text(plan: Plan) -> Iterator[str]:
    """Lines for a terminal."""
    held = plan.memory
    yield f"{plan.model}, vocabulary {plan.vocabulary:,}"
    yield f"  parameters                {plan.parameters:,} ({plan.parameters_without_embeddings:,} without embeddings)"
    if plan.trained_parameters != plan.parameters:
        yield f"  trained                   {plan.trained_parameters:,} (LoRA)"
    yield ""
    gpus = f"each of {plan.gpus} {plan.gpu}" if plan.gpus > 1 else f"one {plan.gpu}"
    at_a_time = f"{plan.micro_batch} block{'s' if plan.micro_batch > 1 else ''} at a time"
    yield f"memory of {gpus}, {at_a_time}, activation checkpointing {plan.activation_checkpointing}"
    for name, size in asdict(held).items():
        if name != "total":
            yield f"  {name:<24}  {_gb(size)}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    usable = f"{_gb(plan.usable_bytes).strip()} of {_gb(plan.gpu_bytes).strip()} can be used"
    yield f"  {'at the fullest moment':<24}  {_gb(held.total)}   {verdict}: {usable}"
    sizes = ", ".join(
        f"{choice} {size or 'none'}" for choice, size in plan.largest_micro_batch.items()
    )
    share = plan.blocks_per_step // plan.gpus
    yield f"  largest micro-batch       {sizes} (of {share} blocks that a GPU has in a step)"
    if not plan.fits:
        yield f"  {_advice(plan)}"
    yield ""
    yield f"time, at {plan.mfu:.0%} of the peak (a run writes down what it reaches, as mfu)"
    yield f"  FLOPs a token             {plan.flops_per_token:.4g}"
    yield f"  tokens a second           {plan.tokens_per_second:,.0f} ({plan.tokens_per_second / plan.gpus:,.0f} a GPU)"
    yield f"  {plan.steps:,} steps".ljust(28) + f"{_span(plan.tokens, plan.days, plan.gpu_hours)}"
    if plan.paper_tokens and plan.paper_days and plan.paper_gpu_hours:
        yield f"  the paper's tokens        {_span(plan.paper_tokens, plan.paper_days, plan.paper_gpu_hours)}"
    yield ""
    if plan.layouts:
        yield from _traffic_as_text(plan)
        yield ""
    yield "disk"
    one, all_of_them = (
        _gb(count * plan.checkpoint_bytes).strip() for count in (1, plan.checkpoints)
    )
    yield f"  checkpoints               {one} each, {all_of_them} for the {plan.checkpoints} that are kept"
    parts = ", ".join(f"{name} {_gb(size).strip()}" for name, size in plan.data_bytes.items())
    yield (
        f"  {plan.documents:,} pairs".ljust(28)
        + f"{_gb(sum(plan.data_bytes.values())).strip()}: {parts}"
    )
    yield ""
    yield from _drawing_as_text(plan)


def _drawing_as_text(plan: Plan) -> Iterator[str]:
    """What one of the GPUs takes to draw images with guidance."""
    drawing = plan.drawing
    yield f"drawing an image of {drawing.ids:,} ids with guidance, on one {plan.gpu}"
    weights = ", ".join(f"{kind} {_gb(size).strip()}" for kind, size in drawing.weights.items())
    yield f"  weights                   {weights}"
    cache, full = (_gb(size).strip() for size in (drawing.cache, drawing.full_cache))
    yield f"  keys and values           {cache}, with documents that fill the context {full}"
    seconds = ", ".join(f"{kind} {size:.1f} s" for kind, size in drawing.seconds.items())
    yield f"  at least, one code a step {seconds}"


def _traffic_as_text(plan: Plan) -> Iterator[str]:
    """A row for each layout; the one of the settings is marked, and the best one named."""
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
            f"{mark} {each.replicas:8,}  {each.shards:6,}  {_gb(each.inside_bytes).strip():>8}  "
            f"{_gb(each.across_bytes).strip():>8}  {each.traffic_seconds:6.3f} s  {each.exposed_seconds:12.3f} s  "
            f"{each.step_seconds:6.3f} s  {_gb(each.memory).strip():>8}{room}"
        )
    if not any(each.fits for each in plan.layouts):
        yield "  none of them fits"
    elif plan.best_replicas == plan.replicas:
        yield "  the settings' layout (*) is the best that fits"
    else:
        as_nodes = ", one a node" if plan.best_replicas == plan.nodes else ""
        yield f"  best that fits            training.replicas={plan.best_replicas}{as_nodes}"


def _advice(plan: Plan) -> str:
    if any(plan.largest_micro_batch.values()):
        return "take a smaller training.micro_batch, or another training.activation_checkpointing"
    least, usable = _gb(plan.least_memory).strip(), _gb(plan.usable_bytes).strip()
    return (
        f"one block at a time with full checkpointing takes {least}, of {usable} that can be used: take more GPUs, "
        "larger ones, or training.lora_rank"
    )


def _span(tokens: float, days: float, gpu_hours: float) -> str:
    return f"{tokens / 1e9:,.1f}B tokens, {days:,.1f} days, {gpu_hours:,.0f} GPU-hours"


def _gb(size: float) -> str:
    return f"{size / 1e12:8.2f} TB" if size >= 1e12 else f"{size / 1e9:8.2f} GB"
