"""Draw the validation perplexity of runs against their updates, as the paper's figure 3.

python -m cm3leon.run perplexity runs=[runs/short,runs/long] out=perplexity.png
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from cm3leon.config import PositiveInt, load_yaml
from cm3leon.io import check_shape, read_json_lines
from cm3leon.paths import make_folder, path_of
from cm3leon.types import UserError

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(kw_only=True)
class Options:
    """Options of the command perplexity."""

    runs: list[str]
    """A list of run folders with validation figures; a run that goes on from another one
    (training.start_with=everything) is drawn as its continuation."""
    out: Path = Path("perplexity.png")
    """File of the plot, .png, .svg or .pdf; the numbers go beside it as .csv."""
    of: str = "loss"
    """The loss whose perplexity is drawn: loss, loss_text, loss_image, or loss/NAME for a corpus of
    a mixture."""
    by: Literal["updates", "tokens", "epochs"] = "updates"
    """The horizontal axis."""
    width: PositiveInt = 1000
    """Width of the plot in pixels."""

    def check(self) -> None:
        if not self.runs:
            raise UserError("runs is empty; write runs=[DIR,DIR], for example runs=[runs/digits]")
        if self.out.suffix not in SUFFIXES:
            raise UserError(f"out is {self.out}; its name must end in one of {', '.join(SUFFIXES)}")


@dataclass(frozen=True)
class Validation:
    """One validation of a run: a point of its curve."""

    run: str
    updates: int
    tokens: int
    """Positions trained on; padding counts."""
    epochs: float
    perplexity: float


@dataclass(frozen=True)
class Curve:
    """The validations of a run, after those of the runs that it continues."""

    name: str
    points: tuple[Validation, ...]

    def junctions(self) -> Iterator[tuple[Validation, Validation]]:
        """Where a run continues another: the last point before, and the first one after."""
        for one, other in pairwise(self.points):
            if one.run != other.run:
                yield one, other

    def epoch_ends(self) -> Iterator[tuple[Validation, Validation]]:
        """Where an epoch ends: the last point before, and the first one after."""
        for one, other in pairwise(self.points):
            if math.floor(other.epochs) > math.floor(one.epochs):
                yield one, other


def main(options: Options) -> None:
    """Draw the runs' validation perplexity, write the numbers beside it, and print the last ones.

    Raises:
        UserError: for runs without validation figures, or a mistake in the options.
    """
    curves = curves_of([path_of(run, "runs") for run in options.runs], options.of)
    make_folder(options.out.parent, "out")
    draw(curves, options)

    numbers = options.out.with_suffix(".csv")
    with numbers.open("w", newline="") as file:
        columns = ["curve", "run", "updates", "tokens", "epochs", "perplexity"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for curve in curves:
            for point in curve.points:
                row = asdict(point) | {"curve": curve.name, "epochs": f"{point.epochs:.4f}"}
                writer.writerow(row)

    for curve in curves:
        last = curve.points[-1]
        print(
            f"{curve.name}: {last.perplexity:.4g} after {last.updates:,} updates, "
            f"{last.epochs:.3g} epochs"
        )
    print(f"picture: {options.out}\nnumbers: {numbers}")


def curves_of(folders: Sequence[Path], of: str) -> list[Curve]:
    """A curve for each run, except for runs that another of the given runs continues.

    Of runs A, B and C, where B continues A, there are two curves: A then B, and C.

    Raises:
        UserError: for a folder that is not a run, or does not have this loss.
    """
    chains = [_chain(folder) for folder in folders]
    continued: set[Path] = set()
    for chain in chains:
        continued.update(folder.resolve() for folder in chain[:-1])

    names = _names(folders)
    curves = []
    for chain in chains:
        if chain[-1].resolve() not in continued:
            curves.append(Curve(names[chain[-1]], _points(chain, of)))
    return curves


def _chain(folder: Path) -> list[Path]:
    """The run and the runs that it continues, the first one first."""
    chain = [folder]
    while start := _predecessor_of(chain[0]):
        chain.insert(0, start)
    return chain


def _predecessor_of(folder: Path) -> Path | None:
    """The run that a run continues; None if it starts anew, or with the weights alone."""
    training = _settings(folder).get("training", {})
    if training.get("start_with") != "everything":
        return None
    return Path(training["start"])


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The folders' names, or their whole paths where two have the same name."""
    last = [folder.resolve().name for folder in folders]
    names = {}
    for folder, name in zip(folders, last, strict=True):
        names[folder] = name
        if last.count(name) > 1:
            names[folder] = str(folder)
    return names


def _points(chain: Sequence[Path], of: str) -> tuple[Validation, ...]:
    """The validations of a run, after those of the runs that it continues.

    Tokens are summed run by run, as each may have another batch.
    """
    points, updates, tokens = [], 0, 0
    for folder in chain:
        tokens_per_step = _tokens_per_step(folder)
        for line in _validations(folder, of):
            tokens += (line["step"] - updates) * tokens_per_step
            updates = line["step"]
            perplexity = math.exp(min(line[of], 700))  # beyond 709, exp overflows
            points.append(Validation(str(folder), updates, tokens, line["epoch"], perplexity))
    return tuple(points)


def _validations(folder: Path, of: str) -> list[dict[str, Any]]:
    """The lines of a run's validations that have this loss.

    Raises:
        UserError: if there are none.
    """
    file = _existing(folder / "pretraining" / "validation.jsonl", folder)
    lines = read_json_lines(file, {"step": int, "epoch": (int, float)})
    if not lines:
        raise UserError(
            f"runs: {file} has no records yet; the first is written at step training.callback_every"
        )

    found = [line for line in lines if of in line]
    if not found:
        known = [name for name in lines[0] if name.startswith("loss")]
        raise UserError(f"of is {of}, which {file} does not have; it has {', '.join(known)}")
    return found


def _tokens_per_step(folder: Path) -> int:
    config = _settings(folder)
    shape = {"training": {"batch_tokens?": int, "batch_size": int}, "model": {"seq_len": int}}
    check_shape(config, shape, str(folder / "config.yaml"))
    training = config["training"]
    return training.get("batch_tokens") or training["batch_size"] * config["model"]["seq_len"]


def _settings(folder: Path) -> dict[str, Any]:
    """The sections of a run; of a finished stage, as it was made."""
    from cm3leon.stages.generations import finished_settings

    return {**load_yaml(_existing(folder / "config.yaml", folder)), **finished_settings(folder)}


def _existing(file: Path, folder: Path) -> Path:
    if not file.is_file():
        raise UserError(
            f"runs: {folder} is not the folder of a run with validation figures: {file} is missing"
        )
    return file


def draw(curves: Sequence[Curve], options: Options) -> None:
    """Draw a curve for each run: a ring where an epoch begins, a bar where a run continues."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        figsize=(options.width / 100, options.width / 160), dpi=100, layout="constrained"
    )
    for number, curve in enumerate(curves):
        color = f"C{number % 10}"
        at = [getattr(point, options.by) for point in curve.points]
        perplexities = [point.perplexity for point in curve.points]
        axes.plot(at, perplexities, color=color, label=curve.name, linewidth=1.6)

        # A dotted line and a ring where an epoch begins, labelled a row lower for each curve.
        for _, point in curve.epoch_ends():
            x = getattr(point, options.by)
            axes.axvline(x, color=color, linestyle=":", linewidth=1)
            axes.plot(x, point.perplexity, "o", color=color, markerfacecolor="white", markersize=6)
            axes.annotate(
                f"epoch {math.floor(point.epochs) + 1}",
                (x, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -10 - 11 * number),
                textcoords="offset points",
                color=color,
                fontsize=8,
            )

        # A bar where a run continues another.
        for _, point in curve.junctions():
            axes.plot(
                getattr(point, options.by),
                point.perplexity,
                "|",
                color=color,
                markersize=14,
                markeredgewidth=1.6,
            )

    # Perplexities fall fast, then slowly: a logarithmic axis, with plain numbers on it.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(
        mpl.ticker.LogFormatter(minor_thresholds=(2, 0.8), labelOnlyBase=False)
    )

    across = {"updates": "updates", "tokens": "tokens (padding counted)", "epochs": "epochs"}
    axes.set_xlabel(across[options.by])
    what = {"loss": "", "loss_text": " of text", "loss_image": " of images"}
    axes.set_ylabel(f"validation perplexity{what.get(options.of, f', {options.of}')}")
    axes.grid(which="both", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)

    # An empty line explains the bars in the legend.
    if any(list(curve.junctions()) for curve in curves):
        axes.plot(
            [],
            [],
            "|",
            color="gray",
            markersize=10,
            label="continued, with the learning rate raised again",
        )
    axes.legend(framealpha=0.9, edgecolor="none")

    figure.savefig(options.out)
    plt.close(figure)
