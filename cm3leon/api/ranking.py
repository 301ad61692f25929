"""The CLIP that ranks images by how well they fit their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cm3leon.retrievers.base import Encoder
from cm3leon.stages.opening import open_run
from cm3leon.stages.trust import Opening
from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.types import UserError

SCORED_AT_ONCE = 256
"""Images that are drawn and compared with their texts at a time."""


def opened_clip(folder: Path, opening: Opening, device: torch.device) -> Encoder:
    """Open the CLIP of a run's retriever, to rank the images of another run by it.

    Raises:
        UserError: for a folder that is not a run with a finished retriever, or whose retriever has
            no CLIP.
    """
    run = open_run(folder, opening, where="ranker", needs=("retriever",), device=device)
    if not run.retriever.encoder.joint:
        raise UserError(
            f"ranker: the retriever {run.experiment.retriever.name} of {folder} has no CLIP to "
            "rank images by; name a run whose retriever is dense"
        )
    return run.retriever.encoder


def cosines(
    encoder: Encoder,
    tokenizer: ImageTokenizer,
    texts: Sequence[str],
    codes_BN: np.ndarray,
    grid: tuple[int, int],
) -> np.ndarray:
    """Compute the cosine (B,) of each image, given by its codes, and its text.

    Each text is encoded once. Images are drawn in parts, as they take more memory than codes.
    """
    scores_B = np.full(len(codes_BN), np.nan, np.float32)
    if not texts:
        return scores_B
    distinct = list(dict.fromkeys(texts))
    row_of = {each: row for row, each in enumerate(distinct)}
    text_B = np.array([row_of[each] for each in texts], np.int64)
    text_QD = encoder.encode_texts(distinct)
    for start in range(0, len(codes_BN), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        images_BHWC = tokenizer.decode(codes_BN[part].astype(np.int64), grid=grid)
        image_BD = encoder.encode_images(images_BHWC)
        scores_B[part] = (image_BD * text_QD[text_B[part]]).sum(-1)
    return scores_B
