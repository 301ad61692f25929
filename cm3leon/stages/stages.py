"""The table of stages, and what each depends on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from cm3leon.config import dump_yaml, recorded_settings, result_settings
from cm3leon.digests import path_digest, remembered
from cm3leon.experiment import Experiment
from cm3leon.io import write_text
from cm3leon.paths import make_folder
from cm3leon.registry import PROTOCOLS, RETRIEVERS
from cm3leon.retrievers.base import StrategyConfig
from cm3leon.stages.artifacts import ENCODER, GEOMETRY, IMAGE_TOKENIZER, TEXT_TOKENIZER, Run
from cm3leon.stages.checks import check_settings
from cm3leon.stages.documents import make_documents
from cm3leon.stages.evaluation import RESULTS, make_evaluation
from cm3leon.stages.folders import check_run_folder
from cm3leon.stages.image_tokenizer import make_image_tokenizer
from cm3leon.stages.neighbours import (
    STRATEGY,
    bank_fingerprint,
    make_index,
    make_index_part,
    make_neighbours,
    make_neighbours_part,
    make_vectors,
    make_vectors_part,
)
from cm3leon.stages.pipeline import (
    check_unasked,
    first_unfinished,
    is_finished,
    run_part,
    run_stages,
)
from cm3leon.stages.pretrain import make_pretraining
from cm3leon.stages.publish import publish
from cm3leon.stages.reconstruction import FIGURES, make_reconstruction
from cm3leon.stages.retrieve import make_retriever
from cm3leon.stages.sharing import is_shared_out
from cm3leon.stages.stage import Part, Stage, check_redo, number_of
from cm3leon.stages.text_tokenizer import make_text_tokenizer, text_tokenizer_inputs
from cm3leon.stages.tokens import longest_document, make_tokens, make_tokens_part
from cm3leon.stages.training_data import mixed_fingerprints, start_digest
from cm3leon.training.config import training_settings
from cm3leon.training.device import best_device
from cm3leon.training.distributed import Ranks, current_rank, joined
from cm3leon.types import UserError

CONFIG = "config.yaml"
"""The settings that were last accepted; of what is finished, each stage's own record is the truth."""
DIGESTS = "digests.json"
"""Checksums of what the run was made from, so that a second start need not read it again."""

# ------------------------------------------------------------------------------------------------ what each depends on
#
# Each of these functions gives all that the result of a stage depends on besides other stages, and nothing else: of
# files, what they hold, and no setting that changes no result. Whatever they leave out may change while a run goes on.


def _corpus_inputs(run: Run) -> dict[str, Any]:
    """The documents and their splits: how the source reads them, and what it holds."""
    return {
        "data": result_settings(run.experiment.data),
        "corpus": run.source.fingerprint(),
        **run.depends_on("split"),
        "image_size": run.image_tokenizer_shape.image_size,
        **_sample_inputs(run),
    }


def _sample_inputs(run: Run) -> dict[str, Any]:
    """The size of the sample; the seed says from which parts it is, where they are more than it has."""
    shards = run.shards
    drawn = len(run.source.parts()) > shards.sample
    return {"shards": {"sample": shards.sample}, **(run.depends_on("seed") if drawn else {})}


def _image_tokenizer_inputs(run: Run) -> dict[str, Any]:
    experiment = run.experiment
    # Those of the discriminator and so on shape the tokenizer only if it is trained here.
    inputs: dict[str, Any] = {"weights": run.borrowed_digest(IMAGE_TOKENIZER)}
    if _trains_image_tokenizer(run):
        inputs |= run.depends_on("image_tokenizer", "seed")
        inputs["image_tokenizer_training"] = training_settings(experiment.image_tokenizer_training)
        inputs["streamed"] = run.shards.tokenizer_images == "corpus"
    else:
        inputs["image_tokenizer"] = result_settings(experiment.image_tokenizer)
        if run.borrowed is None:
            inputs["weights"] = run.image_tokenizer_shape.fingerprint()
    return inputs | _varied_inputs(run)


def _varied_inputs(run: Run) -> dict[str, Any]:
    """The varied versions of the training images, which the seed draws."""
    if run.experiment.augment.versions:
        return {**run.depends_on("augment", "seed"), "drawn_for": "document"}
    return {"augment": {"versions": 0}}


def _trains_image_tokenizer(run: Run) -> bool:
    return run.borrowed is None and not run.image_tokenizer_shape.pretrained


def _retriever_inputs(run: Run) -> dict[str, Any]:
    experiment = run.experiment
    inputs: dict[str, Any] = {"weights": run.borrowed_digest(ENCODER), **run.depends_on("seed")}
    inputs["retriever"] = _encoder_settings(run, path_digest)
    if _trains_encoder(run):
        assert experiment.retriever_training is not None
        inputs["retriever_training"] = training_settings(experiment.retriever_training)
        inputs |= _varied_inputs(run)
    return inputs


def _trains_encoder(run: Run) -> bool:
    retriever = RETRIEVERS.get(run.experiment.retriever.name)
    return (
        retriever.trained
        and run.experiment.retriever_training is not None
        and not run.borrows_encoder
    )


def _encoder_settings(run: Run, held: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """The settings of the retriever that shape its encoder, not the strategy."""
    strategy = {field.name for field in fields(StrategyConfig)}
    settings = result_settings(run.experiment.retriever, held)
    return {name: value for name, value in settings.items() if name not in strategy}


def _neighbour_settings(run: Run) -> dict[str, Any]:
    """The settings that find the neighbours; how many of them a sample gets is drawn in training."""
    settings = result_settings(run.experiment.retriever)
    return {name: value for name, value in settings.items() if name not in DRAWN_IN_TRAINING}


DRAWN_IN_TRAINING = ("max_documents", "random_count")


def _text_tokenizer_settings(run: Run) -> dict[str, Any]:
    return run.recorded("text_tokenizer", "text_data", "split", "seed", "shards")


def _tokens_inputs(run: Run) -> dict[str, Any]:
    sizes = run.vocab.text_size, run.vocab.image_size, run.vocab.sentinels
    inputs = {**_corpus_inputs(run), "vocabulary": sizes, "longest": longest_document(run)}
    # Named only where there are some, so that tokens of a corpus that has neither are what they were.
    if run.experiment.augment.versions:
        inputs |= _varied_inputs(run)
    if run.source.class_names:
        inputs["labels"] = True
    return inputs


def _index_inputs(run: Run) -> dict[str, Any]:
    return {**run.depends_on("index", "seed"), "pairs_only": run.retrieves_pairs_only}


def _neighbours_inputs(run: Run) -> dict[str, Any]:
    settings = _neighbour_settings(run)
    # Where training draws none, none are looked for.
    settings["max_documents"] = min(1, run.experiment.retriever.config.max_documents)
    return {"retriever": settings, **run.depends_on("seed"), "bank": bank_fingerprint(run)}


def _pretraining_inputs(run: Run) -> dict[str, Any]:
    retriever = run.section("retriever")["retriever"]
    return {
        **run.depends_on("sentinels", "objective", "packing", "model", "seed"),
        "training": training_settings(run.experiment.training, run.seq_len),
        "retriever": {name: retriever.get(name) for name in DRAWN_IN_TRAINING},
        "mix": mixed_fingerprints(run),
        "start": start_digest(run),
    }


EVALUATED = ("evaluations", "decoder", "text_decoder", "seed")


def _evaluation_inputs(run: Run) -> dict[str, Any]:
    protocols = {
        name: PROTOCOLS.build(evaluation.protocol).fingerprint()
        for name, evaluation in run.experiment.evaluations.items()
    }
    return {**run.depends_on(*EVALUATED), "protocols": protocols}


# ------------------------------------------------------------------------------------------------ the table


def _recorded(*sections: str) -> Callable[[Run], dict[str, Any]]:
    return lambda run: run.recorded(*sections)


def _depends_on(*sections: str) -> Callable[[Run], dict[str, Any]]:
    return lambda run: run.depends_on(*sections)


SHARDS = ("*.arrow", "index.json", "plan.json")


def _first(experiment: Experiment) -> tuple[Stage[Run], ...]:
    text_of_its_own = experiment.text_data is not None or experiment.shards.tokenizers is not None
    return (
        Stage(
            "documents",
            3,
            _corpus_inputs,
            make_documents,
            needs=(),
            settings=_recorded("data", "split", "shards"),
            results=("documents.jsonl", "images.npy"),
        ),
        Stage(
            "text_tokenizer",
            3,
            text_tokenizer_inputs,
            make_text_tokenizer,
            needs=() if text_of_its_own else ("documents",),
            settings=_text_tokenizer_settings,
            results=("tokenizer.json",),
        ),
        Stage(
            "image_tokenizer",
            2,
            _image_tokenizer_inputs,
            make_image_tokenizer,
            needs=("documents",),
            settings=_recorded(
                "image_tokenizer", "image_tokenizer_training", "augment", "seed", "shards"
            ),
            results=("*.safetensors", "*.npy", "config.json", GEOMETRY),
            expensive=True,
            trains=_trains_image_tokenizer,
        ),
        Stage(
            "reconstruction",
            2,
            _depends_on("reconstruction"),
            make_reconstruction,
            needs=("documents", "image_tokenizer"),
            settings=_recorded("reconstruction"),
            results=(FIGURES,),
        ),
        Stage(
            "retriever",
            3,
            _retriever_inputs,
            make_retriever,
            needs=("documents",),
            settings=_recorded("retriever", "retriever_training", "augment", "seed", "shards"),
            expensive=True,
            trains=_trains_encoder,
            results=("*.safetensors",),
        ),
    )


# These depend on the tokenizers and the encoder themselves, not on how they came to be: a terabyte of tokens stays
# when the retriever changes.
TOKENS = Stage(
    "tokens",
    4,
    _tokens_inputs,
    make_tokens,
    make_tokens_part,
    needs=(),
    files=(TEXT_TOKENIZER, IMAGE_TOKENIZER),
    settings=_recorded("data", "split", "seed", "shards", "sentinels", "augment"),
    results=SHARDS,
    expensive=True,
)
BANK = (
    Stage(
        "vectors",
        2,
        lambda run: {"retriever": _encoder_settings(run)},
        make_vectors,
        make_vectors_part,
        needs=("tokens",),
        files=(ENCODER,),
        results=SHARDS,
        expensive=True,
    ),
    Stage(
        "index",
        3,
        _index_inputs,
        make_index,
        make_index_part,
        needs=("vectors",),
        settings=_recorded("index", "retriever", "seed"),
        expensive=True,
    ),
)


def _neighbours(*needs: str) -> Stage[Run]:
    return Stage(
        "neighbours",
        3,
        _neighbours_inputs,
        make_neighbours,
        make_neighbours_part,
        needs=needs,
        files=(ENCODER,),
        settings=_recorded("retriever", "seed", "shards"),
        results=(*SHARDS, STRATEGY),
        expensive=True,
    )


def _last() -> tuple[Stage[Run], ...]:
    return (
        Stage(
            "pretraining",
            4,
            _pretraining_inputs,
            make_pretraining,
            needs=("neighbours",),
            files=(TEXT_TOKENIZER, IMAGE_TOKENIZER),
            settings=_recorded(
                "sentinels",
                "objective",
                "packing",
                "model",
                "training",
                "retriever",
                "seed",
                "shards",
            ),
            results=("*.safetensors", "config.json"),
            expensive=True,
            trains=lambda run: True,
        ),
        Stage(
            "evaluation",
            6,
            _evaluation_inputs,
            make_evaluation,
            needs=("pretraining",),
            settings=_recorded(*EVALUATED),
            results=(RESULTS,),
        ),
    )


def stages_of(experiment: Experiment) -> tuple[Stage[Run], ...]:
    """The stages of an experiment; one that takes another run's memory bank makes none of its own."""
    first, last = _first(experiment), _last()
    if experiment.shards.bank:
        return (*first, TOKENS, _neighbours("tokens"), *last)
    return (*first, TOKENS, *BANK, _neighbours("tokens", "index"), *last)


# ------------------------------------------------------------------------------------------------ running


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    until: str | None = None,
    redo: Collection[str] = (),
    accepted: Callable[[], None] = lambda: None,
) -> None:
    """Bring all stages of an experiment up to date in the run folder, and say where the report is.

    Args:
        redo: stages that may be made anew although they are expensive, with all that depend on them.
        accepted: called before anything is made, when nothing is refused; on several ranks, on the first.

    Raises:
        UserError: for a user's mistake that only a stage can see, such as a corpus without documents; for settings
            that would make an expensive stage anew unasked; on several ranks, if the stages before pretraining are not
            finished.
    """
    until, stages = until or experiment.until, stages_of(experiment)
    check_redo(stages, redo)
    check_run_folder(folder)
    check_before_stages(experiment, folder, until=until)
    rank = current_rank()
    if rank and not _reaches(stages, "pretraining", until):
        if rank.number > 0:
            return
        rank = None

    def bring(run: Run, last: str | None) -> dict[str, float]:
        make_folder(folder, "run")
        with remembered(folder / DIGESTS) as keep_digests:

            def begin() -> None:
                write_config(experiment, folder)
                keep_digests()
                accepted()

            return run_stages(stages, run, folder, _say, until=last, redo=redo, accepted=begin)

    def before() -> None:
        # Several processes share the parts of a larger corpus, and ranks are not to wait for them.
        if not is_shared_out(experiment):
            bring(Run(experiment, folder, best_device()), "neighbours")

    with joined(rank, experiment.training.timeout_seconds, before=before) as ranks:
        if ranks.joined:
            _pretrain_together(experiment, folder, ranks, redo, bring)
    if ranks.joined and (not ranks.first or until == "pretraining"):
        return
    run = Run(experiment, folder, best_device())
    seconds = bring(run, until)
    if "evaluation" in seconds:
        print("\n".join(publish(run, seconds)))
    elif "reconstruction" in seconds and len(run.corpus.rows("held_out")):
        print(f"report: {(folder / 'reconstruction' / 'report.html').resolve().as_uri()}")


def check_before_stages(
    experiment: Experiment, folder: Path, *, until: str | None = None, found: Sequence[str] = ()
) -> None:
    """`check_settings` for the stages of an experiment up to `until`, or to the experiment's own last one.

    Raises:
        UserError: naming all mistakes, those in `found` too.
    """
    until, stages = until or experiment.until, stages_of(experiment)
    check_settings(
        experiment,
        folder,
        trains=_reaches(stages, "pretraining", until),
        asks=_reaches(stages, "evaluation", until),
        found=found,
    )


def _reaches(stages: Sequence[Stage[Run]], name: str, until: str | None) -> bool:
    return until is None or number_of(stages, until, "until") >= number_of(stages, name, "until")


def _pretrain_together(
    experiment: Experiment,
    folder: Path,
    ranks: Ranks,
    redo: Collection[str],
    bring: Callable[[Run, str | None], dict[str, float]],
) -> None:
    """Bring the pretraining up to date, on all ranks; the first of them looks after the run folder."""
    run = Run(experiment, folder, ranks.device, ranks)
    stages = stages_of(experiment)
    number = number_of(stages, "pretraining", "until")
    before = stages[:number]
    missing, needed, refusal = None, False, ""
    if ranks.first:
        make_folder(folder, "run")
        with remembered(folder / DIGESTS):
            missing, _ = first_unfinished(before, run, folder)
            needed = not missing and not is_finished(stages[number], before, run, folder)
            try:
                check_unasked(stages[: number + 1], run, folder, redo)
            except UserError as error:  # which all ranks end with: none is to wait for the first
                refusal = str(error)
    missing, needed, refusal = ranks.gather((missing, needed, refusal))[0]
    if refusal:
        raise UserError(refusal)
    if missing:
        raise UserError(
            f"stage {missing} is not finished in {folder} with these settings, and one process makes it: "
            f"run the same command once without torchrun or srun, with until={before[-1].name}"
        )
    if ranks.first:
        bring(run, "pretraining")
    elif needed:
        make_pretraining(run, folder / "pretraining")


def run_stage_part(
    experiment: Experiment, folder: Path, stage: str, part: Part, *, redo: Collection[str] = ()
) -> None:
    """Make one worker's share of a stage's shards.

    Raises:
        UserError: for an unknown stage, one that cannot be shared out, or one whose turn has not come.
    """
    run = Run(experiment, folder, best_device())
    with remembered(folder / DIGESTS) if folder.is_dir() else nullcontext():
        run_part(stages_of(experiment), stage, run, folder, part, redo=redo)


def write_config(experiment: Experiment, folder: Path) -> None:
    """Write the settings of an experiment beside its stages, whole or not at all, with absolute paths."""
    write_text(folder / CONFIG, dump_yaml(recorded_settings(experiment)))


def _say(line: str) -> None:
    print(line, flush=True)
