"""Dialogues about images: VisDial, as published.

Two rounds about one image make two documents of the task vqa:

    the file       caption "a dog in the snow"; "is it big" "yes"; "what colour" "brown"
    document 1     Question: a dog in the snow. is it big?                       Answer: yes.
    document 2     Question: a dog in the snow. is it big? yes. what colour?     Answer: brown.

The image follows in both.
"""

from __future__ import annotations

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


@dataclass(frozen=True, eq=False)
class RankedExample(Example):
    """A question with candidates for its answer."""

    options: tuple[str, ...] = ()
    relevance: tuple[float, ...] = ()
    """How relevant people rated each candidate; empty if nobody did."""


@SOURCES.register("visdial")
class VisDialSource(InstructionSource):
    """VisDial 1.0: a caption and up to ten rounds about an image. Questions and answers are listed
    once, and referred to by number.

    A document is one round: the caption and the earlier rounds precede its question.
    """

    task = "vqa"
    more_files = ("relevance",)

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the files and the images are, and how images are named."""

        image_name: str = "VisualDialog_val2018_{image_id:012d}.jpg"
        """Name of an image, with the slot {image_id}."""
        relevance: Annotated[str, Location()] | None = None
        """The dense annotations JSON, such as visdial_1.0_val_dense_annotations.json: only the
        rounds rated there are read, with their candidates; null = every round."""

        def check(self) -> None:
            check_image_name(self.image_name, 1)

    config: Config

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        path = f"data.path: {self.config.path}"
        what = "the JSON of VisDial 1.0, such as visdial_1.0_val.json"
        if isinstance(content, Mapping) and content.get("version") not in (None, "1.0"):
            raise UserError(f"{path} is of version {content['version']}; give {what}")

        data = content.get("data") if isinstance(content, Mapping) else None
        dialogs = [
            dialog for dialog in listed(data, "dialogs", path, what) if isinstance(dialog, Mapping)
        ]
        self._questions = listed(data, "questions", path, what)
        self._answers = listed(data, "answers", path, what)

        # With ratings, only the rounds that are rated count.
        rated = self._rated()
        found: list[Any] = []
        for dialog in dialogs:
            image_id = id_key(dialog.get("image_id"))
            for number in range(len(dialog.get("dialog") or ())):
                if rated is None:
                    found.append((dialog, number, None))
                elif (image_id, number) in rated:
                    found.append((dialog, number, rated[image_id, number]))
        if rated and not found:
            raise UserError(
                f"data.relevance: {self.config.relevance} rates none of the rounds of "
                f"{self.config.path}; give that of the same split"
            )
        return found

    def example(self, entry: Any, rng: Random) -> Example:
        dialog, number, relevance = entry
        image_id = integer(dialog.get("image_id"), "the image_id")
        rounds = [turn if isinstance(turn, Mapping) else {} for turn in dialog["dialog"]]

        # What was said before the round.
        said = [self._sentence(self.words(dialog.get("caption"), "the caption"))]
        for turn in rounds[:number]:
            said.append(self._question(turn))
            said.append(self._sentence(self._answer(turn.get("answer"))))

        turn = rounds[number]
        options = tuple(self._answer(option) for option in turn.get("answer_options") or ())
        if relevance is not None and len(relevance) != len(options):
            raise BadRecord(f"{len(relevance)} relevances for {len(options)} candidates")

        question = self._question(turn)
        if "answer" not in turn:
            raise BadRecord("the round has no answer")
        values = {
            "question": " ".join([*said, question]),
            "answer": self._answer(turn["answer"]),
            "image": self.image(self.config.image_name.format(image_id=image_id)),
        }
        truth = (values["answer"],)
        return RankedExample(
            f"visdial-{image_id}-{number + 1}",
            values,
            truth,
            options=options,
            relevance=tuple(relevance or ()),
        )

    # ------------------------------------------------------------------------------------ parts

    def _rated(self) -> dict[tuple[Any, int], list[float]] | None:
        """The relevances of candidates, by image id and round (from 0); None if not asked for."""
        if self.config.relevance is None:
            return None
        content = read_json(Files(self.config.relevance, "data.relevance"), "data.relevance")
        wrong = UserError(
            f"data.relevance: {self.config.relevance} is not a list of image_id, round_id and "
            "gt_relevance; give VisDial's dense annotations"
        )
        if not isinstance(content, list):
            raise wrong
        try:
            # The annotations of training call it `relevance`, those of validation `gt_relevance`.
            rated: dict[tuple[Any, int], list[float]] = {}
            for each in content:
                values = each.get("gt_relevance", each.get("relevance"))
                key = (id_key(each["image_id"]), each["round_id"] - 1)
                rated[key] = [float(value) for value in values]
            return rated
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise wrong from error

    def _question(self, turn: Mapping[str, Any]) -> str:
        """The question of a round, with its question mark."""
        text = self._of(self._questions, turn.get("question"), "question")
        return text if text.endswith("?") else f"{text}?"

    def _answer(self, number: Any) -> str:
        """An answer by its number."""
        return self._of(self._answers, number, "answer")

    def _of(self, texts: list[Any], number: Any, what: str) -> str:
        """The text of that number in a list. Raises BadRecord for one that is not listed."""
        index = integer(number, f"the number of the {what}")
        if not 0 <= index < len(texts):
            raise BadRecord(f"{what} {index} is not listed")
        return self.words(texts[index], f"the {what}")

    @staticmethod
    def _sentence(text: str) -> str:
        """A text with a full stop, if it does not end a sentence already."""
        return text if text[-1] in ".!?" else f"{text}."
