"""An experiment as jobs: its stages, each with its own resources, after those that it needs.

A corpus in many parts, trained on several GPUs with a published image tokenizer, becomes for example:

    retriever -> tokens (array of 256) -> tokens_end -> vectors (array of 256) -> index ->
    neighbours (array of 256) -> neighbours_end -> pretraining (all ranks) -> evaluation
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cm3leon.config import Component, dump_yaml, recorded_settings
from cm3leon.experiment import Experiment
from cm3leon.io import digest_of, write_text
from cm3leon.launch.jobs import Command, Job, Submitted, submit
from cm3leon.paths import make_folder
from cm3leon.registry import LAUNCHERS
from cm3leon.secrets import places_of_secrets
from cm3leon.stages.folders import check_run_folder
from cm3leon.stages.running import trained_together
from cm3leon.stages.sharing import is_shared_out
from cm3leon.stages.stage import check_redo, number_of, redo_of
from cm3leon.stages.table import stages_of
from cm3leon.terminal import command_line
from cm3leon.training.checkpoint import check_format
from cm3leon.training.steps import numbered
from cm3leon.types import UserError


def launch_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    until: str | None = None,
    redo: Collection[str] = (),
) -> int:
    """Hand an experiment to its launcher, and print how to follow it.

    Returns:
        an exit code; 0 if none is known yet.

    Raises:
        UserError: for an unknown `until` or `redo`, a folder that is not a run's, or what the
            launcher knows to be impossible.
    """
    folder = folder.absolute()
    check_redo(stages_of(experiment), redo)
    check_run_folder(folder)
    make_folder(folder, "run")
    jobs = experiment_jobs(experiment, folder, until=until, redo=redo)
    return launched(jobs, folder, experiment.launcher)


def experiment_jobs(
    experiment: Experiment,
    folder: Path,
    *,
    until: str | None = None,
    redo: Collection[str] = (),
    name: str = "",
) -> list[Job]:
    """The jobs of an experiment in a run folder.

    One job, unless the corpus has many parts or the launcher's section sets the parts of a stage.
    Then each stage that workers share is an array, and each that all ranks train together is a job;
    what one process makes is a job before, between and behind them.

    Args:
        name: stands before the names of the jobs.
    """
    until = until or experiment.until
    stages = stages_of(experiment)
    if until is not None:
        stages = stages[: number_of(stages, until, "until") + 1]
    frozen = frozen_file(recorded_settings(experiment), folder)
    own = redo_of(stages_of(experiment), redo)
    words = (f"experiment={frozen}", f"run={folder}", "launcher=here", *with_redo(own))
    launcher = LAUNCHERS.build(experiment.launcher)

    # A single job; all ranks start it if they train something together.
    asked_for = any("parts" in launcher.resources(stage.name) for stage in stages)
    if not asked_for and not is_shared_out(experiment):
        trains = bool(trained_together(experiment, folder, until, launcher.processes("")))
        return [Job(name or "run", (with_until(words, until),), together=trains)]

    jobs: list[Job] = []

    def add(stage: str, *commands: Command, together: bool = False) -> None:
        title = f"{name}.{stage}" if name else stage
        after = (jobs[-1].name,) if jobs else ()
        jobs.append(Job(title, commands, launcher.resources(stage), after, together))

    # Stages in parts, and stages of all ranks.
    parts = {stage.name: launcher.parts(stage.name) if stage.make_part else 1 for stage in stages}
    trained = set()
    for stage in stages:
        ranks = launcher.processes(stage.name)
        if stage.name in trained_together(experiment, folder, until, ranks):
            trained.add(stage.name)

    # A run up to a stage makes all stages before it that are missing. So a stage of one process has
    # a job only before an array or a training, or at the end.
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        count = parts[stage.name]
        if count > 1:
            about = ("part", f"stage={stage.name}")
            add(stage.name, *((*about, f"part={k}/{count}", *words) for k in range(count)))
        if stage.name in trained:
            add(stage.name, with_until(words, stage.name), together=True)
        elif following is None or following.name in trained or parts[following.name] > 1:
            add(stage.name if count == 1 else f"{stage.name}_end", with_until(words, stage.name))
    return jobs


def launched(jobs: list[Job], folder: Path, launcher: Component) -> int:
    """Give jobs to a launcher, and print how to follow them if it does not wait.

    Returns:
        the first exit code that is not 0, if the launcher waits.

    Raises:
        UserError: for what is known to be impossible, such as checkpoints of an older format.
    """
    for stage in folder.glob("*/"):
        for path in numbered(stage):
            check_format(path)
    submitted = submit(jobs, folder, launcher)
    if not LAUNCHERS.get(launcher.name).detached:
        return next((each.code for each in submitted if each.code), 0)

    for job in jobs:
        of_job = [each for each in submitted if each.job == job.name]
        after = f", after {', '.join(job.after)}" if job.after else ""
        print(f"{job.name}: {_shown(of_job)}{after}, log {of_job[0].log}")
    of_run = f"run={folder}"
    print(f"follow with: {command_line('logs', of_run, 'follow=true')}")
    print(f"see where it stands with: {command_line('status', of_run)}")
    print(f"end it with: {command_line('cancel', of_run)}")
    return 0


def _shown(submitted: list[Submitted]) -> str:
    first, last = submitted[0].id, submitted[-1].id
    return f"job {first}" if first == last else f"jobs {first} to {last}"


def frozen_file(settings: Mapping[str, Any], folder: Path) -> Path:
    """A file of resolved settings that nothing changes later,
    for jobs that read it when they start.

    Raises:
        UserError: for settings that hold a secret.
    """
    if found := places_of_secrets(settings):
        raise UserError(
            f"{', '.join(found)} holds a password or a token, and jobs read their settings from "
            "the run's folder, where no secret is written; give it by the environment, or by "
            "fsspec's configuration file"
        )
    text = dump_yaml(settings)
    file = folder / "launch" / f"{digest_of(text)[:12]}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return file


def with_redo(names: Collection[str]) -> Command:
    """The argument that allows stages to be made anew, if there are any."""
    return (f"redo={','.join(names)}",) if names else ()


def with_until(words: Command, until: str | None) -> Command:
    """The arguments, with the name of the last stage or part if one is given."""
    return (*words, f"until={until}") if until else words
