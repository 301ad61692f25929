"""Write captions for images.

    python -m cm3leon.run caption run=runs/digits image=seven.png
    python -m cm3leon.run caption run=runs/digits image=photos out=captions.jsonl

Images of a folder are all asked, those below it too. Each gets a line of JSON, printed or in `out`. An image that has
its line is not asked again by the same command, and one that cannot be used is named at the end, which then has exit
code 3. The line of a text that was cut at `max_tokens` pieces, before its end, has `truncated`, and their number is
said at the end.
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
    """Asks in turns, as imported chat weights were tuned, for example What do you see in this image?"""


def main(options: Options) -> None:
    """Writes a text for each image. Raises as `ask` does."""

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
