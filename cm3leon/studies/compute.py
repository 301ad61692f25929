"""The compute of a model's training, read from its log (the paper's figure 2)."""

from __future__ import annotations

from pathlib import Path

from cm3leon.config import load_yaml
from cm3leon.io import read_json_lines
from cm3leon.stages.generations import finished_settings
from cm3leon.types import UserError


def training_flops(folder: Path, step: int | None = None) -> float:
    """Model FLOPs of a run's training up to a step (None: its end),
    and of the run that it started from.

    The log has rates; the quotient of two of them is the FLOPs of a token, which is multiplied by
    the tokens of a step. Padding counts as tokens; packed blocks have little of it.

    Raises:
        UserError: for a run whose log has no FLOPs, such as that of a model which is not the core
            decoder.
    """
    log = folder / "pretraining" / "log.jsonl"
    if not log.is_file():
        raise UserError(
            f"against is compute, and {folder} has no log of its training: {log} is missing; use "
            "against: sweep, or a run with its log"
        )

    # The run that this one started from has its own FLOPs.
    config = {**load_yaml(folder / "config.yaml"), **finished_settings(folder)}
    training = config["training"]
    start = Path(training["start"]) if training.get("start") else None
    total, before = 0.0, 0
    if start:
        total = training_flops(start)
        # A run that continues another one's optimizer also continues its steps.
        if training.get("start_with") == "everything":
            before = _last_step(start)

    tokens = training["batch_tokens"] or training["batch_size"] * config["model"]["seq_len"]
    for record in read_json_lines(log, {"step": int}):
        if step is not None and record["step"] > step:
            break
        if "flops_per_second" not in record:
            raise UserError(
                f"against is compute, and {log} has no flops_per_second; use against: sweep"
            )
        # In this order of operations, as results were always computed.
        steps = record["step"] - before
        total += steps * tokens * record["flops_per_second"] / record["tokens_per_second"]
        before = record["step"]
    return total


def _last_step(folder: Path) -> int:
    return read_json_lines(folder / "pretraining" / "log.jsonl", {"step": int})[-1]["step"]
