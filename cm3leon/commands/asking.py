"""A finished run asked about images: what the commands caption, answer, score, infill and edit have in common.

`image` is a file, or a folder whose images are all asked, those below it too. Each gets a line of JSON, printed or in
`out`; new images go beside the lines. An image that has its line is not asked again by the same command, and one that
cannot be used is named at the end, which then has exit code 3. The line of a text that was cut at `max_tokens` pieces,
before its end, has `truncated`, and their number is said at the end.
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
"""Images that are named among those that could not be used."""
RESULTS = "results.jsonl"
"""Lines of a command that writes images, in their folder."""


@dataclass(kw_only=True)
class ImageOptions(AskingOptions):
    """Options of a command that asks about images."""

    image: Path
    """An image file, or a folder whose images are all asked, those below it too."""
    seed: NonNegativeInt = 0
    """Seed of what is drawn, the same for each image."""

    retrieve = 0
    """Documents of the memory bank that are put before a prompt; an option where the command has one."""
    max_tokens = 0
    """Pieces of a text that is asked for; an option where the command has one."""


@dataclass(kw_only=True)
class TextOptions(ImageOptions):
    """Options of a command that has the model write."""

    decoder: Annotated[Component, DECODERS] | None = None
    """How tokens are drawn; null = as the run's experiment says."""
    max_tokens: PositiveInt = 64
    """Pieces of a text that the model may write."""


@dataclass(kw_only=True)
class LineOptions(ImageOptions):
    """Options of a command whose answers are texts or numbers."""

    out: Path | None = None
    """File for the lines, made anew or gone on with; null prints them."""


Save = Callable[[Image.Image, str], str]
"""An image and what its file is called behind the name of the one that was asked about -> the file's name."""
Answer = Callable[["CM3Leon", Path, Save], dict[str, Any]]


def load_model(options: AskingOptions, ranks: Ranks | None = None) -> CM3Leon:
    """The model of the run that the options name, shared by the ranks if there are several."""
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
    """Asks about each image that has no line yet, and writes its line, to `out` if there is one.

    Raises:
        UserError: where no image could be used, or `out` holds other answers.
        Partly: where some could not.
    """
    from tqdm import tqdm

    from cm3leon.api import TruncatedWarning

    images = _images(options.image)
    with ExitStack() as held:
        if out is not None:
            make_folder(out.parent, "out")
            held.enter_context(locked(out.parent, f".{out.name}.lock", where="out"))
            held.enter_context(naming(out))
        model = load_model(options)
        done = set() if out is None else _done(options, out, model, images)
        failed: dict[str, str] = {}
        truncated, said = 0, set[str]()
        left = [name for name in images if name not in done]
        for name in tqdm(
            left, desc="ask", unit="image", dynamic_ncols=True, disable=len(images) == 1
        ):
            try:
                found, cut = _counted(answer, model, images[name], _saver(out, name), said)
            except (UserError, OSError) as error:
                failed[name] = str(error)
                continue
            truncated += cut
            told = {"truncated": True} if cut else {}
            _write({"image": name, "sha256": sha256(images[name]), **found, **told}, out)
    if truncated:
        warnings.warn(
            f"{truncated} of {len(left) - len(failed)} texts were cut before their end; "
            f"raise max_tokens, which is {options.max_tokens}",
            TruncatedWarning,
            stacklevel=3,
        )
    _conclude(failed, done, images, out)


def _counted(
    answer: Answer, model: CM3Leon, image: Path, save: Save, said: set[str]
) -> tuple[dict[str, Any], bool]:
    """What is answered about an image, and whether a text of it was cut.

    Args:
        said: what other warnings have said; one that is not among them passes.
    """
    from cm3leon.api import TruncatedWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = answer(model, image, save)
    cut = False
    for each in caught:
        if issubclass(each.category, TruncatedWarning):
            cut = True
        elif str(each.message) not in said:
            said.add(str(each.message))
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return found, cut


def _images(place: Path) -> dict[str, Path]:
    """The image files at a path by their names, those of a folder by their paths in it."""
    from cm3leon.data.images import SUFFIXES

    if place.is_dir():
        files = [
            file
            for file in sorted(place.rglob("*"))
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        ]
        if not files:
            raise UserError(f"image: {place} holds no image files")
        return {file.relative_to(place).as_posix(): file for file in files}
    if not place.is_file():
        raise UserError(f"image: {place} is not there; give an image file, or a folder of images")
    return {place.name: place}


def _saver(out: Path | None, name: str) -> Save:
    def save(image: Image.Image, suffix: str) -> str:
        assert out is not None
        file = out.parent / f"{name}{suffix}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        return f"{name}{suffix}.png"

    return save


def _done(options: ImageOptions, out: Path, model: CM3Leon, images: Mapping[str, Path]) -> set[str]:
    """The images that have their line, and the files that it names; other lines are taken away.

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
    """Writes down what the answers depend on, or compares with what is written."""
    file = out.with_suffix(".settings.json")
    apart = {"run", "image", "out", "window", "execution", *(each.name for each in fields(Opening))}
    settings = {
        "command": type(options).__module__.rpartition(".")[2],
        **{name: value for name, value in to_mapping(options).items() if name not in apart},
        "model": model.run.parts_of_answers(with_bank=options.retrieve > 0),
    }
    if settings.get("mask") is not None:  # whose content is what answers depend on
        settings["mask"] = sha256(Path(settings["mask"]))
    if not out.is_file() or not file.is_file():
        if out.is_file() and out.stat().st_size:
            raise UserError(f"out: {out} was not made by this command; take another name")
        write_json(file, settings)
        return
    # By today's names, also where an earlier version wrote them.
    written = {current_name(name, settings): value for name, value in read_json(file).items()}
    settings = json.loads(json.dumps(settings))
    differing = sorted(name for name in settings if settings[name] != written.get(name))
    if differing:
        raise UserError(
            f"out: {out} was made with other settings ({', '.join(differing)}); take another name"
        )


def _write(entry: dict[str, Any], out: Path | None) -> None:
    if out is None:
        print(_line(entry), flush=True)
        return
    with out.open("a", encoding="utf-8") as lines:
        lines.write(_line(entry) + "\n")


def _line(entry: Mapping[str, Any]) -> str:
    """The entry as JSON, with escapes where a terminal would obey what is in it."""
    line = json.dumps(entry, ensure_ascii=False)
    return line if is_printable(line) else json.dumps(entry)


def _conclude(
    failed: Mapping[str, str], done: set[str], images: Mapping[str, Path], out: Path | None
) -> None:
    """Says where the answers are, and which images have none."""
    if done:
        print(f"{len(done)} of {len(images)} images were done already")
    if out is not None and len(failed) < len(images):
        print(f"answers: {out}")
    if not failed:
        return
    some = [f"{printable(name)}: {why}" for name, why in list(failed.items())[:NAMED]]
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    if len(failed) == len(images):
        raise UserError(some[0] if len(images) == 1 else f"no image could be used: {some[0]}{more}")
    raise Partly(
        f"{len(failed)} of {len(images)} images could not be used: {'; '.join(some)}{more}"
    )
