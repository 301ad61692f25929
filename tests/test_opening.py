"""Runs are opened in one way: what is read from them is what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from records import finish

from cm3leon.config import dump_yaml, to_mapping
from cm3leon.data.corpus import Corpus
from cm3leon.experiment import load_experiment
from cm3leon.retrievers.bank import MemoryBank, Parts
from cm3leon.retrievers.neighbours import Neighbours
from cm3leon.stages.opening import Opening, open_run
from cm3leon.types import UserError

READ = {
    "corpus": ("documents/documents.jsonl", "documents/images.npy"),
    "codes_MN": ("image_tokenizer/codes.npy",),
    "varied_codes_VBN": ("image_tokenizer/varied_codes.npy",),
    "bank": ("retriever/ids.json", "retriever/vectors.npz", "retriever/index.faiss"),
    "neighbours": ("retriever/neighbours.npy",),
}
"""Results of a run in memory, and the files that they are read from."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with a corpus in memory, as its stages would have left it."""
    folder = tmp_path / "run"
    for name in ("documents", "image_tokenizer", "retriever"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(to_mapping(load_experiment("digits_smoke"))))
    rng = np.random.default_rng(0)
    images_BHWC = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    Corpus(["a", "b", "c"], ["x", "y", "z"], images_BHWC, [0, 1, None], ["train"] * 3).save(
        folder / "documents"
    )
    np.save(folder / "image_tokenizer" / "codes.npy", rng.integers(0, 9, (3, 4)))
    np.save(folder / "image_tokenizer" / "varied_codes.npy", rng.integers(0, 9, (1, 3, 4)))
    text_BD, image_BD = rng.normal(size=(2, 3, 8)).astype(np.float32)
    MemoryBank(["a", "b", "c"], Parts(text_BD, image_BD)).save(folder / "retriever")
    Neighbours(rng.integers(0, 3, (1, 3, 2))).save(folder / "retriever" / "neighbours.npy")
    finish(*(folder / stage for stage in ("documents", "image_tokenizer", "retriever")))
    return folder


@pytest.mark.parametrize(
    ("result", "name"), [(result, name) for result, names in READ.items() for name in names]
)
def test_a_file_that_has_changed_is_named(run: Path, result: str, name: str) -> None:
    getattr(open_run(run), result)
    file = run / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) * 2 // 3] ^= 1
    for damaged in (bytes(flipped), content[: len(content) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{file} has changed since it was written; put"):
            getattr(open_run(run), result)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged|is not JSON"):
        getattr(open_run(run, Opening(verify=False)), result)
    file.unlink()
    with pytest.raises(UserError, match=f"^{file} is missing; put a copy back, or run"):
        getattr(open_run(run), result)


@pytest.mark.parametrize("verify", [True, False])
def test_a_stage_that_is_not_finished_is_refused(run: Path, verify: bool) -> None:
    (run / "documents" / "stage.json").unlink()
    opened = open_run(run, Opening(verify=verify))
    with pytest.raises(UserError, match=r"documents is not finished: its stage.json is missing"):
        _ = opened.corpus
    with pytest.raises(UserError, match=r"no run with a finished documents, .* is missing"):
        open_run(run, needs=["documents"])


def test_a_file_is_read_for_its_checksum_once_in_a_process(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cm3leon import records

    monkeypatch.setattr(records, "SETTLED", 0.0)
    monkeypatch.setattr(records, "_digests", {})
    read: list[str] = []
    monkeypatch.setattr(
        records.hashlib,
        "file_digest",
        lambda file, kind, digest=records.hashlib.file_digest: (
            read.append(file.name) or digest(file, kind)
        ),
    )
    for _ in range(2):
        _ = open_run(run).bank
    assert sorted(Path(name).name for name in read) == ["ids.json", "index.faiss", "vectors.npz"]
