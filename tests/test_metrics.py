"""Metrics of evaluations: intervals, figures of images, codes and a corpus, and the judge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cm3leon.data.corpus import split_of_key
from cm3leon.evaluation.judge import Judge
from cm3leon.evaluation.metrics import (
    MOST_RUNS,
    Z95,
    average,
    codebook_use,
    equal_to_any,
    over_runs,
    proportion,
    psnr,
)
from cm3leon.evaluation.protocols.base import Answer, Item
from cm3leon.evaluation.protocols.corpus import UNKNOWN, CorpusTask, OwnCorpus
from cm3leon.registry import SOURCES, discover
from cm3leon.types import Document, ImageSegment, TextSegment

discover()

# ---------------------------------------------------------------------------------------- intervals


@given(st.integers(1, 3000), st.data())
def test_proportion_has_wilsons_interval(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    measured = proportion(np.arange(n) < hits)
    reference = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert measured.value == pytest.approx(hits / n)
    assert measured.low == pytest.approx(reference.low, abs=1e-9)
    assert measured.high == pytest.approx(reference.high, abs=1e-9)
    assert 0 <= measured.low <= measured.value + 1e-12
    assert measured.value - 1e-12 <= measured.high <= 1
    assert measured.n == n


def test_wilsons_published_figures() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, table I, method 3): 81/263, 15/148, 0/20, 1/29."""
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        measured = proportion(np.arange(n) < hits)
        assert (round(measured.low, 4), round(measured.high, 4)) == (low, high)


def test_quantile_of_the_intervals() -> None:
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-14) == Z95


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50))
def test_average_has_the_interval_of_its_standard_error(values: list[float]) -> None:
    measured = average(np.array(values))
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    low = high = np.mean(values)
    if error:
        low, high = stats.norm.interval(0.95, np.mean(values), error)
    assert measured.value == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert (measured.low, measured.high) == pytest.approx((low, high), abs=1e-6)
    assert measured.n == len(values)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=MOST_RUNS))
def test_runs_have_students_interval(values: list[float]) -> None:
    found = over_runs(values)
    error = stats.sem(values)
    scale = max(error, 1e-300)  # scipy has no interval of scale 0
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scale)
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3, abs=1e-3 * error + 1e-12)


def test_the_interval_of_runs_needs_two_of_them() -> None:
    for count in (1, MOST_RUNS + 1):
        with pytest.raises(ValueError, match=f"there are {count} runs; there must be 2 to 30"):
            over_runs([0.5] * count)


def test_one_value_has_no_finite_interval_and_none_has_no_figure() -> None:
    assert (average(np.array([3.0])).low, average(np.array([3.0])).high) == (-math.inf, math.inf)
    for metric in (average, proportion):
        with pytest.raises(ValueError, match="of no items is undefined"):
            metric(np.array([]))


# ------------------------------------------------------------------------------------ images, codes


@given(st.integers(0, 1000))
@settings(max_examples=25)
def test_psnr_is_the_mean_over_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)

    # 20 log10(255 / RMSE) of each image, number by number.
    each = []
    for one, other in zip(a, b, strict=True):
        squares = []
        for x, y in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
            squares.append(float(x - y) ** 2)
        each.append(20 * math.log10(255) - 10 * math.log10(math.fsum(squares) / len(squares)))
    assert psnr(a, b) == pytest.approx(sum(each) / 3)

    # An image that comes back exactly has no PSNR, and does not count.
    assert psnr(np.concatenate([a, a[:1]]), np.concatenate([b, a[:1]])) == pytest.approx(psnr(a, b))


def test_psnr_of_known_images() -> None:
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr(black, white) == psnr(white, black) == 0  # no wrap-around of bytes
    assert psnr(black, black + 1) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(white, white) == math.inf


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_codebook_use_and_perplexity(codes: list[int]) -> None:
    used, perplexity = codebook_use(np.array(codes).reshape(1, -1), 10)
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    assert used == pytest.approx(len(shares) / 10)
    assert perplexity == pytest.approx(math.prod(share**-share for share in shares))


def test_codebook_use_of_known_codes() -> None:
    assert codebook_use(np.arange(8).reshape(2, 4), 8) == pytest.approx((1, 8))
    assert codebook_use(np.full((3, 4), 5), 16) == pytest.approx((1 / 16, 1))
    assert codebook_use(np.array([[0, 0, 1, 1]], dtype=np.uint16), 16) == pytest.approx((1 / 8, 2))


code_rows = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=8)


@given(code_rows, code_rows)
def test_equal_to_any_against_brute_force(codes: list[list[int]], known: list[list[int]]) -> None:
    codes_BN = np.array(codes, dtype=np.uint16).reshape(-1, 2)
    known_MN = np.array(known, dtype=np.int64).reshape(-1, 2)
    found = equal_to_any(codes_BN, known_MN)
    assert found.dtype == bool
    assert found.tolist() == [row in known for row in codes]
    assert equal_to_any(codes_BN[:, ::-1], known_MN[:, ::-1]).tolist() == found.tolist()


# ------------------------------------------------------------------------------- a run's own corpus

TRAINING_MN = np.array([[3, 4], [9, 9], [2, 1]])


def drawn(read: int, clip: float, *codes: int) -> Answer:
    """An image that is read as a class, with its CLIP score and its codes."""
    image_HWC = np.full((1, 1, 3), read, np.int64)
    return Answer(image_HWC=image_HWC, clip=clip, codes_N=np.array(codes))


# Five questions for these classes; the second answer has the codes of a training image.
CLASSES = [3, 1, 4, 1, 5]
ANSWERS = [
    drawn(3, 0.1, 1, 2),
    drawn(1, 0.2, 3, 4),
    drawn(UNKNOWN, 0.3, 1, 2),
    drawn(2, 0.4, 5, 6),
    drawn(5, 0.5, 1, 2),
]


def corpus_task(task: str, training_MN: np.ndarray = TRAINING_MN) -> CorpusTask:
    """A protocol whose judge reads the class off the first pixel."""
    protocol = CorpusTask(CorpusTask.Config(task=task))
    empty = np.zeros((0, 1, 1, 3), np.uint8)
    corpus = OwnCorpus(
        lambda split: [], empty, np.zeros(0), training_MN, lambda text: len(text) or None
    )
    read = SimpleNamespace(read=lambda images_BHWC: images_BHWC[:, 0, 0, 0])
    vars(corpus)["judge"] = read
    protocol.ask_about(corpus)
    return protocol


def measure(
    answers: Sequence[Answer] = ANSWERS, classes: Sequence[int | None] = CLASSES, **of: Any
) -> Any:
    pair = Document("a", (TextSegment("a seven"), ImageSegment(np.zeros((1, 1, 3), np.uint8))))
    items = [Item("a", "text_to_image", pair, truth=label) for label in classes]
    return corpus_task("text_to_image", **of).score(items, answers)


def test_accuracy_is_the_share_of_classes_read_as_asked() -> None:
    assert measure()["accuracy"] == proportion(np.array([True, True, False, False, True]))

    # Captions have a class too, here that of their length, but nothing that only images have.
    texts = corpus_task("caption")
    item = Item("a", "caption", Document("a", (TextSegment("abc"),)), truth=3)
    figures = texts.score([item, item], [Answer(text="one"), Answer(text="")])
    assert figures["accuracy"].value == 0.5
    assert not {"copies", "distinct", "clip_score"} & set(figures)
    assert [texts.right(item, Answer(text=text)) for text in ("one", "")] == [True, False]


def test_accuracy_does_not_apply_where_a_class_is_unknown() -> None:
    """Otherwise an image without a class, asked for without one, would count as right."""
    assert "accuracy" not in measure(classes=[3, None, 4, 1, 5])


def test_accuracy_does_not_apply_where_nobody_can_read_the_images() -> None:
    """There is a judge where every training image has a class; without one, all would be wrong."""
    protocol = corpus_task("text_to_image")
    vars(protocol.corpus)["judge"] = None
    pair = Document("a", (TextSegment("a seven"), ImageSegment(np.zeros((1, 1, 3), np.uint8))))
    items = [Item("a", "text_to_image", pair, truth=label) for label in CLASSES]
    assert "accuracy" not in protocol.score(items, ANSWERS)


def test_copies_are_those_of_training_images_and_of_the_retrieved_ones() -> None:
    assert measure()["copies"].value == 0.2

    # The third answer has the codes of a retrieved image, the second those of a training image.
    retrieved = [(), (), ([7, 7], [1, 2]), ([1, 2], [5, 7]), ([5, 6],)]
    answers = []
    for answer, found in zip(ANSWERS, retrieved, strict=True):
        codes = [np.array(of_image) for of_image in found]
        answers.append(dataclasses.replace(answer, retrieved=codes))
    assert measure(answers)["copies"] == proportion(np.array([False, True, True, False, False]))
    assert measure(training_MN=np.zeros((0, 2), np.int64))["copies"].value == 0


def test_distinct_counts_every_answer_once() -> None:
    assert measure()["distinct"] == proportion(np.array([True, True, False, True, False]))


def test_clip_score_is_the_mean_cosine() -> None:
    assert measure()["clip_score"] == average(np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    unknown = [dataclasses.replace(ANSWERS[0], clip=math.nan), *ANSWERS[1:]]
    assert "clip_score" not in measure(unknown)


def test_given_kept_is_the_share_of_exact_ones() -> None:
    answers = [
        dataclasses.replace(answer, given_kept=number > 0) for number, answer in enumerate(ANSWERS)
    ]
    assert measure(answers)["given_kept"].value == 0.8

    # The true answers, which the ceiling is made of, have nothing given that could be changed.
    assert "given_kept" not in measure()


def test_documents_are_asked_as_often_as_it_takes() -> None:
    protocol = CorpusTask(CorpusTask.Config(task="text_to_image", at_least=5))
    documents = [Document(id_, (TextSegment("a"),), 3) for id_ in "abc"]
    corpus = corpus_task("caption").corpus
    protocol.ask_about(dataclasses.replace(corpus, documents=lambda split: documents))
    assert [item.id for item in protocol.items()] == [*"abc", *(f"{id_}#1" for id_ in "abc")]


# -------------------------------------------------------------------------------------------- judge


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images, their labels, and which of them are held out."""
    documents = list(SOURCES.build("digits").documents())
    splits = [
        split_of_key(document.id, validation=0.113, held_out=0.1946) for document in documents
    ]
    images_BHWC = np.stack([document.image for document in documents])
    labels_B = np.array([document.label for document in documents])
    return images_BHWC, labels_B, np.array(splits) == "held_out"


@pytest.fixture(scope="module")
def judge(digits: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Judge:
    images_BHWC, labels_B, held_out_B = digits
    return Judge(images_BHWC[~held_out_B], labels_B[~held_out_B])


def test_judge_reads_held_out_digits(
    judge: Judge, digits: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    images_BHWC, labels_B, held_out_B = digits
    read_B = judge.read(images_BHWC[held_out_B])
    assert read_B.shape == (359,)
    assert np.mean(read_B == labels_B[held_out_B]) > 0.97

    for label in range(10):
        chosen_B = labels_B[held_out_B] == label
        assert np.mean(read_B[chosen_B] == label) > 0.9


def test_judge_reads_larger_images_alike(
    judge: Judge, digits: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    images_BHWC = digits[0][:100]
    larger_BHWC = images_BHWC.repeat(4, axis=1).repeat(4, axis=2)
    assert np.array_equal(judge.read(larger_BHWC), judge.read(images_BHWC))


def test_judge_is_the_same_every_time(
    judge: Judge, digits: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    images_BHWC, labels_B, _ = digits
    twice = [Judge(images_BHWC[:300], labels_B[:300]).read(images_BHWC[300:600]) for _ in range(2)]
    assert np.array_equal(*twice)


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (4, 4)])
def test_judge_refuses_sides_that_it_cannot_divide(judge: Judge, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"sides that are multiples of 8, got {size[0]}x{size[1]}"):
        judge.read(np.zeros((1, *size, 3), np.uint8))
