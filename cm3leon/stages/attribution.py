"""Whose images a page shows: the attribution that their licences require."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cm3leon.config import Component, load_yaml
from cm3leon.evaluation.config import EvaluationConfig
from cm3leon.experiment import Experiment
from cm3leon.records import KINDS
from cm3leon.registry import PROTOCOLS, SOURCES
from cm3leon.types import UserError


def attribution(
    experiments: Iterable[Experiment] = (),
    evaluations: Iterable[EvaluationConfig] = (),
    folders: Iterable[Path] = (),
) -> str:
    """What a page has to say about its images, one paragraph a licensor; "" if none requires it.

    Images come from the corpora of the runs; from corpora that they retrieve from, mix in or start
    with; and from what protocols ask about.

    Args:
        experiments: of runs whose images are shown.
        evaluations: whose items are shown.
        folders: of more runs whose images are shown.
    """
    said: list[str] = []
    opened: set[Path] = set()
    waiting = list(folders)
    for experiment in experiments:
        said += _of_component(experiment.data)
        shards = experiment.shards
        waiting += [Path(folder) for folder in (*shards.mix, shards.bank) if folder]
    for evaluation in evaluations:
        said += _of_protocol(evaluation.protocol)

    # Settings are read without opening the runs: attribution is due even if one cannot be opened.
    while waiting:
        folder = waiting.pop()
        if folder in opened:
            continue
        opened.add(folder)
        settings = _settings(folder)
        said += _of_source(settings.get("data"))
        section = settings.get("shards") or {}
        others = (*(section.get("mix") or ()), section.get("bank"))
        waiting += [Path(each) for each in others if each]
    return "\n\n".join(dict.fromkeys(filter(None, said)))


def _of_protocol(protocol: Component) -> Iterator[str]:
    yield from PROTOCOLS.get(protocol.name).attributions(protocol.config)
    data = getattr(protocol.config, "data", None)
    if isinstance(data, Component):
        yield from _of_component(data)


def _of_component(data: Component) -> Iterator[str]:
    yield from SOURCES.get(data.name).attributions(data.config)


def _of_source(data: Any) -> Iterator[str]:
    """What is due of a source by a run's file, also if its other settings are not understood."""
    name = data.get("name") if isinstance(data, dict) else None
    if name not in SOURCES.names():
        return
    try:
        yield from _of_component(SOURCES.check(data))
    except UserError:
        yield from SOURCES.get(name).attributions(None)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = load_yaml(folder / KINDS["run"])
    except (OSError, UserError):
        return {}
    return found if isinstance(found, dict) else {}
