"""Files of the networks behind LPIPS and FID, as published but with random weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn


def vgg_weights() -> dict[str, Tensor]:
    """Under the names of torchvision's VGG16; the classifier's are left out, as they are large."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    return {
        f"features.{name}": torch.randn(w.shape)
        * (math.sqrt(2 / w[0].numel()) if w.dim() > 1 else 0.1)
        for name, w in shapes.items()
    }


def write_vgg(path: Path, weights: dict[str, Tensor]) -> Path:
    """Write the weights in PyTorch's older file format, as the published files are."""
    parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}
    torch.save(
        {**parameters, "classifier.0.bias": torch.zeros(4096)},
        path,
        _use_new_zipfile_serialization=False,
    )
    return path


def inception_weights() -> dict[str, Tensor]:
    """In the layout of pytorch-fid's file: torchvision's names, 1008 classes, one classifier."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = torchvision.models.Inception3(1008, aux_logits=False, init_weights=False)
    weights = {}
    for name, like in network.state_dict().items():
        if name.endswith("running_var"):
            weights[name] = torch.rand(like.shape) + 0.5
        elif like.dim() > 1:
            weights[name] = torch.randn(like.shape) * math.sqrt(2 / like[0].numel())
        elif not name.endswith("num_batches_tracked"):
            weights[name] = torch.randn(like.shape) * 0.1 + name.endswith("bn.weight")
    return weights


def write_inception(path: Path, weights: dict[str, Tensor]) -> Path:
    """Write the weights as pytorch-fid's file holds them."""
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    return path
