"""Add documents to a run's memory bank without a rebuild.

    python -m cm3leon.run add run=runs/corpus data.path=more/

Those whose ids were added before are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cm3leon.commands.words import DataOptions
from cm3leon.locks import locked
from cm3leon.paths import naming
from cm3leon.registry import SOURCES
from cm3leon.stages.trust import Opening
from cm3leon.types import Document, UserError

if TYPE_CHECKING:
    from cm3leon.stages.run_folder import RunFolder


@dataclass(kw_only=True)
class Options(DataOptions, Opening):
    """Options of the command add."""

    run: Path
    """A run folder to whose memory bank documents are added."""


def main(options: Options) -> None:
    """Encodes the documents of a source and adds them to a bank; those whose ids were added before are left out.

    Raises:
        UserError: for a mistake in the options, a run without a finished bank, or no document to add.
    """
    from cm3leon.stages.opening import open_run

    run = open_run(options.run, options)
    with locked(run.bank_folder), naming(run.bank_folder / "index"):
        _add(run, options)


def _add(run: RunFolder, options: Options) -> None:
    """Add documents to a bank that this process holds alone, so that no other one's are lost."""
    from tqdm import tqdm

    from cm3leon.data.source import Skipped
    from cm3leon.data.token_shards import write_token_shard
    from cm3leon.retrievers.parts import Parts
    from cm3leon.stages.sharing import batches
    from cm3leon.stages.tokens import token_documents
    from cm3leon.stages.vectors import document_parts

    bank = run.bank
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
    write_token_shard(run.added_tokens_file, documents, run.tokenizer_digests)
    bank.add([document.id for document in added], Parts.concatenate(vectors))
    bank.save_added()
    print(f"{len(added):,} documents added, {skipped:,} items left out; the bank has {len(bank):,}")
