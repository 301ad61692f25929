"""The command `plan`: its figures by hand, recipes that fit, and mistakes in one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cm3leon.commands.plan import Options, Plan, plan
from cm3leon.experiment import is_sweep, list_experiments, load_experiment
from cm3leon.run import main
from cm3leon.training.costs import GPUS
from cm3leon.types import UserError

GPU_OF = {"24gb": "rtx4090", "80gb": "h100"}
RECIPES = [
    name
    for name in list_experiments()
    if name.startswith(("pretrain_", "sft_")) and not is_sweep(name)
]


def planned(name: str, *overrides: str, **fields: Any) -> Plan:
    return plan(load_experiment(name, overrides), Options(experiment=name, **fields))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_where_it_says(name: str) -> None:
    gpu = next((gpu for suffix, gpu in GPU_OF.items() if name.endswith(suffix)), "a100")
    made = planned(name, gpu=gpu)
    assert made.fits
    assert made.memory.total <= made.usable_bytes < made.gpu_bytes == GPUS[gpu].memory


def test_the_7b_by_hand() -> None:
    made = planned("pretrain_7b", "launcher.nodes=64", gpu="h200", mfu=0.4)
    assert made.parameters == 6_996_099_072
    assert made.parameters_without_embeddings == 6_442_450_944

    # Six for each parameter, the head's included. Attention takes twelve for each layer, channel
    # and position that is seen, and on average a token sees half of the 4096 positions.
    flops = 6 * (6_442_450_944 + 65_536 * 4096) + 6 * 32 * 4096 * 4096
    assert made.flops_per_token == flops

    # 512 GPUs at 40 % of their peak.
    rate = 512 * 989.4e12 * 0.4 / flops
    assert made.tokens_per_second == pytest.approx(rate)
    assert made.tokens == 286_102 * 2**23
    assert made.days == pytest.approx(286_102 * 2**23 / rate / 86_400)
    assert made.gpu_hours == pytest.approx(24 * 512 * made.days)

    assert made.paper_tokens == 2.4e12
    assert made.paper_days == pytest.approx(2.4e12 / rate / 86_400)

    # Weights, and two moments of each, are shared by the eight GPUs of a node, in float32.
    assert made.memory.weights == pytest.approx(4 * 6_996_099_072 / 8)
    assert made.memory.optimizer == 2 * made.memory.weights
    assert made.checkpoint_bytes == 12 * 6_996_099_072
    assert made.checkpoints == 2 + 286_102 // 20_000
    assert made.data_bytes["tokens"] == pytest.approx(0.7293e12)


@pytest.mark.parametrize(
    ("name", "nodes"), [("pretrain_350m", 32), ("pretrain_7b", 64), ("sft_760m", 8), ("sft_7b", 16)]
)
@pytest.mark.parametrize("gpu", ["a100", "h100", "h200"])
def test_recipes_shard_inside_a_node_which_is_best_and_fits(
    name: str, nodes: int, gpu: str
) -> None:
    made = planned(name, gpu=gpu)
    assert made.replicas == made.nodes == made.best_replicas == nodes
    assert made.fits

    (own,) = [each for each in made.layouts if each.replicas == nodes]
    assert (own.memory, own.shards) == (made.memory.total, 8)
    assert own.step_seconds < 1.05 * made.compute_seconds
    assert own.step_seconds == made.compute_seconds + own.exposed_seconds


@pytest.mark.parametrize("name", ["sft_chameleon_7b", "sft_anole_7b"])
def test_chameleon_is_adapted_on_24_gb_and_drawn_with_there(name: str) -> None:
    made = planned(name, gpu="rtx4090")

    assert made.vocabulary == 65_536
    assert made.trained_parameters == 32 * 16 * (16_384 + 8192 + 3 * (4096 + 11_008))
    assert made.fits

    assert made.drawing.ids == 1024
    # Keys and values of both streams, in bf16.
    assert made.drawing.cache == 2 * 1024 * 2 * 32 * 4096 * 2
    # Each step reads all weights, and on average half of the cache.
    read = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 2 * 65_536 * 4096
    seconds = 1024 * (read + made.drawing.cache / 2) / 1008e9
    assert made.drawing.seconds["bf16"] == pytest.approx(seconds)
    assert made.drawing.weights["bf16"] + made.drawing.full_cache < made.usable_bytes


def test_all_of_chameleon_is_trained_on_eight_gpus_and_on_no_small_one() -> None:
    assert planned("sft_chameleon_7b_8x80gb", gpu="h100").fits
    whole = planned("sft_chameleon_7b", "training.lora_rank=0", gpu="rtx4090")
    assert not whole.fits
    assert set(whole.largest_micro_batch.values()) == {0}


def test_slower_links_are_seen() -> None:
    usual = planned("pretrain_7b", gpu="h100", across=50.0)
    slow = planned("pretrain_7b", gpu="h100", across=1.0)

    assert slow.layouts[0].across_bytes == usual.layouts[0].across_bytes
    assert slow.layouts[0].step_seconds > 2 * usual.layouts[0].step_seconds
    assert planned("pretrain_7b", gpu="h100", inside=1.0).links.inside == 1e9


def test_the_largest_micro_batch_is_the_largest() -> None:
    found = planned("pretrain_7b_8x80gb").largest_micro_batch
    assert 0 < found["none"] <= found["selective"] < found["full"]
    for choice, size in found.items():
        words = [f"training.activation_checkpointing={choice}"]
        assert planned("pretrain_7b_8x80gb", *words, f"training.micro_batch={size}").fits
        assert not planned("pretrain_7b_8x80gb", *words, f"training.micro_batch={size + 1}").fits

    # Where not even one block fits, what that block needs is said.
    one = planned("sft_7b_24gb", "training.lora_rank=0", gpu="rtx4090")
    assert set(one.largest_micro_batch.values()) == {0}
    assert not one.fits
    settings = [
        "training.lora_rank=0",
        "training.activation_checkpointing=full",
        "training.micro_batch=1",
    ]
    assert one.least_memory == planned("sft_7b_24gb", *settings, gpu="rtx4090").memory.total


def test_checkpoints_hold_the_average_of_the_weights_too() -> None:
    made = planned("pretrain_350m", "training.average_decay=0.999")
    assert made.checkpoint_bytes == 16 * 440_401_920


def test_the_command_says_it_to_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    # For programs, then for people, then a plan that does not fit.
    words = ["plan", "experiment=pretrain_7b", "launcher.nodes=64", "gpu=h200"]
    assert main([*words, "format=json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["parameters"] == 6_996_099_072
    made = planned("pretrain_7b", "launcher.nodes=64", gpu="h200")
    assert content["memory"]["total"] == made.memory.total

    assert main([*words, "documents=1000"]) == 0
    said = capsys.readouterr().out
    assert "450 GB/s inside a node, 50 GB/s to others" in said
    assert "*       64       8  48.00 GB   6.89 GB" in said
    assert "the settings' layout (*) is the best that fits" in said
    assert "parameters                6,996,099,072 (6,442,450,944 without embeddings)" in said
    assert "fits: 129.72 GB of 141.00 GB can be used" in said
    assert "1,000 pairs               0.00 GB" in said

    assert main(["plan", "experiment=pretrain_7b", "launcher=here", "gpu=l4"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    least = planned("pretrain_7b", "launcher=here", gpu="l4").least_memory / 1e9
    one_block = f"one block at a time with full checkpointing takes {least:.2f} GB"
    assert f"{one_block}, of 22.08 GB that can be used" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gpu=h20"], "gpu is h20, which is not known; did you mean h200?"),
        (["mfu=1.5"], "mfu is 1.5; it must be a share of the peak"),
        (["mfu=0"], "mfu is 0"),
        (["format=xml"], 'format is "xml"; it must be one of text, json'),
        (
            ["launcher.nodes=60"],
            "a step has 2048 blocks of 4096 tokens, which 480 GPUs cannot share evenly; change "
            "training.batch_size (or training.batch_tokens, if it is set) or the number of GPUs",
        ),
        (
            ["training.replicas=3"],
            "launcher has 512 GPUs, which training.replicas 3 does not divide",
        ),
        (
            ["training.optimizer=adamw_8bit"],
            "training.optimizer is adamw_8bit, which is for one GPU",
        ),
        (
            ["training.precision=float32"],
            "training.precision is float32, which cannot be planned for; set "
            "training.precision=bf16",
        ),
        (
            ["training.batch_tokens=5000"],
            "training.batch_tokens is 5000; it must be a multiple of model.seq_len 4096",
        ),
    ],
)
def test_mistakes_are_said(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "experiment=pretrain_7b", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_another_model_cannot_be_planned_for(registries: None) -> None:
    from dataclasses import dataclass

    from cm3leon.models.base import Model
    from cm3leon.registry import MODELS

    @MODELS.register("other")
    class Other(Model):
        """Another model."""

        @dataclass(kw_only=True)
        class Config:
            seq_len: int = 4096
            """Positions."""

        def __init__(self, config: Config, *, vocab_size: int) -> None:
            super().__init__()

    # The planner asks the model what its layers hold, and this one does not tell.
    with pytest.raises(
        UserError, match=r"model\.name is other, which cannot be planned for: it does not say"
    ):
        planned("pretrain_7b", "model=other")
