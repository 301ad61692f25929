"""Experiments: everything that a run fixes, found by name or path,
overridden and checked section by section."""

from cm3leon.experiment.files import (
    SEEDS,
    SWEEP,
    asks_for_seeds,
    experiment_name,
    is_study,
    is_sweep,
    list_experiments,
    load_experiment,
    load_listed,
    load_mapping,
    load_plugins,
    overrides_of,
    with_absolute_plugins,
    with_overrides,
)
from cm3leon.experiment.sections import Experiment, ShardsConfig, SplitConfig, row_name

__all__ = [
    "SEEDS",
    "SWEEP",
    "Experiment",
    "ShardsConfig",
    "SplitConfig",
    "asks_for_seeds",
    "experiment_name",
    "is_study",
    "is_sweep",
    "list_experiments",
    "load_experiment",
    "load_listed",
    "load_mapping",
    "load_plugins",
    "overrides_of",
    "row_name",
    "with_absolute_plugins",
    "with_overrides",
]
