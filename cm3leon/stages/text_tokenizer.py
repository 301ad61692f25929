"""The stage that makes the text tokenizer."""

from __future__ import annotations

from pathlib import Path

from cm3leon.stages.artifacts import TEXT_TOKENIZER, Run
from cm3leon.tokenizers.text import TextTokenizer


def make_text_tokenizer(run: Run, folder: Path) -> None:
    """Learns the merges on the training captions, or takes over another run's tokenizer."""
    config = run.experiment.text_tokenizer
    if run.borrowed is not None:
        TextTokenizer.load(run.borrowed_file(TEXT_TOKENIZER).parent, config).save(folder)
        return
    TextTokenizer.train(config, [run.corpus.captions[row] for row in run.corpus.rows("train")]).save(folder)
