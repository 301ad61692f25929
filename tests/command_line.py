"""The command line without a process of its own, which takes seconds to start."""

from __future__ import annotations

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout

from cm3leon.run import main


def cm3leon(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Call `python -m cm3leon.run` with these words.

    Args:
        check: fail unless the exit code is 0.

    Returns:
        The exit code, and what was written to standard output and error.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(words))
    assert not check or code == 0, err.getvalue()[-2000:]
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
