"""Generation: every task under every setting, each setting one file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cm3leon.config import Component
from cm3leon.data.corpus import Split
from cm3leon.decoders.generate import generate, is_truncated
from cm3leon.io import write_json_lines
from cm3leon.models.serving import keep_weights
from cm3leon.registry import DECODERS, TASKS
from cm3leon.retrievers.strategy import NONE
from cm3leon.seeds import nth_seed
from cm3leon.stages.artifacts import Run
from cm3leon.training.device import autocast, uses_bf16
from cm3leon.types import Prompt, TokenDocument


@dataclass(frozen=True)
class Setting:
    """What one file of generations was made with."""

    task: str
    split: Split
    documents: int
    """Retrieved documents in the prompt."""
    shuffled: bool
    """Whether they were retrieved for another prompt."""
    cfg: float | None
    """Guidance weight, None for a task without guidance."""

    @property
    def file(self) -> str:
        """File name of the setting."""
        shuffled = "-shuffled" if self.shuffled else ""
        cfg = "" if self.cfg is None else f"-cfg{self.cfg:g}"
        return f"{self.task}-{self.split}-{self.documents}{shuffled}{cfg}.jsonl"


@dataclass(frozen=True)
class Generation:
    """One output: the document it was asked for (a row of the corpus), the retrieved ones (of the bank), the answer."""

    row: int
    retrieved: list[int]
    caption: str
    codes: list[int]
    truncated: bool = False
    """Whether the answer is a text that was stopped by its length before it ended."""


def make_generations(run: Run, folder: Path) -> None:
    """Generates all settings that have no file yet."""
    if uses_bf16(run.device, run.experiment.training.precision):
        keep_weights(run.model, "bf16")  # what autocast would do again at every token
    for setting in settings(run):
        if not (folder / setting.file).is_file():
            _write(folder / setting.file, setting, _generate(run, setting))


def settings(run: Run) -> list[Setting]:
    """All settings of the experiment: on the held-out split, and guidance weights also on the validation split."""
    config = run.experiment.generation
    retrieval = [(count, False) for count in config.documents]
    if config.shuffled_documents:
        retrieval.append((config.shuffled_documents, True))
    result = []
    for component in run.experiment.tasks:
        weights: Sequence[float | None] = [None]
        task = _build_task(run, component.name)
        if task.guided and hasattr(_decoder(run, component.name, task).config, "cfg"):
            weights = config.cfg
            result += [
                Setting(component.name, "validation", 0, False, weight) for weight in weights
            ]
        result += [
            Setting(component.name, "held_out", count, mixed, weight)
            for count, mixed in retrieval
            for weight in weights
        ]
    return result


def read_generations(folder: Path, setting: Setting) -> list[Generation]:
    """The generations of a setting."""
    lines = (folder / setting.file).read_text().splitlines()[1:]
    return [Generation(**json.loads(line)) for line in lines]


def _write(path: Path, setting: Setting, generations: Iterator[Generation]) -> None:
    """The setting, then a generation a line; the file gets its name when it is whole."""
    lines = itertools.chain([asdict(setting)], map(asdict, generations))
    write_json_lines(path, lines)


def _generate(run: Run, setting: Setting) -> Iterator[Generation]:
    task = _build_task(run, setting.task)
    rows = _rows(
        run, setting, at_least=run.experiment.generation.samples if task.asked_again else 0
    )
    documents = [run.token_documents[row] for row in rows]
    found = retrieved_rows(run, task, rows, documents=setting.documents, shuffled=setting.shuffled)
    retrieved = [
        that_fit(run, task, document, others)
        for document, others in zip(documents, found, strict=True)
    ]
    prompts = [
        _prompt(run, task, document, others)
        for document, others in zip(documents, retrieved, strict=True)
    ]
    decoder = _decoder(run, setting.task, task)
    with (
        tqdm(
            total=len(rows),
            desc=setting.file[:-6],
            unit="sample",
            mininterval=2.0,
            dynamic_ncols=True,
        ) as progress,
        autocast(run.device, run.experiment.training.precision),
    ):
        answers = generate(
            run.model,
            prompts,
            DECODERS.build(_with_cfg(decoder, setting.cfg)),
            vocab=run.vocab,
            seeds=[nth_seed(run.experiment.seed, number) for number in range(len(rows))],
            batch_size=run.experiment.generation.batch_size,
            on_answer=lambda _: progress.update(),
        )
    for number, (row, others) in enumerate(zip(rows, retrieved, strict=True)):
        completed = task.complete(documents[number], answers[number])
        yield Generation(
            row,
            others,
            run.tokenizer.caption(completed),
            run.tokenizer.codes(completed).tolist(),
            is_truncated(prompts[number], answers[number], run.seq_len),
        )


def _prompt(run: Run, task: Any, query: TokenDocument, retrieved: list[int]) -> Prompt:
    return task.prompt(query, [run.bank_document(row) for row in retrieved])


def that_fit(run: Run, task: Any, query: TokenDocument, retrieved: list[int]) -> list[int]:
    """Retrieved documents without those, from the left, that leave too little room for the longest answer."""
    while retrieved:
        prompt = _prompt(run, task, query, retrieved)
        if len(prompt.ids_T) + prompt.length <= run.seq_len:
            break
        retrieved = retrieved[1:]
    return retrieved


def _rows(run: Run, setting: Setting, at_least: int) -> list[int]:
    """The documents of the split, all of them as often as it takes to have `at_least`."""
    rows = run.rows_to_ask(setting.split)
    return rows * max(1, -(-at_least // len(rows)))


def retrieved_rows(
    run: Run, task: Any, rows: Sequence[int], *, documents: int, shuffled: bool = False
) -> list[list[int]]:
    """Rows of the bank to put before the prompt of each document, the most relevant last.

    Args:
        shuffled: whether each gets those of another one.
    """
    if not documents:
        return [[] for _ in rows]
    distinct = sorted(set(rows))
    by_text = task.retrieves_by == "text"
    queries = run.retriever.parts(
        [run.corpus.captions[row] for row in distinct] if by_text else None,
        None if by_text else run.corpus.images_BHWC[distinct],
    )
    rows_QK, _ = run.retriever.retrieve(run.bank, queries, task.retrieves_by, count=documents)
    found = [[row for row in reversed(rows_K) if row != NONE] for rows_K in rows_QK.tolist()]
    if shuffled:
        found = [
            found[place]
            for place in np.random.default_rng(run.experiment.seed).permutation(len(found))
        ]
    of_row = dict(zip(distinct, found, strict=True))
    return [of_row[row] for row in rows]


def _build_task(run: Run, name: str) -> Any:
    component = next(component for component in run.experiment.tasks if component.name == name)
    return TASKS.build(component, vocab=run.vocab, image_codes=run.image_tokenizer.grid**2)


def _decoder(run: Run, name: str, task: Any) -> Component:
    """How a task's answers are drawn: as is said for it, or for its modality."""
    usual = run.experiment.decoder if task.answers_in == "image" else run.experiment.text_decoder
    return run.experiment.task_decoders.get(name, usual)


def _with_cfg(decoder: Component, cfg: float | None) -> Component:
    return decoder if cfg is None else replace(decoder, config=replace(decoder.config, cfg=cfg))
