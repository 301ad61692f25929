"""The doctor: what it finds on machines that lack something, and how it judges figures."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cm3leon.commands import doctor
from cm3leon.doctor import files, machine, nccl, page, parts
from cm3leon.doctor.figures import GOALS, MANY_IMAGES, MFU_7B, ONE_IMAGE, Figure, attempted, goal_of
from cm3leon.doctor.files import look_at_files
from cm3leon.doctor.findings import Finding, good, wrong
from cm3leon.doctor.hardware import product_rate, read_rate
from cm3leon.doctor.machine import links, look_at_attention, look_at_gpus, look_at_slurm
from cm3leon.doctor.parts import PARTS, Part, in_process
from cm3leon.launch.cluster import Nodes
from cm3leon.registry import discover

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
discover()


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


# ------------------------------------------------------------------------------------------- files


def test_a_local_disk_keeps_everything_and_is_left_as_it_was(tmp_path: Path) -> None:
    found = by_name(look_at_files(tmp_path / "not" / "there" / "yet"))
    assert {name for name, finding in found.items() if finding.verdict == "wrong"} <= {"disk"}
    assert len(found) == 10
    assert list(tmp_path.iterdir()) == []


def refuse(code: int) -> Any:
    """A function of the system that fails with this error."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def test_a_disk_that_does_not_sync_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    found = by_name(look_at_files(tmp_path))
    assert found["files, synced"].verdict == "wrong"
    assert found["files, linked"].verdict == "good"


def test_a_reader_that_finds_half_a_file_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a file system does not replace a file in one step when it is renamed."""

    def in_place(path: Path, text: str) -> None:
        path.unlink(missing_ok=True)
        path.write_text(text)

    monkeypatch.setattr(files, "write_text", in_place)
    monkeypatch.setattr(files, "REPLACEMENTS", 3000)
    assert by_name(look_at_files(tmp_path))["files, replaced"].verdict == "wrong"


def test_without_flock_files_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system tells this process and the second one that it has no locks."""
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EOPNOTSUPP))
    in_the_second = f"raise OSError({errno.EOPNOTSUPP}, 'not supported')"
    monkeypatch.setattr(files, "SECOND_PROCESS", in_the_second)

    found = by_name(look_at_files(tmp_path))["files, locked"]
    assert found.verdict == "warning"
    assert "files that name their process serve as locks instead" in found.text


def test_a_lock_that_two_processes_have_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *args: None)
    assert by_name(look_at_files(tmp_path))["files, locked"].verdict == "wrong"


def test_little_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bound, verdict in (("LITTLE", "warning"), ("VERY_LITTLE", "wrong")):
        monkeypatch.setattr(files, bound, 1e18)
        assert by_name(look_at_files(tmp_path))["disk"].verdict == verdict


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert by_name(look_at_files(tmp_path))["files"].verdict == "wrong"
    tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------- the machine

MATRIX = """\
\x1b[4m\tGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \t{0}\tPXB\t0-31
GPU1\t{0}\t X \tSYS\t0-31
NIC0\tPXB\tSYS\t X

Legend:
  X    = Self
"""


def test_links_are_read_from_the_matrix_of_nvidia_smi() -> None:
    """Links to network cards stand in the same rows, but are none between GPUs."""
    assert links(MATRIX.format("NV18")) == ["NV18", "NV18"]
    assert links(MATRIX.format("SYS")) == ["SYS", "SYS"]
    assert links("") == []


def test_gpus_that_torch_does_not_see_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "smi", lambda *fields: [["570.1", "NVIDIA H100"]] * 2)
    (found,) = look_at_gpus(CPU)
    assert found.verdict == "wrong"
    assert found.text.startswith("the driver 570.1 lists 2, but torch")

    monkeypatch.setattr(machine, "smi", lambda *fields: [])
    assert [finding.verdict for finding in look_at_gpus(CPU)] == ["warning"]


class Properties:
    name, total_memory, major, minor = "NVIDIA H100", 80e9, 9, 0


def test_a_gpu_that_is_limited_damaged_or_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:

    # nvidia-smi's row: three memory errors, and a power limit below the usual one.
    rows = [["570.1", "NVIDIA H100", "3", "400.00", "700.00"]]
    monkeypatch.setattr(machine, "smi", lambda *fields: rows)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (80e9, 80e9))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a", "compute_90"])

    verdicts = [finding.verdict for finding in look_at_gpus(CUDA)]
    assert verdicts == ["good", "good", "wrong", "warning"]

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (20e9, 80e9))
    assert "60.0 GB are in use" in list(look_at_gpus(CUDA))[1].text

    # A torch that was built for other GPUs only.
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_100"])
    assert list(look_at_gpus(CUDA))[1].verdict == "wrong"


def test_every_backend_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(look_at_attention(CPU))
    assert {finding.verdict for finding in found.values()} == {"good"}

    # A backend with wrong results has to be found out even though it raises nothing.
    class Broken:
        def plan(self, sample_BT: Any, device: Any) -> None: ...

        def __call__(self, q: Any, k: Any, v: Any, plan: None) -> Any:
            return q + k + v

    usual = machine.choose

    def broken_sdpa(name: str, device: torch.device) -> Any:
        choice = usual(name, device)
        if name == "sdpa":
            choice = choice._replace(attention=Broken())
        return choice

    monkeypatch.setattr(machine, "choose", broken_sdpa)
    assert by_name(look_at_attention(CPU))["attention, sdpa"].verdict == "wrong"


def test_partitions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/sbatch")
    for nodes, verdict in (
        ([], "warning"),
        ([Nodes("cpu", True, 3, 0)], "warning"),
        ([Nodes("cpu", False, 3, 0), Nodes("gpu", True, 2, 8)], "good"),
    ):
        monkeypatch.setattr(machine, "partitions", lambda nodes=nodes: nodes)
        assert look_at_slurm().verdict == verdict

    assert look_at_slurm().text == "cpu (3 nodes, 0 GPUs each), gpu* (2 nodes, 8 GPUs each)"

    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert look_at_slurm().verdict == "good"


class Rank:
    """A process that has ended, with this code and these outputs."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.returncode, self._printed = code, (out, err)

    def communicate(self, timeout: float) -> tuple[str, str]:
        return self._printed

    def kill(self) -> None: ...

    def wait(self) -> None: ...


@pytest.mark.parametrize(
    ("code", "out", "err", "verdict", "words"),
    [
        (0, "0.001", "", "good", "268 GB/s"),
        (0, "0.1", "", "warning", "3 GB/s"),
        (1, "", "warnings\nNCCL error: unhandled", "wrong", "cannot sum: NCCL error: unhandled"),
        (-11, "", "", "wrong", "cannot sum: no reason was given"),
    ],
)
def test_sums_between_gpus(
    code: int, out: str, err: str, verdict: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl.subprocess, "Popen", lambda *args, **kwargs: Rank(code, out, err))
    found = nccl.look_at_nccl(2)
    assert (found.verdict, words in found.text) == (verdict, True)


# ----------------------------------------------------------------------------------------- figures


def test_all_parts_fit_into_25_minutes() -> None:
    assert sum(part.limit for part in PARTS) <= 25 * 60


def test_goals_are_judged_on_their_own_device_alone() -> None:
    name = ONE_IMAGE["bf16"]
    for device, gpu, is_own in (
        ("NVIDIA H200", "H200", True),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA A100-SXM4-80GB", "H100", False),
    ):
        goal, own = goal_of(name, device)
        assert goal is not None
        assert (goal.gpu, own) == (gpu, is_own)
    assert goal_of("reading memory", "NVIDIA H100") == (None, False)

    # 4.5 meets the goal of an H100, the first, and misses the stricter one of an H200.
    assert [goal.is_met(4.5) for goal in GOALS if goal.name == name] == [True, False]
    many = MANY_IMAGES["bf16"]
    assert [goal.is_met(4.5) for goal in GOALS if goal.name == many] == [True, False]


def test_what_is_raised_becomes_the_reason() -> None:
    (found,) = attempted("p", "n", "s", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert found == Figure("p", "n", None, "s", "ZeroDivisionError: division by zero")


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let a part's process run this program instead; its file is the last argument."""
    script = tmp_path / "part.py"
    script.write_text(f"import json, os, sys, time\nfile = open(sys.argv[-1], 'a')\n{body}")
    real = parts.subprocess.run

    def ours(command: list[str], **options: Any) -> Any:
        return real([sys.executable, str(script), *command[-1:]], **options)

    monkeypatch.setattr(parts.subprocess, "run", ours)


FIGURE = '{"part": "p", "name": "n", "value": 1.0, "unit": "s"}'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "ended with code -9: it gave no reason"),
        ("sys.exit('CUDA error: misaligned')", "ended with code 1: CUDA error: misaligned"),
        ("file.write('{\"part\": '); file.flush(); time.sleep(60)", "stopped at its limit of 1 s"),
    ],
)
def test_a_part_that_dies_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    program(tmp_path, monkeypatch, f"print({FIGURE!r}, file=file, flush=True)\n{body}")
    found = in_process(Part("p", lambda device, full: iter(()), 1), full=False)
    assert [(each.value, each.note) for each in found] == [(1.0, ""), (None, reason)]


@pytest.mark.parametrize(
    "part", [p for p in PARTS if p.name not in ("tests", "index")], ids=lambda part: part.name
)
def test_every_part_measures_in_small_on_a_cpu(part: Part, tmp_path: Path) -> None:
    """Where a CPU cannot do something, the figure has the reason; all others have a value."""
    figures = list(part.measure(CPU, False))
    assert figures
    for figure in figures:
        if figure.value is None:
            assert any(words in figure.note for words in ("float8", "fp8", "lacks a CUDA device"))
        else:
            assert figure.value > 0


def test_rates_are_those_of_the_work_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by half a second at each look shows the work that was counted.

    A product of side 64 in half a second is 2 * 64^3 * 2 FLOP/s.
    """
    from cm3leon.doctor import hardware

    now = iter(range(1000))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(now) / 2)
    assert product_rate(CPU, 64, torch.float32) == 4 * 64**3
    assert read_rate(CPU) == 2 * 4 * 2**25


# -------------------------------------------------------------------------------- page and command


FIGURES = [
    Figure("layers", MFU_7B, 0.55, "of the peak", "datasheet"),
    Figure("images, bf16", ONE_IMAGE["bf16"], 9.0, "s"),
    Figure("images, int8", ONE_IMAGE["int8"], None, "s", "<OutOfMemory> & more"),
]


def test_the_page_says_what_is_wrong_and_which_goals_are_reached(tmp_path: Path) -> None:
    findings = [good("torch", "2"), wrong("faiss", "not there", "install it")]
    made = page.report(findings, FIGURES, "NVIDIA H100", "now")

    facts = {fact.label: (fact.value, fact.status) for fact in made.facts}
    assert facts["wrong"] == ("1", "bad")
    assert facts["goals reached"] == ("1 of 3", "bad")

    # What is wrong stands first, and a figure without a value is neither reached nor missed.
    machine_table, goals = (section.blocks[0] for section in made.sections[:2])
    assert machine_table.rows[0][:2] == ["faiss", "wrong"]  # type: ignore[union-attr]
    assert [row[3] for row in goals.rows] == ["reached", "missed", None]  # type: ignore[union-attr]

    # Texts of exceptions are escaped, and no script runs.
    page.write(tmp_path, findings, FIGURES, CPU)
    html = (tmp_path / page.PAGE).read_text()
    assert "&lt;OutOfMemory&gt; &amp; more" in html
    assert "<script" not in html
    kept = json.loads((tmp_path / page.JSON).read_text())
    assert kept["figures"][0]["goal"]["bound"] == 0.5
    assert kept["figures"][0]["met"] is None  # this is no H100
    assert kept["findings"][1]["advice"] == "install it"


def test_the_command_fails_where_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "measured", lambda device, full: iter(FIGURES))
    monkeypatch.setattr(files, "LITTLE", 0)
    monkeypatch.setattr(files, "VERY_LITTLE", 0)
    monkeypatch.setattr(machine, "look_at_machine", lambda device: iter([good("torch", "2")]))

    # Only what is wrong fails the command; the folder that was tried is left as it was.
    options = {"folder": tmp_path / "runs", "out": tmp_path / "out"}
    assert doctor.main(doctor.Options(measure=True, **options)) == 0
    assert len(json.loads((tmp_path / "out" / page.JSON).read_text())["figures"]) == 3
    assert not (tmp_path / "runs").exists()

    bad = [wrong("faiss", "not there", "install it")]
    monkeypatch.setattr(machine, "look_at_machine", lambda device: iter(bad))
    assert doctor.main(doctor.Options(**options)) == 1
    printed = capsys.readouterr().out
    assert "wrong    faiss: not there\n         -> install it\n" in printed
