"""Sources beside the libraries that read the same files: decoded documents a second, one process.

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
    pixels_HWC = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "jpeg", quality=85)
    return file.getvalue()


def write(folder: Path, documents: int) -> float:
    """Write a tar and a parquet file of the same documents; return the mean bytes of an image."""
    rng = np.random.default_rng(0)
    images, captions = [], []
    for number in range(documents):
        images.append(photograph(rng))
        captions.append(f"a photograph of thing number {number} in some place, seen from afar")

    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            for suffix, content in (("jpg", image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    # The form in which `datasets` keeps images.
    structs = [{"bytes": image, "path": None} for image in images]
    table = pa.table({"image": structs, "caption": captions})
    pq.write_table(table, folder / "a.parquet", row_group_size=500)
    return sum(map(len, images)) / documents


def ours(**settings: Any) -> Callable[[], Iterable[Any]]:
    """A function that reads the images of a source with these settings."""

    def read() -> Iterable[Any]:
        for item in SOURCES.build(settings).documents():
            assert not isinstance(item, Skipped)
            yield item.image

    return read


def webdataset(folder: Path) -> Iterable[Any]:
    """The images of the tar, by webdataset."""
    import webdataset as wds

    for item in wds.WebDataset(str(folder / "00000.tar"), shardshuffle=False).decode("rgb8"):
        yield item["jpg"]


def datasets(folder: Path) -> Iterable[Any]:
    """The images of the parquet file, by Hugging Face's datasets."""
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

        tar = ours(name="webdataset", path=str(folder / "00000.tar"))
        parquet = ours(name="parquet", path=str(folder / "a.parquet"), image_column="image")
        print_row("tar", "ours", tar)
        print_row("tar", "webdataset", lambda: webdataset(folder))
        print_row("parquet", "ours", parquet)
        print_row("parquet", "datasets, streaming", lambda: datasets(folder))


def print_row(files: str, name: str, read: Callable[[], Iterable[Any]]) -> None:
    """Print the best rate of three passes; the later ones find the file in the page cache."""
    best = 0.0
    try:
        for _ in range(3):
            start = time.perf_counter()
            count = sum(1 for _ in read())
            best = max(best, count / (time.perf_counter() - start))
    except ImportError:
        print(f"| {files} | {name} | not installed |", flush=True)
    else:
        print(f"| {files} | {name} | {best:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
