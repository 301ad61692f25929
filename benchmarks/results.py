"""Write the tables of README.md and docs/ from the result files in docs/results/.

    # Write the tables between their marks.
    python benchmarks/results.py

    # Take a finished run's figures first.
    python benchmarks/results.py digits runs/digits 'one idle H100'

A page marks where a table of docs/results/tables.yaml stands:

    <!-- table digits_held_out -->

    | Markdown | 1 |

    <!-- end -->

A result file says under `made` what made it: command, machine, torch, date, seeds, minutes, and
from what its figures were transcribed if they were. It has the figures as a run
(evaluation/results.json) or a study (results.json) writes them:

    {"made": {...}, "evaluations": {NAME: [{"row": ..., "metrics": {...}}]}}
"""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
SHARED = ("ceiling", "chance")
"""Parts of a row that stand in a file only where they differ from those of the row above."""
INNERMOST = re.compile(r"[\[{][^\[\]{}]*[\]}]")
"""An object or a list of JSON that holds no other."""
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Figure:
    """A figure, which a table writes as `{...:share}`, `{...:interval}`, `{...:spread}`,
    `{...:value}`, `{...:value_spread}` or `{...:n}`."""

    def __init__(self, name: str, found: dict[str, Any]) -> None:
        self.name = name
        self.found = found

    def __format__(self, form: str) -> str:
        if form == "share":
            return f"{100 * self.found['value']:.1f} %"
        if form == "interval":
            # One decimal, but none at a bound of 100 %.
            low, high = 100 * self.found["low"], 100 * self.found["high"]
            if high == 100:
                return f"{low:.1f} to 100"
            return f"{low:.1f} to {high:.1f}"
        if form == "spread":
            # The standard deviation over the seeds, behind their mean.
            return (
                f"{100 * self.found['value']:.1f} ± {100 * self.found['runs']['deviation']:.1f} %"
            )
        if form == "value":
            return f"{self.found['value']:,.0f}"
        if form == "value_spread":
            return f"{self.found['value']:,.0f} ± {self.found['runs']['deviation']:,.0f}"
        if form == "n":
            return f"{self.found['n']:,}"
        raise ValueError(
            f"{self.name}: the form is {form}; it must be share, interval, spread, value, "
            "value_spread or n"
        )


class ResultFile:
    """A file of docs/results, whose figures and origin a table of tables.yaml writes.

        {digits[caption/documents 0/metrics/accuracy]:share}
        {digits:made}

    The first is a figure, by its evaluation, row and metric; the second is a sentence on the run.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.content = json.loads(path.read_text(encoding="utf-8"))

    def __getitem__(self, key: str) -> Figure:
        """Return the figure at a path.

        Raises:
            KeyError: names the file and the path that it has no figure at.
        """
        parts = key.split("/")
        found: Any = self.content

        # The row of an evaluation is found by its name; anything else lies under its keys.
        rows = self.content["evaluations"].get(parts[0])
        if rows is not None:
            found = _row(rows, parts[1])
            parts = parts[2:]
        for part in parts:
            found = found.get(part, {})
        if "value" not in found:
            raise KeyError(f"{self.name}.json has no figure {key}")
        return Figure(f"{self.name}[{key}]", found)

    def __format__(self, form: str) -> str:
        if form != "made":
            raise ValueError(f"{self.name}: the form is {form}; it must be made, or name a figure")

        made = self.content["made"]
        seeds = ", ".join(str(seed) for seed in made["seeds"])
        text = (
            f"`{made['command']}`, seed{'s' * (len(made['seeds']) > 1)} {seeds}, "
            f"{made['machine']}, torch {made['torch']}, {made['date']}"
        )

        # A study has no minutes, and only a transcribed file says from what.
        if "minutes" in made:
            text += f": {made['minutes']} minutes"
        source = f"[{self.name}.json](docs/results/{self.name}.json)"
        if "from" in made:
            source += f", transcribed from {made['from']}"
        return f"{text} ({source})."


def _row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of that name, with what it shares with rows above it; {} if there is none."""
    shared: dict[str, Any] = {}
    for row in rows:
        shared |= {part: row[part] for part in SHARED if part in row}
        if row["row"] == name:
            return {**shared, **row}
    return {}


def result_files() -> dict[str, ResultFile]:
    """Return the result files by their names."""
    return {path.stem: ResultFile(path) for path in sorted(RESULTS.glob("*.json"))}


def tables() -> dict[str, str]:
    """Return every table of tables.yaml as Markdown, with links as README.md would write them."""
    forms = yaml.safe_load((RESULTS / "tables.yaml").read_text(encoding="utf-8"))
    files = result_files()
    return {name: form.format_map(files) for name, form in forms.items()}


def pages() -> list[Path]:
    """Return the pages that may have marks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(page: Path) -> str:
    """Return the text of a page with its tables as the result files give them.

    Raises:
        KeyError: for a mark of a table that tables.yaml does not have.
    """
    written = tables()

    def table(mark: re.Match[str]) -> str:
        text = written[mark[2]]

        # Links in a page of docs/ start at its folder.
        if page.is_relative_to(ROOT / "docs"):
            up = "../" * (len(page.relative_to(ROOT / "docs").parts) - 1)
            text = text.replace("](docs/", f"]({up}")
        return f"{mark[1]}\n{text}\n{mark[3]}"

    return TABLE.sub(table, page.read_text(encoding="utf-8"))


def take(name: str, folder: Path, machine: str) -> None:
    """Write the result file of that name from a finished run or study.

    Args:
        folder: a run folder, or that of a study.
        machine: what it ran on, in words.

    Raises:
        FileNotFoundError: if the folder holds no results.
    """
    results = folder / "results.json"
    if results.is_file():
        # A study, with its runs somewhere below.
        runs = [each.parent for each in folder.rglob("pretraining")]
    else:
        results, runs = folder / "evaluation" / "results.json", [folder]
    found = json.loads(results.read_text(encoding="utf-8"))
    command = f"python -m cm3leon.run experiment={name}"

    # A run with several seeds is a study that asks nothing itself: the run's own figures are its.
    if not found["evaluations"] and len(own := found.get("own_evaluations", {})) == 1:
        (found,) = own.values()
        command += f" seeds={len(runs)}"
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    configs = [yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) for run in runs]

    made: dict[str, Any] = {
        "command": command,
        "machine": machine,
        "torch": environment["packages"]["torch"],
        "date": datetime.fromtimestamp(results.stat().st_mtime, UTC).date().isoformat(),
        "seeds": sorted({config["seed"] for config in configs}),
    }
    metrics = folder / "metrics.json"
    if metrics.is_file():
        seconds = json.loads(metrics.read_text(encoding="utf-8"))["wall_seconds"]["total"]
        made["minutes"] = round(seconds / 60)

    # Only figures: notes, answers and seconds of rows stay with the run.
    evaluations: dict[str, Any] = {}
    for evaluation, rows in found["evaluations"].items():
        evaluations[evaluation] = []
        above: dict[str, Any] = {}
        for row in rows:
            kept = {"row": row["row"], "metrics": row["metrics"]}
            for part in SHARED:
                # Rows of one model mostly share these, and then only the first one has them.
                if part in row and row[part] != above.get(part):
                    kept[part] = above[part] = row[part]
            evaluations[evaluation].append(kept)
    content = {"made": made, "judge": found.get("judge"), "evaluations": evaluations}
    (RESULTS / f"{name}.json").write_text(written_out(content), encoding="utf-8")


def written_out(content: dict[str, Any]) -> str:
    """Return the text of a result file: JSON with a figure on each line, of eight digits."""
    text = json.dumps(_rounded(content), indent=1, ensure_ascii=False)
    text = INNERMOST.sub(lambda found: " ".join(found[0].split()), text)
    return f"{text}\n"


def _rounded(content: Any) -> Any:
    if isinstance(content, float):
        return float(f"{content:.8g}")
    if isinstance(content, list):
        return [_rounded(each) for each in content]
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return content


if __name__ == "__main__":
    if sys.argv[1:]:
        named, made_in, words = sys.argv[1:]
        take(named, Path(made_in), words)
    for each in pages():
        text = filled(each)
        if text != each.read_text(encoding="utf-8"):
            each.write_text(text, encoding="utf-8")
            print(f"{each.relative_to(ROOT)}: written")
