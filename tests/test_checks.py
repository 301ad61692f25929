"""Mistakes that the settings alone show are all reported before the first stage."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from cm3leon import digests
from cm3leon.experiment import load_experiment
from cm3leon.io import write_json
from cm3leon.run import main
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.running import DIGESTS, check_before_stages
from cm3leon.training.config import TOKENS_AT_ONCE, DecoderTrainingConfig
from cm3leon.types import UserError, sentences_of
from cm3leon.weights import save_tensors


def mistakes(
    *overrides: str, experiment: str = "digits_smoke", until: str | None = None
) -> list[str]:
    """The sentences about an experiment, before any of its stages is run."""
    try:
        check_before_stages(load_experiment(experiment, overrides), Path("none"), until=until)
    except UserError as error:
        return list(sentences_of(error))
    return []


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "experiment=digits_smoke",
        f"run={tmp_path / 'run'}",
        "model.seq_len=18",
        "training.warmup_steps=50",
        "retriever_training.warmup_steps=90",
        f"training.start={tmp_path / 'nowhere'}",
    ]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("cm3leon: ").partition(";")[0] for line in said] == [
        "retriever_training: warmup_steps 90 must be below steps 10",
        "training: warmup_steps 50 must be below steps 20",
        "model.seq_len is 18",
        f"training.start: {tmp_path / 'nowhere'} is not the folder of a run with a finished pretraining",
    ]

    # Nothing was written: neither the run folder nor anything else.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("section", ["reconstruction", "image_tokenizer"])
def test_the_package_of_the_perceptual_distance_is_missed_before_the_first_stage(
    section: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    (tmp_path / "vgg.pth").touch()
    words = (
        "image_tokenizer=vqgan",
        "image_tokenizer.image_size=64",
        "augment.versions=0",
        f"{section}.perceptual_file={tmp_path / 'vgg.pth'}",
    )
    assert mistakes(*words) == []

    # The package is found by its metadata, which is missing from here on.
    monkeypatch.setattr("cm3leon.tokenizers.image.perceptual.distribution", missing)
    (sentence,) = mistakes(*words)
    assert sentence.endswith("(pip install torchmetrics)")


def test_an_image_longer_than_the_block_is_known_by_its_tokenizer() -> None:
    """An image of 256 pixels has 1,024 codes: with `<eos>`, a piece, `<break>` and `<eos>`, 1,028
    tokens."""
    paper = ("image_tokenizer=vqgan", "augment.versions=0")
    (sentence,) = mistakes(*paper, "model.seq_len=512")
    assert sentence == (
        "model.seq_len is 512; an image of 1,024 codes with a caption takes 1,028 tokens or more; "
        "raise model.seq_len, or take an image_tokenizer with fewer codes"
    )
    assert len(mistakes(*paper, "model.seq_len=1027")) == 1
    assert mistakes(*paper, "model.seq_len=1028") == []


def test_what_a_run_does_not_come_to_is_not_checked() -> None:
    assert mistakes("model.seq_len=18", until="reconstruction") == []
    assert mistakes("model.seq_len=18") != []
    assert mistakes("training.start=nowhere", until="retriever") == []


@pytest.mark.parametrize("split", ["validation", "held_out"])
def test_a_split_that_a_stage_needs_has_a_share(split: str) -> None:
    stage = {"validation": "pretraining", "held_out": "evaluation"}[split]
    (sentence,) = mistakes(f"split.{split}=0")
    assert sentence.startswith(f"split.{split} is 0, and the stage {stage} needs documents")
    assert mistakes(f"split.{split}=0", until="neighbours") == []


def test_other_runs_have_to_be_there() -> None:
    overrides = ("data.path=tars", "shards.tokenizers=a", "shards.bank=b", "shards.mix.c=1.0")
    said = mistakes(*overrides, experiment="corpus")
    assert [sentence.partition(" is no")[0] for sentence in said] == [
        "shards.tokenizers: a",
        "shards.tokenizers: a",
        "shards.bank: b",
        "shards.mix: c",
    ]


def test_what_an_evaluation_needs_has_to_be_there(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    overrides = (
        "aims=[]",
        "evaluations.caption.protocol={name: showcase, task: caption, "
        f"prompts: [{{image: {picture}}}]}}",
        f"evaluations.caption.setting.bank={tmp_path / 'nowhere'}",
    )
    assert mistakes(*overrides) == [
        f"evaluations.caption.protocol: prompts: {picture} does not exist; give the path of an image",
        f"evaluations.caption: setting.bank: {tmp_path / 'nowhere'} is not the folder of a "
        "run with a finished index, for example runs/digits",
    ]

    # A run that ends before its evaluation needs neither, and one whose files are there is right.
    assert mistakes(*overrides, until="pretraining") == []
    picture.touch()
    assert mistakes(*overrides[:2]) == []

    # CLIP that ranks samples, and the weights that a protocol measures by.
    ranker = f"evaluations.caption.setting.ranker={tmp_path / 'nobody'}"
    (sentence,) = mistakes(*overrides[:2], ranker)
    assert sentence.startswith(f"evaluations.caption: setting.ranker: {tmp_path / 'nobody'} is not")
    weights = tmp_path / "inception.pth"
    protocol = (
        "evaluations.caption.protocol={name: captioned_images, data: {name: folder, "
        f"path: {tmp_path / 'nowhere'}}}, inception_file: {weights}}}"
    )
    missing, not_there = mistakes("aims=[]", protocol)
    assert missing == (
        f"evaluations.caption.protocol.inception_file is {weights}, which does not exist; give "
        "another path"
    )
    assert not_there.startswith("evaluations.caption.protocol: data.path: ")


def test_a_later_start_reads_no_corpus_of_an_evaluation_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED", -60.0)  # as if the files were older than they are
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "page.png").touch()
    words = (
        "aims=[]",
        "evaluations.caption.protocol={name: pages, asks: text, data: {name: folder, "
        f"path: {tmp_path / 'pages'}}}}}",
    )
    experiment, run = load_experiment("digits_smoke", words), tmp_path / "run"
    read: list[Path] = []
    content = digests._content
    monkeypatch.setattr(digests, "_content", lambda file: read.append(file) or content(file))

    def start() -> None:
        monkeypatch.setattr(digests, "_known", {})
        monkeypatch.setattr(digests, "_used", set())
        check_before_stages(experiment, run)

    start()
    start()
    assert len(read) == 2
    assert not run.exists()

    # What the run keeps is used.
    run.mkdir()
    (run / DIGESTS).write_text("{}")
    start()
    start()
    assert len(read) == 3


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A run with the weights of a pretraining and the record of a text tokenizer."""
    folder = tmp_path / "start"
    (folder / "pretraining").mkdir(parents=True)
    (folder / "text_tokenizer").mkdir()

    experiment = load_experiment("digits_smoke")
    run = RunFolder(experiment, folder, torch.device("cpu"))
    save_tensors(folder / "pretraining" / "model.safetensors", run.new_model().state_dict())

    record = {"fingerprint": "0" * 64, "seconds": 1.0, "files": {}}
    write_json(folder / "pretraining" / "stage.json", record)
    settings = run.recorded("text_tokenizer")
    write_json(folder / "text_tokenizer" / "stage.json", {**record, "settings": settings})
    return folder


def test_weights_to_start_from_have_to_fit_the_model(start: Path) -> None:
    fits = [sentence for sentence in mistakes(f"training.start={start}") if "another" in sentence]
    assert fits == []

    said = mistakes(f"training.start={start}", "model.width=32")
    opening = "training.start: the model is another one than this run's: "
    assert any(
        sentence.startswith(opening) and "has another shape for" in sentence for sentence in said
    )


def test_tokenizers_of_other_settings_are_other_tokenizers(start: Path) -> None:
    said = mistakes(f"training.start={start}", "text_tokenizer.vocab_size=300")
    assert (
        f"training.start: {start} was trained with another text tokenizer than this run's; "
        f"take its tokenizers over with shards.tokenizers={start}"
    ) in said


def test_large_batches_are_computed_in_parts() -> None:
    config = DecoderTrainingConfig(steps=200, batch_size=65_536)
    assert config.blocks_at_once(96, 65_536) == TOKENS_AT_ONCE // 96 == 1365
    assert config.blocks_at_once(96, 24) == 24
    assert config.blocks_at_once(2 * TOKENS_AT_ONCE, 8) == 1
    assert DecoderTrainingConfig(steps=200, micro_batch=4).blocks_at_once(96, 24) == 4

    said = _refused("training.batch_size=100000")
    (sentence,) = [each for each in said if "batch_size" in each]
    assert sentence == "training.batch_size is 100000; it must be a whole number from 1 to 65536"


def _refused(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as refusal:
        load_experiment("digits_smoke", overrides)
    return list(sentences_of(refusal.value))
