"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from cm3leon import registry

# No file of failing examples in the tree, and no failure because the machine was busy.
settings.register_profile("quiet", database=None, deadline=None)
settings.register_profile("ci", settings.get_profile("quiet"), derandomize=True)
settings.load_profile("quiet")


SURROUNDINGS = {"COLUMNS": "80", "LINES": "24", "TZ": "UTC", "LC_ALL": "C.UTF-8", "TERM": "dumb"}
"""The same environment for the tests in every terminal, background job and allocation."""
LEFT_OUT = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
    *("SLURM_STEP_ID", "SLURM_STEP_NODELIST", "LANGUAGE", "FORCE_COLOR", "NO_COLOR"),
    *("PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONUTF8", "PYTHONIOENCODING"),
)
"""Variables that are unset: they would make a process a rank, color its output, change its
warnings, and so on."""


def pytest_configure(config: pytest.Config) -> None:
    """Set the surroundings of the tests, and so those of the processes that they start.

    A shell's background job ignores Ctrl-C, and programs that it starts inherit that. SIGHUP stays
    ignored where nohup has said so: the tests go on when their terminal closes.
    """
    os.environ.update(SURROUNDINGS)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        # The user's cache is one folder for all processes of these tests, deleted at their end.
        kept = tempfile.mkdtemp(prefix="cm3leon-cache-")
        os.environ["XDG_CACHE_HOME"] = kept
        config.add_cleanup(lambda: shutil.rmtree(kept, ignore_errors=True))

    for name in LEFT_OUT:
        os.environ.pop(name, None)

    time.tzset()
    os.umask(0o022)

    # What a background job ignores is again as a program in a terminal finds it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


LONG = (
    *("test_digits.py", "test_distributed.py", "test_end_to_end.py", "test_fairseq2_extension.py"),
    *("test_hub.py", "test_memory.py", "test_paper_experiments.py", "test_shard_stages.py"),
    *("test_stores.py", "test_study.py", "test_tokenizer_stages.py", "test_training.py"),
    *("test_tutorials.py", "test_wheel.py"),
)
"""Files that take longest, most of them by whole experiments."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long files last in one process, so that a failure shows early.

    Among several processes they come first, so that no single one is still busy at the end.
    """
    among_several = "PYTEST_XDIST_WORKER" in os.environ
    items.sort(key=lambda item: (item.path.name in LONG) != among_several)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count a skipped test of the cluster's stack as failed where that stack was installed for it.

    The tests that need a GPU as well may still be skipped.
    """
    report = yield
    must_run = item.get_closest_marker("cluster") and not item.get_closest_marker("gpu")
    if (
        os.environ.get("CM3LEON_CLUSTER") == "1"
        and must_run
        and report.skipped
        and not hasattr(report, "wasxfail")
    ):
        report.outcome, report.longrepr = "failed", f"skipped where it must run: {report.longrepr}"
    return report


@pytest.fixture
def registries() -> Iterator[None]:
    """Let a test register components and load plugins, and restore the registries afterwards."""
    registry.discover()
    entries = [(each, dict(each._entries)) for each in registry.REGISTRIES]
    origins = dict(registry._origins)
    modules = set(sys.modules)

    yield
    for each, before in entries:
        each._entries = before
    registry._origins.clear()
    registry._origins.update(origins)
    for name in set(sys.modules) - modules:
        if name.startswith("cm3leon_plugin_"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def tuned_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shrunken run tuned on instructions, as a `CM3Leon`.

    Its weights are made larger, so that what it draws depends on what it is given.
    """
    import torch

    from cm3leon import CM3Leon
    from cm3leon.run import main

    run = tmp_path_factory.mktemp("tuned") / "run"
    words = ["experiment=pretrain_350m", "overrides=smoke", f"run={run}", "retriever.threshold=2"]

    assert main([*words, "objective=instruct"]) == 0
    loaded = CM3Leon.load(run, precision="float32")

    # Trained for a few steps, the model would draw almost the same whatever it is given.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in loaded.run.model.named_parameters():
            std = 0.2
            if name.startswith(("embedding", "positions")):
                std = 0.5
            weight.normal_(std=std, generator=generator)

    return loaded


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Folder whose file modes hold for the test even if root runs it.

    Root may read everything, so the test runs as the user nobody meanwhile. pytest's own folders
    are closed to others, so this one is elsewhere.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if os.geteuid() != 0:
            yield folder
            return

        nobody = 65534
        os.chown(folder, nobody, nobody)
        os.setegid(nobody)
        os.seteuid(nobody)

        # However the test ends, the others need root's rights again.
        try:
            yield folder
        finally:
            os.seteuid(0)
            os.setegid(0)
