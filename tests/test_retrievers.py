"""Memory bank, retrieval strategy, query dropout, neighbours, and the CLIP encoder."""

from __future__ import annotations

import collections
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks import bank_of, stored, write_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.config import from_mapping
from cm3leon.data.corpus import split_of_key
from cm3leon.registry import RETRIEVERS, discover
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.encoder import ClipEncoder, EncoderConfig
from cm3leon.retrievers.neighbours import draw, neighbours_of
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.strategy import NONE, Rules, select, total
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

discover()

# -------------------------------------------------------------------------------------- parts, bank


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    vectors_BD = rng.normal(size=(rows, dim))
    return stored(vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True))


def random_parts(seed: int, rows: int, dim: int = 4, missing: float = 0.0) -> Parts:
    """Unit vectors of texts and images; each is missing with the given probability."""
    rng = np.random.default_rng(seed)
    text_BD, image_BD = unit(rng, rows, dim), unit(rng, rows, dim)
    text_BD[rng.random(rows) < missing] = 0
    image_BD[rng.random(rows) < missing] = 0
    return Parts(text_BD, image_BD)


@given(st.integers(0, 999), st.integers(1, 8))
def test_mean_is_that_of_the_parts_a_document_has(seed: int, rows: int) -> None:
    parts = random_parts(seed, rows, missing=0.4)
    for row, mean_D in enumerate(parts.mean()):
        present = [vector for vector in (parts.text_BD[row], parts.image_BD[row]) if vector.any()]
        expected = np.mean(present, axis=0) if present else np.zeros(4)
        np.testing.assert_allclose(mean_D, expected, atol=1e-6)
        assert parts.has("text")[row] == bool(parts.text_BD[row].any())
        assert parts.has("image")[row] == bool(parts.image_BD[row].any())

    # Rows keep their order.
    some = parts.rows(np.array([rows - 1, 0]))
    assert np.array_equal(some.text_BD, parts.text_BD[[rows - 1, 0]])
    assert np.array_equal(some.image_BD, parts.image_BD[[rows - 1, 0]])


@given(st.integers(0, 999), st.integers(1, 60), st.integers(1, 80))
@settings(max_examples=40)
def test_search_is_the_largest_inner_product_by_brute_force(
    seed: int, rows: int, count: int
) -> None:
    parts = random_parts(seed, rows, 5, missing=0.2)
    query_QD = np.random.default_rng(seed + 1).normal(size=(3, 5))

    found_QK = bank_of(parts).search(query_QD, count)
    assert found_QK.shape == (3, count)
    assert (found_QK[:, rows:] == NONE).all()

    found_QK = found_QK[:, :rows]
    scores_QB = query_QD @ parts.mean().astype(np.float64).T
    for q in range(3):
        assert len(set(found_QK[q].tolist())) == found_QK.shape[1]
        # The scores are compared and not the rows, since ties may come in any order.
        best = np.sort(scores_QB[q])[::-1][: found_QK.shape[1]]
        np.testing.assert_allclose(scores_QB[q][found_QK[q]], best, atol=1e-5)


def test_missing_faiss_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_bank(tmp_path, random_parts(0, 1))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss is not installed: pip install faiss-cpu"):
        Bank(*folders)


# ----------------------------------------------------------------------------------------- strategy


def slow_select(
    candidates: list[int], parts: Parts, query: Parts, exclude: int | None, count: int, rules: Rules
) -> tuple[list[int], collections.Counter[str]]:
    """The strategy as the paper tells it: one candidate after the other."""

    def similar(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
        """Compare the images where both documents have one, otherwise the texts."""
        if a[1].any() and b[1].any():
            return float(a[1] @ b[1]) > rules.threshold
        return float(a[0] @ b[0]) > rules.threshold

    queried = (query.text_BD[0], query.image_BD[0])
    taken: list[int] = []
    verdicts: collections.Counter[str] = collections.Counter()

    for place, row in enumerate(candidates):
        if len(taken) == count:
            return [candidates[t] for t in taken], verdicts
        verdicts["seen"] += 1

        # The candidate is skipped for the first reason that holds.
        own = (parts.text_BD[place], parts.image_BD[place])
        others = [(parts.text_BD[t], parts.image_BD[t]) for t in taken]
        if row == exclude:
            verdicts["itself"] += 1
        elif rules.both_modalities and not (own[0].any() and own[1].any()):
            verdicts["modality"] += 1
        elif similar(own, queried):
            verdicts["like_query"] += 1
        elif any(similar(own, other) for other in others):
            verdicts["like_taken"] += 1
        else:
            taken.append(place)
    return [candidates[t] for t in taken], verdicts


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    count=st.integers(0, 5),
    threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.6, 0.9, 1.0]),
    both=st.booleans(),
    excluded=st.one_of(st.none(), st.integers(0, 11)),
    missing=st.sampled_from([0.0, 0.4]),
)
@settings(max_examples=400)
def test_strategy_against_a_slow_reference(
    seed: int,
    rows: int,
    count: int,
    threshold: float,
    both: bool,
    excluded: int | None,
    missing: float,
) -> None:
    """Three queries at once; the last two have fewer candidates, and no document of their own."""
    rng = np.random.default_rng(seed)
    candidates_QK = np.stack([rng.permutation(100)[:rows] for _ in range(3)])
    candidates_QK[1, rows // 2 :] = NONE
    candidates_QK[2] = NONE
    parts, queries = random_parts(seed, 3 * rows, 2, missing), random_parts(seed + 1, 3, 2, missing)
    of_each = Parts(parts.text_BD.reshape(3, rows, 2), parts.image_BD.reshape(3, rows, 2))

    rules = Rules(threshold, both)
    own = NONE if excluded is None else candidates_QK[0, excluded % rows]
    exclude_Q = np.array([own, NONE, NONE])

    got_QR, verdicts = select(
        candidates_QK, of_each, queries, exclude_Q=exclude_Q, count=count, rules=rules
    )
    assert got_QR.shape == (3, count)

    # Each query by itself, without the candidates that are missing.
    counted: collections.Counter[str] = collections.Counter()
    for q in range(3):
        known = candidates_QK[q] != NONE
        expected, seen = slow_select(
            candidates_QK[q][known].tolist(),
            of_each.rows(slice(q, q + 1)).rows((0, known)),
            queries.rows(slice(q, q + 1)),
            None if exclude_Q[q] == NONE else int(exclude_Q[q]),
            count,
            rules,
        )
        assert got_QR[q].tolist() == expected + [NONE] * (count - len(expected))
        counted += seen
    assert total(verdicts, np.arange(3)) == counted


def test_strategy_by_hand() -> None:
    """Copies of the query and of what is taken are skipped, and so is a document without a text.

    Among the others, relevance decides.
    """
    x, y, z = np.eye(4)[:3]
    near_y = np.array([0.2, 0.98, 0, 0]) / np.hypot(0.2, 0.98)
    images_KD = np.stack([z, x, y, near_y, y, -x, -y]).astype(np.float32)
    # Every document has the same text, except the one without any.
    texts_KD = np.tile(np.eye(4)[3], (7, 1)).astype(np.float32)
    texts_KD[2] = 0
    query = Parts(texts_KD[:1], np.stack([x]).astype(np.float32))

    rows_QR, verdicts = select(
        np.array([[70, 71, 72, 73, 74, 75, 76]]),
        Parts(texts_KD[None], images_KD[None]),
        query,
        exclude_Q=np.array([70]),
        count=2,
        rules=Rules(0.9, True),
    )

    # 70 is the query itself, 71 a copy of it, and 72 has no text. 73 is taken, 74 is a copy of 73,
    # and 75 is taken, which is enough.
    assert rows_QR.tolist() == [[73, 75]]
    assert total(verdicts, np.array([0])) == {
        "seen": 6,
        "itself": 1,
        "like_query": 1,
        "modality": 1,
        "like_taken": 1,
    }


# ------------------------------------------------------------------------------------------ encoder

TINY = {
    "architecture": None,
    "image_size": 16,
    "patch_size": 4,
    "width": 32,
    "layers": 2,
    "embed_dim": 8,
}
DOCUMENTS = 12
ADJECTIVES, NOUNS = ("red", "blue", "tiny", "old"), ("dog", "cat", "ox")
TEXTS = [f"{adjective} {noun}" for adjective, noun in itertools.product(ADJECTIVES, NOUNS)]


def pictures(count: int = DOCUMENTS, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def build_encoder(**fields: Any) -> ClipEncoder:
    torch.manual_seed(0)
    return ClipEncoder(from_mapping(EncoderConfig, {**TINY, **fields}, "encoder")).eval()


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return build_encoder()


@pytest.fixture(scope="module")
def retriever() -> Any:
    return build_retriever()


def build_retriever(**fields: Any) -> Any:
    torch.manual_seed(0)
    built = RETRIEVERS.build({"name": "dense", "encoder": TINY, "threshold": 2.0, **fields})
    built.encoder.eval()
    return built


def test_vectors_are_of_length_one_and_do_not_depend_on_the_batch(encoder: ClipEncoder) -> None:
    texts, images_BHWC = TEXTS * 30, pictures(300)
    text_BD, image_BD = encoder.encode_texts(texts), encoder.encode_images(images_BHWC)
    for vectors_BD in (text_BD, image_BD):
        assert vectors_BD.dtype == np.float32
        assert vectors_BD.shape[1] == 8
        np.testing.assert_allclose(np.linalg.norm(vectors_BD, axis=1), 1, atol=1e-5)

    # Parts of a batch, one of them across the border of the encoder's own batches.
    for start, end in ((0, 1), (255, 258), (290, 300)):
        texts_again_BD = encoder.encode_texts(texts[start:end])
        images_again_BD = encoder.encode_images(images_BHWC[start:end])
        np.testing.assert_allclose(texts_again_BD, text_BD[start:end], atol=1e-5)
        np.testing.assert_allclose(images_again_BD, image_BD[start:end], atol=1e-5)

    assert np.array_equal(encoder.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    assert len({tuple(np.round(row, 5)) for row in text_BD}) == DOCUMENTS


def test_pixels_are_normalised_as_clip_expects(encoder: ClipEncoder) -> None:
    images_BHWC = pictures(2)
    got = encoder._pixels(torch.from_numpy(images_BHWC)).numpy()
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = ((images_BHWC / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, expected, atol=1e-5)

    # Other sizes are resized, which leaves the inside of a white image white.
    assert encoder._pixels(torch.from_numpy(pictures(2, 40))).shape == (2, 3, 16, 16)
    flat = encoder._pixels(torch.full((1, 50, 50, 3), 255, dtype=torch.uint8))
    np.testing.assert_allclose(flat[0, :, 3, 3].numpy(), (1 - mean) / std, atol=1e-4)


def test_loss_is_the_symmetric_contrastive_one(encoder: ClipEncoder) -> None:
    images_BHWC = pictures()
    loss, figures = encoder.loss(TEXTS, torch.from_numpy(images_BHWC))

    # The same from the vectors, in float64: each image picks its text, and each text its image.
    text_BD = encoder.encode_texts(TEXTS).astype(np.float64)
    image_BD = encoder.encode_images(images_BHWC).astype(np.float64)
    scale = float(encoder.clip.logit_scale.detach().double().exp())
    scores_BB = scale * image_BD @ text_BD.T

    def cross_entropy(rows_BB: np.ndarray) -> float:
        """Mean of -log softmax at the diagonal."""
        return float(np.mean(np.log(np.exp(rows_BB).sum(1)) - np.diag(rows_BB)))

    expected = (cross_entropy(scores_BB) + cross_entropy(scores_BB.T)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    accuracy = np.mean(scores_BB.argmax(1) == np.arange(DOCUMENTS))
    assert figures["pair_accuracy"].item() == pytest.approx(accuracy)
    assert figures["logit_scale"].item() == pytest.approx(scale, rel=1e-5)
    assert scale == pytest.approx(1 / 0.07, rel=1e-4)
    assert figures["images"] == DOCUMENTS


def test_the_loss_falls_when_trained() -> None:
    trained = build_encoder()
    trained.train()
    optimizer = torch.optim.Adam(trained.parameters(), 1e-3)

    losses = []
    for _ in range(12):
        loss, _ = trained.loss(TEXTS, torch.from_numpy(pictures()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad is not None for parameter in trained.parameters())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": 40}, "width 40 must be a multiple of 16"),
        ({"patch_size": 5}, "patch_size 5 must divide image_size 16"),
        (
            {"pretrained": "openai"},
            "pretrained is set, so architecture must name an open_clip model",
        ),
    ],
)
def test_unfit_encoders_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_encoder(**fields)


# -------------------------------------------------------------------------------------- other CLIPs

LARGE = "ViT-S-32-alt"
"""The smallest ViT among open_clip's architectures."""


def large(**fields: Any) -> ClipEncoder:
    return ClipEncoder(EncoderConfig(**{"architecture": LARGE, **fields})).eval()


def test_the_papers_encoder_is_the_default() -> None:
    torch.manual_seed(0)
    paper = ClipEncoder(EncoderConfig()).eval()
    assert paper.config.architecture == "ViT-B-32"
    assert paper.image_size == 224
    assert paper.clip.visual.conv1.kernel_size == (32, 32)
    assert paper.encode_images(pictures(1, 32)).shape == (1, 512)
    assert paper.encode_texts(["a red dog"]).shape == (1, 512)


@pytest.mark.parametrize("format_", ["pt", "safetensors"])
def test_weights_are_read_from_a_file(tmp_path: Path, format_: str) -> None:
    torch.manual_seed(1)
    original = large()
    path = tmp_path / f"weights.{format_}"
    if format_ == "pt":
        torch.save(original.clip.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(original.clip.state_dict(), path)

    # Another seed, so that the vectors agree only if the file was read.
    torch.manual_seed(2)
    loaded = large(pretrained=str(path))
    images_BHWC = pictures(2, 40)
    np.testing.assert_allclose(
        loaded.encode_images(images_BHWC), original.encode_images(images_BHWC), atol=1e-5
    )
    np.testing.assert_allclose(
        loaded.encode_texts(TEXTS[:2]), original.encode_texts(TEXTS[:2]), atol=1e-5
    )


def test_an_unknown_architecture_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"architecture is ViT-B-33, which open_clip does not have"):
        large(architecture="ViT-B-33")


UNREADABLE = {
    "missing.pt": None,
    "tag": None,
    "other model.pt": {"a": torch.zeros(2)},
    "cut.pt": b"PK\x03\x04cut",
    "text.pt": b"no weights",
    "empty.pt": b"",
    "text.safetensors": b"no weights",
}


@pytest.mark.parametrize("name", list(UNREADABLE))
def test_weights_that_cannot_be_read_are_one_sentence(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / name, UNREADABLE[name]
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    pretrained = name if name == "tag" else str(path)
    with pytest.raises(UserError) as refusal:
        large(pretrained=pretrained)
    assert str(refusal.value).startswith(
        f"retriever.encoder.pretrained: {pretrained!r} cannot be loaded for {LARGE}: "
    )
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------ query dropout


def text_tokens(
    encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch, texts: list[str], **options: Any
) -> list[Any]:
    """The BPE tokens that the text tower gets for each text, without padding."""
    seen = []

    def encode_text(tokens_BT: torch.Tensor) -> torch.Tensor:
        seen.append(tokens_BT)
        return torch.ones(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr(encoder.clip, "encode_text", encode_text)
        encoder.encode_texts(texts, **options)

    # The end token has the largest id.
    (tokens_BT,) = seen
    return [row[: int(row.argmax()) + 1].tolist() for row in tokens_BT]


LONG = "the quick brown fox jumps over a lazy dog and then sleeps under an old oak"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.5, 0.9, 1.0])
def test_that_share_of_the_text_is_dropped(
    encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    texts = [" ".join(LONG.split()[:count]) for count in range(1, 17)] + [""]
    before = text_tokens(encoder, monkeypatch, texts)
    after = text_tokens(encoder, monkeypatch, texts, dropout=share, seed=3)

    for whole, kept in zip(before, after, strict=True):
        assert (kept[0], kept[-1]) == (whole[0], whole[-1])
        assert len(whole) - len(kept) == round(share * (len(whole) - 2))
        # The tokens that are left keep their order.
        left = iter(whole)
        assert all(token in left for token in kept)


def test_every_inner_token_is_dropped_at_times(
    encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text_tokens(encoder, monkeypatch, [LONG])[0]
    assert len(set(whole)) == len(whole)

    dropped: collections.Counter[int] = collections.Counter()
    for seed in range(300):
        kept = text_tokens(encoder, monkeypatch, [LONG], dropout=0.2, seed=seed)[0]
        dropped.update(set(whole) - set(kept))

    # The two ends are never dropped.
    share = round(0.2 * (len(whole) - 2)) / (len(whole) - 2)
    for token in whole[1:-1]:
        assert abs(dropped[token] - 300 * share) < 4 * (300 * share * (1 - share)) ** 0.5


def test_a_text_with_token_zero_keeps_its_end(
    encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP's piece "!" inside a word, as in "wow!%", has id 0, as the padding has."""
    text = "wow!% " + LONG
    whole = encoder._tokens([text])[0].tolist()
    assert 0 in whole[: whole.index(max(whole))]
    for seed in range(5):
        kept = text_tokens(encoder, monkeypatch, [text], dropout=0.2, seed=seed)[0]
        length = whole.index(max(whole)) + 1
        assert kept[-1] == max(whole)
        assert len(kept) == length - round(0.2 * (length - 2))


def test_texts_cut_by_the_context_keep_their_end(
    encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = text_tokens(encoder, monkeypatch, ["word " * 100], dropout=0.2)
    assert len(kept) == 32 - round(0.2 * 30)
    assert kept[-1] == 49_407


def test_dropout_changes_the_vectors_by_its_seed_alone(encoder: ClipEncoder) -> None:
    images_BHWC, texts = pictures(), [f"{LONG} {text}" for text in TEXTS]
    for encode, items in ((encoder.encode_images, images_BHWC), (encoder.encode_texts, texts)):
        plain_BD = encode(items)
        torch.manual_seed(7)
        state = torch.get_rng_state()

        # The seed decides, and torch's own generator is neither used nor moved.
        first_BD = encode(items, dropout=0.3, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(8)
        assert np.array_equal(encode(items, dropout=0.3, seed=1), first_BD)

        assert (np.abs(encode(items, dropout=0.3, seed=2) - first_BD).max(1) > 1e-4).all()
        assert (np.abs(plain_BD - first_BD).max(1) > 1e-4).all()
        np.testing.assert_allclose(np.linalg.norm(first_BD, axis=1), 1, atol=1e-5)
        # Without the argument, dropout is off again.
        assert np.array_equal(encode(items), plain_BD)


def test_that_share_of_the_patches_is_dropped(encoder: ClipEncoder) -> None:
    lengths = []
    first = encoder.clip.visual.transformer.resblocks[0]
    handle = first.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape))
    try:
        for share in (0.0, 0.25, 0.5):
            encoder.encode_images(pictures(3), dropout=share)
    finally:
        handle.remove()

    # A class token, and what is left of 4 x 4 patches.
    assert [max(shape[:2]) for shape in lengths] == [1 + 16, 1 + 12, 1 + 8]
    assert not encoder.training
    assert not encoder.clip.visual.training


def test_patch_dropout_is_off_again_after_an_error(encoder: ClipEncoder) -> None:
    usual, state = encoder.clip.visual.patch_dropout, torch.get_rng_state()
    with pytest.raises(RuntimeError):
        encoder.encode_images(np.zeros((2, 16, 16, 5), np.uint8), dropout=0.5)
    assert encoder.clip.visual.patch_dropout is usual
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_tower_without_patches_is_one_sentence(encoder: ClipEncoder) -> None:
    class Convolutions(torch.nn.Module):
        image_size = 16

    whole = build_encoder()
    whole.clip.visual = Convolutions()
    with pytest.raises(UserError, match=r"is 0\.2, and this image tower has no patches to drop"):
        whole.encode_images(pictures(1), dropout=0.2)


# ---------------------------------------------------------------------------------------- retrieval


def filled(retriever: Any, ids: list[str], texts: list[str], images_BHWC: np.ndarray) -> Bank:
    """A memory bank of documents with a text and an image each."""
    parts = retriever.parts(texts, images_BHWC)
    return bank_of(parts, ids, pairs_only=retriever.rules.both_modalities)


def test_parts_that_are_not_asked_for_are_zero(retriever: Any) -> None:
    texts_only = retriever.parts(TEXTS, None)
    images_only = retriever.parts(None, pictures())
    assert not texts_only.image_BD.any()
    assert not images_only.text_BD.any()

    both = retriever.parts(TEXTS, pictures())
    assert np.array_equal(both.text_BD, texts_only.text_BD)
    assert np.array_equal(both.image_BD, images_only.image_BD)
    with pytest.raises(ValueError, match="a query needs texts or images"):
        retriever.parts(None, None)


@pytest.mark.parametrize("by", ["text", "image"])
@pytest.mark.parametrize("threshold", [0.3, 0.9, 2.0])
def test_retrieval_is_brute_force_and_the_strategy(by: Any, threshold: float) -> None:
    """It begins with two candidates, whose number grows until all documents were looked at."""
    retriever = build_retriever(threshold=threshold, candidates=2)
    ids = [f"document {n}" for n in range(DOCUMENTS)]
    bank = filled(retriever, ids, TEXTS, pictures())
    parts = bank.parts_of(np.arange(DOCUMENTS))
    queries = retriever.parts([f"a {text}" for text in TEXTS], pictures(seed=1))

    # Every second query stands for its own document; the others come from outside.
    own_Q = np.array([n if n % 2 else NONE for n in range(DOCUMENTS)])
    found, verdicts = retriever.retrieve(bank, queries, by, exclude_Q=own_Q, count=3)

    # By brute force: all documents in the order of their inner products, and the slow strategy.
    expected_verdicts: collections.Counter[str] = collections.Counter()
    searched_QD = queries.text_BD if by == "text" else queries.image_BD
    for q in range(DOCUMENTS):
        vector_D = searched_QD[q]
        order = np.argsort(-(parts.mean() @ vector_D), kind="stable")
        rows, seen = slow_select(
            order.tolist(),
            parts.rows(order),
            queries.rows(slice(q, q + 1)),
            q if q % 2 else None,
            3,
            Rules(threshold, True),
        )
        assert found[q].tolist() == rows + [NONE] * (3 - len(rows))
        expected_verdicts += seen

    assert verdicts == expected_verdicts


def test_a_query_never_finds_itself_nor_its_exact_copy() -> None:
    retriever = build_retriever(threshold=0.999)
    # Documents 0 and 5 have the same image.
    images_BHWC = pictures()
    images_BHWC[5] = images_BHWC[0]
    ids = [str(n) for n in range(DOCUMENTS)]
    bank = filled(retriever, ids, TEXTS, images_BHWC)
    parts = bank.parts_of(np.arange(DOCUMENTS))

    for by in ("text", "image"):
        found, _ = retriever.retrieve(
            bank, parts, by, exclude_Q=np.arange(DOCUMENTS), count=DOCUMENTS
        )
        assert all(n not in rows for n, rows in enumerate(found))
        assert 5 not in found[0]
        assert 0 not in found[5]

    # A query from outside has no document of its own, so nothing is left out.
    outside, _ = build_retriever(threshold=2.0).retrieve(bank, parts, "image", count=12)
    assert all(n in rows for n, rows in enumerate(outside))


def test_a_query_without_the_part_that_is_searched_by_finds_nothing(retriever: Any) -> None:
    bank = filled(retriever, [str(n) for n in range(DOCUMENTS)], TEXTS, pictures())
    queries = retriever.parts(TEXTS[:3], pictures(3))
    queries.text_BD[1] = 0
    found, verdicts = retriever.retrieve(bank, queries, "text", count=2)
    assert (found[1] == NONE).all()
    assert (found[[0, 2]] != NONE).any()

    # It is not counted, either.
    others = queries.rows(np.array([0, 2]))
    _, of_others = retriever.retrieve(bank, others, "text", count=2)
    assert verdicts["seen"] == of_others["seen"]


def test_held_out_documents_are_not_in_a_bank_of_the_training_documents(retriever: Any) -> None:
    ids = [f"document {n}" for n in range(DOCUMENTS)]
    splits = [split_of_key(id_, validation=0.2, held_out=0.3) for id_ in ids]
    train = [n for n, split in enumerate(splits) if split == "train"]

    bank = filled(retriever, [ids[n] for n in train], [TEXTS[n] for n in train], pictures()[train])
    held_out = {ids[n] for n in range(DOCUMENTS)} - {ids[n] for n in train}
    assert len(held_out) >= 4
    assert not held_out & {bank.id(row) for row in range(len(bank))}

    queries = retriever.parts(TEXTS, pictures())
    found, _ = retriever.retrieve(bank, queries, "image", count=DOCUMENTS)
    assert not held_out & {bank.id(row) for row in found.ravel() if row != NONE}


# --------------------------------------------------------------------------------------- neighbours


def neighbours_in(
    retriever: Any, bank: Bank, texts: list[str], images_BHWC: np.ndarray, seed: int
) -> tuple[np.ndarray, collections.Counter[str]]:
    """Neighbours (V, B, K) of the bank's documents under every variant of dropout, and verdicts."""
    config, own_B = retriever.config, np.arange(len(texts))
    variants = (
        retriever.parts(texts, images_BHWC, dropout=config.query_dropout, seed=seed + variant)
        for variant in range(config.dropout_variants)
    )
    return neighbours_of(retriever, bank, variants, own_B, like=retriever.parts(texts, images_BHWC))


def test_neighbours_are_those_of_every_variant_and_modality() -> None:
    retriever = build_retriever(dropout_variants=3, per_modality=2, query_dropout=0.25)
    ids = [str(n) for n in range(DOCUMENTS)]
    bank = filled(retriever, ids, TEXTS, pictures())
    found_VBK, verdicts = neighbours_in(retriever, bank, TEXTS, pictures(), 5)
    assert found_VBK.shape == (3, DOCUMENTS, 4)

    # The first half is found by text; the second half by image, with the first half taken.
    seen = 0
    for variant in range(3):
        queries = retriever.parts(TEXTS, pictures(), dropout=0.25, seed=5 + variant)
        for half, by in enumerate(("text", "image")):
            own, documents = np.arange(DOCUMENTS), retriever.parts(TEXTS, pictures())
            taken = None if by == "text" else found_VBK[variant, :, :2]
            expected, counted = retriever.retrieve(
                bank, queries, by, exclude_Q=own, count=2, like=documents, taken_QT=taken
            )
            assert np.array_equal(found_VBK[variant, :, 2 * half : 2 * half + 2], expected)
            seen += counted["seen"]

    # No document is its own neighbour, and dropout makes the variants differ.
    assert verdicts["seen"] == seen

    assert (found_VBK != np.arange(DOCUMENTS)[None, :, None]).all()
    assert not np.array_equal(found_VBK[0], found_VBK[1])

    again_VBK, _ = neighbours_in(retriever, bank, TEXTS, pictures(), 5)
    assert np.array_equal(again_VBK, found_VBK)


def simulated_bank(seed: int, rows: int, text_only: float, noise: float = 0.8) -> Parts:
    """Documents whose image is like their text; the given share has no image."""
    rng = np.random.default_rng(seed)
    text_BD = unit(rng, rows, 32)
    image_BD = text_BD + noise * unit(rng, rows, 32)
    image_BD = stored(image_BD / np.linalg.norm(image_BD, axis=1, keepdims=True))
    image_BD[rng.random(rows) < text_only] = 0
    return Parts(text_BD, image_BD)


def all_of(parts: Parts, rows: np.ndarray, query_D: np.ndarray) -> list[int]:
    """The given rows in the order of their inner products with the query, by brute force."""
    return rows[np.argsort(-(parts.mean()[rows] @ query_D), kind="stable")].tolist()


@pytest.mark.parametrize("pairs_only", [True, False])
def test_prompts_get_pairs_from_a_bank_that_is_half_text(pairs_only: bool) -> None:
    """Documents without images are left out of the index, or candidates grow beyond them."""
    parts = simulated_bank(0, 2000, text_only=0.5)
    bank = bank_of(parts, pairs_only=pairs_only)
    pairs = np.flatnonzero(parts.has("image"))
    queries = Parts(unit(np.random.default_rng(1), 10, 32), np.zeros((10, 32), np.float32))

    found, verdicts = build_retriever(candidates=4).retrieve(bank, queries, "text", count=3)
    for q in range(10):
        assert found[q].tolist() == all_of(parts, pairs, queries.text_BD[q])[:3]
    assert ("modality" in verdicts) is not pairs_only

    # Four candidates of a whole index held no pair at all for some queries, so they had to grow.
    if not pairs_only:
        first_QK = bank.search(queries.text_BD, 4)
        assert not np.isin(first_QK, pairs).any(axis=1).all()


def test_candidates_grow_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only pair is the last of 300 candidates."""
    # The query is far from all texts, and the document that is the farthest gets the only image.
    parts = simulated_bank(0, 300, text_only=1.0)
    query_1D = -parts.text_BD.mean(axis=0, keepdims=True)
    last = all_of(parts, np.arange(300), query_1D[0])[-1]
    parts.image_BD[last] = parts.text_BD[last]
    bank = bank_of(parts)
    assert all_of(parts, np.arange(300), query_1D[0])[-1] == last

    asked: list[int] = []
    search = Bank.search

    def counted(self: Bank, query_QD: np.ndarray, count: int) -> np.ndarray:
        asked.append(count)
        return search(self, query_QD, count)

    monkeypatch.setattr(Bank, "search", counted)

    retriever, query = build_retriever(), Parts(query_1D, np.zeros_like(query_1D))
    found, verdicts = retriever.retrieve(bank, query, "text", count=1)
    assert (found.tolist(), asked) == ([[last]], [64, 128, 256, 300])
    # Each candidate is counted once, though it was found several times.
    assert verdicts == {"seen": 300, "modality": 299}

    # A limit ends the search.
    asked.clear()
    monkeypatch.setattr("cm3leon.retrievers.base.MOST_CANDIDATES", 100)
    assert retriever.retrieve(bank, query, "text", count=1)[0].tolist() == [[NONE]]
    assert asked == [64, 100]


def test_a_bank_of_pairs_knows_its_rows() -> None:
    parts = simulated_bank(0, 40, text_only=0.5)
    pairs = np.flatnonzero(parts.has("image"))
    bank = bank_of(parts, pairs_only=True)
    queries_QD = unit(np.random.default_rng(1), 4, 32)
    found_QK = bank.search(queries_QD, len(pairs))
    assert bank.searchable == len(pairs)
    assert found_QK.tolist() == [all_of(parts, pairs, query_D) for query_D in queries_QD]

    # A bank without any pair finds nothing.
    none = bank_of(random_parts(0, 1, missing=1.0), pairs_only=True)
    assert (none.search(queries_QD[:, :4], 3) == NONE).all()


def test_both_halves_of_the_neighbours_together_are_diverse() -> None:
    """Every document has two copies; by text and by image, the same documents are the nearest."""
    once = simulated_bank(0, 60, text_only=0.0, noise=0.1)
    parts = Parts.concatenate([once, once, once])
    bank = bank_of(parts, pairs_only=True)
    queries = simulated_bank(1, 20, text_only=0.0, noise=0.1)
    retriever = build_retriever(threshold=0.95, per_modality=2)
    rows_VBK, _ = neighbours_of(retriever, bank, [queries], np.full(20, NONE), like=queries)

    # The documents by number, each once, although three copies of it are in the bank.
    def nearest(query_D: np.ndarray) -> list[int]:
        return list(dict.fromkeys(row % 60 for row in all_of(parts, np.arange(180), query_D)))

    for q in range(20):
        by_text, by_image = nearest(queries.text_BD[q]), nearest(queries.image_BD[q])
        expected = by_text[:2] + [row for row in by_image if row not in by_text[:2]][:2]
        assert [row % 60 for row in rows_VBK[0, q].tolist()] == expected


def test_copies_are_told_by_the_document_not_by_what_dropout_left_of_it() -> None:
    """Document 1 is a copy of document 0 under another id; half of the query's image is dropped."""
    retriever = build_retriever(
        threshold=0.999, query_dropout=0.5, per_modality=DOCUMENTS, dropout_variants=2
    )

    images_BHWC = pictures()
    images_BHWC[1] = images_BHWC[0]
    ids = [str(n) for n in range(DOCUMENTS)]
    bank = filled(retriever, ids, TEXTS, images_BHWC)

    found_VBK, _ = neighbours_in(retriever, bank, TEXTS, images_BHWC, 0)
    assert 1 not in found_VBK[:, 0]
    assert 0 not in found_VBK[:, 1]

    # Without `like`, the copy would be found by what dropout left of the query.
    dropped = retriever.parts(TEXTS, images_BHWC, dropout=0.5, seed=0)
    unaware, _ = retriever.retrieve(
        bank, dropped, "image", exclude_Q=np.arange(DOCUMENTS), count=DOCUMENTS
    )
    assert 1 in unaware[0]


def test_missing_neighbours_are_marked() -> None:
    retriever = build_retriever(threshold=-1.0, dropout_variants=1)
    bank = filled(retriever, ["a", "b"], TEXTS[:2], pictures(2))
    found_VBK, _ = neighbours_in(retriever, bank, TEXTS[:2], pictures(2), 0)
    assert (found_VBK == NONE).all()

    rng = np.random.default_rng(0)
    assert draw(found_VBK[:, 0], most=3, random_count=False, rng=rng) == []


rows_of_one_document = st.lists(
    st.lists(st.integers(-1, 6), min_size=4, max_size=4), min_size=1, max_size=4
)


@given(rows_of_one_document, st.integers(0, 5), st.booleans(), st.integers(0, 999))
def test_a_draw_is_distinct_and_most_relevant_last(
    rows: list[list[int]], most: int, random_count: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drawn = draw(np.array(rows), most=most, random_count=random_count, rng=rng)
    assert len(drawn) == len(set(drawn)) <= most
    assert NONE not in drawn
    orders = [list(dict.fromkeys(row for row in variant if row != NONE)) for variant in rows]
    # All drawn documents come from one variant, the closest last.
    fitting = [order for order in orders if [row for row in order if row in drawn] == drawn[::-1]]
    assert fitting
    if not random_count:
        assert any(len(drawn) == min(most, len(order)) for order in fitting)


def test_count_choice_and_variant_are_drawn_evenly() -> None:
    # The second variant has three distinct neighbours.
    rows_VK = np.array([[1, 2, 3, 4], [5, 6, 7, 5]])
    rng, draws = np.random.default_rng(0), 6000
    drawn = [draw(rows_VK, most=3, random_count=True, rng=rng) for _ in range(draws)]

    # Each number of documents from 0 to 3.
    counts = collections.Counter(len(rows) for rows in drawn)
    for count in range(4):
        assert abs(counts[count] - draws / 4) < 4 * (draws * 3 / 16) ** 0.5

    # Each pair of one variant, half of them from either variant.
    pairs = collections.Counter(tuple(sorted(rows)) for rows in drawn if len(rows) == 2)
    assert set(pairs) == {
        *itertools.combinations((1, 2, 3, 4), 2),
        *itertools.combinations((5, 6, 7), 2),
    }
    first = sum(pairs[p] for p in pairs if p[0] < 5)
    second = sum(pairs[p] for p in pairs if p[0] >= 5)
    assert abs(first - second) < 4 * (first + second) ** 0.5
    assert min(pairs.values()) > first / 6 * 0.7

    fixed = [draw(rows_VK, most=3, random_count=False, rng=rng) for _ in range(100)]
    assert {len(rows) for rows in fixed} == {3}
