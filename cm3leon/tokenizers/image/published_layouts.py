"""How publishers of VQ tokenizers name their tensors, by patterns in our names.

One convolution of the decoder, at the coarsest of four levels, has the names

    ours        decoder.levels.0.blocks.1.conv1.weight
    taming      decoder.up.3.block.1.conv1.weight
    janus       decoder.up.0.block.1.conv1.weight
    llamagen    decoder.conv_blocks.0.res.1.conv1.weight
    diffusers   decoder.up_blocks.0.resnets.1.conv1.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cm3leon.tokenizers.image.network import GROUPS, Architecture
from cm3leon.tokenizers.image.published_files import Stored, Weights
from cm3leon.types import UserError


@dataclass(frozen=True)
class TensorNames:
    """How a publisher names the tensors of a `VQModel`."""

    name: str
    shown_by: tuple[str, ...]
    """Tensors by which the layout is recognised. Layouts are tried in the order of `LAYOUTS`."""
    spelling: tuple[tuple[str, str], ...]
    """Patterns in our names and their replacements, applied one after the other."""
    finest_first: bool = False
    """Whether the decoder numbers its levels from full resolution on, from its end to its start."""
    normalized: bool = False
    """Whether the nearest code is that of the largest cosine, which no tensor shows."""

    def published(self, name: str, levels: int) -> str:
        """Translate our name of a tensor, in a model of that many levels, into the publisher's."""
        if self.finest_first:
            name = re.sub(
                r"^(decoder\.levels)\.(\d+)", lambda m: f"{m[1]}.{levels - 1 - int(m[2])}", name
            )
        for pattern, instead in self.spelling:
            name = re.sub(pattern, instead, name)
        return name


_PROJECTIONS = (
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"^quantizer\.codebook_VD$", "quantize.embedding.weight"),
    (r"^quantizer\.logits\.", "quantize.proj."),
)
_TAMING_BLOCKS = (
    (r"\.attentions\.", ".attn."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
    (r"^(encoder.*)\.resample\.", r"\1.downsample."),
    (r"^(decoder.*)\.resample\.", r"\1.upsample."),
)
TAMING = TensorNames(
    name="taming",
    shown_by=("encoder.down.0.block.0.conv1.weight",),
    spelling=(
        *_PROJECTIONS,
        *_TAMING_BLOCKS,
        (r"^encoder\.levels\.", "encoder.down."),
        (r"^decoder\.levels\.", "decoder.up."),
        (r"\.blocks\.", ".block."),
        (r"\.mid\.0\.", ".mid.block_1."),
        (r"\.mid\.1\.", ".mid.attn_1."),
        (r"\.mid\.2\.", ".mid.block_2."),
    ),
    finest_first=True,
)
JANUS = replace(
    TAMING,
    name="janus",
    # The decoder's levels are numbered as they are computed, so the first one is enlarged; in
    # taming it is the last one.
    shown_by=("encoder.down.0.block.0.conv1.weight", "decoder.up.0.upsample.conv.weight"),
    finest_first=False,
    # The weights were trained so, for they are LlamaGen's model. transformers' `JanusVQVAE.encode`
    # leaves vectors and codebook as they are, and only its `decode` normalizes.
    normalized=True,
)
LLAMAGEN = TensorNames(
    name="llamagen",
    shown_by=("encoder.conv_blocks.0.res.0.conv1.weight",),
    spelling=(
        *_PROJECTIONS,
        *_TAMING_BLOCKS,
        (r"\.levels\.", ".conv_blocks."),
        (r"\.blocks\.", ".res."),
    ),
    normalized=True,
)
DIFFUSERS = TensorNames(
    name="diffusers",
    shown_by=("encoder.down_blocks.0.resnets.0.conv1.weight",),
    spelling=(
        *_PROJECTIONS,
        (r"\.mid\.0\.", ".mid_block.resnets.0."),
        (r"\.mid\.1\.", ".mid_block.attentions.0."),
        (r"\.mid\.2\.", ".mid_block.resnets.1."),
        (r"^encoder\.levels\.", "encoder.down_blocks."),
        (r"^decoder\.levels\.", "decoder.up_blocks."),
        (r"\.blocks\.", ".resnets."),
        (r"\.(q|k|v)\.", r".to_\1."),
        (r"\.out\.", ".to_out.0."),
        (r"\.norm\.", ".group_norm."),
        (r"\.shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"^(encoder.*)\.resample\.", r"\1.downsamplers.0."),
        (r"^(decoder.*)\.resample\.", r"\1.upsamplers.0."),
    ),
)
# Older folders have other names for the parts of attention.
EARLY_DIFFUSERS = replace(
    DIFFUSERS,
    shown_by=(
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "encoder.mid_block.attentions.0.query.weight",
    ),
    spelling=(
        *DIFFUSERS.spelling,
        (r"\.to_q\.", ".query."),
        (r"\.to_k\.", ".key."),
        (r"\.to_v\.", ".value."),
        (r"\.to_out\.0\.", ".proj_attn."),
    ),
)
LAYOUTS = (JANUS, TAMING, LLAMAGEN, EARLY_DIFFUSERS, DIFFUSERS)

GUMBEL_CODEBOOK = "quantize.embed.weight"
"""Name of a gumbel quantizer's codebook; all others are named `quantize.embedding.weight`."""

LEFT_OUT = re.compile(
    r"loss\.|quantize\.codebook_used$|quantize\.embedding\.(cluster_size|embed_avg)$"
)
"""Names of tensors of training only: parts of the loss, used codes, the codebook's averages."""


def layout_of(weights: Weights, asked: str) -> tuple[TensorNames, dict[str, Stored]]:
    """Find the layout of published weights, and the tensors of the tokenizer among them.

    The tokenizer may be a part of a bigger model, with a prefix in front of all its names. The
    returned names have no prefix.

    Args:
        weights: the published weights.
        asked: name of the layout by the user's settings, or auto.

    Raises:
        UserError: for tensors of another layout, or of an unknown one.
    """
    for layout in LAYOUTS:
        for prefix in _prefixes(weights.tensors, layout.shown_by[0]):
            part = {}
            for key, stored in weights.tensors.items():
                if key.startswith(prefix):
                    part[key.removeprefix(prefix)] = stored
            if "quant_conv.weight" in part and all(key in part for key in layout.shown_by):
                if asked not in ("auto", layout.name):
                    raise UserError(
                        f"layout is {asked}, but {weights.path} names its tensors as {layout.name} "
                        f"does ({prefix}{layout.shown_by[-1]})"
                    )
                return layout, part

    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise UserError(
        f"{weights.path} is in none of the known layouts ({known}): "
        f"it has the keys {_some(weights.tensors)}"
    )


def _prefixes(keys: Iterable[str], end: str) -> list[str]:
    """List what stands in front of the name `end` in the keys, the shortest first."""
    return sorted((key.removesuffix(end) for key in keys if f".{key}".endswith(f".{end}")), key=len)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@dataclass(frozen=True)
class PublishedTensors:
    """Published tensors that can be looked up by our names."""

    path: Path
    layout: TensorNames
    tensors: Mapping[str, Stored]

    @property
    def levels(self) -> int:
        return self._count("encoder.levels.{}.blocks.0.conv1.weight")

    def has(self, name: str) -> bool:
        return self.layout.published(name, 0) in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the encoder or the quantizer."""
        key = self.layout.published(name, 0)
        if key not in self.tensors:
            raise UserError(f"{self.path} lacks {key}")
        return self.tensors[key].shape

    def architecture(self) -> Architecture:
        """Read the shape of the networks off the encoder's tensors."""
        channels = self.shape("encoder.conv_in.weight")[0]
        widths = []
        for level in range(self.levels):
            widths.append(self.shape(f"encoder.levels.{level}.blocks.0.conv1.weight")[0])
        for width in (channels, *widths):
            if width % channels or width % GROUPS:
                raise UserError(
                    f"{self.path} has {channels} channels at full resolution and {width} further "
                    f"down; both must be multiples of {GROUPS}, and the second one of the first"
                )

        # A level has attention if its first residual block is followed by one.
        attention_levels = []
        for level in range(self.levels):
            if self.has(f"encoder.levels.{level}.attentions.0.q.weight"):
                attention_levels.append(level)
        return Architecture(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            residual_blocks=self._count("encoder.levels.0.blocks.{}.conv1.weight"),
            attention_levels=tuple(attention_levels),
            z_channels=self.shape("encoder.conv_out.weight")[0],
        )

    def check(self, wanted: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the published name of each of our tensors.

        Raises:
            UserError: for tensors that are missing, left over, or of another shape.
        """
        keys = {name: self.layout.published(name, self.levels) for name in wanted}

        # Every tensor must be known, and every name must have its tensor ...
        known = set(keys.values())
        unknown = {key for key in self.tensors.keys() - known if not LEFT_OUT.match(key)}
        for what, some in (("lacks", known - self.tensors.keys()), ("has the unknown", unknown)):
            if some:
                raise UserError(f"{self.path} {what} {_some(some)}")

        # ... of the right shape.
        for name, key in keys.items():
            given, expected = self.tensors[key].shape, tuple(wanted[name].shape)
            if _matrix(given) != _matrix(expected):
                raise UserError(
                    f"{self.path}: {key} has the shape {given}; "
                    f"beside its other tensors it must be {expected}"
                )
        return keys

    def _count(self, name: str) -> int:
        """Count how many of name 0, name 1 ... there are."""
        count = 0
        while self.has(name.format(count)):
            count += 1
        return count


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1x1 convolution as that of the linear layer that it is."""
    return shape[:2] if shape[2:] == (1, 1) else shape
