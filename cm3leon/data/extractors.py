"""Feature images computed from photographs: edges, scribbles, poses, segments, depth and normals.

Each is computed by a well-kept package: by scikit-image without any weights, by ControlNet's
detectors (controlnet_aux) or by models of transformers with weights from a folder on disk. Nothing
is downloaded.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from PIL import Image

from cm3leon.config import NonNegativeFloat, PositiveFloat, PositiveInt
from cm3leon.permissions import check_folder_readable
from cm3leon.registry import EXTRACTORS
from cm3leon.types import UserError
from cm3leon.weights import check_no_adapter

SIDES = 64
"""The sides of images as ControlNet's detectors see them are multiples of this."""


class Extractor:
    """Base of the extractors, which turn an image into its feature image. Registered in
    `EXTRACTORS`, built as `cls(config)`."""

    kind: str
    """The feature as the templates know it, a key of `FEATURES`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """The feature image, uint8 (H, W, 3), of an image, uint8 (H, W, 3)."""
        raise NotImplementedError


@EXTRACTORS.register("canny")
class Canny(Extractor):
    """Canny's edges (1986), by scikit-image: white on black."""

    kind = "canny"

    @dataclass(kw_only=True)
    class Config:
        """The blur and the two thresholds of Canny's method."""

        sigma: NonNegativeFloat = 1.4
        """Standard deviation of the blur before the edges are found, in pixels."""
        low: NonNegativeFloat = 0.08
        """Gradient down to which an edge is continued; 1 is a step from black to white."""
        high: NonNegativeFloat = 0.2
        """Gradient that starts an edge."""

    config: Config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        canny = _scikit_image("feature").canny
        config = self.config
        return _grey(canny(_luma(pixels_HWC), config.sigma, config.low, config.high))


@EXTRACTORS.register("regions")
class Regions(Extractor):
    """Felzenszwalb's regions of similar colour (2004), each in a colour of its own: segments
    without classes."""

    kind = "segmentation"

    @dataclass(kw_only=True)
    class Config:
        """The size of the regions."""

        scale: PositiveFloat = 200.0
        """Larger for larger regions."""

    config: Config

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        segment = _scikit_image("segmentation").felzenszwalb
        least = max(8, pixels_HWC.shape[0] * pixels_HWC.shape[1] // 400)
        return palette()[segment(pixels_HWC, scale=self.config.scale, min_size=least) % 256]


class _Learned(Extractor):
    """Base of the extractors that use a model in transformers' format, loaded on first use."""

    loads: str
    """The class of transformers that loads the model."""

    @dataclass(kw_only=True)
    class Config:
        """The model to use."""

        path: Path
        """Folder of the model, including its preprocessor_config.json."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not (config.path / "config.json").is_file():
            raise UserError(
                f"data.extractor.path is {config.path}, which holds no model in transformers' "
                "format: config.json is missing; give the folder of the model as transformers "
                "saves it"
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
        return _grey((depth_HW - low) / max(high - low, 1e-6))


@EXTRACTORS.register("classes")
class Classes(_Learned):
    """Semantic segments by a model in transformers' format on disk (SegFormer, Mask2Former with a
    semantic head)."""

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


class _Detector(Extractor):
    """Base of the extractors that use one of ControlNet's detectors, loaded on first use."""

    weights: str
    """File of the weights, named as in the folder that holds them all (lllyasviel/Annotators)."""

    @dataclass(kw_only=True)
    class Config:
        """The weights, and the resolution at which the detector sees the image."""

        path: Path
        """Folder that holds the file of the weights."""
        resolution: PositiveInt = 512
        """Shorter side of the image that the detector sees, in pixels; a multiple of 64."""

        def check(self) -> None:
            # controlnet_aux rounds both sides to such multiples, small ones down to nothing.
            if self.resolution % SIDES:
                raise UserError(
                    f"resolution is {self.resolution}; it must be a multiple of {SIDES}, for "
                    "example 512"
                )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not (config.path / self.weights).is_file():
            raise UserError(
                f"data.extractor.path is {config.path}, which has no {self.weights}; give the "
                "folder of these weights, as in lllyasviel/Annotators"
            )

    def load(self, package: Any) -> Any:
        """Build the detector from the package."""
        raise NotImplementedError

    def detected(self, pixels_HWC: np.ndarray, **sizes: int) -> np.ndarray:
        """The detector's drawing, at the resolution at which it sees the image."""
        return self._detector(pixels_HWC, output_type="np", **sizes)

    def __call__(self, pixels_HWC: np.ndarray) -> np.ndarray:
        resolution = self.config.resolution
        found = self.detected(pixels_HWC, detect_resolution=resolution, image_resolution=resolution)
        height, width = pixels_HWC.shape[:2]
        drawn = Image.fromarray(found).resize((width, height), Image.Resampling.BILINEAR)
        return np.array(drawn)

    @cached_property
    def _detector(self) -> Any:
        package = _controlnet_aux()
        try:
            # The package prints while it loads. Its weights are unpickled as tensors alone, which
            # is torch's default.
            with redirect_stdout(io.StringIO()):
                return self.load(package)
        except (OSError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            file, reason = self.config.path / self.weights, str(error).partition("\n")[0]
            raise UserError(f"path: {file} holds no weights of this detector: {reason}") from error


@EXTRACTORS.register("hed")
class Hed(_Detector):
    """Soft holistically nested edges (2015), by the network that ControlNet uses."""

    kind = "hed"
    weights = "ControlNetHED.pth"

    def load(self, package: Any) -> Any:
        return package.HEDdetector.from_pretrained(str(self.config.path))


@EXTRACTORS.register("scribble")
class Scribble(Hed):
    """Holistically nested edges as thick lines of one width, as ControlNet draws scribbles."""

    kind = "scribble"

    def detected(self, pixels_HWC: np.ndarray, **sizes: int) -> np.ndarray:
        return self._detector(pixels_HWC, output_type="np", scribble=True, **sizes)


@EXTRACTORS.register("normals")
class Normals(_Detector):
    """Surface normals by Bae, Budvytis and Cipolla's network (2021), as ControlNet 1.1 uses it."""

    kind = "normals"
    weights = "scannet.pt"

    def load(self, package: Any) -> Any:
        return package.NormalBaeDetector.from_pretrained(str(self.config.path))


@EXTRACTORS.register("pose")
class Pose(_Detector):
    """Joints and limbs of people by OpenPose (2017), the body alone, in OpenPose's colours on
    black."""

    kind = "pose"
    weights = "body_pose_model.pth"

    def load(self, package: Any) -> Any:
        body = package.open_pose.Body(str(self.config.path / self.weights))
        return package.OpenposeDetector(body)


def palette() -> np.ndarray:
    """Return 256 colours (256, 3) in which neighbouring indices look different, as PASCAL VOC
    colours its classes; 0 is black."""
    numbers = np.arange(256)
    result = np.zeros((256, 3), np.uint8)

    # The bits of an index are dealt to red, green and blue in turn, each from its highest bit down.
    for shift in range(8):
        for channel in range(3):
            bit = (numbers >> (3 * shift + channel)) & 1
            result[:, channel] |= (bit << (7 - shift)).astype(np.uint8)
    return result


def _luma(pixels_HWC: np.ndarray) -> np.ndarray:
    """The brightness of each pixel, from 0 to 1 (ITU-R BT.601)."""
    return (pixels_HWC.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)) / 255


def _grey(values_HW: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as a grey image, uint8 (H, W, 3)."""
    grey_HW = (255 * np.clip(values_HW.astype(np.float32), 0, 1)).round().astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, -1)


def _scikit_image(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"skimage.{module}")
    except ImportError as error:
        raise UserError(
            "data.extractor: this extractor needs the package scikit-image: pip install "
            "scikit-image"
        ) from error


def _controlnet_aux() -> Any:
    try:
        import controlnet_aux
    except ImportError as error:
        raise UserError(
            "data.extractor: this extractor needs the package controlnet_aux: pip install "
            "controlnet_aux"
        ) from error
    return controlnet_aux


def _transformers(path: Path, kind: str) -> tuple[Any, Any]:
    """Load the processor and the model of a folder. Weights are read from safetensors alone;
    nothing is downloaded.

    Raises:
        UserError: for a folder that cannot be read, and without the package.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "data.extractor: this extractor needs the package transformers: pip install "
            "transformers"
        ) from error
    check_folder_readable(path)
    check_no_adapter(path)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)
        model = getattr(transformers, kind).from_pretrained(
            path, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"data.extractor.path is {path}, which cannot be read: {error}") from error
    return processor, model.eval()
