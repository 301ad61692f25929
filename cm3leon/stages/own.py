"""A run with documents behind those of its memory bank, in memory alone."""

from __future__ import annotations

from copy import copy
from pathlib import Path

from cm3leon.data.formats import with_source_name
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.tokens import token_documents
from cm3leon.stages.vectors import document_parts
from cm3leon.types import Document, UserError


def with_own_documents(run: RunFolder, path: Path) -> RunFolder:
    """The run whose memory bank has the documents of a source too; its folder and `run` itself stay
    as they are.

    Args:
        path: that a source reads, such as a .jsonl file with an `image` and a `text` a line.

    Raises:
        UserError: for a run without a memory bank, files that tell no source, an item that cannot
            be used, or none.
    """
    source = SOURCES.build(with_source_name({"path": str(path)}))
    documents: list[Document] = []
    for item in source.documents(size=run.image_tokenizer.image_size):
        if isinstance(item, Skipped):
            raise UserError(f"own: {item.file}: {item.reason}")
        documents.append(item)
    if not documents:
        raise UserError(f"own: {path} has no documents; give files with at least one")
    bank = copy(run.bank)
    bank.add([document.id for document in documents], document_parts(run, documents))
    # A run is frozen, as is its copy, which shares all that was read of it already.
    other = copy(run)
    own = (*run.own_documents, *token_documents(run, documents))
    vars(other).update(bank=bank, own_documents=own)
    return other
