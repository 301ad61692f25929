"""Files of stages: their names, and how they are opened."""

from __future__ import annotations

from pathlib import Path

from cm3leon.data.shards import INDEX, PLAN
from cm3leon.records import MARKER, check_stage, read_stage
from cm3leon.types import UserError

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"

# Files of a run that another run may reuse.
TEXT_TOKENIZER = f"text_tokenizer/{TOKENIZER}"
IMAGE_TOKENIZER = f"image_tokenizer/{WEIGHTS}"
ENCODER = f"retriever/{WEIGHTS}"
GEOMETRY = "geometry.json"
"""What a run keeps of a published image tokenizer besides its weights."""
SHARD_LISTS = (PLAN, INDEX)
"""Files of a stage in shards, whose shards have checksums of their own."""


def recorded_digest(stage: Path, name: str) -> str:
    """The recorded digest of a file of a finished stage."""
    files = read_stage(stage)["files"]
    if name not in files:
        raise UserError(
            f"{stage / MARKER} does not name {name}; run the experiment again, which makes the "
            "stage anew"
        )
    return files[name]


def opened_stage(folder: Path, *files: str, verify: bool = True, finished: bool = True) -> Path:
    """The folder of a stage whose files are about to be read, see `TokenizedRun.stage`."""
    if verify:
        check_stage(folder, files, finished=finished)
    elif finished and not (folder / MARKER).is_file():
        raise UserError(
            f"{folder} is not finished: its {MARKER} is missing; run the experiment again, which "
            "finishes it"
        )
    return folder
