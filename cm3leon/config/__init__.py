"""Typed configuration: plain mappings (YAML, command line) to checked dataclasses and back.

A config class is a keyword-only dataclass with one sentence under every field:

    @dataclass(kw_only=True)
    class Config:
        layers: PositiveInt = 24
        \"\"\"Number of transformer layers.\"\"\"

`from_mapping(Config, {"layers": 0}, "model")` then raises UserError("model.layers is 0; it must be
a whole number, at least 1").

    schema    what a config class is made of: bounds, marks, components
    plain     a config as plain data: whole, or what a result depends on
    describe  a config in words
    json_schema  a config as a JSON Schema, for editors
    files     YAML, and the overrides of a command line
    check     plain data to a checked config
    values    what a swept key takes: lists, ranges, intervals to draw from
"""

from cm3leon.config.check import checked_value, from_mapping, settled, typed_value
from cm3leon.config.describe import (
    FieldDoc,
    check_config_class,
    choices,
    describe,
    nearest,
    summary_of,
)
from cm3leon.config.files import (
    SHIPPED,
    Override,
    Word,
    apply_overrides,
    dump_yaml,
    load_yaml,
    parse_override,
    parse_word,
    split_key,
)
from cm3leon.config.plain import recorded_settings, result_settings, to_mapping
from cm3leon.config.schema import (
    Component,
    ComponentChecker,
    Guidance,
    Later,
    Location,
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    NoSettings,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    Seed,
    Settings,
    Temperature,
    component_sections,
    key_of,
)
from cm3leon.config.values import LEGEND, Choice, Interval, parse_lists, parse_values

__all__ = [
    "LEGEND",
    "SHIPPED",
    "Choice",
    "Component",
    "ComponentChecker",
    "FieldDoc",
    "Guidance",
    "Interval",
    "Later",
    "Location",
    "NoEffect",
    "NoSettings",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Override",
    "PositiveFloat",
    "PositiveInt",
    "Probability",
    "Range",
    "Seed",
    "Settings",
    "Temperature",
    "Word",
    "apply_overrides",
    "check_config_class",
    "checked_value",
    "choices",
    "component_sections",
    "describe",
    "dump_yaml",
    "from_mapping",
    "key_of",
    "load_yaml",
    "nearest",
    "parse_lists",
    "parse_override",
    "parse_values",
    "parse_word",
    "recorded_settings",
    "result_settings",
    "settled",
    "split_key",
    "summary_of",
    "to_mapping",
    "typed_value",
]
