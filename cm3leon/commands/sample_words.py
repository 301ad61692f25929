"""The facts about a training sample, and the sample as lines for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import numpy as np

from cm3leon.evaluation.report.sample import (
    Names,
    ShownPiece,
    ShownSample,
    runs,
    visible,
)
from cm3leon.objectives.cm3 import Span
from cm3leon.retrievers.strategy import NONE
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.training_data import TrainingSamples
from cm3leon.tokenizers.layout import SPECIALS

LONG_TEXT = 600
"""Characters of a text that are printed; longer ones are shortened, the page has them whole."""

SPECIAL_LOOK = re.compile(rf"{'|'.join(SPECIALS)}|<mask:\d+>")
"""What looks like a special token; in a text it is printed with a backslash before it."""


def facts_of(
    run: RunFolder, samples: TrainingSamples, position: int, shown: ShownSample
) -> list[tuple[str, str]]:
    """The facts about a sample, each with its name, in the order in which they are shown."""
    source, row = samples.at(position)
    corpus = samples.corpora[source]
    mixed_in = f", mixed in from {corpus.folder}" if source else ""
    *retrieved, query = shown.documents
    facts = [
        ("run", str(run.folder)),
        ("place", f"position {position:,} of the stream, of which an epoch has {samples.epoch:,}"),
        ("query", visible(query.id) + mixed_in),
    ]

    # The retrieved documents, first those in the sample, then those without room in it.
    drawn = len(retrieved) + len(shown.left_out)
    facts.append(("retrieved", _retrieved(corpus.neighbours_VK(row), drawn)))
    for document in retrieved:
        facts.append((document.role, f"{visible(document.id)}, {document.note}"))
    for left_out in shown.left_out:
        facts.append(("left out", f"{visible(left_out)}, as it does not fit the block"))

    trained = sum(len(piece.ids_T) for piece in shown.pieces)
    tokens = f"{len(shown.laid_out.ids_T):,} as laid out, {trained:,} as trained on"
    facts.append(("tokens", tokens))
    facts += _spans(run, shown)
    facts.append(("loss", _loss(shown)))
    for piece in shown.pieces:
        facts.append(("block", _block(run, piece)))
    return facts


def _spans(run: RunFolder, shown: ShownSample) -> list[tuple[str, str]]:
    """The moved spans with their names; without any, why there are none."""
    if shown.spans:
        return [(name, _span(shown, span)) for name, span in shown.spans]
    if all(piece.spans is not None for piece in shown.pieces):
        return [("spans", "none drawn")]
    objective = run.experiment.objective.name
    return [("spans", f"unknown, {objective} does not change samples by moving spans")]


def _retrieved(rows_VK: np.ndarray, drawn: int) -> str:
    """How many documents were drawn, and how many there were to draw from."""
    counts = sorted({len(set(rows_K.tolist()) - {NONE}) for rows_K in rows_VK})
    found = " to ".join(str(number) for number in dict.fromkeys((counts[0], counts[-1])))
    return f"{drawn or 'none'} drawn; the variants of query dropout found {found}"


def _span(shown: ShownSample, span: Span) -> str:
    """Where a span lies, and its text.

    For example: 3 of 5 pieces of the text of the query, tokens 12 to 14: 'a red dog'.
    """
    start, end = span
    segment = next(s for s in shown.laid_out.segments if s.start <= start < s.end)
    unit = "codes" if segment.modality == "image" else "pieces"
    share = f"{end - start:,} of {segment.end - segment.start:,} {unit}"
    if (start, end) == (segment.start, segment.end):
        share = f"all {end - start:,} {unit}"

    role = shown.document_at(start)
    document = "the query" if role == "query" else role
    where = f"{share} of the {segment.modality} of {document}, {_tokens(start, end)}"
    if segment.modality == "image":
        return where
    return f"{where}: {_shortened(shown.names.run(shown.laid_out.ids_T[start:end]))!r}"


def _tokens(start: int, end: int) -> str:
    if end - start == 1:
        return f"token {start:,}"
    return f"tokens {start:,} to {end - 1:,}"


def _loss(shown: ShownSample) -> str:
    """How many tokens have a loss, and with which weights."""
    loss_T = np.concatenate([piece.loss_T for piece in shown.pieces])
    weights, counts = np.unique(loss_T[loss_T > 0], return_counts=True)
    text = f"on {np.count_nonzero(loss_T):,} of {len(loss_T):,} tokens"
    if not len(weights):
        return text
    shares = []
    for weight, number in zip(weights.tolist(), counts.tolist(), strict=True):
        shares.append(f"{number:,} with weight {weight:g}")
    return f"{text}, {' and '.join(shares)}"


def _block(run: RunFolder, piece: ShownPiece) -> str:
    """Where a piece was trained on: step, row of the batch, positions in the block."""
    packing = run.experiment.packing
    positions = "run on through the block" if packing.run_on else "restart in each sample"
    others = len(piece.samples) - 1
    beside = "1 other sample" if others == 1 else f"{others} other samples"
    return (
        f"step {piece.step:,}, row {piece.lane} of {run.experiment.training.batch_size}, "
        f"positions {piece.first:,} to {piece.first + len(piece.ids_T) - 1:,} of {run.seq_len:,}, "
        f"beside {beside} (packing {packing.method}, position ids {positions})"
    )


def printed(shown: ShownSample, facts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """The sample as lines for a terminal: its facts, the sequence as laid out, as trained on."""
    wide = 2 + max(len(key) for key, _ in facts)
    lines = [shown.title]
    for key, value in facts:
        lines += _wrapped(value, width, f"  {key:<{wide}}", " " * (wide + 2))

    lines += ["", "laid out", *_wrapped(_sequence(shown.names, shown.laid_out.ids_T), width)]
    for number, piece in enumerate(shown.pieces, 1):
        part = f", piece {number} of {len(shown.pieces)}" if len(shown.pieces) > 1 else ""
        lines += ["", f"trained on{part} (no loss on what is in parentheses)"]
        words = _sequence(shown.names, piece.ids_T, piece.loss_T > 0)
        lines += _wrapped(words, width)
    return lines


def _wrapped(text: str, width: int, first: str = "  ", others: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def _sequence(names: Names, ids_T: np.ndarray, has_loss_T: np.ndarray | None = None) -> str:
    """Ids as the paper's figures write them, in parentheses where they have no loss:

    `<eos> (a red dog) <break> [image 1024 codes: 17 993 4 ... 12 8] <eos>`
    """
    if has_loss_T is None:
        has_loss_T = np.ones(len(ids_T), bool)
    words = []
    for start, end in runs(ids_T, names, has_loss_T):
        word = names.run(ids_T[start:end])
        match names.kind(int(ids_T[start])):
            case "image":
                word = f"[image {end - start} {'code' if end - start == 1 else 'codes'}: {word}]"
            case "text":
                word = SPECIAL_LOOK.sub(r"\\\g<0>", _shortened(word)).strip()
        words.append(word if has_loss_T[start] else f"({word})")
    return " ".join(words)


def _shortened(text: str) -> str:
    if len(text) <= LONG_TEXT:
        return text
    return f"{text[: LONG_TEXT // 2]} ... {text[-LONG_TEXT // 2 :]}"
