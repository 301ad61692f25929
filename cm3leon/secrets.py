"""Secrets are kept out of what is written into run folders and sent to trackers.

masked("https://me:pass@host/a.tar?sig=x1")    # "https://***@host/a.tar?sig=***"

Masked are the user's part of a URL, parameters of its query that are named as secrets are, and the
values of environment variables that are named so (WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY),
wherever they stand in a text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

SHORTEST = 8
"""Characters from which the value of a variable counts as a secret: a shorter one would be found in other words."""
HIDDEN = "***"

_NAME = re.compile(
    r"(?:TOKEN|SECRETS?|PASSW(?:OR)?D|PASSPHRASE|(?:^|_|PG)PASS|_PWD|CREDENTIALS?"
    r"|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH)(?![A-Z])",
    re.IGNORECASE,
)
"""Names of variables that hold secrets. TOKENIZER, MAX_TOKENS and GIT_AUTHOR_NAME are none."""
_USER = re.compile(
    r"(?<=://)(?:"
    r"[^/\s\"'?#]+"  # all before the last @ of the host's part
    r"|[^/\s:@\"'?#]+:(?!\d+/)[^\s\"'?#]*"  # a password with a / in it: no such URL works, but errors show it
    r")(?=@)"
)
_PARAMETER = re.compile(
    r"([?&][\w.%-]*(?:token|secret|pass|pwd|key|sig|credential|auth)[\w.%-]*=)[^&\s\"'#]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text with its secrets replaced by `***`."""
    for secret in _values():
        text = text.replace(secret, HIDDEN)
    return masked_url(text)


def masked_url(text: str) -> str:
    """The text with the secrets of URLs replaced by `***`: the same text on every machine."""
    return _PARAMETER.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))


def without_secrets(content: Any) -> Any:
    """Plain data (mappings, lists, texts, numbers) with every text in it masked, keys too."""
    if isinstance(content, str):
        return masked(content)
    if isinstance(content, Mapping):
        return {without_secrets(key): without_secrets(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_secrets(each) for each in content]
    return content


def places_of_secrets(settings: Mapping[str, Any]) -> list[str]:
    """The keys of a section whose values hold secrets, also further inside."""
    return [key for key, value in settings.items() if without_secrets(value) != value]


def _of_file_systems() -> Iterator[tuple[str, str]]:
    """The settings of fsspec's file systems that stand in a variable as JSON: FSSPEC_S3='{"secret": "..."}'."""
    for name, value in os.environ.items():
        if not name.startswith("FSSPEC_") or not value.startswith("{"):
            continue
        try:
            settings = json.loads(value)
        except ValueError:
            continue
        yield from ((key, each) for key, each in settings.items() if isinstance(each, str))


def _values() -> list[str]:
    """The secrets of the environment, the longest first: one may be a part of another."""
    found = {
        value
        for name, value in (*os.environ.items(), *_of_file_systems())
        # A path is where a secret lies, as in GOOGLE_APPLICATION_CREDENTIALS, and no secret itself.
        if _NAME.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", "."))
    }
    return sorted(found, key=len, reverse=True)
