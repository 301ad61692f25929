"""The stages of an experiment, in the order in which they run."""

from cm3leon.stages.stages import run_experiment, run_stage_part

__all__ = ["run_experiment", "run_stage_part"]
