"""What the stage of tokens keeps of a document: varied versions, label, and row in the sample."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cm3leon.data.augment import AugmentConfig, varied
from cm3leon.data.corpus import Corpus
from cm3leon.experiment import ShardsConfig, load_experiment
from cm3leon.stages.sharing import is_shared_out
from cm3leon.stages.tokens import _varied_ids, sampled_rows
from cm3leon.stages.training_data import TrainingCorpus
from cm3leon.types import Document, ImageSegment, TextSegment, TokenDocument, TokenSegment

SIDE = 8


class Brightest:
    """As much of an image tokenizer as is needed: an image's codes are its two brightest rows."""

    image_size = SIDE

    def encode(self, images_BHWC: np.ndarray) -> np.ndarray:
        return np.argsort(-images_BHWC.sum((2, 3)).astype(int), axis=1, kind="stable")[:, :2]


def document(name: str, images: int) -> Document:
    """A document of a text and some random images."""
    rng = np.random.default_rng(len(name))
    segments = []
    for _ in range(images):
        segments.append(ImageSegment(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))
    return Document(name, (TextSegment("words"), *segments))


def varying_run() -> Any:
    """As much of a run as is needed to vary images three times."""
    return SimpleNamespace(
        experiment=SimpleNamespace(augment=AugmentConfig(versions=3), seed=5),
        image_tokenizer=Brightest(),
        vocab=SimpleNamespace(image_ids=lambda codes: codes + 100),
    )


def test_each_document_has_its_own_varied_images_whatever_is_beside_it() -> None:
    """The images are varied by the document's id and the seed alone."""
    documents = [document("a", 1), document("bb", 0), document("ccc", 2)]
    found = _varied_ids(varying_run(), documents)
    assert [ids_VN.shape for ids_VN in found] == [(3, 2), (3, 0), (3, 4)]

    (alone,) = _varied_ids(varying_run(), documents[2:])
    assert np.array_equal(alone, found[2])

    # A version's codes are those of the varied image; the second image is varied otherwise.
    first_HWC = documents[2].images[0]
    versions = varied(first_HWC[None], ["ccc"], AugmentConfig(versions=3), 5)
    expected_VN = np.concatenate([Brightest().encode(version) for version in versions]) + 100
    assert np.array_equal(found[2][:, :2], expected_VN)
    assert not np.array_equal(found[2][:, :2], found[2][:, 2:])


def test_documents_without_images_have_nothing_to_vary() -> None:
    (found,) = _varied_ids(varying_run(), [document("a", 0)])
    assert found.shape == (3, 0)
    assert _varied_ids(varying_run(), []) == []


def test_the_samples_documents_are_the_first_rows_of_their_shards() -> None:
    """Of a part's documents, two are sampled; one is not for training, another was too long."""
    shards = [["a", "long"], ["b", "c", "d"]]
    tokens = SimpleNamespace(
        shard=lambda number: Ids(shards[number]), first=lambda number: 2 * number
    )

    images_BHWC = np.zeros((3, 2, 2, 3), np.uint8)
    splits: Any = ["train", "train", "held_out"]
    run: Any = SimpleNamespace(
        corpus=Corpus(["a", "c", "held"], ["x"] * 3, images_BHWC, [None] * 3, splits),
        tokens=tokens,
        source=SimpleNamespace(parts=lambda: ["0", "1"]),
        shards=ShardsConfig(sample=4),
        experiment=SimpleNamespace(seed=0),
    )
    assert sampled_rows(run) == {"a": 0, "c": 3}


class Ids:
    """As much of a token shard as is needed: the ids of its documents."""

    def __init__(self, ids: list[str]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, row: int) -> str:
        return self._ids[row]


# ----------------------------------------------------------------------------------------- settings


def test_what_earlier_versions_wrote_of_a_corpus_in_memory_is_read(tmp_path: Path) -> None:
    assert load_experiment("digits", ["shards=null"]).shards == ShardsConfig()
    assert load_experiment("digits", sections={"shards": None}).shards == ShardsConfig()
    assert load_experiment("digits").shards.sample == 10_000


def test_a_corpus_of_few_parts_is_not_shared_out(tmp_path: Path) -> None:
    assert not is_shared_out(load_experiment("digits"))
    assert is_shared_out(load_experiment("corpus", [f"data.path={tmp_path}/nowhere/*.tar"]))


def shards(shared_maps: str | None) -> Any:
    """As much of token shards as is needed: a document's only id is 100 * number + version."""

    def made(number: int, version: int = 0) -> TokenDocument:
        segment = TokenSegment("image", np.array([100 * number + version]))
        return TokenDocument(str(number), (segment,))

    def drawn_version(rng: np.random.Generator) -> int:
        return int(rng.integers(9))

    return SimpleNamespace(
        shared_maps=shared_maps,
        document=made,
        drawn_version=drawn_version,
        drawn=lambda number, rng: made(number, drawn_version(rng)),
    )


@pytest.mark.parametrize("shared_maps", ["the same", None])
def test_a_sample_has_one_version_of_all_its_documents_where_the_maps_are_shared(
    shared_maps: str | None,
) -> None:
    config = SimpleNamespace(max_documents=2, random_count=False)
    experiment = SimpleNamespace(retriever=SimpleNamespace(config=config))
    run: Any = SimpleNamespace(experiment=experiment)

    # Two documents are retrieved, number 4 and number 7 of the bank.
    corpus = TrainingCorpus(Path("run"), run)
    neighbours = SimpleNamespace(draw=lambda row, **options: [4, 7])
    given = {"tokens": shards(shared_maps), "bank": shards(shared_maps), "neighbours": neighbours}
    corpus.__dict__.update(given)

    # Every version is drawn; where the maps are not shared, a sample may have three of them.
    counts = set()
    seen = set()
    for position in range(40):
        sample = corpus.sample(2, np.random.default_rng(position))
        ids = [int(d.segments[0].ids_T[0]) for d in (*sample.retrieved, sample.query)]
        assert [id_ // 100 for id_ in ids] == [4, 7, 2]
        versions = {id_ % 100 for id_ in ids}
        counts.add(len(versions))
        seen |= versions
    assert seen == set(range(9))
    expected = {1} if shared_maps else {1, 2, 3}
    assert counts == expected
