"""Feature images of photographs: edges, scribbles, segments, depth and normals, which images are drawn by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config import NonNegativeFloat, PositiveFloat, PositiveInt
from cm3leon.permissions import check_folder_readable
from cm3leon.registry import EXTRACTORS
from cm3leon.types import UserError
from cm3leon.weights import check_no_adapter


class Extractor:
    """Base of the extractors: what is seen in an image. Registered in `EXTRACTORS`, built as `cls(config)`."""

    kind: str
    """What the templates call it, of `FEATURES`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """The feature image (H, W, 3), uint8, of an image (H, W, 3), uint8."""
        raise NotImplementedError


@EXTRACTORS.register("canny")
class Canny(Extractor):
    """Canny's edges (1986), by scikit-image: white on black."""

    kind = "canny"

    @dataclass(kw_only=True)
    class Config:
        """Of Canny's method."""

        sigma: NonNegativeFloat = 1.4
        """Standard deviation of the blur before, in pixels."""
        low: NonNegativeFloat = 0.08
        """Gradient from which an edge goes on, of 1 from black to white."""
        high: NonNegativeFloat = 0.2
        """Gradient from which an edge begins."""

    config: Config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        canny = _scikit_image("feature").canny
        config = self.config
        return _grey(canny(_luma(pixels_HWC), config.sigma, config.low, config.high))


@EXTRACTORS.register("soft_edge")
class SoftEdge(Extractor):
    """How much the colours change, without any weights: it stands in for HED, whose edges are learned."""

    kind = "hed"

    @dataclass(kw_only=True)
    class Config:
        """How fine."""

        sigma: PositiveFloat = 1.5
        """Standard deviation of the Gaussian whose gradient is taken, in pixels."""

    config: Config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        from scipy.ndimage import gaussian_gradient_magnitude

        channels = [
            gaussian_gradient_magnitude(
                pixels_HWC[..., channel].astype(np.float32), self.config.sigma
            )
            for channel in range(3)
        ]
        strength_HW = np.max(channels, axis=0)
        return _grey(strength_HW / max(float(np.quantile(strength_HW, 0.99)), 1.0))


@EXTRACTORS.register("scribble")
class Scribble(Extractor):
    """Strong edges as thick lines of one width, as a child would draw them."""

    kind = "scribble"

    @dataclass(kw_only=True)
    class Config:
        """How it is drawn."""

        share: PositiveFloat = 0.1
        """Share of the pixels with the strongest edges that lines are drawn along."""
        width: PositiveInt = 3
        """Of lines, in pixels."""

    config: Config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        from scipy.ndimage import binary_dilation

        edge_HW = SoftEdge(SoftEdge.Config(sigma=2.0))(pixels_HWC)[..., 0]
        strong_HW = edge_HW >= max(np.quantile(edge_HW, 1 - self.config.share), 32)
        thin_HW = _scikit_image("morphology").skeletonize(strong_HW)
        return _grey(binary_dilation(thin_HW, np.ones((self.config.width,) * 2)))


@EXTRACTORS.register("regions")
class Regions(Extractor):
    """Felzenszwalb's regions of like colour (2004), each in a colour of its own: segments without their classes."""

    kind = "segmentation"

    @dataclass(kw_only=True)
    class Config:
        """How large."""

        scale: PositiveFloat = 200.0
        """Larger for larger regions."""

    config: Config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        segment = _scikit_image("segmentation").felzenszwalb
        least = max(8, pixels_HWC.shape[0] * pixels_HWC.shape[1] // 400)
        return palette()[segment(pixels_HWC, scale=self.config.scale, min_size=least) % 256]


class _Learned(Extractor):
    """Base of the extractors by a model in transformers' format on disk, which is loaded when it is first used."""

    loads: str
    """Which of transformers' classes."""

    @dataclass(kw_only=True)
    class Config:
        """Which model."""

        path: Path
        """Folder of the model, with its preprocessor_config.json."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not (config.path / "config.json").is_file():
            raise UserError(
                f"path is {config.path}, which holds no model in transformers' format: config.json is missing"
            )

    @cached_property
    def _model(self) -> Any:
        return _transformers(self.config.path, self.loads)


@EXTRACTORS.register("depth")
class Depth(_Learned):
    """Depth by a model in transformers' format on disk (DPT, Depth Anything): near is bright."""

    kind = "depth"

    loads = "AutoModelForDepthEstimation"

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        return _grey(self.depth(pixels_HWC))

    def depth(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """How near each pixel is, (H, W), from 0 to 1."""
        import torch
        import torch.nn.functional as F

        processor, model = self._model
        with torch.inference_mode():
            depth_1hw = model(**processor(images=pixels_HWC, return_tensors="pt")).predicted_depth
        depth_HW = (
            F.interpolate(depth_1hw[:, None], pixels_HWC.shape[:2], mode="bicubic")[0, 0]
            .float()
            .numpy()
        )
        low, high = float(depth_HW.min()), float(depth_HW.max())
        return (depth_HW - low) / max(high - low, 1e-6)


@EXTRACTORS.register("normals")
class Normals(Extractor):
    """Normals of the surface that the depth describes."""

    kind = "normals"

    @dataclass(kw_only=True)
    class Config:
        """Which depth."""

        path: Path
        """Folder of the depth model, see `depth`."""
        strength: PositiveFloat = 4.0
        """Slope of a change of depth of 1 across the image's width."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._depth = Depth(Depth.Config(path=config.path))

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        depth_HW = self._depth.depth(pixels_HWC)
        slope_y, slope_x = np.gradient(depth_HW * self.config.strength * depth_HW.shape[1] / 4)
        normal_HWC = np.stack([-slope_x, -slope_y, np.ones_like(depth_HW)], -1)
        normal_HWC /= np.linalg.norm(normal_HWC, axis=-1, keepdims=True)
        return ((normal_HWC + 1) * 127.5).round().astype(np.uint8)


@EXTRACTORS.register("classes")
class Classes(_Learned):
    """Semantic segments by a model in transformers' format on disk (SegFormer, Mask2Former's semantic heads)."""

    kind = "segmentation"

    loads = "AutoModelForSemanticSegmentation"

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        import torch
        import torch.nn.functional as F

        processor, model = self._model
        with torch.inference_mode():
            logits_1Khw = model(**processor(images=pixels_HWC, return_tensors="pt")).logits
        class_HW = (
            F.interpolate(logits_1Khw, pixels_HWC.shape[:2], mode="bilinear")[0].argmax(0).numpy()
        )
        return palette()[class_HW % 256]


def palette() -> np.ndarray:
    """256 colours (256, 3) far apart for neighbouring numbers, as PASCAL VOC colours its classes; 0 is black."""
    numbers = np.arange(256)
    result = np.zeros((256, 3), np.uint8)
    for shift in range(8):
        for channel in range(3):
            bit = (numbers >> (3 * shift + channel)) & 1
            result[:, channel] |= (bit << (7 - shift)).astype(np.uint8)
    return result


def _luma(pixels_HWC: np.ndarray) -> np.ndarray:
    """Brightness from 0 to 1 (ITU-R BT.601)."""
    return (pixels_HWC.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)) / 255


def _grey(values_HW: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as a grey image."""
    grey_HW = (255 * np.clip(values_HW.astype(np.float32), 0, 1)).round().astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, -1)


def _scikit_image(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"skimage.{module}")
    except ImportError as error:
        raise UserError(
            "this feature needs the package scikit-image (pip install scikit-image)"
        ) from error


def _transformers(path: Path, kind: str) -> tuple[Any, Any]:
    """The processor and the model of a folder; weights are read from safetensors alone, nothing is downloaded."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "this feature needs the package transformers (pip install transformers)"
        ) from error
    check_folder_readable(path)
    check_no_adapter(path)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)
        model = getattr(transformers, kind).from_pretrained(
            path, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"path is {path}, which cannot be read: {error}") from error
    return processor, model.eval()
