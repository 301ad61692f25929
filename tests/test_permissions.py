"""Written files have the modes that the umask gives, and a lack of permission is called that."""

from __future__ import annotations

import ast
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from banks import write_bank

from cm3leon.data.files import Files
from cm3leon.data.shards import ShardFolder, open_shard
from cm3leon.models.pretrained import load_model
from cm3leon.permissions import check_folder_readable, use_umask
from cm3leon.provenance import snapshot
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.parts import Parts
from cm3leon.tokenizers.image.published_files import open_weights
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.distributed import Ranks
from cm3leon.types import UserError
from cm3leon.weights import read_weights, save_tensors, save_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# ------------------------------------------------------------------------------------------ writing


def test_weights_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(file, {"weight": torch.arange(3.0)})
    assert mode(file) == 0o666 & ~umask

    # The same over an older file.
    save_weights(file, {"weight": torch.ones(2)})
    assert mode(file) == 0o666 & ~umask
    assert torch.equal(read_weights(file)["weight"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_else_writes_safetensors() -> None:
    """The library's own function leaves files that only their owner can read."""
    writers = []
    for folder in ("cm3leon", "evaluation", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.ImportFrom):
                    continue
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                if names & {"safetensors.torch.save_file", "safetensors.numpy.save_file"}:
                    writers.append(str(file.relative_to(ROOT)))
    assert writers == ["cm3leon/weights.py"]


def test_a_folder_of_closed_files_is_opened_as_far_as_the_umask_allows(
    tmp_path: Path, umask: int
) -> None:
    # Files of one's own only, a folder of one's own only, and a link that leads out of the folder.
    folder = tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text("")
        (folder / name).chmod(0o600)
    (folder / "inner").chmod(0o700)
    (folder / "away").symlink_to(tmp_path / "elsewhere")

    use_umask(folder)
    assert [mode(folder / name) for name in ("a", "inner/b")] == [0o666 & ~umask] * 2
    assert [mode(each) for each in (folder, folder / "inner")] == [0o777 & ~umask] * 2
    assert list(tmp_path.iterdir()) == [folder]


def test_copied_code_does_not_keep_the_modes_of_its_original(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "site-packages" / "cm3leon"
    shipped.mkdir(parents=True)
    (shipped / "run.py").write_text("")
    (shipped / "run.py").chmod(0o400)
    monkeypatch.setattr("cm3leon.provenance.SHIPPED", shipped)
    snapshot(tmp_path / "code")
    assert mode(tmp_path / "code" / "cm3leon" / "run.py") == 0o666 & ~umask
    assert mode(tmp_path / "code" / "cm3leon") == 0o777 & ~umask


def test_what_the_system_refuses_is_an_error_of_the_system_with_the_files_name(
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.safetensors"
    save_tensors(file, {"weight": torch.ones(2)})

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refusal:
            save_tensors(file, {"weight": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert refusal.value.filename == str(file)
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(read_weights(file)["weight"], torch.ones(2))


# ------------------------------------------------------------------------------------------ reading


def read_bank(file: Path) -> object:
    """Open the bank whose file was closed to this user, beside all its other files."""
    parts = Parts(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))
    with TemporaryDirectory() as made:
        folders = write_bank(Path(made), parts)
        closed = next(folder for folder in folders if (folder / file.name).is_file())
        (closed / file.name).chmod(0)
        return Bank(*folders)


def read_step(file: Path) -> object:
    folder = file.parent / "step_00000001"
    folder.mkdir()
    file.rename(folder / "state.json")
    return Checkpoints(file.parent, Ranks(torch.device("cpu")), keep=1).newest()


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("model.safetensors", read_weights),
    "weights of PyTorch": ("vgg16.pth", read_weights),
    "published weights": ("vq.safetensors", open_weights),
    "published checkpoint": ("vqgan.ckpt", open_weights),
    "model": ("config.json", lambda file: load_model(file.parent)),
    "text tokenizer": (
        "tokenizer.json",
        lambda file: TextTokenizer.load(file.parent, TextTokenizerConfig(vocab_size=300)),
    ),
    "shard": ("0.arrow", open_shard),
    "shards": ("index.json", lambda file: ShardFolder(file.parent, lambda shard: shard)),
    "bank's vectors": ("shard-00000-of-00001.arrow", read_bank),
    "bank's index": ("index.json", read_bank),
    "checkpoint": ("state.json", read_step),
    "folder of a library": ("model.safetensors", lambda file: check_folder_readable(file.parent)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read_is_called_that(unprivileged: Path, name: str) -> None:
    file = unprivileged / READERS[name][0]
    file.write_text("{}")
    file.chmod(0)
    with pytest.raises(
        UserError, match=r"^no permission to read .*; its owner can allow it: chmod"
    ):
        READERS[name][1](file)


@pytest.mark.parametrize("name", ["weights", "published weights", "text tokenizer", "model"])
def test_a_folder_that_may_not_be_entered_is_called_that(unprivileged: Path, name: str) -> None:
    file = unprivileged / "inner" / READERS[name][0]
    file.parent.mkdir()
    file.write_text("{}")
    file.parent.chmod(0)
    with pytest.raises(UserError, match=r"^no permission to read"):
        READERS[name][1](file)
    file.parent.chmod(0o700)


def test_data_in_a_folder_that_may_not_be_entered_do_not_count_as_missing(
    unprivileged: Path,
) -> None:
    inner = unprivileged / "inner"
    (inner / "images").mkdir(parents=True)
    inner.chmod(0)
    with pytest.raises(UserError, match=r"^no permission to read .*images"):
        Files(str(inner / "images"))
    inner.chmod(0o700)

    with pytest.raises(UserError, match="does not exist"):
        Files(str(inner / "elsewhere"))
