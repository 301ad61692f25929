"""Experiments: everything that a run fixes, found by name or path,
overridden and checked section by section."""

from cm3leon.experiment.files import (
    SWEEP,
    experiment_name,
    is_study,
    is_sweep,
    list_experiments,
    load_experiment,
    load_listed,
    load_mapping,
    load_plugins,
    with_absolute_plugins,
)
from cm3leon.experiment.sections import Experiment, ShardsConfig, SplitConfig, row_name

__all__ = [
    "SWEEP",
    "Experiment",
    "ShardsConfig",
    "SplitConfig",
    "experiment_name",
    "is_study",
    "is_sweep",
    "list_experiments",
    "load_experiment",
    "load_listed",
    "load_mapping",
    "load_plugins",
    "row_name",
    "with_absolute_plugins",
]
