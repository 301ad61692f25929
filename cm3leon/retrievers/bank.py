"""The memory bank: documents as vectors, searched by maximum inner product with FAISS."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch

from cm3leon.permissions import check_readable
from cm3leon.records import read_json
from cm3leon.retrievers.mips import Searcher, import_faiss
from cm3leon.types import Modality, UserError
from cm3leon.weights import check_finite


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

    def search(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Rows (Q, K) of the best documents by inner product, the best first; K <= count, -1 where there are fewer."""

    def parts_of(self, rows: np.ndarray) -> Parts:
        """The parts of some rows, (*rows.shape, D) each; those of a negative row mean nothing."""

    def id(self, row: int) -> str:
        """The id of a document."""


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Documents that can be retrieved: their ids, and the vectors of their parts."""

    ids: list[str]
    parts: Parts

    @cached_property
    def index(self) -> Any:
        """FAISS inner-product index over `parts.mean()`. Raises UserError where FAISS is not installed."""
        faiss = import_faiss()
        vectors_BD = np.ascontiguousarray(self.parts.mean(), dtype=np.float32)
        index = faiss.IndexFlatIP(vectors_BD.shape[1])
        index.add(vectors_BD)
        return index

    @cached_property
    def _searcher(self) -> Searcher:
        return Searcher(self.index)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each id."""
        return {id_: row for row, id_ in enumerate(self.ids)}

    def search(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Rows (Q, count) of the best documents by inner product, the best first."""
        return self._searcher.search(
            np.ascontiguousarray(query_QD, dtype=np.float32), min(count, len(self.ids))
        )

    def parts_of(self, rows: np.ndarray) -> Parts:
        """The parts of some rows, (*rows.shape, D) each; those of a negative row mean nothing."""
        return self.parts.rows(rows)

    def id(self, row: int) -> str:
        """The id of a document."""
        return self.ids[row]

    def save(self, folder: Path) -> None:
        """Writes `ids.json`, `vectors.npz` and `index.faiss`."""
        (folder / "ids.json").write_text(json.dumps(self.ids))
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
                bank = cls(ids, Parts(vectors["text"], vectors["image"]))
            bank.__dict__["index"] = import_faiss().read_index(str(folder / "index.faiss"))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, RuntimeError) as error:
            raise UserError(
                f"the memory bank in {folder} is damaged ({error}); run the experiment again"
            ) from error
        for array_BD in (bank.parts.text_BD, bank.parts.image_BD):
            check_finite(torch.from_numpy(array_BD), f"{folder / 'vectors.npz'}")
        return bank
