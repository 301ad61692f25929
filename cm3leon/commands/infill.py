"""Make a part of an image, or of its text, anew.

    python -m cm3leon.run infill run=runs/digits image=seven.png text="a seven" box='[0,16,32,32]' out=filled

Images of a folder are all asked, those below it too. Each gets a line of JSON in results.jsonl of `out`, beside the new
images. An image that has its line is not asked again by the same command, and one that cannot be used is named at the
end, which then has exit code 3. The line of a text that was cut at `max_tokens` pieces, before its end, has
`truncated`, and their number is said at the end.
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
    """Part of the image that is made anew: left, top, right, bottom in its pixels."""
    mask: Path | None = None
    """Image file of the image's size, in the place of `box`; where it is wholly transparent the image is made anew."""
    words: tuple[int, int] | None = None
    """Part of the text that is made anew: its characters from the first number to before the second."""

    def check(self) -> None:
        if self.box is None and self.mask is None and self.words is None:
            raise UserError(
                "`infill` needs what is to be made anew: box=[LEFT,TOP,RIGHT,BOTTOM], for example "
                "box=[0,16,32,32], mask=FILE, or words=[FROM,TO]"
            )


def main(options: Options) -> None:
    """Makes the part of each image, or of its text, anew. Raises as `ask` does."""
    from cm3leon.data.images import read_mask

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        filled = model.infill(
            image,
            options.text,
            box=options.box,
            mask=None if options.mask is None else read_mask(options.mask),
            words=options.words,
            decoder=options.decoder,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        return {"files": [save(filled.image, "")], "text": filled.text}

    ask(options, options.out / RESULTS, answer)
