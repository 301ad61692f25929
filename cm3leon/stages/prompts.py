"""The retrieved documents before a prompt: found in a run's memory bank, and as many as there is room for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
        texts: of the queries, if they are known; those of the modality `by` have to be.
        images_BHWC: uint8, in the size of the image tokenizer.
        by: the modality that is searched with.
    """
    searched: Sequence[str] | np.ndarray | None = texts if by == "text" else images_BHWC
    assert searched is not None
    if not count or not len(searched):
        return [[] for _ in searched]
    queries = run.retriever.parts(texts, images_BHWC)
    # Every document takes at least a position: no more of them have room.
    rows_QK, _ = run.retriever.retrieve(run.bank, queries, by, count=min(count, run.seq_len))
    return [[row for row in reversed(rows_K) if row != NONE] for rows_K in rows_QK.tolist()]


def fitting_prompt(
    run: RunFolder, task: Task, document: TokenDocument, rows: list[int]
) -> tuple[Prompt, list[int]]:
    """The prompt with as many of the retrieved documents, the closest ones, as leave room for the longest answer.

    Where there is none without any, a page loses segments from its beginning.

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
