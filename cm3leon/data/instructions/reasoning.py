"""Questions with options, a context and an explanation: ScienceQA."""

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
    """ScienceQA: problems.json, an object of problems by id. Problems with an image are read, which
    lies at `{split}/{id}/{image}`."""

    task = "reasoning"

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the file and the images are, and the split to read."""

        split: Literal["train", "val", "test"] = "train"
        """ScienceQA's split."""

    config: Config

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        if not isinstance(content, Mapping):
            raise UserError(
                f"data.path: {self.config.path} is not a JSON object; give ScienceQA's "
                "problems.json"
            )
        found: list[Any] = []
        for id_, problem in content.items():
            if not isinstance(problem, Mapping) or problem.get("split") != self.config.split:
                continue
            if problem.get("image"):
                found.append((id_, problem))
        return found

    def example(self, entry: Any, rng: Random) -> Example:
        id_, problem = entry

        choices = problem.get("choices")
        is_list = isinstance(choices, list) and bool(choices)
        if not is_list or not all(isinstance(choice, str) for choice in choices):
            raise BadRecord("choices is no list of texts")
        number = integer(problem.get("answer"), "the answer")
        if not 0 <= number < len(choices):
            raise BadRecord(f"the answer is {number}, of {len(choices)} choices")

        question = self.words(problem.get("question"), "the question")
        image = self.image(f"{self.config.split}/{id_}/{problem['image']}")
        # Not every problem has a solution; the lecture then explains its subject.
        explanation = str(problem.get("solution") or problem.get("lecture") or "").strip()
        context = str(problem.get("hint") or "")
        slots = reasoning_slots(question, context, choices, number, explanation)
        return Example(
            f"scienceqa-{id_}",
            {**slots, "image": image},
            (choices[number], *choices),
        )


def letter(number: int) -> str:
    """The name of an option: (A), (B) ..."""
    return f"({chr(ord('A') + number)})"


def reasoning_slots(
    question: str, context: str, options: list[str], answer: int, explanation: str
) -> dict[str, str]:
    """The texts of a question with options, as the templates name them."""
    right = letter(answer)
    return {
        "question": question,
        "context": context.strip() or "N/A",
        "options": " ".join(f"{letter(number)} {option}" for number, option in enumerate(options)),
        "answer": right,
        "steps": f"{explanation} So the answer is {right}.".strip(),
    }
