"""Text is cut by patterns: published ones to the letter, and none that would cut special tokens."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from cm3leon.experiment import load_experiment
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.text_tokenizer import text_tokenizer_inputs
from cm3leon.tokenizers.layout import SPECIALS
from cm3leon.tokenizers.patterns import PUBLISHED_PATTERNS, Pattern, expression
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig

pytestmark = pytest.mark.stack

PATTERNS = get_args(Pattern)
TEXTS = ["a red dog on 12 chairs; it's नमस्ते", "<pad> <eos><break> <end_of_span>", "x\n\n  y"] * 3


def words(pattern: Pattern, text: str) -> list[str]:
    split = pre_tokenizers.Split(Regex(expression(pattern, 64)), behavior="isolated")
    return [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]


def test_every_name_has_a_pattern() -> None:
    assert set(PATTERNS) == {"words", *PUBLISHED_PATTERNS}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("words", "it|'s| |1|2|\n\n | |<|red|>| DogSter| नमस्ते|;"),
        ("gpt2", "it|'s| 12|\n\n | <|red|>| DogSter| नमस|्|त|े;"),
        ("llama3", "it|'s| |12|\n\n| | <|red|>| DogSter| नमस|्त|े;"),
        ("gpt4o", "it's| |12|\n\n| | <|red|>| Dog|Ster| नमस्ते|;"),
        ("qwen2", "it|'s| |1|2|\n\n| | <|red|>| DogSter| नमस|्त|े;"),
        ("qwen3_5", "it|'s| |1|2|\n\n| | <|red|>| DogSter| नमस्ते|;"),
        ("tekken", "it|'s| |1|2|\n\n| | <|red|>| Dog|Ster| नमस्ते|;"),
    ],
)
def test_a_text_is_cut_as_the_pattern_says(pattern: Pattern, expected: str) -> None:
    assert words(pattern, "it's 12\n\n  <red> DogSter नमस्ते;") == expected.split("|")


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("qwen2", "transformers.models.qwen2.tokenization_qwen2"),
        ("qwen3_5", "transformers.models.qwen3_5.tokenization_qwen3_5"),
        ("llama3", "transformers.convert_slow_tokenizer"),
        ("tekken", "transformers.tokenization_utils_tokenizers"),
    ],
)
def test_a_published_pattern_is_letter_for_letter_that_of_transformers(
    pattern: Pattern, module: str
) -> None:
    source = inspect.getsource(pytest.importorskip(module))
    assert PUBLISHED_PATTERNS[pattern] in source.replace('"\n', "").replace(' r"', "")


letters = st.text(st.sampled_from("aZée\u0301ßǅʰ漢ना्ٌ0½٣ _-'’.<>/|\n\r\tsTlL"), max_size=24)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=letters)
@settings(max_examples=60)
def test_another_engine_of_regular_expressions_cuts_alike(pattern: Pattern, text: str) -> None:
    regex = pytest.importorskip("regex")
    assert words(pattern, text) == regex.findall(expression(pattern, 64), text)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=letters | st.text())
@settings(max_examples=60)
def test_no_word_has_a_letter_before_a_closing_bracket(pattern: Pattern, text: str) -> None:
    """So no piece of text ends as special tokens do."""
    found = words(pattern, f"{text}{text}>{SPECIALS[2]}")
    assert "".join(found) == f"{text}{text}>{SPECIALS[2]}"
    assert not any(re.search(r"[a-zA-Z]>", word) for word in found)


@pytest.fixture(scope="module")
def trained() -> dict[Pattern, TextTokenizer]:
    configs = {
        pattern: TextTokenizerConfig(vocab_size=400, pattern=pattern) for pattern in PATTERNS
    }
    return {pattern: TextTokenizer.train(config, TEXTS) for pattern, config in configs.items()}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_file_holds_the_pattern_and_is_read_whatever_the_settings_say(
    trained: dict[Pattern, TextTokenizer], tmp_path: Path, pattern: Pattern
) -> None:
    trained[pattern].save(tmp_path)

    steps = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert steps[0]["pattern"] == {"Regex": expression(pattern, 64)}
    assert [step["type"] for step in steps] == ["Split", "ByteLevel"]

    # The file is what counts: loaded with the settings of another pattern, it cuts as before.
    for other in PATTERNS:
        loaded = TextTokenizer.load(tmp_path, TextTokenizerConfig(vocab_size=400, pattern=other))
        for text in TEXTS:
            assert loaded.encode(text).tolist() == trained[pattern].encode(text).tolist()


# --------------------------------------------------------------------------------------- older runs


def inputs(folder: Path, *overrides: str) -> Any:
    run = RunFolder(load_experiment("digits", overrides), folder, torch.device("cpu"))
    return text_tokenizer_inputs(run)["text_tokenizer"]


def test_records_from_before_there_was_a_choice_are_those_of_words(tmp_path: Path) -> None:
    before = {"vocab_size": 320, "min_frequency": 2, "max_word": 64, "sample_bytes": 10**9}
    assert inputs(tmp_path, "text_tokenizer.pattern=words") == before
    assert inputs(tmp_path, "text_tokenizer.pattern=qwen2") == {**before, "pattern": "qwen2"}
    assert inputs(tmp_path, "text_tokenizer.fill_to=16") == {**before, "fill_to": 16}


def test_a_run_that_names_no_pattern_has_words_and_a_new_experiment_the_default() -> None:
    section = {"text_tokenizer": {"vocab_size": 300}}
    for earlier, pattern in ((True, "words"), (False, TextTokenizerConfig().pattern)):
        loaded = load_experiment("digits", sections=section, earlier=earlier)
        assert loaded.text_tokenizer.pattern == pattern
    named = {"text_tokenizer": {"pattern": "gpt2"}}
    assert load_experiment("digits", sections=named, earlier=True).text_tokenizer.pattern == "gpt2"
