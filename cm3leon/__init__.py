"""CM3Leon: retrieval-augmented, token-based, decoder-only modelling of text and images (arXiv 2309.02591)."""

from pathlib import Path

__version__ = "0.1.0"

# `evaluation/` and `plugins/` are top-level folders of the repository but subpackages of `cm3leon` when imported, so
# that they neither shadow nor are shadowed by other packages of those names. A built wheel installs them inside
# `cm3leon/`; in a clone they lie beside it, and this line lets Python find them there.
_repository = Path(__file__).resolve().parent.parent
if (_repository / "experiments.yaml").is_file():
    __path__.append(str(_repository))
