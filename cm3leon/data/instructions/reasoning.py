"""Questions with options, context and an explanation: ScienceQA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from cm3leon.data.file_source import BadRecord
from cm3leon.data.instructions.base import (
    Example,
    InstructionConfig,
    InstructionSource,
    integer,
    read_json,
)
from cm3leon.registry import SOURCES
from cm3leon.types import UserError


@SOURCES.register("scienceqa")
class ScienceQaSource(InstructionSource):
    """ScienceQA: problems.json, an object of problems by id; those with an image, at
    `{split}/{id}/{image}`."""

    task = "reasoning"

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Which of the file's splits."""

        split: Literal["train", "val", "test"] = "train"
        """Of ScienceQA's."""

    config: Config

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        if not isinstance(content, Mapping):
            raise UserError(
                f"data.path: {self.config.path} is no object; give ScienceQA's problems.json"
            )
        return [
            (id_, problem)
            for id_, problem in content.items()
            if isinstance(problem, Mapping)
            and problem.get("split") == self.config.split
            and problem.get("image")
        ]

    def example(self, entry: Any, rng: Random) -> Example:
        id_, problem = entry
        choices = problem.get("choices")
        if (
            not isinstance(choices, list)
            or not choices
            or not all(isinstance(choice, str) for choice in choices)
        ):
            raise BadRecord("choices is no list of texts")
        number = integer(problem.get("answer"), "the answer")
        if not 0 <= number < len(choices):
            raise BadRecord(f"the answer is {number}, of {len(choices)} choices")
        question = self.words(problem.get("question"), "the question")
        image = self.image(f"{self.config.split}/{id_}/{problem['image']}")
        explanation = str(problem.get("solution") or problem.get("lecture") or "").strip()
        return Example(
            f"scienceqa-{id_}",
            {
                **reasoning_slots(
                    question, str(problem.get("hint") or ""), choices, number, explanation
                ),
                "image": image,
            },
            (choices[number], *choices),
        )


def letter(number: int) -> str:
    """(A), (B) ..."""
    return f"({chr(ord('A') + number)})"


def reasoning_slots(
    question: str, context: str, options: list[str], answer: int, explanation: str
) -> dict[str, str]:
    """The texts of a question with options, as the templates have them."""
    right = letter(answer)
    return {
        "question": question,
        "context": context.strip() or "N/A",
        "options": " ".join(f"{letter(number)} {option}" for number, option in enumerate(options)),
        "answer": right,
        "steps": f"{explanation} So the answer is {right}.".strip(),
    }
