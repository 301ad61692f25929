"""A run's LoRA as an adapter of PEFT, for the exported model that the run started from.

Some matrices of ours are several matrices of transformers, one below the other: the queries, keys
and values of a layer are one matrix `qkv`. LoRA has one pair A (r, in) and B (out, r) for it. In
PEFT each of the three gets the same A, and its own rows of B:

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
        UserError: for a run that was not trained by LoRA.
    """
    run, form = exported.run, exported.form
    training = run.experiment.training
    if not training.lora_rank:
        raise UserError(
            f"run: {run.folder} was trained whole, without adapters (training.lora_rank); "
            "export it with to=hf"
        )
    stage = run.stage("pretraining")
    if not (stage / ADAPTER).is_file():
        raise UserError(
            f"run: {stage} has no {ADAPTER}, as it was trained by an older version; train it "
            "again, or export the merged weights with to=hf"
        )
    tensors = dict(_peft_tensors(exported, read_weights(stage / ADAPTER)))

    # PEFT finds adapted matrices by their short names, such as q_proj; all layers have the same.
    adapted = set()
    for names in form.inner.values():
        for name in names:
            matrix = name.removesuffix(".weight")
            if f"{PREFIX}{form.named(0, matrix)}.lora_A.weight" in tensors:
                adapted.add(matrix.rpartition(".")[2])

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
    """The tensors of the adapter by PEFT's names: of each matrix, A and then B."""
    form, config = exported.form, exported.run.experiment.model.config
    for layer in range(config.layers):
        for ours, names in form.inner.items():
            prefix = f"blocks.{layer}.{ours.removesuffix('weight')}"
            if f"{prefix}lora_a" not in adapter:
                continue

            # Each tensor gets memory of its own, as safetensors stores none that share it.
            first, second = adapter[f"{prefix}lora_a"], adapter[f"{prefix}lora_b"]
            for name, rows in zip(names, split_rows(second, len(names), config), strict=True):
                module = PREFIX + form.named(layer, name.removesuffix(".weight"))
                yield f"{module}.lora_A.weight", first.clone()
                yield f"{module}.lora_B.weight", rows.clone()
