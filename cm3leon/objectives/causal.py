"""Plain left-to-right language modelling, the baseline of CM3."""

from __future__ import annotations

import numpy as np

from cm3leon.config import NoSettings
from cm3leon.objectives.base import Corrupted, Objective
from cm3leon.registry import OBJECTIVES
from cm3leon.tokenizers.document import LaidOut


@OBJECTIVES.register("causal")
class Causal(Objective):
    """Next-token prediction of the sample as it is."""

    Config = NoSettings

    def corrupt(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> Corrupted:
        return Corrupted(sample.ids_T, np.ones(len(sample.ids_T), dtype=np.float32))
