"""What clients may ask for: the fields of OpenAI's requests that have a meaning here, and our
own."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from cm3leon.config import (
    Component,
    Guidance,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Range,
    Seed,
    from_mapping,
    to_mapping,
)
from cm3leon.registry import DECODERS
from cm3leon.serve.errors import Refusal
from cm3leon.types import UserError

C = TypeVar("C", bound="Asked")

LONGEST_TEXT = 32_000
"""The most characters of a text, as in OpenAI's longest prompts."""
MOST_PARTS = 64
"""The most texts and images of a conversation."""
DATA_URL = re.compile(r"data:image/[a-z+.-]+;base64,", re.IGNORECASE)


@dataclass(kw_only=True)
class Asked:
    """Fields of every request."""

    model: str | None = None
    """Name of the model, as listed by /v1/models; null = the one that is served."""
    user: str | None = None
    """Who asks; users take turns if the server has an API key. Null = the client's address."""
    seed: Seed | None = None
    """Seed of the first sample, the next ones have the next seeds; null = a random one, which the
    answer names."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How tokens are drawn; null = as the run's experiment says."""
    stream: bool = False
    """Whether the answer comes as server-sent events while it grows."""

    not_for_us: ClassVar[tuple[str, ...]] = (
        "safety_identifier",
        "metadata",
        "store",
        "service_tier",
    )
    """Fields that OpenAI's clients send and that have no effect here."""


@dataclass(kw_only=True)
class ImagesAsked(Asked):
    """Fields of every request for images."""

    prompt: str
    """What the image should show; for an edit without a mask, the instruction."""
    n: PositiveInt = 1
    """Images that are drawn."""
    size: str = "auto"
    """The model's own size as WIDTHxHEIGHT, or auto."""
    response_format: str = "b64_json"
    """b64_json: images are in the answer."""
    output_format: Literal["png", "jpeg", "webp"] = "png"
    """Format of the image files."""
    guidance: Guidance | None = None
    """Weight of guidance by the text, in place of the decoder's."""
    partial_images: Annotated[int, Range(ge=0, le=1024)] | None = None
    """Partial images that a stream shows of each image; null = one for each row of codes."""

    not_for_us = (*Asked.not_for_us, "quality", "style", "background", "moderation",
                  "output_compression", "input_fidelity")  # fmt: skip

    def check(self) -> None:
        if not self.prompt.strip():
            raise UserError("prompt is empty; it must be a text")
        if len(self.prompt) > LONGEST_TEXT:
            raise UserError(
                f"prompt has {len(self.prompt)} characters; it must have at most {LONGEST_TEXT}"
            )
        if self.response_format != "b64_json":
            raise UserError(
                f"response_format is {self.response_format!r}; it must be b64_json: this server "
                "keeps no images, and so has no URLs of them"
            )


@dataclass(kw_only=True)
class GenerationAsked(ImagesAsked):
    """POST /v1/images/generations."""

    retrieve: NonNegativeInt = 0
    """Documents of the memory bank that are put before the prompt."""


@dataclass(kw_only=True)
class EditAsked(ImagesAsked):
    """POST /v1/images/edits, beside its files."""

    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of the image, in place of a mask."""


@dataclass(kw_only=True)
class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[Any]
    """The conversation, with texts and images in it."""
    n: Annotated[int, Range(ge=1, le=1)] = 1
    """Number of answers."""
    max_tokens: PositiveInt | None = None
    """The most pieces of a text; null = 64."""
    max_completion_tokens: PositiveInt | None = None
    """The newer name of max_tokens."""
    temperature: Annotated[float, Range(ge=0, le=2)] | None = None
    """Temperature of texts; 0 takes the likeliest token; null = as the run's own decoder of
    texts."""
    top_p: Probability | None = None
    """Share of probability that texts are drawn from."""
    modalities: list[Literal["text", "image"]] = field(default_factory=lambda: ["text"])
    """What the answer may hold; with image, it continues the conversation by texts and images."""
    segments: Annotated[int, Range(ge=1, le=16)] = 2
    """The most texts and images of such an answer."""
    retrieve: NonNegativeInt = 0
    """Documents of the memory bank that are put before an image to describe."""
    stream_options: Any = None
    """Accepted without an effect: the last event of a stream always has the usage."""

    not_for_us = (*Asked.not_for_us, "frequency_penalty", "presence_penalty", "logprobs",
                  "parallel_tool_calls", "reasoning_effort")  # fmt: skip

    @property
    def longest(self) -> int:
        """The most pieces of a text."""
        return self.max_completion_tokens or self.max_tokens or 64

    @property
    def text_decoder(self) -> Component | dict[str, Any] | None:
        """How texts are drawn; None = as the run says."""
        if self.decoder is not None or (self.temperature is None and self.top_p is None):
            return self.decoder
        if self.temperature is not None and self.temperature < 0.01:
            return {"name": "greedy"}
        drawn = {
            "temperature": self.temperature or 1.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }
        return {"name": "top_p", "cfg": 1, **drawn}


@dataclass(kw_only=True)
class RetrieveAsked(Asked):
    """POST /v1/retrieve."""

    text: str | None = None
    """Text to find documents for."""
    image: str | None = None
    """Image to find documents for, as a data URL or in base64; with a text, for the mean of
    both."""
    count: Annotated[int, Range(ge=1, le=100)] = 5
    """Documents to find."""
    images: bool = True
    """Whether the answer has the documents' images."""

    def check(self) -> None:
        if self.text is None and self.image is None:
            raise UserError("text and image are missing; give at least one to search by")
        if self.text is not None and len(self.text) > LONGEST_TEXT:
            raise UserError(
                f"text has {len(self.text)} characters; it must have at most {LONGEST_TEXT}"
            )


def read_asked(cls: type[C], mapping: Any) -> C:
    """Read a request from its JSON.

    Fields that are null count as missing, and fields without a meaning here are left out.

    Raises:
        UserError: for an unknown field, or a value that is not allowed.
    """
    if not isinstance(mapping, Mapping):
        raise UserError("the request must be a JSON object")
    given = {
        key: value
        for key, value in mapping.items()
        if value is not None and key not in cls.not_for_us
    }
    return from_mapping(cls, given)


def read_json_body(body: bytes, content_type: str) -> Any:
    """The JSON of a request.

    Raises:
        Refusal: for another type of content, which pages of other sites could send.
        UserError: for a body that is not JSON.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(
            415, f"the content type is {content_type or 'missing'}; it must be application/json"
        )
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON: {error}") from error


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def form_values(cls: type[Asked], items: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a form as a request's JSON would have them.

    Values of fields that are not texts are read as JSON, and names with brackets are keys of a
    section: n=2 and decoder[cfg]=3 become {"n": 2, "decoder": {"cfg": 3}}.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in items.items():
        section = re.fullmatch(r"(\w+)\[(\w+)\]", name)
        if section:
            inner = values.setdefault(section[1], {})
            if not isinstance(inner, dict):
                raise UserError(f"{name} and {section[1]} are both given; give one of them")
            inner[section[2]] = _json_or_text(value)
        elif hints.get(name) in (str, str | None):
            values[name] = value
        else:
            values[name] = _json_or_text(value)
    return values


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return value


def decoder_of(
    choice: Component | None, guidance: float | None, usual: Component | str
) -> Component | dict[str, Any] | str:
    """The chosen decoder, with the given weight of guidance.

    Args:
        usual: the decoder if none is chosen.

    Raises:
        UserError: for a weight if the decoder has no guidance.
    """
    chosen = choice or usual
    if guidance is None:
        return chosen
    component = DECODERS.check(chosen) if isinstance(chosen, str) else chosen
    names = [each.name for each in fields(component.config)]
    weight = next((name for name in ("cfg", "text") if name in names), None)
    if weight is None:
        raise UserError(
            f"guidance is {guidance}, but the decoder {component.name} has no weight of guidance; "
            "leave it out"
        )
    return {**to_mapping(component), weight: guidance}


def parts_of(messages: list[Any]) -> list[str | bytes]:
    """The texts and images of a conversation in order, without the system's messages.

    Raises:
        UserError: for a part that is neither a text nor an image, or an image at another address.
    """
    parts: list[str | bytes] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(f"{where} must be an object with role and content")
        if message["role"] in ("system", "developer"):
            continue
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise UserError(f"{where}.content must be a text, or a list of parts")
        parts += [_part(part, f"{where}.content.{index}") for index, part in enumerate(content)]
    if not parts:
        raise UserError("messages has no text and no image")
    if len(parts) > MOST_PARTS:
        raise UserError(f"messages has {len(parts)} parts; it must have at most {MOST_PARTS}")
    return parts


def _part(part: Any, where: str) -> str | bytes:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if len(part["text"]) > LONGEST_TEXT:
            raise UserError(
                f"{where}.text has {len(part['text'])} characters; it must have at most "
                f"{LONGEST_TEXT}"
            )
        return str(part["text"])
    if kind == "image_url" and isinstance(part.get("image_url"), Mapping):
        url = part["image_url"].get("url")
        if isinstance(url, str) and DATA_URL.match(url):
            return file_of(url, f"{where}.image_url.url")
        raise UserError(
            f"{where}.image_url.url must be a data URL (data:image/png;base64,...): this server "
            "fetches nothing"
        )
    raise UserError(f"{where} must be a part of the type text, or image_url with a data URL")


def file_of(text: str, where: str) -> bytes:
    """The bytes of a file, from a data URL or base64. Raises UserError for another text."""
    found = DATA_URL.match(text)
    try:
        return base64.b64decode(text[found.end() if found else 0 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"{where} is not base64 ({error}); it must be an image file in base64, or a data URL"
        ) from error
