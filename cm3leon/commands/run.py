"""Run the stages of an experiment, the default; stages already done are skipped.

    python -m cm3leon.run run experiment=digits
    python -m cm3leon.run experiment=digits run=runs/short training.steps=200
    python -m cm3leon.run experiment=corpus data.path=tars launcher=slurm launcher.nodes=4 launcher.gpus_per_node=8
    python -m cm3leon.run experiment=digits_smoke sweep.training.learning_rate=1e-3,3e-3 'sweep.seed=range(3)'

Of a study, those of its runs, then its evaluations. A launcher other than `here` is given them as jobs, unless this
process is one of those that train together already: launcher=torchrun, local (jobs of this machine) or slurm.

`sweep.KEY=VALUES` makes a run at each value: 1e-4,3e-4 or range(3); at sweep_trials=N draws: uniform(a,b),
loguniform(a,b). A run, a sweep and a study need a folder each; a sweep's is runs/NAME-sweep by default.
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
    """Name of the stage, or of a study's run, after which to stop; null = none."""

    @property
    def sweep_folder(self) -> Path:
        """The run folder of a sweep: one of its own, where the command line makes a sweep of an experiment."""
        from cm3leon.experiment import is_sweep

        own = self.run or is_sweep(self.experiment)
        return self.folder if own else self.folder.with_name(f"{self.folder.name}-sweep")

    @property
    def is_sweep(self) -> bool:
        """Whether the experiment is run at several points."""
        from cm3leon.experiment import is_sweep

        return is_sweep(self.experiment, self.overrides)


def main(options: Options) -> int | None:
    """Runs what is not done yet of an experiment, a sweep or a study, or gives it to a launcher.

    Raises:
        UserError: for a mistake in the settings, or a folder that is of another kind.
    """
    if options.is_study or options.is_sweep:
        return _run_study(options)
    return _run_experiment(options)


def _run_study(options: Options) -> int | None:
    """Runs a study, or a sweep, which is a study of one run."""
    from cm3leon.records import refuse_other_kind
    from cm3leon.studies import run_study
    from cm3leon.studies.run import is_made_here, launch_study

    study, redo = _study(options), options.stages_to_redo
    refuse_other_kind(study.folder, study.kind)
    # What is to be run of a sweep ends with a stage; of a study with a run or an evaluation.
    until = options.until if options.is_study else None
    if _is_launched(study.config.launcher) and not is_made_here(study):
        return launch_study(study, until=until, redo=redo)
    run_study(study, until=until, redo=redo)
    return None


def _study(options: Options) -> Study:
    from cm3leon.studies import load_study, load_sweep

    if options.is_study:
        return load_study(options.experiment, options.overrides, options.folder)
    words, folder = options.overrides, options.sweep_folder
    return load_sweep(options.experiment, words, folder, until=options.until)


def _run_experiment(options: Options) -> int | None:
    from cm3leon.experiment import load_experiment
    from cm3leon.records import refuse_other_kind

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
    """Writes down in the run folder what runs, once for all processes."""
    from cm3leon.provenance import record

    if speaks_for_all():
        make_folder(folder, "run")
        record(folder)


def _is_launched(launcher: Component) -> bool:
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
