"""The names under which data sets keep a text and an image, and how both are found in a record.

    record                                        what is read
    {"file_name": "7.jpg", "text": "a dog"}       an image and its text, by their usual names
    {"photo": "7.jpg", "text": "a dog"}           nothing: `photo` looks like an image, but its name
                                                  is unknown
    {"image": "7.jpg", "file": "7_mask.png"}      nothing: two images, unless `data.image_key` says
                                                  which

Nothing is guessed: a record is left out, with a reason, before half of a pair is read alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from cm3leon.data.file_source import BadRecord, FilesConfig
from cm3leon.data.images import SUFFIXES

TEXT_KEYS = (
    "text",
    "caption",
    "captions",
    "prompt",
    "txt",
    "description",
    "sentence",
    "sentences",
    "alt_text",
    "alt",
)
"""Usual names of a text, the preferred ones first; upper and lower case do not matter."""
IMAGE_KEYS = (
    "image",
    "images",
    "img",
    "image_path",
    "img_path",
    "image_file",
    "image_filename",
    "file_name",
    "filename",
    "file_path",
    "filepath",
    "file",
    "path",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
"""Usual names of an image; upper and lower case do not matter."""
NAMES_OF_ANY_FILE = frozenset(
    {"file_name", "filename", "file_path", "filepath", "file", "path", "images"}
)
"""Those image names that count only if their value looks like an image."""
CONVERSATION_KEYS = ("conversations", "messages")
"""Names of a list of turns, each `{"from": "human", "value": "..."}` or
`{"role": "user", "content": "..."}`."""
PLACEHOLDER = "<image>"
"""Marks the position of an image within the turns of a conversation."""


@dataclass(kw_only=True)
class PairConfig(FilesConfig):
    """Where the files are, and under which names their records keep a text and an image."""

    text_key: str | None = None
    """Key of the text; null = the usual names, such as text, caption and prompt."""
    image_key: str | None = None
    """Key of the image; null = the usual names, such as image, file_name and jpg."""


class Found(NamedTuple):
    """A key of a record and the value under it."""

    key: str
    value: Any


def find_text(record: Mapping[str, Any], key: str | None = None) -> Found | None:
    """Find the text of a record: the value under `key` or, without a key, under the first of the
    usual names; None if there is no such value."""
    if key is not None:
        if record.get(key) is None:
            return None
        return Found(key, record[key])
    return next(iter(under(record, TEXT_KEYS)), None)


def find_image(record: Mapping[str, Any], key: str | None = None) -> Found | None:
    """Find the image of a record: the value under `key` or, without a key, under one of the usual
    names; None if there is no such value.

    Raises:
        BadRecord: if several usual names hold different images.
    """
    if key is not None:
        if not record.get(key):
            return None
        return Found(key, record[key])

    found = []
    for each in under(record, IMAGE_KEYS):
        # Names such as `file` may stand for anything, so their value must look like an image.
        certain = each.key.lower() not in NAMES_OF_ANY_FILE
        if each.value not in ("", []) and (certain or looks_like_image(each.value)):
            found.append(each)

    if any(each.value != found[0].value for each in found):
        keys = ", ".join(each.key for each in found)
        raise BadRecord(f"several images, under {keys}; say which with data.image_key")
    return next(iter(found), None)


def check_unread(
    record: Mapping[str, Any], text: Found | None, image: Found | None, config: PairConfig
) -> None:
    """Check that a record in which one half was found does not hold the other under an unknown
    name.

    A key that is set in the config is the only one that is looked at.

    Args:
        text: the text that was found.
        image: the image that was found.

    Raises:
        BadRecord: naming the values that look like a text or an image and would not be read.
    """
    images, texts = [], []
    if image is None and config.image_key is None:
        images = [key for key, value in record.items() if looks_like_image(value)]
        # A caption belongs to an image, whose address may have any ending.
        if text is not None and text.key.lower() != "text":
            images += [key for key in record if "url" in key.lower() and key not in images]
    if text is None and config.text_key is None:
        texts = [key for key, value in record.items() if looks_like_text(value)]

    for keys, what, setting in (
        (images, "an image", "data.image_key"),
        (texts, "a text", "data.text_key"),
    ):
        if keys:
            names = ", ".join(ascii(key) for key in keys)
            raise BadRecord(f"{names}: looks like {what} and is not read; set {setting} to its key")


def first_text(value: Any) -> Any:
    """The text that a value stands for: itself or, of a list, the first one that is not blank."""
    if not isinstance(value, (list, tuple)):
        return value
    for each in value:
        if isinstance(each, Mapping):  # sentences as Karpathy's files have them
            found = find_text(each) or find_text(each, "raw")
            each = found.value if found is not None else None
        if each is not None and not (isinstance(each, (str, bytes)) and not each.strip()):
            return each
    return ""


def image_paths(found: Found) -> list[str]:
    """The paths under an image's key: one or a list of strings, or of objects with a `path`.

    Raises:
        BadRecord: for anything else.
    """
    paths = []
    for value in found.value if isinstance(found.value, (list, tuple)) else [found.value]:
        path = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(path, str):
            raise BadRecord(f"{found.key} is {type(path).__name__}, not a path")
        paths.append(path)
    return paths


def image_path(found: Found) -> str:
    """The only path under an image's key. Raises BadRecord as `image_paths` does, and for a list of
    more or fewer than one."""
    paths = image_paths(found)
    if len(paths) != 1:
        raise BadRecord(f"{found.key} lists {len(paths)} images; a page is written as segments")
    return paths[0]


def conversation(record: Mapping[str, Any]) -> str | None:
    """A record's conversation as one text, with a line for each turn; None without a conversation.

    Raises:
        BadRecord: for a turn without a text.
    """
    found = next(iter(under(record, CONVERSATION_KEYS)), None)
    if found is None or not isinstance(found.value, list):
        return None
    turns = []
    for number, turn in enumerate(found.value):
        said = None
        if isinstance(turn, Mapping):
            said = next((turn[key] for key in ("value", "content", "text") if key in turn), None)
        if not isinstance(said, str):
            raise BadRecord(f"turn {number} of {found.key} has no text")
        turns.append(said.strip())
    return "\n".join(turns)


def conversation_segments(text: str, images: list[str]) -> list[dict[str, str]]:
    """Split a conversation into the segments of a page. Images stand where `<image>` does; a single
    image without a placeholder stands before the text.

    Raises:
        BadRecord: if there are not as many placeholders as images.
    """
    runs = text.split(PLACEHOLDER)
    if len(runs) == 1 and len(images) == 1:
        runs = ["", *runs]
    if len(runs) - 1 != len(images):
        raise BadRecord(
            f"the turns have {len(runs) - 1} times <image>, the line {len(images)} images"
        )
    segments = [{"text": runs[0].strip()}]
    for image, run in zip(images, runs[1:], strict=True):
        segments += [{"image": image}, {"text": run.strip()}]
    return segments


def looks_like_image(value: Any) -> bool:
    """Whether a value may be an image: its bytes, a path or address with an image's ending, an
    object that holds one of these, or a list of them."""
    if isinstance(value, bytes):
        return True
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), (bytes, str)) or looks_like_image(value.get("path"))
    if isinstance(value, (list, tuple)):
        return bool(value) and looks_like_image(value[0])
    if not isinstance(value, str) or len(value) > 4096 or "\n" in value:
        return False
    name = value.partition("?")[0].partition("#")[0] if "://" in value else value
    return PurePosixPath(name.strip()).suffix.lower() in SUFFIXES


def looks_like_text(value: Any) -> bool:
    """Whether a value may be a text: two words or more, or a list or an object with such."""
    if isinstance(value, (list, tuple)):
        return bool(value) and looks_like_text(value[0])
    if isinstance(value, Mapping):
        return any(
            looks_like_text(value.get(key)) for key in ("value", "content", "raw", *TEXT_KEYS)
        )
    return isinstance(value, str) and len(value.split()) > 1 and not looks_like_image(value)


def under(record: Mapping[str, Any], names: Iterable[str]) -> Iterator[Found]:
    """Yield the entries of a record that have one of these names, in the order of the names."""
    by_name: dict[str, Found] = {}
    for key, value in record.items():
        if isinstance(key, str) and value is not None:
            by_name.setdefault(key.lower(), Found(key, value))
    for name in names:
        if name in by_name:
            yield by_name[name]
