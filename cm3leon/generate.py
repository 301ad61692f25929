"""Images for prompts, from the command line.

python -m cm3leon.run generate run=runs/digits prompt="a handwritten seven" n=8 retrieve=2 out=sevens
python -m cm3leon.run generate run=runs/digits prompts=prompts.txt n=8 keep=1 decoder=mixture out=drawn

Each prompt's images are PNG files, the best by CLIP first, and a line of `manifest.jsonl`; a prompt that has its line
is not drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from cm3leon.api import CM3Leon, Picture
from cm3leon.config import Component, NonNegativeInt, PositiveInt, from_mapping, to_mapping
from cm3leon.registry import DECODERS, discover
from cm3leon.training.device import Precision
from cm3leon.types import UserError

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
AT_ONCE = 16
"""Prompts that are drawn together, and written down together."""


@dataclass(kw_only=True)
class GenerateOptions:
    """Options of the command generate."""

    run: Path
    """Run folder with a finished pretraining."""
    out: Path = Path("generated")
    """Folder for the images."""
    prompt: str | None = None
    """A text to draw."""
    prompts: Path | None = None
    """File with a text a line, in place of `prompt`; empty lines are left out."""
    n: PositiveInt = 8
    """Images that are drawn for a prompt."""
    keep: PositiveInt | None = None
    """Of those, the best by CLIP that are written; null = all."""
    retrieve: NonNegativeInt = 0
    """Documents of the memory bank that are put before a prompt."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How codes are drawn; null = as the run's experiment says."""
    seed: NonNegativeInt = 0
    """Seed of a prompt's first image; the others count on from it."""
    precision: Precision = "auto"
    """Of matrix products: bf16, float32, or auto = bf16 where the processor computes in it."""

    def check(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            which = "both missing" if self.prompt is None else "both given"
            raise UserError(f"prompt and prompts are {which}; give one of them")
        if self.keep is not None and self.keep > self.n:
            raise UserError(f"keep is {self.keep}, of n = {self.n} images")


def main(mapping: Mapping[str, Any]) -> None:
    """Draws the prompts that are not drawn yet, and says where the images are.

    Raises:
        UserError: for a mistake in the options, or a folder that holds images of other settings.
    """
    discover()
    options = from_mapping(GenerateOptions, mapping)
    texts = _texts(options)
    model = CM3Leon.load(options.run, precision=options.precision)
    options.out.mkdir(parents=True, exist_ok=True)
    _check_settings(options)
    done = _done(options.out / MANIFEST, texts)
    if done:
        print(f"{len(done)} of {len(texts)} prompts are done already")
    left = [number for number in range(len(texts)) if number not in done]
    with (
        (options.out / MANIFEST).open("a") as manifest,
        tqdm(total=len(left), desc="generate", unit="prompt", dynamic_ncols=True) as progress,
    ):
        for start in range(0, len(left), AT_ONCE):
            numbers = left[start : start + AT_ONCE]
            drawn = model.generate(
                [texts[number] for number in numbers],
                n=options.n,
                retrieve=options.retrieve,
                decoder=options.decoder,
                seed=options.seed,
            )
            for number, pictures in zip(numbers, drawn, strict=True):
                entry = _write(options, number, texts[number], pictures)
                manifest.write(json.dumps(entry) + "\n")
                manifest.flush()
                progress.update()
    print(f"images: {options.out}")


def _texts(options: GenerateOptions) -> list[str]:
    if options.prompts is None:
        return [options.prompt or ""]
    try:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {options.prompts} cannot be read: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"prompts: {options.prompts} has no line with a text")
    return texts


def _check_settings(options: GenerateOptions) -> None:
    """Writes down what images depend on, or compares with what is written."""
    file = options.out / SETTINGS
    settings = {name: to_mapping(options)[name] for name in ("n", "keep", "retrieve", "decoder", "seed", "precision")}
    settings["run"] = str(options.run.expanduser().resolve())
    if not file.is_file():
        file.write_text(json.dumps(settings, indent=2))
        return
    written = json.loads(file.read_text())
    differing = sorted(name for name in settings if settings[name] != written.get(name))
    if differing:
        raise UserError(
            f"out: {options.out} was made with other settings ({', '.join(differing)}); take another folder"
        )


def _done(file: Path, texts: list[str]) -> set[int]:
    """Numbers of the prompts that have a whole line; what a kill cut short is taken away."""
    entries = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    for entry in entries:
        if entry["number"] >= len(texts) or texts[entry["number"]] != entry["prompt"]:
            raise UserError(f"{file} has other prompts than those given; take another folder")
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return {entry["number"] for entry in entries}


def _write(options: GenerateOptions, number: int, text: str, pictures: list[Picture]) -> dict[str, Any]:
    """Writes the images of a prompt; returns its line of the manifest."""
    images = []
    for place, picture in enumerate(pictures[: options.keep]):
        name = f"{number:05d}_{place}.png"
        picture.image.save(options.out / name)
        images.append({"file": name, "score": picture.score, "seed": picture.seed})
    documents = [{"id": document.id, "text": document.text} for document in pictures[0].documents]
    return {"number": number, "prompt": text, "images": images, "documents": documents}
