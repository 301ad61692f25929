"""Run an experiment's stages in its folder: in one process, on several ranks,
or one worker's share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from cm3leon.config import dump_yaml, recorded_settings
from cm3leon.digests import remembered
from cm3leon.experiment import Experiment
from cm3leon.io import write_text
from cm3leon.paths import make_folder
from cm3leon.secrets import without_secrets
from cm3leon.stages.checks import check_settings
from cm3leon.stages.folders import check_run_folder
from cm3leon.stages.pipeline import (
    check_unasked,
    first_unfinished,
    is_finished,
    run_part,
    run_stages,
)
from cm3leon.stages.publish import publish
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.sharing import is_shared_out
from cm3leon.stages.stage import Part, Stage, check_redo, number_of
from cm3leon.stages.table import stages_of
from cm3leon.training.device import best_device
from cm3leon.training.distributed import Ranks, current_rank, joined
from cm3leon.types import UserError

CONFIG = "config.yaml"
"""The settings that were last accepted; for finished stages, their own records count."""
DIGESTS = "digests.json"
"""Checksums of what the run was made from, so that a later start need not read it again."""


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    until: str | None = None,
    redo: Collection[str] = (),
    accepted: Callable[[], None] = lambda: None,
) -> None:
    """Bring all stages of an experiment up to date in the run folder,
    and print where the report is.

    Args:
        redo: stages that may be made anew although they are expensive,
            with all that depend on them.
        accepted: called before anything is made, once nothing is refused; on several ranks, on the
            first.

    Raises:
        UserError: for a user's mistake that only a stage can see, such as a corpus without
            documents; for settings that would make an expensive stage anew without `redo`; on
            several ranks, if the stages before pretraining are not finished.
    """
    until, stages = until or experiment.until, stages_of(experiment)
    check_redo(stages, redo)
    check_run_folder(folder)
    check_before_stages(experiment, folder, until=until)
    rank = current_rank()
    together = trained_together(experiment, folder, until, rank.count) if rank else []

    def bring(run: RunFolder, last: str | None) -> dict[str, float]:
        make_folder(folder, "run")
        with remembered(folder / DIGESTS) as keep_digests:

            def begin() -> None:
                write_config(experiment, folder)
                keep_digests()
                accepted()

            return run_stages(stages, run, folder, _say, until=last, redo=redo, accepted=begin)

    def refuse_at_once() -> None:
        """Refuse what a later stage would refuse before an earlier one trains for hours."""
        if folder.is_dir():
            last = stages if until is None else stages[: number_of(stages, until, "until") + 1]
            with remembered(folder / DIGESTS):
                check_unasked(last, RunFolder(experiment, folder, best_device()), folder, redo)

    # On several ranks: before each stage that they train together, the first rank makes those
    # that one process makes, while the others wait.
    for name in together:
        alone = stages[number_of(stages, name, "until") - 1].name

        def before(
            last: str = alone,
            shared: bool = name == "pretraining",
            begins: bool = name == together[0],
        ) -> None:
            if begins:
                refuse_at_once()
            # The parts of a larger corpus take hours; ranks must not wait for them.
            if not (shared and is_shared_out(experiment)):
                bring(RunFolder(experiment, folder, best_device()), last)

        with joined(rank, experiment.training.timeout_seconds, before=before) as ranks:
            _train_together(experiment, folder, name, ranks, redo, bring)
    if rank and (rank.number > 0 or until in together):
        return

    # Whatever is left is made by one process.
    run = RunFolder(experiment, folder, best_device())
    seconds = bring(run, until)
    if "evaluation" in seconds:
        print("\n".join(publish(run, seconds)))
    elif "reconstruction" in seconds and len(run.corpus.rows("held_out")):
        print(f"report: {(folder / 'reconstruction' / 'report.html').resolve().as_uri()}")


def trained_together(
    experiment: Experiment, folder: Path, until: str | None, ranks: int
) -> list[str]:
    """The stages up to `until` that several ranks train together.

    A stage whose batch the ranks cannot share evenly is trained by the first rank alone.
    """
    run, stages = RunFolder(experiment, folder, torch.device("cpu")), stages_of(experiment)
    batches = {
        "image_tokenizer": experiment.image_tokenizer_training,
        "retriever": experiment.retriever_training,
    }
    found = []
    for stage in stages:
        if not (stage.trains(run) and _reaches(stages, stage.name, until)):
            continue
        config = batches.get(stage.name)
        if config is None or config.batch_size % ranks == 0:
            found.append(stage.name)
    return found


def check_before_stages(
    experiment: Experiment, folder: Path, *, until: str | None = None, found: Sequence[str] = ()
) -> None:
    """`check_settings` for the stages of an experiment up to `until`, or else to its own last one.

    Raises:
        UserError: naming all mistakes, including those in `found`.
    """
    until, stages = until or experiment.until, stages_of(experiment)
    # A later start need not read again what evaluations ask about.
    known = remembered(folder / DIGESTS) if (folder / DIGESTS).is_file() else nullcontext()
    with known:
        check_settings(
            experiment,
            folder,
            trains=_reaches(stages, "pretraining", until),
            asks=_reaches(stages, "evaluation", until),
            found=found,
        )


def _reaches(stages: Sequence[Stage[RunFolder]], name: str, until: str | None) -> bool:
    return until is None or number_of(stages, until, "until") >= number_of(stages, name, "until")


def _train_together(
    experiment: Experiment,
    folder: Path,
    name: str,
    ranks: Ranks,
    redo: Collection[str],
    bring: Callable[[RunFolder, str | None], dict[str, float]],
) -> None:
    """Bring a stage that trains up to date on all ranks; the first rank keeps the run folder."""
    run = RunFolder(experiment, folder, ranks.device, ranks)
    stages = stages_of(experiment)
    number = number_of(stages, name, "until")
    before = stages[:number]
    missing, needed, refusal = None, False, ""
    if ranks.first:
        make_folder(folder, "run")
        with remembered(folder / DIGESTS):
            missing, _ = first_unfinished(before, run, folder)
            needed = not missing and not is_finished(stages[number], before, run, folder)
            try:
                check_unasked(stages[: number + 1], run, folder, redo)
            except UserError as error:  # raised on all ranks below, so that none waits
                refusal = str(error)

    # All ranks act on what the first one found.
    missing, needed, refusal = ranks.gather((missing, needed, refusal))[0]
    if refusal:
        raise UserError(refusal)
    if missing:
        raise UserError(
            f"stage {missing} is not finished in {folder} with these settings, and one process "
            "makes it: run the same command once without torchrun or srun, with "
            f"until={before[-1].name}"
        )
    if ranks.first:
        bring(run, name)
    elif needed:
        stages[number].make(run, folder / name)


def run_stage_part(
    experiment: Experiment, folder: Path, stage: str, part: Part, *, redo: Collection[str] = ()
) -> None:
    """Make one worker's share of a stage's shards.

    Raises:
        UserError: for an unknown stage, one that workers cannot share, or one that needs a stage
            which is not finished.
    """
    run = RunFolder(experiment, folder, best_device())
    with remembered(folder / DIGESTS) if folder.is_dir() else nullcontext():
        run_part(stages_of(experiment), stage, run, folder, part, redo=redo)


def write_config(experiment: Experiment, folder: Path) -> None:
    """Write the settings of an experiment beside its stages, atomically.

    Paths are absolute, and secrets are masked.
    """
    settings = without_secrets(recorded_settings(experiment))
    write_text(folder / CONFIG, dump_yaml(settings))


def _say(line: str) -> None:
    print(line, flush=True)
