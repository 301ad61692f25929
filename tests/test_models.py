"""The decoder's sizes, its first loss and its function.

Packing, caching and causality change none of its numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, truncnorm
from torch import Tensor

from cm3leon.models.attention import packed_mask
from cm3leon.models.transformer import Transformer
from cm3leon.registry import MODELS, discover
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

discover()

V = 50


def decoder(
    *,
    layers: int = 2,
    heads: int = 3,
    head_size: int = 8,
    mlp_ratio: int = 4,
    seq_len: int = 32,
    seed: int = 0,
) -> Transformer:
    """A decoder whose every weight is large enough to show in the logits, which are of order 1."""
    config = Transformer.Config(
        layers=layers,
        width=heads * head_size,
        head_size=head_size,
        mlp_ratio=mlp_ratio,
        seq_len=seq_len,
    )
    model = Transformer(config, vocab_size=V)

    # Tables of unit size, and matrices that keep the size of what they multiply.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            table = name.startswith(("embedding", "positions"))
            weight.normal_(std=1.0 if table else 2 * config.width**-0.5, generator=generator)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(given_: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(given_, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------- sizes and start


@pytest.mark.parametrize(
    ("name", "total", "in_blocks"),
    [
        ("cm3leon_350m", 440_401_920, 301_989_888),
        ("cm3leon_760m", 887_095_296, 679_477_248),
        ("cm3leon_7b", 6_996_099_072, 6_442_450_944),
    ],
)
def test_the_papers_sizes(name: str, total: int, in_blocks: int) -> None:
    with torch.device("meta"):
        model = MODELS.build(name, vocab_size=65_536)
    assert sum(weight.numel() for weight in model.parameters()) == total
    assert sum(weight.numel() for weight in model.blocks.parameters()) == in_blocks
    assert model.positions.weight.shape == (4096, model.config.width)


def test_nothing_but_matrices() -> None:
    """There are no biases, no learned norms and no buffers, and the head has its own weights."""
    model = decoder()
    assert all(weight.ndim == 2 for weight in model.parameters())
    assert list(model.buffers()) == []
    assert model.head.weight is not model.embedding.weight
    assert not any(isinstance(module, torch.nn.Dropout) for module in model.modules())


def fresh(name: str = "cm3leon", **fields: Any) -> Transformer:
    torch.manual_seed(0)
    return MODELS.build(
        {"name": name, "layers": 2, "width": 256, "seq_len": 512, **fields}, vocab_size=1000
    )


def truncated_std(std: float, cut: float) -> float:
    """Standard deviation of a normal distribution that is cut at `cut` standard deviations."""
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    return std * math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))


def test_the_papers_initialisation() -> None:
    model = fresh()
    for name, weight in model.named_parameters():
        if name == "head.weight":
            assert weight.count_nonzero() == 0
            continue
        std = 0.0002 if name == "positions.weight" else 0.006
        # Four standard errors, at 2^16 numbers or more in each matrix.
        error = 4 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(truncated_std(std, 3), rel=error), name
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel()), name
        assert 2.9 * std < weight.abs().max().item() <= 3 * std * (1 + 1e-6), name


def test_the_stds_of_the_config_are_used_and_the_draw_depends_on_the_seed_alone() -> None:
    model = fresh(init_std=0.02, position_init_std=0.1)
    found = model.blocks[1].down.weight.std().item()
    assert found == pytest.approx(truncated_std(0.02, 3), rel=0.02)
    assert model.positions.weight.std().item() == pytest.approx(truncated_std(0.1, 3), rel=0.02)

    again = fresh(init_std=0.02, position_init_std=0.1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_the_weights_are_distributed_as_a_truncated_normal() -> None:
    """A Kolmogorov-Smirnov test finds nothing in any weight but the head, which is zero."""
    for name, weight in fresh().named_parameters():
        std = 0.0002 if name == "positions.weight" else 0.006
        numbers = weight.detach().flatten()[:20_000].double().numpy() / std
        if name != "head.weight":
            assert kstest(numbers, truncnorm(-3, 3).cdf).pvalue > 1e-3, name


def test_layers_may_begin_by_passing_on_their_input() -> None:
    model, plain = fresh(zero_residual=True), fresh()
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        zero = name.endswith((".out.weight", ".down.weight")) or name == "head.weight"
        assert torch.equal(weight, torch.zeros_like(weight) if zero else other), name

    # Then the last layer's output is the sum of the embeddings, normalised.
    ids_BT = torch.arange(20)[None]
    embedded_BTD = model.embedding(ids_BT) + model.positions(ids_BT)
    assert torch.equal(model.hidden(ids_BT), F.layer_norm(embedded_BTD, (256,)))


def test_the_papers_first_loss_is_11_09() -> None:
    torch.manual_seed(0)
    model = MODELS.build(
        {"name": "cm3leon_350m", "layers": 1, "width": 64, "seq_len": 64}, vocab_size=65_536
    )
    ids_BT = torch.randint(65_536, (1, 64))
    loss = F.cross_entropy(model(ids_BT)[0, :-1].double(), ids_BT[0, 1:])
    assert loss.item() == pytest.approx(math.log(65_536), abs=1e-9)
    assert loss.item() == pytest.approx(11.0904, abs=1e-4)


def test_the_first_loss_is_the_logarithm_of_the_vocabulary() -> None:
    ids_BT = torch.randint(1000, (2, 100), generator=torch.Generator().manual_seed(0))
    logits_BTV = fresh()(ids_BT)
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).double(), ids_BT[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), abs=1e-6)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match=r"^model: head_size 48 must divide width 64$"):
        MODELS.build({"name": "cm3leon", "width": 64, "head_size": 48}, vocab_size=10)


# ------------------------------------------------------------------------------------- the function


def reference(model: Transformer, ids_T: np.ndarray) -> np.ndarray:
    """Logits (T, V) of one sample in float64 numpy, written from the paper.

    It computes one head and one query at a time.
    """
    weights = {
        name: weight.detach().double().numpy() for name, weight in model.state_dict().items()
    }
    config, T = model.config, len(ids_T)
    head_size = config.head_size

    def norm(x_D: np.ndarray) -> np.ndarray:
        return (x_D - x_D.mean()) / np.sqrt(((x_D - x_D.mean()) ** 2).mean() + 1e-5)

    x_TD = np.empty((T, config.width))
    for t, token in enumerate(ids_T):
        x_TD[t] = weights["embedding.weight"][token] + weights["positions.weight"][t]

    for layer in range(config.layers):
        matrix = {
            name: weights[f"blocks.{layer}.{name}.weight"] for name in ("qkv", "out", "up", "down")
        }

        # Attention: each position to itself and those before it.
        normed_TD = np.stack([norm(x_D) for x_D in x_TD])
        query, key, value = (normed_TD @ part.T for part in np.split(matrix["qkv"], 3))
        for t in range(T):
            attended = []
            for head in range(config.width // head_size):
                columns = slice(head * head_size, (head + 1) * head_size)
                scores = [
                    query[t, columns] @ key[s, columns] / math.sqrt(head_size) for s in range(t + 1)
                ]
                shares = np.exp(scores) / np.sum(np.exp(scores))
                attended.append(sum(share * value[s, columns] for s, share in enumerate(shares)))
            x_TD[t] = x_TD[t] + matrix["out"] @ np.concatenate(attended)

        # The MLP, with a ReLU.
        for t in range(T):
            x_TD[t] = x_TD[t] + matrix["down"] @ np.maximum(matrix["up"] @ norm(x_TD[t]), 0)

    return np.stack([weights["head.weight"] @ norm(x_D) for x_D in x_TD])


@pytest.mark.parametrize(
    ("layers", "heads", "head_size", "mlp_ratio"),
    [(1, 1, 8, 4), (2, 3, 8, 4), (3, 2, 5, 1), (2, 1, 16, 3)],
)
def test_equals_a_naive_implementation(
    layers: int, heads: int, head_size: int, mlp_ratio: int
) -> None:
    model = decoder(layers=layers, heads=heads, head_size=head_size, mlp_ratio=mlp_ratio).double()
    ids_BT = random_ids(2, 32)
    with torch.inference_mode():
        logits_BTV = model(ids_BT)
    for row in range(2):
        expected_TV = reference(model, ids_BT[row].numpy())
        np.testing.assert_allclose(logits_BTV[row].numpy(), expected_TV, rtol=0, atol=1e-9)
        assert expected_TV.std() > 0.5  # else the comparison would say nothing


def test_training_mode_changes_nothing() -> None:
    model, ids_BT = decoder(), random_ids(2, 20)
    assert torch.equal(model.train()(ids_BT), model.eval()(ids_BT))


@given(length=st.integers(2, 32), changed=st.integers(0, 31), seed=st.integers(0, 9))
@settings(max_examples=30)
@torch.inference_mode()
def test_a_token_changes_nothing_before_it(length: int, changed: int, seed: int) -> None:
    model, changed = decoder(), changed % length
    ids_BT = random_ids(1, length, seed=seed)
    other_BT = ids_BT.clone()
    other_BT[0, changed] = (ids_BT[0, changed] + 1) % V

    before, after = model(ids_BT)[0], model(other_BT)[0]
    assert_same(after[:changed], before[:changed], atol=1e-6)
    # From the changed token on, every position sees it.
    assert (after[changed:] - before[changed:]).abs().amax(-1).min() > 1e-4


# ------------------------------------------------------------------------------------------ packing


def test_packed_mask_by_hand() -> None:
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, -1]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@given(
    rows=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
@torch.inference_mode()
def test_a_packed_sample_has_the_logits_it_has_alone(rows: list[list[int]], seed: int) -> None:
    model = decoder()

    # Rows of samples one behind the other; each row ends in padding.
    T = max(map(sum, rows)) + 2
    ids_BT = random_ids(len(rows), T, seed=seed)
    sample_BT = torch.full((len(rows), T), -1)
    position_BT = torch.zeros(len(rows), T, dtype=torch.int64)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            sample_BT[row, start : start + length] = number
            position_BT[row, start : start + length] = torch.arange(length)
            start += length

    packed_BTV = model(ids_BT, position_BT=position_BT, sample_BT=sample_BT)
    assert packed_BTV.isfinite().all()

    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            alone_TV = model(ids_BT[row : row + 1, start : start + length])[0]
            assert_same(packed_BTV[row, start : start + length], alone_TV, atol=3e-5)
            start += length


def test_no_gradient_crosses_from_sample_to_sample() -> None:
    model = decoder()
    model.embedding.weight.grad = None
    ids_BT = torch.tensor([[1, 2, 3, 4, 5, 6]])
    sample_BT = torch.tensor([[0, 0, 0, 1, 1, 1]])
    model(ids_BT, sample_BT=sample_BT)[0, 3:].square().sum().backward()

    # The loss is that of the second sample, so only its tokens' embeddings have a gradient.
    moved = model.embedding.weight.grad.abs().sum(-1).nonzero()[:, 0].tolist()
    assert moved == [4, 5, 6]


# -------------------------------------------------------------------------------------------- cache


def cached(
    model: Transformer, prefixes: list[Tensor], tails: list[list[Tensor]], steps: int
) -> list[list[Tensor]]:
    """Logits of the rows behind each prefix, computed with a cache.

    Args:
        prefixes: G prefixes, of any lengths.
        tails: W rows a prefix; they go on from it.
        steps: last tokens of each row that are fed one by one, after the rest of it in one pass.
    """
    G, W = len(prefixes), len(tails[0])
    longest_tail = max(len(row_T) - steps for rows in tails for row_T in rows)
    longest_prefix = max(map(len, prefixes))
    cache = model.new_cache(
        groups=G + 1, width=W, prefix=longest_prefix + 2, tail=longest_tail + steps
    )
    device = cache.device
    # The groups are not in order, and one of them stays empty.
    group_G = torch.arange(1, G + 1).flip(0).to(device)

    def padded(rows: list[Tensor]) -> Tensor:
        T = max(map(len, rows))
        rows_T = [F.pad(row_T, (0, T - len(row_T)), value=7) for row_T in rows]
        return torch.stack(rows_T).to(device)

    # First pass: the prefixes, one a group.
    attend = cache.prefix_pass(group_G, torch.tensor(list(map(len, prefixes)), device=device))
    ids_GT = padded(prefixes)
    model(ids_GT, position_BT=attend.positions(ids_GT.shape[1]), attend=attend)

    # Second pass: all but the last tokens of each row, W rows a group.
    row_GW1 = (group_G[:, None] * W + torch.arange(W, device=device))[:, :, None]
    begun = [row_T[: len(row_T) - steps] for rows in tails for row_T in rows]
    length_GW = torch.tensor(list(map(len, begun)), device=device).view(G, W)
    tail_pass = cache.tail_pass(group_G, row_GW1, length_GW)
    ids_QT = padded(begun)
    found_QTV = model(ids_QT, position_BT=tail_pass.positions(ids_QT.shape[1]), attend=tail_pass)
    found: list[list[Tensor]] = []
    for g in range(G):
        found.append([found_QTV[g * W + w, : len(begun[g * W + w])] for w in range(W)])

    # Then one token a step, for all rows of the cache at once.
    for step in range(steps):
        ids_R = torch.zeros((G + 1) * W, dtype=torch.int64, device=device)
        for g in range(G):
            for w in range(W):
                ids_R[group_G[g] * W + w] = tails[g][w][len(tails[g][w]) - steps + step]
        step_pass = cache.step_pass(G + 1, longest_prefix, longest_tail + step + 1)
        logits_R1V = model(ids_R[:, None], position_BT=step_pass.positions(1), attend=step_pass)
        cache.tail_length_R += 1
        for g in range(G):
            for w in range(W):
                found[g][w] = torch.cat([found[g][w], logits_R1V[group_G[g] * W + w]])
    return found


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    tails=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    steps=st.integers(0, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
@torch.inference_mode()
def test_cached_equals_uncached(
    lengths: list[int], tails: list[int], steps: int, seed: int
) -> None:
    """Rows share prefixes of different lengths, and have tails of different lengths."""
    model = decoder()
    prefixes = [random_ids(length, seed=seed + place) for place, length in enumerate(lengths)]
    rows = []
    for p in prefixes:
        rows.append(
            [
                random_ids(tail + steps, seed=20 * seed + 7 * w + len(p))
                for w, tail in enumerate(tails)
            ]
        )

    # The reference is the whole sequence of each row at once, without a cache.
    found = cached(model, prefixes, rows, steps)
    for prefix_T, own, found_of_prefix in zip(prefixes, rows, found, strict=True):
        for row_T, found_TV in zip(own, found_of_prefix, strict=True):
            alone_TV = model(torch.cat([prefix_T, row_T])[None])[0, len(prefix_T) :]
            assert_same(found_TV, alone_TV, 3e-5)


@torch.inference_mode()
def test_tails_are_kept_for_several_rows_and_may_change_places() -> None:
    model = decoder()
    prefix_T, tail_T, next_R = random_ids(5), random_ids(3, seed=1), random_ids(3, seed=2)
    cache = model.new_cache(groups=1, width=3, prefix=5, tail=6)

    group_1 = torch.tensor([0])
    for attend, ids_T in (
        (cache.prefix_pass(group_1, torch.tensor([5])), prefix_T),
        (cache.tail_pass(group_1, torch.tensor([[[0, 1, 2]]]), torch.tensor([[3]])), tail_T),
    ):
        model(ids_T[None], position_BT=attend.positions(len(ids_T)), attend=attend)

    def step(ids_R: Tensor, tail: int) -> Tensor:
        attend = cache.step_pass(1, 5, tail)
        cache.tail_length_R += 1
        return model(ids_R[:, None], position_BT=attend.positions(1), attend=attend)[:, 0]

    # All three rows go on, then rows 1 and 2 become copies of row 0, and row 0 a copy of row 2.
    step(next_R, 4)
    cache.reorder(torch.tensor([0, 1, 2]), torch.tensor([2, 0, 0]))
    found_RV = step(torch.tensor([9, 9, 11]), 5)

    for row, (source, last) in enumerate(((2, 9), (0, 9), (0, 11))):
        parts = [prefix_T, tail_T, next_R[source : source + 1], torch.tensor([last])]
        sequence_T = torch.cat(parts)
        assert_same(found_RV[row], model(sequence_T[None])[0, -1])


@torch.inference_mode()
def test_a_cache_is_in_the_precision_of_the_weights() -> None:
    model = decoder().double()
    rows = [[random_ids(6, seed=3)]]
    (found,) = cached(model, [random_ids(4)], rows, 3)
    assert_same(found[0], model(torch.cat([random_ids(4), rows[0][0]])[None])[0, 4:], atol=1e-12)


# ----------------------------------------------------------------------------------------- too long


@torch.inference_mode()
def test_more_positions_than_the_model_has_are_refused_in_a_sentence() -> None:
    """Not by the index error of a table, which on a GPU ends the process."""
    model = decoder(seq_len=8)
    assert model(random_ids(1, 8)).shape == (1, 8, V)
    with pytest.raises(ValueError, match=r"^9 positions were asked for, the model has seq_len 8$"):
        model(random_ids(1, 9))


# ---------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_gpu_gives_the_same_logits() -> None:
    model, ids_BT = decoder(), random_ids(2, 20)
    sample_BT = torch.arange(20).div(7, rounding_mode="floor").expand(2, 20)
    plain_BTV, packed_BTV = model(ids_BT), model(ids_BT, sample_BT=sample_BT)
    model.cuda()
    # With a cache: prefixes of eight tokens, then seven in one pass, then five one by one.
    assert_same(model(ids_BT.cuda()).cpu(), plain_BTV, atol=1e-4)
    assert_same(model(ids_BT.cuda(), sample_BT=sample_BT.cuda()).cpu(), packed_BTV, atol=1e-4)
    found = cached(model, [row_T[:8] for row_T in ids_BT], [[row_T[8:]] for row_T in ids_BT], 5)
    for row, rows in enumerate(found):
        assert_same(rows[0].cpu(), plain_BTV[row, 8:], atol=1e-4)
