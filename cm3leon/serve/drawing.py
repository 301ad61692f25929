"""Requests for images: drawn for a text, filled in by a mask, changed by an instruction."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
from PIL import Image

from cm3leon.api import CM3Leon, GeneratedImage
from cm3leon.serve.asked import EditAsked, GenerationAsked, ImagesAsked, decoder_of
from cm3leon.serve.desk import Answered, Growing, Work
from cm3leon.serve.events import ALIVE, event, with_errors
from cm3leon.serve.pictures import Canvas, encoded, given_mask, given_pixels
from cm3leon.serve.service import is_tuned
from cm3leon.serve.setting import Setting
from cm3leon.types import UserError


@dataclass
class Drawing:
    """A request for images: how they are made, and how they are sent."""

    setting: Setting
    asked: ImagesAsked
    kind: str
    """OpenAI's name of its events: image_generation or image_edit."""
    draw: Callable[[CM3Leon], list[dict[str, Any]]]
    canvas: Callable[[CM3Leon], Canvas]
    """Makes the canvas that shows partial images."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def every(self) -> None:
        """None: a stream shows images row by row."""

    @property
    def work(self) -> Work[list[dict[str, Any]]]:
        """What a thread does with the model."""
        return self.draw

    def body(self, answered: Answered[list[dict[str, Any]]]) -> dict[str, Any]:
        """The answer as OpenAI's JSON of images."""
        return {
            "created": self.created,
            "data": answered.result,
            **self._look(),
            "usage": answered.usage,
            "warnings": [str(notice) for notice in answered.notices],
        }

    def events(self, growing: Growing[list[dict[str, Any]]]) -> AsyncIterator[bytes]:
        """The answer as OpenAI's events: partial images, then the finished ones, the best first."""
        return with_errors(self._events(growing))

    async def _events(self, growing: Growing[list[dict[str, Any]]]) -> AsyncIterator[bytes]:
        desk = self.setting.desk
        shown: dict[int, int] = {}
        canvas: Canvas | None = None

        # The canvas is made with the first partial image, by a thread that may ask the model.
        def render(tokens: Sequence[int]) -> str | None:
            nonlocal canvas
            with desk.service.asking(growing.job.caller) as model:
                canvas = canvas or self.canvas(model)
                return encoded(canvas.image(tokens), self.asked.output_format)

        try:
            async for state in growing.states():
                if state is None:
                    yield ALIVE
                    continue
                sample, tokens = state
                if not self._is_due(tokens, shown.get(sample, 0)):
                    continue
                data = {
                    "type": f"{self.kind}.partial_image",
                    "b64_json": await desk.briefly(partial(render, tokens)),
                    "partial_image_index": shown.get(sample, 0),
                    "sample_index": sample,
                    "created_at": self.created,
                    **self._look(),
                }
                shown[sample] = shown.get(sample, 0) + 1
                yield event(data)

            answered = growing.answered()
            for image in answered.result:
                data = {
                    "type": f"{self.kind}.completed",
                    **image,
                    "created_at": self.created,
                    **self._look(),
                    "usage": answered.usage,
                }
                yield event(data)
        finally:
            await growing.close()

    def _is_due(self, tokens: Sequence[int], shown: int) -> bool:
        """Whether a sample has enough codes for its next partial image.

        Of 3 partial images, the first is due at a quarter of the codes.
        """
        wanted = self.asked.partial_images
        if wanted is None:
            return True
        vocab, grid = self.setting.model.run.vocab, self.setting.model.run.grid
        drawn = int(vocab.is_image(np.asarray(tokens)).sum())
        return shown < wanted and drawn * (wanted + 1) >= (shown + 1) * grid[0] * grid[1]

    def _look(self) -> dict[str, Any]:
        return {
            "background": "opaque",
            "output_format": self.asked.output_format,
            "quality": "auto",
            "size": self.setting.image_size,
        }


def generation(setting: Setting, asked: GenerationAsked) -> Drawing:
    """A request for images of a text."""
    usual = setting.model.run.experiment.decoder
    decoder: Any = decoder_of(asked.decoder, asked.guidance, usual)

    def draw(model: CM3Leon) -> list[dict[str, Any]]:
        assert asked.seed is not None
        pictures = model.generate(
            asked.prompt, n=asked.n, retrieve=asked.retrieve, decoder=decoder, seed=asked.seed
        )
        return [_told(picture, asked.output_format) for picture in pictures]

    return Drawing(setting, asked, "image_generation", draw, Canvas.empty)


def edit(setting: Setting, asked: EditAsked, files: Mapping[str, bytes]) -> Drawing:
    """A request to edit an image: filled in by a mask or a box, else changed as the prompt says.

    The files are decoded by the work, in a thread, and not in the event loop.

    Raises:
        UserError: for missing or unknown files, or for an instruction if the model was not tuned on
            instructions.
    """
    unknown = set(files) - {"image", "mask"}
    if unknown:
        raise UserError(f"{min(unknown)} is not a known file; known: image, mask")
    if "image" not in files:
        raise UserError("image is missing; give an image file")
    image, mask = files["image"], files.get("mask")
    limits = setting.limits
    if mask is not None and asked.box is not None:
        raise UserError("mask and box are both given; give one of them")
    look = partial(given_pixels, image, "image", size=setting.size, max_pixels=limits.pixels)
    if mask is None and asked.box is None:
        return _instruction(setting, asked, look)

    grid = setting.model.run.grid[0]
    find = partial(given_mask, image, mask, asked.box, grid=grid, max_pixels=limits.pixels)
    return _infilling(setting, asked, look, find)


def _infilling(
    setting: Setting,
    asked: EditAsked,
    look: Callable[[], np.ndarray],
    find: Callable[[], np.ndarray],
) -> Drawing:
    """A request to fill in a part of an image.

    Args:
        look: the pixels (H, W, 3) of the image.
        find: the codes (grid, grid) to fill in.
    """
    usual = setting.model.run.experiment.decoder
    decoder: Any = decoder_of(asked.decoder, asked.guidance, usual)

    # Decoded once, by whichever thread comes first: the one that draws or the one that shows.
    @cache
    def given() -> tuple[np.ndarray, np.ndarray]:
        return look(), find()

    def draw(model: CM3Leon) -> list[dict[str, Any]]:
        assert asked.seed is not None
        pixels_HWC, codes_GG = given()
        scale = setting.size // len(codes_GG)
        mask_HW = np.kron(codes_GG, np.ones((scale, scale), bool))
        filled = model.infills(
            pixels_HWC, asked.prompt, n=asked.n, mask=mask_HW, decoder=decoder, seed=asked.seed
        )
        return [
            {"b64_json": encoded(each.image, asked.output_format), "seed": asked.seed + number}
            for number, each in enumerate(filled)
        ]

    def canvas(model: CM3Leon) -> Canvas:
        pixels_HWC, codes_GG = given()
        return Canvas(model, codes_GG, model.run.image_tokenizer.encode(pixels_HWC[None])[0])

    return Drawing(setting, asked, "image_edit", draw, canvas)


def _instruction(setting: Setting, asked: EditAsked, look: Callable[[], np.ndarray]) -> Drawing:
    """A request to change an image as the prompt says; `look` returns its pixels (H, W, 3)."""
    if not is_tuned(setting.model):
        raise UserError(
            f"mask is missing, and {setting.name} was not fine-tuned on instructions "
            "(docs/tasks.md): give a mask whose transparent pixels are to be made anew, or a box"
        )
    decoder: Any = decoder_of(asked.decoder, asked.guidance, "edit")

    def draw(model: CM3Leon) -> list[dict[str, Any]]:
        assert asked.seed is not None
        image = Image.fromarray(look())
        pictures = model.edit(image, asked.prompt, n=asked.n, decoder=decoder, seed=asked.seed)
        return [_told(picture, asked.output_format) for picture in pictures]

    return Drawing(setting, asked, "image_edit", draw, Canvas.empty)


def _told(picture: GeneratedImage, kind: str) -> dict[str, Any]:
    """An image in OpenAI's form, with the seed that makes it again, its score and its documents."""
    told: dict[str, Any] = {"b64_json": encoded(picture.image, kind), "seed": picture.seed}
    if not np.isnan(picture.score):
        told["score"] = picture.score
    if picture.asked:
        told["documents"] = [{"id": each.id, "text": each.text} for each in picture.documents]
        told["shortage"] = picture.shortage
    return told
