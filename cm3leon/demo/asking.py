"""The questions of the page: functions from a service and what was entered to what is shown.

Nothing here knows of gradio. Mistakes are raised; `sentence_of` is what the page shows of them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cm3leon.api import CM3Leon, FoundDocument, GeneratedImage, found_of
from cm3leon.demo.again import IMAGE, MASK, Recipe
from cm3leon.demo.entered import LONGEST_TEXT, pixels_of, text_of, words_of
from cm3leon.demo.own import DOCUMENTS, SessionDocuments
from cm3leon.serve.engine import Caller
from cm3leon.serve.errors import refusal_of
from cm3leon.serve.pictures import Canvas
from cm3leon.serve.service import Service
from cm3leon.tasks.prompts import mask_codes
from cm3leon.types import Notice, UserError

LOG = logging.getLogger(__name__)
PATIENCE = 1.0
"""Seconds after which a result is shown although it has not grown, so that its browser can
leave."""

Picture = tuple[Image.Image, str]
"""An image and its caption."""


@dataclass(frozen=True, kw_only=True)
class AskLimits:
    """The most that a question may ask for."""

    pixels: int = 16_000_000
    """Pixels of a given image."""
    samples: int = 8
    """Images at a time."""
    documents: int = 8
    """Retrieved documents before a prompt."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is shown: images or a text, sentences about them, and what makes them again."""

    pictures: Sequence[Picture] = ()
    text: str = ""
    told: Sequence[str] = ()
    """Sentences about the result."""
    again: Recipe | None = None
    """None while the result grows."""
    files: Mapping[str, Image.Image | str] = field(default_factory=dict)
    """The files that `again` reads, by their names."""


class Asker:
    """Threads that ask a service for the page's sessions, which may leave.

    Args:
        run: the folder as it was given, for commands.
        loading: the options that it was loaded with, without defaults.
    """

    def __init__(
        self, service: Service, run: Path, loading: dict[str, Any], limits: AskLimits, requests: int
    ) -> None:
        self.service, self.limits = service, limits
        self._run, self._loading = run, loading
        self._callers: dict[str, set[Caller]] = defaultdict(set)
        self.own = SessionDocuments()
        # The engine's thread has all cores; the others compute on one core.
        alone = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(requests, "page", initializer=alone)
        self._brief = ThreadPoolExecutor(1, "brief", initializer=alone)

    @property
    def model(self) -> CM3Leon:
        """The model, for reading its settings."""
        return self.service.model

    @property
    def size(self) -> int:
        """Height and width of images, in pixels."""
        return int(self.model.run.image_tokenizer.image_size)

    def pixels(self, file: str | None) -> np.ndarray:
        """Pixels (size, size, 3) that the model sees of an image file, see `pixels_of`."""
        return pixels_of(file, self.size, self.limits.pixels)

    def close(self) -> None:
        """Give up all questions, and end the threads."""
        for session in list(self._callers):
            self.leave(session)
        for pool in (self._pool, self._brief):
            pool.shutdown(wait=True, cancel_futures=True)

    def leave(self, session: str) -> None:
        """Give up all questions of a session."""
        for caller in list(self._callers.pop(session, ())):
            caller.cancel()

    def end(self, session: str) -> None:
        """Give up the questions and the documents of a session that has ended."""
        self.leave(session)
        self.own.forget(session)

    def briefly(self, session: str, work: Callable[[CM3Leon], Any]) -> Any:
        """Do work that does not use the engine, and return its result."""
        caller = self.service.caller(session)
        return self._brief.submit(self._work, session, caller, work, []).result()

    def watch(
        self,
        session: str,
        work: Callable[[CM3Leon], Result],
        canvas: Callable[[CM3Leon], Canvas] | None = None,
    ) -> Iterator[Result]:
        """Do the work, and yield its result while it grows; the last one is whole.

        Args:
            canvas: makes the canvas that shows partial images; None = none are shown.
        """
        fresh: dict[int, list[int]] = {}
        changed, growing = threading.Event(), dict[int, Image.Image]()
        canvases: list[Canvas] = []

        def put(_: int, sample: int, tokens: list[int]) -> None:
            fresh[sample] = tokens
            changed.set()

        def render(model: CM3Leon, tokens: list[int]) -> Image.Image:
            if not canvases and canvas is not None:
                canvases.append(canvas(model))
            return canvases[0].image(tokens)

        caller = self.service.caller(session, on_tokens=None if canvas is None else put)
        self._callers[session].add(caller)
        notices: list[Notice] = []
        done: Future[Result] = self._pool.submit(self._work, session, caller, work, notices)
        done.add_done_callback(lambda _: changed.set())

        # A session that leaves closes this generator at a `yield`: its samples are given up.
        try:
            while not done.done():
                changed.wait(PATIENCE)
                changed.clear()
                for sample in list(fresh):
                    drawing = partial(render, tokens=fresh.pop(sample))
                    growing[sample] = self.briefly(session, drawing)
                if not done.done():
                    shown = [(growing[each], "...") for each in sorted(growing)]
                    yield Result(pictures=shown)
            result = done.result()
            yield replace(result, told=[*result.told, *map(str, notices)])
        finally:
            caller.cancel()
            self._forget(session, caller)

    def again(
        self,
        command: str,
        method: str,
        positional: dict[str, Any],
        *,
        own: bool = False,
        **options: Any,
    ) -> Recipe:
        """What makes a result of this run again.

        Args:
            own: whether documents that the browser has added were retrieved from too.
        """
        documents = DOCUMENTS if own else ""
        return Recipe(self._run, self._loading, command, method, positional, options, documents)

    def _forget(self, session: str, caller: Caller) -> None:
        callers = self._callers.get(session, set())
        callers.discard(caller)
        if not callers:
            self._callers.pop(session, None)

    def _work(
        self,
        session: str,
        caller: Caller,
        work: Callable[[CM3Leon], Any],
        notices: list[Notice],
    ) -> Any:
        with self.service.asking(caller, notices) as model:
            return work(self.own.of(session, model))


def sentence_of(error: Exception) -> str:
    """The sentence that the page shows for an error; for a bug, that the log has it."""
    refusal = refusal_of(error)
    if refusal is None:
        LOG.error("a question of the page failed", exc_info=error)
        return "the page failed; its log says why"
    return str(refusal)


def documents_for(asker: Asker, session: str, prompt: str, count: int) -> list[FoundDocument]:
    """The documents retrieved for a prompt, the closest last."""
    prompt = text_of(prompt, "prompt")
    return asker.briefly(session, lambda model: model.documents_for(prompt, count))


def draw(
    asker: Asker,
    session: str,
    prompt: str,
    *,
    n: int,
    decoder: Any,
    found: Sequence[int],
    used: Sequence[int],
    seed: int,
) -> Iterator[Result]:
    """Images for a text as they grow, the best first.

    Args:
        found: rows of the memory bank that were retrieved, the closest last.
        used: those of them that are put before the prompt.
    """
    prompt = text_of(prompt, "prompt")
    kept = [row for row in found if row in set(used)]
    own = asker.own.files(session) if kept else {}
    chosen: dict[str, Any] = {"documents": kept} if kept else {}
    # Where all found documents are used, the command only needs their number.
    if kept and kept == list(found):
        chosen = {"retrieve": len(kept)}

    def work(model: CM3Leon) -> Result:
        drawn = model.generate(prompt, n=n, decoder=decoder, seed=seed, **chosen)
        best = drawn[0]
        told = [f"Seed {seed}."]
        if best.documents:
            told.append(f"Documents: {', '.join(each.id for each in best.documents)}.")
        if best.shortage:
            told.append(found_of(len(best.documents), best.asked, best.shortage))
        options = {"n": n, **chosen, "decoder": decoder, "seed": seed}
        again = asker.again("generate", "generate", {"prompt": prompt}, own=bool(own), **options)
        return Result(pictures=_pictures(drawn), told=told, again=again, files=own)

    return asker.watch(session, work, Canvas.empty)


def edit(
    asker: Asker, session: str, pixels_HWC: np.ndarray, instruction: str, *, n: int, seed: int
) -> Iterator[Result]:
    """Images changed as an instruction says, as they grow, the best first."""
    instruction = text_of(instruction, "instruction")
    image = Image.fromarray(pixels_HWC)

    def work(model: CM3Leon) -> Result:
        drawn = model.edit(image, instruction, n=n, seed=seed)
        given = {"image": IMAGE, "instruction": instruction}
        again = asker.again("edit", "edit", given, n=n, seed=seed)
        return Result(
            pictures=_pictures(drawn), told=[f"Seed {seed}."], again=again, files={IMAGE: image}
        )

    return asker.watch(session, work, Canvas.empty)


def look(
    asker: Asker,
    session: str,
    pixels_HWC: np.ndarray,
    question: str | None,
    *,
    retrieve: int,
    seed: int,
) -> Iterator[Result]:
    """A text for an image: the answer to a question or, without one, a caption."""
    image, question = Image.fromarray(pixels_HWC), (question or "").strip()
    own = asker.own.files(session) if retrieve and not question else {}

    def work(model: CM3Leon) -> Result:
        given = {"image": IMAGE}
        if question:
            text = model.answer(image, question, seed=seed)
            given["question"] = question
            again = asker.again("answer", "answer", given, seed=seed)
        else:
            text = model.caption(image, retrieve=retrieve, seed=seed)
            options = {"retrieve": retrieve or None, "seed": seed}
            again = asker.again("caption", "caption", given, own=bool(own), **options)
        files: dict[str, Image.Image | str] = {IMAGE: image, **own}
        return Result(text=text, told=[f"Seed {seed}."], again=again, files=files)

    return asker.watch(session, work)


def fill_in(
    asker: Asker,
    session: str,
    pixels_HWC: np.ndarray,
    caption: str | None,
    *,
    brushed_HW: np.ndarray | None,
    box: tuple[int, int, int, int] | None,
    decoder: Any,
    seed: int,
) -> Iterator[Result]:
    """An image, or words of its caption, of which a part is filled in.

    Args:
        caption: with [brackets] around the words to fill in.
        brushed_HW: booleans of any height and width, True where the brush was.
        box: left, top, right, bottom in pixels of the image.
    """
    caption = (caption or "").strip()
    if len(caption) > LONGEST_TEXT:
        raise UserError(f"caption is too long; it must have at most {LONGEST_TEXT} characters")
    text, words = words_of(caption)
    brushed = brushed_HW is not None and bool(brushed_HW.any())
    if not brushed and box is None and words is None:
        raise UserError(
            "nothing is to be made anew; brush over a part of the image, give a box, or put "
            "[brackets] around words"
        )
    if brushed and box is not None:
        raise UserError("both a box and a brush say what is made anew; take one of them away")

    # The mask is that of whole codes, in the image's size, as the offered file has it.
    grid = asker.model.run.grid[0]
    image = Image.fromarray(pixels_HWC)
    files = {IMAGE: image}
    scale = asker.size // grid
    asked_HW = np.zeros((asker.size, asker.size), bool)
    options: dict[str, Any] = {"box": box, "words": words, "decoder": decoder, "seed": seed}
    mask_HW = None
    if brushed:
        assert brushed_HW is not None
        codes_GG = mask_codes(brushed_HW, (grid, grid))
        mask_HW = asked_HW = np.kron(codes_GG, np.ones((scale, scale), bool)).astype(bool)
        files[MASK] = _mask_image(mask_HW)
        options["mask"] = MASK
    elif box is not None:
        asked_HW[box[1] : box[3], box[0] : box[2]] = True

    def work(model: CM3Leon) -> Result:
        filled = model.infill(
            image, text, box=box, mask=mask_HW, words=words, decoder=decoder, seed=seed
        )
        given = {"image": IMAGE, "text": text}
        return Result(
            pictures=[(filled.image, f"seed {seed}")],
            text=filled.text,
            told=[f"Seed {seed}."],
            again=asker.again("infill", "infill", given, **options),
            files=files,
        )

    def canvas(model: CM3Leon) -> Canvas:
        codes_N = model.run.image_tokenizer.encode(pixels_HWC[None])[0]
        return Canvas(model, mask_codes(asked_HW, (grid, grid)), codes_N)

    return asker.watch(session, work, canvas if asked_HW.any() else None)


def search(
    asker: Asker, session: str, text: str, file: str | None, count: int
) -> list[FoundDocument]:
    """The documents of the memory bank that are closest to a text, an image, or both."""
    pixels_HWC = asker.pixels(file) if file else None
    words = (text or "").strip() or None
    if words is not None:
        words = text_of(words, "text")

    def work(model: CM3Leon) -> list[FoundDocument]:
        return model.search(words, pixels_HWC, count=count)

    return asker.briefly(session, work)


def add(asker: Asker, session: str, file: str | None, text: str) -> str:
    """Add a document to the memory bank as this session sees it; returns a sentence about it."""
    pixels_HWC = asker.pixels(file)

    def work(model: CM3Leon) -> int:
        return asker.own.add(session, model, pixels_HWC, text)

    row = asker.briefly(session, work)
    return f"Row {row} of the memory bank, in this browser alone, until its page is closed."


def browse(asker: Asker, session: str, page: float, per_page: int) -> tuple[list[Picture], str]:
    """A page of the memory bank, from 1 to the last one, and a sentence about it."""

    def work(model: CM3Leon) -> tuple[list[Picture], str]:
        size = len(model.run.bank)
        pages = max(1, math.ceil(size / per_page))
        number = int(min(max(page, 1), pages))
        rows = range((number - 1) * per_page, min(number * per_page, size))
        shown = [
            (each.image or _no_image(asker.size), f"{row}: {each.text}")
            for row, each in zip(rows, model.used_documents(list(rows)), strict=True)
        ]
        return shown, f"Page {number} of {pages}, {size:,} documents."

    return asker.briefly(session, work)


def found_pictures(found: Sequence[FoundDocument], size: int) -> list[Picture]:
    """Found documents as images with captions; grey for documents without an image."""
    return [(each.image or _no_image(size), document_line(each)) for each in found]


def document_line(document: FoundDocument) -> str:
    """A found document in a line: its score, its text and its row."""
    text = document.text if len(document.text) <= 80 else f"{document.text[:80]}..."
    return f"{document.score:.2f} · {text or '(no text)'} · row {document.row}"


def _pictures(drawn: Sequence[GeneratedImage]) -> list[Picture]:
    """Images with their seeds, and their scores if they were compared, as captions."""
    pictures = []
    for each in drawn:
        caption = f"seed {each.seed}"
        if not np.isnan(each.score):
            caption += f" · CLIP {each.score:.3f}"
        pictures.append((each.image, caption))
    return pictures


def _mask_image(mask_HW: np.ndarray) -> Image.Image:
    """A mask as an image: transparent where the mask is True."""
    rgba_HW4 = np.zeros((*mask_HW.shape, 4), np.uint8)
    rgba_HW4[~mask_HW, 3] = 255
    return Image.fromarray(rgba_HW4)


def _no_image(size: int) -> Image.Image:
    return Image.new("RGB", (size, size), (128, 128, 128))
