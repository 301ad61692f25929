"""Low-rank adaptation: at first the same function, in training few gradients, at the end merged."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from processes import finish
from rank_worker import SHAPE, VOCAB
from test_distributed import assert_alike, figures, start, trained, wait_for

from cm3leon.config import from_mapping
from cm3leon.models.lora import add_lora, lora_scale, merged
from cm3leon.models.pretrained import load_model
from cm3leon.models.recompute import recompute
from cm3leon.models.transformer import Transformer
from cm3leon.stages.pretraining import load_checkpoint
from cm3leon.training.average import WeightAverage
from cm3leon.training.checkpoint import Checkpoints, training_tensors
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.distributed import Ranks
from cm3leon.training.optimizer import new_optimizer
from cm3leon.training.parallel import distributed
from cm3leon.types import UserError
from cm3leon.weights import save_weights

pytestmark = pytest.mark.stack


def decoder() -> Transformer:
    torch.manual_seed(0)
    config = Transformer.Config(layers=2, width=32, head_size=16, seq_len=24, init_std=0.1)
    model = Transformer(config, vocab_size=50)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


IDS_BT = torch.arange(36).view(2, 18)


def moved(model: Transformer) -> None:
    """Draw the adapters' second matrices, which are 0 at first, so that they have an effect."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(weight, std=0.1, generator=generator)


def test_it_begins_as_the_same_function_and_trains_the_adapters_alone() -> None:
    model = decoder()
    expected_BTV = model(IDS_BT)
    add_lora(model, 3, 12.0)
    torch.testing.assert_close(model(IDS_BT), expected_BTV)
    assert lora_scale(model) == 4.0

    # The first layer's input needs no gradient, yet recomputation must give its adapters theirs.
    recompute(model, "full")
    model(IDS_BT).square().mean().backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    parts = itertools.product((0, 1), ("qkv", "out", "up", "down"), "ab")
    assert with_gradient == {f"blocks.{layer}.{matrix}.lora_{ab}" for layer, matrix, ab in parts}
    assert model.blocks[1].up.lora_b.grad.abs().max() > 0


def test_merged_weights_are_the_formula_under_the_old_names() -> None:
    plain, model = decoder(), decoder()
    add_lora(model, 3, 6.0)
    moved(model)
    state = merged(model.state_dict(), 2.0)
    assert list(state) == list(plain.state_dict())

    # W + scale * B A, in float64.
    adapted = model.blocks[1].qkv
    change = 2 * adapted.lora_b.double() @ adapted.lora_a.double()
    expected = plain.blocks[1].qkv.weight.double() + change
    found = state["blocks.1.qkv.weight"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)

    plain.load_state_dict(state)
    torch.testing.assert_close(plain(IDS_BT), model(IDS_BT), atol=1e-5, rtol=1e-5)
    assert lora_scale(plain) is None


def test_frozen_layers_in_bf16_compute_the_same_up_to_its_rounding() -> None:
    model, halved = decoder(), decoder()
    for each, dtype in ((model, None), (halved, torch.bfloat16)):
        torch.manual_seed(2)
        add_lora(each, 3, 6.0, frozen_dtype=dtype)
        moved(each)

    adapters = {weight.dtype for name, weight in halved.named_parameters() if "lora" in name}
    assert adapters == {torch.float32}
    assert halved.blocks[0].up.weight.dtype == torch.bfloat16
    assert halved.embedding.weight.dtype == torch.float32

    # Exactly the same, as autocast rounds the weights of the other one in the same way.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BTV, expected_BTV = halved(IDS_BT), model(IDS_BT)
    torch.testing.assert_close(found_BTV, expected_BTV, atol=0, rtol=0)
    assert {weight.dtype for weight in merged(halved.state_dict(), 2.0).values()} == {torch.float32}


def test_checkpoints_hold_what_is_trained() -> None:
    model = decoder()
    add_lora(model, 3, 6.0)
    tensors = training_tensors(model, new_optimizer(model, DecoderTrainingConfig()))
    assert len(tensors["model"]) == len(tensors["optimizer"]) == 2 * 4 * 2
    assert all("lora" in name for name in tensors["model"])


@pytest.mark.parametrize("average_decay", [None, 0.5])
def test_the_weights_of_a_checkpoint_are_those_of_its_adapters_added_in(
    tmp_path: Path, average_decay: float | None
) -> None:
    """A run folder with a checkpoint of step 7, and the run that its training started from."""
    base, folder = decoder(), tmp_path / "tuned"
    for run in (tmp_path / "base", folder):
        (run / "pretraining").mkdir(parents=True)
        save_weights(run / "pretraining" / "model.safetensors", base)
        section = {"name": "cm3leon_tiny", "layers": 2, "width": 32, "head_size": 16, "seq_len": 24}
        text = json.dumps({"model": section, "vocab_size": 50})
        (run / "pretraining" / "config.json").write_text(text)

    config = DecoderTrainingConfig(
        lora_rank=3, lora_alpha=6.0, start=tmp_path / "base", average_decay=average_decay
    )

    # The checkpoint holds the adapters alone.
    tuned = decoder()
    add_lora(tuned, 3, 6.0)
    moved(tuned)
    average = WeightAverage(tuned, average_decay) if average_decay else None
    writer = Checkpoints(folder / "pretraining", Ranks(torch.device("cpu")), keep=1)
    tensors = training_tensors(tuned, new_optimizer(tuned, config), average)
    writer.save(tensors, {"step": 7, "data": {}}, wait=True)

    model = load_model(folder, verify=False)
    load_checkpoint(model, config, folder, 7, verify=False)

    expected = merged(tuned.state_dict(), 2.0)
    assert all(torch.equal(expected[name], each) for name, each in model.state_dict().items())
    assert not torch.equal(model.blocks[0].qkv.weight, base.blocks[0].qkv.weight)
    with pytest.raises(UserError, match=r"^checkpoint is 8, which .* does not have; it has 7 "):
        load_checkpoint(model, config, folder, 8, verify=False)

    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"adapters of the run \S*/base \(training.start\), which"):
        load_checkpoint(model, config, folder, 7, verify=False)


FIELDS = {"lora_rank": 4, "learning_rate": 0.1}


@pytest.mark.once
def test_two_ranks_are_one_and_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    weights = trained(tmp_path / "alone", None, fields=FIELDS)
    assert not any("lora" in name for name in weights)

    together = trained(tmp_path / "together", 2, fields=FIELDS)
    assert_alike(figures(tmp_path / "together"), figures(tmp_path / "alone"))
    losses = [numbers[0] for numbers in figures(tmp_path / "alone").values()]
    assert losses[-1] != losses[0]
    for name, weight in weights.items():
        torch.testing.assert_close(together[name], weight, atol=1e-4, rtol=1e-3)

    # Stopped by a signal after its first checkpoint.
    processes = start(tmp_path / "stopped", None, pause=0.2, fields=FIELDS)
    wait_for(tmp_path / "stopped", 1)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes) == [75]
    again = trained(tmp_path / "stopped", None, fields=FIELDS)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "alone")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_adapters_begin_as_if_the_decoder_had_been_built_whole(tmp_path: Path) -> None:
    """Weights come from a file, and adapters from the random stream.

    In the stream they follow the numbers of the model's own weights, which are skipped.
    """
    torch.manual_seed(3)
    built = Transformer(Transformer.Config(**SHAPE), vocab_size=VOCAB.size)
    add_lora(built, 3, 6.0)

    # Weights of another seed, so that it shows where each came from.
    file = tmp_path / "start.safetensors"
    torch.manual_seed(4)
    given = Transformer(Transformer.Config(**SHAPE), vocab_size=VOCAB.size).state_dict()
    save_weights(file, given)

    config = DecoderTrainingConfig(lora_rank=3, lora_alpha=6.0, precision="float32")
    model = distributed(
        lambda: pytest.fail("nobody builds it whole"),
        lambda: Transformer(Transformer.Config(**SHAPE), vocab_size=VOCAB.size),
        config,
        Ranks(torch.device("cpu")),
        random_state=torch.Generator().manual_seed(3).get_state(),
        weights=file,
    )

    for name, weight in model.state_dict().items():
        expected = built.state_dict()[name] if "lora" in name else given[name]
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("fields", [{}, {"start": "runs/x", "start_with": "everything"}])
def test_there_must_be_weights_to_adapt(fields: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match="lora_rank adapts trained weights: set start to a run folder"
    ):
        from_mapping(DecoderTrainingConfig, {"lora_rank": 8, **fields}, "training")

    given = {"lora_rank": 8, "start": "runs/x"}
    assert from_mapping(DecoderTrainingConfig, given, "training").lora_alpha == 16
