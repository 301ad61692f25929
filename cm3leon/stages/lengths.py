"""Check whether the sample's captions fit a block beside their images,
before anything long is made."""

from __future__ import annotations

from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.tokens import longest_document
from cm3leon.tokenizers.text import TextTokenizer, unicode_text
from cm3leon.types import UserError


def check_lengths(run: RunFolder, tokenizer: TextTokenizer) -> None:
    """Print how many documents of the sample will be left out because they do not fit a block.

    Raises:
        UserError: naming the longest one and what to do, if no training document is left.
    """
    room = longest_document(run)
    layout = run.vocab.layout
    codes = layout.image_length(run.grid) + layout.around_image(run.grid)
    between = len(layout.between_segments)
    # Without a limit all fit; if not even the shortest caption does, that is reported elsewhere.
    if room is None or codes + between + 1 > room:
        return
    allowed = room - codes - between

    # Captions with too many tokens. A piece has one byte or more, so most need no counting.
    corpus = run.corpus
    too_long: list[tuple[int, int]] = []
    limit = 0
    for number, caption in enumerate(corpus.captions):
        size = len(unicode_text(caption).encode())
        length = len(tokenizer.encode(caption)) if size > allowed else 0
        if length > allowed:
            too_long.append((length, number))
            limit = min(limit or size, size - 1)
    if not too_long:
        return

    length, longest = max(too_long)
    captions = f"{len(too_long):,} captions are"
    if len(too_long) == 1:
        captions = "one caption is"
    said = (
        f"{captions} too long for a block, of {len(corpus):,} documents read; the longest, that of "
        f"{corpus.ids[longest]}, has {length} tokens; beside the {codes} of the image a block of "
        f"model.seq_len={run.seq_len} has room for {allowed}; raise model.seq_len, set "
        f"packing.method=stream, or leave long captions out with data.max_caption_bytes={limit}"
    )
    if not set(corpus.rows("train").tolist()) - {number for _, number in too_long}:
        raise UserError(f"data: no document is left to train on: {said}")
    print(f"      documents are left out: {said}", flush=True)
