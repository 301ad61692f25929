"""Images for prompts, from the command line.

python -m cm3leon.run generate run=runs/digits prompt="a handwritten seven" n=8 retrieve=2 out=sevens
python -m cm3leon.run generate run=runs/digits prompts=prompts.txt n=8 keep=1 decoder=mixture out=drawn
torchrun --nproc-per-node 4 -m cm3leon.run generate run=runs/pretrain_7b prompt="a red dog"      # four GPUs share it

Each prompt's images are PNG files, the best by CLIP first, and a line of `manifest.jsonl`; a prompt that has its line
and its images is not drawn again. `settings.json` says what all of them depend on, with the digests of the run's parts:
a folder that was made with other settings or by a run that has been trained anew since is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from cm3leon.api import CM3Leon, Picture
from cm3leon.config import Component, NonNegativeInt, PositiveInt, Seed, from_mapping, to_mapping
from cm3leon.decoders.steps import Way
from cm3leon.models.serving import Weights
from cm3leon.paths import naming, writing
from cm3leon.records import check_shape, read_json
from cm3leon.registry import DECODERS, discover
from cm3leon.stages.artifacts import Run
from cm3leon.stages.opening import Opening
from cm3leon.stages.pipeline import write_json
from cm3leon.training.device import Precision
from cm3leon.training.distributed import Ranks, find_place, joined
from cm3leon.types import UserError

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
AT_ONCE = 16
"""Prompts that are drawn together, and written down together."""
TIMEOUT = 600
"""Seconds after which a rank that waits for the others gives up."""


@dataclass(kw_only=True)
class GenerateOptions(Opening):
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
    seed: Seed = 0
    """Seed of a prompt's first image; the others count on from it."""
    precision: Precision = "auto"
    """Of matrix products: bf16, float32, or auto = bf16 where the processor computes in it."""
    weights: Weights | None = None
    """What the decoder's matrices are kept in: float32, bf16, int8, fp8; null = as the precision."""
    window: PositiveInt | None = None
    """Image codes that a step computes, the next one and drafts behind it; null = 4 for a single image, 1 for more."""
    way: Way = "eager"
    """How steps are run: eager, compiled, and on CUDA graph or compiled graph."""

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
    with joined(find_place(), TIMEOUT) as ranks, ExitStack() as held:
        model = CM3Leon.load(
            options.run,
            precision=options.precision,
            weights=options.weights,
            window=options.window,
            way=options.way,
            ranks=ranks if ranks.joined else None,
            plugins=options.plugins,
            trust=options.trust,
            verify=options.verify,
        )
        if ranks.first:
            held.enter_context(writing(options.out, "out"))
            held.enter_context(naming(options.out))
        left = ranks.gather(_left(options, texts, model.run) if ranks.first else None)[0]
        with tqdm(
            total=len(left),
            desc="generate",
            unit="prompt",
            dynamic_ncols=True,
            disable=not ranks.first,
        ) as progress:
            for start in range(0, len(left), AT_ONCE):
                _draw(
                    model,
                    options,
                    {number: texts[number] for number in left[start : start + AT_ONCE]},
                    ranks,
                )
                progress.update(len(left[start : start + AT_ONCE]))
        if ranks.first:
            print(f"images: {options.out}")


def _left(options: GenerateOptions, texts: list[str], run: Run) -> list[int]:
    """Numbers of the prompts that are not drawn yet."""
    _check_settings(options, run)
    done = _done(options.out, texts)
    if done:
        print(f"{len(done)} of {len(texts)} prompts are done already")
    return [number for number in range(len(texts)) if number not in done]


def _draw(model: CM3Leon, options: GenerateOptions, texts: Mapping[int, str], ranks: Ranks) -> None:
    """Draws some prompts, by their numbers: all ranks do, the first writes them down."""
    drawn = model.generate(
        list(texts.values()),
        n=options.n,
        retrieve=options.retrieve,
        decoder=options.decoder,
        seed=options.seed,
    )
    if ranks.first:
        with (options.out / MANIFEST).open("a") as manifest:
            for (number, text), pictures in zip(texts.items(), drawn, strict=True):
                manifest.write(json.dumps(_write(options, number, text, pictures)) + "\n")
                manifest.flush()


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


def _check_settings(options: GenerateOptions, run: Run) -> None:
    """Writes down what images depend on, or compares with what is written."""
    file = options.out / SETTINGS
    names = ("n", "keep", "retrieve", "decoder", "seed", "precision", "weights")
    settings = {name: to_mapping(options)[name] for name in names}
    settings["run"] = str(options.run.resolve())
    settings["parts"] = run.parts_of_answers(with_bank=options.retrieve > 0)
    # What the options leave to the run is what its experiment says today.
    for name in ("decoder", "retriever") if options.retrieve else ("decoder",):
        settings[name] = settings.get(name) or run.section(name)[name]
    if not file.is_file():
        write_json(file, settings)
        return
    written = read_json(file, {"parts?": {str: str}})
    if not written.get("parts"):
        raise UserError(
            f"out: {file} does not say which model drew the images; an earlier version made it, take another folder"
        )
    other = [
        name for name in settings["parts"] if written["parts"].get(name) != settings["parts"][name]
    ]
    if other:
        raise UserError(
            f"out: {options.out} was drawn by another model than {options.run} holds now ({', '.join(other)} "
            "changed); take another folder, or delete this one to draw all anew"
        )
    differing = sorted(name for name in settings if settings[name] != written.get(name))
    if differing:
        raise UserError(
            f"out: {options.out} was made with other settings ({', '.join(differing)}); take another folder"
        )


def _done(out: Path, texts: list[str]) -> set[int]:
    """Numbers of the prompts that have a whole line and all its images.

    What a kill has cut short, and lines whose images were deleted, are taken away.
    """
    file = out / MANIFEST
    entries = []
    for number, line in enumerate(_lines(file), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        check_shape(
            entry,
            {"number": int, "prompt": str, "images": [{"file": str}]},
            f"{file}: line {number}",
        )
        if texts[entry["number"] : entry["number"] + 1] != [entry["prompt"]]:
            raise UserError(f"{file} has other prompts than those given; take another folder")
        if all((out / Path(image["file"]).name).is_file() for image in entry["images"]):
            entries.append(entry)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    partial.replace(file)
    return {entry["number"] for entry in entries}


def _lines(file: Path) -> list[str]:
    """The lines of the manifest; a kill may have cut the last one inside a character."""
    return file.read_text(errors="replace").split("\n") if file.is_file() else []


def _write(
    options: GenerateOptions, number: int, text: str, pictures: list[Picture]
) -> dict[str, Any]:
    """Writes the images of a prompt; returns its line of the manifest."""
    images = []
    for place, picture in enumerate(pictures[: options.keep]):
        name = f"{number:05d}_{place}.png"
        picture.image.save(options.out / name)
        images.append({"file": name, "score": picture.score, "seed": picture.seed})
    documents = [{"id": document.id, "text": document.text} for document in pictures[0].documents]
    return {"number": number, "prompt": text, "images": images, "documents": documents}
