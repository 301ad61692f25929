"""Maximum inner product search by FAISS, on GPUs if it was built for them and a driver exists.

What a GPU has no room for, or cannot do, is done on the CPU, with the same results up to ties:
exact search is exact on both, and candidates found by codes are ordered by their exact vectors.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from cm3leon.types import UserError

PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12", "faiss-gpu-cu11")
"""Distributions of FAISS. Any one of them will do; all install the module `faiss`."""
MOST = 2048
"""Most results of a search on a GPU, and most lists that it probes."""
SHARE = 0.8
"""Share of a GPU's free memory that an index may take."""
SCRATCH = 3 * 2**29
"""Bytes that FAISS holds on a GPU besides the indexes."""
ID_BYTES = 8
"""Bytes of the number of a vector in an inverted list."""
SLOW_THRESHOLD = 128_000
"""Numbers among the queries of a search from which FAISS 1.15 takes matrix products, however few
threads it has."""
THRESHOLD_A_THREAD = 800
"""The same for one thread, as FAISS measured it (its pull request 5109): a search of 256 queries of
449 numbers takes a tenth of the time."""


def import_faiss() -> Any:
    """The module `faiss`.

    Raises:
        UserError: if it is not installed, is installed twice, or lacks CUDA's libraries.
    """
    _check_packages()
    try:
        import faiss

        _take_products_early(faiss)
    except ImportError as error:
        raise UserError(
            "faiss is not installed: pip install faiss-cpu (on a cluster faiss-gpu, which brings "
            "CUDA 12, or faiss-gpu-cuvs, which brings CUDA 13)"
        ) from error
    except (RuntimeError, OSError) as error:  # without the libraries that those for GPUs need
        raise UserError(f"faiss cannot be loaded: {error}") from error
    return faiss


def _take_products_early(faiss: Any) -> None:
    """Let exact search take matrix products as soon as they are faster with so many threads.

    Other versions have other thresholds, which are left alone.
    """
    if faiss.cvar.distance_compute_blas_threshold == SLOW_THRESHOLD:
        threads = faiss.omp_get_max_threads()
        faiss.cvar.distance_compute_blas_threshold = THRESHOLD_A_THREAD * threads


@cache
def _check_packages() -> None:
    """Raise UserError if several distributions are installed: each overwrites files of the others,
    so that without a warning GPUs are not used, or the import fails."""
    found = [name for name in PACKAGES if _is_installed(name)]
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(found)} are installed together and overwrite each other; pip uninstall "
            "all of them, then install one again"
        )


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# ---------------------------------------------------------------------------------------- searching


class Searcher:
    """An index, searched on GPUs if they have room for a copy of it.

    `place` says where, and why FAISS's GPUs are not used if it has some.
    """

    def __init__(self, index: Any) -> None:
        self._index = index
        self._copy, self.place = _copy_on_gpus(index)

    def search(
        self, queries_QD: np.ndarray, count: int, *, nprobe: int | None = None
    ) -> np.ndarray:
        """Rows (Q, count) of the best vectors, the highest score first; -1 if there are fewer.

        Args:
            nprobe: inverted lists to look through, for an index that has them.
        """
        within = max(count, nprobe or 0) <= MOST
        index = self._copy if within and self._copy is not None else self._index
        parameters = None if nprobe is None else import_faiss().SearchParametersIVF(nprobe=nprobe)
        return index.search(queries_QD, count, params=parameters)[1]


def largest(
    queries_QD: np.ndarray, vectors_MD: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest inner products of each query and the rows of their vectors, (Q,
    count) each.

    There must be at least `count` vectors.
    """
    faiss = import_faiss()
    metric = faiss.METRIC_INNER_PRODUCT
    gpus = _gpus_with(queries_QD.nbytes + vectors_MD.nbytes)
    if not gpus or count > MOST:
        return faiss.knn(queries_QD, vectors_MD, count, metric=metric)
    return faiss.knn_gpu(
        _resources(gpus[0]), queries_QD, vectors_MD, count, metric=metric, device=gpus[0]
    )


# ------------------------------------------------------------------------------------------- making


def train_index(index: Any, vectors_BD: np.ndarray) -> None:
    """Train an index of inverted lists on the CPU, with its k-means on all GPUs."""
    faiss = import_faiss()
    gpus = _gpus_with(4 * index.nlist * index.d)
    assigner = _copied(faiss.IndexFlatIP(index.d), gpus) if gpus else None
    index.clustering_index = assigner  # the index does not keep it alive
    index.train(vectors_BD)
    index.clustering_index = None


def with_vectors(index: Any, vectors_BD: np.ndarray, rows_B: np.ndarray) -> Any:
    """Add vectors under their rows to a trained index of inverted lists,
    on a GPU if that has room."""
    copy, _ = _copy_on_gpus(index, more=len(rows_B))
    if copy is None:
        index.add_with_ids(vectors_BD, rows_B)
        return index
    copy.add_with_ids(vectors_BD, rows_B)
    return import_faiss().index_gpu_to_cpu(copy)


# --------------------------------------------------------------------------------------------- GPUs


def _copy_on_gpus(index: Any, more: int = 0) -> tuple[Any | None, str]:
    """Copy an index to the fewest GPUs that hold it and `more` vectors, and say where it is.

    The copy is None if the index stays on the CPU.
    """
    found = len(_gpus())
    if not found:
        return None, "CPU"

    # Each of `count` GPUs holds an equal share of the vectors.
    for count in range(1, found + 1):
        needed = _bytes_on_a_gpu(index, -(-(index.ntotal + more) // count))
        gpus = _gpus_with(needed)[:count]
        if len(gpus) == count:
            try:
                return _copied(index, gpus, shard=True), f"GPU {', '.join(map(str, gpus))}"
            except RuntimeError as error:
                return None, f"CPU, as FAISS refuses the GPU: {str(error).rpartition('Error: ')[2]}"
    return (
        None,
        f"CPU, as {found} GPUs would have to hold {needed / 1e9:.3g} GB each, and have less left",
    )


def _bytes_on_a_gpu(index: Any, vectors: int) -> int:
    """Bytes of an index with this many vectors: the vectors with their rows,
    and the lists' centres twice."""
    lists = getattr(index, "nlist", 0)  # FAISS gives them to indexes with inverted lists alone
    return vectors * (index.code_size + (ID_BYTES if lists else 0)) + 2 * lists * index.d * 4


def _gpus_with(needed: int) -> list[int]:
    """GPUs on which an index may take this many bytes, the one with most room first."""
    room = {gpu: SHARE * torch.cuda.mem_get_info(gpu)[0] - SCRATCH for gpu in _gpus()}
    return sorted((gpu for gpu in room if room[gpu] >= needed), key=lambda gpu: -room[gpu])


def _gpus() -> Sequence[int]:
    """GPUs that this process may use: all, or only its own if it is one of several processes."""
    if not import_faiss().get_num_gpus() or not torch.cuda.is_available():
        return ()
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = joined or multiprocessing.parent_process() is not None
    return [torch.cuda.current_device()] if several else range(import_faiss().get_num_gpus())


def _copied(index: Any, gpus: Sequence[int], *, shard: bool = False) -> Any:
    """A copy of the index on GPUs: a share of its vectors on each with `shard`,
    else all of them."""
    faiss = import_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.shard = shard
    # In float32, the lookup tables of codes of more than 48 bytes do not fit a GPU's shared memory.
    options.useFloat16 = hasattr(index, "pq")
    # A graph over the lists' centres stays on the CPU.
    options.allowCpuCoarseQuantizer = True
    # cuVS gives other numbers and cannot use such a graph; some builds use it unasked.
    options.use_cuvs = False
    return faiss.index_cpu_to_gpu_multiple_py(
        [_resources(gpu) for gpu in gpus], index, options, gpus
    )


@cache
def _resources(gpu: int) -> Any:
    """FAISS's streams and scratch memory on a GPU, made once."""
    return import_faiss().StandardGpuResources()
