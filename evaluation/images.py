"""Distances of images, and of sets of images, as functions of uint8 arrays (B, H, W, 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.tokenizers.image.base import to_signal
from cm3leon.tokenizers.image.perceptual import Perceptual, fit_weights
from cm3leon.weights import read_weights

Extractor = Callable[[np.ndarray], np.ndarray]
"""uint8 images (B, H, W, 3) to features (B, D)."""
WINDOW = 11
"""Side, in pixels, of the window in which structures are compared."""
HELD = 2**23
"""Most numbers of a matrix of distances in memory: 64 MiB in float64."""
SPARE = 4
"""Neighbours beyond the k-th whose distances are computed exactly."""
ROUNDED = 1 + 1e-12
"""Squared distances up to this multiple of a squared radius lie within it."""

# ---------------------------------------------------------------------------------- pairs of images


def ssim(images_BHWC: np.ndarray, reconstructed_BHWC: np.ndarray) -> np.ndarray:
    """Mean structural similarity of each image, (B,), 1 for identical images (Wang et al. 2004,
    IEEE TIP 13, eq. 13).

    As published: a Gaussian window of 11x11 pixels with sigma 1.5, at all positions inside the
    image; K1 = 0.01, K2 = 0.03. Red, green and blue are compared separately, and count equally.

    Raises:
        ValueError: for images with a side below 11 pixels.
    """
    H, W = images_BHWC.shape[1:3]
    if min(H, W) < WINDOW:
        raise ValueError(
            f"structural similarity needs sides of at least {WINDOW} pixels, got {H}x{W}"
        )
    pairs = zip(images_BHWC, reconstructed_BHWC, strict=True)
    return np.array([_ssim_of_one(*pair) for pair in pairs])


def _ssim_of_one(image_HWC: np.ndarray, reconstructed_HWC: np.ndarray) -> float:
    """Mean over all windows of how alike luminance is, times how alike contrast and structure are.

    In float64, since variances are differences of nearly equal numbers.
    """
    x_HWC, y_HWC = image_HWC.astype(np.float64), reconstructed_HWC.astype(np.float64)
    x_mean, y_mean = _in_windows(x_HWC), _in_windows(y_HWC)
    x_variance, y_variance = _in_windows(x_HWC**2) - x_mean**2, _in_windows(y_HWC**2) - y_mean**2
    covariance = _in_windows(x_HWC * y_HWC) - x_mean * y_mean
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * x_mean * y_mean + c1) / (x_mean**2 + y_mean**2 + c1)
    structure = (2 * covariance + c2) / (x_variance + y_variance + c2)
    return float((luminance * structure).mean())


def _in_windows(values_HWC: np.ndarray) -> np.ndarray:
    """Weighted mean of every window inside the image, (H - 10, W - 10, C)."""
    from scipy.ndimage import gaussian_filter  # takes half a second to import

    border = WINDOW // 2
    return gaussian_filter(values_HWC, sigma=1.5, radius=border, axes=(0, 1))[
        border:-border, border:-border
    ]


def lpips(
    perceptual: Perceptual,
    images_BHWC: np.ndarray,
    reconstructed_BHWC: np.ndarray,
    batch_size: int = 16,
) -> np.ndarray:
    """Perceptual distance (LPIPS, VGG16) of each image, (B,), 0 for identical images."""
    device = perceptual.mean_C11.device
    distances = []
    with torch.inference_mode():
        for start in range(0, len(images_BHWC), batch_size):
            part = slice(start, start + batch_size)
            original = to_signal(torch.from_numpy(images_BHWC[part]).to(device))
            rebuilt = to_signal(torch.from_numpy(reconstructed_BHWC[part]).to(device))
            distances.append(perceptual(original, rebuilt).cpu().numpy())
    if not distances:
        return np.zeros(0, np.float32)
    return np.concatenate(distances)


# ----------------------------------------------------------------------------------- sets of images


def features(extractor: Extractor, images_BHWC: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Features (B, D) of at least one image, `batch_size` images at a time."""
    found = []
    for start in range(0, len(images_BHWC), batch_size):
        found.append(extractor(images_BHWC[start : start + batch_size]))
    return np.concatenate(found)


class FeatureStatistics:
    """Mean and covariance of features that arrive in parts, in float64 (Chan et al. 1979).

    So a set of 50,000 images is compared without holding their features, or the images:

        for images_BHWC in batches:
            statistics.add(extractor(images_BHWC))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_D: np.ndarray = np.zeros(())
        self._scatter_DD: np.ndarray = np.zeros(())

    def add(self, features_BD: np.ndarray) -> None:
        """Add the features of more images."""
        if not len(features_BD):
            return
        features_BD = features_BD.astype(np.float64)
        mean_D = features_BD.mean(0)
        centred_BD = features_BD - mean_D

        # What the new features add: the scatter around their own mean, and the scatter of the two
        # means around the common one.
        step_D = mean_D - self.mean_D
        total = self.count + len(features_BD)
        between = self.count * len(features_BD) / total
        self._scatter_DD = (
            self._scatter_DD + centred_BD.T @ centred_BD + between * np.outer(step_D, step_D)
        )
        self.mean_D = self.mean_D + step_D * (len(features_BD) / total)
        self.count = total

    @property
    def covariance_DD(self) -> np.ndarray:
        """Unbiased, as in pytorch-fid. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(
                f"the covariance of the features of {self.count} images is undefined, it needs two"
            )
        return self._scatter_DD / (self.count - 1)

    def frechet(self, other: FeatureStatistics) -> float:
        """Fréchet distance of two normal distributions with these means and covariances (Dowson and
        Landau 1982).

        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), which is the FID for the features of `Inception`
        (Heusel et al. 2017, arXiv 1706.08500). With C = L L^T, the last trace is the sum of the
        singular values of L^T L', which needs no root of an asymmetric matrix and is exact for
        fewer images than features too.

        Raises:
            ValueError: for fewer than two images, or features of another size.
        """
        if self.mean_D.shape != other.mean_D.shape:
            raise ValueError(
                f"features of {self.mean_D.size} and {other.mean_D.size} numbers have no distance"
            )
        left, right = _root(self.covariance_DD), _root(other.covariance_DD)
        common = np.linalg.svd(left.T @ right, compute_uv=False).sum()
        spread = np.trace(self.covariance_DD) + np.trace(other.covariance_DD)
        # Rounding can make the distance of equal sets negative.
        return max(float(np.square(self.mean_D - other.mean_D).sum() + spread - 2 * common), 0.0)


def frechet_distance(features_MD: np.ndarray, other_ND: np.ndarray) -> float:
    """Fréchet distance of two sets of features, see `FeatureStatistics.frechet`.

    It falls with the number of images: compare figures only of equally many.
    """
    statistics, other = FeatureStatistics(), FeatureStatistics()
    statistics.add(features_MD)
    other.add(other_ND)
    return statistics.frechet(other)


@torch.inference_mode()
def precision_recall(
    real_MD: np.ndarray,
    generated_ND: np.ndarray,
    neighbours: int = 3,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    Precision is the share of generated features inside the hyperspheres of real ones, whose radius
    is the distance to the k-th nearest neighbour among the real features. Recall is the same with
    both sets exchanged.

    Distances come from matrix products in float64. Where one is too close to a radius to decide,
    the difference itself is computed; a distance larger by a part in 10^12 still counts as inside.

    Args:
        device: where the products are computed; it must support float64.

    Raises:
        ValueError: for no more features of a kind than neighbours.
    """
    if min(len(real_MD), len(generated_ND)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images of each kind")
    # Moving all features does not change distances; around 0, products have the least rounding.
    mean_D = real_MD.mean(0, dtype=np.float64)
    real = torch.from_numpy(real_MD - mean_D).to(device)
    generated = torch.from_numpy(generated_ND - mean_D).to(device)
    real_radius_M = _squared_radii(real, neighbours)
    generated_radius_N = _squared_radii(generated, neighbours)

    # Some generated features at a time, so that their distances to all real ones fit the memory.
    within_real_N = torch.zeros(len(generated), dtype=torch.bool, device=device)
    within_generated_M = torch.zeros(len(real), dtype=torch.bool, device=device)
    rows = _rows_at_once(len(real))
    for first in range(0, len(generated), rows):
        part = slice(first, first + rows)
        squares_AM, error_AM = _squared_distances(generated[part], real)

        # Recompute the distances that the products leave undecided.
        for radius in (real_radius_M[None, :], generated_radius_N[part, None]):
            unsure = ((squares_AM - radius).abs() <= error_AM).nonzero()
            for pairs in unsure.split(_rows_at_once(real.shape[1])):
                a, m = pairs.unbind(1)
                squares_AM[a, m] = (generated[part][a] - real[m]).square().sum(1)

        within_real_N[part] = (squares_AM <= real_radius_M * ROUNDED).any(1)
        within_generated_M |= (squares_AM <= generated_radius_N[part, None] * ROUNDED).any(0)
    return float(within_real_N.double().mean()), float(within_generated_M.double().mean())


def _squared_radii(features_MD: Tensor, neighbours: int) -> Tensor:
    """Squared distance (M,) of each feature to its k-th nearest other feature."""
    radii = []
    for part_AD in features_MD.split(_rows_at_once(len(features_MD))):
        # The nearest feature is the feature itself. A few spare ones are looked at, since products
        # can confuse neighbours with nearly equal distances; the differences then order them.
        squares_AM, _ = _squared_distances(part_AD, features_MD)
        found = min(neighbours + 1 + SPARE, len(features_MD))
        nearest_AK = squares_AM.topk(found, dim=1, largest=False).indices
        columns = []
        for nearest_A in nearest_AK.unbind(1):
            columns.append((part_AD - features_MD[nearest_A]).square().sum(1))
        radii.append(torch.stack(columns, 1).sort(1).values[:, neighbours])
    return torch.cat(radii)


def _squared_distances(a_AD: Tensor, b_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (A, B) by a matrix product, and a bound on the error of each."""
    sizes_AB = a_AD.square().sum(1)[:, None] + b_BD.square().sum(1)
    squares_AB = torch.addmm(sizes_AB, a_AD, b_BD.T, alpha=-2)
    # The error of a sum of D products is at most D times the precision of its terms.
    return squares_AB, sizes_AB * (2 * a_AD.shape[1] * torch.finfo(torch.float64).eps)


def _rows_at_once(columns: int) -> int:
    """Rows of a matrix of that many columns that may be in memory at a time."""
    return max(1, HELD // columns)


def cell_features(images_BHWC: np.ndarray, cells: int = 6) -> np.ndarray:
    """Mean colours (B, 3 * cells * cells) of the cells of each image, with `cells` of them a side:
    features for small, plain images."""
    B, H, W, _ = images_BHWC.shape
    rows, columns = np.arange(cells) * H // cells, np.arange(cells) * W // cells
    sums_BRWC = np.add.reduceat(images_BHWC.astype(np.float64), rows, axis=1)
    sums_BRSC = np.add.reduceat(sums_BRWC, columns, axis=2)
    areas_RS = np.outer(np.diff(np.append(rows, H)), np.diff(np.append(columns, W)))
    return (sums_BRSC / areas_RS[None, :, :, None]).reshape(B, -1)


def _root(covariance_DD: np.ndarray) -> np.ndarray:
    """L (D, R) of rank R with L L^T = covariance."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    # A zero comes out as rounding noise, whose root is not small: 1e-16 gives 1e-8, thousands of
    # times.
    kept_D = values_D > len(values_D) * np.finfo(np.float64).eps * values_D.max()
    return vectors_DD[:, kept_D] * np.sqrt(values_D[kept_D])


# ---------------------------------------------------------------------------------------- Inception


class Inception:
    """Extractor for the FID: the 2048 features after the last pooling of an Inception v3, exactly
    as in pytorch-fid.

    This network was trained in TensorFlow, and differs from torchvision's in its pooling. Images
    are resized to 299x299 by bilinear interpolation without smoothing, which aliases larger images,
    as published.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._network = network.to(device).eval()
        self._device = device

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Inception:
        """Load pytorch-fid's weights (pt_inception-2015-12-05-6726825d.pth, or the same as
        safetensors).

        Raises:
            UserError: for a file that is missing, cannot be read, or does not hold this network's
                weights.
        """
        # The file's weights replace the initial ones, which need no memory.
        with torch.device("meta"):
            network = _network()
        fit_weights(network, read_weights(path), path)
        network.fc = nn.Identity()
        return cls(network, torch.device(device))

    @torch.inference_mode()
    def __call__(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Features (B, 2048), float32, of uint8 RGB images of any size."""
        images_BCHW = (
            torch.from_numpy(images_BHWC).to(self._device).permute(0, 3, 1, 2).float() / 255
        )
        resized_BCHW = F.interpolate(
            images_BCHW, size=(299, 299), mode="bilinear", align_corners=False
        )
        with _whole_float32():
            return self._network(2 * resized_BCHW - 1).cpu().numpy()


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Keep cuDNN from rounding factors to 10 bits (TF32), so that distances are the same on a
    GPU."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _network() -> nn.Module:
    """Inception v3 as it was trained in TensorFlow, made of torchvision's blocks."""
    from torchvision.models import inception  # takes seconds, see `perceptual.py`

    # Where torchvision averages over the zeros around an image too, this network does not.
    blocks = [
        inception.BasicConv2d,
        _pooled(inception.InceptionA, _average),
        inception.InceptionB,
        _pooled(inception.InceptionC, _average),
        inception.InceptionD,
        _pooled(inception.InceptionE, _average),
    ]
    network = inception.Inception3(
        1008,
        aux_logits=False,
        inception_blocks=[*blocks, inception.InceptionAux],
        init_weights=False,
    )

    # Its last block takes the largest of the pixels instead of their average.
    network.Mixed_7c = _pooled(
        inception.InceptionE, partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    )(2048)
    return network


def _pooled(block: Any, pool: Callable[[Tensor], Tensor]) -> Any:
    """torchvision's block with another pooling in its last branch."""

    class Pooled(block):  # type: ignore[misc]  # torchvision's, which has no types
        def forward(self, x_BCHW: Tensor) -> Tensor:
            branches_BCHW, pooled_BCHW = super().forward(x_BCHW), self.branch_pool(pool(x_BCHW))
            return torch.cat([branches_BCHW[:, : -pooled_BCHW.shape[1]], pooled_BCHW], 1)

    return Pooled


def _average(x_BCHW: Tensor) -> Tensor:
    """TensorFlow's average pooling: of the pixels within the image only."""
    return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)
