"""A run is opened if its files are as its stages wrote them and its plugins are trusted."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks import write_bank
from command_line import cm3leon
from records import finish

from cm3leon.commands import search
from cm3leon.config import (
    apply_overrides,
    dump_yaml,
    from_mapping,
    parse_override,
    to_mapping,
)
from cm3leon.data.corpus import Corpus
from cm3leon.experiment import load_experiment
from cm3leon.io import sha256
from cm3leon.registry import DECODERS, RETRIEVERS, _module_name
from cm3leon.retrievers.parts import Parts
from cm3leon.stages.opening import open_run
from cm3leon.stages.pretraining import first_weights
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.trust import Opening
from cm3leon.studies import load_study, load_sweep
from cm3leon.studies.jobs import point_jobs
from cm3leon.training.checkpoint import Checkpoints, check_intact
from cm3leon.training.distributed import Ranks
from cm3leon.training.trainer import _resume
from cm3leon.types import UserError
from cm3leon.weights import save_weights

READ = {
    "corpus": ("documents/documents.jsonl", "documents/images.npy"),
    "codes_MN": ("image_tokenizer/codes.npy",),
    "bank": (
        "retriever/model.safetensors",
        "vectors/plan.json",
        "vectors/index.json",
        "index/index.json",
    ),
}
"""Results of a run, and the files from which each is read."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, as some of its stages would leave it."""
    folder = tmp_path / "run"
    for name in ("documents", "image_tokenizer", "retriever"):
        (folder / name).mkdir(parents=True)
    experiment = load_experiment("digits_smoke")
    (folder / "config.yaml").write_text(dump_yaml(to_mapping(experiment)))

    # The documents and their codes.
    rng = np.random.default_rng(0)
    images_BHWC = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    Corpus(["a", "b", "c"], ["x", "y", "z"], images_BHWC, [0, 1, None], ["train"] * 3).save(
        folder / "documents"
    )
    np.save(folder / "image_tokenizer" / "codes.npy", rng.integers(0, 9, (3, 4)))

    # The encoder, and a memory bank that names the encoder's digest.
    encoder = RETRIEVERS.build(experiment.retriever).encoder
    weights = folder / "retriever" / "model.safetensors"
    save_weights(weights, encoder)
    parts = Parts(*rng.normal(size=(2, 3, encoder.embed_dim)).astype(np.float32))
    write_bank(folder, parts, ["a", "b", "c"], pairs_only=True, encoder=sha256(weights))

    stages = ("documents", "image_tokenizer", "retriever", "vectors", "index")
    finish(*(folder / stage for stage in stages))
    return folder


@pytest.mark.parametrize(
    ("result", "name"), [(result, name) for result, names in READ.items() for name in names]
)
def test_a_file_that_has_changed_is_named(run: Path, result: str, name: str) -> None:
    # The undamaged file is read.
    getattr(open_run(run), result)
    file = run / name
    content = file.read_bytes()

    # One bit is changed, then half of the file is missing, then all of it.
    flipped = bytearray(content)
    flipped[len(content) * 2 // 3] ^= 1
    for damaged in (bytes(flipped), content[: len(content) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{file} has changed since it was written; put"):
            getattr(open_run(run), result)

    # Without the comparison, reading itself must fail with a sentence.
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged|is not JSON|unreadable|is no |cannot be read"):
        getattr(open_run(run, Opening(verify=False)), result)

    file.unlink()
    with pytest.raises(UserError, match=f"^{file} is missing; put a copy back, or run"):
        getattr(open_run(run), result)


@pytest.mark.parametrize("verify", [True, False])
def test_a_stage_that_is_not_finished_is_refused(run: Path, verify: bool) -> None:
    (run / "documents" / "stage.json").unlink()
    opened = open_run(run, Opening(verify=verify))
    with pytest.raises(UserError, match=r"documents is not finished: its stage.json is missing"):
        _ = opened.corpus
    with pytest.raises(
        UserError, match=r"not the folder of a run with a finished documents: .* is missing"
    ):
        open_run(run, needs=["documents"])


def test_a_run_without_an_index_has_no_memory_bank(run: Path) -> None:
    """Earlier versions made such runs: they kept the bank in memory, beside its encoder."""
    shutil.rmtree(run / "index")
    with pytest.raises(
        UserError, match=f"^{run} has no memory bank: its stage index is not finish"
    ):
        _ = open_run(run).bank


def test_a_bank_of_pairs_alone_is_refused_where_single_modalities_are_retrieved(run: Path) -> None:
    """The index lacks the texts and the images that stand alone, so they would never be found."""
    pairs = load_experiment("digits_smoke")
    singles = load_experiment("digits_smoke", ["retriever.both_modalities=false"])
    folders = [RunFolder(each, run, torch.device("cpu")) for each in (pairs, singles)]

    assert folders[0].bank.searchable == 3
    with pytest.raises(UserError) as refused:
        _ = folders[1].bank
    assert str(refused.value) == (
        f"shards.bank: the index of {run} holds only documents with text and image; set "
        "retriever.both_modalities=true, or make that run's index again with false"
    )


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_weights_that_a_training_starts_with_are_compared(run: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    (start / "pretraining").mkdir(parents=True)
    weights = start / "pretraining" / "model.safetensors"
    weights.write_bytes(bytes(1000))
    finish(start / "pretraining")
    damage(weights)

    opened = open_run(run)
    training = replace(opened.experiment.training, start=start, start_with="weights")
    experiment = replace(opened.experiment, training=training)
    with pytest.raises(UserError, match=f"^{weights} has changed since it was written"):
        first_weights(replace(opened, experiment=experiment))


def test_files_taken_over_from_another_run_are_compared(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "text_tokenizer"
    other.mkdir(parents=True)
    (other / "tokenizer.json").write_text("{}" * 100)
    finish(other)
    words = [f"data.path={tmp_path}", f"shards.tokenizers={tmp_path}/other"]

    taking = replace(open_run(run), experiment=load_experiment("corpus", words))
    assert taking.reused_file("text_tokenizer/tokenizer.json").is_file()
    damage(other / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json has changed since it was written"):
        taking.reused_file("text_tokenizer/tokenizer.json")


def test_a_checkpoint_to_go_on_from_is_compared(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 4)
    earlier, ranks = tmp_path / "earlier", Ranks(torch.device("cpu"))
    saved = Checkpoints(earlier, ranks, keep=1)
    saved.begin()

    saved.save({"model": module.state_dict()}, {"step": 3, "data": {}}, wait=True)
    shard = max((earlier / "step_00000003").glob("__0_*"), key=lambda file: file.stat().st_size)
    check_intact(shard.parent, ranks)
    damage(shard)

    again = Checkpoints(tmp_path / "again", ranks, keep=1)
    state: Any = {"model": module.state_dict()}
    with pytest.raises(UserError, match=f"^{shard} is missing or has changed"):
        _resume(again._folder, earlier, again, state, None, ranks)  # type: ignore[arg-type]


def test_a_file_is_read_for_its_checksum_once_in_a_process(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cm3leon import io

    monkeypatch.setattr(io, "SETTLED", 0.0)
    monkeypatch.setattr(io, "_digests", {})
    read: list[str] = []
    monkeypatch.setattr(
        io.hashlib,
        "file_digest",
        lambda file, kind, digest=io.hashlib.file_digest: (
            read.append(file.name) or digest(file, kind)
        ),
    )

    # The second opening reads nothing again. Both stages have a file of the name index.json.
    for _ in range(2):
        _ = open_run(run).bank
    assert sorted(Path(name).name for name in read) == [
        "index.json",
        "index.json",
        "model.safetensors",
        "plan.json",
    ]


# ------------------------------------------------------------------------------------------ plugins


PLUGIN = '''
from dataclasses import dataclass

from cm3leon.decoders.base import Decoder
from cm3leon.registry import DECODERS


@DECODERS.register("of_a_plugin")
class Scaled(Decoder):
    """A decoder of a plugin."""

    @dataclass(kw_only=True)
    class Config:
        scale: float = 1.0
        """Factor."""
'''


@pytest.fixture
def plugin(tmp_path: Path, registries: None) -> Path:
    """A plugin that registers the decoder `of_a_plugin`."""
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


def forget(plugin: Path) -> None:
    """Be as another process in which the plugin was not loaded."""
    del sys.modules[_module_name(plugin)]
    del DECODERS._entries["of_a_plugin"]


@pytest.mark.parametrize("word", ["plugins={}", "plugins=[{}]"])
def test_the_list_shows_components_of_plugins(plugin: Path, word: str) -> None:
    assert f"of_a_plugin  ({plugin})" in cm3leon("--list", word.format(plugin)).stdout


@pytest.mark.parametrize("word", ["plugins={}", "plugins=[{}]"])
def test_one_plugin_may_be_named_without_brackets(plugin: Path, word: str) -> None:
    words = [word.format(plugin), "decoder=of_a_plugin"]
    assert load_experiment("digits_smoke", words).plugins == [str(plugin)]

    words = ["run=x", "text=a", words[0]]
    options = from_mapping(search.Options, apply_overrides({}, map(parse_override, words)))
    assert options.plugins == [str(plugin)]


def test_a_study_loads_its_plugins(plugin: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "title: a\nplugins: mine.py\n"
        "runs: {a: {experiment: digits_smoke, overrides: {decoder: of_a_plugin}}}\n"
    )
    assert load_study(str(file), (), tmp_path / "run").config.plugins == [str(plugin)]


def test_jobs_of_a_sweep_get_its_plugins_and_nobody_else_runs_them(
    plugin: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    words = ["sweep.seed=1,2", f"plugins={plugin}", "decoder=of_a_plugin", "until=documents"]
    sweep = load_sweep("digits_smoke", words, folder)
    (folder / "sweep.yaml").write_text(dump_yaml(sweep.written))

    # Its jobs name the plugin, which is trusted there as it is here.
    jobs = point_jobs(sweep, list(sweep.runs), list(sweep.runs))
    commands = [command for job in jobs for command in job.commands]
    points = [command for command in commands if command[0] == "point"]
    assert len(points) == 2
    assert all(f'plugins=["{plugin}"]' in command for command in points)

    # Nobody else runs the plugin's code without saying that they trust it.
    forget(plugin)
    for word in ("point", "collect"):
        place = f"run={folder}" if word == "collect" else points[0][1]
        done = cm3leon(word, place, check=False)
        assert done.returncode == 2
        refusal = f"{plugin}, whose code is not run unasked; if you trust it, add plugins="
        assert refusal in done.stderr

    assert "table: " in cm3leon("collect", f"run={folder}", f"plugins={plugin}").stdout
    forget(plugin)
    assert "table: " in cm3leon("collect", f"run={folder}", "trust=true").stdout


# ------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("pretraining/validation.jsonl", "[]\n", ["perplexity", "runs={run}"]),
        ("pretraining/validation.jsonl", '{"step": "x"}\n', ["perplexity", "runs={run}"]),
        ("launch/0001/jobs.json", "[]", ["status", "run={run}"]),
        ("launch/0001/jobs.json", '{"commands": 3, "submitted": []}', ["logs", "run={run}"]),
        ("launch/0001/jobs.json", '{"commands": {}, "submitted": [7]}', ["cancel", "run={run}"]),
        ("documents/stage.json", "[]", ["generate", "run={run}", "prompt=a"]),
    ],
)
def test_records_of_somebody_else_are_said_not_believed(
    run: Path, file: str, content: str, words: list[str], tmp_path: Path
) -> None:
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_text(content)
    words = [word.format(run=run) for word in words]
    if words[0] == "perplexity":
        words.append(f"out={tmp_path}/out.png")

    done = cm3leon(*words, check=False)
    assert done.returncode == 2
    assert str(run) in done.stderr
    assert len(done.stderr.splitlines()) == 1
