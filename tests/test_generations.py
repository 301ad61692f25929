"""An opened run has parts that belong together, each read with the settings that made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import cm3leon

from cm3leon.config import dump_yaml, recorded_settings
from cm3leon.experiment import load_experiment
from cm3leon.locks import locked
from cm3leon.records import STAGES
from cm3leon.stages import sharing
from cm3leon.stages.differences import differences
from cm3leon.stages.generations import check_generations, finished_settings
from cm3leon.stages.opening import open_run
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import StageRecord
from cm3leon.stages.table import stages_of
from cm3leon.stages.training_data import start_digest
from cm3leon.types import UserError

MADE = "0" * 64
ANOTHER = "1" * 64


def record(folder: Path, name: str, fingerprint: str = MADE, **content: Any) -> Path:
    """Write the record of a finished stage."""
    fields = {"fingerprint": fingerprint, "version": 1, "seconds": 1.0, "files": {}, **content}
    file = folder / name / "stage.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(fields))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of the digits whose records say that everything up to pretraining is finished."""
    run = tmp_path / "run"
    experiment = load_experiment("digits_smoke")
    needs: dict[str, str] = {}
    for name in ("documents", "text_tokenizer", "image_tokenizer", "retriever"):
        record(run, name, needs=dict(needs))
        needs[name] = MADE
    model = recorded_settings(experiment.model)
    record(run, "pretraining", needs=needs, settings={"model": model, "seed": 0})
    (run / "config.yaml").write_text(dump_yaml(recorded_settings(experiment)))
    return run


def test_the_table_and_the_order_of_the_records_agree() -> None:
    for name in ("digits_smoke", "corpus"):
        overrides = ["data.path=none"] if name == "corpus" else []
        stages = [stage.name for stage in stages_of(load_experiment(name, overrides))]
        assert stages == [known for known in STAGES if known in stages]


def test_settings_of_what_is_finished_win_over_what_was_asked_for_last(folder: Path) -> None:
    """Another width with until=documents leaves the finished run as it was made."""
    asked = load_experiment("digits_smoke", ["model.width=128", "seed=3", "training.steps=77"])
    (folder / "config.yaml").write_text(dump_yaml(recorded_settings(asked)))
    opened = open_run(folder, needs=("pretraining",)).experiment
    assert opened.model.config.width == 64
    assert opened.seed == 0
    assert opened.training.steps == 77  # no record says otherwise


def test_parts_of_different_generations_are_refused_with_what_differs(folder: Path) -> None:
    check_generations(folder, ("pretraining",))

    # The tokenizer is made anew with other settings; the earlier one is kept among the superseded.
    record(folder, "text_tokenizer", inputs={"text_tokenizer": {"vocab_size": 512}})
    superseded = folder / "superseded" / f"text_tokenizer-{MADE[:12]}"
    shutil.copytree(folder / "text_tokenizer", superseded)
    record(folder, "text_tokenizer", ANOTHER, inputs={"text_tokenizer": {"vocab_size": 300}})

    for needs in (("pretraining",), ()):
        with pytest.raises(UserError, match="was made with another text_tokenizer"):
            open_run(folder, needs=needs)
    with pytest.raises(UserError) as refusal:
        check_generations(folder, ("pretraining",))
    assert str(refusal.value) == (
        f"run: pretraining in {folder} was made with another text_tokenizer than the one there now "
        "(text_tokenizer.vocab_size was 512, is 300); make it anew with redo=pretraining, or put "
        "the earlier text_tokenizer back by running the command with its settings"
    )


def test_a_part_of_a_part_is_looked_at_too(folder: Path) -> None:
    record(folder, "documents", ANOTHER)
    with pytest.raises(UserError, match="was made with another documents than"):
        check_generations(folder, ("pretraining",))


def test_a_file_that_a_stage_was_made_with_is_compared(folder: Path) -> None:
    file = "text_tokenizer/tokenizer.json"
    record(folder, "tokens", made_with={file: "a"})
    record(folder, "text_tokenizer", files={"tokenizer.json": "a"})
    check_generations(folder, ("tokens",))
    record(folder, "text_tokenizer", files={"tokenizer.json": "b"})
    with pytest.raises(UserError, match=f"tokens in .* was made with another {file} than"):
        check_generations(folder, ("tokens",))


def test_what_nobody_uses_may_be_of_an_earlier_generation(folder: Path) -> None:
    record(folder, "reconstruction", needs={"image_tokenizer": ANOTHER})
    record(folder, "evaluation", needs={"pretraining": ANOTHER})
    open_run(folder, needs=("pretraining",))
    open_run(folder)


def test_older_records_say_nothing_and_are_read(folder: Path) -> None:
    for name in ("documents", "pretraining"):
        file = folder / name / "stage.json"
        file.write_text(json.dumps({"fingerprint": MADE, "seconds": 1.0, "files": {}}))
    assert open_run(folder, needs=("pretraining",)).experiment.model.config.width == 64


def test_records_cannot_name_plugins_or_launchers(folder: Path) -> None:
    record(
        folder,
        "pretraining",
        settings={"plugins": ["/tmp/evil.py"], "launcher": {"name": "slurm"}, "other": 1},
    )
    assert finished_settings(folder) == {}
    opened = open_run(folder).experiment
    assert opened.plugins == []
    assert opened.launcher.name == "here"


def test_a_record_without_files_switches_no_check_off(folder: Path) -> None:
    with pytest.raises(UserError, match=r"documents/stage\.json names no files"):
        _ = open_run(folder).corpus


def test_a_run_to_start_from_has_to_be_of_one_piece(folder: Path, tmp_path: Path) -> None:
    record(folder, "text_tokenizer", ANOTHER)
    experiment = load_experiment("digits_smoke", [f"training.start={folder}"])
    with pytest.raises(
        UserError, match=r"^training\.start: pretraining in .* another text_tokenizer"
    ):
        start_digest(RunFolder(experiment, tmp_path / "new", torch.device("cpu")))


def test_a_damaged_record_is_a_sentence(folder: Path) -> None:
    (folder / "documents" / "stage.json").write_text("[1")
    with pytest.raises(UserError, match=r"documents/stage\.json is damaged"):
        open_run(folder)


# ----------------------------------------------------------------------------------------- commands


def everything(folder: Path) -> dict[str, bytes]:
    """Content of each file below a folder, by its path there."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_refused_command_writes_nothing(tmp_path: Path) -> None:
    """Neither beside a process that works in the run, nor where settings are refused."""
    run = tmp_path / "run"
    words = ("experiment=digits_smoke", f"run={run}", "until=documents")
    cm3leon(*words)

    # A finished retriever that other settings made.
    record(run, "retriever", inputs={"retriever_training": {"steps": 20}})
    before = everything(run)

    with locked(run):
        refused = cm3leon(*words, "split.held_out=0.5", check=False)

    assert refused.returncode == 2
    assert "another process is working" in refused.stderr
    assert everything(run) == before

    refused = cm3leon(*words[:2], "retriever_training.steps=30", check=False)
    assert refused.returncode == 2
    assert "retriever_training.steps was 20, is 30" in refused.stderr
    assert "say redo=retriever" in refused.stderr
    assert everything(run) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run=/"], "run is /, the root of the file system"),
        (["redo=pretrain"], "redo is pretrain, which is not a stage"),
    ],
)
def test_folders_and_stages_that_are_none_are_refused(
    tmp_path: Path, words: list[str], sentence: str
) -> None:
    refused = cm3leon("experiment=digits_smoke", f"run={tmp_path / 'run'}", *words, check=False)
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_of_ones_own_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    refused = cm3leon("experiment=digits_smoke", f"run={tmp_path}", check=False)
    assert refused.returncode == 2
    assert "holds files that are not those of a run" in refused.stderr
    assert list(everything(tmp_path)) == ["letter.txt"]


def test_workers_are_given_the_experiment_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not read config.yaml, which another command may have written meanwhile."""
    given: list[Any] = []

    class Process:
        exitcode = 0

        def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
            given.append(args)

        def start(self) -> None: ...
        def join(self) -> None: ...
        def terminate(self) -> None: ...

    # No process is started: what it would be given is enough.
    monkeypatch.setattr(
        sharing.multiprocessing, "get_context", lambda method: SimpleNamespace(Process=Process)
    )

    settings = ["data.path=none", "shards.workers=2", "split.held_out=0.125"]
    run = RunFolder(load_experiment("corpus", settings), tmp_path, torch.device("cpu"))
    sharing.share_out(run, tmp_path / "tokens", lambda run, folder, part: None)
    assert [args[0]["split"]["held_out"] for args in given] == [0.125, 0.125]

    # What a process does with it: the same run, and its part of the work.
    made: list[Any] = []
    sharing._work(*given[1][:3], lambda run, folder, part: made.append((run, part)), (1, 2))
    ((theirs, part),) = made
    assert theirs.experiment == run.experiment
    assert part == (1, 2)


def test_a_setting_that_only_one_record_has_is_a_difference() -> None:
    """A setting that is null is another thing than no setting."""
    inputs = ({"text": {"size": 1, "fill": None}}, {"text": {"size": 1}, "seed": 0})
    before, now = (StageRecord("", version=1, inputs=each) for each in inputs)
    assert differences(before, now) == [
        "text.fill was null, is not there",
        "seed was not there, is 0",
    ]
    assert differences(before, before) == []
