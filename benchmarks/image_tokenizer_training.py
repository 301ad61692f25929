"""Memory for an image, and time, of a training step of the image tokenizer at the paper's size.

    OMP_NUM_THREADS=2 python benchmarks/image_tokenizer_training.py

One image of 256x256 pixels goes forward and backward through tokenizer, discriminator and VGG16
(with random weights). On a GPU a step needs memory for two things: the weights (in float32 the
weight, its gradient, two moments and the average: 20 bytes each) and, for each image of the batch,
the tensors that are kept for the backward pass. The latter are counted here.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torchvision  # type: ignore[import-untyped]

from cm3leon.registry import IMAGE_TOKENIZERS, discover

BYTES_OF_A_WEIGHT = 20
BATCH = 32


def main() -> None:
    discover()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        vgg = Path(folder) / "vgg16.pth"
        torch.save(torchvision.models.vgg16(weights=None).state_dict(), vgg)

        print("| precision | perceptual | kept for an image, GB ", end="")
        print("| forward, s | backward, s | batch of 32, GB |\n|---|---|---|---|---|---|")
        for file in (None, vgg):
            for bf16 in (False, True):
                measure(file, bf16)


def measure(perceptual_file: Path | None, bf16: bool) -> None:
    """Print a row of the table.

    Args:
        perceptual_file: weights of the VGG16 of the perceptual loss; None = without that loss.
    """
    settings = {
        "name": "vqgan",
        "adversarial_start": 0,
        "perceptual_file": perceptual_file and str(perceptual_file),
    }
    module = IMAGE_TOKENIZERS.build(settings).training_module().train()

    # Bytes by address: a storage that several tensors share is kept once, and weights are not new.
    tensors = (*module.parameters(), *module.buffers())
    fixed = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images_BHWC = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8)
    start = time.perf_counter()
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss, _ = module.loss(images_BHWC)
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()

    weights = sum(parameter.numel() for parameter in module.parameters())
    image = sum(kept.values()) / 1e9
    batch = BATCH * image + weights * BYTES_OF_A_WEIGHT / 1e9
    precision = "bf16" if bf16 else "float32"
    perceptual = "yes" if perceptual_file else "no"
    times = f"{middle - start:.1f} | {end - middle:.1f}"
    print(f"| {precision} | {perceptual} | {image:.2f} | {times} | {batch:.0f} |", flush=True)


if __name__ == "__main__":
    main()
