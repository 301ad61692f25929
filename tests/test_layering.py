"""A module imports only from parts that stand before its own part.

Imports under TYPE_CHECKING count too, except those of the registry, which names the base class of
what each of its registries holds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FOUNDATION = (
    "types",
    "terminal",
    "locks",
    "paths",
    "permissions",
    "secrets",
    "io",
    "seeds",
    "records",
    "digests",
    "weights",
    "collectives",
    "config",
    "provenance",
    "arguments",
    "registry",
)
CHAIN = ("tokenizers", "data", "retrievers", "objectives", "models", "loggers", "training")
TOP = (
    "experiment",
    "stages",
    "hub",
    "api",
    "evaluate",
    "stages.evaluation",
    "stages.publish",
    "stages.table",
    "stages.checks",
    "stages.running",
    "stages.importing",
    "hub.export",
    "hub.adapter",
    "hub.card",
    "launch",
    "studies",
    "doctor",
    "serve",
    "demo",
    "commands",
    "run",
)
# The stage that evaluates a finished model, and all that builds on it, come after what asks
# models: they are parts of their own.
PARTS = (*FOUNDATION, *CHAIN, "decoders", "tasks", "evaluation", *TOP, "plugins")


def allowed(part: str) -> set[str]:
    """The parts of `cm3leon` that a part may import, itself included."""
    if part in FOUNDATION:
        before = FOUNDATION[: FOUNDATION.index(part)]
    elif part in CHAIN:
        before = FOUNDATION + CHAIN[: CHAIN.index(part)]
    elif part == "decoders":
        before = FOUNDATION + CHAIN[: CHAIN.index("models") + 1]
    elif part == "tasks":
        before = FOUNDATION + CHAIN[: CHAIN.index("objectives") + 1]
    else:  # evaluation, the top in its order, and plugins, which nothing imports
        before = PARTS[: PARTS.index(part)]
    return {part, *before}


def part_of(name: str) -> str:
    """The part that a module of `cm3leon` belongs to, by its name there.

    For example `stages.table` is a part, and `stages.pretraining` is in the part `stages`.
    """
    first, *rest = name.split(".")
    two = f"{first}.{rest[0]}" if rest else first
    return two if two in PARTS else first


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in a module, also inside functions."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    tree = ast.parse(source)
    if module == "cm3leon.registry":
        tree.body = [statement for statement in tree.body if not is_for_types_alone(statement)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the module's own package, and each further dot the one above it.
            names = package[: len(package) - node.level + 1] if node.level else []
            if node.module:
                names = [*names, node.module]
            base = ".".join(names)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_for_types_alone(statement: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:` with all that stands below it."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One sentence for every import that goes the wrong way."""
    part = part_of(module.partition(".")[2])
    found = []
    for line, name in imported(source, module, is_package):
        top, _, rest = name.partition(".")
        target = part_of(rest)
        if top in ("evaluation", "plugins"):
            found.append(f"{module}, line {line}: import cm3leon.{name} instead of {name}")
        elif top == "cm3leon" and target in PARTS and part in PARTS and target not in allowed(part):
            found.append(f"{module}, line {line}: {part} must not import {name}")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of the package, with its file."""
    folders: list[tuple[Path, tuple[str, ...]]] = [
        (ROOT / "cm3leon", ()),
        (ROOT / "evaluation", ("cm3leon",)),
        (ROOT / "plugins", ("cm3leon",)),
    ]
    found = []
    for folder, prefix in folders:
        for file in sorted(folder.rglob("*.py")):
            parts = [*prefix, *file.relative_to(ROOT).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found.append((".".join(parts), file))
    return found


@pytest.mark.parametrize(
    ("module", "file"), [pytest.param(*each, id=each[0]) for each in modules()]
)
def test_imports_go_one_way(module: str, file: Path) -> None:
    assert violations(file.read_text(), module, file.name == "__init__.py") == []


def test_the_core_knows_no_plugin() -> None:
    """What a folder of `plugins/` adds is found by the registry: no module outside names it."""
    names = "|".join(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir())
    known = re.compile(rf"\bplugins\.({names})\b")
    core = [file for module, file in modules() if not module.startswith("cm3leon.plugins")]
    assert [str(file) for file in core if known.search(file.read_text())] == []


def test_every_part_has_its_place() -> None:
    parts = {module.split(".")[1] for module, _ in modules() if "." in module}
    assert parts <= set(PARTS)


def test_id_ranges_are_known_to_the_vocabulary_alone() -> None:
    """Other modules ask the vocabulary what an id is, or for the id of a code or sentinel."""
    starts = ("image_start", "sentinel_start")
    for module, file in modules():
        if module != "cm3leon.tokenizers.vocab":
            for node in ast.walk(ast.parse(file.read_text())):
                is_bound = isinstance(node, ast.Attribute) and node.attr in starts
                assert not is_bound, f"{module}, line {node.lineno}"


def test_tests_and_benchmarks_import_by_the_full_name() -> None:
    found = []
    for file in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        found += violations(file.read_text(), file.stem)
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cm3leon.models.layers", "from cm3leon.training import trainer"),
        ("cm3leon.models.layers", "def f():\n    import cm3leon.training.trainer"),
        ("cm3leon.models.layers", "if TYPE_CHECKING:\n    from ..training.trainer import Trainer"),
        ("cm3leon.decoders.engine", "from cm3leon import training"),
        ("cm3leon.tasks.vqa", "from cm3leon.models import Transformer"),
        ("cm3leon.config", "from cm3leon.registry import MODELS"),
        ("cm3leon.data", "from cm3leon.run import main"),
        ("cm3leon.evaluation.report", "from cm3leon.stages import run_experiment"),
        ("cm3leon.stages.pretraining", "from cm3leon.api import CM3Leon"),
        ("cm3leon.evaluate", "from cm3leon.stages.running import run_experiment"),
        ("cm3leon.stages", "from evaluation import report"),
        ("cm3leon.stages", "import plugins.example"),
        ("cm3leon.run", "from cm3leon.plugins.scenes.world import World"),
        ("cm3leon.evaluation.report", "def f():\n    from cm3leon.plugins import scenes"),
    ],
)
def test_a_backward_import_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "cm3leon.training.trainer",
            "from cm3leon.models import Transformer\nfrom .schedule import linear",
        ),
        ("cm3leon.evaluation.report", "from cm3leon.training import trainer"),
        ("cm3leon.run", "from cm3leon.stages import run_experiment"),
        ("cm3leon.stages.running", "from cm3leon.stages.pretraining import make_pretraining"),
        ("cm3leon.run", "from cm3leon import __version__"),
        ("cm3leon.tasks.vqa", "import torch.utils.data\nfrom cm3leon.tokenizers import vocab"),
    ],
)
def test_a_forward_import_is_fine(module: str, source: str) -> None:
    assert violations(source, module) == []
