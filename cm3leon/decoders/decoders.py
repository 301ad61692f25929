"""The registered ways to choose the next token, composed of guidance and processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cm3leon.config import NonNegativeFloat, NoSettings, PositiveFloat, PositiveInt, Probability
from cm3leon.decoders.guidance import classifier_free, contrastive_k
from cm3leon.decoders.processors import keep_top_p
from cm3leon.registry import DECODERS


class Decoder(Protocol):
    """How the next token is chosen. Registered in `DECODERS`, built as `cls(config)`."""

    @property
    def guided(self) -> bool:
        """Whether it wants the unconditional stream, where a prompt has one."""

    def __init__(self, config: Any) -> None: ...

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None) -> Tensor:
        """Logits (B, V) that the next token is drawn from; -inf is never drawn.

        Args:
            conditional_BV: the model's float32 logits of the tokens that the grammar allows.
            unconditional_BV: those of the unconditional stream; None without it.
        """


@DECODERS.register("top_p")
class TopP:
    """Temperature and top-p sampling with classifier-free guidance."""

    @dataclass(kw_only=True)
    class Config:
        """The usual settings of text to image."""

        cfg: NonNegativeFloat = 3.0
        """Weight of classifier-free guidance; 1 is none."""
        temperature: PositiveFloat = 1.0
        """Divides the guided logits."""
        top_p: Probability = 0.9
        """Probability kept, of the most likely tokens; 1 keeps all."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def guided(self) -> bool:
        return self.config.cfg != 1

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None) -> Tensor:
        logits_BV = conditional_BV
        if unconditional_BV is not None:
            logits_BV = classifier_free(conditional_BV, unconditional_BV, self.config.cfg)
        return keep_top_p(logits_BV / self.config.temperature, self.config.top_p)


@DECODERS.register("cd_k")
class ContrastiveK:
    """Contrastive decoding with the k-th largest probability as its threshold (CD-K, paper section 3.2)."""

    guided = True

    @dataclass(kw_only=True)
    class Config:
        """Defaults are this project's reading; the paper does not state them."""

        alpha: Probability = 0.1
        """A token stays if its probability is at least this share of the k-th largest."""
        k: PositiveInt = 32
        """Which of the largest probabilities sets the threshold; 1 is plain contrastive decoding."""
        temperature: PositiveFloat = 1.0
        """Divides the contrastive scores."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None) -> Tensor:
        if unconditional_BV is None:
            return conditional_BV / self.config.temperature
        scores_BV = contrastive_k(conditional_BV, unconditional_BV, alpha=self.config.alpha, k=self.config.k)
        return scores_BV / self.config.temperature


@DECODERS.register("greedy")
class Greedy:
    """The most likely token."""

    guided = False

    Config = NoSettings

    def __init__(self, config: NoSettings) -> None:
        self.config = config

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None) -> Tensor:
        best_B1 = conditional_BV.argmax(-1, keepdim=True)
        return conditional_BV.new_full(conditional_BV.shape, float("-inf")).scatter(-1, best_B1, 0.0)
