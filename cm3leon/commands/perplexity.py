"""Draw the paper's figure 3, validation perplexity against updates, of several runs in one plot.

python -m cm3leon.run perplexity runs=[runs/short,runs/long] out=perplexity.png
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """A list of run folders with validation figures; one that goes on from another (training.start_with=everything) is
    drawn as its continuation."""
    out: Path = Path("perplexity.png")
    """File of the picture, .png, .svg or .pdf; the numbers go beside it as .csv."""
    of: str = "loss"
    """Whose perplexity is drawn: loss, loss_text, loss_image, or that of a corpus of a mixture, as loss/NAME."""
    by: Literal["updates", "tokens", "epochs"] = "updates"
    """What is on the horizontal axis."""
    width: PositiveInt = 1000
    """Pixels of the picture's width."""

    def check(self) -> None:
        if not self.runs:
            raise UserError("runs is empty; write runs=[DIR,DIR]")
        if self.out.suffix not in SUFFIXES:
            raise UserError(f"out is {self.out}; its name must end in one of {', '.join(SUFFIXES)}")


@dataclass(frozen=True)
class Point:
    """One validation."""

    run: str
    updates: int
    tokens: int
    """Positions trained on; padding counts."""
    epochs: float
    perplexity: float


@dataclass(frozen=True)
class Curve:
    """The validations of a run, after those of the runs that it goes on from."""

    name: str
    points: tuple[Point, ...]

    def junctions(self) -> Iterator[tuple[Point, Point]]:
        """The last point of each run that was gone on from, and the first one after it."""
        return ((one, other) for one, other in pairwise(self.points) if one.run != other.run)

    def epoch_ends(self) -> Iterator[tuple[Point, Point]]:
        """The points around the end of the first epoch, and of every one after it."""
        return (
            (one, other)
            for one, other in pairwise(self.points)
            if math.floor(other.epochs) > one.epochs // 1
        )


def main(options: Options) -> None:
    """Draws the runs' validation perplexity, writes the numbers beside the picture, and prints where it ended.

    Raises:
        UserError: for runs without validation figures, or a mistake in the options.
    """
    curves = curves_of([path_of(run, "runs") for run in options.runs], options.of)
    make_folder(options.out.parent, "out")
    draw(curves, options)
    numbers = options.out.with_suffix(".csv")
    with numbers.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["curve", "run", "updates", "tokens", "epochs", "perplexity"])
        for curve in curves:
            writer.writerows(
                [
                    curve.name,
                    point.run,
                    point.updates,
                    point.tokens,
                    f"{point.epochs:.4f}",
                    point.perplexity,
                ]
                for point in curve.points
            )
    for curve in curves:
        last = curve.points[-1]
        print(
            f"{curve.name}: {last.perplexity:.4g} after {last.updates:,} updates, {last.epochs:.3g} epochs"
        )
    print(f"picture: {options.out}\nnumbers: {numbers}")


def curves_of(folders: Sequence[Path], of: str) -> list[Curve]:
    """A curve for each run, but none of its own for one that another of them goes on from.

    Raises:
        UserError: for a folder that is no run, or has no such figure.
    """
    chains = [_chain(folder) for folder in folders]
    earlier = {folder.resolve() for chain in chains for folder in chain[:-1]}
    names = _names(folders)
    return [
        Curve(names[chain[-1]], _points(chain, of))
        for chain in chains
        if chain[-1].resolve() not in earlier
    ]


def _chain(folder: Path) -> list[Path]:
    """The run and those that it goes on from, the first one first."""
    chain = [folder]
    while start := _goes_on_from(chain[0]):
        chain.insert(0, start)
    return chain


def _goes_on_from(folder: Path) -> Path | None:
    training = _settings(folder).get("training", {})
    return Path(training["start"]) if training.get("start_with") == "everything" else None


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The folders' names, or their whole paths where two have the same."""
    last = [folder.resolve().name for folder in folders]
    return {
        folder: name if last.count(name) == 1 else str(folder)
        for folder, name in zip(folders, last, strict=True)
    }


def _points(chain: Sequence[Path], of: str) -> tuple[Point, ...]:
    """The validations of a run after those of the ones that it goes on from; each has tokens of its own a step."""
    points, updates, tokens = [], 0, 0
    for folder in chain:
        of_a_step = _tokens_of_a_step(folder)
        for line in _validations(folder, of):
            tokens += (line["step"] - updates) * of_a_step
            updates = line["step"]
            points.append(
                Point(str(folder), updates, tokens, line["epoch"], math.exp(min(line[of], 700)))
            )
    return tuple(points)


def _validations(folder: Path, of: str) -> list[dict[str, Any]]:
    file = _existing(folder / "pretraining" / "validation.jsonl", folder)
    lines = read_json_lines(file, {"step": int, "epoch": (int, float)})
    if not lines:
        raise UserError(
            f"runs: {file} is empty; the first validation is at step training.callback_every"
        )
    found = [line for line in lines if of in line]
    if not found:
        known = [name for name in lines[0] if name.startswith("loss")]
        raise UserError(f"of is {of}, which {file} does not have; it has {', '.join(known)}")
    return found


def _tokens_of_a_step(folder: Path) -> int:
    config = _settings(folder)
    shape = {"training": {"batch_tokens?": int, "batch_size": int}, "model": {"seq_len": int}}
    check_shape(config, shape, str(folder / "config.yaml"))
    return (
        config["training"].get("batch_tokens")
        or config["training"]["batch_size"] * config["model"]["seq_len"]
    )


def _settings(folder: Path) -> dict[str, Any]:
    """The sections of a run as what is finished of it was made with them."""
    from cm3leon.stages.generations import finished_settings

    return {**load_yaml(_existing(folder / "config.yaml", folder)), **finished_settings(folder)}


def _existing(file: Path, folder: Path) -> Path:
    if not file.is_file():
        raise UserError(
            f"runs: {folder} is no run folder with validation figures, {file} is missing"
        )
    return file


def draw(curves: Sequence[Curve], options: Options) -> None:
    """The picture: a curve for each run, a ring where it begins another epoch, a break where it was gone on from."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        figsize=(options.width / 100, options.width / 160), dpi=100, layout="constrained"
    )
    for number, curve in enumerate(curves):
        color = f"C{number % 10}"
        at = [getattr(point, options.by) for point in curve.points]
        axes.plot(
            at,
            [point.perplexity for point in curve.points],
            color=color,
            label=curve.name,
            linewidth=1.6,
        )
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
        for _, point in curve.junctions():
            axes.plot(
                getattr(point, options.by),
                point.perplexity,
                "|",
                color=color,
                markersize=14,
                markeredgewidth=1.6,
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(
        mpl.ticker.LogFormatter(minor_thresholds=(2, 0.8), labelOnlyBase=False)
    )
    axes.set_xlabel(
        {"updates": "updates", "tokens": "tokens (padding counted)", "epochs": "epochs"}[options.by]
    )
    of = {"loss": "", "loss_text": " of text", "loss_image": " of images"}.get(
        options.of, f", {options.of}"
    )
    axes.set_ylabel(f"validation perplexity{of}")
    axes.grid(which="both", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
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
