"""Load the model behind `CM3Leon.load`: a run folder, an exported folder, or a model on the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cm3leon.hub.folder import is_hub_folder, open_hub_folder
from cm3leon.hub.repository import model_folder
from cm3leon.models.base import Model
from cm3leon.models.pretrained import load_model
from cm3leon.records import MARKER
from cm3leon.stages.opening import open_run
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.trust import Opening
from cm3leon.types import UserError


def opened_model(
    given: str | Path,
    opening: Opening,
    device: torch.device,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    bank: Path | None = None,
    checkpoint: int | None = None,
) -> tuple[RunFolder, Model]:
    """Open a finished run, and load its model on the CPU with its weights as the file has them.

    `AskedRun.load` explains the arguments.

    Raises:
        UserError: for a folder that is not a finished run, and for arguments that a folder of its
            kind does not take.
    """
    folder = model_folder(given, revision=revision)

    # An exported model: it has neither a memory bank nor checkpoints, but takes an adapter.
    if is_hub_folder(folder):
        for name, value in {"bank": bank, "checkpoint": checkpoint}.items():
            if value is not None:
                raise UserError(
                    f"{name} is given, but the exported model {given} has no memory bank and no "
                    "checkpoints; leave it out"
                )
        lora = None if adapter is None else model_folder(adapter, where="adapter")
        exported = open_hub_folder(folder, device, adapter=lora)
        assert exported.hub is not None
        return exported, exported.hub.build()

    if adapter is not None:
        raise UserError(
            f"adapter is given, which is for an exported model, but {given} is a run, in which an "
            "adapter of its own would be merged already; leave it out"
        )

    # A run folder, with its own memory bank or that of another run.
    opened = open_run(folder, opening, needs=("pretraining",), device=device)
    if bank is not None:
        if not (bank / "index" / MARKER).is_file():
            raise UserError(
                f"bank: {bank} has no finished index; a memory bank is a run made with until=index"
            )
        shards = replace(opened.experiment.shards, bank=bank)
        opened = replace(opened, experiment=replace(opened.experiment, shards=shards))

    model = load_model(opened.folder, verify=opening.verify)
    if checkpoint is not None:
        # What trains takes more than a second to import, and only checkpoints need it.
        from cm3leon.stages.pretraining import load_checkpoint

        training = opened.experiment.training
        load_checkpoint(model, training, opened.folder, checkpoint, verify=opening.verify)
    return opened, model
