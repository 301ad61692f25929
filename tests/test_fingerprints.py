"""A fingerprint depends on the settings and files that change a result, and on nothing else."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from corpora import CORPORA

from cm3leon import digests
from cm3leon.config import Later, Location, NoEffect, recorded_settings, result_settings, to_mapping
from cm3leon.digests import BLOCK, WHOLE, files_digest, path_digest, remembered
from cm3leon.experiment import load_experiment
from cm3leon.registry import DECODERS, discover
from cm3leon.retrievers.dense import DenseRetriever
from cm3leon.retrievers.encoder import EncoderConfig
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.table import stages_of

# ----------------------------------------------------------------------------------------- settings


@dataclass(kw_only=True)
class Inner:
    """A nested section."""

    weights: Path | None = None
    """A location by its type."""
    size: int = 3
    """What counts."""
    every: Annotated[int, NoEffect("how often")] = 5
    """What does not."""


@dataclass(kw_only=True)
class Outer:
    """A section."""

    inner: Inner = field(default_factory=Inner)
    """A section in it."""
    folder: Annotated[str, Location()] = ""
    """A location by its mark."""
    tag: Annotated[str, Location(or_name=True)] | None = None
    """A file, or a name."""
    mix: Annotated[dict[str, float], Location()] = field(default_factory=dict)
    """Locations with shares."""
    paths: list[Path] = field(default_factory=list)
    """Several."""


@dataclass(kw_only=True)
class Grown:
    """A section that got a field."""

    size: int = 3
    """What was there."""
    alpha: Annotated[float, Later()] = 0.0
    """What came later."""


def test_a_later_field_counts_where_it_is_set() -> None:
    assert result_settings(Grown()) == {"size": 3}
    assert result_settings(Grown(alpha=0.1)) == {"size": 3, "alpha": 0.1}
    assert to_mapping(Grown()) == {"size": 3, "alpha": 0.0}
    discover()
    for name in ("top_p", "edit"):
        assert "alpha" not in result_settings(DECODERS.check(name))
        assert result_settings(DECODERS.check({"name": name, "alpha": 0.1}))["alpha"] == 0.1


def test_what_changes_no_result_and_where_files_lie_are_left_out() -> None:
    config = Outer(inner=Inner(weights=Path("a")), folder="b", mix={"c": 0.5}, paths=[Path("d")])
    assert result_settings(config) == {"inner": {"size": 3}, "tag": None}
    assert result_settings(config, str.upper) == {
        "inner": {"weights": "A", "size": 3},
        "folder": "B",
        "tag": None,
        "mix": [["C", 0.5]],
        "paths": ["D"],
    }


def test_recorded_paths_are_absolute_and_names_and_urls_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    config = Outer(
        inner=Inner(weights=Path("w")),
        tag="openai",
        folder="s3://bucket/*.tar",
        mix={"runs/a": 1.0},
    )

    recorded = recorded_settings(config)
    assert recorded["inner"] == {"weights": f"{tmp_path}/w", "size": 3, "every": 5}
    assert (recorded["tag"], recorded["folder"]) == ("openai", "s3://bucket/*.tar")
    assert recorded["mix"] == {f"{tmp_path}/runs/a": 1.0}

    # A tag that is the name of a file here is that file; a pattern is a path too.
    assert recorded_settings(Outer(tag="file", folder="tars/**/*.tar"))["tag"] == f"{tmp_path}/file"
    assert recorded_settings(Outer(folder="tars/**/*.tar"))["folder"] == f"{tmp_path}/tars/**/*.tar"


# -------------------------------------------------------------------------------------------- files


def test_a_digest_says_what_files_hold_and_not_where_they_lie(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file.txt").write_text("content")
        (tmp_path / f"{name}.bin").write_bytes(b"same")

    assert path_digest(tmp_path / "a") == path_digest(tmp_path / "b")
    assert path_digest(tmp_path / "a.bin") == path_digest(tmp_path / "b.bin")

    # One letter differs.
    (tmp_path / "b" / "inner" / "file.txt").write_text("Content")
    assert path_digest(tmp_path / "a") != path_digest(tmp_path / "b")

    assert path_digest("laion2b") == "laion2b"


def test_a_large_file_is_told_by_its_size_and_blocks_all_over_it(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(WHOLE + 12345)
    before = files_digest([large], [""])

    # The first byte, the last one of the first block, and the last one of the file.
    for position in (0, BLOCK - 1, WHOLE + 12344):
        with large.open("r+b") as file:
            file.seek(position)
            file.write(b"x")
        changed = files_digest([large], [""])
        assert changed != before
        before = changed

    with large.open("ab") as file:
        file.write(b"\0")
    assert files_digest([large], [""]) != before


def test_a_second_start_reads_nothing_unless_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED", -60.0)  # as if the files were older than they are
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one")
    read: list[Path] = []
    content = digests._content

    def counted(file: Path) -> str:
        read.append(file)
        return content(file)

    monkeypatch.setattr(digests, "_content", counted)

    def start() -> str:
        monkeypatch.setattr(digests, "_known", {})
        monkeypatch.setattr(digests, "_used", set())
        with remembered(tmp_path / "digests.json"):
            return files_digest([corpus], ["corpus"])

    first = start()
    assert start() == first
    assert len(read) == 1

    stat = corpus.stat()
    corpus.write_text("two")
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time of its content is forged
    assert start() != first

    # A damaged record is as good as none.
    (tmp_path / "digests.json").write_text("{")
    assert start() != first


# ------------------------------------------------------------------------------------------- stages


def inputs(tmp_path: Path, *overrides: str, name: str = "digits_smoke") -> dict[str, Any]:
    """Everything that each stage of an experiment depends on, other than earlier stages."""
    experiment = load_experiment(name, overrides)
    run = RunFolder(experiment, tmp_path, torch.device("cpu"))
    found = {}
    for stage in stages_of(experiment):
        found[stage.name] = json.loads(json.dumps(stage.inputs(run)))  # as stage.json records it
    return found


@pytest.mark.parametrize(
    "changed",
    [
        ["training.log_every=5", "training.checkpoint_every=5", "training.keep_checkpoints=7"],
        ["training.micro_batch=2", "training.compile=true", "training.bad_steps=3"],
        ["training.decay_share=0.5", "training.lora_alpha=3"],
        ["image_tokenizer_training.callback_every=3", "retriever_training.spike=9"],
        ["model.attention=sdpa", "launcher=local", "until=pretraining"],
        ["training.batch_tokens=2304"],  # 24 blocks of 96, as batch_size has it
    ],
)
def test_settings_that_change_no_result_change_no_fingerprint(
    tmp_path: Path, changed: list[str]
) -> None:
    assert inputs(tmp_path, *changed) == inputs(tmp_path)


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ("decoder.top_p=0.95", {"evaluation"}),  # training draws pictures by it, no more
        ("training.learning_rate=1e-4", {"pretraining"}),
        ("retriever.max_documents=1", {"pretraining"}),
        ("retriever.threshold=0.5", {"neighbours"}),
        ("retriever_training.steps=21", {"retriever"}),
        ("text_tokenizer.vocab_size=300", {"text_tokenizer", "tokens"}),
        ("image_tokenizer_training.steps=21", {"image_tokenizer"}),
        ("augment.degrees=3", {"image_tokenizer", "retriever", "tokens"}),
        ("augment.versions=1", {"image_tokenizer", "retriever", "tokens"}),
        ("split.held_out=0.3", {"documents", "tokens"}),
        ("evaluations.caption.setting.max_tokens=8", {"evaluation"}),
        ("evaluations.caption.title=Words", set()),
        ("aims=[]", set()),
    ],
)
def test_a_setting_changes_the_stages_that_depend_on_it(
    tmp_path: Path, changed: str, stages: set[str]
) -> None:
    before, after = inputs(tmp_path), inputs(tmp_path, changed)
    assert {name for name in before if before[name] != after[name]} == stages


def test_how_images_are_varied_does_not_matter_where_none_is(tmp_path: Path) -> None:
    none = "augment.versions=0"
    assert inputs(tmp_path, none, "augment.degrees=3") == inputs(tmp_path, none)


def test_varied_versions_of_earlier_runs_stay_what_they_were(tmp_path: Path) -> None:
    some = "augment.versions=2"
    same = (some, "augment.shared=false", "augment.shift_step=0", "augment.outside=black")
    assert inputs(tmp_path, *same) == inputs(tmp_path, some)

    # Settings that came later are left out while they have no effect.
    settings = inputs(tmp_path, some)["tokens"]["augment"]
    assert set(settings) == {"versions", "degrees", "scale", "shear", "shift", "elastic"}
    assert inputs(tmp_path, some, "augment.shared=true")["tokens"]["augment"]["shared"] is True


def test_a_corpus_that_was_moved_or_copied_is_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "imgs", tmp_path / "scratch" / "imgs2"
    first.mkdir()
    CORPORA["folder"](first)
    before = inputs(tmp_path, f"data.path={first}", name="folder")

    # A copy with other times, and the first one gone.
    shutil.copytree(first, second)
    for file in second.rglob("*"):
        os.utime(file, ns=(1, 1))
    assert inputs(tmp_path, f"data.path={second}", name="folder") == before
    shutil.rmtree(first)
    assert inputs(tmp_path, f"data.path={second}/", name="folder") == before

    (second / "sub" / "1.txt").write_text("picture l")
    changed = inputs(tmp_path, f"data.path={second}", name="folder")
    assert changed["documents"] != before["documents"]


def test_an_encoder_that_a_run_has_is_built_without_its_published_weights() -> None:
    config = DenseRetriever.Config(
        encoder=EncoderConfig(architecture="ViT-B-32", pretrained="openai")
    )
    assert DenseRetriever.without_weights(config).encoder == EncoderConfig(architecture="ViT-B-32")
