"""What a model's training has computed, read off its log (the paper's figure 2)."""

from __future__ import annotations

from pathlib import Path

from cm3leon.config import load_yaml
from cm3leon.io import read_json_lines
from cm3leon.stages.generations import finished_settings
from cm3leon.types import UserError


def training_flops(folder: Path, step: int | None = None) -> float:
    """Model FLOPs of a run's training up to a step (None = its end),
    with those of the run that it started from.

    The log has rates: FLOPs a token, which are the quotient of two of them, times the tokens of a
    step. Padding is counted as tokens, which there is little of in packed blocks.

    Raises:
        UserError: for a run whose log has no FLOPs,
            such as that of a model which is not the core decoder.
    """
    log = folder / "pretraining" / "log.jsonl"
    if not log.is_file():
        raise UserError(f"against: compute: {folder} has no log of its training, {log} is missing")
    config = {**load_yaml(folder / "config.yaml"), **finished_settings(folder)}
    training = config["training"]
    start = Path(training["start"]) if training.get("start") else None
    total = training_flops(start) if start else 0.0
    # A run that goes on counts its steps on from those of the other.
    before = _last_step(start) if start and training.get("start_with") == "everything" else 0
    tokens = training["batch_tokens"] or training["batch_size"] * config["model"]["seq_len"]
    for record in read_json_lines(log, {"step": int}):
        if step is not None and record["step"] > step:
            break
        if "flops_per_second" not in record:
            raise UserError(f"against: compute: {log} has no flops_per_second")
        total += (
            (record["step"] - before)
            * tokens
            * record["flops_per_second"]
            / record["tokens_per_second"]
        )
        before = record["step"]
    return total


def _last_step(folder: Path) -> int:
    return read_json_lines(folder / "pretraining" / "log.jsonl", {"step": int})[-1]["step"]
