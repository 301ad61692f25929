"""Run the stages of an experiment, the default; stages already done are skipped.

    python -m cm3leon.run run experiment=digits
    python -m cm3leon.run experiment=digits run=runs/short training.steps=200
    python -m cm3leon.run experiment=corpus data.path=tars launcher=slurm launcher.nodes=4
    python -m cm3leon.run experiment=digits_smoke sweep.training.learning_rate=1e-3,3e-3
    python -m cm3leon.run experiment=digits_smoke seeds=3

A study runs the stages of all its runs, then its evaluations. With launcher=torchrun, local (jobs
on this machine) or slurm, the work is launched as jobs; inside such a job it is done there.

`sweep.KEY=VALUES` makes a run at each value, 1e-4,3e-4 or 'range(3)', or, with sweep_trials=N, at N
values drawn from uniform(a,b) or loguniform(a,b). `seeds=N` makes every run with N seeds, and says
the mean and spread of its figures. Each run, sweep and study needs a folder of its own; that of a
sweep is runs/NAME-sweep by default, that of a run with several seeds runs/NAME-seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cm3leon.commands.words import ExperimentRunOptions, RedoOptions
from cm3leon.config import Component, dump_yaml, to_mapping
from cm3leon.paths import make_folder
from cm3leon.terminal import speaks_for_all

if TYPE_CHECKING:
    from cm3leon.studies import Study


@dataclass(kw_only=True)
class Options(ExperimentRunOptions, RedoOptions):
    """Options of the command run."""

    until: str | None = None
    """Name of the stage, or of a study's run, after which to stop; null = at the end."""

    @property
    def sweep_folder(self) -> Path:
        """The folder of a sweep: runs/NAME-sweep if the command line makes a sweep of NAME.

        An experiment that is a sweep by its file has the folder runs/NAME for itself.
        """
        from cm3leon.experiment import is_sweep

        if self.run or is_sweep(self.experiment):
            return self.folder
        return self.folder.with_name(f"{self.folder.name}-sweep")

    @property
    def is_sweep(self) -> bool:
        """Whether the experiment is run at several points."""
        from cm3leon.experiment import is_sweep

        return is_sweep(self.experiment, self.overrides)


def main(options: Options) -> int | None:
    """Run what is not done yet of an experiment, a sweep or a study, or launch it as jobs.

    Raises:
        UserError: for a mistake in the settings, or a folder that holds another kind of run.
    """
    if options.is_study or options.is_sweep:
        return _run_study(options)
    return _run_experiment(options)


def _run_study(options: Options) -> int | None:
    """Run a study, or a sweep, which is a study of one run at several points."""
    from cm3leon.records import refuse_other_kind
    from cm3leon.studies import run_study
    from cm3leon.studies.run import is_made_here, launch_study

    study, redo = _study(options), options.stages_to_redo
    refuse_other_kind(study.folder, study.kind)

    # `until` of a sweep or of a single run with several seeds names a stage, which its points or
    # runs know already; of a study, a run.
    until = options.until if options.is_study and not options.is_single else None
    if _is_launched(study.config.launcher) and not is_made_here(study):
        return launch_study(study, until=until, redo=redo)
    run_study(study, until=until, redo=redo)
    return None


def _study(options: Options) -> Study:
    from cm3leon.studies import load_study, load_sweep

    if options.is_study:
        of_runs = [f"until={options.until}"] if options.is_single and options.until else []
        return load_study(options.experiment, [*options.overrides, *of_runs], options.folder)
    words, folder = options.overrides, options.sweep_folder
    return load_sweep(options.experiment, words, folder, until=options.until)


def _run_experiment(options: Options) -> int | None:
    from cm3leon.experiment import load_experiment
    from cm3leon.records import refuse_other_kind

    # All mistakes of the settings are reported together, before anything is written.
    mistakes: list[str] = []
    folder, redo = options.folder, options.stages_to_redo
    experiment = load_experiment(options.experiment, options.overrides, unfit=mistakes)
    refuse_other_kind(folder, "run")
    from cm3leon.stages.running import check_before_stages, run_experiment

    check_before_stages(experiment, folder, until=options.until, found=mistakes)

    if _is_launched(experiment.launcher):
        from cm3leon.launch.runs import launch_experiment

        return launch_experiment(experiment, folder, until=options.until, redo=redo)
    run_experiment(
        experiment, folder, until=options.until, redo=redo, accepted=lambda: _record(folder)
    )
    return None


def _record(folder: Path) -> None:
    """Write down the code and the machine in the run folder, once for all processes."""
    from cm3leon.provenance import record

    if speaks_for_all():
        make_folder(folder, "run")
        record(folder)


def _is_launched(launcher: Component) -> bool:
    """Whether the work is launched as jobs; not inside a process that a launcher started."""
    from cm3leon.training.distributed import current_rank

    return launcher.name != "here" and current_rank() is None


def resolved(options: Options) -> str:
    """The experiment, sweep or study as YAML, with every default filled in."""
    if options.is_study:
        return dump_yaml(_study(options).written)
    if options.is_sweep:
        sweep = _study(options)
        return dump_yaml(sweep.written) + "".join(f"# {name}\n" for name in sweep.runs)
    from cm3leon.experiment import load_experiment

    return dump_yaml(to_mapping(load_experiment(options.experiment, options.overrides)))
