"""What the commands that ask about images share: caption, answer, score, infill and edit.

`image` is a file, or a folder, with all images in it and below it. Each image gets a line of JSON,
printed or appended to `out`; new images are written beside the lines:

    {"image": "a/seven.png", "sha256": "9f2c...", "caption": "a seven"}
    {"image": "b/two.png", "sha256": "41d0...", "caption": "a two and a", "truncated": true}

The same command given again skips images that have their line, if the image's digest and the
settings beside the lines (`captions.settings.json`) are still the same. Images that cannot be used
are named at the end, and the exit code is then 3.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image

from cm3leon.arguments import current_name
from cm3leon.commands.words import AskingOptions, OwnDocuments
from cm3leon.config import Component, NonNegativeInt, PositiveInt, to_mapping
from cm3leon.io import read_json, read_log, sha256, write_json, write_text
from cm3leon.locks import locked
from cm3leon.paths import make_folder, naming
from cm3leon.registry import DECODERS
from cm3leon.stages.trust import Opening
from cm3leon.terminal import is_printable, printable
from cm3leon.types import Partly, UserError

if TYPE_CHECKING:
    from cm3leon.api import CM3Leon
    from cm3leon.training.distributed import Ranks

NAMED = 5
"""How many of the images that could not be used a message names."""
RESULTS = "results.jsonl"
"""File with the lines of a command that writes images, in the folder of the images."""


@dataclass(kw_only=True)
class ImageOptions(AskingOptions):
    """Options of a command that asks about images."""

    image: Path
    """An image file, or a folder; all images in it and below it are used."""
    seed: NonNegativeInt = 0
    """Seed of what is drawn, the same for each image."""

    retrieve = 0
    """Documents of the memory bank before a prompt; an option in some of the commands."""
    max_tokens = 0
    """Pieces of text that the model may write; an option in some of the commands."""


@dataclass(kw_only=True)
class TextOptions(ImageOptions):
    """Options of a command in which the model writes a text."""

    decoder: Annotated[Component, DECODERS] | None = None
    """How tokens are drawn; null = as the run's experiment says."""
    max_tokens: PositiveInt = 64
    """Pieces of text that the model may write."""


@dataclass(kw_only=True)
class LineOptions(ImageOptions):
    """Options of a command whose answers are texts or numbers."""

    out: Path | None = None
    """File for the lines, which are added to those already there; null prints them."""


Save = Callable[[Image.Image, str], str]
"""Writes an image beside the lines and returns its file's name. The text goes behind the name of
the image that was asked about: seven.png, with "_1", becomes seven.png_1.png."""
Answer = Callable[["CM3Leon", Path, Save], dict[str, Any]]
"""Asks the model about an image file; returns the command's part of the line."""


def load_model(options: AskingOptions, ranks: Ranks | None = None) -> CM3Leon:
    """Load the model of the run that the options name.

    Args:
        ranks: processes that share the images of a prompt; None = this process alone.
    """
    from cm3leon.api import CM3Leon

    model = CM3Leon.load(
        options.run,
        precision=options.precision,
        weights=options.weights,
        window=options.window,
        execution=options.execution,
        ranks=ranks,
        plugins=options.plugins,
        trust=options.trust,
        verify=options.verify,
    )
    if isinstance(options, OwnDocuments) and options.own is not None:
        return model.with_documents(options.own)
    return model


def ask(options: ImageOptions, out: Path | None, answer: Answer) -> None:
    """Ask about each image that has no line yet, and print its line or append it to `out`.

    Raises:
        UserError: if no image could be used, or `out` holds answers of other settings.
        Partly: if some images could not be used.
    """
    from tqdm import tqdm

    from cm3leon.api import TruncatedWarning

    images = _images(options.image)
    with ExitStack() as held:
        # Two commands that append to one file would lose lines of each other.
        if out is not None:
            make_folder(out.parent, "out")
            held.enter_context(
                locked(
                    out.parent,
                    f".{out.name}.lock",
                    where="out",
                    doing=f"writing to {out}",
                    instead="choose another file with out=FILE",
                )
            )
            held.enter_context(naming(out))

        model = load_model(options)
        done: set[str] = set()
        if out is not None:
            done = _done(options, out, model, images)
        left = [name for name in images if name not in done]

        # One image that cannot be used does not stop the others.
        failed: dict[str, str] = {}
        truncated, warned = 0, set[str]()
        for name in tqdm(
            left, desc="ask", unit="image", dynamic_ncols=True, disable=len(images) == 1
        ):
            try:
                found, cut = _counted(answer, model, images[name], _saver(out, name), warned)
            except (UserError, OSError) as error:
                failed[name] = str(error)
                continue
            entry = {"image": name, "sha256": sha256(images[name]), **found}
            if cut:
                truncated += 1
                entry["truncated"] = True
            _write(entry, out)

    if truncated:
        warnings.warn(
            f"{truncated} of {len(left) - len(failed)} texts were cut before their end; "
            f"raise max_tokens, which is {options.max_tokens}",
            TruncatedWarning,
            stacklevel=3,
        )
    _conclude(failed, done, images, out)


def _counted(
    answer: Answer, model: CM3Leon, image: Path, save: Save, warned: set[str]
) -> tuple[dict[str, Any], bool]:
    """The answer about an image, and whether its text was cut.

    Cut texts are counted instead of warned about one by one. Other warnings are shown once.

    Args:
        warned: messages of the warnings shown so far; new ones are added.
    """
    from cm3leon.api import TruncatedWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = answer(model, image, save)

    cut = False
    for each in caught:
        if issubclass(each.category, TruncatedWarning):
            cut = True
        elif str(each.message) not in warned:
            warned.add(str(each.message))
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return found, cut


def _images(path: Path) -> dict[str, Path]:
    """The image files at a path by their names; those of a folder by their paths in it."""
    from cm3leon.data.images import SUFFIXES

    if path.is_dir():
        found = {}
        for file in sorted(path.rglob("*")):
            hidden = file.name.startswith(".")
            if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
                found[file.relative_to(path).as_posix()] = file
        if not found:
            raise UserError(f"image: {path} holds no image files ({', '.join(sorted(SUFFIXES))})")
        return found

    if not path.is_file():
        raise UserError(f"image: {path} does not exist; give an image file, or a folder of images")
    return {path.name: path}


def _saver(out: Path | None, name: str) -> Save:
    """A function that writes images beside the lines of `out`, named after the image `name`."""

    def save(image: Image.Image, suffix: str) -> str:
        assert out is not None
        file = out.parent / f"{name}{suffix}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        return f"{name}{suffix}.png"

    return save


def _done(options: ImageOptions, out: Path, model: CM3Leon, images: Mapping[str, Path]) -> set[str]:
    """The images whose line is complete: of the same content, with all files that it names.

    Other lines are removed from the file, so that each image has one line at most.

    Raises:
        UserError: for lines that were made with other settings, or by another model.
    """
    _check_settings(options, out, model)
    kept: dict[str, dict[str, Any]] = {}
    for entry in read_log(out):
        name = str(entry.get("image"))
        whole = all((out.parent / file).is_file() for file in entry.get("files", []))
        if name in images and whole and entry.get("sha256") == sha256(images[name]):
            kept[name] = entry
    write_text(out, "".join(_line(entry) + "\n" for entry in kept.values()))
    return set(kept)


def _check_settings(options: ImageOptions, out: Path, model: CM3Leon) -> None:
    """Write down what the answers depend on, or compare it with what is written.

    Raises:
        UserError: if the lines were made with other settings, or by another model.
    """
    # Where files lie and how steps are run do not change an answer.
    settings: dict[str, Any] = {"command": type(options).__module__.rpartition(".")[2]}
    apart = {"run", "image", "out", "window", "execution"}
    apart.update(each.name for each in fields(Opening))
    for name, value in to_mapping(options).items():
        if name not in apart:
            settings[name] = value
    settings["model"] = model.run.parts_of_answers(with_bank=options.retrieve > 0)

    # Answers depend on the content of a mask, not on its name.
    if settings.get("mask") is not None:
        settings["mask"] = sha256(Path(settings["mask"]))

    file = out.with_suffix(".settings.json")
    if not out.is_file() or not file.is_file():
        if out.is_file() and out.stat().st_size:
            raise UserError(f"out: {out} was not made by this command; choose another name")
        write_json(file, settings)
        return

    # An earlier version may have written settings by names that have changed since.
    written = {current_name(name, settings): value for name, value in read_json(file).items()}
    settings = json.loads(json.dumps(settings))
    differing = sorted(name for name in settings if settings[name] != written.get(name))
    if differing:
        raise UserError(
            f"out: {out} was made with other settings ({', '.join(differing)}); choose another name"
        )


def _write(entry: dict[str, Any], out: Path | None) -> None:
    if out is None:
        print(_line(entry), flush=True)
        return
    with out.open("a", encoding="utf-8") as lines:
        lines.write(_line(entry) + "\n")


def _line(entry: Mapping[str, Any]) -> str:
    """The entry as JSON, with escapes if it holds characters that a terminal would obey."""
    line = json.dumps(entry, ensure_ascii=False)
    if is_printable(line):
        return line
    return json.dumps(entry)


def _conclude(
    failed: Mapping[str, str], done: set[str], images: Mapping[str, Path], out: Path | None
) -> None:
    """Print where the answers are, and report the images that have none.

    Raises:
        UserError: if no image could be used.
        Partly: if some could not.
    """
    if done:
        print(f"{len(done)} of {len(images)} images were done already")
    if out is not None and len(failed) < len(images):
        print(f"answers: {out}")
    if not failed:
        return

    some = [f"{printable(name)}: {why}" for name, why in list(failed.items())[:NAMED]]
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    if len(images) == 1:
        raise UserError(some[0])
    if len(failed) == len(images):
        raise UserError(f"no image could be used: {some[0]}{more}")
    raise Partly(
        f"{len(failed)} of {len(images)} images could not be used: {'; '.join(some)}{more}"
    )
