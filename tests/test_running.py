"""What a run on several ranks refuses, and before which of its stages."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from cm3leon.experiment import load_experiment
from cm3leon.stages import running
from cm3leon.stages.running import run_experiment
from cm3leon.stages.stage import Stage
from cm3leon.types import UserError

TRAINED = ("image_tokenizer", "retriever", "pretraining")


def trained_stages(made: list[str]) -> list[Stage[Any]]:
    """Stages that take no time to make; those that train depend on their number of steps."""

    def stage(name: str, section: str) -> Stage[Any]:
        def make(run: Any, place: Path) -> None:
            made.append(name)
            (place / "weights").write_text("trained")

        def inputs(run: Any) -> Any:
            settings = getattr(run.experiment, section)
            return {section: {"steps": getattr(settings, "steps", None)}}

        return Stage(
            name, 1, inputs, make, needs=(), expensive=True, trains=lambda run: name in TRAINED
        )

    # In the order of a run; what comes between them does not matter here.
    return [
        stage("documents", "data"),
        stage("image_tokenizer", "image_tokenizer_training"),
        stage("retriever", "retriever_training"),
        stage("pretraining", "training"),
        stage("evaluation", "training"),
    ]


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder except the remembered checksums."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != running.DIGESTS:
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


@pytest.fixture
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the only rank, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("first_rank")
def test_ranks_refuse_a_later_stage_before_an_earlier_one_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(running, "stages_of", lambda experiment: trained_stages(made))
    folder = tmp_path / "run"
    first = load_experiment("digits_smoke")
    run_experiment(first, folder, until="retriever")
    assert made == ["documents", "image_tokenizer", "retriever"]
    before = everything(folder)

    # Both trainings would be made anew, but only the first one was asked for.
    changed = ["image_tokenizer_training.steps=3", "retriever_training.steps=3"]
    other = load_experiment("digits_smoke", changed)
    accepted: list[str] = []
    refusal = r"retriever in .* would make it anew .* say redo=retriever"
    with pytest.raises(UserError, match=refusal):
        run_experiment(
            other,
            folder,
            until="retriever",
            redo=["image_tokenizer"],
            accepted=lambda: accepted.append("yes"),
        )
    assert (made, accepted) == (["documents", "image_tokenizer", "retriever"], [])
    assert everything(folder) == before

    # What the run does not reach is not refused.
    run_experiment(other, folder, until="image_tokenizer", redo=["image_tokenizer"])
    assert made == ["documents", "image_tokenizer", "retriever", "image_tokenizer"]
