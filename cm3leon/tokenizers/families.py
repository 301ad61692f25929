"""Families of public weights: how their one vocabulary is ordered, and what stands in their sequences.

Chameleon's (arXiv 2405.09818; ids as the published tokenizer.json has them) is CM3Leon's vocabulary in another order:

    <s> <pad> </s> <unk> | image codes IMGIMGAZ ... | <eoss> <racm3:break> | 512 reserved | more reserved, text

Here special tokens and text come first, then codes, then sentinels. A family is a table of names, and the order of a
published vocabulary is read from its tokenizer.json, so that no id is written down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cm3leon.tokenizers.layout import SPECIALS
from cm3leon.types import UserError

RESERVED = re.compile(r"<reserved(\d+)>")
CODE = re.compile(r"IMGIMG([A-J]+)Z")
"""The name of an image code, whose digits are written as letters: A for 0 to J for 9."""


@dataclass(frozen=True)
class Family:
    """Public weights with a vocabulary and a layout of their own."""

    title: str
    licence: str
    """Name of the licence that the publisher states."""
    conditions: str
    """What it asks and forbids, in a sentence."""
    names: Mapping[str, str]
    """The publisher's names of the first special tokens, by ours."""
    layout: Mapping[str, Any]
    """Fields of `Layout`, with the publisher's names in the place of ids; of `sizes`, those that a vocabulary has."""
    sentinels: int = 512
    """Reserved ids that are its mask tokens, the lowest ones."""
    draws: bool = True
    """Whether its weights draw images, and its licence allows it."""


CHAMELEON_NAMES = {
    "<pad>": "<pad>",
    "<eos>": "</s>",
    "<break>": "<racm3:break>",
    "<end_of_span>": "<eoss>",
}
CHAMELEON_LAYOUT = {
    "begin": "<s>",
    "end": "</s>",
    "between_segments": [],
    "between_documents": ["<reserved08706>"],
    "image_open": ["<racm3:break>"],
    "image_close": ["<eoss>"],
    "turn": ["<reserved08706>"],
    "unconditional_text": "none",
}
"""Images are opened and closed; documents are parted by the token that ends a turn; guidance drops the text."""
CHAMELEON_LICENCE = "Chameleon Research License"
CHAMELEON_CONDITIONS = (
    "research only: no commercial use of the weights or of what they make, attribution is asked for, and functionality "
    "that Meta disabled may not be enabled again (section 3.2)"
)

FAMILIES = {
    "chameleon": Family(
        title="Chameleon",
        licence=CHAMELEON_LICENCE,
        conditions=CHAMELEON_CONDITIONS,
        names=CHAMELEON_NAMES,
        layout=CHAMELEON_LAYOUT,
        draws=False,
    ),
    "anole": Family(
        title="Anole",
        licence=f"{CHAMELEON_LICENCE} (of the weights that Anole was made from)",
        conditions=CHAMELEON_CONDITIONS,
        names=CHAMELEON_NAMES,
        layout=CHAMELEON_LAYOUT,
    ),
    "lumina_mgpt": Family(
        title="Lumina-mGPT",
        licence=f"{CHAMELEON_LICENCE} (of the weights that Lumina-mGPT was made from)",
        conditions=CHAMELEON_CONDITIONS,
        names=CHAMELEON_NAMES,
        # Its size tokens count 32 pixels, two codes of 16.
        layout={
            **CHAMELEON_LAYOUT,
            "row_close": "<reserved08799>",
            "sizes": {
                f"{2 * rows}x{2 * columns}": [
                    f"<reserved{8800 + rows:05d}>",
                    f"<reserved{8800 + columns:05d}>",
                ]
                for rows in range(1, 65)
                for columns in range(1, 65)
            },
        },
    ),
}


@dataclass(frozen=True)
class PublishedVocab:
    """A published vocabulary brought into this project's order."""

    tokenizer: dict[str, Any]
    """tokenizer.json of the special tokens and the text alone, with their new ids."""
    table: dict[str, Any]
    """Special tokens and layout by our names, see `LayoutTable`."""
    old_id_V: np.ndarray = field(repr=False)
    """The published id of each of our ids."""
    text_size: int
    image_size: int
    sentinels: int


def renumbered(published: Mapping[str, Any], family: Family, where: str) -> PublishedVocab:
    """The vocabulary of a published tokenizer.json in this project's order.

    Raises:
        UserError: for a file that lacks a token which the family has, or names codes that are not 0, 1, 2 ...
    """
    model = published.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or "vocab" not in model:
        raise UserError(f"{where} is no tokenizer.json of byte-level BPE")
    added = {token["content"]: token["id"] for token in published.get("added_tokens", [])}
    ids: dict[str, int] = {**model["vocab"], **added}
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"{where}: its ids are not 0 to {len(ids) - 1}, each once")

    codes = {int(_digits(name)): name for name in ids if CODE.fullmatch(name)}
    if not codes or sorted(codes) != list(range(len(codes))):
        raise UserError(f"{where}: it names no image codes IMGIMG...Z from 0 on")
    layout = dict(family.layout)
    if "sizes" in layout:
        layout["sizes"] = {
            size: names for size, names in layout["sizes"].items() if ids.keys() >= set(names)
        }
    named = set(family.names.values()) | _named(layout)
    reserved = [name for name in sorted(ids, key=ids.__getitem__) if RESERVED.fullmatch(name)]
    masks = [name for name in reserved if name not in named][: family.sentinels]
    for name in sorted(named - ids.keys()):
        raise UserError(f"{where}: it lacks the token {name}, which {family.title} has")
    if len(masks) < family.sentinels:
        raise UserError(
            f"{where}: it has {len(masks)} reserved tokens <reserved...>; {family.sentinels} are needed"
        )

    # Special tokens: the four that every vocabulary has, then whatever else is not text.
    ours = {theirs: name for name, theirs in family.names.items()}
    first = [family.names[name] for name in SPECIALS]
    taken = {*first, *codes.values(), *masks}
    others = [
        name
        for name in sorted(ids, key=ids.__getitem__)
        if name not in taken and (name in added or name in named or RESERVED.fullmatch(name))
    ]
    text = [
        name
        for name in sorted(ids, key=ids.__getitem__)
        if name not in taken and name not in others
    ]
    specials = [ours.get(name, name) for name in (*first, *others)]
    order = [*first, *others, *text, *(codes[n] for n in range(len(codes))), *masks]

    spelled = {name: number for number, name in enumerate([*specials, *text])}
    tokenizer = {
        **published,
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "model": {**model, "vocab": spelled, "unk_token": None},
    }
    return PublishedVocab(
        tokenizer,
        {"specials": specials, **_renamed(layout, ours)},
        np.array([ids[name] for name in order]),
        len(spelled),
        len(codes),
        len(masks),
    )


def _digits(name: str) -> str:
    letters = CODE.fullmatch(name)
    assert letters is not None
    return "".join(str(ord(letter) - ord("A")) for letter in letters[1])


def _named(layout: Any) -> set[str]:
    """All names of tokens in a layout."""
    if isinstance(layout, Mapping):
        tokens = (value for key, value in layout.items() if key != "unconditional_text")
        return set().union(*map(_named, tokens))
    if isinstance(layout, list):
        return set(layout)
    return {layout} if isinstance(layout, str) else set()


def _renamed(layout: Any, names: Mapping[str, str]) -> Any:
    if isinstance(layout, Mapping):
        return {key: _renamed(value, names) for key, value in layout.items()}
    if isinstance(layout, list):
        return [names.get(name, name) for name in layout]
    return names.get(layout, layout)
