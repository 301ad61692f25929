"""What the processes of tests/processes.py have imported when they begin."""

from __future__ import annotations

import importlib
from contextlib import suppress

import torch.distributed.tensor  # noqa: F401

import cm3leon.commands.run
import cm3leon.training.trainer  # noqa: F401
from cm3leon.registry import discover

discover()
# Not everybody has installed these. The server that imports this file would keep silent.
for _name in ("open_clip", "sklearn.svm"):
    with suppress(ImportError):
        importlib.import_module(_name)
