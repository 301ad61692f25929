"""The model built from fairseq2's modules, as a component: `model.name=fairseq2_cm3leon`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.config import choices
from cm3leon.models.attention import choose, run_lengths
from cm3leon.models.base import Attend, Model
from cm3leon.models.transformer import Transformer
from cm3leon.plugins.fairseq2_cm3leon import guard
from cm3leon.registry import MODELS
from cm3leon.types import UserError

ATTENTION = ("auto", "sdpa", "naive")


@MODELS.register("fairseq2_cm3leon")
class Fairseq2Transformer(Model):
    """fairseq2's TransformerLM with the shape and numbers of `cm3leon`; needs the extra `cluster`.

    Its weights are named as in a TransformerLM; `convert.py` gives them the names of
    `model=cm3leon`, and back. From the same seed both begin with the same weights.
    """

    @dataclass(kw_only=True)
    class Config(Transformer.Config):
        """The shape, which is that of `cm3leon`, and the attention."""

        attention: str = "auto"
        """Attention in training: auto (as in `cm3leon`), or one of fairseq2's own: sdpa (torch's)
        or naive."""

        def check(self) -> None:
            if self.attention not in ATTENTION:
                raise UserError(
                    f"attention is {self.attention}, which is not known; "
                    f"{choices(self.attention, ATTENTION)}"
                )
            if self.width % self.head_size:
                raise UserError(f"head_size {self.head_size} must divide width {self.width}")

    missing = staticmethod(guard.missing)

    def __init__(self, config: Config, *, vocab_size: int) -> None:
        guard.load("model.name is fairseq2_cm3leon, which")
        from cm3leon.plugins.fairseq2_cm3leon._network import create_transformer_lm
        from cm3leon.plugins.fairseq2_cm3leon._sdpa import SDPAS, CacheableSDPA

        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.heads = self.kv_heads = config.width // config.head_size
        model = create_transformer_lm(config, vocab_size, SDPAS[config.attention])
        for layer, block in enumerate(model.decoder.layers):
            block.self_attn.sdpa = CacheableSDPA(layer, block.self_attn.sdpa)
        # The parts are kept rather than the whole, so that weights are named as in a TransformerLM.
        self.decoder_frontend, self.decoder, self.final_proj = (
            model.decoder_frontend,
            model.decoder,
            model.final_proj,
        )

    @property
    def embedding(self) -> Any:
        return self.decoder_frontend.embed

    @property
    def blocks(self) -> Any:
        return self.decoder.layers

    @property
    def head(self) -> Any:
        return self.final_proj

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        sample_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        from fairseq2.nn import BatchLayout

        from cm3leon.plugins.fairseq2_cm3leon._sdpa import Packed, Pass

        if position_BT is None:
            position_BT = self.default_positions(ids_BT)

        # The encoder's table is read directly. Its forward pass derives positions from lengths, but
        # in a cache, or in a document that continues from another block, they begin elsewhere. Row
        # 0 is for padding.
        place_BTD = F.embedding(position_BT + 1, self.decoder_frontend.pos_encoder.weight)
        x_BTD = self.embedding(ids_BT) + place_BTD

        if attend:
            return self.decoder(x_BTD, Pass(attend))
        if self.config.attention == "auto":
            attention = choose("auto", ids_BT.device).attention
            plan = None if sample_BT is None else attention.plan(sample_BT, ids_BT.device)
            return self.decoder(x_BTD, Packed(attention, plan))
        if sample_BT is None:
            return self.decoder(x_BTD, BatchLayout.of(ids_BT))
        layout = BatchLayout(
            (ids_BT.numel(),), run_lengths(sample_BT), packed=True, device=ids_BT.device
        )
        return self.decoder(x_BTD.flatten(0, 1), layout).view_as(x_BTD)

    def attention_on(self, device: torch.device) -> str:
        if self.config.attention != "auto":
            return f"{self.config.attention} of fairseq2"
        return str(choose("auto", device))
