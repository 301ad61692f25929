"""What LoRA has learned in a run, as an adapter of PEFT for the exported model that the run started from.

A matrix of ours whose rows are those of several matrices there has one pair A (r, in) and B (out, r). There, each of
the several gets the same A, and its rows of B:

    blocks.0.qkv.lora_b (3D, r)  ->  q_proj.lora_B, k_proj.lora_B, v_proj.lora_B (D, r)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from cm3leon.hub.export import Exported
from cm3leon.hub.parts import METADATA
from cm3leon.io import write_json
from cm3leon.models.adapter import PREFIX
from cm3leon.models.form import split_rows
from cm3leon.models.lora import ADAPTER
from cm3leon.types import UserError
from cm3leon.weights import ADAPTERS, read_weights, save_tensors


def write_adapter(exported: Exported, folder: Path, base_model: str | None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        base_model: the exported model that it is for, by its name on the Hub or as a folder.

    Raises:
        UserError: for a run without adapters.
    """
    run, form = exported.run, exported.form
    training = run.experiment.training
    if not training.lora_rank:
        raise UserError(
            f"run: {run.folder} was trained whole, without adapters (training.lora_rank); export to=hf takes it"
        )
    stage = run.stage("pretraining")
    if not (stage / ADAPTER).is_file():
        raise UserError(
            f"run: {stage} has no {ADAPTER}, as it was trained by an older version; train it again, or take the merged "
            "weights with export to=hf"
        )
    tensors = dict(_peft_tensors(exported, read_weights(stage / ADAPTER)))
    matrices = {name for names in form.inner.values() for name in names}
    adapted = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name in matrices
        if f"{PREFIX}{form.named(0, name.removesuffix('.weight'))}.lora_A.weight" in tensors
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": training.lora_rank,
        "lora_alpha": training.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapted),
        "inference_mode": True,
    }
    write_json(folder / ADAPTERS[0], settings)
    save_tensors(folder / ADAPTERS[1], tensors, METADATA)


def _peft_tensors(
    exported: Exported, adapter: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    form, config = exported.form, exported.run.experiment.model.config
    for layer in range(config.layers):
        for ours, names in form.inner.items():
            prefix = f"blocks.{layer}.{ours.removesuffix('weight')}"
            if f"{prefix}lora_a" not in adapter:
                continue
            first, second = adapter[f"{prefix}lora_a"], adapter[f"{prefix}lora_b"]
            for name, rows in zip(names, split_rows(second, len(names), config), strict=True):
                module = PREFIX + form.named(layer, name.removesuffix(".weight"))
                yield f"{module}.lora_A.weight", first.clone()
                yield f"{module}.lora_B.weight", rows.clone()
