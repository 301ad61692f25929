"""LPIPS by VGG16: the distance of images as people see it (Zhang et al. 2018, arXiv 1801.03924)."""

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
"""Layers of VGG16's `features` that are compared: the last ReLU of each resolution."""
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's colours, for pixels in [-1, 1], rounded as in the published
code."""
SMALLEST = 16
"""Smallest side of an image in pixels, because VGG16 halves it four times."""


class Perceptual(nn.Module):
    """Weighted squared distance of VGG16's features, built by `Perceptual.load`.

    It can be a submodule of a module in training. Its weights are non-persistent buffers: they
    follow `.to`, but are part of neither checkpoints nor optimizers, and only the images get
    gradients. After a restart it is loaded from its file again.

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
        """Load torchvision's published weights of VGG16.

        The file is vgg16-397923af.pth, or the same as safetensors. Weights of the classifier are
        ignored and may be absent. The linear weights come with the package torchmetrics.

        Raises:
            UserError: for a file that is missing, cannot be read, or does not hold VGG16's weights,
                or without the package torchmetrics.
        """
        import torchvision  # imported here because it takes seconds

        # The weights of the file replace these, so they need no memory.
        with torch.device("meta"):
            features = torchvision.models.vgg16(weights=None).features[: LAYERS[-1] + 1]
        given = {}
        for name, weight in read_weights(path).items():
            if not name.startswith("classifier."):
                given[name] = weight
        fit_weights(nn.ModuleDict({"features": features}), given, path)
        return cls(features, _linear_weights())

    def forward(self, images_BCHW: Tensor, reconstructed_BCHW: Tensor) -> Tensor:
        """Return the distances (B,) of images in [-1, 1]; 0 for equal images.

        Raises:
            UserError: for sides below 16 pixels.
        """
        if min(images_BCHW.shape[2:]) < SMALLEST:
            raise UserError(
                f"images of {images_BCHW.shape[2]}x{images_BCHW.shape[3]} pixels are too small for "
                f"the perceptual distance (LPIPS); their sides must be at least {SMALLEST}"
            )

        # The linear layers are written as products, because autocast would round a convolution.
        x, y = self._directions(images_BCHW), self._directions(reconstructed_BCHW)
        per_level = []
        for level in range(len(LAYERS)):
            weighted_BCHW = self.get_buffer(f"linear{level}") * (x[level] - y[level]).square()
            per_level.append(weighted_BCHW.sum(1).mean((1, 2)))
        return torch.stack(per_level).sum(0)

    def _directions(self, images_BCHW: Tensor) -> list[Tensor]:
        """Compute the features of each of `LAYERS`, scaled to length 1 at every position."""
        x_BCHW = (images_BCHW - self.mean_C11) / self.std_C11
        directions = []
        for number, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if number in LAYERS:
                directions.append(F.normalize(x_BCHW.float(), dim=1, eps=1e-10))
        return directions


def fit_weights(module: nn.Module, given: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a module, which may be on the meta device, in float32.

    Args:
        module: takes the tensors as its weights.
        given: tensors by name.
        path: the file that they come from, for messages.

    Raises:
        UserError: naming the keys that are missing, unknown, or of another shape.
    """
    given, wanted = _without_counts(given), _without_counts(module.state_dict())
    check_fit(path, given, wanted)
    module.load_state_dict({name: weight.float() for name, weight in given.items()}, assign=True)


def _without_counts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the counts of batches that batch norms keep.

    They are unused after training, and old files lack them.
    """
    return {
        name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")
    }


def linear_weights_file() -> Path:
    """Find the authors' weights of the features (version 0.1), a file of the package torchmetrics.

    Raises:
        UserError: if it is not installed.
    """
    # Importing torchmetrics would take seconds, and only this file of it is needed.
    try:
        package = distribution("torchmetrics")
    except PackageNotFoundError as error:
        raise UserError(
            "the perceptual distance (perceptual_file) needs weights that come with the package "
            "torchmetrics (pip install torchmetrics)"
        ) from error
    return Path(str(package.locate_file("torchmetrics/functional/image/lpips_models/vgg.pth")))


def _linear_weights() -> list[Tensor]:
    """Read the weights (1, C, 1, 1) of the features of each of `LAYERS`."""
    weights = read_weights(linear_weights_file())
    return [weights[f"lin{level}.model.1.weight"] for level in range(len(LAYERS))]
