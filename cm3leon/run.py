"""The command line: `python -m cm3leon.run [command] experiment=name [key=value ...]`.

The console script `cm3leon` takes the same words.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from cm3leon import __version__
from cm3leon.commands import load_command
from cm3leon.commands.words import read_options
from cm3leon.config import choices
from cm3leon.secrets import MaskedFormatter, mask_tracebacks, masked
from cm3leon.terminal import guard, guarded, printable, speaks_for_all
from cm3leon.training.signals import Signals
from cm3leon.types import AGAIN, PARTLY, REFUSED, Again, Notice, Partly, UserError, sentences_of

# Nothing else is imported up here, so that --help and mistyped commands need not wait for torch.

FLAGS = ("--help", "--list", "--schema", "--show", "--version")

ADVICE = {
    errno.ENOSPC: "make room; the same command goes on from there",
    errno.EDQUOT: "make room; the same command goes on from there",
    errno.EACCES: "see who may read and write there, or name another path",
    errno.EPERM: "see who may read and write there, or name another path",
    errno.EROFS: "nothing can be written there; name another path",
    errno.EMFILE: "let this process open more files (ulimit -n); "
    "the same command goes on from there",
    errno.ENOTDIR: "a file stands where a folder is needed; name another path",
    errno.EEXIST: "a file stands where a folder is needed; name another path",
    errno.EISDIR: "a folder stands where a file is needed; name another path",
    errno.ENOENT: "it is not there, and cannot be made there; see the path",
}
"""What a user can do about some errors of the system."""
ALWAYS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of the machine even if they name no file; others without a file are bugs, and shown with
their traceback."""


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command of a command line, and return the exit code.

    Raises:
        UserError: for an unknown command or flag, or a mistake in the options of a command.
    """
    flags = ["--help" if word == "-h" else word for word in arguments if word.startswith("-")]
    words = [word for word in arguments if not word.startswith("-")]

    # Two flags take words that are not options.
    if flags == ["--list"]:
        from cm3leon.commands.listing import listing

        print(listing(words), end="")
        return 0
    if flags == ["--schema"]:
        from cm3leon.commands.schema import schema

        print(schema(words), end="")
        return 0

    # All others come with a command, or with its default, `run`.
    named = words.pop(0) if words and "=" not in words[0] else None
    for flag in flags:
        if flag not in FLAGS:
            raise UserError(f"{flag} is not a known flag; {choices(flag, FLAGS)}")
    command = load_command(named or "run")
    for word in words:
        if "=" not in word:
            raise UserError(
                f"{word} follows the command {command.name}; everything after it must be key=value"
            )

    if "--help" in flags:
        from cm3leon.commands.help import help_of, usage

        print(help_of(command) if named else usage(), end="")
    elif "--version" in flags:
        print(__version__)
    elif "--show" in flags:
        from cm3leon.commands.run import resolved

        print(resolved(read_options(load_command("run"), words)), end="")
    else:
        return command.main(read_options(command, words)) or 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    It is 2 for a user's mistake, 3 if a part of the results is missing, 75 if the same command is
    to be started again, and 130 after Ctrl-C.
    """
    with guarded(), _own_warnings_only(), Signals():
        try:
            code = dispatch(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
            return code
        except UserError as error:
            for sentence in sentences_of(error):
                _complain(sentence, REFUSED)
            return REFUSED
        except Again as error:
            return _complain(
                f"{error}; the progress is kept, and the same command goes on from there", AGAIN
            )
        except Partly as error:
            return _complain(str(error), PARTLY)
        except FloatingPointError as error:
            return _complain(f"{error}; a lower learning_rate may help", 1)
        except KeyboardInterrupt:
            return _complain(
                "stopped; the progress is kept, and the same command goes on from there", 130
            )
        except BrokenPipeError:
            # The reader of `--list | head` has gone. Nothing must be left to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno not in ALWAYS):
                raise
            advice = ADVICE.get(error.errno, "see the path, or name another one")
            return _complain(f"{error.filename or 'a file'}: {error.strerror}; {advice}", REFUSED)


@contextmanager
def _own_warnings_only() -> Iterator[None]:
    """Show this project's warnings on a line each, once; hide those of libraries.

    Users can do nothing about the latter.
    A developer sees them all with `python -W default -m cm3leon.run experiment=digits`.
    """
    if sys.warnoptions:
        yield
        return

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if isinstance(message, Notice):
            _complain(str(message), 0)

    logged = logging.StreamHandler()
    logged.setLevel(logging.ERROR)
    logged.setFormatter(MaskedFormatter())
    root = logging.getLogger()
    root.addHandler(logged)  # with a handler in place, libraries set up none that prints warnings
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", Notice)
        warnings.showwarning = show
        try:
            yield
        finally:
            root.removeHandler(logged)


def _complain(sentence: str, code: int) -> int:
    if not speaks_for_all():
        return code  # the first rank says it
    # Secrets are masked because a job's log lies in the run's folder.
    print(f"cm3leon: {printable(masked(' '.join(sentence.split())))}", file=sys.stderr)
    return code


def script() -> NoReturn:
    """Run `main` and end the process: `cm3leon`, and `python -m cm3leon.run`."""
    # Threads that wait for each other spin for a while before they release their cores. With
    # libgomp's own spin count, a step takes ten times as long if other processes need the cores.
    # This count costs almost nothing on idle cores (docs/training.md). libgomp reads it once, when
    # torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # For good: the traceback of a bug is printed after the end of `main`.
    guard()
    mask_tracebacks()
    sys.exit(main())


if __name__ == "__main__":
    script()
