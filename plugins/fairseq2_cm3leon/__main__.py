"""CM3Leon with fairseq2: what a run says to it, pretraining with its trainer, and the weights back.

python -m cm3leon.plugins.fairseq2_cm3leon card RUN              an asset card of the run, as YAML
python -m cm3leon.plugins.fairseq2_cm3leon recipe RUN            the run's pretraining as a recipe, as YAML
python -m cm3leon.plugins.fairseq2_cm3leon pretrain OUTPUT ...   fairseq2's options, such as --config-file and --config
python -m cm3leon.plugins.fairseq2_cm3leon export OUTPUT FOLDER  the last checkpoint as config.json, model.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from cm3leon.plugins.fairseq2_cm3leon.guard import load
from cm3leon.types import UserError


def card(run: str) -> None:
    """Print a run's asset card."""
    from cm3leon.plugins.fairseq2_cm3leon._cards import card_entries

    print(yaml.safe_dump(card_entries(Path(run)), sort_keys=False), end="")


def recipe(run: str) -> None:
    """Print a run's pretraining as a recipe."""
    from fairseq2.utils.structured import StandardValueConverter

    from cm3leon.plugins.fairseq2_cm3leon._recipe import recipe_of
    from cm3leon.stages.opening import open_run

    content = StandardValueConverter().unstructure(recipe_of(open_run(Path(run))))
    print(yaml.safe_dump(content, sort_keys=False), end="")


def pretrain(*arguments: str) -> None:
    """Train; the process ends when fairseq2 ends it."""
    from fairseq2.recipe.cli import main as fairseq2_main

    from cm3leon.plugins.fairseq2_cm3leon._recipe import PretrainRecipe

    sys.argv[1:] = arguments
    fairseq2_main(PretrainRecipe())


def export(output: str, folder: str) -> None:
    """Write the trained weights as our own files."""
    from cm3leon.plugins.fairseq2_cm3leon._cards import export

    export(Path(output), Path(folder))


COMMANDS: dict[str, tuple[Callable[..., None], int | None]] = {
    "card": (card, 1),
    "recipe": (recipe, 1),
    "pretrain": (pretrain, None),
    "export": (export, 2),
}
"""Each command's function, and how many arguments it takes; None = any number."""


def main(arguments: Sequence[str]) -> int:
    """Run a command and return the exit code: 2 after a user's mistake, with a sentence."""
    name, *rest = arguments or ("--help",)
    command, count = COMMANDS.get(name, (None, None))
    if command is None or count not in (None, len(rest)):
        print(__doc__)
        return 0 if name in ("-h", "--help") else 2
    try:
        load(f"the command {name}")
        command(*rest)
    except UserError as error:
        print(f"cm3leon: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
