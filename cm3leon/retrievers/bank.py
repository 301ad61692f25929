"""The memory bank: documents as vectors, searched by maximum inner product with FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch

from cm3leon.io import read_json, write_json
from cm3leon.permissions import check_readable
from cm3leon.retrievers.mips import Searcher, import_faiss
from cm3leon.types import Modality, UserError
from cm3leon.weights import check_finite

MODALITIES: tuple[Modality, ...] = ("text", "image")


@dataclass(frozen=True, eq=False)
class Parts:
    """Unit vectors of the text and image parts of documents, (B, D) each; zeros where a document lacks one.

    Documents may have several dimensions, such as the candidates of each query: (Q, K, D).
    """

    text_BD: np.ndarray
    image_BD: np.ndarray

    def mean(self) -> np.ndarray:
        """One vector a document: the mean of its normalised parts (paper section 2.2), of the one where it has one."""
        count_B1 = (self.has("text").astype(np.float32) + self.has("image"))[..., None]
        return (self.text_BD + self.image_BD) / np.maximum(count_B1, 1)

    def has(self, modality: Modality) -> np.ndarray:
        """Which documents have that part, boolean (B,)."""
        return np.any(self.text_BD if modality == "text" else self.image_BD, axis=-1)

    def searched(self, pairs_only: bool) -> np.ndarray:
        """Places (N,) of the documents that an index holds: all, or those that have both parts."""
        if not pairs_only:
            return np.arange(len(self.text_BD))
        return np.flatnonzero(self.has("text") & self.has("image"))

    def rows(self, rows: Any) -> Parts:
        """The parts of some documents."""
        return Parts(self.text_BD[rows], self.image_BD[rows])

    @staticmethod
    def concatenate(parts: Sequence[Parts]) -> Parts:
        """The documents of all, one after the other."""
        return Parts(
            np.concatenate([p.text_BD for p in parts]), np.concatenate([p.image_BD for p in parts])
        )


class SearchableBank(Protocol):
    """What the strategy asks of a memory bank, in memory or on disk."""

    @property
    def searchable(self) -> int:
        """Number of documents that a search may find."""

    def search(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Rows (Q, K) of the best documents by inner product, the best first; K <= count, -1 where there are fewer."""

    def parts_of(self, rows: np.ndarray) -> Parts:
        """The parts of some rows, (*rows.shape, D) each; those of a negative row mean nothing."""

    def id(self, row: int) -> str:
        """The id of a document."""


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Documents that can be retrieved: their ids, and the vectors of their parts.

    Where `pairs_only`, documents without a text or an image keep their rows and are not searched.
    """

    ids: list[str]
    parts: Parts
    pairs_only: bool = False

    @cached_property
    def index(self) -> Any:
        """FAISS inner-product index over `parts.mean()` of the documents that are searched.

        Raises UserError where FAISS is not installed.
        """
        faiss = import_faiss()
        means_BD = self.parts.mean()[self._searched]
        vectors_BD = np.ascontiguousarray(means_BD, dtype=np.float32)
        index = faiss.IndexFlatIP(vectors_BD.shape[1])
        index.add(vectors_BD)
        return index

    @cached_property
    def _searched(self) -> np.ndarray:
        """Row of the bank of each vector in the index."""
        return self.parts.searched(self.pairs_only)

    @cached_property
    def _searcher(self) -> Searcher:
        return Searcher(self.index)

    @property
    def searchable(self) -> int:
        """Number of documents that a search may find."""
        return len(self._searched)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each id."""
        return {id_: row for row, id_ in enumerate(self.ids)}

    def search(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Rows (Q, count) of the best documents by inner product, the best first."""
        count = min(count, self.searchable)
        if not count:
            return np.zeros((len(query_QD), 0), np.int64)
        query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        return self._searched[self._searcher.search(query_QD, count)]

    def parts_of(self, rows: np.ndarray) -> Parts:
        """The parts of some rows, (*rows.shape, D) each; those of a negative row mean nothing."""
        return self.parts.rows(rows)

    def id(self, row: int) -> str:
        """The id of a document."""
        return self.ids[row]

    def save(self, folder: Path) -> None:
        """Writes `ids.json`, `vectors.npz` and `index.faiss`."""
        write_json(folder / "ids.json", self.ids, indent=None)
        np.savez(folder / "vectors.npz", text=self.parts.text_BD, image=self.parts.image_BD)
        import_faiss().write_index(self.index, str(folder / "index.faiss"))

    @classmethod
    def load(cls, folder: Path) -> MemoryBank:
        """Reads what `save` wrote.

        Raises:
            UserError: for a file that is missing, may not be read or is damaged.
            NotFinite: for vectors that are NaN or infinite.
        """
        for name in ("vectors.npz", "index.faiss"):
            check_readable(folder / name)
        ids = read_json(folder / "ids.json", [str])
        try:
            with np.load(folder / "vectors.npz", allow_pickle=False) as vectors:
                parts = Parts(vectors["text"], vectors["image"])
            index = import_faiss().read_index(str(folder / "index.faiss"))
            # An index of fewer vectors than documents holds the pairs alone.
            bank = cls(ids, parts, pairs_only=index.ntotal < len(ids))
            if index.ntotal != bank.searchable:
                raise ValueError(f"an index of {index.ntotal} vectors, not {bank.searchable}")
            bank.__dict__["index"] = index
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, RuntimeError) as error:
            raise UserError(
                f"the memory bank in {folder} is damaged ({error}); run the experiment again"
            ) from error
        for array_BD in (bank.parts.text_BD, bank.parts.image_BD):
            check_finite(torch.from_numpy(array_BD), f"{folder / 'vectors.npz'}")
        return bank
