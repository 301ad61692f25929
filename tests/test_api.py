"""A finished run asked from Python and by the command.

What is given stays, what is asked for comes, and every mistake is one sentence.
"""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import page_corpus
from PIL import Image
from processes import Forked
from safetensors.torch import load_file, save_file

from cm3leon import CM3Leon
from cm3leon.api import NO_MORE, NO_ROOM, ShortageWarning, TruncatedWarning, ranking
from cm3leon.decoders.request import Request
from cm3leon.evaluate import Evaluation, Row
from cm3leon.evaluation.config import AskConfig
from cm3leon.io import sha256
from cm3leon.locks import locked
from cm3leon.registry import DECODERS, PROTOCOLS, discover
from cm3leon.run import main
from cm3leon.types import TokenDocument, TokenSegment, UserError

discover()


@pytest.fixture
def model(tuned_model: CM3Leon) -> CM3Leon:
    return tuned_model


def picture(number: int = 0) -> Image.Image:
    """Random pixels of 32 by 32, different ones for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_images_are_ranked_and_depend_on_their_seeds_alone(model: CM3Leon) -> None:
    drawn = model.generate("a handwritten seven", n=4, retrieve=2)
    assert [p.score for p in drawn] == sorted((p.score for p in drawn), reverse=True)
    assert sorted(p.seed for p in drawn) == [0, 1, 2, 3]
    assert all(p.image.size == (32, 32) and p.codes_N.shape == (16,) for p in drawn)
    assert len({p.codes_N.tobytes() for p in drawn}) == 4
    assert 1 <= len(drawn[0].documents) <= 2
    assert drawn[0].documents[0].text

    (alone,) = model.generate("a handwritten seven", seed=2, retrieve=2)
    assert np.array_equal(alone.codes_N, next(p.codes_N for p in drawn if p.seed == 2))

    # The score is the similarity of the text and the image by the run's own CLIP.
    encoder = model.run.retriever.encoder
    image_1D = encoder.encode_images(np.asarray(alone.image)[None])
    expected = image_1D @ encoder.encode_texts(["a handwritten seven"])[0]
    assert alone.score == pytest.approx(float(expected[0]), abs=1e-6)


def test_weights_are_kept_as_is_said(model: CM3Leon) -> None:
    run = model.run.folder
    for weights, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        loaded = CM3Leon.load(run, precision="bf16", weights=weights)
        assert loaded.run.model.blocks[0].up.weight.dtype == dtype
        assert loaded.run.model.embedding.weight.dtype == torch.float32

    small = CM3Leon.load(run, precision="bf16", weights="int8").run.model.blocks[0].up.weight
    assert type(small) is not torch.nn.Parameter
    assert CM3Leon.load(run, precision="bf16").run.model.head.weight.dtype == torch.bfloat16


def test_several_prompts_and_decoders(model: CM3Leon) -> None:
    both = model.generate(["a seven", "a two"], n=2, decoder="mixture", seed=5)
    assert [len(pictures) for pictures in both] == [2, 2]

    # The decoder `mixture` has its parts draw in turn, by the seeds.
    of_top_p = model.generate("a seven", n=1, decoder={"name": "top_p"}, seed=5)[0]
    of_cd_k = model.generate("a seven", n=1, decoder="cd_k", seed=6)[0]
    found = {p.seed: p.codes_N.tolist() for p in both[0]}
    assert found == {5: of_top_p.codes_N.tolist(), 6: of_cd_k.codes_N.tolist()}


@pytest.mark.parametrize("decoder", [None, {"name": "top_p", "cfg": 2}])
def test_documents_that_are_decoded_alike_are_drawn_in_one_operation(
    decoder: Any, model: CM3Leon, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests_seen: list[Request] = []
    answer = model._answers

    def seen(requests: Sequence[Request]) -> list[list[list[int]]]:
        requests_seen.extend(requests)
        return answer(requests)

    monkeypatch.setattr(model, "_answers", seen)
    model.ask(
        "text_to_image",
        [document(model)] * 3,
        [[]] * 3,
        samples=range(2),
        seeds=[0, 1, 2],
        decoder=decoder,
    )

    # Requests that share a decoder object are drawn together.
    assert len(requests_seen) == 3
    decoders = [each["image"] for request in requests_seen for each in request.decoders]
    assert len({id(decoder) for decoder in decoders}) == 1


def test_images_are_scored_with_a_text_of_their_own(
    model: CM3Leon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are scored two at a time, which must not change their scores."""
    texts, codes_BN = ["a seven", "a two", "a seven"], model.run.codes_MN[:3]
    alone = [model.clip_scores(text, codes_BN[row : row + 1])[0] for row, text in enumerate(texts)]

    monkeypatch.setattr(ranking, "SCORED_AT_ONCE", 2)
    assert model.clip_scores(texts, codes_BN) == pytest.approx(np.array(alone), abs=1e-6)
    assert len({round(float(each), 6) for each in alone}) == 3

    with pytest.raises(UserError, match="text has 2 items, and codes_BN 3"):
        model.clip_scores(texts[:2], codes_BN)


def test_captions_and_their_likelihoods(model: CM3Leon) -> None:
    text = model.caption(picture(), retrieve=1, max_tokens=5)
    assert isinstance(text, str)

    searched = model.caption(picture(), decoder={"name": "beam", "beams": 3}, max_tokens=4)
    texts = ["a seven", "two", searched]
    scores = model.score(texts=texts, image=picture())
    assert all(score < 0 for score in scores)

    one_by_one = [model.score(texts=[each], image=picture())[0] for each in texts]
    assert scores == pytest.approx(one_by_one, rel=1e-4)
    assert len(model.score(images=[picture(0), picture(1)], text="a seven")) == 2


@pytest.mark.parametrize("ends", [True, False])
def test_texts_that_do_not_end_are_told(
    model: CM3Leon, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """The model ends its texts after two of three pieces, or never."""
    vocab = model.run.vocab
    piece = model.run.text_tokenizer.encode("a")[-1]
    closed: dict[str, int] = {}

    def answers(requests: Sequence[Request]) -> list[list[list[int]]]:
        drawn = [piece] * 3
        if ends:
            drawn = [piece, piece, closed["by"]]
        return [[drawn for _ in request.seeds] for request in requests]

    monkeypatch.setattr(model, "_answers", answers)
    calls = {
        "caption": partial(model.caption, picture(), max_tokens=3),
        "answer": partial(model.answer, picture(), "What is it?", max_tokens=3),
        "infill": partial(model.infill, picture(), "a seven", words=(0, 1), max_tokens=3),
        "interleave": partial(model.interleave, ["a seven", picture()], segments=1, max_tokens=3),
    }

    # An interleaved text ends a document, the others end a span; the warning names this file.
    for name, call in calls.items():
        closed["by"] = vocab.eos if name == "interleave" else vocab.end_of_span
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        cuts = [each for each in caught if issubclass(each.category, TruncatedWarning)]
        assert len(cuts) == (0 if ends else 1), name
        assert all("cut at 3 pieces" in str(each.message) for each in cuts)
        assert all(each.filename == __file__ for each in cuts), "it names the caller's line"

    # Asked for as data, the samples themselves say so, without a warning.
    closed["by"] = vocab.end_of_span
    asked = {"task": "instruction", "documents": [question(model)], "retrieved": [[]]}
    ((one, two),) = model.ask(**asked, samples=range(2), seeds=[0], max_tokens=3)  # type: ignore[arg-type]
    assert (one.truncated, two.truncated) == (not ends, not ends)


def test_answers_to_a_question_are_scored_as_they_are_asked_for(model: CM3Leon) -> None:
    texts, question = ["yes", "a seven"], "What is it?"
    scores = model.score(texts=texts, image=picture(), question=question)
    one_by_one = [
        model.score(texts=[text], image=picture(), question=question)[0] for text in texts
    ]
    assert scores == pytest.approx(one_by_one, rel=1e-4)
    of_another = model.score(texts=texts, image=picture(), question="Where is it?")
    assert scores != pytest.approx(of_another, rel=1e-4)

    with pytest.raises(UserError, match="a question is asked about an image"):
        model.score(images=[picture()], text="a seven", question=question)


def test_an_infilled_box_leaves_the_other_codes(model: CM3Leon) -> None:
    tokenizer = model.run.image_tokenizer
    before_N = tokenizer.encode(np.asarray(picture())[None])[0]
    filled = model.infill(picture(), "a seven", box=(8, 8, 24, 17))
    assert filled.text == "a seven"

    # A code covers 8 by 8 pixels: 8 to 24 are the columns 1 and 2, 8 to 17 the rows 1 and 2.
    inside = np.zeros((4, 4), bool)
    inside[1:3, 1:3] = True
    assert np.array_equal(filled.codes_N[~inside.ravel()], before_N[~inside.ravel()])
    assert not np.array_equal(filled.codes_N, before_N)
    assert np.array_equal(np.asarray(filled.image), tokenizer.decode(filled.codes_N[None])[0])


def test_a_mask_of_a_box_is_the_box_and_any_mask_leaves_what_it_does_not_touch(
    model: CM3Leon,
) -> None:
    mask_HW = np.zeros((32, 32), bool)
    mask_HW[9:20, 3:12] = True
    boxed = model.infill(picture(), "a seven", box=(3, 9, 12, 20), seed=4)
    masked = model.infill(picture(), "a seven", mask=mask_HW, seed=4)
    assert np.array_equal(boxed.codes_N, masked.codes_N)

    # One pixel of a code is enough to draw it anew; each of the samples has its own seed.
    mask_HW = np.zeros((32, 32), bool)
    mask_HW[[0, 31, 12], [0, 31, 17]] = True
    pixels_HWC = np.asarray(picture())
    given_N = model.run.image_tokenizer.encode(pixels_HWC[None])[0]
    drawn: Any = {
        "mask": mask_HW,
        "decoder": {"name": "top_p", "temperature": 50, "top_p": 1, "cfg": 1},
    }

    several = model.infills(picture(), "a seven", n=3, seed=7, **drawn)
    for number, filled in enumerate(several):
        changed = np.flatnonzero(filled.codes_N != given_N)
        assert set(changed) <= {0, 1 * 4 + 2, 15}
        alone = model.infill(picture(), "a seven", seed=7 + number, **drawn)
        assert np.array_equal(filled.codes_N, alone.codes_N)
    assert len({filled.codes_N.tobytes() for filled in several}) > 1


def test_infilled_words_leave_the_others_and_the_image(model: CM3Leon) -> None:
    before_N = model.run.image_tokenizer.encode(np.asarray(picture())[None])[0]
    filled = model.infill(picture(), "a big seven", words=(2, 5), max_tokens=3)
    assert filled.text.startswith("a ")
    assert filled.text.endswith(" seven")
    assert np.array_equal(filled.codes_N, before_N)
    both = model.infill(picture(), "a big seven", words=(2, 5), box=(0, 0, 32, 8), max_tokens=3)
    assert both.text.endswith(" seven")
    assert np.array_equal(both.codes_N[4:], before_N[4:])


def test_infilling_is_guided_by_the_text_and_words_by_the_image(model: CM3Leon) -> None:
    """A weight of 0 takes the unconditional stream alone, which lacks what guides the answer."""

    def boxed(text: str, cfg: float) -> list[int]:
        drawn = {"name": "top_p", "cfg": cfg}
        return model.infill(picture(), text, box=(0, 8, 32, 32), decoder=drawn).codes_N.tolist()

    # Images are guided by the text.
    assert boxed("a seven", 0) == boxed("two dogs", 0)
    assert boxed("a seven", 1) != boxed("two dogs", 1)
    assert boxed("a seven", 3) != boxed("a seven", 1)

    def worded(number: int, cfg: float) -> str:
        drawn = {"name": "top_p", "cfg": cfg}
        image = picture(number)
        return model.infill(image, "a big seven", words=(2, 5), decoder=drawn, max_tokens=6).text

    # Words are guided by the image.
    assert worded(0, 0) == worded(1, 0)
    assert worded(0, 1) != worded(1, 1)
    assert worded(0, 3) != worded(0, 1)


def test_pages_are_gone_on_with_by_images_and_texts(model: CM3Leon) -> None:
    parts = ["a farm", picture(0), "its cow"]
    drawn = model.page_image(parts, n=3, retrieve=1)
    assert [one.score for one in drawn] == sorted((one.score for one in drawn), reverse=True)
    assert sorted(one.seed for one in drawn) == [0, 1, 2]
    assert all(one.codes_N.shape == (16,) and one.image.size == (32, 32) for one in drawn)

    # A page of one text is what text to image draws, retrieved documents included.
    (one,) = model.page_image(["a seven"], retrieve=2)
    (other,) = model.generate("a seven", retrieve=2)
    assert np.array_equal(one.codes_N, other.codes_N)
    assert [document.id for document in one.documents] == [d.id for d in other.documents]

    # The texts guide and the image before them stays context: at a weight of 0 it alone counts.
    def drawn_by(cfg: float, *parts: Any) -> list[int]:
        return model.page_image(parts, decoder={"name": "top_p", "cfg": cfg})[0].codes_N.tolist()

    assert drawn_by(0, "a farm", picture(0), "its cow") == drawn_by(0, "x", picture(0), "a two")
    assert drawn_by(0, "a farm", picture(0), "cow") != drawn_by(0, "a farm", picture(1), "cow")
    assert drawn_by(1, "a farm", picture(0), "cow") != drawn_by(1, "x", picture(0), "a two")

    text = model.page_text(["a farm", picture(0)], retrieve=1, max_tokens=5)
    assert isinstance(text, str)

    # Texts are guided by the images, so at a weight of 0 another image changes nothing.
    alone = {"name": "top_p", "cfg": 0}
    of_one = model.page_text(["a farm", picture(0)], decoder=alone, max_tokens=5)
    of_another = model.page_text(["a farm", picture(1)], decoder=alone, max_tokens=5)
    assert of_one == of_another

    with pytest.raises(UserError, match="parts must end in an image"):
        model.page_text([picture(0), "a farm"])


def test_a_page_that_is_too_long_loses_its_beginning(model: CM3Leon) -> None:
    """As many of its last segments stay as fit, and the answer is the one to those alone."""
    parts: list[Any] = []
    for number in range(20):
        parts += [f"a {number}", picture(number)]
    greedy = {"decoder": "greedy"}

    def fits(begun: list[Any], answer: int) -> bool:
        # A token in front, a segment's tokens and one that ends it, and the answer's own.
        tokens = 1 + answer
        for part in begun:
            tokens += 1 + (
                len(model.run.text_tokenizer.encode(part)) if isinstance(part, str) else 16
            )
        return tokens <= model.run.seq_len

    images, texts = [*parts, "the last"], parts
    while not fits(images, 16):
        images = images[1:]
    while not fits(texts, 8):
        texts = texts[1:]
    assert 1 < len(images) < len(parts)

    (long,) = model.page_image([*parts, "the last"], **greedy)  # type: ignore[arg-type]
    (short,) = model.page_image(images, **greedy)  # type: ignore[arg-type]
    assert np.array_equal(long.codes_N, short.codes_N)
    said = [model.page_text(each, max_tokens=8, **greedy) for each in (parts, texts)]  # type: ignore[arg-type]
    assert said[0] == said[1]

    with pytest.raises(UserError, match="do not fit the model's"):
        model.page_image(["word " * 500])


def test_a_study_asks_pages(
    model: CM3Leon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has its figures, a ceiling, a chance level, and pages to look at."""
    monkeypatch.setattr(shutil, "which", lambda name: None)  # Java takes seconds to start
    data = {"name": "jsonl", **page_corpus(tmp_path / "pages", 3)}
    row = Row("row", "model", model.run.folder, AskConfig(documents=1), {})
    for asks, figure in (("image", "SSIM"), ("text", "ROUGE-L (words (no Java for PTB))")):
        section = {"name": "pages", "data": data, "asks": asks, "split": "all", "count": 4}

        asking = Evaluation(PROTOCOLS.check(section, "protocol"), tmp_path / asks)
        asking._opened = ((row.folder, None, None), model)
        asking.answer(row, [0])
        measured = asking.measure(row)
        assert measured["items"] == len(asking.answers(row)) == 4

        answered, ceiling, chance = (
            measured[kind][figure]["value"] for kind in ("metrics", "ceiling", "chance")
        )
        # This run's tokenizer returns images as noise, but texts as they are.
        if asks == "text":
            assert ceiling == pytest.approx(1)
            assert max(answered, chance) < 0.9

        shown = asking.shown(row)
        assert len(shown) == 4
        assert shown[0].text.startswith("page 0 begins")
        assert (shown[0].given_HWC is None) == (asks == "image")


def test_edits_and_what_goes_on_in_turn(model: CM3Leon) -> None:
    edited = model.edit(picture(), "make it red", n=3)
    assert len(edited) == 3
    assert edited[0].score >= edited[-1].score
    of_another = model.edit(picture(1), "make it red", n=3)
    assert any(
        not np.array_equal(a.codes_N, b.codes_N) for a, b in zip(edited, of_another, strict=True)
    )

    parts = model.interleave(["a seven", picture()], first="text", segments=3, max_tokens=4)
    assert len(parts) <= 3
    assert all(isinstance(part, (str, Image.Image)) for part in parts)
    assert model.interleave(["a seven"], first="image", segments=5, max_tokens=10_000)

    # A length that cannot fit the positions is refused before anything is drawn.
    with pytest.raises(UserError, match="do not fit the model's 256 positions"):
        model.interleave(["a seven"], first="image", segments=40)
    (image,) = model.interleave(["a seven"], first="image", segments=1)
    assert isinstance(image, Image.Image)


def test_mistakes_are_said(model: CM3Leon, tmp_path: Path) -> None:
    sentence = r"is not the folder of a run with a finished pretraining: .*config.yaml is missing"
    with pytest.raises(UserError, match=sentence):
        CM3Leon.load(tmp_path)

    sentence = r"box is \(8, 8, 40, 16\); it must be .* inside an image of 32 x 32 pixels"
    with pytest.raises(UserError, match=sentence):
        model.infill(picture(), "a", box=(8, 8, 40, 16))
    with pytest.raises(UserError, match="box, mask and words are missing"):
        model.infill(picture(), "a")
    sentence = r"words is \(5, 9\); it must be \(start, end\), a part of the text of 1 characters"
    with pytest.raises(UserError, match=sentence):
        model.infill(picture(), "a", words=(5, 9))

    with pytest.raises(UserError, match="give texts and the image that they are for"):
        model.score(texts=["a"])
    with pytest.raises(UserError, match="topp, which is not a known decoder; did you mean top_p"):
        model.generate("a", decoder="topp")


# --------------------------------------------------------------------------------------- arguments


def document(model: CM3Leon) -> TokenDocument:
    """A text, and an image that is asked for."""
    text_T = model.run.text_tokenizer.encode("a seven")
    empty_T = np.empty(0, np.int64)
    return TokenDocument("asked", (TokenSegment("text", text_T), TokenSegment("image", empty_T)))


def question(model: CM3Leon) -> TokenDocument:
    """A question, and an answer that is asked for."""
    encode = model.run.text_tokenizer.encode
    answer = TokenSegment("text", encode(" a"), "answer", joined=True)
    return TokenDocument("asked", (TokenSegment("text", encode("What?")), answer))


def own_documents(model: CM3Leon) -> Path:
    """A file with one document of the user's own, beside the run."""
    folder = model.run.folder.parent / "own"
    folder.mkdir(exist_ok=True)
    picture().save(folder / "own.png")
    file = folder / "own.jsonl"
    file.write_text('{"image": "own.png", "text": "one of my own"}\n')
    return file


def good_calls(model: CM3Leon) -> dict[str, dict[str, Any]]:
    """A call of every public method, with all of its arguments."""
    image, drawn = picture(), {"decoder": "greedy", "seed": 0}
    codes_BN = np.zeros((1, 16), np.int64)

    return {
        "generate": {
            "prompt": ["a seven"],
            "n": 1,
            "retrieve": 0,
            "documents": [0],
            "size": None,
            **drawn,
        },
        "documents_for": {"prompt": "a seven", "count": 1},
        "with_documents": {"path": own_documents(model)},
        "too_long": {"texts": ["a seven"], "size": (32, 32)},
        "caption": {
            "image": image,
            "retrieve": 1,
            "max_tokens": 3,
            "question": None,
            **drawn,
        },
        "infill": {
            "image": image,
            "text": "a seven",
            "box": (0, 0, 8, 8),
            "mask": None,
            "words": (0, 1),
            "max_tokens": 3,
            **drawn,
        },
        "infills": {
            "image": image,
            "text": "a seven",
            "n": 2,
            "box": None,
            "mask": np.eye(32, dtype=bool),
            "words": (0, 1),
            "max_tokens": 3,
            **drawn,
        },
        "edit": {"image": image, "instruction": "make it red", "n": 1, **drawn},
        "answer": {"image": image, "question": "What is it?", "max_tokens": 3, **drawn},
        "interleave": {
            "parts": ["a seven", image],
            "first": "text",
            "segments": 1,
            "max_tokens": 3,
            "text_decoder": "greedy",
            **drawn,
        },
        "page_image": {"parts": ["a seven", image, "a two"], "n": 1, "retrieve": 1, **drawn},
        "page_text": {"parts": ["a seven", image], "retrieve": 1, "max_tokens": 3, **drawn},
        "search": {"text": None, "image": image, "count": 2},
        "score": {
            "texts": ["a"],
            "images": None,
            "image": image,
            "text": None,
            "question": "What is it?",
        },
        "ask": {
            "task": "text_to_image",
            "documents": [document(model)],
            "retrieved": [[]],
            "samples": range(1),
            "seeds": [0],
            "decoder": "greedy",
            "max_tokens": 3,
        },
        "fitting": {
            "task": "text_to_image",
            "documents": [document(model)],
            "retrieved": [[]],
            "max_tokens": 3,
        },
        "used_documents": {"rows": [0]},
        "rank": {
            "documents": [question(model)],
            "retrieved": [[]],
            "options": [[np.array([5, 6])]],
        },
        "retrieved": {"texts": ["a"], "images_BHWC": None, "by": "text", "count": 1},
        "clip_scores": {"text": "a seven", "codes_BN": codes_BN, "size": (32, 32)},
    }


NUMBERS = [-1, 2.5, True, "3", None, float("nan"), np.float32(2), [1], np.array([1, 2])]
TEXTS = [7, None, b"a", ["a", 3], "half a pair \ud83d", picture()]
IMAGES = [7, "no such file.png", b"GIF", None, np.zeros((4, 4)), ["a.png"], Image.new("F", (4, 4))]
LISTS = [7, "a text", {"a": 1}, [object()], [None], object()]
DECODERS_ASKED = [
    7,
    "topp",
    {},
    {"name": 3},
    {"name": "top_p", "topp": 1},
    {"name": "top_p", "temperature": "hot"},
    {"name": "top_p", "temperature": 0},
    {"name": "beam", "beams": 0},
    {"name": "top_p", 3: 1},
]
BAD: dict[str, list[Any]] = {
    "prompt": [*TEXTS, "", " ", [""], ["a", None], {"a": 1}],
    "instruction": [*TEXTS, "", " "],
    "path": [7, None, "", " ", b"own.jsonl", "no such file.jsonl", Path("no such folder")],
    "question": [*[text for text in TEXTS if text is not None], ""],
    "text": [text for text in TEXTS if text is not None],
    "n": [*NUMBERS, 0, 10**9],
    "retrieve": NUMBERS,
    "count": NUMBERS,
    "max_tokens": [*NUMBERS, 0],
    "segments": [*NUMBERS, 0, 1000],
    "seed": NUMBERS,
    "seeds": [*LISTS, [-1], [1.5], [0, 1], []],
    "decoder": DECODERS_ASKED,
    "text_decoder": DECODERS_ASKED,
    "image": IMAGES,
    "images": [7, [picture()], ["no such file.png"], "a.png"],
    "parts": [*LISTS, [7], [Path("no such file.png")], [np.zeros((4, 4))], ["\ud83d"]],
    "box": [7, "0008", (0, 0, 8), (0.0, 0.0, 8.0, 8.0), (0, 0, 0, 8), (8, 0, 0, 8), (-1, 0, 8, 8),
            (0, 0, 33, 8), (0, 0, 8, float("nan")), (True, 0, 8, 8), [None] * 4],
    "size": [7, "32", (32,), (32, 64), (0, 0), (-32, -32), (32.5, 32), (True, 32), (10**30, 32)],
    "mask": [7, "a", [[True]], np.eye(32), np.ones((3, 3), bool), np.zeros((32, 32), bool)],
    "words": [7, "01", (0,), (1, 1), (3, 1), (-3, -1), (0, 99), (0.0, 1.0), ("a", "b"), (None, 1)],
    "first": [7, "video", None, "", "Text"],
    "by": [7, "video", None, "image"],
    "texts": [*LISTS, ["\ud83d"]],
    "task": [7, None, "drawing", ""],
    "documents": [*LISTS, [-1], ["a"], [1.5], [10**9]],
    "retrieved": [*LISTS, [[10**9]], [[-1]], [["a"]], [[], []], [[1.5]]],
    "rows": [*LISTS, [-1], ["a"], [1.5], [10**9]],
    "samples": [7, [0], None, range(-1, 1), range(0, 4, 2), "range(1)"],
    "options": [*LISTS, [["a"]], [[7]], [], [[], []], [[np.array([1.5])]], [[np.array([10**9])]]],
    "images_BHWC": [7, "a", picture()],
    "codes_BN": [7, "a", None, np.zeros(16, np.int64), np.zeros((1, 5), np.int64),
                 np.full((1, 16), -1), np.full((1, 16), 10**6), np.zeros((1, 16))],
}  # fmt: skip


def test_every_public_method_is_called_below(model: CM3Leon) -> None:
    calls = good_calls(model)
    methods = set()
    for cls in CM3Leon.__mro__[:-1]:
        for name, value in vars(cls).items():
            if callable(value) and not name.startswith("_"):
                methods.add(name)
    assert methods == set(calls)

    for name, call in calls.items():
        assert set(call) == set(inspect.signature(getattr(CM3Leon, name)).parameters) - {"self"}
        assert set(call) <= set(BAD)
        getattr(model, name)(**call)


@pytest.mark.parametrize("argument", BAD)
def test_bad_arguments_are_a_users_mistake_in_one_sentence(model: CM3Leon, argument: str) -> None:
    """Each bad value, in each method with that argument, is a UserError and nothing else."""
    for name, call in good_calls(model).items():
        if argument not in call:
            continue
        for value in BAD[argument]:
            ask = partial(getattr(model, name), **{**call, argument: value})
            with pytest.raises(UserError) as caught:
                # Reached only if the value was accepted; then the assertion fails and says so.
                assert ask() is NotImplemented, f"{name}({argument}={value!r}) is taken"
            assert len(str(caught.value)) < 1000


def test_something_is_asked(model: CM3Leon) -> None:
    with pytest.raises(UserError, match="documents"):
        model.ask(**{**good_calls(model)["ask"], "documents": [], "retrieved": []})


def test_numbers_of_numpy_and_huge_seeds_are_taken(model: CM3Leon) -> None:
    (drawn,) = model.generate("a seven", n=np.int64(1), retrieve=np.uint8(1), seed=np.int32(3))  # type: ignore[arg-type]
    (same,) = model.generate(("a seven",), n=1, retrieve=1, seed=3)[0]
    assert np.array_equal(drawn.codes_N, same.codes_N)

    far = model.generate("a seven", n=2, seed=2**64 - 1)
    assert sorted(each.seed for each in far) == [2**64 - 1, 2**64]

    nanoseconds = 1_764_363_600_000_000_000
    caption = model.caption(picture(), seed=nanoseconds, max_tokens=np.int16(2))  # type: ignore[arg-type]
    assert caption is not None
    box = np.array([0, 0, 8, 8])
    filled = model.infill(picture(), "a", box=box)  # type: ignore[arg-type]
    assert np.array_equal(filled.codes_N, model.infill(picture(), "a", box=(0, 0, 8, 8)).codes_N)

    assert model.generate([], retrieve=2) == []
    assert len(model.generate(iter(["a", "b"]))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weights": "int4"}, 'weights is "int4"; it must be one of float32, bf16, int8, fp8'),
        ({"weights": "x"}, 'weights is "x"; it must be'),
        ({"precision": "x"}, 'precision is "x"; it must be one of auto, bf16, float32'),
        ({"precision": None}, "precision is null; it must be"),
        ({"execution": "x"}, 'execution is "x"; it must be one of eager, compiled, graph'),
        ({"way": "x"}, 'execution is "x"; it must be one of eager'),
        ({"execution": "fast"}, 'execution is "fast"; it must be one of eager, compiled'),
        ({"window": 0}, "window is 0; it must be"),
        ({"window": 2.5}, r"window is 2.5; it must be"),
        ({"device": "gpu"}, "device is gpu, which cannot be used here"),
        ({"device": "meta"}, "device is meta, which cannot be used here"),
        ({"device": "banana"}, "device is banana, which cannot be used here"),
        ({"device": 7}, "device is 7; it must be"),
        ({"device": "cuda:99"}, "device is cuda:99, which cannot be used here"),
        ({"ranks": "x"}, "ranks is of type str; it must be Ranks"),
        ({"bank": 7}, "bank is 7; it must be"),
        ({"bank": "nowhere"}, "bank: .*; a memory bank is a run made with until=index"),
        ({"checkpoint": 0}, "checkpoint is 0; it must be"),
        ({"checkpoint": 99999}, r"checkpoint is 99999, which .* does not have"),
        ({"checkpoint": 10**30}, r"checkpoint is 10+, which .* does not have"),
        ({"plugins": "nowhere.py"}, "nowhere.py"),
        ({"checkpoint": -1}, "checkpoint is -1; it must be"),
        ({"checkpoint": "last"}, 'checkpoint is "last"; it must be'),
        ({"run": None}, "run is null; it must be"),
        ({"run": 7}, "run is 7; it must be"),
    ],
)
def test_choices_of_loading_are_checked_as_on_the_command_line(
    model: CM3Leon, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        CM3Leon.load(**{"run": model.run.folder, **fields})


# ----------------------------------------------------------------------------------- every decoder


@pytest.mark.parametrize("name", [name for name in DECODERS.names() if name != "example"])
def test_every_decoder_answers_every_question_within_its_grammar(model: CM3Leon, name: str) -> None:
    """Images have all their codes, what was not to be changed stays, and texts are texts."""
    before_N = model.run.image_tokenizer.encode(np.asarray(picture())[None])[0]
    images = model.generate(["a seven"], n=3, retrieve=1, decoder=name)[0]
    edited = model.edit(picture(), "make it red", n=3, decoder=name)
    for drawn in (*images, *edited):
        assert drawn.codes_N.shape == (16,)

    # Each box with the codes that it touches, of four in a row.
    for box, inside in (((8, 8, 24, 17), [5, 6, 9, 10]), ((0, 0, 32, 16), range(8))):
        filled = model.infill(
            picture(), "a big seven", box=box, words=(2, 5), decoder=name, max_tokens=4
        )
        assert np.array_equal(np.delete(filled.codes_N, inside), np.delete(before_N, inside))
        assert filled.codes_N.shape == (16,)
        assert filled.text.startswith("a ")
        assert filled.text.endswith(" seven")

    # Texts and images alternate, whichever comes first and whatever decodes the texts.
    for other in (name, "greedy", "beam"):
        for first in ("text", "image"):
            found = model.interleave(
                ["a"],
                first=first,
                segments=4,
                max_tokens=5,
                decoder=name,
                text_decoder=other,  # type: ignore[arg-type]
            )
            kinds = [isinstance(part, str) for part in found]
            assert all(a != b for a, b in pairwise(kinds))

    assert isinstance(model.caption(picture(), decoder=name, max_tokens=5, retrieve=1), str)
    assert isinstance(model.answer(picture(), "What is it?", decoder=name, max_tokens=5), str)


# ------------------------------------------------------------------------------------- the command


def listed(folder: Path) -> list[dict[str, object]]:
    """The lines of a folder's manifest."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_the_best_images_are_kept_where_there_is_a_clip_to_choose_by(
    model: CM3Leon,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CM3Leon, "has_clip", False)
    words = [
        "generate",
        f"run={model.run.folder}",
        "prompt=a seven",
        "n=2",
        f"out={tmp_path / 'o'}",
    ]

    assert main([*words, "keep=1"]) == 2
    assert "keep is 1 of n = 2 images, but the run has no CLIP that" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))

    assert main([*words, "keep=2"]) == 0
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_the_command_writes_images_and_goes_on(
    model: CM3Leon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = model.run.folder, tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a seven\n\na two\nthree\n")
    words = [
        f"run={run}",
        f"prompts={tmp_path}/prompts.txt",
        "n=3",
        "keep=2",
        "retrieve=1",
        f"out={out}",
    ]
    assert main(["generate", *words]) == 0

    entries = listed(out)
    assert [entry["prompt"] for entry in entries] == ["a seven", "a two", "three"]
    expected = [f"{prompt:05d}_{image}.png" for prompt in range(3) for image in range(2)]
    assert sorted(path.name for path in out.glob("*.png")) == expected
    assert entries[0]["images"][0]["score"] >= entries[0]["images"][1]["score"]  # type: ignore[index]
    assert entries[0]["documents"]
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}

    # A kill may leave a line of the manifest cut off.
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text("\n".join([*lines[:2], lines[2][:20]]))
    (out / "00002_0.png").unlink()

    capsys.readouterr()
    assert main(["generate", *words]) == 0
    assert "2 of 3 prompts are done already" in capsys.readouterr().out
    assert listed(out) == entries
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before

    assert main(["generate", *words[:-1], f"out={out}", "seed=1"]) == 2
    assert "was made with other settings (seed)" in capsys.readouterr().err

    # A missing image of a whole line is drawn again, too.
    (out / "00001_1.png").unlink()
    assert main(["generate", *words]) == 0
    assert "2 of 3 prompts are done already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before
    assert sorted(entry["number"] for entry in listed(out)) == [0, 1, 2]


def test_images_of_a_model_that_is_not_the_run_s_any_more_are_not_kept(
    model: CM3Leon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(model.run.folder, run)
    words = [f"run={run}", "prompt=a seven", "n=1", f"out={out}"]
    assert main(["generate", *words]) == 0

    # Trained anew: the weights are others, and the record fits them.
    weights = load_file(run / "pretraining" / "model.safetensors")
    weights["head.weight"] += 1
    save_file(weights, run / "pretraining" / "model.safetensors")
    record = run / "pretraining" / "stage.json"
    content = json.loads(record.read_text())
    content["files"]["model.safetensors"] = sha256(run / "pretraining" / "model.safetensors")
    record.write_text(json.dumps(content))

    capsys.readouterr()
    assert main(["generate", *words]) == 2
    sentence = f"was drawn by another model than {run} holds now (model changed)"
    assert sentence in capsys.readouterr().err

    # Older settings do not name the model.
    (out / "settings.json").write_text('{"n": 1}')
    assert main(["generate", *words]) == 2
    assert "does not say which model drew the images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("settings.json", "[]", "settings.json is []; it must be an object"),
        ("settings.json", "{", "settings.json is damaged: it is not JSON"),
        ("settings.json", '{"parts": 3}', "settings.json: parts is 3; it must be an object"),
        ("manifest.jsonl", "[1]", "manifest.jsonl: line 1 is [1]; it must be an object"),
        ("manifest.jsonl", '{"number": "x"}', 'line 1: number is "x"; it must be a whole number'),
        (
            "manifest.jsonl",
            '{"number": 0, "prompt": "a", "images": {}}',
            "line 1: images is {}; it must be a list",
        ),
        (
            "manifest.jsonl",
            '{"number": 7, "prompt": "a", "images": []}',
            "has other prompts than those given",
        ),
    ],
)
def test_records_of_a_folder_that_are_not_as_expected_are_said(
    model: CM3Leon,
    file: str,
    content: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"run={model.run.folder}", "prompt=a", "n=1", f"out={tmp_path}"]
    if file == "manifest.jsonl":
        assert main(["generate", *words]) == 0
    (tmp_path / file).write_text(content)
    assert main(["generate", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_two_commands_do_not_draw_into_one_folder(
    model: CM3Leon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path):
        assert main(["generate", f"run={model.run.folder}", "prompt=a", f"out={tmp_path}"]) == 2
    assert "out: another process is working in" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_documents_are_added_by_one_command_at_a_time(
    model: CM3Leon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model.run.folder, run)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        picture(len(name)).save(tmp_path / name / f"{name}.png")
        (tmp_path / name / f"{name}.txt").write_text(f"the {name} one")

    with locked(run):
        assert main(["add", f"run={run}", f"data.path={tmp_path}/first"]) == 2
    assert "run: another process is working in" in capsys.readouterr().err

    # Both at once: who is refused adds its documents afterwards, and none are lost.
    words = [["add", f"run={run}", f"data.path={tmp_path}/{name}"] for name in ("first", "second")]
    running = [Forked("cm3leon.run", each) for each in words]
    codes = [process.wait(300) for process in running]
    assert set(codes) <= {0, 2}
    for code, each in zip(codes, words, strict=True):
        assert code == 0 or main(each) == 0

    bank = CM3Leon.load(run).run.bank
    assert {"first.png", "second.png"} <= {Path(id_).name for id_ in bank.added_ids}


# ---------------------------------------------------------------------------------- what is opened


def answers(run: Path) -> list[Any]:
    """What a run answers with all its parts: tokenizers, encoder, bank, documents and weights."""
    model = CM3Leon.load(run, precision="float32")
    (drawn,) = model.generate("a handwritten seven", retrieve=2)
    shown = [(each.id, each.text, np.asarray(each.image).tobytes()) for each in drawn.documents]
    return [drawn.codes_N.tolist(), drawn.score, np.asarray(drawn.image).tobytes(), shown]


def test_a_flipped_bit_or_a_cut_file_is_refused_wherever_it_is_read(
    model: CM3Leon, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model.run.folder, run)
    expected, refused = answers(run), set()

    # No answer needs the figures and pages of these two stages.
    files = []
    for record in sorted(run.glob("*/stage.json")):
        if record.parent.name not in ("evaluation", "reconstruction"):
            files += [record.parent / name for name in json.loads(record.read_text())["files"]]

    # Either an answer needs the file, and it is refused; or the answers are as before.
    for file in files:
        content = file.read_bytes()
        if not content:
            continue

        middle = len(content) // 2
        flipped = bytearray(content)
        flipped[middle] ^= 1

        for damaged in (bytes(flipped), content[:middle]):
            file.write_bytes(damaged)
            try:
                found = answers(run)
            except UserError as error:
                refused.add((file.relative_to(run).as_posix(), str(error).partition(";")[0]))
            else:
                assert found == expected, f"{file} was read as it is"

        file.write_bytes(content)

    # At least these files are needed for an answer.
    assert {name for name, _ in refused} >= {
        "image_tokenizer/model.safetensors",
        "index/index.json",
        "pretraining/config.json",
        "pretraining/model.safetensors",
        "retriever/model.safetensors",
        "text_tokenizer/tokenizer.json",
        "tokens/index.json",
        "tokens/plan.json",
        "vectors/index.json",
        "vectors/plan.json",
        "vectors/shard-00000-of-00001.arrow",
    }
    for name, said in refused:
        if name.endswith(".arrow"):
            path = run / name
            assert said.startswith((f"{path} is ", f"{path} cannot be read as a shard"))
        else:
            assert said == f"{run / name} has changed since it was written"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is damaged: it is not JSON"),
        ("[]", r"stage.json is \[\]; it must be an object"),
        ("{}", "stage.json has no fingerprint"),
        (
            '{"fingerprint": "x", "seconds": 1, "files": []}',
            r"files is \[\]; it must be an object",
        ),
        (
            json.dumps({"fingerprint": "0" * 64, "seconds": 1, "files": {}}),
            "does not name config.json; run the experiment again",
        ),
        (None, "is not the folder of a run with a finished pretraining: .*stage.json is missing"),
    ],
)
def test_a_record_cannot_switch_the_comparison_off(
    model: CM3Leon, content: str | None, sentence: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    shutil.copytree(model.run.folder, run)
    record = run / "pretraining" / "stage.json"
    if content is None:
        record.unlink()
    else:
        record.write_text(content)

    with pytest.raises(UserError, match=sentence):
        CM3Leon.load(run)


def test_a_damaged_checkpoint_is_refused_unless_the_user_says_so(
    model: CM3Leon, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model.run.folder, run)
    checkpoint = max((run / "pretraining").glob("step_*"))
    step = int(checkpoint.name[5:])
    CM3Leon.load(run, checkpoint=step)

    for file in sorted(each for each in checkpoint.iterdir() if each.name != ".metadata"):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (bytes(flipped), content[:-1]):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match="is missing or has changed since it was written"):
                CM3Leon.load(run, checkpoint=step)
        file.write_bytes(content)

    # A flipped bit in the largest file of tensors; `verify=False` is the user's own risk.
    shards = max(checkpoint.glob("__0_*"), key=lambda each: each.stat().st_size)
    content = bytearray(shards.read_bytes())
    content[-100] ^= 1
    shards.write_bytes(content)

    with pytest.raises(UserError):
        CM3Leon.load(run, checkpoint=step)
    CM3Leon.load(run, checkpoint=step, verify=False)


PLUGIN = """
from pathlib import Path
Path({mark!r}).write_text("was here")
"""


def test_opening_somebody_else_s_run_does_not_run_its_code(
    model: CM3Leon,
    tmp_path: Path,
    registries: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, mark, plugin = tmp_path / "run", tmp_path / "mark", tmp_path / "theirs.py"
    shutil.copytree(model.run.folder, run)
    plugin.write_text(PLUGIN.format(mark=str(mark)))

    # The run's own settings name a plugin that its author has written.
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("plugins: []", f"plugins: [{plugin}]"))
    assert str(plugin) in config.read_text()

    for words in (
        ["generate", f"run={run}", "prompt=a", f"out={tmp_path}/drawn"],
        ["search", f"run={run}", "text=a"],
        ["add", f"run={run}", f"data.path={tmp_path}"],
        ["export", "to=hf", f"run={run}", f"out={tmp_path}/hf"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"names {plugin}, whose code is not run unasked" in said
        assert f"plugins={plugin}, or trust=true" in said

    with pytest.raises(UserError, match="whose code is not run unasked"):
        CM3Leon.load(run)

    assert not mark.exists()

    # The user names the plugin: now it is loaded, and stays so in this process.
    assert main(["search", f"run={run}", "text=a", f"plugins={plugin}"]) == 0
    assert mark.exists()
    CM3Leon.load(run)  # it was loaded before, by this process

    # The user's own copy of a plugin takes the place of the one that the run names.
    elsewhere = tmp_path / "mine" / "theirs.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text(plugin.read_text())
    plugin.unlink()
    mark.unlink()

    loaded = CM3Leon.load(run, plugins=str(elsewhere))
    assert loaded.run.experiment.plugins == [str(elsewhere)]
    assert mark.exists()


def test_trust_loads_all_plugins_of_a_run(model: CM3Leon, tmp_path: Path, registries: None) -> None:
    run, mark, plugin = tmp_path / "run", tmp_path / "mark", tmp_path / "trusted.py"
    shutil.copytree(model.run.folder, run)
    plugin.write_text(PLUGIN.format(mark=str(mark)))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("plugins: []", f"plugins: {plugin}"))

    CM3Leon.load(run, trust=True)
    assert mark.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run={run}"], "`generate` needs a text: prompt=TEXT, for example"),
        (["run={run}", "prompt=a", "prompts=b"], "prompt and prompts are both given"),
        (["run={run}", "prompts={run}/none.txt"], "none.txt cannot be read"),
        (["run={run}/none", "prompt=a"], "is not the folder of a run with a finished pretraining"),
        (["run={run}", "prompt=a", "n=2", "keep=3"], "keep is 3; it must be at most n, which is 2"),
        (["run={run}", "prompt=a", "decoder=topp"], "topp"),
        (
            ["run={run}", "prompt=a", "weights=fp8"],
            "weights are fp8, which cpu does not compute in",
        ),
        (["run={run}", "prompt=a", "weights=int4"], 'weights is "int4"; it must be'),
    ],
)
def test_mistakes_of_the_command_are_said(
    model: CM3Leon,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    given = [word.format(run=model.run.folder) for word in words]
    assert main(["generate", *given, f"out={tmp_path}/out"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_drawn(
    model: CM3Leon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, out = "a very long story " * 200, tmp_path / "out"
    # Line breaks of many kinds: only those of a text file end a prompt.
    text = f"\ufeffa\u2028red\x0bseven\r\n\n{long}\na two\x85\u2028\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    words = ["generate", f"run={model.run.folder}", f"prompts={tmp_path}/prompts.txt", "n=1"]
    # The second start says the same, and draws nothing again.
    line_3 = "prompts.txt, line 3 ('a very long story a very long story a ve...'): a prompt of"
    for _ in range(2):
        assert main([*words, f"out={out}"]) == 3
        said = capsys.readouterr().err
        assert "1 of 3 prompts are too long, not drawn" in said
        assert line_3 in said
        assert "retrieved" not in said

    entries = {entry["prompt"]: entry for entry in listed(out)}
    assert set(entries) == {"a red seven", long.strip(), "a two"}
    assert "do not fit the model's 256 positions" in str(entries[long.strip()]["left_out"])
    assert sorted(path.name for path in out.glob("*.png")) == ["00000_0.png", "00002_0.png"]

    # A single prompt that is too long is the whole command's mistake.
    assert main(["generate", f"run={model.run.folder}", f"prompt={long}", f"out={tmp_path}/o"]) == 2
    assert not (tmp_path / "o").exists()

    with pytest.raises(UserError, match=r"prompt\.1 \('a very long story .*'\): a prompt of"):
        model.generate(["a", long])


def test_fewer_documents_than_asked_are_said_with_the_reason(
    model: CM3Leon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (drawn,) = model.generate("a seven", retrieve=50)
    assert drawn.asked == 50
    assert len(drawn.documents) < 50
    assert drawn.shortage in (NO_ROOM, NO_MORE)
    assert model.generate("a seven", retrieve=0)[0].shortage == ""

    (full,) = model.generate("a word " * 30, retrieve=2)
    assert (full.asked, full.shortage) == (2, NO_ROOM if len(full.documents) < 2 else "")

    # The command says so, too, and records it beside the images.
    out = tmp_path / "out"
    words = ["generate", f"run={model.run.folder}", "prompt=a seven", "retrieve=50", "n=1"]
    assert main([*words, f"out={out}"]) == 0
    assert f"found {len(drawn.documents)} of 50 documents: " in capsys.readouterr().out
    assert listed(out)[0]["shortage"] == drawn.shortage

    with pytest.warns(ShortageWarning, match="of 50 documents"):
        model.caption(picture(), retrieve=50, max_tokens=3)
