"""Answer a question about images.

    python -m cm3leon.run answer run=runs/scenes/tuned image=scene.png question="How many things?"

With a folder, all images in it and below it are asked about. Each image gets a line of JSON,
printed or written to `out`. The same command given again skips the images that have their line.
Images that cannot be used are named at the end, and the exit code is then 3. A text that was cut at
`max_tokens` pieces is marked `truncated` in its line, and the number of cut texts is printed at the
end.
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
    """Answer the question about each image. Raises as `ask` does."""

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
