"""The model built of fairseq2's blocks computes what our own does.

So does xformers' attention in the place that fairseq2 leaves for one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graphs import Graphs
from test_compile import graphs, packings, step  # noqa: F401  # a fixture
from test_decoders import VOCAB, prompts
from test_decoders import model as small_decoder
from test_distributed import assert_alike, figures, trained
from test_models import cached, decoder, random_ids
from torch import Tensor

from cm3leon.decoders.generate import generate
from cm3leon.models import packed as packed_module
from cm3leon.models.pretrained import load_model
from cm3leon.models.recompute import compile_blocks, recompute
from cm3leon.models.transformer import Transformer
from cm3leon.objectives.packing import Corrupted, collate, pack
from cm3leon.plugins.fairseq2_cm3leon import guard
from cm3leon.plugins.fairseq2_cm3leon.attention import use_xformers
from cm3leon.plugins.fairseq2_cm3leon.convert import from_fairseq2, to_fairseq2
from cm3leon.registry import ATTENTIONS, DECODERS, MODELS, OBJECTIVES, discover
from cm3leon.weights import save_weights

pytestmark = [
    pytest.mark.stack,
    pytest.mark.cluster,
    pytest.mark.skipif(bool(guard.missing()), reason=f"needs {guard.missing()}"),
]

if not guard.missing():
    guard.load()
    from fairseq2.models.transformer import (
        ALiBiAttentionBias,
        AttentionBiasCache,
        CausalAttentionBias,
        IdentityBias,
        TorchSDPA,
        create_default_sdpa,
        get_default_sdpa_factory,
        set_default_sdpa_factory,
    )
    from fairseq2.models.transformer.attention_bias import materialize_attention_bias
    from fairseq2.nn import BatchLayout, IncrementalStateBag

    from cm3leon.plugins.fairseq2_cm3leon import _sdpa
    from cm3leon.plugins.fairseq2_cm3leon._network import create_transformer_lm
    from cm3leon.plugins.fairseq2_cm3leon._sdpa import XformersSDPA

discover()


def twin(ours: Transformer, attention: str = "auto") -> Any:
    """The model of fairseq2's blocks with the same weights, in their precision."""
    sizes = ("layers", "width", "head_size", "mlp_ratio", "seq_len")
    section = {
        "name": "fairseq2_cm3leon",
        "attention": attention,
        **{key: getattr(ours.config, key) for key in sizes},
    }
    theirs = MODELS.build(section, vocab_size=ours.vocab_size).to(ours.embedding.weight.dtype)
    theirs.load_state_dict(to_fairseq2(ours.state_dict()))
    return theirs.train(ours.training)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    tight = 1e-12 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected, rtol=tight, atol=tight)


def packed() -> dict[str, Tensor]:
    """Two packed rows.

    The first has two documents and padding; the second begins with the end of a document, whose
    positions go on from an earlier block.
    """
    sample_BT = torch.tensor([[0] * 5 + [1] * 9 + [-1] * 2, [0] * 3 + [1] * 3 + [2] * 10])
    position_BT = torch.tensor(
        [[*range(5), *range(9), 0, 0], [*range(20, 23), *range(3), *range(10)]]
    )
    return {"sample_BT": sample_BT, "position_BT": position_BT}


# ---------------------------------------------------------------------------------------- the model


def test_it_begins_with_the_same_weights_under_the_names_of_a_transformer_lm() -> None:
    config = Transformer.Config(layers=2, width=24, head_size=8, seq_len=16, zero_residual=True)

    torch.manual_seed(3)
    expected = to_fairseq2(Transformer(config, vocab_size=30).state_dict())

    torch.manual_seed(3)
    fields = {"layers": 2, "width": 24, "head_size": 8, "seq_len": 16, "zero_residual": True}
    model = MODELS.build({"name": "fairseq2_cm3leon", **fields}, vocab_size=30)

    state = model.state_dict()
    assert list(state) == list(create_transformer_lm(config, 30, TorchSDPA).state_dict())
    assert state.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in state.items())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("attention", ["auto", "sdpa", "naive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.inference_mode()
def test_logits_are_ours(dtype: torch.dtype, attention: str) -> None:
    ours, ids_BT = decoder().to(dtype), random_ids(2, 16)
    if attention == "naive" and dtype == torch.float64:
        pytest.xfail("fairseq2's NaiveSDPA computes its softmax in float32")

    theirs = twin(ours, attention)
    assert_equal(theirs(ids_BT), ours(ids_BT))
    assert_equal(theirs(ids_BT, **packed()), ours(ids_BT, **packed()))


@pytest.mark.parametrize("choice", ["none", "full", "selective"])
def test_the_loss_of_packed_documents_and_its_gradients_are_ours(choice: Any) -> None:
    objective: Any = OBJECTIVES.build("cm3", vocab=VOCAB)
    ours = small_decoder().double().train()
    rows = [[corrupted(5, 0), corrupted(9, 1)], [corrupted(12, 2)]]
    batch = collate([pack(row, 16, VOCAB.pad) for row in rows], torch.device("cpu"))
    theirs = twin(ours)
    recompute(theirs, choice)

    # The loss and the gradients of ours, then of theirs.
    results = []
    for model in (ours, theirs):
        loss, _ = model(
            batch.ids_BT,
            position_BT=batch.position_BT,
            sample_BT=batch.sample_BT,
            readout=lambda hidden_BTD, head: objective.loss(hidden_BTD, head, batch),
        )
        loss.backward()
        results.append((loss, {name: weight.grad for name, weight in model.named_parameters()}))

    (our_loss, our_gradients), (their_loss, their_gradients) = results
    assert_equal(their_loss, our_loss)
    found = from_fairseq2(their_gradients)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)

    # The row that fairseq2 keeps for padding is never read.
    assert not their_gradients["decoder_frontend.pos_encoder.weight"][0].any()


@pytest.mark.parametrize(("choice", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_compiled_layers_are_one_graph_for_all_packings(
    choice: Any,
    again: int,
    graphs: Graphs,  # noqa: F811
) -> None:
    """All layers share that graph, and selective checkpointing computes no attention again."""
    model = twin(decoder()).train()
    recompute(model, choice)
    compile_blocks(model)
    for sample_BT in packings(20):
        step(model, sample_BT)
    assert graphs.count == {"forward": 1, "backward": 1}
    assert graphs.attentions == {"forward": 1, "backward": again}
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("choice", "passes"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.usefixtures("graphs")
def test_attention_is_computed_once_a_layer_where_the_rest_is_computed_again(
    choice: Any, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compilation: calls of the operator's kernel, which takes samples one by one."""
    kernel, calls = packed_module._aten._scaled_dot_product_flash_attention_for_cpu, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return kernel(*args)

    backward = packed_module._aten._scaled_dot_product_flash_attention_for_cpu_backward
    monkeypatch.setattr(
        packed_module,
        "_aten",
        SimpleNamespace(
            _scaled_dot_product_flash_attention_for_cpu=counted,
            _scaled_dot_product_flash_attention_for_cpu_backward=backward,
        ),
    )

    model = twin(decoder()).train()
    recompute(model, choice)
    step(model, next(packings(1)))

    # Two rows, so two samples.
    assert len(calls) == passes * 2 * model.config.layers


def corrupted(length: int, seed: int) -> Corrupted:
    ids_T = random_ids(length, seed=seed) % VOCAB.used
    return Corrupted(ids_T.numpy(), torch.ones(length).numpy())


@torch.inference_mode()
def test_cached_steps_are_ours() -> None:
    """Prefixes and tails of different lengths, then token by token.

    They are compared with our cache, and with one pass over the whole row.
    """
    ours = decoder().double()
    prefixes = [random_ids(length, seed=length) for length in (7, 3)]
    rows = []
    for prefix in prefixes:
        rows.append([random_ids(tail + 4, seed=9 * tail + len(prefix)) for tail in (2, 5)])

    theirs = twin(ours)
    found, expected = cached(theirs, prefixes, rows, 4), cached(ours, prefixes, rows, 4)

    for prefix_T, own, one, other in zip(prefixes, rows, found, expected, strict=True):
        for row_T, found_TV, expected_TV in zip(own, one, other, strict=True):
            assert_equal(found_TV, expected_TV)
            assert_equal(found_TV, theirs(torch.cat([prefix_T, row_T])[None])[0, len(prefix_T) :])


@pytest.mark.parametrize("name", ["greedy", "top_p", "cd_k"])
def test_the_engine_answers_alike(name: str) -> None:
    ours, asked = small_decoder(), prompts()
    seeds = range(len(asked))
    found, expected = (
        generate(model, asked, DECODERS.build(name), vocab=VOCAB, seeds=seeds)
        for model in (twin(ours), ours)
    )
    assert [answer_T.tolist() for answer_T in found] == [answer_T.tolist() for answer_T in expected]


def test_more_positions_than_it_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^9 positions were asked for, the model has seq_len 8$"):
        twin(decoder(seq_len=8))(random_ids(1, 9))


def test_a_trained_one_is_read_from_its_files(tmp_path: Any) -> None:
    theirs, ids_BT = twin(decoder()), random_ids(1, 9)
    section = (
        '{"name": "fairseq2_cm3leon", "layers": 2, "width": 24, "head_size": 8, "seq_len": 32}'
    )
    (tmp_path / "config.json").write_text(
        f'{{"model": {section}, "vocab_size": {theirs.vocab_size}}}'
    )
    save_weights(tmp_path / "model.safetensors", theirs.state_dict())
    assert torch.equal(load_model(tmp_path)(ids_BT), theirs(ids_BT))


def test_two_processes_train_it_to_the_losses_of_ours_on_one(tmp_path: Any) -> None:
    trained(tmp_path / "ours", None)
    weights = trained(tmp_path / "theirs", 2, model="fairseq2_cm3leon")
    assert_alike(figures(tmp_path / "theirs"), figures(tmp_path / "ours"))
    assert "decoder.layers.1.self_attn.q_proj.weight" in weights


# ---------------------------------------------------------------------------- fairseq2's own passes


@torch.inference_mode()
def test_the_converted_weights_are_a_transformer_lm_of_the_same_function() -> None:
    """By fairseq2's own forward pass: padded, packed, and token by token from its own cache."""
    ours = decoder().double()
    lm = create_transformer_lm(ours.config, ours.vocab_size, TorchSDPA).double().eval()
    lm.load_state_dict(to_fairseq2(ours.state_dict()))

    ids_BT, lengths = random_ids(2, 10), [6, 10]
    padded_BTV = lm(ids_BT, BatchLayout.of(ids_BT, lengths))
    packed_TV = lm(torch.cat([ids_BT[0, :6], ids_BT[1]]), BatchLayout((16,), lengths, packed=True))

    for row, length in enumerate(lengths):
        expected_TV = ours(ids_BT[row : row + 1, :length])[0]
        assert_equal(padded_BTV[row, :length], expected_TV)
        assert_equal(packed_TV[6 * row : 6 * row + length], expected_TV)

    # A prefix of four tokens, then one token at a time.
    state, steps = IncrementalStateBag(max_num_steps=32), []
    for start, end in [(0, 4), *((t, t + 1) for t in range(4, 10))]:
        piece_BT = ids_BT[:, start:end]
        steps.append(lm(piece_BT, BatchLayout.of(piece_BT), state_bag=state))
        state.increment_step_nr(end - start)
    assert_equal(torch.cat(steps, 1), ours(ids_BT))


def test_the_environment_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fairseq2.device import CPU
    from fairseq2.recipe.internal.log import _StandardLogHelper
    from fairseq2.utils.structured import StandardValueConverter

    monkeypatch.setenv("SECRET_KEY", "hunter2")
    with caplog.at_level(logging.DEBUG, logger="fairseq2"):
        helper = _StandardLogHelper(CPU, StandardValueConverter())
        helper.log_software_info()
        helper.log_environment_variables()
    assert "PyTorch" in caplog.text
    assert "hunter2" not in caplog.text


# ------------------------------------------------------------------------------ xformers' attention

H, K = 2, 8
BIASES = ["identity", "causal", "window"]


def bias_of(name: str) -> Any:
    if name == "identity":
        return IdentityBias()
    return CausalAttentionBias(attn_window_len=3 if name == "window" else None)


def layout(shape: Sequence[int], lengths: list[int] | None) -> Any:
    """fairseq2's layout of a batch: padded where the shape is (N, S), packed where it is (S,)."""
    return BatchLayout(tuple(shape), lengths, packed=len(shape) == 1)


LAYOUTS: list[Any] = [
    ((2, 5), None),
    ((3, 6), [6, 2, 5]),
    ((9,), [4, 3, 2]),
    ((11,), [4, 3, 2]),
    ((5,), None),
]
"""Batches: full, padded, packed, packed with padding at the end, and one sequence alone."""


def real(shape: Sequence[int], lengths: list[int] | None) -> Tensor:
    """Whether each of the batch's tokens, laid in one row, is no padding."""
    return layout(shape, lengths).position_indices.flatten() >= 0


def tensors(shape: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, H, K, generator=generator).double().requires_grad_() for _ in range(3)
    ]


def block_diagonal(shape: Sequence[int], lengths: list[int] | None, bias: Any) -> Tensor:
    """fairseq2's own mask over the tokens of all rows, laid in one: (P, P), 0 or -inf."""
    place = layout(shape, lengths)
    mask = materialize_attention_bias(bias, place, place, torch.device("cpu"), torch.float64)
    if len(shape) == 1:
        return mask

    # A padded batch has one mask a row: they stand on the diagonal.
    N, S = shape
    whole_PP = torch.full((N * S, N * S), -math.inf, dtype=torch.float64)
    for row, mask_SS in enumerate(mask.reshape(-1, S, S).expand(N, S, S)):
        whole_PP[row * S : (row + 1) * S, row * S : (row + 1) * S] = mask_SS
    return whole_PP


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("shape", "lengths"), LAYOUTS)
def test_xformers_mask_is_fairseq2s(shape: Any, lengths: Any, bias: str) -> None:
    place = layout(shape, lengths)
    mask = _sdpa.xformers_mask(bias_of(bias), _sdpa._lengths(place), _sdpa._lengths(place))

    # What padding would attend to does not matter, so only real queries are compared.
    P = math.prod(shape)
    found_PP = mask.materialize((P, P), torch.float64)[real(shape, lengths)]
    expected_PP = block_diagonal(shape, lengths, bias_of(bias))[real(shape, lengths)]
    assert torch.equal(found_PP, expected_PP)


def test_the_last_query_is_as_late_as_the_last_key() -> None:
    """Two queries over four keys, then one over three, as when decoding from a cache."""
    mask = _sdpa.xformers_mask(CausalAttentionBias(), [2, 1], [4, 3])
    allowed = mask.materialize((3, 7)).exp().int().tolist()
    assert allowed == [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]


def by_mask(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, scale: float | None
) -> Tensor:
    """memory_efficient_attention by the formula of its documentation, on any device."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    scores = query * scale @ key.transpose(-2, -1)
    shares = (scores + attn_bias.materialize(tuple(scores.shape), scores.dtype)).softmax(-1)
    return torch.dropout(shares, p, True).matmul(value).transpose(1, 2)


@pytest.fixture
def xformers_everywhere(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """xformers' operator replaced by its formula; gives the list of masks that it receives."""
    import xformers.ops

    masks: list[Any] = []

    def operator(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, scale: Any
    ) -> Tensor:
        assert query.shape[0] == key.shape[0] == value.shape[0] == 1
        masks.append(attn_bias)
        return by_mask(query, key, value, attn_bias, p, scale)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", operator)
    monkeypatch.setattr(ATTENTIONS.get("xformers"), "missing", staticmethod(lambda device: ""))

    # The operator has no float64, in which alone the comparison is exact.
    monkeypatch.setattr(XformersSDPA, "_why_not", _without_float64(XformersSDPA._why_not))
    return masks


def _without_float64(why_not: Any) -> Any:
    return lambda self, q, *layouts: why_not(self, q.float(), *layouts)


def attended(sdpa: Any, inputs: list[Tensor], place: Any, keep_P: Tensor) -> list[Tensor]:
    """Attention's output without the padding, and the gradients of query, key and value."""
    q, k, v = inputs
    output = sdpa(q, place, k, place, v, AttentionBiasCache())[0]
    assert output.shape == q.shape
    output_PHK = output.reshape(-1, H, K)[keep_P]

    # A sum with unequal weights, as the plain sum has equal gradients at every output.
    weights = torch.arange(output_PHK.numel()).view_as(output_PHK).sin()
    return [output_PHK.detach(), *torch.autograd.grad((output_PHK * weights).sum(), inputs)]


def assert_is_torchs(shape: Any, lengths: Any, bias: Any, **settings: Any) -> None:
    place, inputs, keep_P = layout(shape, lengths), tensors(shape), real(shape, lengths)
    expected = attended(TorchSDPA(bias, **settings), inputs, place, keep_P)
    found = attended(XformersSDPA(bias, **settings), inputs, place, keep_P)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("shape", "lengths"), LAYOUTS)
def test_by_xformers_it_is_torchs(
    shape: Any, lengths: Any, bias: str, xformers_everywhere: list[Any]
) -> None:
    assert_is_torchs(shape, lengths, bias_of(bias))
    assert_is_torchs(shape, lengths, bias_of(bias), scale=0.3)
    assert len(xformers_everywhere) == 2


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("shape", "lengths"), LAYOUTS)
def test_on_a_cpu_it_is_torchs(shape: Any, lengths: Any, bias: str) -> None:
    assert_is_torchs(shape, lengths, bias_of(bias))


def test_all_layers_share_a_mask(xformers_everywhere: list[Any]) -> None:
    sdpa, cache = XformersSDPA(CausalAttentionBias()), AttentionBiasCache()
    place = layout((9,), [4, 5])
    for _ in range(3):
        q, k, v = tensors((9,))
        sdpa(q, place, k, place, v, cache)
    assert len({id(mask) for mask in xformers_everywhere}) == 1


@pytest.mark.usefixtures("xformers_everywhere")
def test_dropout_is_for_training() -> None:
    sdpa = XformersSDPA(CausalAttentionBias(), dropout_p=0.9)
    place, (q, k, v) = layout((2, 5), None), tensors((2, 5))

    def output() -> Tensor:
        return sdpa(q, place, k, place, v, AttentionBiasCache())[0]

    assert not torch.equal(output(), output())
    sdpa.eval()
    assert torch.equal(output(), output())


@pytest.mark.parametrize(
    ("bias", "q_place", "k_place", "reason"),
    [
        ("alibi", ((2, 4), None), ((2, 4), None), "it has no mask for ALiBiAttentionBias"),
        (
            "identity",
            ((2, 4), [4, 2]),
            ((2, 5), None),
            "it has no mask for padding among queries or keys alone",
        ),
        (
            "window",
            ((2, 4), None),
            ((2, 5), None),
            "it has no mask for a window over more keys than queries",
        ),
    ],
)
@pytest.mark.usefixtures("xformers_everywhere")
def test_what_xformers_does_not_have_is_torchs(
    bias: str, q_place: Any, k_place: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    bias_ = ALiBiAttentionBias(H) if bias == "alibi" else bias_of(bias)
    q_layout, k_layout = layout(*q_place), layout(*k_place)
    (q, _, _), (_, k, v) = tensors(q_place[0]), tensors(k_place[0], 1)

    # Twice, as the reason is logged once only.
    _sdpa._log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, logger="fairseq2"):
        for _ in range(2):
            found = XformersSDPA(bias_)(q, q_layout, k, k_layout, v, AttentionBiasCache())[0]

    expected = TorchSDPA(bias_)(q, q_layout, k, k_layout, v, AttentionBiasCache())[0]
    assert torch.equal(found, expected)
    assert caplog.text.count(f"Attention is computed by TorchSDPA, not by xformers: {reason}") == 1


def test_it_can_be_the_attention_of_all_of_fairseq2s_models() -> None:
    before = get_default_sdpa_factory()
    try:
        use_xformers()
        assert isinstance(create_default_sdpa(CausalAttentionBias()), XformersSDPA)
    finally:
        set_default_sdpa_factory(before)


def test_the_reason_on_a_cpu_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _sdpa._log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, logger="fairseq2"):
        for _ in range(2):
            assert_is_torchs((2, 5), None, CausalAttentionBias())
    assert caplog.text.count("not by xformers: it lacks a CUDA device") == 1
    chosen = twin(decoder()).attention_on(torch.device("cpu"))
    assert chosen.startswith("sdpa (xformers lacks a CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("shape", "lengths"), [((2, 128), None), ((3, 96), [96, 30, 70]), ((250,), [100, 90, 40])]
)
def test_on_a_gpu_it_is_torchs_in_bf16(shape: Any, lengths: Any, bias: str) -> None:
    place = BatchLayout(tuple(shape), lengths, packed=len(shape) == 1, device=torch.device("cuda"))
    generator, keep_P = torch.Generator().manual_seed(0), real(shape, lengths)
    given = [torch.randn(*shape, 2, 64, generator=generator).cuda() for _ in range(3)]

    # The output without padding and the gradients: xformers' in bfloat16, then torch's in float32.
    results = []
    for sdpa, dtype in ((XformersSDPA, torch.bfloat16), (TorchSDPA, torch.float32)):
        inputs = [each.to(dtype).requires_grad_() for each in given]
        q, k, v = inputs
        output = sdpa(bias_of(bias))(q, place, k, place, v, AttentionBiasCache())[0]
        output_PHK = output.reshape(-1, 2, 64)[keep_P.cuda()].float()
        results.append([output_PHK, *torch.autograd.grad(output_PHK.sin().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_on_a_gpu_the_logits_are_ours() -> None:
    ours, ids_BT = decoder(), random_ids(2, 16)
    expected, theirs = ours(ids_BT, **packed()), twin(ours).cuda()
    found = theirs(ids_BT.cuda(), **{name: tensor.cuda() for name, tensor in packed().items()})
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
