"""Feature images of pictures whose truth is known, and the source that makes documents of them."""

from __future__ import annotations

import io
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from instruction_corpora import features, images

from cm3leon.data.extractors import palette
from cm3leon.data.instructions.templates import FEATURES
from cm3leon.data.source import Skipped
from cm3leon.plugins.scenes import render
from cm3leon.plugins.scenes.world import Scene, Thing
from cm3leon.registry import EXTRACTORS, SOURCES, discover
from cm3leon.types import Document, TextSegment, UserError

pytestmark = pytest.mark.stack

discover()

SIDE = 96
SCENE = Scene(
    "white",
    (
        Thing("shape", "red", "large", 0.3, 0.3, "square"),
        Thing("shape", "blue", "large", 0.7, 0.7, "circle"),
    ),
)
PIXELS = render.picture(SCENE, SIDE)


def near_edges(reach: int) -> np.ndarray:
    """Pixels that are close to a true edge."""
    from scipy.ndimage import binary_dilation

    return binary_dilation(render.edges(SCENE, SIDE), np.ones((2 * reach + 1,) * 2))


def test_edges_are_where_things_end() -> None:
    pytest.importorskip("skimage")
    found_HWC = EXTRACTORS.build("canny")(PIXELS)
    assert found_HWC.shape == PIXELS.shape
    assert found_HWC.dtype == np.uint8

    # No edge where there is none, and more than half of the true ones.
    bright_HW = found_HWC[..., 0] > 100
    assert bright_HW.any()
    assert not (bright_HW & ~near_edges(2)).any()
    covered = (near_edges(3) & bright_HW).sum() / render.edges(SCENE, SIDE).sum()
    assert covered > 0.5


def test_an_image_without_edges_has_none() -> None:
    pytest.importorskip("skimage")
    flat_HWC = np.full((48, 48, 3), 90, np.uint8)
    assert not EXTRACTORS.build("canny")(flat_HWC).any()


def test_regions_are_the_things() -> None:
    pytest.importorskip("skimage")
    found_HWC = EXTRACTORS.build("regions")(PIXELS)
    owner_HW = render.owners(SCENE, SIDE)
    inside_HW = ~near_edges(2)

    # Away from the edges, the background (-1) and each thing have one colour, not the others'.
    main = []
    for number in (-1, 0, 1):
        colours = Counter(map(tuple, found_HWC[inside_HW & (owner_HW == number)].tolist()))
        ((colour, count),) = colours.most_common(1)
        assert count > 0.9 * colours.total()
        main.append(colour)
    assert len(set(main)) == 3


def test_the_palette_is_that_of_pascal_voc() -> None:
    """Its first classes, as the VOC development kit prints them."""
    assert palette()[:5].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
    ]
    assert palette()[[9, 20]].tolist() == [[192, 0, 0], [0, 64, 128]]
    assert len({tuple(colour) for colour in palette().tolist()}) == 256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A depth and a segmentation model in transformers' format, small and random."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    small: dict[str, Any] = {
        "depths": [1] * 4,
        "hidden_sizes": [8] * 4,
        "num_attention_heads": [1] * 4,
        "decoder_hidden_size": 8,
    }
    # Both as folders that `from_pretrained` reads, with their image processors.
    segmentation = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(num_labels=5, **small)
    )
    segmentation.save_pretrained(folder / "classes")
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(folder / "classes")

    depth = transformers.GLPNForDepthEstimation(transformers.GLPNConfig(**small))
    depth.save_pretrained(folder / "depth")
    transformers.GLPNImageProcessor(size_divisor=32).save_pretrained(folder / "depth")
    return folder


def test_learned_features_come_from_a_folder(models: Path) -> None:
    for name, folder in (("classes", "classes"), ("depth", "depth")):
        extractor = EXTRACTORS.build({"name": name, "path": str(models / folder)})
        found_HWC = extractor(PIXELS)
        assert found_HWC.shape == PIXELS.shape
        assert found_HWC.dtype == np.uint8
        assert np.array_equal(found_HWC, extractor(PIXELS))
        assert extractor.kind in FEATURES

    # Depth is a grey image that uses the whole range.
    grey = EXTRACTORS.build({"name": "depth", "path": str(models / "depth")})(PIXELS)
    assert (grey.min(), grey.max()) == (0, 255)
    assert (grey[..., 0] == grey[..., 2]).all()


@pytest.fixture(scope="module")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of ControlNet's detectors under their published names.

    HED's are random. Those of the others are one repeated number, which is stored once, so the
    files stay small.
    """
    aux = pytest.importorskip("controlnet_aux")
    import torch

    folder = tmp_path_factory.mktemp("annotators")
    torch.manual_seed(0)
    hed = sys.modules[aux.HEDdetector.__module__].ControlNetHED_Apache2()
    torch.save({k: v.half() for k, v in hed.state_dict().items()}, folder / "ControlNetHED.pth")

    def equal(model: torch.nn.Module, value: float) -> dict[str, torch.Tensor]:
        return {
            name: torch.full((), value).to(tensor.dtype).expand(tensor.shape)
            for name, tensor in model.state_dict().items()
        }

    from controlnet_aux.normalbae import NNET
    from controlnet_aux.open_pose.model import bodypose_model

    # The published file lacks the outer name of each weight.
    body = {k.partition(".")[2]: v for k, v in equal(bodypose_model(), 0.0).items()}
    torch.save(body, folder / "body_pose_model.pth")
    settings = SimpleNamespace(architecture="BN", sampling_ratio=0.4, importance_ratio=0.7)
    with redirect_stdout(io.StringIO()):
        normals = NNET(settings)
    torch.save({"model": equal(normals, 0.01)}, folder / "scannet.pt")
    return folder


def detector(name: str, annotators: Path, resolution: int = 64) -> Any:
    return EXTRACTORS.build({"name": name, "path": str(annotators), "resolution": resolution})


@pytest.mark.parametrize("resolution", [20, 100])
def test_a_resolution_that_a_detector_would_round_is_refused(resolution: int) -> None:
    section = {"name": "hed", "path": "anywhere", "resolution": resolution}
    with pytest.raises(UserError, match=rf"resolution is {resolution}; .* a multiple of 64"):
        EXTRACTORS.check(section)


def test_soft_edges_are_the_mean_of_the_networks_five_maps(annotators: Path) -> None:
    import torch
    import torch.nn.functional as F
    from controlnet_aux.hed import ControlNetHED_Apache2

    network = ControlNetHED_Apache2()
    network.load_state_dict(torch.load(annotators / "ControlNetHED.pth", weights_only=True))

    # Independent of the detector: the network's maps at the image's size, their mean, a sigmoid.
    pixels_HWC = render.picture(SCENE, 64)
    with torch.no_grad():
        maps = network(torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float())
        whole = [F.interpolate(each, (64, 64), mode="bilinear")[0, 0] for each in maps]
        expected_HW = 255 * torch.stack(whole).mean(0).sigmoid().numpy()

    found_HWC = detector("hed", annotators)(pixels_HWC)
    assert found_HWC.shape == (64, 64, 3)
    assert np.ptp(found_HWC) > 5
    np.testing.assert_allclose(found_HWC[..., 0], expected_HW, atol=2)

    # An image of another size has a feature image of its own size.
    assert detector("hed", annotators)(PIXELS).shape == PIXELS.shape


def test_scribbles_are_black_and_white(annotators: Path) -> None:
    found_HWC = detector("scribble", annotators)(render.picture(SCENE, 64))
    assert set(np.unique(found_HWC).tolist()) <= {0, 255}


def test_normals_are_what_the_network_says(annotators: Path) -> None:
    import torch

    extractor, pixels_HWC = detector("normals", annotators), render.picture(SCENE, 64)
    found_HWC = extractor(pixels_HWC)

    # The network takes images normalised as ImageNet's are; normals of -1 to 1 become 0 to 255.
    image_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image_CHW = (image_CHW - mean[:, None, None]) / std[:, None, None]

    with torch.no_grad():
        normal_CHW = extractor._detector.model(image_CHW[None])[0][-1][0, :3]
    expected_HWC = ((normal_CHW + 1) / 2).clip(0, 1).permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(found_HWC, expected_HWC, atol=1.01)


def test_a_pose_is_drawn_where_the_joints_are_and_nobody_is_black(annotators: Path) -> None:
    extractor = detector("pose", annotators, 128)
    assert not extractor(np.full((128, 128, 3), 200, np.uint8)).any()

    # One person, found by a stand-in: the neck, the right shoulder and the right elbow, which
    # are numbers 1, 2 and 3 of OpenPose's 18 joints.
    joints = {1: (64.0, 20.0), 2: (40.0, 20.0), 3: (40.0, 100.0)}
    candidate = np.array([[x, y, 1.0, n] for n, (x, y) in enumerate(joints.values())])
    subset = np.full((1, 20), -1.0)
    subset[0, list(joints)] = range(3)
    subset[0, 18:] = 3.0, 3.0

    body = extractor._detector.body_estimation
    found = type("Found", (), {"format_body_result": staticmethod(body.format_body_result)})
    found.__call__ = lambda self, image: (candidate, subset)  # type: ignore[attr-defined]
    extractor._detector.body_estimation = found()

    # On the lower arm and the shoulder; nothing right of the neck, nothing between the limbs.
    drawn_HW = extractor(np.zeros((128, 128, 3), np.uint8)).any(-1)
    assert drawn_HW[60, 40]
    assert drawn_HW[20, 52]
    assert not drawn_HW[:, 80:].any()
    assert not drawn_HW[40:90, 50:].any()


def test_weights_that_run_code_are_not_run(tmp_path: Path) -> None:
    pytest.importorskip("controlnet_aux")
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Evil()}, tmp_path / "ControlNetHED.pth")
    with pytest.raises(UserError, match=r"ControlNetHED\.pth holds no weights of this detector"):
        detector("hed", tmp_path)(PIXELS)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_are_a_sentence(tmp_path: Path) -> None:
    for name, file in (
        ("hed", "ControlNetHED.pth"),
        ("scribble", "ControlNetHED.pth"),
        ("normals", "scannet.pt"),
        ("pose", "body_pose_model.pth"),
    ):
        with pytest.raises(UserError, match=f"which has no {file}"):
            detector(name, tmp_path)


def test_a_folder_without_a_model_is_a_sentence(tmp_path: Path) -> None:
    for name in ("depth", "classes"):
        with pytest.raises(UserError, match=r"^data\.extractor\.path is .* saves it$"):
            EXTRACTORS.build({"name": name, "path": str(tmp_path)})


def documents(**fields: Any) -> tuple[list[Document], list[Skipped]]:
    items = list(SOURCES.build({"name": "features", **fields}).documents())
    found = [item for item in items if isinstance(item, Document)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    return found, skipped


def test_documents_of_an_extractor(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    found, skipped = documents(**features(tmp_path))
    assert (len(found), len(skipped)) == (4, 2)

    # The feature image is grey, the image that follows it is not.
    feature, image = found[1].images
    assert (feature[..., 0] == feature[..., 1]).all()
    assert not (image[..., 0] == image[..., 1]).all()

    texts = [segment for segment in found[1].segments if isinstance(segment, TextSegment)]
    assert [(text.text, text.role) for text in texts] == [
        ("Make high quality image from canny edge features", ""),
        ("A picture 1.", "instruction"),
    ]


def test_documents_of_a_folder(tmp_path: Path) -> None:
    given = features(tmp_path) | {
        "extractor": None,
        "kind": "pose",
        "folder": str(tmp_path / "poses"),
    }
    images(tmp_path / "poses", ["0.png", "2.jpg"])
    found, skipped = documents(**given)
    assert [document.id for document in found] == ["features-0", "features-2"]
    assert len(skipped) == 4
    assert "openpose features" in found[0].text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extractor": None}, "extractor and folder are both null"),
        ({"folder": "x"}, "both given"),
        ({"extractor": None, "folder": "x", "kind": "heat"}, "kind is heat; .* one of: canny"),
    ],
)
def test_features_of_nothing_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        documents(**(features(tmp_path) | fields))
