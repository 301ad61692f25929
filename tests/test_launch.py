"""Launching without SLURM: jobs and their journals, and jobs that run on this machine.

Scripts that stand in for SLURM's commands show what sbatch would be given, and what is made of
what SLURM says.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cm3leon import provenance
from cm3leon.commands import logs
from cm3leon.config import Component
from cm3leon.experiment import load_experiment
from cm3leon.launch import Job, Submitted, follow, jobs, submit, work
from cm3leon.launch.follow import State
from cm3leon.launch.jobs import newest_launch
from cm3leon.launch.journal import outcome, progress, read_events, write_event
from cm3leon.launch.machine import LocalJobs
from cm3leon.launch.runs import experiment_jobs
from cm3leon.locks import locked
from cm3leon.registry import LAUNCHERS, discover
from cm3leon.run import main
from cm3leon.stages.running import trained_together
from cm3leon.studies import load_study
from cm3leon.studies.jobs import study_jobs
from cm3leon.types import UserError

discover()

COMMANDS = '''
"""Stands in for the command line: sleeps `sleep=` seconds, ends by signal `kill=` or `code=`."""
import os, signal, sys, time
words = dict(word.split("=") for word in sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
sys.stdout.write(f"says {words} {os.environ.get('RANK')}\\n")  # in one piece: ranks speak at once
sys.stdout.flush()
time.sleep(float(words.get("sleep", 0)))
if "kill" in words:
    os.kill(os.getpid(), int(words["kill"]))
sys.exit(int(words.get("code", 0)))
'''


@pytest.fixture
def small_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the command line, jobs run a script of ten lines, which starts at once."""

    def copy(folder: Path) -> None:
        provenance.snapshot(folder)
        (folder / "cm3leon" / "run.py").write_text(COMMANDS)

    monkeypatch.setattr(jobs, "snapshot", copy)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def job(name: str, folder: Path, *commands: str, **rest: Any) -> Job:
    """A job of commands written as `sleep=1 code=0`."""
    return Job(name, tuple((*command.split(), f"run={folder}") for command in commands), **rest)


def launcher(name: str, **fields: Any) -> Component:
    return LAUNCHERS.check({"name": name, **fields})


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def words(folder: Path) -> list[str]:
    """State of each command of the newest submission, in one word."""
    return [state.word for _, state in follow.states(newest_launch(folder))]


# ----------------------------------------------------------------------------------------- journals


def test_outcomes_by_exit_code() -> None:
    assert outcome(0, "here", [], 3) == ("done", {})
    assert outcome(75, "here", [], 3) == ("again", {"at": "here"})
    assert outcome(2, "here", [], 3) == ("refused", {"code": 2})

    # Three deaths at one point are the end; a death further on is the first one there.
    died = {"event": "died", "at": "step 5", "code": 137}
    assert outcome(137, "step 5", [died], 3)[0] == "died"
    event, details = outcome(137, "step 5", [died, {"event": "started"}, died], 3)
    assert (event, details["why"]) == ("stopped", "it died 3 times at step 5, exit code 137")
    assert outcome(137, "step 6", [died, died], 3)[0] == "died"
    assert outcome(1, "step 6", [], 1)[1]["why"] == "it died once at step 6, exit code 1"


def test_progress_is_the_stage_that_is_being_made(tmp_path: Path) -> None:
    command = ("experiment=x", f"run={tmp_path}")
    assert progress(command) == "the beginning"

    # A stage has a file once it was begun, and another once it has ended.
    for name, marker in (
        ("documents", "stage.json"),
        ("documents", "started.json"),
        ("pretraining", "started.json"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / marker).touch()
    assert progress(command) == "pretraining"

    for step in (5, 120):
        folder = tmp_path / "pretraining" / f"step_{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").touch()
    (tmp_path / "pretraining" / "step_best").mkdir()  # somebody's own
    (tmp_path / "pretraining" / "step_00000200").mkdir()  # not complete
    assert progress(command) == "pretraining, step 120"

    assert progress(("part", "stage=tokens", "part=3/8", *command)) == "part 3/8 of tokens"


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    write_event(tmp_path / "j", "started", at="x")
    with (tmp_path / "j").open("a") as file:
        file.write('{"event": "di')
    assert [event["event"] for event in read_events(tmp_path / "j")] == ["started"]


# ---------------------------------------------------------------------------------- what made a run


def test_what_made_a_run_is_written_down_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JWT", "hidden-token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-token")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    provenance.record(tmp_path)

    found = json.loads((tmp_path / provenance.ENVIRONMENT).read_text())
    assert found["variables"]["SLURM_JOB_ID"] == "77"
    assert "torch" in found["packages"]
    assert "hidden-token" not in (tmp_path / provenance.ENVIRONMENT).read_text()
    assert json.loads((tmp_path / provenance.CODE).read_text())["version"] == provenance.__version__


def test_a_snapshot_runs_by_itself_and_says_of_what_it_is_a_copy(tmp_path: Path) -> None:
    copy = tmp_path / "code"
    provenance.snapshot(copy)
    said = json.loads((copy / provenance.CODE).read_text())
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    script = (
        "import cm3leon, cm3leon.evaluation; from cm3leon import provenance; "
        f"from pathlib import Path; provenance.write_code(Path({str(tmp_path)!r})); "
        "print(cm3leon.__file__, cm3leon.evaluation.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )

    # Python ran the copy, whose record of the code is that of this clone.
    assert done.stdout.split() == [
        str(copy / "cm3leon/__init__.py"),
        str(copy / "cm3leon/evaluation/__init__.py"),
    ]
    assert json.loads((tmp_path / provenance.CODE).read_text()) == said
    assert (copy / "experiments/digits.yaml").is_file()


# ---------------------------------------------------------------------------- an experiment as jobs


def shown(found: list[Job]) -> dict[str, tuple[tuple[str, ...], int, bool]]:
    """Of each job: the jobs before it, how many commands it has, and whether they run together."""
    return {each.name: (each.after, len(each.commands), each.together) for each in found}


def test_an_experiment_on_few_parts_is_one_job_that_reads_a_frozen_file(tmp_path: Path) -> None:
    experiment = load_experiment("digits_smoke", ["seed=3", "launcher=slurm", "launcher.nodes=2"])
    [only] = experiment_jobs(experiment, tmp_path, until="pretraining")
    [command] = only.commands
    file, run, *rest = command
    assert (run, rest) == (f"run={tmp_path}", ["launcher=here", "until=pretraining"])
    assert load_experiment(file.removeprefix("experiment=")) == experiment
    assert only.together


def test_stages_of_many_parts_are_arrays_between_jobs_of_one_process(tmp_path: Path) -> None:
    fields = [
        "launcher=slurm",
        "launcher.nodes=2",
        "launcher.parts=4",
        "launcher.stages.index.parts=1",
        f'data={{"name": "webdataset", "path": "{tmp_path}/not/here/*.tar"}}',
    ]
    experiment = load_experiment(
        "pretrain_350m", ["overrides=smoke", *fields, "launcher.stages.tokens.timeout_min=9"]
    )
    found = experiment_jobs(experiment, tmp_path, until="evaluation")
    assert shown(found) == {
        "text_tokenizer": ((), 1, False),
        "image_tokenizer": (("text_tokenizer",), 1, True),
        "retriever": (("image_tokenizer",), 1, False),
        "tokens": (("retriever",), 4, False),
        "tokens_end": (("tokens",), 1, False),
        "vectors": (("tokens_end",), 4, False),
        "index": (("vectors",), 1, False),
        "neighbours": (("index",), 4, False),
        "neighbours_end": (("neighbours",), 1, False),
        "pretraining": (("neighbours_end",), 1, True),
        "evaluation": (("pretraining",), 1, False),
    }

    by_name = {each.name: each for each in found}
    assert by_name["vectors"].commands[3][:3] == ("part", "stage=vectors", "part=3/4")
    assert by_name["index"].commands[0][-1] == "until=index"

    # A stage's own resources win over the launcher's.
    slurm = LAUNCHERS.build(experiment.launcher)
    tokens, pretraining = slurm.of(by_name["tokens"]), slurm.of(by_name["pretraining"])
    assert (tokens.nodes, tokens.timeout_min) == (1, 9)
    assert (pretraining.nodes, pretraining.timeout_min) == (2, 1440)
    assert slurm.of(by_name["image_tokenizer"]).nodes == 2

    assert [each.name for each in experiment_jobs(experiment, tmp_path, until="tokens")] == [
        "text_tokenizer",
        "image_tokenizer",
        "retriever",
        "tokens",
        "tokens_end",
    ]


@pytest.mark.parametrize(
    ("fields", "together", "nodes"),
    [
        ([], ["image_tokenizer", "retriever"], 2),
        (["launcher.stages.retriever.nodes=4"], ["image_tokenizer", "retriever"], 4),
        (["retriever_training.batch_size=9"], ["image_tokenizer"], 2),
        (["launcher.stages.image_tokenizer.tasks_per_node=3"], ["retriever"], 2),
    ],
)
def test_what_is_trained_has_all_ranks_where_they_can_share_its_batch(
    fields: list[str], together: list[str], nodes: int, tmp_path: Path
) -> None:
    """A batch that the ranks cannot divide is one process's, as the ranks themselves will find."""
    given = ["launcher=slurm", "launcher.nodes=2", "launcher.stages.vectors.parts=4"]
    given += ["image_tokenizer_training.batch_size=8", "retriever_training.batch_size=8"]
    experiment = load_experiment("digits_smoke", [*given, *fields])

    found = {each.name: each for each in experiment_jobs(experiment, tmp_path)}
    assert [name for name, each in found.items() if each.together] == [*together, "pretraining"]
    for name in together:
        assert found[name].commands[0][-1] == f"until={name}"
        processes = LAUNCHERS.build(experiment.launcher).processes(name)
        assert name in trained_together(experiment, tmp_path, None, processes)
    if "retriever" in together:
        assert LAUNCHERS.build(experiment.launcher).of(found["retriever"]).nodes == nodes


def test_a_study_is_its_runs_in_order_then_the_answers_then_what_is_measured(
    tmp_path: Path,
) -> None:
    study = load_study(
        "scenes",
        ["launcher=slurm", "launcher.parts=1", "launcher.stages.answers.parts=3"],
        tmp_path,
    )
    found = study_jobs(study)
    *runs, answers, measuring = found
    assert [each.after for each in found[1:]] == [(each.name,) for each in found[:-1]]
    entries = list(study.config.runs)
    assert list(dict.fromkeys(each.name.partition(".")[0] for each in runs)) == entries

    # The points of a sweep are commands of one job.
    (points,) = [each for each in runs if each.name == "task.points"]
    assert [command[1] for command in points.commands] == [
        f"run={tmp_path / name}" for name in study.runs if name.startswith("task-")
    ]
    assert (answers.name, len(answers.commands)) == ("answers", 3)
    assert answers.commands[2][:2] == ("part", "part=2/3")
    assert measuring.name == "measuring"

    # The jobs read a copy of the study, which has the same runs with the same settings.
    frozen = load_study(
        measuring.commands[0][0].removeprefix("experiment="), ["launcher=here"], tmp_path
    )
    assert list(frozen.runs) == list(study.runs)
    for name in study.runs:
        assert frozen.experiment(name) == study.experiment(name)
    assert study_jobs(study, until="pretrain")[-1].name == "pretrain.pretraining"


# ------------------------------------------------------------------------------------- this machine


def test_jobs_run_in_order_and_not_behind_one_that_failed(tmp_path: Path, small_code: None) -> None:
    asked = [
        job("a", tmp_path, "code=0", "code=1"),
        job("b", tmp_path, "code=0", after=("a",)),
        job("c", tmp_path, "code=0"),
    ]
    found = submit(asked, tmp_path, launcher("here"))
    ran = [(each.job, each.number, each.code) for each in found]
    assert ran == [("a", 0, 0), ("a", 1, 1), ("c", 0, 0)]

    launch = newest_launch(tmp_path)
    assert (launch.logs / "a-1.log").read_text().startswith("says {'code': '1'")
    events = [event["event"] for event in read_events(launch.journal("a", 1))]
    assert events == ["started", "stopped"]


@pytest.mark.stack
def test_torchrun_starts_ranks_and_keeps_their_exit_code(
    tmp_path: Path, small_code: None, capfd: Any
) -> None:
    # The first rank to end takes the others with it, so both sleep until both have spoken.
    asked = [job("a", tmp_path, "sleep=5 code=75")]
    [done] = submit(asked, tmp_path, launcher("torchrun", processes=2))
    assert done.code == 75
    said = capfd.readouterr().out
    assert "} 0\n" in said
    assert "} 1\n" in said


def test_a_detached_job_is_followed_and_ends(tmp_path: Path, small_code: None, capsys: Any) -> None:
    asked = [
        job("a", tmp_path, "sleep=1"),
        job("b", tmp_path, "kill=9", after=("a",)),
        job("c", tmp_path, "", after=("b",)),
    ]
    submit(asked, tmp_path, launcher("local", max_deaths=2))
    with pytest.raises(UserError, match=r"job a \(\d+\) is (queued|running) in .* already"):
        submit(asked, tmp_path, launcher("local"))

    # The second is killed each time, twice at most; so the third never begins.
    wait_for(lambda: words(tmp_path) == ["done", "stopped", "failed"])
    assert main(["status", f"run={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "stopped    it died 2 times at the beginning, exit code 137" in said
    assert "failed     not started, as a job before it did not succeed" in said

    assert main(["logs", f"run={tmp_path}", "job=b", "follow=true"]) == 0
    assert capsys.readouterr().out.count("says {'kill': '9'") == 2
    assert main(["logs", f"run={tmp_path}", "job=d"]) == 2
    assert "job is d, which was not launched; known: a, b, c" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "allowed"),
    [
        ({"a": [0], "b": [0], "c": [0]}, "0"),
        ({"a": [0, 1, 2], "b": [0, 1]}, "one from 0 to 2"),
        ({"a": [2, 0], "b": [0]}, "0 or 2"),
    ],
)
def test_a_number_that_no_job_has_is_refused_with_those_there_are(
    numbers: dict[str, list[int]], allowed: str
) -> None:
    found = []
    for name, of_job in numbers.items():
        found += [(Submitted(name, number, "1", None), State("done")) for number in of_job]
    options = logs.Options(run=Path("run"), number=7)
    with pytest.raises(UserError) as refusal:
        logs._chosen(found, options)
    assert str(refusal.value) == f"number is 7, which no job has; choose {allowed}"


def test_a_detached_job_that_is_cancelled_writes_a_checkpoint(
    tmp_path: Path, small_code: None, capsys: Any
) -> None:
    submit([job("a", tmp_path, "sleep=60"), job("b", tmp_path, "")], tmp_path, launcher("local"))
    log = newest_launch(tmp_path).logs / "a-0.log"
    wait_for(lambda: log.is_file() and "says" in log.read_text())
    assert words(tmp_path) == ["running", "queued"]

    assert main(["cancel", f"run={tmp_path}"]) == 0
    wait_for(lambda: words(tmp_path) == ["cancelled", "failed"])
    events = read_events(newest_launch(tmp_path).journal("a", 0))
    assert [event["event"] for event in events] == ["started", "again"]

    # A new submission goes on.
    submit([job("a", tmp_path, "")], tmp_path, launcher("local"))
    assert newest_launch(tmp_path).number == 2
    wait_for(lambda: words(tmp_path) == ["done"])


def test_gpus_are_shared_out_among_commands_side_by_side(
    tmp_path: Path, small_code: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = jobs.begin_launch(tmp_path)
    (launch.code / "cm3leon" / "run.py").write_text(
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    asked = [job("a", tmp_path, "", "", "", together=False)]
    LocalJobs(launch, devices=("4", "5", "6", "7"), parallel=2).run(asked)
    seen = {(launch.logs / f"a-{number}.log").read_text().strip() for number in range(3)}
    assert seen <= {"4,5", "6,7"}


# -------------------------------------------------------------------------------------------- SLURM


SBATCH = """#!/bin/bash
cp "$1" {folder}/script-$(ls {folder} | grep -c script).sh
grep -q 'account=broke' "$1" && {{
  echo 'sbatch: error: Batch job submission failed: Invalid account' >&2
  exit 1
}}
echo Submitted batch job $((100 + $(ls {folder} | grep -c script)))
"""
SINFO = """#!/bin/bash
echo 'main*|4|gpu:a100:8(S:0-1)'; echo 'main*|2|(null)'; echo 'cpu|16|(null)'
"""
SCONTROL = """#!/bin/bash
case $1 in
  ping) echo UP ;;
  show) grep "JobId=$4 " {folder}/known ;;
  requeue) touch {folder}/requeued ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path, small_code: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with commands that stand in for SLURM's.

    sbatch keeps the scripts that it is given there, and scontrol says the lines of the file
    `known`; requeue and scancel leave the files `requeued` and `cancelled`.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": SBATCH.format(folder=folder),
        "sinfo": SINFO,
        "srun": "#!/bin/bash\n",
        "scontrol": SCONTROL.format(folder=folder),
        "scancel": f'#!/bin/bash\necho "$@" >>{folder}/cancelled\n',
        "sacctmgr": "#!/bin/bash\necho physics; echo biology; echo broke\n",
    }

    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "known").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


BREAKS_OUT = "x\n#SBATCH --wrap='touch /tmp/owned'\ntouch owned"


@pytest.mark.parametrize(
    "fields",
    [
        *({name: BREAKS_OUT} for name in ("partition", "account", "qos", "constraint")),
        {"sbatch": {"comment": BREAKS_OUT}},
        {"sbatch": {BREAKS_OUT: 1}},
        {"stages": {"tokens": {"qos": BREAKS_OUT}}},
    ],
)
def test_no_setting_ends_a_line_of_the_script(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"control characters|not an option of sbatch") as error:
        launcher("slurm", **fields)
    assert str(error.value).count("\n") == 0


def test_a_run_folder_does_not_break_out_of_the_script(tmp_path: Path, slurm: Path) -> None:
    folder = tmp_path / BREAKS_OUT.replace("/", "")
    with pytest.raises(UserError, match=r"^run is .*x\\n#SBATCH .*control characters"):
        submit([job("run", folder, "")], folder, launcher("slurm"))
    assert not list(slurm.glob("script-*"))

    # Without control characters, a name of any kind is one quoted word wherever it stands.
    folder = tmp_path / "a'b\" c;$(touch owned)`touch owned`"
    submit([job("run", folder, "")], folder, launcher("slurm"))
    script = (slurm / "script-0.sh").read_text()
    assert "#SBATCH --job-name=a-b-c-touch-owned-touch-owned-.run\n" in script
    lines = [line for line in script.splitlines() if "owned" in line and "job-name" not in line]
    assert lines
    for line in lines:
        assert any(folder.name in word for word in shlex.split(line))


def test_sbatch_is_given_resources_arrays_and_dependencies(tmp_path: Path, slurm: Path) -> None:
    config = launcher(
        "slurm",
        nodes=2,
        gpus_per_node=8,
        partition="main",
        account="physics",
        mem_gb=1.5,
        cpus_per_task=3,
        setup=["module load x"],
        sbatch={"exclusive": True},
    )
    run, resources = tmp_path / "r", {"timeout_min": 7, "gpus_per_node": 0}
    asked = [
        job("tokens", run, "", "", "", together=False, resources=resources),
        job("pretraining", run, "", after=("tokens",)),
    ]
    found = submit(asked, run, config)
    assert [each.id for each in found] == ["101_0", "101_1", "101_2", "102"]
    assert found[1].log == run / "launch/1/jobs/101_1_0_log.out"

    # Commands that do not run together are an array, each of one process.
    tokens, pretraining = ((slurm / f"script-{number}.sh").read_text() for number in range(2))
    resources_of_tokens = ("nodes=1", "ntasks-per-node=1", "time=7", "mem=1500M")
    for line in ("array=0-2%3", *resources_of_tokens, "requeue", "account=physics"):
        assert f"#SBATCH --{line}\n" in tokens
    assert "gpus" not in tokens

    # One command on all GPUs, after the array.
    for line in (
        "dependency=afterok:101",
        "gpus-per-node=8",
        "ntasks-per-node=8",
        "signal=USR2@120",
        "exclusive",
        "kill-on-invalid-dep=yes",
        "job-name=r.pretraining",
    ):
        assert f"#SBATCH --{line}\n" in pretraining
    assert "\nmodule load x\n" in pretraining
    assert "--kill-on-bad-exit=1 --cpus-per-task=3" in pretraining
    assert f"PYTHONPATH={tmp_path}/r/launch/1/code" in pretraining
    assert subprocess.run(["bash", "-n", slurm / "script-1.sh"], check=True).returncode == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"partition": "mian"},
            "launcher.partition is mian, which the cluster does not have; did you mean main?",
        ),
        (
            {"nodes": 17, "partition": "cpu"},
            "launcher.nodes is 17; partition cpu has only 16 nodes; lower it, or choose another",
        ),
        ({"gpus_per_node": 1, "partition": "cpu"}, "nodes of partition cpu have no GPUs"),
        (
            {"gpus_per_node": 9},
            "launcher.gpus_per_node is 9; nodes of partition main have 8 GPUs; lower it, or choose "
            "another launcher.partition",
        ),
        (
            {"gpus_per_node": 4, "nodes": 5},
            "launcher.nodes is 5; partition main has only 4 nodes with 4 GPUs; lower it, or choose "
            "another launcher.partition",
        ),
        (
            {"account": "fysics"},
            "launcher.account is fysics, which is not one of yours; did you mean physics?",
        ),
        (
            {"account": "broke"},
            "sbatch refused the job b, and nothing is queued: .*Invalid account",
        ),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_queued(
    tmp_path: Path, slurm: Path, fields: dict[str, Any], sentence: str
) -> None:
    """The account `broke` is refused by sbatch alone, when the first job is queued already."""
    late = {}
    if fields.get("account") == "broke":
        late = {"account": fields.pop("account")}
    first = job("a", tmp_path / "r", "")
    asked = [first, job("b", tmp_path / "r", "", after=("a",), resources=late)]
    with pytest.raises(UserError, match=sentence):
        submit(asked, tmp_path / "r", launcher("slurm", **fields))
    assert not list((tmp_path / "r").glob("launch/*"))
    assert (slurm / "cancelled").exists() == bool(late)


def test_without_sbatch_one_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["experiment=digits_smoke", "launcher=slurm", f"run={tmp_path / 'r'}"]) == 2
    assert "launcher is slurm, and sbatch is not on the PATH" in capsys.readouterr().err


def test_a_full_disk_or_an_old_checkpoint_is_said_before_anything_is_queued(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = ["experiment=digits_smoke", "launcher=slurm", f"run={tmp_path / 'r'}"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e6))
        assert main(asked) == 2
    assert "is full, 5 MB are left" in capsys.readouterr().err

    old = tmp_path / "r/pretraining/step_00000005"
    old.mkdir(parents=True)
    (old / "state.json").write_text('{"step": 5, "format": 0}')
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "step_00000005 is a checkpoint of format 0, and this version reads format 1" in said
    assert not list(slurm.glob("script*"))


def slurm_says(folder: Path, *lines: str) -> None:
    (folder / "known").write_text("".join(f"{line}\n" for line in lines))


def test_status_is_put_together_from_scontrol_and_journals(
    tmp_path: Path, slurm: Path, capsys: Any
) -> None:
    run = tmp_path / "r"
    asked = [
        job("tokens", run, *[""] * 6, together=False),
        job("pretraining", run, "", after=("tokens",)),
    ]
    submit(asked, run, launcher("slurm"))
    launch = newest_launch(run)

    # Of six commands one is done, one failed before its first line, one runs, and three wait.
    slurm_says(
        slurm,
        "JobId=101 ArrayJobId=101 ArrayTaskId=3-5 JobState=PENDING Reason=Resources NodeList= ",
        "JobId=105 ArrayJobId=101 ArrayTaskId=2 JobState=RUNNING Reason=None NodeList=node7 "
        "ExitCode=0:0 ",
        "JobId=104 ArrayJobId=101 ArrayTaskId=1 JobState=FAILED Reason=x NodeList=node8 "
        "ExitCode=0:53 ",
        "JobId=102 JobState=PENDING Reason=Dependency NodeList= ",
    )
    write_event(launch.journal("tokens", 0), "done")
    write_event(launch.journal("tokens", 2), "started", at="x")
    assert words(run) == ["done", "failed", "running", "queued", "queued", "queued", "queued"]

    assert main(["status", f"run={run}"]) == 0
    said = capsys.readouterr().out
    assert "FAILED before its first line: see that node8 can write into the run folder" in said
    assert "3 of 6       queued     Resources" in said
    assert "queued     after tokens" in said

    # SLURM has forgotten the array: the command that had started is gone, and of those that had
    # not nothing is known.
    slurm_says(slurm, "JobId=102 JobState=CANCELLED Reason=Dependency NodeList= ")
    assert words(run) == ["done", "unknown", "gone", "unknown", "unknown", "unknown", "failed"]
    assert main(["cancel", f"run={run}"]) == 0
    assert "no job is running or waiting" in capsys.readouterr().out

    # No SLURM to ask.
    (slurm / "scontrol").unlink()
    assert words(run)[1] == "unknown"


def test_a_job_that_never_saw_its_folder_on_a_node_says_so(tmp_path: Path, slurm: Path) -> None:
    submit([job("a", tmp_path / "r", "")], tmp_path / "r", launcher("slurm", nodes=2))
    script = (slurm / "script-0.sh").read_text().replace("srun --nodes=2", "false")
    environment = {**os.environ, "SLURM_JOB_NODELIST": "node[1-2]"}
    assert subprocess.run(["bash", "-c", script], env=environment, check=False).returncode == 66
    [(_, state)] = follow.states(newest_launch(tmp_path / "r"))
    assert state.word == "failed"
    assert state.more.startswith("the run folder is not visible on all of node[1-2]")


# ------------------------------------------------------------------------------------- inside a job


@pytest.mark.parametrize(
    ("before", "code", "event", "requeued"),
    [
        (["started"], 137, "died", True),
        (["started", "died", "started", "died", "started"], 137, "stopped", False),
        (["started"], 2, "refused", False),
        (["started", "again"], 255, "again", False),
        ([], 66, "died", True),
    ],
)
def test_the_batch_script_looks_back(
    tmp_path: Path,
    slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[str],
    code: int,
    event: str,
    requeued: bool,
) -> None:
    submit([job("a", tmp_path / "r", "")], tmp_path / "r", launcher("slurm"))
    launch = newest_launch(tmp_path / "r")
    for name in before:
        write_event(launch.journal("a", 0), name, at="the beginning")

    slurm_says(slurm, "JobId=101 JobState=RUNNING ")
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    assert work.after_step(launch, "a", 0, 3, code) == code
    assert read_events(launch.journal("a", 0))[-1]["event"] == event
    assert (slurm / "requeued").exists() == requeued


def test_names_and_order_of_jobs_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="job a/b: its name must be"):
        submit([Job("a/b", (("x",),))], tmp_path, launcher("here"))
    with pytest.raises(UserError, match="job a is after b, which is not a job before it"):
        submit([Job("a", (("x",),), after=("b",))], tmp_path, launcher("here"))


# ------------------------------------------------------------------------------------- without jobs


def stage(run: Path, name: str, **finished: Any) -> Path:
    """The folder of a stage that was begun; one that has ended has a record of these fields."""
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "started.json").write_text("{}")
    if finished:
        (folder / "stage.json").write_text(json.dumps(finished))
    return folder


def test_status_of_a_run_made_here_tells_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Time left goes by the steps of the log and the times of files: here 200 steps in 400 s."""
    folder = tmp_path / "run"
    stage(folder, "documents", fingerprint="x", seconds=2.4, files={})
    training = stage(folder, "pretraining")
    (folder / "config.yaml").write_text("training: {steps: 1000}\n")
    log = training / "log.jsonl"
    log.write_text('{"step": 100, "loss": 3.5}\n{"step": 200, "loss": 2.25}\n{"step": 3')
    os.utime(training / "started.json", (1000, 1000))
    os.utime(log, (1400, 1400))

    assert main(["status", f"run={folder}"]) == 0
    documents, pretraining, end = capsys.readouterr().out.splitlines()
    assert documents.split() == ["documents", "done", "in", "2", "s"]
    assert pretraining.endswith("step 200 of 1,000, loss 2.250")
    assert "the command of the run, given again, continues from there" in end

    # While a process works there, which holds the lock.
    with locked(folder):
        assert main(["status", f"run={folder}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("step 200 of 1,000, loss 2.250, about 27 min left")

    # Resumed from step 100: 100 steps in 400 s, as the time of earlier steps does not count.
    (training / "step_00000100").mkdir()
    os.utime(training / "step_00000100", (900, 900))
    with locked(folder):
        main(["status", f"run={folder}"])
    assert capsys.readouterr().out.rstrip().endswith("about 53 min left")


def test_status_of_a_sweep_made_here_tells_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text("sweep: {}\n")
    for name in ("seed=0", "seed=1"):
        stage(tmp_path / name, "documents", fingerprint="x", seconds=3, files={})
        (tmp_path / name / "config.yaml").write_text("training: {steps: 9}\n")
    stage(tmp_path / "seed=1", "pretraining")
    assert main(["status", f"run={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "seed=0: documents done in 3 s",
        "seed=1: pretraining begun",
    ]


def test_status_of_nothing_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", f"run={tmp_path / 'gone'}"]) == 2
    assert f"nothing was begun in {tmp_path / 'gone'}" in capsys.readouterr().err
