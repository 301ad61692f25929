"""Asking about images from the command line: lines and files of answers, and a second call.

A second call resumes the first one: it asks again only what is missing or could not be used.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import cm3leon
from PIL import Image

from cm3leon.api import CM3Leon, ShortageWarning, TruncatedWarning
from cm3leon.data.images import read_given_image
from cm3leon.types import PARTLY


class Model:
    """Stands in for a run: its answers say what was asked, and the shade of the image's pixels."""

    digest = "first"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.run = SimpleNamespace(parts_of_answers=lambda with_bank: {"model": self.digest})

    def _shade(self, image: Path) -> int:
        shade = int(read_given_image(image, "image").mean())
        self.asked.append(Path(image).name)
        return shade

    def caption(self, image: Path, *, retrieve: int, max_tokens: int, **_: Any) -> str:
        return f"{self._shade(image)} {retrieve} {max_tokens}"

    def answer(self, image: Path, question: str, **_: Any) -> str:
        return f"{question} {self._shade(image)}"

    def score(self, **given: Any) -> list[float]:
        texts = given.get("texts") or [given["text"]]
        return [float(len(text)) for text in texts]

    def infill(self, image: Path, text: str, *, box: Any, words: Any, **_: Any) -> Any:
        shade = self._shade(image)
        return SimpleNamespace(image=Image.new("L", (4, 4), shade), text=f"{text} {box} {words}")

    def edit(self, image: Path, instruction: str, *, n: int, **_: Any) -> Any:
        shade = self._shade(image)
        return [SimpleNamespace(image=Image.new("L", (4, 4), shade + each)) for each in range(n)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model()
    monkeypatch.setattr(CM3Leon, "load", lambda *_, **__: made)
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of the shades 0, 1 and 2, two of one name, and a file that is no image."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.JPG", "sub/a.png"]):
        Image.new("RGB", (8, 8), (number,) * 3).save(folder / name)
    (folder / "note.txt").write_text("no image")
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_folder_has_a_line_for_each_image(model: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    words = ["caption", "run=x", f"image={images}", f"out={out}", "retrieve=1", "max_tokens=7"]
    assert cm3leon(*words).stdout == f"answers: {out}\n"
    assert [(line["image"], line["caption"]) for line in lines(out)] == [
        ("a.png", "0 1 7"),
        ("b.JPG", "1 1 7"),
        ("sub/a.png", "2 1 7"),
    ]

    said = cm3leon("answer", "run=x", f"image={images / 'a.png'}", "question=7").stdout
    (printed,) = said.split("\n")[:-1]
    assert json.loads(printed)["answer"] == "7 0"

    # Texts are taken as they are typed: 7 and yes are no number and no truth value.
    said = cm3leon("score", "run=x", f"image={images / 'a.png'}", "texts=[7, 'a two', yes]").stdout
    assert json.loads(said)["scores"] == {"7": 1.0, "a two": 5.0, "yes": 3.0}


def test_only_what_is_missing_is_asked_again(model: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    words = ["caption", "run=x", f"image={images}", f"out={out}"]
    cm3leon(*words)

    # A kill in the middle of the second line, and another first image since.
    whole = out.read_text().splitlines(keepends=True)
    out.write_text(whole[0] + whole[1][:20])
    Image.new("RGB", (8, 8), (9, 9, 9)).save(images / "a.png")

    model.asked.clear()
    cm3leon(*words)
    assert model.asked == ["a.png", "b.JPG", "a.png"]
    assert sorted(line["caption"] for line in lines(out)) == ["1 0 64", "2 0 64", "9 0 64"]

    # All is done; other settings or another model would be mixed with what is there.
    said = cm3leon(*words)
    assert "3 of 3 images were done already" in said.stdout
    assert len(model.asked) == 3

    said = cm3leon(*words, "max_tokens=5", check=False)
    assert said.returncode == 2
    assert "was made with other settings (max_tokens)" in said.stderr

    model.digest = "trained anew"
    said = cm3leon(*words, check=False)
    assert (said.returncode, "was made with other settings (model)" in said.stderr) == (2, True)


def test_names_of_earlier_versions_are_still_read(
    model: Model, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    words = ["caption", "run=x", f"image={images}", f"out={out}"]

    # The settings on the command line, and those that an earlier version wrote beside its lines.
    cm3leon(*words, "most=7", "way=eager")
    assert [line["caption"] for line in lines(out)] == ["0 0 7", "1 0 7", "2 0 7"]

    settings = out.with_suffix(".settings.json")
    settings.write_text(settings.read_text().replace("max_tokens", "most"))
    assert "3 of 3 images were done already" in cm3leon(*words, "max_tokens=7").stdout


def test_texts_that_were_cut_have_it_in_their_lines_and_are_counted(
    model: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three texts are cut; another warning, which comes with each, is shown once."""

    def caption(image: Path, **_: Any) -> str:
        warnings.warn("no room", ShortageWarning, stacklevel=2)
        shade = model._shade(image)
        if shade:
            warnings.warn("it was cut", TruncatedWarning, stacklevel=2)
        return str(shade)

    monkeypatch.setattr(model, "caption", caption)
    out = tmp_path / "captions.jsonl"
    said = cm3leon("caption", "run=x", f"image={images}", f"out={out}", "max_tokens=7")
    assert [line.get("truncated") for line in lines(out)] == [None, True, True]
    assert "2 of 3 texts were cut before their end; raise max_tokens, which is 7" in said.stderr
    assert "it was cut" not in said.stderr
    assert said.stderr.count("no room") == 1


def test_images_go_beside_their_lines(model: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "filled"
    words = ["infill", "run=x", f"image={images}", f"out={out}", "text=7", "box=0,4,8,8"]
    cm3leon(*words)
    files = {line["image"]: line["files"] for line in lines(out / "results.jsonl")}
    assert files == {
        "a.png": ["a.png.png"],
        "b.JPG": ["b.JPG.png"],
        "sub/a.png": ["sub/a.png.png"],
    }
    assert lines(out / "results.jsonl")[0]["text"] == "7 (0, 4, 8, 8) None"

    # Only the image whose file is missing is made again.
    (out / "sub" / "a.png.png").unlink()
    model.asked.clear()
    cm3leon(*words)
    assert model.asked == ["a.png"]
    assert (out / "sub" / "a.png.png").is_file()

    edited = tmp_path / "edited"
    cm3leon("edit", "run=x", f"image={images / 'a.png'}", f"out={edited}", "instruction=x", "n=2")
    assert sorted(file.name for file in edited.glob("*.png")) == ["a.png.png", "a.png_1.png"]


def test_images_that_cannot_be_used_are_named_and_tried_again(
    model: Model, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    (images / "\x1b[2Jbad.png").write_bytes(b"no image")
    words = ["caption", "run=x", f"image={images}", f"out={out}"]
    said = cm3leon(*words, check=False)
    assert said.returncode == PARTLY
    assert "1 of 4 images could not be used: \\x1b[2Jbad.png: " in said.stderr
    assert len(lines(out)) == 3

    Image.new("RGB", (8, 8)).save(images / "\x1b[2Jbad.png")
    assert cm3leon(*words).returncode == 0
    assert len(lines(out)) == 4

    # A single image: its error is the command's.
    (images / "only.png").write_bytes(b"no image")
    said = cm3leon("caption", "run=x", f"image={images / 'only.png'}", check=False)
    assert (said.returncode, said.stdout) == (2, "")
    assert "only.png" in said.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["caption", "run=x"],
            "`caption` needs an image file: image=FILE, for example image=seven.png",
        ),
        (
            ["caption", "run=x", "image={images}/gone"],
            "gone does not exist; give an image file, or",
        ),
        (["caption", "run=x", "image={images}/none"], "none holds no image files"),
        (
            ["answer", "run=x", "image={images}"],
            "`answer` needs a question about each image: question=TEXT, for example",
        ),
        (
            ["edit", "run=x", "image={images}"],
            "`edit` needs an instruction that says what to change in each image: instruction=TEXT",
        ),
        (
            ["score", "run=x", "image={images}"],
            "`score` needs texts: texts=[TEXT,TEXT], for example",
        ),
        (["score", "run=x", "image={images}", "text=a", "question=b"], "question is given without"),
        (["infill", "run=x", "image={images}"], "`infill` needs the part to fill in: box="),
        (
            ["infill", "run=x", "image={images}", "box=[1,2]"],
            "box is [1, 2]; it must be a list of 4",
        ),
        (["infill", "run=x", "image={images}", "box=1,2"], 'box is "1,2"; it must be a list of 4'),
        (["caption", "run=x", "image={images}", "weights=x"], 'weights is "x"; it must be one of'),
        (["caption", "run=x", "image={images}", "out={images}/note.txt"], "was not made by this"),
    ],
)
def test_mistakes_are_said(model: Model, images: Path, words: list[str], sentence: str) -> None:
    (images / "none").mkdir()
    said = cm3leon(*(word.format(images=images) for word in words), check=False)
    assert said.returncode == 2
    assert sentence in said.stderr
    assert said.stderr.count("\n") == 1
    assert not model.asked
