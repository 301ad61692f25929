"""Captions compared with those of people: CIDEr, BLEU, ROUGE-L and METEOR, by pycocoevalcap."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from cm3leon.evaluation.metrics import Measured
from cm3leon.types import UserError

LEAST = 2
"""Fewest images for which CIDEr is defined: its weights are logarithms of shares of images."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions, and the tokenizer that divided them into words."""

    cider: float
    bleu: tuple[float, float, float, float]
    rouge_l: float
    meteor: float | None
    """None without Java, which computes it."""
    tokenizer: str
    """PTB, as for published figures, or what replaced it; then the scores are not comparable."""
    images: int


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Compare one caption of each image with its references, as the COCO evaluation tools do.

    CIDEr is the tools' CIDEr-D: 10 for captions of four words or more that equal all their
    references. Papers print 100 times it: 61.6 in the paper's table 2 is 0.616 here.

    Raises:
        UserError: for fewer than two images, an image without references, or without pycocoevalcap.
    """
    if len(captions) != len(references) or len(captions) < LEAST:
        raise UserError(
            f"{len(captions)} captions for {len(references)} images; CIDEr needs one each, of "
            f"{LEAST} or more"
        )
    for number, of_image in enumerate(references):
        if not of_image:
            raise UserError(f"image {number} has no reference caption")
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UserError(
            "captions are scored by the package pycocoevalcap (pip install pycocoevalcap)"
        ) from error

    # The official tokenizer and METEOR are Java programs. Without Java, words are found by a
    # pattern and METEOR stays unknown.
    has_java = shutil.which("java") is not None
    cut, tokenizer = _penn_treebank, "PTB"
    if not has_java:
        cut, tokenizer = _words, "words (no Java for PTB)"
    given = cut({number: [caption] for number, caption in enumerate(captions)})
    expected = cut(dict(enumerate(map(list, references))))

    bleu, _ = Bleu(4).compute_score(expected, given, verbose=0)
    cider, _ = Cider().compute_score(expected, given)
    rouge, _ = Rouge().compute_score(expected, given)
    meteor = float(Meteor().compute_score(expected, given)[0]) if has_java else None
    return CaptionScores(
        cider=float(cider),
        bleu=(float(bleu[0]), float(bleu[1]), float(bleu[2]), float(bleu[3])),
        rouge_l=float(rouge),
        meteor=meteor,
        tokenizer=tokenizer,
        images=len(captions),
    )


def caption_figures(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Measured]:
    """The scores as figures without an interval, named with the tokenizer: `CIDEr (PTB)`."""
    found = caption_scores(captions, references)
    figures = {
        "CIDEr": found.cider,
        "BLEU-4": found.bleu[3],
        "ROUGE-L": found.rouge_l,
        "METEOR": found.meteor,
    }
    measured = {}
    for name, value in figures.items():
        if value is not None:
            exact = Measured(value, value, value, found.images)
            measured[f"{name} ({found.tokenizer})"] = exact
    return measured


def _penn_treebank(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    """Divide texts into words by the official tokenizer, with spaces between the words."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {}
    for key, of_key in texts.items():
        captions[key] = [{"caption": text} for text in of_key]
    return PTBTokenizer().tokenize(captions)


def _words(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    """Divide texts into words by a pattern, with spaces between the words."""

    def words_of(text: str) -> str:
        return " ".join(re.findall(r"[^\W_]+(?:'[a-z]+)?", text.lower()))

    return {key: list(map(words_of, of_key)) for key, of_key in texts.items()}
