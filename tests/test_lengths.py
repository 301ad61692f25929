"""Captions that are too long for any block are reported once they can be counted, and left out."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import encoded, picture

from cm3leon.data.corpus import Corpus
from cm3leon.objectives.packing import PackingConfig
from cm3leon.run import main
from cm3leon.stages.lengths import check_lengths
from cm3leon.stages.opening import open_run
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError

TOKENIZER = TextTokenizer.train(TextTokenizerConfig(vocab_size=300), ["a dog and a cat"] * 9)


def run_of(captions: list[str], *, room: int, method: str = "whole") -> Any:
    """As much of a run as is looked at, with `room` tokens for a caption.

    Beside the caption a block holds an image of 4 codes, the <break> between them, and two <eos>.
    """
    ids = [str(number) for number in range(len(captions))]
    images_BHWC = np.zeros((len(ids), 2, 2, 3), np.uint8)
    return SimpleNamespace(
        corpus=Corpus(ids, captions, images_BHWC, [], ["train"] * len(ids)),
        seq_len=room + 4 + 1 + 2,
        grid=(2, 2),
        vocab=Vocab(TOKENIZER.vocab_size, 16),
        experiment=SimpleNamespace(
            packing=PackingConfig(method=method),  # type: ignore[arg-type]
            text_tokenizer=SimpleNamespace(max_word=64),
        ),
    )


def test_a_caption_of_just_the_room_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["a dog", "xyzxyzxyz", "a cat and a dog"]
    longest = max(len(TOKENIZER.encode(caption)) for caption in captions)
    check_lengths(run_of(captions, room=longest), TOKENIZER)
    check_lengths(run_of(captions, room=1, method="stream"), TOKENIZER)
    assert capsys.readouterr().out == ""


def test_captions_that_are_too_long_are_counted_and_the_longest_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    captions = ["a dog", "xyzxyzxyz", "a cat and a dog"]
    lengths = [len(TOKENIZER.encode(caption)) for caption in captions]
    longest = max(lengths)
    assert lengths[1] == longest
    room = longest - 1
    check_lengths(run_of(captions, room=room), TOKENIZER)
    assert capsys.readouterr().out.strip() == (
        "documents are left out: one caption is too long for a block, of 3 documents read; the "
        f"longest, that of 1, has {longest} tokens; beside the 4 of the image a block of "
        f"model.seq_len={room + 7} has room for {room}; raise model.seq_len, set "
        "packing.method=stream, or leave long captions out with data.max_caption_bytes=8"
    )


def test_a_corpus_of_long_captions_alone_is_refused() -> None:
    with pytest.raises(UserError, match="no document is left to train on: 3 captions are too long"):
        check_lengths(run_of(["a dog", "xyzxyzxyz", "a cat and a dog"], room=1), TOKENIZER)


def test_long_documents_are_neither_trained_on_nor_asked_for(tmp_path: Path) -> None:
    """Documents of odd numbers have captions that no block holds.

    They are in the sample that tokenizers are trained on, but their tokens are not kept, and no
    evaluation asks for them.
    """
    for number in range(60):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded(picture(number)))
        (tmp_path / f"{number:02d}.txt").write_text(f"words {number} " * (250 if number % 2 else 1))
    words = ["experiment=digits_smoke", f'data={{"name": "folder", "path": "{tmp_path}"}}']
    words += [f"run={tmp_path}/run", "split.validation=0.2", "split.held_out=0.2"]
    assert main([*words, "augment.versions=0", "until=tokens"]) == 0

    run = open_run(tmp_path / "run")
    even = [document.id for document in run.tokens]
    assert even
    assert all(int(id_[:2]) % 2 == 0 for id_ in even)

    # Of the held-out documents, those that fit.
    asked = run.rows_to_ask("held_out")
    assert 0 < len(asked) < len(run.corpus.rows("held_out"))
    assert all(int(run.corpus.ids[row][:2]) % 2 == 0 for row in asked)

    listed = (tmp_path / "run" / "tokens" / "skipped" / "00000.jsonl").read_text()
    assert "tokens, packing.method whole allows" in listed


def test_where_no_document_fits_the_reason_of_the_first_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first").mkdir()
    for number in range(30):
        (tmp_path / "first" / f"{number}.png").write_bytes(encoded(picture(number)))
        (tmp_path / "first" / f"{number}.txt").write_text("a dog")
    words = ["experiment=digits_smoke", f'data={{"name": "folder", "path": "{tmp_path}/first"}}']
    words += [f"run={tmp_path}/run", "split.validation=0.2", "split.held_out=0.2"]
    words += ["augment.versions=0", "model.seq_len=18", "until=tokens"]
    assert main(words) == 2

    said = capsys.readouterr().err
    assert "no document to train on" in said
    first = r"the first: \d+\.png: takes \d+ tokens, packing.method whole allows 16\)"
    assert re.search(first, said)
