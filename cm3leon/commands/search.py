"""Search a run's memory bank by a text or an image, and print the best documents.

Each has a line: its score, its id, and its text.

python -m cm3leon.run search run=runs/corpus text="a red dog"
python -m cm3leon.run search run=runs/corpus image=dog.jpg count=10
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cm3leon.config import PositiveInt
from cm3leon.stages.trust import Opening
from cm3leon.terminal import printable
from cm3leon.types import TokenDocument, UserError

if TYPE_CHECKING:
    from cm3leon.stages.run_folder import RunFolder


@dataclass(kw_only=True)
class Options(Opening):
    """Options of the command search."""

    run: Path
    """A run folder whose memory bank is searched."""
    text: str | None = None
    """Text to find documents for."""
    image: Path | None = None
    """Image file to find documents for; with a text, for the mean of both."""
    count: PositiveInt = 5
    """Documents to find."""

    def check(self) -> None:
        if self.text is None and self.image is None:
            raise UserError(
                "`search` needs what to search for: text=TEXT, for example text='a red dog', or "
                "image=FILE"
            )


def main(options: Options) -> None:
    """Print the best documents by inner product: score, id and text.

    Raises:
        UserError: for a mistake in the options, or a run without a finished bank.
    """
    from cm3leon.data.images import read_given_image, square
    from cm3leon.stages.opening import open_run
    from cm3leon.stages.prompts import found_rows

    run = open_run(options.run, options)
    pixels_HWC = None
    if options.image is not None:
        given_HWC = read_given_image(options.image, "image")
        pixels_HWC = square(given_HWC, run.image_tokenizer_shape.image_size)
    for row, score in found_rows(run, options.text, pixels_HWC, options.count):
        document = run.bank_document(row)
        print(f"{score:.3f}  {printable(document.id)}  {printable(shown(run, document))}")


def shown(run: RunFolder, document: TokenDocument) -> str:
    """A document on one line: its text, with <image> in place of its images."""
    words = []
    for segment in document.segments:
        text = "<image>"
        if segment.modality == "text":
            text = run.text_tokenizer.decode(segment.ids_T)
        words += text.split()
    return " ".join(words)
