"""Scores of captions: published values, and formulas by brute force."""

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


def test_the_classic_pair() -> None:
    """Papineni et al. 2002: seven times "the" has a clipped precision of 2/7."""
    scores = caption_scores(["the the the the the the the", "a dog"], [MAT, ["a dog"]])
    assert scores.bleu[0] == pytest.approx((2 + 2) / 9)  # over the whole set: 4 of 9 words
    assert scores.images == 2


def test_captions_equal_to_all_their_references_have_ten() -> None:
    texts = ["a red circle at the top", "two blue squares below it", "a small green cross on white"]
    scores = caption_scores(texts, [[text] * 5 for text in texts])
    assert scores.cider == pytest.approx(10)
    assert scores.bleu[2] == pytest.approx(1)
    assert scores.rouge_l == pytest.approx(1)
    assert (scores.meteor is None) == (shutil.which("java") is None)


def test_cider_is_its_formula() -> None:
    """Vedantam et al. 2015, CIDEr-D: clipped tf-idf cosines of n-grams with a length penalty, times ten."""
    given = ["a red circle left", "the blue square is at the top", "a cross"]
    references = [
        ["a red circle at the left", "red circle"],
        ["a blue square at the top"],
        ["green cross", "a cross"],
    ]
    expected = []
    for order in range(1, 5):
        grams = [[_grams(text, order) for text in of_image] for of_image in references]
        frequency = Counter(gram for of_image in grams for gram in set().union(*of_image))

        def weights(counts: Grams, frequency: Grams = frequency) -> dict[tuple[str, ...], float]:
            return {
                g: n * (math.log(3) - math.log(max(1, frequency[g]))) for g, n in counts.items()
            }

        row = []
        for text, of_image, texts in zip(given, grams, references, strict=True):
            mine = weights(_grams(text, order))
            total = 0.0
            for counts, other in zip(of_image, texts, strict=True):
                theirs = weights(counts)
                norm = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(
                    sum(v * v for v in theirs.values())
                )
                dot = sum(min(mine[g], theirs.get(g, 0)) * theirs.get(g, 0) for g in mine)
                apart = sum(_grams(text, 2).values()) - sum(_grams(other, 2).values())
                total += (dot / norm if norm else 0) * math.exp(-(apart**2) / (2 * 6**2))
            row.append(10 * total / len(of_image))
        expected.append(row)
    assert caption_scores(given, references).cider == pytest.approx(
        sum(map(sum, expected)) / 4 / 3, rel=1e-6
    )


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
