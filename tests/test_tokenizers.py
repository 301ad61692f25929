"""Vocabulary, text tokenizer, image tokenizers, and the layout of samples."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.registry import IMAGE_TOKENIZERS, discover
from cm3leon.tokenizers.document import DocumentTokenizer, lay_out, sample_length, token_count
from cm3leon.tokenizers.image.base import to_signal
from cm3leon.tokenizers.image.quantizer import EMAQuantizer
from cm3leon.tokenizers.layout import SPECIALS
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment, UserError

pytestmark = pytest.mark.stack

discover()

# --------------------------------------------------------------------------------------- vocabulary

PAPER = Vocab(text_size=56_320, image_size=8_192)


def test_the_papers_sizes_make_two_to_the_sixteen() -> None:
    assert PAPER.sentinels == 512
    assert PAPER.size == 65_536 == 2**16
    assert PAPER.size - PAPER.used == 512  # reserved
    assert PAPER.size - 1 <= np.iinfo(np.uint16).max
    assert (PAPER.pad, PAPER.eos, PAPER.brk, PAPER.end_of_span) == (0, 1, 2, 3)
    assert len(SPECIALS) == 4


vocabs = st.builds(Vocab, st.integers(5, 3000), st.integers(1, 3000), st.integers(1, 600))


@given(vocabs)
def test_id_ranges_are_disjoint_and_cover_the_ids_in_use(vocab: Vocab) -> None:
    # Each id in use is of exactly one kind, counted in two ways.
    ids = np.arange(vocab.size)
    kinds = np.zeros(vocab.size, dtype=int)
    kinds[[vocab.pad, vocab.eos, vocab.brk, vocab.end_of_span]] += 1
    kinds[slice(*vocab.id_range("text"))] += 1
    kinds[slice(*vocab.id_range("image"))] += 1
    kinds += vocab.is_sentinel(ids)
    assert (kinds[: vocab.used] == 1).all()
    assert (kinds[vocab.used :] == 0).all()
    first, end = vocab.id_range("image")
    assert (vocab.is_image(ids) == ((ids >= first) & (ids < end))).all()

    by_kind = {
        "special": ids < len(SPECIALS),
        "text": vocab.is_text(ids) & (ids >= len(SPECIALS)),
        "image": vocab.is_image(ids),
        "sentinel": vocab.is_sentinel(ids),
        "reserved": ids >= vocab.used,
    }
    for kind, is_kind in by_kind.items():
        assert {vocab.kind(id_) for id_ in ids[is_kind].tolist()} <= {kind}
    assert sum(map(np.sum, by_kind.values())) == vocab.size

    assert vocab.used == vocab.text_size + vocab.image_size + vocab.sentinels
    assert vocab.is_sentinel(ids).sum() == vocab.sentinels
    assert vocab.is_image(ids).sum() == vocab.image_size


@given(vocabs)
def test_size_is_the_next_power_of_two(vocab: Vocab) -> None:
    power = 1
    while power < vocab.used:
        power *= 2
    assert vocab.size == power


@given(vocabs, st.data())
def test_codes_round_trip_and_sentinels_are_numbered(vocab: Vocab, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.integers(0, vocab.image_size - 1), max_size=20))
    codes = np.array(drawn, dtype=np.uint16)
    ids = vocab.image_ids(codes.reshape(1, -1))
    assert ids.shape == (1, len(codes))
    assert ids.dtype == np.int64
    assert vocab.is_image(ids).all()
    assert vocab.image_codes(ids).tolist() == [codes.tolist()]

    number = data.draw(st.integers(0, vocab.sentinels - 1))
    assert vocab.is_sentinel(np.array([vocab.sentinel(number)])).all()
    assert vocab.sentinel_numbers(np.array([vocab.sentinel(number)])).tolist() == [number]


def test_ids_of_other_kinds_are_no_sentinels() -> None:
    with pytest.raises(ValueError, match="no number"):
        PAPER.sentinel_numbers(np.array([PAPER.sentinel(0), PAPER.eos]))


@pytest.mark.parametrize(("text", "dtype"), [(65_536 - 14, np.uint16), (65_536 - 13, np.uint32)])
def test_ids_are_stored_in_16_bits_where_they_fit(text: int, dtype: type) -> None:
    assert Vocab(text, 10, 4).id_dtype is dtype


@pytest.mark.parametrize("id_", [0, 3, 39, 56, 57, 63, 64, 1000, -1])
def test_only_image_ids_become_codes(id_: int) -> None:
    vocab = Vocab(text_size=40, image_size=16, sentinels=4)
    with pytest.raises(ValueError, match="outside the image range"):
        vocab.image_codes(np.array([40, id_]))
    assert vocab.image_codes(np.array([40, 55])).tolist() == [0, 15]


@pytest.mark.parametrize("number", [-1, 4, 512])
def test_sentinels_beyond_the_vocabulary_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"no <mask:{number}>: the vocabulary has 4 sentinels"):
        Vocab(text_size=40, image_size=16, sentinels=4).sentinel(number)


@pytest.mark.parametrize("sizes", [(4, 16, 4), (0, 16, 4), (40, 0, 4), (40, 16, 0), (40, -1, 4)])
def test_empty_ranges_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="a vocabulary needs more than 4 text ids"):
        Vocab(*sizes)


# --------------------------------------------------------------------------------------------- text

CONTROL_TEXTS = ("<break>", "<pad>", "<eos>", "<end_of_span>", "<mask:0>", "<mask>", "<infill>")
CAPTIONS = [
    "a red dog on 12 chairs in 1984",
    "two red dogs, and a third red dog",
    "the red fox jumps over the lazy dogs",
    "ein kleiner Hund läuft über die Straße",
    "2023 2023 2023 20 23 007 007",
    "a  b\n\n\tc d",
] * 5
# Every pair of the texts that stand for control tokens, joined and apart.
ATTACKS = [f"{a}{b} red {a} {b}" for a in CONTROL_TEXTS for b in CONTROL_TEXTS] * 5


def train(texts: Sequence[str], vocab_size: int = 600) -> TextTokenizer:
    return TextTokenizer.train(TextTokenizerConfig(vocab_size=vocab_size), texts)


@pytest.fixture(scope="module", params=["captions", "control words"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    """A tokenizer trained on captions, and one on texts full of words like control tokens."""
    return train(CAPTIONS if request.param == "captions" else ATTACKS)


any_text = (
    st.text()
    | st.text(st.characters(max_codepoint=127, exclude_categories=["Cs"]))
    | st.from_regex(r"[\s\S]*")
)
beginnings = [word[:cut] for word in CONTROL_TEXTS for cut in range(1, len(word))]
endings = [word[cut:] for word in CONTROL_TEXTS for cut in range(1, len(word))]
attack = st.lists(
    st.sampled_from([*CONTROL_TEXTS, *beginnings, *endings, " ", "Ġ", "\x00", "0"]),
    max_size=12,
).map("".join)


@given(text=any_text)
def test_any_text_comes_back_exactly(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text


@given(text=attack | any_text)
@settings(max_examples=300)
def test_text_never_becomes_a_control_token(tokenizer: TextTokenizer, text: str) -> None:
    vocab = Vocab(text_size=tokenizer.vocab_size, image_size=16)
    low, high = vocab.id_range("text")
    ids = tokenizer.encode(text)
    assert ((ids >= low) & (ids < high) & (ids < tokenizer.pieces)).all()
    assert tokenizer.decode(ids) == text


@given(text=st.text(st.sampled_from("0123456789 a.<٣²"), max_size=30))
def test_digits_are_pieces_of_their_own(tokenizer: TextTokenizer, text: str) -> None:
    pieces = [tokenizer.decode([id_]) for id_ in tokenizer.encode(text)]
    digits = [piece.strip() for piece in pieces if re.search("[0-9]", piece)]
    assert digits == re.findall("[0-9]", text)


def test_no_learned_piece_holds_two_digits_or_a_digit_and_a_letter(
    tokenizer: TextTokenizer,
) -> None:
    pieces = [tokenizer.decode([id_]) for id_ in range(len(SPECIALS), tokenizer.pieces)]
    assert len(pieces) > 256 + 20  # it has learned something

    # A digit may have white space beside it, and nothing else; a letter never has a >.
    of_digits = [piece.strip() for piece in pieces if re.search("[0-9]", piece)]
    assert [piece for piece in of_digits if len(piece) != 1] == []
    assert [piece for piece in pieces if re.search(r"\w>", piece)] == []
    assert not set(pieces) & set(CONTROL_TEXTS)


def test_frequent_words_become_short_and_nothing_else_is_learned() -> None:
    tokenizer = train(CAPTIONS)
    assert len(tokenizer.encode("a red dog")) == 3
    assert len(tokenizer.encode("zqxjkv")) == 6
    assert tokenizer.pieces <= 600

    assert train(CAPTIONS, vocab_size=300).pieces == 300
    rare = TextTokenizer.train(TextTokenizerConfig(vocab_size=600, min_frequency=1000), CAPTIONS)
    assert rare.pieces == 256 + len(SPECIALS)


def test_smallest_vocabulary_spells_text_by_bytes() -> None:
    tokenizer = train(CAPTIONS, vocab_size=260)
    assert tokenizer.pieces == 260
    text = "Straße <eos> 🦎"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_and_unused_ids_are_left_out_of_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a red dog")
    wide = TextTokenizer(tokenizer._tokenizer, 10_000)
    noisy = [0, 1, *ids[:1].tolist(), 2, 3, *ids[1:].tolist(), tokenizer.pieces, 9_999, -1]
    assert wide.decode(noisy) == "a red dog"
    assert wide.decode([]) == ""
    assert wide.decode(tokenizer.encode("ß")[:1]) in ("�", "ß")


def test_saved_tokenizer_gives_the_same_ids(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = TextTokenizerConfig(vocab_size=tokenizer.vocab_size)
    loaded = TextTokenizer.load(tmp_path, config)
    assert (loaded.pieces, loaded.vocab_size) == (tokenizer.pieces, tokenizer.vocab_size)

    for text in (*CAPTIONS, *ATTACKS[:50], string.printable, "🦎"):
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert loaded.decode(loaded.encode(text)) == text

    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert [vocabulary[special] for special in SPECIALS] == [0, 1, 2, 3]
    assert sorted(vocabulary.values()) == list(range(tokenizer.pieces))


def test_training_twice_gives_the_same_ids() -> None:
    first, second = train(CAPTIONS + ATTACKS), train(CAPTIONS + ATTACKS)
    for text in CAPTIONS:
        assert first.encode(text).tolist() == second.encode(text).tolist()


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"tokenizer\.json does not exist; train the tokenizer first"
    ):
        TextTokenizer.load(tmp_path, TextTokenizerConfig())


def test_more_pieces_than_the_config_allows_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = train(CAPTIONS)
    tokenizer.save(tmp_path)
    just_enough = TextTokenizerConfig(vocab_size=tokenizer.pieces)
    assert TextTokenizer.load(tmp_path, just_enough).pieces == tokenizer.pieces

    sentence = rf"has {tokenizer.pieces} pieces, at most {tokenizer.pieces - 1} are allowed"
    with pytest.raises(UserError, match=sentence):
        TextTokenizer.load(tmp_path, TextTokenizerConfig(vocab_size=tokenizer.pieces - 1))


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_training_on_no_text_is_one_sentence(texts: list[str]) -> None:
    with pytest.raises(UserError, match="the corpus holds no text to train on"):
        train(texts)


# ---------------------------------------------------------------------------------------- quantizer


def quantizer(size: int = 6, dim: int = 3, **fields: float) -> EMAQuantizer:
    """A quantizer that moves its codes by 10 % of a batch, and never revives one."""
    usual = {"decay": 0.9, "revive_below": 0.0, "commitment": 1.0}
    return EMAQuantizer(size=size, dim=dim, **{**usual, **fields})


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=30)
def test_codes_are_the_nearest_by_brute_force(seed: int, size: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    # On a coarse grid every distance is exact, and ties occur: the first code wins them.
    codebook_VD = rng.integers(-4, 5, (size, dim)) / 4
    z_ND = rng.integers(-4, 5, (20, dim)) / 4

    each = quantizer(size, dim).eval()
    each.codebook_VD.copy_(torch.from_numpy(codebook_VD))
    distance_NV = ((z_ND[:, None] - codebook_VD[None]) ** 2).sum(2)

    assert each.lookup(torch.from_numpy(z_ND)).tolist() == distance_NV.argmin(1).tolist()
    quantized_ND, codes_N, commitment = each(torch.from_numpy(z_ND).float())
    assert codes_N.tolist() == distance_NV.argmin(1).tolist()
    np.testing.assert_allclose(quantized_ND.numpy(), codebook_VD[codes_N.numpy()], atol=1e-6)
    assert commitment.item() == pytest.approx(distance_NV.min(1).mean() / dim, abs=1e-6)


def test_codebook_follows_moving_averages_written_out_in_float64() -> None:
    torch.manual_seed(0)
    # The first batch only places the codes.
    each = quantizer(decay=0.8).train()
    each(torch.randn(40, 3))
    codebook_VD = each.codebook_VD.double().numpy()
    count_V = each.count_V.double().numpy()
    sum_VD = each.sum_VD.double().numpy()

    for step in range(4):
        z_ND = torch.randn(40, 3, generator=torch.Generator().manual_seed(step)) + step
        _, codes_N, _ = each(z_ND)
        batch_ND = z_ND.double().numpy()
        nearest_N = ((batch_ND[:, None] - codebook_VD[None]) ** 2).sum(2).argmin(1)
        assert codes_N.tolist() == nearest_N.tolist()
        # Every code moves a fifth of the way to the vectors that are nearest to it.
        for v in range(6):
            members = batch_ND[nearest_N == v]
            count_V[v] = 0.8 * count_V[v] + 0.2 * len(members)
            sum_VD[v] = 0.8 * sum_VD[v] + 0.2 * members.sum(0)
            codebook_VD[v] = sum_VD[v] / max(count_V[v], 1e-5)

        np.testing.assert_allclose(each.count_V.numpy(), count_V, rtol=1e-5)
        np.testing.assert_allclose(each.sum_VD.numpy(), sum_VD, atol=1e-4)
        np.testing.assert_allclose(each.codebook_VD.numpy(), codebook_VD, atol=1e-4)


def test_codebook_starts_on_vectors_of_the_first_batch_and_rests_outside_training() -> None:
    torch.manual_seed(0)
    each = quantizer(decay=1.0)

    # Before training, it knows no codes.
    z_ND = torch.randn(40, 3)
    each.eval()(z_ND)
    assert not each.initialized
    assert not each.codebook_VD.any()

    each.train()(z_ND)
    assert each.initialized
    assert (each.codebook_VD[:, None] - z_ND).abs().amax(2).amin(1).max() < 1e-6

    before = {name: value.clone() for name, value in each.state_dict().items()}
    each.eval()(torch.randn(40, 3))
    assert all(torch.equal(value, before[name]) for name, value in each.state_dict().items())
    assert set(before) == {"codebook_VD", "count_V", "sum_VD", "initialized"}


def test_dead_codes_are_moved_onto_vectors_of_the_batch() -> None:
    torch.manual_seed(0)
    each = quantizer(size=4, dim=2, decay=0.5, revive_below=0.1).train()
    each.initialized.fill_(True)
    each.codebook_VD.copy_(torch.tensor([[0.0, 0.0], [100.0, 100.0], [1.0, 1.0], [-100.0, 0.0]]))
    each.sum_VD.copy_(each.codebook_VD * 10)
    each.count_V.copy_(torch.tensor([10.0, 10.0, 10.0, 10.0]))
    z_ND = torch.cat([torch.randn(20, 2) * 0.1, torch.randn(20, 2) * 0.1 + 1])

    # Nothing is near codes 1 and 3: their counts fall to 5, 2.5, 1.25 and 0.625, which is below
    # a tenth of an even share, 40 vectors for 4 codes.
    alive_after = [True] * 4
    for step in range(1, 6):
        each(z_ND)
        alive_after = [bool(each.codebook_VD[v].abs().max() > 50) for v in (1, 3)]
        assert alive_after == [step < 4] * 2, step
        if step == 4:
            nearest = torch.cdist(each.codebook_VD[[1, 3]], z_ND).min(1).values
            assert nearest.max() < 1e-6
            assert each.count_V[[1, 3]].tolist() == [10.0, 10.0]  # as if used evenly
            torch.testing.assert_close(each.sum_VD[[1, 3]], each.codebook_VD[[1, 3]] * 10)
    assert len(each.eval().lookup(z_ND).unique()) == 4


def test_codes_revived_far_go_to_what_no_code_is_near() -> None:
    """Of 200 vectors 198 lie on a code and two do not: dead codes are moved onto those two."""
    torch.manual_seed(0)
    each = quantizer(size=4, dim=2, decay=0.0, revive_below=0.01, revive_far=True).train()
    each.initialized.fill_(True)
    each.codebook_VD.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0], [60.0, 60.0], [70.0, 70.0]]))
    z_ND = torch.cat([torch.zeros(198, 2), torch.tensor([[9.0, 9.0], [9.0, 9.0]])])
    each(z_ND)
    assert [each.codebook_VD[v].tolist() for v in (1, 2, 3)] == [[9.0, 9.0]] * 3


def test_gradient_of_the_codes_goes_straight_to_the_vectors() -> None:
    torch.manual_seed(0)
    each = quantizer().train()
    each(torch.randn(30, 3))
    each.eval()

    # The gradient at the codes is the gradient at the vectors.
    z_ND = torch.randn(7, 3, requires_grad=True)
    quantized_ND, codes_N, _ = each(z_ND)
    (quantized_ND**3).sum().backward()
    at_code_ND = each.codebook_VD[codes_N].clone().requires_grad_()
    (at_code_ND**3).sum().backward()
    torch.testing.assert_close(z_ND.grad, at_code_ND.grad)

    # The commitment pulls the vectors to their codes, and does nothing else.
    z_ND.grad = None
    each(z_ND)[2].backward()
    pull_ND = 2 * (z_ND - each.codebook_VD[codes_N]).detach() / z_ND.numel()
    torch.testing.assert_close(z_ND.grad, pull_ND)
    assert not any(parameter.requires_grad for parameter in each.parameters())


def test_quantizer_keeps_float32_under_autocast() -> None:
    torch.manual_seed(0)
    each = quantizer().train()
    z_ND = torch.randn(30, 3)
    each(z_ND)
    each.eval()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = each(z_ND)
    for got, expected in zip(mixed, each(z_ND), strict=True):
        assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------- image tokenizer

SMALL = {
    "name": "vq",
    "image_size": 16,
    "downsampling": 4,
    "codebook_size": 32,
    "code_dim": 8,
    "channels": 8,
}


@pytest.fixture(scope="module")
def vq() -> Any:
    """A small tokenizer after a few training steps, so that its codebook is in use."""
    torch.manual_seed(0)
    tokenizer = IMAGE_TOKENIZERS.build(SMALL).train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 2e-3)
    for _ in range(15):
        loss, _ = tokenizer.loss(torch.from_numpy(pictures(16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tokenizer.eval()


def pictures(count: int, side: int = 16) -> np.ndarray:
    """Smooth colourful images."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    smooth_BCHW = F.interpolate(coarse, (side, side), mode="bilinear") * 255
    return smooth_BCHW.byte().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.mark.parametrize(
    ("image_size", "downsampling"), [(16, 1), (16, 2), (16, 4), (16, 16), (24, 8)]
)
def test_geometry(image_size: int, downsampling: int) -> None:
    torch.manual_seed(0)
    section = {**SMALL, "image_size": image_size, "downsampling": downsampling}
    tokenizer = IMAGE_TOKENIZERS.build(section).train()

    images_BHWC = pictures(2, image_size)
    loss, figures = tokenizer.loss(torch.from_numpy(images_BHWC))
    assert loss.isfinite()
    assert tokenizer.grid == image_size // downsampling

    codes_BN = tokenizer.eval().encode(images_BHWC)
    assert codes_BN.shape == (2, tokenizer.grid**2)
    assert codes_BN.dtype == np.int64
    assert codes_BN.min() >= 0
    assert codes_BN.max() < tokenizer.codebook_size == 32
    assert tokenizer.decode(codes_BN).shape == images_BHWC.shape
    assert 0 < figures["codes_used_in_batch"] <= 1


def test_the_default_geometry_is_the_papers() -> None:
    config = IMAGE_TOKENIZERS.check("vq").config
    assert (config.image_size // config.downsampling) ** 2 == 1024
    assert config.codebook_size == 8192


def test_a_patch_has_the_same_code_wherever_it_stands() -> None:
    torch.manual_seed(0)
    section = {
        "name": "patches",
        "image_size": 16,
        "downsampling": 4,
        "codebook_size": 32,
        "code_dim": 8,
        "width": 16,
    }

    # The codes are the vectors of the first patches.
    patches = IMAGE_TOKENIZERS.build(section).ready()
    images_BHWC = pictures(3)
    z_BDHW = patches.encoder(to_signal(torch.from_numpy(images_BHWC)))
    patches.quantizer.codebook_VD.copy_(z_BDHW.permute(0, 2, 3, 1).reshape(-1, 8)[:32])

    # Images that are rolled by whole patches have codes that are rolled alike.
    codes_BHW = patches.encode(images_BHWC).reshape(3, 4, 4)
    moved_BHW = patches.encode(np.roll(images_BHWC, (4, 8), (1, 2))).reshape(3, 4, 4)
    assert np.array_equal(moved_BHW, np.roll(codes_BHW, (1, 2), (1, 2)))
    assert len(np.unique(codes_BHW)) > 3

    # Sixteen times the same code are sixteen times the same patch.
    decoded_HWC = patches.decode(np.array([[5] * 16]))[0]
    decoded_BHWC = decoded_HWC.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 4, 4, 3)
    assert (decoded_BHWC == decoded_BHWC[0]).all()

    with pytest.raises(UserError, match="must divide image_size 16"):
        IMAGE_TOKENIZERS.build({**section, "downsampling": 5})


def test_codes_are_row_by_row(vq: Any) -> None:
    """A code in the upper right corner changes that quarter of the decoded image most."""
    codes_N = vq.encode(pictures(1))[0]
    changed_N = codes_N.copy()
    changed_N[3] = (codes_N[3] + 7) % 32  # first row, last column: the upper right corner

    before, after = vq.decode(np.stack([codes_N, changed_N])).astype(int)
    change_HW = np.abs(after - before).sum(2)
    others = (change_HW[:8, :8].sum(), change_HW[8:, :8].sum(), change_HW[8:, 8:].sum())
    assert change_HW[:8, 8:].sum() > 1.5 * max(others)


def test_codes_are_the_nearest_to_the_encoders_vectors(vq: Any) -> None:
    images_BHWC = pictures(5)
    signal_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).double() / 127.5 - 1
    with torch.no_grad():
        z_BDHW = vq.encoder(signal_BCHW.float()).double().numpy()
    codebook_VD = vq.quantizer.codebook_VD.double().numpy()
    codes_BN = vq.encode(images_BHWC)

    # The distances of all codes, computed in float64.
    assert len(np.unique(codes_BN)) > 3
    for b in range(5):
        for n, code in enumerate(codes_BN[b]):
            distance_V = ((codebook_VD - z_BDHW[b, :, n // 4, n % 4]) ** 2).sum(1)
            assert distance_V[code] <= distance_V.min() + 1e-5


def test_encoding_and_decoding_do_not_depend_on_the_batch(vq: Any) -> None:
    images_BHWC = pictures(7)
    codes_BN = vq.encode(images_BHWC)
    assert np.array_equal(vq.encode(images_BHWC), codes_BN)
    assert np.array_equal(vq.encode(images_BHWC, batch_size=3), codes_BN)
    one_by_one = [vq.encode(images_BHWC[b : b + 1]) for b in range(7)]
    assert np.array_equal(np.concatenate(one_by_one), codes_BN)

    # In batches of another size, a value that lies halfway may be rounded either way.
    rebuilt_BHWC = vq.decode(codes_BN)
    assert np.array_equal(vq.decode(codes_BN), rebuilt_BHWC)
    alone = vq.decode(codes_BN, batch_size=1)
    backwards = vq.decode(codes_BN[::-1].copy(), batch_size=2)[::-1]
    for other in (alone, backwards):
        assert np.abs(other.astype(int) - rebuilt_BHWC).max() <= 1
        assert (other != rebuilt_BHWC).mean() < 1e-3


def test_decoding_is_what_the_training_saw(vq: Any) -> None:
    images_BHWC = pictures(4)
    signal_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        reconstruction_BCHW, codes_BN, _ = vq(signal_BCHW)

    assert np.array_equal(codes_BN.numpy(), vq.encode(images_BHWC))
    expected = ((reconstruction_BCHW.double().clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(vq.decode(codes_BN.numpy()) - expected).max() < 0.51


def test_loss_is_squared_error_and_commitment(vq: Any) -> None:
    images_BHWC = pictures(4)
    signal_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        reconstruction_BCHW, codes_BN, pull = vq(signal_BCHW)
        loss, figures = vq.loss(torch.from_numpy(images_BHWC))

    # Signals lie between -1 and 1: the peak of the signal-to-noise ratio is 2.
    error = ((reconstruction_BCHW - signal_BCHW).double().numpy() ** 2).mean()
    assert loss.item() == pytest.approx(error + pull.item(), rel=1e-5)
    assert figures["psnr_db"].item() == pytest.approx(10 * np.log10(2**2 / error), rel=1e-5)
    assert figures["codes_used_in_batch"] == len(np.unique(codes_BN.numpy())) / 32
    assert figures["images"] == 4


def test_no_images_give_no_codes(vq: Any) -> None:
    codes_BN = vq.encode(np.zeros((0, 16, 16, 3), np.uint8))
    assert codes_BN.shape == (0, 16)
    assert vq.decode(codes_BN).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 3), (2, 16, 8, 3), (2, 16, 16), (2, 16, 16, 4), (16, 16, 3), (1, 3, 16, 16)]
)
def test_images_of_another_size_are_refused(vq: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be 16x16 RGB"):
        vq.encode(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"downsampling": 3}, "downsampling 3 must be a power of two that divides image_size 16"),
        (
            {"image_size": 20, "downsampling": 8},
            "downsampling 8 must be a power of two that divides image_size 20",
        ),
        ({"downsampling": 32}, "downsampling 32 must be a power of two"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"decay": 1.1}, "decay is 1.1"),
        ({"commitment": -1.0}, "commitment is -1.0"),
    ],
)
def test_unfit_image_tokenizers_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        IMAGE_TOKENIZERS.check({**SMALL, **fields}, "image_tokenizer")


def test_channels_that_the_normalisation_cannot_group_are_refused() -> None:
    with pytest.raises(UserError, match="channels 12"):
        IMAGE_TOKENIZERS.build({**SMALL, "channels": 12})


# ------------------------------------------------------------------------------------------- layout

TINY = Vocab(text_size=40, image_size=16, sentinels=8)


def segments(modality: str) -> st.SearchStrategy[TokenSegment]:
    low, high = TINY.id_range(modality)
    return st.lists(st.integers(low, high - 1), max_size=6).map(
        lambda ids: TokenSegment(modality, np.array(ids, int))
    )


documents = st.lists(segments("text") | segments("image"), min_size=1, max_size=4).map(
    lambda parts: TokenDocument("document", tuple(parts))
)
samples = st.builds(Sample, documents, st.lists(documents, max_size=3).map(tuple))


def pair(text: Sequence[int], codes: Sequence[int]) -> TokenDocument:
    """A document of a text and an image."""
    image = TokenSegment("image", TINY.image_ids(np.array(codes)))
    return TokenDocument("pair", (TokenSegment("text", np.array(text)), image))


def test_three_retrieved_documents_and_the_query_are_laid_out_as_in_the_paper() -> None:
    retrieved = tuple(pair([10 + k, 20 + k], [3 * k, 3 * k + 1, 3 * k + 2]) for k in range(3))
    laid = lay_out(Sample(pair([13, 23], [9, 10, 11]), retrieved), TINY)

    # The order of the paper: an end around all, a break between any two segments.
    text, brk, eos = [[10 + k, 20 + k] for k in range(4)], [TINY.brk], [TINY.eos]
    image = [[40 + 3 * k, 41 + 3 * k, 42 + 3 * k] for k in range(4)]
    parts = [eos, text[0], brk, image[0], brk, text[1], brk, image[1], brk]
    parts += [text[2], brk, image[2], brk, text[3], brk, image[3], eos]
    assert laid.ids_T.tolist() == list(itertools.chain(*parts))

    assert laid.ids_T.dtype == np.int64
    assert [s.modality for s in laid.segments] == ["text", "image"] * 4
    assert [s.is_query for s in laid.segments] == [False] * 6 + [True] * 2

    assert (laid.ids_T == TINY.brk).sum() == 7
    assert (laid.ids_T == TINY.eos).sum() == 2
    assert laid.ids_T[-2] != TINY.brk  # it never trails


@given(samples)
@pytest.mark.once
def test_layout_of_any_sample(sample: Sample) -> None:
    laid = lay_out(sample, TINY)
    parts = [(s, d is sample.query) for d in (*sample.retrieved, sample.query) for s in d.segments]
    expected = [TINY.eos]
    for number, (part, _) in enumerate(parts):
        if number:
            expected.append(TINY.brk)
        expected += part.ids_T.tolist()
    assert laid.ids_T.tolist() == [*expected, TINY.eos]
    assert sample_length(sample, TINY.layout) == len(laid.ids_T)

    kinds = [(part.modality, is_query) for part, is_query in parts]
    assert [(s.modality, s.is_query) for s in laid.segments] == kinds
    for span, (part, _) in zip(laid.segments, parts, strict=True):
        assert laid.ids_T[span.start : span.end].tolist() == part.ids_T.tolist()

    # A document alone has an end before and behind it.
    for document in (*sample.retrieved, sample.query):
        alone = sample_length(Sample(document), TINY.layout)
        assert token_count(document, TINY.layout) == alone - 2


def test_documents_to_ids_and_back(vq: Any) -> None:
    text = train(CAPTIONS)
    both = DocumentTokenizer(Vocab(text.vocab_size, vq.codebook_size, 8), text, vq)
    codes_N = vq.encode(pictures(1))[0]
    document = both.token_document("a", "a red <eos> 🦎", codes_N)

    assert [segment.modality for segment in document.segments] == ["text", "image"]
    assert both.caption(document) == "a red <eos> 🦎"
    assert both.codes(document).tolist() == codes_N.tolist()

    only_text = TokenDocument("b", document.segments[:1])
    assert both.caption(TokenDocument("c", document.segments[1:])) == ""
    with pytest.raises(ValueError, match="document b has no image"):
        both.codes(only_text)


KMEANS = {"name": "kmeans", "image_size": 12, "downsampling": 3}


def test_clusters_are_the_same_where_training_computes_in_bf16() -> None:
    torch.manual_seed(0)
    images_BHWC = torch.randint(0, 256, (8, 12, 12, 3), dtype=torch.uint8)
    found = []
    for bf16 in (False, True):
        torch.manual_seed(1)
        tokenizer = IMAGE_TOKENIZERS.build({**KMEANS, "codebook_size": 16})
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = tokenizer.loss(images_BHWC)
        found.append((loss, tokenizer.quantizer.codebook_VD))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_patch_goes_with_its_colour_or_its_outline_by_the_weight_of_colour() -> None:
    light, dark = np.array([220, 180, 150]), np.array([190, 150, 120])
    outlines = np.eye(3)[..., None], np.fliplr(np.eye(3))[..., None]

    def tiled(outline: int, colour: np.ndarray) -> np.ndarray:
        patch_PPC = np.where(outlines[outline], colour - 60, colour)
        return np.tile(patch_PPC, (4, 4, 1)).astype(np.uint8)[None]

    for weight, expected in ((1.0, "outline"), (3.0, "colour")):
        tokenizer = IMAGE_TOKENIZERS.build({**KMEANS, "codebook_size": 2, "colour_weight": weight})
        tokenizer.ready()

        # The two codes are a light patch of the first outline and a dark one of the second.
        for code, known_BHWC in enumerate((tiled(0, light), tiled(1, dark))):
            z_BDHW = tokenizer.encoder(to_signal(torch.from_numpy(known_BHWC)))
            tokenizer.quantizer.codebook_VD[code] = z_BDHW[0, :, 0, 0]
            assert (tokenizer.encode(known_BHWC) == code).all()

        # This patch has the outline of the second code, and the colour of the first.
        codes_BN = tokenizer.encode(tiled(1, light))
        assert (codes_BN == ["colour", "outline"].index(expected)).all()


def test_what_a_cluster_is_decoded_to_is_its_mean() -> None:
    """Where each of 16 patches is a code, decoding gives the image back, up to rounding."""
    torch.manual_seed(0)
    tokenizer = IMAGE_TOKENIZERS.build({**KMEANS, "codebook_size": 16}).ready()
    images_BHWC = pictures(1)[:, :12, :12]
    z_BDHW = tokenizer.encoder(to_signal(torch.from_numpy(images_BHWC)))
    tokenizer.quantizer.codebook_VD.copy_(z_BDHW.permute(0, 2, 3, 1).reshape(16, 27))

    rebuilt_BHWC = tokenizer.decode(tokenizer.encode(images_BHWC))
    assert np.abs(rebuilt_BHWC.astype(int) - images_BHWC).max() <= 1
    with pytest.raises(UserError, match="must divide image_size 12"):
        IMAGE_TOKENIZERS.build({**KMEANS, "downsampling": 5})
