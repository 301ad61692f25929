"""Sweeps: one experiment at many points, each a run of its own, and one table of what they came to."""

from cm3leon.sweep.run import collect, run_point, run_sweep

__all__ = ["collect", "run_point", "run_sweep"]
