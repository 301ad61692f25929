"""The measure of emojis on answers whose quality is known.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/emoji_measure.py [side=24]

The answers are the true drawings, the drawings of other items, true ones with noise, and noise
alone. A good measure is near 1 for the first and as low as chance for the second and the last. What
it reads in noisy drawings says how much of a drawing it needs.
"""

from __future__ import annotations

import sys

import numpy as np

from cm3leon.evaluation.protocols.base import Answer
from cm3leon.plugins.emoji.protocols import EmojiTask

NOISE = (10, 25, 50)
"""Standard deviations of the noise, of pixels in 0 to 255."""


def main(side: int) -> None:
    """Print the figures of both parts, one line for each kind of answers."""
    for part in ("compositions", "objects"):
        task = EmojiTask(EmojiTask.Config(task="text_to_image", side=side, part=part))
        items = task.items()
        true_BHWC = np.stack([item.document.images[-1] for item in items])

        # Rolled by one, every item is answered by the drawing of the item before it.
        rng = np.random.default_rng(0)
        answers = {"true": true_BHWC, "others": np.roll(true_BHWC, 1, axis=0)}
        for deviation in NOISE:
            answers[f"noise {deviation}"] = true_BHWC + rng.normal(0, deviation, true_BHWC.shape)
        answers["random"] = rng.integers(0, 256, true_BHWC.shape)

        for name, pixels_BHWC in answers.items():
            images_BHWC = np.clip(pixels_BHWC, 0, 255).round().astype(np.uint8)
            figures = task.score(items, [Answer(image_HWC=image) for image in images_BHWC])
            told = ", ".join(f"{key} {found.value:.3f}" for key, found in figures.items())
            print(f"{side} pixels, {part}, {name}: {told}")


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("side=")) if len(sys.argv) > 1 else 24)
