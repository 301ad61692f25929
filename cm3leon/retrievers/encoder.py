"""The bi-encoder: an open_clip model, text and image parts encoded separately and L2-normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.collectives import all_rows
from cm3leon.config import Location, PositiveInt
from cm3leon.retrievers.base import Encoder
from cm3leon.types import UserError
from cm3leon.weights import check_finite


@dataclass(kw_only=True)
class EncoderConfig:
    """Which CLIP. The default is the paper's, ViT-B/32;
    `architecture: null` builds a small one to train here."""

    architecture: str | None = "ViT-B-32"
    """Name of an open_clip model, or None for a small one of the sizes below."""
    pretrained: Annotated[str, Location(or_name=True)] | None = None
    """Tag or file of pretrained weights for `architecture`; None starts from random weights."""
    image_size: PositiveInt = 32
    """Small model: height and width of its input, in pixels."""
    patch_size: PositiveInt = 8
    """Small model: side of a patch, in pixels."""
    width: PositiveInt = 64
    """Small model: width of both transformers, a multiple of 16 (the head size)."""
    layers: PositiveInt = 2
    """Small model: layers of each transformer."""
    embed_dim: PositiveInt = 64
    """Small model: size of the common embedding."""
    context_length: PositiveInt = 32
    """Small model: text tokens, longer texts are cut."""

    def check(self) -> None:
        if self.pretrained and not self.architecture:
            raise UserError(
                "pretrained is set, so architecture must name an open_clip model, for example "
                "ViT-B-32"
            )
        if self.width % _HEAD:
            raise UserError(f"width {self.width} must be a multiple of {_HEAD}")
        if self.image_size % self.patch_size:
            raise UserError(
                f"patch_size {self.patch_size} must divide image_size {self.image_size}"
            )


_HEAD = 16


class ClipEncoder(Encoder):
    """An open_clip model with its tokenizer and pixel normalisation.

    Raises:
        UserError: for an unknown architecture.
    """

    joint = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.clip, self._tokenize = _pretrained(config) if config.architecture else _small(config)
        size = self.clip.visual.image_size
        self.image_size = size[0] if isinstance(size, tuple) else size
        self.embed_dim = int(self.clip.visual.output_dim)

    def loss(
        self, texts: list[str], images_BHWC: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """CLIP's symmetric contrastive loss of pairs (open_clip's), with figures to record."""
        from open_clip import ClipLoss

        image_BD, text_BD, scale = self.clip(self._pixels(images_BHWC), self._tokens(texts))[:3]

        # Each pair is compared with all others of the batch, including those of other ranks.
        image_BD, text_BD = all_rows(image_BD), all_rows(text_BD)
        scores_BB = image_BD.detach() @ text_BD.detach().T
        own_B = torch.arange(len(scores_BB), device=scores_BB.device)
        accuracy = (scores_BB.argmax(1) == own_B).float().mean()
        loss = ClipLoss()(image_BD.float(), text_BD.float(), scale)
        return loss, {
            "pair_accuracy": accuracy,
            "logit_scale": scale.detach(),
            "images": float(len(texts)),
        }

    @torch.inference_mode()
    def encode_texts(self, texts: list[str], *, dropout: float = 0.0, seed: int = 0) -> np.ndarray:
        """Unit vectors (B, D), float32. `dropout` is the share
        of each text's BPE tokens to leave out."""
        tokens_BT = self._tokens(texts)
        if dropout:
            tokens_BT = _drop_tokens(tokens_BT, dropout, np.random.default_rng(seed))
        return self._batched(lambda rows: self.clip.encode_text(tokens_BT[rows]), len(texts))

    @torch.inference_mode()
    def encode_images(
        self, images_BHWC: np.ndarray, *, dropout: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Unit vectors (B, D), float32, of uint8 images. `dropout` is the share of the ViT's
        patches to leave out."""

        def encode(rows: slice) -> Tensor:
            pixels = self._pixels(torch.from_numpy(images_BHWC[rows]))
            return self.clip.encode_image(pixels)

        with _patch_dropout(self.clip.visual, dropout, seed):
            return self._batched(encode, len(images_BHWC))

    def _batched(
        self, encode: Callable[[slice], Tensor], count: int, batch_size: int = 256
    ) -> np.ndarray:
        parts = [encode(slice(start, start + batch_size)) for start in range(0, count, batch_size)]
        vectors_BD = torch.cat(parts).float()
        check_finite(vectors_BD, "what the retriever's encoder makes of texts or images")
        return F.normalize(vectors_BD, dim=-1).cpu().numpy()

    def _tokens(self, texts: list[str]) -> Tensor:
        return self._tokenize(texts).to(self._device)

    def _pixels(self, images_BHWC: Tensor) -> Tensor:
        """uint8 (B, H, W, C) to what CLIP expects, (B, C, size, size)."""
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        images_BCHW = images_BHWC.to(self._device).permute(0, 3, 1, 2).float() / 255
        if images_BCHW.shape[-1] != self.image_size:
            images_BCHW = F.interpolate(
                images_BCHW, size=self.image_size, mode="bicubic", antialias=True
            ).clamp(0, 1)
        mean = torch.tensor(OPENAI_DATASET_MEAN, device=self._device)[:, None, None]
        std = torch.tensor(OPENAI_DATASET_STD, device=self._device)[:, None, None]
        return (images_BCHW - mean) / std

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


def _pretrained(config: EncoderConfig) -> tuple[Any, Any]:
    import open_clip

    if config.architecture not in open_clip.list_models():
        raise UserError(
            f"retriever.encoder.architecture is {config.architecture}, which open_clip does not "
            "have; choose one of open_clip.list_models(), for example ViT-B-32"
        )
    try:
        model = open_clip.create_model(config.architecture, pretrained=config.pretrained)
        return model, open_clip.get_tokenizer(config.architecture)
    except Exception as error:
        # A bad file or tag raises OSError, RuntimeError, EOFError, UnpicklingError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"retriever.encoder.pretrained: {config.pretrained!r} cannot be loaded for "
            f"{config.architecture}: {reason}"
        ) from error


def _small(config: EncoderConfig) -> tuple[Any, Any]:
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=config.layers,
        width=config.width,
        head_width=_HEAD,
        patch_size=config.patch_size,
        image_size=config.image_size,
    )
    text = CLIPTextCfg(
        context_length=config.context_length,
        width=config.width,
        heads=config.width // _HEAD,
        layers=config.layers,
    )
    return CLIP(config.embed_dim, vision, text), _tokenizer(config.context_length)


@lru_cache(maxsize=8)
def _tokenizer(context_length: int) -> Any:
    """CLIP's tokenizer, which is the same for all encoders of a context length."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=context_length)


def _drop_tokens(tokens_BT: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Leave out a share of each text's tokens at random, but never the first and the last, which
    mark its start and end."""
    dropped_BT = torch.zeros_like(tokens_BT)
    for row, tokens_T in enumerate(tokens_BT):
        # The end is CLIP's largest id. Padding is 0, which is also the piece "!".
        length = int(tokens_T.argmax()) + 1
        inner = np.arange(1, length - 1)
        kept = np.sort(rng.permutation(inner)[: len(inner) - round(share * len(inner))])
        chosen = torch.as_tensor(np.concatenate([[0], kept, [length - 1]]), device=tokens_BT.device)
        dropped_BT[row, : len(chosen)] = tokens_T[chosen]
    return dropped_BT


@contextmanager
def _patch_dropout(visual: Any, share: float, seed: int) -> Iterator[None]:
    """Let open_clip's ViT leave out a share of its patches,
    with the rest of the model as at inference."""
    from open_clip.transformer import PatchDropout

    if not share:
        yield
        return
    if not hasattr(visual, "patch_dropout"):
        raise UserError(
            f"retriever.query_dropout is {share}, and this image tower has no patches to drop; "
            "use a ViT, or 0"
        )
    usual = visual.patch_dropout
    visual.patch_dropout = PatchDropout(share).train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        visual.patch_dropout = usual
