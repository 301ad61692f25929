"""CM3Leon: retrieval-augmented, decoder-only modelling of text and images (arXiv 2309.02591)."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `CM3Leon` on first use, because it imports torch."""
    if name == "CM3Leon":
        from cm3leon.api import CM3Leon

        return CM3Leon
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
