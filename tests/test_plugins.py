"""Discovery of plugins: the folder, entry points, paths, and failures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cm3leon.registry import METRICS, PluginError, discover
from cm3leon.types import UserError

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = '''
from dataclasses import dataclass

from cm3leon.registry import METRICS


@METRICS.register("{name}")
class Metric:
    """A metric of a plugin."""

    @dataclass(kw_only=True)
    class Config:
        scale: float = 1.0
        """Factor."""
'''


def write_plugin(file: Path, name: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(PLUGIN.format(name=name))
    return file


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with the registry and no built-in components, so that discovery has little to import."""
    clone = tmp_path / "clone"
    (clone / "cm3leon").mkdir(parents=True)
    for name in ("__init__.py", "types.py", "config.py", "registry.py"):
        shutil.copy(ROOT / "cm3leon" / name, clone / "cm3leon")
    (clone / "experiments.yaml").write_text("")
    for name in ("plugins", "evaluation"):  # without the second, an editable installation would lend its own
        (clone / name).mkdir()
        (clone / name / "__init__.py").write_text("")
    return clone


PRINT_ORIGINS = """
discover()
discover()
for name in METRICS.names():
    print(f"{name}: {METRICS.origin(name)}")
"""


def discovered(clone: Path, *path: Path, code: str = PRINT_ORIGINS) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, the clone and more folders being on its path."""
    folders = [str(folder) for folder in (clone, *path)]
    code = f"import sys\nsys.path[:0] = {folders}\nfrom cm3leon.registry import METRICS, discover\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=clone.parent)


@pytest.mark.usefixtures("registries")
def test_file_and_package_given_by_path(tmp_path: Path) -> None:
    file = write_plugin(tmp_path / "one/my-plugin.py", "from_file")
    same_name = write_plugin(tmp_path / "two/my-plugin.py", "from_second_file")
    package = write_plugin(tmp_path / "pack/__init__.py", "from_package").parent
    write_plugin(package / "sub/__init__.py", "from_subpackage")
    write_plugin(package / "test_it.py", "from_test")
    write_plugin(package / "tests/__init__.py", "from_tests")
    for _ in range(2):
        discover([file, str(same_name), package])
    assert METRICS.origin("from_file") == str(file)
    assert METRICS.origin("from_second_file") == str(same_name)
    assert METRICS.origin("from_subpackage") == str(package)
    assert not {"from_test", "from_tests"} & set(METRICS.names())


@pytest.mark.parametrize("name", ["missing.py", "empty_folder", "notes.txt"])
def test_path_that_is_no_plugin(tmp_path: Path, name: str, registries: None) -> None:
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=rf"the plugin .*{name} (does not exist|must be a \.py file or a folder)"):
        discover([tmp_path / name])


@pytest.mark.usefixtures("registries")
def test_failing_import_names_the_plugin_and_keeps_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module\n")
    for _ in range(2):
        with pytest.raises(PluginError, match=r"plugin .*broken\.py failed to import: ModuleNotFoundError") as caught:
            discover([file])
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.usefixtures("registries")
def test_name_taken_by_another_plugin_names_both(tmp_path: Path) -> None:
    first = write_plugin(tmp_path / "first.py", "taken")
    second = write_plugin(tmp_path / "second.py", "taken")
    with pytest.raises(PluginError, match=f"the first is from {first}; the second is from {second}"):
        discover([first, second])


def test_plugins_folder(clone: Path) -> None:
    write_plugin(clone / "plugins/mine/__init__.py", "mine").write_text("")
    write_plugin(clone / "plugins/mine/metric.py", "reached")
    write_plugin(clone / "plugins/single.py", "single")
    write_plugin(clone / "plugins/test_single.py", "test")
    done = discovered(clone)
    assert done.stdout.splitlines() == ["reached: plugins/mine", "single: plugins/single"], done.stderr


def test_plugins_folder_with_a_folder_that_is_no_package(clone: Path) -> None:
    write_plugin(clone / "plugins/mine/metric.py", "mine")
    assert "plugins/mine holds Python files but no __init__.py" in discovered(clone).stderr


def test_entry_point(clone: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_plugin(site / "their_package/__init__.py", "theirs")
    info = site / "their_dist-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-dist\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[cm3leon.plugins]\nthem = their_package\n")
    done = discovered(clone, site)
    assert done.stdout.splitlines() == ["theirs: entry point them (their-dist 1.2)"], done.stderr


def test_example_plugin_also_where_the_experiment_names_it(clone: Path) -> None:
    shutil.copytree(ROOT / "plugins/example", clone / "plugins/example")
    code = """
discover(["clone/plugins/example"])

import torch
from cm3leon.registry import DECODERS

decoder = DECODERS.build({"name": "top_k", "k": 2})
print(DECODERS.origin("top_k"), decoder.logits(torch.tensor([[1.0, 4, 3, 2]]), None).tolist())
"""
    done = discovered(clone, code=code)
    assert done.stdout == "plugins/example [[-inf, 4.0, 3.0, -inf]]\n", done.stderr


def test_failing_plugin_shows_its_own_traceback(clone: Path) -> None:
    write_plugin(clone / "plugins/broken.py", "x").write_text("def f():\n    return 1 / 0\n\n\nf()\n")
    done = discovered(clone)
    assert done.returncode == 1
    assert "return 1 / 0" in done.stderr
    assert "PluginError: plugin plugins/broken failed to import: ZeroDivisionError" in done.stderr
