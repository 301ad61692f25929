"""The corpus that a run was made from, for the protocol that asks about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm3leon.api import CM3Leon, Completed
from cm3leon.evaluation.protocols.base import Item
from cm3leon.evaluation.protocols.corpus import UNKNOWN, OwnCorpus
from cm3leon.registry import TASKS
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.tokens import training_codes
from cm3leon.types import TokenDocument


def own_corpus(run: RunFolder) -> OwnCorpus:
    """What a run knows of the documents that it was made from."""
    corpus, training = run.corpus, run.corpus.rows("train")
    labels = []
    for label in corpus.labels:
        labels.append(UNKNOWN if label is None else label)
    return OwnCorpus(
        documents=lambda split: [corpus.document(row) for row in run.rows_to_ask(split)],
        training_images_BHWC=corpus.images_BHWC[training],
        training_labels_B=np.array(labels)[training],
        training_codes_MN=training_codes(run),
        class_in=run.source.class_in,
    )


def figures_of_own(
    model: CM3Leon,
    items: Sequence[Item],
    documents: Sequence[TokenDocument],
    drawn: Sequence[Sequence[Completed]],
) -> dict[str, np.ndarray]:
    """Whether each answer left the given parts unchanged; for texts, also their CLIP cosine with
    the image."""
    run = model.run
    kept_In = np.zeros((len(drawn), len(drawn[0])), bool)
    for index, answers in enumerate(drawn):
        task = TASKS.build(items[index].task, vocab=run.vocab, grid=run.grid)
        for sample, answer in enumerate(answers):
            # An edit or an infilling must not touch what it was given.
            kept_In[index, sample] = task.keeps_given(documents[index], answer.document)
    encoder = model.clip
    if TASKS.get(items[0].task).answers_in == "image" or encoder is None:
        return {"kept": kept_In}

    image_BD = encoder.encode_images(np.stack([item.document.images[-1] for item in items]))
    clip_In = np.zeros(kept_In.shape)
    for sample in range(kept_In.shape[1]):
        texts = [run.tokenizer.caption(answers[sample].document) for answers in drawn]
        clip_In[:, sample] = (encoder.encode_texts(texts) * image_BD).sum(axis=1)
    return {"kept": kept_In, "clip": clip_In}
