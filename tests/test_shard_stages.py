"""A corpus in shards, from tars to a report: by one process, by several workers, and after kills.

However the shards are made, they have the same bytes, and training on them has the same losses.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import cm3leon
from corpora import digit_tars
from PIL import Image
from processes import Forked

from cm3leon.config import from_mapping
from cm3leon.data import file_source
from cm3leon.data.images import decode_image
from cm3leon.data.shards import open_shard
from cm3leon.experiment import Experiment
from cm3leon.stages import sharing
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.tokens import make_tokens_part
from cm3leon.stages.vectors import make_vectors_part

TARS, PER_TAR = 4, 60
SHARD_STAGES = ("tokens", "vectors", "neighbours")
SETTINGS = (
    "split.validation=0.1",
    "split.held_out=0.1",
    "shards.sample=200",
    "text_tokenizer.vocab_size=300",
    "image_tokenizer.image_size=32",
    "image_tokenizer.codebook_size=64",
    "image_tokenizer.channels=8",
    "retriever.encoder.image_size=32",
    "retriever.encoder.context_length=16",
    "model.layers=1",
    "model.width=64",
    "model.seq_len=96",
    "evaluations={text_to_image: {title: Images, protocol: {name: corpus, task: text_to_image}}}",
    *(
        f"{section}.{key}={value}"
        for section in ("image_tokenizer_training", "retriever_training", "training")
        for key, value in (
            ("steps", 4),
            ("warmup_steps", 1),
            ("log_every", 1),
            ("checkpoint_every", 2),
            ("batch_size", 4),
        )
    ),
)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in tars as img2dataset writes them; one image of the second tar is broken."""
    folder = tmp_path_factory.mktemp("tars")
    digit_tars(folder, TARS, PER_TAR, broken=(1, 7))
    return folder


def arguments(tars: Path, run: Path, *more: str) -> list[str]:
    return ["experiment=corpus", f"data.path={tars}/*.tar", f"run={run}", *SETTINGS, *more]


def losses(run: Path) -> list[dict[str, float]]:
    """What each step of the pretraining logged, without the speeds, which differ between runs."""
    records = []
    for line in (run / "pretraining" / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.append({k: v for k, v in record.items() if not k.endswith("per_second")})
    return records


def shards(run: Path) -> dict[str, bytes]:
    """The bytes of every shard by its path in the run."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted(run.glob("*/shard-*.arrow"))
    }


@pytest.fixture(scope="module")
def finished(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by one process without interruption."""
    run = tmp_path_factory.mktemp("run") / "whole"
    cm3leon(*arguments(tars, run))
    return run


def test_one_process_makes_a_shard_of_each_part_and_trains_on_them(finished: Path) -> None:
    for stage in SHARD_STAGES:
        assert len(list((finished / stage).glob("shard-*.arrow"))) == TARS
    documents = sum(len(open_shard(file)) for file in (finished / "tokens").glob("*.arrow"))
    assert 0.6 * TARS * PER_TAR < documents < TARS * PER_TAR  # the training split, about 80 %

    # The broken image, number 7 of the second tar, is left out and written down.
    lines = (finished / "tokens/skipped/00001.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines]
    assert len(skipped) == 1
    assert "000067" in skipped[0]["file"]

    assert [record["step"] for record in losses(finished)] == [1, 2, 3, 4]
    assert (finished / "report.html").is_file()


def test_a_second_run_changes_nothing(tars: Path, finished: Path) -> None:
    before = shards(finished)
    said = cm3leon(*arguments(tars, finished)).stdout
    assert said.count("up to date") == 11
    assert shards(finished) == before


def test_workers_that_share_the_stages_make_the_same(
    tars: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "shared"
    cm3leon(*arguments(tars, run, "until=retriever"))
    for stage in SHARD_STAGES:
        # Neighbours are found with the index, which one process makes here.
        if stage == "neighbours":
            cm3leon(*arguments(tars, run, "until=index"))

        workers = []
        for k in range(2):
            words = ["part", f"stage={stage}", f"part={k}/2", *arguments(tars, run)]
            workers.append(Forked("cm3leon.run", words))
        assert [worker.wait(300) for worker in workers] == [0, 0]
        cm3leon(*arguments(tars, run, f"until={stage}"))

    cm3leon(*arguments(tars, run))
    assert shards(run) == shards(finished)
    assert losses(run) == losses(finished)


def test_a_killed_run_goes_on_with_the_shards_that_are_there(
    tars: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"

    # Each stage is killed as soon as it has started.
    for stage in (*SHARD_STAGES, "pretraining"):
        process = Forked("cm3leon.run", arguments(tars, run))
        started = run / stage / "started.json"
        while not started.is_file() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert started.is_file()
    cm3leon(*arguments(tars, run))

    # The weights that shards are made with come first: where they differ, the shards do too.
    for stage in ("image_tokenizer", "retriever"):
        weights = [(each / stage / "model.safetensors").read_bytes() for each in (run, finished)]
        assert weights[0] == weights[1], stage
    assert shards(run) == shards(finished)
    assert losses(run) == losses(finished)


@pytest.mark.parametrize("room", [20.0, 0.0])
def test_an_image_is_decoded_once_for_all_stages_that_read_it(
    room: float, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Decoded images are deleted when the stages that read them are finished.
    assert not (finished / "tokens" / sharing.DECODED).exists()

    copy = tmp_path / "run"
    for stage in ("text_tokenizer", "image_tokenizer", "retriever"):
        shutil.copytree(finished / stage, copy / stage)

    # With room for none, the second stage decodes every image again.
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    settings["shards"]["decoded_gb"] = room
    run = RunFolder(from_mapping(Experiment, settings), copy, torch.device("cpu"))

    decoded: list[str] = []

    def decode_and_count(content: bytes, limit: int, name: str, **more: Any) -> Any:
        decoded.append(name)
        return decode_image(content, limit, name, **more)

    monkeypatch.setattr(file_source, "decode_image", decode_and_count)

    (copy / "tokens").mkdir()
    make_tokens_part(run, copy / "tokens", (0, 1))
    assert len(decoded) == TARS * PER_TAR
    assert {file.name: file.read_bytes() for file in (copy / "tokens").glob("shard-*.arrow")} == {
        file.name: file.read_bytes() for file in (finished / "tokens").glob("shard-*.arrow")
    }

    (copy / "vectors").mkdir()
    make_vectors_part(run, copy / "vectors", (0, 1))
    assert len(decoded) == TARS * PER_TAR * (1 if room else 2)
    for file in (copy / "vectors").glob("shard-*.arrow"):
        assert file.read_bytes() == (finished / "vectors" / file.name).read_bytes()


def test_a_deleted_shard_is_made_again(tars: Path, finished: Path) -> None:
    before = shards(finished)
    shard = sorted((finished / "tokens").glob("*.arrow"))[2]
    shard.unlink()
    assert f"{shard.name} is missing" in cm3leon(*arguments(tars, finished)).stdout
    assert shards(finished) == before


def test_a_text_corpus_borrows_tokenizers_and_bank_and_is_mixed_into_another_run(
    tars: Path, finished: Path, tmp_path: Path
) -> None:
    lines = []
    for number in range(120):
        lines.append(json.dumps({"text": f"the digit {number} " * (1 + number % 50)}))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    borrowed = (f"shards.tokenizers={finished}", f"shards.bank={finished}", "packing.method=stream")
    texts = tmp_path / "texts"
    source = f'data={{"name": "text_jsonl", "path": "{tmp_path}/texts.jsonl"}}'

    # Texts have no images to make vectors of: they find neighbours in the other run's bank.
    cm3leon(f"run={texts}", "experiment=corpus", *SETTINGS, source, *borrowed, "until=neighbours")
    assert not (texts / "vectors").exists()
    for file in (
        "text_tokenizer/tokenizer.json",
        "image_tokenizer/model.safetensors",
        "retriever/model.safetensors",
    ):
        assert (texts / file).read_bytes() == (finished / file).read_bytes()

    # It cannot be trained alone, as no text has an image to validate with.
    said = cm3leon(f"run={texts}", "experiment=corpus", *SETTINGS, source, *borrowed, check=False)
    assert said.returncode == 2
    assert "shards.mix" in said.stderr.splitlines()[-1]

    # Half of what the other run is trained on are these texts.
    run = tmp_path / "mixed"
    mixed = (*borrowed, f'shards.mix={{"{texts}": 0.5}}')
    cm3leon(*arguments(tars, run, *mixed, "training.callback_every=2"))
    assert not (run / "vectors").exists()

    lines = (run / "pretraining" / "validation.jsonl").read_text().splitlines()
    by_source = [json.loads(line) for line in lines]
    assert [figures["step"] for figures in by_source] == [2, 4]
    for figures in by_source:
        # The texts have no images; the loss of all is between those of the two sources.
        assert "loss_image/texts" not in figures
        assert figures["loss_image"] == figures["loss_image/mixed"]
        for name in ("loss", "loss_text"):
            parts = sorted((figures[f"{name}/mixed"], figures[f"{name}/texts"]))
            assert parts[0] < figures[name] < parts[1]

    assert [record["step"] for record in losses(run)] == [1, 2, 3, 4]
    assert losses(run) != losses(finished)
    assert (run / "report.html").is_file()

    said = cm3leon(
        *arguments(tars, run, *borrowed, f'shards.mix={{"{tmp_path}/none": 0.5}}'), check=False
    )
    assert said.returncode == 2
    assert "none is not the folder of a run with finished neighbours" in said.stderr


def test_the_bank_answers_by_text_and_image_and_takes_more_documents(
    tars: Path, finished: Path, tmp_path: Path
) -> None:
    by_text = cm3leon(
        "search", f"run={finished}", "text=the digit 7", "count=3"
    ).stdout.splitlines()
    assert len(by_text) == 3
    scores = [float(line.split()[0]) for line in by_text]
    assert scores == sorted(scores, reverse=True)
    assert all(".tar/" in line and line.endswith("<image>") for line in by_text)

    more = tmp_path / "more"
    more.mkdir()
    for number in range(3):
        Image.fromarray(np.full((16, 16, 3), 40 + 90 * number, np.uint8)).save(
            more / f"{number}.png"
        )
        (more / f"{number}.txt").write_text(f"a grey square, number {number}")

    said = cm3leon("add", f"run={finished}", f"data.path={more}").stdout
    assert "3 documents added, 0 items left out" in said
    found = cm3leon(
        "search",
        f"run={finished}",
        f"image={more}/2.png",
        "text=a grey square, number 2",
        "count=3",
    ).stdout
    # Four steps of training tell the three grey squares from digits, not from each other.
    assert any("  2.png  a grey square, number 2 <image>" in line for line in found.splitlines())

    # What was added is there, and is not added again.
    again = cm3leon("add", f"run={finished}", f"data.path={more}", check=False)
    assert again.returncode == 2
    assert "no documents to add (3 items skipped or added before)" in again.stderr
    assert "up to date" in cm3leon(*arguments(tars, finished)).stdout

    # Mistakes end in a sentence.
    said = cm3leon(*arguments(tars, tmp_path / "run", f"shards.bank={more}"), check=False)
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1].startswith(
        f"cm3leon: shards.bank: {more} is not the folder of a run with a finished index"
    )

    for words in (
        ["text=x", "run=none"],
        [f"run={finished}"],
        [f"run={finished}", "image=none.png"],
    ):
        wrong = cm3leon("search", *words, check=False)
        assert wrong.returncode == 2
        assert "Traceback" not in wrong.stderr


def test_a_flipped_bit_is_named_and_not_trained_on(
    tars: Path, finished: Path, tmp_path: Path
) -> None:
    # A copy of the run up to its neighbours.
    run = tmp_path / "flipped"
    later = shutil.ignore_patterns("pretraining", "evaluation", "answers", "report.html")
    shutil.copytree(finished, run, ignore=later)
    for shard in sorted((run / "tokens").glob("*.arrow")):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)

    said = cm3leon(*arguments(tars, run), check=False)
    assert said.returncode == 2
    assert "Traceback" not in said.stderr
    named = said.stderr.splitlines()[-1]
    assert named.startswith(f"cm3leon: {run}/tokens/shard-0000")
    assert "damaged" in named

    # Once the damaged shards are deleted, they are made again as they were.
    for shard in (run / "tokens").glob("*.arrow"):
        shard.unlink()
    cm3leon(*arguments(tars, run))
    assert shards(run) == shards(finished)
    assert losses(run) == losses(finished)


def test_other_tokenizers_are_refused_in_a_sentence(
    tars: Path, finished: Path, tmp_path: Path
) -> None:
    said = cm3leon(
        *arguments(tars, tmp_path / "other", f'shards.mix={{"{finished}": 1}}', "seed=1"),
        check=False,
    )
    assert said.returncode == 2
    assert said.stderr.strip().splitlines()[-1].startswith("cm3leon: ")
    assert "tokenizer" in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["stage=pretraining", "part=0/2"],
            "made in one piece; workers share: tokens, vectors, index, neighbours",
        ),
        (["stage=token", "part=0/2"], "tokens"),
        (["stage=tokens", "part=2/2"], "write part=k/n"),
        (["stage=tokens", "part=0/2"], "not exist"),
    ],
)
def test_mistakes_of_a_worker_end_in_a_sentence(
    tars: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    said = cm3leon("part", *words, *arguments(tars, tmp_path / "none"), check=False)
    assert said.returncode == 2
    assert sentence in said.stderr
    assert "Traceback" not in said.stderr
