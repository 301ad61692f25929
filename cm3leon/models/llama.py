"""The model of Chameleon and its relatives: Llama's layers, with norms of queries and keys.

Chameleon (arXiv 2405.09818, section 2.2) keeps CM3Leon's vocabulary and recipe and changes the
layer: RMSNorm with weights, rotary positions, a gated MLP, and a norm of each head's queries and
keys. Its 34B places the norms behind attention and MLP, like Swin Transformer v2, and has fewer
heads of keys and values than of queries:

    norm: before    x = x + attention(norm(x))        norm: behind    x = x + norm(attention(x))
                    x = x + MLP(norm(x))                              x = x + norm(MLP(x))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

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


@MODELS.register("llama")
class Llama(Model):
    """Decoder-only transformer of Llama's shape, as in Chameleon and Anole."""

    @dataclass(kw_only=True)
    class Config:
        """The default is Chameleon's 7B."""

        layers: PositiveInt = 32
        """Number of blocks of attention and feed-forward."""
        width: PositiveInt = 4096
        """Size of the residual stream."""
        head_size: PositiveInt = 128
        """Size of one attention head, an even number; it must divide the width."""
        kv_heads: PositiveInt | None = None
        """Heads of keys and values; it must divide the heads of queries. None = as many as those."""
        mlp_width: PositiveInt = 11008
        """Hidden size of the gated feed-forward part."""
        seq_len: PositiveInt = 4096
        """Largest number of positions of a sequence, and tokens of a training block."""
        rope_theta: PositiveFloat = 10_000.0
        """Base of the rotary positions' wavelengths."""
        norm: Literal["before", "behind"] = "before"
        """Where the norms stand: before attention and MLP, on their inputs, or behind them, on what
        they add to the residual stream."""
        norm_eps: PositiveFloat = 1e-5
        """Number that the norms add to the mean square."""
        qk_norm: bool = True
        """Whether each head's queries and keys are normalised, with a weight and a bias for each of
        its numbers."""
        init_std: PositiveFloat = 0.02
        """Standard deviation of the normal initialisation, cut at three of them."""
        attention: Annotated[str, NoEffect("how the same is computed")] = "auto"
        """Backend of attention in training, one of those that --list shows; auto takes the one that
        suits the device."""

        def check(self) -> None:
            check_name(self.attention)
            if self.width % self.head_size or self.head_size % 2:
                raise UserError(
                    f"head_size {self.head_size} must be even and divide width {self.width}"
                )
            heads = self.width // self.head_size
            if self.kv_heads is not None and heads % self.kv_heads:
                raise UserError(
                    f"kv_heads {self.kv_heads} must divide the {heads} heads of queries"
                )

    matrices = ("qkv", "out", "gate", "up", "down")
    recomputed = ("before_attention", "after_attention")

    def __init__(self, config: Config, *, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.heads = config.width // config.head_size
        self.kv_heads = config.kv_heads or self.heads
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(
            Layer(config, self.heads, self.kv_heads) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        self.reset_parameters()

    def firsts(self) -> list[First]:
        """Truncated normal matrices, and norms with weights of one.

        The head of zeros makes the first loss exactly ln(vocab_size).
        """
        firsts = []
        for name, _ in self.named_parameters():
            if name.endswith("norm.bias"):
                firsts.append(First(name, "zeros"))
            elif name.endswith("norm.weight"):
                firsts.append(First(name, "ones"))
            else:
                firsts.append(First(name, "normal", self.config.init_std))
        return [*firsts, First("head.weight", "zeros")]

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
        rotation = rotations(position_BT, self.config.head_size, self.config.rope_theta)

        x_BTD = self.embedding(ids_BT)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(
                x_BTD, rotation, attention, plan, partial(attend, layer) if attend else None
            )
        return self.norm(x_BTD)

    def attention_on(self, device: torch.device) -> str:
        return str(choose(self.config.attention, device))

    def layer_bytes(self, *, sharded: bool, frozen: bool) -> LayerBytes:
        """Count bytes for A heads of queries, K of keys and values, and M hidden units of the MLP.

        A head has E numbers and the residual stream D. Without activation checkpointing these stay:

            2 x 4 D            inputs of the norms, float32
            3 x 2 D            inputs of the matrices, the MLP's twice
            2 x 4 (A + K) E    queries and keys before and after their norms, float32; the latter
                               for the gradients of the norms' weights
            4 x 2 A E          queries, keys and values of all heads, and the attended values
            4 x 2 M            the MLP's four products

        Where keys and values have as many heads as queries, the values are a view of the whole
        product of queries, keys and values, which then stays as well (4 A E more).
        """
        D, M, heads = self.config.width, self.config.mlp_width, self.heads
        q_width, k_width = heads * self.config.head_size, self.kv_heads * self.config.head_size
        repeated = k_width < q_width
        product = 2 * (q_width + 2 * k_width)
        values = 2 * q_width if repeated else product
        attended = 2 * q_width + 4 * heads

        head_norms = 0
        if self.config.qk_norm:
            copies = 1 if frozen else 2
            head_norms = 4 * copies * (q_width + k_width) + 8 * (heads + self.kv_heads)

        # Layers hand on float32, or bf16 where ranks gather their weights in bf16.
        handed_on = (2 if sharded else 4) * D
        return LayerBytes(
            none=14 * D + 8 + head_norms + 4 * q_width + values + attended + 8 * M,
            selective=handed_on
            + (product + 4 * q_width + repeated * values + attended)
            + (4 * D + 4 * M),
            full=handed_on,
            backward=6 * M,
        )

    def share(self, rank: int, count: int) -> None:
        if self.kv_heads % count or self.config.mlp_width % count:
            raise UserError(
                f"{count} ranks cannot share the model's {self.kv_heads} heads of keys and values "
                f"and its MLP of {self.config.mlp_width}; the number must divide both"
            )

        heads = (self.heads, self.kv_heads, self.kv_heads)
        rows = [number * self.config.head_size for number in heads]
        for block in self.blocks:
            # A rank takes whole heads and hidden units: rows of the matrices that compute them ...
            parts = [part.chunk(count)[rank] for part in block.qkv.weight.split(rows)]
            block.qkv.weight = frozen(torch.cat(parts))
            for linear in (block.gate, block.up):
                linear.weight = frozen(linear.weight.chunk(count)[rank])

            # ... and columns of the matrices that read them, whose results the ranks add up.
            block.out = Summed(block.out.weight.chunk(count, 1)[rank])
            block.down = Summed(block.down.weight.chunk(count, 1)[rank])

            for norm in (block.q_norm, block.k_norm):
                for name, parameter in norm.named_parameters():
                    setattr(norm, name, frozen(parameter.chunk(count)[rank]))
            block.heads, block.kv_heads = self.heads // count, self.kv_heads // count
        self.heads, self.kv_heads = self.heads // count, self.kv_heads // count


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); or x + norm(attention(x)) and so on."""

    def __init__(self, config: Llama.Config, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_size, self.heads, self.kv_heads = config.head_size, heads, kv_heads
        self.norm_first = config.norm == "before"
        width, qkv_heads = config.width, heads + 2 * kv_heads
        self.qkv = nn.Linear(width, qkv_heads * config.head_size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, config.mlp_width, bias=False)
        self.up = nn.Linear(width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)
        self.attention_norm = nn.RMSNorm(width, config.norm_eps)
        self.mlp_norm = nn.RMSNorm(width, config.norm_eps)
        self.q_norm = HeadNorm(heads, config.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(kv_heads, config.head_size) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: Attention,
        plan: Any,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the residual stream (B, T, D) after this layer.

        Args:
            x_BTD: the residual stream before it.
            rotation: of queries and keys, from `rotations`.
            attention: the backend.
            plan: the backend's plan.
            attend: replaces the backend: (q, k, v) -> the attended values.
        """
        q_BATE, k_BATE, v_BATE = self.before_attention(x_BTD, rotation)
        if attend:
            attended_BATE = attend(q_BATE, k_BATE, v_BATE)
        else:
            # Only a cache profits from fewer heads of keys and values. Backends get all of them.
            shared = self.heads // self.kv_heads
            k_BATE, v_BATE = (x.repeat_interleave(shared, 1) for x in (k_BATE, v_BATE))
            attended_BATE = attention(q_BATE, k_BATE, v_BATE, plan)
        return self.after_attention(x_BTD, attended_BATE)

    def before_attention(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, A, T, E), and keys and values of as many heads or fewer."""
        B, T, _ = x_BTD.shape
        heads = (self.heads, self.kv_heads, self.kv_heads)
        if self.norm_first:
            x_BTD = self.attention_norm(x_BTD)
        q_BTAE, k_BTAE, v_BTAE = self.qkv(x_BTD).view(B, T, -1, self.head_size).split(heads, 2)
        q_BATE = rotated(self.q_norm(q_BTAE).transpose(1, 2), rotation)
        k_BATE = rotated(self.k_norm(k_BTAE).transpose(1, 2), rotation)
        return q_BATE, k_BATE, v_BTAE.transpose(1, 2)

    def after_attention(self, x_BTD: Tensor, attended_BATE: Tensor) -> Tensor:
        """Return the residual stream after this layer.

        Args:
            x_BTD: the residual stream before the layer.
            attended_BATE: the attended values.
        """
        B, T, _ = x_BTD.shape
        attended_BTD = self.out(attended_BATE.transpose(1, 2).reshape(B, T, -1))
        if self.norm_first:
            x_BTD = x_BTD + attended_BTD
            return x_BTD + self._feed_forward(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + self.attention_norm(attended_BTD)
        return x_BTD + self.mlp_norm(self._feed_forward(x_BTD))

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class HeadNorm(nn.Module):
    """Layer norm of each head's numbers, with a weight and a bias for each: (..., A, E) to the same."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_size))
        self.bias = nn.Parameter(torch.zeros(heads, head_size))

    def forward(self, x_BTAE: Tensor) -> Tensor:
        """Normalise the last dimension; 1e-5 is added to the variance, as in Chameleon."""
        return F.layer_norm(x_BTAE, x_BTAE.shape[-1:], eps=1e-5) * self.weight + self.bias


def rotations(position_BT: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (B, 1, T, E/2), float32, of rotary positions (arXiv 2104.09864).

    The numbers e and e + E/2 of a head are a point of the plane, and position t turns it by the
    angle t / theta^(2e / E). A query turned by its position times a key turned by its own depends
    on the distance of the two only.
    """
    exponent_E = torch.arange(0, head_size, 2, device=position_BT.device).float() / head_size
    angle_BTE = position_BT[..., None].float() * (1.0 / theta**exponent_E)
    return angle_BTE.cos()[:, None], angle_BTE.sin()[:, None]


def rotated(x_BATE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn heads of queries or keys by the angles of their positions, in float32."""
    cos, sin = rotation
    first, second = x_BATE.float().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x_BATE.dtype)
