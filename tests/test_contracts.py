"""Contracts that every registered component keeps.

The tests run over the registries, so a new component is covered once it is registered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from banks import bank_of
from corpora import CORPORA as CAPTIONED
from instruction_corpora import INSTRUCTIONS
from published import IMAGE_TOKENIZER_FILES

from cm3leon import config
from cm3leon.data.source import Skipped
from cm3leon.models.base import Model
from cm3leon.objectives.packing import collate, pack
from cm3leon.registry import (
    DECODERS,
    IMAGE_TOKENIZERS,
    LAUNCHERS,
    MODELS,
    OBJECTIVES,
    REGISTRIES,
    RETRIEVERS,
    SOURCES,
    TASKS,
    Registry,
    discover,
)
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Document, Sample, TokenDocument, TokenSegment, UserError

pytestmark = pytest.mark.stack

discover()


def every(*registries: Registry[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over `(registry, name)` of every component in the registries.

    A model that needs a package of the cluster's stack is marked as such.
    """
    pairs: list[Any] = []
    for registry in registries:
        for name in registry.names():
            marks: Any = ()
            if registry is MODELS and MODELS.get(name).missing is not Model.missing:
                marks = pytest.mark.cluster
            label = f"{registry.kind.replace(' ', '_')}-{name}"
            pairs.append(pytest.param(registry, name, id=label, marks=marks))
    return pytest.mark.parametrize(("registry", "name"), pairs)


@every(*REGISTRIES)
def test_says_what_it_is_and_documents_every_field(registry: Registry[Any], name: str) -> None:
    assert config.summary_of(registry.get(name)).endswith((".", ":"))
    for doc in registry.describe(name):
        assert doc.sentence.endswith((".", "?", ")")), doc.name


@every(*REGISTRIES)
def test_defaults_are_valid_or_only_required_fields_are_missing(
    registry: Registry[Any], name: str
) -> None:
    required = [doc.name for doc in registry.describe(name) if doc.default == "required"]
    if required:
        with pytest.raises(UserError, match="is missing; it must be"):
            registry.check(name)
    else:
        component = registry.check(name)
        assert registry.check(config.to_mapping(component)) == component


@every(*REGISTRIES)
def test_unknown_key_is_refused_by_its_path(registry: Registry[Any], name: str) -> None:
    with pytest.raises(UserError, match=r"^here\.no_such_key is not a known key"):
        registry.check({"name": name, "no_such_key": 1}, "here")


# What each kind of component has to do. Components are built small: `SMALL` has a value for each
# size, and those that a component's `Config` has are set.

CORPORA = CAPTIONED | INSTRUCTIONS
VOCAB = Vocab(text_size=40, image_size=16, sentinels=8)
CODES = 4
SMALL: dict[str, Any] = {
    "layers": 1,
    "mlp_width": 48,
    "kv_heads": 1,
    "width": 32,
    "head_size": 16,
    "seq_len": 32,
    "image_size": 16,
    "codebook_size": 16,
    "code_dim": 8,
    "channels": 32,
    "discriminator_layers": 1,
    "encoder": {"architecture": None, "width": 16, "layers": 1, "embed_dim": 16},
}


def small(registry: Registry[Any], name: str, **extra: Any) -> dict[str, Any]:
    """Settings of a component, with each of its sizes as in `SMALL`."""
    fields = [doc.name for doc in registry.describe(name)]
    sizes = {key: value for key, value in SMALL.items() if key in fields}
    return {"name": name, **sizes, **extra}


def corpus(name: str, folder: Any) -> dict[str, Any]:
    """Settings of a source and a small corpus for it; none for a plugin's source without one."""
    if name not in CORPORA:
        return {}
    return CORPORA[name](folder)


def document(name: str = "query", first_code: int = 0) -> TokenDocument:
    """A text of three tokens and an image."""
    codes = VOCAB.image_ids(np.arange(first_code, first_code + CODES))
    text = TokenSegment("text", np.array([10, 11, 12]))
    return TokenDocument(name, (text, TokenSegment("image", codes)))


@every(OBJECTIVES)
def test_objective_keeps_every_token_within_the_limit(registry: Registry[Any], name: str) -> None:
    objective = registry.build(small(registry, name), vocab=VOCAB)
    sample = lay_out(Sample(document(), (document("other", 8),)), VOCAB)

    for seed in range(50):
        corrupted = objective.corrupt(sample, np.random.default_rng(seed), 30)
        assert len(corrupted.weight_T) == len(corrupted.ids_T) <= 30
        assert not (set(sample.ids_T.tolist()) - set(corrupted.ids_T.tolist()))

    # A head of zeros gives each of the vocabulary's tokens the same probability.
    batch = collate([pack([corrupted], 32, VOCAB.pad)], torch.device("cpu"))
    head = torch.nn.Linear(8, VOCAB.size, bias=False)
    loss, figures = objective.loss(torch.zeros(1, 32, 8), head, batch)
    assert loss.item() == pytest.approx(np.log(VOCAB.size), abs=1e-5)
    assert figures["tokens"] == len(corrupted.ids_T)


@every(DECODERS)
def test_decoder_leaves_something_to_draw(registry: Registry[Any], name: str) -> None:
    decoder = registry.build(small(registry, name))
    torch.manual_seed(0)
    conditional_BV, unconditional_BV = torch.randn(3, 20), torch.randn(3, 20)

    for second in (None, unconditional_BV):
        logits_BV = decoder.logits(conditional_BV.clone(), second)
        assert logits_BV.shape == (3, 20)
        assert not logits_BV.isnan().any()
        assert logits_BV.isfinite().any(dim=1).all()
        assert not (logits_BV == float("inf")).any()
    assert decoder.streams in (1, 2, 3)


@every(TASKS)
def test_task_asks_and_reads_back(registry: Registry[Any], name: str) -> None:
    task = registry.build(small(registry, name), vocab=VOCAB, grid=(2, 2))
    query = document()
    for retrieved in ((), (document("other", 8),)):
        prompt = task.prompt(query, retrieved)
        assert prompt.modality == task.answers_in
        assert (prompt.unconditional_T is not None) == task.guided
        assert prompt.ids_T[0] == VOCAB.eos

        low, high = VOCAB.id_range(prompt.modality)
        completed = task.complete(query, np.arange(low, high)[: prompt.length])
        assert task.keeps_given(query, completed)
        assert len(completed.segments[1].ids_T) == CODES


@every(IMAGE_TOKENIZERS)
def test_image_tokenizer_gives_codes_and_images(
    registry: Registry[Any], name: str, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    files: dict[str, Any] = {}
    if name in IMAGE_TOKENIZER_FILES:
        files = IMAGE_TOKENIZER_FILES[name](tmp_path)
    tokenizer = registry.build(small(registry, name, **files))

    side = tokenizer.image_size
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)

    # A pretrained tokenizer is never trained, and the same files give the same one.
    if tokenizer.pretrained:
        with pytest.raises(UserError, match="used as it is"):
            tokenizer.training_module()
        again = registry.build(small(registry, name, **files))
        assert tokenizer.fingerprint() == again.fingerprint()
    else:
        loss, figures = tokenizer.training_module().train().loss(torch.from_numpy(images_BHWC))
        loss.backward()
        assert figures["images"] == 3

    codes_BN = tokenizer.eval().encode(images_BHWC)
    assert codes_BN.shape == (3, tokenizer.grid**2)
    assert 0 <= codes_BN.min() <= codes_BN.max() < tokenizer.codebook_size

    rebuilt_BHWC = tokenizer.decode(codes_BN)
    assert rebuilt_BHWC.shape == images_BHWC.shape
    assert rebuilt_BHWC.dtype == np.uint8


@every(RETRIEVERS)
def test_retriever_never_returns_the_query_itself(registry: Registry[Any], name: str) -> None:
    torch.manual_seed(0)
    retriever = registry.build({**small(registry, name), "threshold": 2.0})
    retriever.encoder.eval()
    assert retriever.vector_width(retriever.config) == retriever.encoder.embed_dim

    images_BHWC = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    texts = [f"text {n}" for n in range(6)]
    bank = bank_of(retriever.parts(texts, images_BHWC), pairs_only=True)

    # No similarity reaches the threshold of 2, so only the query itself may be left out.
    for modality in ("text", "image"):
        results, _ = retriever.retrieve(
            bank, retriever.parts(texts, images_BHWC), modality, exclude_Q=np.arange(6), count=3
        )
        for own, rows in enumerate(results.tolist()):
            assert len(set(rows)) == 3
            assert own not in rows


@every(SOURCES)
@pytest.mark.once
def test_source_yields_documents_in_a_fixed_order(
    registry: Registry[Any], name: str, tmp_path: Any
) -> None:
    settings = small(registry, name, **corpus(name, tmp_path))
    source = registry.build(settings)
    first, second = list(source.documents()), list(source.documents())
    assert sum(isinstance(item, Document) for item in first) >= 4 or not source.parts()

    ids = [item.id for item in first if isinstance(item, Document)]
    assert ids == [item.id for item in second if isinstance(item, Document)]
    assert len(set(ids)) == len(ids)

    for item in first:
        if isinstance(item, Skipped):
            assert item.reason
        else:
            assert item.segments
            assert item.image is None or (item.image.dtype == np.uint8 and item.image.shape[2] == 3)
            assert item.label is None or source.class_in(item.text) == item.label

    # The fingerprint depends on the files, not on the object that read them.
    assert source.fingerprint() == registry.build(settings).fingerprint()


def _same_item(a: Any, b: Any) -> bool:
    """Whether two reads gave the same document, or skipped it for the same reason."""
    if isinstance(a, Skipped) or isinstance(b, Skipped):
        return bool(a == b)
    return a.id == b.id and len(a.segments) == len(b.segments) and np.array_equal(a.image, b.image)


@every(SOURCES)
@pytest.mark.once
def test_source_goes_on_from_every_item(registry: Registry[Any], name: str, tmp_path: Any) -> None:
    source = registry.build(small(registry, name, **corpus(name, tmp_path)))
    for part in source.parts():
        items = list(source.read(part))
        for start in [*range(min(len(items), 12)), len(items), len(items) + 3]:
            rest = list(source.read(part, start))
            assert len(rest) == max(0, len(items) - start)
            assert all(_same_item(a, b) for a, b in zip(items[start:], rest, strict=True))


@every(LAUNCHERS)
def test_launcher_counts_gpus_and_says_whether_it_waits(registry: Registry[Any], name: str) -> None:
    launcher = registry.build(name)
    assert launcher.gpus >= 1
    assert launcher.detached in (True, False)
    assert callable(launcher.launch)
