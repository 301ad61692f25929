"""What `--schema` prints: the JSON Schema of experiments and studies, for editors of YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cm3leon.commands.listing import plugins_of
from cm3leon.config.json_schema import Schemas
from cm3leon.experiment import Experiment
from cm3leon.experiment.files import Entry
from cm3leon.registry import discover
from cm3leon.studies.config import StudyConfig
from cm3leon.studies.points import ExperimentSweep


def schema(words: Sequence[str]) -> str:
    """The schema as JSON.

    Args:
        words: `plugins=` with paths of plugins whose components are included.

    Raises:
        UserError: for any other word.
    """
    discover(plugins_of(words, "--schema"))
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def document() -> dict[str, Any]:
    """The schema with all components that are loaded.

    A file is a study if it has `runs`, or asks without data; else it is an experiment. Two more
    files have a definition: `#/definitions/overrides` is for files of dotted keys, and
    `#/definitions/list` for experiments.yaml.
    """
    schemas = Schemas()
    study = schemas.section(StudyConfig)

    # A sweep's keys stand beside the sections of an experiment, and beside their dotted keys.
    swept = schemas.properties(ExperimentSweep)
    experiment = {
        "description": "An experiment, or one that is run at several points.",
        "type": "object",
        "properties": {**schemas.properties(Experiment), **swept},
        "additionalProperties": False,
    }
    dotted = schemas.definition(schemas.settings(Experiment))
    overrides = {
        **dotted,
        "properties": {**dotted["properties"], **swept},
        "patternProperties": {**dotted["patternProperties"], r"^sweep\.": {}},
    }
    entry = schemas.definition(schemas.section(Entry))
    entry["properties"]["overrides"] = {"$ref": "#/definitions/overrides"}
    schemas.definitions |= {
        "experiment": experiment,
        "overrides": overrides,
        "list": {"type": "object", "additionalProperties": schemas.section(Entry)},
    }

    # `experiment.files` tells experiments and studies apart in the same way.
    asks_alone = {"required": ["evaluations"], "not": {"required": ["data"]}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "CM3Leon: experiments and studies",
        "if": {"anyOf": [{"required": ["runs"]}, asks_alone]},
        "then": study,
        "else": {"$ref": "#/definitions/experiment"},
        "definitions": dict(sorted(schemas.definitions.items())),
    }
