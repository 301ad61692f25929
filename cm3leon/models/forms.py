"""Which class of transformers a decoder goes out as, and which decoder one of them comes in as."""

from __future__ import annotations

from cm3leon.models.base import Model
from cm3leon.models.chameleon import CHAMELEON
from cm3leon.models.form import Form
from cm3leon.models.llama import Llama
from cm3leon.models.opt import OPT
from cm3leon.models.transformer import Transformer

FORMS: dict[type[Model], Form] = {Transformer: OPT, Llama: CHAMELEON}
"""By the class of the decoder: a class derived from one of them computes something else, and has none."""
