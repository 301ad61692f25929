"""CM3Leon with fairseq2: what a run says to it, and pretraining with its trainer.

python -m cm3leon.plugins.fairseq2_cm3leon card RUN            an asset card of the run, as YAML
python -m cm3leon.plugins.fairseq2_cm3leon recipe RUN          the run's pretraining as a recipe, as YAML
python -m cm3leon.plugins.fairseq2_cm3leon pretrain OUTPUT ... fairseq2's options, such as --config-file and --config
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from cm3leon.plugins.fairseq2_cm3leon.guard import load
from cm3leon.types import UserError


def main(arguments: Sequence[str]) -> int:
    """The exit code: 2 after a user's mistake, with a sentence."""
    command, *rest = arguments or ("--help",)
    try:
        if command in ("card", "recipe") and len(rest) == 1:
            load(f"the command {command}")
            print(yaml.safe_dump(_card(Path(rest[0])) if command == "card" else _recipe(Path(rest[0])), sort_keys=False))
        elif command == "pretrain":
            load("the command pretrain")
            _pretrain(rest)
        else:
            print(__doc__)
            return 0 if command in ("-h", "--help") else 2
    except UserError as error:
        print(f"cm3leon: {error}", file=sys.stderr)
        return 2
    return 0


def _card(run: Path) -> object:
    from cm3leon.plugins.fairseq2_cm3leon._cards import card_entries

    return card_entries(run)


def _recipe(run: Path) -> object:
    from fairseq2.utils.structured import StandardValueConverter

    from cm3leon.plugins.fairseq2_cm3leon._recipe import recipe_of
    from cm3leon.search import open_run

    return StandardValueConverter().unstructure(recipe_of(open_run(run)))


def _pretrain(arguments: Sequence[str]) -> None:
    from fairseq2.recipe.cli import main as fairseq2_main

    from cm3leon.plugins.fairseq2_cm3leon._recipe import PretrainRecipe

    sys.argv[1:] = arguments
    fairseq2_main(PretrainRecipe())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
