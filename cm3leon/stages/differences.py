"""What differs between two records of a stage, in words."""

from __future__ import annotations

import json
import re
from typing import Any

from cm3leon.stages.stage import StageRecord

DIFFERENCES = 5
"""Most settings that a refusal names."""
UNSET = object()
"""In the place of a setting that only the other record has; None is a value."""


def differences(before: StageRecord, now: StageRecord) -> list[str]:
    """What differs between what a stage was made from and what it would be made from now,
    in words."""
    if before.version is None:
        return [
            "it was made by an earlier version of CM3Leon, whose record does not say from which "
            "settings"
        ]
    was, is_ = _flat(before.inputs), _flat(now.inputs)
    every = dict.fromkeys([*was, *is_])
    keys = [key for key in every if was.get(key, UNSET) != is_.get(key, UNSET)]

    found = []
    for key in keys[:DIFFERENCES]:
        was_it, is_it = _short(was.get(key, UNSET)), _short(is_.get(key, UNSET))
        found.append(f"{key or 'its input'} was {was_it}, is {is_it}")
    if len(keys) > DIFFERENCES:
        found.append(f"{len(keys) - DIFFERENCES} more settings differ")
    if before.version != now.version:
        found.append(f"its code is of version {now.version}, it was of version {before.version}")
    return found


def changed_parts(before: StageRecord, now: StageRecord) -> list[str]:
    """The stages, and files of stages, that were others when a stage was made."""
    old, new = before.needs | before.made_with, now.needs | now.made_with
    return [name for name in new if old.get(name) != new[name]]


def _short(value: Any) -> str:
    if value is UNSET:
        return "not there"
    text = json.dumps(value, ensure_ascii=False)
    if re.fullmatch(r'"[0-9a-f]{64}"', text):  # the start of a checksum is enough
        return text[1:13]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of mappings, as one mapping with dotted keys."""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        entries = {str(number): inner for number, inner in enumerate(value)}.items()
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in entries:
        flat |= _flat(inner, f"{key}.{name}".strip("."))
    return flat
