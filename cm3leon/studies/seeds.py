"""Several seeds of one study: each run is made once for every seed,
and each figure says how it varies.

With `seeds: 3` a study that has the run `model` has the runs `model-seed_1` and `model-seed_2` too.
Their experiments differ from the first one's in the seed alone, and where the first refers to a run
of the study (`training.start: {run}/pretrain`), they refer to that run of their own seed:

    pretrain          tuned           seed 0 of the experiment, or the one that is set for it
    pretrain-seed_1   tuned-seed_1    that seed + 1
    pretrain-seed_2   tuned-seed_2    that seed + 2
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.evaluate import Row
from cm3leon.evaluation.metrics import over_runs

DRAWS = 2**20
"""Distance between the first seeds of sampling of one seed and the next:
more than items there are."""
PARTS = ("metrics", "ceiling", "chance")
"""Groups of figures in the result of a row."""
SHARES = ("all_documents", "truncated")
"""Figures that stand by themselves in the result of a row, where it has them."""
_COPY = re.compile(r"(.+)-seed_\d+")


def name_of(name: str, seed: int) -> str:
    """The name of a run's copy with another seed; the first one keeps its own."""
    return name if seed == 0 else f"{name}-seed_{seed}"


def first_runs(names: Collection[str]) -> list[str]:
    """The runs of the first seed: those that are not copies of another run in `names`."""
    copies = [name for name in names if (match := _COPY.fullmatch(name)) and match[1] in names]
    return [name for name in names if name not in copies]


def of_seed(content: Any, names: Collection[str], folder: Path, seed: int) -> Any:
    """The content with every path in the folder of one of the runs `names` moved to its copy's."""
    if isinstance(content, Mapping):
        return {key: of_seed(value, names, folder, seed) for key, value in content.items()}
    if isinstance(content, list):
        return [of_seed(each, names, folder, seed) for each in content]
    if not isinstance(content, str | Path):
        return content

    try:
        name, *rest = Path(content).relative_to(folder).parts
    except ValueError:  # it is no path in the study's folder, or that folder itself
        return content
    return type(content)(folder.joinpath(name_of(name, seed), *rest)) if name in names else content


def row_of_seed(row: Row, names: Collection[str], folder: Path, seed: int) -> Row:
    """The row as it is asked for a seed: of that seed's run, with other draws."""
    if seed == 0:
        return row
    setting = replace(
        row.setting,
        seed=row.setting.seed + seed * DRAWS,
        bank=of_seed(row.setting.bank, names, folder, seed),
    )
    moved = of_seed(row.folder, names, folder, seed)
    return replace(row, name=name_of(row.name, seed), folder=moved, setting=setting)


def over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of a row out of those of its seeds;
    what is no figure is that of the first seed."""
    first = dict(results[0])
    if len(results) == 1:
        return first
    for part in PARTS:
        if part in first:
            first[part] = {
                name: _combined([result[part][name] for result in results])
                for name in first[part]
                if all(name in result[part] for result in results)
            }
    for share in SHARES:
        if share in first:
            first[share] = _combined([result[share] for result in results])
    first["seconds"] = sum(result["seconds"] for result in results)
    return first


def _combined(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of a figure over the seeds, with its interval over items and what it is over runs.

    The interval over items (`low`, `high`) is the mean of those of the runs:
    how well one run is known.
    """
    values = [figure["value"] for figure in figures]
    return {
        **figures[0],
        "value": float(np.mean(values)),
        "low": float(np.mean([figure["low"] for figure in figures])),
        "high": float(np.mean([figure["high"] for figure in figures])),
        "runs": {"values": values, **asdict(over_runs(values))},
    }
