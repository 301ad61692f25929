"""Names of files and folders as users give them, and what happens when a disk is full."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import cm3leon
from safetensors.torch import save_file

from cm3leon.commands import generate
from cm3leon.config import from_mapping
from cm3leon.paths import make_folder, naming, path_of
from cm3leon.types import UserError

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a\0b", "holds a NUL character"),
        ("~nobody-of-this-name/x", "this machine has no user nobody-of-this-name"),
        ("x" * 300, "file name too long"),
        ("x/" * 3000, "file name too long"),
    ],
)
def test_a_name_that_no_file_can_have_is_a_sentence_everywhere(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        path_of(name, "run")

    with pytest.raises(UserError, match=f"^out.* {sentence}|^out.*{sentence}"):
        from_mapping(generate.Options, {"run": "runs/x", "prompt": "a", "out": name})

    # Every command that takes a run refuses the name, in few words.
    for words in (
        ["experiment=digits", f"run={name}"],
        ["experiment=digits", f"run={name}", "until=documents"],
        ["generate", f"run={name}", "prompt=a"],
        ["search", f"run={name}", "text=a"],
        ["export", "to=hf", f"run={name}", "out=x"],
        ["perplexity", f"runs={name}"],
        ["status", f"run={name}"],
        ["collect", f"run={name}"],
    ):
        done = cm3leon(*words, check=False)
        assert done.returncode == 2, words
        assert sentence in done.stderr, words
        assert len(done.stderr) < 400


@pytest.mark.parametrize("name", ["~", "~/x"])
def test_without_a_home_folder_the_whole_path_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    # As in a container that runs under a number without an entry in /etc/passwd.
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UserError) as refusal:
        path_of(name, "out")
    assert str(refusal.value) == (
        f"out is {name}, but the home folder is not known here; give the whole path"
    )


@pytest.mark.parametrize("kind", ["a file", "a device", "a pipe"])
def test_a_run_folder_that_is_something_else_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("/dev/null") if kind == "a device" else tmp_path / "taken"
    if kind == "a file":
        path.write_text("kept")
    elif kind == "a pipe":
        os.mkfifo(path)

    # The folder itself, and one inside it.
    for name in (path, path / "inner"):
        for more in ([], ["launcher=local"], ["sweep.seed=1,2"]):
            done = cm3leon("experiment=digits", f"run={name}", *more, check=False)
            assert done.returncode == 2
            assert f"is {kind}; it must be a folder" in done.stderr
        with pytest.raises(UserError, match=f"is {kind}; it must be a folder"):
            make_folder(name, "out")
    assert kind != "a file" or path.read_text() == "kept"


def test_the_root_and_places_without_folders_are_refused() -> None:
    for name in ("/", "/proc/self/fd/../../x", "/proc/x"):
        done = cm3leon("experiment=digits", f"run={name}", check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("cm3leon: run is ")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KB; to a writer this looks like a full disk."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("library", ["python", "numpy", "npz", "safetensors", "faiss"])
def test_a_full_disk_says_where(library: str, tmp_path: Path) -> None:
    file, array = tmp_path / "file", np.zeros(100_000, np.float32)

    def write() -> None:
        if library == "python":
            file.write_bytes(bytes(100_000))
        elif library == "numpy":
            np.save(file, array)
        elif library == "npz":
            np.savez(file, array=array)
        elif library == "safetensors":
            save_file({"x": torch.from_numpy(array)}, file)
        else:
            import faiss

            index = faiss.IndexFlatL2(100)
            index.add(array.reshape(-1, 100))
            faiss.write_index(index, str(file))

    # Whatever library writes, the error names the folder.
    with pytest.raises(OSError, match=r"large|space") as raised, naming(tmp_path):
        write()
    assert raised.value.filename == str(tmp_path)
    assert raised.value.errno in (errno.EFBIG, errno.ENOSPC)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("No way"), UserError("No space left on device"), OSError(2, "x", "y")):
        with pytest.raises(type(error)) as raised, naming(tmp_path):
            raise error
        assert raised.value is error
