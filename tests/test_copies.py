"""Tokens from tars on S3, and copies of runs in a bucket.

They outlive killed processes and lost connections, and a training resumes on another machine.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import cm3leon
from corpora import digit_tars
from processes import Forked

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from s3 import KEY_ID, SECRET, Fault, Gate, gate_to, moto_server, surroundings, upload
from test_shard_stages import SETTINGS
from test_training import Interrupted, Numbers, run, without_rates

from cm3leon.data import remote
from cm3leon.hub import copies
from cm3leon.hub.copies import STATE, ForeignCopy, pull_copy, push_copy
from cm3leon.hub.store import FILES, Store
from cm3leon.types import UserError

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """A server for all tests of the file, which keeps buckets in its memory."""
    with moto_server() as port:
        yield port


@pytest.fixture
def gate(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate to the server that tries again at once, without the real waits."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    with gate_to(server) as made, surroundings(made, tmp_path):
        yield made


@pytest.fixture
def bucket(gate: Gate, request: pytest.FixtureRequest) -> str:
    """The address of an empty bucket of the test's own."""
    import s3fs

    name = f"b{zlib.crc32(request.node.name.encode())}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def write_files(folder: Path, **files: str) -> Path:
    """Write files into a folder; in a keyword `__` is a slash, `_json` is .json, `_log` .jsonl."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_log", ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def contents_of(folder: Path) -> dict[str, bytes]:
    """Names and contents of a folder's files, but for hidden ones beside the others."""
    contents = {}
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name[0] != ".":
            contents[name] = file.read_bytes()
    return contents


def objects(address: str) -> set[str]:
    """Names of all objects below an address."""
    import s3fs

    root = address.removeprefix("s3://")
    names = s3fs.S3FileSystem(use_listings_cache=False).find(root)
    return {name[len(root) + 1 :] for name in names}


# ------------------------------------------------------------------------------------------ tokens


@pytest.mark.once
def test_tokens_of_tars_on_s3_outlive_a_killed_worker_and_show_no_credentials(
    gate: Gate, bucket: str, tmp_path: Path
) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    digit_tars(tars, 3, 30)
    upload(tars, f"{bucket}/tars")

    settings = ["experiment=corpus", *SETTINGS, "until=tokens"]
    local, there = tmp_path / "local", tmp_path / "there"

    # The same settings over local tars and over those on S3, there up to the stage before.
    cm3leon(*settings, f"data.path={tars}/*.tar", f"run={local}")
    words = [*settings, f"data.path={bucket}/tars/*.tar", f"run={there}"]
    words += [f"shards.tokenizers={local}"]
    cm3leon(*[word.replace("until=tokens", "until=retriever") for word in words])

    # A worker waits for its last tar without end, and is killed.
    tar = f"{bucket}/tars/00002.tar".removeprefix("s3://")
    gate.faults = [Fault("hang", f"GET /{tar}", 1)]
    part = [word for word in words if not word.startswith("until=")]
    worker = Forked("cm3leon.run", ["part", "stage=tokens", "part=0/1", *part])
    try:
        while gate.faults[0].count and worker.poll() is None:
            time.sleep(0.02)
    finally:
        worker.send_signal(signal.SIGKILL)
        said = "".join(worker.communicate())
    made = sorted(file.name for file in (there / "tokens").glob("shard-*.arrow"))
    assert len(made) == 2, said[-2000:]
    times = [(there / "tokens" / name).stat().st_mtime_ns for name in made]

    # A second call keeps what the worker had finished, and makes the rest.
    done = cm3leon(*words)
    assert [(there / "tokens" / name).stat().st_mtime_ns for name in made] == times
    shards = []
    for run_folder in (local, there):
        files = (run_folder / "tokens").glob("shard-*.arrow")
        shards.append({file.name: file.read_bytes() for file in files})
    assert len(shards[0]) == 3
    assert shards[0] == shards[1]

    for name, content in contents_of(there).items():
        assert SECRET.encode() not in content, name
        assert KEY_ID.encode() not in content, name
    assert SECRET not in done.stdout + done.stderr + said


# ------------------------------------------------------------------------------------------ copies


def test_a_training_goes_on_from_its_copy_on_another_machine(bucket: str, tmp_path: Path) -> None:
    whole, log = run(tmp_path / "whole", keep_checkpoints=1)
    here = tmp_path / "here"

    # Interrupted and copied twice; then this machine is gone.
    with pytest.raises(Interrupted):
        run(here / "pretraining", batches=Numbers(fails_at=7), keep_checkpoints=1)
    push_copy(here, f"{bucket}/run")
    with pytest.raises(Interrupted):
        run(here / "pretraining", batches=Numbers(fails_at=15), keep_checkpoints=1)
    pushed = push_copy(here, f"{bucket}/run")
    assert pushed.files > 0
    shutil.rmtree(here)

    there = tmp_path / "there"
    pull_copy(f"{bucket}/run", there)
    assert [path.name for path in (there / "pretraining").glob("step_*")] == ["step_00000012"]
    resumed, resumed_log = run(there / "pretraining", batches=Numbers(), keep_checkpoints=1)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert without_rates(resumed_log) == without_rates(log)

    # The new machine owns the copy now.
    push_copy(there, f"{bucket}/run")
    assert not any("step_00000012" in name for name in objects(f"{bucket}/run"))


@pytest.mark.once
def test_only_what_changed_is_pushed_and_what_is_gone_goes(bucket: str, tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "run", config_json="{}", tokens__a="1", tokens__log_log="1", old="x"
    )
    not_copied = (
        ".lock",
        ".x.partial",
        "superseded/x",
        "tokens/decoded/x",
        "p/step_00000004/__0_0",
    )
    for name in not_copied:
        write_files(folder, **{name: "not copied"})

    address = f"{bucket}/run"
    assert push_copy(folder, address).files == 4
    assert objects(address) == {"config.json", "tokens/a", "tokens/log.jsonl", "old", FILES}
    assert push_copy(folder, address) == copies.Copied(0, 0, 4)

    # A log that has grown is pushed as an object of a new name, and a deleted file goes.
    write_files(folder, tokens__log_log="12")
    (folder / "old").unlink()
    assert push_copy(folder, address) == copies.Copied(1, 2, 2)
    assert objects(address) == {"config.json", "tokens/a", "tokens/log.jsonl.2", FILES}

    moved = pull_copy(address, tmp_path / "there")
    assert moved.files == 3
    assert contents_of(tmp_path / "there") == {
        "config.json": b"{}",
        "tokens/a": b"1",
        "tokens/log.jsonl": b"12",
    }

    # The other machine knows what it has pulled, and pushes nothing of it.
    assert push_copy(tmp_path / "there", address) == copies.Copied(0, 0, 3)


@pytest.mark.once
def test_a_push_or_a_pull_that_is_killed_leaves_the_copy_whole(
    bucket: str, gate: Gate, tmp_path: Path
) -> None:
    folder, address = write_files(tmp_path / "run", a="1", b="1", c="1"), f"{bucket}/run"
    push_copy(folder, address)

    # The push fails where it would have replaced the list of files, which comes last.
    write_files(folder, a="22", b="22", d="22")
    listing = f"{address}/{FILES}".removeprefix("s3://")
    gate.faults = [Fault("403", f"PUT /{listing}", 1)]
    with pytest.raises(UserError, match="forbidden"):
        push_copy(folder, address)

    pull_copy(address, tmp_path / "first")
    assert contents_of(tmp_path / "first") == {"a": b"1", "b": b"1", "c": b"1"}
    push_copy(folder, address)

    # The pull fails at its last file.
    last = f"{address}/c bytes".removeprefix("s3://")
    gate.faults = [Fault("403", f"GET /{last}", 1)]
    with pytest.raises(UserError, match="forbidden"):
        pull_copy(address, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    assert pull_copy(address, tmp_path / "second").unchanged == 2
    assert contents_of(tmp_path / "second") == {"a": b"22", "b": b"22", "c": b"1", "d": b"22"}


@pytest.mark.once
@pytest.mark.parametrize("kind", ["503", "reset"])
def test_a_push_waits_passing_trouble_out(
    kind: str, gate: Gate, bucket: str, tmp_path: Path
) -> None:
    # Larger than a part of an upload, so that it is uploaded in parts.
    big = bytes(range(256)) * (2**12 * 41)
    folder = write_files(tmp_path / "run", small="1")
    (folder / "big").write_bytes(big)

    # Trouble at the beginning of an upload, in the middle of one in parts, and in downloads.
    gate.faults = [
        Fault(kind, "PUT /", 2),
        Fault(kind, "uploads", 1),
        Fault(kind, "partNumber=2", 1),
    ]
    push_copy(folder, f"{bucket}/run")
    assert [fault.count for fault in gate.faults] == [0, 0, 0]

    gate.faults = [Fault(kind, "GET /", 4)]
    pull_copy(f"{bucket}/run", tmp_path / "there")
    assert contents_of(tmp_path / "there") == {"small": b"1", "big": big}


def test_two_folders_do_not_share_a_copy(bucket: str, tmp_path: Path) -> None:
    address = f"{bucket}/run"
    first = write_files(tmp_path / "first", a="1")
    push_copy(first, address)

    with pytest.raises(ForeignCopy, match="holds a copy that was not made from"):
        push_copy(write_files(tmp_path / "second", a="2"), address)

    # Whoever pulled a copy may push to it, and then the first folder may no longer.
    pull_copy(address, tmp_path / "third")
    push_copy(write_files(tmp_path / "third", b="1"), address)
    with pytest.raises(ForeignCopy, match="another machine has pushed"):
        push_copy(first, address)

    with pytest.raises(UserError, match="holds files; give a new or empty folder"):
        pull_copy(address, first)
    with pytest.raises(UserError, match="holds no copy that `push` has made"):
        pull_copy(f"{bucket}/none", tmp_path / "fourth")


def test_a_changed_object_and_a_list_that_leads_outside_are_refused(
    bucket: str, tmp_path: Path
) -> None:
    import s3fs

    system, address = s3fs.S3FileSystem(use_listings_cache=False), f"{bucket}/run"
    push_copy(write_files(tmp_path / "run", a="1"), address)

    system.pipe_file(f"{address}/a", b"2")
    with pytest.raises(UserError, match="a is missing or not as it was pushed"):
        pull_copy(address, tmp_path / "there")
    for name in ("../evil", "/evil"):
        files = {name: {"object": "a", "bytes": 1, "sha256": ""}}
        system.pipe_file(f"{address}/{FILES}", json.dumps({"number": 1, "files": files}).encode())
        with pytest.raises(UserError, match="lies outside the copy"):
            pull_copy(address, tmp_path / "there")

    # A list of files that is no JSON.
    system.pipe_file(f"{address}/{FILES}", b"[")
    with pytest.raises(UserError, match="is damaged"):
        Store(address, "address").copy()


def test_the_commands_copy_there_and_back(bucket: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "exported", README="1")

    # A dry run only says what would be pushed.
    words = ["push", f"folder={folder}", f"to={bucket}/exported"]
    assert "nothing was uploaded" in cm3leon(*words, "dry_run=true").stdout
    assert objects(bucket) == set()

    assert "1 files of 1 bytes" in cm3leon(*words).stdout
    done = cm3leon("pull", f"address={bucket}/exported", f"folder={tmp_path}/back")
    assert "1 files of 1 bytes" in done.stdout
    assert contents_of(tmp_path / "back") == {"README": b"1"}
    assert SECRET not in (folder / STATE).read_text() + done.stdout

    # Mistakes are one sentence: a bucket that is not there, and `every` for another target.
    said = cm3leon("push", f"folder={folder}", "to=s3://nowhere/x", check=False)
    assert said.returncode == 2
    assert said.stderr.startswith("cm3leon: to: ")
    assert len(said.stderr.splitlines()) == 1
    said = cm3leon("push", f"folder={folder}", "to=org/name", "every=5", check=False)
    assert "every is given, which is for an address" in said.stderr


@pytest.mark.once
def test_it_is_pushed_again_and_again_until_it_is_stopped(
    gate: Gate, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cm3leon.commands import push

    folder = write_files(tmp_path / "run", a="1")

    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        gate.faults = []
        if len(waits) == 1:
            gate.faults = [Fault("403", "", 1)]
        write_files(folder, a="1" * (1 + len(waits)))
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(push, "time", type("", (), {"sleep": staticmethod(wait)}))
    done = cm3leon("push", f"folder={folder}", f"to={bucket}/run", "every=7", check=False)
    assert done.returncode == 130
    assert waits == [7, 7, 7]
    assert "trying again in 7 s" in done.stdout

    # The last change came with the interruption, after the last push.
    pull_copy(f"{bucket}/run", tmp_path / "there")
    assert contents_of(tmp_path / "there") == {"a": b"111"}
