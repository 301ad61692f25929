"""What a decoder is: how the next token is chosen from the logits of a prompt's streams."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Decoder:
    """Base of the decoders. Registered in `DECODERS`, built as `cls(config)`.

    `logits` is all that one has to have; the rest says what more it can do, and is overridden by a
    plain attribute (`streams = 2`) or, where it depends on the settings, by a property.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def streams(self) -> int:
        """Streams that it looks at, where a prompt has them: 1 the prompt alone, 2 also the
        unconditional one, 3 also that with a part of the conditions."""
        return 1

    @property
    def looks_back(self) -> bool:
        """Whether `logits` is also given `past`: for each row,
        the columns of the tokens that its answer has so far."""
        return False

    @property
    def beams(self) -> int:
        """Beginnings of an answer that are searched side by side and compared by `score`;
        0 = tokens are drawn."""
        return 0

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None = None) -> Tensor:
        """Logits (B, V) that the next token is drawn from; -inf is never drawn.

        A decoder of three streams takes the logits of the third one as well,
        one that looks back takes `past`.

        Args:
            conditional_BV: the model's float32 logits of the tokens that the grammar allows.
            unconditional_BV: those of the unconditional stream; None without it.
        """
        raise NotImplementedError

    def score(self, log_likelihood: float, length: int) -> float:
        """What finished runs of tokens are compared by, in a search."""
        return log_likelihood

    def of(self, number: int) -> Decoder:
        """The decoder of a prompt's sample of that number."""
        return self
