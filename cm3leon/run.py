"""The command line: `python -m cm3leon.run [command] experiment=name [key=value ...]`."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm3leon import __version__
from cm3leon.config import (
    apply_overrides,
    choices,
    component_sections,
    dump_yaml,
    parse_override,
    to_mapping,
)
from cm3leon.paths import check_folder, make_folder, path_of
from cm3leon.terminal import guard, guarded, printable
from cm3leon.training.signals import Signals
from cm3leon.types import AGAIN, PARTLY, REFUSED, Again, Notice, Partly, UserError, sentences_of

# Nothing else is imported up here: --help and a mistyped command answer at once, before torch is loaded.

USAGE = """\
usage: python -m cm3leon.run [command] experiment=NAME [key=value ...]
       python -m cm3leon.run experiment=NAME [key=value ...] --show
       python -m cm3leon.run --list [NAME ...] | --help | --version

commands:
{commands}

options of run:
  experiment=NAME    a name that --list shows, or the path of a .yaml file
  run=DIR            the run folder, runs/NAME by default; run again with the same folder to go on
                     (a sweep's is runs/NAME-sweep; a run, a sweep and a study need a folder each)
  until=STAGE        stop after that stage
  redo=STAGE         make a finished stage that takes long anew, with those that depend on it, where settings differ
  section.key=value  replaces one value of the experiment: training.steps=100, tasks.0.name=caption
  section=name       picks another component: decoder=cd_k
  sweep.KEY=VALUES   a run at each value: 1e-4,3e-4 or range(3); at sweep_trials=N draws: uniform(a,b), loguniform(a,b)
  launcher=NAME      where it runs: here, torchrun, local (a job of this machine), slurm

values:
  A text or a path is taken as it is typed: text=7, prompt='"OPEN" sign', data.path=2024; only null means none, where
  none is allowed. Anything else is YAML: 500, 1e-4, true, null, [1, 2], {{name: top_p, top_p: 0.9}}. In brackets the
  same holds for each value, and quotes there are YAML's: texts=[7, 'two words'].

flags:
  --show             print the experiment with every default filled in, and stop
  --list [NAME ...]  list commands with their options, the sections of an experiment, components with their settings,
                     and experiments; or what has one of the names: --list training, --list decoder, --list generate
  --version          print the version
  --help             print this

examples:
  python -m cm3leon.run experiment=digits
  python -m cm3leon.run experiment=digits run=runs/short training.steps=200
  python -m cm3leon.run experiment=corpus data.path=tars launcher=slurm launcher.nodes=4 launcher.gpus_per_node=8
  python -m cm3leon.run logs run=runs/corpus follow=true
  python -m cm3leon.run experiment=digits_smoke sweep.training.learning_rate=1e-3,3e-3 'sweep.seed=range(3)'
  python -m cm3leon.run part stage=tokens part=0/8 experiment=corpus data.path=tars run=runs/tars
  python -m cm3leon.run show experiment=digits
  python -m cm3leon.run validate data.path=tars
  python -m cm3leon.run generate run=runs/digits prompt="a handwritten seven" n=8 retrieve=2 out=sevens
  python -m cm3leon.run plan experiment=pretrain_7b launcher.nodes=64 gpu=h200
  python -m cm3leon.run export to=hf run=runs/digits out=exported
"""
FLAGS = ("--help", "--list", "--show", "--version")

ADVICE = {
    errno.ENOSPC: "make room; the same command goes on from there",
    errno.EDQUOT: "make room; the same command goes on from there",
    errno.EACCES: "see who may read and write there, or name another path",
    errno.EPERM: "see who may read and write there, or name another path",
    errno.EROFS: "nothing can be written there; name another path",
    errno.EMFILE: "let this process open more files (ulimit -n); the same command goes on from there",
    errno.ENOTDIR: "a file stands where a folder is needed; name another path",
    errno.EEXIST: "a file stands where a folder is needed; name another path",
    errno.EISDIR: "a folder stands where a file is needed; name another path",
    errno.ENOENT: "it is not there, and cannot be made there; see the path",
}
"""What a user can do about an error of the system; others say what the system says."""
ALWAYS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EACCES, errno.EPERM, errno.EROFS)
"""A matter of the machine even where no file is named; another error without a file is a bug, with its traceback."""


@dataclass(frozen=True)
class Command:
    """A word of the command line: what it does, and the function that takes the arguments after it."""

    summary: str
    function: Callable[[Sequence[str]], int | None]
    """Returns an exit code, where it may be another one than 0."""
    options: tuple[str, ...] = ()
    """`module:class` of each config class that its words may fill; empty for a command that takes an experiment's."""


def run(arguments: Sequence[str]) -> int | None:
    """Runs the stages of an experiment that are not done yet; of a study, those of its runs, and its evaluations.

    A launcher other than `here` is given them as jobs, unless this process is one of those that train together already.
    """
    named, overrides = _split(arguments, ("experiment", "run", "until", "redo"))
    folder, until, redo = _run_folder(named), named["until"] or None, _redo(named)
    from cm3leon.records import refuse_other_kind

    if _is_study(named):
        from cm3leon.stages.pipeline import check_run_folder
        from cm3leon.study import load_study, run_study
        from cm3leon.study.run import check_study_redo, check_until

        study = load_study(named["experiment"], overrides, folder)
        refuse_other_kind(folder, "study")
        if _is_launched(study.launcher):
            from cm3leon.launch.runs import launch_study

            return launch_study(study, folder, until=until, redo=redo)
        check_until(study, until)
        check_study_redo(study, redo)
        check_run_folder(folder)
        _record(folder)
        run_study(study, folder, until=until, redo=redo)
        return None
    from cm3leon.experiment import is_sweep, load_experiment

    if is_sweep(named["experiment"], overrides):
        from cm3leon.sweep import load_sweep, run_sweep

        folder = _sweep_folder(named)
        sweep = load_sweep(named["experiment"], overrides, folder, until=until, redo=redo)
        refuse_other_kind(folder, "sweep")
        run_sweep(sweep)
        return None
    mistakes: list[str] = []
    experiment = load_experiment(named["experiment"], overrides, unfit=mistakes)
    refuse_other_kind(folder, "run")
    from cm3leon.stages.stages import check_before_stages, run_experiment

    check_before_stages(experiment, folder, until=until, found=mistakes)
    if _is_launched(experiment.launcher):
        from cm3leon.launch.runs import launch_experiment

        return launch_experiment(experiment, folder, until=until, redo=redo)
    run_experiment(experiment, folder, until=until, redo=redo, accepted=lambda: _record(folder))
    return None


def _record(folder: Path) -> None:
    """Writes down in the run folder what runs, once for all processes."""
    from cm3leon.provenance import record

    if _is_first():
        make_folder(folder, "run")
        record(folder)


def _is_launched(launcher: Any) -> bool:
    from cm3leon.training.distributed import find_place

    return launcher.name != "here" and find_place() is None


def part(arguments: Sequence[str]) -> None:
    """Makes one worker's share of the shards of a stage."""
    named, overrides = _split(arguments, ("experiment", "run", "stage", "part", "redo"))
    share = _share(named["part"])
    if _is_study(named):
        from cm3leon.study import load_study, run_study

        folder = _run_folder(named)
        return run_study(load_study(named["experiment"], overrides, folder), folder, asked=share)
    from cm3leon.experiment import load_experiment

    experiment = load_experiment(named["experiment"], overrides)
    from cm3leon.stages.stages import run_stage_part

    run_stage_part(experiment, _run_folder(named), named["stage"], share, redo=_redo(named))


def show_sample(arguments: Sequence[str]) -> None:
    """Prints one training sample, and writes a page of it."""
    named, overrides = _split(arguments, ("experiment", "run", "sample", "epoch", "out"))
    from cm3leon.experiment import load_experiment

    experiment = load_experiment(named["experiment"], overrides)
    from cm3leon.show import show

    own = ("sample=", "epoch=", "out=")
    again = [word for word in arguments if not word.startswith(own)]
    show(
        experiment,
        _run_folder(named),
        named["sample"],
        epoch=named["epoch"],
        out=named["out"],
        again=again,
    )


def plan(arguments: Sequence[str]) -> None:
    """Prints what a training takes."""
    own = ("gpu", "mfu", "documents", "format")
    named, overrides = _split(arguments, ("experiment", *own))
    from cm3leon.config import from_mapping
    from cm3leon.experiment import load_experiment

    experiment = load_experiment(named["experiment"], overrides)
    from cm3leon.plan import PlanConfig, main

    words = [parse_override(f"{name}={named[name]}") for name in own if named[name]]
    main(experiment, from_mapping(PlanConfig, apply_overrides({}, words)))


def _is_study(named: dict[str, str]) -> bool:
    from cm3leon.experiment import is_study

    return is_study(named["experiment"])


def _run_folder(named: dict[str, str]) -> Path:
    from cm3leon.experiment import experiment_name

    folder = path_of(named["run"] or f"runs/{experiment_name(named['experiment'])}", "run")
    check_folder(folder, "run")
    if folder.resolve() == Path(folder.anchor or "/"):
        raise UserError(f"run is {folder}, the root of the file system; choose a folder of its own")
    return folder


def _redo(named: dict[str, str]) -> list[str]:
    """The stages that may be made anew: `redo=pretraining`, or several with commas between them."""
    return [name.strip() for name in named["redo"].split(",") if name.strip()]


def _sweep_folder(named: dict[str, str]) -> Path:
    """The run folder of a sweep: one of its own, where the command line makes a sweep of an experiment."""
    from cm3leon.experiment import is_sweep

    folder = _run_folder(named)
    own = named["run"] or is_sweep(named["experiment"])
    return folder if own else folder.with_name(f"{folder.name}-sweep")


def _share(text: str) -> tuple[int, int]:
    """`k/n` as numbers; in a job of a SLURM array, its place there if nothing is said."""
    if not text and "SLURM_ARRAY_TASK_ID" in os.environ:
        number, first, count = (
            int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT")
        )
        text = f"{number - first}/{count}"
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise UserError(
            f"part is {text or 'missing'}; write part=k/n for worker k, from 0, of n, for example part=0/8 "
            "(in a SLURM array --array=0-7 nothing need be said)"
        )
    return int(k), int(n)


def _forwarded(summary: str, module: str, function: str, *options: str) -> Command:
    """A command whose key=value words are the options of a function, imported when it is called."""

    named = tuple(f"{module}:{name}" for name in options)

    def command(arguments: Sequence[str]) -> int | None:
        sections = frozenset().union(*(component_sections(options_class(name)) for name in named))
        words = apply_overrides({}, map(parse_override, arguments), sections)
        return getattr(importlib.import_module(module), function)(words)

    return Command(summary, command, named)


def options_class(named: str) -> type:
    """The config class of a command, by its `module:class`."""
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)


COMMANDS = {
    "run": Command(
        "run the stages of an experiment, the default; stages already done are skipped", run
    ),
    "part": Command(
        "a worker's share of a stage in shards: stage=NAME part=k/n experiment=NAME run=DIR", part
    ),
    "show": Command(
        "print a training sample, the first with a moved span or sample=N, and make a page of it: "
        "experiment=NAME run=DIR epoch=0",
        show_sample,
    ),
    "validate": _forwarded(
        "read a corpus, say what it holds, what is broken and what it costs: data.path=PATH",
        "cm3leon.validate",
        "main",
        "Options",
    ),
    "search": _forwarded(
        "ask a run's memory bank: run=DIR text=TEXT or image=FILE, count=5",
        "cm3leon.search",
        "search",
        "SearchOptions",
    ),
    "add": _forwarded(
        "add documents to a run's memory bank without a rebuild: run=DIR data.path=PATH",
        "cm3leon.search",
        "add",
        "AddOptions",
    ),
    "point": _forwarded(
        "run a point of a sweep, as its jobs do: run=DIR/POINT",
        "cm3leon.sweep.run",
        "point",
        "PointOptions",
    ),
    "collect": _forwarded(
        "make the table of a sweep of the points that are finished: run=DIR",
        "cm3leon.sweep.run",
        "collect",
        "CollectOptions",
    ),
    "status": _forwarded(
        "where a run stands, its stages or its jobs: run=DIR",
        "cm3leon.launch.follow",
        "status",
        "RunOptions",
    ),
    "cancel": _forwarded(
        "end the jobs of a run, which goes on later from its checkpoints: run=DIR",
        "cm3leon.launch.follow",
        "cancel",
        "RunOptions",
    ),
    "logs": _forwarded(
        "print what a job of a run printed: run=DIR job=NAME lines=40 follow=true",
        "cm3leon.launch.follow",
        "logs",
        "LogsOptions",
    ),
    "generate": _forwarded(
        "draw images for a text, best by CLIP first: run=DIR prompt=TEXT or prompts=FILE, n=8 retrieve=2 out=DIR",
        "cm3leon.generate",
        "main",
        "GenerateOptions",
    ),
    "caption": _forwarded(
        "write captions for images: run=DIR image=FILE or a folder, out=captions.jsonl",
        "cm3leon.ask",
        "caption",
        "CaptionOptions",
    ),
    "infill": _forwarded(
        "make a part of an image or its text anew: run=DIR image=FILE text=TEXT box=[0,0,16,32] out=DIR",
        "cm3leon.ask",
        "infill",
        "InfillOptions",
    ),
    "edit": _forwarded(
        "change images as an instruction says: run=DIR image=FILE instruction=TEXT n=1 out=DIR",
        "cm3leon.ask",
        "edit",
        "EditOptions",
    ),
    "answer": _forwarded(
        "answer a question about images: run=DIR image=FILE question=TEXT out=answers.jsonl",
        "cm3leon.ask",
        "answer",
        "AnswerOptions",
    ),
    "score": _forwarded(
        "log-likelihoods of texts for images: run=DIR image=FILE texts=[TEXT,TEXT] or text=TEXT, out=scores.jsonl",
        "cm3leon.ask",
        "score",
        "ScoreOptions",
    ),
    "plan": Command(
        "what a training takes, memory by part, time and disk: experiment=NAME launcher.gpus=8 gpu=h100 mfu=0.4",
        plan,
        ("cm3leon.plan:PlanConfig",),
    ),
    "perplexity": _forwarded(
        "draw the paper's figure 3, validation perplexity against updates: runs=[DIR,DIR] out=perplexity.png",
        "cm3leon.perplexity",
        "main",
        "PerplexityConfig",
    ),
    "export": _forwarded(
        "convert: to=hf run=DIR out=DIR, or to=cm3leon hf=DIR out=DIR",
        "cm3leon.export",
        "main",
        "ToHf",
        "ToCM3Leon",
    ),
}


def usage() -> str:
    """The text of --help."""
    return USAGE.format(
        commands="\n".join(f"  {name:<17}  {command.summary}" for name, command in COMMANDS.items())
    )


def resolved(arguments: Sequence[str]) -> str:
    """The resolved experiment as YAML."""
    named, overrides = _split(arguments, ("experiment", "run", "until", "redo"))
    if _is_study(named):
        from cm3leon.study import load_study

        return dump_yaml(to_mapping(load_study(named["experiment"], overrides, _run_folder(named))))
    from cm3leon.experiment import is_sweep, load_experiment

    if is_sweep(named["experiment"], overrides):
        from cm3leon.sweep import load_sweep

        sweep = load_sweep(
            named["experiment"], overrides, _sweep_folder(named), until=named["until"] or None
        )
        return dump_yaml(sweep.mapping) + "".join(f"# {name}\n" for name in sweep.points)
    return dump_yaml(to_mapping(load_experiment(named["experiment"], overrides)))


def _listing(words: Sequence[str]) -> str:
    """What `--list` shows of the names among the words, or all, with the components of `plugins=`."""
    from cm3leon.listing import listing

    wanted = [word for word in words if "=" not in word]
    commands = {
        name: (command.summary, list(map(options_class, command.options)))
        for name, command in COMMANDS.items()
    }
    return listing(wanted, _plugins_of(words), commands)


def _plugins_of(words: Sequence[str]) -> list[str]:
    """The plugins that a command line names, as absolute paths."""
    from cm3leon.experiment import with_absolute_plugins

    named = [parse_override(word) for word in words if word.startswith("plugins=")]
    return with_absolute_plugins(apply_overrides({}, named), Path.cwd()).get("plugins", [])


def _split(arguments: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Arguments as the command's `own` ones, "" for one that is missing, and the overrides of the experiment."""
    named = dict.fromkeys(own, "")
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in named:
            named[key] = value
        else:
            overrides.append(argument)
    if not named["experiment"]:
        raise UserError(
            "experiment is missing; write experiment=NAME with a name that --list shows, or a .yaml file"
        )
    return named, overrides


def _check_paths(words: Sequence[str]) -> None:
    """Check that a path is given once: of data.path=tars/{0,1}.tar the shell makes two words, the last of which counts.

    Raises:
        UserError: for a path that is given with different values.
    """
    values: dict[str, dict[str, None]] = {}
    for key, _, value in (word.partition("=") for word in words):
        if key.endswith(".path"):
            values.setdefault(key, {})[value] = None
    for key, given in values.items():
        if len(given) > 1:
            raise UserError(
                f"{key} is given {len(given)} times; several paths are one word, in quotes so that "
                f"the shell leaves its braces: '{key}={{a,b}}.tar', or a list: '{key}=[a.tar, b.tar]'"
            )


def dispatch(arguments: Sequence[str]) -> int:
    """Does what the command line says, and returns the exit code.

    Raises:
        UserError: for an unknown command or flag, or a mistake in what it is given.
    """
    flags = ["--help" if word == "-h" else word for word in arguments if word.startswith("-")]
    words = [word for word in arguments if not word.startswith("-")]
    if flags == ["--list"]:
        print(_listing(words), end="")
        return 0
    command = words.pop(0) if words and "=" not in words[0] else "run"
    for flag in flags:
        if flag not in FLAGS:
            raise UserError(f"{flag} is not a known flag; {choices(flag, FLAGS)}")
    if command not in COMMANDS:
        raise UserError(f"{command} is not a known command; {choices(command, COMMANDS)}")
    for word in words:
        if "=" not in word:
            raise UserError(
                f"{word} follows the command {command}; everything after it must be key=value"
            )
    _check_paths(words)
    if "--help" in flags:
        print(usage(), end="")
    elif "--version" in flags:
        print(__version__)
    elif "--show" in flags:
        print(resolved(words), end="")
    else:
        return COMMANDS[command].function(words) or 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 2 for a mistake, 130 for Ctrl-C, 75 for "again",
    3 where only a part of what was asked for could be made."""
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
            # The reader of `--list | head` has gone: nothing to say, and nothing left to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno not in ALWAYS):
                raise
            advice = ADVICE.get(error.errno, "see the path, or name another one")
            return _complain(f"{error.filename or 'a file'}: {error.strerror}; {advice}", REFUSED)


@contextmanager
def _own_warnings_only() -> Iterator[None]:
    """Our warnings are a line each, said once; those of libraries are not for the user, who can do nothing about them.

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


def _is_first() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _complain(sentence: str, code: int) -> int:
    if not _is_first():
        return code  # the first rank says it
    print(f"cm3leon: {printable(' '.join(sentence.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    guard()  # for good: the traceback of a bug is printed after the end of `main`
    sys.exit(main())
