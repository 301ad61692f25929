"""A folder that `export to=hf` wrote, read back as weights, or as a run that answers from where it
is.

The weights are those of a class of transformers. What transformers has no file for (the experiment,
the ranges of ids) is in `cm3leon.json`. The folder may come from anyone: everything in it is
checked before it is used, and no code of it is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm3leon.config import Component, choices, from_mapping, to_mapping
from cm3leon.experiment import Experiment
from cm3leon.io import read_json, write_json
from cm3leon.models.adapter import has_adapter, merge_adapter
from cm3leon.models.base import Model
from cm3leon.models.form import Form
from cm3leon.models.forms import FORMS
from cm3leon.permissions import check_folder_readable
from cm3leon.registry import IMAGE_TOKENIZERS, MODELS, discover
from cm3leon.stages.files import GEOMETRY, TOKENIZER, WEIGHTS
from cm3leon.stages.run_folder import RunFolder
from cm3leon.tokenizers.families import FAMILIES, PublishedVocab, renumbered
from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.tokenizers.image.published_files import Weights, open_weights
from cm3leon.tokenizers.layout import LayoutTable
from cm3leon.tokenizers.text import LAYOUT, TextTokenizer, layout_table
from cm3leon.types import UserError
from cm3leon.weights import check_finite, check_fit, load_weights

EXTRAS = "cm3leon.json"
EXTRAS_SHAPE = {
    "model?": dict,
    "family?": str,
    "origin?": {"licence?": str, "base_model?": str},
}
IMAGE_TOKENIZER = "image_tokenizer"
"""The subfolder of the image tokenizer."""
IMAGE_ENCODER = "model.vqmodel."
"""Prefix of the tensors of a Chameleon's own image tokenizer, which is also in its own folder."""
TABLES = ("embedding.weight", "head.weight")
"""Weights with a row for each id."""


@dataclass(frozen=True)
class HubFolder:
    """A model of transformers in a form that this project has."""

    folder: Path
    adapter: Path | None = None
    """Folder of a LoRA adapter of PEFT that is merged into the weights; None = the one inside the
    folder, if there is one."""
    where: str = "hf"
    """The option that names the folder, for messages."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json. Raises UserError if it does not exist."""
        file = self.folder / "config.json"
        if not file.is_file():
            raise UserError(
                f"{self.where}: {file} does not exist; give the folder of a model as transformers "
                "saves it"
            )
        return read_json(file)

    @cached_property
    def extras(self) -> dict[str, Any]:
        """cm3leon.json; empty if it does not exist."""
        file = self.folder / EXTRAS
        if not file.is_file():
            return {}
        return read_json(file, EXTRAS_SHAPE)

    @cached_property
    def form(self) -> Form:
        """The class of the model. Raises UserError for one that this project has no counterpart
        of."""
        given = self.settings.get("model_type")
        known = {form.model_type: form for form in FORMS.values()}
        if given not in known:
            names = " or ".join(json.dumps(name) for name in known)
            raise UserError(
                f"{self.where}: {self.folder / 'config.json'}: model_type is {json.dumps(given)}; "
                f"it must be {names}"
            )
        return known[given]

    @cached_property
    def model(self) -> Component:
        """The model's settings: its shape by config.json, the rest by cm3leon.json or by
        default."""
        form, settings = self.form, self.settings
        try:
            shape = form.read_config(settings)
        except UserError as error:
            raise UserError(f"{self.where}: {self.folder / 'config.json'}: {error}") from error
        discover()  # the kept name may be that of a preset
        section = {"name": form.name, **self.extras.get("model", {}), **shape}
        return MODELS.check(section, f"{self.where}: {self.folder / EXTRAS}: model")

    @cached_property
    def vocab(self) -> PublishedVocab | None:
        """The vocabulary of public weights in our order of ids; None if the ids are our own."""
        family = self.extras.get("family")
        if family is None:
            return None
        if family not in FAMILIES:
            raise UserError(
                f"{self.where}: {self.folder / EXTRAS}: family is {family}, which is not known; "
                f"{choices(str(family), FAMILIES)}"
            )
        file = self.folder / TOKENIZER
        return renumbered(read_json(file), FAMILIES[family], f"{self.where}: {file}")

    @cached_property
    def vocab_size(self) -> int:
        """Ids of the model in our order; of public weights, with rows that they do not have."""
        holder = self.settings if self.vocab is None else self.extras
        given = holder.get("vocab_size")
        if type(given) is not int or given < 1:
            raise UserError(
                f"{self.where}: {self.folder}: vocab_size is {json.dumps(given)}; it must be a "
                "whole number, at least 1"
            )
        return given

    @cached_property
    def weights(self) -> Weights:
        """The tensors by transformers' names, each read when it is used."""
        check_folder_readable(self.folder)
        try:
            return open_weights(self.folder, adapter_allowed=True)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by transformers' names with the adapter merged, in their own precision."""
        adapter = self.adapter
        if adapter is None and has_adapter(self.folder):
            adapter = self.folder
        given = self.weights.read()
        if adapter is None:
            return given
        return merge_adapter(adapter, given)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by our names, in our order of ids, one after the other.

        Raises:
            UserError: for weights that are missing, left over or of another shape.
            NotFinite: for weights that are NaN or infinite.
        """
        config, published = self.model.config, self.vocab
        rows = self.vocab_size if published is None else len(published.old_id_V)

        # Names and shapes are compared before any weight is read.
        with torch.device("meta"):
            model = MODELS.build(self.model, vocab_size=rows)
            wanted = dict(self.form.to_state(model.state_dict(), config))
        given = {}
        for name, stored in self.weights.tensors.items():
            if not name.startswith(IMAGE_ENCODER):
                given[name] = torch.empty(stored.shape, device="meta")
        try:
            check_fit(self.folder, given, wanted)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error

        for name, tensor in self.form.from_state(self.tensors(), config.layers):
            check_finite(tensor, f"{self.where}: {self.folder}: {name}")
            if published is not None and name in TABLES:
                tensor = in_order(tensor, published.old_id_V, self.vocab_size)
            yield name, tensor

    def build(self) -> Model:
        """The model in evaluation mode, in the precision of the file; memory is taken once."""
        with torch.device("meta"):
            model = MODELS.build(self.model, vocab_size=self.vocab_size)
        model.load_state_dict(dict(self.state()), assign=True)
        return model.eval()


def in_order(weight_VD: Tensor, old_id_V: np.ndarray, size: int) -> Tensor:
    """The rows of a table in our order of ids; ids that the publisher does not have are zeros."""
    ordered_VD = weight_VD[torch.from_numpy(old_id_V)]
    return torch.cat([ordered_VD, ordered_VD.new_zeros(size - len(ordered_VD), weight_VD.shape[1])])


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder is one that transformers reads, and not a run."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").exists()


def asked_experiment(sections: Mapping[str, Any]) -> Experiment:
    """An experiment for weights that were made elsewhere: without a corpus, and without training.

    Args:
        sections: of the model and both tokenizers, and others that replace the usual ones below.
    """
    usual = {
        "data": {"name": "none"},
        "retriever": {"name": "lexical"},
        "objective": {"name": "cm3"},
        "training": {"steps": 1, "batch_size": 1, "warmup_steps": 0},
        "decoder": {"name": "top_p", "cfg": 3.0},
        "text_decoder": {"name": "greedy"},
        "until": "pretraining",
    }
    return from_mapping(Experiment, {**usual, **sections})


@dataclass(frozen=True, eq=False)
class ExportedRun(RunFolder):
    """An exported folder as a run with a model and both tokenizers, and without a memory bank.

    It has no stages: everything is read from the folder itself.
    """

    hub: HubFolder | None = None

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        assert self.hub is not None
        config, published = self.experiment.text_tokenizer, self.hub.vocab
        if published is None:
            return TextTokenizer.load(self.folder, config)

        # The published tokenizer in our order of ids, in the form of the tokenizer stage.
        with TemporaryDirectory() as made:
            folder = Path(made)
            (folder / TOKENIZER).write_text(json.dumps(published.tokenizer), encoding="utf-8")
            write_json(folder / LAYOUT, published.table)
            return TextTokenizer.load(folder, config)

    def _layout_table(self) -> LayoutTable:
        assert self.hub is not None
        published = self.hub.vocab
        if published is None:
            return layout_table(self.folder)
        return LayoutTable.from_names(published.table, str(self.folder / TOKENIZER))

    def new_image_tokenizer(self) -> ImageTokenizer:
        section, kept = self.experiment.image_tokenizer, self.folder / IMAGE_TOKENIZER / GEOMETRY
        if kept.is_file():
            return IMAGE_TOKENIZERS.build(section, kept=read_json(kept))
        return IMAGE_TOKENIZERS.build(section)

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        tokenizer = self.new_image_tokenizer()
        own = self.folder / IMAGE_TOKENIZER / WEIGHTS
        if own.is_file():
            load_weights(own, tokenizer)
        return tokenizer.to(self.device).ready()


def open_hub_folder(
    folder: Path, device: torch.device, *, adapter: Path | None = None, where: str = "run"
) -> ExportedRun:
    """Open an exported folder, which then answers like a run.

    Args:
        adapter: folder of a LoRA adapter of PEFT to merge into the weights.
        where: the option that names the folder, for messages.

    Raises:
        UserError: for a folder that this project did not write, or one that is incomplete or
            damaged.
    """
    hub = HubFolder(folder, adapter, where)
    kept = hub.extras.get("experiment")
    if not isinstance(kept, dict):
        raise UserError(
            f"{where}: {folder} has no {EXTRAS} that `export to=hf` wrote, and so no image "
            "tokenizer for its codes; public weights become a run with: import from=FAMILY hf=DIR "
            "vqgan=FILE out=DIR"
        )

    # The image tokenizer is in the folder, in the form of diffusers or of this project.
    discover()
    own = (folder / IMAGE_TOKENIZER / WEIGHTS).is_file()
    published = {
        "name": "pretrained",
        "path": str(folder / IMAGE_TOKENIZER),
        "image_size": hub.extras.get("image_size"),
    }

    # Of the experiment, only what changes answers is needed; the rest is described by the card.
    names = ("text_tokenizer", "sentinels", "objective", "decoder", "text_decoder")
    sections = {name: kept[name] for name in names if name in kept}
    sections["image_tokenizer"] = kept.get("image_tokenizer") if own else published
    sections["model"] = to_mapping(hub.model)
    experiment = asked_experiment(sections)
    run = ExportedRun(experiment, folder, device, finished=True, verify=False, hub=hub)
    if hub.vocab_size != run.vocab.size:
        raise UserError(
            f"{where}: {folder} has a vocabulary of {hub.vocab_size} ids, but its tokenizers make "
            f"one of {run.vocab.size}; export the run again"
        )
    return run
