"""Sizes of models: the paper's three (Table 3), one for a laptop, and Chameleon's public ones."""

from cm3leon.models import llama, transformer  # noqa: F401  registers the classes of the presets
from cm3leon.registry import MODELS

MODELS.preset("cm3leon_350m", of="cm3leon", layers=24, width=1024, head_size=64)
MODELS.preset("cm3leon_760m", of="cm3leon", layers=24, width=1536, head_size=64)
MODELS.preset("cm3leon_7b", of="cm3leon", layers=32, width=4096, head_size=128)
MODELS.preset(
    "cm3leon_tiny", of="cm3leon", layers=6, width=256, head_size=64, seq_len=256, init_std=0.02
)

MODELS.preset("chameleon_7b", of="llama")
MODELS.preset(
    "chameleon_34b",
    of="llama",
    layers=48,
    width=8192,
    mlp_width=22016,
    kv_heads=8,
    norm="behind",
)
