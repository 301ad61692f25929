"""Make a run folder of public weights: Chameleon, Anole, Lumina-mGPT.

    python -m cm3leon.run import from=chameleon hf=chameleon-7b vqgan=vqgan.ckpt out=runs/chameleon

The folder is then generated from, captioned with, scored and fine-tuned like any other:

    python -m cm3leon.run generate run=runs/chameleon prompt="a red dog"

Fine-tuning takes its tokenizers and starts from its weights: shards.tokenizers=runs/chameleon
training.start=runs/chameleon. Nothing is downloaded. docs/public_weights.md has the whole way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cm3leon.config import PositiveInt, choices
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Options:
    """Options of the command import."""

    from_: str
    """A family of weights: chameleon, anole or lumina_mgpt."""
    hf: Path
    """A folder as transformers reads it: config.json, tokenizer.json and the weights, in one file or several."""
    vqgan: Path
    """A file of the image tokenizer, with its decoder."""
    image_size: PositiveInt = 512
    """Height and width of the images, in pixels."""
    out: Path
    """A run folder to make; it must not exist, or be empty."""

    def check(self) -> None:
        from cm3leon.tokenizers.families import FAMILIES

        if self.from_ not in FAMILIES:
            raise UserError(
                f"from is {self.from_}, which is not known; {choices(self.from_, FAMILIES)}"
            )


def main(options: Options) -> None:
    """Prints the licence and makes the folder.

    Raises:
        UserError: for files that are missing or are not of the family, or a folder that holds something.
    """
    from cm3leon.paths import new_folder
    from cm3leon.registry import discover
    from cm3leon.stages.importing import import_run
    from cm3leon.tokenizers.families import FAMILIES

    discover()
    family = FAMILIES[options.from_]
    print(f"licence of {family.title}: {family.licence}; {family.conditions}")
    with new_folder(options.out) as folder:
        import_run(options.from_, options.hf, options.vqgan, options.image_size, folder)
    print(f"written: {options.out}")
