"""A run as a folder that others can use without this project: `export to=hf`.

    model.safetensors       the model as a class of transformers; a large one in parts with an index
    config.json             settings of this class
    tokenizer.json          the text tokenizer, with tokenizer_config.json
    generation_config.json  what opens and ends a sample, and the ids of each modality
    image_tokenizer/        diffusers' VQModel, or this project's own file for other tokenizers
    cm3leon.json            what has no place in the others: the experiment, the ranges of ids
    README.md               the model card, with sample images beside it

Weights are converted one tensor after the other in their own precision, so that memory holds one
file of the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cm3leon import __version__
from cm3leon.config import to_mapping
from cm3leon.hub.folder import EXTRAS, IMAGE_TOKENIZER, TABLES, HubFolder
from cm3leon.hub.image_tokenizer import (
    chameleon_config,
    chameleon_state,
    diffusers_config,
    diffusers_state,
    why_not_diffusers,
)
from cm3leon.hub.parts import METADATA, PART_BYTES, save_in_parts
from cm3leon.hub.processor import has_processor, processor_files, special_tokens
from cm3leon.io import read_json, write_json, write_text
from cm3leon.models.chameleon import CHAMELEON
from cm3leon.models.form import Form, transformers, verify
from cm3leon.models.forms import FORMS
from cm3leon.registry import MODELS
from cm3leon.secrets import without_secrets
from cm3leon.stages.files import GEOMETRY, TOKENIZER, WEIGHTS
from cm3leon.stages.origin import ORIGIN, Origin
from cm3leon.stages.run_folder import RunFolder
from cm3leon.tokenizers.families import FAMILIES, Family, PublishedVocab, renumbered
from cm3leon.tokenizers.image.published_files import open_weights
from cm3leon.tokenizers.text import LAYOUT, PUBLISHED
from cm3leon.types import UserError
from cm3leon.weights import save_tensors

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """A finished run in the form of transformers: the ids, names and settings for its files."""

    run: RunFolder

    @cached_property
    def form(self) -> Form:
        """The class of its model.

        Raises:
            UserError: for a model or settings that no class of transformers has.
        """
        name, config = self.run.experiment.model.name, self.run.experiment.model.config
        form = FORMS.get(MODELS.get(name))
        if form is None:
            known = " and ".join(each.name for each in FORMS.values())
            raise UserError(
                f"run: a model {name} cannot be exported with to=hf; only {known} and their "
                "presets can"
            )
        form.to_config(config, self.run.vocab.size)
        return form

    @cached_property
    def published(self) -> Mapping[str, str] | None:
        """The family and the tokenizer.json of the public weights that the run began with, if
        any."""
        file = self.run.stage("text_tokenizer", TOKENIZER) / PUBLISHED
        if not file.is_file():
            return None
        return read_json(file, {"family": str, "tokenizer.json": str})

    @property
    def family(self) -> Family | None:
        """The family of the public weights that the run began with, if any."""
        if not self.published:
            return None
        return FAMILIES[self.published["family"]]

    @cached_property
    def names(self) -> Mapping[int, str] | None:
        """The names of published ids; None if the ids are our own."""
        if self.published is None:
            return None
        content = json.loads(self.published["tokenizer.json"])
        names = {id_: name for name, id_ in content["model"]["vocab"].items()}
        return names | {token["id"]: token["content"] for token in content.get("added_tokens", [])}

    @property
    def has_processor(self) -> bool:
        """Whether transformers' processor can ask the exported model about images."""
        if self.form is not CHAMELEON or self.names is None:
            return False
        if why_not_diffusers(self.run.image_tokenizer):
            return False
        return has_processor(self.run.vocab.layout, self.names.values())

    def origin(self, licence: str | None, base_model: str | None) -> Origin:
        """Licence and base model: as given, or else as recorded for the weights that the run began
        with."""
        kept = Origin()
        if (self.run.folder / "pretraining" / ORIGIN).is_file():
            kept = Origin.of(self.run.stage("pretraining", ORIGIN))
        family = None if self.family is None else self.family.licence
        return Origin(licence or kept.licence or family, base_model or kept.base_model)

    @cached_property
    def vocab(self) -> PublishedVocab | None:
        """The public weights' vocabulary in our order of ids, if the run began with any."""
        if self.published is None:
            return None
        family = FAMILIES[self.published["family"]]
        return renumbered(json.loads(self.published["tokenizer.json"]), family, PUBLISHED)

    @cached_property
    def id_there_V(self) -> np.ndarray:
        """For each of our ids, the id in the exported model: the published one, or the same."""
        if self.vocab is None:
            return np.arange(self.run.vocab.size)
        return self.vocab.old_id_V

    def ids(self, ids: Any) -> list[int]:
        """Ids of the exported model for ids of ours."""
        return [int(id_) for id_ in self.id_there_V[np.asarray(ids, dtype=np.int64)]]

    def id_ranges(self) -> dict[str, list[list[int]]]:
        """The ids of each modality, as [first, one past the last] of each range."""
        vocab = self.run.vocab
        kinds = {
            "text": range(*vocab.id_range("text")),
            "image": range(*vocab.id_range("image")),
            "sentinels": [vocab.sentinel(number) for number in range(vocab.sentinels)],
        }
        return {name: _ranges(sorted(self.ids(ids))) for name, ids in kinds.items()}

    def special_ids(self) -> dict[str, Any]:
        """The ids that open, end and pad a sample. A text ends at the first of its ends."""
        vocab = self.run.vocab
        ends = dict.fromkeys(self.ids([vocab.end_of_span, vocab.layout.end]))
        return {
            "bos_token_id": self.ids([vocab.layout.begin])[0],
            "eos_token_id": list(ends),
            "pad_token_id": self.ids([vocab.pad])[0],
        }

    def weights(self) -> Mapping[str, Tensor]:
        """The model's tensors by our names, each read when it is used."""
        return open_weights(self.run.stage("pretraining", WEIGHTS) / WEIGHTS).read()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the exported model, one after the other."""
        # Tables with a row for each id get the published order.
        tables = {self.form.outer[name] for name in TABLES}
        for name, tensor in self.form.to_state(self.weights(), self.run.experiment.model.config):
            if self.vocab is not None and name in tables:
                ours_VD, tensor = tensor, tensor.new_empty(len(self.id_there_V), tensor.shape[1])
                tensor[torch.from_numpy(self.id_there_V)] = ours_VD[: len(tensor)]
            yield name, tensor
        if self.form is CHAMELEON:
            yield from self._image_encoder().items()

    def _image_encoder(self) -> dict[str, Tensor]:
        """The image tokenizer that is part of a Chameleon; zeros if this run's is of another
        form."""
        tokenizer: Any = self.run.image_tokenizer
        if not why_not_diffusers(tokenizer):
            return chameleon_state(tokenizer)

        # transformers would fill missing tensors with random numbers.
        library = transformers()
        config = library.ChameleonConfig(**CHAMELEON.extra)
        with torch.device("meta"):
            state = library.ChameleonVQVAE(config.vq_config).state_dict()
        zeros = {}
        for name, tensor in state.items():
            zeros[f"model.vqmodel.{name}"] = torch.zeros(tensor.shape)
        return zeros

    def config(self) -> dict[str, Any]:
        """config.json: the settings of the model's class."""
        config, vocab = self.run.experiment.model.config, self.run.vocab
        head = self.weights()["head.weight"]
        settings = {
            **self.form.to_config(config, len(self.id_there_V)),
            **self.special_ids(),
            "eos_token_id": self.ids([vocab.layout.end])[0],
            "architectures": [self.form.model_class],
            "dtype": str(head.dtype).removeprefix("torch."),
        }
        if self.form is not CHAMELEON:
            return settings

        # Chameleon's forward pass forbids the tokens named IMGIMG..., which only public weights
        # have.
        names = {"<image>": self.ids([vocab.pad])[0]}
        if self.names is not None:
            names = {name: id_ for id_, name in self.names.items()}
        tokenizer: Any = self.run.image_tokenizer
        other = why_not_diffusers(tokenizer)
        vision = CHAMELEON.extra["vq_config"] if other else chameleon_config(tokenizer)
        return {**settings, "vocabulary_map": names, "vq_config": vision}


def write_hub_folder(
    exported: Exported,
    folder: Path,
    card: str,
    origin: Origin | None = None,
    *,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write all files but the sample images, and compare the written weights with the run.

    Args:
        folder: an empty one.
        card: the text of README.md.
        origin: licence and base model, which an import of the folder records.

    Raises:
        UserError: for a run whose model or tokenizers have no such form.
        RuntimeError: if the written weights are not those of the run, or compute other logits.
    """
    library, run, form = transformers(), exported.run, exported.form
    settings = exported.config()
    getattr(library, form.config_class)(**settings).save_pretrained(folder)

    # Version 4 of the library reads this setting at the top.
    if "rope_parameters" in settings:
        kept = read_json(folder / "config.json")
        rope_theta = run.experiment.model.config.rope_theta
        write_json(folder / "config.json", {"rope_theta": rope_theta, **kept})

    progress = tqdm(exported.tensors(), "weights", unit="tensor", dynamic_ncols=True)
    save_in_parts(folder, progress, part_bytes)
    _write_text_tokenizer(exported, folder)
    _write_image_tokenizer(run, folder / IMAGE_TOKENIZER)

    generation = {
        **exported.special_ids(),
        "ids": exported.id_ranges(),
        "codes_per_image": run.grid[0] * run.grid[1],
    }
    write_json(folder / "generation_config.json", generation)

    # What an import or `CM3Leon.load` needs beside all this.
    extras = {
        "cm3leon": __version__,
        **run.settings_of("model"),
        "vocab_size": run.vocab.size,
        "ids": run.vocab.ranges(),
        "image_size": run.image_tokenizer_shape.image_size,
        "experiment": without_secrets(to_mapping(run.experiment)),
    }
    if origin is not None:
        extras["origin"] = asdict(origin)
    if exported.published is not None:
        extras["family"] = exported.published["family"]
    write_json(folder / EXTRAS, extras)
    write_text(folder / "README.md", card)
    _verify(exported, folder)


def _verify(exported: Exported, folder: Path) -> None:
    """Compare the written tensors with the run's, and the first layers' logits with
    transformers'."""
    ours, written = exported.weights(), HubFolder(folder)
    used = len(exported.id_there_V)
    for name, tensor in written.state():
        expected = ours[name]
        if name in TABLES:  # rows beyond the used ids are not exported
            tensor, expected = tensor[:used], expected[:used]
        if not torch.equal(tensor, expected):
            raise RuntimeError(f"the exported weights are not those of the run: {name} differs")

    with torch.device("meta"):
        model = exported.run.empty_model()
    settings = read_json(folder / "config.json")
    id_there_V = torch.from_numpy(exported.id_there_V)
    verify(exported.form, model, ours, written.tensors(), settings, id_there_V)


def _write_text_tokenizer(exported: Exported, folder: Path) -> None:
    """Write tokenizer.json and its settings. No text becomes a special token, whatever it holds."""
    run, special = exported.run, exported.special_ids()
    stage = run.stage("text_tokenizer", TOKENIZER)
    if exported.published is not None:
        write_text(folder / TOKENIZER, exported.published["tokenizer.json"])
    else:
        shutil.copyfile(stage / TOKENIZER, folder / TOKENIZER)
        if (stage / LAYOUT).is_file():
            shutil.copyfile(stage / LAYOUT, folder / LAYOUT)

    names = exported.names or dict(enumerate(run.text_tokenizer.specials))
    settings: dict[str, Any] = {
        # This class runs tokenizer.json as it is. The model's own class would change its pipeline.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": run.seq_len,
        "pad_token": names[special["pad_token_id"]],
        "bos_token": names[special["bos_token_id"]],
        "eos_token": names[exported.ids([run.vocab.layout.end])[0]],
    }

    # The processor turns images into ids by the names of the tokens around them.
    if exported.has_processor:
        layout = run.vocab.layout
        ids = exported.ids([*layout.image_open, *layout.image_close, *layout.turn])
        settings |= special_tokens(*(names[id_] for id_ in ids))
        tokenizer = run.image_tokenizer_shape
        for file, content in processor_files(tokenizer.image_size, run.grid).items():
            write_json(folder / file, content)
    write_json(folder / "tokenizer_config.json", settings)


def _write_image_tokenizer(run: RunFolder, folder: Path) -> None:
    """Write the image tokenizer as diffusers' VQModel, or else as this project's own file."""
    folder.mkdir()
    tokenizer: Any = run.image_tokenizer
    if not why_not_diffusers(tokenizer):
        write_json(folder / "config.json", diffusers_config(tokenizer))
        save_tensors(folder / DIFFUSERS_WEIGHTS, diffusers_state(tokenizer), METADATA)
        return
    stage = run.stage("image_tokenizer", WEIGHTS)
    shutil.copyfile(stage / WEIGHTS, folder / WEIGHTS)
    if (stage / GEOMETRY).is_file():
        shutil.copyfile(stage / GEOMETRY, folder / GEOMETRY)


def _ranges(ids: list[int]) -> list[list[int]]:
    """Sorted ids as [first, one past the last] of each range.

    >>> _ranges([3, 4, 5, 9])
    [[3, 6], [9, 10]]
    """
    ranges: list[list[int]] = []
    for id_ in ids:
        if ranges and ranges[-1][1] == id_:
            ranges[-1][1] = id_ + 1
        else:
            ranges.append([id_, id_ + 1])
    return ranges
