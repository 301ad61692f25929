"""CM3Leon as an extension of fairseq2, which finds `register` by its entry point in the group
`fairseq2.extension`.

    from fairseq2 import init_fairseq2
    from cm3leon.plugins.fairseq2_cm3leon.extension import asset_card, get_cm3leon_model_hub

    init_fairseq2()
    model = get_cm3leon_model_hub().load_model(asset_card("runs/corpus"))

Nothing else is imported until it is needed: fairseq2 calls `register` in every process, whoever
uses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def register(container: Any) -> None:
    """Register the families `cm3leon` of models, tokenizers and datasets with fairseq2."""
    from cm3leon.plugins.fairseq2_cm3leon._families import register_families

    register_families(container)


def get_cm3leon_model_hub() -> Any:
    """fairseq2's hub of our models: their architectures, new models, and trained ones by their
    cards."""
    from cm3leon.plugins.fairseq2_cm3leon._families import model_hub

    return model_hub()


def get_cm3leon_tokenizer_hub() -> Any:
    """fairseq2's hub of our text tokenizers."""
    from cm3leon.plugins.fairseq2_cm3leon._families import tokenizer_hub

    return tokenizer_hub()


def get_cm3leon_dataset_hub() -> Any:
    """fairseq2's hub of the blocks that a run trains on."""
    from cm3leon.plugins.fairseq2_cm3leon._families import dataset_hub

    return dataset_hub()


def asset_card(run: str | Path) -> Any:
    """The card by which fairseq2 loads those of a run's model, text tokenizer and training data
    that exist.

    Raises:
        UserError: for a folder that is not a run's, or whose model is not of this family.
    """
    from cm3leon.plugins.fairseq2_cm3leon._cards import asset_card

    return asset_card(Path(run))
