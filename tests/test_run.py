"""The command line: what it prints, its exit codes, and its one-line messages."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cm3leon import __version__, run
from cm3leon.config import describe
from cm3leon.records import KINDS

ROOT = Path(__file__).resolve().parent.parent


def cm3leon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cm3leon.run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
    )


def test_help_and_typos_answer_before_anything_heavy_is_imported() -> None:
    code = """
import sys
from cm3leon.run import main
main(["--help"]), main(["ru"]), main(["experiment"]), main([])
print({"torch", "numpy", "cm3leon.experiment"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("usage: python -m cm3leon.run")
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_exit_code_of_the_process_for_a_mistake() -> None:
    done = cm3leon("expert")
    assert done.returncode == 2
    sentence = "expert is not a known command; did you mean export? "
    known = ", ".join(sorted(run.COMMANDS))
    assert done.stderr == f"cm3leon: {sentence}(known: {known})\n"
    assert done.stdout == ""


def test_help_names_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {word} " in text for word in (*run.COMMANDS, *run.FLAGS))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "experiment is missing; write experiment=NAME"),
        (["--shaw"], "--shaw is not a known flag; did you mean --show?"),
        (
            ["run", "digits"],
            "digits follows the command run; everything after it must be key=value",
        ),
        (["experiment=no/such.yaml"], "no/such.yaml is not a file"),
        (["export", "to=[hf"], "to is [hf, which is not known; did you mean hf?"),
        (["search", "run=x", "text=x", "count=[5"], "count is [5, which is not valid YAML"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"cm3leon: {sentence}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("there", "kind", "words"),
    [
        ("run", "sweep", ["experiment=digits_smoke", "sweep.seed=1,2"]),
        ("run", "study", ["experiment=scenes"]),
        ("sweep", "run", ["experiment=digits_smoke"]),
        ("sweep", "study", ["experiment=scenes"]),
        ("study", "run", ["experiment=digits_smoke", "launcher=torchrun"]),
        ("study", "sweep", ["experiment=digits_smoke", "sweep.seed=1,2"]),
    ],
)
def test_a_run_a_sweep_and_a_study_need_a_folder_each(
    there: str,
    kind: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / KINDS[there]).write_text("kept: 1\n")
    assert run.main([*words, f"run={tmp_path}"]) == 2
    said = f"cm3leon: run: {tmp_path} is the folder of a {there}, and a {kind} needs one of its own"
    assert capsys.readouterr().err.startswith(said)
    assert [file.name for file in tmp_path.rglob("*")] == [KINDS[there]]


def test_a_sweep_on_the_command_line_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Readme's line, after `make demo`."""
    folders: list[Path] = []
    monkeypatch.setattr("cm3leon.sweep.run_sweep", lambda sweep: folders.append(sweep.folder))
    monkeypatch.chdir(tmp_path)
    words = ["experiment=digits", "sweep.training.learning_rate=1e-3,3e-3"]
    assert run.main(words) == 0
    assert run.main([*words, "run=mine"]) == 0
    assert run.main(["experiment=sweep_digits"]) == 0
    assert folders == [
        tmp_path / "runs" / "digits-sweep",
        tmp_path / "mine",
        tmp_path / "runs" / "sweep_digits",
    ]
    assert not list(tmp_path.iterdir())


def raising(error: BaseException) -> run.Command:
    def function(arguments: Sequence[str]) -> None:
        raise error

    return run.Command("fails", function)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            KeyboardInterrupt(),
            130,
            "cm3leon: stopped; the progress is kept, and the same command goes on from there\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            2,
            "cm3leon: runs/x: No space left on device; ",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            2,
            "cm3leon: runs: Permission denied; ",
        ),
    ],
)
def test_stops_that_are_no_bug(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    monkeypatch.setitem(run.COMMANDS, "run", raising(error))
    assert run.main(["run"]) == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone"), ZeroDivisionError(), ValueError("bug")]
)
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setitem(run.COMMANDS, "run", raising(error))
    with pytest.raises(type(error)):
        run.main(["run"])


def test_commands_get_the_words_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Sequence[str]] = []
    monkeypatch.setitem(run.COMMANDS, "export", run.Command("records", given.append))
    assert run.main(["export", "to=hf", "run=a=b"]) == 0
    assert given == [["to=hf", "run=a=b"]]


@pytest.mark.parametrize(
    ("names", "shown", "hidden"),
    [
        (["training"], ["  training: a section", "training.warmup_steps: a whole number"], "DECOD"),
        (["training.steps"], ["      training.steps: a whole number, at least 1 = 1000"], "warmup"),
        (["generate"], ["COMMANDS", "n: a whole number, at least 1 = 8"], "DECODERS"),
        (["packing", "shards"], ["packing.method: one of", "shards.workers: a"], "training.steps"),
        (["generation"], ["generation.samples: a whole number, at least 1 = 1000"], "COMMANDS"),
        (["decoder"], ["DECODERS", "  cd_k  (built-in)"], "SOURCES"),
        (["cd_k"], ["  cd_k  (built-in)"], "  top_p  "),
        (["decoder.cfg"], ["  top_p  (built-in)", "      cfg: "], "temperature:"),
        (["digits_smoke"], ["EXPERIMENTS", "  digits_smoke\n    cost"], "  digits\n"),
        (["plan", "export"], ["mfu: ", "hf: a path, required"], "SECTIONS"),
        (["sweep_trials"], ["sweep_trials: a whole number, at least 1"], "DECODERS"),
    ],
)
def test_list_takes_names(
    names: list[str], shown: list[str], hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--list", *names]) == 0
    text = capsys.readouterr().out
    assert all(each in text for each in shown), text
    assert hidden not in text


def test_list_names_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "trainin"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cm3leon: --list trainin: there is no such command, section, component")
    assert "did you mean training?" in said


def test_list_has_the_options_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "commands"]) == 0
    text = capsys.readouterr().out
    for name, command in run.COMMANDS.items():
        assert f"\n  {name}\n" in text
        for options in map(run.options_class, command.options):
            for doc in describe(options):
                assert f"      {doc.name}: " in text


def test_list_shows_every_component_and_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    from cm3leon.experiment import list_experiments
    from cm3leon.registry import REGISTRIES

    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert (
        "\n  min_p  (plugins/example)\n    Samples among the tokens that are not much less likely"
        in text
    )
    assert (
        "\n      min_p: a number from 0 to 1 = 0.1\n          A token stays if its probability"
        in text
    )
    for registry in REGISTRIES:
        assert all(f"\n  {name}  ({registry.origin(name)})\n" in text for name in registry.names())
    for name, entry in list_experiments().items():
        assert f"\n  {name}\n    cost    {entry.cost}\n    expect  {entry.expect}\n" in text
    assert max(map(len, text.splitlines())) <= 120
