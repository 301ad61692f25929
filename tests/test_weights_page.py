"""docs/public_weights.md: its commands, run in order on a small folder in the published form."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from corpora import encoded, picture
from test_emu3 import publish as publish_emu3
from test_import import publish

from cm3leon.run import main
from cm3leon.tokenizers.families import FAMILIES, renumbered

pytestmark = pytest.mark.stack

PAGE = Path(__file__).parent.parent / "docs" / "public_weights.md"
CALL = "python -m cm3leon.run "
ELSEWHERE = {"push", "serve", "demo"}
"""Commands that need a network, or go on until they are stopped: tests of their own run them."""

SHRUNK = (
    *("model.layers=2", "model.width=64", "model.head_size=16", "model.mlp_width=88"),
    *("model.seq_len=128", "training.batch_tokens=256", "training.steps=2", "launcher=here"),
    *("training.warmup_steps=1", "training.callback_every=2", "training.compile=false"),
    "split={validation: 0.2, held_out: 0.1}",
)


def commands() -> list[list[str]]:
    """The words of each command in the page's blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    return [shlex.split(line.removeprefix(CALL)) for line in lines if line.startswith(CALL)]


def shrunk(words: list[str], text_size: int) -> list[str]:
    """The same command for the small folder; a plan stays as it is, of the published size."""
    if words[0] == "import":
        sizes = {"from=emu3": ["image_size=32"], "from=export": []}
        return [*words, *sizes.get(words[1], ["image_size=8"])]

    if words[0].startswith("experiment="):
        return [*words, *SHRUNK, f"text_tokenizer.vocab_size={text_size}"]

    if words[0] == "generate":
        size = "size=[64,16]" if "run=runs/emu3" in words else "size=[16,4]"
        return [size if word.startswith("size=") else word for word in words]

    if words[0] == "infill":
        others = [word for word in words if not word.startswith("box=")]
        return [*others, "box=[0,6,12,12]"]

    return words


@pytest.mark.slow
def test_every_command_of_the_page_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The folders and images that the page's commands name.
    files = publish(tmp_path)
    for family in ("anole", "chameleon"):
        (tmp_path / f"{family}-7b").symlink_to(files["hf"])
    (tmp_path / "lumina-mgpt").symlink_to(files["hf"])
    publish_emu3(tmp_path).rename(tmp_path / "emu3-gen")

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(30):
        (photos / f"{number}.png").write_bytes(encoded(picture(number)))
        (photos / f"{number}.txt").write_text(f"a red dog with {number} cats")
    (tmp_path / "photo.jpg").write_bytes(encoded(picture(99), "jpeg"))

    tokenizer = files["hf"] / "tokenizer.json"
    text_size = renumbered(json.loads(tokenizer.read_text()), FAMILIES["anole"], "").text_size

    monkeypatch.chdir(tmp_path)
    asked = commands()
    assert {words[0] for words in asked} >= {"import", "generate", "caption", "plan", "search"}
    for words in asked:
        if words[0] not in ELSEWHERE or "dry_run=true" in words:
            assert main(shrunk(words, text_size)) == 0, (words, capsys.readouterr().err)

    # What some of them have left behind.
    assert len(list((tmp_path / "drawn_with_mine").rglob("*.png"))) >= 4
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "license: other" in card
    assert (tmp_path / "drawn_emu3").is_dir()
    for name in ("mine", "whole", "further"):
        assert (tmp_path / "runs" / name / "pretraining" / "model.safetensors").is_file()
