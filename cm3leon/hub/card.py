"""The model card of an exported run: what it is, how to use it without this project, and its
limits.

Everything that it says of training and quality is read from the run. A figure that was not measured
does not appear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cm3leon.config import dump_yaml
from cm3leon.evaluation.report import numbers
from cm3leon.hub.export import Exported
from cm3leon.hub.image_tokenizer import why_not_diffusers
from cm3leon.io import read_json
from cm3leon.registry import TASKS
from cm3leon.stages.attribution import attribution
from cm3leon.stages.origin import Origin
from cm3leon.stages.publish import limit
from cm3leon.types import TokenDocument, TokenSegment

TEMPLATES = Path(__file__).parent / "templates"


def card_of(exported: Exported, origin: Origin, samples: Sequence[tuple[str, str]]) -> str:
    """The text of README.md, with the YAML header that the Hub reads.

    Args:
        samples: names of image files beside it, and the texts that they were drawn for.
    """
    run = exported.run
    tokenizer, layout = run.image_tokenizer, run.vocab.layout
    draws = exported.family is None or exported.family.draws
    metrics = _metrics(run.folder)
    parameters = sum(parameter.numel() for parameter in run.empty_model().parameters())

    # The card shows prompts as ids: readers have no code of this project that would make them.
    before_text, after_text, without_text = _text_to_image(exported)
    before_image, after_image = _image_to_text(exported)
    side = tokenizer.image_size
    summary = (
        f"A decoder-only model of text and images with {parameters:,} parameters. An image of "
        f"{side} x {side} pixels is {run.grid[0]} x {run.grid[1]} codes of "
        f"{tokenizer.codebook_size:,}, in one vocabulary with the pieces of its text."
    )
    card = (
        _environment()
        .get_template("card.md")
        .render(
            header=dump_yaml(_header(exported, origin, draws)),
            title=f"A CM3Leon decoder as {exported.form.model_class}",
            summary=summary,
            samples=samples,
            model_class=exported.form.model_class,
            draws=draws,
            rows_closed=layout.row_close is not None,
            has_processor=exported.has_processor,
            diffusers_reason=why_not_diffusers(tokenizer),
            before_text=before_text,
            after_text=after_text,
            without_text=without_text,
            before_image=before_image,
            after_image=after_image,
            text_ends=exported.special_ids()["eos_token_id"],
            rows=run.grid[0],
            columns=run.grid[1],
            image_size=tokenizer.image_size,
            seq_len=run.seq_len,
            ids=_ids(exported),
            training=_training(exported, origin, metrics),
            figures=_figures(metrics),
            limits=_limits(exported, metrics, draws),
            licence=_licence(exported, origin),
        )
    )
    return card.rstrip() + "\n"


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _header(exported: Exported, origin: Origin, draws: bool) -> dict[str, Any]:
    """What the Hub reads: licence, base model, and what the model is for."""
    header: dict[str, Any] = {"license": origin.licence or "unknown"}
    family = exported.family
    if family is not None and origin.licence == family.licence:
        # A family has the title of its licence, which is not one of the Hub's short names.
        header = {"license": "other", "license_name": family.licence}
    if origin.base_model is not None:
        header["base_model"] = origin.base_model
    header["library_name"] = "transformers"
    if draws:
        header["pipeline_tag"] = "any-to-any"
        header["tags"] = ["cm3leon", "text-to-image", "image-to-text"]
    else:
        header["pipeline_tag"] = "image-text-to-text"
        header["tags"] = ["cm3leon", "image-to-text"]
    return header


# ---------------------------------------------------------------------------------------- prompts


def _text_to_image(exported: Exported) -> tuple[list[int], list[int], list[int]]:
    """Ids before and behind a text whose image is asked for, and the unconditional prompt.

    They are found around one piece of text, which stands for any text.
    """
    run = exported.run
    piece = run.vocab.id_range("text")[0]
    asked = TokenDocument("", (TokenSegment("text", np.array([piece])), _fresh(exported)))
    prompt = _task(exported, "text_to_image").prompt(asked)
    before, after = _around(prompt.ids_T, np.array([piece]))
    without = prompt.ids_T[:0]
    if prompt.unconditional_T is not None:
        without = prompt.unconditional_T
    return exported.ids(before), exported.ids(after), exported.ids(without)


def _image_to_text(exported: Exported) -> tuple[list[int], list[int]]:
    """Ids before and behind the codes of an image whose text is asked for."""
    vocab, grid = exported.run.vocab, exported.run.grid
    ids_T = vocab.image_ids(np.zeros(grid[0] * grid[1], np.int64), grid)
    image = TokenSegment("image", ids_T, grid=grid)
    asked = TokenDocument("", (TokenSegment("text", np.empty(0, np.int64)), image))
    before, after = _around(_task(exported, "caption").prompt(asked).ids_T, ids_T)
    return exported.ids(before), exported.ids(after)


def _fresh(exported: Exported) -> TokenSegment:
    return TokenSegment("image", np.empty(0, np.int64), grid=exported.run.grid)


def _task(exported: Exported, name: str) -> Any:
    return TASKS.build(name, vocab=exported.run.vocab, grid=exported.run.grid)


def _around(ids_T: np.ndarray, part_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids before and behind the first occurrence of a part."""
    windows = np.lib.stride_tricks.sliding_window_view(ids_T, len(part_T))
    start = int(np.flatnonzero((windows == part_T).all(1))[0])
    return ids_T[:start], ids_T[start + len(part_T) :]


def _ids(exported: Exported) -> list[tuple[str, str]]:
    """The names of single ids and of modalities, each with its ids."""
    vocab = exported.run.vocab
    single = {
        "begin": vocab.layout.begin,
        "end": vocab.layout.end,
        "pad": vocab.pad,
        "break": vocab.brk,
        "end_of_span": vocab.end_of_span,
    }
    rows = [(name, str(exported.ids([id_])[0])) for name, id_ in single.items()]
    for name, ranges in exported.id_ranges().items():
        rows.append((name, ", ".join(f"{first} to {end - 1}" for first, end in ranges)))
    return rows


# ------------------------------------------------------------------------------ what the run says


def _metrics(folder: Path) -> Mapping[str, Any]:
    """metrics.json of a run that is finished; empty for others."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    return read_json(file)


def _training(exported: Exported, origin: Origin, metrics: Mapping[str, Any]) -> str:
    """How the weights were trained, in a few sentences."""
    experiment = exported.run.experiment
    training, made_from = experiment.training, _made_from(exported, origin)
    if experiment.data.name == "none":
        return f"The weights are those of {made_from}, converted and not trained further."

    lines = [
        f"Trained from {made_from} for {training.steps:,} steps of "
        f"{training.batch_size:,} samples with the objective {experiment.objective.name}, "
        f"on the source `{experiment.data.name}`."
    ]
    if training.lora_rank:
        lines.append(f"Low-rank adapters of rank {training.lora_rank} were trained and merged.")

    # Only a run that came to its end knows its documents and its losses.
    if "documents" in metrics:
        counts = metrics["documents"]
        held_out = f"{counts['held_out']:,} held-out ones"
        lines.append(f"It saw {counts['train']:,} documents, and is judged on {held_out}.")
    if "validation_loss" in metrics:
        losses = metrics["validation_loss"]
        named = [f"{name[5:]} {losses[name]:.3f}" for name in losses if name.startswith("loss_")]
        lines.append(f"Validation loss in nats a token: {', '.join(named)}.")
    return " ".join(lines)


def _made_from(exported: Exported, origin: Origin) -> str:
    """The name of the weights that the run began with."""
    experiment = exported.run.experiment
    if origin.base_model is not None:
        return origin.base_model
    if exported.family is not None:
        return f"{exported.family.title}'s public weights"
    if experiment.training.start is not None or experiment.data.name == "none":
        return "another run of this project"
    return "random weights"


def _figures(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table: evaluation, row, figure, value, interval, items."""
    found = []
    for name, rows in metrics.get("evaluations", {}).items():
        for row in rows:
            for metric, measured in row["metrics"].items():
                low, high = measured.get("low"), measured.get("high")
                interval = ""
                if low is not None and high is not None:
                    interval = f"{numbers.metric(low)} to {numbers.metric(high)}"
                value = numbers.metric(measured["value"])
                found.append([name, row["row"], metric, value, interval, f"{row['items']:,}"])
    return found


def _limits(exported: Exported, metrics: Mapping[str, Any], draws: bool) -> list[str]:
    """What the model cannot do or was not tested for, a sentence or two each."""
    run = exported.run
    limits = [
        "Nothing filters what it draws or writes, and it knows no more than its training data: do "
        "not take its texts for facts, nor its images for photographs.",
        "Images are drawn in one size, and nothing in them is finer than the image tokenizer "
        "keeps.",
    ]
    if "reconstruction" in metrics:
        figures = metrics["reconstruction"]
        limits.append(
            f"The image tokenizer gives held-out images back at {figures['psnr_held_out']:.1f} dB. "
            f"{limit(figures)}".strip()
        )
    if not metrics.get("evaluations"):
        limits.append("No figures of its quality were measured.")
    if not draws:
        limits.append(
            "It draws no images: its publisher disabled them, and its licence keeps it so."
        )
    if run.has_retriever:
        limits.append(
            "It was trained with retrieved documents before its samples. The memory bank is not in "
            "this folder: without it, it is asked in another way than it was trained."
        )
    return limits


def _licence(exported: Exported, origin: Origin) -> str:
    """The licence of the weights, those of what they were made from, and of the training data."""
    family = exported.family
    if family is None:
        said = origin.licence or "Whoever publishes these weights has not said under which licence."
    else:
        said = (
            f"The weights that this was made from are under the {family.licence}: "
            f"{family.conditions}."
        )
        if origin.licence not in (None, family.licence):
            said = f"{origin.licence}. {said}"
    return "\n\n".join(filter(None, [said, attribution([exported.run.experiment])]))
