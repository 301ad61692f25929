"""The command `validate`, which reads a corpus and says what it holds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import CORPORA, encoded, picture, write_lines, write_tar
from hypothesis import given
from hypothesis import strategies as st
from processes import Forked

from cm3leon.data.formats import told_source
from cm3leon.data.survey import Seen, quantile, read
from cm3leon.run import main
from cm3leon.types import Document, TextSegment

ROOT = Path(__file__).resolve().parent.parent


def test_a_corpus_with_everything_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Seven pairs, and an eighth whose image is none; then a text, an image, a page of both, two
    # lines whose images are missing, and one without anything.
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number, 10 + number)))
    (tmp_path / "7.png").write_bytes(b"no image")
    lines = [{"text": "x" * (10 + n), "image": f"{n}.png"} for n in range(8)]
    page = {"segments": [{"text": "ab"}, {"image": "0.png"}, {"image": "1.png"}]}
    more = [
        {"text": "y" * 50},
        {"image": "0.png"},
        page,
        {"image": "gone.png"},
        {"image": "lost.png"},
        {},
    ]
    write_lines(tmp_path / "a.jsonl", [*lines, *more])

    assert main(["validate", f"data.path={tmp_path}/a.jsonl", "limit=1"]) == 0
    said = capsys.readouterr().out

    assert "documents  10 usable, 4 items left out (28.6%)" in said
    for kind in (
        "7 of a caption and its image",
        "1 of text alone",
        "1 of an image alone",
        "1 pages of text and imag",
    ):
        assert f"           {kind}" in said

    assert "text       characters a document: least 2, median 13, 95 % 50, most 50" in said
    assert "images     10 (RGB 10 in their files)\n" in said
    assert "           shorter side in pixels: least 10, median 11, 95 % 16, most 16\n" in said
    assert "           pixels: least 100, median 121, 95 % 256, most 256\n" in said

    assert "repeated" not in said
    assert "left out   2: unreadable: FileNotFoundError: the image ...\n" in said
    assert "             a.jsonl/12: unreadable: FileNotFoundError: the image 'gone.png'\n" in said
    assert "             and 1 more\n" in said
    assert "left out   1: the line has none of text, image and segments" in said

    # 10 images of 1,024 codes; 7 captions of 10 to 16 characters, 50 and 2 make 143 bytes
    assert "tokens     about 10,276 by the paper's tokenizers" in said
    assert "disk       tokens 20.6 kB (2 bytes each), vectors 20.5 kB" in said


def test_the_cost_of_an_experiments_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CORPORA["webdataset"](tmp_path)
    assert main(["validate", f"data.path={settings['path']}", "experiment=digits"]) == 0
    said = capsys.readouterr().out

    # Six images of 16 codes, and 37 bytes of text with about four bytes a token.
    assert "about 105 by the experiment's tokenizers: 16 an image" in said
    tokens, vectors = "210 B (2 bytes each)", "1.28 kB (text and image, 64 x 2 bytes each)"
    assert f"disk       tokens {tokens}, vectors {vectors}" in said
    rate = r"encoding images: [\d,]+ images/s on this machine's [CG]PU, \d+ s in all"
    assert re.search(rate, said)


def test_settings_go_over_those_of_an_experiments_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CORPORA["webdataset"](tmp_path)
    assert main(["validate", f"data.path={settings['path']}", "experiment=corpus"]) == 0
    assert "documents  5 usable, 0 items left out" in capsys.readouterr().out

    # The experiment's own source has a column that the files lack; a setting names another one.
    CORPORA["parquet"](tmp_path)
    file = tmp_path / "mine.yaml"
    text = (ROOT / "experiments" / "corpus.yaml").read_text()
    source = "{name: parquet, image_column: none, path: none}"
    file.write_text(text.replace("{name: webdataset}", source))
    words = ["validate", f"experiment={file}", f"data.path={tmp_path}/*.parquet"]
    assert main(words) == 2
    assert "has no column none for data.image_column" in capsys.readouterr().err
    assert main([*words, "data.image_column=jpg"]) == 0

    # Settings may name another source, in any order.
    tars = ["data.name=webdataset", f"data.path={tmp_path}/*.tar"]
    assert main([*words[:2], *tars]) == 0
    assert main([*words[:2], *reversed(tars)]) == 0

    assert main(["validate", "experiment=corpus"]) == 2
    assert "data.path is missing" in capsys.readouterr().err


def test_ids_of_more_than_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = CORPORA["webdataset"](tmp_path)
    digits = (ROOT / "experiments" / "digits.yaml").read_text()

    # Beside the ids of texts there are 128 codes and 64 sentinels.
    for size, width in ((65_536 - 128 - 64, 2), (65_536 - 128 - 63, 4)):
        file = tmp_path / "wide.yaml"
        file.write_text(digits.replace("vocab_size: 320", f"vocab_size: {size}"))
        assert main(["validate", f"data.path={settings['path']}", f"experiment={file}"]) == 0
        assert f"tokens {105.25 * width:.0f} B ({width} bytes each)" in capsys.readouterr().out


def test_repeated_documents_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    # The third pair has the image of the first one under another name.
    write_lines(
        tmp_path / "a.jsonl",
        [
            {"image": "0.png", "text": "words"},
            {"image": "1.png", "text": "words"},
            {"image": "copy.png", "text": "words"},
            {"text": "words"},
            {"text": "words"},
        ],
    )
    assert main(["validate", f"data.path={tmp_path}/a.jsonl"]) == 0
    repeated = "repeated   2 documents have the text and the images of an earlier one\n"
    assert repeated in capsys.readouterr().out

    seen = Seen()
    for id_ in ("a", "b", "a", "a"):
        seen.add(Document(id_, (TextSegment("text"),)))
    assert "repeated   2 documents have an id of an earlier one" in seen.report()


def test_like_reasons_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a.png", "it's.png", 'quo"te.png', "17.png", "caf\u00e9.png"]
    lines = [json.dumps({"image": name}).encode() for name in names]
    lines += [b'{"text": "\xff"}', b'{"text": "......\xe9"}', b'{"text": "good"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert main(["validate", f"data.path={tmp_path}", "limit=2"]) == 0

    # File names and bytes, which differ from line to line, do not make another reason of one.
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert [line.split(":")[0] for line in told] == ["left out   5", "left out   1", "left out   1"]
    assert "0x" not in "".join(told)


def test_the_data_of_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "experiment=digits"]) == 0
    said = capsys.readouterr().out
    assert "source     digits\n" in said
    assert "documents  1,797 usable, 0 items left out" in said
    assert "images     1,797\n" in said


@pytest.mark.parametrize("name", ["webdataset", "parquet", "jsonl", "folder"])
def test_the_source_is_told_by_the_files(name: str, tmp_path: Path) -> None:
    settings = CORPORA[name](tmp_path)
    expected = "folder" if name == "jsonl" else name
    assert told_source(settings["path"])[0] == expected
    if name == "jsonl":  # a folder with images in it; its lines are told by their own path
        assert told_source(f"{tmp_path}/*.jsonl")[0] == "jsonl"


def stray(kind: str, place: Path, size: int) -> None:
    """Write a file of another kind than the corpus's, of about this size in bytes or images."""
    name = {"webdataset": "old.tar", "parquet": "meta.parquet", "jsonl": "log.jsonl"}.get(kind)
    if name is None:
        for number in range(size):
            (place / f"preview {number}.png").write_bytes(encoded(picture(number, 4)))
    else:
        (place / name).write_bytes(bytes(size))


@pytest.mark.parametrize(
    ("corpus", "other", "size"),
    [
        ("folder", "webdataset", 10_240),
        ("folder", "parquet", 2_000),
        ("folder", "jsonl", 500),
        ("webdataset", "folder", 5),
        ("parquet", "folder", 3),
        ("webdataset", "parquet", 900),
    ],
)
def test_the_kind_that_fills_the_folder_is_taken_and_others_are_named(
    corpus: str, other: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usable = 40 if corpus == "folder" else 99
    images = [encoded(picture(number)) for number in range(usable)]
    if corpus == "folder":
        for number, image in enumerate(images):
            (tmp_path / f"{number}.png").write_bytes(image)
            (tmp_path / f"{number}.txt").write_text("words")
    elif corpus == "webdataset":
        members = []
        for number, image in enumerate(images):
            members += [(f"{number:03d}.png", image), (f"{number:03d}.txt", b"words")]
        write_tar(tmp_path / "a.tar", members)
    else:
        table = pa.table({"jpg": images, "caption": ["words"] * 99})
        pq.write_table(table, tmp_path / "a.parquet")

    stray(other, tmp_path, size)

    assert main(["validate", f"data.path={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"source     {corpus}\n" in said
    assert f"data.name  {corpus}, whose files fill data.path; not read: " in said
    assert f"for data.name={other} (" in said
    assert f"documents  {usable} usable" in said


def test_several_paths_are_validated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        members = [(f"{name}.png", encoded(picture())), (f"{name}.txt", b"words")]
        write_tar(tmp_path / f"{name}.tar", members)

    for path in (
        f"{tmp_path}/a.tar::{tmp_path}/b.tar",
        f"[{tmp_path}/a.tar, {tmp_path}/b.tar]",
        f"{tmp_path}/{{a,b}}.tar",
    ):
        assert main(["validate", f"data.path={path}"]) == 0
        said = capsys.readouterr().out
        assert "source     webdataset" in said
        assert "documents  2 usable, 0 items left out" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "`validate` needs a corpus: data.path=PATH, for example data.path="),
        (["data.path=a0.tar", "data.path=a1.tar"], "data.path is given 2 times; several paths are"),
        (["data.path={tars}/b0.tar::{tars}/a.tar"], "b0.tar does not exist"),
        (["data.path=none"], "data.path: none does not exist"),
        (["data.path={empty}"], "holds no files that end in .tar, "),
        (["data.name=webdatset", "data.path={empty}"], "did you mean webdataset?"),
        (["data.path={tars}", "limits=3"], "limits is not a known key; did you mean limit?"),
        (["data.path={tars}", "limit=0"], "limit is 0; it must be a whole number, at least 1"),
        (["data.path={tars}", "data.paths=3"], "data.paths is not a known key"),
        (["data.path={tars}"], "data: no usable documents in the corpus (1 items left out)"),
    ],
)
def test_mistakes_are_sentences(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("empty", "tars"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [("a.txt", b"x")])
    words = [word.format(empty=tmp_path / "empty", tars=tmp_path / "tars") for word in words]

    assert main(["validate", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("cm3leon: ")
    assert sentence in said


@given(st.lists(st.integers(0, 20), min_size=1), st.sampled_from([0.0, 0.25, 0.5, 0.95, 1.0]))
def test_quantiles_by_their_definition(values: list[int], share: float) -> None:
    """The least value that at least this share of the values does not exceed."""

    def count_up_to(value: int) -> int:
        return sum(other <= value for other in values)

    expected = next(v for v in sorted(values) if count_up_to(v) >= share * len(values))
    assert quantile(Counter(values), share) == expected


def test_an_interruption_keeps_what_was_seen(tmp_path: Path) -> None:
    class Interrupted:
        def parts(self) -> list[str]:
            return ["one"]

        def read(self, part: str):
            yield Document("a", (TextSegment("text"),))
            raise KeyboardInterrupt

    seen = Seen()
    assert not read(Interrupted(), seen)  # type: ignore[arg-type]
    assert seen.documents == 1


def test_what_the_shell_ignores_is_not_ignored_in_tests(tmp_path: Path) -> None:
    """A shell's background job ignores Ctrl-C; the processes of tests started in one do not."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_inside.py").write_text(
        "import os, shutil, signal, subprocess, sys\n"
        "def test_inside():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    child.send_signal(signal.SIGINT)\n"
        "    assert child.wait(30) == -signal.SIGINT\n"
        "    assert shutil.get_terminal_size().columns == 80\n"
        "    assert 'RANK' not in os.environ\n"
    )

    # The shell's settings that would change what tests see: signals, columns, and a rank.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "31", "RANK": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_ctrl_c_prints_the_report_and_exits_with_130(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ({"text": str(number)} for number in range(1_000_000)))
    process = Forked("cm3leon.run", ["validate", f"data.path={tmp_path}"])

    # The report is asked for as soon as some documents were read.
    while "documents=" not in process.said(1):
        assert process.poll() is None, process.said(1)
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)

    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped before the end" in said
    assert "Traceback" not in errors
