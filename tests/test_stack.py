"""What is tested with the pinned versions for clusters as well: the marker `stack` is in its place.

The versions of requirements/cluster.lock are older than those of a fresh installation: torch 2.9,
transformers 4. A test file has the marker if it uses one of the packages that differ, by itself or
through a helper of the tests; and each part of the method has a marked file. With these versions,
the rest of the tests would show nothing new.
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
"""Packages whose versions differ, and of which more than tensors is used. Torch differs as well."""
COMPUTING = (
    "tokenizers",
    "retrievers",
    "objectives",
    "models",
    "training",
    "decoders",
    "hub",
)
"""Parts of the package that compute with tensors."""
MARKED = re.compile(r"^pytestmark = (\[\n\s*)?pytest\.mark\.stack\b", re.MULTILINE)


def imports(file: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, also where it is skipped without them."""
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
    """Names of the modules that a test file imports, by itself or through helpers beside it."""
    found = imports(file)
    for helper in sorted(found):
        if (TESTS / f"{helper}.py").is_file():
            found |= imports(TESTS / f"{helper}.py")
    return found


FILES = {file.name: imports_of_test(file) for file in sorted(TESTS.glob("test_*.py"))}


def marked(name: str) -> bool:
    """Whether all tests of a file have the marker `stack`."""
    return MARKED.search((TESTS / name).read_text()) is not None


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_handles_a_package_of_another_version_is_marked(name: str) -> None:
    handled = {each.partition(".")[0] for each in FILES[name]} & set(DIFFERENT)
    assert not handled or marked(name), f"{sorted(handled)}: add pytestmark = pytest.mark.stack"


@pytest.mark.parametrize("part", COMPUTING)
def test_every_part_that_computes_has_a_marked_file(part: str) -> None:
    assert list(PACKAGE.glob(f"{part}*"))
    prefix = f"cm3leon.{part}"

    def has_part(modules: set[str]) -> bool:
        return any(each == prefix or each.startswith(f"{prefix}.") for each in modules)

    of_part = [name for name, modules in FILES.items() if has_part(modules)]
    assert any(map(marked, of_part)), f"mark one of {of_part}"


def test_a_whole_run_is_marked() -> None:
    tests = (TESTS / "test_end_to_end.py").read_text()
    assert "pytest.mark.stack\ndef test_metrics_and_report_are_complete" in tests
