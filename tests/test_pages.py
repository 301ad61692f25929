"""Tasks on pages of several texts and images, by hand, and items made of held-out pages."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import page_corpus, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoders import VOCAB as LARGER
from test_decoders import model

from cm3leon.decoders.generate import answers, generate, request_for
from cm3leon.evaluation.protocols.base import Answer, asked, given_image, true_answer
from cm3leon.registry import DECODERS, PROTOCOLS, TASKS, discover
from cm3leon.stages.tokens import split_in
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import (
    Document,
    Sample,
    TextSegment,
    TokenDocument,
    TokenSegment,
    UserError,
)

discover()

# By hand, the ids are: 0 <pad>, 1 <eos>, 2 <break>, 3 <end_of_span>, 4 to 19 text, 20 to 27 images,
# 28 <mask:0>, 29 <mask:1>.
VOCAB = Vocab(text_size=20, image_size=8, sentinels=8)
EOS, BREAK, END, MASK = 1, 2, 3, 28


def text(*ids: int) -> TokenSegment:
    return TokenSegment("text", np.array(ids, np.int64))


def image(*ids: int) -> TokenSegment:
    return TokenSegment("image", np.array(ids, np.int64))


FARM, COW = image(20, 22, 24, 26), image(21, 23, 25, 27)
PAGE = TokenDocument("page", (text(5, 6), FARM, text(7), COW, text(8, 9)))
CAT = TokenDocument("cat", (text(10), image(20, 20, 20, 20)))
CAT_IDS = [10, BREAK, 20, 20, 20, 20, BREAK]


def built(name: str, **fields: Any) -> Any:
    return TASKS.build({"name": name, **fields}, vocab=VOCAB, grid=(2, 2))


def ids(array: np.ndarray | None) -> list[int] | None:
    return None if array is None else array.tolist()


def segments(document: TokenDocument) -> list[tuple[str, list[int]]]:
    return [(segment.modality, segment.ids_T.tolist()) for segment in document.segments]


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("number", [2, None])
def test_an_image_of_a_page_is_asked_for_by_what_stands_before_it(number: int | None) -> None:
    """The images before it stay in both streams; in the second one a mask stands for each text."""
    prompt = built("page_image", number=number).prompt(PAGE, (CAT,))
    before = [5, 6, BREAK, *FARM.ids_T, BREAK, 7, BREAK]
    assert ids(prompt.ids_T) == [EOS, *CAT_IDS, *before]
    masked = [MASK, BREAK, *FARM.ids_T, BREAK, MASK + 1, BREAK]
    assert ids(prompt.unconditional_T) == [EOS, *CAT_IDS, *masked]
    assert (prompt.modality, prompt.length, prompt.ends) == ("image", 4, (EOS,))

    # Nothing but a text stands before the first image.
    first = built("page_image", number=1).prompt(PAGE)
    assert ids(first.ids_T) == [EOS, 5, 6, BREAK]
    assert ids(first.unconditional_T) == [EOS, MASK, BREAK]


def test_the_text_behind_an_image_is_asked_for_until_a_break_or_the_end() -> None:
    prompt = built("page_text", number=1, max_tokens=9).prompt(PAGE, (CAT,))

    assert ids(prompt.ids_T) == [EOS, *CAT_IDS, 5, 6, BREAK, *FARM.ids_T, BREAK]
    assert ids(prompt.unconditional_T) == [EOS, *CAT_IDS, 5, 6, BREAK, MASK, BREAK]
    assert (prompt.modality, prompt.length, prompt.ends) == ("text", 9, (EOS, BREAK))

    last = built("page_text").prompt(PAGE)
    assert ids(last.ids_T) == [EOS, 5, 6, BREAK, *FARM.ids_T, BREAK, 7, BREAK, *COW.ids_T, BREAK]
    assert ids(last.unconditional_T) == [EOS, 5, 6, BREAK, MASK, BREAK, 7, BREAK, MASK + 1, BREAK]


def test_a_page_of_a_text_and_an_image_is_asked_for_as_text_to_image() -> None:
    pair = TokenDocument("pair", (text(5, 6), FARM))
    one = built("page_image").prompt(pair, (CAT,))
    other = built("text_to_image").prompt(pair, (CAT,))
    assert ids(one.ids_T) == ids(other.ids_T)
    assert ids(one.unconditional_T) == ids(other.unconditional_T)


def test_a_page_without_texts_before_the_image_has_nothing_to_guide_by() -> None:
    page = TokenDocument("page", (FARM, COW))
    prompt = built("page_image").prompt(page)
    assert ids(prompt.ids_T) == [EOS, *FARM.ids_T, BREAK]
    assert prompt.unconditional_T is None
    assert ids(built("page_image", number=1).prompt(page).ids_T) == [EOS]


runs = st.lists(st.integers(4, 19), min_size=1, max_size=3).map(lambda run: text(*run))
images = st.lists(st.integers(20, 27), min_size=4, max_size=4).map(lambda codes: image(*codes))
pages = st.lists(st.one_of(runs, images), min_size=1, max_size=7).map(
    lambda found: TokenDocument("page", tuple(found))
)


@given(page=pages)
@settings(max_examples=80)
def test_prompts_and_true_answers_are_beginnings_of_the_page_as_it_is_trained(
    page: TokenDocument,
) -> None:
    trained = lay_out(Sample(page, (CAT,)), VOCAB).ids_T.tolist()
    indices = [k for k, segment in enumerate(page.segments) if segment.modality == "image"]

    for number, index in enumerate(indices, 1):
        for task, at in (("page_image", index), ("page_text", index + 1)):
            asking = built(task, number=number)
            # Behind an image there may be another one, or nothing; then no text is asked for.
            if at == len(page.segments) or page.segments[at].modality != asking.answers_in:
                continue

            answer_T = page.segments[at].ids_T
            prompt = asking.prompt(page, (CAT,))
            begun = [*prompt.ids_T.tolist(), *answer_T.tolist()]
            assert begun == trained[: len(begun)]
            assert trained[len(begun)] in (EOS, BREAK)

            completed = asking.complete(page, answer_T)
            assert segments(completed) == segments(page)
            assert asking.keeps_given(page, completed)


# ------------------------------------------------------------------------------------------ answers


def test_an_answer_takes_its_place_on_the_page() -> None:
    codes_T = np.array([27, 27, 20, 20])
    completed = built("page_image", number=1).complete(PAGE, codes_T)
    assert segments(completed) == [
        ("text", [5, 6]),
        ("image", [27, 27, 20, 20]),
        *segments(PAGE)[2:],
    ]

    words_T = np.array([11])
    completed = built("page_text", number=1).complete(PAGE, words_T)
    assert segments(completed) == [*segments(PAGE)[:2], ("text", [11]), *segments(PAGE)[3:]]

    # Where the page ends with its image, the text is added at the end.
    ending = TokenDocument("page", (text(5), FARM))
    completed = built("page_text").complete(ending, words_T)
    assert segments(completed) == [*segments(ending), ("text", [11])]


def test_what_stands_before_the_answer_must_be_kept() -> None:
    other = TokenDocument("page", (text(5), FARM, text(7), COW, text(8, 9)))
    assert not built("page_image").keeps_given(PAGE, other)
    assert not built("page_text", number=1).keeps_given(PAGE, other)
    assert built("page_image", number=1).keeps_given(other, other)


@pytest.mark.parametrize(
    ("page", "number", "sentence"),
    [
        (PAGE, 3, "document page has no image 3, which this task is about: it has 2"),
        (
            TokenDocument("words", (text(5),)),
            None,
            "document words has no image 1, which this task is about: it has 0",
        ),
    ],
)
def test_a_page_without_the_image_is_refused(
    page: TokenDocument, number: int | None, sentence: str
) -> None:
    for name in ("page_image", "page_text"):
        with pytest.raises(UserError, match=f"^{sentence}$"):
            built(name, number=number).prompt(page)


def test_more_masks_than_sentinels_are_a_sentence() -> None:
    crowded = TokenDocument("page", (*[text(5)] * 9, FARM))
    with pytest.raises(UserError, match="9 masked segments need a sentinel each"):
        built("page_image").prompt(crowded)


def test_answers_keep_to_their_grammar() -> None:
    """A random model gives all codes of an image, and text that ends at its break or its end."""

    def of(name: str, **fields: Any) -> Any:
        return TASKS.build({"name": name, **fields}, vocab=LARGER, grid=(2, 2))

    codes = [image(*LARGER.image_ids(np.array(each))) for each in ([0, 2, 4, 6], [1, 3, 5, 7])]
    page = TokenDocument("page", (text(5, 6), codes[0], text(7), codes[1]))
    prompts = [of("page_image").prompt(page), of("page_text", max_tokens=12).prompt(page)] * 12

    # Samples at full randomness, so that only the grammar keeps an answer in order.
    for fields in ({"name": "top_p", "cfg": 2.0, "top_p": 1.0}, {"name": "cd_k"}):
        decoder = DECODERS.build(fields)
        found = generate(model(), prompts, decoder, vocab=LARGER, seeds=range(len(prompts)))

        for prompt, answer_T in zip(prompts, found, strict=True):
            if prompt.modality == "image":
                assert len(answer_T) == 4
                assert LARGER.is_image(answer_T).all()
            else:
                assert len(answer_T) <= 12
                assert ((answer_T >= 4) & (answer_T < LARGER.text_size)).all()
        assert any(len(answer_T) < 12 for answer_T in found[1::2])


def test_text_ends_at_a_break_as_well_as_at_the_page_s_end() -> None:
    codes = image(*LARGER.image_ids(np.array([0, 2, 4, 6])))
    task = TASKS.build({"name": "page_text", "max_tokens": 40}, vocab=LARGER, grid=(2, 2))
    prompt = task.prompt(TokenDocument("page", (text(5), codes)))

    decoder = DECODERS.build({"name": "top_p", "cfg": 1.0, "top_p": 1.0, "temperature": 3.0})
    asked_for = request_for(prompt, decoder, vocab=LARGER, seeds=range(60), seq_len=64)
    (drawn,) = answers(model(), [asked_for], vocab=LARGER)

    endings = {tokens[-1] for tokens in drawn if len(tokens) < 40}
    assert endings == {LARGER.eos, LARGER.brk}
    for tokens in drawn:
        assert not {LARGER.eos, LARGER.brk} & set(tokens[:-1])


# ------------------------------------------------------------------------------------- the protocol


def pages_of(place: Path, pages: int, **fields: Any) -> Any:
    data = {"name": "jsonl", **page_corpus(place, pages)}
    return PROTOCOLS.build({"name": "pages", "data": data, **fields})


def shown(document: Document) -> list[str]:
    return [
        segment.text if isinstance(segment, TextSegment) else "image"
        for segment in document.segments
    ]


def test_each_image_and_each_text_behind_one_is_an_item(tmp_path: Path) -> None:
    of_images = pages_of(tmp_path, 2, asks="image", split="all").items()
    begun = ["page 0 begins", "image", "page 0 goes on", "image", "image"]

    assert [shown(item.document) for item in of_images[:3]] == [begun[:2], begun[:4], begun]
    assert [item.id for item in of_images[:4]] == [
        "pages.jsonl/0#1",
        "pages.jsonl/0#2",
        "pages.jsonl/0#3",
        "pages.jsonl/1#1",
    ]
    assert {item.task for item in of_images} == {"page_image"}

    # The second image is followed by the third one, so no text stands behind it.
    of_texts = pages_of(tmp_path, 2, asks="text", split="all").items()
    assert [(item.id[-3:], item.truth) for item in of_texts[:2]] == [
        ("0#1", "page 0 goes on"),
        ("0#3", "page 0 ends here"),
    ]
    assert shown(of_texts[1].document) == [*begun, "page 0 ends here"]

    assert asked(of_texts[1]).endswith(" | …")
    assert "ends" not in asked(of_texts[1])
    assert given_image(of_texts[1]) is not None
    assert true_answer(of_texts[1], "text").text == "page 0 ends here"

    # The items may be limited to one image a page, or to a count.
    second = pages_of(tmp_path, 2, asks="image", split="all", number=2).items()
    assert [item.id[-3:] for item in second] == ["0#2", "1#2"]
    assert len(pages_of(tmp_path, 2, asks="image", split="all", count=4).items()) == 4


def test_items_are_of_pages_that_the_run_does_not_train_on(tmp_path: Path) -> None:
    """They are split as a run in shards splits the corpus, and the three parts are all of it."""
    shares = {"validation": 0.2, "held_out": 0.3}
    run: Any = SimpleNamespace(experiment=SimpleNamespace(split=SimpleNamespace(**shares)))
    source = pages_of(tmp_path, 20, asks="image")._source()
    documents = {document.id: document for document in source.documents()}

    found: dict[str, set[str]] = {}
    for split in ("train", "validation", "held_out"):
        items = pages_of(tmp_path, 20, asks="text", split=split, **shares).items()
        found[split] = {item.id.rpartition("#")[0] for item in items}
        assert {split_in(run, documents[id_]) for id_ in found[split]} == {split}

    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 20


def test_figures_of_pages_tell_right_answers_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without Java, which takes seconds to start.
    monkeypatch.setattr(shutil, "which", lambda name: None)

    # Images: the right ones, then each in the place of another.
    of_images = pages_of(tmp_path, 3, asks="image", split="all")
    items = of_images.items_squared(32)
    right = [true_answer(item, "image") for item in items]
    assert of_images.score(items, right)["SSIM"].value == pytest.approx(1)
    assert of_images.score(items, [*right[1:], right[0]])["SSIM"].value < 0.5

    scored = [replace(answer, clip=0.25) for answer in right]
    assert of_images.score(items, scored)["CLIP score"].value == pytest.approx(0.25)

    # Texts: the right ones, then others. CIDEr of a right answer is not 1.
    of_texts = pages_of(tmp_path, 3, asks="text", split="all")
    items = of_texts.items()
    right = [true_answer(item, "text") for item in items]
    for name, figure in of_texts.score(items, right).items():
        if not name.startswith("CIDEr"):
            assert figure.value == pytest.approx(1, abs=1e-6), name
    wrong = of_texts.score(items, [Answer(text="nothing of it")] * len(items))
    assert all(figure.value < 0.3 for figure in wrong.values())


def test_a_corpus_without_what_is_asked_is_a_sentence(tmp_path: Path) -> None:
    write_lines(tmp_path / "texts.jsonl", [{"text": f"words {n}"} for n in range(4)])
    data = {"name": "jsonl", "path": str(tmp_path / "texts.jsonl")}
    asking = PROTOCOLS.build({"name": "pages", "data": data, "asks": "text", "split": "all"})
    with pytest.raises(UserError, match=r"none of 4 pages .* has a text behind an image"):
        asking.items()
