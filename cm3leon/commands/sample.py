"""One training sample as training draws it, printed and as a page with its images.

cm3leon/commands/traced_sample.py draws it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from cm3leon.commands.sample_words import facts_of, printed
from cm3leon.commands.traced_sample import shown_sample
from cm3leon.evaluation.report.sample import (
    ShownSample,
    write_sample_page,
)
from cm3leon.experiment import Experiment
from cm3leon.stages.attribution import attribution
from cm3leon.stages.pipeline import first_unfinished
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.table import stages_of
from cm3leon.stages.training_data import (
    TrainingSamples,
    training_samples,
)
from cm3leon.terminal import command_line
from cm3leon.types import UserError

LOOKED_AT = 32
"""How many samples are searched for one with a moved span, if no number is given."""


def show(
    experiment: Experiment,
    folder: Path,
    sample: int | None = None,
    *,
    epoch: int = 0,
    out: Path | None = None,
    again: Sequence[str] = (),
) -> None:
    """Print a training sample, and write its page.

    Args:
        sample: its number in the epoch; None = the first one with a moved span.
        epoch: number of the epoch, from 0.
        out: file for the page; None = `show/sample-N.html` in the run folder.
        again: words of a command line that name the experiment, for the message about a stage that
            is not finished.

    Raises:
        UserError: for a number out of range, or a stage before pretraining that is not finished.
    """
    # On the CPU: training may be using the GPU, and there are only a few images to decode.
    run = RunFolder(experiment, folder, torch.device("cpu"))
    require_finished(run, again)
    samples = training_samples(run)

    first = epoch * samples.epoch
    if sample is None:
        number, shown = _first_with_spans(run, samples, first)
    else:
        if sample >= samples.epoch:
            raise UserError(
                f"sample is {sample}; write sample=N with a whole number N from 0 to "
                f"{samples.epoch - 1}"
            )
        number, shown = sample, shown_sample(run, samples, first + sample)

    facts = facts_of(run, samples, first + number, shown)
    print("\n".join(printed(shown, facts, width=min(shutil.get_terminal_size().columns, 120))))

    of_epoch = f"-epoch-{epoch}" if epoch else ""
    path = out or folder / "show" / f"sample-{number}{of_epoch}.html"
    try:
        write_sample_page(path, shown, facts, attribution([experiment]))
    except OSError as error:
        raise UserError(f"out: {path} cannot be written: {error.strerror}") from error
    print(f"\npage: {path}")


def _first_with_spans(
    run: RunFolder, samples: TrainingSamples, first: int
) -> tuple[int, ShownSample]:
    """The first sample of an epoch with a moved span, which shows what the objective does.

    If none of the first `LOOKED_AT` has one, as with an objective that moves none, the first one.

    Returns:
        Its number, and the sample.
    """
    for number in range(min(LOOKED_AT, samples.epoch)):
        shown = shown_sample(run, samples, first + number)
        if shown.spans:
            return number, shown
    return 0, shown_sample(run, samples, first)


def require_finished(run: RunFolder, again: Sequence[str]) -> None:
    """Check that the stages before pretraining are finished with these settings.

    Raises:
        UserError: if one is not; it says the command that makes it.
    """
    stages = stages_of(run.experiment)
    needed = stages[: [stage.name for stage in stages].index("pretraining")]
    missing, _ = first_unfinished(needed, run, run.folder)
    if missing:
        command = command_line(*again, f"until={needed[-1].name}")
        raise UserError(
            f"run: {run.folder} has no finished stage {missing} made with these settings; "
            f"make it with: {command}"
        )
