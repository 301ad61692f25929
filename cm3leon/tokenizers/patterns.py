r"""Where merges stop: the patterns that cut text into words before byte-level BPE.

No piece of the vocabulary reaches across the border of two words. The text
"it's 12\n\n  <red> dogs" is cut into

    words      it | 's | ␣ | 1 | 2 | \n\n␣ | ␣ | < | red | > | ␣dogs
    gpt2       it | 's | ␣12 | \n\n␣ | ␣< | red | > | ␣dogs
    llama3     it | 's | ␣ | 12 | \n\n | ␣ | ␣< | red | > | ␣dogs
    gpt4o      it's | ␣ | 12 | \n\n | ␣ | ␣< | red | > | ␣dogs
    qwen2, qwen3_5   it | 's | ␣ | 1 | 2 | \n\n | ␣ | ␣< | red | > | ␣dogs
    tekken     it | 's | ␣ | 1 | 2 | \n\n | ␣ | ␣< | red | > | ␣dogs

All but `words` are kept letter for letter as published, because other encoders recognise them by
their text.

All special tokens end in a letter and ">". No pattern has a word in which a letter stands before
">", so no piece can end in the two, and no text becomes a special token.
"""

from __future__ import annotations

from typing import Literal

Pattern = Literal["words", "gpt2", "llama3", "gpt4o", "qwen2", "qwen3_5", "tekken"]

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

PUBLISHED_PATTERNS: dict[Pattern, str] = {
    # OpenAI's GPT-2: a word takes its space along, digits run together, an accent is a sign.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Meta's Llama 3: a word takes any one sign before it along, signs the newlines behind them,
    # and digits come by threes.
    "llama3": _ENDINGS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _LINES,
    # OpenAI's GPT-4o (o200k): Llama 3's, but a capital begins a word, and accents are with their
    # letters.
    "gpt4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS}|{_LINES}",
    # Alibaba's Qwen 2 to 3: Llama 3's, with single digits.
    "qwen2": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES,
    # Alibaba's Qwen 3.5: Qwen 2's, with accents beside their letters.
    "qwen3_5": _ENDINGS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + _LINES,
    # Mistral's Tekken: GPT-4o's, with single digits and "'s" by itself.
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_SIGNS}|{_LINES}",
}


def expression(pattern: Pattern, longest: int) -> str:
    """Return the regular expression of a pattern.

    In `words` a word has at most `longest` characters, and one space before them.
    """
    return _words(longest) if pattern == "words" else PUBLISHED_PATTERNS[pattern]


def learned_from(pattern: Pattern, longest: int) -> list[str]:
    """Return the expressions that cut text for learning, one after the other.

    They keep pieces to `longest` characters. Without this limit a megabyte of base64 or of Chinese
    would be one word, which every merge reads again from its beginning. Encoding takes long words
    whole, up to the million characters of `tokenizers.text.BATCH`.
    """
    whole = expression(pattern, longest)
    return [whole] if pattern == "words" else [whole, rf"[\s\S]{{1,{longest}}}"]


def _words(longest: int) -> str:
    """Return GPT-2's pattern with four changes.

    Digits and "<" are words of their own, accents stay with their letters, and words have a largest
    length. White space before a word is one run, of which the word takes the last space; a run that
    ends in a newline stays whole.
    """
    return (
        r"'(?:s|t|re|ve|m|ll|d)|\p{N}|<"
        rf"| ?[\p{{L}}\p{{M}}]{{1,{longest}}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}<]{{1,{longest}}}"
        rf"|\s{{0,{longest - 1}}}[\r\n](?!\s)"
        rf"|\s{{1,{longest}}}(?!\S)"
        rf"|\s{{1,{longest}}}"
    )
