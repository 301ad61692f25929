"""One training sample, drawn again by the objects that training uses.

Each of them is asked what it did:

    draw       documents from the neighbours of the query         which variant and half found them
    lay out    <eos> retrieved <eos> query <eos>                  documents left out or cut to fit
    corrupt    spans move to the end, behind their sentinels      the spans, found from the ids
    pack       pieces of samples fill blocks of seq_len           step, row, position and neighbours

The model plays no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm

from cm3leon.data.augment import varied
from cm3leon.evaluation.report.sample import (
    Companion,
    Names,
    ShownDocument,
    ShownPiece,
    ShownSample,
    ShownSegment,
)
from cm3leon.objectives.base import Corrupted
from cm3leon.objectives.block_stream import SAMPLE, Samples, Uncut, new_lane
from cm3leon.objectives.cm3 import Span, rotate
from cm3leon.objectives.packing import fit, pack
from cm3leon.retrievers.neighbours import draw
from cm3leon.retrievers.parts import MODALITIES, Parts
from cm3leon.retrievers.strategy import NONE
from cm3leon.retrievers.vectors import VectorShards
from cm3leon.stages.files import TEXT_TOKENIZER
from cm3leon.stages.neighbours import bank_of
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.tokens import sampled_rows
from cm3leon.stages.training_data import (
    TrainingCorpus,
    TrainingSamples,
)
from cm3leon.tokenizers.document import LaidOut, lay_out, token_count
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Modality, Sample, TokenDocument, TokenSegment, UserError


class TracedSamples(Samples):
    """The samples of training, which remember the origin of each piece that was made."""

    made: WeakKeyDictionary[Corrupted, tuple[int, int, int]]
    """Piece -> (position of its sample, start, end) in the sample's tokens; end is -1 for a whole
    sample."""

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
        """The sample at a position as blocks hold it, and whether its first document is cut."""
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
    """The sample at a position of the stream as training draws, lays out, corrupts and packs it.

    Raises:
        UserError: for a document that does not fit a block.
    """
    traced = TracedSamples(run, samples)
    sample = traced.drawn(position)
    pieces = list(_pieces(run, traced, samples.epoch, position))
    fitted, is_cut = traced.trained_on(position)
    laid_out = lay_out(fitted, run.vocab)

    # Retrieved documents that do not fit are dropped from the front, where the least close ones
    # are.
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
    """The pieces of a sample, each in its block.

    The lane is made from its first block on, as the room in a block depends on those before it.

    Args:
        epoch: samples of an epoch.
    """
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
            if end < 0:
                end = len(laid_out_T)

            # Spans and sources are found in the piece, and shown by their place in the sample.
            spans, source_T = None, None
            moved = moved_spans(made[number].ids_T, laid_out_T[start:end], run.vocab)
            if moved is not None:
                spans = [(start + first, start + last) for first, last in moved[0]]
                source_T = np.where(moved[1] >= 0, start + moved[1], -1)

            companions = []
            for (other, _, _), corrupted in zip(origins, made, strict=True):
                query = traced.drawn(other).query
                name = _name(other, epoch, position)
                companions.append(Companion(name, query.id, len(corrupted.ids_T)))
            yield ShownPiece(
                start=start,
                end=end,
                step=step,
                lane=position % lanes,
                block=pack(made, run.seq_len, run.vocab.pad, run_on=packing.run_on),
                number=number,
                samples=companions,
                spans=spans,
                source_T=source_T,
            )
            if end == len(laid_out_T):
                return


def _name(position: int, epoch: int, beside: int) -> str:
    """The number of a sample, with its epoch if that is not the shown sample's."""
    if position // epoch == beside // epoch:
        return f"{position % epoch}"
    return f"{position % epoch} of epoch {position // epoch}"


def moved_spans(
    ids_T: np.ndarray, laid_out_T: np.ndarray, vocab: Vocab
) -> tuple[list[Span], np.ndarray] | None:
    """The spans whose moving makes the trained ids of the laid-out ones; None if there are none.

    Each moved span leaves a sentinel in its place and stands behind a second one at the end:

        laid out      <eos>  a   red  dog    <break>  I4  I9  <eos>
        trained on    <eos>  a   <mask:0>    <break>  I4  I9  <eos>  <mask:0>  red  dog  <eos>
                                 |--- the first half of the sentinels       |--- the second half

    so the lengths behind the second half give back the spans, here (2, 4). The spans are right if
    `rotate` makes the same ids of them.

    Returns:
        The spans, and `source_T` of `rotate`.
    """
    sentinels = np.flatnonzero(vocab.is_sentinel(ids_T)).tolist()
    half = len(sentinels) // 2
    holes, tails = sentinels[:half], [*sentinels[half:], len(ids_T)]

    spans: list[Span] = []
    before = 0  # tokens of earlier spans, each of which one sentinel stands for
    for number, hole in enumerate(holes):
        length = tails[number + 1] - tails[number] - 2
        start = hole - number + before
        if not 0 <= start <= start + length <= len(laid_out_T):
            return None
        spans.append((start, start + length))
        before += length

    rotated_T, source_T = laid_out_T, np.arange(len(laid_out_T))
    if spans:
        rotated_T, source_T = rotate(laid_out_T, spans, vocab)
    if not np.array_equal(rotated_T, ids_T):
        return None
    return spans, source_T


# -------------------------------------------------------------------------------------- retrieval


def _how_found(
    run: RunFolder, samples: TrainingSamples, traced: TracedSamples, position: int
) -> list[str]:
    """For each retrieved document of a sample, which part of the query found it, and its score."""
    source, row = samples.at(position)
    corpus = samples.corpora[source]
    rows_VK, config = corpus.neighbours_VK(row), run.experiment.retriever.config

    # The documents are drawn again with the same generator, but as indices into `rows_VK` instead
    # of rows of the bank: an index tells which variant of the query found the document.
    drawn = draw(
        _indices(rows_VK),
        most=config.max_documents,
        random_count=config.random_count,
        rng=traced.generator(position),
    )

    # A variant's neighbours by text stand before those by image; a document may be in both halves.
    parts_of = _vectors(run, corpus)
    notes = []
    for index in drawn:
        variant, k = divmod(index, rows_VK.shape[1])
        found = int(rows_VK[variant, k])
        halves_2K = rows_VK[variant].reshape(len(MODALITIES), -1)
        found_by = []
        for modality, half_K in zip(MODALITIES, halves_2K, strict=True):
            if found in half_K:
                found_by.append(f"its {modality}{_score(parts_of, row, found, modality)}")
        note = "found by " + " and ".join(found_by)
        notes.append(note.replace("its", "the query's", 1))
    return notes


def _indices(rows_VK: np.ndarray) -> np.ndarray:
    """The index of each entry in the flat array, and NONE for what `draw` leaves out.

    It leaves out missing rows and repetitions in a variant: [[7, 9, 7]] becomes [[0, 1, NONE]].
    """
    repeated_VK = np.triu(rows_VK[:, :, None] == rows_VK[:, None, :], k=1).any(axis=1)
    index_VK = np.arange(rows_VK.size).reshape(rows_VK.shape)
    return np.where((rows_VK == NONE) | repeated_VK, NONE, index_VK)


def _vectors(run: RunFolder, corpus: TrainingCorpus) -> Callable[[np.ndarray], Parts] | None:
    """A function from rows of the bank to their vectors; None if the query has no row there."""
    if bank_of(corpus.folder / "neighbours") != corpus.folder:
        return None
    try:
        return VectorShards(corpus.folder / "vectors", run.encoder_header).parts
    except UserError:
        # Vectors are not needed once the neighbours are found, and may have been deleted.
        return None


def _score(
    parts_of: Callable[[np.ndarray], Parts] | None, row: int, other: int, modality: Modality
) -> str:
    """The score that the search ranks by, of the query without dropout, as ` (score 0.83)`."""
    if parts_of is None:
        return ""
    parts = parts_of(np.array([row, other]))
    query_D = parts.text_BD[0] if modality == "text" else parts.image_BD[0]
    return f" (score {float(query_D @ parts.mean()[1]):.2f})"


# -------------------------------------------------------------------------------------- documents


def _documents(
    run: RunFolder, sample: Sample, laid_out: LaidOut, notes: Sequence[str]
) -> list[ShownDocument]:
    """The documents of a sample with their segments and images, the query last."""
    spans = iter(laid_out.segments)
    shown = []
    documents = (*sample.retrieved, sample.query)
    for number, (document, note) in enumerate(zip(documents, [*notes, ""], strict=True), 1):
        segments = []
        for segment in document.segments:
            segments.append(ShownSegment(next(spans), _pictures(run, document, segment)))
        role = "query" if number == len(documents) else f"retrieved {number}"
        shown.append(ShownDocument(role, document.id, note, segments))
    return shown


def _pictures(
    run: RunFolder, document: TokenDocument, segment: TokenSegment
) -> list[tuple[str, np.ndarray]]:
    """The images of a segment with their titles: decoded from its codes, as encoded, the original.

    Only documents of the run's sample of the corpus have kept their original.
    """
    if segment.modality == "text":
        return []
    codes_N = run.vocab.image_codes(segment.ids_T)
    grid = run.vocab.layout.grid_of(segment.ids_T)
    if grid not in run.grids:  # cut by packing, so not a whole image
        return []

    pictures = [("from its codes", run.image_tokenizer.decode(codes_N[None], grid=grid)[0])]
    row = sampled_rows(run).get(document.id)
    if row is None:
        return pictures

    # Version 0 is the original, the others are its variations; this one is found by its codes.
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
    """How ids are written: special tokens by name, images by codes, text as it was."""
    tokenizer = Tokenizer.from_file(str(run.folder / TEXT_TOKENIZER))

    # Byte-level BPE writes a character for each byte. These texts have every byte that UTF-8 uses.
    ranges = (range(0x800), range(0x800, 0xD800, 0x800), range(0xE000, 0x110000, 0x1000))
    probe = "".join(map(chr, chain.from_iterable(ranges)))
    [(written, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(probe)
    byte_of = dict(zip(written, probe.encode(), strict=True))

    def piece(id_: int) -> str:
        return bytes(byte_of[c] for c in tokenizer.id_to_token(id_) or "").decode(
            "utf-8", "backslashreplace"
        )

    return Names(run.vocab, run.text_tokenizer.decode, piece, run.text_tokenizer.specials)
