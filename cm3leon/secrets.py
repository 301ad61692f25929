"""Keep secrets out of files in run folders, and out of what is sent to services.

    masked("https://me:pass@host/a.tar?sig=x1")    # "https://***@host/a.tar?sig=***"

Three things are masked wherever they stand in a text: the user's part of a URL, parameters of its
query whose names are those of secrets, and the values of environment variables with such names
(WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

SHORTEST = 8
"""Characters from which on a variable's value counts as a secret; a shorter one would be found
inside other words."""
HIDDEN = "***"

_NAME = re.compile(
    r"(?:TOKEN|SECRETS?|PASSW(?:OR)?D|PASSPHRASE|(?:^|_|PG)PASS|_PWD|CREDENTIALS?"
    r"|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH)(?![A-Z])",
    re.IGNORECASE,
)
"""Names of variables that hold secrets; TOKENIZER, MAX_TOKENS and GIT_AUTHOR_NAME do not match."""
_USER = re.compile(
    r"(?<=://)(?:"
    r"[^/\s\"'?#]+"  # all before the last @ of the host's part
    # A password with a / in it: no such URL works, but errors show it.
    r"|[^/\s:@\"'?#]+:(?!\d+/)[^\s\"'?#]*"
    r")(?=@)"
)
_PARAMETER = re.compile(
    r"([?&][\w.%-]*(?:token|secret|pass|pwd|key|sig|credential|auth)[\w.%-]*=)[^&\s\"'#]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Replace the secrets in a text by `***`."""
    return _without(text, _values())


def masked_url(text: str) -> str:
    """Replace the secrets of URLs in a text by `***`; the result is the same on every machine."""
    return _PARAMETER.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))


def without_secrets(content: Any) -> Any:
    """Mask every text in plain data (mappings, lists, texts, numbers), including keys."""
    return _without(content, _values())


def _without(content: Any, secrets: Sequence[str]) -> Any:
    """Mask every text in plain data, given the secrets of the environment."""
    if isinstance(content, str):
        for secret in secrets:
            content = content.replace(secret, HIDDEN)
        return masked_url(content)
    if isinstance(content, Mapping):
        return {_without(key, secrets): _without(value, secrets) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without(each, secrets) for each in content]
    return content


def places_of_secrets(settings: Mapping[str, Any]) -> list[str]:
    """List the keys of a section whose values hold secrets, at any depth."""
    return [key for key, value in settings.items() if without_secrets(value) != value]


class MaskedFormatter(logging.Formatter):
    """Formats what a library logs, including its tracebacks, with secrets masked."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return masked(super().format(record))


def mask_tracebacks() -> None:
    """Mask secrets in the tracebacks of this process and of its threads from here on.

    Errors of libraries quote addresses with their passwords, and a job's log lies in the run's
    folder.
    """
    sys.excepthook = _print_traceback
    threading.excepthook = _print_traceback_of_thread


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    lines = traceback.format_exception(kind, error, trace)
    # The whole text is masked at once, as Python itself would print it in pieces.
    print(masked("".join(lines)), end="", file=sys.stderr, flush=True)


def _print_traceback_of_thread(given: threading.ExceptHookArgs) -> None:
    # A thread that calls sys.exit ends in silence, as Python has it.
    if given.exc_value is None or isinstance(given.exc_value, SystemExit):
        return
    if given.thread is not None:
        print(f"Exception in thread {given.thread.name}:", file=sys.stderr)
    _print_traceback(given.exc_type, given.exc_value, given.exc_traceback)


def _of_file_systems() -> Iterator[tuple[str, str]]:
    """Yield fsspec's settings from variables that hold JSON, as FSSPEC_S3='{"secret": "..."}'."""
    for name, value in os.environ.items():
        if not name.startswith("FSSPEC_") or not value.startswith("{"):
            continue
        try:
            settings = json.loads(value)
        except ValueError:
            continue
        yield from ((key, each) for key, each in settings.items() if isinstance(each, str))


def _values() -> list[str]:
    """List the secrets of the environment, the longest first, since one may be part of another."""
    found = {
        value
        for name, value in (*os.environ.items(), *_of_file_systems())
        # A path, as in GOOGLE_APPLICATION_CREDENTIALS, tells where a secret is, and is none itself.
        if _NAME.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", "."))
    }
    return sorted(found, key=len, reverse=True)
