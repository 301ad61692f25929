"""Pushes to a store in this process's memory: during a training, after a kill, with bad lists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from command_line import cm3leon

from cm3leon.commands import push
from cm3leon.hub.copies import Copied, pull_copy, push_copy
from cm3leon.hub.store import FILES, UNLISTED, Store, StoredFile
from cm3leon.types import UserError

ADDRESS = "memory://pushes/run"


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    yield
    system = fsspec.filesystem("memory")
    if system.exists("/pushes"):
        system.rm("/pushes", recursive=True)


def put(folder: Path, **files: str) -> Path:
    """Write files; `__` in a name stands for a slash."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def checkpoint(training: Path, step: int) -> Path:
    folder = put(training / f"step_{step:08d}", weights=f"weights of {step}")
    (folder / "manifest.json").write_text(json.dumps({"weights": "sha"}))
    return folder


def objects() -> set[str]:
    found = fsspec.filesystem("memory").find("/pushes/run")
    return {name.removeprefix("/pushes/run/") for name in found}


def pulled(folder: Path) -> dict[str, str]:
    """The files that a pull makes of the copy, with their content."""
    pull_copy(ADDRESS, folder)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("[!.]*")}
    return {name: path.read_text() for name, path in files.items() if path.is_file()}


def before_uploads(monkeypatch: pytest.MonkeyPatch, action: Callable[[Path], None]) -> None:
    """Let something happen before each file is uploaded."""
    upload = Store.upload

    def meanwhile(store: Store, path: Path, name: str) -> StoredFile:
        action(path)
        return upload(store, path, name)

    monkeypatch.setattr(Store, "upload", meanwhile)


def steps(files: dict[str, str]) -> set[str]:
    return {Path(name).parent.name for name in files if name.endswith("weights")}


def test_a_checkpoint_that_is_pruned_meanwhile_is_replaced_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tmp_path / "run" / "pretraining"
    old = checkpoint(training, 4)
    push_copy(tmp_path / "run", ADDRESS)
    shutil.rmtree(old)
    checkpoint(training, 8)

    # Step 8 is deleted while it is uploaded, because step 12 has come.
    def prune(path: Path) -> None:
        if path.parent.name == "step_00000008":
            checkpoint(training, 12)
            shutil.rmtree(path.parent, ignore_errors=True)

    before_uploads(monkeypatch, prune)
    push_copy(tmp_path / "run", ADDRESS)
    assert steps(pulled(tmp_path / "there")) == {"step_00000012"}
    assert not any("step_00000004" in name or "step_00000008" in name for name in objects())


def test_the_last_checkpoint_of_a_copy_stays_where_no_new_one_comes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tmp_path / "run" / "pretraining"
    old = checkpoint(training, 4)
    push_copy(tmp_path / "run", ADDRESS)
    shutil.rmtree(old)
    checkpoint(training, 8)

    # Each step is deleted while it is uploaded, because the next one has come.
    def prune(path: Path) -> None:
        if path.parent.exists() and path.parent.name.startswith("step_"):
            checkpoint(training, int(path.parent.name[5:]) + 4)
            shutil.rmtree(path.parent)

    with monkeypatch.context() as patch:
        before_uploads(patch, prune)
        push_copy(tmp_path / "run", ADDRESS)
    assert steps(pulled(tmp_path / "there")) == {"step_00000004"}

    # Without more deletions the newest step comes through, and the old one goes.
    push_copy(tmp_path / "run", ADDRESS)
    assert steps(pulled(tmp_path / "later")) == {"step_00000020"}
    assert not any("step_00000004" in name for name in objects())

    # Checkpoints that were all deleted on purpose are deleted there.
    shutil.rmtree(training)
    put(training, log="1")
    push_copy(tmp_path / "run", ADDRESS)
    assert objects() == {FILES, "pretraining/log"}


def test_an_object_of_a_changed_file_takes_no_other_files_name(tmp_path: Path) -> None:
    # A file that is there already, and one that comes later.
    folder = put(tmp_path / "run", log="1", **{"log.2": "old"})
    push_copy(folder, ADDRESS)

    put(folder, log="22")
    push_copy(folder, ADDRESS)
    assert pulled(tmp_path / "first") == {"log": "22", "log.2": "old"}

    put(folder, **{"log.3": "new", "log.2": "older"})
    push_copy(folder, ADDRESS)
    expected = {"log": "22", "log.2": "older", "log.3": "new"}
    assert pulled(tmp_path / "second") == expected

    # A new file keeps its own name.
    put(folder, log="333", **{"log.4": "4"})
    push_copy(folder, ADDRESS)
    assert pulled(tmp_path / "third") == {**expected, "log": "333", "log.4": "4"}
    assert fsspec.filesystem("memory").cat_file("/pushes/run/log.4") == b"4"
    assert len(objects()) == 5


def test_what_a_killed_push_uploaded_goes_with_the_next_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").pipe_file("/pushes/run/foreign", b"1")
    folder = put(tmp_path / "run", a="1")
    push_copy(folder, ADDRESS)

    # The second push is killed between b and c.
    def kill(path: Path) -> None:
        if path.name == "c":
            raise KeyboardInterrupt

    put(folder, a="22", b="22", c="22")
    with monkeypatch.context() as patch:
        before_uploads(patch, kill)
        with pytest.raises(KeyboardInterrupt):
            push_copy(folder, ADDRESS)
    assert objects() == {FILES, UNLISTED, "a", "a.2", "b", "foreign"}

    # Another machine, which knows nothing but the address, cleans up after it.
    assert pulled(tmp_path / "there") == {"a": "1"}
    assert push_copy(tmp_path / "there", ADDRESS) == Copied(0, 0, 1)
    assert objects() == {FILES, "a", "foreign"}


def test_what_is_linked_twice_is_copied_once(tmp_path: Path) -> None:
    folder = put(tmp_path / "run", shared__a="1")
    for point in ("one", "two"):
        (folder / point).mkdir()
        (folder / point / "stage").symlink_to(folder / "shared")
    assert push_copy(folder, ADDRESS) == Copied(3, 1, 0)
    assert len(objects()) == 2
    assert set(pulled(tmp_path / "there").values()) == {"1"}

    put(folder, shared__a="22")
    push_copy(folder, ADDRESS)
    names = ("one/stage/a", "shared/a", "two/stage/a")
    assert pulled(tmp_path / "later") == dict.fromkeys(names, "22")


def test_a_folder_may_hold_the_list_of_another_copy(tmp_path: Path) -> None:
    folder = put(tmp_path / "run", a="1", **{FILES: "{}", f"in__{FILES}": "{}", UNLISTED: "[]"})
    push_copy(folder, ADDRESS)
    assert pulled(tmp_path / "there") == {"a": "1", f"in/{FILES}": "{}"}


def test_a_local_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "run", a="1")
    opened = Path.open

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"^folder: .*run/a cannot be read here \(Permission"):
        push_copy(folder, ADDRESS)


ENTRY = {"object": "a", "bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    "files",
    [
        {"a": {**ENTRY, "object": 5}},
        {"a": {**ENTRY, "bytes": "1"}},
        {"a": {"object": "a"}},
        {"a": ENTRY, "a/b": ENTRY},
        {"\ud800": ENTRY},
        [],
    ],
)
def test_a_damaged_list_is_a_sentence_that_names_it(tmp_path: Path, files: Any) -> None:
    content = json.dumps({"number": 1, "files": files}).encode()
    fsspec.filesystem("memory").pipe_file(f"/pushes/run/{FILES}", content)
    with pytest.raises(UserError, match=f"^address: /pushes/run/{FILES}"):
        pull_copy(ADDRESS, tmp_path / "there")


def test_a_dry_run_refuses_a_missing_folder_and_outlives_a_file_that_vanishes(
    tmp_path: Path,
) -> None:
    words = ["push", f"to={ADDRESS}", "dry_run=true"]
    said = cm3leon(*words, f"folder={tmp_path}/nope", check=False)
    assert said.returncode == 2
    assert "nope does not exist" in said.stderr

    folder = put(tmp_path / "run", a="1")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    assert "1 bytes in 1 files" in cm3leon(*words, f"folder={folder}").stdout


def test_pushes_wait_for_the_folder_and_show_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    address = "memory://me:planted@pushes/run"
    waits: list[float] = []

    # The folder appears while the push waits, and the second wait ends it.
    def wait(seconds: float) -> None:
        waits.append(seconds)
        put(folder, a="1")
        if len(waits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(push, "time", type("", (), {"sleep": staticmethod(wait)}))
    try:
        said = cm3leon("push", f"folder={folder}", f"to={address}", "every=7", check=False)
    finally:
        system = fsspec.filesystem("memory")
        if system.exists("/me:planted@pushes"):
            system.rm("/me:planted@pushes", recursive=True)

    assert waits == [7, 7]
    missing = "does not exist; give the folder of a run or an export; trying again in 7 s"
    assert missing in said.stdout
    assert "pushed to memory://***@pushes/run: 1 files of 1 bytes" in said.stdout
    assert "planted" not in said.stdout + said.stderr
