"""Several seeds of one study: each run is made once for every seed, and figures show how they vary.

With `seeds: 3` a study that has the run `model` also has `model-seed_1` and `model-seed_2`. Their
experiments differ from the first one's only in the seed. If the first one refers to a run of the
study (`training.start: {run}/pretrain`), they refer to the run of their own seed:

    pretrain          tuned           seed 0, or the one that the experiment sets
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
from cm3leon.evaluation.metrics import over_runs, wilson

DRAWS = 2**20
"""Distance between the sampling seeds of neighbouring study seeds: more than there are items."""
PARTS = ("metrics", "ceiling", "chance")
"""Groups of figures in the result of a row."""
SHARES = ("all_documents", "truncated")
"""Single figures in the result of a row, if it has them."""
_COPY = re.compile(r"(.+)-seed_\d+")


def name_of(name: str, seed: int) -> str:
    """The name of a run's copy with another seed; with the first seed its own name."""
    return name if seed == 0 else f"{name}-seed_{seed}"


def first_runs(names: Collection[str]) -> list[str]:
    """The runs of the first seed: those that are not copies of another run in `names`."""
    first = []
    for name in names:
        match = _COPY.fullmatch(name)
        if not (match and match[1] in names):
            first.append(name)
    return first


def of_seed(content: Any, names: Collection[str], folder: Path, seed: int) -> Any:
    """The content with every path into the folder of one of the runs `names` moved to its copy's,
    also where it is a key, as in `shards.mix`."""
    if isinstance(content, Mapping):
        moved = {}
        for key, value in content.items():
            moved[of_seed(key, names, folder, seed)] = of_seed(value, names, folder, seed)
        return moved
    if isinstance(content, list):
        return [of_seed(each, names, folder, seed) for each in content]
    if not isinstance(content, str | Path):
        return content

    try:
        name, *rest = Path(content).relative_to(folder).parts
    except ValueError:  # not a path inside the study's folder
        return content
    if name not in names:
        return content
    return type(content)(folder.joinpath(name_of(name, seed), *rest))


def row_of_seed(row: Row, names: Collection[str], folder: Path, seed: int) -> Row:
    """The row as it is asked for a seed: of that seed's run, with other draws."""
    if seed == 0:
        return row
    setting = replace(
        row.setting,
        seed=row.setting.seed + seed * DRAWS,
        bank=of_seed(row.setting.bank, names, folder, seed),
        ranker=of_seed(row.setting.ranker, names, folder, seed),
    )
    moved = of_seed(row.folder, names, folder, seed)
    return replace(row, name=name_of(row.name, seed), folder=moved, setting=setting)


def over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the results of a row for all seeds; what is not a figure is the first seed's."""
    first = dict(results[0])
    if len(results) == 1:
        return first

    # Figures that every seed has.
    for part in PARTS:
        if part not in first:
            continue
        combined = {}
        for name in first[part]:
            figures = [result[part][name] for result in results if name in result[part]]
            if len(figures) == len(results):
                combined[name] = _combined(figures)
        first[part] = combined

    for share in SHARES:
        if share in first:
            first[share] = _combined([result[share] for result in results])
    first["seconds"] = sum(result["seconds"] for result in results)
    return first


def own_over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine what runs with the same settings wrote of their own evaluations, one mapping a seed:
    the rows of each evaluation, and the judge's figures."""
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for name in results[0]["evaluations"]:
        of_seeds = [result["evaluations"][name] for result in results]
        evaluations[name] = [over_seeds(rows) for rows in zip(*of_seeds, strict=True)]
    judge = dict(results[0]["judge"] or {})
    if len(results) > 1:
        for name in judge:
            judge[name] = _combined([result["judge"][name] for result in results])
    return {"judge": judge, "evaluations": evaluations}


def _combined(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of a figure over the seeds, with its interval over items and its spread over runs.

    The interval over items (`low`, `high`) is the mean of the runs' intervals: how well one run is
    known.
    """
    values, lows, highs = [], [], []
    for figure in figures:
        values.append(figure["value"])
        lows.append(figure["low"])
        highs.append(figure["high"])

    # Student's t knows no bounds; a share is between 0 and 1.
    runs = over_runs(values)
    if all(map(_is_share, figures)):
        runs = replace(runs, low=max(0.0, runs.low), high=min(1.0, runs.high))
    return {
        **figures[0],
        "value": float(np.mean(values)),
        "low": float(np.mean(lows)),
        "high": float(np.mean(highs)),
        "runs": {"values": values, **asdict(runs)},
    }


def _is_share(figure: Mapping[str, Any]) -> bool:
    """Whether a figure is a share of its items, as its interval tells."""
    if not figure.get("n") or not 0 <= figure["value"] <= 1:
        return False
    return (figure["low"], figure["high"]) == wilson(figure["value"], figure["n"])
