"""Sources against the libraries that read the same files: documents a second, decoded, in one process.

    python benchmarks/reading.py

Images are JPEGs of 256 x 256 pixels with captions of about 60 characters.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES, discover


def photograph(rng: np.random.Generator, side: int = 256) -> bytes:
    """A JPEG of smooth noise, about as large as a photograph's."""
    coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 8, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)).save(
        file, "jpeg", quality=85
    )
    return file.getvalue()


def write(folder: Path, documents: int) -> float:
    """One tar and one parquet file of the same documents; bytes of an image."""
    rng = np.random.default_rng(0)
    images = [photograph(rng) for _ in range(documents)]
    captions = [
        f"a photograph of thing number {number} in some place, seen from afar"
        for number in range(documents)
    ]
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            for suffix, content in (("jpg", image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    structs = [{"bytes": image, "path": None} for image in images]
    pq.write_table(
        pa.table({"image": structs, "caption": captions}), folder / "a.parquet", row_group_size=500
    )
    return sum(map(len, images)) / documents


def ours(**settings: Any) -> Callable[[], Iterable[Any]]:
    def read() -> Iterable[Any]:
        for item in SOURCES.build(settings).documents():
            assert not isinstance(item, Skipped)
            yield item.image

    return read


def webdataset(folder: Path) -> Iterable[Any]:
    import webdataset as wds

    for item in wds.WebDataset(str(folder / "00000.tar"), shardshuffle=False).decode("rgb8"):
        yield item["jpg"]


def datasets(folder: Path) -> Iterable[Any]:
    import datasets as hf

    files = hf.load_dataset(
        "parquet", data_files=str(folder / "a.parquet"), split="train", streaming=True
    )
    for item in files.cast_column("image", hf.Image()):
        yield np.asarray(item["image"].convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=2000)
    options = parser.parse_args()
    discover()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = write(folder, options.documents)
        print(f"{options.documents:,} documents, {size / 1000:.1f} kB an image\n")
        print("| files | read by | documents/s |")
        print("|---|---|---|")
        for files, name, read in (
            ("tar", "ours", ours(name="webdataset", path=str(folder / "00000.tar"))),
            ("tar", "webdataset", lambda: webdataset(folder)),
            (
                "parquet",
                "ours",
                ours(name="parquet", path=str(folder / "a.parquet"), image_column="image"),
            ),
            ("parquet", "datasets, streaming", lambda: datasets(folder)),
        ):
            best = 0.0
            try:
                for _ in range(3):
                    start = time.perf_counter()
                    count = sum(1 for _ in read())
                    best = max(best, count / (time.perf_counter() - start))
                print(f"| {files} | {name} | {best:,.0f} |", flush=True)
            except ImportError:
                print(f"| {files} | {name} | not installed |", flush=True)


if __name__ == "__main__":
    main()
