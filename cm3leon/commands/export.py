"""Convert a run into a folder that transformers, diffusers and PEFT read, or back.

    python -m cm3leon.run export to=hf run=runs/digits out=exported       # a model of transformers
    python -m cm3leon.run export to=peft run=runs/mine out=adapter        # a run's LoRA, for PEFT
    python -m cm3leon.run export to=cm3leon hf=exported out=back          # as pretraining writes it

Weights are only reordered and renamed, in their own precision, so converting there and back is
exact. to=hf also writes the tokenizers, generation settings, a model card and a sample image.
`push` uploads the folder, and CM3Leon.load reads it. What transformers has no file for (id ranges,
the experiment) is kept in `cm3leon.json`. docs/public_weights.md has every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cm3leon.config import NonNegativeInt, to_mapping
from cm3leon.io import read_json, write_json
from cm3leon.paths import new_folder
from cm3leon.permissions import use_umask
from cm3leon.stages.trust import Opening
from cm3leon.types import UserError

if TYPE_CHECKING:
    from cm3leon.stages.run_folder import RunFolder

DIRECTIONS = {
    "hf": ("run", "runs/digits"),
    "peft": ("run", "runs/mine"),
    "cm3leon": ("hf", "exported"),
}
"""The option that each direction reads, with an example."""


@dataclass(kw_only=True)
class Options(Opening):
    """Options of the command export."""

    to: Literal["hf", "peft", "cm3leon"]
    """A direction: hf writes `run` as a model of transformers, peft its LoRA as an adapter, and
    cm3leon writes `hf` as a model of this project."""
    run: Path | None = None
    """Folder of a run whose pretraining is finished, for to=hf and to=peft."""
    hf: Path | None = None
    """Folder of a model of transformers in a shape that this project has, for to=cm3leon."""
    adapter: Path | None = None
    """Folder of a LoRA adapter of PEFT to merge into `hf`, for to=cm3leon; null = the one inside
    `hf`, if there is one."""
    licence: str | None = None
    """The licence of the weights by the Hub's name, such as mit, for the card; null = that of the
    weights which the run began with, or unknown."""
    base_model: str | None = None
    """The model on the Hub that the run started from, such as facebook/chameleon-7b, for the card
    and the adapter; null = as recorded when its first weights were imported."""
    prompt: str | None = None
    """A text for the card's sample images; null = a held-out caption of the run, if it has one."""
    samples: NonNegativeInt = 1
    """Sample images on the card; 0 = none."""
    out: Path
    """A folder to make; it must not exist, or be empty."""

    def check(self) -> None:
        given = {"run": self.run, "hf": self.hf}
        source, example = DIRECTIONS[self.to]
        other = "hf" if source == "run" else "run"
        if given[source] is None:
            raise UserError(
                f"`export to={self.to}` needs a folder to convert: {source}=DIR, "
                f"for example {source}={example}"
            )
        if given[other] is not None:
            raise UserError(f"{other} is given, which to={self.to} does not read; give {source}")
        if self.adapter is not None and self.to != "cm3leon":
            raise UserError(f"adapter is given, which to={self.to} does not read; leave it out")


def main(options: Options) -> None:
    """Convert in the given direction, and print the new folder.

    Raises:
        UserError: for a run without a finished pretraining, a model of a shape that this project
            does not have, or an output folder that is not empty.
    """
    if options.to == "hf":
        export_to_hf(options)
    elif options.to == "peft":
        export_to_peft(options)
    else:
        export_to_cm3leon(options)
    print(f"written: {options.out}")


def export_to_hf(options: Options) -> None:
    """Write a run as a model of transformers, with its tokenizers and a card.

    The files are read again and compared before the folder gets its name.

    Raises:
        UserError: for a run without a finished pretraining, a model class that transformers has no
            counterpart of, or a folder `out` that is not empty.
        RuntimeError: if the written weights differ, or compute other logits.
    """
    from cm3leon.hub.card import card_of
    from cm3leon.hub.export import Exported, write_hub_folder
    from cm3leon.models.form import transformers

    transformers()
    exported = Exported(_finished(options))
    _ = exported.form  # a model that cannot be exported is refused before images are drawn
    with new_folder(options.out) as folder:
        samples = []
        if _draws(exported.family):
            samples = _draw(options, exported.run, folder)
        origin = exported.origin(options.licence, options.base_model)
        write_hub_folder(exported, folder, card_of(exported, origin, samples), origin)
        use_umask(folder)


def _draws(family: object) -> bool:
    return family is None or bool(getattr(family, "draws", True))


def _finished(options: Options) -> RunFolder:
    """The run, opened on the CPU, with a finished pretraining of the settings in its folder."""
    import torch

    from cm3leon.stages.opening import open_run

    assert options.run is not None
    needs = ("text_tokenizer", "image_tokenizer", "pretraining")
    run = open_run(options.run, options, needs=needs, device=torch.device("cpu"))
    made = read_json(run.stage("pretraining", "config.json") / "config.json")
    if made != {**run.settings_of("model"), "vocab_size": run.vocab.size}:
        raise UserError(
            f"run: the model of {options.run / 'config.yaml'} is not the one that was trained; "
            "run it to its end"
        )
    return run


def _draw(options: Options, run: RunFolder, folder: Path) -> list[tuple[str, str]]:
    """Draw sample images into the folder; returns the name of each file, and its prompt."""
    from cm3leon.api import CM3Leon

    # A held-out caption shows what the model makes of a text that it was not trained on.
    prompt = options.prompt
    if prompt is None and (run.folder / "documents").is_dir():
        held_out = run.corpus.rows("held_out")
        if len(held_out):
            prompt = run.corpus.captions[held_out[0]]
    if prompt is None or not options.samples:
        return []

    model = CM3Leon.load(
        run.folder, plugins=options.plugins, trust=options.trust, verify=options.verify
    )
    samples = []
    for number in range(options.samples):
        (drawn,) = model.generate(prompt, seed=number)
        name = "sample.png" if options.samples == 1 else f"sample-{number}.png"
        drawn.image.save(folder / name)
        samples.append((name, prompt))
    return samples


def export_to_peft(options: Options) -> None:
    """Write a run's LoRA as an adapter of PEFT, for the export of the run that it started from.

    Raises:
        UserError: for a run that was not trained by LoRA, or a folder `out` that is not empty.
    """
    from cm3leon.hub.adapter import write_adapter
    from cm3leon.hub.export import Exported

    exported = Exported(_finished(options))
    _ = exported.form
    with new_folder(options.out) as folder:
        write_adapter(exported, folder, exported.origin(None, options.base_model).base_model)
        use_umask(folder)


def export_to_cm3leon(options: Options) -> None:
    """Write a model of transformers as `model.safetensors` and `config.json` of the pretraining
    stage.

    A LoRA adapter of PEFT is merged into the weights. The model's name and the settings that
    transformers lacks come from `cm3leon.json` if the folder has one.

    Raises:
        UserError: for a folder that holds no such model, or a folder `out` that is not empty.
        RuntimeError: if transformers' model computes other logits.
    """
    import torch

    from cm3leon.hub.folder import HubFolder
    from cm3leon.models.form import transformers, verify
    from cm3leon.registry import MODELS
    from cm3leon.stages.files import WEIGHTS
    from cm3leon.weights import save_weights

    transformers()
    assert options.hf is not None
    hub = HubFolder(options.hf, options.adapter)
    content = {"model": to_mapping(hub.model), "vocab_size": hub.vocab_size}
    state = dict(hub.state())

    # Both models compute the same tokens, each with its own ids for them, and must agree.
    with torch.device("meta"):
        model = MODELS.build(hub.model, vocab_size=hub.vocab_size)
    id_there_V = None
    if hub.vocab is not None:
        id_there_V = torch.from_numpy(hub.vocab.old_id_V)
    verify(hub.form, model, state, hub.tensors(), hub.settings, id_there_V)

    with new_folder(options.out) as folder:
        save_weights(folder / WEIGHTS, state)
        write_json(folder / "config.json", content)
