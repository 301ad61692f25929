"""Our text tokenizer behind fairseq2's interface. Ids are those of the common vocabulary of text
and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from fairseq2.data.tokenizers import TokenDecoder, TokenEncoder, Tokenizer, VocabularyInfo
from torch import Tensor

from cm3leon.config import PositiveInt, from_mapping
from cm3leon.tokenizers.layout import SPECIALS
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError

MODES = {
    None: ("<eos>", "<eos>"),
    "prompt": ("<eos>", ""),
    "text_to_image": ("<eos>", "<break>"),
    "as_is": ("", ""),
}
"""What an encoder puts before and after the text, by its mode."""


@dataclass(kw_only=True)
class VocabConfig:
    """Sizes of the ranges of the common vocabulary, as in the tokenizer's run."""

    text_size: PositiveInt = 56_320
    """Text ids, the four special tokens included."""
    image_size: PositiveInt = 8_192
    """Image codes."""
    sentinels: PositiveInt = 512
    """Mask tokens."""


def load_tokenizer(path: Path, config: VocabConfig) -> TextTokenizerAdapter:
    """Load the tokenizer of a folder with `tokenizer.json`.

    Raises:
        UserError: for a file that is missing or damaged, or has more pieces than there are text
            ids.
    """
    config = from_mapping(VocabConfig, vars(config), "tokenizer")
    vocab = Vocab(config.text_size, config.image_size, config.sentinels)
    folder = path.parent if path.is_file() else path
    return TextTokenizerAdapter(
        TextTokenizer.load(folder, TextTokenizerConfig(vocab_size=config.text_size)), vocab
    )


class TextTokenizerAdapter(Tokenizer):
    """Encodes text as it stands in our documents, `<eos> text <eos>`, or a part of that by the
    encoder's mode."""

    def __init__(self, text: TextTokenizer, vocab: Vocab) -> None:
        self.text = text
        self.vocab = vocab

    def create_encoder(
        self,
        *,
        task: str | None = None,
        lang: str | None = None,
        mode: str | None = None,
        device: torch.device | None = None,
        pin_memory: bool = False,
    ) -> TokenEncoder:
        """Create an encoder. Mode None is a document of one text, `prompt` its beginning,
        `text_to_image` the beginning of a document whose image follows, and `as_is` the text alone.

        Raises:
            UserError: for another mode, and for any task or language.
        """
        if mode not in MODES or task or lang:
            raise UserError(
                f"the tokenizer cm3leon has the modes {', '.join(filter(None, MODES))}, no tasks "
                f"and no languages; asked for were mode={mode}, task={task}, lang={lang}"
            )
        return _Encoder(self.text, *MODES[mode], device=device, pin_memory=pin_memory)

    def create_raw_encoder(
        self, *, device: torch.device | None = None, pin_memory: bool = False
    ) -> TokenEncoder:
        return self.create_encoder(mode="as_is", device=device, pin_memory=pin_memory)

    def create_decoder(self, *, skip_special_tokens: bool = False) -> TokenDecoder:
        """Create a decoder of text. Image codes are left out, and special tokens if asked for."""
        return _Decoder(self.text, skip_special_tokens)

    @property
    def vocab_info(self) -> VocabularyInfo:
        """Sizes and special ids; `<eos>` also opens a sequence, and `size` is the whole
        vocabulary's."""
        vocab = self.vocab
        return VocabularyInfo(
            vocab.size, unk_idx=None, bos_idx=vocab.eos, eos_idx=vocab.eos, pad_idx=vocab.pad
        )


class _Encoder(TokenEncoder):
    """Encodes texts between up to one special token before and one after them."""

    def __init__(
        self,
        text: TextTokenizer,
        before: str,
        after: str,
        *,
        device: torch.device | None,
        pin_memory: bool,
    ) -> None:
        self._text = text
        self._before, self._after = ([name] if name else [] for name in (before, after))
        self._device = device
        self._pin_memory = pin_memory

    def __call__(self, text: str) -> Tensor:
        ids = [
            *self._text.ids(self._before),
            *self._text.encode(text),
            *self._text.ids(self._after),
        ]
        return self._tensor(ids)

    def encode_as_tokens(self, text: str) -> list[str]:
        return [*self._before, *self._text.tokens(self._text.encode(text)), *self._after]

    @property
    def prefix_indices(self) -> Tensor | None:
        if not self._before:
            return None
        return self._tensor(self._text.ids(self._before))

    @property
    def suffix_indices(self) -> Tensor | None:
        if not self._after:
            return None
        return self._tensor(self._text.ids(self._after))

    def _tensor(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        return torch.tensor(
            ids, dtype=torch.int64, device=self._device, pin_memory=self._pin_memory
        )


class _Decoder(TokenDecoder):
    """Decodes ids to text, special tokens by their names unless they are left out."""

    def __init__(self, text: TextTokenizer, skip_special_tokens: bool) -> None:
        self._text = text
        self._skip = skip_special_tokens

    def __call__(self, token_indices: Tensor) -> str:
        ids = token_indices.tolist()
        if self._skip:
            return self._text.decode(ids)

        # Special tokens stand as they are between runs of text.
        special = range(len(SPECIALS))
        parts: list[str] = []
        for is_special, run in groupby(ids, key=special.__contains__):
            if is_special:
                parts.extend(SPECIALS[id_] for id_ in run)
            else:
                parts.append(self._text.decode(list(run)))
        return "".join(parts)

    def decode_from_tokens(self, tokens: Sequence[str]) -> str:
        return self(torch.from_numpy(self._text.ids(tokens)))
