"""Quantizers: vectors to codes and back, each with its own way to find and to learn codes.

The code of a vector is the index of its nearest row in the codebook, but for the quantizer gumbel,
which takes the most likely code of a linear layer. With two numbers a vector,

    codebook   0: (0, 0)   1: (1, 0)   2: (0, 1)
    vectors    (0.9, 0.2)  (0.1, 0.7)
    codes      1           2
    quantized  (1, 0)      (0, 1)

The decoder gets the quantized vectors. Finding the nearest one has no gradient, so the encoder gets
the gradient of the quantized vectors as if it were its own (straight-through).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.collectives import all_rows, rank_count, rows_of_all, summed

MAX_DISTANCES = 2**26
"""Largest number of distances in memory at once: 256 MiB in float32."""


class Quantizer(nn.Module):
    """Base of the quantizers."""

    def forward(self, z_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize vectors, and learn from them in training.

        Returns:
            The quantized vectors (N, D) with straight-through gradients, the codes (N,), and the
            loss that draws vectors and codes together.
        """
        raise NotImplementedError

    def lookup(self, z_ND: Tensor) -> Tensor:
        """Return the code of each vector, (N,), int64."""
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the vector of each code, with the shape of `codes`, then D."""
        raise NotImplementedError


class LookupQuantizer(Quantizer):
    """Nearest code of a codebook learned by gradient (van den Oord et al. 2017, eq. 3).

    Args:
        size: number of codes in the codebook.
        dim: length of each code's vector.
        normalized: whether vectors and codes are first projected onto the unit sphere, where the
            nearest code is that of the largest cosine (Yu et al. 2021, ViT-VQGAN). With few
            dimensions, nearly all codes of a large codebook are then used.
        commitment: weight of the pull of the vectors to their codes; the pull of the codes to the
            vectors has the weight 1.
    """

    def __init__(self, *, size: int, dim: int, normalized: bool, commitment: float) -> None:
        super().__init__()
        self.normalized = normalized
        self.commitment = commitment
        self.codebook_VD = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))

    def forward(self, z_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z_ND.device.type, enabled=False):  # distances need float32
            z_ND = self._on_sphere(z_ND.float())
            codes_N = self.lookup(z_ND)
            quantized_ND = self.vectors(codes_N)
            pull = F.mse_loss(quantized_ND, z_ND.detach()) + self.commitment * F.mse_loss(
                z_ND, quantized_ND.detach()
            )
            return z_ND + (quantized_ND - z_ND).detach(), codes_N, pull

    def lookup(self, z_ND: Tensor) -> Tensor:
        return nearest(self._on_sphere(z_ND.float()), self._on_sphere(self.codebook_VD))

    def vectors(self, codes: Tensor) -> Tensor:
        return self._on_sphere(F.embedding(codes, self.codebook_VD))

    def _on_sphere(self, z_ND: Tensor) -> Tensor:
        return F.normalize(z_ND, dim=-1) if self.normalized else z_ND


class GumbelQuantizer(Quantizer):
    """Most likely code by a linear layer: a trained gumbel-softmax model (Ramesh et al. 2021).

    It serves published weights, and cannot be trained.
    """

    def __init__(self, *, size: int, dim: int) -> None:
        super().__init__()
        self.logits = nn.Linear(dim, size)
        self.codebook_VD = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))

    def lookup(self, z_ND: Tensor) -> Tensor:
        return torch.cat(
            [self.logits(z).argmax(1) for z in z_ND.split(_rows_at_once(self.codebook_VD))]
        )

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook_VD)


def nearest(z_ND: Tensor, codebook_VD: Tensor) -> Tensor:
    """Return the index of each vector's nearest code by Euclidean distance, (N,), int64.

    Among equally near codes it is the first.
    """
    # |z - c|^2 = |z|^2 - 2 z c + |c|^2, without |z|^2, which is the same for every code.
    square_V, twice_DV = codebook_VD.pow(2).sum(1), 2 * codebook_VD.T
    return torch.cat(
        [(square_V - z @ twice_DV).argmin(1) for z in z_ND.split(_rows_at_once(codebook_VD))]
    )


def _rows_at_once(codebook_VD: Tensor) -> int:
    return max(MAX_DISTANCES // len(codebook_VD), 1)


class EMAQuantizer(Quantizer):
    """Nearest code by Euclidean distance; a code is the moving average of the vectors nearest to it.

    The averages are those of van den Oord et al. 2017, appendix A.1.

    Args:
        size: number of codes in the codebook.
        dim: length of each code's vector.
        decay: decay of the moving averages of each code's count and sum.
        revive_below: a code counts as dead when its moving count falls below this share of even
            use. It is then moved onto a random vector of the batch.
        commitment: weight of the pull of the vectors to their codes.
        revive_far: whether the vectors that dead codes are moved onto are drawn by their squared
            distances to their codes (k-means++, Arthur and Vassilvitskii 2007), not evenly. Rare
            vectors then get codes, too.
    """

    def __init__(
        self,
        *,
        size: int,
        dim: int,
        decay: float,
        revive_below: float,
        commitment: float,
        revive_far: bool = False,
    ) -> None:
        super().__init__()
        self.commitment = commitment
        self.decay = decay
        self.revive_below = revive_below
        self.revive_far = revive_far
        self.codebook_VD: Tensor
        self.count_V: Tensor
        self.sum_VD: Tensor
        self.initialized: Tensor
        self.register_buffer("codebook_VD", torch.zeros(size, dim))
        self.register_buffer("count_V", torch.ones(size))
        self.register_buffer("sum_VD", torch.zeros(size, dim))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, z_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z_ND.device.type, enabled=False):  # distances and averages need float32
            z_ND = z_ND.float()

            # All codes begin on vectors of the first batch.
            if self.training and not self.initialized:
                self._move(
                    torch.arange(len(self.codebook_VD), device=z_ND.device), z_ND.detach(), None
                )
                self.initialized.fill_(True)

            codes_N = self.lookup(z_ND)
            quantized_ND = self.codebook_VD[codes_N]
            pull = self.commitment * F.mse_loss(z_ND, quantized_ND)
            if self.training:
                far_N = (z_ND - quantized_ND).detach().pow(2).sum(1) if self.revive_far else None
                self._learn(z_ND.detach(), codes_N, far_N)
            return z_ND + (quantized_ND - z_ND).detach(), codes_N, pull

    def lookup(self, z_ND: Tensor) -> Tensor:
        return nearest(z_ND.float(), self.codebook_VD)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.codebook_VD[codes]

    @torch.no_grad()
    def _learn(self, z_ND: Tensor, codes_N: Tensor, far_N: Tensor | None) -> None:
        """Update the averages by a batch and its codes, and move dead codes.

        Args:
            z_ND: the vectors of this rank.
            codes_N: their codes.
            far_N: weights by which vectors for dead codes are drawn; None = evenly.
        """
        # Count and sum the vectors of each code, some rows at a time.
        rows = _rows_at_once(self.codebook_VD)
        count_V, sum_VD = torch.zeros_like(self.count_V), torch.zeros_like(self.sum_VD)
        for z, codes in zip(z_ND.split(rows), codes_N.split(rows), strict=True):
            one_hot_NV = F.one_hot(codes, len(self.codebook_VD)).to(z.dtype)
            count_V += one_hot_NV.sum(0)
            sum_VD += one_hot_NV.T @ z

        self.count_V.lerp_(summed(count_V), 1 - self.decay)
        self.sum_VD.lerp_(summed(sum_VD), 1 - self.decay)
        self.codebook_VD.copy_(self.sum_VD / self.count_V.clamp(min=1e-5)[:, None])

        even_use = rank_count() * len(z_ND) / len(self.codebook_VD)
        dead_M = (self.count_V < self.revive_below * even_use).nonzero()[:, 0]
        if len(dead_M):
            self._move(dead_M, z_ND, far_N)

    @torch.no_grad()
    def _move(self, dead_M: Tensor, z_ND: Tensor, weight_N: Tensor | None) -> None:
        """Move codes onto vectors of all ranks' batch, drawn by weight or else evenly.

        Their averages become those of a code with even use. All ranks draw the same vectors,
        because their random numbers are the same.
        """
        total = rank_count() * len(z_ND)
        if weight_N is None:
            chosen_M = torch.randint(total, (len(dead_M),), device=z_ND.device)
        else:
            weights = all_rows(weight_N) + 1e-12
            chosen_M = torch.multinomial(weights, len(dead_M), replacement=True)

        even_use = total / len(self.codebook_VD)
        chosen_MD = rows_of_all(z_ND, chosen_M)
        self.codebook_VD[dead_M] = chosen_MD
        self.sum_VD[dead_M] = chosen_MD * even_use
        self.count_V[dead_M] = even_use
