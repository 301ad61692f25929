"""Public weights, or what `export to=hf` wrote, as a run folder, which everything that takes a run
then takes.

The folder holds three finished stages: the text tokenizer, renumbered into this project's order of
ids, the image tokenizer, and the decoder, whose tables have their rows in that order. `import.json`
says what they were made of, and `origin.json` beside the decoder whose weights they are, which runs
that start from it keep.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cm3leon.config import to_mapping
from cm3leon.digests import files_digest
from cm3leon.experiment import Experiment
from cm3leon.hub.folder import (
    EXTRAS,
    IMAGE_ENCODER,
    TABLES,
    ExportedRun,
    asked_experiment,
    in_order,
    open_hub_folder,
)
from cm3leon.hub.folder import IMAGE_TOKENIZER as EXPORTED_IMAGE_TOKENIZER
from cm3leon.io import digest_of, read_json, write_json
from cm3leon.models.chameleon import CHAMELEON
from cm3leon.models.emu3 import EMU3
from cm3leon.models.form import Form
from cm3leon.models.llama import Llama
from cm3leon.registry import MODELS
from cm3leon.stages.files import (
    GEOMETRY,
    IMAGE_TOKENIZER,
    TEXT_TOKENIZER,
    TOKENIZER,
    WEIGHTS,
    recorded_digest,
)
from cm3leon.stages.folders import make_result
from cm3leon.stages.origin import Origin
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.running import write_config
from cm3leon.stages.stage import StageRecord
from cm3leon.stages.table import stages_of
from cm3leon.terminal import printable
from cm3leon.tokenizers.families import FAMILIES, Family, PublishedVocab, renumbered
from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.tokenizers.image.published_files import Weights, open_weights
from cm3leon.tokenizers.layout import LayoutTable
from cm3leon.tokenizers.text import LAYOUT, PUBLISHED, TextTokenizer
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError
from cm3leon.weights import ADAPTERS, check_finite, check_fit, save_weights

IMPORT = "import.json"
"""What a run folder was imported from, and under which licence."""
READ = {form.model_type: form for form in (CHAMELEON, EMU3)}
"""Forms that public weights come in, by `model_type` of config.json."""

Makers = Mapping[str, Callable[[RunFolder, Path], None]]
"""What writes each of the stages."""


@dataclass(frozen=True)
class Published:
    """A Hugging Face folder of a family's decoder."""

    folder: Path
    name: str
    """Of the family."""

    @property
    def family(self) -> Family:
        """Whose weights they are."""
        return FAMILIES[self.name]

    @cached_property
    def weights(self) -> Weights:
        """Its tensors by their present names, which are read when they are asked for."""
        weights = open_weights(self.folder)
        tensors = {}
        for name, stored in weights.tensors.items():
            tensors[self._form_of(weights).present(name)] = stored
        return replace(weights, tensors=tensors)

    @property
    def form(self) -> Form:
        """The class of its model. Raises UserError for one that no decoder of ours is."""
        return self._form_of(self.weights)

    def _form_of(self, weights: Weights) -> Form:
        given = weights.settings.get("model_type")
        if given not in READ:
            names = " or ".join(map(json.dumps, READ))
            raise UserError(
                f"hf: {self.folder / 'config.json'}: model_type is {json.dumps(given)}; it must be "
                f"{names}"
            )
        return READ[given]

    @cached_property
    def vocab(self) -> PublishedVocab:
        """Its vocabulary in our order. Raises UserError
        for a tokenizer.json that is not of the family."""
        file = self.folder / TOKENIZER
        if not file.is_file():
            raise UserError(f"hf: {file} does not exist; give the whole folder as it was published")
        return renumbered(read_json(file), self.family, f"hf: {file}")

    @cached_property
    def model(self) -> dict[str, Any]:
        """The section `model` of the decoder. Raises UserError for one of another shape."""
        file = self.folder / "config.json"
        try:
            fields = self.form.read_config(self.weights.settings)
        except UserError as error:
            raise UserError(f"hf: {file}: {error}") from error
        return to_mapping(MODELS.check({"name": "llama", **fields}, f"hf: {file}"))


def import_run(
    family: str,
    hf: Path,
    image_tokenizer: Path | None,
    image_size: int | None,
    out: Path,
    base_model: str | None = None,
) -> None:
    """Makes a run folder of a Hugging Face folder and the file of the image tokenizer.

    Memory is what the weights take, in the precision that they are published in.

    Args:
        image_tokenizer: None = the folder holds it.
        image_size: of the images in pixels; None = the family's.
        base_model: the name on the Hub of the published model; None = that of the family's model of
            this shape, where there is one alone.

    Raises:
        UserError: for what is missing, or of another shape or family, before anything is written.
    """
    published = Published(hf, family)
    vocab = published.vocab

    # Everything is compared by names and sizes before anything is written.
    tokenizer = {
        "name": "emu3" if published.family.whole else "pretrained",
        "path": str((image_tokenizer or hf).absolute()),
        "image_size": image_size or published.family.image_size,
    }
    experiment = _experiment(published, tokenizer)
    run = RunFolder(experiment, out, torch.device("cpu"))
    _check(published, run, image_tokenizer)
    ours = Vocab(vocab.text_size, vocab.image_size, vocab.sentinels)
    origin = Origin(
        licence=published.family.licence,
        base_model=base_model or published.family.models.get(published.model["layers"]),
    )

    makers: Makers = {
        "text_tokenizer": lambda run, folder: _make_text_tokenizer(run, folder, published),
        "image_tokenizer": lambda run, folder: _write_image_tokenizer(
            run, run.new_image_tokenizer(), folder
        ),
        "pretraining": lambda run, folder: _make_decoder(folder, published, ours, origin),
    }

    # The records say from which files the run was made.
    files = [*published.weights.files, hf / TOKENIZER]
    if image_tokenizer is not None:
        files.append(image_tokenizer)
    source = digest_of(family + files_digest(files, [file.name for file in files]))
    said = {
        "family": family,
        "licence": published.family.licence,
        "conditions": published.family.conditions,
        "base_model": origin.base_model,
        "ids": vocab.old_id_V.tolist(),
    }
    _write_run(run, makers, source, said)


def import_export(hf: Path, out: Path, name: str | None = None) -> None:
    """Prints the licence, and makes a run folder of a folder that `export to=hf` wrote, with the
    weights and tokenizers that are in it.

    Args:
        name: of the model on the Hub; None = it is a folder, and its origin is that of the exported
            run.

    Raises:
        UserError: for a folder that no export wrote, or one that lacks something or is damaged.
    """
    exported = open_hub_folder(hf, torch.device("cpu"), where="hf")
    hub = exported.hub
    assert hub is not None
    run = RunFolder(exported.experiment, out, torch.device("cpu"))

    # Weights that were trained further keep the licence and the origin of the first ones.
    kept = Origin.from_mapping(hub.extras.get("origin") or {})
    family = None if hub.vocab is None else FAMILIES[hub.extras["family"]]
    licence = kept.licence
    if licence is None and family is not None:
        licence = family.licence
    origin = Origin(licence, name or kept.base_model)
    print(f"licence: {printable(_terms(origin.licence, family))}")

    def make_decoder(_: RunFolder, folder: Path) -> None:
        save_weights(folder / WEIGHTS, dict(hub.state()))
        made = {"model": to_mapping(hub.model), "vocab_size": hub.vocab_size}
        write_json(folder / "config.json", made)
        origin.save(folder)

    makers: Makers = {
        "text_tokenizer": lambda _, folder: _copy_text_tokenizer(exported, folder),
        "image_tokenizer": lambda _, folder: _write_image_tokenizer(
            exported, exported.image_tokenizer, folder
        ),
        "pretraining": make_decoder,
    }
    files = _read_of_export(hf, hub.weights.files)
    names = [file.relative_to(hf).as_posix() for file in files]
    source = digest_of("export" + files_digest(files, names))
    said = {
        "licence": origin.licence,
        "conditions": None if family is None else family.conditions,
        "base_model": origin.base_model,
    }
    _write_run(run, makers, source, {key: value for key, value in said.items() if value})


def _terms(licence: str | None, family: Family | None) -> str:
    """What an export says of its licence, and what that of its family asks and forbids."""
    if family is None:
        return licence or "unknown; ask whoever made the weights"
    asked = f"{family.licence}; {family.conditions}"
    if licence == family.licence:
        return asked
    return f"{licence}; made from weights of {family.title}: {asked}"


def _read_of_export(hf: Path, weights: Sequence[Path]) -> list[Path]:
    """The files of an exported folder that a run is made of: all but the card and its images."""
    wanted = [hf / name for name in (EXTRAS, TOKENIZER, LAYOUT, *ADAPTERS)]
    wanted += sorted((hf / EXPORTED_IMAGE_TOKENIZER).rglob("*"))
    return [*weights, *(file for file in wanted if file.is_file())]


def _write_run(run: RunFolder, makers: Makers, source: str, said: Mapping[str, Any]) -> None:
    """Write the stages, one after the other, and what they were made of.

    Args:
        source: a digest of the files that they are made of.
        said: of where the weights are from.
    """
    write_config(run.experiment, run.folder)
    for number, (name, make) in enumerate(makers.items(), 1):
        print(f"[{number}/{len(makers)}] {name}", flush=True)
        _finish(run, name, make, source)
    write_json(run.folder / IMPORT, {**said, "weights": source})


def _check(published: Published, run: RunFolder, image_tokenizer: Path | None) -> None:
    """Raises UserError for what is missing, left over, or of another shape,
    by names and sizes alone."""
    vocab, hf = published.vocab, published.folder
    codes = run.image_tokenizer_shape.codebook_size
    if codes != vocab.image_size:
        where = "vqgan" if image_tokenizer else "hf"
        raise UserError(
            f"{where}: {image_tokenizer or hf} has {codes} codes, but the vocabulary of {hf} has "
            f"{vocab.image_size}; give the image tokenizer that these weights were trained with"
        )
    layout = LayoutTable.from_names(vocab.table, f"hf: {hf / TOKENIZER}").layout
    if layout.sizes and run.grid not in layout.sizes:
        raise UserError(
            f"image_size: images of {run.grid[0]} x {run.grid[1]} codes have no tokens of their "
            f"size in {published.family.title}; choose another image_size"
        )

    # Tables have a row for each published id, and may have more.
    given = published.weights.tensors
    rows, ours = len(vocab.old_id_V), Vocab(vocab.text_size, vocab.image_size, vocab.sentinels)
    table = given.get(published.form.outer["embedding.weight"])
    size = table.shape[0] if table else rows
    if not rows <= size <= ours.size:
        raise UserError(
            f"hf: the tables in {hf} have {size} rows; for the {rows} tokens of its tokenizer.json "
            f"it must be from {rows} to {ours.size}"
        )

    # The decoder's own tensors by name and shape; some files hold the image tokenizer's too.
    section = MODELS.check(published.model, "model")
    with torch.device("meta"):
        model = MODELS.build(section, vocab_size=size)
    assert isinstance(model, Llama)
    wanted = dict(published.form.to_state(model.state_dict(), model.config))
    decoder = {}
    for name, stored in given.items():
        if not name.startswith(IMAGE_ENCODER):
            decoder[name] = torch.empty(stored.shape, device="meta")
    try:
        check_fit(hf, decoder, wanted)
    except UserError as error:
        raise UserError(f"hf: {error}") from error


def _experiment(published: Published, image_tokenizer: Mapping[str, Any]) -> Experiment:
    vocab = published.vocab
    return asked_experiment(
        {
            "text_tokenizer": {"vocab_size": vocab.text_size},
            "image_tokenizer": image_tokenizer,
            "sentinels": vocab.sentinels,
            "model": published.model,
        }
    )


def _finish(
    run: RunFolder, name: str, make: Callable[[RunFolder, Path], None], source: str
) -> None:
    """Makes a stage and writes its record: it is finished, and made of what was published alone."""
    stage = next(each for each in stages_of(run.experiment) if each.name == name)

    # Like one that was trained, the decoder records the tokenizers that it belongs to.
    made_with = {}
    if name == "pretraining":
        for file in (TEXT_TOKENIZER, IMAGE_TOKENIZER):
            made_with[file] = recorded_digest((run.folder / file).parent, Path(file).name)
    record = StageRecord(
        digest_of(f"imported {name} {source}"),
        stage.version,
        made_with=made_with,
        inputs={"imported": source},
        settings=dict(stage.settings(run)),
    )
    make_result(replace(stage, make=make), run, run.folder / name, record)


def _make_text_tokenizer(run: RunFolder, folder: Path, published: Published) -> None:
    vocab = published.vocab
    (folder / TOKENIZER).write_text(
        json.dumps(vocab.tokenizer, ensure_ascii=False), encoding="utf-8"
    )
    write_json(folder / LAYOUT, vocab.table)
    text = (published.folder / TOKENIZER).read_text(encoding="utf-8")
    write_json(folder / PUBLISHED, {"family": published.name, "tokenizer.json": text})
    # Refuses one that is not exact, and writes the file as those who take it over will.
    TextTokenizer.load(folder, run.experiment.text_tokenizer).save(folder)


def _copy_text_tokenizer(exported: ExportedRun, folder: Path) -> None:
    assert exported.hub is not None
    exported.text_tokenizer.save(folder)
    published = exported.hub.vocab
    if published is not None:
        write_json(folder / LAYOUT, published.table)
        text = (exported.folder / TOKENIZER).read_text(encoding="utf-8")
        family = exported.hub.extras["family"]
        write_json(folder / PUBLISHED, {"family": family, "tokenizer.json": text})
    elif (exported.folder / LAYOUT).is_file():
        shutil.copyfile(exported.folder / LAYOUT, folder / LAYOUT)


def _write_image_tokenizer(run: RunFolder, tokenizer: ImageTokenizer, folder: Path) -> None:
    save_weights(folder / WEIGHTS, tokenizer)
    write_json(folder / "config.json", run.recorded("image_tokenizer"))
    if (geometry := tokenizer.geometry()) is not None:
        write_json(folder / GEOMETRY, geometry)


def _make_decoder(folder: Path, published: Published, vocab: Vocab, origin: Origin) -> None:
    """The decoder's file: tensors one after the other, rows of both tables in our order."""
    state: dict[str, Tensor] = {}
    layers = published.model["layers"]
    tensors = published.form.from_state(published.weights.read(), layers)

    # The bar counts weights, since tensors differ much in size.
    count = 0
    for name, stored in published.weights.tensors.items():
        if not name.startswith(IMAGE_ENCODER):
            count += math.prod(stored.shape)
    progress = tqdm(desc="weights", total=count, unit="weight", unit_scale=True, dynamic_ncols=True)
    for name, tensor in tensors:
        progress.update(tensor.numel())
        if name in TABLES:
            tensor = in_order(tensor, published.vocab.old_id_V, vocab.size)
        check_finite(tensor, f"hf: {published.folder}: {name}")
        state[name] = tensor
    progress.close()
    save_weights(folder / WEIGHTS, state)
    write_json(folder / "config.json", {"model": published.model, "vocab_size": vocab.size})
    origin.save(folder)
