"""The traceback of a bug is printed without secrets, since a job's log lies in the run's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cm3leon.launch import work

ROOT = Path(__file__).resolve().parent.parent
# In two halves, as a run keeps changes of the source, which must not hold the secret itself.
PLANTED = "".join(("planted0", "secret1value2"))
PASSWORD = "".join(("open", "sesame"))
BUG = f"""
import os, threading, logging
from cm3leon import run

def bug(*_):
    address = "https://me:{PASSWORD}@host/a?token=" + os.environ["HF_TOKEN"]
    try:
        raise ValueError("first " + address)
    except ValueError as error:
        raise RuntimeError("then " + os.environ["HF_TOKEN"] + " at " + address) from error
"""


def printed_by(program: str) -> str:
    """What a process prints that runs the program and ends with the code 1."""
    done = subprocess.run(
        [sys.executable, "-c", BUG + program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_TOKEN": PLANTED},
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    "program",
    [
        "run.dispatch = bug; run.script()",
        # A thread that fails, and a library that logs the error of another.
        """
def fails_in_a_thread(*_):
    thread = threading.Thread(target=bug)
    thread.start()
    thread.join()
    return 1
run.dispatch = fails_in_a_thread; run.script()
""",
        """
def logs(*_):
    try:
        bug()
    except RuntimeError:
        logging.getLogger("a.library").exception("failed")
    return 1
run.dispatch = logs; run.script()
""",
    ],
    ids=["process", "thread", "logged"],
)
def test_a_traceback_shows_no_secrets(program: str) -> None:
    said = printed_by(program)
    assert PLANTED not in said
    assert PASSWORD not in said
    assert "ValueError: first https://***@host/a?token=***" in said
    assert "RuntimeError: then *** at https://***@host/a?token=***" in said
    assert "in bug" in said


def test_submitit_is_given_no_traceback_to_keep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It pickles the traceback of what leaves a job, into the run's folder."""

    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(work.runpy, "run_module", bug)
    assert work.run(("experiment=digits",)) == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err
