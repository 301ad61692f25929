"""Base class of the decoders: how the next token is chosen
from the logits of a prompt's streams."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Decoder:
    """Base of the decoders. Registered in `DECODERS`, built as `cls(config)`.

    A decoder must define `logits`. The other attributes say what more it can do; override them with
    a plain attribute (`streams = 2`), or with a property where they depend on the settings.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def streams(self) -> int:
        """Streams that it looks at, if the prompt has them: 1 the prompt, 2 also the unconditional
        prompt, 3 also the prompt with a part of the conditions."""
        return 1

    @property
    def looks_back(self) -> bool:
        """Whether `logits` also takes `past`: for each row,
        the columns of the answer's tokens so far."""
        return False

    @property
    def beams(self) -> int:
        """Beams that are searched side by side and compared by `score`; 0: tokens are drawn."""
        return 0

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None = None) -> Tensor:
        """Logits (B, V) that the next token is drawn from; a token with -inf is never drawn.

        A decoder of three streams also takes the logits of the third stream, one that looks back
        also takes `past`.

        Args:
            conditional_BV: the model's float32 logits of the tokens that the grammar allows.
            unconditional_BV: those of the unconditional stream; None without it.
        """
        raise NotImplementedError

    def score(self, log_likelihood: float, length: int) -> float:
        """Score of a finished beam; the highest wins."""
        return log_likelihood

    def of(self, number: int) -> Decoder:
        """The decoder of the sample with this index."""
        return self
