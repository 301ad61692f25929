"""Feature images of photographs: edges, scribbles, poses, segments, depth and normals, which images
are drawn by.

Each is what a well-kept package makes of the image: scikit-image without any weights; ControlNet's
detectors of controlnet_aux, and models of transformers, with weights from a folder on disk. Nothing
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


class Extractor:
    """Base of the extractors: what is seen in an image. Registered in `EXTRACTORS`, built as
    `cls(config)`."""

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


@EXTRACTORS.register("regions")
class Regions(Extractor):
    """Felzenszwalb's regions of like colour (2004), each in a colour of its own: segments without
    their classes."""

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
    """Base of the extractors by a model in transformers' format on disk, which is loaded when it is
    first used."""

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
    """Semantic segments by a model in transformers' format on disk (SegFormer, Mask2Former's
    semantic heads)."""

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
    """Base of ControlNet's detectors, which are loaded when they are first used."""

    weights: str
    """The file of the weights, as the folder of all of them (lllyasviel/Annotators) calls it."""

    @dataclass(kw_only=True)
    class Config:
        """Where its weights are, and how much it sees."""

        path: Path
        """Folder that holds the file of the weights."""
        resolution: PositiveInt = 512
        """Pixels of the shorter side, in multiples of 64, that the detector sees the image with."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not (config.path / self.weights).is_file():
            raise UserError(
                f"path is {config.path}, which has no {self.weights}; give the folder of these weights, as in "
                "lllyasviel/Annotators"
            )

    def load(self, package: Any) -> Any:
        """The detector, given the package."""
        raise NotImplementedError

    def detected(self, pixels_HWC: np.ndarray, **sizes: int) -> np.ndarray:
        """What the detector draws, in the size that it sees."""
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
            # It prints what it does; its weights are unpickled as tensors alone, which is torch's
            # default.
            with redirect_stdout(io.StringIO()):
                return self.load(package)
        except (OSError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            file, reason = self.config.path / self.weights, str(error).partition("\n")[0]
            raise UserError(f"path: {file} holds no weights of this detector: {reason}") from error


@EXTRACTORS.register("hed")
class Hed(_Detector):
    """Holistically nested edges (2015), soft ones, by the network that ControlNet takes."""

    kind = "hed"
    weights = "ControlNetHED.pth"

    def load(self, package: Any) -> Any:
        return package.HEDdetector.from_pretrained(str(self.config.path))


@EXTRACTORS.register("scribble")
class Scribble(Hed):
    """Holistically nested edges as thick lines of one width, as ControlNet draws its scribbles."""

    kind = "scribble"

    def detected(self, pixels_HWC: np.ndarray, **sizes: int) -> np.ndarray:
        return self._detector(pixels_HWC, output_type="np", scribble=True, **sizes)


@EXTRACTORS.register("normals")
class Normals(_Detector):
    """Normals of surfaces by Bae, Budvytis and Cipolla's network (2021), as ControlNet 1.1 takes
    them."""

    kind = "normals"
    weights = "scannet.pt"

    def load(self, package: Any) -> Any:
        return package.NormalBaeDetector.from_pretrained(str(self.config.path))


@EXTRACTORS.register("pose")
class Pose(_Detector):
    """Joints and limbs of people by OpenPose (2017), its body alone, in OpenPose's colours on
    black."""

    kind = "pose"
    weights = "body_pose_model.pth"

    def load(self, package: Any) -> Any:
        body = package.open_pose.Body(str(self.config.path / self.weights))
        return package.OpenposeDetector(body)


def palette() -> np.ndarray:
    """256 colours (256, 3) far apart for neighbouring numbers, as PASCAL VOC colours its classes; 0
    is black."""
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


def _controlnet_aux() -> Any:
    try:
        import controlnet_aux
    except ImportError as error:
        raise UserError(
            "this feature needs the package controlnet_aux (pip install controlnet_aux)"
        ) from error
    return controlnet_aux


def _transformers(path: Path, kind: str) -> tuple[Any, Any]:
    """The processor and the model of a folder; weights are read from safetensors alone, nothing is
    downloaded."""
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
