"""What a person takes from a run: metrics.json and report.html,
written from the finished stages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cm3leon import __version__
from cm3leon.config import dump_yaml, to_mapping
from cm3leon.data.shuffle import shuffled
from cm3leon.evaluation.config import named
from cm3leon.evaluation.report import (
    Code,
    Fact,
    Folded,
    Picture,
    Report,
    Section,
    Strip,
    Table,
    logged,
    write_report,
)
from cm3leon.evaluation.report.answers import aim_fact, evaluation_section
from cm3leon.io import holds_json, read_json_lines, write_json
from cm3leon.provenance import code_digest, commit, environment, processor
from cm3leon.records import KINDS
from cm3leon.secrets import without_secrets
from cm3leon.stages.attribution import attribution
from cm3leon.stages.evaluation import RESULTS, Evaluator, best_row
from cm3leon.stages.run_folder import RunFolder
from cm3leon.terminal import command_line
from cm3leon.training.device import uses_bf16

Entry = dict[str, Any]
"""A part of results.json."""

COLUMNS = 12
"""Images in a strip."""


def closing(run: RunFolder, metrics: Entry) -> list[str]:
    """The last lines of a run: its figures beside their aims, the report,
    and a command to try next."""
    lines = []
    for aim in run.experiment.aims:
        fact = aim_fact(aim, metrics["evaluations"])
        lines.append(f"  {fact.label:<28} {fact.value:>8}   {fact.note}")
    for name, rows in metrics["evaluations"].items():
        for row in rows:
            cut = row.get("truncated", {}).get("value", 0)
            if cut:
                lines.append(
                    f"  {round(cut * row['items'])} of {row['items']} texts of {name}, "
                    f"{row['row']}, were cut at {row['max_tokens']} tokens; raise "
                    "setting.max_tokens of the evaluation"
                )
    psnr = metrics["reconstruction_psnr"]
    lines.append(f"  {'images from their codes':<28} {psnr:>5.1f} dB   PSNR of held-out images")
    lines.append(f"report: {(run.folder / 'report.html').resolve().as_uri()}")

    # The example works as it is written: a caption of this corpus that the model has not seen.
    held_out = run.corpus.rows("held_out")
    if len(held_out):
        prompt = f"prompt={run.corpus.captions[held_out[0]]}"
        words = [f"run={run.folder}", prompt, "n=4"]
        if documents := run.experiment.retriever.config.max_documents:
            words.append(f"retrieve={documents}")
        command = command_line("generate", *words, "out=drawn")
        lines.append(f"next, for example: {command}")
    return lines


def publish(run: RunFolder, seconds: dict[str, float]) -> list[str]:
    """Write `metrics.json` and `report.html` into the run folder; return the lines of `closing`.

    The page loads what it shows, which takes seconds, so both are left as they are if all figures
    are the same. They have the settings, a digest of the code, and the seconds of each stage, so a
    stage made anew changes them.
    """
    results = json.loads((run.folder / "evaluation" / RESULTS).read_text())
    metrics = figures(run, results, seconds)
    file, page = run.folder / "metrics.json", run.folder / "report.html"
    if not (page.is_file() and holds_json(file, metrics)):
        # Without figures, an interrupted page is not taken for a finished one.
        file.unlink(missing_ok=True)
        write_report(page, _Page(run, results, metrics).report())
        write_json(file, metrics)
    return closing(run, metrics)


# ------------------------------------------------------------------------------------- metrics.json
def figures(run: RunFolder, results: Entry, seconds: dict[str, float]) -> Entry:
    """The content of metrics.json. Shares are in [0, 1], intervals 95 %, times in seconds."""
    judge = results["judge"] or {}
    return {
        "judge_accuracy_real": _value(judge.get("real")),
        "judge_accuracy_reconstructed": _value(judge.get("reconstructed")),
        "reconstruction_psnr": results["reconstruction"]["psnr_held_out"],
        "evaluations": results["evaluations"],
        "validation_loss": json.loads((run.folder / "pretraining" / "validation.json").read_text()),
        **{name: results[name] for name in ("documents", "judge", "reconstruction", "retriever")},
        "wall_seconds": {**seconds, "total": sum(seconds.values())},
        "to_run_again": _provenance(run),
    }


def _value(figure: Entry | None) -> float | None:
    return None if figure is None else figure["value"]


def _provenance(run: RunFolder) -> Entry:
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
        "code": code_digest(run.experiment.plugins),
        "python": made_with["python"],
        "packages": {name: installed[name] for name in packages if name in installed},
        "machine": {
            "platform": made_with["system"],
            "device": torch.cuda.get_device_name() if run.device.type == "cuda" else processor(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "bf16": uses_bf16(run.device, run.experiment.training.precision),
        },
        "config": without_secrets(to_mapping(run.experiment)),
    }


# -------------------------------------------------------------------------------------- report.html
class _Page:
    """Composes the report; every image and figure comes from the run folder."""

    def __init__(self, run: RunFolder, results: Entry, metrics: Entry) -> None:
        self.run = run
        self.results = results
        self.metrics = metrics

    def report(self) -> Report:
        counts = self.results["documents"]
        sections = [*self.pictures_first(), self.curves(), self.retrieval(), self.again()]
        return Report(
            title=f"CM3Leon on {self.run.experiment.data.name}",
            subtitle=(
                f"A retrieval-augmented model of text and images with {self._parameters():,} "
                f"parameters, trained on {counts['train']:,} captioned images; judged on "
                f"{counts['held_out']:,} it never saw."
            ),
            facts=self.facts(),
            sections=[section for section in sections if section.blocks],
            footer=attribution([self.run.experiment], self.run.experiment.evaluations.values()),
        )

    def pictures_first(self) -> list[Section]:
        """What there is to look at. Without a judge,
        originals beside their reconstructions come first."""
        rebuilt, made = self.reconstructions(), self.evaluations()
        return [rebuilt, *made] if self.results["judge"] is None else [*made, rebuilt]

    def evaluations(self) -> list[Section]:
        """A section for each evaluation; last come those that only choose values for others."""
        evaluations, found = self.run.experiment.evaluations, self.results["evaluations"]
        evaluator = Evaluator(self.run)
        chosen_from = {config.best_of for config in evaluations.values()}
        sections = []
        for name in sorted(evaluations, key=lambda name: name in chosen_from):
            config, text = evaluations[name], ""
            if config.best_of is not None:
                best = self._best(evaluator, config.best_of)["point"]
                title = evaluations[config.best_of].title
                if best:
                    text = f"With {', '.join(named(best))}, the best row of “{title}”."

            # The row whose values other evaluations take over is marked in the table.
            marked = []
            if name in chosen_from:
                marked = [found[name].index(self._best(evaluator, name))]
            examples = evaluator.shown(name, found)
            sections.append(
                evaluation_section(config, found[name], examples, text=text, best=marked)
            )
        return sections

    def _best(self, evaluator: Evaluator, name: str) -> Mapping[str, Any]:
        """The row of an evaluation whose values other evaluations use."""
        return best_row(self.results["evaluations"][name], evaluator.lowest_is_best(name))

    def facts(self) -> list[Fact]:
        wall = self.metrics["wall_seconds"]["total"]
        facts = [aim_fact(aim, self.results["evaluations"]) for aim in self.run.experiment.aims]
        psnr = self.metrics["reconstruction_psnr"]
        judged = self.metrics["judge_accuracy_reconstructed"]
        note = ""
        if judged is not None:
            note = f"of held-out images; {_percent(judged)} of them read right"
        return [
            *facts,
            Fact("reconstruction from codes", f"{psnr:.1f} dB", note),
            Fact(
                "time of all stages",
                f"{wall / 60:.1f} min",
                f"{self._provenance('machine')['cpu_cores']} CPU cores",
            ),
        ]

    def reconstructions(self) -> Section:
        rows = self._held_out(COLUMNS)
        originals = self.run.corpus.images_BHWC[rows]
        rebuilt = self.run.image_tokenizer.decode(self.run.codes_MN[rows])
        figures = self.results["reconstruction"]
        strip = Strip(
            [("original", _pictures(originals)), ("from codes", _pictures(rebuilt))],
            caption=(
                f"Held-out images. {figures['codes_per_image']} codes an image, "
                f"{figures['codebook_use']:.0%} of {figures['codebook_size']} codes in use "
                f"(perplexity {figures['codebook_perplexity']:.0f}); PSNR "
                f"{figures['psnr_held_out']:.1f} dB (mean over images), on training images "
                f"{figures['psnr_train']:.1f} dB."
            ),
        )
        return Section(
            "Image tokenizer",
            "What an image is to the model: everything it draws is bounded by this. "
            f"{limit(figures)}".strip(),
            [strip],
        )

    def curves(self) -> Section:
        pretraining = self.run.log("pretraining")
        by_modality = {"text": "loss_text", "image": "loss_image"}
        blocks = [
            logged("Validation loss", self._validation(), by_modality, "nats a token"),
            logged("Pretraining loss", pretraining, by_modality, "nats a token"),
            logged(
                "Learning rate", pretraining, {"learning rate": "learning_rate"}, "learning rate"
            ),
            logged("Gradient norm", pretraining, {"gradient norm": "gradient_norm"}, "norm"),
            logged("Image tokenizer", self.run.log("image_tokenizer"), {"PSNR": "psnr_db"}, "dB"),
            logged("Retriever", self.run.log("retriever"), {"loss": "loss"}, "nats"),
        ]

        # The losses stand open, the other curves are folded; what was not logged is left out.
        shown = [block for block in blocks[:2] if block.series]
        folded = [block for block in blocks[2:] if block.series]

        # A corpus without texts, or without images, has no loss of them.
        loss = self.metrics["validation_loss"]
        said = []
        for modality, name in by_modality.items():
            if name in loss:
                said.append(f"{modality} {loss[name]:.3f}")
        return Section(
            "Training",
            "Validation loss after training, without documents, in nats a token: "
            f"{', '.join(said)}.",
            [*shown, Folded("More curves", folded)],
        )

    def _validation(self) -> list[dict[str, float]]:
        """Records of the validation during pretraining; [] for a run that kept none."""
        file = self.run.folder / "pretraining" / "validation.jsonl"
        return read_json_lines(file, {"step": int}) if file.is_file() else []

    def retrieval(self) -> Section:
        figures = self.results["retriever"]
        rows = [("candidates looked at", f"{figures['candidates_looked_at']:,}")]
        for rule, share in figures["share_rejected"].items():
            rows.append((f"rejected: {rule.replace('_', ' ')}", f"{share:.1%}"))
        rows.append(("neighbours a training document", f"{figures['neighbours_per_document']:.2f}"))
        if figures.get("same_label") is not None:
            rows.append(("neighbours of the same class", f"{figures['same_label']:.1%}"))
        if "nearest_neighbour_vote" in figures:
            vote = figures["nearest_neighbour_vote"]
            rows.append(("class of the nearest document, read as the image's", _interval(vote)))
        return Section(
            "Retrieval",
            "The memory bank is the training documents; a query never retrieves itself, and "
            "held-out documents are not in it.",
            [Table(("", ""), rows)],
        )

    def again(self) -> Section:
        rows = []
        for name, seconds in self.metrics["wall_seconds"].items():
            rows.append((name, f"{seconds:.1f}"))
        table = Table(("stage", "seconds"), rows)

        # The configuration is long, so it is folded away by itself.
        provenance = self._provenance()
        lines = {key: value for key, value in provenance.items() if key != "config"}
        return Section(
            "To run it again",
            "Everything below is in metrics.json too; config.yaml beside this file is the resolved "
            "experiment.",
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

    def _held_out(self, count: int) -> list[int]:
        rows = self.run.corpus.rows("held_out")
        chosen = []
        for index in range(min(count, len(rows))):
            chosen.append(int(rows[shuffled(0, index, len(rows))]))
        return chosen


FEW_CODES = 0.1
"""Share of the codes in use below which the image tokenizer limits whatever is drawn."""
LOW_PSNR = 20.0
"""PSNR in dB below which it does."""


def limit(figures: Entry) -> str:
    """How the image tokenizer limits the model, in a sentence, by its figures on held-out images;
    "" if it is good enough."""
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


def _pictures(images_BHWC: np.ndarray) -> list[Picture]:
    return [Picture(image, height=64) for image in images_BHWC]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(figure: Entry) -> str:
    return f"[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _interval(figure: Entry) -> str:
    return f"{_percent(figure['value'])} {_range(figure)}"
