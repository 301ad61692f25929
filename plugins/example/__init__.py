"""The smallest complete plugin: one class, registered by name.

`python -m cm3leon.run --list` shows it as `distinct_words` from `plugins/example`. To make your own, copy this folder,
or put one like it anywhere and name its path in the experiment: `plugins: [path/to/folder]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cm3leon.registry import METRICS


@METRICS.register("distinct_words")
class DistinctWords:
    """Share of different words among all words of the texts: 1 without repetition, near 0 for a loop.

    `["a red dog", "a dog"]` has 3 different words among 5, so 0.6.
    """

    @dataclass(kw_only=True)
    class Config:
        lower_case: bool = True
        """Whether words that differ in case alone are the same word."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, texts: Sequence[str]) -> float:
        """The share, 0 where there are no words."""
        words = [word.lower() if self.config.lower_case else word for text in texts for word in text.split()]
        return len(set(words)) / len(words) if words else 0.0
