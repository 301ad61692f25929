"""LPIPS, the distance of images as people see it (Zhang et al. 2018, arXiv 1801.03924), in its VGG16 variant."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.types import UserError
from cm3leon.weights import check_fit, read_weights

LAYERS = (3, 8, 15, 22, 29)
"""Layers of VGG16's `features` that are compared: the last rectifier of each resolution."""
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
"""Of the colours of ImageNet, for pixels in [-1, 1], rounded as in the published code."""
SMALLEST = 16
"""Pixels of an image's side, which VGG16 halves four times."""


class Perceptual(nn.Module):
    """Weighted squared distance of VGG16's features, made by `Perceptual.load`.

    It can be a submodule of what is trained: its weights are buffers that no `state_dict` holds. So they follow `.to`,
    but enter neither checkpoints nor optimizers, and only the images get gradients. After a restart it has to be loaded
    from its file again, before the checkpoint or after.

    Args:
        features: VGG16's `features`, with their weights.
        linear: weights (1, C, 1, 1) of the features of each of `LAYERS`.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, features: nn.Sequential, linear: list[Tensor]) -> None:
        super().__init__()
        self.features = features
        for layer in self.features.modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                delattr(layer, name)
                layer.register_buffer(name, parameter.detach(), persistent=False)
        for level, weight in enumerate(linear):
            self.register_buffer(f"linear{level}", weight, persistent=False)
        self.register_buffer("mean_C11", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std_C11", torch.tensor(STD)[:, None, None], persistent=False)

    @classmethod
    def load(cls, path: Path) -> Perceptual:
        """With the weights of VGG16 as torchvision publishes them (vgg16-397923af.pth, or the same as safetensors).

        The classifier's are not used and may be absent. The linear weights come with the package torchmetrics.

        Raises:
            UserError: for a file that is missing, cannot be read, or does not hold VGG16's weights, or without the
                package torchmetrics.
        """
        import torchvision  # takes seconds, which nobody waits for who does not use it

        with torch.device(
            "meta"
        ):  # the file's weights take the place of these, which so cost nothing
            features = torchvision.models.vgg16(weights=None).features[: LAYERS[-1] + 1]
        given = {
            name: weight
            for name, weight in read_weights(path).items()
            if not name.startswith("classifier.")
        }
        fit_weights(nn.ModuleDict({"features": features}), given, path)
        return cls(features, _linear_weights())

    def forward(self, images_BCHW: Tensor, reconstructed_BCHW: Tensor) -> Tensor:
        """Distance (B,), 0 for equal images, of pixels in [-1, 1]. Raises UserError for sides below 16 pixels."""
        if min(images_BCHW.shape[2:]) < SMALLEST:
            raise UserError(
                f"images of {images_BCHW.shape[2]}x{images_BCHW.shape[3]} pixels are too small for the perceptual "
                f"distance (LPIPS); their sides must be at least {SMALLEST}"
            )
        x, y = self._directions(images_BCHW), self._directions(reconstructed_BCHW)
        # Not a convolution, which autocast would round.
        per_level = [
            (self.get_buffer(f"linear{level}") * (x[level] - y[level]).square()).sum(1).mean((1, 2))
            for level in range(len(LAYERS))
        ]
        return torch.stack(per_level).sum(0)

    def _directions(self, images_BCHW: Tensor) -> list[Tensor]:
        """Features of each of `LAYERS`, of length 1 at every position."""
        x_BCHW = (images_BCHW - self.mean_C11) / self.std_C11
        directions = []
        for number, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if number in LAYERS:
                directions.append(F.normalize(x_BCHW.float(), dim=1, eps=1e-10))
        return directions


def fit_weights(module: nn.Module, given: Mapping[str, Tensor], path: Path) -> None:
    """Makes tensors read from `path` the weights of a module, which may be on the meta device, in float32.

    Raises:
        UserError: naming the keys that are missing, unknown, or of another shape.
    """
    # How many batches a batch norm has seen plays no part once it is trained, and old files lack it.
    given, wanted = (
        {
            name: weight
            for name, weight in weights.items()
            if not name.endswith("num_batches_tracked")
        }
        for weights in (given, module.state_dict())
    )
    check_fit(path, given, wanted)
    module.load_state_dict({name: weight.float() for name, weight in given.items()}, assign=True)


def linear_weights_file() -> Path:
    """Where the weights of the features lie, learned by the authors (version 0.1): in the package torchmetrics.

    Raises:
        UserError: if it is not installed.
    """
    # Importing torchmetrics takes seconds, and only a file of it is needed.
    try:
        package = distribution("torchmetrics")
    except PackageNotFoundError as error:
        raise UserError(
            "the perceptual distance (perceptual_file) needs weights that come with the package torchmetrics "
            "(pip install torchmetrics)"
        ) from error
    return Path(str(package.locate_file("torchmetrics/functional/image/lpips_models/vgg.pth")))


def _linear_weights() -> list[Tensor]:
    """Weights (1, C, 1, 1) of the features of each of `LAYERS`."""
    weights = read_weights(linear_weights_file())
    return [weights[f"lin{level}.model.1.weight"] for level in range(len(LAYERS))]
