"""The lexical retriever: TF-IDF as scikit-learn defines it, and the colours of an image's cells.

Names that it was never fitted on are found too.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from banks import bank_of
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from cm3leon import CM3Leon
from cm3leon.api import UnrankedWarning
from cm3leon.evaluate import Evaluation, Row
from cm3leon.evaluate.files import read_answers
from cm3leon.evaluation.config import AskConfig
from cm3leon.experiment import load_experiment
from cm3leon.plugins.scenes.world import entity_name
from cm3leon.registry import PROTOCOLS, RETRIEVERS, discover
from cm3leon.retrievers.lexical import CELLS, TEXT_DIM, LexicalEncoder, direction
from cm3leon.retrievers.neighbours import NeighbourShards
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.running import run_experiment
from cm3leon.training.device import best_device
from cm3leon.types import Notice, UserError

discover()

WORDS = ["red", "blue", "dog", "cat", "a", "the", "photo", "7", "naïve"]
TEXTS = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=2, max_size=12
)


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@given(TEXTS)
def test_texts_are_tf_idf_vectors_projected(texts: list[str]) -> None:
    encoder = LexicalEncoder()
    encoder.fit(texts)
    reference = TfidfVectorizer(token_pattern=r"\w+")
    tf_idf_BV = reference.fit_transform(texts).toarray()
    directions_VD = np.stack([direction(word) for word in reference.get_feature_names_out()])
    projected_BD = tf_idf_BV @ directions_VD
    expected_BD = projected_BD / np.linalg.norm(projected_BD, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode_texts(texts)[:, :TEXT_DIM], expected_BD, atol=1e-5)


def test_different_words_are_nearly_orthogonal() -> None:
    directions_WD = np.stack([direction(entity_name(number)) for number in range(1000)])
    cosines_WW = directions_WD @ directions_WD.T
    others = cosines_WW[~np.eye(1000, dtype=bool)]
    assert others.std() == pytest.approx(TEXT_DIM**-0.5, rel=0.05)
    assert np.diag(cosines_WW).mean() == pytest.approx(1, rel=0.02)


def test_names_that_were_not_fitted_are_found() -> None:
    """Each name has two documents in the bank, which are the best for a third text with it."""

    def on_grounds(names: list[str], grounds: tuple[str, ...]) -> list[str]:
        return [f"{name} on {ground}" for name, ground in itertools.product(names, grounds)]

    retriever = RETRIEVERS.build({"name": "lexical", "threshold": 0.99})
    fitted = [entity_name(n) for n in range(300)]
    retriever.encoder.fit(on_grounds(fitted, ("white", "grey")))

    new = [entity_name(n) for n in range(300, 900)]
    texts = on_grounds(new, ("grey", "black"))
    bank = bank_of(retriever.parts(texts, pictures(len(texts))), pairs_only=True)
    queries = retriever.parts(on_grounds(new, ("white",)), None)
    rows_QK, _ = retriever.retrieve(bank, queries, "text", count=2)
    assert np.array_equal(rows_QK // 2, np.repeat(np.arange(len(new))[:, None], 2, axis=1))


def test_images_are_compared_by_the_colours_of_their_cells() -> None:
    encoder = LexicalEncoder()

    # Two images of one pixel a cell, enlarged, and one of a single colour.
    images_BHWC = pictures(3, side=CELLS)
    large_BHWC = images_BHWC.repeat(4, axis=1).repeat(4, axis=2)
    shown_BHWC = np.concatenate([large_BHWC[:2], np.full((1, 32, 32, 3), 7, "u1")])
    vectors_BD = encoder.encode_images(shown_BHWC)

    # The cosine of the cells' colours without each channel's mean; 0.1 keeps it defined where
    # all cells are alike.
    cells_BCN = images_BHWC[:2].reshape(2, -1, 3).transpose(0, 2, 1) / 255
    first_D, second_D = (cells_BCN - cells_BCN.mean(2, keepdims=True)).reshape(2, -1)
    expected = first_D @ second_D + 0.1**2
    expected /= np.sqrt((first_D @ first_D + 0.1**2) * (second_D @ second_D + 0.1**2))
    assert vectors_BD[0] @ vectors_BD[1] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors_BD, axis=1), 1, atol=1e-5)

    # The size of an image does not matter.
    larger_BD = encoder.encode_images(shown_BHWC.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_allclose(larger_BD, vectors_BD, atol=1e-5)


def test_a_text_and_an_image_have_nothing_in_common() -> None:
    encoder = LexicalEncoder()
    encoder.fit(["a red dog"])
    assert not (encoder.encode_texts(["a red dog"]) @ encoder.encode_images(pictures(4)).T).any()


@pytest.mark.parametrize("dropout", [0.25, 0.5, 1.0])
def test_query_dropout_leaves_out_that_share(dropout: float) -> None:
    encoder = LexicalEncoder()
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    encoder.fit(words)
    text = " ".join(words)
    (whole_D,), singles_BD = encoder.encode_texts([text]), encoder.encode_texts(words)
    dropped_BD = encoder.encode_texts([text] * 20, dropout=dropout, seed=3)

    # What is left is found by least squares, as every word has a direction of its own.
    left_BW = np.linalg.lstsq(singles_BD.T, dropped_BD.T, rcond=None)[0].T > 1e-3
    assert set(left_BW.sum(axis=1)) == {max(1, 8 - round(8 * dropout))}
    assert len(np.unique(left_BW, axis=0)) > 1
    again_BD = encoder.encode_texts([text] * 20, dropout=dropout, seed=3)
    assert np.array_equal(dropped_BD, again_BD)
    assert np.abs(dropped_BD[0] - whole_D).max() > 0.01

    # Of an image, that share of its cells is 0 in all three channels.
    cells_BD = encoder.encode_images(pictures(5), dropout=dropout, seed=3)[:, TEXT_DIM:-1]
    empty_BN = (cells_BD.reshape(5, 3, -1) == 0).all(axis=1)
    assert (empty_BN.sum(axis=1) == round(dropout * CELLS**2)).all()


def test_a_text_without_words_is_none() -> None:
    retriever = RETRIEVERS.build({"name": "lexical"})
    retriever.encoder.fit(["a dog"])
    parts = retriever.parts(["...", "a dog"], pictures(2))
    assert parts.has("text").tolist() == [False, True]
    assert parts.has("image").all()


SMALL = {
    # A fifth of the digits is enough to train on and to retrieve from.
    "split": {"validation": 0.02, "held_out": 0.8},
    "augment": {"versions": 1},
    "retriever": {"name": "lexical", "max_documents": 1},
    "retriever_training": None,
    "until": "pretraining",
}


def test_a_run_with_it_fits_keeps_finds_and_is_ranked_by_another(
    tmp_path: Path, tuned_model: CM3Leon
) -> None:
    experiment = load_experiment("digits_smoke", settings=SMALL)
    run_experiment(experiment, tmp_path)
    run = RunFolder(experiment, tmp_path, best_device())
    captions = [run.corpus.captions[row] for row in run.corpus.rows("train")]

    # The run's retriever is fitted on the captions of its training split.
    fitted = LexicalEncoder()
    fitted.fit(captions)
    found_BD = run.retriever.encoder.encode_texts(captions[:5])
    assert np.array_equal(found_BD, fitted.encode_texts(captions[:5]))
    assert NeighbourShards(tmp_path / "neighbours").shard(0).max() > 0

    # It has no CLIP model, so samples stay in the order of their seeds, which is said once.
    model = CM3Leon.load(tmp_path)
    assert np.isnan(model.clip_scores(captions[0], run.codes_MN[:2])).all()
    with pytest.warns(UnrankedWarning, match="lexical of this run has no CLIP") as said:
        both = model.generate(captions[:2], n=3, seed=7)
    assert len(said) == 1
    for pictures_of_one in both:
        assert [each.seed for each in pictures_of_one] == [7, 8, 9]
        assert all(np.isnan(each.score) for each in pictures_of_one)

    # A prompt among others is drawn as it is alone.
    (alone,) = model.generate(captions[1], seed=8)
    assert np.array_equal(alone.codes_N, both[1][1].codes_N)

    for ask in (model.edit, model.answer):
        with pytest.raises(UserError, match="needs a model that was fine-tuned on instructions"):
            ask(pictures(1)[0], "make it bold")

    # The CLIP of another run ranks the same images; a run without one cannot.
    other = tuned_model.run.folder
    ranked = CM3Leon.load(tmp_path, ranker=other).generate(captions[0], n=3, seed=7)
    encoder = tuned_model.run.retriever.encoder
    images_BHWC = np.stack([np.asarray(each.image) for each in both[0]])
    cosines_B = encoder.encode_images(images_BHWC) @ encoder.encode_texts(captions[:1])[0]
    best_first = np.argsort(-cosines_B)
    assert [each.seed for each in ranked] == [7 + index for index in best_first.tolist()]
    assert [each.score for each in ranked] == pytest.approx(cosines_B[best_first], abs=1e-6)
    with pytest.raises(UserError, match=r"ranker: the retriever lexical of .* has no CLIP"):
        CM3Leon.load(tmp_path, ranker=tmp_path)

    # An evaluation asks for several samples where a ranker is named, and knows answers by it.
    protocol = {"name": "corpus", "task": "text_to_image"}
    evaluation = Evaluation(PROTOCOLS.check(protocol), tmp_path / "answers")
    settings = (AskConfig(samples=2), AskConfig(samples=2, ranker=other))
    unranked, by_other = (Row("m", "m", tmp_path, setting, {}) for setting in settings)
    with pytest.raises(UserError, match=r"samples is 2, .* setting\.ranker must name a run"):
        evaluation.answer(unranked, [0])
    evaluation.answer(by_other, [0])
    (held,) = (tmp_path / "answers").rglob("*.npz")
    assert np.isfinite(read_answers(held)["clip"]).all()
    assert evaluation.folder_of(unranked) != evaluation.folder_of(by_other)
    with pytest.raises(UserError, match=r"setting\.ranker: .* finished retriever"):
        evaluation.identity(Row("m", "m", tmp_path, AskConfig(ranker=tmp_path / "no"), {}))


def test_one_word_is_enough_to_choose_it() -> None:
    said = "retriever_training is left out: the retriever lexical has nothing to train"
    with pytest.warns(Notice, match=said):
        experiment = load_experiment("digits_smoke", ["retriever=lexical"])
    assert experiment.retriever_training is None
    settings = {"retriever": {"name": "lexical"}, "retriever_training": None}
    assert load_experiment("digits_smoke", settings=settings) == experiment
