"""The model exported as an OPT of Hugging Face's library, and read back.

Logits are the same there, weights come back bit for bit, and what cannot be converted is refused
in a sentence.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import finish
from safetensors.torch import load_file, save_file

from cm3leon import run
from cm3leon.commands import export
from cm3leon.config import dump_yaml, from_mapping, to_mapping
from cm3leon.decoders.decoders import Greedy
from cm3leon.decoders.generate import generate
from cm3leon.experiment import load_experiment
from cm3leon.hub import export as hub_export
from cm3leon.models import form, forms, opt
from cm3leon.models.opt import OPT, from_opt_config, to_opt_config
from cm3leon.models.transformer import Transformer
from cm3leon.registry import IMAGE_TOKENIZERS, MODELS
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Prompt, UserError
from cm3leon.weights import save_weights

pytestmark = pytest.mark.stack

transformers = pytest.importorskip(
    "transformers", reason="the export needs transformers: pip install transformers"
)


def convert(**options: Any) -> None:
    """The command export with these options."""
    export.main(from_mapping(export.Options, options))


VOCAB = Vocab(text_size=300, image_size=16, sentinels=4)
CAPTIONS = ["a red dog", "a photo of 12 cats", "a red cat and a dog"] * 3


def randomised(config: Transformer.Config, vocab_size: int, seed: int = 0) -> Transformer:
    """Model whose every weight, the head's too, is large enough to show in logits of order 1."""
    model = Transformer(config, vocab_size=vocab_size)
    generator = torch.Generator().manual_seed(seed)
    stds = {"embedding": 1.0, "positions": 1.0, "head": config.width**-0.5}

    with torch.no_grad():
        for name, weight in model.named_parameters():
            std = stds.get(name.split(".")[0], 2 * config.width**-0.5)
            weight.normal_(std=std, generator=generator)
    return model.eval()


def to_opt_state(model: Transformer) -> dict[str, torch.Tensor]:
    return dict(OPT.to_state(model.state_dict(), model.config))


def to_opt(model: Transformer) -> Any:
    return OPT.build(to_opt_state(model), to_opt_config(model.config, model.vocab_size))


def random_ids(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------- pure conversions


@pytest.mark.parametrize(
    ("layers", "width", "head_size", "mlp_ratio", "seq_len"),
    [
        (1, 16, 16, 4, 7),
        (2, 48, 16, 1, 33),
        (3, 64, 8, 3, 20),
        (2, 128, 64, 4, 50),
        (1, 6, 3, 2, 1),
    ],
)
def test_logits_are_the_same(
    layers: int, width: int, head_size: int, mlp_ratio: int, seq_len: int
) -> None:
    config = Transformer.Config(
        layers=layers, width=width, head_size=head_size, mlp_ratio=mlp_ratio, seq_len=seq_len
    )
    model = randomised(config, VOCAB.size)
    ids_BT = random_ids(3, seq_len, below=VOCAB.size)
    opt, mask_BT = to_opt(model), torch.ones_like(ids_BT)

    with torch.inference_mode():
        logits_BTV = model(ids_BT)
        torch.testing.assert_close(
            opt(ids_BT, attention_mask=mask_BT).logits, logits_BTV, rtol=0, atol=1e-5
        )

        # In double precision the two differ by rounding alone, so the function is the same.
        exact_BTV = model.double()(ids_BT)
        torch.testing.assert_close(
            opt.double()(ids_BT, attention_mask=mask_BT).logits, exact_BTV, rtol=0, atol=1e-12
        )
    assert logits_BTV.std() > 0.5  # else the comparison would say nothing


@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_size=st.integers(1, 9),
    mlp_ratio=st.integers(1, 5),
    seq_len=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_state_and_shape_come_back(
    layers: int, heads: int, head_size: int, mlp_ratio: int, seq_len: int, seed: int
) -> None:
    config = Transformer.Config(
        layers=layers,
        width=heads * head_size,
        head_size=head_size,
        mlp_ratio=mlp_ratio,
        seq_len=seq_len,
        init_std=0.5,
    )
    model = randomised(config, 11, seed)
    state, returned = model.state_dict(), dict(OPT.from_state(to_opt_state(model), layers))
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name], state[name]) for name in state)

    full = {**opt.FIXED, **to_opt_config(config, 11)}
    assert Transformer.Config(**from_opt_config(full)) == config


def test_the_config_has_our_special_ids_and_no_dropout() -> None:
    config = transformers.OPTConfig(**to_opt_config(Transformer.Config(), VOCAB.size))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        VOCAB.eos,
        VOCAB.eos,
        VOCAB.pad,
    )
    assert config.dropout == config.attention_dropout == config.layerdrop == 0
    assert config.to_dict().items() >= opt.FIXED.items()


def test_without_the_library_the_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for options in ({"to": "hf", "run": "x", "out": "y"}, {"to": "cm3leon", "hf": "x", "out": "y"}):
        with pytest.raises(UserError, match=r"pip install transformers$"):
            convert(**options)


# ------------------------------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, which looks like a finished run, and its export `hf`.

    All tests share it: they change copies of it only.
    """
    folder = tmp_path_factory.mktemp("export")
    experiment = load_experiment(
        "digits_smoke",
        [
            "model={name: cm3leon_tiny, layers: 2, width: 32, head_size: 16, seq_len: 40, "
            "position_init_std: 0.125}",
            "text_tokenizer.vocab_size=300",
            "image_tokenizer.codebook_size=16",
            "sentinels=4",
        ],
    )
    (folder / "run" / "pretraining").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text(dump_yaml(to_mapping(experiment)))

    # Tokenizers and weights are random, but each has its file and its record.
    (folder / "run" / "text_tokenizer").mkdir()
    TextTokenizer.train(TextTokenizerConfig(vocab_size=300), CAPTIONS).save(
        folder / "run" / "text_tokenizer"
    )

    (folder / "run" / "image_tokenizer").mkdir()
    image_tokenizer = IMAGE_TOKENIZERS.build(experiment.image_tokenizer)
    save_weights(folder / "run" / "image_tokenizer" / "model.safetensors", image_tokenizer)

    pretraining = folder / "run" / "pretraining"
    save_weights(pretraining / "model.safetensors", randomised(experiment.model.config, VOCAB.size))
    made_of = {"model": to_mapping(experiment.model), "vocab_size": VOCAB.size}
    (pretraining / "config.json").write_text(json.dumps(made_of))

    stages = ("pretraining", "text_tokenizer", "image_tokenizer")
    finish(*(folder / "run" / name for name in stages))
    convert(to="hf", run=str(folder / "run"), out=str(folder / "hf"))
    return folder


def decoder(pretraining: Path) -> Transformer:
    """The model in a folder as the pretraining stage writes it."""
    content = json.loads((pretraining / "config.json").read_text())
    model = MODELS.build(content["model"], vocab_size=content["vocab_size"])
    model.load_state_dict(load_file(pretraining / "model.safetensors"))
    return model.eval()


@torch.inference_mode()
def test_a_fresh_load_gives_the_same_logits(made: Path) -> None:
    opt = transformers.OPTForCausalLM.from_pretrained(made / "hf")
    ids_BT = random_ids(2, 40, below=VOCAB.size)
    expected_BTV = decoder(made / "run" / "pretraining")(ids_BT)
    torch.testing.assert_close(opt(ids_BT).logits, expected_BTV, rtol=0, atol=1e-5)
    assert opt.dtype == torch.float32
    assert not any((made / "hf").glob("*.bin"))


def test_the_export_holds_the_tokenizer_the_ranges_and_the_experiment(made: Path) -> None:
    run_folder, hf = made / "run", made / "hf"
    assert (hf / "tokenizer.json").read_bytes() == (
        run_folder / "text_tokenizer" / "tokenizer.json"
    ).read_bytes()

    extras = json.loads((hf / "cm3leon.json").read_text())
    # Aims are about what a model is asked, and stay with the run.
    whole = to_mapping(load_experiment(str(run_folder / "config.yaml")))
    assert extras["experiment"] == {**whole, "aims": []}
    assert extras["ids"] == {
        "pad": 0, "eos": 1, "break": 2, "end_of_span": 3,
        "text": [4, 300], "image": [300, 316], "sentinels": [316, 320], "reserved": [320, 512],
    }  # fmt: skip

    readme = (hf / "README.md").read_text()
    assert "| `image` | 300 to 315 |" in readme
    assert "| `end_of_span` | 3 |" in readme


def test_the_library_reads_the_tokenizer_as_it_is(made: Path) -> None:
    ours = TextTokenizer.load(made / "run" / "text_tokenizer", TextTokenizerConfig(vocab_size=300))
    theirs = transformers.AutoTokenizer.from_pretrained(made / "hf")
    for text in (*CAPTIONS, "2024 <eos> <pad>é", ""):
        assert theirs(text).input_ids == ours.encode(text).tolist()


def test_the_way_back_is_exact(made: Path, tmp_path: Path) -> None:
    convert(to="cm3leon", hf=str(made / "hf"), out=str(tmp_path / "back"))
    pretraining = made / "run" / "pretraining"
    written = sorted(file.name for file in (tmp_path / "back").iterdir())
    assert written == ["config.json", "model.safetensors"]

    for name in ("model.safetensors", "config.json"):
        back, before = (tmp_path / "back" / name), pretraining / name
        if name == "config.json":
            assert json.loads(back.read_text()) == json.loads(before.read_text())
        else:
            assert back.read_bytes() == before.read_bytes()


def test_an_opt_that_never_was_ours_comes_in_half_precision(tmp_path: Path) -> None:
    model = randomised(
        Transformer.Config(layers=1, width=32, head_size=8, seq_len=20, init_std=0.25), 100
    )
    to_opt(model).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    convert(to="cm3leon", hf=str(tmp_path / "hf"), out=str(tmp_path / "back"))
    back = decoder(tmp_path / "back")
    assert (back.config, back.vocab_size) == (model.config, 100)
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.bfloat16().float())


def test_an_out_folder_that_is_empty_is_used_and_one_in_a_new_folder_is_made(
    made: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        convert(to="cm3leon", hf=str(made / "hf"), out=str(out))
        assert (out / "model.safetensors").is_file()
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("to", ["hf", "cm3leon"])
def test_a_failure_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("differ")

    monkeypatch.setattr(form, "verify", fails)
    monkeypatch.setattr(hub_export, "verify", fails)

    source = {"hf": {"run": str(made / "run")}, "cm3leon": {"hf": str(made / "hf")}}[to]
    with pytest.raises(RuntimeError, match="differ"):
        convert(to=to, **source, out=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["model", "state"])
def test_a_wrong_conversion_is_noticed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def with_other_activation(*given: Any) -> dict[str, Any]:
        return {**to_opt_config(*given), "activation_function": "gelu"}

    # A form that says something else than the model computes: another activation, or the query and
    # key weights exchanged.
    query, key, value = OPT.inner["qkv.weight"]
    damaged = {
        "model": replace(OPT, to_config=with_other_activation),
        "state": replace(OPT, inner={**OPT.inner, "qkv.weight": (key, query, value)}),
    }
    monkeypatch.setitem(forms.FORMS, Transformer, damaged[damage])
    with pytest.raises((RuntimeError, UserError), match=r'differ|must be "relu"'):
        convert(to="hf", run=str(made / "run"), out=str(tmp_path / "out"))


# -------------------------------------------------------------------------------- greedy generation


@torch.inference_mode()
def test_greedy_generation_of_the_library_is_our_greedy_decoder(made: Path) -> None:
    model = decoder(made / "run" / "pretraining")
    opt = transformers.OPTForCausalLM.from_pretrained(made / "hf")

    rng = np.random.default_rng(0)
    prompts = [np.concatenate([[VOCAB.eos], rng.integers(4, 300, size)]) for size in (3, 9, 5, 1)]
    answers = generate(
        model,
        [Prompt(ids_T, "text", 25, VOCAB.end_of_span) for ids_T in prompts],
        Greedy(Greedy.Config()),
        vocab=VOCAB,
        seeds=range(len(prompts)),
    )

    # The library wants prompts of one length: padded in front, the padding masked out.
    longest = max(map(len, prompts))
    padded, mask = [], []
    for ids_T in prompts:
        padding = longest - len(ids_T)
        padded.append([VOCAB.pad] * padding + ids_T.tolist())
        mask.append([0] * padding + [1] * len(ids_T))
    ids_BT, mask_BT = torch.tensor(padded), torch.tensor(mask)

    # Our engine draws text alone where text is asked for, so the library is held to the same ids.
    allowed = [VOCAB.end_of_span, *range(*VOCAB.id_range("text"))]
    outputs_BT = opt.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=25,
        do_sample=False,
        eos_token_id=VOCAB.end_of_span,
        prefix_allowed_tokens_fn=lambda row, ids_T: allowed,
    )

    # The library's output goes on to the end of the span; ours ends before it.
    for answer_T, output_T in zip(answers, outputs_BT[:, longest:].tolist(), strict=True):
        end = [*output_T, VOCAB.end_of_span].index(VOCAB.end_of_span)
        assert answer_T.tolist() == output_T[:end]
    assert len(np.unique(np.concatenate(answers))) > 10  # not one token over and over


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"to": "hff", "out": "x"}, r'^to is "hff"; it must be one of hf, peft, cm3leon$'),
        (
            {"to": {"hf": 1}, "out": "x"},
            r'^to is \{"hf": 1\}; it must be one of hf, peft, cm3leon$',
        ),
        (
            {"to": "hf", "out": "x"},
            "^`export to=hf` needs a folder to convert: run=DIR, for example run=runs/digits$",
        ),
        (
            {"to": "cm3leon", "out": "x"},
            "^`export to=cm3leon` needs a folder to convert: hf=DIR, for example hf=exported$",
        ),
        ({"to": "hf", "runn": "x", "out": "y"}, r"^runn is not a known key; did you mean run\?"),
        (
            {"to": "cm3leon", "hf": "x", "run": "x", "out": "y"},
            "^run is given, which to=cm3leon does not read; give hf$",
        ),
        ({"to": "hf", "run": 7, "out": "y"}, r"^run is 7; it must be a path$"),
        (
            {"to": "hf", "run": "no/such", "out": "y"},
            r"^run: no/such is not the folder of a run with a finished pretraining: no/such/config.yaml is missing",
        ),
        (
            {"to": "cm3leon", "hf": "no/such", "out": "y"},
            r"^hf: no/such/config.json does not exist; give the folder of a model",
        ),
    ],
)
def test_unfit_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        convert(**options)


@pytest.mark.parametrize("to", ["hf", "cm3leon"])
@pytest.mark.parametrize("taken", ["folder", "file"])
def test_an_out_that_is_taken_is_refused(made: Path, tmp_path: Path, to: str, taken: str) -> None:
    out = tmp_path / "out"
    if taken == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.write_text("mine")

    source = {"hf": {"run": str(made / "run")}, "cm3leon": {"hf": str(made / "hf")}}[to]
    with pytest.raises(
        UserError, match=r"^out: .*/out exists already; out must be a new or empty folder$"
    ):
        convert(to=to, **source, out=str(out))
    assert list(tmp_path.iterdir()) == [out]


def without_marker(folder: Path) -> None:
    (folder / "pretraining" / "stage.json").unlink()


def without_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "text_tokenizer")


def with_more_layers(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(
        config.read_text().replace("layers: 2\n  width: 32", "layers: 3\n  width: 32")
    )


def with_more_sentinels(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("sentinels: 4", "sentinels: 400"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            without_marker,
            r"^run: .* is not the folder of a run with a finished pretraining: .*pretraining/stage.json is missing$",
        ),
        (
            without_tokenizer,
            r"^run: .* is not the folder of a run with .*/text_tokenizer/stage.json is missing$",
        ),
        (
            with_more_layers,
            r"^run: the model of .*/config.yaml is not the one that was trained; "
            r"run it to its end$",
        ),
        (
            with_more_sentinels,
            r"^run: the model of .*/config.yaml is not the one that was trained; "
            r"run it to its end$",
        ),
    ],
)
def test_runs_that_are_not_finished_are_refused(
    made: Path, tmp_path: Path, change: Callable[[Path], None], sentence: str
) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(UserError, match=sentence):
        convert(to="hf", run=str(tmp_path / "run"), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("registries")
def test_a_model_of_another_class_is_refused(made: Path, tmp_path: Path) -> None:
    MODELS.register("other")(type("Other", (Transformer,), {}))
    shutil.copytree(made / "run", tmp_path / "run")
    for file in (
        tmp_path / "run" / "config.yaml",
        tmp_path / "run" / "pretraining" / "config.json",
    ):
        file.write_text(file.read_text().replace("cm3leon_tiny", "other"))

    finish(tmp_path / "run" / "pretraining")
    # Its record is up to date, so that only the class is in the way.
    with pytest.raises(
        UserError,
        match=r"^run: a model other cannot be exported with to=hf; "
        r"only cm3leon and llama and their presets can$",
    ):
        convert(to="hf", run=str(tmp_path / "run"), out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"enable_bias": True}, r"enable_bias is true; it must be false$"),
        (
            {"layer_norm_elementwise_affine": True},
            r"layer_norm_elementwise_affine is true; it must be false$",
        ),
        ({"do_layer_norm_before": False}, r"do_layer_norm_before is false; it must be true$"),
        (
            {"_remove_final_layer_norm": True},
            r"_remove_final_layer_norm is true; it must be false$",
        ),
        ({"activation_function": "gelu"}, r'activation_function is "gelu"; it must be "relu"$'),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is true; it must be false$"),
        ({"word_embed_proj_dim": 16}, r"word_embed_proj_dim is 16; it must be 32$"),
        ({"model_type": "gpt2"}, r'model_type is "gpt2"; it must be "opt" or "chameleon"$'),
        ({"ffn_dim": 100}, r"ffn_dim is 100; it must be a multiple of hidden_size 32$"),
        ({"num_attention_heads": 5}, r"num_attention_heads is 5; it must divide hidden_size 32$"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; it must divide hidden_size 32$"),
        ({"num_hidden_layers": 0}, r"model.layers is 0; it must be a whole number, at least 1$"),
        (
            {"hidden_size": "wide"},
            r'hidden_size is "wide"; it must be a whole number$',
        ),
    ],
)
def test_an_opt_that_is_not_this_decoder_is_refused(
    made: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))

    with pytest.raises(UserError, match=sentence) as refusal:
        convert(to="cm3leon", hf=str(tmp_path / "hf"), out=str(tmp_path / "out"))
    assert str(refusal.value).startswith(f"hf: {tmp_path / 'hf'}")
    assert not (tmp_path / "out").exists()


def test_the_defaults_of_an_opt_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(UserError, match=r"it must be (true|false)$"):
        convert(to="cm3leon", hf=str(tmp_path), out=str(tmp_path / "out"))


def without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_half_a_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def with_more_ids(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 512', '"vocab_size": 513'))


def with_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def with_another_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def test_exported_files_have_the_mode_that_the_umask_gives(made: Path, tmp_path: Path) -> None:
    expected = 0o666 & ~_umask()
    convert(to="cm3leon", hf=str(made / "hf"), out=str(tmp_path / "out"))
    for folder in (made / "hf", tmp_path / "out"):
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert any(file.suffix == ".safetensors" for file in files)
        assert {file.stat().st_mode & 0o777 for file in files} == {expected}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_adapter_beside_the_weights_is_merged(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    name = "model.decoder.layers.0.self_attn.k_proj"
    weight = load_file(made / "hf" / "model.safetensors")[f"{name}.weight"]

    first, second = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    prefix = f"base_model.model.{name}.lora_"
    save_file(
        {f"{prefix}A.weight": first, f"{prefix}B.weight": second},
        tmp_path / "hf" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["k_proj"]}
    (tmp_path / "hf" / "adapter_config.json").write_text(json.dumps(settings))

    # alpha / r = 2 scales the product of the adapter's two matrices.
    convert(to="cm3leon", hf=str(tmp_path / "hf"), out=str(tmp_path / "out"))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    _, key, _ = merged["blocks.0.qkv.weight"].chunk(3)
    torch.testing.assert_close(key, weight + 2 * (second @ first))

    # An adapter alone is no model.
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^hf: .* has no weights"):
        convert(to="cm3leon", hf=str(tmp_path / "hf"), out=str(tmp_path / "other"))


def with_weights_of_its_own(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.decoder.layers.0.self_attn.q_proj.lora_A"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_head, r"^hf: .* lacks lm_head.weight$"),
        (with_weights_of_its_own, r"^hf: .* has the unknown model.*lora_A$"),
        (without_weights, r"^hf: .* has no weights; "),
        (with_half_a_file, r"^hf: .* is not a safetensors file, or is damaged$"),
        (
            with_more_ids,
            r"^hf: .* has another shape for lm_head.weight, model.*embed_tokens.weight$",
        ),
        (with_a_broken_config, r"config.json is damaged: it is not JSON"),
        (with_another_config, r"config.json is \[\]; it must be an object$"),
    ],
)
def test_damaged_folders_are_refused(
    made: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=sentence):
        convert(to="cm3leon", hf=str(tmp_path / "hf"), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- command line


@pytest.mark.once
def test_the_command_in_a_process(made: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cm3leon.run",
            "export",
            "to=hf",
            f"run={made / 'run'}",
            f"out={tmp_path / 'hf'}",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {tmp_path / 'hf'}\n"
    for name in ("model.safetensors", "config.json", "cm3leon.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (made / "hf" / name).read_bytes()


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["export", "to=hff"]) == 2
    assert capsys.readouterr().err == (
        'cm3leon: to is "hff"; it must be one of hf, peft, cm3leon\n'
        "cm3leon: `export` needs a folder to make: out=DIR, for example out=exported\n"
    )
