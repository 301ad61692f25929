"""An autoencoder of patches: each code is made from the pixels of its own patch, and of no other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cm3leon.config import PositiveInt
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.vq import Autoencoder, CodebookConfig
from cm3leon.types import UserError


@IMAGE_TOKENIZERS.register("patches")
class PatchAutoencoder(Autoencoder):
    """Two layers from a patch to its code's vector, two back: for small plain images, trained in a minute on a CPU.

    Equal patches have equal codes wherever they stand, which convolutions do not give.
    """

    @dataclass(kw_only=True)
    class Config(CodebookConfig):
        """Its layers."""

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
        values = (
            3 * config.downsampling**2
        )  # of a patch, which a convolution of size 1 sees as its channels
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
