"""Write captions for images.

    python -m cm3leon.run caption run=runs/digits image=seven.png
    python -m cm3leon.run caption run=runs/digits image=photos out=captions.jsonl

With a folder, all images in it and below it are captioned. Each image gets a line of JSON, printed
or written to `out`. The same command given again skips the images that have their line. Images that
cannot be used are named at the end, and the exit code is then 3. A text that was cut at
`max_tokens` pieces is marked `truncated` in its line, and the number of cut texts is printed at the
end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.commands.asking import LineOptions, Save, TextOptions, ask
from cm3leon.commands.words import OwnDocuments
from cm3leon.config import NonNegativeInt

if TYPE_CHECKING:
    from cm3leon.api import CM3Leon


@dataclass(kw_only=True)
class Options(OwnDocuments, LineOptions, TextOptions):
    """Options of the command caption."""

    retrieve: NonNegativeInt = 0
    """Documents of the memory bank that are put before a prompt."""
    question: str | None = None
    """A question asked in a chat turn, for imported chat weights, for example What do you see in
    this image?; null = a plain caption."""


def main(options: Options) -> None:
    """Write a caption for each image. Raises as `ask` does."""

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        said = model.caption(
            image,
            retrieve=options.retrieve,
            question=options.question,
            decoder=options.decoder,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        return {"caption": said}

    ask(options, options.out, answer)
