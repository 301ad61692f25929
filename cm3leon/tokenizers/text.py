"""Byte-level BPE, digits split one by one (the lineage's choice), trained and run by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cm3leon.config import Annotated, Range
from cm3leon.tokenizers.vocab import SPECIALS
from cm3leon.types import UserError

BYTES = 256


@dataclass(kw_only=True)
class TextTokenizerConfig:
    """Size of the text vocabulary."""

    vocab_size: Annotated[int, Range(ge=BYTES + len(SPECIALS))] = 56_320
    """Text ids, the four special tokens and the 256 bytes included; fewer are used where the corpus has few merges."""
    min_frequency: Annotated[int, Range(ge=1)] = 2
    """A pair of pieces is merged only if the corpus holds it at least this often."""


class TextTokenizer:
    """Text to ids and back, exactly, for any Unicode string; text never becomes a special token.

    The special tokens are the first four *ordinary* entries of the vocabulary: what the library calls special tokens
    would be recognised inside user text. No merge can produce them, because "<" is always a piece of its own.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size

    @classmethod
    def train(cls, config: TextTokenizerConfig, texts: Iterable[str]) -> TextTokenizer:
        """Learn the merges on `texts`. Raises UserError where there is no text at all."""
        texts = [text for text in texts if text]
        if not texts:
            raise UserError("text_tokenizer: the corpus holds no text to train on, at least one caption is needed")
        learner = _pipeline(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size - len(SPECIALS),
            min_frequency=config.min_frequency,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        learner.train_from_iterator(texts, trainer)
        return cls(_with_specials(learner), config.vocab_size)

    @classmethod
    def load(cls, folder: Path, config: TextTokenizerConfig) -> TextTokenizer:
        """Read `tokenizer.json` from `folder`. Raises UserError if it is missing or larger than the config allows."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"text_tokenizer: {path} does not exist, train the tokenizer first")
        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise UserError(
                f"text_tokenizer.vocab_size: {path} has {tokenizer.get_vocab_size()} pieces, "
                f"at most {config.vocab_size} are allowed by the config"
            )
        return cls(tokenizer, config.vocab_size)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, the standard format of the `tokenizers` library."""
        self._tokenizer.save(str(folder / "tokenizer.json"))

    @property
    def pieces(self) -> int:
        """Ids in use, at most `vocab_size`."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, shape (T,), int64, none of them a special token."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special tokens and ids without a piece are left out, broken UTF-8 becomes U+FFFD."""
        kept = [int(i) for i in ids if len(SPECIALS) <= i < self.pieces]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("<", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_specials(learner: Tokenizer) -> Tokenizer:
    """The learned BPE with every id moved up by four, to make room for the special tokens at ids 0 to 3."""
    learned = json.loads(learner.to_str())["model"]
    vocab = {special: number for number, special in enumerate(SPECIALS)}
    vocab |= {piece: number + len(SPECIALS) for piece, number in learned["vocab"].items()}
    return _pipeline(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]]))
