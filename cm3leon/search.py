"""The memory bank of a run: asked by text or by image, and given more documents without a rebuild.

python -m cm3leon.run search run=runs/corpus text="a red dog"
python -m cm3leon.run search run=runs/corpus image=dog.jpg count=10
python -m cm3leon.run add run=runs/corpus data.path=more/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from cm3leon.config import Component, PositiveInt, from_mapping
from cm3leon.data.images import read_given_image, square
from cm3leon.data.source import Skipped
from cm3leon.data.token_shards import write_token_shard
from cm3leon.locks import locked
from cm3leon.paths import naming
from cm3leon.registry import SOURCES, discover
from cm3leon.retrievers.bank import Parts
from cm3leon.retrievers.index import Bank
from cm3leon.stages.artifacts import Run
from cm3leon.stages.neighbours import document_parts
from cm3leon.stages.opening import open_run
from cm3leon.stages.sharing import batches
from cm3leon.stages.tokens import token_documents
from cm3leon.stages.trust import Opening
from cm3leon.terminal import printable
from cm3leon.types import Document, TokenDocument, UserError
from cm3leon.validate import with_source_name


@dataclass(kw_only=True)
class SearchOptions(Opening):
    """Options of the command search."""

    run: Path
    """Run folder whose memory bank is asked."""
    text: str | None = None
    """Text to find documents for."""
    image: Path | None = None
    """Image file to find documents for; with a text, for the mean of both."""
    count: PositiveInt = 5
    """Documents to find."""

    def check(self) -> None:
        if self.text is None and self.image is None:
            raise UserError("text and image are both missing; give what to search for")


@dataclass(kw_only=True)
class AddOptions(Opening):
    """Options of the command add."""

    run: Path
    """Run folder to whose memory bank documents are added; its corpus must be in shards."""
    data: Annotated[Component, SOURCES]
    """Where they come from, as the section data of an experiment."""


def search(mapping: Mapping[str, Any]) -> None:
    """Prints the best documents by inner product: score, id and text.

    Raises:
        UserError: for a mistake in the options, or a run without a finished bank.
    """
    options = from_mapping(SearchOptions, mapping)
    run = open_run(options.run, options)
    query = _query(run, options)
    rows_1K = run.bank.search(query.mean(), options.count)
    scores_K = (run.bank.parts_of(rows_1K).mean()[0] @ query.mean()[0]).tolist()
    for row, score in zip(rows_1K[0].tolist(), scores_K, strict=True):
        if row >= 0:
            document = run.bank_document(row)
            print(f"{score:.3f}  {printable(document.id)}  {printable(shown(run, document))}")


def _query(run: Run, options: SearchOptions) -> Parts:
    images_BHWC = None
    if options.image is not None:
        pixels_HWC = read_given_image(options.image, "image")
        images_BHWC = square(pixels_HWC, run.image_tokenizer_shape.image_size)[None]
    return run.retriever.parts(None if options.text is None else [options.text], images_BHWC)


def shown(run: Run, document: TokenDocument) -> str:
    """A document on one line: its text, with <image> where its images stand."""
    runs = (
        run.text_tokenizer.decode(segment.ids_T) if segment.modality == "text" else "<image>"
        for segment in document.segments
    )
    return " ".join(" ".join(runs).split())


def add(mapping: Mapping[str, Any]) -> None:
    """Encodes the documents of a source and adds them to a bank; those whose ids were added before are left out.

    Raises:
        UserError: for a mistake in the options, a run without a finished bank, or no document to add.
    """
    discover()
    options = from_mapping(AddOptions, {**mapping, "data": with_source_name(mapping.get("data"))})
    run = open_run(options.run, options)
    if run.experiment.shards is None:
        raise UserError(
            f"run: the corpus of {options.run} is not in shards; make it with experiment=corpus to add to it"
        )
    with locked(run.bank_folder), naming(run.bank_folder / "index"):
        _add(run, options)


def _add(run: Run, options: AddOptions) -> None:
    """Add documents to a bank that this process holds alone, so that no other one's are lost."""
    bank = run.bank
    assert isinstance(bank, Bank)
    documents, vectors = [run.added_tokens.document(row) for row in range(len(bank.added_ids))], []
    skipped = 0
    known = set(bank.added_ids)

    def usable() -> Iterator[Document]:
        nonlocal skipped
        for item in tqdm(
            SOURCES.build(options.data).documents(size=run.image_tokenizer.image_size),
            desc="add",
            unit="document",
            dynamic_ncols=True,
        ):
            if isinstance(item, Skipped) or item.id in known:
                skipped += 1
            else:
                known.add(item.id)
                yield item

    for batch in batches(usable()):
        documents += token_documents(run, batch)
        vectors.append(document_parts(run, batch))
    added = documents[len(bank.added_ids) :]
    if not added:
        raise UserError(f"data: no documents to add ({skipped} items skipped or added before)")
    # The ids first: a bank has the documents that it has vectors of.
    write_token_shard(run.added_tokens_file, documents, run.made_by)
    bank.add([document.id for document in added], Parts.concatenate(vectors))
    bank.save_added()
    print(f"{len(added):,} documents added, {skipped:,} items left out; the bank has {len(bank):,}")
