"""What the measure of emojis reads in true drawings, in noise and in others.

OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/emoji_measure.py [side=24]
"""

from __future__ import annotations

import sys

import numpy as np

from cm3leon.evaluation.protocols.base import Answer
from cm3leon.plugins.emoji.protocols import EmojiTask

NOISE = (10, 25, 50)


def main(side: int) -> None:
    """Print the figures of both parts, a line for each thing that is done to the true drawings."""
    for part in ("compositions", "objects"):
        task = EmojiTask(EmojiTask.Config(task="text_to_image", side=side, part=part))
        items = task.items()
        true_BHWC = np.stack([item.document.images[-1] for item in items])
        rng = np.random.default_rng(0)
        shown = {"true": true_BHWC, "others": np.roll(true_BHWC, 1, axis=0)}
        for deviation in NOISE:
            shown[f"noise {deviation}"] = true_BHWC + rng.normal(0, deviation, true_BHWC.shape)
        shown["random"] = rng.integers(0, 256, true_BHWC.shape)
        for name, pixels_BHWC in shown.items():
            images_BHWC = np.clip(pixels_BHWC, 0, 255).round().astype(np.uint8)
            figures = task.score(items, [Answer(image_HWC=image) for image in images_BHWC])
            told = ", ".join(f"{key} {found.value:.3f}" for key, found in figures.items())
            print(f"{side} pixels, {part}, {name}: {told}")


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("side=")) if len(sys.argv) > 1 else 24)
