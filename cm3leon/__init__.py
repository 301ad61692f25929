"""CM3Leon: retrieval-augmented, token-based, decoder-only modelling of text and images (arXiv 2309.02591)."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# `evaluation/` and `plugins/` are top-level folders of the repository but subpackages of `cm3leon` when imported, so
# that they neither shadow nor are shadowed by other packages of those names. A built wheel installs them inside
# `cm3leon/`; in a clone they lie beside it, and this line lets Python find them there.
_repository = Path(__file__).resolve().parent.parent
if (_repository / "experiments.yaml").is_file():
    __path__.append(str(_repository))


def __getattr__(name: str) -> Any:
    """`CM3Leon`, which is imported when it is asked for: it brings torch."""
    if name == "CM3Leon":
        from cm3leon.api import CM3Leon

        return CM3Leon
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
