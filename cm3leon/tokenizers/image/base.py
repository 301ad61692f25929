"""Base of the image tokenizers: uint8 images to codes and back, in batches or in tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cm3leon.collectives import averaged, rank_count, summed
from cm3leon.tokenizers.layout import Grid
from cm3leon.weights import check_finite

BATCH_PIXELS = 2**20
"""Pixels of a batch if no size is given: 16 images of 256x256 pixels, at most 256 images."""


class TokenizerTraining(nn.Module):
    """Base of what the trainer trains: the tokenizer and whatever else its loss needs."""

    notes: Sequence[str] = ()
    """Sentences for the user about how it is trained."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The parts with a loss of their own, whose gradients are clipped separately."""
        return (self,)

    def loss(self, images_BHWC: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss of uint8 images, and figures to record."""
        raise NotImplementedError


class ImageTokenizer(nn.Module):
    """Base of the image tokenizers.

    An image has `grid * grid` codes, numbered row by row. With 256 pixels and a `downsampling` of 8
    a side, the codes of an image are

        0     1    ...   31
        32    33   ...   63
        ...
        992   993  ...   1023

    A subclass sets `image_size`, `codebook_size` and `downsampling`, and defines the two maps
    `codes_of` and `signal_of`. Signals are float images in [-1, 1].
    """

    image_size: int
    """Height and width of the images, in pixels."""
    codebook_size: int
    """Number of codes."""
    downsampling: int
    """Pixels along a side of a code."""

    @property
    def grid(self) -> int:
        """Codes along a side of an image."""
        return self.image_size // self.downsampling

    def codes_of(self, signal_BCHW: Tensor) -> Tensor:
        """Return the codes (B, H, W), int64, of a signal whose sides `downsampling` divides."""
        raise NotImplementedError

    def signal_of(self, codes_BHW: Tensor) -> Tensor:
        """Return the signal (B, 3, H * downsampling, W * downsampling); it may leave [-1, 1]."""
        raise NotImplementedError

    pretrained = False
    """Whether it comes with its weights and needs no training."""

    def training_module(self) -> TokenizerTraining:
        """Return the module that the trainer trains.

        Raises:
            UserError: for a tokenizer that is used as it is.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a checksum of a pretrained tokenizer's weights, wherever their file lies."""
        raise NotImplementedError

    def geometry(self) -> dict[str, Any] | None:
        """Return the JSON object that a run keeps beside the weights; None if settings suffice.

        With it the run opens without the published files. The tokenizer of such a run is built with
        it as `kept`.
        """
        return None

    def ready(self) -> Self:
        """Prepare itself, on its final device, for use without further training."""
        return self.requires_grad_(False).eval()

    @torch.inference_mode()
    def encode(
        self,
        images_BHWC: np.ndarray,
        batch_size: int | None = None,
        title: str = "",
        *,
        grid: Grid | None = None,
    ) -> np.ndarray:
        """Encode uint8 images (B, H, W, C) as codes (B, N), int64.

        Args:
            images_BHWC: images of the right size.
            batch_size: images of a batch; None = as many as `BATCH_PIXELS` allows.
            title: name of the progress bar; "" = no bar.
            grid: rows and columns of codes of the images; None = the usual square.

        Raises:
            ValueError: for images of another size.
        """
        rows, columns = grid or (self.grid, self.grid)
        height, width = rows * self.downsampling, columns * self.downsampling
        if images_BHWC.shape[1:] != (height, width, 3):
            raise ValueError(
                f"images must be {height}x{width} RGB, got an array of shape {images_BHWC.shape}"
            )

        batch_size = batch_size or self._batch_size
        codes = []
        for start in _starts_of_batches(len(images_BHWC), batch_size, title):
            batch_BHWC = self._tensor(images_BHWC[start : start + batch_size])
            codes.append(self.codes_of(to_signal(batch_BHWC)).flatten(1).cpu().numpy())
        empty = np.zeros((0, height * width // self.downsampling**2), np.int64)
        return np.concatenate(codes) if codes else empty

    @torch.inference_mode()
    def decode(
        self,
        codes_BN: np.ndarray,
        batch_size: int | None = None,
        title: str = "",
        *,
        grid: Grid | None = None,
    ) -> np.ndarray:
        """Decode codes (B, N) to uint8 images (B, H, W, C); other arguments as for `encode`."""
        rows, columns = grid or (self.grid, self.grid)
        batch_size = batch_size or self._batch_size
        images = []
        for start in _starts_of_batches(len(codes_BN), batch_size, title):
            codes_bN = self._tensor(codes_BN[start : start + batch_size])
            images.append(to_pixels(self.signal_of(codes_bN.unflatten(1, (rows, columns)))))
        if not images:
            height, width = rows * self.downsampling, columns * self.downsampling
            return np.zeros((0, height, width, 3), np.uint8)
        return np.concatenate(images)

    @torch.inference_mode()
    def decode_tiled(self, codes_HW: np.ndarray, overlap: int = 8) -> np.ndarray:
        """Decode a grid of codes of any size to an image (H * downsampling, W * downsampling, 3).

        It is decoded in tiles of `grid * grid` codes. Neighbours share `overlap` rows or columns of
        codes and fade into each other there:

            tile 0   |----------\\
            tile 1          /----------\\
            tile 2                 /----------|

        So memory for the network does not grow with the image, and attention sees as many codes as
        in training.

        Raises:
            ValueError: for an overlap that is not below `grid`.
        """
        if not 0 <= overlap < self.grid:
            raise ValueError(
                f"overlap is {overlap} codes; it must be below the {self.grid} of a tile's side"
            )

        # The image is a weighted mean of the tiles: `sum` of weighted signals over `weight`.
        H, W = codes_HW.shape
        scale = self.downsampling
        sum_CHW = torch.zeros(3, H * scale, W * scale)
        weight_HW = torch.zeros(H * scale, W * scale)
        for top in _starts(H, self.grid, overlap):
            for left in _starts(W, self.grid, overlap):
                tile = codes_HW[top : top + self.grid, left : left + self.grid]
                signal_CHW = self.signal_of(self._tensor(tile)[None])[0].float().cpu()
                fade_HW = torch.outer(
                    *(_fade(side * scale, overlap * scale) for side in tile.shape)
                )

                rows = slice(top * scale, (top + tile.shape[0]) * scale)
                columns = slice(left * scale, (left + tile.shape[1]) * scale)
                sum_CHW[:, rows, columns] += signal_CHW * fade_HW
                weight_HW[rows, columns] += fade_HW
        return to_pixels((sum_CHW / weight_HW)[None])[0]

    @property
    def _batch_size(self) -> int:
        return min(max(BATCH_PIXELS // self.image_size**2, 1), 256)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(next(self.parameters()).device)


def psnr_of_batch(squared_error: Tensor) -> Tensor:
    """Return a batch's PSNR in dB from its mean squared error in [-1, 1], over all ranks."""
    return 10 * torch.log10(4 / averaged(squared_error))


def use_of_batch(codes: Tensor, codebook_size: int) -> dict[str, Tensor | float]:
    """Measure how evenly a batch uses the codes, over all ranks.

    Returns:
        The share of the codes that occur, and the perplexity of their distribution, which is the
        codebook's size if all are equally frequent.
    """
    counts_V = torch.bincount(codes.flatten(), minlength=codebook_size)
    share_V = summed(counts_V) / (codes.numel() * rank_count())
    entropy = -torch.xlogy(share_V, share_V).sum()
    return {
        "codes_used_in_batch": (share_V > 0).float().mean(),
        "perplexity_of_batch": entropy.exp(),
    }


def to_signal(images_BHWC: Tensor) -> Tensor:
    """Convert uint8 (B, H, W, C) to float in [-1, 1], (B, C, H, W)."""
    return images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(signal_BCHW: Tensor) -> np.ndarray:
    """Convert float in [-1, 1], (B, C, H, W), to uint8 (B, H, W, C); values outside are clipped.

    Raises:
        NotFinite: for a signal with NaN or infinite numbers.
    """
    check_finite(signal_BCHW, "the image that the image tokenizer's decoder makes")
    pixels_BCHW = ((signal_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels_BCHW.permute(0, 2, 3, 1).cpu().numpy()


def _starts_of_batches(count: int, batch_size: int, title: str) -> Iterable[int]:
    starts = range(0, count, batch_size)
    return tqdm(
        starts,
        title,
        unit="image",
        unit_scale=batch_size,
        disable=not title,
        delay=2,
        mininterval=2,
        dynamic_ncols=True,
    )


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """List the first rows of tiles that cover `length`; the last tile ends where it does.

    >>> _starts(10, 4, 1)
    [0, 3, 6]
    """
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def _fade(length: int, overlap: int) -> Tensor:
    """Return weights that rise over `overlap` at both ends.

    They are never 0, because only one tile covers the border of the image.
    """
    from_end = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 1.0
    return (from_end / (overlap + 1)).clamp(max=1)
