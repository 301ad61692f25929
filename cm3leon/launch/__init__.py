"""Launch jobs made of commands, on this machine or on SLURM; follow and continue them.

`jobs.py` is what a job is, `runs.py` how an experiment becomes jobs, `launchers.py` where they run.
"""

from cm3leon.launch.jobs import Job, Submitted, submit

__all__ = ["Job", "Submitted", "submit"]
