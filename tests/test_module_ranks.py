"""Image tokenizers and the encoder are trained by several ranks as by one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import cm3leon
from module_ranks import CODES, STEPS, train_all
from processes import finish, group
from safetensors.torch import load_file
from torch import Tensor

from cm3leon.experiment import load_experiment
from cm3leon.registry import discover
from cm3leon.stages.running import trained_together
from cm3leon.tokenizers.image.quantizer import EMAQuantizer
from cm3leon.training import parallel
from cm3leon.training.distributed import Ranks

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("adversarial", "far", "clip")
MOVED: Counter[str] = Counter()
"""Number of codes that the training by one process moved, by how their new vectors were drawn."""

discover()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the trainings by one process; dead codes that are moved are counted."""
    folder = tmp_path_factory.mktemp("alone")
    move = EMAQuantizer._move

    def counted(self: Any, dead_M: Tensor, z_ND: Tensor, weight_N: Tensor | None) -> None:
        how = "evenly" if weight_N is None else "by distance"
        MOVED[how] += len(dead_M)
        move(self, dead_M, z_ND, weight_N)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMAQuantizer, "_move", counted)
        train_all(folder, Ranks(torch.device("cpu")))
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same trainings by two ranks, each with half of every batch."""
    folder = tmp_path_factory.mktemp("together")
    assert finish(group("module_ranks", [folder], 2)) == [0, 0]
    return folder


def records(folder: Path) -> list[dict[str, float]]:
    """The figures of each step, without those that are times."""
    found = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.append({name: v for name, v in record.items() if not name.endswith("_second")})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one(name: str, alone: Path, together: Path) -> None:
    one, two = records(alone / name), records(together / name)
    assert [record["step"] for record in two] == list(range(1, STEPS + 1))
    for record, expected in zip(two, one, strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-6)

    weights = load_file(together / name / "model.safetensors")
    others = numbers = 0
    for key, weight in load_file(alone / name / "model.safetensors").items():
        close = torch.isclose(weights[key], weight, atol=1e-4, rtol=1e-3)
        assert close.all() or "quantizer" not in key
        others, numbers = others + int((~close).sum()), numbers + close.numel()

    # Some gradients are 0 but for rounding, such as those of biases before a norm, and AdamW makes
    # whole steps of them.
    assert others < 0.02 * numbers
    if name == "adversarial":
        assert {"adversarial_weight", "discriminator_loss"} <= set(two[-1])


def test_dead_codes_were_moved(alone: Path) -> None:
    """Otherwise the test above would not see whether ranks move the same codes alike."""
    # At the first step all codes of both tokenizers are moved; the dead ones come on top of these.
    assert MOVED["evenly"] > 2 * CODES + 5
    assert MOVED["by distance"] > 5


def test_gradients_are_averaged_once_in_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def averaged(value: torch.Tensor) -> torch.Tensor:
        sizes.append(value.numel())
        return value / 2

    monkeypatch.setattr(parallel, "averaged", averaged)
    module: Any = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    parallel.replicate(module, Ranks(torch.device("cpu"), 0, 2, joined=True))
    for _ in range(3):
        module(torch.ones(5, 3)).sum().backward()
    assert sizes == [12 + 8 + 2] * 3

    # The loss has a gradient of 5 for the bias, one of each of five rows. Each backward pass adds
    # it and halves the sum: 5 / 2 = 2.5, then (2.5 + 5) / 2 = 3.75, then (3.75 + 5) / 2 = 4.375.
    assert module[1].bias.grad.tolist() == [4.375, 4.375]


@pytest.mark.parametrize(
    ("ranks", "until", "together"),
    [
        (2, None, ["image_tokenizer", "retriever", "pretraining"]),
        (2, "tokens", ["image_tokenizer", "retriever"]),
        (2, "text_tokenizer", []),
        (7, None, ["pretraining"]),  # which cannot share the batches of the others
    ],
)
def test_what_ranks_train_together(
    ranks: int, until: str | None, together: list[str], tmp_path: Path
) -> None:
    experiment = load_experiment("digits_smoke", ())
    assert trained_together(experiment, tmp_path, until, ranks) == together


@pytest.mark.slow
def test_two_ranks_make_the_stages_that_one_process_makes(tmp_path: Path) -> None:
    """Image tokenizer and encoder are trained together; the first rank makes what lies between."""
    steps = []
    for stage in ("image_tokenizer_training", "retriever_training"):
        for setting in ("steps=4", "log_every=1", "callback_every=2", "precision=float32"):
            steps.append(f"{stage}.{setting}")
    words = ["experiment=digits_smoke", "until=retriever", *steps]

    # One process, and then two that torchrun starts.
    cm3leon(*words, f"run={tmp_path / 'one'}")

    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = ["-m", "cm3leon.run", *words, f"run={tmp_path / 'two'}"]
    subprocess.run([sys.executable, *start, *run], check=True, cwd=ROOT, timeout=300)

    for stage in ("image_tokenizer", "retriever"):
        one, two = tmp_path / "one" / stage, tmp_path / "two" / stage
        assert [record["loss"] for record in records(two)] == pytest.approx(
            [record["loss"] for record in records(one)], rel=1e-5
        )
        weights = load_file(two / "model.safetensors")
        for key, weight in load_file(one / "model.safetensors").items():
            torch.testing.assert_close(weights[key], weight, atol=2e-4, rtol=1e-3)
