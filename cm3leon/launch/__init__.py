"""Launching: jobs made of commands, given to this machine or to SLURM, followed,
and gone on with."""

from cm3leon.launch.jobs import Job, Submitted, submit

__all__ = ["Job", "Submitted", "submit"]
