"""What every registered model promises; a new model is covered as soon as it is registered.

Each test asks the model what it offers (`matrices`, `share`, `layer_bytes`); no test asks which
model it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finish, group
from share_worker import held, new_model, results
from test_contracts import every, small
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cm3leon.decoders.footprint import footprint
from cm3leon.models.base import Model
from cm3leon.models.lora import add_lora, merged
from cm3leon.models.pretrained import load_model
from cm3leon.models.serving import keep_weights, share
from cm3leon.objectives.loss import linear_cross_entropy
from cm3leon.registry import MODELS
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.costs import flops_per_token, model_flops
from cm3leon.training.distributed import Ranks
from cm3leon.training.memory import lora_parameters, parameters, training_memory
from cm3leon.training.optimizer import new_optimizer
from cm3leon.training.parallel import distributed
from cm3leon.types import UserError
from cm3leon.weights import save_weights

pytestmark = pytest.mark.stack

V, T = 96, 20
IDS_BT = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
SHAPE = {"layers": 2, "width": 64, "kv_heads": 2, "head_size": 16, "seq_len": 32}


def built(name: str, **fields: Any) -> Model:
    """A small model of that name, each of whose parameters shows in the logits.

    The test is skipped where a package that the model needs is missing.
    """
    missing = MODELS.get(name).missing()
    section = dict(small(MODELS, name))
    section |= {key: value for key, value in SHAPE.items() if key in section}
    if missing:
        with pytest.raises(UserError, match=re.escape(missing)):
            MODELS.build(section, vocab_size=V)
        pytest.skip(f"needs {missing}")

    model = MODELS.build({**section, **fields}, vocab_size=V)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        center = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, mean=center, std=0.2, generator=generator)
    return model.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@every(MODELS)
def test_a_prefix_that_rows_share_and_their_steps_give_the_same_logits(
    registry: Any, name: str
) -> None:
    # Two rows begin with the same six tokens and go on differently.
    model = built(name)
    shared_T, tails_BT = IDS_BT[0, :6], IDS_BT[:2, 6:]
    whole_BTV = model(torch.cat([shared_T.expand(2, 6), tails_BT], 1))
    assert whole_BTV.shape == (2, T, V)

    cache = model.new_cache(groups=1, width=2, prefix=6, tail=T)
    bytes_ = model.cache_bytes(groups=1, width=2, prefix=6, tail=T)
    assert cache.nbytes() == bytes_ == 4 * model.cache_numbers * (6 + 2 * T)

    # The prefix is computed once for both rows, then their tails, then two tokens a step.
    with torch.inference_mode():
        attend = cache.prefix_pass(torch.tensor([0]), torch.tensor([6]))
        prefix_BTV = model(shared_T[None], position_BT=attend.positions(6), attend=attend)
        close(prefix_BTV[0], whole_BTV[0, :6])

        rows, lengths = torch.tensor([[[0], [1]]]), torch.tensor([[4, 4]])
        attend = cache.tail_pass(torch.tensor([0]), rows, lengths)
        tail_BTV = model(tails_BT[:, :4], position_BT=attend.positions(4), attend=attend)
        close(tail_BTV, whole_BTV[:, 6:10])

        for t in range(4, tails_BT.shape[1] - 1, 2):
            attend = cache.step_pass(1, 6, T, tokens=2)
            step_BTV = model(tails_BT[:, t : t + 2], position_BT=attend.positions(2), attend=attend)
            close(step_BTV, whole_BTV[:, 6 + t : 8 + t])
            cache.tail_length_R += 2


@every(MODELS)
def test_packed_samples_are_as_alone(registry: Any, name: str) -> None:
    # Three samples in one row, each with positions that begin at zero.
    model = built(name)
    lengths = (5, 8, 7)
    sample_1T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    position_1T = torch.cat([torch.arange(length) for length in lengths])[None]

    packed_TV = model(IDS_BT[:1], position_BT=position_1T, sample_BT=sample_1T)[0]
    alone = [model(ids_1T)[0] for ids_1T in IDS_BT[:1].split(lengths, 1)]
    close(packed_TV, torch.cat(alone))

    packed_TV.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every(MODELS)
def test_adapters_begin_as_nothing_are_counted_and_are_added_in(registry: Any, name: str) -> None:
    plain, adapted = built(name), built(name)
    if not adapted.matrices:
        with pytest.raises(UserError, match="have no matrices to adapt"):
            add_lora(adapted, 2, 4.0)
        return

    # New adapters change nothing, and only they are trained.
    planned = lora_parameters(adapted, 2)
    add_lora(adapted, 2, 4.0)
    close(adapted(IDS_BT), plain(IDS_BT))
    trained = {key: weight for key, weight in adapted.named_parameters() if weight.requires_grad}
    assert sum(weight.numel() for weight in trained.values()) == planned

    # Once they are trained they do change the logits; the merged matrices give the same ones.
    for key, weight in trained.items():
        if key.endswith("lora_b"):
            torch.nn.init.normal_(weight, std=0.1)
    assert not torch.allclose(adapted(IDS_BT), plain(IDS_BT), atol=1e-2)
    plain.load_state_dict(merged(adapted.state_dict(), 2.0))
    close(adapted(IDS_BT), plain(IDS_BT))


@every(MODELS)
@torch.inference_mode()
def test_weights_in_fewer_bits_are_close_and_take_what_is_planned(registry: Any, name: str) -> None:
    plain, small = built(name), built(name)
    planned = footprint(plain, 16, 1e9)
    assert planned.full_cache == 2 * 2 * plain.cache_numbers * plain.seq_len

    # In bf16 the model computes what autocast would compute, to the bit.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_BTV = plain(IDS_BT)
        keep_weights(plain, "bf16")
        torch.testing.assert_close(plain(IDS_BT), expected_BTV, atol=0, rtol=0)

    # The plan may be off by the blocks' vectors (norms, biases), and no more.
    held_bytes = sum(weight.nbytes for weight in plain.parameters())
    vectors = sum(weight.nbytes for weight in plain.blocks.parameters() if weight.dim() == 1)
    assert planned.weights["bf16"] == pytest.approx(held_bytes, abs=vectors + 1024)

    if not small.matrices:
        assert "int8" not in planned.weights
        with pytest.raises(UserError, match="does not offer; take float32 or bf16"):
            keep_weights(small, "int8")
        return

    assert planned.weights["bf16"] - planned.weights["int8"] == sum(
        getattr(block, matrix).weight.numel() for block in small.blocks for matrix in small.matrices
    )

    pytest.importorskip("torchao")
    keep_weights(small, "int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BTV = small(IDS_BT).float().log_softmax(-1)
    expected_BTV = expected_BTV.float().log_softmax(-1)
    assert 0 < (expected_BTV.exp() * (expected_BTV - found_BTV)).sum(-1).mean() < 0.05  # nats


@every(MODELS)
def test_flops_are_those_that_torch_counts(registry: Any, name: str) -> None:
    """Attention by its formula computes all pairs of positions, twice as many as we count.

    We leave out the half that is masked.
    """
    model = built(name, attention="naive")
    count = parameters(model)
    assert count.total == sum(weight.numel() for weight in model.parameters())
    assert min(vars(count).values()) > 0

    with FlopCounterMode(display=False) as counted:
        model(IDS_BT).sum().backward()
    products = counted.get_flop_counts()["Global"]
    attention = 6 * model.config.layers * model.heads * model.config.head_size * 3 * T**2

    # The gradient of the first layer's input is needed for the embeddings, so each product is
    # counted with its three parts: forward, and both gradients.
    flops = model_flops(model, torch.zeros(3, T, dtype=torch.int64))
    assert products[torch.ops.aten.mm] == flops - attention
    assert products[torch.ops.aten.bmm] == 2 * attention

    whole = model_flops(model, torch.zeros(1, model.seq_len, dtype=torch.int64))
    assert flops_per_token(model) == pytest.approx(whole / model.seq_len)


@every(MODELS)
def test_a_training_step_of_it_is_planned_and_made(registry: Any, name: str) -> None:
    model = built(name)
    config = DecoderTrainingConfig(batch_size=3)
    if model.layer_bytes(sharded=False, frozen=False) is None:
        with pytest.raises(UserError, match="does not say what its layers hold in a training"):
            training_memory(model, config, gpus=1, micro_batch=3)
    else:
        # Recomputing more of the activations keeps less of them.
        kept = []
        for choice in ("none", "selective", "full"):
            planned = DecoderTrainingConfig(batch_size=3, activation_checkpointing=choice)
            memory = training_memory(model, planned, gpus=1, micro_batch=3)
            kept.append(memory.activations)
        assert kept == sorted(kept, reverse=True)

    # One step of AdamW changes every parameter.
    model = distributed(
        lambda: built(name), lambda: built(name), config, Ranks(torch.device("cpu"))
    )
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    optimizer = new_optimizer(model, config)
    ids_N, weight_N = IDS_BT.flatten(), torch.ones(IDS_BT.numel())

    loss = model(
        IDS_BT,
        readout=lambda hidden_BTD, head: linear_cross_entropy(
            hidden_BTD.flatten(0, 1), head.weight, ids_N, weight_N
        )[0],
    )

    loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[key], weight) for key, weight in model.named_parameters())


@every(MODELS)
@torch.inference_mode()
def test_it_comes_back_from_its_files_bit_for_bit(registry: Any, name: str, tmp_path: Path) -> None:
    model = built(name)
    section = {"name": name, **{k: v for k, v in vars(model.config).items() if v is not None}}
    save_weights(tmp_path / "model.safetensors", model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"model": section, "vocab_size": V}))
    assert torch.equal(load_model(tmp_path)(IDS_BT), model(IDS_BT))


def test_three_ranks_answer_as_one() -> None:
    """Three ranks that share a model give the answers and log-likelihoods of one process.

    The answers are guided. A model that ranks cannot share refuses it.
    """
    alone: dict[str, Model] = {}
    for name in MODELS.names():
        if MODELS.get(name).missing():
            continue
        model = new_model(name)
        if type(model).share is Model.share:
            with pytest.raises(UserError, match="cannot share the layers of a"):
                share(model, rank=0, count=3)
        # Of presets that are the same at this size, one is enough.
        elif model.config not in [each.config for each in alone.values()]:
            alone[name] = model
    assert {"cm3leon", "llama"} <= {MODELS.preset_of(name) or name for name in alone}
    assert "chameleon_34b" in alone

    processes = group("share_worker", [*alone], 3)
    assert finish(processes) == [0, 0, 0]

    found = json.loads(processes[0].said(0).splitlines()[-1])
    for name in alone:
        expected = results(alone[name])
        assert found[name]["answers"] == expected["answers"]
        assert found[name]["scores"] == pytest.approx(expected["scores"], rel=1e-5)
        assert {key: 3 * found[name][key] for key in held(alone[name])} == held(alone[name])
