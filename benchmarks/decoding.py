"""JPEGs of a tar to squares of 256 pixels, as the stages read them: images a second.

    # As many threads as this process has processors.
    python benchmarks/decoding.py

    # One thread.
    taskset -c 1 python benchmarks/decoding.py

    # Beside a device that takes half a second for a batch of 64.
    python benchmarks/decoding.py --device-ms 500

Tokenizing, embedding and evaluation read images this way. The device is a stand-in that sleeps, as
a thread does that waits for a GPU. While it is busy, the next images may be decoded.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from reading import photograph

from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES, discover
from cm3leon.stages.sharing import batches

SIZE, BATCH = 256, 64


def write(path: Path, side: int, count: int) -> None:
    """A tar of captioned photographs; there are 16 different ones."""
    contents = [photograph(np.random.default_rng(number), side) for number in range(16)]
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for suffix, content in (("jpg", contents[number % 16]), ("txt", b"a photograph")):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def rate(path: Path, device_seconds: float) -> tuple[float, float]:
    """Images by second of time, and by second of a processor."""
    source = SOURCES.build({"name": "webdataset", "path": str(path)})
    begun, worked, count = time.perf_counter(), time.process_time(), 0

    # Batches come from threads that decode ahead, also while the device is busy.
    for batch in batches(source.read_squared(source.parts()[0], size=SIZE), BATCH):
        assert not any(isinstance(item, Skipped) for item in batch)
        count += len(batch)
        time.sleep(device_seconds)

    return count / (time.perf_counter() - begun), count / (time.process_time() - worked)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--megapixels", type=int, default=300, help="of a tar, altogether")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device-ms", type=float, default=0.0)
    options = parser.parse_args()

    discover()
    processors = len(os.sched_getaffinity(0))
    print(f"{processors} processors, a device of {options.device_ms:g} ms a batch")
    for side in options.sides:
        # Tars of all sizes have about as many pixels, in whole batches.
        count = max(BATCH, options.megapixels * 10**6 // side**2 // BATCH * BATCH)
        wall = processor = 0.0
        with tempfile.TemporaryDirectory() as folder:
            tar = Path(folder) / "a.tar"
            write(tar, side, count)
            for _ in range(options.repeats):
                by_time, by_processor = rate(tar, options.device_ms / 1000)
                wall, processor = max(wall, by_time), max(processor, by_processor)
        print(f"{side:5} px: {wall:7.0f} images/s, {processor:7.0f} a processor second")


if __name__ == "__main__":
    main()
