"""Documents to token ids, and samples to the paper's layout (section 2.1, figures 8 and 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon.tokenizers.text import TextTokenizer
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Modality, Role, Sample, TokenDocument, TokenSegment


@dataclass(frozen=True)
class SegmentSpan:
    """Where a segment lies in a laid-out sample: positions [start, end), and whether it is the query's."""

    start: int
    end: int
    modality: Modality
    is_query: bool
    role: Role = ""


@dataclass(frozen=True, eq=False)
class LaidOut:
    """A sample as one sequence: `ids_T` (int64) and its segments in order."""

    ids_T: np.ndarray
    segments: tuple[SegmentSpan, ...]


def lay_out(sample: Sample, vocab: Vocab) -> LaidOut:
    """A sample as ids: `<eos>` opens and closes it, `<break>` stands between segments and between documents.

    None stands before a joined segment.

    A retrieved document "a cat" + I4 I7 and the query "a dog" + I2 I9 make
    `<eos> a cat <break> I4 I7 <break> a dog <break> I2 I9 <eos>`.
    """
    pieces = [np.array([vocab.eos])]
    segments: list[SegmentSpan] = []
    position = 1
    for document in (*sample.retrieved, sample.query):
        for segment in document.segments:
            if segments and not segment.joined:
                pieces.append(np.array([vocab.brk]))
                position += 1
            end = position + len(segment.ids_T)
            segments.append(
                SegmentSpan(position, end, segment.modality, document is sample.query, segment.role)
            )
            pieces.append(segment.ids_T)
            position = end
    pieces.append(np.array([vocab.eos]))
    return LaidOut(np.concatenate(pieces).astype(np.int64), tuple(segments))


def token_count(document: TokenDocument) -> int:
    """Tokens of a document's segments and the breaks between them."""
    apart = sum(not segment.joined for segment in document.segments)
    return sum(len(segment.ids_T) for segment in document.segments) + apart - 1


def sample_length(sample: Sample) -> int:
    """Length of `lay_out(sample)` without building it."""
    return 2 + sum(token_count(d) + 1 for d in (*sample.retrieved, sample.query)) - 1


@dataclass(frozen=True)
class DocumentTokenizer:
    """Both tokenizers and their common vocabulary: documents to ids and back."""

    vocab: Vocab
    text: TextTokenizer
    image: Any

    def token_document(self, id_: str, caption: str, codes_N: np.ndarray) -> TokenDocument:
        """A caption and the codes of its image as a document of ids."""
        text = TokenSegment("text", self.text.encode(caption))
        return TokenDocument(id_, (text, TokenSegment("image", self.vocab.image_ids(codes_N))))

    def caption(self, document: TokenDocument) -> str:
        """The text of a document of ids, empty without one."""
        segment = document.segment("text")
        return "" if segment is None else self.text.decode(segment.ids_T)

    def codes(self, document: TokenDocument) -> np.ndarray:
        """The image codes (N,) of a document of ids. Raises ValueError without an image."""
        segment = document.segment("image")
        if segment is None:
            raise ValueError(f"document {document.id} has no image")
        return self.vocab.image_codes(segment.ids_T)
