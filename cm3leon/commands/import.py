"""Make a run folder from public weights, or from what `export to=hf` wrote.

    python -m cm3leon.run import from=chameleon hf=chameleon-7b vqgan=vqgan.ckpt out=runs/chameleon
    python -m cm3leon.run import from=emu3 hf=emu3-gen out=runs/emu3
    python -m cm3leon.run import from=export hf=org/name out=runs/theirs

Every command takes the folder like that of any other run:

    python -m cm3leon.run generate run=runs/chameleon prompt="a red dog"

Fine-tuning takes its tokenizers and starts from its weights: shards.tokenizers=runs/chameleon
training.start=runs/chameleon. Nothing is downloaded, except a model on the Hub that is named with
from=export. docs/public_weights.md has every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cm3leon.config import PositiveInt, choices
from cm3leon.types import UserError

EXPORT = "export"
"""The value of `from` for a folder that an export wrote."""


@dataclass(kw_only=True)
class Options:
    """Options of the command import."""

    from_: str
    """A family of weights (chameleon, anole, lumina_mgpt or emu3), or export for what
    `export to=hf` wrote."""
    hf: Path
    """A folder as transformers reads it: config.json, tokenizer.json and the weights, in one file
    or several. With from=export it may be the name of a model on the Hub, as org/name."""
    vqgan: Path | None = None
    """A file of the image tokenizer, with its decoder; null = `hf` holds it, as that of emu3 and of
    an export does."""
    image_size: PositiveInt | None = None
    """Height and width of the images, in pixels; null = those of the family."""
    base_model: str | None = None
    """The model on the Hub that `hf` is a copy of, such as facebook/chameleon-7b, which the card of
    an export will name; null = the family's published model of this shape, where there is one
    alone."""
    out: Path
    """A run folder to make; it must not exist, or be empty."""

    def check(self) -> None:
        from cm3leon.tokenizers.families import FAMILIES

        if self.from_ not in (*FAMILIES, EXPORT):
            raise UserError(
                f"from is {self.from_}, which is not known; "
                f"{choices(self.from_, [*FAMILIES, EXPORT])}"
            )

        # An export has its image tokenizer and image size in it.
        if self.from_ == EXPORT:
            given = {"vqgan": self.vqgan, "image_size": self.image_size}
            for name, value in given.items():
                if value is not None:
                    raise UserError(f"{name} is given, which an export says itself; leave it out")
            return

        # The other families have the image tokenizer in their folder, or in a file of its own.
        family = FAMILIES[self.from_]
        if family.other_decoder:
            raise UserError(
                f"from is {self.from_}: the decoder of {family.title} cannot be imported, as "
                f"{family.other_decoder}; only its layout is known"
            )
        if family.whole and self.vqgan is not None:
            raise UserError(
                f"vqgan is given, but the folder of {family.title} holds the image tokenizer; "
                "leave it out"
            )
        if not family.whole and self.vqgan is None:
            raise UserError(
                f"`import from={self.from_}` needs the file of the image tokenizer with its "
                "decoder: vqgan=FILE, for example vqgan=vqgan.ckpt"
            )


def main(options: Options) -> None:
    """Print the licence and make the folder.

    Raises:
        UserError: for files that are missing or not of the family, or an `out` that is not empty.
    """
    from cm3leon.paths import new_folder
    from cm3leon.registry import discover
    from cm3leon.stages.importing import import_run
    from cm3leon.tokenizers.families import FAMILIES

    discover()
    if options.from_ == EXPORT:
        _import_export(options)
    else:
        # The licence comes first: reading the weights takes minutes.
        family = FAMILIES[options.from_]
        print(f"licence of {family.title}: {family.licence}; {family.conditions}")
        with new_folder(options.out) as folder:
            import_run(
                options.from_,
                options.hf,
                options.vqgan,
                options.image_size,
                folder,
                options.base_model,
            )
    print(f"written: {options.out}")


def _import_export(options: Options) -> None:
    from cm3leon.hub.repository import model_folder
    from cm3leon.paths import new_folder
    from cm3leon.stages.importing import import_export

    hub_folder = model_folder(options.hf, where="hf")
    base_model = options.base_model
    if not base_model and hub_folder != options.hf:
        base_model = str(options.hf)  # a name on the Hub
    with new_folder(options.out) as folder:
        import_export(hub_folder, folder, base_model)
