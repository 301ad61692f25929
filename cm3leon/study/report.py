"""The page of a study: aims, a table and a plot for each evaluation, some of the answers, and its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cm3leon.evaluate import Example
from cm3leon.evaluation.config import Aim, shown
from cm3leon.evaluation.origin import Origin, is_logarithmic, page_of
from cm3leon.evaluation.report import (
    Card,
    Cell,
    Content,
    Curves,
    Fact,
    Folded,
    Gallery,
    Picture,
    Report,
    Section,
    Series,
    Status,
    Table,
    write_report,
)
from cm3leon.study.config import Study, StudyEvaluation

NOTE = "In brackets the interval of 95 %."
SEEDS = (
    "Each figure is the mean over {count} seeds, ± the standard deviation between their runs; in round brackets the "
    "interval of 95 % of that mean (Student's t over the runs), in square brackets that over the items of one run. "
    "Answers that are shown are of the first seed."
)
ALL_DOCUMENTS = "All documents: the share of the prompts that had as many retrieved documents as were asked for."
TRUNCATED = "Truncated: the share of answers that were cut at their longest, {lengths} tokens, before they ended."
CEILING = (
    "Ceiling: the true images after the image tokenizer, measured as answers are. Chance: the true answers to other "
    "items."
)


def study_report(
    path: Path,
    study: Study,
    results: Mapping[str, Any],
    examples: Mapping[str, Sequence[Sequence[Example]]],
    origin: Origin,
) -> None:
    """Writes the page, with links to the pages of the runs, whose folders lie beside it.

    Args:
        examples: for each evaluation, those of each of its rows.
    """
    evaluations = results["evaluations"]
    sections = [
        _section(study.evaluations[name], found, examples[name])
        for name, found in evaluations.items()
    ]
    write_report(
        path,
        Report(
            title=study.title,
            subtitle=study.about,
            facts=[_fact(aim, evaluations) for aim in study.aims if aim.evaluation in evaluations],
            sections=[
                *sections,
                *_runs(study, path.parent),
                *_losses(results["validation"]),
                *_times(results["seconds"]),
                origin.section(),
            ],
            footer="All figures and settings are in results.json; the same command makes only what is missing.",
        ),
    )


def _fact(aim: Aim, evaluations: Mapping[str, Any]) -> Fact:
    row = next((row for row in evaluations[aim.evaluation] if row["row"] == aim.row), None)
    found = row["metrics"].get(aim.metric) if row else None
    if found is None:
        return Fact(aim.label, "–", f"no figure {aim.metric} of {aim.row}")
    value, notes, status = found["value"], [_spread(found), _interval(found)], "plain"
    met = True
    for text, bound, holds in (
        ("at least", aim.at_least, aim.at_least is None or value >= aim.at_least),
        ("at most", aim.at_most, aim.at_most is None or value <= aim.at_most),
    ):
        if bound is not None:
            notes.append(f"aim {text} {_number(bound)}")
            met, status = met and holds, "good"
    kind: Status = "plain" if status == "plain" else "good" if met else "bad"
    for level in ("ceiling", "chance"):
        if row and level in row:
            notes.append(f"{level} {_number(row[level][aim.metric]['value'])}")
    return Fact(aim.label, _number(value), "; ".join(note for note in notes if note), kind)


def _section(
    evaluation: StudyEvaluation,
    rows: Sequence[Mapping[str, Any]],
    examples: Sequence[Sequence[Example]],
) -> Section:
    metrics = list(rows[0]["metrics"])
    table = [
        [row["row"], *(_cell(row["metrics"].get(metric)) for metric in metrics), row["items"]]
        for row in rows
    ]
    columns = ["", *metrics, "items"]
    for level in ("ceiling", "chance"):
        if level in rows[0]:
            table.append(
                [
                    level,
                    *(_cell(rows[0][level].get(metric)) for metric in metrics),
                    rows[0]["items"],
                ]
            )
    if "truncated" in rows[0]:
        columns.append("truncated")
        for line, row in zip(table, rows, strict=False):
            line.append(_cell(row["truncated"]))
        for line in table[len(rows) :]:
            line.append("")
    if any("all_documents" in row for row in rows):
        columns.append("all documents")
        table = [
            [*line, _cell(row.get("all_documents"))] for line, row in zip(table, rows, strict=False)
        ] + [[*line, ""] for line in table[len(rows) :]]
    if "training_flops" in rows[0]:
        columns.append("FLOPs of training")
        table = [
            [*line, f"{row['training_flops']:.2e}"] for line, row in zip(table, rows, strict=False)
        ] + [[*line, ""] for line in table[len(rows) :]]
    one: Mapping[str, Any] = next(iter(rows[0]["metrics"].values()), {})
    notes = [SEEDS.format(count=len(one["runs"]["values"])) if "runs" in one else NOTE]
    if "truncated" in columns:
        lengths = list(dict.fromkeys(row["max_tokens"] for row in rows))
        notes.append(TRUNCATED.format(lengths=" or ".join(map(str, lengths))))
    if "all documents" in columns:
        notes.append(ALL_DOCUMENTS)
    if "ceiling" in rows[0]:
        notes.append(CEILING)
    blocks: list[Content] = [Table(columns, table, " ".join(notes))]
    if evaluation.plot:
        blocks.insert(0, _curves(evaluation, evaluation.plot, rows))
    for number, (row, few) in enumerate(zip(rows, examples, strict=True)):
        answered = Gallery([_card(example) for example in few], caption=row["row"])
        several = [example for example in few if len(example.samples) > 1]
        drawn = [_samples(row["row"], several)] if several else []
        if number < _PICTURED:
            blocks += [answered, *drawn]
        else:
            blocks.append(Folded(f"Answers of {row['row']}", [answered, *drawn]))
    return Section(evaluation.title, blocks=blocks)


_PICTURED = 4
"""Rows of an evaluation whose answers are seen at once; those of the others are behind their names."""


def _samples(row: str, examples: Sequence[Example]) -> Folded:
    """Every image that was drawn for some items, folded."""
    count = max(len(example.samples) for example in examples)
    cards = [
        Card(
            [
                Picture(np.asarray(sample.image_HWC), f"CLIP {sample.clip:.3f}")
                for sample in example.samples
            ],
            caption=example.text,
        )
        for example in examples
    ]
    caption = "The first one is the answer that counts."
    return Folded(
        f"All {count} samples of {row}, the best by CLIP first", [Gallery(cards, caption=caption)]
    )


def _runs(study: Study, folder: Path) -> list[Section]:
    """The runs with their experiments, what was changed in these, and links to their pages."""
    if not study.runs:
        return []
    rows: list[dict[str, Cell]] = [
        {
            "run": name,
            "experiment": run.experiment,
            "changed in it": ", ".join(
                f"{key} {shown(value)}" for key, value in run.overrides.items()
            ),
            "page": page_of(name, folder),
        }
        for name, run in study.runs.items()
    ]
    return [Section("Runs", blocks=[Table.of(rows)])]


def _curves(evaluation: StudyEvaluation, metric: str, rows: Sequence[Mapping[str, Any]]) -> Curves:
    """The metric against the first swept key, a line for each model and combination of the other keys; or against
    the FLOPs of training, a line for each model and combination of all keys but the checkpoint's."""
    by_compute = evaluation.against == "compute"
    others = (
        [key for key in evaluation.sweep if key != "checkpoint"]
        if by_compute
        else list(evaluation.sweep)[1:]
    )
    key = "" if by_compute else next(iter(evaluation.sweep))
    most = max(row["training_flops"] for row in rows) if by_compute else 1.0
    power = 3 * (math.floor(math.log10(most)) // 3)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = ", ".join(
            [
                row["model"],
                *(f"{other.split('.')[-1]} {shown(row['point'][other])}" for other in others),
            ]
        )
        lines.setdefault(name, []).append(row)
    series = [
        Series(
            name,
            [
                row["training_flops"] / 10**power if by_compute else float(row["point"][key])
                for row in of
            ],
            *([row["metrics"][metric][part] for row in of] for part in ("value", "low", "high")),
        )
        for name, of in lines.items()
    ]
    label = f"FLOPs of training, in units of 10^{power}" if by_compute else key.split(".")[-1]
    log_x = is_logarithmic(key, [x for of in series for x in of.x])
    return Curves(series, x_label=label, y_label=metric, log_x=log_x)


def _card(example: Example) -> Card:
    images = [image for image in (example.given_HWC, example.answer.image_HWC) if image is not None]
    status: Literal["good", "bad"] | None = None
    if example.right is not None:
        status = "good" if example.right else "bad"
    # A retrieved document of text alone has no picture to stand under.
    texts = [f"retrieved: {each.text}" for each in example.retrieved if each.image is None]
    cut = "truncated" if example.answer.truncated else ""
    return Card(
        [Picture(np.asarray(image)) for image in images],
        title=example.answer.text,
        caption="; ".join(filter(None, [example.text, cut, *texts])),
        retrieved=[
            Picture(np.asarray(each.image), each.text)
            for each in example.retrieved
            if each.image is not None
        ],
        status=status,
    )


def _losses(validation: Mapping[str, Mapping[str, float]]) -> list[Section]:
    """What the runs that trained came to, the lowest loss marked."""
    trained = {name: losses for name, losses in validation.items() if losses}
    if not trained:
        return []
    best = min(range(len(trained)), key=lambda row: list(trained.values())[row]["loss"])
    rows: list[dict[str, Cell]] = [{"run": name, **losses} for name, losses in trained.items()]
    note = "In nats a token, without retrieved documents; runs of other documents or objectives do not compare."
    table = Table.of(rows, note, {best} if len(rows) > 1 else ())
    return [Section("Validation losses", blocks=[table])]


def _times(seconds: Mapping[str, Mapping[str, float]]) -> list[Section]:
    if not seconds:
        return []
    rows: list[dict[str, Cell]] = [
        {
            "run": name,
            "stages, in seconds": " ".join(f"{stage} {spent:.0f}" for stage, spent in of.items()),
            "seconds": round(sum(of.values())),
        }
        for name, of in seconds.items()
    ]
    total = sum(sum(of.values()) for of in seconds.values())
    text = f"All runs together took {total / 60:.1f} minutes."
    return [Section("Time", text, [Table.of(rows)])]


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    parts = [_number(found["value"]), _spread(found), _interval(found)]
    return " ".join(filter(None, parts))


def _spread(found: Mapping[str, Any]) -> str:
    """How a figure varies over the seeds, `± 0.012 (0.880 to 0.940)`; empty for a single seed."""
    if "runs" not in found:
        return ""
    runs = found["runs"]
    return f"± {_number(runs['deviation'])} ({_number(runs['low'])} to {_number(runs['high'])})"


def _interval(found: Mapping[str, Any]) -> str:
    return (
        f"[{_number(found['low'])}, {_number(found['high'])}]"
        if found["low"] < found["high"]
        else ""
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
