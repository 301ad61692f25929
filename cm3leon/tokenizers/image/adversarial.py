"""The loss of a VQGAN: likeness, and a discriminator's verdict (Esser et al. 2021, section 3.1).

    loss = |x - y|  +  perceptual * LPIPS(x, y)  +  quantizer's loss
           +  adversarial * weight * generator_loss(D(y))  +  discriminator_loss(D(x), D(y))

for an image x, its reconstruction y and the discriminator D. `adaptive_weight` gives the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cm3leon.tokenizers.image.base import (
    TokenizerTraining,
    psnr_of_batch,
    to_signal,
    use_of_batch,
)
from cm3leon.tokenizers.image.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from cm3leon.tokenizers.image.perceptual import Perceptual
from cm3leon.tokenizers.image.vq_model import VQModel


class LossSettings(Protocol):
    """Settings of the loss; `VQGAN.Config` explains them."""

    perceptual_file: Path | None
    perceptual: float
    adversarial: float
    adversarial_start: int
    discriminator_channels: int
    discriminator_layers: int


class AdversarialTraining(TokenizerTraining):
    """A tokenizer, its discriminator, and the loss of both at once.

    One backward pass gives each network the gradient of its own loss only: for the generator's loss
    the discriminator's weights are constants, for the discriminator's loss the reconstructions are.
    """

    def __init__(self, tokenizer: VQModel, config: LossSettings) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial:
            self.discriminator = PatchDiscriminator(
                config.discriminator_channels, config.discriminator_layers
            )
        self.step: Tensor
        self.register_buffer("step", torch.tensor(0))

        self.perceptual: Perceptual | None = None
        if config.perceptual > 0:
            if config.perceptual_file:
                self.perceptual = Perceptual.load(config.perceptual_file)
            else:
                self.notes = (
                    "no perceptual distance in the loss: "
                    "image_tokenizer.perceptual_file names no weights of VGG16",
                )

    @property
    def networks(self) -> Sequence[nn.Module]:
        return [network for network in (self.tokenizer, self.discriminator) if network is not None]

    def loss(self, images_BHWC: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss of uint8 images, and figures to record."""
        images_BCHW = to_signal(images_BHWC)
        reconstruction_BCHW, codes_BHW, pull = self.tokenizer(images_BCHW)
        reconstruction_BCHW = reconstruction_BCHW.float()

        # Likeness: absolute error, and the perceptual distance if there are weights for it.
        likeness = F.l1_loss(reconstruction_BCHW, images_BCHW)
        figures: dict[str, Tensor | float] = {
            "psnr_db": psnr_of_batch(F.mse_loss(reconstruction_BCHW, images_BCHW)),
            **use_of_batch(codes_BHW, self.tokenizer.codebook_size),
            "quantizer_loss": pull.detach(),
            "images": float(len(images_BHWC)),
        }
        if self.perceptual is not None:
            distance = self.perceptual(images_BCHW, reconstruction_BCHW).mean()
            likeness = likeness + self.config.perceptual * distance
            figures["perceptual"] = distance.detach()
        loss = likeness + pull

        # The discriminator joins late, when reconstructions have got a shape.
        if self.discriminator is not None and self.step >= self.config.adversarial_start:
            verdict, discrimination = self._adversarial(images_BCHW, reconstruction_BCHW)
            weight = adaptive_weight(likeness, verdict, self.tokenizer.decoder.conv_out.weight)
            loss = loss + self.config.adversarial * weight * verdict + discrimination
            figures |= {
                "adversarial_weight": weight,
                "generator_loss": verdict.detach(),
                "discriminator_loss": discrimination.detach(),
            }

        if self.training:
            self.step += 1
        return loss, figures

    def _adversarial(
        self, images_BCHW: Tensor, reconstruction_BCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the generator's and the discriminator's loss.

        Gradients of the first reach the reconstruction only, those of the second the discriminator
        only.
        """
        discriminator = self.discriminator
        assert discriminator is not None
        constants = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        verdict = generator_loss(functional_call(discriminator, constants, (reconstruction_BCHW,)))
        return verdict, discriminator_loss(
            discriminator(images_BCHW), discriminator(reconstruction_BCHW.detach())
        )
