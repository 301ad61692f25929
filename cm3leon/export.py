"""A trained decoder to and from Hugging Face's OPT, which computes the same function (paper section 3.1).

    python -m cm3leon.run export to=hf run=DIR out=DIR          a finished run as a folder for OPTForCausalLM
    python -m cm3leon.run export to=cm3leon hf=DIR out=DIR      such a folder as the pretraining stage writes it

Weights only move and change their names, so the way there and back is exact. What OPT has no place for (id ranges,
the experiment, the name of the model) lies beside the weights, in `cm3leon.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from cm3leon import __version__
from cm3leon.config import choices, from_mapping, to_mapping
from cm3leon.io import read_json, write_json
from cm3leon.locks import LOCK
from cm3leon.models.adapter import has_adapter, merge_adapter
from cm3leon.models.transformer import Transformer
from cm3leon.paths import make_folder, naming, writing
from cm3leon.permissions import check_folder_readable, use_umask
from cm3leon.registry import MODELS, discover
from cm3leon.stages.artifacts import TOKENIZER, WEIGHTS, Run
from cm3leon.stages.opening import open_run
from cm3leon.stages.trust import Opening
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.training.checkpoint import save_weights
from cm3leon.types import UserError
from cm3leon.weights import ADAPTERS

TOLERANCE = 1e-5
"""Largest difference allowed between the logits of both forms, in units of the largest logit or of 1."""
EXTRAS = "cm3leon.json"


@dataclass(kw_only=True)
class ToHf(Opening):
    """Options of `to=hf`."""

    to: Literal["hf"]
    """The direction."""
    run: Path
    """Folder of a run whose pretraining is finished."""
    out: Path
    """Folder to make; it must not exist, or be empty."""


@dataclass(kw_only=True)
class ToCM3Leon:
    """Options of `to=cm3leon`."""

    to: Literal["cm3leon"]
    """The direction."""
    hf: Path
    """Folder of an OPTForCausalLM that has this decoder's shape."""
    out: Path
    """Folder to make; it must not exist, or be empty."""


DIRECTIONS: dict[str, type[ToHf] | type[ToCM3Leon]] = {"hf": ToHf, "cm3leon": ToCM3Leon}


def main(options: Mapping[str, Any]) -> None:
    """Does what the options of the command line say, and prints what it made.

    Raises:
        UserError: for unknown, missing or unfit options, a run without a finished pretraining, an OPT that is not this
            decoder, or an output folder that holds something.
    """
    if "to" not in options:
        raise UserError("to is missing; write to=hf run=DIR out=DIR, or to=cm3leon hf=DIR out=DIR")
    if options["to"] not in list(DIRECTIONS):
        raise UserError(
            f"to is {options['to']}, which is not known; {choices(str(options['to']), DIRECTIONS)}"
        )
    config = from_mapping(DIRECTIONS[options["to"]], options)
    if isinstance(config, ToHf):
        export_to_hf(config.run, config.out, config)
    else:
        export_to_cm3leon(config.hf, config.out)
    print(f"written: {config.out}")


# ------------------------------------------------------------------------------------------------ pure conversions

POSITION_OFFSET = 2
"""OPT's position table begins with two rows that no token of a sequence reads."""

POSITIONS = ("positions.weight", "model.decoder.embed_positions.weight")
OUTER = {"embedding.weight": "model.decoder.embed_tokens.weight", "head.weight": "lm_head.weight"}
INNER = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "up": ("fc1",),
    "down": ("fc2",),
}
"""A matrix of our block, and OPT's matrices that its rows are split into."""

FIXED = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "tie_word_embeddings": False,
}
"""What makes an OPT this decoder."""


def to_opt_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's weights under OPT's names; `from_opt_state` is the inverse.

    `blocks.0.qkv.weight` (3D, D) becomes `q_proj`, `k_proj` and `v_proj` (D, D) of layer 0; the position table
    (T, D) gains two rows of zeros on top.
    """
    opt = {theirs: state[ours] for ours, theirs in OUTER.items()}
    positions_TD = state[POSITIONS[0]]
    opt[POSITIONS[1]] = torch.cat(
        [positions_TD.new_zeros(POSITION_OFFSET, positions_TD.shape[1]), positions_TD]
    )
    for name, weight in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", name):
            layer, names = match[1], INNER[match[2]]
            for theirs, part in zip(names, weight.chunk(len(names)), strict=True):
                opt[_opt_name(layer, theirs)] = part.contiguous()
    return opt


def from_opt_state(opt: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OPT's weights under the decoder's names; the two unused rows of the position table are left out."""
    state = {ours: opt[theirs] for ours, theirs in OUTER.items()}
    state[POSITIONS[0]] = opt[POSITIONS[1]][POSITION_OFFSET:].contiguous()
    for layer in range(layers):
        for ours, names in INNER.items():
            parts = [opt[_opt_name(layer, theirs)] for theirs in names]
            state[f"blocks.{layer}.{ours}.weight"] = (
                torch.cat(parts) if len(parts) > 1 else parts[0]
            )
    return state


def to_opt_config(config: Transformer.Config, vocab_size: int) -> dict[str, Any]:
    """Arguments of `OPTConfig` for a decoder of that shape."""
    return {
        **{
            key: value
            for key, value in FIXED.items()
            if key not in ("model_type", "_remove_final_layer_norm")
        },
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.width // config.head_size,
        "ffn_dim": config.mlp_ratio * config.width,
        "max_position_embeddings": config.seq_len,
        "init_std": config.init_std,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "pad_token_id": Vocab.pad,
        "bos_token_id": Vocab.eos,  # one token opens and closes a sample
        "eos_token_id": Vocab.eos,
    }


def from_opt_config(opt: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the decoder that an OPT is, from the OPT's config with all its defaults.

    Dropout is not looked at: it has no weights.

    Raises:
        UserError: for an OPT of another shape, naming the key and its allowed value.
    """
    width, heads, hidden = (
        _whole(opt, key) for key in ("hidden_size", "num_attention_heads", "ffn_dim")
    )
    for key, allowed in {**FIXED, "word_embed_proj_dim": width}.items():
        if opt[key] != allowed:
            raise UserError(f"{key} is {json.dumps(opt[key])}; it must be {json.dumps(allowed)}")
    if width < 1 or heads < 1 or width % heads:
        raise UserError(f"num_attention_heads is {heads}; it must divide hidden_size {width}")
    if hidden % width:
        raise UserError(f"ffn_dim is {hidden}; it must be a multiple of hidden_size {width}")
    return {
        "layers": _whole(opt, "num_hidden_layers"),
        "width": width,
        "head_size": width // heads,
        "mlp_ratio": hidden // width,
        "seq_len": _whole(opt, "max_position_embeddings"),
        "init_std": opt["init_std"],
    }


def _whole(opt: Mapping[str, Any], key: str) -> int:
    if type(opt[key]) is not int:
        raise UserError(f"{key} is {json.dumps(opt[key])}; it must be a whole number")
    return opt[key]


def _opt_name(layer: int | str, name: str) -> str:
    return f"model.decoder.layers.{layer}.{name}.weight"


# ------------------------------------------------------------------------------------------------ run -> hf


def to_opt(model: Transformer, **config: Any) -> Any:
    """The decoder as an `OPTForCausalLM` in evaluation mode; `config` goes to `OPTConfig`.

    Loaded, not built: below version 5, transformers fails to initialise norms without weights.
    """
    transformers = _transformers()
    opt_config = transformers.OPTConfig(**to_opt_config(model.config, model.vocab_size), **config)
    state = to_opt_state(model.state_dict())
    return transformers.OPTForCausalLM.from_pretrained(
        None, config=opt_config, state_dict=state
    ).eval()


def export_to_hf(run_folder: Path, out: Path, opening: Opening | None = None) -> None:
    """Writes a run's decoder as `OPTForCausalLM`, with its text tokenizer, `cm3leon.json` and a README.

    What was written is read again and has to give the same logits before the folder gets its name.

    Raises:
        UserError: for a run without a finished pretraining, another class of model, or a folder `out` that is taken.
        RuntimeError: if the OPT's logits differ.
    """
    _transformers()
    run, model = _finished(run_folder, opening)
    with _new_folder(out) as folder:
        to_opt(model).save_pretrained(folder)
        shutil.copyfile(run.stage("text_tokenizer", TOKENIZER) / TOKENIZER, folder / TOKENIZER)
        # The plain class runs tokenizer.json as it is; the one that OPT names would replace its pipeline.
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        extras = {
            "cm3leon": __version__,
            **run.section("model"),
            "vocab_size": model.vocab_size,
            "ids": run.vocab.ranges(),
            "experiment": to_mapping(run.experiment),
        }
        write_json(folder / EXTRAS, extras)
        (folder / "README.md").write_text(_readme(run.vocab, model.config.seq_len))
        use_umask(folder)
        written = _load_opt(folder)
        returned = from_opt_state(written.state_dict(), model.config.layers)
        if not all(
            torch.equal(weight, returned[name]) for name, weight in model.state_dict().items()
        ):
            raise RuntimeError("the exported weights are not those of the run")
        _verify(model, written)


def _finished(folder: Path, opening: Opening | None) -> tuple[Run, Transformer]:
    """A run and its trained decoder, in evaluation mode on the CPU."""
    run = open_run(
        folder, opening, needs=("text_tokenizer", "pretraining"), device=torch.device("cpu")
    )
    made = read_json(run.stage("pretraining", "config.json") / "config.json")
    if made != {**run.section("model"), "vocab_size": run.vocab.size}:
        raise UserError(
            f"run: the model of {folder / 'config.yaml'} is not the one that was trained; run it to its end"
        )
    if MODELS.get(run.experiment.model.name) is not Transformer:
        raise UserError(
            f"run: the model {run.experiment.model.name} has no form in hf; only cm3leon and its presets do"
        )
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


# ------------------------------------------------------------------------------------------------ hf -> cm3leon


def export_to_cm3leon(hf: Path, out: Path) -> None:
    """Writes `model.safetensors` and `config.json` as the pretraining stage does, from an `OPTForCausalLM`.

    Weights in half precision become float32, and a LoRA adapter of PEFT in the folder is merged into them. The name of
    the model and the settings that OPT lacks come from `cm3leon.json` where there is one.

    Raises:
        UserError: for a folder that holds no OPT, an OPT that is not this decoder, or a folder `out` that is taken.
    """
    _transformers()
    section = _model_section(hf)
    opt = _load_opt(hf)
    content = {"model": section, "vocab_size": opt.config.vocab_size}
    with torch.device("meta"):
        model = MODELS.build(section, vocab_size=content["vocab_size"]).eval()
    model.load_state_dict(from_opt_state(opt.state_dict(), section["layers"]), assign=True)
    _verify(model, opt)
    with _new_folder(out) as folder:
        save_weights(folder / WEIGHTS, model)
        write_json(folder / "config.json", content)


def _model_section(hf: Path) -> dict[str, Any]:
    """The model section of an exported OPT: its shape by `config.json`, the rest by `cm3leon.json` or by default."""
    file = hf / "config.json"
    if not file.is_file():
        raise UserError(f"hf: {file} does not exist; hf is the folder of an OPTForCausalLM")
    given = read_json(file)
    if given.get("model_type") != FIXED["model_type"]:
        raise UserError(
            f'hf: {file}: model_type is {json.dumps(given.get("model_type"))}; it must be "opt"'
        )
    try:
        full = _transformers().OPTConfig.from_dict(given).to_dict()
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


# ------------------------------------------------------------------------------------------------ both ways


@torch.inference_mode()
def _verify(model: Transformer, opt: Any) -> None:
    """Raises RuntimeError if both do not give the same logits for random ids."""
    shape = (2, min(model.config.seq_len, 64))
    ids_BT = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    # The mask is said aloud: left to itself, `generate` takes a <pad> inside a sequence for padding.
    ours_BTV, theirs_BTV = model(ids_BT), opt(ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    difference = float((ours_BTV - theirs_BTV).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours_BTV.abs().max()))
    if not difference <= allowed:  # so that NaN does not pass
        raise RuntimeError(
            f"the logits of the two forms differ by {difference:.2g}, {allowed:.2g} is allowed"
        )


def _load_opt(folder: Path) -> Any:
    """The OPT of a folder, float32, in evaluation mode, with the adapter that PEFT may have left beside it merged.

    Raises:
        UserError: for weights that are missing, may not be read or do not fit, and an adapter that cannot be merged.
    """
    check_folder_readable(folder)
    with _without_adapter(folder) as plain:
        try:
            opt, report = _transformers().OPTForCausalLM.from_pretrained(
                plain, local_files_only=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = str(error).replace(str(plain), str(folder))
            raise UserError(f"hf: the weights in {folder} cannot be loaded: {reason}") from error

    # The library fills missing weights with random numbers, and leaves unknown ones out.
    for what, keys in (("lack", "missing_keys"), ("have the unknown", "unexpected_keys")):
        names = sorted(report[keys])
        if names:
            raise UserError(
                f"hf: the weights in {folder} {what} {', '.join(names[:5])}{', ...' if names[5:] else ''}"
            )
    opt = opt.float().eval()
    if has_adapter(folder):
        opt.load_state_dict(merge_adapter(folder, opt.state_dict()))
    return opt


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """A folder as if it held no adapter: the library applies one only if PEFT is installed, and never merges it."""
    if not has_adapter(folder):
        yield folder
        return
    with TemporaryDirectory() as made:
        for file in folder.iterdir():
            if file.name not in ADAPTERS:
                (Path(made) / file.name).symlink_to(file.resolve())
        yield Path(made)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
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


def _transformers() -> Any:
    """The library, imported when it is needed: it is large, and nothing else asks for it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "export needs the package transformers; install it with: pip install transformers"
        ) from error
    return transformers
