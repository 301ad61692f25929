"""The retrieved documents before a prompt: found in a run's memory bank,
as many as there is room for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.strategy import NONE
from cm3leon.stages.run_folder import RunFolder
from cm3leon.tasks.base import Task
from cm3leon.types import Modality, Prompt, TokenDocument


def retrieved_rows(
    run: RunFolder,
    texts: Sequence[str] | None,
    images_BHWC: np.ndarray | None,
    by: Modality,
    count: int,
) -> list[list[int]]:
    """Rows of the bank for each query, the closest last.

    Args:
        texts: of the queries, if they are known; required if `by` is text.
        images_BHWC: uint8, in the size of the image tokenizer; required if `by` is image.
        by: the modality to search with.
    """
    searched: Sequence[str] | np.ndarray | None = texts if by == "text" else images_BHWC
    assert searched is not None
    if not count or not len(searched):
        return [[] for _ in searched]
    queries = run.retriever.parts(texts, images_BHWC)
    # Every document takes at least one position, so more of them cannot fit.
    rows_QK, _ = run.retriever.retrieve(run.bank, queries, by, count=min(count, run.seq_len))

    found = []
    for rows_K in rows_QK.tolist():
        found.append([row for row in reversed(rows_K) if row != NONE])
    return found


def found_rows(
    run: RunFolder, text: str | None, pixels_HWC: np.ndarray | None, count: int
) -> list[tuple[int, float]]:
    """Rows of the bank and their scores, the best first:
    inner products with the mean of text and image.

    Args:
        pixels_HWC: uint8, in the size of the image tokenizer; either it or the text may be None.
    """
    texts = None if text is None else [text]
    images_BHWC = None if pixels_HWC is None else pixels_HWC[None]
    query = run.retriever.parts(texts, images_BHWC)
    rows_K = [row for row in run.bank.search(query.mean(), count)[0].tolist() if row != NONE]
    return list(zip(rows_K, _scores(run, query, rows_K), strict=True))


def text_scores(run: RunFolder, text: str, rows: list[int]) -> list[float]:
    """Inner products of rows of the bank with a text."""
    return _scores(run, run.retriever.parts([text], None), rows)


def _scores(run: RunFolder, query: Parts, rows: list[int]) -> list[float]:
    if not rows:
        return []
    scores_K = run.bank.parts_of(np.array([rows])).mean()[0] @ query.mean()[0]
    return [float(score) for score in scores_K]


def fitting_prompt(
    run: RunFolder, task: Task, document: TokenDocument, rows: list[int]
) -> tuple[Prompt, list[int]]:
    """The prompt with as many of the closest retrieved documents
    as leave room for the longest answer.

    If it is too long without documents, a page loses segments from its beginning.

    Args:
        rows: of the bank, the closest last.
    """
    while True:
        prompt = task.prompt(document, [run.bank_document(row) for row in rows])
        if len(prompt.ids_T) + prompt.length <= run.seq_len:
            return prompt, rows
        shorter = None if rows else task.shortened(document)
        if not rows and shorter is None:
            return prompt, rows
        rows, document = rows[1:], shorter or document
