"""The three families by which fairseq2 knows us, all named `cm3leon`. Imported in every process
that uses fairseq2."""

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
"""Our presets that are architectures of fairseq2."""


@dataclass(kw_only=True)
class CM3LeonConfig(Transformer.Config):
    """The shape of the model. `attention` is not used, as fairseq2 has a setting of its own
    (`common.torch.default_sdpa`)."""

    vocab_size: PositiveInt = 65_536
    """Number of ids: text, image codes and reserved ones."""


model_hub = ModelHubAccessor(FAMILY, kls=TransformerLM, config_kls=CM3LeonConfig)
tokenizer_hub = TokenizerHubAccessor(FAMILY, kls=TextTokenizerAdapter, config_kls=VocabConfig)
dataset_hub = DatasetHubAccessor(FAMILY, kls=Blocks, config_kls=BlocksConfig)


def register_families(container: DependencyContainer) -> None:
    """Register models with their architectures, tokenizers and datasets, unless that was done
    already."""
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

    # A preset is made only when its architecture is asked for.
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
    """The shape of one of our presets."""
    from cm3leon.models import presets  # noqa: F401  registers them
    from cm3leon.registry import MODELS

    return CM3LeonConfig(**vars(MODELS.check(name).config))


def _new_model(config: CM3LeonConfig) -> TransformerLM:
    """A model with the weights that our own begins with; fairseq2 has set the device and the
    precision."""
    from fairseq2.models.transformer import create_default_sdpa

    from cm3leon.plugins.fairseq2_cm3leon._network import create_transformer_lm

    config = from_mapping(CM3LeonConfig, asdict(config), "model")
    return create_transformer_lm(config, config.vocab_size, create_default_sdpa)


def _under_fairseq2_names(state: dict[str, Tensor], config: CM3LeonConfig) -> dict[str, Tensor]:
    """The weights of our checkpoints under fairseq2's names, which its own checkpoints have."""
    from cm3leon.plugins.fairseq2_cm3leon.convert import to_fairseq2

    if "head.weight" not in state:
        return state
    return to_fairseq2(state)
