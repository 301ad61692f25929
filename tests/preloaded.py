"""What the processes of tests/processes.py have imported when they begin."""

from __future__ import annotations

import open_clip  # noqa: F401
import sklearn.svm  # noqa: F401
import torch.distributed.tensor  # noqa: F401

import cm3leon.commands.run
import cm3leon.training.trainer  # noqa: F401
from cm3leon.registry import discover

discover()
