"""How a model is asked the items of a protocol and scored; a killed evaluation is resumed.

Read `evaluation.py` first.
"""

from cm3leon.evaluate.evaluation import Evaluation
from cm3leon.evaluate.figures import figures_line
from cm3leon.evaluate.own_corpus import own_corpus
from cm3leon.evaluate.row import Row, bank_identity, ranker_identity

__all__ = [
    "Evaluation",
    "Row",
    "bank_identity",
    "figures_line",
    "own_corpus",
    "ranker_identity",
]
