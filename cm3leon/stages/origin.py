"""Whose weights a run's are: the licence that they came under, and the model on the Hub that they
were made from.

It is written beside the decoder when weights are imported. A run that starts from another keeps
what stands there, so that it is known when the run goes out, wherever the other one is by then.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from cm3leon.io import read_json, write_json

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Origin:
    """Where weights came from; None where that is not known, or they began as random numbers."""

    licence: str | None = None
    """By its name."""
    base_model: str | None = None
    """By its name on the Hub."""

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """What a file says of it."""
        return cls(content.get("licence"), content.get("base_model"))

    @classmethod
    def of(cls, pretraining: Path) -> Self:
        """That of a decoder's folder."""
        file = pretraining / ORIGIN
        if not file.is_file():
            return cls()
        return cls.from_mapping(read_json(file, {"licence?": str, "base_model?": str}))

    def save(self, pretraining: Path) -> None:
        """Write it beside a decoder's weights, if there is something to say."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        if content:
            write_json(pretraining / ORIGIN, content)


def keep_origin(start: Path, pretraining: Path) -> None:
    """Take over what stands beside the weights that a training started from."""
    if (start / ORIGIN).is_file():
        shutil.copyfile(start / ORIGIN, pretraining / ORIGIN)
