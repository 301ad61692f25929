"""Studies: experiments made of several runs, and of what is asked of their models;
a sweep is a study of one run."""

from cm3leon.studies.config import Study
from cm3leon.studies.load import load_study, load_sweep
from cm3leon.studies.run import run_study

__all__ = ["Study", "load_study", "load_sweep", "run_study"]
