"""The one way to open a finished run: for the API, the commands, studies and plugins.

Nothing that the run's folder says is trusted before it is checked:

- its parts must belong together, and each is read with the settings it was made with
  (`generations.py`);
- its files are compared with their recorded checksums, once a process, when they are read
  (`records.py`);
- plugins that its `config.yaml` names are code of whoever made the run. They are loaded if the user
  named them in this call or on this command line, said `trust`, or loaded them before. Installed
  packages and folders in `plugins/` are the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cm3leon.experiment import Experiment, load_experiment
from cm3leon.paths import path_of
from cm3leon.permissions import check_readable
from cm3leon.records import MARKER
from cm3leon.registry import SOURCES, PluginError
from cm3leon.stages.generations import check_generations, finished_settings
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.trust import Opening
from cm3leon.training.device import best_device
from cm3leon.types import UserError

CONFIG = "config.yaml"
TUNED = "instruct"
"""The objective of fine-tuning on instructions."""


def open_run(
    folder: str | Path,
    opening: Opening | None = None,
    *,
    where: str = "run",
    needs: Sequence[str] = (),
    device: torch.device | None = None,
) -> RunFolder:
    """Open a finished run, which reads each of its results when it is first needed.

    Args:
        opening: which code and which files are trusted; None: the defaults.
        where: the argument that names the folder, for messages.
        needs: stages that must be finished.
        device: where models are put; None: a GPU if there is one.

    Raises:
        UserError: for a folder that is not a run or that this user may not read, parts of different
            generations, a stage in `needs` that is not finished, or a plugin that is not trusted.
            Reading a result raises it for a file that is missing or has changed.
        PluginError: for a plugin that fails to import.
    """
    opening = opening or Opening()
    folder = path_of(folder, where)
    check_readable(folder)

    config = folder / CONFIG
    for file in (config, *(folder / stage / MARKER for stage in needs)):
        if not file.is_file():
            what = f"the folder of a run with a finished {needs[-1]}" if needs else "a run folder"
            raise UserError(f"{where}: {folder} is not {what}: {file} is missing")

    check_generations(folder, needs, where)
    experiment = load_experiment(
        str(config),
        trusted_plugins=opening.trusted_plugins,
        # Aims may be about evaluations that are not finished yet.
        sections={**finished_settings(folder), "aims": []},
        earlier=True,
    )
    return RunFolder(
        experiment, folder, device or best_device(), verify=opening.verify, finished=True
    )


def tuned_on(experiment: Experiment, seen: frozenset[Path] = frozenset()) -> set[str] | None:
    """The instruction tasks that a run learned, also from runs that it mixes in or started from.

    None if the settings do not tell: for a source whose documents may be of any task, or another
    run that cannot be opened any more.

    Args:
        seen: runs that are not to be followed again.
    """
    tasks: set[str] = set()
    if experiment.objective.name == TUNED:
        mixed_in = (_settings_of(Path(folder)) for folder in experiment.shards.mix)
        for each in (experiment, *mixed_in):
            task = SOURCES.get(each.data.name).task_of(each.data.config) if each else None
            if task is None:
                return None
            tasks.add(task)

    # The run that it started from may have learned tasks before.
    start = experiment.training.start
    if start is not None and start not in seen:
        before = _settings_of(start)
        earlier = tuned_on(before, seen | {start}) if before else None
        if earlier is None:
            return None
        tasks |= earlier
    return tasks


def _settings_of(folder: Path) -> Experiment | None:
    try:
        return open_run(folder).experiment
    except (UserError, PluginError):
        return None
