"""Maximum inner product search by FAISS: on GPUs where it was built for them and a driver exists,
on the CPU elsewhere.

What a GPU has no room for, or cannot do, is done on the CPU, with the same results up to ties:
exact search is exact on both, and candidates that codes find are ordered by their vectors.
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
"""Distributions of FAISS, any one of which serves; all install the module `faiss`."""
MOST = 2048
"""Most results of a search on a GPU, and most lists that it probes."""
SHARE = 0.8
"""Share of a GPU's free memory that an index may take."""
SCRATCH = 3 * 2**29
"""Bytes that FAISS holds on a GPU besides the indexes."""
ID_BYTES = 8
"""Bytes of the number of a vector in an inverted list."""


def import_faiss() -> Any:
    """The library.

    Raises:
        UserError: where it is not installed, lacks the libraries of CUDA, or is installed twice.
    """
    _check_packages()
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "faiss is not installed: pip install faiss-cpu (on a cluster faiss-gpu, which brings "
            "CUDA 12, or faiss-gpu-cuvs, which brings CUDA 13)"
        ) from error
    except (RuntimeError, OSError) as error:  # without the libraries that those for GPUs need
        raise UserError(f"faiss cannot be loaded: {error}") from error
    return faiss


@cache
def _check_packages() -> None:
    """Each package overwrites files of the others: without a word, no GPU is used,
    or nothing can be imported."""
    found = [name for name in PACKAGES if _is_installed(name)]
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(found)} are installed together and overwrite each other: pip uninstall "
            "all of them, install one again"
        )


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# ---------------------------------------------------------------------------------------- searching


class Searcher:
    """An index, searched on GPUs if they have room for a copy of it.

    `place` says where, and if FAISS has GPUs and they are not used, why.
    """

    def __init__(self, index: Any) -> None:
        self._index = index
        self._copy, self.place = _copy_on_gpus(index)

    def search(
        self, queries_QD: np.ndarray, count: int, *, nprobe: int | None = None
    ) -> np.ndarray:
        """Rows (Q, count) of the best vectors in falling order of the index's scores,
        -1 where there are fewer.

        Args:
            nprobe: inverted lists that are looked through, of an index that has them.
        """
        within = max(count, nprobe or 0) <= MOST
        index = self._copy if within and self._copy is not None else self._index
        parameters = None if nprobe is None else import_faiss().SearchParametersIVF(nprobe=nprobe)
        return index.search(queries_QD, count, params=parameters)[1]


def largest(
    queries_QD: np.ndarray, vectors_MD: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest inner products of each query in falling order, and the rows of their vectors, (Q,
    count) each.

    There have to be `count` vectors at least.
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
    """Trains an index of inverted lists on the CPU, but its k-means on all GPUs."""
    faiss = import_faiss()
    gpus = _gpus_with(4 * index.nlist * index.d)
    assigner = _copied(faiss.IndexFlatIP(index.d), gpus) if gpus else None
    index.clustering_index = assigner  # which it does not keep alive
    index.train(vectors_BD)
    index.clustering_index = None


def with_vectors(index: Any, vectors_BD: np.ndarray, rows_B: np.ndarray) -> Any:
    """A trained index of inverted lists with vectors added under their rows, on the CPU;
    added on a GPU if it can."""
    copy, _ = _copy_on_gpus(index, more=len(rows_B))
    if copy is None:
        index.add_with_ids(vectors_BD, rows_B)
        return index
    copy.add_with_ids(vectors_BD, rows_B)
    return import_faiss().index_gpu_to_cpu(copy)


# --------------------------------------------------------------------------------------------- GPUs


def _copy_on_gpus(index: Any, more: int = 0) -> tuple[Any | None, str]:
    """A copy on the fewest GPUs that hold it and so many more vectors; and in words, where it is.

    None if it has to stay on the CPU.
    """
    found = len(_gpus())
    if not found:
        return None, "CPU"
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
        f"CPU, as {found} GPUs would have to hold {needed / 1e9:.3g} GB each, which they have not "
        "left",
    )


def _bytes_on_a_gpu(index: Any, vectors: int) -> int:
    """Bytes of an index with so many vectors: these, with their rows, and the centres of lists,
    twice."""
    lists = getattr(index, "nlist", 0)  # FAISS gives them to indexes with inverted lists alone
    return vectors * (index.code_size + (ID_BYTES if lists else 0)) + 2 * lists * index.d * 4


def _gpus_with(needed: int) -> list[int]:
    """GPUs on which an index may take so many bytes, the one with most left first."""
    room = {gpu: SHARE * torch.cuda.mem_get_info(gpu)[0] - SCRATCH for gpu in _gpus()}
    return sorted((gpu for gpu in room if room[gpu] >= needed), key=lambda gpu: -room[gpu])


def _gpus() -> Sequence[int]:
    """GPUs that this process may use: all, or its own where it is one of several processes."""
    if not import_faiss().get_num_gpus() or not torch.cuda.is_available():
        return ()
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = joined or multiprocessing.parent_process() is not None
    return [torch.cuda.current_device()] if several else range(import_faiss().get_num_gpus())


def _copied(index: Any, gpus: Sequence[int], *, shard: bool = False) -> Any:
    """The index on GPUs: a share of its vectors on each, or all of them."""
    faiss = import_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.shard = shard
    # Of product-quantised indexes, tables of more than 48 bytes a code do not fit otherwise.
    options.useFloat16 = hasattr(index, "pq")
    options.allowCpuCoarseQuantizer = True  # lists found by a graph
    # cuVS has numerical behaviour of its own and no lists found by a graph.
    # Some builds with it use it unasked.
    options.use_cuvs = False
    return faiss.index_cpu_to_gpu_multiple_py(
        [_resources(gpu) for gpu in gpus], index, options, gpus
    )


@cache
def _resources(gpu: int) -> Any:
    """FAISS's streams and scratch memory on a GPU, made once."""
    return import_faiss().StandardGpuResources()
