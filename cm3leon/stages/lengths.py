"""Whether every document of a corpus in memory fits a block, known before anything long is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cm3leon.stages.artifacts import Run
from cm3leon.stages.tokens import longest_document
from cm3leon.tokenizers.text import TextTokenizer, fewest_pieces, unicode_text
from cm3leon.types import UserError


def check_lengths_by_words(run: Run, ids: Sequence[str], captions: Sequence[str]) -> None:
    """Check captions before there is a text tokenizer: each word takes a piece or more.

    Raises:
        UserError: as `check_lengths`, for captions that no tokenizer could bring into a block.
    """
    longest = run.experiment.text_tokenizer.max_word
    _check(run, ids, captions, lambda text: fewest_pieces(text, longest), "at least ")


def check_lengths(run: Run, tokenizer: TextTokenizer) -> None:
    """Check that each document of a corpus in memory fits a block, where it has to lie in one.

    Raises:
        UserError: naming the longest one and what to do.
    """
    if run.experiment.shards is not None:
        return
    _check(run, run.corpus.ids, run.corpus.captions, lambda text: len(tokenizer.encode(text)), "")


def _check(
    run: Run,
    ids: Sequence[str],
    captions: Sequence[str],
    pieces: Callable[[str], int],
    qualifier: str,
) -> None:
    room = longest_document(run)
    if room is None or run.experiment.shards is not None:
        return
    codes = run.image_tokenizer_shape.grid**2
    allowed = room - codes - 1  # a break stands between the caption and its image
    if allowed < 1:  # no document at all fits, which is a matter of the settings
        return

    too_long: list[tuple[int, int]] = []
    limit = 0
    for number, caption in enumerate(captions):
        size = len(unicode_text(caption).encode())
        # A piece has a byte or more, so most captions need no counting.
        length = pieces(caption) if size > allowed else 0
        if length > allowed:
            too_long.append((length, number))
            limit = min(limit or size, size - 1)
    if not too_long:
        return

    length, number = max(too_long)
    others = f" ({len(too_long)} captions are too long)" if len(too_long) > 1 else ""
    raise UserError(
        f"data: the caption of {ids[number]} takes {qualifier}{length} tokens{others}; with the "
        f"{codes} of the image, a block of model.seq_len={run.seq_len} holds {allowed}; "
        f"raise model.seq_len, set packing.method=stream, or leave long captions out with "
        f"data.max_caption_bytes={limit}"
    )
