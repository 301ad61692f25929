"""NaN and infinite numbers in weights, logits, codebooks and vectors are refused.

The message names where they are; no answer is made of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks import write_bank
from test_decoders import VOCAB, model
from test_engine import built, request
from test_retrievers import random_parts

from cm3leon.decoders.generate import answers
from cm3leon.decoders.score import log_likelihoods
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.types import NotFinite
from cm3leon.weights import is_finite, load_weights, save_weights

pytestmark = pytest.mark.stack

BAD = [math.nan, math.inf, -math.inf]
NUMBERS = r"holds numbers that are NaN or infinite"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_bad_number_among_many_is_found(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(50, 60).to(dtype)
    assert is_finite(tensor)
    tensor[31, 7] = bad
    assert not is_finite(tensor)

    # Empty tensors and integers are finite; numbers in float8 are looked at, too.
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([2**62]))
    assert not is_finite(torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("bad", BAD)
def test_weights_are_refused_by_the_name_of_their_tensor(tmp_path: Path, bad: float) -> None:
    linear = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(linear.bias, bad)
    save_weights(tmp_path / "w.safetensors", linear)
    with pytest.raises(NotFinite, match=rf"^{tmp_path}/w.safetensors: the tensor bias {NUMBERS}"):
        load_weights(tmp_path / "w.safetensors", torch.nn.Linear(3, 2))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("decoder", "modality"),
    [
        ("top_p", "image"),
        ("greedy", "image"),
        ("cd_k", "image"),
        ("greedy", "text"),
        ("beam", "text"),
    ],
)
def test_no_token_is_drawn_from_logits_that_are_no_numbers(
    decoder: str, modality: str, bad: float
) -> None:
    module = model()
    with torch.no_grad():
        module.head.weight[VOCAB.text_size + 3 if modality == "image" else 9] = bad
    asked = request([VOCAB.eos, 7, 9], built(decoder), modality=modality)
    with pytest.raises(
        NotFinite, match=r"^the logits of token 1 of the answer to request 0 are NaN"
    ):
        answers(module, [asked], vocab=VOCAB)


def test_guidance_that_overflows_is_said() -> None:
    """The weights and the logits are all finite; the logits after guidance are not."""
    module = model()
    with torch.no_grad():
        module.head.weight *= 1e36
    asked = request([VOCAB.eos, 7, 9], built("top_p", cfg=1000), others=(np.array([VOCAB.eos]),))
    with pytest.raises(NotFinite, match=r"or the decoder's guidance is too strong for them$"):
        answers(module, [asked], vocab=VOCAB)


def test_a_likelihood_is_a_number() -> None:
    module = model()
    with torch.no_grad():
        module.head.weight[5] = math.nan
    with pytest.raises(NotFinite, match=r"^the log-likelihood of answer 0 is nan: "):
        log_likelihoods(module, [np.array([VOCAB.eos, 7])], [np.array([9, 11])])


TOKENIZERS = {
    "vq": {"image_size": 16, "downsampling": 4, "codebook_size": 32, "channels": 32},
    "vqgan": {
        "image_size": 16,
        "channels": 32,
        "z_channels": 32,
        "multipliers": [1, 1],
        "residual_blocks": 1,
        "attention_levels": [],
        "discriminator_layers": 1,
        "codebook_size": 32,
        "perceptual": 0,
    },
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("bad", BAD)
def test_an_image_tokenizer_gives_no_codes_and_no_pixels_of_such_numbers(
    name: str, bad: float
) -> None:
    tokenizer: Any = IMAGE_TOKENIZERS.build({"name": name, **TOKENIZERS[name]})
    tokenizer.ready()
    images_BHWC = np.zeros((1, 16, 16, 3), np.uint8)
    # The new tokenizer works; only then are its weights spoiled.
    for codes in (tokenizer.encode(images_BHWC), np.zeros((1, tokenizer.grid**2), np.int64)):
        tokenizer.decode(codes)

    with torch.no_grad():
        next(tokenizer.encoder.parameters()).fill_(bad)
        next(tokenizer.decoder.parameters()).fill_(bad)

    with pytest.raises(NotFinite, match=rf"^what the image tokenizer's encoder .* {NUMBERS}"):
        tokenizer.encode(images_BHWC)
    with pytest.raises(NotFinite, match=rf"^the image that the image tokenizer's .* {NUMBERS}"):
        tokenizer.decode(np.zeros((1, tokenizer.grid**2), np.int64))


def test_a_memory_bank_of_such_vectors_is_refused(tmp_path: Path) -> None:
    parts = random_parts(0, 3)
    parts.text_BD[1, 2] = math.nan
    with pytest.raises(NotFinite, match=rf"documents for {tmp_path}/vectors/shard-\S+ {NUMBERS}"):
        write_bank(tmp_path, parts)
    assert not list(tmp_path.glob("vectors/*.arrow"))
