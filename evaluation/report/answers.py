"""What a page shows of an evaluation: its figures as a table and a plot, and some answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from cm3leon.config import choices
from cm3leon.evaluation.config import Aim, EvaluationConfig, shown
from cm3leon.evaluation.origin import is_logarithmic
from cm3leon.evaluation.protocols.base import RIGHT_IN_ANY, Answer
from cm3leon.evaluation.report import (
    Card,
    Cell,
    Content,
    Curves,
    Fact,
    Folded,
    Gallery,
    Picture,
    Section,
    Series,
    Status,
    Table,
    numbers,
)
from cm3leon.registry import PROTOCOLS

NOTE = "In brackets the interval of 95 %."
SEEDS = (
    "Each figure is the mean over {count} seeds, ± the standard deviation between their runs; in "
    "round brackets the interval of 95 % of that mean (Student's t over the runs, within 0 to 1 for "
    "a share), in square "
    "brackets that over the items of one run."
)
FIRST_SEED = "Answers that are shown are of the first seed."
ALL_DOCUMENTS = (
    "All documents: the share of the prompts that had as many retrieved documents as were asked "
    "for."
)
TRUNCATED = (
    "Truncated: the share of answers that were cut at their longest, {lengths} tokens, before they "
    "ended."
)
IN_ANY = (
    "Right in any: the share of items of which at least one of the samples is right, which is what "
    "a perfect choice between them would reach."
)
CEILING = (
    "Ceiling: the true images after the image tokenizer, measured as answers are. Chance: the true "
    "answers to other items."
)


class Retrieved(Protocol):
    """A document that stood in a prompt."""

    @property
    def text(self) -> str: ...
    @property
    def image(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class AnsweredItem:
    """An item with its answer, as a report shows it."""

    text: str
    given_HWC: np.ndarray | None
    answer: Answer
    right: bool | None
    samples: Sequence[Answer] = ()
    """All images that were drawn, the best by CLIP first; () for answers in text."""
    retrieved: Sequence[Retrieved] = ()
    """The documents in the prompt, the closest last."""
    original_HWC: np.ndarray | None = None
    """The true image, if the answer is to be compared with it."""


def aim_fact(aim: Aim, evaluations: Mapping[str, Any]) -> Fact:
    """The figure of an aim as a fact, with its interval and whether it reaches the aim."""
    row = next((row for row in evaluations[aim.evaluation] if row["row"] == aim.row), None)
    if row is None:
        return Fact(aim.label, numbers.DASH, f"{aim.evaluation} has no row {aim.row}")
    found = row["metrics"].get(aim.metric)
    if found is None:
        known = choices(aim.metric, row["metrics"])
        return Fact(aim.label, numbers.DASH, f"{aim.row} has no figure {aim.metric}; {known}")

    # The note: the figure's spread and interval, what it should be, and what it could be.
    notes, bounds = [_spread(found), _interval(found)], []
    if aim.at_least is not None:
        bounds.append(f"at least {numbers.metric(aim.at_least)}")
    if aim.at_most is not None:
        bounds.append(f"at most {numbers.metric(aim.at_most)}")
    status = aim_status(aim, found)
    if bounds:
        notes.append(f"aim {' and '.join(bounds)}: {AIMED[status]}")
    for level in ("ceiling", "chance"):
        if aim.metric in row.get(level, {}):
            notes.append(f"{level} {numbers.metric(row[level][aim.metric]['value'])}")
    return Fact(aim.label, numbers.metric(found["value"]), "; ".join(filter(None, notes)), status)


AIMED: dict[Status, str] = {
    "good": "met",
    "plain": "missed, but within the interval",
    "bad": "missed",
}


def aim_status(aim: Aim, found: Mapping[str, Any]) -> Status:
    """Whether a figure reaches an aim ("good"), or its interval reaches it ("plain")."""
    lowest, highest = -math.inf, math.inf
    if aim.at_least is not None:
        lowest = aim.at_least
    if aim.at_most is not None:
        highest = aim.at_most

    if lowest == -math.inf and highest == math.inf:
        return "plain"
    if lowest <= found["value"] <= highest:
        return "good"
    if found["high"] >= lowest and found["low"] <= highest:
        return "plain"
    return "bad"


def evaluation_section(
    evaluation: EvaluationConfig,
    rows: Sequence[Mapping[str, Any]],
    examples: Sequence[Sequence[AnsweredItem]],
    *,
    text: str = "",
    best: Collection[int] = (),
    by_compute: bool = False,
) -> Section:
    """The section of an evaluation.

    Args:
        examples: for each row, the answered items to show; a row may have none.
        text: stands below the heading.
        best: indices of rows to mark.
        by_compute: whether the plot is against the FLOPs of training, not the first swept key.
    """
    blocks: list[Content] = [_table(evaluation, rows, best, pictured=any(examples))]
    if evaluation.plot and _can_be_drawn(evaluation.plot, rows, by_compute):
        blocks.insert(0, _curves(evaluation.plot, rows, by_compute))

    for number, (row, few) in enumerate(zip(rows, examples, strict=True)):
        if not few:
            continue
        cards, several = [], []
        for example in few:
            cards.append(_card(example))
            if len(example.samples) > 1:
                several.append(example)
        answers: list[Content] = [Gallery(cards, caption=row["row"])]
        if several:
            answers.append(_samples(row["row"], several))

        # A sweep may have dozens of rows, of which only the first ones are shown unasked.
        if number < _PICTURED:
            blocks += answers
        else:
            blocks.append(Folded(f"Answers of {row['row']}", answers))
    return Section(evaluation.title, text, blocks)


def _table(
    evaluation: EvaluationConfig,
    rows: Sequence[Mapping[str, Any]],
    best: Collection[int],
    *,
    pictured: bool,
) -> Table:
    """A line for each row, then for ceiling and chance, with notes below."""
    # All figures of all rows in the order of their first appearance: a row may lack some.
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(row["metrics"])
    metrics = list(found)
    levels = [level for level in ("ceiling", "chance") if level in rows[0]]

    lines: list[dict[str, Cell]] = []
    for row in rows:
        line: dict[str, Cell] = {"": row["row"], **_cells(metrics, row["metrics"])}
        line["items"] = row["items"]
        for name in ("truncated", "all_documents"):
            if any(name in other for other in rows):
                line[name.replace("_", " ")] = _cell(row.get(name))
        if "training_flops" in row:
            line["FLOPs of training"] = f"{row['training_flops']:.2e}"
        lines.append(line)

    # In the lines of the levels, what is not a figure of the answers stays empty.
    open_cells: dict[str, Cell] = dict.fromkeys(lines[0], "")
    for level in levels:
        figures = _cells(metrics, rows[0][level])
        lines.append({**open_cells, "": level, **figures, "items": rows[0]["items"]})

    # Every figure was measured over the same seeds, so one of them tells how many there are.
    one: Mapping[str, Any] = next(iter(rows[0]["metrics"].values()), {})
    notes = [NOTE]
    if "runs" in one:
        notes = [SEEDS.format(count=len(one["runs"]["values"]))]
        if pictured:
            notes.append(FIRST_SEED)

    # Only what the table has is explained.
    explained = PROTOCOLS.get(evaluation.protocol.name).explained
    for metric in metrics:
        if metric in explained:
            notes.append(explained[metric])
    if RIGHT_IN_ANY in metrics:
        notes.append(IN_ANY)
    if "truncated" in lines[0]:
        lengths = list(dict.fromkeys(row["max_tokens"] for row in rows))
        notes.append(TRUNCATED.format(lengths=" or ".join(map(str, lengths))))
    if "all documents" in lines[0]:
        notes.append(ALL_DOCUMENTS)
    if levels:
        notes.append(CEILING)
    return Table.of(lines, " ".join(notes), best)


def _cells(metrics: Sequence[str], found: Mapping[str, Any]) -> dict[str, Cell]:
    """The figures of a line by the names of their columns; a missing one leaves its cell empty."""
    return {metric.replace("_", " "): _cell(found.get(metric)) for metric in metrics}


_PICTURED = 4
"""Rows of an evaluation whose answers are visible at once; those of other rows are folded."""


def _samples(row: str, examples: Sequence[AnsweredItem]) -> Folded:
    """Every image that was drawn for some items, folded."""
    count = max(len(example.samples) for example in examples)
    cards = []
    for example in examples:
        images = []
        for sample in example.samples:
            images.append(Picture(np.asarray(sample.image_HWC), f"CLIP {sample.clip:.3f}"))
        cards.append(Card(images, caption=example.text))
    caption = "The first one is the answer that counts."
    return Folded(
        f"All {count} samples of {row}, the best by CLIP first", [Gallery(cards, caption=caption)]
    )


def _can_be_drawn(metric: str, rows: Sequence[Mapping[str, Any]], by_compute: bool) -> bool:
    """Whether every row has the metric, and a number to draw it against."""
    key = next(iter(rows[0]["point"]), "")
    for row in rows:
        value = row["point"].get(key)
        # Python counts True and False as numbers, but they have no place on an axis.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if metric not in row["metrics"] or not (by_compute or is_number):
            return False
    return True


def _curves(metric: str, rows: Sequence[Mapping[str, Any]], by_compute: bool) -> Curves:
    """The metric against the first swept key, with one line for each model and combination of the
    other keys.

    By compute, it is against the FLOPs of training, one line for each model and combination of all
    keys but the checkpoint's.
    """
    swept = list(rows[0]["point"])
    if by_compute:
        # The checkpoints of one training are the points of one line. The axis counts in thousands,
        # millions, billions and so on, whichever keeps its numbers short.
        key, others = "", [each for each in swept if each != "checkpoint"]
        most = max(row["training_flops"] for row in rows)
        power = 3 * (math.floor(math.log10(most)) // 3)
        label = f"FLOPs of training, in units of 10^{power}"
    else:
        key, others, power = swept[0], swept[1:], 0
        label = key.split(".")[-1]

    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        values = [f"{other.split('.')[-1]} {shown(row['point'][other])}" for other in others]
        name = ", ".join(filter(None, [row["model"], *values]))
        lines.setdefault(name, []).append(row)

    def x_of(row: Mapping[str, Any]) -> float:
        if by_compute:
            return row["training_flops"] / 10**power
        return float(row["point"][key])

    series, every_x = [], []
    for name, of_line in lines.items():
        xs, ys, lows, highs = [], [], [], []
        for row in of_line:
            figure = row["metrics"][metric]
            xs.append(x_of(row))
            ys.append(figure["value"])
            lows.append(figure["low"])
            highs.append(figure["high"])
        series.append(Series(name, xs, ys, lows, highs))
        every_x += xs

    # All lines share one axis, so their points decide together whether it is logarithmic.
    log_x = is_logarithmic(key, every_x)
    return Curves(series, x_label=label, y_label=metric, log_x=log_x)


def _card(example: AnsweredItem) -> Card:
    """An item with its answer as a card: images side by side, the text of the answer as title."""
    looked_at = [
        ("given", example.given_HWC),
        ("answer", example.answer.image_HWC),
        ("original", example.original_HWC),
    ]
    pictures = []
    for label, image_HWC in looked_at:
        if image_HWC is not None:
            pictures.append(Picture(image_HWC, label))
    # A single image needs no label.
    if len(pictures) == 1:
        pictures = [replace(pictures[0], label="")]

    status: Literal["good", "bad"] | None = None
    if example.right is not None:
        status = "good" if example.right else "bad"
    # An empty text is an answer too, which a reader should see.
    title = example.answer.text
    if not title and example.answer.image_HWC is None:
        title = "(empty)"

    # Retrieved images stand beside the answer; documents of text alone go into the caption.
    texts, retrieved = [], []
    for each in example.retrieved:
        if each.image is None:
            texts.append(f"retrieved: {each.text}")
        else:
            retrieved.append(Picture(np.asarray(each.image), each.text))
    cut = "truncated" if example.answer.truncated else ""
    caption = "; ".join(filter(None, [example.text, cut, *texts]))
    return Card(pictures, title=title, caption=caption, retrieved=retrieved, status=status)


def _cell(found: Mapping[str, Any] | None) -> str:
    """A figure with its spread and interval, `0.912 [0.880, 0.940]`; "" for a missing one."""
    if found is None:
        return ""
    parts = [numbers.metric(found["value"]), _spread(found), _interval(found)]
    return numbers.unbroken(" ".join(filter(None, parts)))


def _spread(found: Mapping[str, Any]) -> str:
    """How a figure varies over the seeds, `± 0.012 (0.880 to 0.940)`; "" for a single seed."""
    if "runs" not in found:
        return ""
    runs = found["runs"]
    deviation = numbers.metric(runs["deviation"])
    low, high = numbers.metric(runs["low"]), numbers.metric(runs["high"])
    return f"± {deviation} ({low} to {high})"


def _interval(found: Mapping[str, Any]) -> str:
    """The interval of a figure, `[0.880, 0.940]`; "" for an exact one."""
    if found["low"] < found["high"]:
        return numbers.interval(found["low"], found["high"])
    return ""
