"""What a person takes from a run: metrics.json and report.html, written from the finished stages."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cm3leon import __version__
from cm3leon.config import dump_yaml, to_mapping
from cm3leon.data.shuffle import shuffled
from cm3leon.evaluation.report import (
    Card,
    Code,
    Curves,
    Fact,
    Folded,
    Gallery,
    Picture,
    Report,
    Section,
    Series,
    Status,
    Strip,
    Table,
    write_report,
)
from cm3leon.io import read_json_lines, write_json
from cm3leon.provenance import commit, environment, processor
from cm3leon.records import KINDS
from cm3leon.registry import TASKS
from cm3leon.stages.artifacts import Run
from cm3leon.stages.evaluate import RESULTS, Evaluator
from cm3leon.stages.generate import Generation, Setting, read_generations
from cm3leon.terminal import command_line
from cm3leon.training.device import uses_bf16

Entry = dict[str, Any]
"""One setting of results.json."""

COLUMNS = 12
"""Pictures in a strip."""

LABELS = {
    "given_kept": "given part unchanged",
    "clip_score": "likeness of text and image",
    "copied": "copies",
    "truncated": "cut by their length",
}
"""Metrics whose names do not say enough."""

CARDS = 6
"""Samples of a gallery."""

PIXELS = 128
"""Height of a picture of the report, in CSS pixels."""


AIMS = (
    ("text_to_image", "text to image, no documents", 0.97),
    ("caption", "image to text, no documents", 0.93),
    ("infill_top", "top half infilled", 0.90),
    ("infill_bottom", "bottom half infilled", 0.90),
)
"""Tasks whose accuracy without documents is to reach a share, with what they are called."""


def aim_status(figure: Entry, aim: float) -> Status:
    """Whether a figure with its interval reaches an aim: missed only where the whole interval does."""
    if figure["value"] >= aim:
        return "good"
    return "bad" if figure["high"] < aim else "plain"


_AIMED = {"good": "reached", "plain": "within the interval", "bad": "missed"}


def closing(run: Run, metrics: Entry) -> list[str]:
    """What a run ends with: its figures beside their aims, the report's address, and a command to try next."""
    found = [
        *metrics["t2i_accuracy"],
        *metrics["caption_accuracy"],
        *metrics["infill_accuracy"],
    ]
    lines = []
    for task, label, aim in AIMS:
        for entry in found:
            chosen = entry["cfg"] in (None, metrics["chosen_cfg"])
            if entry["task"] != task or entry["documents"] or not chosen:
                continue
            if entry["accuracy"] is None:
                continue
            low, high = entry["accuracy_interval"]
            figure = {"value": entry["accuracy"], "low": low, "high": high}
            lines.append(
                f"  {label:<28} {_percent(entry['accuracy']):>8}   95 % interval "
                f"{100 * low:.1f} to {100 * high:.1f}   aim {100 * aim:.0f} %: {_AIMED[aim_status(figure, aim)]}"
            )
    for entry in found:
        if entry.get("truncated"):
            lines.append(
                f"  {round(entry['truncated'] * entry['n'])} of {entry['n']} texts of {entry['task']} with "
                f"{entry['documents']} documents were cut by their length; raise max_tokens of the task"
            )
    psnr = metrics["reconstruction_psnr"]
    lines.append(f"  {'images from their codes':<28} {psnr:>5.1f} dB   PSNR of held-out images")
    lines.append(f"report: {(run.folder / 'report.html').resolve().as_uri()}")
    held_out = run.corpus.rows("held_out")
    if len(held_out):
        prompt = f"prompt={run.corpus.captions[held_out[0]]}"
        command = command_line("generate", f"run={run.folder}", prompt, "n=4", "out=drawn")
        lines.append(f"next, for example: {command}")
    return lines


def publish(run: Run, seconds: dict[str, float]) -> list[str]:
    """Writes `metrics.json` and `report.html` into the run folder; returns what is said of them, see `closing`."""
    results = json.loads((run.folder / "evaluation" / RESULTS).read_text())
    metrics = figures(run, results, seconds)
    write_json(run.folder / "metrics.json", metrics)
    write_report(run.folder / "report.html", _Page(run, results, metrics).report())
    return closing(run, metrics)


# ------------------------------------------------------------------------------------------------------- metrics.json
def figures(run: Run, results: Entry, seconds: dict[str, float]) -> Entry:
    """The content of metrics.json. Shares are in [0, 1], intervals 95 %, times in seconds."""
    held_out = [entry for entry in results["settings"] if entry["split"] == "held_out"]
    judge = results["judge"] or {}
    return {
        "judge_accuracy_real": _value(judge.get("real")),
        "judge_accuracy_reconstructed": _value(judge.get("reconstructed")),
        "reconstruction_psnr": results["reconstruction"]["psnr_held_out"],
        "chosen_cfg": results["chosen_cfg"],
        "t2i_accuracy": [_flat(entry) for entry in held_out if entry["task"] == "text_to_image"],
        "caption_accuracy": [_flat(entry) for entry in held_out if entry["task"] == "caption"],
        "infill_accuracy": [
            _flat(entry) for entry in held_out if entry["task"].startswith("infill")
        ],
        "other_tasks": [_flat(entry) for entry in held_out if not _is_standard(entry["task"])],
        "t2i_validation": [
            _flat(entry) for entry in results["settings"] if entry["split"] == "validation"
        ],
        "validation_loss": json.loads((run.folder / "pretraining" / "validation.json").read_text()),
        **{name: results[name] for name in ("documents", "judge", "reconstruction", "retriever")},
        "wall_seconds": {**seconds, "total": sum(seconds.values())},
        "to_run_again": _provenance(run),
    }


def _is_standard(task: str) -> bool:
    return task in ("text_to_image", "caption") or task.startswith("infill")


def _flat(entry: Entry) -> Entry:
    """A setting with its metrics beside it: `accuracy` (null where no class is known), `accuracy_interval`, ..."""
    flat = {key: entry[key] for key in ("task", "documents", "shuffled", "cfg", "n")}
    flat["accuracy"] = None
    for name, figure in entry["metrics"].items():
        flat |= {name: figure["value"], f"{name}_interval": [figure["low"], figure["high"]]}
    return flat


def _value(figure: Entry | None) -> float | None:
    return None if figure is None else figure["value"]


def _provenance(run: Run) -> Entry:
    """Code, packages, machine and configuration of the run."""
    packages = (
        "torch",
        "numpy",
        "open_clip_torch",
        "tokenizers",
        "scikit-learn",
        "faiss-cpu",
        "faiss-gpu",
    )
    made_with = environment()
    installed = made_with["packages"]
    return {
        "command": command_line(f"experiment={run.folder / KINDS['run']}", f"run={run.folder}"),
        "cm3leon": __version__,
        "git_commit": commit(),
        "python": made_with["python"],
        "packages": {name: installed[name] for name in packages if name in installed},
        "machine": {
            "platform": made_with["system"],
            "device": torch.cuda.get_device_name() if run.device.type == "cuda" else processor(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "bf16": uses_bf16(run.device, run.experiment.training.precision),
        },
        "config": to_mapping(run.experiment),
    }


# -------------------------------------------------------------------------------------------------------- report.html
class _Page:
    """Composes the report; every picture and figure comes from the run folder."""

    def __init__(self, run: Run, results: Entry, metrics: Entry) -> None:
        self.run = run
        self.results = results
        self.metrics = metrics
        self.has_classes = results["judge"] is not None

    def report(self) -> Report:
        counts = self.results["documents"]
        return Report(
            title=f"CM3Leon on {self.run.experiment.data.name}",
            subtitle=(
                f"A retrieval-augmented model of text and images with {self._parameters():,} parameters, trained on "
                f"{counts['train']:,} captioned images; judged on {counts['held_out']:,} it never saw."
            ),
            facts=self.facts(),
            sections=[
                section
                for section in (
                    *self.pictures_first(),
                    self.curves(),
                    self.settings_tables(),
                    self.retrieval(),
                    self.again(),
                )
                if section.blocks
            ],
        )

    def pictures_first(self) -> list[Section]:
        """What there is to look at; where nothing is judged, originals beside what their codes keep come first."""
        made = [self.samples(), self.infillings(), self.captions()]
        rebuilt = self.reconstructions()
        return [*made, rebuilt] if self.has_classes else [rebuilt, *made]

    def facts(self) -> list[Fact]:
        wall = self.metrics["wall_seconds"]["total"]
        facts = [self._fact(*aim) for aim in AIMS]
        psnr = self.metrics["reconstruction_psnr"]
        judged = self.metrics["judge_accuracy_reconstructed"]
        note = (
            "" if judged is None else f"of held-out images; {_percent(judged)} of them read right"
        )
        return [
            *(fact for fact in facts if fact),
            Fact("reconstruction from codes", f"{psnr:.1f} dB", note),
            Fact(
                "time of all stages",
                f"{wall / 60:.1f} min",
                f"{self._provenance('machine')['cpu_cores']} CPU cores",
            ),
        ]

    def samples(self) -> Section:
        """A gallery for the prompts without documents, one with documents."""
        blocks = []
        for documents in sorted({entry["documents"] for entry in self._entries("text_to_image")}):
            entry = self._chosen("text_to_image", documents)
            if entry is None:
                continue
            cards = [self._image_card(entry, each) for each in self._some(entry, CARDS)]
            text = (
                "without documents"
                if not documents
                else f"with {documents} retrieved, most relevant last"
            )
            guidance = "" if entry["cfg"] is None else f"; guidance weight {entry['cfg']:g}"
            blocks.append(Gallery(cards, caption=f"Text to image {text}{guidance}."))
        return Section(
            "Text to image",
            "Captions of held-out documents as prompts, not selected. The small images are the retrieved documents "
            "that stood in the prompt."
            + (" ✓ or ✗ is the judge's reading." if self.has_classes else ""),
            blocks,
        )

    def infillings(self) -> Section:
        blocks = []
        for entry in self._entries("infill_top") + self._entries("infill_bottom"):
            if entry["documents"]:
                continue
            some = self._some(entry, COLUMNS)
            images_BHWC = self._decode(some)
            given_BHWC = images_BHWC.copy()
            middle = given_BHWC.shape[1] // 2
            missing = np.s_[:, :middle] if entry["task"] == "infill_top" else np.s_[:, middle:]
            given_BHWC[missing] = 128
            original_BHWC = self.run.image_tokenizer.decode(
                self.run.codes_MN[[g.row for g in some]]
            )
            rows = [
                ("given", _pictures(given_BHWC)),
                ("infilled", _pictures(images_BHWC)),
                ("original", _pictures(original_BHWC)),
            ]
            blocks.append(
                Strip(
                    rows,
                    caption=f"{entry['task'].replace('_', ' ')}: the caption and one half are given.",
                )
            )
        return Section(
            "Infilling",
            "The CM3 objective at work: the missing half is generated after the rest of the image, seeing both sides. "
            "Originals are shown as the image tokenizer reconstructs them.",
            blocks,
        )

    def captions(self) -> Section:
        entry = next((entry for entry in self._entries("caption") if not entry["documents"]), None)
        if entry is None:
            return Section("Image to text")
        cards = []
        for generation in self._some(entry, CARDS):
            named = self.run.source.class_in(generation.caption)
            status = self._status(generation, named) if self.has_classes else None
            picture = Picture(self.run.corpus.images_BHWC[generation.row], height=64)
            cards.append(
                Card(
                    [picture],
                    title=generation.caption or "(empty)",
                    caption=f"the document's caption: {self.run.corpus.captions[generation.row]}",
                    status=status,
                )
            )
        return Section(
            "Image to text",
            "Held-out images, captioned without documents by the infilling prompt.",
            [Gallery(cards)],
        )

    def settings_tables(self) -> Section:
        names = {
            entry["task"]: None
            for entry in self.results["settings"]
            if entry["split"] == "held_out"
        }
        tables = [self._table(task) for task in names]
        validation = [entry for entry in self.results["settings"] if entry["split"] == "validation"]
        if validation:
            tables.append(
                self._settings_table("Guidance weights on the validation split", validation)
            )
        return Section(
            "Figures",
            "Shares in %, accuracies with their 95 % intervals (Wilson). A copy has the codes of a training image, of "
            "one of its varied versions, or of a retrieved one. Shuffled documents were retrieved for another prompt.",
            [Folded(table.caption, [replace(table, caption="")]) for table in tables],
        )

    def reconstructions(self) -> Section:
        rows = self._held_out(COLUMNS)
        originals = self.run.corpus.images_BHWC[rows]
        rebuilt = self.run.image_tokenizer.decode(self.run.codes_MN[rows])
        figures = self.results["reconstruction"]
        strip = Strip(
            [("original", _pictures(originals)), ("from codes", _pictures(rebuilt))],
            caption=(
                f"Held-out images. {figures['codes_per_image']} codes an image, {figures['codebook_use']:.0%} of "
                f"{figures['codebook_size']} codes in use (perplexity {figures['codebook_perplexity']:.0f}); "
                f"PSNR {figures['psnr_held_out']:.1f} dB (mean over images), "
                f"on training images {figures['psnr_train']:.1f} dB."
            ),
        )
        return Section(
            "Image tokenizer",
            f"What an image is to the model: everything it draws is bounded by this. {limit(figures)}".strip(),
            [strip],
        )

    def curves(self) -> Section:
        pretraining = self.run.log("pretraining")
        blocks = [
            _curves(
                "Validation loss",
                self._validation(),
                {"text": "loss_text", "image": "loss_image"},
                "nats a token",
            ),
            _curves(
                "Pretraining loss",
                pretraining,
                {"text": "loss_text", "image": "loss_image"},
                "nats a token",
            ),
            _curves(
                "Learning rate", pretraining, {"learning rate": "learning_rate"}, "learning rate"
            ),
            _curves("Gradient norm", pretraining, {"gradient norm": "gradient_norm"}, "norm"),
            _curves("Image tokenizer", self.run.log("image_tokenizer"), {"PSNR": "psnr_db"}, "dB"),
            _curves("Retriever", self.run.log("retriever"), {"loss": "loss"}, "nats"),
        ]
        loss = self.metrics["validation_loss"]
        text = ", ".join(
            f"{name[5:]} {loss[name]:.3f}" for name in ("loss_text", "loss_image") if name in loss
        )
        return Section(
            "Training",
            f"Validation loss after training, without documents, in nats a token: {text}.",
            [
                *(block for block in blocks[:2] if block.series),
                Folded("More curves", [block for block in blocks[2:] if block.series]),
            ],
        )

    def _validation(self) -> list[dict[str, float]]:
        """Records of the validation while pretraining; empty for a run that kept none."""
        file = self.run.folder / "pretraining" / "validation.jsonl"
        return read_json_lines(file, {"step": int}) if file.is_file() else []

    def retrieval(self) -> Section:
        figures = self.results["retriever"]
        rows: list[tuple[str, str]] = [
            ("candidates looked at", f"{figures['candidates_looked_at']:,}"),
            *(
                (f"rejected: {rule.replace('_', ' ')}", f"{share:.1%}")
                for rule, share in figures["share_rejected"].items()
            ),
            ("neighbours a training document", f"{figures['neighbours_per_document']:.2f}"),
        ]
        if figures.get("same_label") is not None:
            rows.append(("neighbours of the same class", f"{figures['same_label']:.1%}"))
        if "nearest_neighbour_vote" in figures:
            vote = figures["nearest_neighbour_vote"]
            rows.append(("class of the nearest document, read as the image's", _interval(vote)))
        return Section(
            "Retrieval",
            "The memory bank is the training documents; a query never retrieves itself, and held-out documents are not "
            "in it.",
            [Table(("", ""), rows)],
        )

    def again(self) -> Section:
        seconds = self.metrics["wall_seconds"]
        table = Table(
            ("stage", "seconds"), [(name, f"{value:.1f}") for name, value in seconds.items()]
        )
        provenance = self._provenance()
        lines = {key: value for key, value in provenance.items() if key != "config"}
        return Section(
            "To run it again",
            "Everything below is in metrics.json too; config.yaml beside this file is the resolved experiment.",
            [
                Code(lines.pop("command")),
                Folded("Seconds of each stage", [table]),
                Folded("Code, packages and machine", [Code(dump_yaml(lines))]),
                Folded("The resolved experiment", [Code(dump_yaml(provenance["config"]))]),
            ],
        )

    # pieces

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.run.model.parameters())

    def _provenance(self, *keys: str) -> Any:
        value = self.metrics["to_run_again"]
        for key in keys:
            value = value[key]
        return value

    def _entries(self, task: str) -> list[Entry]:
        """Settings of a task on the held-out split."""
        return [
            e for e in self.results["settings"] if e["split"] == "held_out" and e["task"] == task
        ]

    def _chosen(self, task: str, documents: int) -> Entry | None:
        """The setting with so many documents and, where the task is guided, the chosen weight."""
        fitting = [
            e for e in self._entries(task) if e["documents"] == documents and not e["shuffled"]
        ]
        chosen = self.results["chosen_cfg"]
        return next(
            (e for e in fitting if e["cfg"] in (None, chosen)), fitting[0] if fitting else None
        )

    def _fact(self, task: str, label: str, aim: float) -> Fact | None:
        entry = self._chosen(task, 0)
        if entry is None:
            return None
        if "accuracy" not in entry["metrics"]:
            score = entry["metrics"].get("clip_score")
            return score and Fact(
                label, f"{score['value']:.3f}", "cosine of text and image by the run's retriever"
            )
        figure = entry["metrics"]["accuracy"]
        status = aim_status(figure, aim)
        cfg = "" if entry["cfg"] is None else f"guidance {entry['cfg']:g}; "
        note = f"{cfg}95 % interval {_range(figure)}, n = {figure['n']:,}; aim {100 * aim:.0f} %"
        if status == "plain":
            note += ", which lies within the interval"
        return Fact(label, _percent(figure["value"]), note, status)

    def _some(self, entry: Entry, count: int) -> list[Generation]:
        """A fixed, unselected choice of a setting's generations."""
        setting = Setting(
            *(entry[key] for key in ("task", "split", "documents", "shuffled", "cfg"))
        )
        generations = read_generations(self.run.folder / "generation", setting)
        return [
            generations[shuffled(0, place, len(generations))]
            for place in range(min(count, len(generations)))
        ]

    def _held_out(self, count: int) -> list[int]:
        rows = self.run.corpus.rows("held_out")
        return [int(rows[shuffled(0, place, len(rows))]) for place in range(min(count, len(rows)))]

    def _decode(self, generations: Sequence[Generation]) -> np.ndarray:
        return self.run.image_tokenizer.decode(
            np.array([generation.codes for generation in generations])
        )

    def _image_card(self, entry: Entry, generation: Generation) -> Card:
        image_HWC = self._decode([generation])[0]
        read = int(self._evaluator.read_images(image_HWC[None])[0])
        return Card(
            [Picture(image_HWC, height=PIXELS)],
            caption=generation.caption,
            retrieved=[self._retrieved(row) for row in generation.retrieved],
            status=self._status(generation, read) if self.has_classes else None,
        )

    def _retrieved(self, row: int) -> Picture:
        """A document of the bank, with the image of its codes, which is what the model saw."""
        run = self.run
        document = run.bank_document(row)
        image_HWC = run.image_tokenizer.decode(run.tokenizer.codes(document)[None])[0]
        return Picture(image_HWC, run.tokenizer.caption(document), height=PIXELS)

    def _status(self, generation: Generation, read: int | None) -> Any:
        return "good" if read == self.run.corpus.labels[generation.row] else "bad"

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.run)

    def _table(self, task: str) -> Table:
        about = (TASKS.get(task).__doc__ or "").strip().partition("\n")[0].replace("`", "")
        return self._settings_table(f"{task}: {about}", self._entries(task))

    def _settings_table(self, caption: str, entries: list[Entry]) -> Table:
        """A row for each setting, a column for each metric that applies to any of them."""
        names = list(dict.fromkeys(name for entry in entries for name in entry["metrics"]))
        guided = any(entry["cfg"] is not None for entry in entries)
        columns = [
            "documents",
            *(["CFG"] if guided else []),
            *(LABELS.get(name, name.replace("_", " ")) for name in names),
            "n",
        ]
        rows = []
        for entry in entries:
            documents = f"{entry['documents']}{' shuffled' if entry['shuffled'] else ''}"
            measured = [_cell(name, entry["metrics"].get(name)) for name in names]
            rows.append([documents, *([entry["cfg"]] if guided else []), *measured, entry["n"]])
        chosen = {
            row
            for row, entry in enumerate(entries)
            if guided and entry["cfg"] == self.results["chosen_cfg"]
        }
        return Table(columns, rows, caption=caption, highlight=frozenset(chosen))


FEW_CODES, LOW_PSNR = 0.1, 20.0
"""Share of the codes in use, and PSNR in dB, below which the image tokenizer limits whatever is drawn."""


def limit(figures: Entry) -> str:
    """What the image tokenizer limits, in a sentence, by its figures on held-out images; empty if it is good enough."""
    use, psnr = figures["codebook_use"], figures["psnr_held_out"]
    found = []
    if use < FEW_CODES:
        found.append(f"only {use:.0%} of its codes are in use")
    if psnr < LOW_PSNR:
        found.append(f"it gives images back at {psnr:.1f} dB")
    if not found:
        return ""
    return (
        f"This tokenizer limits what is drawn: {' and '.join(found)}. Train it longer "
        "(image_tokenizer_training.steps) or on more images."
    )


def _curves(title: str, log: list[dict[str, float]], names: dict[str, str], unit: str) -> Curves:
    series = []
    for label, name in names.items():
        points = [(record["step"], record[name]) for record in log if name in record]
        if points:
            steps, values = zip(*points, strict=True)
            series.append(Series(label, steps, values))
    return Curves(series, "step", unit, title=title)


def _pictures(images_BHWC: np.ndarray) -> list[Picture]:
    return [Picture(image, height=64) for image in images_BHWC]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(figure: Entry) -> str:
    return f"[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _interval(figure: Entry) -> str:
    return f"{_percent(figure['value'])} {_range(figure)}"


def _cell(name: str, figure: Entry | None) -> str | None:
    if figure is None:
        return None
    if name == "clip_score":
        return f"{figure['value']:.3f}"
    share = f"{100 * figure['value']:.1f}"
    return f"{share} {_range(figure)}" if name == "accuracy" else share
