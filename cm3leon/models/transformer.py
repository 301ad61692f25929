"""The paper's model (section 3.1): OPT's shape, pre-norm, no biases, norms without parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.config import NoEffect, PositiveFloat, PositiveInt
from cm3leon.models.attention import Attention, attend_by, check_name, choose
from cm3leon.models.base import Attend, LayerBytes, Model
from cm3leon.models.initial import First
from cm3leon.models.split import Summed, frozen
from cm3leon.registry import MODELS
from cm3leon.types import UserError


@MODELS.register("cm3leon")
class Transformer(Model):
    """Decoder-only transformer: ids to logits. No loss, no task, no tokenizer."""

    @dataclass(kw_only=True)
    class Config:
        """The default is the paper's 350M (Table 3)."""

        layers: PositiveInt = 24
        """Number of blocks of attention and feed-forward."""
        width: PositiveInt = 1024
        """Size of the residual stream (the paper's d_model)."""
        head_size: PositiveInt = 64
        """Size of one attention head; it must divide the width."""
        mlp_ratio: PositiveInt = 4
        """Hidden size of the feed-forward part, in widths."""
        seq_len: PositiveInt = 4096
        """Positions of the learned position embedding, and tokens of a training block."""
        init_std: PositiveFloat = 0.006
        """Standard deviation of the normal initialisation, cut at three of them."""
        position_init_std: PositiveFloat = 0.0002
        """Standard deviation of the position embedding at initialisation."""
        zero_residual: bool = False
        """Whether the two output matrices of each layer begin at zero, so that at first each layer
        returns its input."""
        attention: Annotated[str, NoEffect("how the same is computed")] = "auto"
        """Backend of attention in training, one of those that --list shows; auto takes the one that
        suits the device."""

        def check(self) -> None:
            check_name(self.attention)
            if self.width % self.head_size:
                raise UserError(f"head_size {self.head_size} must divide width {self.width}")

    matrices = ("qkv", "out", "up", "down")
    recomputed = ("before_attention", "after_attention")

    def __init__(self, config: Config, *, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.heads = self.kv_heads = config.width // config.head_size
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(config.seq_len, config.width)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        self.reset_parameters()

    def firsts(self) -> list[First]:
        """The paper's initialisation. The zero head makes the first loss exactly ln(vocab_size)."""
        names = [name for name, _ in self.named_parameters()]
        firsts = [First(name, "normal", self.config.init_std) for name in names]
        firsts.append(First("positions.weight", "normal", self.config.position_init_std))
        firsts.append(First("head.weight", "zeros"))
        if self.config.zero_residual:
            ends = (".out.weight", ".down.weight")
            firsts += [First(name, "zeros") for name in names if name.endswith(ends)]
        return firsts

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        sample_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        asked, cached = self.config.attention, attend is not None
        attention, plan = attend_by(asked, ids_BT, sample_BT, cached=cached)
        if position_BT is None:
            position_BT = self.default_positions(ids_BT)
        x_BTD = self.embedding(ids_BT) + self.positions(position_BT)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, attention, plan, partial(attend, layer) if attend else None)
        return _norm(x_BTD)

    def attention_on(self, device: torch.device) -> str:
        return str(choose(self.config.attention, device))

    def layer_bytes(self, *, sharded: bool, frozen: bool) -> LayerBytes:
        """Count bytes for a width of D and an MLP of m D hidden units.

        Without activation checkpointing these stay, 28 D in all for m = 4, and a few numbers of the
        norms and of attention:

            2 x 4 D    inputs of both norms, float32
            2 x 2 D    outputs of both norms
            6 D        queries, keys and values
            2 D        the attended values
            2 m D      hidden units of the MLP
        """
        D, m, heads = self.config.width, self.config.mlp_ratio, self.heads

        # Layers hand on float32, or bf16 where ranks gather their weights in bf16.
        handed_on = (2 if sharded else 4) * D
        return LayerBytes(
            none=(8 + 4 + 6 + 2 + 2 * m) * D + 16 + 4 * heads,
            selective=handed_on + (6 + 2 + 2 + 2 * m + 2) * D + 4 * heads,
            full=handed_on,
            backward=4 * m * D,
        )

    def share(self, rank: int, count: int) -> None:
        head_size, width, heads = self.config.head_size, self.config.width, self.heads
        if heads % count:
            raise UserError(
                f"{count} ranks cannot share the model's {heads} heads; the number must divide them"
            )

        # A rank takes whole heads and hidden units: rows of the matrices that compute them, and
        # columns of the matrices that read them, whose results the ranks add up.
        self.heads = self.kv_heads = heads // count
        for block in self.blocks:
            qkv_3AED = block.qkv.weight.view(3, heads, head_size, width)
            block.qkv.weight = frozen(qkv_3AED.chunk(count, 1)[rank].flatten(0, 2))
            block.up.weight = frozen(block.up.weight.chunk(count)[rank])
            block.out = Summed(block.out.weight.chunk(count, 1)[rank])
            block.down = Summed(block.down.weight.chunk(count, 1)[rank])


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Transformer.Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        attention: Attention,
        plan: Any,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the residual stream (B, T, D) after this layer.

        Args:
            x_BTD: the residual stream before it.
            attention: the backend.
            plan: the backend's plan.
            attend: replaces the backend: (q, k, v) -> the attended values.
        """
        qkv = self.before_attention(x_BTD)
        attended_BATE = attend(*qkv) if attend else attention(*qkv, plan)
        return self.after_attention(x_BTD, attended_BATE)

    def before_attention(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, A, T, E) each."""
        B, T, _ = x_BTD.shape
        qkv_3BATE = self.qkv(_norm(x_BTD)).view(B, T, 3, -1, self.head_size).permute(2, 0, 3, 1, 4)
        q_BATE, k_BATE, v_BATE = qkv_3BATE.unbind()
        return q_BATE, k_BATE, v_BATE

    def after_attention(self, x_BTD: Tensor, attended_BATE: Tensor) -> Tensor:
        """Return the residual stream after this layer.

        Args:
            x_BTD: the residual stream before the layer.
            attended_BATE: the attended values.
        """
        B, T, _ = x_BTD.shape
        x_BTD = x_BTD + self.out(attended_BATE.transpose(1, 2).reshape(B, T, -1))
        return x_BTD + self.down(F.relu(self.up(_norm(x_BTD))))


def _norm(x_BTD: Tensor) -> Tensor:
    """Apply layer norm without learned parameters."""
    return F.layer_norm(x_BTD, x_BTD.shape[-1:])
