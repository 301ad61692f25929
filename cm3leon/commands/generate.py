"""Draw images for a text, the best by CLIP first.

    python -m cm3leon.run generate run=runs/digits prompt="a handwritten seven" n=8 retrieve=2
    python -m cm3leon.run generate run=runs/digits prompts=prompts.txt n=8 keep=1 decoder=mixture
    torchrun --nproc-per-node 4 -m cm3leon.run generate run=runs/pretrain_7b prompt="a red dog"

(The last command shares the work among four GPUs.)

Each prompt's images are written as PNG files, the best by CLIP first, with a line in
`manifest.jsonl`. A prompt that has its line and its images is not drawn again. `settings.json`
records what the images depend on, with digests of the run's parts: a folder that was made with
other settings, or by a run that has been trained anew since, is refused.

`layout` writes the folders that benchmarks read (docs/evaluation.md):

    python -m cm3leon.run generate run=runs/7b layout=geneval prompts=evaluation_metadata.jsonl n=4
    python -m cm3leon.run generate run=runs/7b layout=dpg prompts=dpg_bench/prompts n=4

Prompts that are too long for the model are found before anything is drawn. Each gets a line that
says so (`left_out`), the others are drawn, and the exit code is 3.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cm3leon.arguments import worded_text
from cm3leon.commands.layouts import LAYOUTS, ImageLayout, TextPrompt
from cm3leon.commands.words import AskingOptions, OwnDocuments
from cm3leon.config import Component, NonNegativeInt, PositiveInt, Seed, to_mapping
from cm3leon.io import read_json, read_log, write_json, write_json_lines
from cm3leon.paths import naming, writing
from cm3leon.registry import DECODERS
from cm3leon.types import Partly, UserError

if TYPE_CHECKING:
    from cm3leon.api import CM3Leon, GeneratedImage
    from cm3leon.stages.run_folder import RunFolder
    from cm3leon.training.distributed import Ranks

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
NAMED = 3
"""The most prompts that a message names."""
AT_ONCE = 16
"""Prompts that are drawn together; a kill loses the work of these at most."""
TIMEOUT = 600
"""Seconds after which a rank that waits for the others gives up."""


@dataclass(kw_only=True)
class Options(OwnDocuments, AskingOptions):
    """Options of the command generate."""

    out: Path = Path("generated")
    """Folder for the images."""
    prompt: str | None = None
    """A text to draw."""
    prompts: Path | None = None
    """File with one text a line (UTF-8), in place of `prompt`; empty lines are left out. With
    another `layout`, the benchmark's own file or folder."""
    layout: Literal["plain", "geneval", "dpg"] = "plain"
    """How prompts are read and images are laid out: plain, or as GenEval or DPG-Bench expects, in
    the folder images/ of `out`."""
    n: PositiveInt = 8
    """Images that are drawn for a prompt."""
    keep: PositiveInt | None = None
    """How many of these are written, the best by CLIP; null = all."""
    retrieve: NonNegativeInt = 0
    """Documents of the memory bank that are put before a prompt."""
    documents: list[NonNegativeInt] | None = None
    """Rows of the memory bank that are put before a prompt, the closest last, in place of
    `retrieve`."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How image codes are drawn; null = as the run's experiment says."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, of a size that the model has tokens for; null = the run's square
    images."""
    seed: Seed = 0
    """Seed of a prompt's first image; the next images have the next seeds."""

    def check(self) -> None:
        if self.prompt is None and self.prompts is None:
            raise UserError(
                "`generate` needs a text: prompt=TEXT, for example prompt='a handwritten seven', "
                "or prompts=FILE with a text a line"
            )
        if self.prompt is not None and self.prompts is not None:
            raise UserError("prompt and prompts are both given; give one of them")
        if self.keep is not None and self.keep > self.n:
            raise UserError(f"keep is {self.keep}; it must be at most n, which is {self.n}")
        if self.layout == "plain":
            return
        if self.prompts is None:
            raise UserError(
                f"layout={self.layout} needs the prompts of its benchmark: prompts=PATH"
            )
        if self.size is not None and self.size[0] != self.size[1]:
            raise UserError(f"layout={self.layout} has square images; leave size out")
        counts = LAYOUTS[self.layout].counts
        if counts and self.kept not in counts:
            allowed = " or ".join(map(str, counts))
            raise UserError(
                f"layout={self.layout} has {allowed} images of a prompt, not {self.kept}; "
                "give n=4, or keep=4"
            )

    @property
    def kept(self) -> int:
        """Images of a prompt that are written."""
        return self.keep or self.n


def main(options: Options) -> None:
    """Draw the prompts that are not drawn yet, and print where the images are.

    With several processes, all ranks draw, and the first one writes and prints.

    Raises:
        UserError: for a mistake in the options, or a folder that holds images of other settings.
        Partly: if some prompts are too long for the model, once the others are drawn.
    """
    from tqdm import tqdm

    from cm3leon.api import shortened
    from cm3leon.commands.asking import load_model
    from cm3leon.training.distributed import current_rank, joined

    layout = LAYOUTS[options.layout]
    prompts = _prompts(options, layout)
    texts = [prompt.text for prompt in prompts]
    with joined(current_rank(), TIMEOUT) as ranks, ExitStack() as held:
        model = load_model(options, ranks if ranks.joined else None)
        if options.keep is not None and options.keep < options.n and not model.has_clip:
            raise UserError(
                f"keep is {options.keep} of n = {options.n} images, but the run has no CLIP that "
                "could choose them; leave keep out"
            )

        # Prompts without room for an image are found before the first is drawn.
        too_long = {}
        for number, reason in model.too_long(texts, size=options.size).items():
            too_long[number] = f"{prompts[number].origin} ({shortened(texts[number])}): {reason}"
        if len(too_long) == len(texts):
            raise UserError("; ".join(list(too_long.values())[:NAMED]))

        # The first rank reads what is done, and tells the others which prompts are left.
        undone = None
        if ranks.first:
            held.enter_context(writing(options.out, "out"))
            held.enter_context(naming(options.out))
            undone = _left(options, prompts, too_long, model.run)
        left = ranks.gather(undone)[0]

        shortages: Counter[str] = Counter()
        with tqdm(
            total=len(left),
            desc="generate",
            unit="prompt",
            dynamic_ncols=True,
            disable=not ranks.first,
        ) as progress:
            for start in range(0, len(left), AT_ONCE):
                numbers = left[start : start + AT_ONCE]
                shortages += _draw(
                    model, options, {number: prompts[number] for number in numbers}, ranks
                )
                progress.update(len(numbers))

        if ranks.first:
            for sentence, count in sorted(shortages.items()):
                of = "" if len(texts) == 1 else f" ({count} of {len(left)} prompts)"
                print(f"{sentence}{of}")
            side = model.run.image_tokenizer_shape.image_size
            folder = layout.folder(options.out)
            print(layout.told(folder, options.size or (side, side), options.kept))

    if too_long:
        named = "; ".join(list(too_long.values())[:NAMED])
        raise Partly(f"{len(too_long)} of {len(texts)} prompts are too long, not drawn: {named}")


def _left(
    options: Options, prompts: list[TextPrompt], too_long: Mapping[int, str], run: RunFolder
) -> list[int]:
    """Numbers of the prompts to draw; those that are too long get their line in the manifest."""
    _check_settings(options, run)
    done = _done(options.out, prompts, LAYOUTS[options.layout])
    if drawn := done - set(too_long):
        print(f"{len(drawn)} of {len(prompts)} prompts are done already")
    with (options.out / MANIFEST).open("a") as manifest:
        for number in too_long:
            if number not in done:
                entry = {"number": number, "prompt": prompts[number].text, "images": []}
                manifest.write(json.dumps({**entry, "left_out": too_long[number]}) + "\n")
    return [number for number in range(len(prompts)) if number not in {*done, *too_long}]


def _draw(
    model: CM3Leon, options: Options, prompts: Mapping[int, TextPrompt], ranks: Ranks
) -> Counter[str]:
    """Draw some prompts, by their numbers, on all ranks; the first rank writes the images.

    Returns the sentences about prompts that got fewer documents than asked for, with their number.
    """
    from cm3leon.api import found_of

    drawn = model.generate(
        [prompt.text for prompt in prompts.values()],
        n=options.n,
        retrieve=options.retrieve,
        documents=options.documents,
        decoder=options.decoder,
        seed=options.seed,
        size=options.size,
    )
    if ranks.first:
        with (options.out / MANIFEST).open("a") as manifest:
            for (number, prompt), pictures in zip(prompts.items(), drawn, strict=True):
                manifest.write(json.dumps(_write(options, number, prompt, pictures)) + "\n")
                manifest.flush()
    return Counter(
        found_of(len(best.documents), best.asked, best.shortage)
        for best, *_ in drawn
        if best.shortage
    )


def _prompts(options: Options, layout: ImageLayout) -> list[TextPrompt]:
    """The prompts to draw, in their order."""
    if options.prompts is not None:
        return layout.prompts(options.prompts)
    return [TextPrompt(worded_text(options.prompt, "prompt"), "prompt", f"{0:05d}")]


def _check_settings(options: Options, run: RunFolder) -> None:
    """Write down what the images depend on, or compare it with what is written.

    Raises:
        UserError: if the folder's images were drawn with other settings, or by another model.
    """
    file = options.out / SETTINGS
    names = (
        "n",
        "keep",
        "retrieve",
        "documents",
        "decoder",
        "seed",
        "precision",
        "weights",
        "size",
        "layout",
    )
    settings = {name: to_mapping(options)[name] for name in names}
    settings["run"] = str(options.run.resolve())
    with_bank = options.retrieve > 0 or bool(options.documents)
    settings["parts"] = run.parts_of_answers(with_bank=with_bank)

    # Where the options name no component, the one of the run's experiment counts.
    left_to_run = ["decoder"]
    if options.retrieve:
        left_to_run.append("retriever")
    for name in left_to_run:
        settings[name] = settings.get(name) or run.settings_of(name)[name]

    if not file.is_file():
        write_json(file, settings)
        return

    # Folders of before there were layouts are plain ones.
    written = {"layout": "plain", **read_json(file, {"parts?": {str: str}})}
    if not written.get("parts"):
        raise UserError(
            f"out: {file} does not say which model drew the images, as an earlier version made it; "
            "choose another folder"
        )
    parts = settings["parts"]
    other = [name for name in parts if written["parts"].get(name) != parts[name]]
    if other:
        raise UserError(
            f"out: {options.out} was drawn by another model than {options.run} holds now "
            f"({', '.join(other)} changed); choose another folder, or delete this one to draw all "
            "anew"
        )
    differing = sorted(name for name in settings if settings[name] != written.get(name))
    if differing:
        raise UserError(
            f"out: {options.out} was made with other settings ({', '.join(differing)}); "
            "choose another folder"
        )


def _done(out: Path, prompts: list[TextPrompt], layout: ImageLayout) -> set[int]:
    """Numbers of the prompts that have a whole line in the manifest, and all its files.

    Lines that a kill has cut short, and lines whose files were deleted, are removed.

    Raises:
        UserError: if the manifest has other prompts than those given.
    """
    file, folder = out / MANIFEST, layout.folder(out)
    entries = []
    for entry in read_log(file, {"number": int, "prompt": str, "images": [{"file": str}]}):
        found = prompts[entry["number"] : entry["number"] + 1]
        if [prompt.text for prompt in found] != [entry["prompt"]]:
            raise UserError(
                f"out: {file} has other prompts than those given; choose another folder"
            )
        files: set[str] = set()  # a prompt that was too long has none
        if count := len(entry["images"]):
            files = layout.files(found[0], count)
        if all((folder / name).is_file() for name in files):
            entries.append(entry)
    write_json_lines(file, entries)
    return {entry["number"] for entry in entries}


def _write(
    options: Options, number: int, prompt: TextPrompt, pictures: list[GeneratedImage]
) -> dict[str, Any]:
    """Write the images of a prompt; returns its line of the manifest."""
    layout, kept = LAYOUTS[options.layout], pictures[: options.keep]
    folder = layout.folder(options.out)
    layout.write(folder, prompt, [picture.image for picture in kept])
    images = []
    for name, picture in zip(layout.image_files(prompt, len(kept)), kept, strict=True):
        score = None if math.isnan(picture.score) else picture.score  # JSON has no NaN
        file = (folder / name).relative_to(options.out).as_posix()
        images.append({"file": file, "score": score, "seed": picture.seed})
    best = pictures[0]
    documents = [{"id": document.id, "text": document.text} for document in best.documents]
    entry = {"number": number, "prompt": prompt.text, "images": images, "documents": documents}
    if best.shortage:
        entry["shortage"] = best.shortage
    return entry
