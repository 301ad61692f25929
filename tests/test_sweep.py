"""Sweeps: their values, points, names and figures; and only what is missing is run."""

from __future__ import annotations

import contextlib
import csv
import html
import json
import math
import random
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import Page

from cm3leon.config import Choice, Interval, NoSettings, dump_yaml, parse_lists, parse_values
from cm3leon.experiment import Experiment, is_study, is_sweep, list_experiments
from cm3leon.launch import Job, Submitted
from cm3leon.launch.launchers import Launcher
from cm3leon.provenance import machines
from cm3leon.registry import LAUNCHERS, SOURCES
from cm3leon.run import main
from cm3leon.stages.run_folder import RunFolder
from cm3leon.studies import load_study, load_sweep
from cm3leon.studies.config import Study, StudyConfig, StudyRun
from cm3leon.studies.jobs import point_jobs
from cm3leon.studies.points import MAX_POINTS, SweepConfig, named_points, short_names, values_of
from cm3leon.studies.report import study_report
from cm3leon.studies.results import (
    RunResult,
    StudyEntry,
    as_csv,
    entries_of,
    read_figures,
    results_of,
)
from cm3leon.studies.sharing import groups_of
from cm3leon.types import UserError

NUMBERS = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), min_size=1, unique=True
)


def points(trials: int | None = None, **sweep: Any) -> dict[str, Any]:
    """The points of a sweep by their names, in the order in which they run."""
    config = SweepConfig(sweep=sweep, sweep_trials=trials)
    return dict(named_points(config, values_of(sweep, {})))


# ------------------------------------------------------------------------------------------- values


def test_a_swept_text_takes_what_was_typed(tmp_path: Path) -> None:
    words = ["sweep.data.path=2024,1e3,yes", "sweep.seed=7", "sweep.training.steps=[10, 8]"]
    given = ["data=folder", "data.path=1", "retriever=lexical", *words]
    sweep = load_sweep("digits_smoke", given, tmp_path)
    assert [run.point["data.path"] for run in sweep.runs.values()][::2] == ["2024", "1e3", "yes"]
    assert {run.point["seed"] for run in sweep.runs.values()} == {7}
    assert [run.point["training.steps"] for run in sweep.runs.values()][:2] == [10, 8]

    # The file that a sweep writes reads as the same points.
    (tmp_path / "sweep.yaml").write_text(dump_yaml(sweep.written))
    again = load_sweep(str(tmp_path / "sweep.yaml"), [], tmp_path)
    assert list(again.runs) == list(sweep.runs)
    for name, run in sweep.runs.items():
        assert again.runs[name].point == run.point
        assert again.experiment(name) == sweep.experiment(name)


@given(st.lists(NUMBERS, min_size=1))
def test_numbers_between_commas_are_read_as_they_were_written(values: list[float]) -> None:
    parsed = parse_values("sweep.key", ",".join(map(repr, values)))
    assert isinstance(parsed, Choice)
    assert list(parsed.values) == values
    assert list(map(type, parsed.values)) == list(map(type, values))


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-5, 5).filter(bool))
def test_ranges_are_pythons(start: int, stop: int, step: int) -> None:
    text = f"range({start}, {stop}, {step})"
    if not range(start, stop, step):
        with pytest.raises(UserError, match="has no values"):
            parse_values("sweep.key", text)
    else:
        assert parse_values("sweep.key", text) == Choice(range(start, stop, step))


@given(st.floats(1e-8, 1e8), st.floats(1.001, 1e6), st.booleans(), st.integers())
def test_draws_lie_within_the_bounds(
    low: float, factor: float, logarithmic: bool, seed: int
) -> None:
    name = "loguniform" if logarithmic else "uniform"
    interval = parse_values("sweep.key", f"{name}({low!r},{low * factor!r})")
    assert interval == Interval(low, low * factor, logarithmic)
    for number in range(20):
        assert low <= interval.draw(random.Random(seed + number)) <= low * factor


def test_draws_are_even_on_their_scale() -> None:
    source = random.Random(0)
    drawn = [Interval(1e-4, 1e-2, True).draw(source) for _ in range(2000)]
    assert 0.45 < sum(value < 1e-3 for value in drawn) / 2000 < 0.55
    drawn = [Interval(0, 1, False).draw(source) for _ in range(2000)]
    assert 0.45 < sum(value < 0.5 for value in drawn) / 2000 < 0.55


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ([1, [2, 3]], [1, [2, 3]]),
        (5, [5]),
        (None, [None]),
        ("adamw,adamw_8bit", ["adamw", "adamw_8bit"]),
        ("{name: top_p, cfg: 1.0},greedy", [{"name": "top_p", "cfg": 1.0}, "greedy"]),
        ("[1, 2],[3]", [[1, 2], [3]]),
        ("true,null", [True, None]),
    ],
)
def test_values_may_be_of_any_type(given: Any, values: list[Any]) -> None:
    parsed = parse_values("sweep.key", given)
    assert isinstance(parsed, Choice)
    assert list(parsed.values) == values


@pytest.mark.parametrize("text", ["range(1,5,0)", "range(1,5,00)", "range(1,5,-0)"])
def test_a_step_of_zero_is_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"which is not understood"):
        parse_values("sweep.key", text)


def test_lists_of_values_are_bounded_before_they_are_made() -> None:
    assert len(parse_lists({"seed": "range(1000)"}, "sweep")["seed"]) == 1000
    with pytest.raises(UserError, match=r"sweep.seed has 999,999,999 values; .* at most 1,000"):
        parse_lists({"seed": "range(999999999)"}, "sweep")


# ------------------------------------------------------------------------------------------- points


@given(KEYS)
def test_short_names_are_ends_that_tell_keys_apart(keys: list[str]) -> None:
    short = short_names(keys)
    assert len(set(short.values())) == len(keys)
    assert all(f".{key}".endswith(f".{short[key]}") for key in keys)


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.integers(), min_size=1, max_size=4, unique=True),
        min_size=1,
    )
)
def test_a_grid_has_every_combination_once(sweep: dict[str, list[int]]) -> None:
    named = points(**sweep)
    count = 1
    for values in sweep.values():
        count *= len(values)
    assert len(named) == count == len({str(point) for point in named.values()})
    assert all(point[key] in sweep[key] for point in named.values() for key in sweep)


@given(st.integers(1, 30), st.integers(1, 30))
def test_more_trials_are_the_same_points_and_further_ones(few: int, more: int) -> None:
    sweep = {"lr": "loguniform(1e-5,1e-2)", "steps": "range(100)"}
    first, then = points(few, **sweep), points(few + more, **sweep)
    assert list(then)[:few] == list(first)
    assert len(then) == few + more


def test_names_tell_the_point() -> None:
    sweep = {
        "training.learning_rate": "1e-3,3e-3",
        "seed": "range(2)",
        "decoder": [{"name": "cd_k", "k": 2}],
    }
    named = points(**sweep)
    assert list(named)[:2] == [
        "learning_rate=0.001,seed=0,decoder=cd_k-k-2",
        "learning_rate=0.001,seed=1,decoder=cd_k-k-2",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["sweep.training.learnin_rate=1e-3"],
            "training.learnin_rate is not a known key; did you mean learning_rate?",
        ),
        (
            ["sweep.training.steps=10,0"],
            "sweep, point steps=0: training.steps is 0; it must be a whole number, at least 1",
        ),
        (["sweep.seed=range(0)"], "sweep.seed is range(0), which has no values; write values as"),
        (
            ["sweep.seed=range(1,2,0)"],
            "sweep.seed is range(1,2,0), which is not understood; write values as",
        ),
        (["sweep.seed=__import__(os)"], "which is not understood"),
        (["sweep.seed=uniform(2,1)"], "it must be uniform(low,high) with numbers, low < high"),
        (
            ["sweep.seed=loguniform(0,1)"],
            "it must be loguniform(low,high) with numbers, 0 < low < high",
        ),
        (["sweep.seed=loguniform(a,b)"], "it must be loguniform(low,high) with numbers"),
        (["sweep.model.dropout=uniform(0,1)"], "say how many points to draw with sweep_trials=N"),
        (["sweep.seed=1,1"], "sweep: two points are named seed=1"),
        (
            ["sweep.seed=range(2000)"],
            f"sweep has 2,000 points; it must have at most {MAX_POINTS:,}",
        ),
        (["sweep.seed=range(3)", "sweep_trials=4"], "only 3 different points were found"),
        (["sweep.seed=range(3)", "sweep_trials=4000"], "sweep_trials is 4,000; it must be at most"),
        (
            ["sweep.launcher=here,slurm"],
            "sweep.launcher cannot be swept; launcher, plugins, until are the same",
        ),
        (["sweep.seed=1,2", "sweep_best=loss"], "sweep_best is loss; it must be lowest or highest"),
        (
            ["sweep.seed=1,2", "sweep_trial=2"],
            "sweep_trial is not a known key; did you mean sweep_trials?",
        ),
        (["sweep.seed=1,2", "until=nothing"], "until is nothing, which is not a stage"),
        (["sweep={}"], "sweep is empty; give sweep.KEY=VALUES"),
        (["sweep.metrics.0.name=[" + "x" * 300 + "]"], "has more than 200 letters"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_run(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment=digits_smoke", f"run={tmp_path / 'run'}", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_commands_want_one_of_its_points(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=digits_smoke", "sweep.seed=1,2"]) == 2
    assert "is a sweep, which only the command run takes" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in list_experiments() if is_sweep(name)])
def test_every_sweep_that_is_shipped_has_points(name: str) -> None:
    assert len(load_sweep(name, (), Path("none")).runs) > 1


# ------------------------------------------------------------------------------------------ results


def finished_run(folder: Path, loss: float) -> None:
    """Write the files of a run that went to its end, as far as the table reads them."""
    point, figures = {"documents": 1, "decoder.cfg": 2.0}, {"accuracy": {"value": 0.5, "n": 9}}
    reconstruction = {"psnr_db": {"value": 12.5, "low": 12, "high": 13}, "rfid": None}
    metrics = {
        "evaluations": {"text_to_image": [{"point": point, "metrics": figures}]},
        "wall_seconds": {"total": 7.0},
    }
    files = {
        "pretraining/validation.json": json.dumps({"loss": loss, "loss_text": 2.0}),
        "pretraining/log.jsonl": '{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 4.0}\n',
        "pretraining/stage.json": json.dumps({"fingerprint": "a", "seconds": 3.0, "files": {}}),
        "reconstruction/figures.json": json.dumps(reconstruction),
        "metrics.json": json.dumps(metrics),
    }

    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_figures_are_those_of_the_stages_that_are_there(tmp_path: Path) -> None:
    assert read_figures(tmp_path) == {}
    finished_run(tmp_path, 3.5)
    assert read_figures(tmp_path) == {
        "loss": 3.5,
        "loss_text": 2.0,
        "train.step": 2,
        "train.loss": 4.0,
        "reconstruction.psnr_db": 12.5,
        "text_to_image-1-2.accuracy": 0.5,
        "seconds": 7.0,
    }


def results(**losses: float | None) -> list[RunResult]:
    """The results of points with these losses; a point without one has failed."""
    found = []
    for number, (name, loss) in enumerate(losses.items()):
        if loss is not None:
            result = RunResult(name, {"seed": number}, "finished", {"loss": loss})
        else:
            result = RunResult(name, {"seed": number}, "failed", {}, "no room")
        found.append(result)
    return found


def swept(found: Sequence[RunResult], wanted: str = "lowest loss", **values: Any) -> StudyEntry:
    """The entry of a sweep that came to these results."""
    plan = StudyRun(experiment="digits", sweep=values or {"seed": [0, 1]}, sweep_best=wanted)
    return StudyEntry("", plan, found)


def page_of_sweep(folder: Path, entry: StudyEntry) -> str:
    """Write the page of a sweep, and return it."""
    about = "A sweep of digits<b> over seed"
    config = StudyConfig(title="title", about=about, name="digits<b>", runs={"": entry.plan})
    study = Study(config, folder, {}, {}, "sweep")
    results = {"again": AGAIN, "seconds": {}, "evaluations": {}}
    study_report(folder / "report.html", study, results, {}, [entry])
    return (folder / "report.html").read_text()


def test_the_best_is_the_lowest_or_the_highest_of_the_finished_ones() -> None:
    found = results(a=2.0, b=1.0, c=None, d=float("nan"), e=3.0)
    assert swept(found, "lowest loss").best is found[1]
    assert swept(found, "highest loss").best is found[4]
    assert swept(found, "lowest accuracy").best is None
    swept(found, "highest loss").check_best()
    with pytest.raises(UserError, match="points have no figure losses; did you mean loss"):
        swept(found, "lowest losses").check_best()


@given(st.lists(st.none() | st.floats(), min_size=1), st.sampled_from(["lowest", "highest"]))
def test_no_finished_point_is_better_than_the_best(
    losses: list[float | None], direction: str
) -> None:
    found = results(**{str(number): loss for number, loss in enumerate(losses)})
    winner = swept(found, f"{direction} loss").best

    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    better = {"lowest": min, "highest": max}[direction]
    expected = better(finite) if finite else None
    assert (winner and winner.figures["loss"]) == expected


@given(st.lists(st.dictionaries(st.sampled_from("xyz"), st.floats(allow_nan=False)), min_size=1))
def test_the_table_holds_every_figure_of_every_point(figures: list[dict[str, float]]) -> None:
    found = []
    for number, each in enumerate(figures):
        found.append(RunResult(str(number), {"seed": number}, "finished", each))

    read = []
    for line in csv.DictReader(as_csv(found, []).splitlines()):
        read.append({key: float(text) for key, text in line.items() if key in "xyz" and text})
    assert read == figures


def test_the_table_has_a_line_for_each_point_and_marks_the_best(tmp_path: Path) -> None:
    found = results(a=2.0, b=1.0, c=None)
    lines = list(csv.DictReader(as_csv(found, [swept(found).best]).splitlines()))
    columns = ("point", "seed", "state", "best", "loss")
    cells = []
    for line in lines:
        cells.append(tuple(line[column] for column in columns))
    assert cells == [
        ("a", "0", "finished", "", "2.0"),
        ("b", "1", "finished", "best", "1.0"),
        ("c", "2", "failed", "", ""),
    ]

    page = page_of_sweep(tmp_path, swept(found))
    assert page.count('class="highlight"') == 1
    assert "no room" in page


AGAIN = "python -m cm3leon.run experiment=x/sweep.yaml run=x"


def test_the_page_says_what_made_it_and_leads_to_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, date = "Linux-6, Python 3.11.7, torch 2.14.1", datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
    monkeypatch.setattr("cm3leon.studies.report.machines", lambda folders: [machine])
    clock = SimpleNamespace(now=lambda zone: date)
    monkeypatch.setattr("cm3leon.studies.report.datetime", clock)

    # Two runs have a page of their own, one of the evaluation and one of the images alone.
    found = results(**{'a"b': 2.0, "c": 1.0, "d": 3.0, "e": None})
    for name in (
        'a"b/report.html',
        'a"b/reconstruction/report.html',
        "c/reconstruction/report.html",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    page = Page(page_of_sweep(tmp_path, swept(found)))
    links = [str(link["href"]) for link in page.all("a")]
    assert [link for link in links if not link.startswith("#")] == [
        "./a%22b/report.html",
        "./c/reconstruction/report.html",
    ]

    for words in (
        "A sweep of digits<b> over seed",
        AGAIN,
        "2026-03-04 05:06 UTC",
        machine,
    ):
        assert words in page.words


@pytest.mark.parametrize(
    ("key", "values", "drawn_so", "expected"),
    [
        ("training.learning_rate", [1e-3, 2e-3], False, True),
        ("model.width", [32, 320], False, True),
        ("model.width", [32, 64], False, False),
        ("model.width", [32, 64], True, True),
        ("decoder.cfg", [0.0, 10.0], False, False),
        ("training.learning_rate", [0.0, 1e-3], False, False),
    ],
)
def test_rates_and_wide_ranges_have_logarithmic_axes(
    key: str,
    values: list[float],
    drawn_so: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # The page is not written: what it would draw is looked at.
    drawn: list[Any] = []
    monkeypatch.setattr("cm3leon.studies.report.Report", lambda *page, **_: drawn.append(page))
    monkeypatch.setattr("cm3leon.studies.report.write_report", lambda path, page: None)
    found = [RunResult(str(x), {key: x}, "finished", {"loss": 1.0}) for x in values]
    given = f"loguniform({values[0]},{values[1]})" if drawn_so else values
    with contextlib.suppress(FileNotFoundError):
        page_of_sweep(tmp_path, swept(found, **{key: given}))

    (curves,) = drawn[0][3][0].blocks
    assert (curves.log_x, curves.x_label) == (expected, key)
    assert list(curves.series[0].x) == values


def test_values_drawn_by_factors_are_known_to_the_page(tmp_path: Path) -> None:
    words = ["sweep.training.weight_decay=loguniform(0.1,0.2)", "sweep.seed=0,1", "sweep_trials=3"]
    (plan,) = load_sweep("digits_smoke", words, tmp_path).config.runs.values()
    assert plan.logarithmic == {"training.weight_decay"}


def test_machines_are_named_once_and_damage_is_passed_over(tmp_path: Path) -> None:
    written = {"system": "Linux-6", "python": "3.11.7", "packages": {"torch": "2.14.1", "x": "1"}}
    contents = {"a": json.dumps(written), "b": json.dumps(written), "c": "{", "d": '{"system": 1}'}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "environment.json").write_text(content)
    folders = [tmp_path / name for name in (*contents, "none")]
    assert machines(folders) == ["Linux-6, Python 3.11.7, torch 2.14.1"]


# --------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("words", "pretraining", "folders"),
    [
        (["sweep.training.learning_rate=1e-3,2e-3"], False, ["shared"]),
        (["sweep.training.log_every=1,5"], True, ["shared"]),
        (
            ["sweep.training.learning_rate=1e-3,2e-3", "sweep.seed=0,1"],
            False,
            ["shared,seed=0", "shared,seed=1"],
        ),
        (["sweep.decoder.cfg=1.0,2.0"], True, ["shared"]),
        (["sweep.decoder.cfg=1.0,2.0", "sweep.training.batch_size=4,8"], False, ["shared"]),
        (
            ["sweep.decoder.cfg=1.0,2.0", "sweep.seed=0,1"],
            True,
            ["shared,seed=0", "shared,seed=1"],
        ),
        (["sweep.evaluations.caption.setting.max_tokens=4,5"], True, ["shared"]),
        (
            ["sweep.text_tokenizer.vocab_size=300,301"],
            True,
            ["shared,vocab_size=300", "shared,vocab_size=301"],
        ),
        # A document has to fit the block, so that tokens depend on its length; where a document
        # may be cut, they do not.
        (
            ["sweep.model.seq_len=64,65", "packing.method=whole"],
            True,
            ["shared,seq_len=64", "shared,seq_len=65"],
        ),
        (["sweep.model.seq_len=64,65", "packing.method=stream"], False, ["shared"]),
        (["sweep.model.width=32,64"], False, ["shared"]),
        (["sweep.retriever.max_documents=1,2"], False, ["shared"]),
        (
            ["sweep.retriever.max_documents=0,2"],
            True,
            ["shared,max_documents=0", "shared,max_documents=2"],
        ),
        (
            ["sweep.data=[{name: folder, path: none}, {name: digits}]"],
            True,
            ["shared,data=folder-path-none", "shared,data=digits"],
        ),
    ],
)
def test_what_points_share_depends_on_what_their_stages_read(
    tmp_path: Path, words: list[str], pretraining: bool, folders: list[str]
) -> None:
    sweep = load_sweep("digits_smoke", words, tmp_path)
    groups = groups_of(sweep, list(sweep.runs))
    assert [group.name for group in groups] == folders
    assert {group.pretraining for group in groups} == {pretraining}


def test_keys_that_only_matter_together_part_the_points_that_they_change(tmp_path: Path) -> None:
    words = ["sweep.packing.method=stream,whole", "sweep.model.seq_len=64,65"]
    sweep = load_sweep("digits_smoke", words, tmp_path)
    groups = groups_of(sweep, list(sweep.runs))
    assert [(group.name, len(group.points), group.pretraining) for group in groups] == [
        ("shared,method=stream", 2, False),
        ("shared,method=whole,seq_len=64", 1, True),
        ("shared,method=whole,seq_len=65", 1, True),
    ]


SWEPT = [
    "experiment=digits_smoke",
    "sweep.training.learning_rate=1e-3,2e-3",
    "sweep.seed=0,1",
    "launcher=inline",
]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, registries: None) -> list[str]:
    """Names of the folders whose experiment was run, where no experiment is really run.

    A launcher `inline` runs the commands of jobs in this process.
    """
    names: list[str] = []

    # Instead of a run, the files that one leaves; with this learning rate, its failure.
    def run_experiment(
        experiment: Experiment, folder: Path, *, until: str | None = None, **options: Any
    ) -> None:
        names.append(folder.name)
        rate = experiment.training.learning_rate
        if rate == 0.5:
            raise RuntimeError("the weights\nhave gone")

        if until:  # what points share
            marker = folder / until / "stage.json"
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps({"fingerprint": "a", "seconds": 1.0, "files": {}}))
        else:
            finished_run(folder, 3.0 - 100 * rate)

    def first_unfinished(
        stages: Sequence[Any], run: RunFolder, folder: Path
    ) -> tuple[str | None, Any]:
        made = (folder / stages[-1].name / "stage.json").is_file()
        return (None if made else stages[-1].name), {}

    monkeypatch.setattr("cm3leon.studies.point.run_experiment", run_experiment)
    monkeypatch.setattr("cm3leon.studies.jobs.first_unfinished", first_unfinished)
    monkeypatch.setattr("cm3leon.stages.running.run_experiment", run_experiment)

    @LAUNCHERS.register("inline")
    class Inline(Launcher):
        """One command after the other, in this process."""

        Config = NoSettings

        def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
            for job in jobs:
                for command in job.commands:
                    with contextlib.suppress(RuntimeError):
                        main(command)
            return []

    return names


def test_points_run_in_their_folders_with_what_they_share(ran: list[str], tmp_path: Path) -> None:
    assert main([*SWEPT, f"run={tmp_path}"]) == 0
    assert ran == [
        "shared,seed=0",
        "shared,seed=1",
        "learning_rate=0.001,seed=0",
        "learning_rate=0.001,seed=1",
        "learning_rate=0.002,seed=0",
        "learning_rate=0.002,seed=1",
    ]
    point = tmp_path / "learning_rate=0.002,seed=1"
    assert (point / "neighbours").resolve() == tmp_path / "shared,seed=1" / "neighbours"

    lines = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [line["loss"] for line in lines] == ["2.9", "2.9", "2.8", "2.8"]
    assert [line["best"] for line in lines] == ["", "", "best", ""]

    page = (tmp_path / "report.html").read_text()
    assert "learning_rate=0.002,seed=0" in page
    assert "A sweep of digits_smoke over" in page

    # The command that the page prints finds all of it done, and keeps the name of the experiment.
    (printed,) = re.findall(r"<code>python -m cm3leon\.run ([^<]+)</code>", page)
    assert main(shlex.split(html.unescape(printed))) == 0
    assert len(ran) == 6
    assert "A sweep of digits_smoke over" in (tmp_path / "report.html").read_text()


def test_a_second_start_runs_only_what_is_missing(ran: list[str], tmp_path: Path) -> None:
    words = [*SWEPT[:1], "launcher=inline", f"run={tmp_path}"]
    assert main([*words, "sweep.training.learning_rate=1e-3,2e-3"]) == 0
    assert main([*words, "sweep.training.learning_rate=1e-3,2e-3,4e-3"]) == 0
    assert ran == ["shared", "learning_rate=0.001", "learning_rate=0.002", "learning_rate=0.004"]

    # What the points share does not depend on the training, and stays.
    assert main([*words, "sweep.training.learning_rate=1e-3,2e-3", "training.steps=30"]) == 0
    assert ran[4:] == ["learning_rate=0.001", "learning_rate=0.002"]

    assert main([f"experiment={tmp_path / 'sweep.yaml'}", f"run={tmp_path}"]) == 0
    assert len(ran) == 6


def test_redo_reaches_every_point_and_is_checked(
    ran: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def run_experiment(*args: Any, **options: Any) -> None:
        asked.append(options["redo"])

    monkeypatch.setattr("cm3leon.studies.point.run_experiment", run_experiment)
    words = [
        *SWEPT[:1],
        "launcher=inline",
        f"run={tmp_path}",
        "sweep.training.learning_rate=1e-3,2e-3",
    ]

    main([*words, "redo=pretraining,retriever"])
    assert asked == [["pretraining", "retriever"]] * 2

    assert main([*words, "redo=pretrainin"]) == 2
    assert "redo is pretrainin, which is not a stage" in capsys.readouterr().err


def test_failures_are_listed_and_tried_again_by_the_same_command(
    ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "experiment=digits_smoke",
        "launcher=inline",
        f"run={tmp_path}",
        "sweep.training.learning_rate=1e-3,0.5",
    ]

    # The second start runs the failed point again, and the finished one not.
    for times in (1, 2):
        assert main(words) == 2
        said = capsys.readouterr()
        assert "failed: learning_rate=0.5, the weights have gone" in said.out
        unfinished = "1 of 2 points did not finish, learning_rate=0.5"
        assert f"{unfinished}; the same command tries them again" in said.err
        assert ran.count("learning_rate=0.5") == times

    assert ran.count("learning_rate=0.001") == 1
    assert "the weights have gone" in (tmp_path / "report.html").read_text()


def test_ranks_do_not_each_start_a_sweep(
    ran: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*SWEPT, f"run={tmp_path / 'run'}"]) == 2
    assert "a sweep starts the processes of its points itself" in capsys.readouterr().err
    assert ran == []


def test_figures_of_a_point_that_runs_again_are_not_those_of_before(
    ran: list[str], tmp_path: Path
) -> None:
    assert main([*SWEPT, f"run={tmp_path}"]) == 0
    sweep = load_sweep("digits_smoke", [*SWEPT[1:3], "training.steps=30"], tmp_path)
    assert {result.state for result in results_of(sweep).values()} == {"missing"}


def test_jobs_that_nobody_waits_for_end_with_the_table(registries: None, tmp_path: Path) -> None:
    seen: list[Job] = []

    @LAUNCHERS.register("kept")
    class Kept(Launcher):
        """Keep the jobs instead of running them."""

        detached = True
        Config = NoSettings

        def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
            seen.extend(jobs)
            return [Submitted(job.name, 0, "1", folder / "log") for job in jobs]

    words = [
        "experiment=digits_smoke",
        f"run={tmp_path}",
        "sweep.training.learning_rate=1e-3,2e-3",
        "launcher=kept",
    ]
    assert main([*words, "sweep_retries=2"]) == 0

    # The points wait for what they share, and the table for the points, however these end.
    shared, points, collect = seen
    assert (shared.after, points.after, collect.after) == ((), ("shared0",), ("points",))
    assert (points.always, collect.always) == (True, True)
    assert (shared.together, points.together, collect.together) == (True, True, False)
    assert points.resources == {"max_deaths": 3}

    assert [command[:2] for command in points.commands] == [
        ("point", f"run={tmp_path / 'learning_rate=0.001'}"),
        ("point", f"run={tmp_path / 'learning_rate=0.002'}"),
    ]
    assert collect.commands == (("collect", f"run={tmp_path}"),)


# ------------------------------------------------------------------------- what is swept in a study


def study_of_rates(folder: Path, seeds: int = 1, **more: Any) -> Path:
    """The file of a study with a plain run and one that is swept."""
    rates = {"experiment": "digits_smoke", "sweep": {"training.learning_rate": [1e-3, 2e-3]}}
    content = {
        "title": "Rates",
        "seeds": seeds,
        "runs": {
            "plain": {"experiment": "digits_smoke", "overrides": {"until": "pretraining"}},
            "rates": rates,
        },
        **more,
    }
    file = folder / "rates.yaml"
    file.write_text(dump_yaml(content))
    return file


def test_a_run_of_a_study_takes_the_words_of_a_sweep_and_has_its_draws(tmp_path: Path) -> None:
    drawn = "training.learning_rate=loguniform(1e-4,1e-2)"
    swept_words = ["sweep_trials=3", "sweep_seed=5", f"sweep.{drawn}"]
    words = [f"runs.rates.{word}" for word in swept_words]
    study = load_study(str(study_of_rates(tmp_path)), words, tmp_path / "run")
    alone = load_sweep("digits_smoke", swept_words, tmp_path / "alone")
    points = [run.point for run in study.runs.values() if run.entry == "rates"]
    assert points == [run.point for run in alone.runs.values()]
    assert len({json.dumps(point) for point in points}) == 3

    # The file of the study says what was drawn from, and reads as the same points.
    (tmp_path / "study.yaml").write_text(dump_yaml(study.written))
    again = load_study(str(tmp_path / "study.yaml"), (), tmp_path / "run")
    assert [run.point for run in again.runs.values()] == [run.point for run in study.runs.values()]

    with pytest.raises(UserError, match=r"runs\.rates: sweep.* say how many points to draw"):
        load_study(str(tmp_path / "study.yaml"), ["runs.rates.sweep_trials=null"], tmp_path)


def test_points_of_a_study_are_made_as_those_of_a_sweep(ran: list[str], tmp_path: Path) -> None:
    words = [f"experiment={study_of_rates(tmp_path, seeds=2)}", f"run={tmp_path / 'run'}"]
    assert main([*words, "launcher=inline"]) in (0, None)
    assert [name for name in ran if not name.startswith("plain")] == [
        "rates,shared",
        "rates-0.001",
        "rates-0.002",
        "rates,shared-seed_1",
        "rates-0.001-seed_1",
        "rates-0.002-seed_1",
    ]

    # The table has a line for each point of each seed; the best one is marked once.
    lines = list(csv.DictReader((tmp_path / "run" / "study.csv").read_text().splitlines()))
    assert {line["state"] for line in lines} == {"finished"}
    assert {line["point"]: (line["loss"], line["best"]) for line in lines} == {
        "plain": ("", ""),
        "plain-seed_1": ("", ""),
        "rates-0.001": ("2.9", ""),
        "rates-0.002": ("2.8", "best"),
        "rates-0.001-seed_1": ("2.9", ""),
        "rates-0.002-seed_1": ("2.8", ""),
    }

    page = Page((tmp_path / "run" / "report.html").read_text()).words.replace("\u00a0", " ")
    assert "points finished, rates" in page
    assert "2.800 ± 0.000" in page or "2.8 ± 0" in page

    # What is finished is not made again.
    before = len(ran)
    assert main([*words, "launcher=inline", "until=rates-0.002"]) in (0, None)
    assert [name for name in ran[before:] if not name.startswith("plain")] == []


def test_figures_are_means_over_the_seeds_with_their_spread(tmp_path: Path) -> None:
    study = load_study(str(study_of_rates(tmp_path, seeds=3)), (), tmp_path / "run")
    losses = {"rates-0.001": 1.0, "rates-0.001-seed_1": 2.0, "rates-0.001-seed_2": 6.0}
    found = {}
    for name, run in study.runs.items():
        figures = {"loss": losses.get(name, 5.0), name: 1.0}
        found[name] = RunResult(name, run.point, "finished", figures)

    plain, rates = entries_of(study, found)
    names = [each.name for each in (plain, *rates.results)]
    assert names == ["plain", "rates-0.001", "rates-0.002"]

    # A figure that not every seed has, has no mean.
    merged = rates.results[0]
    assert merged.figures == {"loss": 3.0}
    assert merged.spread["loss"].deviation == pytest.approx(7**0.5)

    # Student's t of 95 % for two degrees of freedom.
    half = 4.303 * (7 / 3) ** 0.5
    assert merged.spread["loss"].low == pytest.approx(3.0 - half)
    assert merged.spread["loss"].high == pytest.approx(3.0 + half)
    assert rates.best is merged
    assert plain.best is None

    # One seed that failed stands for all: no figure is a mean of fewer.
    found["rates-0.001-seed_2"] = RunResult("rates-0.001-seed_2", {}, "failed", {}, "no room")
    (_, rates) = entries_of(study, found)
    assert (rates.results[0].name, rates.results[0].state) == ("rates-0.001", "failed")
    assert rates.best is rates.results[1]


def test_collect_makes_the_table_of_a_study_and_leaves_figures_to_its_own_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    study = load_study(str(study_of_rates(tmp_path)), (), folder)
    (folder / "study.yaml").write_text(dump_yaml(study.written))

    assert main(["collect", f"run={folder}"]) in (0, None)
    assert "missing: rates-0.002" in capsys.readouterr().out
    lines = list(csv.DictReader((folder / "study.csv").read_text().splitlines()))
    assert [line["state"] for line in lines] == ["missing"] * 3
    assert json.loads((folder / "results.json").read_text())["evaluations"] == {}
    assert (folder / "report.html").is_file()

    # With evaluations, the study's own command has to make the figures.
    images = {
        "title": "a",
        "protocol": {"name": "corpus", "task": "text_to_image"},
        "models": {"plain": "{run}/plain"},
    }
    file = study_of_rates(tmp_path, evaluations={"images": images})
    (folder / "study.yaml").write_text(file.read_text())
    assert main(["collect", f"run={folder}"]) == 2
    refused = "is a study with evaluations, whose figures its own command makes"
    assert refused in capsys.readouterr().err


def test_points_that_an_earlier_version_made_need_nothing_shared(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    study = load_study(str(study_of_rates(tmp_path)), (), folder)
    points = [name for name in study.runs if name.startswith("rates-")]
    folder.mkdir()
    jobs = point_jobs(study, points, points)
    assert [job.name for job in jobs] == ["rates.shared0", "rates.points"]

    # Points that have stages of their own share nothing.
    for name in points:
        (folder / name / "documents").mkdir(parents=True)
    assert [job.name for job in point_jobs(study, points, points)] == ["rates.points"]

    # An earlier version wrote every point and every seed as a run of its own.
    first = {"training.learning_rate": 1e-3}
    second = {"training.learning_rate": 1e-3, "seed": 1}
    runs = {
        "rates-0.001": {"experiment": "digits_smoke", "overrides": first, "sweep": {}},
        "rates-0.001-seed_1": {"experiment": "digits_smoke", "overrides": second, "sweep": {}},
    }
    written = {"title": "Rates", "seeds": 2, "runs": runs}
    (folder / "study.yaml").write_text(dump_yaml(written))
    earlier = load_study(str(folder / "study.yaml"), (), folder)
    assert list(earlier.runs) == list(written["runs"])
    assert [earlier.experiment(name).seed for name in earlier.runs] == [0, 1]


def test_a_corpus_is_looked_through_once_for_all_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep("digits_smoke", ["sweep.seed=0,1,2", "sweep.model.width=32,64"], tmp_path)
    read: list[int] = []
    source = type(SOURCES.build(sweep.experiment(next(iter(sweep.runs))).data))
    fingerprint = source.fingerprint

    def counted(self: Any) -> str:
        read.append(1)
        return fingerprint(self)

    monkeypatch.setattr(source, "fingerprint", counted)
    groups = groups_of(sweep, list(sweep.runs))
    assert sum(len(group.points) for group in groups) == 6
    assert len(read) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"runs": {}}, True),
        ({"evaluations": {"a": {"models": {"m": "x"}}}}, True),
        # A run's own evaluation asks about the corpus of that run.
        ({"data": "digits", "evaluations": {"a": {"protocol": "corpus"}}}, False),
        ({"data": "digits", "evaluations": None}, False),
    ],
)
def test_a_study_is_told_from_a_run(tmp_path: Path, content: Any, expected: bool) -> None:
    (tmp_path / "a.yaml").write_text(dump_yaml(content))
    assert is_study(str(tmp_path / "a.yaml")) is expected
