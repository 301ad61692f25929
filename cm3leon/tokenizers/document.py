"""Documents to token ids, and samples to the paper's layout (section 2.1, figures 8 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon.tokenizers.layout import Layout
from cm3leon.tokenizers.text import TextTokenizer
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Modality, Role, Sample, TokenDocument, TokenSegment


@dataclass(frozen=True)
class SegmentSpan:
    """Positions [start, end) of a segment in a laid-out sample."""

    start: int
    end: int
    modality: Modality
    is_query: bool
    """Whether it belongs to the query, not to a retrieved document."""
    role: Role = ""


@dataclass(frozen=True, eq=False)
class LaidOut:
    """A sample as one sequence: `ids_T` (int64) and its segments in order."""

    ids_T: np.ndarray
    segments: tuple[SegmentSpan, ...]


def lay_out(sample: Sample, vocab: Vocab) -> LaidOut:
    """Write a sample as one sequence of ids, by the vocabulary's layout.

    In the paper's layout `<eos>` opens and closes the sample, and `<break>` stands between segments
    and between documents. A joined segment follows the one before it directly. The retrieved
    document "a cat" + I4 I7 and the query "a dog" + I2 I9 give

        <eos> a cat <break> I4 I7 <break> a dog <break> I2 I9 <eos>
    """
    layout = vocab.layout
    pieces: list[Sequence[int] | np.ndarray] = [[layout.begin]]
    segments: list[SegmentSpan] = []
    position = 1

    # Something stands between the documents, and between the segments of each, but not in front of
    # the first one. Positions count the ids around segments too.
    for document in (*sample.retrieved, sample.query):
        between: tuple[int, ...] = layout.between_documents if segments else ()
        for segment in document.segments:
            before: tuple[int, ...] = ()
            if not segment.joined:
                before = (*between, *layout.opening(segment))
            behind = layout.closing(segment)
            start = position + len(before)
            end = start + len(segment.ids_T)
            is_query = document is sample.query
            segments.append(SegmentSpan(start, end, segment.modality, is_query, segment.role))
            pieces += [before, segment.ids_T, behind]
            position = end + len(behind)
            between = layout.between_segments
    pieces.append([layout.end])
    return LaidOut(np.concatenate(pieces).astype(np.int64), tuple(segments))


def prompt_until(sample: Sample, vocab: Vocab) -> np.ndarray:
    """Return the ids (T,) of a sample up to its last segment, which is to be generated.

    The ids that open this segment are included.
    """
    laid_out = lay_out(sample, vocab)
    return laid_out.ids_T[: laid_out.segments[-1].start]


def token_count(document: TokenDocument, layout: Layout) -> int:
    """Count the tokens of a document: its segments, and the ids around and between them."""
    count = 0
    for number, segment in enumerate(document.segments):
        apart = len(layout.between_segments) if number and not segment.joined else 0
        around = len(layout.opening(segment)) + len(layout.closing(segment))
        count += len(segment.ids_T) + apart + around
    return count


def sample_length(sample: Sample, layout: Layout) -> int:
    """Return the length of `lay_out(sample)` without building it."""
    documents = sum(token_count(document, layout) for document in (*sample.retrieved, sample.query))
    return 2 + documents + len(sample.retrieved) * len(layout.between_documents)


@dataclass(frozen=True)
class DocumentTokenizer:
    """The text and the image tokenizer with their common vocabulary: documents to ids and back."""

    vocab: Vocab
    text: TextTokenizer
    image: Any

    def token_document(self, id_: str, caption: str, codes_N: np.ndarray) -> TokenDocument:
        """Make a document of ids from a caption and the codes (N,) of its image."""
        text = TokenSegment("text", self.text.encode(caption))
        return TokenDocument(id_, (text, TokenSegment("image", self.vocab.image_ids(codes_N))))

    def caption(self, document: TokenDocument) -> str:
        """Return the text of a document of ids; "" if it has none."""
        segment = document.segment("text")
        return "" if segment is None else self.text.decode(segment.ids_T)

    def codes(self, document: TokenDocument) -> np.ndarray:
        """Return the image codes (N,) of a document of ids. Raises ValueError without an image."""
        segment = document.segment("image")
        if segment is None:
            raise ValueError(f"document {document.id} has no image")
        return self.vocab.image_codes(segment.ids_T)
