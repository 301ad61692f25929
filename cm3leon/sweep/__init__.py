"""Sweeps: one experiment at many points, each a run of its own, and one table of what they came to."""

from cm3leon.sweep.run import load_sweep, run_sweep

__all__ = ["load_sweep", "run_sweep"]
