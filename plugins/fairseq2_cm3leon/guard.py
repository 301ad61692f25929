"""Imports fairseq2, or refuses to with a sentence.

Its native part, fairseq2n, is built for one version of torch. With another version, fairseq2's own
check refuses only if the CUDA versions differ too; anything else may end the process in the data
pipeline, without a traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from cm3leon.types import UserError

INSTALL = "pip install 'cm3leon[cluster]'"


def missing(running: str | None = None) -> str:
    """What keeps fairseq2 from being used, in a few words; "" if nothing does. Nothing of it is
    imported.

    Args:
        running: version of torch; None = the installed one.
    """
    for package in ("fairseq2", "fairseq2n", "soundfile"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} ({INSTALL})"
    running, built_for = running or str(torch.__version__), torch_of_fairseq2n()
    if _base(built_for) != _base(running):
        return (
            f"a fairseq2n built for torch {running}: the one installed was built for {built_for} "
            f"({INSTALL})"
        )
    return ""


def torch_of_fairseq2n() -> str:
    """The version of torch that fairseq2n was built for, from its file of constants; the package
    itself is not imported."""
    package = importlib.util.find_spec("fairseq2n")
    assert package is not None
    assert package.submodule_search_locations
    spec = importlib.util.spec_from_file_location(
        "_", f"{package.submodule_search_locations[0]}/config.py"
    )
    assert spec is not None
    assert spec.loader is not None
    constants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(constants)
    return str(constants._TORCH_VERSION)


def _base(version: str) -> str:
    """A version without the label of its build: 2.9.1 for 2.9.1+cu128."""
    return version.partition("+")[0]


def load(what: str = "this") -> ModuleType:
    """Import fairseq2. Its recipes will not log the environment's variables, which may hold
    secrets.

    Args:
        what: what needs it, for the refusal.

    Raises:
        UserError: if it cannot be used.
    """
    if lacking := missing():
        raise UserError(f"{what} needs {lacking}")
    importlib.import_module("soundfile")  # brings the libsndfile that fairseq2n loads by name
    import fairseq2
    from fairseq2.recipe.internal.log import _StandardLogHelper

    _StandardLogHelper.log_environment_variables = _log_nothing
    return fairseq2


def _log_nothing(helper: Any) -> None:
    """Takes the place of the function that lists every variable with its value."""
