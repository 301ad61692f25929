"""The stage that finds the documents that may be retrieved for each training document."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config import result_settings
from cm3leon.data.shards import PLAN, make_missing, open_shard, read_plan, shard_path, write_plan
from cm3leon.data.token_shards import NO_LABEL
from cm3leon.experiment import Experiment
from cm3leon.io import write_json
from cm3leon.records import read_stage
from cm3leon.retrievers.neighbours import (
    NeighbourShards,
    finish_neighbours,
    neighbours_of,
    write_neighbour_shard,
)
from cm3leon.retrievers.strategy import NONE
from cm3leon.stages.files import ENCODER
from cm3leon.stages.generations import check_generations
from cm3leon.stages.inputs import DRAWN_IN_TRAINING, SHARDS, recorded
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.sharing import DECODED, shard_documents, share_out, with_progress
from cm3leon.stages.stage import Part, Stage
from cm3leon.stages.vectors import document_parts
from cm3leon.types import UserError

STRATEGY = "strategy.json"
"""What the strategy did with the candidates, in the stage's folder."""
OWN_BANK = ".."
"""The run folder whose documents are the bank, relative to the stage's folder."""


def bank_fingerprint(run: RunFolder) -> str | None:
    """Fingerprint of another run's memory bank; None if the run's own is used.

    Raises:
        UserError: for a folder without a finished index, or with an index of other vectors.
    """
    bank = run.shards.bank
    if bank is None:
        return None
    try:
        fingerprint = read_stage(bank / "index")["fingerprint"]
    except (OSError, UserError) as error:
        raise UserError(
            f"shards.bank: {bank} is not the folder of a run with a finished index; make it with "
            "until=index first"
        ) from error
    check_generations(bank, ("index",), where="shards.bank")
    return fingerprint


def make_neighbours_part(run: RunFolder, folder: Path, part: Part) -> None:
    """Find the neighbours of this worker's documents, under every variant of query dropout."""
    parts, config = run.source.parts(), run.experiment.retriever.config
    first_rows = np.concatenate([[0], np.cumsum(run.tokens.rows)])
    plan = {"bank": str(run.shards.bank.absolute()) if run.shards.bank else OWN_BANK}
    if (folder / PLAN).is_file() and read_plan(folder) != plan:
        # The bank has the same content, which the stage's fingerprint says, but was moved.
        write_json(folder / PLAN, plan, indent=None, shared=True)
    write_plan(folder, plan)

    # Training knows documents by their rows in the bank's token shards; added ones have none.
    bank = run.open_bank(with_added=False)
    if part[0] == 0:
        print(f"      memory bank: {bank.place}", flush=True)
        if not bank.vectors.all_stay_mapped:
            print(
                f"      the bank has {bank.vectors.count:,} shards of vectors, more than a process "
                "keeps mapped (an eighth of vm.max_map_count), so they are opened again and again; "
                "raise vm.max_map_count, or make larger parts (docs/scale.md)",
                flush=True,
            )

    def make(number: int) -> None:
        width = 2 * config.per_modality
        if not config.max_documents:  # training draws none, so nothing is searched for
            none_VBK = np.full((config.dropout_variants, int(run.tokens.rows[number]), width), NONE)
            write_neighbour_shard(
                shard_path(folder, number, len(parts)), none_VBK, {"verdicts": {}}
            )
            return

        found = [np.zeros((config.dropout_variants, 0, width), np.int64)]
        verdicts: Counter[str] = Counter()
        first = int(first_rows[number])
        for batch in shard_documents(run, parts, number):
            # The queries in all variants; their seeds follow from the documents' rows.
            seeds = np.random.SeedSequence([run.experiment.seed, first])
            queries = []
            for seed in seeds.generate_state(config.dropout_variants):
                queries.append(
                    document_parts(run, batch, dropout=config.query_dropout, seed=int(seed))
                )

            # A document's own row, and the vectors by which its copies are recognised.
            if run.shards.bank is None:
                own_B = np.arange(first, first + len(batch))
                documents = bank.parts_of(own_B)
            else:
                own_B, documents = np.full(len(batch), NONE), document_parts(run, batch)
            rows_VBK, seen = neighbours_of(run.retriever, bank, queries, own_B, like=documents)
            found.append(rows_VBK)
            verdicts += seen
            first += len(batch)
        path = shard_path(folder, number, len(parts))
        write_neighbour_shard(path, np.concatenate(found, axis=1), {"verdicts": dict(verdicts)})

    with_progress("neighbours", make_missing(folder, len(parts), make, part=part), len(parts), part)


def make_neighbours(run: RunFolder, folder: Path) -> None:
    """Make the shards that no worker has made, the index of all, and the strategy's figures."""
    share_out(run, folder, make_neighbours_part)
    count = len(run.source.parts())
    finish_neighbours(folder, count)

    verdicts: Counter[str] = Counter()
    found: Counter[int] = Counter()
    for number in range(count):
        shard = open_shard(shard_path(folder, number, count), verify=False)
        verdicts += Counter(shard.header["verdicts"])
        rows_MN, variants = shard.numbers("rows"), shard.header["variants"]
        found += neighbour_counts(
            rows_MN.reshape(len(shard) * variants, len(rows_MN.T) // variants)
        )

    figures = strategy_figures(verdicts, found)
    write_json(folder / STRATEGY, {**figures, "same_label": _same_label(run, folder)})

    # Nothing reads the kept images any more, unless other runs share the stage.
    if not (run.folder / "tokens").is_symlink():
        shutil.rmtree(run.folder / "tokens" / DECODED, ignore_errors=True)


def _same_label(run: RunFolder, folder: Path) -> float | None:
    """Share of neighbours with the class of their query document; None if classes are not known, or
    are another run's."""
    if not run.source.class_names or run.shards.bank is not None:
        return None
    neighbours, tokens = NeighbourShards(folder), run.tokens
    same = found = 0
    for number in range(len(tokens.rows)):
        rows_MN = neighbours.shard(number)
        labels_M = tokens.shard(number).labels(np.arange(len(rows_MN)))

        # A share of the other documents alone would pass for that of all.
        if (labels_M == NO_LABEL).any():
            return None

        known_MN = rows_MN != NONE
        labels_K = tokens.labels(rows_MN[known_MN])
        own_K = np.broadcast_to(labels_M[:, None], rows_MN.shape)[known_MN]
        same += int((labels_K == own_K).sum())
        found += len(labels_K)
    return same / found if found else None


def neighbour_counts(rows: np.ndarray) -> Counter[int]:
    """How many documents (in a variant) have 0, 1, 2 ... neighbours, from rows (..., K)."""
    return Counter(dict(enumerate(np.bincount((rows != NONE).sum(axis=-1).ravel()).tolist())))


def strategy_figures(verdicts: Mapping[str, int], counts: Mapping[int, int]) -> dict[str, Any]:
    """What the strategy did: the share of candidates that each rule rejected, and how many
    neighbours are left.

    Args:
        verdicts: how many candidates were `seen`, and how many each rule rejected.
        counts: how many documents have how many neighbours, see `neighbour_counts`.
    """
    seen, documents = verdicts.get("seen", 0), max(1, sum(counts.values()))
    rejected = {rule: count / seen for rule, count in sorted(verdicts.items()) if rule != "seen"}
    neighbours = sum(number * count for number, count in counts.items())
    return {
        "candidates_looked_at": seen,
        "share_rejected": rejected,
        "neighbours_per_document": neighbours / documents,
        "documents_without_neighbours": counts.get(0, 0) / documents,
    }


def bank_of(folder: Path) -> Path:
    """The run folder whose documents the neighbours in a stage's folder are."""
    bank = read_plan(folder)["bank"]
    return folder.parent if bank == OWN_BANK else Path(bank)


def neighbours_inputs(run: RunFolder) -> dict[str, Any]:
    """The settings that decide the neighbours;
    how many of them a sample gets is drawn in training."""
    settings = result_settings(run.experiment.retriever)
    settings = {name: value for name, value in settings.items() if name not in DRAWN_IN_TRAINING}
    # If training draws none, none are searched for.
    settings["max_documents"] = min(1, run.experiment.retriever.config.max_documents)
    return {"retriever": settings, **run.depends_on("seed"), "bank": bank_fingerprint(run)}


STAGE = Stage(
    "neighbours",
    version=3,
    inputs=neighbours_inputs,
    make=make_neighbours,
    make_part=make_neighbours_part,
    needs=("tokens", "index"),
    files=(ENCODER,),
    settings=recorded("retriever", "seed", "shards"),
    results=(*SHARDS, STRATEGY),
    expensive=True,
)


def stage_of(experiment: Experiment) -> Stage[RunFolder]:
    """The stage, which needs no index if the memory bank is another run's."""
    return replace(STAGE, needs=("tokens",)) if experiment.shards.bank else STAGE
