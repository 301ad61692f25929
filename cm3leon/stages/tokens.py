"""The stage that turns the corpus into token shards, one for each part of the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.data.augment import varied
from cm3leon.data.corpus import Split, split_of_key
from cm3leon.data.images import square
from cm3leon.data.kept_images import keeping, kept_file
from cm3leon.data.shards import make_missing, shard_path, write_plan
from cm3leon.data.source import Skipped
from cm3leon.data.token_shards import TokenShards, finish_tokens, write_token_shard
from cm3leon.io import digest_of, read_log
from cm3leon.records import MARKER
from cm3leon.secrets import without_secrets
from cm3leon.stages.files import IMAGE_TOKENIZER, TEXT_TOKENIZER
from cm3leon.stages.inputs import SHARDS, corpus_inputs, recorded, varied_inputs
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.sharing import DECODED, batches, share_out, with_progress
from cm3leon.stages.stage import Part, Stage
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
"""Token shard of the sample's validation documents, which may have any segments."""


def split_in(run: RunFolder, document: Document) -> Split:
    """The split of a document, by its group or image."""
    shares = run.experiment.split
    return split_of_key(document.split_key, validation=shares.validation, held_out=shares.held_out)


def squared_items(run: RunFolder, part: str) -> Iterator[Document | Skipped]:
    """The items of a part of the source, with images resized to the tokenizer's square."""
    return iter(run.source.read_squared(part, size=run.image_tokenizer_shape.image_size))


def fitted_items(run: RunFolder, part: str) -> Iterator[Document | Skipped]:
    """The items of a part as they are tokenised;
    images keep their shapes if the layout has several."""
    return squared_items(run, part) if len(run.grids) == 1 else iter(run.source.read(part))


class DocumentSample:
    """About `shards.sample` documents: equally many from every part of the source, or one from each
    of as many parts.

    Parts with fewer documents are not made up for. Images have the size of the tokenizer.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.whole = False
        """Whether the sample is all that the source has; known once it was read."""

    def __iter__(self) -> Iterator[Document | Skipped]:
        parts = self.run.source.parts()
        numbers, of_each = sampled_parts(self.run)
        whole = len(numbers) == len(parts)
        for number in numbers:
            left = of_each
            items = squared_items(self.run, parts[number])
            for item in items:
                yield item
                left -= isinstance(item, Document)
                if not left:
                    whole = whole and next(items, None) is None
                    break
        self.whole = whole


def sampled_parts(run: RunFolder) -> tuple[list[int], int]:
    """Indices of the source's parts that the sample is taken from,
    and how many documents from each."""
    count, parts = run.shards.sample, len(run.source.parts())
    order = np.random.default_rng(run.experiment.seed).permutation(parts)[:count]
    return sorted(order.tolist()), -(-count // max(1, len(order)))


def sampled_rows(run: RunFolder) -> dict[str, int]:
    """The row in `run.tokens` of each training document of the sample, by id.

    Documents that do not fit a block have none.
    """
    known = {run.corpus.ids[row] for row in run.corpus.rows("train")}
    numbers, of_each = sampled_parts(run)
    rows: dict[str, int] = {}
    for number in numbers:
        shard, first = run.tokens.shard(number), run.tokens.first(number)
        for index in range(min(of_each, len(shard))):
            if (id_ := shard.id(index)) in known:
                rows[id_] = first + index
    return rows


def training_codes(run: RunFolder) -> np.ndarray:
    """Image codes (M, N) of the sample's training documents, in all their versions."""
    N = run.codes_MN.shape[1]
    found = []
    for row in sampled_rows(run).values():
        for version in range(run.tokens.versions + 1):
            codes_N = run.tokenizer.codes(run.tokens.document(row, version))
            # Images that are asked for are square; those of other shapes cannot be copied.
            if len(codes_N) == N:
                found.append(codes_N)
    return np.array(found, np.int64).reshape(-1, N)


def make_tokens_part(run: RunFolder, folder: Path, part: Part) -> None:
    """Tokenise the training documents of this worker's parts of the source."""
    parts, versions = run.source.parts(), run.experiment.augment.versions
    plan = {
        "tokenizers": asdict(run.tokenizer_digests),
        "parts": len(parts),
        "source": run.source.fingerprint(),
    }
    if versions:
        plan["versions"] = versions
    if versions and run.experiment.augment.shared:
        plan["shared_maps"] = digest_of(json.dumps(varied_inputs(run), sort_keys=True))[:16]
    write_plan(folder, plan)

    size = run.image_tokenizer_shape.image_size
    # Room for decoded images, which the later stages read again. A run that has its neighbours does
    # not need them. If all parts are as long as this one, the room is for the first ones, as many
    # as fit; what is left is divided among the workers.
    found = (run.folder / "neighbours" / MARKER).is_file() or len(run.grids) > 1
    room = 0 if found else int(run.shards.decoded_gb * 1e9)
    own = max(0, room - _size_of(folder / DECODED)) // part[1]

    def make(number: int) -> None:
        nonlocal own
        listed = folder / "skipped" / f"{number:05d}.jsonl"
        listed.parent.mkdir(exist_ok=True)
        with listed.open("w") as file:  # written as it is met, so that it needs no memory

            def leave_out(skipped: Skipped) -> None:
                line = {"file": skipped.file, "reason": skipped.reason}
                file.write(json.dumps(without_secrets(line)) + "\n")

            items = fitted_items(run, parts[number])
            documents: list[TokenDocument] = []
            varied_VN: list[np.ndarray] = []
            decoded = kept_file(folder / DECODED, number, len(parts))
            limit = min(room // (number + 1), own)
            with keeping(decoded, size=size, limit=limit) as keep:
                for originals, tokenized in _tokenized(run, items, "train", leave_out):
                    documents += tokenized
                    keep(originals)
                    if versions:
                        varied_VN += _varied_ids(run, originals)
        own -= decoded.stat().st_size if decoded.is_file() else 0
        path = shard_path(folder, number, len(parts))
        write_token_shard(
            path, documents, run.tokenizer_digests, varied=varied_VN if versions else None
        )

    with_progress("tokens", make_missing(folder, len(parts), make, part=part), len(parts), part)


def _size_of(folder: Path) -> int:
    """Bytes of the kept files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.arrows"))


def make_tokens(run: RunFolder, folder: Path) -> None:
    """Make the shards that no worker has made, the index of all,
    and the sample's validation documents.

    Raises:
        UserError: if there is no document to train on.
    """
    share_out(run, folder, make_tokens_part)
    finish_tokens(folder, len(run.source.parts()), run.vocab.layout)

    # The first item that was left out often says why all of them were.
    if not len(TokenShards(folder)):
        first = None
        for file in sorted((folder / "skipped").glob("*.jsonl")):
            if left_out := read_log(file):
                first = left_out[0]
                break
        why = f" (the first: {first['file']}: {first['reason']})" if first else ""
        raise UserError(
            "data: the corpus has no document to train on; what was left out is listed in "
            f"{folder}/skipped{why}"
        )

    documents: list[TokenDocument] = []
    for _, tokenized in _tokenized(run, DocumentSample(run), "validation", lambda skipped: None):
        documents += tokenized
    write_token_shard(folder / VALIDATION, documents, run.tokenizer_digests)


def _tokenized(
    run: RunFolder,
    items: Iterable[Document | Skipped],
    split: Split,
    leave_out: Callable[[Skipped], None],
) -> Iterator[tuple[list[Document], list[TokenDocument]]]:
    """The documents of a split in batches, as documents and as ids.

    Args:
        leave_out: called with items that cannot be used.
    """
    room = longest_document(run)
    for batch in batches(_documents_of(run, items, split, leave_out)):
        kept: tuple[list[Document], list[TokenDocument]] = ([], [])

        # A document that must lie in one block must fit it.
        for original, document in zip(batch, token_documents(run, batch), strict=True):
            length = token_count(document, run.vocab.layout)
            if room is not None and length > room:
                method = run.experiment.packing.method
                reason = f"takes {length} tokens, packing.method {method} allows {room}"
                leave_out(Skipped(document.id, reason))
            else:
                kept[0].append(original)
                kept[1].append(document)
        yield kept


def _varied_ids(run: RunFolder, documents: Sequence[Document]) -> list[np.ndarray]:
    """For each document, the ids of its images in each varied version (V, N)."""
    config, size = run.experiment.augment, run.image_tokenizer.image_size
    images: list[np.ndarray] = []
    keys: list[str] = []
    for document in documents:
        for index, pixels_HWC in enumerate(document.images):
            images.append(square(pixels_HWC, size))
            keys.append(f"{document.id}#{index}" if index else document.id)

    ids_VBN = np.zeros((config.versions, 0, 0), np.int64)
    if images:
        versions = varied(np.stack(images), keys, config, run.experiment.seed)
        codes = [run.image_tokenizer.encode(version_BHWC) for version_BHWC in versions]
        ids_VBN = run.vocab.image_ids(np.stack(codes))

    # Each document is given those of its own images, one after the other.
    found, first = [], 0
    for document in documents:
        last = first + len(document.images)
        found.append(ids_VBN[:, first:last].reshape(config.versions, -1))
        first = last
    return found


def longest_document(run: RunFolder) -> int | None:
    """Tokens that a document may have if it must lie in one block, between two `<eos>`; None:
    any number."""
    return run.seq_len - 2 if run.experiment.packing.query_is_whole else None


def _documents_of(
    run: RunFolder,
    items: Iterable[Document | Skipped],
    split: Split,
    leave_out: Callable[[Skipped], None],
) -> Iterator[Document]:
    for item in items:
        if isinstance(item, Skipped):
            leave_out(item)
        elif split_in(run, item) == split:
            yield item


def token_documents(run: RunFolder, documents: Sequence[Document]) -> Iterator[TokenDocument]:
    """Documents of any segments as ids; all images of one size are encoded as one batch."""
    images: list[np.ndarray] = []
    texts: list[str] = []
    for document in documents:
        for segment in document.segments:
            if isinstance(segment, ImageSegment):
                images.append(run.fitted(segment.pixels_HWC))
            else:
                texts.append(segment.text)

    # Back to the segments in the same order.
    codes = iter(run.encoded(images))
    text_ids = iter(run.text_tokenizer.encode_all(texts))
    for document in documents:
        segments = []
        for segment in document.segments:
            if isinstance(segment, TextSegment):
                ids_T = next(text_ids)
                segments.append(TokenSegment("text", ids_T, segment.role, segment.joined))
            else:
                ids_T = run.vocab.image_ids(*next(codes))
                segments.append(TokenSegment("image", ids_T, segment.role))
        yield TokenDocument(document.id, tuple(segments), document.label)


def tokens_inputs(run: RunFolder) -> dict[str, Any]:
    """What token shards depend on besides the tokenizers."""
    sizes = run.vocab.text_size, run.vocab.image_size, run.vocab.sentinels
    inputs = {**corpus_inputs(run), "vocabulary": sizes, "longest": longest_document(run)}

    # Named only if they apply, so that the fingerprints of other corpora stay as they were.
    if run.experiment.augment.versions:
        inputs |= varied_inputs(run)
    if run.source.class_names:
        inputs["labels"] = True
    if len(run.grids) > 1:
        inputs["shapes"] = run.grids
    return inputs | run.layout_inputs()


# This and the stages of the bank depend on the files of the tokenizers and the encoder, not on how
# they were made: a terabyte of tokens stays when the retriever changes.
STAGE = Stage(
    "tokens",
    version=4,
    inputs=tokens_inputs,
    make=make_tokens,
    make_part=make_tokens_part,
    needs=(),
    files=(TEXT_TOKENIZER, IMAGE_TOKENIZER),
    settings=recorded("data", "split", "seed", "shards", "sentinels", "augment"),
    results=SHARDS,
    scratch=(DECODED,),
    expensive=True,
)
