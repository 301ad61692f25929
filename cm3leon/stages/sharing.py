"""Stages whose shards are shared among workers: processes of this machine,
or a cluster's array jobs."""

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
"""Parts of a corpus that are too few to share; a folder of up to a thousand images has three."""
BATCH = 256
"""Documents that are encoded together."""
DECODED = "decoded"
"""Folder of the stage tokens with decoded images, for stages that read the same ones;
may be deleted."""


def is_shared_out(experiment: Experiment) -> bool:
    """Whether the corpus has enough parts to share, or cannot be read from here."""
    try:
        return len(SOURCES.build(experiment.data).parts()) > FEW_PARTS
    except UserError:
        return True


def share_out(run: RunFolder, folder: Path, make_part: MakePart) -> None:
    """Make the missing shards of a stage in `shards.workers` processes; with 1, in this process.

    Raises:
        UserError: if a worker fails; what the others have finished is kept.
    """
    workers = run.shards.workers
    if workers == 1:
        make_part(run, folder, (0, 1))
        return

    context = multiprocessing.get_context("spawn")
    settings = to_mapping(run.experiment)
    running = []
    for k in range(workers):
        arguments = (settings, run.folder, folder, make_part, (k, workers))
        running.append(context.Process(target=_work, args=arguments, daemon=True))
        running[-1].start()

    # An interruption must not leave any of them running.
    try:
        for process in running:
            process.join()
    finally:
        for process in running:
            process.terminate()
    if any(process.exitcode for process in running):
        raise UserError(
            f"stage {folder.name}: a worker failed, see above; the same command continues from "
            "there"
        )


def _work(
    experiment: Mapping[str, Any], run_folder: Path, folder: Path, make_part: MakePart, part: Part
) -> None:
    """Run a worker process, with the settings of the process
    that started it and its plugins loaded."""
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
    """Go through a worker's shards, showing how many of its share exist,
    a rate and the time left."""
    share = len(range(part[0], count, part[1]))
    name = title if part[1] == 1 else f"{title} {part[0]}/{part[1]}"
    for _ in tqdm(made, total=share, desc=name, unit="shard", mininterval=2.0, dynamic_ncols=True):
        pass


def batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Items in lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def shard_documents(run: RunFolder, parts: list[str], number: int) -> Iterator[list[Document]]:
    """The documents of token shard `number` in its order and in batches, with text and first image.

    Images are those kept when the shard was made; otherwise they are decoded again.

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

    # The order must be that of the shard.
    found = 0
    for batch in batches(items):
        if [document.id for document in batch] != wanted[found : found + len(batch)]:
            break
        found += len(batch)
        yield batch
    if found < len(wanted):
        raise UserError(
            f"data: {parts[number]} has changed since its tokens were made, and no longer holds "
            f"{wanted[found]}; delete {shard.path} and make it again"
        )
