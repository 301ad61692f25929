"""A finished run asked about images from the command line: captions, answers, scores, infilling and edits.

python -m cm3leon.run caption run=runs/digits image=seven.png
python -m cm3leon.run caption run=runs/digits image=photos out=captions.jsonl
python -m cm3leon.run answer run=runs/scenes/tuned image=scene.png question="How many things are there?"
python -m cm3leon.run score run=runs/digits image=seven.png texts='[a seven, a two]'
python -m cm3leon.run infill run=runs/digits image=seven.png text="a handwritten seven" box='[0,16,32,32]' out=filled
python -m cm3leon.run edit run=runs/scenes/tuned image=scene.png instruction="Make the circle blue." out=edited

`image` is a file, or a folder whose images are all asked, those below it too. Each gets a line of JSON, printed or in
`out`; new images go beside the lines. An image that has its line is not asked again by the same command, and one that
cannot be used is named at the end, which then has exit code 3. The line of a text that was cut at `most` pieces, before
its end, has `truncated`, and their number is said at the end.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from PIL import Image
from tqdm import tqdm

from cm3leon.api import CM3Leon, TruncatedWarning
from cm3leon.config import Component, NonNegativeInt, PositiveInt, from_mapping, to_mapping
from cm3leon.data.images import SUFFIXES
from cm3leon.io import read_json, sha256, write_json, write_text
from cm3leon.locks import locked
from cm3leon.paths import make_folder, naming
from cm3leon.registry import DECODERS, discover
from cm3leon.stages.trust import Opening
from cm3leon.terminal import is_printable, printable
from cm3leon.types import Execution, Partly, Precision, UserError, Weights

NAMED = 5
"""Images that are named among those that could not be used."""
RESULTS = "results.jsonl"
"""Lines of a command that writes images, in their folder."""


@dataclass(kw_only=True)
class AskOptions(Opening):
    """What the commands have in common."""

    run: Path
    """Run folder with a finished pretraining."""
    image: Path
    """An image file, or a folder whose images are all asked, those below it too."""
    seed: NonNegativeInt = 0
    """Seed of what is drawn, the same for each image."""
    precision: Precision = "auto"
    """Of matrix products: bf16, float32, or auto = bf16 where the processor computes in it."""
    weights: Weights | None = None
    """What the decoder's matrices are kept in: float32, bf16, int8, fp8; null = as the precision."""
    window: PositiveInt | None = None
    """Image codes that a step computes, the next one and drafts behind it; null = 4 for a single image, 1 for more."""
    way: Execution = "eager"
    """How steps are run: eager, compiled, and on CUDA graph or compiled graph."""

    retrieve = 0
    """Documents of the memory bank that are put before a prompt; an option where the command has one."""
    most = 0
    """Pieces of a text that is asked for; an option where the command has one."""


@dataclass(kw_only=True)
class LineOptions(AskOptions):
    """What the commands have in common whose answers are texts or numbers."""

    out: Path | None = None
    """File for the lines, made anew or gone on with; null prints them."""


@dataclass(kw_only=True)
class CaptionOptions(LineOptions):
    """Options of the command caption."""

    retrieve: NonNegativeInt = 0
    """Documents of the memory bank that are put before a prompt."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How tokens are drawn; null = as the run's experiment says."""
    most: PositiveInt = 64
    """Pieces of a text that a caption may have."""


@dataclass(kw_only=True)
class AnswerOptions(LineOptions):
    """Options of the command answer."""

    question: str
    """What is asked about each image."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How tokens are drawn; null = as the run's experiment says."""
    most: PositiveInt = 64
    """Pieces of a text that an answer may have."""


@dataclass(kw_only=True)
class ScoreOptions(LineOptions):
    """Options of the command score; the scores are log-likelihoods in nats."""

    texts: list[str] = field(default_factory=list)
    """Texts that are scored for each image: captions, or answers to `question`."""
    text: str | None = None
    """A text that each image is scored for, in place of `texts`."""
    question: str | None = None
    """Question about the image that `texts` answer; null = they are captions."""

    def check(self) -> None:
        if bool(self.texts) == (self.text is not None):
            which = "both given" if self.texts else "both missing"
            raise UserError(f"text and texts are {which}; give one of them")
        if self.question is not None and not self.texts:
            raise UserError("question is given without texts; give the answers that are scored")


@dataclass(kw_only=True)
class InfillOptions(AskOptions):
    """Options of the command infill."""

    out: Path = Path("infilled")
    """Folder for the images and the lines."""
    text: str = ""
    """The text that belongs to the image."""
    box: tuple[int, int, int, int] | None = None
    """Part of the image that is made anew: left, top, right, bottom in its pixels."""
    words: tuple[int, int] | None = None
    """Part of the text that is made anew: its characters from the first number to before the second."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How tokens are drawn; null = as the run's experiment says."""
    most: PositiveInt = 64
    """Pieces of a text that the new words may have."""

    def check(self) -> None:
        if self.box is None and self.words is None:
            raise UserError("box and words are both missing; give what is to be made anew")


@dataclass(kw_only=True)
class EditOptions(AskOptions):
    """Options of the command edit."""

    out: Path = Path("edited")
    """Folder for the images and the lines."""
    instruction: str
    """What is to be changed in each image."""
    n: PositiveInt = 1
    """Images that are drawn for each, the best by CLIP first."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How codes are drawn; null = the decoder edit."""


O = TypeVar("O", bound=AskOptions)  # noqa: E741
Save = Callable[[Image.Image, str], str]
"""An image and what its file is called behind the name of the one that was asked about -> the file's name."""
Answer = Callable[[CM3Leon, Path, Save], dict[str, Any]]


def caption(mapping: Mapping[str, Any]) -> None:
    """Writes a text for each image.

    Raises, as the other commands do:
        UserError: for a mistake in the options, or where no image could be used.
        Partly: where some could not.
    """
    options = _options(CaptionOptions, mapping)

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        said = model.caption(
            image,
            retrieve=options.retrieve,
            decoder=options.decoder,
            seed=options.seed,
            most=options.most,
        )
        return {"caption": said}

    _ask(options, options.out, answer)


def answer(mapping: Mapping[str, Any]) -> None:
    """Answers a question about each image."""
    options = _options(AnswerOptions, mapping)

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        said = model.answer(
            image, options.question, decoder=options.decoder, seed=options.seed, most=options.most
        )
        return {"question": options.question, "answer": said}

    _ask(options, options.out, answer)


def score(mapping: Mapping[str, Any]) -> None:
    """Scores texts for each image, or each image for a text."""
    options = _options(ScoreOptions, mapping)

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        if options.text is not None:
            (found,) = model.score(images=[image], text=options.text)
            return {"text": options.text, "score": found}
        scores = model.score(texts=options.texts, image=image, question=options.question)
        return {"scores": dict(zip(options.texts, scores, strict=True))}

    _ask(options, options.out, answer)


def infill(mapping: Mapping[str, Any]) -> None:
    """Makes a part of each image, or of its text, anew."""
    options = _options(InfillOptions, mapping)

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        filled = model.infill(
            image,
            options.text,
            box=options.box,
            words=options.words,
            decoder=options.decoder,
            seed=options.seed,
            most=options.most,
        )
        return {"files": [save(filled.image, "")], "text": filled.text}

    _ask(options, options.out / RESULTS, answer)


def edit(mapping: Mapping[str, Any]) -> None:
    """Changes each image as an instruction says."""
    options = _options(EditOptions, mapping)

    def answer(model: CM3Leon, image: Path, save: Save) -> dict[str, Any]:
        decoder = options.decoder or "edit"
        drawn = model.edit(
            image, options.instruction, n=options.n, decoder=decoder, seed=options.seed
        )
        names = [
            save(each.image, f"_{number}" if number else "") for number, each in enumerate(drawn)
        ]
        return {"instruction": options.instruction, "files": names}

    _ask(options, options.out / RESULTS, answer)


# ------------------------------------------------------------------------------------------------ parts


def _options(cls: type[O], mapping: Mapping[str, Any]) -> O:
    """The options of a command, whose decoder may be that of a plugin named with it."""
    named = {"plugins": mapping["plugins"]} if "plugins" in mapping else {}
    discover(from_mapping(Opening, named).plugins)
    return from_mapping(cls, mapping)


def _ask(options: AskOptions, out: Path | None, answer: Answer) -> None:
    """Asks about each image that has no line yet, and writes its line, to `out` if there is one."""
    images = _images(options.image)
    with ExitStack() as held:
        if out is not None:
            make_folder(out.parent, "out")
            held.enter_context(locked(out.parent, f".{out.name}.lock", where="out"))
            held.enter_context(naming(out))
        model = CM3Leon.load(
            options.run,
            precision=options.precision,
            weights=options.weights,
            window=options.window,
            way=options.way,
            plugins=options.plugins,
            trust=options.trust,
            verify=options.verify,
        )
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
            f"raise most, which is {options.most}",
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


def _done(options: AskOptions, out: Path, model: CM3Leon, images: Mapping[str, Path]) -> set[str]:
    """The images that have their line, and the files that it names; other lines are taken away.

    Raises:
        UserError: for lines that were made with other settings, or by another model.
    """
    _check_settings(options, out, model)
    kept: dict[str, dict[str, Any]] = {}
    for entry in _lines(out):
        name = str(entry.get("image"))
        whole = all((out.parent / file).is_file() for file in entry.get("files", []))
        if name in images and whole and entry.get("sha256") == sha256(images[name]):
            kept[name] = entry
    write_text(out, "".join(_line(entry) + "\n" for entry in kept.values()))
    return set(kept)


def _check_settings(options: AskOptions, out: Path, model: CM3Leon) -> None:
    """Writes down what the answers depend on, or compares with what is written."""
    file = out.with_suffix(".settings.json")
    apart = {"run", "image", "out", "window", "way", *(each.name for each in fields(Opening))}
    settings = {
        "command": type(options).__name__.removesuffix("Options").lower(),
        **{name: value for name, value in to_mapping(options).items() if name not in apart},
        "model": model.run.parts_of_answers(with_bank=options.retrieve > 0),
    }
    if not out.is_file() or not file.is_file():
        if out.is_file() and out.stat().st_size:
            raise UserError(f"out: {out} was not made by this command; take another name")
        write_json(file, settings)
        return
    written = read_json(file)
    settings = json.loads(json.dumps(settings))
    differing = sorted(name for name in settings if settings[name] != written.get(name))
    if differing:
        raise UserError(
            f"out: {out} was made with other settings ({', '.join(differing)}); take another name"
        )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; one that a kill cut short is left out."""
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            yield entry


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
