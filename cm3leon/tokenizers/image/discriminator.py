"""A discriminator of patches (Isola et al. 2017, arXiv 1611.07004), and VQGAN's losses by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.collectives import averaged
from cm3leon.tokenizers.image.network import GROUPS

STD = 0.02
"""Standard deviation of the initial weights."""


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) to logits (B, 1, h, w), one for each patch; positive means real.

    With 3 layers, 256x256 pixels give 30x30 logits of patches of 70x70 pixels, 8 pixels apart.
    Images must have at least `3 * 2**layers` pixels a side.

    Args:
        channels: channels of the first layer, a multiple of 32. Each layer doubles them, up to
            eight times as many.
        layers: number of layers that halve the resolution, at least 1. Two more follow that keep
            it.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        blocks: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            blocks += [
                nn.Conv2d(
                    widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False
                ),
                # The published network has batch norm. With it the verdict on an image depends on
                # the others of its batch, so N processes would not train as one does, and its
                # running averages are a state that every pass changes. Group norm has neither
                # problem, but the mean and variance of the whole image reach every patch.
                nn.GroupNorm(GROUPS, widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialize)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.blocks(images_BCHW)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the hinge loss (Lim and Ye 2017, arXiv 1705.02894), halved as in VQGAN.

    It is 1 while all logits are 0.
    """
    return (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the generator's side of the hinge loss: minus the mean logit."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer_weight: Tensor
) -> Tensor:
    """Return the weight that makes the generator's gradient as long as the reconstruction's.

    It is the ratio of the norms of both gradients with respect to the weight of the decoder's last
    layer, at most 10^4 (Esser et al. 2021, eq. 7). On several ranks the mean gradients are taken,
    which are those of the whole batch. The denominator's constant is 1e-4, as in the published code
    (the paper has 1e-6).

    Returns:
        A scalar without gradient; the graphs of both losses are kept.
    """
    of_reconstruction, of_generator = (
        averaged(torch.autograd.grad(loss, last_layer_weight, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction_loss, generator_loss)
    )
    return (of_reconstruction / (of_generator + 1e-4)).clamp(0, 1e4).detach()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.GroupNorm) else 0.0, STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
