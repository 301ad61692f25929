"""Answers in words compared with those of people: VQA accuracy, options, and VisDial's ranking."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's i'm isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't shan't she'd she'd've she's should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""


def _without_apostrophes() -> dict[str, str]:
    """Correct words by their spellings without an apostrophe, the first or the second of two.

    The official list has such pairs: "couldnt've" and "couldn'tve" are both "couldn't've".
    """
    table: dict[str, str] = {}
    for word in _CONTRACTED.split():
        table[word.replace("'", "", 1)] = word
        if word.count("'") == 2:
            before, after = word.rsplit("'", 1)
            table[before + after] = word
    return table


CONTRACTIONS = _without_apostrophes()
_NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalized(answer: str) -> str:
    """Bring an answer into the form in which answers are compared: lower case, no punctuation, no
    articles, digits for number words, and apostrophes in contractions.

        Two dogs, dont they?   ->   2 dogs don't they

    Source: the evaluation tools of VQA (Antol et al. 2015), unchanged: punctuation beside a space
    is dropped, other punctuation becomes a space, unless a comma stands inside a number; a period
    stays only before a digit.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    result = text
    for mark in PUNCTUATION:
        # The original text decides, not what earlier marks have left of it.
        dropped = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        result = result.replace(mark, "" if dropped else " ")

    words = []
    for word in _PERIOD.sub("", result).lower().split():
        counted = NUMBERS.get(word, word)
        if counted not in ARTICLES:
            words.append(CONTRACTIONS.get(counted, counted))
    return " ".join(words)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """VQA accuracy: min(1, number of other people with this answer / 3), averaged over leaving each
    person out.

    Of ten people, two say "dog" and eight say "cat". For the answer "dog", one other person is left
    where one of the two is left out, and two are left otherwise: (2 x 1/3 + 8 x 2/3) / 10 = 0.6.

    As in the official tools, answers are normalised only if people disagree. VQA2, OKVQA and VizWiz
    are measured by it.

    Raises:
        ValueError: without answers.
    """
    if not given:
        raise ValueError("a question without answers has no accuracy")
    said = [each.replace("\n", " ").replace("\t", " ").strip() for each in given]
    mine = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(said)) > 1:
        said = [normalized(each) for each in said]
        mine = normalized(mine)

    # A person who is left out takes one from the count if they gave this answer.
    equal = [each == mine for each in said]
    accuracies = []
    for is_equal in equal:
        accuracies.append(min(1.0, (sum(equal) - is_equal) / 3))
    return float(np.mean(accuracies))


def option_of(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer names, None if it names none.

    It is named by its letter behind "answer is", a letter in brackets, a letter alone, or by its
    text.
    """
    allowed = "".join(chr(ord("A") + number) for number in range(len(options)))
    for pattern in (
        rf"answer is \(?([{allowed}])\b",
        rf"\(([{allowed}])\)",
        rf"^\s*([{allowed}])[.):]?\s*$",
    ):
        found = re.findall(pattern, answer)
        if found:
            return allowed.index(found[-1])

    # The whole text of exactly one option.
    named = answer.strip(" .").lower()
    same = [number for number, each in enumerate(options) if each.strip().lower() == named]
    if len(same) != 1:
        return None
    return same[0]


def ndcg(scores_K: Sequence[float], relevance_K: Sequence[float]) -> float:
    """VisDial's NDCG of the first k candidates by score, where k candidates have any relevance.

    It is 0 if no candidate has any. Three candidates of relevance 0, 1 and 0.5, of which the second
    has the highest score and the first the next one, have k = 2 and an NDCG of
    (1 / log2 2 + 0 / log2 3) / (1 / log2 2 + 0.5 / log2 3) = 0.76.

    Source: Visual Dialog challenge: gains are the relevances, discounts 1 / log2(rank + 1).

    Raises:
        ValueError: if there are not as many scores as relevances.
    """
    if len(scores_K) != len(relevance_K):
        raise ValueError(f"{len(scores_K)} scores for {len(relevance_K)} candidates")
    relevance = np.asarray(relevance_K, np.float64)
    k = int((relevance > 0).sum())
    if not k:
        return 0.0
    discount = 1 / np.log2(np.arange(2, k + 2))
    order = np.argsort(-np.asarray(scores_K, np.float64), kind="stable")
    ideal = np.sort(relevance)[::-1]
    return float((relevance[order[:k]] * discount).sum() / (ideal[:k] * discount).sum())
