"""Sweeps: one experiment at many points, each a run of its own, and one table of what they came to."""

from cm3leon.sweep.run import collect, load_sweep, point, run_sweep

__all__ = ["collect", "load_sweep", "point", "run_sweep"]
