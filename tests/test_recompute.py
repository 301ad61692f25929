"""Activation checkpointing gives the same numbers and keeps fewer of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cm3leon.models.recompute import recompute
from cm3leon.models.transformer import Transformer

pytestmark = pytest.mark.stack


def decoder() -> Transformer:
    torch.manual_seed(0)
    config = Transformer.Config(layers=3, width=32, head_size=16, seq_len=64, init_std=0.2)
    model = Transformer(config, vocab_size=50)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model.train()


def step(model: Transformer) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes kept for the backward pass beside the weights."""
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # Two blocks of three samples and a piece of a fourth.
    ids_BT = torch.arange(2 * 64).view(2, 64) % 50
    sample_BT = torch.arange(64).div(20, rounding_mode="floor").expand(2, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids_BT, sample_BT=sample_BT).logsumexp(-1).mean()
    loss.backward()

    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients, sum(kept.values())


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("choice", ["selective", "full"])
def test_the_same_loss_and_gradients(choice: Any) -> None:
    plain_loss, plain, _ = step(decoder())
    model = decoder()

    recompute(model, choice)
    loss, gradients, _ = step(model)

    assert torch.equal(loss, plain_loss)
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


def test_full_keeps_less_and_selective_computes_no_product_twice() -> None:
    kept, products = {}, {}
    for choice in ("none", "selective", "full"):
        model = decoder()
        recompute(model, choice)
        with Products() as counted:
            kept[choice] = step(model)[2]
        products[choice] = counted.count

    assert kept["full"] < 0.5 * kept["none"]
    assert products["selective"] == products["none"]
    # Of the four products in a layer, all but the last are needed again.
    assert products["full"] == products["none"] + 3 * 3


def test_nothing_changes_without_it() -> None:
    model = decoder()
    recompute(model, "none")
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize("choice", ["selective", "full"])
@torch.inference_mode()
def test_a_cache_still_works_and_names_stay(choice: Any) -> None:
    model, ids_BT = decoder().eval(), torch.arange(12)[None]
    names, expected_BTV = list(model.state_dict()), model(ids_BT)
    recompute(model, choice)

    # Eleven tokens as a prefix, then the last one in a step.
    cache = model.new_cache(groups=1, width=1, prefix=11, tail=1)
    attend: Any = cache.prefix_pass(torch.tensor([0]), torch.tensor([11]))
    parts = [model(ids_BT[:, :11], position_BT=attend.positions(11), attend=attend)]
    attend = cache.step_pass(1, 11, 1)
    parts.append(model(ids_BT[:, 11:], position_BT=attend.positions(1), attend=attend))
    found_BTV = torch.cat(parts, 1)
    torch.testing.assert_close(found_BTV, expected_BTV, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names


def test_readout_stands_in_for_the_logits() -> None:
    def readout(hidden_BTD: Tensor, head: Any) -> Any:
        return head(hidden_BTD[:, -1]), hidden_BTD.shape

    model, ids_BT = decoder(), torch.arange(12)[None]
    found = model(ids_BT, readout=readout)
    torch.testing.assert_close(found[0], model(ids_BT)[:, -1])
    assert found[1] == (1, 12, 32)
