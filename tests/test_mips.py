"""FAISS on GPUs: what is moved there, what stays on the CPU and why, and that results are the same.

A stand-in for GPUs runs everywhere; the last section repeats the comparison on real ones.

The stand-in has the functions of FAISS 1.15's Python interface that are called, with their limits:
results and probes up to 2048, and codes of certain lengths only. It divides indexes among its GPUs
as FAISS does and searches them on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import faiss
import faiss.contrib.ondisk
import numpy as np
import pytest
import torch
from test_index import SMALL_IVF, build, clustered

from cm3leon.retrievers import mips
from cm3leon.retrievers.bank import Bank
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

Made = tuple[tuple[Path, Path], np.ndarray]
"""Folders of a bank's vectors and of its index, and what a search on the CPU finds in it."""
DOCUMENTS = 2000
# No query is zero: a zero query would score all documents alike.
QUERIES_QD = clustered(1, 30).image_BD[1:5]


class GpuIndex:
    """An index on GPUs; its vectors are divided by their row modulo the number of GPUs."""

    def __init__(self, gpus: Gpus, index: Any, shards: int) -> None:
        self._gpus = gpus
        self.parts = [self._share(index, shards, number) for number in range(shards)]
        self._all = faiss.IndexShards(index.d, False, False)
        for part in self.parts:
            self._all.add_shard(part)

    @staticmethod
    def _share(index: Any, shards: int, number: int) -> Any:
        # A flat index is copied whole; of inverted lists, each GPU gets every n-th vector.
        if not hasattr(index, "nlist"):
            return faiss.clone_index(index)
        part = faiss.IndexIVFPQ(
            index.quantizer, index.d, index.nlist, index.pq.M, 8, index.metric_type
        )
        part.pq, part.is_trained, part.referenced_objects = index.pq, True, [index]
        index.copy_subset_to(part, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, shards, number)
        return part

    def add_with_ids(self, vectors_BD: np.ndarray, rows_B: np.ndarray) -> None:
        self._all.add_with_ids(vectors_BD, rows_B)

    def search(self, queries_QD: np.ndarray, count: int, *, params: Any = None) -> Any:
        self._gpus.calls.append("search")
        if count > 2048 or (params is not None and params.nprobe > 2048):
            raise RuntimeError("Error: GPU index only supports min/max-K selection up to 2048")
        return self._all.search(queries_QD, count, params=params)


class Gpus(ModuleType):
    """The module `faiss` as in a build for GPUs; `free` is the memory of each GPU in bytes."""

    StandardGpuResources = SimpleNamespace
    code_lengths = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)

    def __init__(self, free: Sequence[int]) -> None:
        super().__init__("faiss")
        self.free = list(free)
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(faiss, name)

    def get_num_gpus(self) -> int:
        return len(self.free)

    def GpuMultipleClonerOptions(self) -> SimpleNamespace:
        """Options as in some builds with cuVS, which use it unless the caller turns it off."""
        return SimpleNamespace(use_cuvs=True)

    def index_cpu_to_gpu_multiple_py(
        self, resources: list[Any], index: Any, co: Any, gpus: Sequence[int]
    ) -> Any:
        assert len(resources) == len(gpus)
        assert not co.use_cuvs  # it has other results

        # A flat index is used for k-means and for exact search.
        if not hasattr(index, "nlist"):
            self.calls.append(f"flat on {list(gpus)}")
            assert not co.useFloat16  # it would be rounded, and search no longer exact
            return faiss.clone_index(index) if not co.shard else GpuIndex(self, index, 1)

        self.calls.append(f"lists on {list(gpus)}")
        assert co.shard
        if index.pq.M not in self.code_lengths:
            raise RuntimeError(
                f"Error in verifyPQSettings_: Error: 'x' failed: a code of {index.pq.M} bytes"
            )
        return GpuIndex(self, index, len(gpus))

    def index_gpu_to_cpu(self, index: GpuIndex) -> Any:
        self.calls.append("back")
        whole, *others = index.parts
        for part in others:
            whole.merge_from(part, 0)
        return whole

    def knn_gpu(
        self, resources: Any, queries: Any, vectors: Any, count: int, *, metric: int, device: int
    ) -> Any:
        self.calls.append(f"knn on {device}")
        assert count <= min(2048, len(vectors))
        return faiss.knn(queries, vectors, count, metric=metric)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """One GPU with 80 GB of free memory."""
    stand_in = Gpus([80 * 10**9])
    monkeypatch.setitem(sys.modules, "faiss", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (stand_in.free[gpu], 80 * 10**9))
    mips._resources.cache_clear()
    yield stand_in
    mips._resources.cache_clear()


def left_for(vectors: int) -> int:
    """Free memory of a GPU that has room for the index of that many vectors, and no more."""
    index_bytes = (
        vectors * (SMALL_IVF["code_bytes"] + mips.ID_BYTES) + 2 * SMALL_IVF["lists"] * 16 * 4
    )
    return int((index_bytes + mips.SCRATCH) / mips.SHARE) + 1


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bank that is searched exactly, and what is found in it on the CPU."""
    made = build(tmp_path_factory.mktemp("exact"), clustered(0, DOCUMENTS))
    return made, Bank(*made).search(QUERIES_QD, 8)


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bank of inverted lists, and what is found in it on the CPU."""
    made = build(tmp_path_factory.mktemp("inverted"), clustered(0, DOCUMENTS), **SMALL_IVF)
    bank = Bank(*made)
    assert bank.place == "CPU"
    return made, bank.search(QUERIES_QD, 8)


# ----------------------------------------------------------------------------- where it is searched


@pytest.mark.parametrize("kind", ["exact", "inverted"])
def test_a_bank_is_searched_on_the_gpu(kind: str, exact: Made, inverted: Made, gpus: Gpus) -> None:
    made, expected_QK = exact if kind == "exact" else inverted
    bank = Bank(*made)
    assert bank.place == "GPU 0"
    assert np.array_equal(bank.search(QUERIES_QD, 8), expected_QK)
    assert gpus.calls == [f"{'flat' if kind == 'exact' else 'lists'} on [0]", "search"]


@pytest.mark.parametrize(
    ("vectors", "place"),
    [
        ([DOCUMENTS], "GPU 0"),
        ([DOCUMENTS - 1, DOCUMENTS], "GPU 1"),
        ([DOCUMENTS - 1, DOCUMENTS // 2, DOCUMENTS // 4], "GPU 0, 1"),
        ([DOCUMENTS // 2 - 1, DOCUMENTS, DOCUMENTS + 1], "GPU 2"),
        ([DOCUMENTS // 2 - 1] * 3, "GPU 0, 1, 2"),
        (
            [DOCUMENTS - 1],
            "CPU, as 1 GPUs would have to hold 3.3e-05 GB each, and have less left",
        ),
        (
            [0, DOCUMENTS // 2 - 1],
            "CPU, as 2 GPUs would have to hold 1.7e-05 GB each, and have less left",
        ),
    ],
)
def test_the_fewest_gpus_that_hold_it_share_it(
    vectors: list[int], place: str, gpus: Gpus, inverted: Made
) -> None:
    made, expected_QK = inverted
    gpus.free = [left_for(count) for count in vectors]
    bank = Bank(*made)
    assert bank.place == place
    assert np.array_equal(bank.search(QUERIES_QD, 8), expected_QK)
    assert ("search" in gpus.calls) == place.startswith("GPU")


def test_one_of_several_processes_has_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, gpus: Gpus, inverted: Made
) -> None:
    gpus.free = [80 * 10**9, left_for(DOCUMENTS)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Bank(*inverted[0]).place == "GPU 1"

    # GPU 0 still has room enough, but it belongs to another process.
    gpus.free[1] -= 1000
    assert Bank(*inverted[0]).place.startswith("CPU, as 1 GPUs would")


def test_what_faiss_refuses_stays_on_the_cpu(gpus: Gpus, inverted: Made) -> None:
    gpus.code_lengths = (64,)
    bank = Bank(*inverted[0])
    assert bank.place == "CPU, as FAISS refuses the GPU: 'x' failed: a code of 8 bytes"
    assert np.array_equal(bank.search(QUERIES_QD, 8), inverted[1])


@pytest.mark.parametrize(
    ("count", "nprobe", "on_gpu"), [(2048, 2048, True), (2049, 1, False), (5, 2049, False)]
)
def test_what_a_gpu_cannot_do_is_done_on_the_cpu(
    count: int, nprobe: int, on_gpu: bool, inverted: Made, gpus: Gpus
) -> None:
    searcher = mips.Searcher(faiss.read_index(str(inverted[0][1] / "trained.faiss")))
    gpus.calls.clear()
    assert searcher.search(QUERIES_QD, count, nprobe=nprobe).shape == (len(QUERIES_QD), count)
    assert gpus.calls == (["search"] if on_gpu else [])


# ----------------------------------------------------------------------------------------- building


@pytest.mark.parametrize(
    "free", [[80 * 10**9], [left_for(DOCUMENTS // 3 + 1)] * 2], ids=["one", "two"]
)
def test_an_index_is_built_on_gpus(
    free: list[int], tmp_path: Path, gpus: Gpus, inverted: Made
) -> None:
    gpus.free = free
    vectors, folder = build(tmp_path, clustered(0, DOCUMENTS), **SMALL_IVF)

    every = list(range(len(free)))
    assert gpus.calls[0] == f"flat on {every}"  # k-means
    assert gpus.calls.count("back") == 3
    assert f"lists on {every}" in gpus.calls
    # Only the one large GPU has room for the vectors themselves, besides the index.
    assert ("knn on 0" in gpus.calls) == (len(free) == 1)
    assert np.array_equal(Bank(vectors, folder).search(QUERIES_QD, 8), inverted[1])


# -------------------------------------------------------------------------------------- the library


@pytest.mark.parametrize(
    ("installed", "refused"),
    [
        (["faiss-cpu"], ""),
        (["faiss-gpu"], ""),
        (["faiss-gpu-cuvs"], ""),
        (["faiss-cpu", "faiss-gpu"], "faiss-cpu and faiss-gpu are installed together"),
        (["faiss-gpu-cuvs", "faiss-gpu"], "faiss-gpu and faiss-gpu-cuvs are installed together"),
        (["faiss-gpu-cuvs", "faiss-cpu"], "faiss-cpu and faiss-gpu-cuvs are installed together"),
    ],
)
def test_one_package_of_faiss_serves_and_two_are_refused(
    installed: list[str], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mips, "_is_installed", installed.__contains__)
    mips._check_packages.cache_clear()
    try:
        if refused:
            with pytest.raises(UserError, match=f"^{refused} and overwrite each other"):
                mips.import_faiss()
        else:
            assert mips.import_faiss() is faiss
    finally:
        mips._check_packages.cache_clear()


@pytest.mark.parametrize(
    ("version", "threshold", "chosen"),
    [("1.12", 20, 20), ("1.15", 128_000, 1_600), ("later", 800, 800)],
)
def test_exact_search_takes_matrix_products_early(
    version: str, threshold: int, chosen: int
) -> None:
    stand_in = SimpleNamespace(
        cvar=SimpleNamespace(distance_compute_blas_threshold=threshold),
        omp_get_max_threads=lambda: 2,
    )
    for _ in range(2):  # a second import changes nothing
        mips._take_products_early(stand_in)
        assert stand_in.cvar.distance_compute_blas_threshold == chosen, version


def test_a_worker_of_several_searches_on_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: Gpus, inverted: Made
) -> None:
    gpus.free = [80 * 10**9] * 4
    monkeypatch.setattr(mips.multiprocessing, "parent_process", lambda: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert Bank(*inverted[0]).place == "GPU 2"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RuntimeError", "faiss-gpu installed but nvidia-cublas-cu12 is missing"),
        ("RuntimeError", "faiss-gpu-cuvs installed but the cuVS runtime wheels are missing"),
        ("OSError", "libcuvs.so: cannot open shared object file"),
    ],
)
def test_missing_libraries_of_cuda_are_one_sentence(
    kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faiss.py").write_text(f"raise {kind}({said!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss")
    with pytest.raises(UserError, match=f"faiss cannot be loaded: {said}"):
        mips.import_faiss()


# ------------------------------------------------------------------------------------------ on GPUs

needs_gpu = pytest.mark.skipif(
    not faiss.get_num_gpus(), reason="needs a GPU and FAISS built for GPUs"
)


@pytest.fixture
def cpu_alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No GPU is used until this patch is undone."""
    monkeypatch.setattr(mips, "_gpus", tuple)
    return monkeypatch


def same_up_to_ties(found_QK: np.ndarray, expected_QK: np.ndarray, vectors_MD: np.ndarray) -> float:
    """Share of the results that are as near to their query as the expected ones."""
    scores_QM = QUERIES_QD.astype(np.float64) @ vectors_MD.T
    found = np.take_along_axis(scores_QM, found_QK, axis=1)
    expected = np.take_along_axis(scores_QM, expected_QK, axis=1)
    return float((np.abs(found - expected) < 1e-5).mean())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("fields", "least"), [({}, 1.0), (SMALL_IVF, 0.95)], ids=["exact", "inverted"]
)
def test_a_gpu_finds_what_a_cpu_finds(
    fields: dict[str, Any], least: float, tmp_path: Path, cpu_alone: pytest.MonkeyPatch
) -> None:
    parts = clustered(0, DOCUMENTS)
    made = build(tmp_path, parts, **fields)
    expected_QK = Bank(*made).search(QUERIES_QD, 8)

    cpu_alone.undo()
    bank = Bank(*made)
    assert bank.place.startswith("GPU")
    assert same_up_to_ties(bank.search(QUERIES_QD, 8), expected_QK, parts.mean()) >= least


@pytest.mark.gpu
@needs_gpu
def test_an_index_built_on_a_gpu_finds_what_one_built_on_a_cpu_finds(
    tmp_path: Path, cpu_alone: pytest.MonkeyPatch
) -> None:
    # Every list is searched, for k-means on a GPU may find other lists.
    parts, all_lists = clustered(0, DOCUMENTS), {**SMALL_IVF, "recall_target": 1.0, "rescored": 500}
    for name in ("cpu", "gpu"):
        (tmp_path / name).mkdir()
    expected_QK = Bank(*build(tmp_path / "cpu", parts, **all_lists)).search(QUERIES_QD, 8)

    cpu_alone.undo()
    bank = Bank(*build(tmp_path / "gpu", parts, **all_lists))
    assert bank.place.startswith("GPU")
    assert same_up_to_ties(bank.search(QUERIES_QD, 8), expected_QK, parts.mean()) >= 0.95
