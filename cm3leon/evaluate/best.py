"""Answers from the arrays of a file of answers: the best sample of each item, or all of one item;
and the best answers that a model could give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cm3leon.api import CM3Leon
from cm3leon.evaluation.metrics import Measured, proportion
from cm3leon.evaluation.protocols.base import (
    RIGHT_IN_ANY,
    Answer,
    Item,
    Protocol,
    true_answer,
)
from cm3leon.retrievers.strategy import NONE


def best_answers(
    model: CM3Leon,
    protocol: Protocol,
    items: Sequence[Item],
    held: Mapping[str, np.ndarray],
    samples: int,
) -> list[Answer]:
    """The best answer to each item of a file.

    A ranked answer is the candidate of the highest log-likelihood, a text is the only sample, and
    an image is the one closest to its caption by CLIP.

    Args:
        held: arrays of the file, see `files.py`.
        samples: how many of the samples count; the file may hold more.
    """
    if protocol.ranks:
        ranked = []
        for item, scores_K in zip(items, held["scores"][:, 0], strict=True):
            ranked.append(_best_candidate(item, scores_K))
        return ranked

    beside = _Beside(model, held)
    answers = []
    if protocol.answers_in == "text":
        texts = zip(held["texts"], held["truncated"], strict=True)
        for index, (text, cut) in enumerate(texts):
            answer = Answer(text=str(text[0]), truncated=bool(cut[0]), **beside.of(index, 0))
            answers.append(answer)
        return answers

    best_I = held["clip"][:, :samples].argmax(axis=1)
    codes_IN = held["codes"][np.arange(len(best_I)), best_I]
    images_IHWC = model.run.image_tokenizer.decode(codes_IN.astype(np.int64))
    for index, image_HWC in enumerate(images_IHWC):
        said = beside.of(index, int(best_I[index]))
        answers.append(Answer(image_HWC=image_HWC, codes_N=codes_IN[index], **said))
    return answers


def drawn_images(
    model: CM3Leon, held: Mapping[str, np.ndarray], index: int, samples: int
) -> list[Answer]:
    """All images that were drawn for the item at this index of a file, the best by CLIP first."""
    clip_n = held["clip"][index, :samples]
    order_n = np.argsort(-clip_n, kind="stable")
    codes_nN = held["codes"][index, :samples][order_n].astype(np.int64)
    images_nHWC = model.run.image_tokenizer.decode(codes_nN)

    answers = []
    for image_HWC, clip in zip(images_nHWC, clip_n[order_n], strict=True):
        answers.append(Answer(image_HWC=image_HWC, clip=float(clip)))
    return answers


def right_in_any(
    model: CM3Leon,
    protocol: Protocol,
    files: Iterable[tuple[Sequence[Item], Mapping[str, np.ndarray]]],
    samples: int,
) -> dict[str, Measured]:
    """The share of items of which at least one image is right, by name: what a perfect choice
    between an item's images would reach. {} if the protocol cannot say what is right.

    Args:
        files: the items of each file of answers, and its arrays.
    """
    right = []
    for items, held in files:
        for index, item in enumerate(items):
            drawn = drawn_images(model, held, index, samples)
            of_item = [protocol.right(item, answer) for answer in drawn]
            if None in of_item:
                return {}
            right.append(any(of_item))
    return {RIGHT_IN_ANY: proportion(np.array(right))}


def rebuilt_truths(
    model: CM3Leon, protocol: Protocol, items: Sequence[Item], batch: int
) -> list[Answer]:
    """The best answers that the model could give: true texts, and true images through its image
    tokenizer and back, `batch` of them at a time."""
    truths = [true_answer(item, protocol.answers_in) for item in items]
    if protocol.answers_in == "text":
        return truths

    tokenizer = model.run.image_tokenizer
    rebuilt: list[Answer] = []
    for first in range(0, len(truths), batch):
        codes_BN = tokenizer.encode(images_of(truths[first : first + batch]))
        for image_HWC, codes_N in zip(tokenizer.decode(codes_BN), codes_BN, strict=True):
            rebuilt.append(Answer(image_HWC=image_HWC, codes_N=codes_N))
    return rebuilt


def images_of(answers: Sequence[Answer]) -> np.ndarray:
    """The images (B, H, W, C) of some answers."""
    return np.stack([answer.image_HWC for answer in answers if answer.image_HWC is not None])


class _Beside:
    """What a file of answers says of a sample besides the answer itself."""

    def __init__(self, model: CM3Leon, held: Mapping[str, np.ndarray]) -> None:
        self._held = held

        # Codes of the retrieved images. A document may stand in many prompts; it is read once.
        self._codes: dict[int, np.ndarray] = {}
        rows = np.unique(held.get("rows", np.empty(0))).tolist()
        for row in rows:
            if row == NONE:
                continue
            document = model.run.bank_document(int(row))
            if document.segment("image") is not None:
                self._codes[int(row)] = model.run.tokenizer.codes(document)

    def of(self, item: int, sample: int) -> dict[str, Any]:
        """Fields of `Answer`, for a sample of an item by their indices in the file."""
        held = self._held
        said: dict[str, Any] = {}
        if "clip" in held:
            said["clip"] = float(held["clip"][item, sample])
        if "kept" in held:
            said["given_kept"] = bool(held["kept"][item, sample])
            said["retrieved"] = []
            for row in map(int, held["rows"][item]):
                # A document without an image has no codes, nor has the NONE that fills short rows.
                if row in self._codes:
                    said["retrieved"].append(self._codes[row])
        return said


def _best_candidate(item: Item, scores_K: np.ndarray) -> Answer:
    scores_K = scores_K[: len(item.options)]
    return Answer(text=item.options[int(scores_K.argmax())], scores_K=scores_K)
