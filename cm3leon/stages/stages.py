"""The table of stages, and what each depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cm3leon.config import dump_yaml, to_mapping
from cm3leon.experiment import Experiment
from cm3leon.stages.artifacts import ENCODER, IMAGE_TOKENIZER, Run
from cm3leon.stages.documents import make_documents
from cm3leon.stages.evaluate import make_evaluation
from cm3leon.stages.generate import make_generations
from cm3leon.stages.image_tokenizer import make_image_tokenizer
from cm3leon.stages.neighbours import (
    make_index,
    make_index_part,
    make_neighbours,
    make_neighbours_part,
    make_vectors,
    make_vectors_part,
    neighbours_inputs,
)
from cm3leon.stages.pipeline import (
    Part,
    Stage,
    first_unfinished,
    is_finished,
    number_of,
    run_part,
    run_stages,
)
from cm3leon.stages.pretrain import make_pretraining
from cm3leon.stages.publish import publish
from cm3leon.stages.reconstruction import make_reconstruction
from cm3leon.stages.retrieve import make_retriever
from cm3leon.stages.text_tokenizer import make_text_tokenizer, text_tokenizer_inputs
from cm3leon.stages.tokens import make_tokens, make_tokens_part, tokens_inputs
from cm3leon.stages.training_data import start_fingerprint, training_inputs
from cm3leon.training.config import LAYOUT
from cm3leon.training.device import best_device
from cm3leon.training.distributed import Ranks, find_place, joined
from cm3leon.types import UserError


def _documents_inputs(run: Run) -> Any:
    shards = run.experiment.shards
    inputs = [
        run.section("data", "split"),
        run.source.fingerprint(),
        run.image_tokenizer_shape.image_size,
    ]
    return [*inputs, shards.sample] if shards else inputs


def _inputs(*sections: str, or_borrowed: str) -> Callable[[Run], Any]:
    """Sections of the experiment, and the digest of the file that is taken over instead, if one is."""
    return lambda run: [run.section(*sections), run.borrowed_digest(or_borrowed)]


def _image_tokenizer_inputs(run: Run) -> Any:
    sections = run.section("image_tokenizer", "image_tokenizer_training", "augment", "seed")
    inputs = [sections, run.borrowed_digest(IMAGE_TOKENIZER)]
    if run.image_tokenizer_shape.pretrained:
        return [*inputs, run.image_tokenizer_shape.fingerprint()]
    streamed = run.experiment.shards and run.experiment.shards.tokenizer_images == "corpus"
    return [*inputs, "corpus"] if streamed else inputs


def _pretraining_inputs(run: Run) -> Any:
    sections = run.section(
        "sentinels", "objective", "packing", "model", "training", "decoder", "seed"
    )
    training = {name: value for name, value in sections["training"].items() if name not in LAYOUT}
    return [{**sections, "training": training}, training_inputs(run), start_fingerprint(run)]


FIRST = (
    Stage("documents", 1, _documents_inputs, make_documents),
    Stage("text_tokenizer", 2, text_tokenizer_inputs, make_text_tokenizer),
    Stage("image_tokenizer", 1, _image_tokenizer_inputs, make_image_tokenizer),
    Stage("reconstruction", 1, lambda run: run.section("reconstruction"), make_reconstruction),
    Stage(
        "retriever",
        1,
        _inputs("retriever", "retriever_training", "seed", or_borrowed=ENCODER),
        make_retriever,
        needs=("image_tokenizer",),
    ),
)
# These depend on the tokenizers and the encoder themselves, not on how they came to be: a terabyte of tokens stays
# when the retriever changes.
TOKENS = Stage("tokens", 2, tokens_inputs, make_tokens, make_tokens_part, needs=())
BANK = (
    Stage(
        "vectors",
        1,
        lambda run: run.encoder_header,
        make_vectors,
        make_vectors_part,
        needs=("tokens",),
    ),
    Stage("index", 1, lambda run: run.section("index", "seed"), make_index, make_index_part),
)


def _neighbours(*needs: str) -> Stage[Run]:
    return Stage("neighbours", 1, neighbours_inputs, make_neighbours, make_neighbours_part, needs)


def _last(*needs: str) -> tuple[Stage[Run], ...]:
    return (
        Stage("pretraining", 3, _pretraining_inputs, make_pretraining, needs=needs, dear=True),
        Stage(
            "generation",
            2,
            lambda run: run.section(
                "tasks", "decoder", "text_decoder", "task_decoders", "generation", "seed"
            ),
            make_generations,
        ),
        Stage("evaluation", 2, lambda run: run.section("metrics"), make_evaluation),
    )


def stages_of(experiment: Experiment) -> tuple[Stage[Run], ...]:
    """The stages of an experiment; those between retriever and pretraining are for a corpus in shards."""
    if experiment.shards is None:
        return (*FIRST, *_last("retriever"))
    if experiment.shards.bank:
        return (*FIRST, TOKENS, _neighbours("tokens"), *_last("retriever", "neighbours"))
    return (
        *FIRST,
        TOKENS,
        *BANK,
        _neighbours("tokens", "index"),
        *_last("retriever", "neighbours"),
    )


def run_experiment(experiment: Experiment, folder: Path, *, until: str | None = None) -> None:
    """Brings all stages of an experiment up to date in the run folder, and says where the report is.

    Raises:
        UserError: for a user's mistake that only a stage can see, such as a corpus without documents; on several
            ranks, if the stages before pretraining are not finished.
    """
    until, stages = until or experiment.until, stages_of(experiment)
    place = find_place()
    if place and not _reaches_pretraining(stages, until):
        if place.rank > 0:
            return
        place = None

    def before() -> None:
        # Those of a corpus in shards take long, and are for jobs of one process.
        if experiment.shards is None:
            run_stages(stages, _open(experiment, folder), folder, _say, until="retriever")

    with joined(place, experiment.training.timeout_seconds, before=before) as ranks:
        if ranks.joined:
            _pretrain_together(experiment, folder, ranks)
    if ranks.joined and (not ranks.first or until == "pretraining"):
        return
    run = _open(experiment, folder)
    seconds = run_stages(stages, run, folder, _say, until=until)
    if "evaluation" in seconds:
        publish(run, seconds)
        print(f"report: {folder / 'report.html'}")
    elif "reconstruction" in seconds and len(run.corpus.rows("held_out")):
        print(f"report: {folder / 'reconstruction' / 'report.html'}")


def _reaches_pretraining(stages: Sequence[Stage[Run]], until: str | None) -> bool:
    return until is None or number_of(stages, until, "until") >= number_of(
        stages, "pretraining", "until"
    )


def _pretrain_together(experiment: Experiment, folder: Path, ranks: Ranks) -> None:
    """Brings the pretraining up to date, on all ranks; the first of them looks after the run folder."""
    run = Run(experiment, folder, ranks.device, ranks)
    stages = stages_of(experiment)
    number = number_of(stages, "pretraining", "until")
    before = stages[:number]
    missing, needed = None, False
    if ranks.first:
        _write_config(experiment, folder)
        missing, _ = first_unfinished(before, run, folder)
        needed = not missing and not is_finished(stages[number], before, run, folder)
    missing, needed = ranks.gather((missing, needed))[0]
    if missing:
        raise UserError(
            f"stage {missing} is not finished in {folder} with these settings, and one process makes it: "
            f"run the same command once without torchrun or srun, with until={before[-1].name}"
        )
    if ranks.first:
        run_stages(stages, run, folder, _say, until="pretraining")
    elif needed:
        make_pretraining(run, folder / "pretraining")


def run_stage_part(experiment: Experiment, folder: Path, stage: str, part: Part) -> None:
    """Makes one worker's share of a stage's shards.

    Raises:
        UserError: for an unknown stage, one that cannot be shared out, or one whose turn has not come.
    """
    run_part(stages_of(experiment), stage, Run(experiment, folder, best_device()), folder, part)


def _open(experiment: Experiment, folder: Path) -> Run:
    _write_config(experiment, folder)
    return Run(experiment, folder, best_device())


def _write_config(experiment: Experiment, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(to_mapping(experiment)))


def _say(line: str) -> None:
    print(line, flush=True)
