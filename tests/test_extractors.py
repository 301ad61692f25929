"""Feature images: what they show of pictures whose truth is known, and the source that makes documents of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
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


@pytest.mark.parametrize(("name", "reach"), [("canny", 2), ("soft_edge", 6), ("scribble", 5)])
def test_edges_are_where_things_end(name: str, reach: int) -> None:
    if name != "soft_edge":
        pytest.importorskip("skimage")
    found_HWC = EXTRACTORS.build(name)(PIXELS)
    assert found_HWC.shape == PIXELS.shape
    assert found_HWC.dtype == np.uint8
    bright_HW = found_HWC[..., 0] > 100
    assert bright_HW.any()
    assert not (bright_HW & ~near_edges(reach)).any()
    covered = (near_edges(3) & bright_HW).sum() / render.edges(SCENE, SIDE).sum()
    assert covered > 0.5


def test_an_image_without_edges_has_none() -> None:
    pytest.importorskip("skimage")
    flat_HWC = np.full((48, 48, 3), 90, np.uint8)
    for name in ("canny", "soft_edge", "scribble"):
        assert not EXTRACTORS.build(name)(flat_HWC).any()


def test_regions_are_the_things() -> None:
    pytest.importorskip("skimage")
    found_HWC = EXTRACTORS.build("regions")(PIXELS)
    owner_HW = render.owners(SCENE, SIDE)
    inside_HW = ~near_edges(2)
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
        "depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8
    }  # fmt: skip
    segmentation = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(num_labels=5, **small)
    )
    depth = transformers.GLPNForDepthEstimation(transformers.GLPNConfig(**small))
    for name, model, processor in (
        (
            "classes",
            segmentation,
            transformers.SegformerImageProcessor(size={"height": 64, "width": 64}),
        ),
        ("depth", depth, transformers.GLPNImageProcessor(size_divisor=32)),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def test_learned_features_come_from_a_folder(models: Path) -> None:
    for name, folder in (("classes", "classes"), ("depth", "depth"), ("normals", "depth")):
        extractor = EXTRACTORS.build({"name": name, "path": str(models / folder)})
        found_HWC = extractor(PIXELS)
        assert found_HWC.shape == PIXELS.shape
        assert found_HWC.dtype == np.uint8
        assert np.array_equal(found_HWC, extractor(PIXELS))
        assert extractor.kind in FEATURES
    grey = EXTRACTORS.build({"name": "depth", "path": str(models / "depth")})(PIXELS)
    assert (grey.min(), grey.max()) == (0, 255)
    assert (grey[..., 0] == grey[..., 2]).all()


def test_normals_lean_away_from_what_rises(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = EXTRACTORS.build({"name": "normals", "path": str(models / "depth")})
    monkeypatch.setattr(
        extractor._depth, "depth", lambda pixels: np.tile(np.linspace(0, 1, 32), (32, 1))
    )
    normal_HWC = extractor(np.zeros((32, 32, 3), np.uint8)).astype(float) / 127.5 - 1
    assert normal_HWC[..., 0].max() < -0.5
    assert abs(normal_HWC[..., 1]).max() < 0.01
    np.testing.assert_allclose(np.linalg.norm(normal_HWC, axis=-1), 1, atol=0.02)


def test_a_folder_without_a_model_is_a_sentence(tmp_path: Path) -> None:
    for name in ("depth", "normals", "classes"):
        with pytest.raises(UserError, match="holds no model in transformers' format"):
            EXTRACTORS.build({"name": name, "path": str(tmp_path)})


def documents(**fields: Any) -> tuple[list[Document], list[Skipped]]:
    items = list(SOURCES.build({"name": "features", **fields}).documents())
    return [item for item in items if isinstance(item, Document)], [
        item for item in items if isinstance(item, Skipped)
    ]


def test_documents_of_an_extractor(tmp_path: Path) -> None:
    found, skipped = documents(**features(tmp_path))
    assert (len(found), len(skipped)) == (4, 2)
    feature, image = found[1].images
    assert (feature[..., 0] == feature[..., 1]).all()
    assert not (image[..., 0] == image[..., 1]).all()
    texts = [segment for segment in found[1].segments if isinstance(segment, TextSegment)]
    assert [(text.text, text.role) for text in texts] == [
        ("Make high quality image from hed features", ""), ("A picture 1.", "instruction")
    ]  # fmt: skip


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
