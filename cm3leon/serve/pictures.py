"""Images between pixels, codes and files: clients' images, finished ones, and partial ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cm3leon.api import CM3Leon
from cm3leon.data.images import UnusableImage, decode_image, decode_transparency
from cm3leon.tasks.prompts import mask_codes
from cm3leon.types import UserError

NOT_YET = 128
"""Grey value of pixels that are not drawn yet."""


def encoded(image: Image.Image, kind: str) -> str:
    """An image as a file of a format (png, jpeg or webp), in base64."""
    file = io.BytesIO()
    image.save(file, kind.upper())
    return base64.b64encode(file.getvalue()).decode()


def data_url(image: Image.Image) -> str:
    """An image as a data URL."""
    return f"data:image/png;base64,{encoded(image, 'png')}"


def given_pixels(content: bytes, where: str, *, size: int, max_pixels: int) -> np.ndarray:
    """Pixels (size, size, 3) of an image file's central square, which is what the model sees.

    Raises:
        UserError: for a file that cannot be read, or has too many pixels.
    """
    try:
        return decode_image(content, max_pixels, where, size=size)
    except UnusableImage as error:
        raise UserError(f"{where} cannot be used: {error}") from error


def given_mask(
    image: bytes,
    mask: bytes | None,
    box: tuple[int, int, int, int] | None,
    *,
    grid: int,
    max_pixels: int,
) -> np.ndarray:
    """The codes (grid, grid) of an image that a mask, or a box, asks for.

    Args:
        mask: an image file of the same size; its transparent pixels are filled in.
        box: left, top, right, bottom in pixels, if there is no mask.

    Raises:
        UserError: for a file that cannot be read, a mask of another size or without transparency, a
            box outside of the image, or one that has nothing in the central square.
    """
    try:
        height, width = decode_image(image, max_pixels, "image").shape[:2]
    except UnusableImage as error:
        raise UserError(f"image cannot be used: {error}; give another image file") from error

    # The pixels that are asked for, in the image's own size.
    if mask is not None:
        try:
            asked_HW = decode_transparency(mask, max_pixels)
        except UnusableImage as error:
            raise UserError(
                f"mask cannot be used: {error}; give an image file whose transparent pixels are "
                "made anew"
            ) from error
    else:
        assert box is not None
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UserError(
                f"box is {box}; it must be (left, top, right, bottom) inside the image of "
                f"{width} x {height} pixels"
            )
        asked_HW = np.zeros((height, width), bool)
        asked_HW[top:bottom, left:right] = True

    if asked_HW.shape != (height, width):
        raise UserError(
            f"mask has {asked_HW.shape[1]} x {asked_HW.shape[0]} pixels; it must have as many as "
            f"the image, {width} x {height}"
        )

    # A code is filled in if one of its pixels is asked for.
    codes_GG = mask_codes(asked_HW, (grid, grid))
    if not codes_GG.any():
        raise UserError(
            "nothing is to be made anew in the central square of the image, which is all that the "
            "model sees; mark a part of it"
        )
    return codes_GG


@dataclass
class Canvas:
    """Shows an image whose codes are still being drawn.

    given  5 5 5 5    asked  . . . .    drawn so far  7 8    shown  5 5 5 5
           5 5 5 5           . 1 1 .                                5 7 8 5
           5 5 5 5           . 1 1 .                                5 ▒ ▒ 5
    """

    model: CM3Leon
    asked_GG: np.ndarray
    """Whether each code is drawn, in reading order."""
    given_N: np.ndarray
    """Codes of the whole image; those where codes are drawn are not used."""

    @classmethod
    def empty(cls, model: CM3Leon) -> Canvas:
        """An image of which nothing is given."""
        grid = model.run.grid
        return cls(model, np.ones(grid, bool), np.zeros(grid[0] * grid[1], np.int64))

    def image(self, tokens: Sequence[int]) -> Image.Image:
        """The image with the codes among the tokens; what is not drawn yet is grey."""
        vocab, tokenizer = self.model.run.vocab, self.model.run.image_tokenizer
        ids_T = np.asarray(tokens, np.int64)
        drawn_K = vocab.image_codes(ids_T[vocab.is_image(ids_T)])
        places_M = np.flatnonzero(self.asked_GG)

        # Codes that are not drawn yet show at the edges of their neighbours: the last drawn code is
        # the best guess for them.
        codes_N = self.given_N.copy()
        codes_N[places_M] = drawn_K[-1] if len(drawn_K) else 0
        codes_N[places_M[: len(drawn_K)]] = drawn_K
        (pixels_HWC,) = tokenizer.decode(codes_N[None])

        # Each code covers a square of pixels.
        missing_N = np.zeros(len(codes_N), bool)
        missing_N[places_M[len(drawn_K) :]] = True
        scale = tokenizer.image_size // tokenizer.grid
        cell = np.ones((scale, scale), bool)
        pixels_HWC[np.kron(missing_N.reshape(self.asked_GG.shape), cell)] = NOT_YET
        return Image.fromarray(pixels_HWC)
