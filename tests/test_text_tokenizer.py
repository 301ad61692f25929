"""The text tokenizer trained on a corpus that is streamed or sampled.

Any text comes back exactly, no text becomes a control token, and transformers reads the files.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models

from cm3leon.data.corpus import split_of_key
from cm3leon.experiment import load_experiment
from cm3leon.stages.documents import make_documents
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.running import run_experiment
from cm3leon.stages.text_tokenizer import (
    TRAINED_ON,
    TextSample,
    make_text_tokenizer,
    text_tokenizer_inputs,
)
from cm3leon.tokenizers import text as text_module
from cm3leon.tokenizers.layout import SPECIALS
from cm3leon.tokenizers.patterns import Pattern
from cm3leon.tokenizers.text import STRETCH, TextTokenizer, TextTokenizerConfig, unicode_text
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

PATTERNS = get_args(Pattern)
CONTROL = (
    *SPECIALS,
    "<mask:0>",
    "<mask:511>",
    "<mask>",
    "<infill>",
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
)
# Sentences, code, other scripts, and words that look like control tokens.
PROSE = [
    "a red dog on 12 chairs in 1984; it's the dog's chair.",
    "    def dogs(self):\n        return self.chairs[0]\n\n\nclass Chair:\n",
    "Ein Hund läuft über die Straße. नमस्ते दुनिया 赤い犬が椅子の上に座っている 🦎",
    *(f"{control} {control}{control}" for control in CONTROL),
] * 4


def train(texts: Iterable[str], vocab_size: int = 700, **fields: Any) -> TextTokenizer:
    return TextTokenizer.train(TextTokenizerConfig(vocab_size=vocab_size, **fields), texts)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train(PROSE)


@pytest.fixture(scope="module", params=PATTERNS)
def of_pattern(request: pytest.FixtureRequest) -> TextTokenizer:
    return train(PROSE, pattern=request.param)


@pytest.fixture(scope="module")
def of_words() -> TextTokenizer:
    return train(PROSE, pattern="words")


@pytest.fixture(scope="module")
def saved(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


# -------------------------------------------------------------------------------------------- words

runs = st.builds(lambda unit, times: unit * times, st.text(max_size=3), st.integers(0, 150))
long_text = st.lists(
    runs | st.text(max_size=20) | st.sampled_from(["\n", "\r\n", "    ", "\x00", "'s"]), max_size=6
)
beginnings = [control[:k] for control in CONTROL for k in range(1, len(control))]
attack = st.lists(
    st.sampled_from([*CONTROL, *beginnings, " ", "Ġ", "\x00", "<", ">", "0"]), max_size=12
)
any_text = (long_text | attack).map("".join)


def words(tokenizer: TextTokenizer, text: str) -> list[str]:
    """The parts of a text that merges never cross."""
    found = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it's 12 dogs", ["it", "'s", " ", "1", "2", " dogs"]),
        (" <red> <", [" ", "<", "red", ">", " ", "<"]),
        ("a\n\nb\r\nc\n", ["a", "\n\n", "b", "\r\n", "c", "\n"]),
        ("a:\n    b   c", ["a", ":", "\n   ", " b", "  ", " c"]),
        ("été नमस्ते ½٣", ["été", " नमस्ते", " ", "½", "٣"]),
        ("== --> !", ["==", " -->", " !"]),
    ],
)
def test_words_are_gpt2s_with_digits_alone_and_newlines_kept_together(
    of_words: TextTokenizer, text: str, expected: list[str]
) -> None:
    assert words(of_words, text) == expected


@given(text=any_text)
def test_no_word_is_longer_than_the_limit_and_nothing_is_lost(
    of_words: TextTokenizer, text: str
) -> None:
    found = words(of_words, text)
    assert "".join(found) == text
    assert all(len(word) <= 64 + 1 for word in found)  # 64 letters, with a space before them


@given(text=any_text)
@settings(max_examples=60)
def test_any_text_comes_back_exactly_and_never_as_a_control_token(
    of_pattern: TextTokenizer, text: str
) -> None:
    ids = of_pattern.encode(text)
    low, high = Vocab(text_size=of_pattern.vocab_size, image_size=16).id_range("text")
    assert ((ids >= low) & (ids < min(high, of_pattern.pieces))).all()
    assert of_pattern.decode(ids) == text


@given(texts=st.lists(any_text | st.just("a red dog" * (STRETCH // 6)), max_size=5))
@settings(max_examples=10)
def test_a_batch_gives_what_each_text_gives(tokenizer: TextTokenizer, texts: list[str]) -> None:
    batch = tokenizer.encode_all(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]
    assert all(ids.dtype == np.int64 and ids.ndim == 1 for ids in batch)


several_words = st.lists(
    st.sampled_from(
        [" dog", " 1984", "'s", "Hund", "\n\n", "   ", "\u2003", "\x1c", "。", " 赤い", "/", "."]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)


@given(text=several_words, limit=st.integers(6, 30))
@settings(max_examples=60)
def test_a_text_of_parts_has_the_ids_of_the_whole_where_words_have_spaces(
    of_pattern: TextTokenizer, text: str, limit: int
) -> None:
    text = unicode_text(text)
    whole = of_pattern.encode(text)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_module, "BATCH", limit)
        parts = text_module._parts(text)
        encoded = of_pattern.encode(text)
        (again,) = of_pattern.encode_all([text])

    assert "".join(parts) == text
    assert max(map(len, parts)) <= limit

    assert encoded.tolist() == again.tolist()
    assert of_pattern.decode(encoded) == text

    # Where each part begins with a space behind a word, the parts are cut between words.
    cut_between_words = []
    for before, part in itertools.pairwise(parts):
        cut_between_words.append(part.startswith(" ") and not before[-1].isspace())
    if all(cut_between_words):
        assert encoded.tolist() == whole.tolist()


def test_a_text_just_above_the_limit_has_the_ids_of_the_whole(
    of_pattern: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", "a red dog", PROSE[0] * 3, "a red dog's  chair,\n in 1984. " * 40]
    whole = [of_pattern.encode(text).tolist() for text in texts]

    # One part more than the limit has room for, and yet no other ids.
    monkeypatch.setattr(text_module, "BATCH", len(texts[-1]) - 1)
    assert len(text_module._parts(texts[-1])) == 2
    assert [of_pattern.encode(text).tolist() for text in texts] == whole
    assert [ids.tolist() for ids in of_pattern.encode_all(texts)] == whole

    # A part ends at a space where there is one, and nothing is lost where there is none.
    monkeypatch.setattr(text_module, "BATCH", 10)
    assert text_module._parts("a red dogs   chairs") == ["a red dogs", "   chairs"]
    assert text_module._parts("a" * 25) == ["a" * 10, "a" * 10, "a" * 5]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "letter"), [("qwen3_5", " "), ("tekken", "A")])
def test_eleven_million_times_one_character_are_encoded(pattern: str, letter: str) -> None:
    """The library panics at ten million retries of a pattern, and Python does not survive that."""
    tokenizer = train(PROSE, pattern=pattern)
    text = letter * 11_000_000
    assert tokenizer.decode(tokenizer.encode_all([text])[0]) == text


@given(text=st.text(st.sampled_from("aé🦎\ud800\ud83d\udfff\ude00")))
def test_surrogates_become_their_character_or_a_replacement(
    tokenizer: TextTokenizer, text: str
) -> None:
    def joined(pair: re.Match[str]) -> str:
        return json.loads(json.dumps(pair[0]))

    paired = re.sub("[\ud800-\udbff][\udc00-\udfff]", joined, text)
    expected = re.sub("[\ud800-\udfff]", "\ufffd", paired)
    assert unicode_text(text) == expected
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.encode_all([text])[0].tolist() == tokenizer.encode(expected).tolist()


# ----------------------------------------------------------------------------------------- training


def test_texts_are_read_once_and_not_kept() -> None:
    class Text(str):
        pass

    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    # Texts that are alive at a time are counted while they are read.
    def texts() -> Iterator[str]:
        nonlocal most
        for number in range(2000):
            text = Text(f"the dog number {number}")
            alive.add(text)
            most = max(most, len(alive))
            yield text
            del text

    assert train(texts()).pieces > 260
    assert most <= 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_texts_in_any_order_give_the_same_file(tmp_path: Path, pattern: str) -> None:
    for name, texts in (("one", PROSE), ("other", reversed(PROSE))):
        (tmp_path / name).mkdir()
        train(texts, pattern=pattern).save(tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_mistake_of_the_source_comes_through() -> None:
    def texts() -> Iterator[str]:
        yield "a dog"
        raise UserError("the corpus has moved")

    with pytest.raises(UserError, match="the corpus has moved"):
        train(texts())


@pytest.mark.parametrize("disable", [False, True])
def test_a_corpus_without_text_is_told_apart_from_one_whose_bytes_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, disable: bool
) -> None:
    """TQDM_DISABLE=1, which many people set for everything, makes a progress bar count nothing."""
    monkeypatch.setattr(text_module, "tqdm", functools.partial(text_module.tqdm, disable=disable))
    assert train(["a dog"] * 9).decode(train(["a dog"] * 9).encode("a dog")) == "a dog"
    with pytest.raises(UserError, match="the corpus holds no text to train on"):
        train(["", ""])


RANDOM = base64.b64encode(np.random.default_rng(0).bytes(300_000)).decode()
# Each is a corpus of one document.
HARD = {
    "one document": "a red dog on a red chair",
    "one character": "aaaa",
    "digits": "0123456789" * 50,
    "white space": " \n\t" * 50,
    "NUL": "\x00" * 300 + "a\x00b",
    "surrogates": "dog \ud800 dog \udfff",
    "base64": RANDOM,
    "no spaces": "".join(chr(0x4E00 + k * 7919 % 20_000) for k in range(100_000)),
    "one letter, a million times": "a" * 1_000_000,
    "a million spaces": " " * 1_000_000,
    "two megabytes": "the quick red dog " * 116_000,
}


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "pattern"),
    [*((name, "qwen3_5") for name in HARD), ("base64", "words"), ("a million spaces", "words")],
)
def test_hard_corpora_are_learned_from(name: str, pattern: str) -> None:
    text = HARD[name]
    tokenizer = train([text], vocab_size=400, pattern=pattern)
    assert BASE <= tokenizer.pieces <= 400

    start = text[:200_000]
    assert tokenizer.decode(tokenizer.encode(start)) == unicode_text(start)

    # No piece that was learned is longer than a word may be, and none has a digit.
    pieces = [tokenizer.decode([id_]) for id_ in range(BASE, tokenizer.pieces)]
    assert all(len(piece) <= 65 for piece in pieces)
    alone = "[0-9<]" if pattern == "words" else "[0-9]"
    assert not any(re.search(alone, piece) for piece in pieces)


BASE = len(SPECIALS) + 256


@pytest.mark.parametrize("pattern", ["words", "gpt4o", "qwen3_5"])
@pytest.mark.parametrize("limit", [1, 2, 7])
def test_a_piece_is_no_longer_than_the_limit(limit: int, pattern: str) -> None:
    tokenizer = train(["abcdefghijkl\n\n\n"] * 3, max_word=limit, pattern=pattern)
    longest = max(len(tokenizer.decode([id_])) for id_ in range(BASE - 256, tokenizer.pieces))
    assert longest == limit
    assert tokenizer.decode(tokenizer.encode("abc\n\n\n\n\n\nabc   ")) == "abc\n\n\n\n\n\nabc   "


def test_a_long_document_teaches_what_its_paragraphs_do() -> None:
    paragraph = "a red dog on a chair\n" * 100
    whole, parts = train([paragraph * 100]), train([paragraph] * 100)
    assert len(paragraph * 100) > 3 * STRETCH
    # A word that lies across two stretches counts as two.
    assert abs(whole.pieces - parts.pieces) <= 4
    assert len(whole.encode(paragraph)) == len(parts.encode(paragraph)) == 700


# ------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def theirs(of_pattern: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The saved folder as transformers reads it, by file and by folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    of_pattern.save(folder)
    return [
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
        transformers.AutoTokenizer.from_pretrained(str(folder)),
    ]


@given(text=any_text)
@settings(max_examples=20)
def test_transformers_gives_the_same_ids_and_the_exact_text(
    theirs: list[Any], of_pattern: TextTokenizer, text: str
) -> None:
    ids = of_pattern.encode(text).tolist()
    for each in theirs:
        assert each(text).input_ids == ids
        assert each.encode(text) == ids
        assert each.decode(ids) == text
        assert each.decode(ids, skip_special_tokens=True) == text
        assert not set(ids) & set(range(len(SPECIALS)))


def test_transformers_knows_no_special_tokens(theirs: list[Any], of_pattern: TextTokenizer) -> None:
    for each in theirs:
        assert each.all_special_tokens == []
        assert each.get_added_vocab() == {}
        assert len(each) == of_pattern.pieces
        assert each.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2, 3]
        assert each.tokenize("<break>") != ["<break>"]


# ---------------------------------------------------------------------------------- files of others

Content = dict[str, Any]


def _declared(content: Content) -> None:
    token = {"id": 2, "content": "<break>", "special": True}
    settings = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [{**token, **settings}]


def _merged(content: Content) -> None:
    """Merge the letters of <pad>, one after the other."""
    for left, right in zip(("<", "<p", "<pa", "<pad"), "pad>", strict=True):
        if left + right not in content["model"]["vocab"]:
            content["model"]["vocab"][left + right] = len(content["model"]["vocab"])
        content["model"]["merges"].append([left, right])


def _renumbered(content: Content) -> None:
    vocab = content["model"]["vocab"]
    vocab["<pad>"], vocab["<eos>"] = vocab["<eos>"], vocab["<pad>"]


def _set(**fields: Any) -> Callable[[Content], None]:
    return lambda content: content.update(fields)


def _set_model(**fields: Any) -> Callable[[Content], None]:
    return lambda content: content["model"].update(fields)


# Changes of a saved file, each of which breaks a promise, and what is said of it.
FOREIGN: dict[str, tuple[Callable[[Content], None], str]] = {
    "declared": (_declared, "recognises <break> inside any text"),
    "merged": (_merged, "its merges can make a special token of text"),
    "whole words": (_set_model(ignore_merges=True), "its merges can make a special token of text"),
    "renumbered": (_renumbered, "ids 0 to 3 are not <pad> <eos> <break> <end_of_span>"),
    "gap": (lambda content: content["model"]["vocab"].update({"zebra": 5000}), "its ids have gaps"),
    "no byte level": (_set(pre_tokenizer=None), "text does not come back from it exactly"),
    "no decoder": (_set(decoder=None), "text does not come back from it exactly"),
    "lower case": (
        _set(normalizer={"type": "Lowercase"}),
        "text does not come back from it exactly",
    ),
    "normal form": (_set(normalizer={"type": "NFC"}), "text does not come back from it exactly"),
    "model": (
        _set(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        "its model is WordLevel",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tokenizer_that_breaks_a_promise_is_refused(
    saved: Path, tmp_path: Path, name: str
) -> None:
    change, sentence = FOREIGN[name]
    content = json.loads((saved / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=sentence) as refused:
        TextTokenizer.load(tmp_path, TextTokenizerConfig(vocab_size=10_000))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "not json", "cut", "\x00\xff"])
def test_a_damaged_file_is_refused(saved: Path, tmp_path: Path, damage: str) -> None:
    whole = (saved / "tokenizer.json").read_text()
    content = damage
    if damage == "cut":
        content = whole[: len(whole) // 2]
    (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(UserError, match=r"is damaged, or not a tokenizer\.json"):
        TextTokenizer.load(tmp_path, TextTokenizerConfig())


def test_the_librarys_own_byte_level_bpe_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    plain = ByteLevelBPETokenizer()
    plain.train_from_iterator(PROSE, vocab_size=300, show_progress=False)
    for other in (plain, Tokenizer(models.BPE())):
        other.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UserError, match="ids 0 to 3 are not"):
            TextTokenizer.load(tmp_path, TextTokenizerConfig())


# ---------------------------------------------------------------------------------------- the stage


@given(st.lists(st.text(max_size=8)), st.integers(1, 60) | st.none())
def test_a_sample_is_the_texts_up_to_so_many_bytes(texts: list[str], limit: int | None) -> None:
    sample = TextSample()
    taken = list(sample.take(texts, limit))
    whole = "".join(texts).encode()
    assert "".join(taken) == whole[:limit].decode(errors="ignore")
    assert (sample.documents, sample.bytes) == (len(taken), len("".join(taken).encode()))


def corpus(folder: Path, parts: int = 3, lines: int = 40) -> Path:
    """Files of lines, each with words of its own."""
    folder.mkdir()
    for part in range(parts):
        texts = [f"{'abc'[part] * 3}{'xyz'[number % 3]} dogs" for number in range(lines)]
        written = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{part}.jsonl").write_text("".join(written))
    return folder


def run_of(folder: Path, *overrides: str) -> RunFolder:
    """A run of digits in a folder, of which nothing is made."""
    folder.mkdir(exist_ok=True)
    return RunFolder(load_experiment("digits", overrides), folder, torch.device("cpu"))


def made(run: RunFolder) -> tuple[TextTokenizer, dict[str, Any]]:
    """Make a run's text tokenizer; return it and what is written of its training."""
    folder, documents = run.folder / "text_tokenizer", run.folder / "documents"
    folder.mkdir()
    if not documents.exists():
        documents.mkdir()
        make_documents(run, documents)
    make_text_tokenizer(run, folder)
    return run.text_tokenizer, json.loads((folder / TRAINED_ON).read_text())


def on(path: Path, *overrides: str) -> tuple[str, ...]:
    """The words that train the text tokenizer on texts of their own."""
    return ("text_data.name=text_jsonl", f"text_data.path={path}", *overrides)


def test_the_training_split_of_a_text_corpus_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corpus(tmp_path / "texts")
    # Two lines of no use, and one that has a NUL.
    with (path / "0.jsonl").open("a") as file:
        file.write('{"text": "\\ud800"}\n{"body": 1}\n{"text": "\\u0000 dogs"}\n')
    run = run_of(tmp_path / "run", *on(path, "split.held_out=0.3"))
    tokenizer, told = made(run)

    # The expected documents are read from the same files as a corpus.
    source = run_of(tmp_path / "run", f"data={{name: text_jsonl, path: {path}}}").source
    documents = [item for item in source.documents() if hasattr(item, "text")]
    shares = {"validation": 0.1, "held_out": 0.3}
    kept = [d for d in documents if split_of_key(d.split_key, **shares) == "train"]
    assert 0 < len(kept) < len(documents)
    assert (told["documents"], told["skipped"]) == (len(kept), 2)
    assert told["bytes"] == sum(len(d.text.encode()) for d in kept)

    assert told["text_data"]["path"] == str(path)
    assert told["pieces"] == tokenizer.pieces <= told["vocab_size"]
    assert f"{tokenizer.pieces:,} of {told['vocab_size']:,} pieces" in capsys.readouterr().out
    assert len(tokenizer.encode(" dogs")) == 1


def test_a_sample_takes_equal_shares_and_what_short_parts_leave(tmp_path: Path) -> None:
    path = corpus(tmp_path / "texts", lines=60)
    (path / "3.jsonl").write_text('{"text": "q"}\n')
    split = ("split.held_out=0", "split.validation=0")
    words = on(path, *split, "text_tokenizer.sample_bytes=200")
    tokenizer, told = made(run_of(tmp_path / "run", *words))

    # What the short part leaves of its share is lost if this part comes last.
    assert told["bytes"] in (151, *range(195, 201))
    assert told["sample_bytes"] == 200
    for word in ("aaa", "bbb", "ccc"):
        assert len(tokenizer.encode(word)) == 1

    _, whole = made(run_of(tmp_path / "all", *on(path, *split, "text_tokenizer.sample_bytes=null")))
    assert whole["bytes"] == 60 * 3 * len("aaax dogs") + 1


def test_the_seed_draws_the_parts_of_a_small_sample(tmp_path: Path) -> None:
    path = corpus(tmp_path / "texts")
    split = ("split.held_out=0", "split.validation=0")
    settings = (*split, "text_tokenizer.sample_bytes=2", "text_tokenizer.min_frequency=1")

    # Two bytes are a sample of one of the three parts.
    files = set()
    for seed in range(4):
        made_twice = []
        for again in range(2):
            run = run_of(tmp_path / f"{seed}-{again}", *on(path, *settings, f"seed={seed}"))
            made(run)
            made_twice.append((run.folder / "text_tokenizer/tokenizer.json").read_bytes())
        assert made_twice[0] == made_twice[1]
        files.add(made_twice[0])
    assert len(files) <= 3


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"^text_data\.path: .* does not exist"),
        ("", r"^text_data: 1 parts hold no text to train on \(0 items skipped\)"),
        (
            '{"body": "a"}\n',
            r"^text_data: .*\(1 items skipped, for example a\.jsonl:1: the line has no text, "
            "but 'body'",
        ),
        ('{"text": "\\ud800"}\n', r"^text_data: .*a\.jsonl:1: the text is not UTF-8\)"),
        ('{"text": " "}\n', r"^text_data: .*a\.jsonl:1: the text is empty\)"),
    ],
)
def test_a_corpus_without_text_is_one_sentence(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)

    with pytest.raises(UserError, match=sentence):
        made(run_of(tmp_path / "run", *on(path)))
    if content is None:
        with pytest.raises(UserError, match=sentence):
            text_tokenizer_inputs(run_of(tmp_path / "run", *on(path)))


def test_inputs_tell_corpora_samples_and_seeds_apart_only_where_they_matter(tmp_path: Path) -> None:
    path = corpus(tmp_path / "texts")

    def inputs(*overrides: str) -> str:
        return json.dumps(text_tokenizer_inputs(run_of(tmp_path / "run", *overrides)))

    # Where captions are learned from, only the size of their sample counts.
    assert inputs() == inputs("seed=7") == inputs("split.held_out=0.3")
    assert inputs() != inputs("text_tokenizer.sample_bytes=1000")

    # With them, each of these changes what the tokenizer is trained on.
    changes = [
        (),
        ("seed=7",),
        ("split.held_out=0.3",),
        ("text_tokenizer.sample_bytes=9",),
        ("text_data.field=body",),
    ]
    found = {inputs(*on(path, *more)) for more in changes} | {inputs()}
    assert len(found) == len(changes) + 1

    before = inputs(*on(path))
    with (path / "0.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert inputs(*on(path)) != before


def test_a_run_takes_the_tokenizer_of_its_text_corpus_and_makes_it_again_when_that_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corpus(tmp_path / "texts")
    experiment = load_experiment("digits", on(path))
    run = tmp_path / "run"

    for said in ("[2/", "text_tokenizer: up to date"):
        run_experiment(experiment, run, until="text_tokenizer")
        assert said in capsys.readouterr().out

    captions = RunFolder(experiment, run, torch.device("cpu")).corpus.captions
    before = (run / "text_tokenizer/tokenizer.json").read_bytes()
    (path / "4.jsonl").write_text('{"text": "zebra zebra zebra"}\n' * 30)
    run_experiment(experiment, run, until="text_tokenizer")

    # The documents are up to date, the tokenizer is not.
    assert "up to date" in capsys.readouterr().out
    assert (run / "text_tokenizer/tokenizer.json").read_bytes() != before

    tokenizer = RunFolder(experiment, run, torch.device("cpu")).text_tokenizer
    assert len(tokenizer.encode("zebra")) == 1
    assert [tokenizer.decode(tokenizer.encode(caption)) for caption in captions[:5]] == captions[:5]


def test_captions_beyond_the_sample_are_left_out(tmp_path: Path) -> None:
    sizes = {}
    for limit in (100, 10**9):
        experiment = load_experiment("digits", [f"text_tokenizer.sample_bytes={limit}"])
        run_experiment(experiment, tmp_path / "run", until="text_tokenizer")
        sizes[limit] = json.loads((tmp_path / "run/text_tokenizer" / TRAINED_ON).read_text())

    run = RunFolder(experiment, tmp_path / "run", torch.device("cpu"))
    assert sizes[100]["bytes"] == 100 < sizes[10**9]["bytes"]
    assert sizes[10**9]["documents"] == len(run.corpus.rows("train"))
    assert sizes[100]["text_data"] is None


def test_short_texts_are_filled_up_to_one_length_and_come_back_without_it(tmp_path: Path) -> None:
    filled, plain = train(PROSE, fill_to=12), train(PROSE)
    texts = ["", "a red dog", PROSE[0]]
    for text, ids_T in zip(texts, filled.encode_all(texts), strict=True):
        own_T = plain.encode(text)
        assert len(ids_T) == max(12, len(own_T))
        assert np.array_equal(ids_T[: len(own_T)], own_T)
        assert np.array_equal(ids_T, filled.encode(text))
        # NUL, written as Ā, fills a short text up.
        assert set(filled.tokens(ids_T[len(own_T) :])) <= {"Ā"}
        assert filled.decode(ids_T) == text
    assert plain.decode(plain.encode("nul\0")) == "nul\0"

    filled.save(tmp_path)
    again = TextTokenizer.load(tmp_path, TextTokenizerConfig(vocab_size=700, fill_to=12))
    assert len(again.encode("a")) == 12
