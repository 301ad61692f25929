"""Score texts for images by their log-likelihoods, in nats.

    python -m cm3leon.run score run=runs/digits image=seven.png texts='[a seven, a two]'
    python -m cm3leon.run score run=runs/digits image=photos text="a seven" out=scores.jsonl

With a folder, all images in it and below it are scored. Each image gets a line of JSON, printed or
written to `out`. The same command given again skips the images that have their line. Images that
cannot be used are named at the end, and the exit code is then 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.commands.asking import LineOptions, Save, ask
from cm3leon.types import UserError

if TYPE_CHECKING:
    from cm3leon.api import CM3Leon


@dataclass(kw_only=True)
class Options(LineOptions):
    """Options of the command score."""

    texts: list[str] = field(default_factory=list)
    """Texts that are scored for each image: captions, or answers to `question`."""
    text: str | None = None
    """A text that each image is scored for, in place of `texts`."""
    question: str | None = None
    """Question about the image that `texts` answer; null = `texts` are captions."""

    def check(self) -> None:
        if not self.texts and self.text is None:
            raise UserError(
                "`score` needs texts: texts=[TEXT,TEXT], for example texts='[a seven, a two]', "
                "or text=TEXT for one"
            )
        if self.texts and self.text is not None:
            raise UserError("text and texts are both given; give one of them")
        if self.question is not None and not self.texts:
            raise UserError(
                "question is given without texts; give the answers to score, for example "
                "texts='[yes, no]'"
            )


def main(options: Options) -> None:
    """Score texts for each image, or each image for a text. Raises as `ask` does."""

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        if options.text is not None:
            (found,) = model.score(images=[image], text=options.text)
            return {"text": options.text, "score": found}
        scores = model.score(texts=options.texts, image=image, question=options.question)
        return {"scores": dict(zip(options.texts, scores, strict=True))}

    ask(options, options.out, answer)
