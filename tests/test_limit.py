"""The sentence of a report that says what the image tokenizer limits."""

from __future__ import annotations

import pytest

from cm3leon.stages.publish import limit


@pytest.mark.parametrize(
    ("use", "psnr", "sentences"),
    [
        (0.73, 25.0, []),
        (0.02, 25.0, ["only 2% of its codes are in use"]),
        (0.73, 17.0, ["gives images back at 17.0 dB"]),
        (0.02, 17.0, ["only 2% of its codes are in use and it gives images back at 17.0 dB"]),
    ],
)
def test_few_codes_in_use_and_a_low_psnr_are_named(
    use: float, psnr: float, sentences: list[str]
) -> None:
    said = limit({"codebook_use": use, "psnr_held_out": psnr})
    assert bool(said) == bool(sentences)
    for sentence in sentences:
        assert sentence in said
        assert "Train it longer (image_tokenizer_training.steps)" in said
