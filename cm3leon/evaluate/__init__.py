"""The one way models are asked and scored: by the items of a protocol, resumed after a kill."""

from cm3leon.evaluate.evaluation import Evaluation, figures_line
from cm3leon.evaluate.own_corpus import own_corpus
from cm3leon.evaluate.row import Row, bank_identity

__all__ = ["Evaluation", "Row", "bank_identity", "figures_line", "own_corpus"]
