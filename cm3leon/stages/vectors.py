"""The stage that embeds the texts and images of the training documents, in shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cm3leon.data.images import square
from cm3leon.data.shards import make_missing, shard_path, write_plan
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.vectors import finish_vectors, write_vector_shard
from cm3leon.stages.files import ENCODER
from cm3leon.stages.inputs import SHARDS, encoder_settings
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.sharing import shard_documents, share_out, with_progress
from cm3leon.stages.stage import Part, Stage
from cm3leon.types import Document


def make_vectors_part(run: RunFolder, folder: Path, part: Part) -> None:
    """Encode the documents of this worker's token shards,
    whose images are read again from the source."""
    parts = run.source.parts()
    write_plan(folder, run.encoder_header)

    def make(number: int) -> None:
        ids: list[str] = []
        vectors = [document_parts(run, [])]
        for batch in shard_documents(run, parts, number):
            ids += [document.id for document in batch]
            vectors.append(document_parts(run, batch))
        write_vector_shard(
            shard_path(folder, number, len(parts)),
            ids,
            Parts.concatenate(vectors),
            run.encoder_header,
        )

    with_progress("vectors", make_missing(folder, len(parts), make, part=part), len(parts), part)


def make_vectors(run: RunFolder, folder: Path) -> None:
    """Make the shards that no worker has made, and the index of all."""
    share_out(run, folder, make_vectors_part)
    finish_vectors(folder, len(run.source.parts()))


def document_parts(
    run: RunFolder, documents: Sequence[Document], *, dropout: float = 0.0, seed: int = 0
) -> Parts:
    """Vectors of the documents' texts and first images; zeros for a missing part."""
    encoder, size = run.retriever.encoder, run.image_tokenizer.image_size
    text_BD = np.zeros((len(documents), encoder.embed_dim), np.float32)
    image_BD = np.zeros_like(text_BD)

    with_text = [index for index, document in enumerate(documents) if document.text]
    if with_text:
        texts = [documents[index].text for index in with_text]
        text_BD[with_text] = encoder.encode_texts(texts, dropout=dropout, seed=seed)

    with_image, squares = [], []
    for index, document in enumerate(documents):
        if document.image is not None:
            with_image.append(index)
            squares.append(square(document.image, size))
    if with_image:
        image_BD[with_image] = encoder.encode_images(np.stack(squares), dropout=dropout, seed=seed)
    return Parts(text_BD, image_BD)


STAGE = Stage(
    "vectors",
    version=2,
    inputs=lambda run: {"retriever": encoder_settings(run)},
    make=make_vectors,
    make_part=make_vectors_part,
    needs=("tokens",),
    files=(ENCODER,),
    results=SHARDS,
    expensive=True,
)
