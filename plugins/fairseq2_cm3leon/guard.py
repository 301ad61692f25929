"""fairseq2 is imported here, or refused in a sentence.

Its native part, fairseq2n, is built for one version of torch. With another one fairseq2's own check
refuses only where the CUDA versions differ too; what it lets through may end the process in the
data pipeline, without a traceback.
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
    loaded.

    Args:
        running: version of torch; None = this one's.
    """
    for package in ("fairseq2", "fairseq2n", "soundfile"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} ({INSTALL})"
    running, built_for = running or str(torch.__version__), torch_of_fairseq2n()
    if _base(built_for) != _base(running):
        return f"a fairseq2n built for torch {running}: the one installed was built for {built_for} ({INSTALL})"
    return ""


def torch_of_fairseq2n() -> str:
    """Version of torch that fairseq2n was built for, from its table of constants; its package is
    not imported."""
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
    """Without the label of the build: 2.9.1 of 2.9.1+cu128."""
    return version.partition("+")[0]


def load(what: str = "this") -> ModuleType:
    """fairseq2, imported; its recipes will not log the environment's variables, which may hold
    secrets.

    Args:
        what: needs it, as the refusal names it.

    Raises:
        UserError: where it cannot be used.
    """
    if lacking := missing():
        raise UserError(f"{what} lacks {lacking}")
    importlib.import_module("soundfile")  # brings the libsndfile that fairseq2n loads by name
    import fairseq2
    from fairseq2.recipe.internal.log import _StandardLogHelper

    _StandardLogHelper.log_environment_variables = _log_nothing
    return fairseq2


def _log_nothing(helper: Any) -> None:
    """In the place of the line that lists every variable with its value."""
