"""Every message of a user's mistake stands in tests/messages.txt, and keeps the rules for messages.

The list is there to be read: a message that changes is a line that changes in it, which a review
sees as its user will see it. What a rule can find is checked here.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from textwrap import dedent

import pytest
from messages import LIST, Message, messages, written

LONGEST = 300
"""Characters of constant text that a message may have."""
TELEGRAMS = (
    r"\b(is|are|was|were) none\b(?! of)",
    r"\bthat (has|have) none\b",
    r"\bwhich (\{\} )?(has|have|had) not\b",
    r"(?<!there )\b(is|are) no (?!longer\b)",
)
"""Words of telegrams, not of sentences: "a folder that is none", "is no run folder"."""
PASSED_ON = (
    "cm3leon/api/model.py: {where} ({shortened(texts[number])}): {reason}",
    "cm3leon/commands/asking.py: {some[0]}",
    "cm3leon/commands/generate.py: {'; '.join(list(too_long.values())[:NAMED])}",
    "cm3leon/config/check.py: {str(error)}",
    "cm3leon/config/check.py: {where}: {error}",
    "cm3leon/config/files.py: {path}{_reason(error)}",
    "cm3leon/hub/folder.py: {self.where}: {error}",
    "cm3leon/hub/folder.py: {self.where}: {self.folder / 'config.json'}: {error}",
    "cm3leon/stages/evaluation.py: {where}: {error}",
    "cm3leon/stages/pretraining.py: {fault}",
    "cm3leon/stages/running.py: {refusal}",
    "cm3leon/studies/config.py: {where}: {error}",
    "cm3leon/tokenizers/image/published_layouts.py: {self.path} {what} {_some(some)}",
    "cm3leon/training/parallel.py: {said}",
    "cm3leon/types.py: {several[0]}",
    "cm3leon/weights.py: {path} {what} {', '.join(sorted(names)[:5])}"
    "{', ...' if len(names) > 5 else ''}",
)
"""Messages without constant text: they say what another message said, or what stands in a table."""


@pytest.fixture(scope="module")
def found() -> list[Message]:
    return messages()


def faults(message: Message) -> list[str]:
    """What is wrong with a message, by the rules."""
    text, wrong = message.constant, []
    if not re.search(r"\w", text.replace("\n", "")):
        wrong.append("has no text of its own")
    if text.endswith((".", "!")) and not text.endswith("..."):
        wrong.append("ends in a full stop or an exclamation mark")
    if "  " in text:
        wrong.append("has two spaces in a row")
    if len(text.replace("{}", "")) > LONGEST:
        wrong.append(f"has more than {LONGEST} characters")
    for pattern in TELEGRAMS:
        if match := re.search(pattern, text):
            wrong.append(f"says {match[0]!r}, which is not a whole sentence")
    return wrong


def test_the_list_is_todays(found: list[Message]) -> None:
    before, now = LIST.read_text().splitlines(), written(found).splitlines()
    changes = [line for line in difflib.ndiff(before, now) if line[0] in "-+"]
    hint = "read the changed messages as their users will, then write the list anew: "
    assert not changes, "\n".join([f"{hint}python tests/messages.py", *changes])


def test_every_message_keeps_the_rules(found: list[Message]) -> None:
    wrong = []
    for message in found:
        if message.line not in PASSED_ON:
            wrong += [f"{message.line} ({fault})" for fault in faults(message)]
    assert not wrong, "\n".join(wrong)


def test_what_passes_a_message_on_is_still_there(found: list[Message]) -> None:
    assert set(PASSED_ON) <= {message.line for message in found}


def test_planted_messages_are_found(tmp_path: Path) -> None:
    # In each way to build one: directly, of a derived class in another file, of a function that
    # makes the error or its text, by a name, as one of several, by a condition, and joined.
    (tmp_path / "cm3leon").mkdir()
    (tmp_path / "cm3leon" / "first.py").write_text(
        dedent(
            """
            class Lost(types.UserError):
                pass

            class LostShard(Lost):
                pass

            class LostRow(Lost):
                def __init__(self, row):
                    super().__init__(f"row {row} is lost")
                    self.row = row

            def _not_allowed(where: str, allowed: str) -> UserError:
                return UserError(f"{where} is wrong; it must be {allowed}")

            def check(self, where, size):
                if size < 0:
                    raise _not_allowed(where, "at least 0")
                mistakes = []
                mistakes.append(f"size {size:,} is too large" + "  for this")
                refuse(mistakes)
            """
        )
    )
    (tmp_path / "plugins" / "mine").mkdir(parents=True)
    (tmp_path / "plugins" / "mine" / "second.py").write_text(
        dedent(
            '''
            async def read(path, folder):
                def written_down():
                    return "never shown"

                text = f"{path} is gone"
                try:
                    raise LostShard(text) from None
                finally:
                    raise types.UserError(reason_of(folder))

            def reason_of(folder):
                """UserError("no message")"""
                return f"{folder} is a folder that is none." if folder else None

            raise LostRow(3)
            raise UserError("all" if x else f"{x}\\n")
            raise UserError(error)
            raise ValueError("no message")
            '''
        )
    )
    found = messages(tmp_path)
    assert written(found).splitlines() == [
        "cm3leon/first.py: row {row} is lost",
        "cm3leon/first.py: {where} is wrong; it must be {allowed}",
        "cm3leon/first.py: _not_allowed({where}, at least 0)",
        "cm3leon/first.py: size {size} is too large  for this",
        "plugins/mine/second.py: {path} is gone",
        "plugins/mine/second.py: {folder} is a folder that is none.",
        "plugins/mine/second.py: all",
        "plugins/mine/second.py: {x}\\n",
        "plugins/mine/second.py: {error}",
    ]
    assert [faults(message) for message in found if faults(message)] == [
        ["has two spaces in a row"],
        [
            "ends in a full stop or an exclamation mark",
            "says 'is none', which is not a whole sentence",
        ],
        ["has no text of its own"],
        ["has no text of its own"],
    ]


def test_a_long_message_is_found() -> None:
    assert faults(Message("a.py", ("x" * LONGEST,))) == []
    assert faults(Message("a.py", ("x" * LONGEST, "x"))) == ["has more than 300 characters"]
