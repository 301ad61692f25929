"""The command line: what it prints, its exit codes, and its messages of one line."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from cm3leon import __version__, commands, run
from cm3leon.commands import COMMANDS, GROUPS, load_command
from cm3leon.config import describe
from cm3leon.records import KINDS

ROOT = Path(__file__).resolve().parent.parent
OF_EXPERIMENTS = {
    "run": "run={}/run",
    "show": "run={}/run",
    "plan": "",
    "part": "run={}/run stage=tokens part=0/2",
}
"""Commands that take the settings of an experiment, with further words that they need."""


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
main(["--help"]), main(["generate", "--help"]), main(["ru"]), main(["experiment"]), main([])
print({"torch", "pyarrow", "cm3leon.experiment"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("usage: python -m cm3leon.run")
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_soon_give_their_cores_away_unless_the_user_says_otherwise(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "main", lambda: 0)
    monkeypatch.setattr(run, "guard", lambda: None)
    monkeypatch.setattr(run, "mask_tracebacks", lambda: None)
    # Each is set first, so that monkeypatch puts it back as it was.
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit):
        run.script()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_exit_code_of_the_process_for_a_mistake() -> None:
    done = cm3leon("expert")
    assert done.returncode == 2
    sentence = "expert is not a known command; did you mean export? "
    known = ", ".join(sorted(COMMANDS))
    assert done.stderr == f"cm3leon: {sentence}(known: {known})\n"
    assert done.stdout == ""


def test_help_names_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {word} " in text for word in (*COMMANDS, *run.FLAGS))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "`run` needs an experiment: experiment=NAME, for example experiment=digits"),
        (["--shaw"], "--shaw is not a known flag; did you mean --show?"),
        (["--schema", "bogus"], "--schema takes no bogus; its only setting is plugins="),
        (
            ["--schema", "experiment=digits"],
            "--schema takes no experiment=digits; its only setting",
        ),
        (["--list", "seed=3"], "--list takes no seed=3; its only setting is plugins="),
        (
            ["run", "digits"],
            "digits follows the command run; everything after it must be key=value",
        ),
        (["experiment=no/such.yaml"], "no/such.yaml is not a file"),
        (
            ["export", "to=[hf", "run=x", "out=x"],
            'to is "[hf"; it must be one of hf, peft, cm3leon',
        ),
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
    """A line of docs/commands.md."""
    folders: list[Path] = []
    monkeypatch.setattr(
        "cm3leon.studies.run_study", lambda sweep, **options: folders.append(sweep.folder)
    )
    monkeypatch.chdir(tmp_path)

    # A folder of its own by default, the one that is given, and that of a sweep's file.
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
    monkeypatch.setattr("cm3leon.commands.cancel.main", Mock(side_effect=error))
    assert run.main(["cancel", "run=x"]) == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone"), ZeroDivisionError(), ValueError("bug")]
)
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("cm3leon.commands.cancel.main", Mock(side_effect=error))
    with pytest.raises(type(error)):
        run.main(["cancel", "run=x"])


def test_a_command_gets_its_options_and_says_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    main = Mock(return_value=75)
    monkeypatch.setattr("cm3leon.commands.export.main", main)
    assert run.main(["export", "to=hf", "run=a=b", "out=null"]) == 75
    (options,) = main.call_args.args
    assert (options.to, options.run, options.out) == ("hf", Path("a=b"), Path("null"))


def test_a_command_takes_the_settings_of_its_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    main = Mock(return_value=None)
    monkeypatch.setattr("cm3leon.commands.run.main", main)
    words = ["training.steps=2", "experiment=digits", "redo=tokens, vectors"]
    words += ["until=", "decoder=cfg"]
    assert run.main(words) == 0

    (options,) = main.call_args.args
    assert (options.experiment, options.until) == ("digits", None)
    assert options.folder == Path("runs/digits")
    assert options.stages_to_redo == ["tokens", "vectors"]
    assert options.overrides == ("training.steps=2", "decoder=cfg")


# ------------------------------------------------------------------------------------ every command


NOT_COMMANDS = {
    "__init__",
    "asking",
    "help",
    "layouts",
    "listening",
    "listing",
    "schema",
    "sample",
    "sample_words",
    "traced_sample",
    "words",
}
"""Modules of the folder that are no commands, but that commands share."""


def test_every_file_is_a_command_that_is_listed() -> None:
    files = {file.stem for file in (ROOT / "cm3leon" / "commands").glob("*.py")}
    assert files - NOT_COMMANDS == set(COMMANDS)
    assert len(COMMANDS) == len(set(COMMANDS))


def test_a_new_command_is_a_file_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new command is the example of docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    example = re.search(r'```python\n(""".+?\n)```', page, re.S)
    assert example

    (tmp_path / "count.py").write_text(example[1])
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setattr(commands, "COMMANDS", (*COMMANDS, "count"))

    assert run.main(["count", "--help"]) == 0
    assert "  run: a path, required\n      A run folder whose" in capsys.readouterr().out
    assert run.main(["count"]) == 2
    said = capsys.readouterr().err.removeprefix("cm3leon: ").strip()
    assert said in page.replace("\n", " ")


def test_the_words_for_jobs_stand_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--help"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    heading, *lines = next(block for block in blocks if "  part " in block).splitlines()
    assert heading == "commands that launchers give to jobs:"
    assert [line.split()[0] for line in lines] == list(GROUPS["that launchers give to jobs"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([name, "--help"]) == 0
    text = capsys.readouterr().out

    command = load_command(name)
    assert text.startswith(f"usage: python -m cm3leon.run {name} ")
    assert command.summary in text
    assert command.summary.endswith(".")
    assert f"python -m cm3leon.run {name} {' '.join(command.example[:1])}" in text

    for doc in describe(command.options):
        default = ", required" if doc.default == "required" else f" = {doc.default}"
        assert f"\n  {doc.name}: {doc.type}{default}"[:70] in text
        assert doc.sentence[:40] in text


# The command doctor has no option that it needs.
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "doctor"])
def test_an_option_that_is_missing_is_answered_with_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each required option is missing once, while the others are as in the example."""
    command = load_command(name)
    required = [doc.name for doc in describe(command.options) if doc.default == "required"]
    assert required
    monkeypatch.setattr("cm3leon.data.formats.told_source", lambda path: ("folder", []))

    for missing in required:
        names = (f"{missing}=", f"{missing}.")
        given = [word for word in command.example if not word.startswith(names)]
        assert run.main([name, *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        key = rf"{missing}(\.path)?="
        assert re.fullmatch(rf"cm3leon: `{name}` needs an? .+: {key}.+, for example {key}.+", line)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(OF_EXPERIMENTS)))
def test_an_unknown_option_is_answered_with_the_nearest(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = load_command(name)
    known = describe(command.options)[0].name
    given = [word for word in command.example if "." not in word.partition("=")[0]]
    assert run.main([name, *given, f"{known}x=1"]) == 2
    assert f"{known}x is not a known key; did you mean {known}?" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(OF_EXPERIMENTS)))
def test_an_unknown_setting_is_answered_with_the_nearest(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=digits", "trainin.steps=1", *OF_EXPERIMENTS[name].format(tmp_path).split()]
    assert run.main([name, *words]) == 2
    assert "trainin is not a known key; did you mean training?" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- --list


@pytest.mark.parametrize(
    ("names", "shown", "hidden"),
    [
        (["training"], ["  training: a section", "training.warmup_steps: a whole number"], "DECOD"),
        (["training.steps"], ["      training.steps: a whole number, at least 1 = 1000"], "warmup"),
        (["generate"], ["COMMANDS", "n: a whole number, at least 1 = 8"], "DECODERS"),
        (["packing", "shards"], ["packing.method: one of", "shards.workers: a"], "training.steps"),
        (["split"], ["split.held_out: "], "COMMANDS"),
        (["decoder"], ["DECODERS", "  cd_k  (built-in)"], "SOURCES"),
        (["cd_k"], ["  cd_k  (built-in)"], "  top_p  "),
        (["decoder.cfg"], ["  top_p  (built-in)", "      cfg: "], "temperature:"),
        (["digits_smoke"], ["EXPERIMENTS", "  digits_smoke\n    cost"], "  digits\n"),
        (["plan", "export"], ["mfu: ", "out: a path, required"], "SECTIONS"),
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
    for name in COMMANDS:
        assert f"\n  {name}\n" in text
        for doc in describe(load_command(name).options):
            assert f"      {doc.name}: " in text


def test_list_shows_every_component_and_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    from cm3leon.experiment import list_experiments
    from cm3leon.registry import REGISTRIES

    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out

    # A plugin's component with its sentence, and one of its settings.
    name = "min_p  (plugins/example)"
    assert f"\n  {name}\n    Samples among the tokens that are not much less likely" in text
    setting = "min_p: a number from 0 to 1 = 0.1"
    assert f"\n      {setting}\n          A token stays if its probability" in text

    for registry in REGISTRIES:
        assert all(f"\n  {name}  ({registry.origin(name)})\n" in text for name in registry.names())
    for name, entry in list_experiments().items():
        assert f"\n  {name}\n    cost    {entry.cost}\n    expect  {entry.expect}\n" in text
    assert max(map(len, text.splitlines())) <= 120
