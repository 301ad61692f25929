"""Files that stages leave: their names, and how they are opened."""

from __future__ import annotations

from pathlib import Path

from cm3leon.data.shards import INDEX, PLAN
from cm3leon.records import MARKER, check_stage, read_stage
from cm3leon.types import UserError

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
TEXT_TOKENIZER, IMAGE_TOKENIZER, ENCODER = (
    f"text_tokenizer/{TOKENIZER}",
    f"image_tokenizer/{WEIGHTS}",
    f"retriever/{WEIGHTS}",
)
"""Files of a run that another one may take over."""
GEOMETRY = "geometry.json"
"""What a run keeps of a published image tokenizer beside its weights."""
SHARD_LISTS = (PLAN, INDEX)
"""Files of a stage in shards; the shards carry checksums of their own."""


def recorded_digest(stage: Path, name: str) -> str:
    """The digest of a file of a finished stage, as it is recorded."""
    files = read_stage(stage)["files"]
    if name not in files:
        raise UserError(f"{stage / MARKER} does not name {name}; run the experiment again")
    return files[name]


def opened_stage(folder: Path, *files: str, verify: bool = True, finished: bool = True) -> Path:
    """The folder of a stage whose files are about to be read, see `TokenizedRun.stage`."""
    if verify:
        check_stage(folder, files, finished=finished)
    elif finished and not (folder / MARKER).is_file():
        raise UserError(f"{folder} is not finished: its {MARKER} is missing")
    return folder
