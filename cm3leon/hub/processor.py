"""The files of transformers' `ChameleonProcessor`, which makes the input of an exported Chameleon.

It writes an image into the text, by the names of its tokens. So the tokens must have the names of
Chameleon's vocabulary, as in public weights, and a sample Chameleon's layout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from PIL import Image

from cm3leon.tokenizers.layout import Grid, Layout

PLACEHOLDER = "<image>"
"""The token in whose place the model puts an image's codes."""


def has_processor(layout: Layout, names: Collection[str]) -> bool:
    """Whether the processor can write samples in a layout.

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
    """Settings of the tokenizer that the processor needs.

    Args:
        opens: name of the token in front of an image.
        closes: name of the token behind an image.
        turn: name of the token that ends a question.
    """
    around = {"image_token": PLACEHOLDER, "boi_token": opens, "eoi_token": closes}
    return {"sep_token": turn, "extra_special_tokens": around}


def processor_files(size: int, grid: Grid) -> Mapping[str, Mapping[str, Any]]:
    """The settings of the processor, and of its image processor: one size, pixels in [-1, 1].

    Args:
        size: height and width of an image, in pixels.
        grid: rows and columns of its codes.
    """
    rows, columns = grid

    # A pixel p becomes p / 127.5 - 1, by a rescaling and a mean of 1.
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
