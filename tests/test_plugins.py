"""Plugins are found in their folder, by entry points and by path, and their failures are named.

The last section installs a package of somebody else by pip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cm3leon.registry import DECODERS, PluginError, discover
from cm3leon.types import UserError

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = '''
from dataclasses import dataclass

from cm3leon.decoders.base import Decoder
from cm3leon.registry import DECODERS


@DECODERS.register("{name}")
class Scaled(Decoder):
    """A decoder of a plugin."""

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
    """A clone with the registry but no built-in components, so that discovery imports little."""
    clone = tmp_path / "clone"
    (clone / "cm3leon").mkdir(parents=True)

    # What the registry imports, and a registered kind without members.
    for name in (
        "__init__.py",
        "types.py",
        "locks.py",
        "paths.py",
        "permissions.py",
        "io.py",
        "registry.py",
    ):
        shutil.copy(ROOT / "cm3leon" / name, clone / "cm3leon")
    shutil.copytree(ROOT / "cm3leon/config", clone / "cm3leon/config")
    (clone / "cm3leon/decoders").mkdir()
    (clone / "cm3leon/decoders/__init__.py").write_text("")
    (clone / "cm3leon/decoders/base.py").write_text("class Decoder:\n    pass\n")
    (clone / "experiments.yaml").write_text("")

    # An empty folder of plugins, reached by the name that it has inside the package.
    (clone / "plugins").mkdir()
    (clone / "plugins/__init__.py").write_text("")
    (clone / "cm3leon/plugins").symlink_to("../plugins")
    return clone


PRINT_ORIGINS = """
discover()
discover()
for name in DECODERS.names():
    print(f"{name}: {DECODERS.origin(name)}")
"""


def discovered(
    clone: Path, *path: Path, code: str = PRINT_ORIGINS
) -> subprocess.CompletedProcess[str]:
    """Run code in its own process, which has the clone and more folders on its path."""
    folders = [str(folder) for folder in (clone, *path)]
    code = f"""
import sys
sys.path[:0] = {folders}
# An editable installation would lend the modules that the clone lacks.
finders = sys.meta_path
sys.meta_path = [each for each in finders if not each.__module__.startswith("__editable__")]
from cm3leon.registry import DECODERS, discover
{code}"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=clone.parent
    )


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

    assert DECODERS.origin("from_file") == str(file)
    assert DECODERS.origin("from_second_file") == str(same_name)
    assert DECODERS.origin("from_subpackage") == str(package)
    assert not {"from_test", "from_tests"} & set(DECODERS.names())


@pytest.mark.parametrize("name", ["missing.py", "empty_folder", "notes.txt"])
def test_path_that_is_no_plugin(tmp_path: Path, name: str, registries: None) -> None:
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "notes.txt").write_text("")
    refusal = rf"plugins: .*{name} (does not exist|must be a \.py file or a folder)"
    with pytest.raises(UserError, match=refusal):
        discover([tmp_path / name])


@pytest.mark.usefixtures("registries")
def test_failing_import_names_the_plugin_and_keeps_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module\n")

    # It fails again the second time, instead of counting as loaded.
    failure = r"plugin .*broken\.py failed to import: ModuleNotFoundError"
    for _ in range(2):
        with pytest.raises(PluginError, match=failure) as caught:
            discover([file])
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.usefixtures("registries")
def test_name_taken_by_another_plugin_names_both(tmp_path: Path) -> None:
    first = write_plugin(tmp_path / "first.py", "taken")
    second = write_plugin(tmp_path / "second.py", "taken")
    clash = f"the first is from {first}; the second is from {second}"
    with pytest.raises(PluginError, match=clash):
        discover([first, second])


def test_plugins_folder(clone: Path) -> None:
    write_plugin(clone / "plugins/mine/__init__.py", "mine").write_text("")
    write_plugin(clone / "plugins/mine/metric.py", "reached")
    write_plugin(clone / "plugins/single.py", "single")
    write_plugin(clone / "plugins/test_single.py", "test")

    done = discovered(clone)
    found = done.stdout.splitlines()
    assert found == ["reached: plugins/mine", "single: plugins/single"], done.stderr


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


def test_failing_plugin_shows_its_own_traceback(clone: Path) -> None:
    program = "def f():\n    return 1 / 0\n\n\nf()\n"
    write_plugin(clone / "plugins/broken.py", "x").write_text(program)
    done = discovered(clone)
    assert done.returncode == 1
    assert "return 1 / 0" in done.stderr
    assert "PluginError: plugin plugins/broken failed to import: ZeroDivisionError" in done.stderr


def test_a_plugin_that_would_end_the_process_is_a_failure(clone: Path) -> None:
    write_plugin(clone / "plugins/quits.py", "x").write_text("raise SystemExit(0)\n")
    done = discovered(clone)
    assert done.returncode == 1
    assert "PluginError: plugin plugins/quits failed to import: SystemExit: 0" in done.stderr


# --------------------------------------------------------------------------------- a package by pip

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "acme-cm3leon"
version = "0.3"

[project.entry-points."cm3leon.plugins"]
acme = "acme_cm3leon"
"""
SOURCE = '''
"""Where Acme keeps its documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cm3leon.config import PositiveInt
from cm3leon.data.source import Source
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment


@SOURCES.register("acme_greys")
class Greys(Source):
    """Images of one grey each."""

    @dataclass(kw_only=True)
    class Config:
        count: PositiveInt = 10
        """Documents."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> list[str]:
        return ["all"]

    def read(self, part: str, start: int = 0) -> Iterator[Document]:
        for grey in range(start, self.config.count):
            pixels_HWC = np.full((8, 8, 3), grey, np.uint8)
            yield Document(f"grey-{grey}", (TextSegment(f"grey {grey}"), ImageSegment(pixels_HWC)))

    def fingerprint(self) -> str:
        return f"greys {self.config.count}"
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed a package that has an entry point."""
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")

    # The project of the package.
    (project / "acme_cm3leon").mkdir()
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "acme_cm3leon/__init__.py").write_text(
        '"""Components of Acme, in the modules beside this one."""\n'
    )
    (project / "acme_cm3leon/source.py").write_text(SOURCE)

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *offline, "--target", site, project], check=True, cwd=project)
    return site


def job(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in another folder with the variables of a SLURM task, and none of the shell's."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT))),
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "node1",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_an_installed_package_is_listed_and_works_in_a_job(site: Path, tmp_path: Path) -> None:
    code = """
from cm3leon.run import main
main(["--list"])
print("RESOLVED")
main(["experiment=digits", "data=acme_greys", "data.count=12", "--show"])
"""

    # It is listed with where it comes from, and an experiment can name it.
    listing, _, experiment = job(site, tmp_path, "-c", code).stdout.partition("RESOLVED\n")
    entry = "\n  acme_greys  (entry point acme (acme-cm3leon 0.3))\n    Images of one grey each.\n"
    assert entry in listing

    # The experiment runs in a job that is started from yet another folder.
    resolved, run = tmp_path / "resolved.yaml", tmp_path / "run"
    resolved.write_text(experiment)
    words = (f"experiment={resolved}", f"run={run}", "until=documents")
    done = job(site, Path("/"), "-m", "cm3leon.run", *words)
    assert done.returncode == 0, done.stderr
    lines = (run / "documents/documents.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == [f"grey-{number}" for number in range(12)]


def test_an_installed_package_that_fails_to_import_stops_the_job(
    site: Path, tmp_path: Path
) -> None:
    broken, run = tmp_path / "site", tmp_path / "run"
    shutil.copytree(site, broken)
    (broken / "acme_cm3leon/source.py").write_text("import acme_that_nobody_installed\n")

    words = ("experiment=digits", f"run={run}", "until=documents")
    done = job(broken, tmp_path, "-m", "cm3leon.run", *words)
    assert done.returncode == 1
    assert f'File "{broken}/acme_cm3leon/source.py", line 1, in <module>' in done.stderr
    cause = "ModuleNotFoundError: No module named 'acme_that_nobody_installed'"
    failure = f"plugin entry point acme (acme-cm3leon 0.3) failed to import: {cause}"
    assert done.stderr.splitlines()[-1] == f"cm3leon.registry.PluginError: {failure}"
    assert not run.exists()
