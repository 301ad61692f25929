"""Fill in a part of an image, or of its text.

    python -m cm3leon.run infill run=runs/digits image=seven.png text="a seven" box='[0,16,32,32]'

With a folder, all images in it and below it are used. Each image gets a line of JSON in
results.jsonl of `out`, beside the new images. The same command given again skips the images that
have their line. Images that cannot be used are named at the end, and the exit code is then 3. A
text that was cut at `max_tokens` pieces is marked `truncated` in its line, and the number of cut
texts is printed at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.commands.asking import RESULTS, Save, TextOptions, ask
from cm3leon.types import UserError

if TYPE_CHECKING:
    from cm3leon.api import CM3Leon


@dataclass(kw_only=True)
class Options(TextOptions):
    """Options of the command infill."""

    out: Path = Path("infilled")
    """Folder for the images and the lines."""
    text: str = ""
    """The text that belongs to the image."""
    box: tuple[int, int, int, int] | None = None
    """Part of the image to fill in: left, top, right, bottom in its pixels."""
    mask: Path | None = None
    """Image file of the image's size, in place of `box`; what is fully transparent in it is filled
    in."""
    words: tuple[int, int] | None = None
    """Part of the text to fill in: the characters from the first number to before the second."""

    def check(self) -> None:
        if self.box is None and self.mask is None and self.words is None:
            raise UserError(
                "`infill` needs the part to fill in: box=[LEFT,TOP,RIGHT,BOTTOM], for example "
                "box=[0,16,32,32], mask=FILE, or words=[FROM,TO]"
            )


def main(options: Options) -> None:
    """Fill in the part of each image, or of its text. Raises as `ask` does."""
    from cm3leon.data.images import read_mask

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        # Read for each image: a mask that cannot be read is reported as any mistake of an image.
        mask = None
        if options.mask is not None:
            mask = read_mask(options.mask)
        filled = model.infill(
            image,
            options.text,
            box=options.box,
            mask=mask,
            words=options.words,
            decoder=options.decoder,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        return {"files": [save(filled.image, "")], "text": filled.text}

    ask(options, options.out / RESULTS, answer)
