"""Captions that no block holds are known when the corpus is read, or when the text tokenizer is there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import encoded, picture
from hypothesis import given
from hypothesis import strategies as st

from cm3leon.data.corpus import Corpus
from cm3leon.objectives.packing import PackingConfig
from cm3leon.run import main
from cm3leon.stages.lengths import check_lengths, check_lengths_by_words
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig, fewest_pieces
from cm3leon.types import UserError

TOKENIZER = TextTokenizer.train(TextTokenizerConfig(vocab_size=300), ["a dog and a cat"] * 9)


def run_of(captions: list[str], *, room: int, method: str = "whole") -> Any:
    """As much of a run as is looked at; `room` tokens are left for a caption beside an image of 4 codes."""
    ids = [str(number) for number in range(len(captions))]
    corpus = Corpus(ids, captions, np.zeros((len(ids), 2, 2, 3), np.uint8), [], [])
    return SimpleNamespace(
        corpus=corpus,
        seq_len=room + 4 + 1 + 2,
        image_tokenizer_shape=SimpleNamespace(grid=2),
        experiment=SimpleNamespace(
            shards=None,
            packing=PackingConfig(method=method),  # type: ignore[arg-type]
            text_tokenizer=SimpleNamespace(max_word=64),
        ),
    )


@given(st.text(max_size=60), st.integers(1, 20))
def test_no_tokenizer_takes_fewer_pieces_than_there_are_words(text: str, longest: int) -> None:
    tokenizer = TextTokenizer.train(
        TextTokenizerConfig(vocab_size=400, max_word=longest), [text * 3, "a dog"]
    )
    assert fewest_pieces(text, longest) <= len(tokenizer.encode(text))


def test_a_caption_of_just_the_room_is_kept() -> None:
    check_lengths_by_words(run_of(["a dog and a cat"], room=5), ["0"], ["a dog and a cat"])
    with pytest.raises(UserError) as refusal:
        check_lengths_by_words(run_of([], room=4), ["7"], ["a dog and a cat"])
    assert str(refusal.value) == (
        "data: the caption of 7 takes at least 5 tokens; with the 4 of the image, a block of "
        "model.seq_len=11 holds 4; raise model.seq_len, set packing.method=stream, or leave long "
        "captions out with data.max_caption_bytes=14"
    )


def test_the_tokenizer_knows_exactly() -> None:
    captions = ["a dog", "xyzxyzxyz", "a cat and a dog"]
    longest = max(len(TOKENIZER.encode(caption)) for caption in captions)
    check_lengths(run_of(captions, room=longest), TOKENIZER)
    with pytest.raises(UserError, match=f"the caption of 1 takes {longest} tokens; "):
        check_lengths(run_of(captions, room=longest - 1), TOKENIZER)
    with pytest.raises(UserError, match=r"max_caption_bytes=8$"):
        check_lengths(run_of(captions, room=longest - 1), TOKENIZER)
    with pytest.raises(UserError, match="3 captions are too long"):
        check_lengths(run_of(captions, room=1), TOKENIZER)
    check_lengths(run_of(captions, room=1, method="stream"), TOKENIZER)


def test_one_long_caption_ends_the_stage_of_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded(picture(number)))
        (tmp_path / f"{number:02d}.txt").write_text("many words " * (250 if number == 7 else 1))
    words = ["experiment=folder", f"data.path={tmp_path}", f"run={tmp_path}/run", "until=documents"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "data: the caption of 07.png takes at least 500 tokens; with the 64 of the image" in said
    assert main([*words, "data.max_caption_bytes=2748"]) == 0
    assert "the caption is longer than 2748 bytes" in (
        (tmp_path / "run" / "documents" / "skipped.jsonl").read_text()
    )
