"""Stages whose shards workers share: processes of this machine, or array jobs of a cluster."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from cm3leon.config import from_mapping, to_mapping
from cm3leon.data.ahead import share_processors
from cm3leon.data.kept_images import kept_documents, kept_file
from cm3leon.data.shards import open_shard, shard_path
from cm3leon.experiment import Experiment
from cm3leon.registry import SOURCES, discover
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Part
from cm3leon.training.device import device_of_worker
from cm3leon.types import Document, UserError

T = TypeVar("T")
MakePart = Callable[[RunFolder, Path, Part], None]

FEW_PARTS = 3
"""Parts of a corpus that are not worth sharing out;
a folder of up to a thousand images has three."""
BATCH = 256
"""Documents that are encoded together."""
DECODED = "decoded"
"""Folder of the stage tokens for its images, for the stages that read the same ones;
it may be deleted."""


def is_shared_out(experiment: Experiment) -> bool:
    """Whether the corpus has parts enough for workers to share;
    also one that cannot be read from here."""
    try:
        return len(SOURCES.build(experiment.data).parts()) > FEW_PARTS
    except UserError:
        return True


def share_out(run: RunFolder, folder: Path, make_part: MakePart) -> None:
    """Makes the missing shards of a stage in `shards.workers` processes, in this one if that is 1.

    Raises:
        UserError: if a worker fails; what the others have finished is kept.
    """
    workers = run.shards.workers
    if workers == 1:
        make_part(run, folder, (0, 1))
        return
    context = multiprocessing.get_context("spawn")
    running = [
        context.Process(
            target=_work,
            args=(to_mapping(run.experiment), run.folder, folder, make_part, (k, workers)),
            daemon=True,
        )
        for k in range(workers)
    ]
    for process in running:
        process.start()
    try:
        for process in running:
            process.join()
    finally:
        for process in running:
            process.terminate()
    if any(process.exitcode for process in running):
        raise UserError(
            f"stage {folder.name}: a worker failed, see above; the same command goes on from there"
        )


def _work(
    experiment: Mapping[str, Any], run_folder: Path, folder: Path, make_part: MakePart, part: Part
) -> None:
    """What a worker process does, with the settings of the process that started it,
    once its plugins are loaded."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // part[1]))
    share_processors(part[1])
    try:
        discover(experiment["plugins"])
        run = RunFolder(from_mapping(Experiment, experiment), run_folder, device_of_worker(part[0]))
        make_part(run, folder, part)
    except (UserError, OSError) as error:
        sys.exit(f"cm3leon: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def with_progress(title: str, made: Iterable[tuple[int, bool]], count: int, part: Part) -> None:
    """Goes through a worker's shards, showing how many of its share are there,
    with a rate and the time left."""
    share = len(range(part[0], count, part[1]))
    name = title if part[1] == 1 else f"{title} {part[0]}/{part[1]}"
    for _ in tqdm(made, total=share, desc=name, unit="shard", mininterval=2.0, dynamic_ncols=True):
        pass


def batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def shard_documents(run: RunFolder, parts: list[str], number: int) -> Iterator[list[Document]]:
    """The documents of token shard `number` with their text and first image at least, in its order,
    in batches.

    Images are those that were kept when the shard was made, or else they are decoded once more.

    Raises:
        UserError: if the source no longer holds the documents that the shard was made of.
    """
    shard = open_shard(shard_path(run.folder / "tokens", number, len(parts)))
    wanted = shard.strings("id")
    kept = set(wanted)
    decoded = kept_documents(kept_file(run.folder / "tokens" / DECODED, number, len(parts)))
    size = run.image_tokenizer_shape.image_size
    read = decoded or run.source.read_squared(parts[number], size=size)
    items = (item for item in read if isinstance(item, Document) and item.id in kept)
    found = 0
    for batch in batches(items):
        if [document.id for document in batch] != wanted[found : found + len(batch)]:
            break
        found += len(batch)
        yield batch
    if found < len(wanted):
        raise UserError(
            f"data: {parts[number]} has changed since its tokens were made, it no longer holds "
            f"{wanted[found]}; delete {shard.path} and make it again"
        )
