"""The paper's retriever: CLIP vectors, maximum inner product search, and the strategy on top."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cm3leon.registry import RETRIEVERS
from cm3leon.retrievers.base import Retriever, StrategyConfig
from cm3leon.retrievers.encoder import ClipEncoder, EncoderConfig


@RETRIEVERS.register("dense")
class DenseRetriever(Retriever):
    """CLIP bi-encoder, FAISS inner-product search; relevance, modality, diversity,
    query dropout."""

    @dataclass(kw_only=True)
    class Config(StrategyConfig):
        """The strategy of the paper's section 2.2, and the encoder."""

        encoder: EncoderConfig = field(default_factory=EncoderConfig)
        """The CLIP model."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.encoder = ClipEncoder(config.encoder)

    @classmethod
    def without_weights(cls, config: Config) -> Config:
        return replace(config, encoder=replace(config.encoder, pretrained=None))

    @classmethod
    def vector_width(cls, config: Config) -> int:
        """The width of its encoder's vectors, which is known without building a large CLIP."""
        if config.encoder.architecture is None:
            return config.encoder.embed_dim
        from open_clip import get_model_config

        if (known := get_model_config(config.encoder.architecture)) is None:
            return super().vector_width(config)  # says that there is no such model
        return int(known["embed_dim"])
