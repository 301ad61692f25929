"""The registered decoders, composed of guidance (`guidance.py`)
and processors (`processors.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from cm3leon.config import (
    Component,
    Guidance,
    Later,
    NonNegativeInt,
    NoSettings,
    PositiveInt,
    Probability,
    Range,
    Temperature,
)
from cm3leon.decoders.base import Decoder
from cm3leon.decoders.guidance import (
    classifier_free,
    contrastive_k,
    implausible,
    two_conditions,
)
from cm3leon.decoders.processors import forbid_repeats, keep_top_k, keep_top_p, penalize
from cm3leon.registry import DECODERS
from cm3leon.types import UserError


@dataclass(kw_only=True)
class SamplingConfig:
    """How tokens are drawn from the guided logits."""

    temperature: Temperature = 1.0
    """Divides the guided logits."""
    top_p: Probability = 0.9
    """Share of the probability that is kept, from the most likely token on; 1 keeps all tokens."""
    top_k: NonNegativeInt = 0
    """Number of most likely tokens that are kept; 0 keeps all."""
    alpha: Annotated[Probability, Later()] = 0.0
    """A token is kept if its probability without guidance is at least this share of the largest, as
    in contrastive decoding; 0 keeps all. A large weight of guidance needs it where the model is
    nearly certain."""
    repetition_penalty: Annotated[float, Range(ge=0.01, le=100)] = 1.0
    """For text: logits of tokens that the answer already has are divided by it if positive, and
    multiplied by it if negative (CTRL, arXiv 1909.05858); 1 turns it off."""
    no_repeat: NonNegativeInt = 0
    """For text: no run of this many tokens occurs twice in an answer; 0 turns it off."""


class _Sampling(Decoder):
    """Draws from guided logits by temperature, top-k and top-p, with repetition control."""

    config: SamplingConfig

    @property
    def looks_back(self) -> bool:
        return self.config.repetition_penalty != 1 or self.config.no_repeat > 0

    def _drawn_from(
        self, guided_BV: Tensor, conditional_BV: Tensor, past: Sequence[Sequence[int]]
    ) -> Tensor:
        config = self.config
        if config.alpha:
            # A token that may not come again leaves its place to the next ones.
            likely_BV = self._without_repeats(conditional_BV, past)
            unlikely_BV = implausible(likely_BV, alpha=config.alpha)
            guided_BV = guided_BV.masked_fill(unlikely_BV, -torch.inf)
        guided_BV = self._without_repeats(guided_BV, past)
        return keep_top_p(keep_top_k(guided_BV / config.temperature, config.top_k), config.top_p)

    def _without_repeats(self, logits_BV: Tensor, past: Sequence[Sequence[int]]) -> Tensor:
        if not past:
            return logits_BV
        penalized_BV = penalize(logits_BV, past, self.config.repetition_penalty)
        return forbid_repeats(penalized_BV, past, self.config.no_repeat)


@DECODERS.register("top_p")
class TopP(_Sampling):
    """Temperature, top-k and top-p sampling with classifier-free guidance."""

    @dataclass(kw_only=True)
    class Config(SamplingConfig):
        """The usual settings of text to image."""

        cfg: Guidance = 3.0
        """Weight of classifier-free guidance; 1 turns it off."""

    config: Config

    @property
    def streams(self) -> int:
        return 1 if self.config.cfg == 1 else 2

    def logits(
        self,
        conditional_BV: Tensor,
        unconditional_BV: Tensor | None = None,
        *,
        past: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        guided_BV = conditional_BV
        if unconditional_BV is not None:
            guided_BV = classifier_free(conditional_BV, unconditional_BV, self.config.cfg)
        return self._drawn_from(guided_BV, conditional_BV, past)


@DECODERS.register("edit")
class TwoConditions(_Sampling):
    """Sampling with two weights of guidance, for an image and an instruction (InstructPix2Pix,
    paper section 4.2).

    A prompt without a stream of the image alone is guided by the instruction's weight.
    """

    streams = 3

    @dataclass(kw_only=True)
    class Config(SamplingConfig):
        """The paper's weights."""

        image: Guidance = 1.5
        """Weight of the given image."""
        text: Guidance = 7.5
        """Weight of the instruction."""

    config: Config

    def logits(
        self,
        conditional_BV: Tensor,
        unconditional_BV: Tensor | None = None,
        image_BV: Tensor | None = None,
        *,
        past: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        config, guided_BV = self.config, conditional_BV
        if image_BV is not None and unconditional_BV is not None:
            guided_BV = two_conditions(
                conditional_BV, image_BV, unconditional_BV, first=config.image, both=config.text
            )
        elif unconditional_BV is not None:
            guided_BV = classifier_free(conditional_BV, unconditional_BV, config.text)
        return self._drawn_from(guided_BV, conditional_BV, past)


@DECODERS.register("cd_k")
class ContrastiveK(Decoder):
    """Contrastive decoding with the k-th largest probability as threshold (CD-K,
    paper section 3.2)."""

    streams = 2

    @dataclass(kw_only=True)
    class Config:
        """The best settings on the validation split of digits, for 128 codes;
        the paper states none.

        Another codebook needs its own (docs/decoding.md says how to find them).
        """

        alpha: Probability = 0.3
        """A token stays if its probability is at least this share of the k-th largest."""
        k: PositiveInt = 2
        """Which of the largest probabilities sets the threshold;
        1 is plain contrastive decoding."""
        temperature: Temperature = 1.0
        """Divides the contrastive scores."""

    config: Config

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None = None) -> Tensor:
        if unconditional_BV is None:
            return conditional_BV / self.config.temperature
        scores_BV = contrastive_k(
            conditional_BV, unconditional_BV, alpha=self.config.alpha, k=self.config.k
        )
        return scores_BV / self.config.temperature


@DECODERS.register("greedy")
class Greedy(Decoder):
    """The most likely token."""

    Config = NoSettings

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None = None) -> Tensor:
        best_B1 = conditional_BV.argmax(-1, keepdim=True)
        return conditional_BV.new_full(conditional_BV.shape, float("-inf")).scatter(
            -1, best_B1, 0.0
        )


@DECODERS.register("beam")
class Beam(Decoder):
    """Beam search: the tokens of the highest likelihood that a number of beams find.

    Each run of tokens of one kind (a text, an image, or a span of either) is searched by itself:
    its best beam is kept, and the answer continues from it.
    """

    @dataclass(kw_only=True)
    class Config:
        """The usual settings for captions."""

        beams: PositiveInt = 4
        """Number of beams."""
        length_penalty: Annotated[float, Range(ge=0, le=10)] = 1.0
        """The log-likelihood of a run is divided by its length to this power;
        0 favours short runs."""

    config: Config

    @property
    def beams(self) -> int:
        return self.config.beams

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None = None) -> Tensor:
        """The log-probabilities that beams add up."""
        return conditional_BV.log_softmax(-1)

    def score(self, log_likelihood: float, length: int) -> float:
        return log_likelihood / max(length, 1) ** self.config.length_penalty


@DECODERS.register("mixture")
class Alternating(Decoder):
    """Several decoders in turn over a prompt's samples: half by top-p and half by CD-K, as in the
    paper's figure 4."""

    @dataclass(kw_only=True)
    class Config:
        """The decoders to alternate."""

        decoders: list[Annotated[Component, DECODERS]] = field(
            default_factory=lambda: [DECODERS.check("top_p"), DECODERS.check("cd_k")]
        )
        """Sample i is drawn by decoder i of this list, which starts again at its end."""

        def check(self) -> None:
            if not self.decoders:
                raise UserError("decoders is empty; name at least one, for example [top_p, cd_k]")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._decoders = [DECODERS.build(component) for component in config.decoders]

    @property
    def streams(self) -> int:
        return max(decoder.streams for decoder in self._decoders)

    def of(self, number: int) -> Decoder:
        rounds, own = divmod(number, len(self._decoders))
        return self._decoders[own].of(rounds)

    def logits(
        self, conditional_BV: Tensor, unconditional_BV: Tensor | None = None, *others: Tensor
    ) -> Tensor:
        """Logits of the first decoder, for a prompt with a single sample."""
        return self._decoders[0].logits(conditional_BV, unconditional_BV, *others)
