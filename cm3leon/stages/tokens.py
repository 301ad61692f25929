"""The stage that turns a corpus of any size into token shards, one for each part of the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cm3leon.data.corpus import Split
from cm3leon.data.images import square
from cm3leon.data.shards import make_missing, shard_path, write_plan
from cm3leon.data.source import Skipped
from cm3leon.data.token_shards import TokenShards, finish_tokens, split_of_key, write_token_shard
from cm3leon.stages.artifacts import Run
from cm3leon.stages.pipeline import Part
from cm3leon.stages.sharing import batches, share_out, with_progress
from cm3leon.tokenizers.document import token_count
from cm3leon.types import (
    Document,
    ImageSegment,
    TextSegment,
    TokenDocument,
    TokenSegment,
    UserError,
)

VALIDATION = "validation.arrow"
"""Token shard of the sample's validation documents, of any segments."""


def split_in(run: Run, document: Document) -> Split:
    """The split of a document, by what it is about: its group or picture."""
    shares = run.experiment.split
    return split_of_key(document.split_key, validation=shares.validation, held_out=shares.held_out)


def squared_items(run: Run, part: str) -> Iterator[Document | Skipped]:
    """The items of a part of the source, images brought to the size of the tokenizer as they are read."""
    return iter(run.source.read_squared(part, size=run.image_tokenizer_shape.image_size))


class DocumentSample:
    """About `shards.sample` documents, equally many from every part of the source, or one from each of as many parts.

    Parts with fewer are not made up for. Images have the size of the tokenizer.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.whole = False
        """Whether the sample turned out to be all that the source has; known when it was read."""

    def __iter__(self) -> Iterator[Document | Skipped]:
        count, parts = self.run.shards.sample, self.run.source.parts()
        order = np.random.default_rng(self.run.experiment.seed).permutation(len(parts))[:count]
        whole = len(order) == len(parts)
        for number in sorted(order.tolist()):
            left = -(-count // len(order))
            items = squared_items(self.run, parts[number])
            for item in items:
                yield item
                left -= isinstance(item, Document)
                if not left:
                    whole = whole and next(items, None) is None
                    break
        self.whole = whole


def make_tokens_part(run: Run, folder: Path, part: Part) -> None:
    """Tokenises the training documents of this worker's parts of the source."""
    parts = run.source.parts()
    write_plan(
        folder,
        {
            "tokenizers": asdict(run.made_by),
            "parts": len(parts),
            "source": run.source.fingerprint(),
        },
    )

    def make(number: int) -> None:
        listed = folder / "skipped" / f"{number:05d}.jsonl"
        listed.parent.mkdir(exist_ok=True)
        with listed.open("w") as file:  # what is left out is written down as it is met, not held

            def leave_out(skipped: Skipped) -> None:
                file.write(json.dumps({"file": skipped.file, "reason": skipped.reason}) + "\n")

            items = squared_items(run, parts[number])
            documents = _tokenized(run, items, "train", leave_out)
        write_token_shard(shard_path(folder, number, len(parts)), documents, run.made_by)

    with_progress("tokens", make_missing(folder, len(parts), make, part=part), len(parts), part)


def make_tokens(run: Run, folder: Path) -> None:
    """Makes the shards that no worker has made, the index of all, and the validation documents of the sample.

    Raises:
        UserError: if there is not one document to train on.
    """
    share_out(run, folder, make_tokens_part)
    finish_tokens(folder, len(run.source.parts()))
    if not len(TokenShards(folder)):
        raise UserError(
            f"data: the corpus has no document to train on; what was left out is listed in {folder}/skipped"
        )
    documents = _tokenized(run, DocumentSample(run), "validation", lambda skipped: None)
    write_token_shard(folder / VALIDATION, documents, run.made_by)


def _tokenized(
    run: Run,
    items: Iterable[Document | Skipped],
    split: Split,
    leave_out: Callable[[Skipped], None],
) -> list[TokenDocument]:
    """The documents of a split among the items, as ids.

    Args:
        leave_out: called with what cannot be used, which documents of other splits can.
    """
    documents: list[TokenDocument] = []
    room = longest_document(run)
    for batch in batches(_documents_of(run, items, split, leave_out)):
        for document in token_documents(run, batch):
            length = token_count(document)
            if room is not None and length > room:
                method = run.experiment.packing.method
                reason = f"takes {length} tokens, packing.method {method} allows {room}"
                leave_out(Skipped(document.id, reason))
            else:
                documents.append(document)
    return documents


def longest_document(run: Run) -> int | None:
    """Tokens that a document may have where it has to lie in one block, between two `<eos>`."""
    return run.seq_len - 2 if run.experiment.packing.query_is_whole else None


def _documents_of(
    run: Run,
    items: Iterable[Document | Skipped],
    split: Split,
    leave_out: Callable[[Skipped], None],
) -> Iterator[Document]:
    for item in items:
        if isinstance(item, Skipped):
            leave_out(item)
        elif split_in(run, item) == split:
            yield item


def token_documents(run: Run, documents: Sequence[Document]) -> Iterator[TokenDocument]:
    """Documents of any segments as ids, all their images encoded as one batch."""
    size = run.image_tokenizer.image_size
    images = [
        square(s.pixels_HWC, size)
        for d in documents
        for s in d.segments
        if isinstance(s, ImageSegment)
    ]
    codes = iter(run.image_tokenizer.encode(np.stack(images)) if images else ())
    texts = [s.text for d in documents for s in d.segments if isinstance(s, TextSegment)]
    texts_ids = iter(run.text_tokenizer.encode_all(texts))
    for document in documents:
        yield TokenDocument(
            document.id,
            tuple(
                TokenSegment("text", next(texts_ids), segment.role, segment.joined)
                if isinstance(segment, TextSegment)
                else TokenSegment("image", run.vocab.image_ids(next(codes)), segment.role)
                for segment in document.segments
            ),
        )
