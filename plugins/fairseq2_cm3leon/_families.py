"""What fairseq2 is told of us: three families by the name `cm3leon`. Imported in every process of
its users."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

from fairseq2.composition import (
    register_dataset_family,
    register_model_family,
    register_tokenizer_family,
)
from fairseq2.data.tokenizers import TokenizerHubAccessor
from fairseq2.datasets import DatasetHubAccessor
from fairseq2.models import ModelFamily, ModelHubAccessor
from fairseq2.models.transformer_lm import (
    TransformerLM,
    apply_ac_to_transformer_lm,
    apply_fsdp_to_transformer_lm,
    compile_transformer_lm,
)
from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer
from torch import Tensor

from cm3leon.config import PositiveInt, from_mapping
from cm3leon.models.transformer import Transformer
from cm3leon.plugins.fairseq2_cm3leon._dataset import Blocks, BlocksConfig, open_blocks
from cm3leon.plugins.fairseq2_cm3leon._tokenizer import (
    TextTokenizerAdapter,
    VocabConfig,
    load_tokenizer,
)

FAMILY = "cm3leon"
ARCHITECTURES = ("cm3leon_350m", "cm3leon_760m", "cm3leon_7b", "cm3leon_tiny")
"""Our presets that are fairseq2's architectures."""


@dataclass(kw_only=True)
class CM3LeonConfig(Transformer.Config):
    """Shape of the decoder; `attention` is not read, fairseq2 has its own choice
    (`common.torch.default_sdpa`)."""

    vocab_size: PositiveInt = 65_536
    """All ids, those of the text and of the image tokenizer and reserved ones."""


model_hub = ModelHubAccessor(FAMILY, kls=TransformerLM, config_kls=CM3LeonConfig)
tokenizer_hub = TokenizerHubAccessor(FAMILY, kls=TextTokenizerAdapter, config_kls=VocabConfig)
dataset_hub = DatasetHubAccessor(FAMILY, kls=Blocks, config_kls=BlocksConfig)


def register_families(container: DependencyContainer) -> None:
    """Registers models with their architectures, tokenizers and datasets, where that has not been
    done."""
    if FAMILY in container.iter_keys(ModelFamily):
        return
    register_model_family(
        container,
        FAMILY,
        kls=TransformerLM,
        config_kls=CM3LeonConfig,
        factory=_new_model,
        state_dict_converter=_under_fairseq2_names,
        compiler=compile_transformer_lm,
        fsdp_applier=apply_fsdp_to_transformer_lm,
        layerwise_ac_applier=apply_ac_to_transformer_lm,
    )
    architecture = ConfigRegistrar(container, CM3LeonConfig)
    for name in ARCHITECTURES:
        architecture(name)(partial(_preset, name))
    register_tokenizer_family(
        container, FAMILY, kls=TextTokenizerAdapter, config_kls=VocabConfig, loader=load_tokenizer
    )
    register_dataset_family(
        container, FAMILY, kls=Blocks, config_kls=BlocksConfig, opener=open_blocks
    )


def _preset(name: str) -> CM3LeonConfig:
    from cm3leon.models import presets  # noqa: F401  registers them
    from cm3leon.registry import MODELS

    return CM3LeonConfig(**vars(MODELS.check(name).config))


def _new_model(config: CM3LeonConfig) -> TransformerLM:
    """A decoder with the weights that our own begins with; fairseq2 has set the device and the
    precision."""
    from fairseq2.models.transformer import create_default_sdpa

    from cm3leon.plugins.fairseq2_cm3leon._network import create_transformer_lm

    config = from_mapping(CM3LeonConfig, asdict(config), "model")
    return create_transformer_lm(config, config.vocab_size, create_default_sdpa)


def _under_fairseq2_names(state: dict[str, Tensor], config: CM3LeonConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint of ours; those of fairseq2's trainer have its names already."""
    from cm3leon.plugins.fairseq2_cm3leon.convert import to_fairseq2

    return to_fairseq2(state) if "head.weight" in state else state
