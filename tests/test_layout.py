"""Layouts of sequences: how other families separate documents, and open, size and close images.

Samples, prompts, masks and answers go by a layout's table of ids, and agree with each other
whatever the table says.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cm3leon.data.shards import shard_path, write_plan
from cm3leon.data.token_shards import Tokenizers, TokenShards, finish_tokens, write_token_shard
from cm3leon.decoders import grammar
from cm3leon.decoders.generate import Answerer, request_for
from cm3leon.models.llama import Llama
from cm3leon.objectives.cm3 import rotate
from cm3leon.objectives.packing import shorten
from cm3leon.registry import DECODERS, TASKS, discover
from cm3leon.tasks.base import without_conditions
from cm3leon.tasks.prompts import _cells, box_spans, code_spans, mask_codes, spans_prompt
from cm3leon.tokenizers.document import lay_out, sample_length, token_count
from cm3leon.tokenizers.layout import PAPER, SPECIALS, Layout, LayoutTable
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment, UserError

discover()

EOS, BREAK, CLOSE, BEGIN, NEXT, ROW, SIZE = 1, 2, 3, 4, 5, 6, 7
CHAMELEON = Layout(
    begin=BEGIN,
    between_segments=(),
    between_documents=(NEXT,),
    image_open=(BREAK,),
    image_close=(CLOSE,),
)
ROWS = Layout(
    begin=BEGIN,
    between_segments=(),
    between_documents=(NEXT,),
    image_open=(BREAK,),
    image_close=(CLOSE,),
    row_close=ROW,
    sizes={(2, 3): (SIZE, SIZE + 1), (3, 2): (SIZE + 1, SIZE), (3, 3): (SIZE + 1, SIZE + 1)},
)
TEXT = replace(
    ROWS,
    image_close=(SIZE + 1, CLOSE),
    sizes={(2, 3): (22, 29, 23, SIZE), (3, 2): (23, SIZE), (3, 3): (23, 29, SIZE)},
)
"""Sizes are written as text, in unequal numbers of pieces; an image is closed by two tokens."""
PARTED = replace(TEXT, last_row_closed=False)
"""The same, but rows are separated, so that nothing closes the last one."""
LAYOUTS = {"paper": PAPER, "chameleon": CHAMELEON, "rows": ROWS, "text": TEXT, "parted": PARTED}
GRID = (2, 3)
CODES = GRID[0] * GRID[1]


def vocab(layout: Layout) -> Vocab:
    return Vocab(text_size=30, image_size=16, sentinels=6, specials=9, layout=layout)


def text(*ids: int) -> TokenSegment:
    return TokenSegment("text", np.array(ids, np.int64))


def image(layout: Layout, codes: list[int], grid: tuple[int, int] = GRID) -> TokenSegment:
    ids_T = vocab(layout).image_ids(np.array(codes), grid)
    return TokenSegment("image", ids_T)


texts = st.lists(st.integers(9, 29), max_size=4).map(lambda ids: ("text", ids))
images = st.lists(st.integers(0, 15), min_size=CODES, max_size=CODES).map(
    lambda ids: ("image", ids)
)
documents = st.lists(texts | images, min_size=1, max_size=4)
samples = st.tuples(documents, st.lists(documents, max_size=3))


def made(layout: Layout, parts: list[tuple[str, list[int]]]) -> TokenDocument:
    """The document of texts and images, which are given by their codes."""
    segments = []
    for kind, ids in parts:
        segments.append(text(*ids) if kind == "text" else image(layout, ids))
    return TokenDocument("document", tuple(segments))


def sample_of(layout: Layout, drawn: Any) -> Sample:
    query, retrieved = drawn
    return Sample(made(layout, query), tuple(made(layout, parts) for parts in retrieved))


def written(name: str, parts: list[tuple[str, list[int]]]) -> list[int]:
    """Ids of a document, laid out by hand.

    A text 9 10 and an image of 2 x 3 codes a ... f, for example:

        paper        9 10 BREAK a b c d e f
        chameleon    9 10 BREAK a b c d e f CLOSE
        rows         9 10 BREAK size size a b c ROW d e f ROW CLOSE
    """
    start = vocab(LAYOUTS[name]).image_start
    size = [SIZE, SIZE + 1] if name == "rows" else [22, 29, 23, SIZE]
    close = [CLOSE] if name == "rows" else [SIZE + 1, CLOSE]
    last = [] if name == "parted" else [ROW]

    found: list[int] = []
    for number, (kind, ids) in enumerate(parts):
        if number > 0 and name == "paper":
            found.append(BREAK)
        codes = [start + code for code in ids]
        if kind == "text":
            found += ids
        elif name == "paper":
            found += codes
        elif name == "chameleon":
            found += [BREAK, *codes, CLOSE]
        else:
            found += [BREAK, *size, *codes[:3], ROW, *codes[3:], *last, *close]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
@given(drawn=samples)
@settings(max_examples=60)
def test_samples_are_laid_out_as_the_table_says(name: str, drawn: Any) -> None:
    layout = LAYOUTS[name]
    sample, (query, retrieved) = sample_of(layout, drawn), drawn
    between = BREAK if name == "paper" else NEXT
    expected = [layout.begin]
    for number, parts in enumerate([*retrieved, query]):
        expected += [between] * (number > 0) + written(name, parts)

    laid_out = lay_out(sample, vocab(layout))
    assert laid_out.ids_T.tolist() == [*expected, EOS]
    assert sample_length(sample, layout) == len(laid_out.ids_T)

    segments = list(itertools.chain(*(d.segments for d in (*sample.retrieved, sample.query))))
    for span, segment in zip(laid_out.segments, segments, strict=True):
        assert laid_out.ids_T[span.start : span.end].tolist() == segment.ids_T.tolist()
    for document in (*sample.retrieved, sample.query):
        assert token_count(document, layout) == sample_length(Sample(document), layout) - 2


@pytest.mark.parametrize("name", LAYOUTS)
@given(drawn=samples, length=st.integers(1, 150))
@settings(max_examples=80)
def test_a_shortened_sample_is_the_end_of_the_whole_one(name: str, drawn: Any, length: int) -> None:
    """An image that lacks its beginning has no ids that open it."""
    layout = LAYOUTS[name]
    sample = sample_of(layout, drawn)
    assume(sample_length(Sample(sample.query), layout) <= length)
    short, is_cut = shorten(sample, length, layout)
    full, ids_T = (lay_out(each, vocab(layout)).ids_T.tolist() for each in (sample, short))
    assert len(ids_T) == sample_length(short, layout) <= length
    assert ids_T[1:] == full[len(full) - len(ids_T) + 1 :]

    # Beyond what must go, whole pieces are lost at most: what opens an image, and what closes one
    # after codes that are gone.
    most = layout.around_image(GRID) + len(layout.between_documents) + len(layout.between_segments)
    assert len(full) <= length or len(ids_T) >= length - most

    # Documents go from the front, where none of them is cut.
    gone = len(sample.retrieved) - len(short.retrieved)
    assert is_cut or short.retrieved == sample.retrieved[gone:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_count_what_stands_beside_the_segments(name: str, tmp_path: Any) -> None:
    layout = LAYOUTS[name]
    codes = list(range(CODES))
    # Text and image, two images in a row, a joined text, and a document without segments.
    documents = [
        made(layout, [("text", [9, 10]), ("image", codes)]),
        made(layout, [("image", codes), ("image", codes), ("text", [])]),
        TokenDocument("joined", (text(9), TokenSegment("text", np.array([10]), "answer", True))),
        TokenDocument("empty", ()),
    ]
    if layout.sizes:
        documents[3] = TokenDocument("tall", (image(layout, codes, (3, 2)), text(9)))

    tokenizers = Tokenizers("text", "image", 30, 16, 6)
    write_plan(tmp_path, {"tokenizers": asdict(tokenizers)})
    write_token_shard(shard_path(tmp_path, 0, 1), documents, tokenizers)
    finish_tokens(tmp_path, 1, layout)

    read = TokenShards(tmp_path, tokenizers, layout)
    counts = [token_count(document, layout) for document in documents]
    assert read.token_counts(np.array([2, 0, 3, 1])).tolist() == [counts[n] for n in (2, 0, 3, 1)]
    assert read.longest == max(counts)


def asked(layout: Layout, name: str, **fields: Any) -> Any:
    return TASKS.build({"name": name, **fields}, vocab=vocab(layout), grid=GRID)


@pytest.mark.parametrize("name", LAYOUTS)
@given(caption=st.lists(st.integers(9, 29), max_size=4), drawn=st.lists(documents, max_size=2))
@settings(max_examples=40)
def test_prompt_and_answer_are_what_is_trained(name: str, caption: list[int], drawn: Any) -> None:
    layout = LAYOUTS[name]
    ids = vocab(layout)
    query = made(layout, [("text", caption), ("image", list(range(CODES)))])
    retrieved = tuple(made(layout, parts) for parts in drawn)
    laid_out = lay_out(Sample(query, retrieved), ids)
    words, codes = (span for span in laid_out.segments if span.is_query)
    answer = {
        span.modality: laid_out.ids_T[span.start : span.end].tolist() for span in (words, codes)
    }
    behind = [*layout.image_close, layout.end]

    # Prompt, image and what closes it are the sample. Ids that close rows are not asked for.
    for task in ("text_to_image", "page_image"):
        prompt = asked(layout, task).prompt(query, retrieved)
        assert [*prompt.ids_T, *answer["image"], *behind] == laid_out.ids_T.tolist()
        closing = [answer["image"][index] for index in prompt.closed]
        assert closing == [layout.row_close] * len(prompt.closed)
        closed = 2 if layout.last_row_closed else 1
        assert len(prompt.closed) == (closed if layout.row_close else 0)
        completed = asked(layout, task).complete(query, np.array(answer["image"]))
        assert completed.segments[1].ids_T.tolist() == answer["image"]

    # The second stream is a sample whose caption is rotated, up to the end of its image.
    rotated_T, _ = rotate(laid_out.ids_T, [(words.start, words.end)], ids)
    second_T = asked(layout, "text_to_image").prompt(query, retrieved).unconditional_T.tolist()
    if layout.sizes:  # the size of a masked image is not said, that of the asked one is
        size = layout.sizes[GRID]
        assert tuple(second_T[-len(size) :]) == size
    second_and_image = [*second_T, *answer["image"]]
    assert second_and_image == rotated_T[: len(second_and_image)].tolist()

    # By another convention it has neither a caption nor documents.
    alone = asked(
        layout, "text_to_image", unconditional_text="none", unconditional_documents="drop"
    )
    without = lay_out(Sample(TokenDocument("", query.segments[1:])), ids).ids_T.tolist()
    assert [*alone.prompt(query, retrieved).unconditional_T, *answer["image"], *behind] == without

    # An image that is masked keeps what says its size, as in training.
    masked = without_conditions(query, "text", ids)
    hidden_T, _ = rotate(laid_out.ids_T, [(codes.start, codes.end)], ids)
    trained = hidden_T[: len(laid_out.ids_T) - len(answer["image"]) + 1]
    assert lay_out(Sample(masked, retrieved), ids).ids_T.tolist() == trained.tolist()

    captioned = asked(layout, "caption").prompt(query, retrieved)
    assert [*captioned.ids_T, *answer["text"], ids.end_of_span] == rotated_T.tolist()

    for half in ("top", "bottom"):
        task = asked(layout, "infill", half=half)
        start, end = task.span
        prompt, part = task.prompt(query, retrieved), answer["image"][start:end]
        rotated_T, _ = rotate(laid_out.ids_T, [(codes.start + start, codes.start + end)], ids)
        assert [*prompt.ids_T, *part, ids.end_of_span] == rotated_T.tolist()
        drawn_codes = range(3) if half == "top" else range(3, 6)
        assert ids.image_codes(np.array(part)).tolist() == list(drawn_codes)
        is_closed = layout.row_close is not None and (layout.last_row_closed or half == "top")
        assert [part[index] for index in prompt.closed] == [layout.row_close] * is_closed


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_box_takes_codes_and_leaves_what_closes_their_rows(name: str) -> None:
    """Boxes in pixels, of an image of 6 x 6 whose codes are 0 1 2 / 3 4 5 / 6 7 8."""
    layout, grid = LAYOUTS[name], (3, 3)
    ids = vocab(layout)
    document = TokenDocument("", (text(9), image(layout, list(range(9)), grid)))
    for box, rows in (((0, 2, 6, 6), [[3, 4, 5, 6, 7, 8]]), ((2, 0, 4, 4), [[1], [4]])):
        spans = box_spans(box, segment=1, grid=(3, 3), width=6, height=6, layout=layout)
        found = [document.segments[1].ids_T[span.start : span.end] for span in spans]
        assert [ids.image_codes(each).tolist() for each in found] == rows

        ends = [layout.row_ends(3, span.start, span.end) for span in spans]
        for each, closed in zip(found, ends, strict=True):
            assert [int(id_) for id_ in each[list(closed)]] == [layout.row_close] * len(closed)
            assert sum(each == ROW) == len(closed)
        assert len(spans_prompt(document, spans, (), ids))


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(6, 30), st.integers(6, 30)),
    data=st.data(),
)
@settings(max_examples=80)
def test_a_box_asks_for_what_a_mask_of_its_pixels_does(grid: Any, size: Any, data: Any) -> None:
    """In images and grids of any shape. A mask of everything asks for every code."""
    height, width = size
    assert mask_codes(np.ones(size, bool), grid).all()

    # Any box of the pixels that the grid covers.
    across, down = _cells(width, height, grid)
    left, right = sorted(data.draw(st.tuples(*[st.integers(*across.seen)] * 2)))
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(*down.seen)] * 2)))
    assume(left < right and top < bottom)

    mask_HW = np.zeros(size, bool)
    mask_HW[top:bottom, left:right] = True
    box: Any = (left, top, right, bottom)
    of_box = box_spans(box, segment=1, grid=grid, width=width, height=height, layout=ROWS)
    assert of_box == code_spans(mask_codes(mask_HW, grid), segment=1, layout=ROWS)


@given(
    sizes=st.sets(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1),
    codes=st.integers(1, 81),
)
def test_the_sizes_within_a_number_of_codes_are_the_largest(sizes: Any, codes: int) -> None:
    found = Layout(sizes=dict.fromkeys(sizes, ())).sizes_within(codes)
    fitting = [grid for grid in sizes if grid[0] * grid[1] <= codes]

    def inside(small: Any, large: Any) -> bool:
        return small != large and small[0] <= large[0] and small[1] <= large[1]

    largest = []
    for grid in fitting:
        if not any(inside(grid, other) for other in fitting):
            largest.append(grid)
    assert sorted(found) == sorted(largest)


def decoder(ids: Vocab) -> Llama:
    """A small model with weights large enough for clear choices."""
    config = Llama.Config(layers=2, width=32, head_size=16, mlp_width=48, seq_len=64)
    model = Llama(config, vocab_size=ids.size)
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_engine_draws_codes_and_closes_their_rows(name: str, window: int) -> None:
    """A plain loop over the model gives the same: the likeliest code, or the end of a row."""
    ids = vocab(LAYOUTS[name])
    model, query = decoder(ids), made(ids.layout, [("text", [9, 12, 20]), ("image", [0] * CODES)])
    prompt = asked(ids.layout, "text_to_image").prompt(query)
    greedy = DECODERS.build("greedy")
    request = request_for(prompt, greedy, vocab=ids, seeds=[0], seq_len=model.seq_len)
    ((tokens,),) = Answerer(model, ids, window=window).answers([request])
    answer_T = np.array(tokens)

    # The plain loop, which reads the whole sequence for each token.
    expected = prompt.ids_T.tolist()
    low, high = ids.id_range("image")
    with torch.inference_mode():
        for index in range(prompt.length):
            if index in prompt.closed:
                expected.append(ROW)
            else:
                logits_V = model(torch.tensor([expected]))[0, -1, low:high]
                expected.append(low + int(logits_V.argmax()))
    assert answer_T.tolist() == expected[len(prompt.ids_T) :]
    assert len(ids.image_codes(answer_T)) == CODES


def followed(ids: Vocab, drawn: list[int], **fields: Any) -> list[int]:
    """Tokens that a grammar takes, where `drawn` are the choices wherever it leaves one."""
    rules = grammar.interleaved(ids, grid=GRID, text_length=2, **fields)
    choices, taken = iter(drawn), []
    try:
        allowed = next(rules)
        while True:
            token = allowed.forced if allowed.forced is not None else next(choices)
            assert allowed.low <= token < allowed.high
            assert token not in allowed.closed
            taken.append(token)
            allowed = rules.send(token)
    except StopIteration:
        return taken


@pytest.mark.parametrize("name", LAYOUTS)
def test_interleaved_answers_are_samples_as_they_are_trained(name: str) -> None:
    layout = LAYOUTS[name]
    ids = vocab(layout)
    codes = list(range(CODES))
    page = made(layout, [("text", [10, 11]), ("image", codes), ("text", [12])])
    trained = lay_out(Sample(page), ids).ids_T.tolist()

    start = ids.image_start
    between = [BREAK] if name == "paper" else []
    drawn = [10, 11, *(start + code for code in codes), *between, 12, EOS]
    taken = followed(ids, drawn, first="text", segments=4)
    assert [layout.begin, *taken] == trained
    assert list(grammar.segments_of(taken, ids)) == [
        (segment.modality, segment.ids_T.tolist()) for segment in page.segments
    ]

    # An image alone: the prompt ends with what opens it, and it is the last segment asked for.
    illustrated = made(layout, [("text", [10]), ("image", codes)])
    opened = asked(layout, "page_image").prompt(illustrated)
    taken = followed(ids, [start + code for code in codes], first="image", segments=1)
    whole = lay_out(Sample(illustrated), ids).ids_T.tolist()
    assert [*opened.ids_T, *taken] == whole


def test_images_that_are_not_square_go_to_ids_and_back() -> None:
    ids = vocab(ROWS)
    for grid in ((2, 3), (3, 2)):
        ids_T = ids.image_ids(np.arange(6), grid)
        assert ROWS.grid_of(ids_T) == grid
        assert ids.image_codes(ids_T).tolist() == list(range(6))

    two_BT = ids.image_ids(np.arange(12).reshape(2, 6), (3, 2))
    assert ids.image_codes(two_BT).tolist() == np.arange(12).reshape(2, 6).tolist()

    odd = TokenDocument("", (image(ROWS, [0, 1, 2, 3], (2, 2)),))
    with pytest.raises(ValueError, match="images of 2 x 2 codes have no ids of their size"):
        lay_out(Sample(odd), ids)


def test_sizes_of_one_row_that_nothing_closes_are_refused() -> None:
    table = {
        "specials": [*SPECIALS, "<row>"],
        "row_close": "<row>",
        "last_row_closed": False,
        "pieces": {"1": 9, "2": 10},
        "sizes": {"2x1": ["2", "1"]},
    }
    found = LayoutTable.from_names(table, "layout.json").layout
    assert found.sizes == {(2, 1): (10, 9)}
    assert found.row_close == 4

    for changed, sentence in (
        ({"sizes": {"1x2": ["1", "2"]}}, "images of one row"),
        ({"last_row_closed": "no"}, "last_row_closed is 'no'; it must be true or false"),
        ({"pieces": {}}, "sizes names '2', which is not among its specials"),
        ({"pieces": ["1"]}, "pieces must be an object of ids"),
    ):
        with pytest.raises(UserError, match=sentence):
            LayoutTable.from_names({**table, **changed}, "layout.json")
