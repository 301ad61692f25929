"""Experiments as files: found by name or path, overridden, and checked section by section."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from cm3leon.config import (
    SHIPPED,
    Override,
    Settings,
    apply_overrides,
    choices,
    component_sections,
    from_mapping,
    load_yaml,
    parse_override,
    settled,
    split_key,
)
from cm3leon.experiment.sections import Experiment
from cm3leon.registry import (
    discover,
    is_known_plugin,
)
from cm3leon.types import UserError

EARLIER = ("tasks", "task_decoders", "generation", "metrics")
"""Sections of earlier versions, which `evaluations` has replaced."""
EARLIER_TEXT_TOKENIZER = {"pattern": "words"}
"""Of runs from before there was a choice, which do not say it."""
SWEEP = "sweep"
"""Section of dotted keys and the values that they take in turn; it makes an experiment a sweep."""
SEEDS = "seeds"
"""Setting of a study: how many seeds each of its runs is made with."""


@dataclass(kw_only=True)
class Entry:
    """An experiment as experiments.yaml lists it."""

    file: Path
    """YAML file of the experiment, relative to experiments.yaml."""

    cost: str
    """Hardware and time it takes, in one line."""

    expect: str
    """The numbers to expect, in one line."""

    overrides: Annotated[dict[str, Any], Settings(Experiment)] = field(default_factory=dict)
    """Dotted keys, and the values that replace those in the file."""


def list_experiments(shipped: Path = SHIPPED) -> dict[str, Entry]:
    """The entries of experiments.yaml by name.

    Raises:
        UserError: for a broken experiments.yaml.
    """
    entries = {}
    for name, entry in load_yaml(shipped / "experiments.yaml").items():
        entries[name] = from_mapping(Entry, entry, f"experiments.yaml: {name}")
    return entries


def experiment_name(name_or_path: str) -> str:
    """The name of an experiment: `digits` for both `digits` and `mine/digits.yaml`."""
    return Path(name_or_path).stem if _is_path(name_or_path) else name_or_path


class Reading(TypedDict, total=False):
    """How the file of an experiment is read, for a caller that has more to say than a command
    line."""

    settings: Mapping[str, Any] | None
    """Dotted keys with their values, under the overrides of the command line."""
    trusted_plugins: Sequence[str | Path] | None
    """All plugins that may be loaded, see `load_plugins`; None trusts the file that is named."""
    sections: Mapping[str, Any] | None
    """Whole ones that take the place of the file's."""
    earlier: bool
    """Leave out what earlier versions asked of a model, and say what they did not: for their runs."""


def load_experiment(
    name_or_path: str,
    overrides: Sequence[str] = (),
    shipped: Path = SHIPPED,
    *,
    unfit: list[str] | None = None,
    **reading: Unpack[Reading],
) -> Experiment:
    """Find an experiment, apply `key=value` overrides, load its plugins, and check it.

    The command line's overrides win over those of experiments.yaml, which win over the file. Among
    them, `overrides=smoke` stands for all the dotted keys in `experiments/overrides/smoke.yaml`,
    and `overrides=mine.yaml` for those of a file of one's own.

    Args:
        name_or_path: a name in experiments.yaml, or the path of a YAML file.
        unfit: given what does not go together, in place of an error, by a caller that checks more
            (`stages/checks.py`).

    Raises:
        UserError: for an unknown experiment, a sweep, a mistake in the file or the overrides, or a
            plugin that is not trusted.
        PluginError: for a plugin that fails to import.
    """
    mapping = load_mapping(name_or_path, overrides, shipped, **reading)
    if SWEEP in mapping:
        raise UserError(
            f"experiment: {name_or_path} is a sweep, which only the command run takes; give the "
            "experiment of one of its points"
        )
    return from_mapping(Experiment, mapping, unfit=unfit)


def load_mapping(
    name_or_path: str,
    overrides: Sequence[str] = (),
    shipped: Path = SHIPPED,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """What `load_experiment` checks: the sections as they are written, with those of a sweep,
    if it is one."""
    # The command line comes last, so that it has the last word.
    given: list[Override] = []
    for key, value in (reading.get("settings") or {}).items():
        given.append((split_key(key), value))
    given += overrides_of(overrides, shipped)
    _, mapping = load_listed(name_or_path, shipped, given)
    if _is_study(mapping):
        raise UserError(
            f"experiment: {name_or_path} is a study of several runs; give the experiment of one of "
            "them"
        )
    if SEEDS in mapping:
        raise UserError(
            f"{SEEDS}: {name_or_path} is a single run, of which only the command run makes several "
            f"seeds: python -m cm3leon.run experiment={name_or_path} {SEEDS}={mapping[SEEDS]}"
        )
    mapping = with_absolute_plugins({**mapping, **(reading.get("sections") or {})}, Path.cwd())

    # A run of an earlier version has sections that are gone, and lacks a choice that is new.
    if reading.get("earlier"):
        for section in EARLIER:
            mapping.pop(section, None)
        text_tokenizer = mapping.get("text_tokenizer", {})
        if isinstance(text_tokenizer, Mapping):
            mapping["text_tokenizer"] = {**EARLIER_TEXT_TOKENIZER, **text_tokenizer}
    _refuse_earlier(name_or_path, mapping)

    # Plugins first: they register what the sections name.
    trusted = reading.get("trusted_plugins")
    if trusted is not None:
        mapping["plugins"] = load_plugins(
            mapping.get("plugins", []), trusted, f"{name_or_path}: plugins"
        )
    discover(mapping.get("plugins", []))

    # Swept values are left as they are: their types are those of their keys (`cm3leon.studies`).
    swept = {SWEEP: mapping.pop(SWEEP)} if SWEEP in mapping else {}
    written = settled(Experiment, mapping)
    if written.get("shards", {}) is None:  # as earlier versions wrote it
        del written["shards"]
    return {**written, **swept}


def load_plugins(named: Sequence[str], trusted: Sequence[str | Path], where: str) -> list[str]:
    """Load the trusted plugins, which must include all plugins that somebody's file names.

    A named plugin passes if it is trusted, has the file name of a trusted one (which replaces it:
    the run may come from another machine), lies in `plugins/`,
    or was loaded before in this process.

    Returns:
        The absolute paths of all.

    Raises:
        UserError: for a named plugin that is not trusted.
        PluginError: for a plugin that fails to import.
    """
    given = [str(Path(path).expanduser().resolve()) for path in trusted]
    replaced = {Path(path).name for path in given}
    others = []
    for path in named:
        if Path(path).name in replaced:
            continue
        if not is_known_plugin(Path(path)):
            raise UserError(
                f"{where} names {path}, whose code is not run unasked; if you trust it, add "
                f"plugins={path}, or trust=true for every plugin named there"
            )
        others.append(path)

    # Nothing is imported before all of them are known to be trusted.
    discover(given)
    return [*others, *given]


def is_study(name_or_path: str, shipped: Path = SHIPPED) -> bool:
    """Whether an experiment is made of several runs, see `cm3leon.studies`.

    Raises:
        UserError: for an unknown experiment.
    """
    file, _ = _find(name_or_path, shipped)
    return _is_study(load_yaml(file))


def asks_for_seeds(overrides: Sequence[str], shipped: Path = SHIPPED) -> bool:
    """Whether a command line says `seeds=N`, by which a single run becomes a study of its seeds."""
    return any(path == (SEEDS,) for path, _ in overrides_of(overrides, shipped))


def _is_study(mapping: Mapping[str, Any]) -> bool:
    """Whether a mapping is a study's: it has runs, or evaluations of models and no corpus."""
    return "runs" in mapping or ("evaluations" in mapping and "data" not in mapping)


def _refuse_earlier(name_or_path: str, mapping: Mapping[str, Any]) -> None:
    """Raise UserError for sections of an earlier version, saying what to write instead."""
    found = [section for section in EARLIER if section in mapping]
    if found:
        raise UserError(
            f"{name_or_path} has sections of earlier versions: {', '.join(found)}; write what the "
            "model is asked as evaluations, for example evaluations={caption: {title: Captions, "
            "protocol: {name: corpus, task: caption}}} (docs/evaluation.md)"
        )


def is_sweep(name_or_path: str, overrides: Sequence[str] = (), shipped: Path = SHIPPED) -> bool:
    """Whether an experiment is run at several points, see `cm3leon.studies`.

    Raises:
        UserError: for an unknown experiment.
    """
    file, listed = _find(name_or_path, shipped)
    sections = [key.partition(".")[0] for key in listed]
    sections += [path[0] for path, _ in overrides_of(overrides, shipped)]
    return SWEEP in sections or SWEEP in load_yaml(file)


def load_listed(
    name_or_path: str, shipped: Path, overrides: Sequence[Override]
) -> tuple[Path, dict[str, Any]]:
    """The file of an experiment, and its content with the overrides of experiments.yaml and the
    given ones.

    Raises:
        UserError: for an unknown experiment, or overrides that lead nowhere.
    """
    file, listed = _find(name_or_path, shipped)
    mapping = with_absolute_plugins(load_yaml(file), file.parent)

    # Plugins are named relative to the file that names them.
    own = [(split_key(key), value) for key, value in listed.items()]
    mapping = with_overrides(mapping, own)
    mapping = with_absolute_plugins(mapping, shipped)
    return file, with_overrides(mapping, overrides)


def split_setting(key: str) -> tuple[str, ...]:
    """The path of a setting by its dotted key; what stands behind `sweep` is one part of it."""
    ((path, _),) = _of_sweep([(split_key(key), None)])
    return path


def with_overrides(mapping: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """The content of an experiment, a sweep or a study with overrides.

    Raises:
        UserError: for overrides that lead nowhere.
    """
    return apply_overrides(mapping, _of_sweep(overrides), component_sections(Experiment))


def _of_sweep(overrides: Iterable[Override]) -> Iterator[Override]:
    """The overrides with everything behind `sweep` as one key, which is a dotted key of the sweep.

    `sweep` is a section of an experiment, and of each run and evaluation
    (`evaluations.NAME.sweep.KEY`).
    """
    for path, value in overrides:
        at = 2 if path[0] in ("runs", "evaluations") else 0
        if path[at : at + 1] == (SWEEP,) and len(path) > at + 1:
            path = (*path[: at + 1], ".".join(path[at + 1 :]))
        yield path, value


def _find(name_or_path: str, shipped: Path) -> tuple[Path, Mapping[str, Any]]:
    """The YAML file of an experiment, and its overrides in experiments.yaml."""
    if _is_path(name_or_path):
        return Path(name_or_path).expanduser(), {}
    entries = list_experiments(shipped)
    if name_or_path not in entries:
        raise UserError(
            f"experiment is {name_or_path}, which is not known; {choices(name_or_path, entries)}"
        )
    entry = entries[name_or_path]
    return shipped / entry.file, entry.overrides


def overrides_of(words: Sequence[str], shipped: Path = SHIPPED) -> Iterator[Override]:
    """The overrides of a command line, including those of the files that it names.

    Raises:
        UserError: for a word that is not an override, and `overrides=` of an unknown name.
    """
    for word in words:
        key, _, value = word.partition("=")
        if key != "overrides":
            yield parse_override(word)
            continue

        # overrides=NAME, or overrides=FILE.yaml.
        folder = shipped / "experiments" / "overrides"
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        if not _is_path(value) and value not in names:
            raise UserError(
                f"overrides is {value}, which is not known; {choices(value, names)}, or a .yaml "
                "file"
            )
        file = Path(value).expanduser() if _is_path(value) else folder / f"{value}.yaml"
        for name, setting in load_yaml(file).items():
            yield split_key(name), setting


def _is_path(name_or_path: str) -> bool:
    return name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path


def with_absolute_plugins(mapping: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The mapping with absolute paths of its plugins, so that its copy may lie anywhere."""
    if "plugins" not in mapping:
        return mapping
    plugins = from_mapping(_Plugins, {"plugins": mapping["plugins"]}).plugins
    absolute = []
    for path in plugins:
        absolute.append(str((folder / Path(path).expanduser()).resolve()))
    return {**mapping, "plugins": absolute}


@dataclass(kw_only=True)
class _Plugins:
    """The section that is read before the others can be checked."""

    plugins: list[str] = field(default_factory=list)
    """As in `Experiment`."""
