"""Base of every VQGAN, ours or a published one: a convolutional autoencoder around a codebook.

image -> encoder -> to_code -> quantizer -> from_code -> decoder -> image
                                   |
                                 codes
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.tokenizers.image.network import Architecture, ImageDecoder, ImageEncoder
from cm3leon.tokenizers.image.quantizer import Quantizer
from cm3leon.weights import check_finite


class VQModel(ImageTokenizer):
    """Encoder, projection onto the codebook's dimensions, quantizer, and the way back."""

    def __init__(
        self,
        shape: Architecture,
        quantizer: Quantizer,
        *,
        image_size: int,
        codebook_size: int,
        code_dim: int,
    ) -> None:
        super().__init__()
        self.image_size, self.codebook_size = image_size, codebook_size
        self.downsampling = shape.downsampling
        self.shape = shape
        self.encoder = ImageEncoder(shape)
        self.to_code = nn.Conv2d(shape.z_channels, code_dim, 1)
        self.quantizer = quantizer
        self.from_code = nn.Conv2d(code_dim, shape.z_channels, 1)
        self.decoder = ImageDecoder(shape)

    def forward(self, signal_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction (B, 3, H, W), the codes (B, H, W), and the quantizer's loss.

        Signals are in [-1, 1].
        """
        z_BHWD = self._vectors_of(signal_BCHW)
        quantized_ND, codes_N, pull = self.quantizer(z_BHWD.flatten(0, 2))
        return self._decoded(quantized_ND.view_as(z_BHWD)), codes_N.view(z_BHWD.shape[:3]), pull

    def codes_of(self, signal_BCHW: Tensor) -> Tensor:
        z_BHWD = self._vectors_of(signal_BCHW)
        check_finite(z_BHWD, "what the image tokenizer's encoder makes of an image")
        return self.quantizer.lookup(z_BHWD.flatten(0, 2)).view(z_BHWD.shape[:3])

    def signal_of(self, codes_BHW: Tensor) -> Tensor:
        return self._decoded(self.quantizer.vectors(codes_BHW))

    def ready(self) -> Self:
        super().ready()
        if next(self.parameters()).device.type != "cpu":
            return self

        # On a CPU this saves a fifth of the time. It is not done for training, because the
        # optimizer's moments would keep the old memory format.
        return self.to(memory_format=torch.channels_last)

    def _vectors_of(self, signal_BCHW: Tensor) -> Tensor:
        return self.to_code(self.encoder(signal_BCHW)).permute(0, 2, 3, 1)

    def _decoded(self, vectors_BHWD: Tensor) -> Tensor:
        return self.decoder(self.from_code(vectors_BHWD.permute(0, 3, 1, 2)))
