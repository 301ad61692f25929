"""Conversations: describing an image, answering a question about it, continuing texts and
images."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from cm3leon.api import CM3Leon, TruncatedWarning
from cm3leon.serve.asked import ChatAsked, parts_of
from cm3leon.serve.desk import Answered, Growing, Work
from cm3leon.serve.events import ALIVE, event, with_errors
from cm3leon.serve.pictures import data_url, given_pixels
from cm3leon.serve.service import takes_questions
from cm3leon.serve.setting import Setting
from cm3leon.types import Modality, UserError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Ends a decoded text whose last character is not complete yet."""


class GrowingText:
    """A text that is shown while its ids come in; only the newest ids are decoded, not all each
    time.

    Characters may need several ids, and spaces at the end may turn out to be the end of the text:

        ids so far    decoded     grown() returns
        a             "a"         "a"
        a _           "a "        ""            a space is held back
        a _ \\xc3      "a �"       ""            half of a character, too
        a _ \\xc3 \\xa9 "a é"       " é"

    Args:
        decode: ids -> their text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._start = self._whole = 0
        self._known = ""
        self._held = ""
        self.shown = ""
        """Everything that `grown` has returned."""

    def grown(self, ids: Sequence[int]) -> str:
        """What is new in a text of these ids.

        White space before and behind the text is held back, and an incomplete character at its end.
        """
        # A piece may be written differently at the start of a text, so some known ids are decoded
        # in front of the new ones.
        text = self._decode(ids[self._start :])
        stable = text.rstrip(UNFINISHED)
        self._held += stable[len(self._known) :]
        self._known = stable
        if stable == text:
            self._start, self._whole = self._whole, len(ids)
            self._known = self._decode(ids[self._start :])

        # White space at the end is held back, as it may be the last of the text.
        if not self.shown:
            self._held = self._held.lstrip()
        fresh = self._held.rstrip()
        self._held = self._held[len(fresh) :]
        self.shown += fresh
        return fresh

    def rest(self, text: str) -> str:
        """The end of the finished text, behind the beginning that was shown."""
        same = 0
        for one, other in zip(text, self.shown, strict=False):
            if one != other:
                break
            same += 1
        return text[same:]


@dataclass
class Conversation:
    """An answer to a conversation: how it is made, and how it is sent."""

    setting: Setting
    asked: ChatAsked
    parts: list[str | bytes]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def with_images(self) -> bool:
        """Whether the answer may hold images."""
        return "image" in self.asked.modalities

    @property
    def every(self) -> int:
        """Tokens after which a stream shows a text."""
        return 1

    @property
    def work(self) -> Work[list[str | Image.Image]]:
        """What a thread does with the model."""
        return self._ask

    def _ask(self, model: CM3Leon) -> list[str | Image.Image]:
        """Ask the model for what the conversation's last parts call for.

            answer may hold images               texts and images that continue the conversation
            one image                            a caption
            one image and texts, tuned model     an answer to the texts as a question
            ends with an image                   the text that follows it

        Raises:
            UserError: for any other conversation.
        """
        asked, setting = self.asked, self.setting
        given: list[Any] = [
            part if isinstance(part, str) else self._pixels(part) for part in self.parts
        ]
        drawn: Any = {"seed": asked.seed, "max_tokens": asked.longest}
        decoder: Any = asked.text_decoder
        if self.with_images:
            first: Modality = "image" if isinstance(given[-1], str) else "text"
            text_decoder = None if asked.decoder else decoder
            return model.interleave(
                given,
                first=first,
                segments=asked.segments,
                decoder=asked.decoder,
                text_decoder=text_decoder,
                **drawn,
            )

        texts = [part for part in given if isinstance(part, str)]
        images = [part for part in given if not isinstance(part, str)]
        if not images:
            raise UserError(
                "messages has no image; give one to be described, or ask for images with "
                'modalities: ["text", "image"]'
            )

        # What the model was trained or tuned to do with such parts.
        if len(images) == 1 and not texts:
            return [model.caption(images[0], retrieve=asked.retrieve, decoder=decoder, **drawn)]
        if len(images) == 1 and takes_questions(model):
            question = " ".join(texts)
            return [model.answer(images[0], question, decoder=decoder, **drawn)]
        if not isinstance(given[-1], str):
            return [model.page_text(given, retrieve=asked.retrieve, decoder=decoder, **drawn)]

        if len(images) == 1:
            raise UserError(
                f"{setting.name} was not fine-tuned on questions (docs/tasks.md): give an image "
                "alone, which is described, or end with one"
            )
        raise UserError(
            f"messages has {len(images)} images and a question; a question is about one image: "
            "give one, or end with an image, after which the model writes a text"
        )

    def _pixels(self, image: bytes) -> np.ndarray:
        setting = self.setting
        return given_pixels(
            image, "messages: an image", size=setting.size, max_pixels=setting.limits.pixels
        )

    def body(self, answered: Answered[list[str | Image.Image]]) -> dict[str, Any]:
        """The answer as OpenAI's JSON of a completion."""
        choice = {"index": 0, "message": self._message(answered.result), "logprobs": None}
        return {
            **self._head("chat.completion"),
            "choices": [{**choice, "finish_reason": _reason(answered)}],
            "usage": answered.usage,
            "warnings": [str(notice) for notice in answered.notices],
            "seed": self.asked.seed,
        }

    def events(self, growing: Growing[list[str | Image.Image]]) -> AsyncIterator[bytes]:
        """The answer as OpenAI's chunks: a text as it grows, texts with images once all are
        made."""
        return with_errors(self._events(growing))

    async def _events(self, growing: Growing[list[str | Image.Image]]) -> AsyncIterator[bytes]:
        growing_text = GrowingText(self._decoded)
        try:
            # OpenAI's clients take the role from the first chunk.
            yield self._chunk({"role": "assistant", "content": ""})
            async for state in growing.states():
                if state is None or self.with_images:
                    yield ALIVE
                    continue
                if fresh := growing_text.grown(state[1]):
                    yield self._chunk({"content": fresh})

            # The finished text may end otherwise than it grew, such as without white space.
            answered = growing.answered()
            message = self._message(answered.result)
            rest = {"content": growing_text.rest(message.pop("content"))}
            message.pop("role")
            yield self._chunk({**rest, **message})
            yield self._chunk({}, finish_reason=_reason(answered), usage=answered.usage)
        finally:
            await growing.close()

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.setting.model.run.text_tokenizer.decode(ids)

    def _message(self, result: list[str | Image.Image]) -> dict[str, Any]:
        texts = [part.strip() for part in result if isinstance(part, str)]
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(filter(None, texts))}
        if self.with_images:
            parts = [
                {"type": "text", "text": part} if isinstance(part, str) else _image_part(part)
                for part in result
            ]
            message["images"] = [part for part in parts if part["type"] == "image_url"]
            message["parts"] = parts
        return message

    def _chunk(self, delta: dict[str, Any], **more: Any) -> bytes:
        reason = more.pop("finish_reason", None)
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.setting.name,
        }


def completion(setting: Setting, asked: ChatAsked) -> Conversation:
    """The answer to a conversation. Raises UserError as `parts_of` does."""
    return Conversation(setting, asked, parts_of(asked.messages))


def _image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def _reason(answered: Answered[Any]) -> str:
    cut = any(isinstance(notice, TruncatedWarning) for notice in answered.notices)
    return "length" if cut else "stop"
