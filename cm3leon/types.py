"""The nouns of the project, and the legend of its shape letters.

A *segment* is a run of text or one image; a *document* is segments in order; a *sample* is what one training example
holds: retrieved documents, then the query document; a *block* is `seq_len` positions holding packed samples.

Names of arrays and tensors end in their shape, one letter a dimension:

    B  batch (blocks, rows or images)        V  vocabulary
    T  positions (tokens) of a sequence      D  width of the model or of an embedding
    S  positions attended to (keys)          A  attention heads
    N  codes of one image                    E  size of one attention head
    C  image channels                        K  retrieved documents, or candidates
    H  image height    W  image width        Q  queries
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line imports this module, and has to answer before torch is loaded
    import numpy as np
    import torch

Modality = Literal["text", "image"]
Role = Literal["", "answer", "instruction", "condition"]
"""What a segment of an instruction is: the text that is asked for, the instruction, an image that it is about. An image
that is asked for has none: it comes last, and is never masked."""

# How a model computes, here where the options of commands find the words before torch is loaded.
Precision = Literal["auto", "bf16", "float32"]
"""Of matrix products; auto is bf16 where the processor computes in it."""
TrainingPrecision = Literal["auto", "bf16", "float32", "float8"]
"""Of a training: in float8 the layers' products are, and all else is in bf16."""
Weights = Literal["float32", "bf16", "int8", "fp8"]
"""What the matrices of layers are kept in."""
Execution = Literal["eager", "compiled", "graph", "compiled graph"]
"""How steps are run. A graph is recorded for each shape when it first occurs, and replayed from then on."""


class UserError(ValueError):
    """A user's mistake: its message is one sentence (what, where, what is allowed) shown without a traceback."""


class Notice(UserWarning):
    """A warning of ours: its message is one sentence for the user. The command line shows it, and no library's."""


class UserErrors(UserError):
    """Several mistakes in one answer: `sentences`, which are shown one a line."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = tuple(sentences)


class NotFinite(UserError):
    """Weights, or what a network computes with them, are NaN or infinite: its answers would mean nothing."""


def sentences_of(error: UserError) -> tuple[str, ...]:
    """The mistakes that an error names, one or several."""
    return error.sentences if isinstance(error, UserErrors) else (str(error),)


def refuse(sentences: Sequence[str]) -> None:
    """Raises UserError for one mistake, UserErrors for several; without any it returns."""
    several = list(dict.fromkeys(sentences))
    if several:
        raise UserError(several[0]) if len(several) == 1 else UserErrors(several)


class Again(BaseException):
    """A run was asked to make room: its progress is saved, and the same command goes on from there.

    As KeyboardInterrupt, it is not an Exception: it may come at any place, and nobody takes it for a fault.
    """


class Partly(Exception):
    """Some of what was asked for could not be made, the rest is: its message is one sentence that names what is not."""


AGAIN, REFUSED, PARTLY = 75, 2, 3
"""Exit codes of `python -m cm3leon.run`: to be started again (EX_TEMPFAIL of sysexits.h), a user's mistake, and a part
of what was asked for that could not be made."""


@dataclass(frozen=True)
class TextSegment:
    """A run of text; a joined one goes on with the run before it, as the answer within its template does."""

    text: str
    role: Role = ""
    joined: bool = False


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """One image: `pixels_HWC`, uint8 RGB."""

    pixels_HWC: np.ndarray
    role: Role = ""


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, eq=False)
class Document:
    """Segments in order, under an id unique in its corpus. `label` is the known class, where the source has one."""

    id: str
    segments: tuple[Segment, ...]
    label: int | None = None
    group: str = ""
    """Documents of one group, such as the questions about one picture, fall on one side of a split."""

    @property
    def split_key(self) -> str:
        """What the split goes by: the group; without one, the words of a text, and the id of anything else."""
        if self.group or self.images:
            return self.group or self.id
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def text(self) -> str:
        """All text of the document, runs joined by a space."""
        runs: list[str] = []
        for segment in self.segments:
            if isinstance(segment, TextSegment):
                if segment.joined:
                    runs[-1] += segment.text
                else:
                    runs.append(segment.text)
        return " ".join(runs)

    @property
    def images(self) -> list[np.ndarray]:
        """Pixels (H, W, C) of each image."""
        return [
            segment.pixels_HWC for segment in self.segments if isinstance(segment, ImageSegment)
        ]

    @property
    def image(self) -> np.ndarray | None:
        """Pixels (H, W, C) of the first image, None without one."""
        return next(iter(self.images), None)


@dataclass(frozen=True, eq=False)
class TokenSegment:
    """A segment as ids of the whole vocabulary: `ids_T`, int64, without what a layout puts around it."""

    modality: Modality
    ids_T: np.ndarray
    role: Role = ""
    joined: bool = False
    """Whether it goes on with what stands before it, as an answer does within its template."""
    grid: tuple[int, int] | None = None
    """Rows and columns of an image that has no codes yet; None where its codes tell, (0, 0) where nobody knows."""


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """A document after both tokenizers."""

    id: str
    segments: tuple[TokenSegment, ...]
    label: int | None = None

    def segment(self, modality: Modality) -> TokenSegment | None:
        """The first segment of that modality, None without one."""
        return next((s for s in self.segments if s.modality == modality), None)


@dataclass(frozen=True, eq=False)
class Sample:
    """What one training example holds: `retrieved` documents, the closest last, then the `query` document."""

    query: TokenDocument
    retrieved: tuple[TokenDocument, ...] = ()


@dataclass(frozen=True, eq=False)
class Block:
    """`seq_len` positions holding packed samples, as numpy arrays of shape (T,).

    `target_T[t]` is the token after `ids_T[t]` in the same sample; `weight_T` is its share in the loss (0 for
    sentinels, padding and the last position of a sample). `sample_T` numbers the samples of the block from 0, -1 is
    padding: attention never crosses it. `position_T` restarts at 0 in every sample, or runs on through the block.
    """

    ids_T: np.ndarray
    target_T: np.ndarray
    weight_T: np.ndarray
    sample_T: np.ndarray
    position_T: np.ndarray


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks stacked as tensors of shape (B, T); the fields are those of `Block`.

    In a training or a validation all are on the model's device but `sample_BT`, which stays on the CPU (see `to`).
    """

    ids_BT: torch.Tensor
    target_BT: torch.Tensor
    weight_BT: torch.Tensor
    sample_BT: torch.Tensor
    position_BT: torch.Tensor

    def split(self, blocks: int) -> list[Batch]:
        """The batch in parts of that many blocks, the last one with what is left."""
        parts = zip(
            *(getattr(self, field.name).split(blocks) for field in fields(self)), strict=True
        )
        return [Batch(*part) for part in parts]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, but for the samples' numbers: where they begin is looked up on the CPU."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "sample_BT"
        }
        return Batch(**moved, sample_BT=self.sample_BT)

    def pinned(self) -> Batch:
        """The batch in memory that a GPU copies from while both go on."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


@dataclass(frozen=True, eq=False)
class OnCpu:
    """A tensor that a model is to get on the CPU: FSDP moves those that it sees to its device."""

    tensor: torch.Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the decoders are asked for: a continuation of `ids_T` by tokens of one modality.

    An image answer has exactly `length` tokens; a text answer has at most `length` pieces and ends early at one of
    `ends`: at `end`, or at one of `also_ends`.
    `unconditional_T` is the prompt of guidance's second stream, None where there is nothing to guide by;
    `partial_T` that of the third one, with a part of the conditions.
    """

    ids_T: np.ndarray
    modality: Modality
    length: int
    end: int
    unconditional_T: np.ndarray | None = None
    partial_T: np.ndarray | None = None
    also_ends: tuple[int, ...] = ()
    closed: tuple[int, ...] = ()
    """Tokens of an image answer, counted from its first, that close a row of codes: they are not drawn."""

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end a text answer early."""
        return (self.end, *self.also_ends)

    def content(self, answer: Sequence[int]) -> Sequence[int]:
        """An answer without the token that ends it."""
        return answer[:-1] if answer and answer[-1] in self.ends else answer
