"""TensorBoard's files, in `tensorboard/` of a stage's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cm3leon.config import NoSettings
from cm3leon.loggers.base import Kind, Logger, Training, tagged
from cm3leon.registry import LOGGERS


@LOGGERS.register("tensorboard")
class TensorBoard(Logger):
    """Files for TensorBoard in the folder of each stage; a resumed training goes on in the same ones."""

    Config = NoSettings  # type: ignore[assignment]

    def start(self, training: Training) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what a killed process has written after its last checkpoint.
        self._writer = SummaryWriter(
            str(training.folder / "tensorboard"), purge_step=training.step + 1
        )

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        for name, value in tagged(kind, figures).items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        self._writer.add_images(name, images_BHWC, step, dataformats="NHWC")

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self._writer.add_text(name, text, step)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


def _cell(text: Any) -> str:
    """Make a text fit into a row of a table in Markdown."""
    return " ".join(str(text).split()).replace("|", "\\|")
