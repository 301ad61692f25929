"""Weights kept in fewer bits, and weights that ranks share: what may differ, and by how much."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from test_decoders import VOCAB, model, prompts

from cm3leon.decoders.generate import generate
from cm3leon.models.serving import keep_weights, share
from cm3leon.models.transformer import Transformer
from cm3leon.registry import DECODERS
from cm3leon.types import UserError

pytestmark = pytest.mark.stack


def wide() -> Transformer:
    """Build a small model whose large head weights give distributions that are far from uniform."""
    torch.manual_seed(0)
    module = Transformer(
        Transformer.Config(layers=3, width=128, head_size=32, seq_len=96, init_std=0.08),
        vocab_size=300,
    )
    torch.nn.init.normal_(module.head.weight, std=0.3)
    return module.eval()


IDS_BT = torch.randint(300, (4, 60), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_bf16_weights_give_the_same_answers() -> None:
    module, asked = model(), prompts()
    decoder = DECODERS.build("top_p")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = generate(module, asked, decoder, vocab=VOCAB, seeds=range(8))
        keep_weights(module, "bf16")
        again = generate(module, asked, decoder, vocab=VOCAB, seeds=range(8))

    assert [one.tolist() for one in first] == [one.tolist() for one in again]


@torch.inference_mode()
def stored(tensor: Any) -> int:
    """Bytes of a tensor, or of the tensors that it is made of."""
    parts = ()
    if hasattr(tensor, "__tensor_flatten__"):
        parts = tensor.__tensor_flatten__()[0]
    if not parts:
        return tensor.nbytes
    return sum(stored(getattr(tensor, part)) for part in parts)


def test_int8_weights_are_close_and_small() -> None:
    """A weight is off by half a step at most: a step is 1/127 of the output's largest weight."""
    pytest.importorskip("torchao")
    module, small = wide(), wide()
    keep_weights(small, "int8")

    for name, layer in small.blocks[1].named_children():
        weight_OI = getattr(module.blocks[1], name).weight
        step_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        error_OI = (layer.weight.dequantize().float() - weight_OI).abs()
        # bf16 rounds four times: the weight, the scale, their quotient and their product.
        rounding_OI = 4 * 2**-8 * weight_OI.abs()
        assert (error_OI <= 0.5 * step_O1 + rounding_OI).all(), name
        assert stored(layer.weight) < 0.3 * weight_OI.nbytes

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_BTV = module(IDS_BT).float().log_softmax(-1)
        found_BTV = small(IDS_BT).float().log_softmax(-1)
    divergence_BT = (expected_BTV.exp() * (expected_BTV - found_BTV)).sum(-1)
    assert 0 < divergence_BT.mean() < 0.01  # nats


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="weights are fp8, which cpu does not compute in"):
        keep_weights(wide(), "fp8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="weights are int8, which needs the package torchao"):
        keep_weights(wide(), "int8")
    with pytest.raises(
        UserError, match="3 ranks cannot share the model's 4 heads; the number must divide them"
    ):
        share(wide(), rank=0, count=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.inference_mode()
def test_fewer_bits_on_a_gpu(kind: str) -> None:
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a device with fp8")
    module = wide().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected_BTV = module(IDS_BT.cuda()).float().log_softmax(-1)
        keep_weights(module, kind)  # type: ignore[arg-type]
        found_BTV = module(IDS_BT.cuda()).float().log_softmax(-1)
    assert 0 < (expected_BTV.exp() * (expected_BTV - found_BTV)).sum(-1).mean() < 0.02
