"""Images as PNG files in `pictures/` of a stage's folder, to look at while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cm3leon.config import NoSettings
from cm3leon.io import write_text
from cm3leon.loggers.base import Logger, Training
from cm3leon.paths import make_folder
from cm3leon.registry import LOGGERS

GAP = 2
"""White pixels between two images."""


@LOGGERS.register("pictures")
class Pictures(Logger):
    """Images of a step on one sheet, `NAME_STEP.png`, and tables as `NAME_STEP.txt`.

    The terminal says where the first sheet lies.
    """

    Config = NoSettings  # type: ignore[assignment]

    def start(self, training: Training) -> None:
        self._folder = training.folder / "pictures"
        self._announced = training.step > 0

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        make_folder(self._folder, "pictures")
        file = self._folder / f"{name}_{step:08d}.png"
        Image.fromarray(sheet(images_BHWC)).save(file)
        if not self._announced:
            tqdm.write(f"      pictures, from step {step} on: {file}")
        self._announced = True

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        make_folder(self._folder, "pictures")
        lines = ["\t".join(map(_cell, row)) for row in (columns, *rows)]
        write_text(self._folder / f"{name}_{step:08d}.txt", "\n".join(lines) + "\n")


def sheet(images_BHWC: np.ndarray) -> np.ndarray:
    """Lay images on a page of about equal sides, row by row from left to right.

    Five images give

        0 1
        2 3
        4

    Args:
        images_BHWC: uint8, of one size.
    """
    B, H, W, C = images_BHWC.shape
    columns = min(B, max(1, round(math.sqrt(B * H / W))))
    rows = math.ceil(B / columns)
    page_HWC = np.full((rows * (H + GAP) - GAP, columns * (W + GAP) - GAP, C), 255, np.uint8)
    for number, image_HWC in enumerate(images_BHWC):
        top, left = number // columns * (H + GAP), number % columns * (W + GAP)
        page_HWC[top : top + H, left : left + W] = image_HWC
    return page_HWC


def _cell(text: Any) -> str:
    return " ".join(str(text).split())
