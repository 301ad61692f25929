"""Change images as an instruction says.

    python -m cm3leon.run edit run=runs/scenes/tuned image=scene.png instruction="Make it blue."

With a folder, all images in it and below it are edited. Each image gets a line of JSON in
results.jsonl of `out`, beside the new images. The same command given again skips the images that
have their line. Images that cannot be used are named at the end, and the exit code is then 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cm3leon.commands.asking import RESULTS, ImageOptions, Save, ask
from cm3leon.config import Component, PositiveInt
from cm3leon.registry import DECODERS

if TYPE_CHECKING:
    from cm3leon.api import CM3Leon


@dataclass(kw_only=True)
class Options(ImageOptions):
    """Options of the command edit."""

    out: Path = Path("edited")
    """Folder for the images and the lines."""
    instruction: str
    """An instruction that says what to change in each image."""
    n: PositiveInt = 1
    """Images that are drawn for each, the best by CLIP first."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How image codes are drawn; null = the decoder edit."""


def main(options: Options) -> None:
    """Change each image as the instruction says. Raises as `ask` does."""

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        decoder = options.decoder or "edit"
        drawn = model.edit(
            image, options.instruction, n=options.n, decoder=decoder, seed=options.seed
        )
        # The best image has the name of the one that was edited, the others a number behind it.
        names = [save(drawn[0].image, "")]
        for number, each in enumerate(drawn[1:], 1):
            names.append(save(each.image, f"_{number}"))
        return {"instruction": options.instruction, "files": names}

    ask(options, options.out / RESULTS, answer)
