"""The service MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon.loggers.base import Kind, Logger, Training, tagged
from cm3leon.registry import LOGGERS
from cm3leon.types import UserError

AT_ONCE = 100
"""Largest number of parameters in one request to the service."""
LONGEST = 500
"""Characters of a parameter that every version of the service accepts."""
TAG = "cm3leon.id"
"""Tag of a run with the training's id, by which a resumed training finds its run."""


@LOGGERS.register("mlflow")
class MLflow(Logger):
    """Runs of MLflow, one for each stage that trains.

    The user is that of the environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
    MLFLOW_TRACKING_TOKEN).
    """

    package = extra = "mlflow"
    apart = True

    @dataclass(kw_only=True)
    class Config:
        experiment: str = "cm3leon"
        """MLflow's experiment that the runs belong to."""
        tracking_uri: str | None = None
        """Where they are kept; null = MLFLOW_TRACKING_URI of the environment, or else mlruns in the
        run's folder."""

    def start(self, training: Training) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # Without a server, runs are kept in files, which MLflow allows on demand only.
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        here = (training.folder.parent / "mlruns").absolute().as_uri()
        uri = self.config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or here
        self._client = MlflowClient(uri)
        known = self._client.get_experiment_by_name(self.config.experiment)
        if known and known.lifecycle_stage == "deleted":
            raise UserError(
                f"loggers: the experiment {self.config.experiment} was deleted in MLflow; restore "
                "it there, or set experiment to another name"
            )
        experiment = (
            known.experiment_id if known else self._client.create_experiment(self.config.experiment)
        )

        # A resumed training continues its run.
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{training.id}'")
        if found:
            run = found[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {TAG: training.id, "run": training.run, "stage": training.stage}
            name = f"{training.run}/{training.stage}"
            run = self._client.create_run(experiment, tags=tags, run_name=name)
        self._id = run.info.run_id

        # A process that was killed at this point may have left out some of the parameters.
        params = [
            Param(key, str(value)[:LONGEST])
            for key, value in _flat(training.settings)
            if key not in run.data.params
        ]
        for start in range(0, len(params), AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + AT_ONCE])

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        named = tagged(kind, figures).items()
        metrics = [self._metric(key, float(value), now, step) for key, value in named]
        self._client.log_batch(self._id, metrics=metrics)

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        for number, image_HWC in enumerate(images_BHWC):
            self._client.log_image(self._id, image_HWC, key=f"{name}/{number}", step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        # The file is that of `MlflowClient.log_table`, which would need pandas.
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._client.log_dict(self._id, table, f"tables/{name}/{step:08d}.json")

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested settings, and their values."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
