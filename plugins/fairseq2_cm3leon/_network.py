"""The paper's model as fairseq2's TransformerLM."""

from __future__ import annotations

import torch
from fairseq2.gang import create_fake_gangs
from fairseq2.models.transformer import (
    SDPA,
    CausalAttentionBias,
    StandardFeedForwardNetwork,
    StandardMultiheadAttention,
    TransformerEmbeddingFrontend,
    TransformerNormOrder,
)
from fairseq2.models.transformer.sdpa.default import SDPAFactory
from fairseq2.models.transformer_lm import (
    StandardTransformerLMDecoder,
    StandardTransformerLMDecoderLayer,
    TransformerLM,
)
from fairseq2.nn import LearnedPositionEncoder, Linear, StandardEmbedding, StandardLayerNorm

from cm3leon.models.transformer import Transformer
from cm3leon.plugins.fairseq2_cm3leon.convert import to_fairseq2
from cm3leon.tokenizers.vocab import Vocab

META = torch.device("meta")


def create_transformer_lm(
    config: Transformer.Config, vocab_size: int, attention: SDPAFactory
) -> TransformerLM:
    """Create a TransformerLM of that shape, with the initial weights that `Transformer` draws from
    the same seed, on torch's default device and in one process.

    Args:
        attention: creates the SDPA of each layer.
    """
    D, heads = config.width, config.width // config.head_size
    gangs = create_fake_gangs(torch.device("cpu"))

    def norm() -> StandardLayerNorm:
        return StandardLayerNorm(D, bias=False, elementwise_affine=False, device=META)

    def layer(sdpa: SDPA) -> StandardTransformerLMDecoderLayer:
        return StandardTransformerLMDecoderLayer(
            StandardMultiheadAttention(D, heads, sdpa, bias=False, gangs=gangs, device=META),
            norm(),
            StandardFeedForwardNetwork(
                D, config.mlp_ratio * D, bias=False, gangs=gangs, device=META
            ),
            norm(),
            norm_order=TransformerNormOrder.PRE,
        )

    model = TransformerLM(
        D,
        TransformerEmbeddingFrontend(
            D,
            StandardEmbedding(vocab_size, D, device=META),
            LearnedPositionEncoder(D, config.seq_len, device=META),
            no_scale=True,
        ),
        StandardTransformerLMDecoder(
            [layer(attention(CausalAttentionBias())) for _ in range(config.layers)], norm()
        ),
        Linear(D, vocab_size, bias=False, device=META),
        pad_idx=Vocab.pad,
        max_seq_len=config.seq_len,
    )
    # The modules above were made without memory; these are their weights.
    model.load_state_dict(
        to_fairseq2(Transformer(config, vocab_size=vocab_size).state_dict()), assign=True
    )
    return model
