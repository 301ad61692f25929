"""The blocks of Python and YAML on pages: they parse, and what they name is there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_commands import PAGES

ROOT = Path(__file__).resolve().parent.parent


def blocks(language: str) -> dict[str, str]:
    """The blocks of all pages in a language, by where they stand."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            found[f"{page.relative_to(ROOT)}-{line}"] = block[1]
    return found


PYTHON, YAML = blocks("python"), blocks("yaml")


def test_blocks_are_found() -> None:
    assert len(PYTHON) > 12
    assert len(YAML) > 5


def is_there(module: str, name: str) -> bool:
    """Whether a module has the name, or a module of that name lies in it."""
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("where", PYTHON)
def test_a_block_of_python_compiles_and_imports_what_is_there(where: str) -> None:
    compile(PYTHON[where], where, "exec")
    for node in ast.walk(ast.parse(PYTHON[where])):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("cm3leon."):
            assert node.module
            missing = [each.name for each in node.names if not is_there(node.module, each.name)]
            assert not missing, f"from {node.module} import {', '.join(missing)}"
        elif isinstance(node, ast.Import):
            for each in node.names:
                if f"{each.name}.".startswith("cm3leon."):
                    importlib.import_module(each.name)


@pytest.mark.parametrize("where", YAML)
def test_a_block_of_yaml_has_keys_that_are_known(where: str) -> None:
    """It is a part of a study if it has `runs`, and else of an experiment."""
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is missing")
    schema: dict[str, Any] = json.loads((ROOT / "experiments/schema.json").read_text())
    content = yaml.safe_load(YAML[where])
    assert isinstance(content, dict)
    if "runs" not in content:
        schema = {"$ref": "#/definitions/experiment", "definitions": schema["definitions"]}
    errors = jsonschema.Draft7Validator(schema).iter_errors(content)
    assert not [f"{error.json_path}: {error.message[:200]}" for error in errors]
