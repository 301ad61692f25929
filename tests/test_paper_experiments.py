"""The experiments of the paper's sizes have the paper's settings and run when they are shrunken."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graphs import Graphs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cm3leon.decoders.generate import generate
from cm3leon.experiment import is_sweep, list_experiments, load_experiment
from cm3leon.registry import LAUNCHERS, MODELS
from cm3leon.run import main
from cm3leon.stages import validation
from cm3leon.stages.files import IMAGE_TOKENIZER, TEXT_TOKENIZER
from cm3leon.stages.pretraining import check_tokenizers
from cm3leon.stages.run_folder import RunFolder
from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.types import UserError

PAPER = {
    # Layers, width, head size, tokens of a step, peak rate, warm-up, GPUs, tokens: Table 3, and
    # Table 4 for sft.
    "pretrain_350m": (24, 1024, 64, 2**23, 6e-4, 1500, 256, 1.4e12),
    "pretrain_760m": (24, 1536, 64, 2**23, 5e-4, 1500, 256, 1.9e12),
    "pretrain_7b": (32, 4096, 128, 2**23, 1.2e-4, 1500, 512, 2.4e12),
    "sft_760m": (24, 1536, 64, 2**21, 5e-5, 150, 64, 30e9),
    "sft_7b": (32, 4096, 128, 2**21, 5e-5, 150, 128, 30e9),
}
PRETRAINING = [name for name in list_experiments() if name.startswith("pretrain_")]
FINE_TUNING = [
    name for name in list_experiments() if name.startswith("sft_") and not is_sweep(name)
]


def those_for_small_clusters_are_slow(names: list[str]) -> list[Any]:
    """The names; what is named after the memory of its GPUs differs in what a shrunken run leaves
    out, and is left to `make test-all`."""
    given: list[Any] = []
    for name in names:
        marks = [pytest.mark.slow] if name.endswith("gb") else []
        given.append(pytest.param(name, marks=marks))
    return given


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name: str) -> None:
    experiment = load_experiment(name)
    model, training = experiment.model.config, experiment.training
    *settings, tokens = PAPER[name]

    # What differs between the sizes.
    assert settings == [
        model.layers,
        model.width,
        model.head_size,
        training.batch_tokens,
        training.learning_rate,
        training.warmup_steps,
        LAUNCHERS.build(experiment.launcher).gpus,
    ]
    assert training.steps == round(tokens / training.batch_tokens)

    # What all of them share.
    assert (model.seq_len, model.mlp_ratio, model.init_std, model.position_init_std) == (
        4096,
        4,
        0.006,
        0.0002,
    )
    assert (training.optimizer, training.beta1, training.beta2) == ("adamw", 0.9, 0.95)
    assert (training.weight_decay, training.clip, training.schedule, training.precision) == (
        0.1,
        1.0,
        "linear",
        "bf16",
    )

    # Pretraining retrieves documents and masks; fine-tuning does neither.
    pretraining = name.startswith("pretrain")
    retriever = experiment.retriever.config
    assert experiment.objective.name == ("cm3" if pretraining else "instruct")
    assert experiment.packing.method == ("together" if pretraining else "whole")
    assert retriever.max_documents == (3 if pretraining else 0)
    assert (retriever.per_modality, retriever.query_dropout, retriever.encoder.pretrained) == (
        2,
        0.2,
        "openai",
    )

    # The vocabulary of the run; no device is asked for. Blocks divide among GPUs and micro-batches.
    run = RunFolder(experiment, Path("none"), None)  # type: ignore[arg-type]
    assert run.vocab.size == 2**16
    blocks = training.blocks(model.seq_len)
    assert blocks % (LAUNCHERS.build(experiment.launcher).gpus * training.micro_batch) == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a shrunken experiment up to its pretraining; up to there all experiments agree."""
    run = tmp_path_factory.mktemp("smoke") / "prepared"
    words = ["experiment=pretrain_350m", "overrides=smoke", f"run={run}", "until=neighbours"]
    assert main(words) == 0
    return run


def smoke(name: str, prepared: Path, run: Path, *more: str) -> list[float]:
    """Losses of the few steps of a shrunken experiment."""
    shutil.copytree(prepared, run)
    assert main([f"experiment={name}", "overrides=smoke", f"run={run}", *more]) == 0
    assert (run / "pretraining" / "model.safetensors").is_file()
    lines = (run / "pretraining" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", those_for_small_clusters_are_slow(PRETRAINING))
def test_pretraining_runs_when_shrunken(name: str, prepared: Path, tmp_path: Path) -> None:
    losses = smoke(name, prepared, tmp_path / "run")
    assert len(losses) == 6
    assert losses[-1] < losses[0]

    # Some images were drawn in a row, each with the retrieved documents that stood before it.
    events = EventAccumulator(str(tmp_path / "run" / "pretraining" / "tensorboard")).Reload()
    for tag, widths in (
        ("generated", [32]),
        ("generated_with_documents", [34 * n + 32 for n in (1, 2, 3)]),
    ):
        drawn = events.Images(tag)
        assert [image.step for image in drawn] == [3, 6]
        assert any(drawn[0].width % width == 0 for width in widths)


def test_images_are_drawn_in_one_batch_and_spend_no_graph(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions are drawn twice, each time without and with documents.

    All through the training, the layers stay one graph.
    """
    graphs = Graphs()
    asked: list[int] = []
    decoded: list[int] = []

    def counted_generate(model: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return generate(model, prompts, *args, **options)

    def counted_decode(self: Any, codes_BN: Any, *args: Any) -> Any:
        decoded.append(len(codes_BN))
        return decode(self, codes_BN, *args)

    decode = ImageTokenizer.decode

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs.backend))
    monkeypatch.setattr(validation, "generate", counted_generate)
    monkeypatch.setattr(ImageTokenizer, "decode", counted_decode)

    # The training compiles anew, and leaves nothing compiled to other tests.
    torch._dynamo.reset()
    smoke("pretrain_350m", prepared, tmp_path / "run", "training.compile=true")
    torch._dynamo.reset()

    assert graphs.count == {"forward": 1, "backward": 1}
    assert len(asked) == len(decoded) == 2
    assert asked[0] == asked[1] <= 2 * validation.SHOWN

    # Retrieved documents are decoded beside the images that are drawn.
    assert all(images > prompts for images, prompts in zip(decoded, asked, strict=True))


@pytest.mark.parametrize("name", those_for_small_clusters_are_slow(FINE_TUNING))
def test_fine_tuning_runs_when_shrunken(
    name: str, prepared: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = load_experiment(name).model.name
    # The overrides leave settings that are not widths as they are, which would take a CPU its time.
    narrow = ["model.mlp_width=172"] if MODELS.has_setting(model, "mlp_width") else []
    first = tmp_path_factory.getbasetemp() / f"{model}_for_sft"
    if not first.exists():
        # Instead of public weights, a run of the same shape with random ones. tests/test_import.py
        # imports whole models.
        words = ["training.start=null", "training.lora_rank=0", "redo=neighbours"]
        smoke(name, prepared, first, *words, *narrow)

    # The prepared run has neighbours, but fine-tuning draws none, so that stage is made anew.
    words = [f"training.start={first}", "redo=neighbours"]
    losses = smoke(name, prepared, tmp_path / "run", *words, *narrow)
    assert len(losses) == 6


def test_fine_tuning_refuses_another_vocabulary(tmp_path: Path) -> None:
    """The vocabularies have the same sizes, but their ids mean something else."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        for file in (TEXT_TOKENIZER, IMAGE_TOKENIZER):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("the same")
    run: Any = SimpleNamespace(folder=ours)

    check_tokenizers(run, theirs)
    for file, name in ((TEXT_TOKENIZER, "text"), (IMAGE_TOKENIZER, "image")):
        (theirs / file).write_text("another")
        with pytest.raises(UserError, match=f"trained with another {name} tokenizer"):
            check_tokenizers(run, theirs)
        (theirs / file).write_text("the same")


def test_a_file_of_overrides_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("training.steps: 3000\nmodel.layers: 2\n")
    experiment = load_experiment("pretrain_7b", [f"overrides={file}", "model.layers=3"])
    assert (experiment.training.steps, experiment.model.config.layers) == (3000, 3)

    refusal = r"overrides is smok, which is not known; did you mean smoke\? .*or a .yaml"
    with pytest.raises(UserError, match=refusal):
        load_experiment("pretrain_7b", ["overrides=smok"])
