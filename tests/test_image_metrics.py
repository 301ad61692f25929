"""LPIPS, the discriminator and metrics of images, against published code and formulas by hand."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path

import lpips as published_lpips
import numpy as np
import pytest
import torch
import torchvision
from metric_weights import inception_weights as random_inception_weights
from metric_weights import vgg_weights, write_inception, write_vgg
from pytorch_fid import inception as published_inception
from safetensors.torch import save_file
from scipy.spatial.distance import cdist
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from cm3leon.evaluation import images as metrics
from cm3leon.evaluation.images import (
    FeatureStatistics,
    Inception,
    features,
    frechet_distance,
    lpips,
    precision_recall,
    ssim,
)
from cm3leon.evaluation.metrics import psnr, psnr_each
from cm3leon.tokenizers.image.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from cm3leon.tokenizers.image.perceptual import MEAN, Perceptual
from cm3leon.types import UserError
from cm3leon.weights import read_weights

pytestmark = pytest.mark.stack


def pair_of_images(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and noisy copies of them, each noisier than the one before: uint8 (B, H, W, 3).

    The images are of 8 x 8 squares of one colour, so that most neighbouring pixels are alike.
    """
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, -(-height // 8), -(-width // 8), 3))
    images = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]

    strength_B111 = np.linspace(0.2, 2, count)[:, None, None, None]
    noisy = images + rng.normal(0, 20, images.shape) * strength_B111
    return images.astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


# -------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    return vgg_weights()


@pytest.fixture(scope="module")
def perceptual(vgg: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Perceptual:
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    return Perceptual.load(write_vgg(path, vgg))


@pytest.fixture(scope="module")
def published(vgg: dict[str, Tensor]) -> published_lpips.LPIPS:
    """The authors' own code, with their linear weights, on the same features."""
    with warnings.catch_warnings(action="ignore"):  # it asks torchvision in an old way
        model = published_lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    features = {}
    for name in model.net.state_dict():
        features[name] = vgg[f"features.{name.split('.', 1)[1]}"]
    model.net.load_state_dict(features)
    return model


@pytest.mark.parametrize("size", [(16, 16), (40, 56)])
def test_lpips_is_that_of_its_authors(
    perceptual: Perceptual, published: published_lpips.LPIPS, size: tuple[int, int]
) -> None:
    x_BCHW, y_BCHW = torch.rand(2, 3, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1

    distance_B = perceptual(x_BCHW, y_BCHW)
    assert distance_B.shape == (3,)
    assert distance_B.min() > 0.01
    torch.testing.assert_close(
        distance_B, published(x_BCHW, y_BCHW).flatten(), rtol=1e-5, atol=1e-6
    )
    assert perceptual(x_BCHW, x_BCHW).tolist() == [0, 0, 0]


def test_lpips_has_the_gradient_of_its_authors(
    perceptual: Perceptual, published: published_lpips.LPIPS
) -> None:
    x_BCHW, y_BCHW = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    y_BCHW.requires_grad_()
    gradients = [
        torch.autograd.grad(d(x_BCHW, y_BCHW).sum(), y_BCHW)[0] for d in (perceptual, published)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_gradient_of_lpips_is_finite_where_there_are_no_features(
    vgg: dict[str, Tensor], tmp_path: Path
) -> None:
    """An image of the mean colour is 0 after normalisation, so each convolution gives its bias.

    Where all biases are negative, no feature is left.
    """
    path = tmp_path / "vgg.safetensors"
    negative = {}
    for name, weight in vgg.items():
        negative[name] = torch.full_like(weight, -1) if name.endswith("bias") else weight
    save_file(negative, path)

    y_BCHW = torch.tensor(MEAN)[:, None, None].repeat(1, 1, 16, 16).requires_grad_()
    distance_B = Perceptual.load(path)(torch.rand(1, 3, 16, 16), y_BCHW)
    assert distance_B.item() > 0

    (gradient_BCHW,) = torch.autograd.grad(distance_B.sum(), y_BCHW)
    assert torch.equal(gradient_BCHW, torch.zeros_like(gradient_BCHW))


def test_lpips_is_no_weight_of_what_holds_it(perceptual: Perceptual) -> None:
    holder = nn.ModuleDict({"perceptual": perceptual, "trained": nn.Linear(2, 2)})
    assert list(holder.state_dict()) == ["trained.weight", "trained.bias"]
    assert [name for name, _ in holder.named_parameters()] == ["trained.weight", "trained.bias"]
    holder.load_state_dict(holder.state_dict())

    # Its weights are buffers: moved with the rest, neither saved nor trained.
    assert perceptual.get_buffer("features.0.weight").shape == (64, 3, 3, 3)
    assert not any(buffer.requires_grad for buffer in perceptual.buffers())
    moved = copy.deepcopy(holder).to(torch.float64)
    assert {buffer.dtype for buffer in moved.buffers()} == {torch.float64}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_wrong_weights_are_named(vgg: dict[str, Tensor], tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"vgg16.{ending}"
    save = torch.save if ending == "pth" else save_file

    def sentence() -> str:
        with pytest.raises(UserError) as raised:
            Perceptual.load(path)
        return str(raised.value).removeprefix(str(path)).strip()

    assert sentence() == f"there are no weights at {path}"

    kind = "weights saved by PyTorch" if ending == "pth" else "safetensors"
    for content in (b"", b"<!DOCTYPE html>", b"\x80\x02}q\x00", bytes(1000)):
        path.write_bytes(content)
        assert sentence() == f"cannot be read as {kind}"

    # Tensors that are missing, too many, and of another shape.
    save({name: weight for name, weight in vgg.items() if name != "features.5.bias"}, path)
    assert sentence() == "lacks features.5.bias"
    save({**vgg, "features.1.bias": torch.zeros(2)}, path)
    assert sentence() == "has the unknown features.1.bias"
    save({**vgg, "features.2.bias": torch.zeros(2)}, path)
    assert sentence() == "has another shape for features.2.bias"
    save({"a": torch.zeros(2)}, path)
    assert sentence() == (
        "lacks features.0.bias, features.0.weight, features.10.bias, features.10.weight, "
        "features.12.bias, ..."
    )


def test_a_file_of_weights_runs_no_code(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "weights.pth"
    for content in (Touch(), {"weight": Touch()}):
        torch.save(content, path)
        with pytest.raises(UserError, match="cannot be read"):
            read_weights(path)

    # Also in the format of plain pickles.
    path.write_bytes(pickle.dumps(Touch(), protocol=2))
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()

    torch.save({"epoch": 3, "weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="must hold tensors by their names, and nothing else"):
        read_weights(path)


def test_images_too_small_for_lpips(perceptual: Perceptual) -> None:
    with pytest.raises(UserError, match=r"images of 15x40 pixels are too small .* at least 16$"):
        perceptual(*torch.zeros(2, 1, 3, 15, 40))


def test_lpips_of_arrays_in_batches(
    perceptual: Perceptual, published: published_lpips.LPIPS
) -> None:
    images, noisy = pair_of_images(3, 24, 24)
    distance_B = lpips(perceptual, images, noisy, batch_size=2)
    x, y = (
        torch.from_numpy(a).permute(0, 3, 1, 2).double().div(127.5).sub(1).float()
        for a in (images, noisy)
    )
    np.testing.assert_allclose(distance_B, published(x, y).flatten().detach(), rtol=1e-5)
    assert np.all(np.diff(distance_B) > 0)  # more noise
    assert lpips(perceptual, images[:0], noisy[:0]).shape == (0,)


# ------------------------------------------------------------------------------------ discriminator


@pytest.mark.parametrize(
    ("layers", "pixels", "logits"), [(3, 256, 30), (3, 24, 1), (2, 64, 14), (1, 32, 14)]
)
def test_shape_of_the_verdict(layers: int, pixels: int, logits: int) -> None:
    discriminator = PatchDiscriminator(channels=32, layers=layers)
    assert discriminator(torch.zeros(2, 3, pixels, pixels)).shape == (2, 1, logits, logits)


def test_discriminator_has_the_published_size_and_beginning() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()

    # pix2pix: C64-C128-C256-C512 of 4 x 4 kernels, then one logit. The first and the last
    # convolution have biases; the norms between them have a weight and a bias for each channel.
    widths = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    kernels = sum(16 * before * after for before, after in widths)
    biases_and_norms = 64 + 1 + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in discriminator.parameters()) == kernels + biases_and_norms

    for name, weight in discriminator.named_parameters():
        if weight.dim() == 4:
            assert weight.mean().item() == pytest.approx(0, abs=0.001)
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            mean = 0 if name.endswith("bias") else 1
            assert weight.mean().item() == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(("layers", "field"), [(3, 70), (2, 34), (1, 16)])
def test_a_logit_sees_a_patch(layers: int, field: int) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=32, layers=layers).double()

    # Without the norms, whose mean and variance are those of the whole image.
    for number, block in enumerate(discriminator.blocks):
        if isinstance(block, nn.GroupNorm):
            discriminator.blocks[number] = nn.Identity()

    # The pixels that the middle logit depends on.
    image = torch.rand(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = discriminator(image)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], image)
    rows, columns = gradient[0].abs().sum(0).nonzero(as_tuple=True)
    assert [int(each.max() - each.min()) + 1 for each in (rows, columns)] == [field, field]
    assert 0 < rows.min() < rows.max() < 127


def test_a_verdict_depends_on_no_other_image_and_changes_no_state() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=32).train()
    images = torch.randn(4, 3, 40, 40)
    together = discriminator(images)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    assert not list(discriminator.buffers())


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # max(0, 1 - real) = 0, 0.5, 2; max(0, 1 + fake) = 0, 1, 2
    assert discriminator_loss(real, fake).item() == pytest.approx((2.5 / 3 + 3 / 3) / 2)
    assert generator_loss(fake).item() == pytest.approx(2 / 3)
    assert discriminator_loss(torch.zeros(2), torch.zeros(3)) == 1
    assert discriminator_loss(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_adaptive_weight_by_hand() -> None:
    weight = torch.tensor([1.0, 1.0], requires_grad=True)
    factor = torch.tensor([3.0, 4.0])
    reconstruction, adversarial = (weight * factor).sum(), 2 * weight[1]

    # The gradients of the two losses are (3, 4) and (0, 2), of length 5 and 2.
    chosen = adaptive_weight(reconstruction, adversarial, weight)
    assert chosen.item() == pytest.approx(5 / 2.0001)
    assert not chosen.requires_grad

    (reconstruction + chosen * adversarial).backward()  # the graphs are still there
    assert weight.grad is not None
    assert weight.grad.tolist() == pytest.approx([3, 4 + 2 * 5 / 2.0001])

    # The weight is at most 10,000, and 0 where the reconstruction has no gradient.
    assert adaptive_weight((weight * factor).sum(), 0 * weight.sum(), weight) == 1e4
    assert adaptive_weight(0 * weight.sum(), weight.sum(), weight) == 0


# --------------------------------------------------------------------------------------- PSNR, SSIM


def test_psnr_of_each_image() -> None:
    images, noisy = pair_of_images(4, 9, 14)
    noisy[2] = images[2]
    with np.errstate(divide="ignore"):
        expected = [
            peak_signal_noise_ratio(a, b, data_range=255)
            for a, b in zip(images, noisy, strict=True)
        ]

    assert expected[2] == math.inf
    np.testing.assert_allclose(psnr_each(images, noisy), expected, rtol=1e-12)
    assert psnr_each(images[:1], noisy[:1])[0] == pytest.approx(psnr(images[:1], noisy[:1]))


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (37, 24)])
def test_ssim_is_that_of_scikit_image(size: tuple[int, int]) -> None:
    images, noisy = pair_of_images(4, *size)
    images[3], noisy[3] = 255, 0
    noisy[2] = images[2]

    expected = [
        structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2,
            data_range=255,
        )
        for a, b in zip(images, noisy, strict=True)
    ]
    similarity_B = ssim(images, noisy)
    np.testing.assert_allclose(similarity_B, expected, atol=1e-12)
    assert similarity_B[2] == pytest.approx(1)

    # White and black are flat, so only the luminance term is left: C1 / (255^2 + C1), where
    # C1 = (0.01 * 255)^2.
    assert similarity_B[3] == pytest.approx(1e-4 / (1 + 1e-4))


def test_ssim_needs_a_whole_window() -> None:
    with pytest.raises(ValueError, match="sides of at least 11 pixels, got 10x30"):
        ssim(*np.zeros((2, 1, 10, 30, 3), np.uint8))


# --------------------------------------------------------------------------------- Fréchet distance


def of_moments(mean_D: np.ndarray, covariance_DD: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Features (M, D) with exactly this mean and unbiased covariance."""
    noise = np.random.default_rng(seed).normal(size=(count, len(mean_D)))
    orthonormal, _ = np.linalg.qr(noise - noise.mean(0))
    return mean_D + orthonormal * math.sqrt(count - 1) @ np.linalg.cholesky(covariance_DD).T


def test_frechet_distance_of_independent_normals() -> None:
    """It is the squared distance of the means plus that of the standard deviations."""
    rng = np.random.default_rng(3)
    (m, other_m), (s, other_s) = rng.normal(size=(2, 6)), rng.uniform(0.1, 3, (2, 6))
    x, y = of_moments(m, np.diag(s**2), 40, 1), of_moments(other_m, np.diag(other_s**2), 30, 2)

    expected = np.sum((m - other_m) ** 2) + np.sum((s - other_s) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


class Pixels(nn.Module):
    """An extractor whose features are the pixels."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1)


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(100, 3, 2, 2).double(), torch.rand(80, 3, 2, 2).double() ** 2

    metric = FrechetInceptionDistance(feature=Pixels(), normalize=True, input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert frechet_distance(x.flatten(1).numpy(), y.flatten(1).numpy()) == pytest.approx(
        metric.compute().item(), rel=1e-8
    )


def test_frechet_distance_of_fewer_images_than_features() -> None:
    """The covariances are singular, and have no root by the usual way.

    The trace of the root of their product is then the nuclear norm of the product of the centred
    features, which has 2 x 7 numbers here.
    """
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2, 200)) @ np.diag(np.geomspace(1e-4, 10, 200))
    y = rng.normal(3, 2, (7, 200))

    a, b = ((each - each.mean(0)) / math.sqrt(len(each) - 1) for each in (x, y))
    common = np.linalg.norm(a @ b.T, ord="nuc")
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * common
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("count", [2, 20, 200])
def test_equal_sets_have_no_distance(scale: float, count: int) -> None:
    x = np.random.default_rng(6).normal(5, 1, (count, 50)) * scale
    assert 0 <= frechet_distance(x, x[::-1]) < 1e-11 * scale**2 * 50
    assert frechet_distance(x, x + scale) == pytest.approx(50 * scale**2, rel=1e-9)
    constant = np.full((count, 50), scale)
    assert frechet_distance(constant, constant) == pytest.approx(0, abs=1e-20 * scale**2)


def test_statistics_in_parts_are_those_of_the_whole() -> None:
    """The features lie far from 0, where a sum of squares would lose the variance."""
    x = np.random.default_rng(7).normal(1e6, 1, (101, 8))
    statistics = FeatureStatistics()
    for part in np.split(x, [1, 1, 2, 50]):
        statistics.add(part)
    assert statistics.count == 101
    np.testing.assert_allclose(statistics.mean_D, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(
        statistics.covariance_DD, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_statistics_of_float32_are_in_float64() -> None:
    x = np.random.default_rng(8).normal(100, 1, (500, 4)).astype(np.float32)
    statistics = FeatureStatistics()
    statistics.add(x)
    np.testing.assert_allclose(
        statistics.covariance_DD, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12
    )


@pytest.mark.parametrize("held", [1, 200, 2**23])
def test_precision_and_recall_are_those_of_every_distance(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "HELD", held)
    rng = np.random.default_rng(held)
    for _ in range(6):
        # Features as Inception's: positive and far from 0. Some of them are equal, so that radii
        # are 0 or met exactly.
        real_MD = (np.abs(rng.normal(size=(60, 24))) + 30).astype(np.float32)
        made_ND = (np.abs(rng.normal(size=(45, 24))) * 1.1 + 30).astype(np.float32)
        real_MD[:6], made_ND[:9] = real_MD[0], real_MD[2:11]
        made_ND[20:25] = made_ND[20]

        def share_inside(points_ND: np.ndarray, of_MD: np.ndarray) -> float:
            radius_M = np.sort(cdist(of_MD, of_MD), axis=1)[:, 3]
            return float((cdist(points_ND, of_MD) <= radius_M).any(axis=1).mean())

        expected = share_inside(made_ND, real_MD), share_inside(real_MD, made_ND)
        assert precision_recall(real_MD, made_ND) == expected
        assert 0 < expected[0] < 1


def test_inception_multiplies_in_whole_float32() -> None:
    seen: list[bool] = []

    class Network(nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return x_BCHW.mean((2, 3))

    before = torch.backends.cudnn.allow_tf32
    Inception(Network(), torch.device("cpu"))(np.zeros((2, 5, 5, 3), np.uint8))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_what_has_no_frechet_distance() -> None:
    x = np.zeros((3, 4))
    with pytest.raises(ValueError, match="of 1 images is undefined"):
        frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="features of 4 and 3 numbers"):
        frechet_distance(x, x[:, :3])


# ---------------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def inception_weights() -> dict[str, Tensor]:
    return random_inception_weights()


@pytest.fixture(scope="module")
def inception_file(
    inception_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    return write_inception(path, inception_weights)


def test_inception_is_that_of_pytorch_fid(
    inception_weights: dict[str, Tensor], inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        published_inception, "load_state_dict_from_url", lambda *_, **__: inception_weights
    )
    theirs = published_inception.InceptionV3().eval()
    ours = Inception.load(inception_file)
    to_tensor = torchvision.transforms.functional.to_tensor

    # Both resize to 299 x 299: the first images are enlarged, the others reduced.
    for size in ((32, 48), (310, 400)):
        images, _ = pair_of_images(2, *size)
        with torch.no_grad():
            (expected,) = theirs(torch.stack([to_tensor(image) for image in images]))

        found = features(ours, images, batch_size=1)
        assert found.shape == (2, 2048)
        assert found.dtype == np.float32
        assert np.abs(found[0] - found[1]).max() > 0.01
        np.testing.assert_allclose(found, expected.flatten(1).numpy(), rtol=1e-4, atol=5e-5)


def test_wrong_inception_weights_are_named(
    inception_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "inception.safetensors"

    # torchvision's own weights have 1,000 classes; those of the FID have 1,008.
    head = {"fc.bias": torch.zeros(1000), "fc.weight": torch.zeros(1000, 2048)}
    save_file({**inception_weights, **head}, path)
    with pytest.raises(
        UserError, match=r"inception\.safetensors has another shape for fc\.bias, fc\.weight$"
    ):
        Inception.load(path)


def test_any_function_extracts_features() -> None:
    images, _ = pair_of_images(5, 8, 8)
    seen: list[int] = []

    def colour(images_BHWC: np.ndarray) -> np.ndarray:
        seen.append(len(images_BHWC))
        return images_BHWC.mean((1, 2))

    np.testing.assert_array_equal(features(colour, images, batch_size=2), images.mean((1, 2)))
    assert seen == [2, 2, 1]
