"""Vector quantization with a codebook learned as moving averages (van den Oord et al. 2017, appendix A.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EMAQuantizer(nn.Module):
    """Nearest code by Euclidean distance, straight-through gradients, revival of codes that nothing uses.

    Args:
        size, dim: of the codebook.
        decay: of the moving averages of each code's count and sum.
        revive_below: a code is dead, and is moved onto a random vector of the batch, when its moving count falls
            below this share of what even use would give it.
    """

    def __init__(self, *, size: int, dim: int, decay: float, revive_below: float) -> None:
        super().__init__()
        self.decay = decay
        self.revive_below = revive_below
        self.codebook_VD: Tensor
        self.count_V: Tensor
        self.sum_VD: Tensor
        self.initialized: Tensor
        self.register_buffer("codebook_VD", torch.zeros(size, dim))
        self.register_buffer("count_V", torch.ones(size))
        self.register_buffer("sum_VD", torch.zeros(size, dim))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, z_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes vectors, and learns from them in training.

        Returns:
            quantized_ND with straight-through gradients, codes_N, and the commitment loss: the mean squared distance
            of the vectors from their codes.
        """
        with torch.autocast(z_ND.device.type, enabled=False):  # distances and averages need float32
            z_ND = z_ND.float()
            if self.training and not self.initialized:
                self._move(torch.arange(len(self.codebook_VD), device=z_ND.device), z_ND.detach())
                self.initialized.fill_(True)
            codes_N = self.lookup(z_ND)
            quantized_ND = self.codebook_VD[codes_N]
            commitment = F.mse_loss(z_ND, quantized_ND)
            if self.training:
                self._learn(z_ND.detach(), codes_N)
            return z_ND + (quantized_ND - z_ND).detach(), codes_N, commitment

    def lookup(self, z_ND: Tensor) -> Tensor:
        """Number of the nearest code of each vector, (N,)."""
        z_ND = z_ND.float()
        # |z - c|^2 without |z|^2, which is the same for every code
        distance_NV = self.codebook_VD.pow(2).sum(1) - 2 * z_ND @ self.codebook_VD.T
        return distance_NV.argmin(1)

    @torch.no_grad()
    def _learn(self, z_ND: Tensor, codes_N: Tensor) -> None:
        one_hot_NV = F.one_hot(codes_N, len(self.codebook_VD)).to(z_ND.dtype)
        self.count_V.lerp_(one_hot_NV.sum(0), 1 - self.decay)
        self.sum_VD.lerp_(one_hot_NV.T @ z_ND, 1 - self.decay)
        self.codebook_VD.copy_(self.sum_VD / self.count_V.clamp(min=1e-5)[:, None])
        even_use = len(z_ND) / len(self.codebook_VD)
        self._move((self.count_V < self.revive_below * even_use).nonzero()[:, 0], z_ND)

    @torch.no_grad()
    def _move(self, dead_M: Tensor, z_ND: Tensor) -> None:
        """Moves codes onto random vectors of the batch, as if each had had even use."""
        chosen_M = torch.randint(len(z_ND), (len(dead_M),), device=z_ND.device)
        even_use = len(z_ND) / len(self.codebook_VD)
        self.codebook_VD[dead_M] = z_ND[chosen_M]
        self.sum_VD[dead_M] = z_ND[chosen_M] * even_use
        self.count_V[dead_M] = even_use
