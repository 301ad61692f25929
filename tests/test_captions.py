"""Scores of captions against published values, and against their formulas by brute force."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import pytest

from cm3leon.evaluation import captions
from cm3leon.evaluation.captions import caption_scores
from cm3leon.types import UserError

pytest.importorskip("pycocoevalcap")

Grams = Counter[tuple[str, ...]]
MAT = ["the cat is on the mat", "there is a cat on the mat"]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out METEOR, a program in Java that takes seconds to start; of these words, the official
    tokenizer, which is another, makes the same."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_java")
def test_the_classic_pair() -> None:
    """Papineni et al. 2002: seven times "the" has a clipped precision of 2/7."""
    scores = caption_scores(["the the the the the the the", "a dog"], [MAT, ["a dog"]])
    assert scores.bleu[0] == pytest.approx((2 + 2) / 9)  # over the whole set: 4 of 9 words
    assert scores.images == 2


@pytest.mark.parametrize("programs", [pytest.param("java", marks=pytest.mark.slow), "no_java"])
def test_captions_equal_to_all_their_references_have_ten(
    programs: str, request: pytest.FixtureRequest
) -> None:
    if programs == "no_java":
        request.getfixturevalue("no_java")
    texts = ["a red circle at the top", "two blue squares below it", "a small green cross on white"]
    scores = caption_scores(texts, [[text] * 5 for text in texts])
    assert scores.cider == pytest.approx(10)
    assert scores.bleu[2] == pytest.approx(1)
    assert scores.rouge_l == pytest.approx(1)
    assert (scores.meteor is None) == (shutil.which("java") is None)


@pytest.mark.usefixtures("no_java")
def test_cider_is_its_formula() -> None:
    """Vedantam et al. 2015, CIDEr-D: the cosine of clipped tf-idf vectors of n-grams.

    It is multiplied by a penalty for different lengths and by ten, and averaged over an image's
    references and over n-grams of one to four words.
    """
    given = ["a red circle left", "the blue square is at the top", "a cross"]
    references = [
        ["a red circle at the left", "red circle"],
        ["a blue square at the top"],
        ["green cross", "a cross"],
    ]

    expected = []
    for order in range(1, 5):
        # An n-gram's frequency is the number of images in whose references it stands.
        frequency: Grams = Counter()
        for texts in references:
            frequency.update(set().union(*(_grams(text, order) for text in texts)))

        row = []
        for text, texts in zip(given, references, strict=True):
            mine = _tf_idf(_grams(text, order), frequency)
            total = 0.0
            for other in texts:
                theirs = _tf_idf(_grams(other, order), frequency)
                norm = _length(mine) * _length(theirs)
                dot = sum(min(mine[g], theirs.get(g, 0)) * theirs.get(g, 0) for g in mine)

                # The difference of the lengths, counted in pairs of words.
                apart = sum(_grams(text, 2).values()) - sum(_grams(other, 2).values())
                if norm:
                    total += dot / norm * math.exp(-(apart**2) / (2 * 6**2))
            row.append(10 * total / len(texts))
        expected.append(row)

    mean = sum(map(sum, expected)) / 4 / 3
    assert caption_scores(given, references).cider == pytest.approx(mean, rel=1e-6)


def _tf_idf(counts: Grams, frequency: Grams) -> dict[tuple[str, ...], float]:
    """Weights of n-grams among three images."""
    return {g: n * (math.log(3) - math.log(max(1, frequency[g]))) for g, n in counts.items()}


def _length(weights: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(value * value for value in weights.values()))


def _grams(text: str, order: int) -> Grams:
    words = text.split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def test_what_stands_in_for_java_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    scores = caption_scores(["A cat's mat.", "two dogs"], [["a cat's mat"], ["two dogs!"]])
    assert scores.tokenizer == "words (no Java for PTB)"
    assert scores.meteor is None
    assert scores.cider == pytest.approx(10, rel=0.5)
    assert scores.rouge_l == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "references", "message"),
    [
        (["a"], [["a"]], "2 or more"),
        (["a", "b"], [["a"], []], "image 1 has no reference"),
        (["a"], [], "1 captions for 0"),
    ],
)
def test_too_little_to_score_is_a_sentence(
    given: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        caption_scores(given, references)
