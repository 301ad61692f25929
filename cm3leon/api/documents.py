"""Make documents of tokens from what callers give: texts, images, pages and instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cm3leon.data.images import ImageInput, read_given_image, square
from cm3leon.data.instructions.templates import ROLES, TABLE_5
from cm3leon.data.instructions.templates import fill as fill_template
from cm3leon.stages.run_folder import RunFolder
from cm3leon.tokenizers.layout import Grid
from cm3leon.types import TextSegment, TokenDocument, TokenSegment, UserError


class Documents:
    """The tokenizers of a finished run, applied to texts and images."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._fresh = TokenSegment("image", np.empty(0, np.int64), grid=run.grid)

    def _instruction(self, task: str, **values: np.ndarray | str | None) -> TokenDocument:
        """Fill the first template of a task.

        Args:
            task: name of the task.
            values: texts and pixels of the template's fields; None for an image to be generated.
        """
        segments: list[TokenSegment] = []
        for segment in fill_template(TABLE_5[task][0], values, ROLES[task]):
            if isinstance(segment, TextSegment):
                ids_T = self.run.text_tokenizer.encode(segment.text)
                segments.append(TokenSegment("text", ids_T, segment.role, segment.joined))
            else:
                given: Any = segment.content
                image = self._fresh if given is None else self._image(given)
                segments.append(replace(image, role=segment.role))
        return TokenDocument(task, tuple(segments))

    def _page(self, parts: Sequence[str | ImageInput], *more: TokenSegment) -> TokenDocument:
        """Make a document of texts and images, followed by more segments."""
        given = [
            self._text(part) if isinstance(part, str) else self._image(self._pixels(part))
            for part in parts
        ]
        return TokenDocument("page", (*given, *more))

    def _text(self, text: str) -> TokenSegment:
        return TokenSegment("text", self.run.text_tokenizer.encode(text))

    def _pixels(self, image: ImageInput, argument: str = "image") -> np.ndarray:
        return np.array(self.run.fitted(read_given_image(image, argument)))

    def _square(self, image: ImageInput) -> np.ndarray:
        """Cut an image to the square (1, H, W, 3) that retrieval uses for images of all shapes."""
        size = self.run.image_tokenizer.image_size
        return np.array(square(read_given_image(image, "image"), size))[None]

    def _image(self, pixels_HWC: np.ndarray) -> TokenSegment:
        ((codes_N, grid),) = self.run.encoded([pixels_HWC])
        return TokenSegment("image", self.run.vocab.image_ids(codes_N, grid), grid=grid)

    def _grid_of(self, size: tuple[int, int] | None) -> Grid:
        """Return rows and columns of codes for a width and height in pixels; None = the usual ones.

        Raises:
            UserError: for a size that the model has no tokens for.
        """
        if size is None:
            return self.run.grid

        scale, layout = self.run.image_tokenizer.downsampling, self.run.vocab.layout
        width, height = size
        grid = (height // scale, width // scale)
        whole = (grid[0] * scale, grid[1] * scale) == (height, width)
        if whole and (grid in layout.sizes or grid == self.run.grid):
            return grid

        usual = ", ".join(f"{columns * scale}x{rows * scale}" for rows, columns in self.run.grids)
        more = "one of " if len(self.run.grids) > 1 else ""
        raise UserError(
            f"size is {width}x{height}, which this model has no images of; take {more}{usual}"
        )

    def _decoded(self, segment: TokenSegment) -> np.ndarray:
        """Decode the ids of a whole image to pixels (H, W, 3)."""
        vocab = self.run.vocab
        codes_1N = vocab.image_codes(segment.ids_T)[None]
        grid = vocab.layout.grid_of(segment.ids_T)
        return self.run.image_tokenizer.decode(codes_1N, grid=grid)[0]
