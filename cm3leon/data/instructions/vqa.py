"""Questions about images with short answers: VQA2, OKVQA and VizWiz, as published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

from cm3leon.config import Location
from cm3leon.data.file_source import BadRecord, id_key
from cm3leon.data.files import Files
from cm3leon.data.instructions.base import (
    Example,
    InstructionConfig,
    InstructionSource,
    check_image_name,
    integer,
    listed,
    read_json,
)
from cm3leon.registry import SOURCES
from cm3leon.types import UserError


@SOURCES.register("vqa")
class VqaSource(InstructionSource):
    """VQA2 and OKVQA: a questions JSON, an annotations JSON with ten answers for each question, and
    images named by their ids.

    The answer of an example is the one that most of the ten people gave.
    """

    task = "vqa"
    more_files = ("annotations",)

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the files and the images are, and how images are named."""

        annotations: Annotated[str, Location()]
        """Annotations JSON, such as v2_mscoco_train2014_annotations.json; `path` is the questions
        JSON."""
        image_name: str = "COCO_train2014_{image_id:012d}.jpg"
        """Name of an image, with the slot {image_id}."""

        def check(self) -> None:
            check_image_name(self.image_name, 1)

    config: Config

    def entries(self) -> list[Any]:
        what = "the questions JSON of VQA2 or OKVQA"
        questions = listed(
            read_json(self.files, "data.path"), "questions", f"data.path: {self.config.path}", what
        )
        questions = [entry if isinstance(entry, Mapping) else {} for entry in questions]

        path = f"data.annotations: {self.config.annotations}"
        files = Files(self.config.annotations, "data.annotations")
        annotations = listed(
            read_json(files, "data.annotations"), "annotations", path, "the annotations JSON"
        )
        # Both files refer to a question by its id, which may be written as a number or a string.
        by_question = {
            id_key(entry.get("question_id")): entry
            for entry in annotations
            if isinstance(entry, Mapping)
        }

        ids = [id_key(entry.get("question_id")) for entry in questions]
        # Files of different splits share no question, which is a mistake in the config.
        if ids and not any(id_ in by_question for id_ in ids):
            raise UserError(
                f"{path} answers none of the questions of {self.config.path}; give those of the "
                "same split"
            )
        return [(entry, by_question.get(id_)) for entry, id_ in zip(questions, ids, strict=True)]

    def example(self, entry: Any, rng: Random) -> Example:
        question, annotation = entry
        if annotation is None:
            raise BadRecord("the question has no annotation")
        name = self.config.image_name.format(
            image_id=integer(question.get("image_id"), "the image_id")
        )

        answer = majority(annotation.get("answers"), annotation.get("multiple_choice_answer"))
        values = {
            "question": self.words(question.get("question"), "the question"),
            "answer": self.words(answer, "the answer"),
            "image": self.image(name),
        }
        return Example(
            f"vqa-{question['question_id']}",
            values,
            given_answers(annotation.get("answers")) or (answer,),
        )


@SOURCES.register("vizwiz")
class VizWizSource(InstructionSource):
    """VizWiz: one JSON list of images with a question and ten answers. `unanswerable` is an answer
    like any other."""

    task = "vqa"

    Config = InstructionConfig

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        if not isinstance(content, list):
            raise UserError(
                f"data.path: {self.config.path} is not a JSON list; give the annotations JSON of "
                "VizWiz"
            )
        return content

    def example(self, entry: Any, rng: Random) -> Example:
        if not isinstance(entry, Mapping):
            raise BadRecord("not an object")
        values = {
            "question": self.words(entry.get("question"), "the question"),
            "answer": self.words(majority(entry.get("answers")), "the answer"),
            "image": self.image(entry.get("image")),
        }
        return Example(f"vizwiz-{entry['image']}", values, given_answers(entry.get("answers")))


def majority(answers: Any, chosen: Any = None) -> str:
    """The answer given most often, and of several the first; `chosen` if the file names the answer.
    Raises BadRecord without any answer."""
    if isinstance(chosen, str) and chosen.strip():
        return chosen
    texts = given_answers(answers)
    if not texts:
        raise BadRecord("the question has no answers")
    return Counter(texts).most_common(1)[0][0]


def given_answers(answers: Any) -> tuple[str, ...]:
    """The answers that people gave, without empty ones."""
    given = [one.get("answer") for one in answers or () if isinstance(one, Mapping)]
    return tuple(text for text in given if isinstance(text, str) and text.strip())
