"""Templates of instructions, as the paper prints them, filled into segments with roles.

    template    Question: {question} The answer is {answer}. | {image}
    segments    "Question: What is it? The answer is"       text
                " a dog"                                    text, role answer, joined to the last
                "."                                         text, joined to the last
                <the image>

Joined segments have no <break> between them: the answer can be rotated to the end, or asked for,
and reads the same as in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cm3leon.data.file_source import MarkedImage
from cm3leon.types import ImageSegment, Role, TextSegment, UserError

TABLE_5: dict[str, tuple[str, ...]] = {
    "edit": ("Edit first image following the instruction | {image1} | {instruction} | {image2}",),
    "write": ('draw "{text}" | {image}',),
    "grounded": (
        "Generate high quality image of {caption} with segmentations {objects} | {image}",
    ),
    "features": ("Make high quality image from {feature} | {feature_image} | {caption} | {image}",),
    "caption": ("{caption} | {image}", "Describe the given picture. {caption} | {image}"),
    "paragraph": (
        "Describe the given picture in very detail. {caption} | {image}",
        "Describe all the objects in the given image in very detail. {caption} | {image}",
        "Generate a long caption for the given image. {caption} | {image}",
    ),
    "narrative": (
        "Describe the given picture in very detail. {caption} | {image}",
        "Generate a long narration of what is happening in the given image. {caption} | {image}",
        "Generate a long caption for the given image. {caption} | {image}",
    ),
    "vqa": (
        "Question: {question} Answer: {answer}. | {image}",
        "Question: {question}\n{answer} | {image}",
        "Question: {question} The answer is {answer}. | {image}",
    ),
    "reasoning": (
        "Question: {question}\nContext: {context}\nOptions: {options}\nAnswer: {answer}. | {image}",
        "Question: {question}\nContext: {context}\nOptions: {options}\n"
        "Answer: Let's think step-by-step: {steps} | {image}",
    ),
}
"""Templates by task. ` | ` is a `<break>`, {name} a slot; {steps} is "{explanation} So the answer is
{answer}."."""

ROLES: dict[str, dict[str, Role]] = {
    "edit": {"image1": "condition", "instruction": "instruction"},
    "write": {"text": "instruction"},
    "grounded": {"caption": "instruction"},
    "features": {"feature_image": "condition", "caption": "instruction"},
    "caption": {"caption": "answer"},
    "paragraph": {"caption": "answer"},
    "narrative": {"caption": "answer"},
    "vqa": {"answer": "answer"},
    "reasoning": {"answer": "answer", "steps": "answer"},
}
"""Roles of the slots, by task. A text with an instruction in it has that role as a whole."""

FEATURES = {
    "canny": "canny edge features",
    "segmentation": "a segmentation map",
    "hed": "hed features",
    "pose": "openpose features",
    "depth": "depth features",
    "normals": "3D norm features",
    "scribble": "children's scribbles",
}
"""What the templates call each kind of feature image."""

_SLOT = re.compile(r"\{(\w+)\}")


def check_templates(task: str, templates: list[str], where: str = "data.templates") -> None:
    """Check the templates of a task.

    Raises:
        UserError: for a template with a slot that the task does not fill, or without exactly one
            slot for the answer if the task has one.
    """
    known = {slot for template in TABLE_5[task] for slot in _SLOT.findall(template)}
    if not templates:
        raise UserError(
            f"{where} is empty; at least one template is needed, such as {TABLE_5[task][0]!r}"
        )
    for template in templates:
        slots = _SLOT.findall(template)
        wrong = [slot for slot in slots if slot not in known]
        if wrong:
            raise UserError(
                f"{where} has {{{wrong[0]}}}, which {task} does not fill; it fills: "
                f"{', '.join(sorted(known))}"
            )
        answers = [slot for slot in slots if ROLES[task].get(slot) == "answer"]
        if "answer" in ROLES[task].values() and len(answers) != 1:
            raise UserError(f"{where} holds {template!r}, which must have one slot for the answer")


def picture_of(template: str, values: Mapping[str, Any]) -> int:
    """The index, among a template's images, of the one that the example is about: the first image
    of an edit, else the one generated or asked about, not its features. 0 if there is none."""
    images = [slot for slot in _SLOT.findall(template) if not isinstance(values[slot], str)]
    subject = next((slot for slot in ("image1", "image") if slot in images), None)
    return images.index(subject) if subject else 0


def fill(
    template: str, values: Mapping[str, Any], roles: Mapping[str, Role]
) -> tuple[TextSegment | MarkedImage, ...]:
    """Fill a template into segments: texts, and images as they are among the values.

    An answer within a text is a segment of its own, joined to the one before it, and begins with
    the space between them. So it can be rotated as a whole, and reads the same whether it is given
    or asked for.
    """
    segments: list[TextSegment | MarkedImage] = []
    for piece in template.split(" | "):
        # A piece that is just the slot of an image is that image; all others are texts.
        slots = _SLOT.findall(piece)
        if len(slots) == 1 and piece == f"{{{slots[0]}}}" and not isinstance(values[slots[0]], str):
            segments.append(MarkedImage(values[slots[0]], roles.get(slots[0], "")))
        else:
            segments += _texts(piece, slots, values, roles)
    return tuple(segments)


def fill_with_pixels(
    template: str, values: Mapping[str, Any], roles: Mapping[str, Role]
) -> tuple[TextSegment | ImageSegment, ...]:
    """Fill a template as `fill` does, where images are given as pixels (H, W, 3)."""
    segments: list[TextSegment | ImageSegment] = []
    for segment in fill(template, values, roles):
        if isinstance(segment, MarkedImage):
            segments.append(ImageSegment(np.asarray(segment.content), segment.role))
        else:
            segments.append(segment)
    return tuple(segments)


def _texts(
    piece: str, slots: list[str], values: Mapping[str, Any], roles: Mapping[str, Role]
) -> list[TextSegment]:
    """Fill a text; an answer in it becomes a segment of its own."""

    def filled(text: str) -> str:
        return _SLOT.sub(lambda match: values[match[1]], text)

    answer = next((slot for slot in slots if roles.get(slot) == "answer"), None)
    if answer is None:
        is_instruction = any(roles.get(slot) == "instruction" for slot in slots)
        return [TextSegment(filled(piece), "instruction" if is_instruction else "")]

    # The space before the answer belongs to the answer, as it does to a word's first token.
    before, after = map(filled, piece.split(f"{{{answer}}}"))
    given = before.rstrip()
    answer_text = TextSegment(before[len(given) :] + values[answer], "answer", joined=bool(given))
    parts = (TextSegment(given), answer_text, TextSegment(after, joined=True))
    return [part for part in parts if part.text]
