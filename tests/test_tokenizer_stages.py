"""Tokenizers are made by a run that stops at them, and taken over by another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import cm3leon
from corpora import digit_tars
from metric_weights import inception_weights, vgg_weights, write_inception, write_vgg
from published import IMAGE_TOKENIZER_FILES
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cm3leon.stages.opening import open_run

pytestmark = pytest.mark.stack

TRAINING = {
    "steps": 8,
    "warmup_steps": 1,
    "log_every": 1,
    "checkpoint_every": 2,
    "callback_every": 4,
    "batch_size": 4,
    "average_decay": 0.5,
}
SETTINGS = (
    "split.validation=0.1",
    "split.held_out=0.1",
    "shards.sample=60",
    "text_tokenizer.vocab_size=300",
    "image_tokenizer.image_size=32",
    "image_tokenizer.codebook_size=32",
    "image_tokenizer.channels=32",
    "image_tokenizer.multipliers=[1,1,1]",
    "image_tokenizer.residual_blocks=1",
    "image_tokenizer.attention_levels=[]",
    "image_tokenizer.z_channels=16",
    "image_tokenizer.discriminator_channels=32",
    "image_tokenizer.discriminator_layers=1",
    "image_tokenizer.adversarial_start=3",
    *(f"image_tokenizer_training.{key}={value}" for key, value in TRAINING.items()),
)


def arguments(tars: Path, run: Path, *more: str) -> list[str]:
    return ["experiment=tokenizer_256", f"data.path={tars}/*.tar", f"run={run}", *SETTINGS, *more]


def figures(run: Path) -> dict[str, Any]:
    """The figures of a run's reconstructions."""
    return json.loads((run / "reconstruction" / "figures.json").read_text())


def training_log(run: Path) -> list[dict[str, Any]]:
    """What the training of a run's image tokenizer logged, step by step."""
    lines = (run / "image_tokenizer" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's image tokenizer by their names."""
    return load_file(run / "image_tokenizer" / "model.safetensors")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    digit_tars(folder, 3, 40)
    return folder


@pytest.fixture(scope="module")
def finished(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run without interruption, and what it printed."""
    run = tmp_path_factory.mktemp("run") / "whole"
    return run, cm3leon(*arguments(tars, run)).stdout


@pytest.mark.once
def test_the_run_ends_with_a_page_of_reconstructions(finished: tuple[Path, str]) -> None:
    run, said = finished
    assert "[4/4] reconstruction: done" in said
    assert f"report: file://{run}/reconstruction/report.html" in said
    assert "no perceptual distance in the loss" in said

    page = (run / "reconstruction" / "report.html").read_text()
    assert "32x32 pixels to 8x8 codes of 32" in page

    measured = figures(run)
    assert measured["psnr_db"]["low"] <= measured["psnr_db"]["value"] <= measured["psnr_db"]["high"]
    assert 0 < measured["ssim"]["value"] < 1
    assert measured["lpips"] is None  # without weights
    assert measured["rfid"] is None

    assert not (run / "pretraining").exists()
    assert str(run) not in page  # the same page wherever the run lies


@pytest.mark.once
def test_training_is_logged_with_reconstructions(finished: tuple[Path, str]) -> None:
    run, _ = finished
    log = training_log(run)
    assert ["discriminator_loss" in record for record in log] == [False] * 3 + [True] * 5

    events = EventAccumulator(str(run / "image_tokenizer" / "tensorboard")).Reload()
    scalars = {"validation/psnr_db", "validation/codebook_use", "validation/codebook_perplexity"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [picture.step for picture in events.Images("reconstructions")] == [4, 8]


@pytest.mark.once
def test_an_interrupted_run_makes_the_same_tokenizer(
    tars: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """The newest checkpoint is taken away, as a kill would have left the folder.

    Discriminator, average and position in the corpus come back from the checkpoint before it.
    """
    run = tmp_path / "again"
    cm3leon(*arguments(tars, run))

    # Made in another folder at another time, the page has the same bytes.
    page = Path("reconstruction/report.html")
    assert (run / page).read_bytes() == (finished[0] / page).read_bytes()

    # Without its results and its newest checkpoint, the stage looks as if it had been killed.
    folder = run / "image_tokenizer"
    for name in ("stage.json", "model.safetensors", "codes.npy"):
        (folder / name).unlink()
    newest = max(folder.glob("step_*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()

    assert "going on where it stopped" in cm3leon(*arguments(tars, run)).stdout
    one, other = trained_weights(run), trained_weights(finished[0])
    assert all((one[name] == weight).all() for name, weight in other.items())
    assert figures(run) == figures(finished[0])
    assert (run / page).read_bytes() == (finished[0] / page).read_bytes()


@pytest.mark.once
def test_the_whole_corpus_or_the_sample_trains_it(
    tars: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "sample"
    cm3leon(*arguments(tars, run, "shards.tokenizer_images=sample", "until=image_tokenizer"))
    one, other = trained_weights(run), trained_weights(finished[0])
    assert any((one[name] != weight).any() for name, weight in other.items())


@pytest.mark.once
def test_files_of_weights_add_a_loss_and_two_figures(tars: Path, tmp_path: Path) -> None:
    vgg = write_vgg(tmp_path / "vgg16.pth", vgg_weights())
    inception = write_inception(tmp_path / "inception.pth", inception_weights())
    run = tmp_path / "run"
    training = ("image_tokenizer_training.steps=2", f"image_tokenizer.perceptual_file={vgg}")
    said = cm3leon(
        *arguments(tars, run, *training),
        f"reconstruction.perceptual_file={vgg}",
        f"reconstruction.inception_file={inception}",
    ).stdout
    assert "no perceptual distance" not in said
    assert all(record["perceptual"] > 0 for record in training_log(run))

    measured = figures(run)
    assert measured["lpips"]["value"] > 0
    assert measured["rfid"] > 0

    # The networks of the loss are no part of the tokenizer.
    weights = trained_weights(run)
    assert not [name for name in weights if "perceptual" in name or "discriminator" in name]


@pytest.mark.once
def test_another_run_takes_the_tokenizers_over_and_trains_its_own_encoder(
    tars: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """A run that stopped at its tokenizers has no encoder to lend."""
    run = tmp_path / "other"
    small = (
        "retriever.encoder.architecture=null",
        "retriever.encoder.image_size=32",
        "retriever.encoder.width=16",
        "retriever.encoder.layers=1",
        "retriever.encoder.embed_dim=16",
    )

    cm3leon(*arguments(tars, run, f"shards.tokenizers={finished[0]}", "until=retriever", *small))
    for name in ("text_tokenizer/tokenizer.json", "image_tokenizer/model.safetensors"):
        assert (run / name).read_bytes() == (finished[0] / name).read_bytes()
    assert not list((run / "image_tokenizer").glob("step_*"))
    assert (run / "retriever" / "model.safetensors").is_file()


def test_published_weights_are_used_without_training(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").mkdir()
    config = IMAGE_TOKENIZER_FILES["pretrained"](tmp_path / "file")

    run = tmp_path / "run"
    words = (
        "experiment=tokenizer_256",
        f"data.path={tars}/*.tar",
        f"run={run}",
        *SETTINGS[:4],
        "image_tokenizer=pretrained",
        *(f"image_tokenizer.{key}={value}" for key, value in config.items()),
    )

    cm3leon(*words, "image_tokenizer.image_size=32")
    assert not (run / "image_tokenizer" / "log.jsonl").exists()
    assert figures(run)["images"] > 0
    codes_MN = np.load(run / "image_tokenizer" / "codes.npy")
    assert codes_MN.shape[0] == 60
    assert "up to date" in cm3leon(*words, "image_tokenizer.image_size=32").stdout

    # The run has the weights: it is opened without the file, from any folder.
    Path(config["path"]).write_bytes(b"no checkpoint")
    monkeypatch.chdir(tmp_path)
    opened = open_run(run)
    encoded_MN = opened.image_tokenizer.encode(opened.corpus.images_BHWC)
    assert np.array_equal(encoded_MN, codes_MN)
    assert opened.image_tokenizer_shape.codebook_size == opened.vocab.image_size

    # To make the tokenizer, the file is needed.
    failed = cm3leon(*words, "image_tokenizer.image_size=32", check=False)
    assert failed.returncode == 2
    assert str(config["path"]) in failed.stderr
    assert failed.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("image_tokenizer.perceptual_file=nowhere.pth", "there are no weights at nowhere.pth"),
        ("until=no_such_stage", "until is no_such_stage"),
        ("image_tokenizer.quantizer=fsq", "image_tokenizer.quantizer"),
    ],
)
def test_mistakes_are_one_sentence(tars: Path, tmp_path: Path, word: str, sentence: str) -> None:
    failed = cm3leon(*arguments(tars, tmp_path / "run", word), check=False)
    assert failed.returncode == 2
    assert sentence in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
