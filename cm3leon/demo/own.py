"""Documents that a browser adds to the memory bank for itself, in memory, until it leaves."""

from __future__ import annotations

import json
import tempfile
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from cm3leon.api import CM3Leon
from cm3leon.demo.entered import text_of
from cm3leon.stages.run_folder import RunFolder
from cm3leon.types import UserError

DOCUMENTS = "own.jsonl"
"""Name of the file that the page offers, with a document in each line."""
MOST = 32
"""The most documents of a browser."""


@dataclass
class _Own:
    """What one browser has added."""

    lines: list[str] = field(default_factory=list)
    images: dict[str, Image.Image] = field(default_factory=dict)
    run: RunFolder | None = None
    """The run with the documents; None = no document was added yet."""


class SessionDocuments:
    """The documents of all browsers, each seen by the session that added it."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Own] = {}

    def count(self, session: str) -> int:
        """How many documents a session has added."""
        own = self._sessions.get(session)
        return len(own.lines) if own else 0

    def of(self, session: str, model: CM3Leon) -> CM3Leon:
        """The model as the session sees it: with its own documents in the memory bank."""
        own = self._sessions.get(session)
        if own is None or own.run is None:
            return model
        other = copy(model)
        other.run = own.run
        return other

    def files(self, session: str) -> dict[str, Image.Image | str]:
        """The files that `with_documents` reads, by their names; empty without own documents."""
        own = self._sessions.get(session, _Own())
        if not own.lines:
            return {}
        return {DOCUMENTS: "".join(f"{line}\n" for line in own.lines), **own.images}

    def add(self, session: str, model: CM3Leon, pixels_HWC: np.ndarray, text: str) -> int:
        """Add a document, and return its row in the memory bank.

        Args:
            model: as `of` returns it for the session.
            pixels_HWC: the image's pixels as the model sees them.

        Raises:
            UserError: for an empty text, or too many documents.
        """
        text = text_of(text, "the document's text")
        number = self.count(session)
        if number >= MOST:
            raise UserError(f"this page has {MOST} own documents, and takes no more")
        name = f"own_{number}.png"
        line = json.dumps({"id": f"own_{number}", "image": name, "text": text})

        # The model reads the document from a file, like the command that makes a result again.
        with tempfile.TemporaryDirectory(prefix="cm3leon-own-") as folder:
            image = Image.fromarray(pixels_HWC)
            image.save(Path(folder) / name)
            (Path(folder) / DOCUMENTS).write_text(f"{line}\n", encoding="utf-8")
            run = model.with_documents(Path(folder) / DOCUMENTS).run

        own = self._sessions.setdefault(session, _Own())
        own.lines.append(line)
        own.images[name] = image
        own.run = run
        return len(run.bank) - 1

    def forget(self, session: str) -> None:
        """Give up the documents of a session that has ended."""
        self._sessions.pop(session, None)
