"""The paper's three sizes (Table 3), and one for a laptop."""

from cm3leon.models import transformer  # noqa: F401  registers the class that the presets are of
from cm3leon.registry import MODELS

MODELS.preset("cm3leon_350m", of="cm3leon", layers=24, width=1024, head_size=64)
MODELS.preset("cm3leon_760m", of="cm3leon", layers=24, width=1536, head_size=64)
MODELS.preset("cm3leon_7b", of="cm3leon", layers=32, width=4096, head_size=128)
MODELS.preset(
    "cm3leon_tiny", of="cm3leon", layers=6, width=256, head_size=64, seq_len=256, init_std=0.02
)
