"""Tasks: prompts written out by hand, and answers put where they belong in the document.

A prompt and its right answer have the form of the samples that the objective trains on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import unrotate

from cm3leon.objectives.cm3 import rotate
from cm3leon.registry import TASKS, discover
from cm3leon.tasks.base import infilling_prompt, with_segment
from cm3leon.tasks.prompts import AskedSpan, unconditional_spans_prompt
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Prompt, Sample, TokenDocument, TokenSegment, UserError

discover()

# Ids by hand: 0 <pad>, 1 <eos>, 2 <break>, 3 <end_of_span>, text 4 to 19, images 20 to 27,
# <mask:0> 28, <mask:1> 29.
VOCAB = Vocab(text_size=20, image_size=8, sentinels=4)
EOS, BREAK, END, MASK = 1, 2, 3, 28


def document(text: list[int] | None, image: list[int] | None, id_: str = "x") -> TokenDocument:
    """A document of a text, an image, or both, by their ids."""
    segments: list[TokenSegment] = []
    if text is not None:
        segments.append(TokenSegment("text", np.array(text, dtype=np.int64)))
    if image is not None:
        segments.append(TokenSegment("image", np.array(image, dtype=np.int64)))
    return TokenDocument(id_, tuple(segments))


QUERY = document([5, 6, 7], [20, 22, 24, 26])
CAT = document([8, 9], [21, 21, 23, 23], "cat")
DOG = document([10], [27, 25, 27, 25], "dog")
CAT_DOG = [8, 9, BREAK, 21, 21, 23, 23, BREAK, 10, BREAK, 27, 25, 27, 25, BREAK]
"""Two retrieved documents as they lie between the opening `<eos>` and the query."""


def built(name: str, **fields: Any) -> Any:
    return TASKS.build({"name": name, **fields}, vocab=VOCAB, grid=(2, 2))


def ids(array: np.ndarray | None) -> list[int] | None:
    return None if array is None else array.tolist()


def shown(prompt: Prompt) -> tuple[Any, ...]:
    """What is in a prompt, in a form that can be compared with lists."""
    return (
        ids(prompt.ids_T),
        prompt.modality,
        prompt.length,
        prompt.end,
        ids(prompt.unconditional_T),
    )


def segments(document: TokenDocument) -> list[tuple[str, list[int]]]:
    return [(segment.modality, segment.ids_T.tolist()) for segment in document.segments]


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(("retrieved", "between"), [((), []), ((CAT, DOG), CAT_DOG)])
def test_text_to_image_prompt(retrieved: tuple[TokenDocument, ...], between: list[int]) -> None:
    """`<eos> [documents] caption <break>`; the second stream has `<mask:0>` for the caption."""
    expected = [EOS, *between, 5, 6, 7, BREAK], "image", 4, EOS, [EOS, *between, MASK, BREAK]
    assert shown(built("text_to_image").prompt(QUERY, retrieved)) == expected
    assert shown(built("text_to_image").prompt(document([5, 6, 7], None), retrieved)) == expected


def test_text_to_image_may_hide_the_documents_from_the_second_stream() -> None:
    prompt = built("text_to_image", unconditional_documents="drop").prompt(QUERY, (CAT, DOG))
    assert shown(prompt) == ([EOS, *CAT_DOG, 5, 6, 7, BREAK], "image", 4, EOS, [EOS, MASK, BREAK])


@pytest.mark.parametrize(("retrieved", "between"), [((), []), ((CAT, DOG), CAT_DOG)])
def test_caption_prompt(retrieved: tuple[TokenDocument, ...], between: list[int]) -> None:
    """`<eos> [documents] <mask:0> <break> codes <eos> <mask:0>`, whatever the true caption is."""
    expected = [EOS, *between, MASK, BREAK, 20, 22, 24, 26, EOS, MASK], "text", 9, END, None
    for text in ([5, 6, 7], [], [4] * 12, None):
        query = document(text, [20, 22, 24, 26])
        assert shown(built("caption", max_tokens=9).prompt(query, retrieved)) == expected


@pytest.mark.parametrize(("retrieved", "between"), [((), []), ((CAT, DOG), CAT_DOG)])
@pytest.mark.parametrize(
    ("name", "image"),
    [("infill_top", [MASK, 24, 26]), ("infill_bottom", [20, 22, MASK]), ("infill", [20, 22, MASK])],
)
def test_infill_prompt(
    retrieved: tuple[TokenDocument, ...], between: list[int], name: str, image: list[int]
) -> None:
    """The half keeps `<mask:0>` in both streams; the second one has `<mask:1>` for the caption."""
    given_T = [EOS, *between, 5, 6, 7, BREAK, *image, EOS, MASK]
    unconditional_T = [EOS, *between, MASK + 1, BREAK, *image, EOS, MASK]
    expected = given_T, "image", 2, END, unconditional_T
    assert shown(built(name).prompt(QUERY, retrieved)) == expected


def test_an_empty_caption_guides_by_nothing() -> None:
    """Beside an empty caption a mask would say more, not less."""
    prompt = built("infill").prompt(document([], [20, 22, 24, 26]))
    assert shown(prompt) == ([EOS, BREAK, 20, 22, MASK, EOS, MASK], "image", 2, END, None)


def test_spans_are_asked_for_beside_a_mask_of_the_other_modality() -> None:
    """Two rows of codes under the caption's mask, and two words beside the image's, by hand."""

    def second_T(*spans: AskedSpan, query: TokenDocument = QUERY) -> list[int] | None:
        return ids(unconditional_spans_prompt(query, spans, (CAT,), VOCAB))

    cat = [8, 9, BREAK, 21, 21, 23, 23, BREAK]
    of_codes = [EOS, *cat, MASK + 2, BREAK, MASK, 22, MASK + 1, 26, EOS, MASK]
    assert second_T(AskedSpan(1, 0, 1), AskedSpan(1, 2, 3)) == of_codes

    of_words = [EOS, *cat, MASK, 6, MASK + 1, BREAK, MASK + 2, EOS, MASK]
    assert second_T(AskedSpan(0, 0, 1), AskedSpan(0, 2, 3)) == of_words

    # Spans of both modalities leave nothing to mask, and an empty caption is none.
    assert second_T(AskedSpan(0, 0, 1), AskedSpan(1, 2, 3)) is None
    assert second_T(AskedSpan(1, 0, 1), query=document([], [20, 22, 24, 26])) is None

    four = [AskedSpan(1, code, code + 1) for code in range(4)]
    with pytest.raises(UserError, match="4 spans and 1 masked segments need a sentinel each"):
        second_T(*four)


def test_infilling_any_span() -> None:
    prompt = infilling_prompt(Sample(QUERY, (CAT,)), "text", (1, 3), VOCAB, length=6)
    given_T = [EOS, 8, 9, BREAK, 21, 21, 23, 23, BREAK, 5, MASK, BREAK, 20, 22, 24, 26, EOS, MASK]
    assert shown(prompt) == (given_T, "text", 6, END, None)


# ------------------------------------------------------------------------------------ training form

codes = st.integers(20, 27)
pieces = st.integers(4, 19)
documents = st.builds(
    document, st.lists(pieces, max_size=6), st.lists(codes, min_size=4, max_size=4)
)


def whole(prompt: Prompt, answer: list[int], end: list[int]) -> list[int]:
    return [*prompt.ids_T.tolist(), *answer, *end]


@given(query=documents, retrieved=st.lists(documents, max_size=3))
@settings(max_examples=60)
def test_prompt_and_answer_make_the_form_that_is_trained(
    query: TokenDocument, retrieved: list[TokenDocument]
) -> None:
    """Prompt and right answer are the laid-out sample, rotated by the span that was asked for."""
    laid_out = lay_out(Sample(query, tuple(retrieved)), VOCAB)
    text, image = (segment for segment in laid_out.segments if segment.is_query)
    answers = {modality: query.segment(modality).ids_T.tolist() for modality in ("text", "image")}

    caption = built("caption").prompt(query, retrieved)
    rotated_T, _ = rotate(laid_out.ids_T, [(text.start, text.end)], VOCAB)
    assert whole(caption, answers["text"], [END]) == rotated_T.tolist()

    for half, span in (("top", (0, 2)), ("bottom", (2, 4))):
        infill = built("infill", half=half).prompt(query, retrieved)
        begin, end = span
        rotated_T, _ = rotate(laid_out.ids_T, [(image.start + begin, image.start + end)], VOCAB)
        completed = whole(infill, answers["image"][begin:end], [END])
        assert completed == rotated_T.tolist()
        assert unrotate(np.array(completed), VOCAB).tolist() == laid_out.ids_T.tolist()

    image_prompt = built("text_to_image").prompt(query, retrieved)
    assert whole(image_prompt, answers["image"], [EOS]) == laid_out.ids_T.tolist()

    # The second stream is the beginning of a sample whose caption is rotated, up to its image.
    rotated_T, _ = rotate(laid_out.ids_T, [(text.start, text.end)], VOCAB)
    unconditional_T = image_prompt.unconditional_T.tolist()
    assert [*unconditional_T, *answers["image"]] == rotated_T[: len(unconditional_T) + 4].tolist()


# ------------------------------------------------------------------------------------------ answers


def test_an_answer_takes_its_place() -> None:
    caption, image = ("text", [5, 6, 7]), ("image", [20, 22, 24, 26])

    answer_T = np.array([11, 12])
    completed = built("caption").complete(QUERY, answer_T)
    assert segments(completed) == [("text", [11, 12]), image]

    # Another image takes the place of the one that is there, or comes behind the text.
    image_T = np.array([27, 27, 20, 20])
    completed = built("text_to_image").complete(QUERY, image_T)
    assert segments(completed) == [caption, ("image", [27, 27, 20, 20])]
    no_image = document([5, 6, 7], None)
    completed = built("text_to_image").complete(no_image, image_T)
    assert segments(completed) == [caption, ("image", [27, 27, 20, 20])]

    half_T = np.array([21, 23])
    completed = built("infill_top").complete(QUERY, half_T)
    assert segments(completed) == [caption, ("image", [21, 23, 24, 26])]
    completed = built("infill_bottom").complete(QUERY, half_T)
    assert segments(completed) == [caption, ("image", [20, 22, 21, 23])]

    # The query itself stays as it is.
    assert segments(QUERY) == [caption, image]


def test_a_caption_for_an_image_that_has_none_comes_first() -> None:
    """Its place is where the prompt has `<mask:0>`, and where documents have their text."""
    completed = built("caption").complete(document(None, [20, 22, 24, 26]), np.array([11, 12]))
    assert segments(completed) == [("text", [11, 12]), ("image", [20, 22, 24, 26])]


@pytest.mark.parametrize("name", TASKS.names())
def test_the_right_answer_gives_the_document_back(name: str) -> None:
    task = built(name)
    query = QUERY
    if name == "page_text":
        query = replace(QUERY, segments=QUERY.segments[::-1])
    answer_T = query.segment(task.answers_in).ids_T
    if hasattr(task, "span"):
        answer_T = answer_T[slice(*task.span)]

    completed = task.complete(query, answer_T)
    assert segments(completed) == segments(query)
    assert completed.id == query.id
    assert task.keeps_given(query, completed)


@pytest.mark.parametrize(
    ("name", "given_part", "other_part"),
    [
        ("caption", document([5, 6, 7], [20, 22, 24, 27]), document([9], [20, 22, 24, 26])),
        (
            "text_to_image",
            document([5, 6], [20, 22, 24, 26]),
            document([5, 6, 7], [20, 20, 20, 20]),
        ),
        (
            "infill_top",
            document([5, 6, 7], [20, 22, 25, 26]),
            document([5, 6, 7], [27, 27, 24, 26]),
        ),
        ("infill_top", document([5, 6], [20, 22, 24, 26]), document([5, 6, 7], [20, 27, 24, 26])),
        (
            "infill_bottom",
            document([5, 6, 7], [21, 22, 24, 26]),
            document([5, 6, 7], [20, 22, 27, 27]),
        ),
    ],
)
def test_what_was_given_must_be_kept(
    name: str, given_part: TokenDocument, other_part: TokenDocument
) -> None:
    task = built(name)
    assert not task.keeps_given(QUERY, given_part)
    assert task.keeps_given(QUERY, other_part)


def test_only_the_first_segment_of_a_modality_is_replaced() -> None:
    two = TokenDocument("x", (*QUERY.segments, TokenSegment("text", np.array([19]))))
    assert segments(with_segment(two, "text", np.array([4]))) == [
        ("text", [4]),
        ("image", [20, 22, 24, 26]),
        ("text", [19]),
    ]


@pytest.mark.parametrize(
    ("name", "query", "lacks"),
    [
        ("text_to_image", document(None, [20, 22, 24, 26]), "text"),
        ("caption", document([5], None), "image"),
        ("infill_top", document([5], None), "image"),
        ("infill_top", document(None, [20, 22, 24, 26]), "text"),
    ],
)
def test_a_document_that_lacks_what_the_task_gives_is_refused(
    name: str, query: TokenDocument, lacks: str
) -> None:
    with pytest.raises(UserError, match=f"^document x has no {lacks}, which this task needs$"):
        built(name).prompt(query)


def test_what_tasks_say_of_themselves() -> None:
    facts = {}
    for name in TASKS.names():
        task = built(name)
        facts[name] = (task.retrieves_by, task.answers_in, task.guided)
    expected = {
        "text_to_image": ("text", "image", True),
        "caption": ("image", "text", False),
        "infill": ("text", "image", True),
        "infill_top": ("text", "image", True),
        "infill_bottom": ("text", "image", True),
    }
    assert facts.items() >= expected.items()

    for name in TASKS.names():
        assert (built(name).prompt(QUERY).unconditional_T is not None) == built(name).guided
