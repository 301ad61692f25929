"""The service Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cm3leon.loggers.base import Kind, Logger, Training, tagged
from cm3leon.registry import LOGGERS


@LOGGERS.register("wandb")
class WandB(Logger):
    """Runs of Weights & Biases, one for each stage that trains, in a group for the run.

    The key comes from the environment (WANDB_API_KEY) or from `wandb login`. In mode offline, files
    are written to `loggers/wandb` of the stage's folder; `wandb sync` sends them later.
    """

    package = extra = "wandb"
    apart = True

    @dataclass(kw_only=True)
    class Config:
        project: str = "cm3leon"
        """Project that the runs belong to."""
        entity: str | None = None
        """User or team that the project belongs to; null = the user's default."""
        mode: Literal["online", "offline"] = "online"
        """Whether figures are sent as they come, or kept in files."""

    def start(self, training: Training) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self._wandb = wandb
        folder = training.folder / "loggers"
        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            mode=self.config.mode,
            id=training.id,
            resume="allow",
            name=f"{training.run}/{training.stage}",
            group=training.run,
            job_type=training.stage,
            dir=str(folder),
            config=dict(training.settings),
            # What wandb finds out by itself includes command lines, and git remotes with passwords.
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                silent=True,
            ),
        )

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        self._run.log(tagged(kind, figures), step=step)

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        self._run.log({name: [self._wandb.Image(image) for image in images_BHWC]}, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
