"""The type checker sees every package, and what registries build: mistakes about them are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The lines of a program, and what is wrong with some of them.
MISTAKES = """
from cm3leon.evaluation.report.page import Fact
from cm3leon.plugins.scenes.world import Scene
from cm3leon.registry import DECODERS, TASKS

Fact(nonsense=3)
Scene(nonsense=3)
DECODERS.build("greedy").nonsense
TASKS.get("caption").nonsense
"""
FOUND = (
    (6, 'Unexpected keyword argument "nonsense" for "Fact"'),
    (7, 'Unexpected keyword argument "nonsense" for "Scene"'),
    (8, '"Decoder" has no attribute "nonsense"'),
    (9, '"type[Task]" has no attribute "nonsense"'),
)
SETTINGS = f"""
[mypy]
mypy_path = {ROOT}
explicit_package_bases = true
follow_imports = silent

[mypy-jinja2.*,matplotlib.*,numpy.*,torch.*,yaml.*]
# Their stubs take longer than all of ours.
follow_imports = skip
follow_imports_for_stubs = true
"""


def test_mistakes_are_found(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    (tmp_path / "mypy.ini").write_text(SETTINGS)

    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "mistakes.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    for line, mistake in FOUND:
        assert f"mistakes.py:{line}: error: {mistake}" in done.stdout, done.stdout + done.stderr
