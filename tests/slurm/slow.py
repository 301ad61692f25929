"""A plugin for tests: a slow CM3 objective, which leaves time to interrupt a small training."""

import time

from cm3leon.objectives.cm3 import CM3
from cm3leon.registry import OBJECTIVES


@OBJECTIVES.register("slow_cm3")
class SlowCM3(CM3):
    """CM3, a tenth of a second slower for each micro-batch."""

    def loss(self, *arguments, **options):
        time.sleep(0.1)
        return super().loss(*arguments, **options)
