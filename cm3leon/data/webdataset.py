"""Tar shards, as img2dataset and the webdataset library write them.

Members whose names are the same up to the first dot make a document. In a local tar they may lie
anywhere, since all headers are read first:

    member       what happens                                       held
    0.jpg        0.txt is still to come                             0.jpg
    1.jpg        1.txt is still to come                             0.jpg 1.jpg
    1.txt        document 1 is complete                             0.jpg
    0.txt        document 0 is complete
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cm3leon.config import PositiveInt
from cm3leon.data.fields import Found, PairConfig, check_unread, find_text, first_text
from cm3leon.data.file_source import (
    BadRecord,
    FileSource,
    Record,
    caption_text,
    interleaved,
    page_text,
    parse_object,
)
from cm3leon.data.images import SUFFIXES, UnusableImage
from cm3leon.data.source import Skipped
from cm3leon.data.tar import Problem, tar_members
from cm3leon.registry import SOURCES

IMAGES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = ("txt", "caption", "text")
"""Suffixes of members that hold a caption, the preferred ones first."""
MEMBER_BYTES = 1024
"""Bytes that a member counts for besides its content, for its name and the objects that hold it."""
MAX_LISTED_BYTES = 256 * 2**20
"""Most bytes of the list of a tar's members; a longer one is not made."""


@SOURCES.register("webdataset")
class WebDatasetSource(FileSource):
    """Tars whose members share a key: `000.jpg` with its caption in `000.txt`, or under `caption`
    in `000.json`.

    The image is the only member with the ending of an image. The caption is `.txt`, `.caption` or
    `.text`, or stands in `.json` under one of the usual names (see `fields.py`). Members with other
    names, such as `000.input.jpg` and `000.outputs.txt`, are named by `data.image_key=input.jpg`
    and `data.text_key=outputs.txt`. Of two images, that key must say which one to read.

    An interleaved page is `000.json` with `{"segments": [{"text": "..."}, {"image": "0.jpg"}]}` and
    the images `000.0.jpg`, `000.1.jpg` ...

    Tars are read as streams and never unpacked to disk; they may be packed by gzip. The headers of
    a local tar are read first, so that the members of a key may lie anywhere in it. They are held
    until all are there, up to `data.max_held_bytes`. In a remote tar, a key counts as whole if it
    is complete when another one begins.
    """

    @dataclass(kw_only=True)
    class Config(PairConfig):
        """Where the tars are, and how much of one is held."""

        max_held_bytes: PositiveInt = 512 * 2**20
        """Bytes that may be held for one key, and again for all keys whose members lie apart; what
        exceeds this is left out."""

    suffixes = (".tar", ".tar.gz", ".tgz")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._image_member, self._text_member = (
            None if key is None else key.lower().removeprefix(".")
            for key in (config.image_key, config.text_key)
        )

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        """Gather the members of each key until they make a record."""
        awaited = self._suffixes_of_keys(part) if self.files.local else None
        groups: dict[str, _Group] = {}  # keys of which members are still missing
        group, held = _Group(""), 0

        with self.files.open(part) as file:
            for member in tar_members(file, self._is_wanted, self.config.max_file_bytes):
                if isinstance(member, Problem):
                    group.cut = group.cut or not member.name
                    file_name = f"{part}/{member.name}" if member.name else part
                    yield Skipped(file_name, member.reason)
                    continue
                key, suffix = _key_and_suffix(member.name)
                if not key or key.endswith("/"):
                    continue

                # Another key begins: the last one is finished, or held until more of it comes.
                if key != group.key:
                    if awaited is None and group.key in groups and self._is_usable(group):
                        yield from self._finished(groups.pop(group.key), part)
                    elif group.key in groups:
                        fits = group.hold(held, self.config.max_held_bytes)
                        held += group.held
                        if not fits and awaited is None:  # any number of keys may follow
                            held -= group.held
                            yield from self._finished(groups.pop(group.key), part)
                    group = groups.get(key) or _Group(key)
                    held -= group.held
                    group.held = 0

                if suffix in group.members or (awaited is not None and key not in awaited):
                    reason = "occurs twice in the tar; the first one is kept"
                    yield Skipped(f"{part}/{member.name}", reason)
                    continue
                groups[key] = group
                group.add(suffix, member.content, self.config)

                # In a local tar it is known when a key is complete.
                if awaited is not None and len(group.members) == len(awaited[key]):
                    del awaited[key]
                    yield from self._finished(groups.pop(key), part)

        for group in groups.values():
            yield from self._finished(group, part)

    def _suffixes_of_keys(self, part: str) -> dict[str, frozenset[str]] | None:
        """The suffixes of each key of a tar, by its headers alone; None for a tar with too many to
        list."""
        listed: dict[str, frozenset[str]] = {}
        known: dict[frozenset[str], frozenset[str]] = {}  # many keys share few sets
        size = 0
        with self.files.open(part) as file:
            for member in tar_members(file, lambda name: False, 0):
                if isinstance(member, Problem):
                    continue
                key, suffix = _key_and_suffix(member.name)
                if key not in listed:
                    size += len(key) + MEMBER_BYTES // 4
                suffixes = listed.get(key, frozenset()) | {suffix}
                if suffixes not in known:
                    size += len(suffixes) * MEMBER_BYTES // 4
                listed[key] = known.setdefault(suffixes, suffixes)
                if size > MAX_LISTED_BYTES:
                    return None
        return listed

    def _is_wanted(self, name: str) -> bool:
        """Whether the content of a member may be needed."""
        suffix = _key_and_suffix(name)[1]
        return suffix in (self._image_member, self._text_member) or (
            suffix.rpartition(".")[2] in (*IMAGES, *TEXTS, "json")
        )

    def _is_usable(self, group: _Group) -> bool:
        """Whether a group already makes a record."""
        try:
            self._record(group.members, group.key)
        except BadRecord:
            return False
        return True

    def _finished(self, group: _Group, part: str) -> Iterator[Record | Skipped]:
        """The record of a group, or why it is left out."""
        id_ = f"{part}/{group.key}"
        try:
            yield self._record(group.members, id_)
        except BadRecord as error:
            if not group.cut:  # otherwise what is missing lies behind a damage, already reported
                yield Skipped(id_, str(error))

    def _record(self, members: dict[str, bytes | str], id_: str) -> Record:
        """The record of a key's members. Raises BadRecord."""
        config = self.config
        described: dict[str, Any] = {}
        plain: list[str] = []
        if config.text_key is None:
            plain = [suffix for suffix in TEXTS if suffix in members]

        # The JSON beside an image and its caption usually holds nothing but their origin.
        if "json" in members and not (plain and IMAGES & members.keys()):
            described = parse_object(_content(members, "json"), "the member .json")
        if "segments" in described:
            return Record(
                id_, interleaved(described["segments"], lambda name: _image(members, name))
            )

        image = self._image_suffix(members)

        if self._text_member in members:
            caption: Any = _content(members, str(self._text_member))
        elif plain:
            caption = _content(members, plain[0])
        elif found := find_text(described, config.text_key):
            caption = page_text(first_text(found.value), "the caption")
        else:
            # A caption under an unknown name is reported as such.
            check_unread(described, None, Found("", image), config)
            raise BadRecord(
                f"no caption: the key has only {_shown(members)}; "
                "data.text_key names a member, or a key in .json"
            )
        return Record(
            id_, (caption_text(caption, config.max_caption_bytes), _image(members, image))
        )

    def _image_suffix(self, members: dict[str, bytes | str]) -> str:
        """The suffix of a key's one image. Raises BadRecord."""
        key = self._image_member
        images = sorted(IMAGES & members.keys()) if key is None else [key]
        if not images or images[0] not in members:
            raise BadRecord(
                f"no image: the key has only {_shown(members)}; data.image_key names the member"
            )
        if len(images) > 1:
            raise BadRecord(
                f"several images: the key has {_shown(images)}; say which with data.image_key"
            )
        return images[0]


def _shown(suffixes: Iterable[str]) -> str:
    """The endings of some members, for a message."""
    listed = sorted(suffixes)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(ascii(f".{suffix}"[:80])[1:-1] for suffix in listed[:8]) + more


def _content(members: dict[str, bytes | str], suffix: str) -> bytes:
    """The bytes of a member. Raises BadRecord for one that is not held, and KeyError for one that
    is missing."""
    content = members[suffix]
    if isinstance(content, str):
        raise BadRecord(content)
    return content


def _image(members: dict[str, bytes | str], suffix: str) -> Callable[[], bytes]:
    """The function that reads an image among the members. Raises UnusableImage without one."""

    def load() -> bytes:
        try:
            return _content(members, suffix.lower())
        except KeyError as error:
            raise UnusableImage(f"no image: the key has no member .{suffix}") from error
        except BadRecord as error:
            raise UnusableImage(str(error)) from error

    return load


@dataclass
class _Group:
    """The members of one key by suffix: their bytes, or why these are not held."""

    key: str
    members: dict[str, bytes | str] = field(default_factory=dict)
    cut: bool = False
    """Whether the tar is cut off or damaged behind the last member."""
    size: int = 0
    """Bytes that the members count for."""
    held: int = 0
    """Bytes that count as held while other keys are read."""

    def add(self, suffix: str, content: bytes | int, config: WebDatasetSource.Config) -> None:
        """Take a member, unless it or the whole key has more bytes than the config allows."""
        if self.size > config.max_held_bytes:  # not even the names of any more are held
            return
        size = content if isinstance(content, int) else len(content)
        if size > config.max_file_bytes:
            reason = f"the member .{suffix} has {size} bytes, more than {config.max_file_bytes}"
            self.members[suffix] = f"too large: {reason}"
        elif isinstance(content, int):
            self.members[suffix] = f"the member .{suffix} has not the ending of an image or a text"
        elif self.size + size > config.max_held_bytes:
            reason = f"the members of the key have more than {config.max_held_bytes} bytes"
            self.members[suffix] = f"too large: {reason}"
        else:
            self.members[suffix] = content
            self.size += size
        self.size += MEMBER_BYTES

    def hold(self, held: int, limit: int) -> bool:
        """Whether there is room for this group while other keys are read; if not, its contents are
        dropped.

        Args:
            held: bytes that other groups take.
        """
        fits = held + self.size <= limit
        if not fits:
            reason = (
                f"its members lie apart in the tar, of which {limit} bytes are held at most; "
                "sort it, for example with tar --sort=name, or raise data.max_held_bytes"
            )
            self.members = dict.fromkeys(self.members, reason)
            self.size = len(self.members) * MEMBER_BYTES
        self.held = self.size
        return fits


def _key_and_suffix(name: str) -> tuple[str, str]:
    """`sub/000.0.jpg` -> (`sub/000`, `0.jpg`)."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()
