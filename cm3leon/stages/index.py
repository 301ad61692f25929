"""The stage that makes the memory bank's index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from cm3leon.locks import locked
from cm3leon.retrievers.index import add_shard, merge, train
from cm3leon.stages.inputs import recorded
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.sharing import share_out
from cm3leon.stages.stage import Part, Stage


def make_index_part(run: RunFolder, folder: Path, part: Part) -> None:
    """Add the vectors of this worker's shards to pieces of the index;
    the first worker trains it."""
    vectors = run.vectors
    _train(run, folder)
    numbers = range(part[0], vectors.count, part[1])
    for number in tqdm(numbers, desc="index", unit="shard", mininterval=2.0, dynamic_ncols=True):
        add_shard(vectors, number, folder, pairs_only=run.retrieves_pairs_only)


def _train(run: RunFolder, folder: Path) -> None:
    """Train what all pieces use, unless another worker has or is about to."""
    with locked(folder, ".training", wait=True):
        train(
            run.vectors,
            folder,
            run.experiment.index,
            run.experiment.seed,
            pairs_only=run.retrieves_pairs_only,
        )


def make_index(run: RunFolder, folder: Path) -> None:
    """Make the pieces that no worker has made, merge all, and measure the recall."""
    _train(run, folder)  # here, where all GPUs can be used; a worker has one
    share_out(run, folder, make_index_part)
    merge(
        run.vectors,
        folder,
        run.experiment.index,
        run.experiment.seed,
        pairs_only=run.retrieves_pairs_only,
    )


def index_inputs(run: RunFolder) -> dict[str, Any]:
    """What the index depends on besides the vectors."""
    return {**run.depends_on("index", "seed"), "pairs_only": run.retrieves_pairs_only}


STAGE = Stage(
    "index",
    version=3,
    inputs=index_inputs,
    make=make_index,
    make_part=make_index_part,
    needs=("vectors",),
    settings=recorded("index", "retriever", "seed"),
    expensive=True,
)
