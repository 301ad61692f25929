"""PSNR, SSIM, FID, CLIP score, CIDEr and BLEU agree with other implementations.

A few photographs and captions are enough here; benchmarks/metrics_reference.py compares many more.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.text import BLEUScore

from cm3leon.evaluation.captions import caption_scores
from cm3leon.evaluation.images import cell_features, frechet_distance, precision_recall, ssim
from cm3leon.evaluation.metrics import psnr_each
from cm3leon.retrievers.encoder import ClipEncoder, EncoderConfig

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "metrics_reference.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metrics_reference", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their annotations up by the module's name.
    sys.modules["metrics_reference"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Two photographs that scikit-image ships."""
    return [data.astronaut(), data.coffee()]


def test_psnr_and_ssim_of_photographs(benchmark: ModuleType, photographs: list[np.ndarray]) -> None:
    # Each crop has a pair that JPEG changes: the first one most, the last one hardly.
    images_BHWC = benchmark.crops(photographs, 4, seed=1)
    pairs = zip(images_BHWC, (5, 30, 60, 95), strict=True)
    rebuilt_BHWC = np.stack([benchmark.as_jpeg(image, quality) for image, quality in pairs])
    similarity_B, psnr_B = ssim(images_BHWC, rebuilt_BHWC), psnr_each(images_BHWC, rebuilt_BHWC)

    assert similarity_B.min() < 0.9

    for number, (one, other) in enumerate(zip(images_BHWC, rebuilt_BHWC, strict=True)):
        assert psnr_B[number] == pytest.approx(
            peak_signal_noise_ratio(one, other, data_range=255), rel=1e-12
        )
        of_scikit_image = benchmark.published_ssim(one, other)
        assert similarity_B[number] == pytest.approx(of_scikit_image, abs=1e-12)

        # torchmetrics' own mean also counts windows over a mirrored border. Away from the border
        # both maps must agree.
        one_BCHW, other_BCHW = (
            torch.from_numpy(each.copy()).permute(2, 0, 1)[None].double() for each in (one, other)
        )
        _, map_BCHW = structural_similarity_index_measure(
            one_BCHW, other_BCHW, data_range=255.0, return_full_image=True
        )
        assert similarity_B[number] == pytest.approx(
            float(map_BCHW[..., 5:-5, 5:-5].mean()), abs=1e-9
        )


def test_frechet_distance_of_photographs(
    benchmark: ModuleType, photographs: list[np.ndarray]
) -> None:
    """The Fréchet distance agrees with torchmetrics and with the nuclear norm.

    The features are the mean colours of cells, so that no network is needed.
    """
    real_BD = cell_features(benchmark.crops(photographs[:2], 60, 1), 3)
    other_BD = cell_features(benchmark.crops(photographs[:1], 60, 2), 3)

    # torchmetrics computes the features itself; this network passes on what it is given.
    identity = nn.Identity()
    identity.num_features = real_BD.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real_BD), real=True)
    metric.update(torch.from_numpy(other_BD), real=False)

    distance = frechet_distance(real_BD, other_BD)
    assert distance > 100
    assert distance == pytest.approx(float(metric.compute()), rel=1e-7)
    assert distance == pytest.approx(benchmark.frechet_by_hand(real_BD, other_BD), rel=1e-10)

    # One photograph's crops lie among those of two photographs, and not the other way round.
    precision, recall = precision_recall(real_BD, other_BD)
    assert precision > 0.9
    assert 0.3 < recall < 0.8


def test_clip_score_is_that_of_torchmetrics(
    benchmark: ModuleType, photographs: list[np.ndarray]
) -> None:
    """With a small CLIP, open_clip's on our side and transformers' on theirs.

    Their side has its own tokenizer and its own preparation of pixels.
    """
    torch.manual_seed(0)
    config = EncoderConfig(architecture=None, image_size=benchmark.CROP, patch_size=32)
    encoder = ClipEncoder(config).eval()
    texts = ["an astronaut in an orange suit, smiling", "A cup of coffee on a wooden table!"]
    images_BHWC = benchmark.crops(photographs, 2, seed=3)

    ours_B = (encoder.encode_images(images_BHWC) * encoder.encode_texts(texts)).sum(1)
    theirs_B = benchmark.torchmetrics_clip_scores(encoder, texts, images_BHWC)
    np.testing.assert_allclose(ours_B, theirs_B, atol=1e-6)

    # A constant score would agree, too.
    assert abs(ours_B[0] - ours_B[1]) > 1e-3


def test_captions_score_as_by_their_formulas_and_torchmetrics(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The captions are Unicode's names of emoji; each one's references are its two neighbours."""
    pytest.importorskip("pycocoevalcap")
    # Without Java, words are found by a pattern: alike on every machine.
    monkeypatch.setattr(shutil, "which", lambda _: None)

    names = [unicodedata.name(chr(code)).replace("-", " ") for code in range(0x1F600, 0x1F640)]
    names = [name.lower() for name in names]
    captions = names[1:-1]

    # Of two references that are equally far from the caption's length, BLEU takes the shorter one
    # and torchmetrics the first one. The shorter one comes first, so both take the same.
    references = []
    for number in range(len(captions)):
        neighbours = (names[number], names[number + 2])
        references.append(sorted(neighbours, key=lambda text: len(text.split())))

    scores = caption_scores(captions, references)
    assert 0.5 < scores.cider < 9
    assert scores.cider == pytest.approx(benchmark.cider_by_hand(captions, references), rel=1e-9)

    assert 0.1 < scores.bleu[3] < 0.9
    for order, bleu in enumerate(scores.bleu, 1):
        metric = BLEUScore(n_gram=order).set_dtype(torch.float64)
        assert bleu == pytest.approx(float(metric(captions, references)), rel=1e-6)
