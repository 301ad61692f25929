"""Answer a question about images.

    python -m cm3leon.run answer run=runs/scenes/tuned image=scene.png question="How many things are there?"

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

if TYPE_CHECKING:
    from cm3leon.api import CM3Leon


@dataclass(kw_only=True)
class Options(LineOptions, TextOptions):
    """Options of the command answer."""

    question: str
    """A question about each image."""


def main(options: Options) -> None:
    """Answers the question about each image. Raises as `ask` does."""

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        said = model.answer(
            image,
            options.question,
            decoder=options.decoder,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        return {"question": options.question, "answer": said}

    ask(options, options.out, answer)
