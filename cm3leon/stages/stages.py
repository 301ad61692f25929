"""The table of stages, and what each depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cm3leon.config import dump_yaml, to_mapping
from cm3leon.experiment import Experiment
from cm3leon.stages.artifacts import Run
from cm3leon.stages.evaluate import make_evaluation
from cm3leon.stages.generate import make_generations
from cm3leon.stages.pipeline import Stage, run_stages
from cm3leon.stages.pretrain import make_pretraining
from cm3leon.stages.publish import publish
from cm3leon.stages.retrieve import make_retriever
from cm3leon.stages.tokenize import make_documents, make_image_tokenizer, make_text_tokenizer
from cm3leon.training.device import best_device


def _documents_inputs(run: Run) -> Any:
    return [run.section("data", "split"), run.source.fingerprint(), run.new_image_tokenizer().image_size]


STAGES = (
    Stage("documents", 1, _documents_inputs, make_documents),
    Stage("text_tokenizer", 1, lambda run: run.section("text_tokenizer"), make_text_tokenizer),
    Stage(
        "image_tokenizer",
        1,
        lambda run: run.section("image_tokenizer", "image_tokenizer_training", "augment", "seed"),
        make_image_tokenizer,
    ),
    Stage("retriever", 1, lambda run: run.section("retriever", "retriever_training", "seed"), make_retriever),
    Stage(
        "pretraining",
        1,
        lambda run: run.section("sentinels", "objective", "model", "training", "decoder"),
        make_pretraining,
    ),
    Stage(
        "generation",
        1,
        lambda run: run.section("tasks", "decoder", "text_decoder", "task_decoders", "generation"),
        make_generations,
    ),
    Stage("evaluation", 2, lambda run: run.section("metrics"), make_evaluation),
)


def run_experiment(experiment: Experiment, folder: Path) -> None:
    """Brings all stages of an experiment up to date in the run folder, and says where the report is.

    Raises:
        UserError: for a user's mistake that only a stage can see, such as a corpus without documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(to_mapping(experiment)))
    run = Run(experiment, folder, best_device())
    seconds = run_stages(STAGES, run, folder, lambda line: print(line, flush=True))
    publish(run, seconds)
    print(f"report: {folder / 'report.html'}")
