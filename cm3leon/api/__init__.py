"""Use a finished run from Python.

from cm3leon import CM3Leon

model = CM3Leon.load("runs/digits")
best = model.generate("a handwritten seven", n=8, retrieve=2)[0]
best.image.save("seven.png")
model.caption(best.image)
"""

from cm3leon.api.answers import (
    NO_MORE,
    NO_ROOM,
    Completed,
    Filled,
    FoundDocument,
    GeneratedImage,
    Images,
    ShortageWarning,
    TruncatedWarning,
    UnrankedWarning,
    UntunedWarning,
    UsedDocument,
    found_of,
    shortened,
)
from cm3leon.api.given import DecoderChoice
from cm3leon.api.model import CM3Leon, asked_through

__all__ = [
    "NO_MORE",
    "NO_ROOM",
    "CM3Leon",
    "Completed",
    "DecoderChoice",
    "Filled",
    "FoundDocument",
    "GeneratedImage",
    "Images",
    "ShortageWarning",
    "TruncatedWarning",
    "UnrankedWarning",
    "UntunedWarning",
    "UsedDocument",
    "asked_through",
    "found_of",
    "shortened",
]
