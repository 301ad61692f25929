"""The type checker sees every package: a mistake in what `evaluation/` and `plugins/` offer is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = """
from cm3leon.evaluation.report.page import Fact
from cm3leon.plugins.scenes.world import Scene

Fact(nonsense=3)
Scene(nonsense=3)
"""
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


def test_mistakes_across_packages_are_found(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "mistakes.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    for line, name in ((5, "Fact"), (6, "Scene")):
        wrong = f'mistakes.py:{line}: error: Unexpected keyword argument "nonsense" for "{name}"'
        assert wrong in done.stdout, done.stdout + done.stderr
