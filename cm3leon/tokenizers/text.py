"""Byte-level BPE over the words of a pattern, trained and run by the `tokenizers` library."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from cm3leon.config import PositiveInt, Range
from cm3leon.io import read_json, write_json
from cm3leon.permissions import check_readable
from cm3leon.tokenizers.layout import SPECIALS, LayoutTable
from cm3leon.tokenizers.patterns import Pattern, expression, learned_from
from cm3leon.types import UserError

BYTES = 256
FILE = "tokenizer.json"
LAYOUT = "layout.json"
"""File beside it for special tokens and layouts of sequences that are not the paper's."""
PUBLISHED = "published.json"
"""File beside a published tokenizer: the name of its family, and its text before renumbering."""

FILLER = "Ā"
"""The piece of U+0000 in the alphabet of bytes."""

STRETCH = 1 << 16
"""Characters of a stretch, in which documents go to the library for learning.

The library holds a few hundred stretches at a time, so its memory does not depend on the documents.
"""
BATCH = 1 << 20
"""Largest number of characters that the library encodes at once, of one text or of many.

It needs some hundred bytes of memory for each. A pattern may also backtrack once per character
of a word, and after ten million such steps in one word the library ends the process with a panic.
"""


@dataclass(kw_only=True)
class TextTokenizerConfig:
    """Size of the text vocabulary, where its pieces end, and how much text it is learned from."""

    vocab_size: Annotated[int, Range(ge=BYTES + len(SPECIALS))] = 56_320
    """Text ids, including the four special tokens and the 256 bytes. A corpus with few merges
    leaves some of them unused."""
    min_frequency: PositiveInt = 2
    """A pair of pieces is merged only if the sample holds it at least this often."""
    pattern: Pattern = "qwen3_5"
    """How text is cut into words, across which no piece reaches: `words` is this project's own
    pattern, the others are those of published models."""
    max_word: Annotated[int, Range(ge=1, le=1000)] = 64
    """Characters after which words are cut for learning, and so the longest piece (with `words`,
    plus a space)."""
    sample_bytes: PositiveInt | None = 1_000_000_000
    """UTF-8 bytes of text that are read, the same number from each part of the corpus; null = all
    of it."""
    fill_to: PositiveInt | None = None
    """Number of ids that shorter texts are filled up to, by the piece of U+0000; null = texts are
    not filled. The images of a sample then stand at equal distances, and a small model learns
    sooner to look from one to the next (DALL-E's texts were filled up to 256)."""


class TextTokenizer:
    """Text to ids and back, exactly, for any Unicode string; text never becomes a special token.

    The special tokens are the first four *ordinary* entries of the vocabulary, because those that
    the library calls special would be recognised inside user text. No merge can produce them:
    `patterns.py` says why.

    There are two exceptions to "exactly". Where texts are filled up (`fill_to`), a U+0000 at the
    end of a text is lost. And a lone surrogate, which JSON can bring into a Python string although
    no Unicode text may hold it, comes back as U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        specials: Sequence[str] = SPECIALS,
    ) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.specials = tuple(specials)
        self.fills = tokenizer.padding is not None
        """Whether short texts are filled up; `tokenizer.json` keeps it as the library's padding."""

    @classmethod
    def train(cls, config: TextTokenizerConfig, texts: Iterable[str]) -> TextTokenizer:
        """Learn the merges from `texts`.

        They are read once. Only their distinct words stay in memory.

        Raises:
            UserError: if there is no text at all.
        """
        learner = Tokenizer(models.BPE())
        learner.decoder = decoders.ByteLevel()

        # Long words are cut for learning only; the file gets the pattern that other encoders know.
        learner.pre_tokenizer = _cut_at(*learned_from(config.pattern, config.max_word))
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size - len(SPECIALS),
            min_frequency=config.min_frequency,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        with tqdm(
            desc="text", unit="B", unit_scale=True, mininterval=2.0, dynamic_ncols=True
        ) as progress:
            stretches = _stretches(texts, progress)
            first = next(stretches, None)
            if first is None:
                raise UserError(
                    "text_tokenizer: the corpus holds no text to train on; give one with at least "
                    "one caption"
                )
            learner.train_from_iterator(itertools.chain([first], stretches), trainer)

        learner.pre_tokenizer = _cut_at(expression(config.pattern, config.max_word))
        tokenizer = _with_specials(learner)
        if config.fill_to is not None:
            filler = tokenizer.token_to_id(FILLER)
            tokenizer.enable_padding(pad_id=filler, pad_token=FILLER, length=config.fill_to)
        return cls(tokenizer, config.vocab_size)

    @classmethod
    def load(cls, folder: Path, config: TextTokenizerConfig) -> TextTokenizer:
        """Read `tokenizer.json` from `folder`.

        Raises:
            UserError: if it is missing, damaged, larger than the config allows, or a tokenizer that
                does not keep the promises of this class.
        """
        path = folder / FILE
        check_readable(path)
        if not path.is_file():
            raise UserError(f"text_tokenizer: {path} does not exist; train the tokenizer first")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"text_tokenizer: {path} is damaged, or not a tokenizer.json: {error}"
            ) from error

        # Any tokenizer.json may lie there: what this class promises is checked, not believed.
        specials = layout_table(folder).specials
        problem = _problem(tokenizer, specials)
        if problem:
            raise UserError(
                f"text_tokenizer: {path} is not a tokenizer of this project: {problem}; train one "
                "here"
            )
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise UserError(
                f"text_tokenizer.vocab_size: {path} has {tokenizer.get_vocab_size()} pieces, "
                f"at most {config.vocab_size} are allowed by the config"
            )
        return cls(tokenizer, config.vocab_size, specials)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and the file that transformers' `AutoTokenizer` needs beside it.

        The second file names no special tokens on purpose, because transformers would recognise
        them inside user text.
        """
        self._tokenizer.save(str(folder / FILE))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", settings)

    @property
    def pieces(self) -> int:
        """Ids in use, at most `vocab_size`."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Encode a text as ids (T,), int64, none of them a special token.

        A text of more than `BATCH` characters is encoded in parts that end where a word ends, so
        its ids are those of the whole text. Only where no word ends within `BATCH` characters is a
        word cut, and encoded as two.
        """
        encoded = []
        for part in _parts(unicode_text(text)):
            ids = self._tokenizer.encode(part, add_special_tokens=False).ids
            encoded.append(np.asarray(ids, dtype=np.int64))
        return np.concatenate(encoded)

    def encode_all(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Encode many texts on all cores, each as by `encode`."""
        # Texts are cut into parts, and the parts of all texts are encoded in batches.
        counts: list[int] = []

        def all_parts() -> Iterator[str]:
            for text in texts:
                parts = _parts(unicode_text(text))
                counts.append(len(parts))
                yield from parts

        ids: list[np.ndarray] = []
        for batch in _batches(all_parts()):
            encoded = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids += [np.asarray(each.ids, dtype=np.int64) for each in encoded]

        # Put the parts of each text together. Nearly all texts have one, which is not copied.
        following = iter(ids)
        joined: list[np.ndarray] = []
        for count in counts:
            parts = list(itertools.islice(following, count))
            joined.append(parts[0] if count == 1 else np.concatenate(parts))
        return joined

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode ids into a text.

        Special tokens and ids without a piece are left out. Broken UTF-8 becomes U+FFFD.
        """
        kept = [int(i) for i in ids if len(self.specials) <= i < self.pieces]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text.rstrip("\0") if self.fills else text

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the names of ids in `tokenizer.json`; ids without a piece are left out.

        Pieces are spelled in the file's alphabet of bytes, in which a space is Ġ.
        """
        names = []
        for i in ids:
            name = self._tokenizer.id_to_token(int(i))
            if name is not None:
                names.append(name)
        return names

    def ids(self, tokens: Sequence[str]) -> np.ndarray:
        """Invert `tokens`: ids (T,), int64. Raises UserError for an unknown name."""
        ids = [self._tokenizer.token_to_id(token) for token in tokens]
        if None in ids:
            raise UserError(f"{tokens[ids.index(None)]!r} is not a token of this tokenizer")
        return np.asarray(ids, dtype=np.int64)


def layout_table(folder: Path) -> LayoutTable:
    """Read special tokens and layout from beside a text tokenizer; without a file, the paper's."""
    file = folder / LAYOUT
    if not file.is_file():
        return LayoutTable()
    return LayoutTable.from_names(read_json(file), str(file))


def unicode_text(text: str) -> str:
    """Make a text that UTF-8 can hold: surrogate pairs become their character, others U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_WORD_END = re.compile(r".*\S(?= )", re.DOTALL)
"""Everything before the last space that follows another character.

Every pattern ends a word there, whatever follows, because a space is either the first character of
a word or part of a run of white space.
"""


def _parts(text: str) -> list[str]:
    """Cut a text into parts of at most `BATCH` characters, in front of a space if there is one."""
    parts: list[str] = []
    start = 0
    while len(text) - start > BATCH:
        # The space may be the first character of the next part, so one more character is searched.
        word_end = _WORD_END.match(text, start, start + BATCH + 1)
        end = start + BATCH if word_end is None else word_end.end()
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Collect texts, none longer than `BATCH` characters, in lists of at most as many in all."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


# ----------------------------------------------------------------------------- from text to words


def _cut_at(*expressions: str) -> pre_tokenizers.PreTokenizer:
    """Build a step that cuts text by each expression in turn, and spells the words as bytes."""
    splits = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def _stretches(texts: Iterable[str], progress: tqdm[Any]) -> Iterator[str]:
    """Yield the texts one after the other, long ones in stretches, and count their bytes."""
    for text in texts:
        for start in range(0, len(text), STRETCH):
            stretch = unicode_text(text[start : start + STRETCH])
            progress.update(len(stretch.encode()))
            yield stretch
    progress.set_description_str("text read, merging")


# --------------------------------------------------------------------------------- special tokens


def _with_specials(learner: Tokenizer) -> Tokenizer:
    """Move every learned id up by four, to make room for the special tokens at ids 0 to 3."""
    content = json.loads(learner.to_str())
    learned = content["model"]
    vocab = {special: number for number, special in enumerate(SPECIALS)}
    vocab |= {piece: number + len(SPECIALS) for piece, number in learned["vocab"].items()}
    learner.model = models.BPE(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]])
    return learner


_PROBE = "".join(
    map(chr, [*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000)])
) + (" A  b\n\n\t 12 e\u0301 \ufb01 \uff21 \x00 isn't 'a , b . <break><mask:0> ")
"""A text with all bytes that occur in UTF-8, and with everything that normalisers change."""


def _problem(tokenizer: Tokenizer, specials: Sequence[str]) -> str | None:
    """Say which promise of `TextTokenizer` the tokenizer breaks; None if it keeps all."""
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    if [model["vocab"].get(special) for special in specials] != list(range(len(specials))):
        return f"ids 0 to {len(specials) - 1} are not {' '.join(specials)}"
    if sorted(model["vocab"].values()) != list(range(len(model["vocab"]))):
        return "its ids have gaps"
    if content["added_tokens"]:
        return f"it recognises {content['added_tokens'][0]['content']} inside any text as a token"
    merged = {"".join(merge) for merge in model["merges"]}
    if model["ignore_merges"] or not merged.isdisjoint(specials):
        return "its merges can make a special token of text"

    ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != _PROBE:
        return "text does not come back from it exactly, as it does from byte-level pieces"
    return None
