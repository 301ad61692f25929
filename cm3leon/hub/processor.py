"""Files of transformers' `ChameleonProcessor`, which turns texts and images into what the exported
Chameleon reads.

It writes an image as ids by their names, in a text: so the names have to be those of its
vocabulary, which public weights have, and the layout has to be Chameleon's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from PIL import Image

from cm3leon.tokenizers.layout import Grid, Layout

PLACEHOLDER = "<image>"
"""The token in whose place the model puts an image's codes."""


def has_processor(layout: Layout, names: Collection[str]) -> bool:
    """Whether the processor lays samples out as a layout says.

    Args:
        names: of the vocabulary's tokens.
    """
    return (
        PLACEHOLDER in names
        and len(layout.image_open) == len(layout.image_close) == len(layout.turn) == 1
        and not layout.sizes
        and layout.row_close is None
    )


def special_tokens(opens: str, closes: str, turn: str) -> dict[str, Any]:
    """Settings of the tokenizer that the processor asks for.

    Args:
        opens: name of what stands in front of an image.
        closes: name of what stands behind an image.
        turn: name of what ends a question.
    """
    around = {"image_token": PLACEHOLDER, "boi_token": opens, "eoi_token": closes}
    return {"sep_token": turn, "extra_special_tokens": around}


def processor_files(size: int, grid: Grid) -> Mapping[str, Mapping[str, Any]]:
    """The processor's settings, and those of what it does with images: pixels in [-1, 1], in one
    size.

    Args:
        size: height and width of an image, in pixels.
        grid: rows and columns of its codes.
    """
    rows, columns = grid
    pixels = {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "do_normalize": True,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    processor = {
        "processor_class": "ChameleonProcessor",
        "image_seq_length": rows * columns,
        "image_token": PLACEHOLDER,
    }
    return {"preprocessor_config.json": pixels, "processor_config.json": processor}
