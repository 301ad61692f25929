"""Studies: experiments made of several runs, and of what is asked of their models."""

from cm3leon.study.config import Study, load_study
from cm3leon.study.run import run_study

__all__ = ["Study", "load_study", "run_study"]
