"""Metrics of answers in words: the published rules, worked by hand and by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from cm3leon.evaluation.answers import CONTRACTIONS, ndcg, normalized, option_of, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two", "2"),
        ("The dog.", "dog"),
        ("a red, round thing", "red round thing"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes!", "yes"),
        ("Dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("none", "0"),
        ("new\nyork", "new york"),
        ("mr. smith", "mr smith"),
        ("black/white", "black white"),
    ],
)
def test_answers_are_normalised_as_the_official_tools_do(answer: str, expected: str) -> None:
    assert normalized(answer) == expected


def test_contractions_are_those_of_the_official_list() -> None:
    assert len(CONTRACTIONS) > 110
    for short, full in (
        ("shouldnt've", "shouldn't've"),
        ("yalld've", "y'all'd've"),
        ("twas", "'twas"),
        ("im", "i'm"),
    ):
        assert CONTRACTIONS.get(short, full) == full
    assert "well" not in CONTRACTIONS.values()


def test_accuracy_is_the_mean_over_leaving_one_out() -> None:
    """Checked against all subsets of nine people, as the paper on VQA defines it."""
    people = ["red"] * 2 + ["blue"] * 3 + ["Red."] + ["green"] * 4

    for answer in ("red", "blue", "green", "the red", "yellow"):
        by_hand = []
        for nine in itertools.combinations(people, 9):
            same = sum(normalized(one) == normalized(answer) for one in nine)
            by_hand.append(min(1.0, same / 3))
        assert vqa_accuracy(answer, people) == pytest.approx(np.mean(by_hand))

    assert vqa_accuracy("red", people) == pytest.approx(0.9)
    assert vqa_accuracy("blue", ["blue"] * 10) == 1
    assert vqa_accuracy("Blue", ["blue"] * 10) == 0  # not normalised where all agree
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("x", [])


def test_options_are_read_from_answers() -> None:
    options = ["a cat", "a dog", "neither"]
    expected = {
        "(B)": 1,
        "B": 1,
        "b": None,
        "The answer is C": 2,
        "It is (A) or so. So the answer is (B).": 1,
        "a dog.": 1,
        "": None,
        "(D)": None,
        "A dog": 1,
        "A cat sits": None,
    }
    for answer, option in expected.items():
        assert option_of(answer, options) == option, answer


@given(
    relevance=st.lists(st.sampled_from([0.0, 0.0, 0.2, 0.5, 1.0]), min_size=2, max_size=20),
    seed=st.integers(0, 999),
)
@settings(max_examples=60)
def test_ndcg_is_scikit_learns_at_as_many_as_are_relevant(
    relevance: list[float], seed: int
) -> None:
    scores = np.random.default_rng(seed).random(len(relevance))
    k = sum(value > 0 for value in relevance)
    expected = ndcg_score([relevance], [scores], k=k) if k else 0.0
    assert ndcg(scores.tolist(), relevance) == pytest.approx(expected)


def test_ndcg_of_unequal_lists_is_refused() -> None:
    with pytest.raises(ValueError, match="2 scores for 3"):
        ndcg([1, 2], [0, 0, 1])
