"""Imports everything that the processes of tests/processes.py need before they begin."""

from __future__ import annotations

import importlib
from contextlib import suppress

import torch.distributed.tensor  # noqa: F401

import cm3leon.commands.run
import cm3leon.training.trainer  # noqa: F401
from cm3leon.registry import discover

discover()
# These are optional. An error here would not be seen: the server that imports this file drops it.
for _name in ("open_clip", "sklearn.svm"):
    with suppress(ImportError):
        importlib.import_module(_name)
