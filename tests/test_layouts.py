"""`generate` writes images in the folders and names that GenEval and DPG-Bench read.

Each is read here in the way that the benchmark's own evaluation reads it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cm3leon import CM3Leon
from cm3leon.run import main

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a seven"},
    {
        "tag": "colors",
        "include": [{"class": "cow", "count": 1, "color": "red"}],
        "prompt": "a red two",
    },
]
DPG = {"0": "a thin seven", "partiprompts12": "a bold two,\nslanted\n"}
SIDE = 32


@pytest.fixture
def words(tuned_model: CM3Leon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The common beginning of the commands here.

    They ask the tuned model itself, as its weights are not those of its folder.
    """
    monkeypatch.setattr(CM3Leon, "load", lambda *_, **__: tuned_model)
    folder = tuned_model.run.folder
    return ["generate", f"run={folder}", "precision=float32", f"out={tmp_path / 'out'}"]


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    return file


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in DPG.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def read_geneval(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """What GenEval's evaluation reads, by prompt: a JSON document, and samples by their names.

    Folders and samples have digits as their names.
    """
    found = {}
    for each in folder.iterdir():
        if each.is_dir() and each.name.isdigit():
            samples = {}
            for sample in (each / "samples").iterdir():
                if re.match(r"\d+\.png", sample.name):
                    samples[sample.name] = np.asarray(Image.open(sample))
            found[each.name] = (json.loads((each / "metadata.jsonl").read_text()), samples)
    return found


def read_dpg(folder: Path, side: int, count: int) -> dict[str, list[np.ndarray]]:
    """What DPG-Bench's evaluation reads: each file of a folder, cut into images of that side."""
    corners = [(0, 0), (side, 0), (0, side), (side, side)][:count]
    found = {}
    for file in folder.iterdir():
        grid = Image.open(file)
        crops = [grid.crop((left, top, left + side, top + side)) for left, top in corners]
        found[file.name.split(".")[0]] = [np.asarray(crop) for crop in crops]
    return found


def drawn_alone(model: CM3Leon, prompts: list[str], n: int) -> list[list[np.ndarray]]:
    """The images of each prompt, as the model draws them without any layout."""
    found = []
    for pictures in model.generate(prompts, n=n):
        found.append([np.asarray(picture.image) for picture in pictures])
    return found


def test_geneval_finds_its_lines_and_four_samples_of_each(
    tuned_model: CM3Leon,
    words: list[str],
    metadata: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [*words, "layout=geneval", f"prompts={metadata}", "n=4"]
    assert main(asked) == 0
    assert f"evaluate_images.py {tmp_path}/out/images" in capsys.readouterr().out

    found = read_geneval(tmp_path / "out" / "images")
    lines = {name: line for name, (line, _) in found.items()}
    assert lines == {"00000": GENEVAL[0], "00001": GENEVAL[1]}

    names = ["0000.png", "0001.png", "0002.png", "0003.png"]
    expected = drawn_alone(tuned_model, [str(line["prompt"]) for line in GENEVAL], 4)
    for (_, samples), images in zip([found["00000"], found["00001"]], expected, strict=True):
        assert sorted(samples) == names
        assert all(np.array_equal(samples[n], i) for n, i in zip(names, images, strict=True))

    # Any file of a prompt that is lost is made again, and nothing else.
    folder = tmp_path / "out" / "images"
    for lost in ("00001/samples/0002.png", "00000/metadata.jsonl"):
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        (folder / lost).unlink()
        assert main(asked) == 0
        assert "1 of 2 prompts are done already" in capsys.readouterr().out
        after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert after == before
    assert main(asked) == 0
    assert "2 of 2 prompts are done already" in capsys.readouterr().out


def test_dpg_bench_finds_a_grid_by_the_name_of_its_prompt(
    tuned_model: CM3Leon,
    words: list[str],
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = drawn_alone(tuned_model, ["a thin seven", "a bold two, slanted"], 4)
    for count in (4, 1):
        out = tmp_path / f"out{count}"
        asked = [*words[:-1], f"out={out}", "layout=dpg", f"prompts={texts}", f"n={count}"]
        assert main(asked) == 0
        told = f"PIC_NUM={count} bash dpg_bench/dist_eval.sh {out}/images {SIDE}"
        assert told in capsys.readouterr().out
        found = read_dpg(out / "images", SIDE, count)
        assert set(found) == set(DPG)
        if count == 4:
            for name, images in zip(DPG, expected, strict=True):
                assert all(map(np.array_equal, found[name], images))

        # Four images are a grid of two by two.
        sizes = {Image.open(file).size for file in (out / "images").iterdir()}
        assert sizes == {(SIDE * (1 + (count == 4)),) * 2}

    # A grid that is lost is made again, and nothing else.
    before = (tmp_path / "out4" / "images" / "0.png").read_bytes()
    (tmp_path / "out4" / "images" / "0.png").unlink()
    again = [*words[:-1], f"out={tmp_path}/out4", "layout=dpg", f"prompts={texts}", "n=4"]
    assert main(again) == 0
    assert "1 of 2 prompts are done already" in capsys.readouterr().out
    assert (tmp_path / "out4" / "images" / "0.png").read_bytes() == before


def test_a_folder_has_one_layout(
    words: list[str], metadata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "prompt=a seven", "n=1"]) == 0
    settings = tmp_path / "out" / "settings.json"
    written = json.loads(settings.read_text())
    assert written.pop("layout") == "plain"

    # A folder from before there were layouts is plain.
    settings.write_text(json.dumps(written))
    assert main([*words, "prompt=a seven", "n=1"]) == 0
    assert "1 of 1 prompts are done already" in capsys.readouterr().out

    assert main([*words, "layout=geneval", f"prompts={metadata}", "n=1"]) == 2
    assert "was made with other settings (layout)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["layout=geneval", "prompt=a"], "layout=geneval needs the prompts of its benchmark"),
        (["layout=dpg", "prompts={texts}", "n=8"], "layout=dpg has 1 or 4 images of a prompt, not"),
        (["layout=dpg", "prompts={texts}", "n=4", "size=[32,16]"], "leave size out"),
        (["layout=dpg", "prompts={metadata}", "n=4"], "must be a folder of .txt files"),
        (["layout=geneval", "prompts={texts}/0.txt", "n=4"], "0.txt, line 1 is not a line of"),
        (["layout=grid", "prompt=a"], "layout is"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    words: list[str],
    texts: Path,
    metadata: Path,
    given: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [word.format(texts=texts, metadata=metadata) for word in given]
    assert main([*words, *asked]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
