"""The nouns of the project, and the legend of its shape letters.

A *segment* is a run of text or one image. A *document* is a sequence of segments. A *sample* is one
training example: retrieved documents, then the query document. A *block* is `seq_len` positions
with packed samples:

    block       | sample 0                                  | sample 1 ...        | padding |
    sample 0      retrieved document   query document
    document      text segment   image segment

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
"""Role of a segment in an instruction: the text to be generated, the instruction, or an image that
it is about. An image to be generated has no role: it comes last, and is never masked."""

# How a model computes. The types stand here because commands need them before torch is loaded.
Precision = Literal["auto", "bf16", "float32"]
"""Precision of matrix products; auto is bf16 if the processor computes in it."""
TrainingPrecision = Literal["auto", "bf16", "float32", "float8"]
"""Precision of a training; with float8, the layers' products use it and everything else bf16."""
Weights = Literal["float32", "bf16", "int8", "fp8"]
"""Type in which the matrices of layers are stored."""
Execution = Literal["eager", "compiled", "graph", "compiled graph"]
"""How steps are run. A graph is recorded when a shape first occurs, and replayed from then on."""


class UserError(ValueError):
    """A user's mistake. The message is one sentence (what, where, what is allowed) for the user.

    It is shown without a traceback.
    """


class Notice(UserWarning):
    """A warning of this project, with one sentence for the user as its message.

    The command line shows these warnings and hides those of libraries.
    """


class UserErrors(UserError):
    """Several mistakes at once; each of the `sentences` is shown on a line of its own."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = tuple(sentences)


class NotFinite(UserError):
    """Weights, or results of a network, are NaN or infinite, so answers would be meaningless."""


def sentences_of(error: UserError) -> tuple[str, ...]:
    """List the sentences of an error, one or several."""
    return error.sentences if isinstance(error, UserErrors) else (str(error),)


def refuse(sentences: Sequence[str]) -> None:
    """Raise UserError for one mistake, UserErrors for several, and nothing for none."""
    several = list(dict.fromkeys(sentences))
    if several:
        raise UserError(several[0]) if len(several) == 1 else UserErrors(several)


class Again(BaseException):
    """A run was asked to stop for now. Its progress is saved, and the same command continues it.

    Like KeyboardInterrupt it is not an Exception: it may occur anywhere, and must not be handled as
    an error.
    """


class Partly(Exception):
    """A command could make only a part of its results; the message names the rest in a sentence."""


AGAIN, REFUSED, PARTLY = 75, 2, 3
"""Exit codes of `python -m cm3leon.run`: start it again (EX_TEMPFAIL of sysexits.h), a user's
mistake, and results of which a part is missing."""


@dataclass(frozen=True)
class TextSegment:
    """A run of text. A joined one continues the run before it, like the answer in its template."""

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
    """Segments in order, with an id that is unique in the corpus.

    `label` is the known class, if the source has one.
    """

    id: str
    segments: tuple[Segment, ...]
    label: int | None = None
    group: str = ""
    """Documents of one group, such as the questions about one picture, stay on one side of a
    split."""

    @property
    def split_key(self) -> str:
        """Key by which documents are split: the group; without one, the words of a document of text
        alone, and the id of any other."""
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
    """A segment as ids of the whole vocabulary: `ids_T`, int64, without the ids around it."""

    modality: Modality
    ids_T: np.ndarray
    role: Role = ""
    joined: bool = False
    """Whether it continues the segment before it, like an answer in its template."""
    grid: tuple[int, int] | None = None
    """Rows and columns of an image that has no codes yet; None if its codes show them, (0, 0) if
    they are unknown."""


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """A document after both tokenizers."""

    id: str
    segments: tuple[TokenSegment, ...]
    label: int | None = None

    def segment(self, modality: Modality) -> TokenSegment | None:
        """Return the first segment of that modality; None if there is none."""
        return next((s for s in self.segments if s.modality == modality), None)


@dataclass(frozen=True, eq=False)
class Sample:
    """One training example: `retrieved` documents, the closest last, then the `query` document."""

    query: TokenDocument
    retrieved: tuple[TokenDocument, ...] = ()


@dataclass(frozen=True, eq=False)
class Block:
    """`seq_len` positions with packed samples, as numpy arrays of shape (T,).

    `target_T[t]` is the token after `ids_T[t]` in the same sample, and `weight_T[t]` its weight in
    the loss: 0 for sentinels, padding and the last position of a sample. `sample_T` numbers the
    samples of the block from 0, with -1 for padding; attention never crosses samples. `position_T`
    restarts at 0 in every sample, or continues through the block.
    """

    ids_T: np.ndarray
    target_T: np.ndarray
    weight_T: np.ndarray
    sample_T: np.ndarray
    position_T: np.ndarray


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks stacked as tensors of shape (B, T); the fields are those of `Block`.

    In training and validation `sample_BT` stays on the CPU, and all others are on the model's
    device.
    """

    ids_BT: torch.Tensor
    target_BT: torch.Tensor
    weight_BT: torch.Tensor
    sample_BT: torch.Tensor
    position_BT: torch.Tensor

    def split(self, blocks: int) -> list[Batch]:
        """Split the batch into parts of that many blocks; the last part has the remaining ones."""
        parts = zip(
            *(getattr(self, field.name).split(blocks) for field in fields(self)), strict=True
        )
        return [Batch(*part) for part in parts]

    def to(self, device: torch.device) -> Batch:
        """Move the batch to a device, except `sample_BT`, which is read on the CPU."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "sample_BT"
        }
        return Batch(**moved, sample_BT=self.sample_BT)

    def pinned(self) -> Batch:
        """Copy the batch to pinned memory, from which a GPU copies while both go on."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


@dataclass(frozen=True, eq=False)
class OnCpu:
    """A tensor that stays on the CPU, although FSDP moves a model's tensors to its device."""

    tensor: torch.Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request for tokens of one modality that continue `ids_T`.

    An answer that is an image has exactly `length` tokens. One that is a text has at most `length`
    pieces, and ends early at `end` or at one of `also_ends`. `unconditional_T` is the prompt of
    guidance's second stream, None if there is nothing to guide by; `partial_T` is that of the third
    stream, with a part of the conditions.
    """

    ids_T: np.ndarray
    modality: Modality
    length: int
    end: int
    unconditional_T: np.ndarray | None = None
    partial_T: np.ndarray | None = None
    also_ends: tuple[int, ...] = ()
    closed: tuple[int, ...] = ()
    """Indices in an image's tokens at which a row is closed; these tokens are not drawn."""

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end a text answer early."""
        return (self.end, *self.also_ends)

    def content(self, answer: Sequence[int]) -> Sequence[int]:
        """Return an answer without the token that ends it."""
        return answer[:-1] if answer and answer[-1] in self.ends else answer
