"""An autoencoder of patches: each code depends on the pixels of its own patch only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cm3leon.config import PositiveInt
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.vq import Autoencoder, CodebookConfig
from cm3leon.types import UserError


@IMAGE_TOKENIZERS.register("patches")
class PatchAutoencoder(Autoencoder):
    """Two layers from a patch to its code's vector, and two back, for small plain images.

    It trains in a minute on a CPU. Unlike with convolutions, equal patches have equal codes
    wherever they stand.
    """

    @dataclass(kw_only=True)
    class Config(CodebookConfig):
        """Settings of the codebook, and of the layers."""

        width: PositiveInt = 256
        """Units of the hidden layers."""

        def check(self) -> None:
            if self.image_size % self.downsampling:
                raise UserError(
                    f"downsampling {self.downsampling} must divide image_size {self.image_size}"
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

        # PixelUnshuffle turns a patch into channels, so a 1x1 convolution is a layer on patches.
        values = 3 * config.downsampling**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(config.downsampling),
            nn.Conv2d(values, config.width, 1),
            nn.SiLU(),
            nn.Conv2d(config.width, config.code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, config.width, 1),
            nn.SiLU(),
            nn.Conv2d(config.width, values, 1),
            nn.PixelShuffle(config.downsampling),
        )
