"""The VQGAN: quantizers by brute force, the adversarial loss by two passes, training, and tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cm3leon.registry import IMAGE_TOKENIZERS, discover
from cm3leon.tokenizers.image import base
from cm3leon.tokenizers.image.discriminator import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from cm3leon.tokenizers.image.quantizer import GumbelQuantizer, LookupQuantizer, nearest
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

discover()

TINY = {
    "name": "vqgan",
    "image_size": 32,
    "codebook_size": 24,
    "code_dim": 4,
    "channels": 32,
    "multipliers": [1, 1],
    "residual_blocks": 1,
    "attention_levels": [],
    "z_channels": 16,
    "discriminator_channels": 32,
    "discriminator_layers": 1,
    "adversarial_start": 0,
}


def tiny(**settings: Any) -> Any:
    torch.manual_seed(0)
    return IMAGE_TOKENIZERS.build({**TINY, **settings})


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth pictures, uint8 (B, side, side, 3)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


# --------------------------------------------------------------------------------------- quantizers


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 5), st.booleans())
@settings(max_examples=30)
def test_codes_are_the_nearest_by_brute_force(
    seed: int, size: int, dim: int, normalized: bool
) -> None:
    torch.manual_seed(seed)
    each = LookupQuantizer(size=size, dim=dim, normalized=normalized, commitment=0.25)
    nn.init.normal_(each.codebook_VD)
    z_ND = torch.randn(20, dim)

    # In float64; normalised vectors and codes all have length 1.
    z, book = z_ND.double().numpy(), each.codebook_VD.detach().double().numpy()
    if normalized:
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        book /= np.linalg.norm(book, axis=1, keepdims=True)
    distance_NV = ((z[:, None] - book[None]) ** 2).sum(2)

    # Where two codes are equally near up to rounding, either may be taken.
    distance_NV = ((z[:, None] - book[None]) ** 2).sum(2)
    codes_N = each.lookup(z_ND).numpy()
    best_N = distance_NV.min(1)
    np.testing.assert_allclose(distance_NV[np.arange(20), codes_N], best_N, atol=1e-5)

    quantized_ND, codes_again_N, pull = each(z_ND)
    assert codes_again_N.tolist() == codes_N.tolist()
    np.testing.assert_allclose(quantized_ND.detach().numpy(), book[codes_N], atol=1e-5)
    assert pull.item() == pytest.approx(1.25 * best_N.mean() / dim, rel=1e-3, abs=1e-5)


def test_vectors_and_codes_pull_each_other_with_their_own_weights() -> None:
    """Written out: codes are moved by the mean squared distance, vectors by `commitment` of it."""
    torch.manual_seed(0)
    each = LookupQuantizer(size=5, dim=3, normalized=False, commitment=0.3)
    nn.init.normal_(each.codebook_VD)
    z_ND = torch.randn(7, 3, requires_grad=True)
    _, codes_N, pull = each(z_ND)

    pull.backward()
    apart_ND = (z_ND - each.codebook_VD[codes_N]).detach()
    torch.testing.assert_close(z_ND.grad, 0.3 * 2 * apart_ND / apart_ND.numel())
    moved_ND = -2 * apart_ND / apart_ND.numel()
    expected_VD = torch.zeros_like(each.codebook_VD).index_add(0, codes_N, moved_ND)
    torch.testing.assert_close(each.codebook_VD.grad, expected_VD)


def test_distances_in_pieces_are_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    z_ND, book_VD = torch.randn(50, 4), torch.randn(9, 4)
    whole_N = nearest(z_ND, book_VD)
    monkeypatch.setattr("cm3leon.tokenizers.image.quantizer.MAX_DISTANCES", 63)
    assert torch.equal(nearest(z_ND, book_VD), whole_N)
    assert torch.equal(whole_N, torch.cdist(z_ND.double(), book_VD.double()).argmin(1))


def test_gumbel_takes_the_most_likely_code() -> None:
    torch.manual_seed(0)
    each = GumbelQuantizer(size=9, dim=4)
    z_ND = torch.randn(50, 4)
    logits_NV = z_ND.double() @ each.logits.weight.double().T + each.logits.bias.double()
    assert torch.equal(each.lookup(z_ND), logits_NV.argmax(1))
    assert torch.equal(each.vectors(torch.tensor([[3, 1]])), each.codebook_VD[[3, 1]][None])


# ----------------------------------------------------------------------------- adversarial training


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients of a network's weights, by their names."""
    return {name: weight.grad.clone() for name, weight in module.named_parameters()}


def test_one_pass_gives_each_network_the_gradient_of_its_own_loss() -> None:
    """The gradients are those of two passes, the second with the reconstruction as a constant.

    This is how Goodfellow et al. (2014) train both networks.
    """
    module = tiny().training_module().train()
    images_BHWC = torch.from_numpy(pictures(2))
    loss, figures = module.loss(images_BHWC)
    loss.backward()
    together = gradients_of(module)
    module.zero_grad()

    # First pass: the tokenizer's loss, with the verdict weighted against the likeness.
    signal_BCHW = base.to_signal(images_BHWC)
    rebuilt_BCHW, _, pull = module.tokenizer(signal_BCHW)
    likeness = F.l1_loss(rebuilt_BCHW, signal_BCHW)
    verdict = generator_loss(module.discriminator(rebuilt_BCHW))
    weight = adaptive_weight(likeness, verdict, module.tokenizer.decoder.conv_out.weight)
    (likeness + pull + 0.5 * weight * verdict).backward()
    alone = {f"tokenizer.{name}": grad for name, grad in gradients_of(module.tokenizer).items()}
    module.zero_grad()

    # Second pass: the discriminator's loss.
    of_real = module.discriminator(signal_BCHW)
    of_rebuilt = module.discriminator(rebuilt_BCHW.detach())
    discriminator_loss(of_real, of_rebuilt).backward()
    for name, grad in gradients_of(module.discriminator).items():
        alone[f"discriminator.{name}"] = grad

    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-4, msg=name)
    assert figures["adversarial_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    judging = [grad for name, grad in together.items() if "discriminator" in name]
    assert any(gradient.abs().max() > 0 for gradient in judging)


def test_the_discriminator_comes_later_and_a_checkpoint_knows_when() -> None:
    module = tiny(adversarial_start=2).training_module().train()
    images_BHWC = torch.from_numpy(pictures(2))
    judged = []
    for _ in range(4):
        figures = module.loss(images_BHWC)[1]
        judged.append("discriminator_loss" in figures)
    assert judged == [False, False, True, True]

    other = tiny(adversarial_start=2).training_module()
    other.load_state_dict(module.state_dict())
    assert "discriminator_loss" in other.train().loss(images_BHWC)[1]

    module.eval().loss(images_BHWC)
    assert module.step == 4  # only steps of training count


def test_without_a_discriminator_there_is_none() -> None:
    module = tiny(adversarial=0).training_module().train()
    loss, figures = module.loss(torch.from_numpy(pictures(2)))
    assert list(module.networks) == [module.tokenizer]
    assert not any("discriminator" in name for name in module.state_dict())
    assert not any("discriminator" in name for name in figures)
    loss.backward()


def test_a_missing_perceptual_loss_is_said() -> None:
    assert any("perceptual_file" in note for note in tiny().training_module().notes)
    assert not list(tiny(perceptual=0).training_module().notes)


def test_use_of_codes_by_hand() -> None:
    module = tiny(adversarial=0).training_module()
    _, figures = module.loss(torch.from_numpy(pictures(3)))

    codes_BN = module.tokenizer.eval().encode(pictures(3))
    counts = np.bincount(codes_BN.ravel(), minlength=24) / codes_BN.size
    entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    assert figures["codes_used_in_batch"].item() == pytest.approx((counts > 0).mean())
    assert figures["perplexity_of_batch"].item() == pytest.approx(np.exp(entropy), rel=1e-4)


# ----------------------------------------------------------------------------------------- geometry


def test_the_default_is_the_papers_geometry() -> None:
    with torch.device("meta"):
        tokenizer = IMAGE_TOKENIZERS.build("vqgan")
    assert (tokenizer.image_size, tokenizer.grid, tokenizer.codebook_size) == (256, 32, 8192)
    codes_BHW = tokenizer.codes_of(torch.zeros(1, 3, 256, 256, device="meta"))
    assert codes_BHW.shape == (1, 32, 32)
    assert tokenizer.signal_of(codes_BHW).shape == (1, 3, 256, 256)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"channels": 48}, "channels is 48; it must be a multiple of 32"),
        ({"multipliers": []}, "multipliers is empty"),
        ({"image_size": 33}, "image_size is 33; it must be a multiple of 2"),
        ({"attention_levels": [2]}, "attention_levels has 2; there are the levels 0 to 1"),
        (
            {"discriminator_layers": 4},
            "images of 32 pixels are too small; take fewer layers, or an image_size of at least 48",
        ),
        ({"perceptual_file": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_mistakes_are_sentences(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tiny(**fields).training_module()


# -------------------------------------------------------------------------------------------- tiles


class Patchwork(base.ImageTokenizer):
    """An image tokenizer whose every code is a patch of its own colour, whatever is beside it."""

    image_size, codebook_size, downsampling = 16, 256, 2

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def signal_of(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        assert codes_BHW.shape[1] <= self.grid
        assert codes_BHW.shape[2] <= self.grid
        colour_BHW = codes_BHW.float() / 127.5 - 1
        colour_BCHW = colour_BHW[:, None].repeat(1, 3, 1, 1)
        return colour_BCHW.repeat_interleave(2, 2).repeat_interleave(2, 3)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 7), st.integers(0, 2**31))
def test_tiles_cover_an_image_of_any_size_with_weights_that_sum_to_one(
    height: int, width: int, overlap: int, seed: int
) -> None:
    codes_HW = np.random.default_rng(seed).integers(0, 256, (height, width))
    image_HWC = Patchwork().decode_tiled(codes_HW, overlap)
    expected_HWC = codes_HW.repeat(2, 0).repeat(2, 1)[..., None].repeat(3, 2)
    assert np.array_equal(image_HWC, expected_HWC)


def test_one_tile_is_the_image() -> None:
    tokenizer = tiny().eval()
    codes_BN = tokenizer.encode(pictures(1))
    tiled_HWC = tokenizer.decode_tiled(codes_BN[0].reshape(16, 16))
    assert np.array_equal(tiled_HWC, tokenizer.decode(codes_BN)[0])


def test_tiles_must_not_overlap_wholly() -> None:
    with pytest.raises(
        ValueError, match="overlap is 8 codes; it must be below the 8 of a tile's side"
    ):
        Patchwork().decode_tiled(np.zeros((20, 20), int), 8)


# ----------------------------------------------------------------------------------------- learning


@pytest.mark.once
def test_it_learns_to_rebuild_images(tmp_path: Path) -> None:
    """It is better than the best single colour, within a minute on a CPU."""
    from cm3leon.data.shuffle import RowStream
    from cm3leon.training.trainer import TrainingConfig, train

    images_BHWC = pictures(64)
    tokenizer = tiny(adversarial_start=30, codebook_size=64)
    module = tokenizer.training_module()
    config = TrainingConfig(
        steps=60,
        learning_rate=2e-3,
        warmup_steps=5,
        log_every=10,
        checkpoint_every=30,
        average_decay=0.9,
        weight_decay=0.0,
        precision="float32",
    )
    log = train(
        module,
        lambda module, batch_BHWC: module.loss(torch.from_numpy(batch_BHWC)),
        RowStream(64, lambda items: images_BHWC[items], batch_size=4, seed=0),
        config,
        folder=tmp_path,
        device=torch.device("cpu"),
        seed=0,
        title="image tokenizer",
        clipped=module.networks,
    )
    assert "discriminator_loss" in log[-1]
    assert "discriminator_loss" not in log[0]

    # Images that it was not trained on, against the mean colour of each.
    held_out_BHWC = pictures(16, seed=1)
    error = (tokenizer.decode(tokenizer.encode(held_out_BHWC)).astype(float) - held_out_BHWC) ** 2
    plain = (held_out_BHWC.mean((1, 2), keepdims=True) - held_out_BHWC) ** 2
    assert error.mean() < 0.5 * plain.mean()


# ---------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_codes_of_the_cpu_and_trains_in_bf16() -> None:
    images_BHWC = pictures(16)
    tokenizer = tiny().eval()
    codes_BN = tokenizer.encode(images_BHWC)
    rebuilt_BHWC = tokenizer.decode(tokenizer.encode(images_BHWC))

    # Two codes may be equally near.
    tokenizer.cuda()
    assert (tokenizer.encode(images_BHWC) == codes_BN).mean() > 0.99
    assert np.abs(tokenizer.decode(codes_BN).astype(int) - rebuilt_BHWC).max() <= 1

    module = tiny().training_module().cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = module.loss(torch.from_numpy(images_BHWC).cuda())
    loss.backward()
    for weight in module.parameters():
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
