"""The service Trackio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon.loggers.base import Kind, Logger, Training, tagged
from cm3leon.registry import LOGGERS


@LOGGERS.register("trackio")
class Trackio(Logger):
    """Runs of Trackio, one for each stage that trains, in a group for the run.

    They are kept on this machine, where `trackio show` finds them (the environment variable
    TRACKIO_DIR names another folder), or in a Space of Hugging Face.
    """

    package = extra = "trackio"
    apart = True

    @dataclass(kw_only=True)
    class Config:
        project: str = "cm3leon"
        """Project that the runs belong to."""
        space_id: str | None = None
        """Space that they are sent to, user/name; null = none."""

    def start(self, training: Training) -> None:
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=self.config.project,
            # Trackio identifies runs by their names.
            name=f"{training.run}-{training.stage}-{training.id}",
            group=training.run,
            space_id=self.config.space_id,
            config=dict(training.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        self._run.log(tagged(kind, figures), step=step)

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        images = {
            f"{name}/{number}": self._trackio.Image(image)
            for number, image in enumerate(images_BHWC)
        }
        self._run.log(images, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        table = self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish()
