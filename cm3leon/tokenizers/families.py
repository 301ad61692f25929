"""Families of public weights: the order of their vocabulary, and the layout of their sequences.

Chameleon (arXiv 2405.09818) has CM3Leon's vocabulary in another order. By the ids of the published
tokenizer.json it is

    <s> <pad> </s> <unk> | codes IMGIMGAZ ... | <eoss> <racm3:break> | 512 reserved | reserved, text

and Emu3's (arXiv 2409.18869) is

    text | <|endoftext|> <|im_start|> ... | <|extra_0|> ... | <|image token|> ... | codes

An import brings both into this project's order:

    special tokens | text | codes | sentinels

A family is a table of names. The ids behind the names are read from the published tokenizer.json,
so no id is written down here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cm3leon.tokenizers.layout import SPECIALS, Grid
from cm3leon.types import UserError

LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclass(frozen=True)
class Family:
    """Public weights with a vocabulary and a layout of their own."""

    title: str
    licence: str
    """Name of the licence that the publisher states."""
    conditions: str
    """What the licence asks and forbids, in a sentence."""
    names: Mapping[str, str]
    """Our names of the first special tokens -> the publisher's."""
    layout: Mapping[str, Any]
    """Fields of `Layout`, with the publisher's names instead of ids. A vocabulary keeps those
    `sizes` for which it has tokens. A size given as text stands for the tokens of this text by the
    published tokenizer."""
    models: Mapping[int, str] = field(default_factory=dict)
    """Names on the Hub of its published models, by their numbers of layers, as far as the number
    of layers determines the model."""
    sentinels: int = 512
    """How many of the reserved ids, from the lowest on, become mask tokens."""
    draws: bool = True
    """Whether its weights draw images, and its licence allows it."""
    reserved: str = r"<reserved(\d+)>"
    """Pattern of the names of unused ids."""
    code: str = r"IMGIMG([A-J]+)Z"
    """Pattern of the names of image codes; digits may be written as letters, A for 0 to J for 9."""
    whole: bool = False
    """Whether the published folder also holds the image tokenizer, with its decoder."""
    image_size: int = 512
    """Height and width of the images that it draws, in pixels."""
    other_decoder: str = ""
    """Why its model cannot be imported, as the end of a sentence; empty = it can."""


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
"""Images are opened and closed, the token that ends a turn separates documents, and guidance drops
the text."""
CHAMELEON_LICENCE = "Chameleon Research License"
CHAMELEON_CONDITIONS = (
    "research only: no commercial use of the weights or of what they make, attribution is asked "
    "for, and functionality that Meta disabled may not be enabled again (section 3.2)"
)


def _sizes(tokens: int, *, least: int = 1) -> Iterator[Grid]:
    """Yield the rows and columns of images of at most so many ids, including those that close rows.

    Neither side is longer than five times the other.
    """
    for rows in range(least, math.isqrt(5 * tokens) + 1):
        for columns in range(-(-rows // 5), 5 * rows + 1):
            if rows * (columns + 1) <= tokens:
                yield rows, columns


def _written_sizes(tokens: int, *, least: int = 1) -> dict[str, str]:
    """Return sizes as Emu3's sequences write them: `2x3` as the text `2*3<|image token|>`."""
    sizes = {}
    for rows, columns in _sizes(tokens, least=least):
        sizes[f"{rows}x{columns}"] = f"{rows}*{columns}<|image token|>"
    return sizes


def _named_sizes() -> dict[str, list[str]]:
    """Return Lumina-mGPT's sizes: reserved tokens count them in steps of 32 pixels (two codes)."""
    sizes = {}
    for rows in range(1, 65):
        for columns in range(1, 65):
            sizes[f"{2 * rows}x{2 * columns}"] = [
                f"<reserved{8800 + rows:05d}>",
                f"<reserved{8800 + columns:05d}>",
            ]
    return sizes


EMU3_LAYOUT = {
    "begin": "<|extra_203|>",
    "end": "<|extra_204|>",
    "between_segments": [],
    "between_documents": ["<|im_end|>"],
    "image_open": ["<|image start|>"],
    "image_close": ["<|extra_201|>", "<|image end|>"],
    "row_close": "<|extra_200|>",
    "unconditional_text": "none",
    "sizes": _written_sizes(9000),
}
"""The size of an image is written as text in front of its codes, and two tokens close the image."""
EMU3_NAMES = {
    "<pad>": "<|endoftext|>",
    "<eos>": "<|extra_204|>",
    "<break>": "<|image start|>",
    "<end_of_span>": "<|image end|>",
}
EMU3 = Family(
    title="Emu3",
    licence="Apache License 2.0",
    conditions="commercial use is allowed; its notice is to be kept, and changes are to be stated",
    names=EMU3_NAMES,
    layout=EMU3_LAYOUT,
    sentinels=199,
    reserved=r"<\|extra_(\d+)\|>",
    code=r"<\|visual token (\d+)\|>",
    whole=True,
    image_size=720,
)

FAMILIES = {
    "chameleon": Family(
        title="Chameleon",
        licence=CHAMELEON_LICENCE,
        conditions=CHAMELEON_CONDITIONS,
        names=CHAMELEON_NAMES,
        layout=CHAMELEON_LAYOUT,
        models={32: "facebook/chameleon-7b", 48: "facebook/chameleon-30b"},
        draws=False,
    ),
    "anole": Family(
        title="Anole",
        licence=f"{CHAMELEON_LICENCE} (of the weights that Anole was made from)",
        conditions=CHAMELEON_CONDITIONS,
        names=CHAMELEON_NAMES,
        layout=CHAMELEON_LAYOUT,
        models={32: "GAIR/Anole-7b-v0.1"},
    ),
    "lumina_mgpt": Family(
        title="Lumina-mGPT",
        licence=f"{CHAMELEON_LICENCE} (of the weights that Lumina-mGPT was made from)",
        conditions=CHAMELEON_CONDITIONS,
        names=CHAMELEON_NAMES,
        layout={
            **CHAMELEON_LAYOUT,
            "row_close": "<reserved08799>",
            "sizes": _named_sizes(),
        },
    ),
    "emu3": EMU3,
    # Unlike in Emu3, nothing closes the last row, and only one token closes the image.
    "emu3_5": replace(
        EMU3,
        title="Emu3.5",
        layout={
            **EMU3_LAYOUT,
            "image_close": ["<|image end|>"],
            "last_row_closed": False,
            "sizes": _written_sizes(4500, least=2),
        },
        image_size=1024,
        other_decoder=(
            "it normalises queries and keys by a norm that all heads share, which no decoder here "
            "does"
        ),
    ),
}


@dataclass(frozen=True)
class PublishedVocab:
    """A published vocabulary in this project's order."""

    tokenizer: dict[str, Any]
    """tokenizer.json with the special tokens and the text only, under their new ids."""
    table: dict[str, Any]
    """Special tokens and layout by our names, the content of a `LayoutTable`."""
    old_id_V: np.ndarray = field(repr=False)
    """The published id of each new id."""
    text_size: int
    image_size: int
    sentinels: int


def renumbered(published: Mapping[str, Any], family: Family, where: str) -> PublishedVocab:
    """Bring the vocabulary of a published tokenizer.json into this project's order.

    Args:
        published: content of the file.
        family: whose vocabulary it is.
        where: the file's name in messages.

    Raises:
        UserError: for a file that lacks a token of the family, or whose codes are not numbered
            0, 1, 2 ...
    """
    model = published.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or "vocab" not in model:
        raise UserError(f"{where} is not the tokenizer.json of a byte-level BPE")
    added = {token["content"]: token["id"] for token in published.get("added_tokens", [])}
    ids: dict[str, int] = {**model["vocab"], **added}
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"{where}: its ids are not 0 to {len(ids) - 1}, each once")

    # The image codes, by their numbers.
    codes: dict[int, str] = {}
    for name in ids:
        match = re.fullmatch(family.code, name)
        if match:
            codes[int(match[1].translate(LETTERS))] = name
    if not codes or sorted(codes) != list(range(len(codes))):
        raise UserError(f"{where}: it names no image codes {family.code} from 0 on")

    # The tokens that the family names, and the reserved ids that become sentinels.
    layout, pieces = _layout_in(family, published, ids)
    named = set(family.names.values()) | (_named(layout) - pieces)
    is_reserved = re.compile(family.reserved).fullmatch
    in_order = sorted(ids, key=ids.__getitem__)
    masks = []
    for name in in_order:
        if is_reserved(name) and name not in named:
            masks.append(name)
    masks = masks[: family.sentinels]
    for name in sorted(named - ids.keys()):
        raise UserError(f"{where}: it lacks the token {name}, which {family.title} has")
    if len(masks) < family.sentinels:
        raise UserError(
            f"{where}: it has {len(masks)} reserved tokens {family.reserved}; {family.sentinels} "
            "are needed"
        )

    # The order: four special tokens that every vocabulary has, then all others that are not text,
    # then the text, the codes and the sentinels.
    ours = {theirs: name for name, theirs in family.names.items()}
    first = [family.names[name] for name in SPECIALS]
    taken = {*first, *codes.values(), *masks}
    others, text = [], []
    for name in in_order:
        if name in taken:
            continue
        if name in added or name in named or is_reserved(name):
            others.append(name)
        else:
            text.append(name)
    specials = [ours.get(name, name) for name in (*first, *others)]
    order = [*first, *others, *text, *(codes[n] for n in range(len(codes))), *masks]

    # The tokenizer knows special tokens and text only. Without `added_tokens`, no text becomes a
    # special token.
    spelled = {name: number for number, name in enumerate([*specials, *text])}
    tokenizer = {
        **published,
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "model": {**model, "vocab": spelled, "unk_token": None},
    }
    table = {"specials": specials, **_renamed(layout, ours)}
    if pieces:
        table["pieces"] = {name: spelled[name] for name in sorted(pieces)}
    return PublishedVocab(
        tokenizer,
        table,
        np.array([ids[name] for name in order]),
        len(spelled),
        len(codes),
        len(masks),
    )


def _layout_in(
    family: Family, published: Mapping[str, Any], ids: Mapping[str, int]
) -> tuple[dict[str, Any], set[str]]:
    """Return a family's layout by names of tokens, and the set of names that are pieces of text.

    Of the sizes only those remain for which the vocabulary has tokens. Sizes that are written as
    text are spelled by the published tokenizer.
    """
    sizes: Mapping[str, Any] = family.layout.get("sizes", {})
    if not sizes:
        return dict(family.layout), set()
    if not all(isinstance(names, str) for names in sizes.values()):
        known = {size: names for size, names in sizes.items() if ids.keys() >= set(names)}
        return {**family.layout, "sizes": known}, set()

    tokenizer = Tokenizer.from_str(json.dumps(published))
    encoded = tokenizer.encode_batch(list(sizes.values()), add_special_tokens=False)
    spelled = {size: each.tokens for size, each in zip(sizes, encoded, strict=True)}
    added = {token["content"] for token in published.get("added_tokens", [])}
    return {**family.layout, "sizes": spelled}, set().union(*spelled.values()) - added


SETTINGS = ("unconditional_text", "last_row_closed")
"""Fields of a layout that do not name tokens."""


def _named(layout: Any) -> set[str]:
    """Collect all names of tokens in a layout."""
    if isinstance(layout, Mapping):
        tokens = (value for key, value in layout.items() if key not in SETTINGS)
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
