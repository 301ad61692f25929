"""Which class of transformers each model is exported as and imported from."""

from __future__ import annotations

from cm3leon.models.base import Model
from cm3leon.models.chameleon import CHAMELEON
from cm3leon.models.form import Form
from cm3leon.models.llama import Llama
from cm3leon.models.opt import OPT
from cm3leon.models.transformer import Transformer

FORMS: dict[type[Model], Form] = {Transformer: OPT, Llama: CHAMELEON}
"""The form of each model class. A derived class computes something else and has no form."""
