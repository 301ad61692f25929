"""Vector shards, their index and the memory bank on disk give what brute force in numpy gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from banks import bank_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.config import from_mapping
from cm3leon.data.shards import DamagedShard, shard_path, write_plan
from cm3leon.retrievers import search as search_module
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.dense import DenseRetriever
from cm3leon.retrievers.index import IndexConfig, add_shard, lists_for, merge, train
from cm3leon.retrievers.neighbours import (
    NeighbourShards,
    draw,
    finish_neighbours,
    neighbours_of,
    write_neighbour_shard,
)
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.recall import recall_at
from cm3leon.retrievers.search import exact_search
from cm3leon.retrievers.strategy import NONE
from cm3leon.retrievers.vectors import VectorShards, finish_vectors, write_vector_shard
from cm3leon.stages.index import make_index, make_index_part
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

WIDTH = 16
HEADER = {"encoder": "abc", "width": WIDTH}


def clustered(seed: int, rows: int) -> Parts:
    """Unit vectors around a few centres, as those of a real corpus are.

    Every fifth document has no image, and every seventh has no text.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, WIDTH))

    def around() -> np.ndarray:
        vectors_BD = centres[rng.integers(12, size=rows)] + 0.4 * rng.normal(size=(rows, WIDTH))
        unit_BD = vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True)
        return unit_BD.astype(np.float16).astype(np.float32)  # shards store float16

    parts = Parts(around(), around())
    parts.image_BD[::5] = 0
    parts.text_BD[1::7] = 0
    return parts


def write(folder: Path, parts: Parts, shards: int = 3, header: dict[str, Any] = HEADER) -> Path:
    """Vector shards of unequal sizes, the second one empty."""
    write_plan(folder, header)
    cuts = [0, len(parts.text_BD) // 3, len(parts.text_BD) // 3, len(parts.text_BD)][: shards + 1]
    for number in range(shards):
        chosen = slice(cuts[number], cuts[number + 1])
        ids = [f"document {row}" for row in range(len(parts.text_BD))][chosen]
        write_vector_shard(shard_path(folder, number, shards), ids, parts.rows(chosen), header)
    finish_vectors(folder, shards)
    return folder


def build(tmp_path: Path, parts: Parts, **fields: Any) -> tuple[Path, Path]:
    """Vectors and index of some documents."""
    vectors, folder = write(tmp_path / "vectors", parts), tmp_path / "index"
    config = from_mapping(IndexConfig, fields, "index")
    folder.mkdir()
    make(vectors, folder, config)
    return vectors, folder


def make(vectors: Path, folder: Path, config: IndexConfig) -> None:
    shards = VectorShards(vectors, HEADER)
    train(shards, folder, config, seed=0)
    for number in range(shards.count):
        add_shard(shards, number, folder)
    merge(shards, folder, config, seed=0)


SMALL_IVF = {"exact_below": 0, "code_bytes": 8, "lists": 8, "rescored": 50, "recall_queries": 100}


# ------------------------------------------------------------------------------------------ vectors


@given(st.lists(st.integers(-1, 59), max_size=40))
@settings(max_examples=25)
def test_rows_in_any_order_are_those_that_were_written(rows: list[int]) -> None:
    import tempfile

    parts = clustered(0, 60)
    with tempfile.TemporaryDirectory() as folder:
        vectors = VectorShards(write(Path(folder) / "vectors", parts), HEADER)
        assert (len(vectors), vectors.count, vectors.width) == (60, 3, WIDTH)
        got = vectors.parts(np.array(rows, np.int64))

        # Row -1 is no document, and has zeros.
        for index, row in enumerate(rows):
            text_D, image_D = np.zeros(WIDTH), np.zeros(WIDTH)
            if row >= 0:
                text_D, image_D = parts.text_BD[row], parts.image_BD[row]
            assert np.array_equal(got.text_BD[index], text_D)
            assert np.array_equal(got.image_BD[index], image_D)
            assert row < 0 or vectors.id(row) == f"document {row}"


def test_another_encoder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "vectors", clustered(0, 9))
    with pytest.raises(
        UserError, match="was made by another encoder: encoder is abc there and xyz here; use that"
    ):
        VectorShards(folder, {**HEADER, "encoder": "xyz"})
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="is not a finished folder of shards"):
        VectorShards(folder)


def test_damaged_vectors_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "vectors", clustered(0, 90))
    damaged = shard_path(folder, 2, 3)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    with pytest.raises(DamagedShard, match=f"{damaged.name} is damaged"):
        finish_vectors(folder, 3)


# -------------------------------------------------------------------------------------------- index


def brute_force(parts: Parts, queries_QD: np.ndarray, count: int) -> np.ndarray:
    """Rows (Q, count) of the documents with the largest inner products, the largest first."""
    scores_QB = queries_QD.astype(np.float64) @ parts.mean().T
    return np.argsort(-scores_QB, axis=1, kind="stable")[:, :count]


def assert_best(parts: Parts, queries_QD: np.ndarray, found_QK: np.ndarray) -> None:
    """Check that the rows found have the largest inner products, in falling order.

    Scores are compared, as rows of equal score may come in any order.
    """
    expected_QK = brute_force(parts, queries_QD, found_QK.shape[1])
    scores_QB = queries_QD.astype(np.float64) @ parts.mean().T
    got = np.take_along_axis(scores_QB, found_QK, axis=1)
    best = np.take_along_axis(scores_QB, expected_QK, axis=1)
    np.testing.assert_allclose(got, best, atol=1e-6)
    assert all(len(set(rows_K)) == len(rows_K) for rows_K in found_QK.tolist())


@pytest.mark.parametrize("piece", [7, 2**18])
def test_exact_search_through_all_shards_is_brute_force(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "PIECE", piece)
    parts, queries = clustered(0, 200), clustered(1, 20).text_BD
    vectors = VectorShards(write(tmp_path / "vectors", parts))
    assert_best(parts, queries, exact_search(vectors, queries, 7))
    assert (exact_search(vectors, queries, 300)[:, 200:] == NONE).all()


def test_a_small_bank_is_searched_exactly(tmp_path: Path) -> None:
    parts, queries = clustered(0, 200), clustered(1, 20).text_BD
    vectors, folder = build(tmp_path, parts)
    assert sorted(file.name for file in folder.iterdir()) == ["index.json"]
    figures = json.loads((folder / "index.json").read_text())
    whole = {"text": {"2": 1.0, "10": 1.0}, "image": {"2": 1.0, "10": 1.0}}
    assert (figures["kind"], figures["documents"], figures["recall"]) == ("exact", 200, whole)

    bank = Bank(vectors, folder, HEADER)
    assert_best(parts, queries, bank.search(queries, 5))


def test_the_recall_that_is_written_is_that_of_a_search(tmp_path: Path) -> None:
    parts = clustered(0, 3000)
    vectors, folder = build(tmp_path, parts, **SMALL_IVF)
    figures = json.loads((folder / "index.json").read_text())
    assert (figures["kind"], figures["lists"]) == ("ivf_pq", 8)

    # Lists are probed until the recall reaches its target, or there are no more.
    lowest = min(of["2"] for of in figures["recall"].values())
    assert lowest >= 0.95 or figures["nprobe"] == 8
    assert lowest > 0.8
    assert 8 < figures["bytes_per_document"] < 200

    # The queries are documents of the bank; a query's own document is neither expected nor counted.
    bank = Bank(vectors, folder, HEADER)
    rows = np.random.default_rng([0, 1]).choice(3000, 100, False)
    for by, vectors_BD in (("text", parts.text_BD), ("image", parts.image_BD)):
        asked = [row for row in rows.tolist() if vectors_BD[row].any()]
        assert 50 < len(asked) < 100
        found_QK = bank.search(vectors_BD[asked], 11)
        exact_QK = brute_force(parts, vectors_BD[asked], 11)
        for k in (2, 10):
            hits = []
            for own, exact_K, found_K in zip(asked, exact_QK, found_QK, strict=True):
                best = [row for row in exact_K.tolist() if row != own][:k]
                found = [row for row in found_K.tolist() if row != own][:k]
                hits.append(len(set(found) & set(best)) / k)
            assert figures["recall"][by][str(k)] == pytest.approx(np.mean(hits))


def test_only_pairs_are_in_an_index_that_is_for_pairs(tmp_path: Path) -> None:
    parts = clustered(0, 3000)
    pairs = np.flatnonzero(parts.has("text") & parts.has("image"))
    vectors = VectorShards(write(tmp_path / "vectors", parts), HEADER)
    queries_QD = clustered(1, 20).text_BD
    queries_QD = queries_QD[queries_QD.any(axis=1)]

    by_codes = {**SMALL_IVF, "code_bytes": 1, "rescored": 3000, "recall_target": 1.0}
    for kind, fields in (("exact", {}), ("ivf_pq", by_codes)):
        config, folder = from_mapping(IndexConfig, fields, "index"), tmp_path / kind
        folder.mkdir()
        train(vectors, folder, config, 0, pairs_only=True)
        for number in range(vectors.count):
            add_shard(vectors, number, folder, pairs_only=True)
        merge(vectors, folder, config, 0, pairs_only=True)

        figures = json.loads((folder / "index.json").read_text())
        assert (figures["kind"], figures["pairs_only"]) == (kind, True)
        assert (figures["documents"], figures["vectors"]) == (3000, len(pairs))

        bank = Bank(vectors.folder, folder)
        assert (len(bank), bank.searchable) == (3000, len(pairs))
        found_QK = bank.search(queries_QD, 5)
        exact_QK = pairs[brute_force(parts.rows(pairs), queries_QD, 5)]
        assert set(found_QK.ravel()) <= set(pairs)
        assert recall_at(exact_QK, found_QK, 5) > (0.99 if kind == "exact" else 0.8)

        # Of the documents that are added, too, only pairs are found; the others have their rows.
        more = clustered(2, 30)
        rows = bank.add([f"new {n}" for n in range(30)], more)
        assert bank.searchable == len(pairs) + (more.has("text") & more.has("image")).sum()
        single = int(np.flatnonzero(~more.has("image"))[0])
        found_K = bank.search(more.text_BD[[single]], 6)[0]
        assert rows[single] not in found_K
        assert bank.id(int(rows[single])) == f"new {single}"


def test_lists_are_probed_until_there_are_as_many_documents_as_asked_for(tmp_path: Path) -> None:
    fields = {**SMALL_IVF, "code_bytes": 1, "rescored": 1, "recall_target": 0.0}
    vectors, folder = build(tmp_path, clustered(0, 400), **fields)
    bank = Bank(vectors, folder)
    assert json.loads((folder / "index.json").read_text())["nprobe"] == 1

    # One list would do for the recall; all 400 documents need all lists.
    found_QK = bank.search(clustered(1, 20).text_BD, 400)
    assert np.array_equal(np.sort(found_QK, axis=1), np.tile(np.arange(400), (20, 1)))


def test_found_documents_are_ordered_by_their_vectors_not_their_codes(tmp_path: Path) -> None:
    parts = clustered(0, 2000)
    vectors, folder = build(
        tmp_path, parts, **{**SMALL_IVF, "recall_target": 1.0, "rescored": 2000}
    )
    queries_QD = clustered(1, 50).text_BD
    # With all lists probed and all candidates ordered by their vectors, it is exact search.
    assert_best(parts, queries_QD, Bank(vectors, folder).search(queries_QD, 2000)[:, :10])


def test_recall_by_hand() -> None:
    exact, found = np.array([[1, 2, 3], [4, 5, NONE]]), np.array([[2, 9, 1], [4, NONE, 5]])
    assert recall_at(exact, found, 1) == pytest.approx(1 / 2)
    assert recall_at(exact, found, 2) == pytest.approx(2 / 4)
    assert recall_at(exact, found, 3) == pytest.approx(4 / 5)


def test_lists_grow_with_the_square_root() -> None:
    sizes = (200_000, 1_000_000, 340_000_000)
    assert [lists_for(n, IndexConfig()) for n in sizes] == [2048, 4096, 65_536]
    assert lists_for(10, IndexConfig(lists=3)) == 3


def test_pieces_are_made_once_and_the_missing_one_again(tmp_path: Path) -> None:
    parts = clustered(0, 2000)
    vectors, folder = build(tmp_path, parts, **SMALL_IVF)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("piece-*")}

    (folder / "piece-00002.faiss").unlink()
    (folder / "index.json").unlink()
    make(vectors, folder, from_mapping(IndexConfig, SMALL_IVF, "index"))

    after = {file.name: file.read_bytes() for file in folder.iterdir()}

    # All but index.json, which holds seconds, is the same to the byte.
    del before["index.json"], after["index.json"]
    assert after == before

    # Pieces that were there are not written again.
    changed = [name for name, time in times.items() if (folder / name).stat().st_mtime_ns != time]
    assert changed == ["piece-00002.faiss"]


def test_workers_share_the_pieces_of_an_index(tmp_path: Path) -> None:
    vectors, alone = build(tmp_path, clustered(0, 2000), **SMALL_IVF)
    folder = tmp_path / "shared"
    folder.mkdir()
    experiment = SimpleNamespace(index=from_mapping(IndexConfig, SMALL_IVF, "index"), seed=0)
    run: Any = SimpleNamespace(
        vectors=VectorShards(vectors),
        experiment=experiment,
        shards=SimpleNamespace(workers=1),
        folder=tmp_path,
        retrieves_pairs_only=False,
    )

    # The second of two workers trains, as nobody has yet, and makes every second piece.
    make_index_part(run, folder, (1, 2))
    written = sorted(file.name for file in folder.glob("*.faiss"))
    assert written == ["piece-00001.faiss", "trained.faiss"]
    make_index_part(run, folder, (0, 2))
    assert len(list(folder.glob("piece-*.faiss"))) == 3

    make_index(run, folder)
    queries_QD = clustered(1, 20).image_BD
    expected_QK = Bank(vectors, alone).search(queries_QD, 5)
    assert np.array_equal(Bank(vectors, folder).search(queries_QD, 5), expected_QK)


def test_few_documents_are_searched_exactly_whatever_is_asked_for(tmp_path: Path) -> None:
    vectors, folder = build(tmp_path, clustered(0, 200), **SMALL_IVF)
    assert json.loads((folder / "index.json").read_text())["kind"] == "exact"
    assert len(Bank(vectors, folder)) == 200


def test_the_folder_can_be_moved(tmp_path: Path) -> None:
    parts = clustered(0, 2000)
    vectors, folder = build(tmp_path, parts, **SMALL_IVF)
    queries_QD = clustered(1, 20).image_BD
    expected = Bank(vectors, folder).search(queries_QD, 5)
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    assert np.array_equal(Bank(vectors, moved).search(queries_QD, 5), expected)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    write(tmp_path / "enough", clustered(0, 300))
    shards, config = VectorShards(tmp_path / "enough"), IndexConfig(exact_below=0, code_bytes=5)
    with pytest.raises(
        UserError, match=r"index\.code_bytes is 5; it must divide the vectors' width, 16"
    ):
        train(shards, tmp_path, config, seed=0)

    vectors, folder = build(tmp_path, clustered(0, 60))
    write(tmp_path / "more", clustered(0, 90))
    with pytest.raises(
        UserError, match=r"is the index of 60 documents, .* has 90; make the index again"
    ):
        Bank(tmp_path / "more", folder)

    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="holds no finished index"):
        Bank(vectors, folder)


# ------------------------------------------------------------------------------------------- adding


@pytest.mark.parametrize("fields", [{}, SMALL_IVF], ids=["exact", "ivf_pq"])
def test_documents_are_added_without_a_rebuild(tmp_path: Path, fields: dict[str, Any]) -> None:
    parts, more = clustered(0, 2000), clustered(2, 30)
    vectors, folder = build(tmp_path, parts, **fields)
    bank = Bank(vectors, folder)

    # Added twice, their rows follow those of the index.
    ids = [f"new {n}" for n in range(30)]
    first_rows = bank.add(ids[:20], more.rows(slice(0, 20)))
    assert first_rows.tolist() == list(range(2000, 2020))
    second_rows = bank.add(ids[20:], more.rows(slice(20, 30)))
    assert second_rows.tolist() == list(range(2020, 2030))

    # Those of the best that were added are found, and all that is found is in falling order.
    every = Parts.concatenate([parts, more])
    for by in ("text_BD", "image_BD"):
        queries_QD = getattr(more, by)[[2, 4]]  # documents with both parts
        found_QK = bank.search(queries_QD, 6)
        exact_QK = brute_force(every, queries_QD, 6)
        added = exact_QK >= 2000
        assert added.any()
        for q in range(2):
            assert set(exact_QK[q][added[q]]) <= set(found_QK[q])
            scores = every.mean()[found_QK[q]] @ queries_QD[q]
            assert (np.diff(scores) <= 1e-6).all()

    # Ids and vectors of old rows and new ones.
    assert (len(bank), bank.id(1999), bank.id(2021)) == (2030, "document 1999", "new 21")
    got = bank.parts_of(np.array([[2003, NONE], [5, 2029]]))
    assert np.array_equal(got.text_BD[0, 0], more.text_BD[3])
    assert not got.text_BD[0, 1].any()
    assert np.array_equal(got.image_BD[1], np.stack([parts.image_BD[5], more.image_BD[29]]))

    bank.save_added()
    again = Bank(vectors, folder)
    assert (len(again), again.id(2021)) == (2030, "new 21")
    assert len(Bank(vectors, folder, with_added=False)) == 2000
    queries_QD = clustered(5, 10).text_BD
    assert np.array_equal(again.search(queries_QD, 6), bank.search(queries_QD, 6))


# --------------------------------------------------------------------------------------- neighbours


@pytest.fixture(scope="module")
def retriever() -> Any:
    from cm3leon.registry import RETRIEVERS, discover

    discover()
    encoder = {
        "architecture": None,
        "image_size": 16,
        "patch_size": 8,
        "width": 16,
        "layers": 1,
        "embed_dim": WIDTH,
    }
    return RETRIEVERS.build({"name": "dense", "encoder": encoder, "candidates": 12})


def test_a_bank_of_several_shards_retrieves_as_one_of_one_shard(
    tmp_path: Path, retriever: DenseRetriever
) -> None:
    parts = clustered(0, 300)
    vectors, folder = build(tmp_path, parts)
    own = np.arange(300)
    variants = [parts, clustered(3, 300)]

    expected, verdicts = neighbours_of(retriever, bank_of(parts), variants, own, like=parts)
    found, counted = neighbours_of(retriever, Bank(vectors, folder), variants, own, like=parts)

    assert np.array_equal(found, expected)
    assert counted == verdicts
    assert verdicts["itself"] > 0
    assert verdicts["modality"] > 0

    # No document is its own neighbour, and all neighbours have text and image.
    assert (found != own[None, :, None]).all()
    complete = parts.has("text") & parts.has("image")
    assert complete[found[found != NONE]].all()


def test_neighbours_are_read_back_from_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows_VBK = rng.integers(-1, 50, (4, 30, 4))
    write_plan(tmp_path, {"bank": ".."})
    for number, chosen in enumerate((slice(0, 11), slice(11, 11), slice(11, 30))):
        path = shard_path(tmp_path, number, 3)
        write_neighbour_shard(path, rows_VBK[:, chosen], {"verdicts": {}})
    # The folder counts only when it is finished.
    with pytest.raises(UserError, match="is not a finished folder"):
        NeighbourShards(tmp_path)

    finish_neighbours(tmp_path, 3)
    shards = NeighbourShards(tmp_path)
    assert np.array_equal(shards.shard(2), rows_VBK[:, 11:].transpose(1, 0, 2).reshape(19, 16))
    assert len(shards) == 30

    for document in range(30):
        assert np.array_equal(shards.rows(document), rows_VBK[:, document])
        one, other = np.random.default_rng(document), np.random.default_rng(document)
        drawn = shards.draw(document, most=3, random_count=True, rng=one)
        assert drawn == draw(rows_VBK[:, document], most=3, random_count=True, rng=other)


def test_damaged_neighbours_are_named_when_they_are_drawn(tmp_path: Path) -> None:
    rows_VBK = np.random.default_rng(0).integers(0, 50, (4, 30, 4))
    path = shard_path(tmp_path, 0, 1)
    write_neighbour_shard(path, rows_VBK, {})
    finish_neighbours(tmp_path, 1)

    # One bit of row 7.
    content = bytearray(path.read_bytes())
    start = content.index(rows_VBK[:, 7].astype(np.int32).tobytes())
    content[start + 5] ^= 1
    path.write_bytes(content)

    shards = NeighbourShards(tmp_path)
    assert np.array_equal(shards.rows(6), rows_VBK[:, 6])
    with pytest.raises(DamagedShard, match=rf"{path.name}: row 7 is damaged"):
        shards.draw(7, most=3, random_count=True, rng=np.random.default_rng(0))
