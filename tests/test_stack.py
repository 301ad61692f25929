"""What runs on the pinned stack for clusters as well: the marker `stack` is where it has to be.

The versions of requirements/cluster.lock are older than those of a fresh installation: torch 2.9,
transformers 4. A file of tests has the marker if it handles one of the packages that differ itself,
by itself or through a helper of the tests, and each part of the method has a marked file. The rest of
the tests would say there what they have said already.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "cm3leon"
DIFFERENT = (
    "torchvision",
    "torchao",
    "faiss",
    "xformers",
    "fairseq2",
    "transformers",
    "diffusers",
    "peft",
    "tokenizers",
    "huggingface_hub",
)
"""Packages beside torch whose versions differ, and of which more than tensors is used."""
COMPUTING = (
    "tokenizers",
    "retrievers",
    "objectives",
    "models",
    "training",
    "decoders",
    "hub",
)
MARKED = re.compile(r"^pytestmark = (\[\n\s*)?pytest\.mark\.stack\b", re.MULTILINE)


def imports(file: Path) -> set[str]:
    """Modules that a file imports anywhere, also where it skips without them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            found.update(str(each.value) for each in node.args if isinstance(each, ast.Constant))
    return found


def imports_of_test(file: Path) -> set[str]:
    """Modules that a file of tests imports, by itself or through the helpers beside it."""
    found = imports(file)
    for helper in sorted(found):
        if (TESTS / f"{helper}.py").is_file():
            found |= imports(TESTS / f"{helper}.py")
    return found


FILES = {file.name: imports_of_test(file) for file in sorted(TESTS.glob("test_*.py"))}


def marked(name: str) -> bool:
    return MARKED.search((TESTS / name).read_text()) is not None


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_handles_a_package_of_another_version_is_marked(name: str) -> None:
    handled = {each.partition(".")[0] for each in FILES[name]} & set(DIFFERENT)
    assert not handled or marked(name), f"{sorted(handled)}: add pytestmark = pytest.mark.stack"


@pytest.mark.parametrize("part", COMPUTING)
def test_every_part_that_computes_has_a_marked_file(part: str) -> None:
    assert list(PACKAGE.glob(f"{part}*"))
    prefix = f"cm3leon.{part}"
    of_part = [
        name
        for name, found in FILES.items()
        if any(each == prefix or each.startswith(f"{prefix}.") for each in found)
    ]
    assert any(map(marked, of_part)), f"mark one of {of_part}"


def test_a_whole_run_is_marked() -> None:
    assert (
        "pytest.mark.stack\ndef test_metrics_and_report_are_complete"
        in (TESTS / "test_end_to_end.py").read_text()
    )
