"""Convert a trained decoder to Hugging Face's OPT, which computes the same function, or back.

    python -m cm3leon.run export to=hf run=runs/digits out=exported       # a finished run for OPTForCausalLM
    python -m cm3leon.run export to=cm3leon hf=exported out=back          # such a folder as pretraining writes it

Weights only move and change their names, so the way there and back is exact. What OPT has no place for (id ranges,
the experiment, the name of the model) lies beside the weights, in `cm3leon.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cm3leon import __version__
from cm3leon.config import to_mapping
from cm3leon.io import read_json, write_json
from cm3leon.locks import LOCK
from cm3leon.paths import make_folder, naming, writing
from cm3leon.permissions import use_umask
from cm3leon.registry import MODELS, discover
from cm3leon.stages.trust import Opening
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError

if TYPE_CHECKING:
    from cm3leon.models.transformer import Transformer
    from cm3leon.stages.run_folder import RunFolder

EXTRAS = "cm3leon.json"


@dataclass(kw_only=True)
class Options(Opening):
    """Options of the command export."""

    to: Literal["hf", "cm3leon"]
    """A direction: hf makes an OPTForCausalLM of `run`, cm3leon a decoder of `hf`."""
    run: Path | None = None
    """Folder of a run whose pretraining is finished, for to=hf."""
    hf: Path | None = None
    """Folder of an OPTForCausalLM that has this decoder's shape, for to=cm3leon."""
    out: Path
    """A folder to make; it must not exist, or be empty."""

    def check(self) -> None:
        given = {"run": self.run, "hf": self.hf}
        source, other = ("run", "hf") if self.to == "hf" else ("hf", "run")
        if given[source] is None:
            raise UserError(
                f"`export to={self.to}` needs a folder to convert: {source}=DIR, for example "
                f"{source}={'runs/digits' if source == 'run' else 'exported'}"
            )
        if given[other] is not None:
            raise UserError(f"{other} is given, which to={self.to} does not read; give {source}")


def main(options: Options) -> None:
    """Does what the options say, and prints what it made.

    Raises:
        UserError: for a run without a finished pretraining, an OPT that is not this decoder, or an output folder that
            holds something.
    """
    if options.run is not None:
        export_to_hf(options.run, options.out, options)
    elif options.hf is not None:
        export_to_cm3leon(options.hf, options.out)
    print(f"written: {options.out}")


def export_to_hf(run_folder: Path, out: Path, opening: Opening | None = None) -> None:
    """Writes a run's decoder as `OPTForCausalLM`, with its text tokenizer, `cm3leon.json` and a README.

    What was written is read again and has to give the same logits before the folder gets its name.

    Raises:
        UserError: for a run without a finished pretraining, another class of model, or a folder `out` that is taken.
        RuntimeError: if the OPT's logits differ.
    """
    import torch

    from cm3leon.models.opt import from_opt_state, load_opt, to_opt, transformers, verify
    from cm3leon.stages.files import TOKENIZER

    transformers()
    run, model = _finished(run_folder, opening)
    with new_folder(out) as folder:
        to_opt(model).save_pretrained(folder)
        shutil.copyfile(run.stage("text_tokenizer", TOKENIZER) / TOKENIZER, folder / TOKENIZER)
        # The plain class runs tokenizer.json as it is; the one that OPT names would replace its pipeline.
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        extras = {
            "cm3leon": __version__,
            **run.settings_of("model"),
            "vocab_size": model.vocab_size,
            "ids": run.vocab.ranges(),
            "experiment": to_mapping(run.experiment),
        }
        write_json(folder / EXTRAS, extras)
        (folder / "README.md").write_text(_readme(run.vocab, model.config.seq_len))
        use_umask(folder)
        written = load_opt(folder)
        returned = from_opt_state(written.state_dict(), model.config.layers)
        if not all(
            torch.equal(weight, returned[name]) for name, weight in model.state_dict().items()
        ):
            raise RuntimeError("the exported weights are not those of the run")
        verify(model, written)


def _finished(folder: Path, opening: Opening | None) -> tuple[RunFolder, Transformer]:
    """A run and its trained decoder, in evaluation mode on the CPU."""
    import torch

    from cm3leon.models.transformer import Transformer
    from cm3leon.stages.opening import open_run

    run = open_run(
        folder, opening, needs=("text_tokenizer", "pretraining"), device=torch.device("cpu")
    )
    made = read_json(run.stage("pretraining", "config.json") / "config.json")
    if made != {**run.settings_of("model"), "vocab_size": run.vocab.size}:
        raise UserError(
            f"run: the model of {folder / 'config.yaml'} is not the one that was trained; run it to its end"
        )
    if MODELS.get(run.experiment.model.name) is not Transformer:
        raise UserError(
            f"run: the model {run.experiment.model.name} has no form in hf; only cm3leon and its presets do"
        )
    assert isinstance(run.model, Transformer)
    return run, run.model


def _readme(vocab: Vocab, seq_len: int) -> str:
    rows = "\n".join(
        f"| `{name}` | {ids[0]} to {ids[1] - 1} |"
        if isinstance(ids, list)
        else f"| `{name}` | {ids} |"
        for name, ids in vocab.ranges().items()
        if not isinstance(ids, list) or ids[0] < ids[1]
    )
    return f"""\
# A CM3Leon decoder as OPTForCausalLM

`OPTForCausalLM.from_pretrained` reads this folder; `tokenizer.json` is the tokenizer of its text. Sequences hold at
most {seq_len} tokens. One vocabulary holds text pieces, image codes and the sentinels `<mask:0>`, `<mask:1>` ...:

| ids | |
|---|---|
{rows}

Text to image: `<eos> caption <break>`, then image codes. Image to text: `<eos> <mask:0> <break> codes <eos> <mask:0>`,
then text until `<end_of_span>`. Allow only ids of the modality that is being generated, and pass an `attention_mask`.
Codes become pixels by the image tokenizer of the run, which is not in this folder.

`cm3leon.json` holds these ranges and the experiment. The way back, exact:
`python -m cm3leon.run export to=cm3leon hf=DIR out=DIR`.
"""


def export_to_cm3leon(hf: Path, out: Path) -> None:
    """Writes `model.safetensors` and `config.json` as the pretraining stage does, from an `OPTForCausalLM`.

    Weights in half precision become float32, and a LoRA adapter of PEFT in the folder is merged into them. The name of
    the model and the settings that OPT lacks come from `cm3leon.json` where there is one.

    Raises:
        UserError: for a folder that holds no OPT, an OPT that is not this decoder, or a folder `out` that is taken.
    """
    import torch

    from cm3leon.models.opt import from_opt_state, load_opt, transformers, verify
    from cm3leon.models.transformer import Transformer
    from cm3leon.stages.files import WEIGHTS
    from cm3leon.training.checkpoint import save_weights

    transformers()
    section = _model_section(hf)
    opt = load_opt(hf)
    content = {"model": section, "vocab_size": opt.config.vocab_size}
    with torch.device("meta"):
        model = MODELS.build(section, vocab_size=content["vocab_size"]).eval()
    assert isinstance(model, Transformer)  # `_model_section` says cm3leon
    model.load_state_dict(from_opt_state(opt.state_dict(), section["layers"]), assign=True)
    verify(model, opt)
    with new_folder(out) as folder:
        save_weights(folder / WEIGHTS, model)
        write_json(folder / "config.json", content)


def _model_section(hf: Path) -> dict[str, Any]:
    """The model section of an exported OPT: its shape by `config.json`, the rest by `cm3leon.json` or by default."""
    from cm3leon.models.opt import FIXED, from_opt_config, transformers

    file = hf / "config.json"
    if not file.is_file():
        raise UserError(f"hf: {file} does not exist; hf is the folder of an OPTForCausalLM")
    given = read_json(file)
    if given.get("model_type") != FIXED["model_type"]:
        raise UserError(
            f'hf: {file}: model_type is {json.dumps(given.get("model_type"))}; it must be "opt"'
        )
    try:
        full = transformers().OPTConfig.from_dict(given).to_dict()
    except Exception as error:  # whatever the library's own checks of the values raise
        raise UserError(f"hf: {file} is not the config of an OPT: {error}") from error
    try:
        shape = from_opt_config(full)
    except UserError as error:
        raise UserError(f"hf: {file}: {error}") from error
    kept = read_json(hf / EXTRAS, {"model?": dict}).get("model") if (hf / EXTRAS).is_file() else {}
    discover()  # the kept name may be that of a preset
    return to_mapping(
        MODELS.check({"name": "cm3leon", **(kept or {}), **shape}, f"hf: {hf / EXTRAS}: model")
    )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it takes its place when all is written, and vanishes if that fails."""
    out = out.resolve()
    make_folder(out.parent, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {out} exists already; out must be a new or empty folder")
    partial = out.with_name(f".{out.name}.partial")
    with writing(partial, "out"), naming(out):
        for left in partial.iterdir():  # by an export that was killed
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            (partial / LOCK).unlink()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
