"""The command `show`: what it prints and draws is what the stream of training batches holds."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from corpora import digit_tars, encoded, picture, write_lines
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from samples import VOCAB, unrotate
from test_report import Page

from cm3leon.commands.sample_words import facts_of, printed
from cm3leon.commands.traced_sample import _indices, moved_spans, shown_sample
from cm3leon.evaluation.report.sample import ShownSample, render_sample, visible
from cm3leon.experiment import load_experiment
from cm3leon.locks import locked
from cm3leon.objectives.block_stream import BlockStream
from cm3leon.objectives.cm3 import rotate
from cm3leon.retrievers.neighbours import draw
from cm3leon.run import main
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.running import run_experiment
from cm3leon.stages.tokens import sampled_rows
from cm3leon.stages.training_data import training_samples
from cm3leon.types import Batch

HOSTILE = (
    "</p></style></svg>\"'><script>alert(1)</script>"
    "<img src=http://evil.test/x onerror=alert(1)> &amp; \x1b[31m<break>"
)
CAPTIONS = (HOSTILE, "two\nlines", "naïve café 日本", "a red dog", "  spaces  ")
SETTINGS = (
    "text_tokenizer.vocab_size=290",
    "image_tokenizer.image_size=32",
    "image_tokenizer.codebook_size=64",
    "image_tokenizer.channels=8",
    "retriever.encoder.image_size=32",
    "retriever.encoder.context_length=16",
    "retriever.threshold=2",
    "retriever.random_count=false",
    "objective.mean_spans=2",
    "model.layers=1",
    "model.width=64",
    "model.seq_len=384",
    *(
        f"{section}.{key}={value}"
        for section in ("image_tokenizer_training", "retriever_training")
        for key, value in (
            ("steps", 2),
            ("warmup_steps", 1),
            ("log_every", 1),
            ("checkpoint_every", 2),
            ("batch_size", 4),
        )
    ),
    "training.batch_size=4",
    "training.warmup_steps=1",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a command line for a run of 40 documents, finished up to the neighbours.

    Its documents are in one shard, and their images have varied versions.
    """
    place = tmp_path_factory.mktemp("images")
    records = []
    for number in range(40):
        (place / f"{number}.png").write_bytes(encoded(picture(number)))
        records.append({"file": f"{number}.png", "caption": CAPTIONS[number % len(CAPTIONS)]})
    write_lines(place / "captions.jsonl", records)

    source = f'data={{"name": "folder", "path": "{place}"}}'
    run = f"run={tmp_path_factory.mktemp('run')}"
    return made(["experiment=digits", source, run, *SETTINGS, "augment.versions=3"], "neighbours")


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words for a run of 50 documents in two shards, without varied versions."""
    place = tmp_path_factory.mktemp("shards")
    digit_tars(place, 2, 25)
    split = ("split.validation=0.1", "split.held_out=0.1")
    return made(
        ["experiment=corpus", f"data.path={place}/*.tar", f"run={place}/run", *SETTINGS, *split],
        "neighbours",
    )


@pytest.fixture(params=["small", "in_shards"])
def words(request: pytest.FixtureRequest) -> list[str]:
    return request.getfixturevalue(request.param)


def made(words: list[str], until: str) -> list[str]:
    """Run a command line up to a stage, and return its words."""
    assert main([*words, f"until={until}"]) == 0
    return words


def opened(words: list[str], *more: str) -> RunFolder:
    """Open the run of a command line, with other settings where some are given."""
    named = dict(word.split("=", 1) for word in words if word.startswith(("experiment=", "run=")))
    overrides = [word for word in words if word.split("=")[0] not in named]
    return RunFolder(
        load_experiment(named["experiment"], [*overrides, *more]),
        Path(named["run"]),
        torch.device("cpu"),
    )


def batches(run: RunFolder, count: int) -> list[Batch]:
    """The first batches of the stream, made as pretraining makes it."""
    stream = BlockStream(
        training_samples(run),
        run.objective,
        run.experiment.packing,
        seq_len=run.seq_len,
        batch_size=run.experiment.training.batch_size,
        seed=run.experiment.seed,
        device=run.device,
    )
    return [stream.next() for _ in range(count)]


def rows_of(page: str) -> list[list[str]]:
    """The cells of each row of the tables of tokens."""
    tables = "".join(re.findall(r'<table class="tokens">.*?</table>', page, re.DOTALL))
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", tables)]


@pytest.mark.parametrize(
    "packing",
    [
        (),
        ("packing.method=stream", "model.seq_len=100"),
        ("packing.method=together", "model.seq_len=120"),
    ],
    ids=["whole", "stream", "together"],
)
def test_what_is_shown_is_what_training_sees(words: list[str], packing: tuple[str, ...]) -> None:
    """Ids, targets, weights, samples and positions of the blocks are those of the batches.

    The samples are in the first epoch, at its end, and in the second one; one batch has four.
    """
    run = opened(words, *packing)
    samples = training_samples(run)
    stream: list[Batch] = batches(run, 25)
    spans = cut = retrieved = 0
    for position in (0, 1, 5, 9, 14, samples.epoch - 1, samples.epoch + 2):
        shown = shown_sample(run, samples, position)
        page = render_sample(shown, facts_of(run, samples, position, shown))
        Page(page)

        rows, at = rows_of(page), 0
        joined = []
        for piece in shown.pieces:
            batch, lane = stream[piece.step - 1], position % 4
            assert piece.lane == lane
            for name in ("ids", "target", "weight", "sample", "position"):
                in_batch_T = getattr(batch, f"{name}_BT")[lane].numpy()
                assert np.array_equal(getattr(piece.block, f"{name}_T"), in_batch_T)

            # A row of the table says a token's index in the block, id, weight, sample, position.
            columns = ("ids", "sample", "position")
            for t in range(piece.first, piece.first + len(piece.ids_T)):
                row, at = rows[at], at + 1
                in_batch = [int(getattr(batch, f"{name}_BT")[lane, t]) for name in columns]
                assert [int(row[k]) for k in (0, 1, 5, 6)] == [t, *in_batch]
                assert float(row[4]) == pytest.approx(float(batch.weight_BT[lane, t]))

            of_samples = sum(companion.tokens for companion in piece.samples)
            assert of_samples == (batch.sample_BT[lane] >= 0).sum()
            joined.append(unrotate(piece.ids_T, run.vocab))
            assert piece.spans is not None
            spans += len(piece.spans)

        # The table has no other rows; rotated back, the pieces are the whole sample.
        assert at == len(rows)
        assert np.concatenate(joined).tolist() == shown.laid_out.ids_T.tolist()
        cut += len(shown.pieces) > 1
        retrieved += len(shown.documents) > 1

    # Spans are moved and documents found among these samples; only a stream cuts samples.
    assert spans > 3
    assert retrieved > 3
    assert bool(cut) == ("packing.method=stream" in packing)


def test_the_sample_is_printed_as_the_figures_write_it(in_shards: list[str]) -> None:
    run = opened(in_shards, "retriever.max_documents=0")
    samples = training_samples(run)
    position = next(p for p in range(50) if shown_sample(run, samples, p).spans)
    shown = shown_sample(run, samples, position)
    lines = printed(shown, facts_of(run, samples, position, shown), width=10_000)

    # Without neighbours, the sample is a caption and the 16 codes of its image.
    ids_T = shown.laid_out.ids_T
    caption = run.text_tokenizer.decode(ids_T[1 : ids_T.tolist().index(run.vocab.brk)])
    codes = " ".join(map(str, run.vocab.image_codes(ids_T[-17:-1])))
    before = lines[lines.index("laid out") + 1]
    assert before == f"  <eos> {caption} <break> [image 16 codes: {codes}] <eos>"
    assert caption.startswith("the digit ")

    # Rotated, one span of it is masked and stands at the end.
    after = lines[-1].split()
    assert after[0] == "(<eos>)"
    assert after.count("(<mask:0>)") == 2
    assert after[-1] == "<end_of_span>"
    keys = [line[:12].strip() for line in lines]
    assert "<mask:0>" in keys


def test_documents_that_do_not_fit_are_named(in_shards: list[str]) -> None:
    run = opened(in_shards, "model.seq_len=48")
    samples = training_samples(run)
    shown = shown_sample(run, samples, 2)
    all_shown = shown_sample(opened(in_shards), samples, 2)

    assert shown.left_out == [all_shown.documents[0].id]
    assert [d.id for d in shown.documents] == [d.id for d in all_shown.documents[1:]]
    assert [d.note for d in shown.documents] == [d.note for d in all_shown.documents[1:]]

    left_out = ("left out", f"{shown.left_out[0]}, as it does not fit the block")
    assert left_out in facts_of(run, samples, 2, shown)


def test_long_runs_of_codes_are_abbreviated_and_folded(in_shards: list[str]) -> None:
    run = opened(in_shards)
    samples = training_samples(run)
    shown = shown_sample(run, samples, 0)
    ids_T = run.vocab.image_ids(np.arange(40))
    assert shown.names.run(ids_T) == "0 1 2 3 4 5 6 7 ... 37 38 39"
    assert render_sample(shown, []).count("<details>") >= 1


def test_the_page_fits_a_phone(in_shards: list[str]) -> None:
    """What is wider than a phone stands in a box that scrolls by itself, or breaks into lines."""
    run = opened(in_shards)
    page = render_sample(shown_sample(run, training_samples(run), 0), [("a", "b")])
    views = [each for each in Page(page).all("meta") if each.get("name") == "viewport"]
    assert views == [{"name": "viewport", "content": "width=device-width, initial-scale=1"}]

    # What has a width of its own: the tables, and the drawing of the rotation.
    boxes = re.findall(
        r"<(figure|div) class=\"([^\"]*\bscroll\b[^\"]*)\"[^>]*>(.*?)</\1>", page, re.DOTALL
    )
    scrolling = "".join(inner for _, _, inner in boxes)
    assert page.count("<table") == scrolling.count("<table")
    assert page.count('class="rotation"') == scrolling.count('class="rotation"') >= 1

    # The pictures of an image stand side by side, on a phone below one another.
    phone = page[page.rindex("@media (max-width: 40rem)") :]
    assert ".pictures { flex-wrap: wrap; }" in phone
    assert re.search(r"\.box\.image \{ width: auto; min-width: 0; \}", phone)


def test_text_is_trusted_with_nothing(small: list[str], tmp_path: Path, capsys: Any) -> None:
    run = opened(small)
    samples = training_samples(run)
    hostile = []
    for position in range(samples.epoch):
        if HOSTILE in text_of(run, shown_sample(run, samples, position)):
            hostile.append(position)

    # On the terminal, control characters and what looks like a special token are escaped.
    assert main(["show", *small, f"sample={hostile[0]}", f"out={tmp_path}/x.html"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert r"\x1b" in said
    assert r"\<break>" in "".join(said.split())

    # On the page, the caption is text: it brings no element, no attribute and no address.
    page = Page((tmp_path / "x.html").read_text())
    assert not page.all("script")
    sources = [image["src"] for image in page.all("img") if image["src"]]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    attributes = [name for _, of_element in page.elements for name in of_element]
    assert not any(name.startswith("on") for name in attributes)
    assert "<script>alert(1)</script>" in page.words
    assert not re.search(r"https?://(?!evil)", (tmp_path / "x.html").read_text())


def text_of(run: RunFolder, shown: ShownSample) -> str:
    """The caption of the sample itself, which stands behind those that were retrieved for it."""
    query = shown.documents[-1].segments[0].span
    return run.text_tokenizer.decode(shown.laid_out.ids_T[query.start : query.end])


def test_what_cannot_be_seen_is_escaped(small: list[str]) -> None:
    assert visible("a\n\x1b[1m\u202eb é") == "a\\n\\x1b[1m\\u202eb é"

    # The bytes of a token are written so that the text can be had back.
    run = opened(small)
    names = shown_sample(run, training_samples(run), 0).names
    text = "日本 é <b>\n"
    pieces = [names.token(int(id_)) for id_ in run.text_tokenizer.encode(text)]
    spelled = "".join(pieces).replace("␣", " ").replace("\\n", "\n")
    by_byte = re.compile(rb"\\x(..)")
    unescaped = by_byte.sub(lambda match: bytes.fromhex(match[1].decode()), spelled.encode())
    assert unescaped.decode() == text


def test_images_of_the_sample_stand_beside_their_originals(small: list[str]) -> None:
    run = opened(small)
    samples = training_samples(run)
    varied = 0
    for position in range(8):
        for document in shown_sample(run, samples, position).documents:
            # The image as its codes draw it, the variation that they were made of, the original.
            (decoded, *encoded_, original) = document.segments[1].pictures
            row = run.corpus.ids.index(document.id)
            assert decoded[0] == "from its codes"
            assert np.array_equal(original[1], run.corpus.images_BHWC[row])

            for label, pixels_HWC in encoded_:
                varied += 1
                assert label.startswith("encoded: variation ")
                version = int(label.removeprefix("encoded: variation ").split()[0])

                tokens = run.tokens.document(sampled_rows(run)[document.id], version)
                codes_N = run.tokenizer.codes(tokens)
                assert np.array_equal(run.image_tokenizer.decode(codes_N[None])[0], decoded[1])

                # Encoded alone instead of in a batch, a code that is near a tie may be another.
                alone_N = run.image_tokenizer.encode(pixels_HWC[None])[0]
                assert (alone_N == codes_N).mean() >= 0.9
    assert varied


@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(-1, 5)
    ),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 100),
)
def test_places_are_drawn_as_the_rows_are(
    rows_VK: np.ndarray, most: int, random_count: bool, seed: int
) -> None:
    """The same seed draws from the indices of rows what it draws from the rows themselves."""

    def drawn(array: np.ndarray) -> list[int]:
        return draw(array, most=most, random_count=random_count, rng=np.random.default_rng(seed))

    indices = drawn(_indices(rows_VK))
    assert [rows_VK.ravel()[index] for index in indices] == drawn(rows_VK)


def test_documents_are_said_to_be_found_by_what_found_them(small: list[str]) -> None:
    run = opened(small)
    samples = training_samples(run)
    corpus = samples.corpora[0]
    row_of = {run.bank.id(row): row for row in range(len(run.bank))}
    seen = set()

    # A query's neighbours are found half by its text and half by its image.
    for position in range(12):
        rows_VK = corpus.neighbours_VK(samples.at(position)[1])
        for document in shown_sample(run, samples, position).documents[:-1]:
            halves = {"text": rows_VK[:, :2], "image": rows_VK[:, 2:]}
            found = [modality for modality in halves if f"{modality} (score " in document.note]
            seen |= set(found)
            assert found
            assert all(row_of[document.id] in halves[modality] for modality in found)
    assert seen == {"text", "image"}


def test_ids_that_no_rotation_makes_have_no_spans() -> None:
    mask, end = VOCAB.sentinel(0), VOCAB.end_of_span
    laid_out_T = np.array([1, 5, 6, 7, 1])
    assert moved_spans(np.array([1, mask, 7, 1, mask, 5, 6, end]), laid_out_T, VOCAB) is not None
    for ids in (
        [1, 5, 6, 1, 7],
        [1, mask, 7, 1],
        [mask, mask],
        [1, mask, 1, mask, *range(4, 14), end],
    ):
        assert moved_spans(np.array(ids), laid_out_T, VOCAB) is None


@given(
    st.lists(st.integers(4, 39), min_size=9, max_size=12), st.sets(st.integers(0, 9), max_size=6)
)
def test_spans_are_read_off_the_rotated_sample(ids: list[int], borders: set[int]) -> None:
    """Every two borders are a span; a sample without spans stays as it was laid out."""
    laid_out_T = np.array(ids)
    ends = sorted(borders)[: len(borders) // 2 * 2]
    spans = list(zip(ends[::2], ends[1::2], strict=True))
    rotated_T, source_T = laid_out_T, np.arange(len(ids))
    if spans:
        rotated_T, source_T = rotate(laid_out_T, spans, VOCAB)

    found = moved_spans(rotated_T, laid_out_T, VOCAB)
    assert found is not None
    assert found[0] == spans
    assert found[1].tolist() == source_T.tolist()


def test_an_objective_that_changes_samples_otherwise_is_shown_too(in_shards: list[str]) -> None:
    """An objective that reverses samples moves no spans: they are said to be unknown."""
    run = opened(in_shards)
    objective = run.objective
    corrupt = objective.corrupt
    replaced = SimpleNamespace(vocab=run.vocab, corrupt=lambda *given: _reversed(corrupt(*given)))
    run.__dict__["objective"] = replaced

    samples = training_samples(run)
    shown = shown_sample(run, samples, 3)
    facts = facts_of(run, samples, 3, shown)
    assert dict(facts)["spans"].startswith("unknown")
    Page(render_sample(shown, facts))


def _reversed(corrupted: Any) -> Any:
    return type(corrupted)(corrupted.ids_T[::-1].copy(), corrupted.weight_T)


def test_a_page_is_written_into_the_run_while_training_runs(words: list[str], capsys: Any) -> None:
    folder = Path(next(word for word in words if word.startswith("run=")).removeprefix("run="))
    # Training holds the lock; the page needs none, and changes nothing else in the run.
    before = {file for file in folder.rglob("*") if "show" not in file.parts}
    with locked(folder):
        assert main(["show", *words, "sample=3"]) == 0
        assert main(["show", *words, "sample=3", "epoch=2"]) == 0

    said = capsys.readouterr().out
    assert said.startswith("Sample 3 of epoch 0\n")
    assert f"page: {folder}/show/sample-3.html\n" in said
    assert said.endswith(f"page: {folder}/show/sample-3-epoch-2.html\n")
    assert (folder / "show" / "sample-3-epoch-2.html").is_file()

    assert {file for file in folder.rglob("*") if "show" not in file.parts} == before
    run_experiment(opened(words).experiment, folder, until="retriever")
    assert "up to date" in capsys.readouterr().out


def test_without_a_number_the_first_sample_with_a_moved_span_is_shown(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(words)
    samples = training_samples(run)
    has_spans = [bool(shown_sample(run, samples, number).spans) for number in range(20)]
    first = has_spans.index(True)
    assert main(["show", *words]) == 0
    said = capsys.readouterr().out
    assert f"Sample {first} of epoch 0" in said
    assert "<mask:0>" in said

    # An objective that moves nothing has no such sample: the first of all is shown.
    assert main(["show", *words, "objective=causal"]) == 0
    assert "Sample 0 of epoch 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["sample=1000"], "sample is 1000; write sample=N with a whole number N from 0 to 31"),
        (["sample=x"], 'sample is "x"; it must be a whole number'),
        (["sample=-1"], "sample is -1; it must be a whole number, at least 0"),
        (["sample=1", "epoch=1.5"], "epoch is 1.5; it must be a whole number, at least 0"),
        # What fits a block decides which documents there are.
        (["sample=1", "model.seq_len=10"], "run: {run} has no finished stage tokens made with"),
        (
            ["sample=1", "experiment=digts"],
            "experiment is digts, which is not known; did you mean digits?",
        ),
        (["sample=1", "out=/proc/none/x.html"], "out: /proc/none/x.html cannot be written"),
        (
            ["sample=1", "seed=7"],
            "run: {run} has no finished stage image_tokenizer made with these settings",
        ),
        (
            ["sample=1", "run={run}/documents"],
            "run: {run}/documents has no finished stage documents made with",
        ),
        (
            ["sample=1", "run={run}/none"],
            "run: {run}/none has no finished stage documents made with these settings",
        ),
    ],
)
def test_mistakes_end_in_a_sentence(
    small: list[str], capsys: Any, more: list[str], sentence: str
) -> None:
    folder = next(word for word in small if word.startswith("run=")).removeprefix("run=")
    assert main(["show", *small, *(word.format(run=folder) for word in more)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cm3leon: {sentence.format(run=folder)}")
    assert error.count("\n") == 1
    assert not Path(folder, "none").exists()


def test_an_unfinished_run_is_told_the_command_that_finishes_it(
    tmp_path: Path, capsys: Any
) -> None:
    words = ["experiment=digits", f"run={tmp_path}", "sample=1", "training.batch_size=4"]
    assert main(["show", *words]) == 2
    command = (
        f"python -m cm3leon.run experiment=digits run={tmp_path} "
        "training.batch_size=4 until=neighbours"
    )
    assert capsys.readouterr().err.endswith(f"make it with: {command}\n")
