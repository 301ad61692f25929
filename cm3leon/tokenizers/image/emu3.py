"""Emu3's image tokenizer: an encoder and a decoder of videos; an image is a video of one step.

The networks are those of transformers' `Emu3VQVAE` (arXiv 2409.18869: an f8 MoVQGAN with a
temporal axis). That library runs them. Their weights come from the published folder, which holds
both encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm3leon.config import PositiveInt
from cm3leon.digests import files_digest
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.base import ImageTokenizer, TokenizerTraining
from cm3leon.tokenizers.image.published_files import Weights, open_weights
from cm3leon.types import UserError
from cm3leon.weights import check_finite, check_fit

IMAGE_SIZE = 720
"""Height and width of the images, in pixels, that Emu3 draws."""
PREFIXES = ("model.vqmodel.", "vqmodel.", "")
"""Prefixes of the names of its tensors: in an Emu3, in one of earlier versions, and by itself."""


@IMAGE_TOKENIZERS.register("emu3")
class Emu3VQ(ImageTokenizer):
    """Emu3's published weights, used as they are; it needs the package transformers.

    Under `torch.device("meta")` it is built without its weights.
    """

    @dataclass(kw_only=True)
    class Config:
        """Only the path is needed, or nothing if the tokenizers of another run are reused."""

        path: Path | None = None
        """A Hugging Face folder of Emu3, or of its image tokenizer only; None = the copy in the run
        of shards.tokenizers."""
        image_size: PositiveInt | None = None
        """Height and width of the images, in pixels; None = 720."""

    pretrained = True

    def __init__(self, config: Config, *, kept: Mapping[str, Any] | None = None) -> None:
        """Read the folder; or with `kept`, build the networks for weights that a run has kept.

        Args:
            config: the settings.
            kept: the run's copy of what `geometry` returned.

        Raises:
            UserError: for a folder that is missing or holds no such tokenizer, and for an
                `image_size` that does not fit.
            NotFinite: for weights that are NaN or infinite.
        """
        super().__init__()
        self._files: Sequence[Path] = ()
        if kept is not None:
            self._build({**kept, "image_size": config.image_size or kept["image_size"]})
            return
        if config.path is None:
            raise UserError(
                "image_tokenizer.path is missing; set it to a published folder of Emu3, or "
                "shards.tokenizers to a run that was made from one"
            )

        weights = open_weights(config.path)
        self._files = weights.files
        settings = weights.settings.get("vq_config") or weights.settings
        with torch.device("meta"):
            self._build({"vq_config": settings, "image_size": config.image_size or IMAGE_SIZE})
        self._load(weights)

    def _build(self, geometry: Mapping[str, Any]) -> None:
        """Build the networks, with any weights."""
        try:
            from transformers import Emu3VQVAE, Emu3VQVAEConfig
        except ImportError as error:
            raise UserError(
                "image_tokenizer: emu3 needs the package transformers; install it with: "
                "pip install transformers"
            ) from error

        config = Emu3VQVAEConfig.from_dict(dict(geometry["vq_config"]))
        self.networks: Any = Emu3VQVAE(config).eval().requires_grad_(False)
        self.downsampling = int(self.networks.vision_spatial_factor)
        self.codebook_size = int(config.codebook_size)
        self.image_size = geometry["image_size"]
        if self.image_size % self.downsampling:
            raise UserError(
                f"image_size is {self.image_size}; it must be a multiple of {self.downsampling}, "
                "the pixels of a code's side"
            )
        kept = {name: value for name, value in config.to_diff_dict().items() if _is_plain(value)}
        self._geometry = {"vq_config": kept, "image_size": self.image_size}

    def _load(self, weights: Weights) -> None:
        """Load its tensors from those of a folder; on the meta device, compare shapes only."""
        wanted = self.networks.state_dict()
        first = next(iter(wanted))
        prefix = next((each for each in PREFIXES if each + first in weights.tensors), PREFIXES[0])
        given = {}
        for name, stored in weights.tensors.items():
            if name.startswith(prefix):
                given[name.removeprefix(prefix)] = stored

        # Shapes are compared before any tensor is read.
        shapes = {name: torch.empty(stored.shape, device="meta") for name, stored in given.items()}
        try:
            check_fit(weights.path, shapes, wanted)
        except UserError as error:
            raise UserError(f"image_tokenizer: {error}") from error

        if torch.get_default_device().type == "meta":
            return
        state = {}
        for name, stored in given.items():
            check_finite(tensor := stored.read(wanted[name].dtype), f"{weights.path}: {name}")
            state[name] = tensor
        self.networks.load_state_dict(state, assign=True)
        self.requires_grad_(False).eval()

    def geometry(self) -> dict[str, Any]:
        return self._geometry

    def training_module(self) -> TokenizerTraining:
        raise UserError(
            "image_tokenizer.name is emu3, which is used as it is; to train one, take vqgan or vq"
        )

    def fingerprint(self) -> str:
        """Return a checksum of the contents of the files of weights."""
        return files_digest(self._files, [file.name for file in self._files])

    def codes_of(self, signal_BCHW: Tensor) -> Tensor:
        height, width = signal_BCHW.shape[-2:]
        sizes = torch.tensor([[height, width]] * len(signal_BCHW))
        found = self.networks.encode(signal_BCHW, sizes)
        # Before its version 5, transformers returned the codes without what is around them.
        codes = found if isinstance(found, list) else found.image_tokens
        return torch.stack(list(codes))

    def signal_of(self, codes_BHW: Tensor) -> Tensor:
        return self.networks.decode(codes_BHW)


def _is_plain(value: Any) -> bool:
    """Tell whether JSON can hold a setting; those of the networks' shape are of these types."""
    return isinstance(value, int | float | str | list | tuple | bool)
