"""Print a training sample as the paper's figures 8 and 9 do, and write a page with its images.

    python -m cm3leon.run show experiment=digits
    python -m cm3leon.run show experiment=digits sample=17 epoch=2 packing.method=stream

`sample` counts the samples of an epoch in the order of the stream: in a batch of B blocks, block l
holds samples l, l + B, l + 2B ... The sample is drawn, corrupted and packed by the objects that
training uses, from the same seeds. The model plays no part in it, and need not be trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cm3leon.commands.words import ExperimentRunOptions
from cm3leon.config import NonNegativeInt


@dataclass(kw_only=True)
class Options(ExperimentRunOptions):
    """Options of the command show."""

    sample: NonNegativeInt | None = None
    """Number of the sample in its epoch; null = the first one with a moved span."""
    epoch: NonNegativeInt = 0
    """Number of the epoch, from 0."""
    out: Path | None = None
    """File for the page; null = show/sample-N.html in the run folder."""


def main(options: Options) -> None:
    """Print the sample, and write its page.

    Raises:
        UserError: for a number out of range, or a stage before pretraining that is not finished.
    """
    from cm3leon.commands.sample import show
    from cm3leon.experiment import load_experiment

    experiment = load_experiment(options.experiment, options.overrides)
    folder = options.folder
    given = [f"run={options.run}"] if options.run else []
    show(
        experiment,
        folder,
        options.sample,
        epoch=options.epoch,
        out=options.out,
        again=[f"experiment={options.experiment}", *given, *options.overrides],
    )
