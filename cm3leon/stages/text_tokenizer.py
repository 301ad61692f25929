"""The stage that makes the text tokenizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config import result_settings
from cm3leon.data.source import Skipped, Source
from cm3leon.experiment import Experiment
from cm3leon.io import write_json
from cm3leon.registry import SOURCES
from cm3leon.stages.files import TEXT_TOKENIZER
from cm3leon.stages.inputs import recorded
from cm3leon.stages.lengths import check_lengths
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage
from cm3leon.stages.tokens import split_in
from cm3leon.tokenizers.text import LAYOUT, PUBLISHED, TextTokenizer, unicode_text
from cm3leon.types import Document, UserError

TRAINED_ON = "trained_on.json"


def text_tokenizer_inputs(run: RunFolder) -> Any:
    """What the tokenizer depends on besides the captions: a corpus of its own,
    or the reused file."""
    file = run.reused_digest(TEXT_TOKENIZER)
    inputs = {"text_tokenizer": _settings(run), "file": file, **run.layout_inputs()}
    if run.reused is not None or run.experiment.text_data is None:
        return inputs
    with _as_text_data():
        return {
            **inputs,
            "text_data": result_settings(run.experiment.text_data),
            "text_corpus": _text_source(run).fingerprint(),
            **run.depends_on("split", "seed"),
        }


def _settings(run: RunFolder) -> dict[str, Any]:
    """The settings of what is learned.

    A setting that came later is left out where it changes nothing, so that the tokenizers of
    earlier runs stay up to date: theirs have the pattern `words`, and do not fill texts up.
    """
    settings: dict[str, Any] = run.depends_on("text_tokenizer")["text_tokenizer"]
    if run.reused is not None or settings["pattern"] == "words":
        del settings["pattern"]
    if settings["fill_to"] is None:
        del settings["fill_to"]
    return settings


def make_text_tokenizer(run: RunFolder, folder: Path) -> None:
    """Learn the merges on `text_data` or the training captions, or reuse another run's tokenizer.

    Raises:
        UserError: for a corpus without text.
    """
    config = run.experiment.text_tokenizer
    if run.reused is not None:
        reused = run.reused_file(TEXT_TOKENIZER).parent
        TextTokenizer.load(reused, config).save(folder)
        for name in (LAYOUT, PUBLISHED):
            if (reused / name).is_file():
                shutil.copyfile(run.reused_file(f"text_tokenizer/{name}"), folder / name)
        return

    # The sample is counted while the tokenizer reads it, so its figures are complete afterwards.
    sample = TextSample()
    reads_captions = run.experiment.text_data is None
    texts = _captions(run, sample) if reads_captions else _corpus_texts(run, sample)
    tokenizer = TextTokenizer.train(config, texts)
    check_lengths(run, tokenizer)
    tokenizer.save(folder)

    print(
        f"      {tokenizer.pieces:,} of {config.vocab_size:,} pieces learned from {sample.bytes:,} "
        f"bytes of text in {sample.documents:,} documents ({sample.skipped:,} items skipped)"
    )
    made = {
        "pieces": tokenizer.pieces,
        "vocab_size": config.vocab_size,
        "sample_bytes": config.sample_bytes,
    }
    write_json(folder / TRAINED_ON, {**asdict(sample), **made, **run.settings_of("text_data")})


@dataclass
class TextSample:
    """Counts of what a tokenizer is trained on, updated while it is read."""

    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    first_skipped: str = ""

    def take(self, texts: Iterable[str], limit: int | None) -> Iterator[str]:
        """The texts up to `limit` bytes, the last one cut there; None: all of them."""
        left = limit
        for text in texts:
            whole = unicode_text(text).encode()
            # A character that the cut divides is dropped.
            taken = whole[:left].decode(errors="ignore")
            if taken:
                self.documents += 1
                self.bytes += len(taken.encode())
                yield taken
            if left is not None:
                left -= len(whole)
                if left <= 0:
                    return


def _captions(run: RunFolder, sample: TextSample) -> Iterator[str]:
    """The captions of the training documents; if the sample is smaller,
    from all over the corpus."""
    corpus = run.corpus
    rows = corpus.rows("train")
    # A fixed order, so that the stage does not depend on the seed.
    order = np.random.default_rng(0).permutation(len(rows))
    texts = (corpus.captions[row] for row in rows[order])
    return sample.take(texts, run.experiment.text_tokenizer.sample_bytes)


def _corpus_texts(run: RunFolder, sample: TextSample) -> Iterator[str]:
    """Training documents of `text_data`, from the front of every part, until the sample is full.

    The parts come in an order drawn by the seed, each with an equal share of the remaining bytes:
    what short parts leave goes to those behind them.
    """
    with _as_text_data():
        source = _text_source(run)
        parts = source.parts()

    wanted = run.experiment.text_tokenizer.sample_bytes
    order = np.random.default_rng(run.experiment.seed).permutation(len(parts)).tolist()
    for done, number in enumerate(order):
        share = None if wanted is None else -(-(wanted - sample.bytes) // (len(parts) - done))
        if share == 0:
            return
        yield from sample.take(_training_texts(run, source.read(parts[number]), sample), share)

    if not sample.bytes:
        reason = f", for example {sample.first_skipped}" if sample.skipped else ""
        raise UserError(
            f"text_data: {len(parts)} parts hold no text to train on ({sample.skipped:,} items "
            f"skipped{reason})"
        )


def _training_texts(
    run: RunFolder, items: Iterable[Document | Skipped], sample: TextSample
) -> Iterator[str]:
    for item in items:
        if isinstance(item, Skipped):
            sample.first_skipped = sample.first_skipped or f"{item.file}: {item.reason}"
            sample.skipped += 1
        elif split_in(run, item) == "train":
            yield item.text


def _text_source(run: RunFolder) -> Source:
    assert run.experiment.text_data is not None
    return SOURCES.build(run.experiment.text_data)


@contextmanager
def _as_text_data() -> Iterator[None]:
    """Let messages name the section that is meant: sources call theirs `data`."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^data\b", "text_data", str(error))) from error


STAGE = Stage(
    "text_tokenizer",
    version=3,
    inputs=text_tokenizer_inputs,
    make=make_text_tokenizer,
    needs=("documents",),
    settings=recorded("text_tokenizer", "text_data", "split", "seed", "shards"),
    results=("tokenizer.json", LAYOUT, PUBLISHED),
)


def stage_of(experiment: Experiment) -> Stage[RunFolder]:
    """The stage, which needs no sample if its texts are not the sample's captions."""
    reads_captions = experiment.text_data is None and experiment.shards.tokenizers is None
    return STAGE if reads_captions else replace(STAGE, needs=())
