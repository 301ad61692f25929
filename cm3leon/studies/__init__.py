"""Studies: experiments made of several runs, and of what their models are asked; a sweep is a study
of one swept run.

`config.py` is what a study is, `points.py` how a sweep becomes points, `run.py` how it is run,
`results.py` how runs become rows of a table.
"""

from cm3leon.studies.config import Study
from cm3leon.studies.load import load_study, load_sweep
from cm3leon.studies.run import run_study

__all__ = ["Study", "load_study", "load_sweep", "run_study"]
