"""Add documents to a run's memory bank without a rebuild.

    python -m cm3leon.run add run=runs/corpus data.path=more/

Documents whose ids were added before are left out.
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
    """A run folder whose memory bank receives the documents."""


def main(options: Options) -> None:
    """Encode the documents of a source and add them to a run's memory bank.

    Documents whose ids were added before are left out.

    Raises:
        UserError: for a mistake in the options, a run without a finished bank, or no document to
            add.
    """
    from cm3leon.stages.opening import open_run

    run = open_run(options.run, options)
    bank = run.bank_folder
    doing = f"working in {bank}"
    if bank != run.folder:
        doing += f", whose memory bank {run.folder} uses"
    another = "choose another run with run=DIR"
    with locked(bank, doing=doing, instead=another), naming(bank / "index"):
        _add(run, options)


def _add(run: RunFolder, options: Options) -> None:
    """Add documents to a bank.

    The caller holds the bank's lock, so that no other process adds documents at the same time:
    the later of two writers would undo the earlier one.
    """
    from tqdm import tqdm

    from cm3leon.data.source import Skipped
    from cm3leon.data.token_shards import write_token_shard
    from cm3leon.retrievers.parts import Parts
    from cm3leon.stages.sharing import batches
    from cm3leon.stages.tokens import token_documents
    from cm3leon.stages.vectors import document_parts

    # The file of added tokens is written anew, with the documents of earlier additions first.
    bank = run.bank
    documents = [run.added_tokens.document(row) for row in range(len(bank.added_ids))]
    vectors = []
    skipped = 0
    known = set(bank.added_ids)
    source = SOURCES.build(options.data)

    def usable() -> Iterator[Document]:
        nonlocal skipped
        items = source.documents(size=run.image_tokenizer.image_size)
        for item in tqdm(items, desc="add", unit="document", dynamic_ncols=True):
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

    # Tokens first: a bank holds the documents that it has vectors of, so a kill between the two
    # writes leaves tokens that nothing refers to, never vectors without tokens.
    write_token_shard(run.added_tokens_file, documents, run.tokenizer_digests)
    bank.add([document.id for document in added], Parts.concatenate(vectors))
    bank.save_added()
    print(
        f"{len(added):,} documents added, {skipped:,} items left out; "
        f"the bank now has {len(bank):,} documents"
    )
