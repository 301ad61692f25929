"""One training sample, drawn again by the objects that training uses: printed, and as a page with its images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm

from cm3leon.commands.sample_words import facts_of, printed
from cm3leon.data.augment import varied
from cm3leon.evaluation.report.sample import (
    Companion,
    Names,
    ShownDocument,
    ShownPiece,
    ShownSample,
    ShownSegment,
    write_sample_page,
)
from cm3leon.experiment import Experiment
from cm3leon.objectives.base import Corrupted
from cm3leon.objectives.block_stream import SAMPLE, Samples, Uncut, new_lane
from cm3leon.objectives.cm3 import Span, rotate
from cm3leon.objectives.packing import fit, pack
from cm3leon.retrievers.neighbours import draw
from cm3leon.retrievers.parts import MODALITIES, Parts
from cm3leon.retrievers.strategy import NONE
from cm3leon.retrievers.vectors import VectorShards
from cm3leon.stages.attribution import attribution
from cm3leon.stages.files import TEXT_TOKENIZER
from cm3leon.stages.neighbours import bank_of
from cm3leon.stages.pipeline import first_unfinished
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.table import stages_of
from cm3leon.stages.tokens import sampled_rows
from cm3leon.stages.training_data import (
    TrainingCorpus,
    TrainingSamples,
    training_samples,
)
from cm3leon.terminal import command_line
from cm3leon.tokenizers.document import LaidOut, lay_out, token_count
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Modality, Sample, TokenDocument, TokenSegment, UserError

LOOKED_AT = 32
"""Samples among which one with a moved span is looked for, where none was asked for."""


def show(
    experiment: Experiment,
    folder: Path,
    sample: int | None = None,
    *,
    epoch: int = 0,
    out: Path | None = None,
    again: Sequence[str] = (),
) -> None:
    """Prints a training sample, and writes its page to `out`, `show/sample-N.html` in the run folder by default.

    Args:
        sample: its number in the epoch; None = the first one with a moved span.
        epoch: number of the epoch from 0, which is the default.
        again: the words of the command line that name the experiment, for the message that tells how to go on.

    Raises:
        UserError: for a number out of range, or a stage before pretraining that is not finished.
    """
    # On the CPU: training may be using the GPU, and there are only some images to decode.
    run = RunFolder(experiment, folder, torch.device("cpu"))
    require_finished(run, again)
    samples = training_samples(run)
    first = epoch * samples.epoch
    if sample is None:
        number, shown = _first_with_spans(run, samples, first)
    else:
        if sample >= samples.epoch:
            raise UserError(
                f"sample is {sample}; write sample=N with a whole number N from 0 to {samples.epoch - 1}"
            )
        number, shown = sample, shown_sample(run, samples, first + sample)
    position = first + number
    facts = facts_of(run, samples, position, shown)
    name = f"sample-{number}.html" if epoch == 0 else f"sample-{number}-epoch-{epoch}.html"
    path = out or folder / "show" / name
    print("\n".join(printed(shown, facts, width=min(shutil.get_terminal_size().columns, 120))))
    try:
        write_sample_page(path, shown, facts, attribution([experiment]))
    except OSError as error:
        raise UserError(f"out: {path} cannot be written: {error.strerror}") from error
    print(f"\npage: {path}")


def _first_with_spans(
    run: RunFolder, samples: TrainingSamples, first: int
) -> tuple[int, ShownSample]:
    """The first sample of an epoch that shows what the objective does, a moved span, and its number.

    The first of all where none of the first `LOOKED_AT` has one, as with an objective that moves none.
    """
    for number in range(min(LOOKED_AT, samples.epoch)):
        shown = shown_sample(run, samples, first + number)
        if shown.spans:
            return number, shown
    return 0, shown_sample(run, samples, first)


def require_finished(run: RunFolder, again: Sequence[str]) -> None:
    """Raises UserError if a stage that the training samples depend on is not finished with these settings."""
    stages = stages_of(run.experiment)
    needed = stages[: [stage.name for stage in stages].index("pretraining")]
    missing, _ = first_unfinished(needed, run, run.folder)
    if missing:
        command = command_line(*again, f"until={needed[-1].name}")
        raise UserError(
            f"run: {run.folder} has no finished stage {missing} made with these settings; make it with: {command}"
        )


# ------------------------------------------------------------------------------------------------ what training does


class TracedSamples(Samples):
    """The samples of training, which remember what each piece was made of: (position, start, end)."""

    made: WeakKeyDictionary[Corrupted, tuple[int, int, int]]

    def __init__(self, run: RunFolder, samples: TrainingSamples) -> None:
        super().__init__(samples, run.objective, seq_len=run.seq_len, seed=run.experiment.seed)
        self.made = WeakKeyDictionary()
        self._method = run.experiment.packing.method
        self._fitted: dict[int, tuple[Sample, bool]] = {}

    def generator(self, position: int) -> np.random.Generator:
        """The generator that the sample at a position is drawn with."""
        return self._generator(SAMPLE, position)

    def drawn(self, position: int) -> Sample:
        """The sample at a position, with all the documents retrieved for it."""
        return self._draw(position, self.generator(position))

    def trained_on(self, position: int) -> tuple[Sample, bool]:
        """The sample at a position as blocks have it, and whether its first document is cut."""
        drawn = self.drawn(position)
        if self._method == "whole":
            return fit(drawn, self.seq_len, self.layout), False
        return self._fitted.get(position, (drawn, False))

    def whole(self, position: int) -> Corrupted:
        corrupted = super().whole(position)
        self.made[corrupted] = (position, 0, -1)
        return corrupted

    def uncut(self, position: int) -> Uncut:
        uncut = super().uncut(position)
        self.made[uncut.corrupted] = (position, 0, -1)
        return uncut

    def shortened(self, uncut: Uncut, position: int, length: int) -> Corrupted:
        corrupted = super().shortened(uncut, position, length)
        self._fitted[position] = self.fitted(uncut, length)
        self.made[corrupted] = (position, 0, -1)
        return corrupted

    def piece(self, sample: LaidOut, position: int, start: int, room: int) -> tuple[Corrupted, int]:
        corrupted, end = super().piece(sample, position, start, room)
        self.made[corrupted] = (position, start, end)
        return corrupted, end


def shown_sample(run: RunFolder, samples: TrainingSamples, position: int) -> ShownSample:
    """The sample at a position of the stream as it is drawn, laid out, corrupted and packed in training.

    Raises:
        UserError: for a document that does not fit a block.
    """
    traced = TracedSamples(run, samples)
    sample = traced.drawn(position)
    pieces = list(_pieces(run, traced, samples.epoch, position))
    fitted, is_cut = traced.trained_on(position)
    laid_out = lay_out(fitted, run.vocab)
    notes = _how_found(run, samples, traced, position)
    dropped = len(sample.retrieved) - len(fitted.retrieved)
    if is_cut:
        whole, rest = sample.retrieved[dropped], fitted.retrieved[0]
        lost = token_count(whole, run.vocab.layout) - token_count(rest, run.vocab.layout)
        notes[dropped] += (
            f"; its first {lost:,} tokens are cut off, and it is context without a loss"
        )
    epoch, number = divmod(position, samples.epoch)
    return ShownSample(
        title=f"Sample {number:,} of epoch {epoch:,}",
        names=_names(run),
        laid_out=laid_out,
        documents=_documents(run, fitted, laid_out, notes[dropped:]),
        left_out=[document.id for document in sample.retrieved[:dropped]],
        pieces=pieces,
        grid=run.image_tokenizer_shape.grid,
    )


def _pieces(
    run: RunFolder, traced: TracedSamples, epoch: int, position: int
) -> Iterator[ShownPiece]:
    """The pieces of a sample. Its lane is made from the start: what a block has room for depends on those before."""
    packing, lanes = run.experiment.packing, run.experiment.training.batch_size
    lane = new_lane(traced, packing, position % lanes, lanes)
    for step in tqdm(
        count(1), desc="blocks before it", unit="block", delay=2, leave=False, dynamic_ncols=True
    ):
        made = lane.next()
        origins = [traced.made[corrupted] for corrupted in made]
        laid_out_T = lay_out(traced.trained_on(position)[0], run.vocab).ids_T
        for number, (origin, start, end) in enumerate(origins):
            if origin != position:
                continue
            end = len(laid_out_T) if end < 0 else end
            moved = moved_spans(made[number].ids_T, laid_out_T[start:end], run.vocab)
            yield ShownPiece(
                start=start,
                end=end,
                step=step,
                lane=position % lanes,
                block=pack(made, run.seq_len, run.vocab.pad, run_on=packing.run_on),
                number=number,
                samples=[
                    Companion(
                        _name(other, epoch, position),
                        traced.drawn(other).query.id,
                        len(corrupted.ids_T),
                    )
                    for (other, _, _), corrupted in zip(origins, made, strict=True)
                ],
                spans=None if moved is None else [(start + s, start + e) for s, e in moved[0]],
                source_T=None if moved is None else np.where(moved[1] >= 0, start + moved[1], -1),
            )
            if end == len(laid_out_T):
                return


def _name(position: int, epoch: int, beside: int) -> str:
    """The number of a sample, with its epoch where that is not the shown sample's."""
    return f"{position % epoch}" + (
        f" of epoch {position // epoch}" if position // epoch != beside // epoch else ""
    )


def moved_spans(
    ids_T: np.ndarray, laid_out_T: np.ndarray, vocab: Vocab
) -> tuple[list[Span], np.ndarray] | None:
    """The spans that make the trained ids of the laid-out ones, and `source_T` of `rotate`; None if none do."""
    sentinels = np.flatnonzero(vocab.is_sentinel(ids_T)).tolist()
    places, tails = (
        sentinels[: len(sentinels) // 2],
        [*sentinels[len(sentinels) // 2 :], len(ids_T)],
    )
    spans: list[Span] = []
    before = 0  # tokens of earlier spans, each of which one sentinel stands for
    for number, place in enumerate(places):
        length = tails[number + 1] - tails[number] - 2
        start = place - number + before
        if not 0 <= start <= start + length <= len(laid_out_T):
            return None
        spans.append((start, start + length))
        before += length
    rotated_T, source_T = (
        rotate(laid_out_T, spans, vocab) if spans else (laid_out_T, np.arange(len(laid_out_T)))
    )
    return (spans, source_T) if np.array_equal(rotated_T, ids_T) else None


# ------------------------------------------------------------------------------------------------ retrieval


def _how_found(
    run: RunFolder, samples: TrainingSamples, traced: TracedSamples, position: int
) -> list[str]:
    """For each retrieved document of a sample, by which part of the query it was found, and its score."""
    source, row = samples.at(position)
    corpus = samples.corpora[source]
    rows_VK, config = corpus.neighbours_VK(row), run.experiment.retriever.config
    # Drawn once more with the same generator, not rows but where they stand: which variant, which half.
    places_VK = _places(rows_VK)
    most, random_count = config.max_documents, config.random_count
    drawn = draw(places_VK, most=most, random_count=random_count, rng=traced.generator(position))
    parts_of = _vectors(run, corpus)
    notes = []
    for variant, k in (divmod(place, rows_VK.shape[1]) for place in drawn):
        halves_2K = rows_VK[variant].reshape(len(MODALITIES), -1)
        found_by = [
            m
            for m, half_K in zip(MODALITIES, halves_2K, strict=True)
            if rows_VK[variant, k] in half_K
        ]
        scores = [
            _score(parts_of, row, int(rows_VK[variant, k]), modality) for modality in found_by
        ]
        notes.append(
            "found by " + " and ".join(f"its {m}{s}" for m, s in zip(found_by, scores, strict=True))
        )
    return [note.replace("its", "the query's", 1) for note in notes]


def _places(rows_VK: np.ndarray) -> np.ndarray:
    """The place of each row in the array, counted through; -1 for what `draw` leaves out: no row, or one once more."""
    repeated_VK = np.triu(rows_VK[:, :, None] == rows_VK[:, None, :], k=1).any(axis=1)
    return np.where(
        (rows_VK == NONE) | repeated_VK, NONE, np.arange(rows_VK.size).reshape(rows_VK.shape)
    )


def _vectors(run: RunFolder, corpus: TrainingCorpus) -> Callable[[np.ndarray], Parts] | None:
    """Rows of the bank -> their vectors; None where the query itself has none there."""
    if bank_of(corpus.folder / "neighbours") != corpus.folder:
        return None
    try:
        return VectorShards(corpus.folder / "vectors", run.encoder_header).parts
    except (
        UserError
    ):  # they are not needed any more once the neighbours are found, and may have been deleted
        return None


def _score(
    parts_of: Callable[[np.ndarray], Parts] | None, row: int, other: int, modality: Modality
) -> str:
    """What the search ranks by, but of the query without dropout, as ` (score 0.83)`."""
    if parts_of is None:
        return ""
    parts = parts_of(np.array([row, other]))
    query_D = parts.text_BD[0] if modality == "text" else parts.image_BD[0]
    return f" (score {float(query_D @ parts.mean()[1]):.2f})"


# ------------------------------------------------------------------------------------------------ documents


def _documents(
    run: RunFolder, sample: Sample, laid_out: LaidOut, notes: Sequence[str]
) -> list[ShownDocument]:
    spans = iter(laid_out.segments)
    shown = []
    roles = [*(f"retrieved {number}" for number in range(1, len(sample.retrieved) + 1)), "query"]
    for role, note, document in zip(
        roles, [*notes, ""], (*sample.retrieved, sample.query), strict=True
    ):
        segments = [
            ShownSegment(next(spans), _pictures(run, document, segment))
            for segment in document.segments
        ]
        shown.append(ShownDocument(role, document.id, note, segments))
    return shown


def _pictures(
    run: RunFolder, document: TokenDocument, segment: TokenSegment
) -> list[tuple[str, np.ndarray]]:
    """An image as decoded from its codes; of the sample also what was encoded, and what that was made of."""
    if segment.modality == "text":
        return []
    codes_N = run.vocab.image_codes(segment.ids_T)
    grid = run.vocab.layout.grid_of(segment.ids_T)
    if grid not in run.grids:  # cut off by packing, and so no whole image
        return []
    pictures = [("from its codes", run.image_tokenizer.decode(codes_N[None], grid=grid)[0])]
    row = sampled_rows(run).get(document.id)
    if row is None:
        return pictures
    versions = range(run.tokens.versions + 1)
    encoded = [run.tokenizer.codes(run.tokens.document(row, version)) for version in versions]
    version = next((v for v in versions if np.array_equal(encoded[v], codes_N)), None)
    if version is None:  # another image of the document, or a document of another corpus
        return pictures

    original_HWC = run.corpus.images_BHWC[run.corpus.ids.index(document.id)]
    if version:
        config, seed = run.experiment.augment, run.experiment.seed
        varied_VHWC = [each[0] for each in varied(original_HWC[None], [document.id], config, seed)]
        title = f"encoded: variation {version} of {run.tokens.versions}"
        pictures.append((title, varied_VHWC[version - 1]))
    return [*pictures, ("original", original_HWC)]


def _names(run: RunFolder) -> Names:
    tokenizer = Tokenizer.from_file(str(run.folder / TEXT_TOKENIZER))
    # All bytes that UTF-8 has, and the characters that byte-level BPE writes for them.
    probe = "".join(
        map(chr, [*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000)])
    )
    [(written, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(probe)
    byte_of = dict(zip(written, probe.encode(), strict=True))

    def piece(id_: int) -> str:
        return bytes(byte_of[c] for c in tokenizer.id_to_token(id_) or "").decode(
            "utf-8", "backslashreplace"
        )

    return Names(run.vocab, run.text_tokenizer.decode, piece, run.text_tokenizer.specials)
