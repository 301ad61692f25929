"""The example plugin: its objective, task and decoder against hand-worked answers.

Its experiment also runs from end to end, and a renamed copy of the folder is a plugin of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import digit_tars
from hypothesis import given
from hypothesis import strategies as st
from samples import VOCAB, document, documents

from cm3leon.config import SHIPPED
from cm3leon.experiment import load_experiment
from cm3leon.objectives.base import Objective
from cm3leon.plugins.example.objective import EXTRA, rearrange
from cm3leon.registry import DECODERS, OBJECTIVES, TASKS, discover
from cm3leon.run import main
from cm3leon.tokenizers.document import LaidOut, lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, UserError

discover()

EXAMPLE = SHIPPED / "plugins/example"
CODES = 8
WORDS = {"a": 10, "red": 11, "dog": 12, "<eos>": VOCAB.eos, "<break>": VOCAB.brk}
WORDS |= {f"<mask:{n}>": VOCAB.sentinel(n) for n in range(3)} | {
    f"I{n}": VOCAB.image_start + n for n in range(10)
}

laid_out = st.builds(Sample, documents, st.lists(documents, max_size=2).map(tuple)).map(
    lambda s: lay_out(s, VOCAB)
)


def objective(**fields: Any) -> Any:
    return OBJECTIVES.build({"name": "fill_in_the_middle", **fields}, vocab=VOCAB)


def ids(words: str) -> np.ndarray:
    return np.array([WORDS[word] for word in words.split()])


# ---------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize(
    ("suffix_first", "rearranged"),
    [
        (False, "<eos> <mask:0> a red <mask:1> I2 I9 I4 <mask:2> dog <break> I7 <eos>"),
        (True, "<eos> <mask:0> <mask:1> I2 I9 I4 <mask:2> a red dog <break> I7 <eos>"),
    ],
)
def test_the_two_orders_literally(suffix_first: bool, rearranged: str) -> None:
    sample_T = ids("<eos> a red dog <break> I7 I2 I9 I4 <eos>")
    assert (
        rearrange(sample_T, (1, 9), (3, 6), VOCAB, suffix_first=suffix_first).tolist()
        == ids(rearranged).tolist()
    )


@given(laid_out, st.integers(0, 2**32))
def test_every_token_stays_and_retrieved_documents_stay_in_place(
    sample: LaidOut, seed: int
) -> None:
    corrupted = objective(rate=1.0).corrupt(
        sample, np.random.default_rng(seed), len(sample.ids_T) + EXTRA
    )

    # Without the three sentinels, which teach nothing, it is the sample in another order.
    added_T = VOCAB.is_sentinel(corrupted.ids_T)
    assert sorted(corrupted.ids_T[~added_T]) == sorted(sample.ids_T)
    assert corrupted.ids_T[added_T].tolist() == [VOCAB.sentinel(number) for number in range(3)]
    assert ((corrupted.weight_T == 0) == added_T).all()

    # Only the query is rearranged, and the closing <eos> ends it still.
    before = next(segment.start for segment in sample.segments if segment.is_query)
    assert np.array_equal(corrupted.ids_T[:before], sample.ids_T[:before])
    assert corrupted.ids_T[-1] == VOCAB.eos


def test_rates_are_kept_and_every_cut_is_as_likely() -> None:
    sample = lay_out(Sample(document(3, 4)), VOCAB)  # eight tokens between the two <eos>
    drawn = [
        objective(rate=0.6).corrupt(sample, np.random.default_rng(seed), 99).ids_T
        for seed in range(3000)
    ]

    rearranged = [ids_T for ids_T in drawn if len(ids_T) == len(sample.ids_T) + EXTRA]
    assert len(rearranged) / 3000 == pytest.approx(0.6, abs=0.03)

    # A prefix that is empty looks the same in both orders: 17 of the 81 pairs of cuts have one.
    suffix_first = [ids_T for ids_T in rearranged if ids_T[2] == VOCAB.sentinel(1)]
    assert len(suffix_first) / len(rearranged) == pytest.approx(0.5 + 0.5 * 17 / 81, abs=0.04)

    # Where the added sentinels do not fit, the sample stays as it is.
    room = len(sample.ids_T) + EXTRA - 1
    assert (
        objective(rate=1.0).corrupt(sample, np.random.default_rng(0), room).ids_T == sample.ids_T
    ).all()


@given(laid_out, st.integers(1, 12), st.sampled_from([0.0, 1.0]), st.integers(0, 2**32))
def test_pieces_fit_their_room_and_are_the_whole_sample(
    sample: LaidOut, room: int, rate: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    start, seen = 0, []
    while start < len(sample.ids_T):
        piece, end = objective(rate=rate).take(sample, start, room, rng)
        assert start < end
        assert len(piece.ids_T) <= room

        kept_T = piece.ids_T[~VOCAB.is_sentinel(piece.ids_T)]
        assert sorted(kept_T) == sorted(sample.ids_T[start:end])

        start = end
        seen += kept_T.tolist()
    assert len(seen) == len(sample.ids_T)


def test_too_few_sentinels_are_one_sentence() -> None:
    with pytest.raises(UserError, match="sentinels is 2; the objective fill_in_the_middle needs 3"):
        OBJECTIVES.build(
            "fill_in_the_middle", vocab=Vocab(text_size=40, image_size=16, sentinels=2)
        )


# ------------------------------------------------------------------------------------ task, decoder


def test_the_prompt_and_its_answer_are_what_the_objective_trains() -> None:
    task = TASKS.build("infill_middle", vocab=VOCAB, grid=(2, 4))
    query, other = document(3, CODES), document(2, CODES, name="other")

    prompt = task.prompt(query, (other,))
    answer_T = query.segments[1].ids_T[2:6]

    # The objective's own rearrangement of the same documents, cut around codes 2 to 6 of 8.
    sample = lay_out(Sample(query, (other,)), VOCAB)
    first, last = sample.segments[2].start, sample.segments[3].end
    middle = sample.segments[3].start + 2, sample.segments[3].start + 6
    trained_T = rearrange(sample.ids_T, (first, last), middle, VOCAB)

    assert [*prompt.ids_T, *answer_T, prompt.end] == trained_T.tolist()
    assert prompt.length == 4


def test_what_is_given_stays() -> None:
    task = TASKS.build({"name": "infill_middle", "share": 0.25}, vocab=VOCAB, grid=(2, 4))
    query = document(3, CODES)

    # A quarter of the eight codes are replaced: the two in the middle.
    completed = task.complete(query, VOCAB.image_ids(np.array([9, 9])))
    assert VOCAB.image_codes(completed.segments[1].ids_T).tolist() == [0, 1, 2, 9, 9, 5, 6, 7]
    assert task.keeps_given(query, completed)

    # By default it is half of them, more than the task above lets change.
    wider = TASKS.build("infill_middle", vocab=VOCAB, grid=(2, 4))
    spoilt = wider.complete(query, VOCAB.image_ids(np.array([9, 9, 9, 9])))
    assert not task.keeps_given(query, spoilt)

    # At least one code is asked for, however small the share.
    least = TASKS.build({"name": "infill_middle", "share": 0.0}, vocab=VOCAB, grid=(2, 4))
    assert least.prompt(query).length == 1


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.1, 3), (0.4, 2), (0.6, 1), (1.0, 1)])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(min_p: float, kept: int) -> None:
    logits_BV = torch.tensor([[0.6, 0.3, 0.07, 0.03], [0.07, 0.03, 0.6, 0.3]]).log()
    drawn_from_BV = DECODERS.build({"name": "min_p", "min_p": min_p}).logits(logits_BV)
    assert drawn_from_BV.isfinite().sum(dim=1).tolist() == [kept, kept]

    # What is kept keeps its logits.
    finite = drawn_from_BV.isfinite()
    torch.testing.assert_close(drawn_from_BV[finite], logits_BV[finite])


# --------------------------------------------------------------------------------------- experiment


def test_its_experiment_runs_through_every_stage(tmp_path: Path) -> None:
    digit_tars(tmp_path, count=1, per_tar=60)  # in place of all 1,797
    data = f"data={{name: webdataset, path: {tmp_path}}}"
    sizes = {"steps": 2, "warmup_steps": 1, "batch_size": 4, "callback_every": 2}
    short = []
    for section in ("image_tokenizer_training", "retriever_training", "training"):
        short += [f"{section}.{key}={value}" for key, value in sizes.items()]

    run = tmp_path / "run"
    assert main(["experiment=fill_in_the_middle", f"run={run}", data, *short]) == 0

    # Every held-out image was filled in, and none of the given codes changed.
    metrics = json.loads((run / "metrics.json").read_text())
    held_out = metrics["documents"]["held_out"]
    for infilled in metrics["evaluations"]["infill_middle"]:
        assert (infilled["items"], infilled["metrics"]["given_kept"]["value"]) == (held_out, 1.0)
    assert "The middle of an image" in (run / "report.html").read_text()


@pytest.mark.usefixtures("registries")
def test_it_is_loaded_once_where_an_experiment_names_it_too() -> None:
    discover([EXAMPLE, EXAMPLE / "decoder.py"])
    registered = ((OBJECTIVES, "fill_in_the_middle"), (DECODERS, "min_p"))
    assert {registry.origin(name) for registry, name in registered} == {"plugins/example"}


TASK = "evaluations.infill_middle.protocol.task"


@pytest.mark.usefixtures("registries")
def test_a_copy_under_other_names_is_a_plugin_of_its_own(tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(EXAMPLE, copy)
    for file in copy.glob("*.py"):
        file.write_text(file.read_text().replace('.register("', '.register("my_'))

    named = ["objective=my_fill_in_the_middle", "decoder=my_min_p", f"{TASK}=my_infill_middle"]
    experiment = load_experiment("fill_in_the_middle", [f"plugins=[{copy}]", *named])

    asked = experiment.evaluations["infill_middle"].protocol
    assert asked.config.task == "my_infill_middle"  # type: ignore[attr-defined]
    assert OBJECTIVES.origin("my_fill_in_the_middle") == str(copy)
    assert issubclass(OBJECTIVES.get("my_fill_in_the_middle"), Objective)
