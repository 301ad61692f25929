"""Public weights become a run folder, which computes what transformers computes with them.

The weights are those of a small random Chameleon in the form that the real one is published in.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from corpora import encoded, picture
from published import random_tensors, taming_shapes, write_taming
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cm3leon import CM3Leon
from cm3leon.commands.traced_sample import _names
from cm3leon.decoders.processors import gumbel_noise, stream_key
from cm3leon.models.pretrained import load_model
from cm3leon.run import main
from cm3leon.serve.service import Service
from cm3leon.stages import importing
from cm3leon.stages.pretraining import check_tokenizers
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.text_tokenizer import text_tokenizer_inputs
from cm3leon.tokenizers.families import FAMILIES, renumbered
from cm3leon.tokenizers.layout import Layout, LayoutTable
from cm3leon.types import TokenDocument, UserError

pytestmark = pytest.mark.stack

CODES = 16
TEXTS = ["a red dog on a blue sofa", "two cats, 12 dogs", "What is it? It is a cow."] * 4


def code_name(code: int) -> str:
    return f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"


def published_tokenizer(masks: int = 512) -> dict[str, Any]:
    """tokenizer.json as Chameleon's: one vocabulary of special tokens, image codes and text.

    Its special tokens and codes are added tokens, which are recognised inside any text.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(TEXTS, trainer)
    content = json.loads(learner.to_str())

    # In the order of their ids; the last reserved ones are Lumina-mGPT's for rows and sizes.
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    special += [code_name(code) for code in range(CODES)]
    special += ["<eoss>", "<racm3:break>"]
    special += [f"<reserved{8194 + number:05d}>" for number in range(masks)]
    special += ["<reserved08706>", "<image>", "<reserved08799>"]
    special += ["<reserved08801>", "<reserved08802>", "<reserved08804>"]
    learned = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    content["model"]["vocab"] = {name: number for number, name in enumerate([*special, *learned])}

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = [
        {"id": number, "content": name, "special": True, **flags}
        for number, name in enumerate(special)
    ]

    # Every encoded text begins with <s>.
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    return content


def publish(folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> dict[str, Path]:
    """Hugging Face's folder with weights in several files, and the file of the image tokenizer."""
    library = pytest.importorskip("transformers")
    tokenizer = published_tokenizer()
    vocabulary = tokenizer["model"]["vocab"]

    # A small model, whose larger weights make clear choices.
    torch.manual_seed(0)
    config = library.ChameleonConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=fields.pop("num_key_value_heads", 4),
        max_position_embeddings=128,
        vocabulary_map=vocabulary,
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
        initializer_range=0.2,
        **fields,
    )
    model = library.ChameleonForConditionalGeneration(config).to(dtype)

    hf = folder / "chameleon"
    model.save_pretrained(hf, max_shard_size="60KB")
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    vqgan = write_taming(folder / "vqgan.ckpt", random_tensors(taming_shapes(**SMALL)))
    return {"hf": hf, "vqgan": vqgan}


SMALL: dict[str, Any] = {
    "channels": 32,
    "multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_levels": (1,),
    "z_channels": 32,
    "code_dim": 8,
    "codebook_size": CODES,
}


def imported(folder: Path, *, family: str = "chameleon", **fields: Any) -> Path:
    """The run that the command import makes of published files."""
    files = publish(folder, **fields)
    words = ["import", f"from={family}", *(f"{key}={path}" for key, path in files.items())]
    assert main([*words, "image_size=8", f"out={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("imported"))


def theirs(run: Path) -> Any:
    """The published model as transformers loads it."""
    library = pytest.importorskip("transformers")
    folder = run.parent / "chameleon"
    return library.ChameleonForConditionalGeneration.from_pretrained(folder).eval()


def old_ids(run: Path) -> torch.Tensor:
    """Published id of each id of the run, which numbers the tokens in another order."""
    return torch.tensor(json.loads((run / "import.json").read_text())["ids"])


@pytest.mark.parametrize(
    "fields", [{}, {"swin_norm": True, "num_key_value_heads": 2}, {"dtype": torch.bfloat16}]
)
@torch.inference_mode()
def test_logits_are_those_of_transformers(fields: Any, tmp_path: Path) -> None:
    run = imported(tmp_path, **fields)
    model, other, old = load_model(run), theirs(run), old_ids(run)
    assert next(model.parameters()).dtype == fields.get("dtype", torch.float32)
    other = other.to(next(model.parameters()).dtype)
    ids_BT = torch.randint(len(old), (2, 30), generator=torch.Generator().manual_seed(1))
    hidden_BTD = other.model(input_ids=old[ids_BT]).last_hidden_state
    expected_BTV = other.lm_head(hidden_BTD)[..., old]

    # In bfloat16 two orders of the same operations differ by far more.
    atol, rtol = (0.1, 0.05) if fields.get("dtype") else (2e-5, 1e-5)
    found_BTV = model(ids_BT)[..., : len(old)].float()
    torch.testing.assert_close(found_BTV, expected_BTV.float(), atol=atol, rtol=rtol)


def test_text_is_the_same_pieces_and_no_special_token(run: Path) -> None:
    tokenizer, old = CM3Leon.load(run).run.text_tokenizer, old_ids(run)
    published = Tokenizer.from_str(json.dumps(published_tokenizer()))
    for text in (*TEXTS[:3], "é 🦎\n x"):
        expected = published.encode(text, add_special_tokens=False).ids
        assert old[tokenizer.encode(text)].tolist() == expected
        assert tokenizer.decode(tokenizer.encode(text)) == text

    # A text that spells special tokens has pieces of text only.
    forged = "a</s><racm3:break>IMGIMGAZ<eoss><reserved08199><image>"
    assert tokenizer.decode(tokenizer.encode(forged)) == forged
    assert tokenizer.encode(forged).min() >= len(tokenizer.specials)


def test_ids_are_in_the_familys_order(run: Path) -> None:
    vocab, old = CM3Leon.load(run).run.vocab, old_ids(run)
    names = {number: name for name, number in published_tokenizer()["model"]["vocab"].items()}

    def name(id_: int) -> str:
        return names[int(old[id_])]

    first = [name(id_) for id_ in range(5)]
    assert first == ["<pad>", "</s>", "<racm3:break>", "<eoss>", "<s>"]
    codes = [name(vocab.image_start + code) for code in range(CODES)]
    assert codes == [code_name(code) for code in range(CODES)]

    assert name(vocab.sentinel(0)) == "<reserved08194>"
    assert name(vocab.sentinel(511)) == "<reserved08705>"
    assert name(vocab.layout.begin) == "<s>"
    assert [name(id_) for id_ in vocab.layout.between_documents] == ["<reserved08706>"]

    # Every published token is there, once.
    assert sorted(old.tolist()) == list(range(len(names)))


@torch.inference_mode()
def test_greedy_text_and_images_are_those_of_a_plain_loop_over_transformers(run: Path) -> None:
    model, other, old = CM3Leon.load(run, precision="float32"), theirs(run), old_ids(run)
    vocab = model.run.vocab
    names = published_tokenizer()["model"]["vocab"]

    def loop(
        ids: list[int], allowed: list[int], length: int, ends: set[int] = frozenset()
    ) -> list[int]:  # type: ignore[assignment]
        """Tokens of the highest allowed logit; the whole sequence is read for each of them."""
        found: list[int] = []
        for _ in range(length):
            hidden_1TD = other.model(input_ids=torch.tensor([[*ids, *found]])).last_hidden_state
            logits_V = other.lm_head(hidden_1TD[:, -1])[0]
            found.append(allowed[int(logits_V[allowed].argmax())])
            if found[-1] in ends:
                break
        return found

    (picture,) = model.generate("a red dog", decoder="greedy")
    published = Tokenizer.from_str(json.dumps(published_tokenizer()))
    text = published.encode("a red dog", add_special_tokens=False).ids
    codes = [names[code_name(code)] for code in range(CODES)]
    prompt = [names["<s>"], *text, names["<racm3:break>"]]
    assert [codes.index(id_) for id_ in loop(prompt, codes, 16)] == picture.codes_N.tolist()

    # A caption: the text's place is masked, and filled in at the end.
    caption = model.caption(picture.image, decoder="greedy", max_tokens=8)
    seen_N = model.run.image_tokenizer.encode(np.asarray(picture.image)[None])[0]
    mask, end = names["<reserved08194>"], names["<eoss>"]
    image = [names["<racm3:break>"], *(codes[code] for code in seen_N), end]
    asked = [names["<s>"], mask, *image, names["</s>"], mask]
    pieces = old[len(model.run.text_tokenizer.specials) : vocab.text_size].tolist()
    found = [id_ for id_ in loop(asked, [*pieces, end], 8, {end}) if id_ != end]
    assert caption == published.decode(found, skip_special_tokens=False)


@torch.inference_mode()
def test_greedy_text_is_that_of_the_library_s_generate(run: Path) -> None:
    model, other, old = CM3Leon.load(run, precision="float32"), theirs(run), old_ids(run)
    vocab, names = model.run.vocab, published_tokenizer()["model"]["vocab"]

    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    shown = TokenDocument("", (model._text(""), model._image(model._pixels(image))))
    prompt_1T = old[model._task("caption").prompt(shown).ids_T][None]

    # Text alone, in the ids of the library.
    allowed = [*old[len(model.run.text_tokenizer.specials) : vocab.text_size], names["<eoss>"]]
    answer_1T = other.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=names["<eoss>"],
        prefix_allowed_tokens_fn=lambda *_: allowed,
    )[:, prompt_1T.shape[1] :]

    back = {int(there): number for number, there in enumerate(old)}
    expected = model.run.text_tokenizer.decode([back[int(id_)] for id_ in answer_1T[0]])
    assert model.caption(image, decoder="greedy", max_tokens=12) == expected
    assert expected


@pytest.mark.parametrize("window", [1, 4])
@torch.inference_mode()
def test_guided_samples_are_those_of_a_plain_loop_over_transformers(run: Path, window: int) -> None:
    """Samples that share their prompt: each draws by its own seed, and guidance has two streams."""
    model = CM3Leon.load(run, precision="float32", window=window)
    other, old, vocab = theirs(run), old_ids(run), model.run.vocab
    decoder = {"name": "top_p", "top_p": 1.0, "cfg": 3.0}
    pictures = model.generate("a red dog", n=3, decoder=decoder, seed=7)

    asked = TokenDocument("", (model._text("a red dog"), model._fresh))
    prompt = model._task("text_to_image").prompt(asked)
    id_V = torch.arange(*vocab.id_range("image"))
    for drawn in pictures:
        tokens: list[int] = []
        for index in range(CODES):
            # With the text, and without it.
            logits = []
            for ids_T in (prompt.ids_T, prompt.unconditional_T):
                ids_1T = old[torch.tensor([[*ids_T, *tokens]])]
                hidden_D = other.model(input_ids=ids_1T).last_hidden_state[0, -1]
                logits.append(other.lm_head(hidden_D)[old[id_V]])

            # The highest sum of a logit and its Gumbel noise is a draw from the softmax.
            guided_V = logits[1] + 3.0 * (logits[0] - logits[1])
            key = torch.tensor(stream_key(drawn.seed))
            noise_V = gumbel_noise(key, index * vocab.size + id_V)
            tokens.append(int(id_V[(guided_V + noise_V).argmax()]))
        assert vocab.image_codes(np.array(tokens)).tolist() == drawn.codes_N.tolist()
    assert len({tuple(drawn.codes_N) for drawn in pictures}) == 3


def test_it_is_asked_like_any_other_run(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = CM3Leon.load(run)
    pictures = model.generate("two cats", n=3, decoder={"name": "mixture"})
    assert [picture.codes_N.shape for picture in pictures] == [(16,)] * 3
    filled = model.infill(pictures[0].image, "two cats", box=(0, 0, 4, 8))
    assert filled.codes_N.shape == (16,)
    scores = model.score(texts=["a dog", "two cats"], image=pictures[0].image)
    assert all(np.isfinite(scores))
    assert len(model.interleave(["a dog"], segments=3, max_tokens=3)) >= 1
    assert main(["generate", f"run={run}", "prompt=a dog", f"out={tmp_path / 'drawn'}"]) == 0
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 8


def test_it_is_served_like_any_other_run(run: Path) -> None:
    model = CM3Leon.load(run, precision="float32")
    asked: dict[str, Any] = {"n": 2, "decoder": {"name": "top_p", "cfg": 2.0}, "seed": 5}
    alone = model.generate("two cats", **asked)

    with (
        Service(model, samples=2, precision="float32") as service,
        service.asking(service.caller("someone")) as served,
    ):
        pictures = served.generate("two cats", **asked)

    for drawn, same in zip(pictures, alone, strict=True):
        np.testing.assert_array_equal(drawn.codes_N, same.codes_N)


@pytest.mark.once
def test_a_study_asks_it_like_any_other_run(run: Path, tmp_path: Path) -> None:
    for number in range(110):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
        (tmp_path / f"{number}.txt").write_text(f"a red dog with {number} cats")

    # Enough pictures for the covariance of their features.
    protocol = {"name": "captioned_images", "data": {"name": "folder", "path": str(tmp_path)}}
    study = {
        "title": "Public weights",
        "evaluations": {
            "pictures": {
                "title": "Pictures for captions",
                "protocol": {**protocol, "count": 110, "size": 8},
                "models": {"imported": str(run)},
                "setting": {"documents": 0},
            }
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "asked"
    assert main([f"experiment={tmp_path / 'study.yaml'}", f"run={out}"]) == 0

    (row,) = json.loads((out / "results.json").read_text())["evaluations"]["pictures"]
    assert row["items"] == 110
    assert row["metrics"]


def test_the_licence_is_said_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = imported(tmp_path)
    said = capsys.readouterr().out
    assert "licence of Chameleon: Chameleon Research License; research only" in said
    assert json.loads((run / "import.json").read_text())["licence"] == "Chameleon Research License"


def test_what_is_missing_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = publish(tmp_path)
    words = ["import", "from=chameleon", *(f"{key}={path}" for key, path in files.items())]
    words += ["image_size=8", f"out={tmp_path / 'run'}"]

    def refused() -> str:
        assert main(words) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    tokenizer = files["hf"] / "tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.unlink()
    assert "tokenizer.json does not exist" in refused()

    for name, sentence in (
        ("<eoss>", "it lacks the token <eoss>"),
        (code_name(3), "names no image codes"),
    ):
        spoilt = json.loads(whole)
        spoilt["model"]["vocab"]["other"] = spoilt["model"]["vocab"].pop(name)
        spoilt["added_tokens"] = [t for t in spoilt["added_tokens"] if t["content"] != name]
        tokenizer.write_text(json.dumps(spoilt))
        assert sentence in refused()

    # A model that computes something else.
    tokenizer.write_text(whole)
    config = files["hf"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    assert 'hidden_act is "gelu"; it must be "silu"' in refused()


def test_an_import_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    files = publish(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ["import", "from=chameleon", *(f"{key}={path}" for key, path in files.items())]

    # While the weights are read.
    monkeypatch.setattr(importing, "check_finite", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        raise SystemExit(main([*words, "image_size=8", f"out={tmp_path / 'run'}"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == before

    monkeypatch.undo()
    assert main([*words, "image_size=8", f"out={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize("name", ["chameleon", "anole", "lumina_mgpt"])
def test_every_family_has_a_layout_of_tokens_that_are_there(name: str) -> None:
    vocab = renumbered(published_tokenizer(), FAMILIES[name], "tokenizer.json")
    table = LayoutTable.from_names(vocab.table, "layout.json")
    layout = table.layout
    assert table.specials[layout.begin] == "<s>"
    assert layout.image_open == (2,)

    # Lumina-mGPT says the rows and columns of an image, and closes each row.
    if name == "lumina_mgpt":
        assert table.specials[layout.row_close] == "<reserved08799>"
        assert sorted(layout.sizes) == [(r, c) for r in (2, 4, 8) for c in (2, 4, 8)]
        assert layout.sizes_within(16) == [(2, 8), (4, 4), (8, 2)]
        two_by_four = [table.specials[id_] for id_ in layout.sizes[2, 4]]
        assert two_by_four == ["<reserved08801>", "<reserved08802>"]


def test_too_few_reserved_tokens_are_a_sentence() -> None:
    few = published_tokenizer(masks=7)
    with pytest.raises(UserError, match=r"it has \d+ reserved tokens .*; 512 are needed"):
        renumbered(few, FAMILIES["chameleon"], "tokenizer.json")


@torch.inference_mode()
def test_a_question_is_asked_in_turns_as_the_publisher_does(run: Path) -> None:
    """As transformers' processor does it: <s>, the question, the image, and chat's separator."""
    model, other, old = CM3Leon.load(run, precision="float32"), theirs(run), old_ids(run)
    names, vocab = published_tokenizer()["model"]["vocab"], model.run.vocab
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    codes_N = model.run.image_tokenizer.encode(image[None])[0]

    published = Tokenizer.from_str(json.dumps(published_tokenizer()))
    question = published.encode("What is it?", add_special_tokens=False)
    codes = [names[code_name(code)] for code in codes_N]
    shown = [names["<racm3:break>"], *codes, names["<eoss>"]]
    ids = [names["<s>"], *question.ids, *shown, names["<reserved08706>"]]

    # Six tokens of the highest logit among the text's and the end's.
    pieces = old[len(model.run.text_tokenizer.specials) : vocab.text_size].tolist()
    found: list[int] = []
    for _ in range(6):
        hidden_1TD = other.model(input_ids=torch.tensor([[*ids, *found]])).last_hidden_state
        logits_V, allowed = other.lm_head(hidden_1TD[:, -1])[0], [*pieces, names["</s>"]]
        found.append(allowed[int(logits_V[allowed].argmax())])
        if found[-1] == names["</s>"]:
            break

    # Both ways of asking give that text.
    back = {int(published_id): own_id for own_id, published_id in enumerate(old)}
    expected = model.run.text_tokenizer.decode([back[id_] for id_ in found if id_ in pieces])
    asked: dict[str, Any] = {"decoder": "greedy", "max_tokens": 6}
    assert model.caption(image, question="What is it?", **asked) == expected
    assert model.answer(image, "What is it?", **asked) == expected.strip()


def test_guidance_drops_the_text_as_the_publisher_does(run: Path) -> None:
    model = CM3Leon.load(run)
    layout, task = model.run.vocab.layout, model._task("text_to_image")
    document = TokenDocument("", (model._text("a dog"), model._fresh))
    assert task.prompt(document).unconditional_T.tolist() == [layout.begin, *layout.image_open]


@pytest.mark.once
@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_run_of_ones_own_starts_from_it(run: Path, lora: int | None, tmp_path: Path) -> None:
    """It has retrieval, and the tokenizers, layout and first weights of the imported run.

    All weights are trained, or LoRA's alone.
    """
    words = ["experiment=digits_smoke", f"shards.tokenizers={run}", f"training.start={run}"]
    words += ["sentinels=512", "until=pretraining", "retriever=lexical"]
    # A fifth of the digits is enough to train on and to retrieve from.
    words += ["split.held_out=0.8", "augment.versions=1"]
    words += ["training.steps=2", "training.warmup_steps=1"]

    # Sizes have to be those of the imported run.
    config = CM3Leon.load(run).run.experiment
    words += [f"text_tokenizer.vocab_size={config.text_tokenizer.vocab_size}"]
    words += ["image_tokenizer=pretrained", "image_tokenizer.image_size=8"]
    words += [f"image_tokenizer.path={config.image_tokenizer.config.path}"]
    if lora:
        words.append(f"training.lora_rank={lora}")
    words.append("model=llama")
    for key, value in vars(config.model.config).items():
        if value is not None:
            words.append(f"model.{key}={value}")
    own = tmp_path / "own"
    assert main([*words, f"run={own}"]) == 0

    tuned = CM3Leon.load(own)
    assert tuned.run.vocab == CM3Leon.load(run).run.vocab
    (picture,) = tuned.generate("a handwritten seven", retrieve=1)
    assert len(picture.documents) == 1

    # The merged weights are the first ones and the scaled product of the adapter.
    if lora is not None:
        kept = load_file(own / "pretraining" / "lora.safetensors")
        base, merged = load_model(run).state_dict(), load_model(own).state_dict()
        training = tuned.run.experiment.training
        for name in ("blocks.0.qkv", "blocks.1.down"):
            change = kept[f"{name}.lora_b"] @ kept[f"{name}.lora_a"]
            expected = base[f"{name}.weight"] + training.lora_alpha / lora * change
            torch.testing.assert_close(merged[f"{name}.weight"], expected)


def spoil(files: dict[str, Path], change: Any) -> None:
    """Write the folder's weights again, in one file, with some tensor changed."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(files["hf"].glob("*.safetensors")):
        tensors |= load_file(part)
        part.unlink()
    (files["hf"] / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, files["hf"] / "model.safetensors")


LAST = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop(LAST), f"lacks {LAST}"),
        (
            lambda tensors: tensors.pop("model.embed_tokens.weight"),
            "lacks model.embed_tokens.weight",
        ),
        (
            lambda tensors: tensors.update({"model.other": torch.zeros(2)}),
            "has the unknown model.other",
        ),
        (
            lambda tensors: tensors.update({LAST: torch.zeros(3, 64)}),
            f"has another shape for {LAST}",
        ),
        (
            lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(40, 64)}),
            "have 40 rows; for the",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_before_anything_is_written(
    change: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = publish(tmp_path)
    spoil(files, change)
    words = ["import", "from=chameleon", *(f"{key}={path}" for key, path in files.items())]
    assert main([*words, "image_size=8", f"out={tmp_path / 'run'}"]) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chameleon", "vqgan.ckpt"]


def test_a_size_without_tokens_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = publish(tmp_path)
    words = ["import", "from=lumina_mgpt", *(f"{key}={path}" for key, path in files.items())]
    assert main([*words, "image_size=32", f"out={tmp_path / 'run'}"]) == 2
    assert "images of 16 x 16 codes have no tokens of their size" in capsys.readouterr().err
    assert main([*words, "image_size=8", f"out={tmp_path / 'run'}"]) == 0
    (picture,) = CM3Leon.load(tmp_path / "run").generate("a red dog")
    assert picture.codes_N.shape == (16,)


@pytest.mark.once
def test_images_that_are_not_square_go_the_whole_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lumina-mGPT's sizes: drawn, described, filled in and scored.

    A model is also trained on a folder of such images, and retrieves from them.
    """
    base = imported(tmp_path, family="lumina_mgpt")
    model = CM3Leon.load(base)
    scale = model.run.image_tokenizer.downsampling
    (wide,) = model.generate("a red dog", size=(8 * scale, 2 * scale))
    assert wide.image.size == (8 * scale, 2 * scale)
    assert wide.codes_N.shape == (16,)
    expected_HWC = model.run.image_tokenizer.decode(wide.codes_N[None], grid=(2, 8))[0]
    assert np.array_equal(np.asarray(wide.image), expected_HWC)
    with pytest.raises(UserError, match=r"size is 10x8, .* take one of 16x4, 8x8, 4x16"):
        model.generate("a red dog", size=(10, 8))

    # A photograph is brought to the nearest shape, and keeps what no box asks for.
    photo = np.random.default_rng(0).integers(0, 256, (20, 90, 3), dtype=np.uint8)
    seen = model._image(model._pixels(photo))
    assert seen.grid == model.run.vocab.layout.grid_of(seen.ids_T) == (2, 8)
    assert isinstance(model.caption(photo, max_tokens=3), str)
    filled = model.infill(photo, "a dog", box=(10, 0, 45, 20))
    assert filled.image.size == wide.image.size
    kept_RC = np.ones((2, 8), bool)
    kept_RC[:, :4] = False
    kept_N = kept_RC.ravel()
    codes_N = model.run.vocab.image_codes(seen.ids_T)
    assert np.array_equal(filled.codes_N[kept_N], codes_N[kept_N])
    scores = model.score(text="a dog", images=[photo, wide.image, photo.transpose(1, 0, 2)])
    assert np.isfinite(scores).all()

    # Two wide photographs for each square one.
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(24):
        side = (20, 90) if number % 3 else (60, 60)
        pixels = np.random.default_rng(number).integers(0, 256, (*side, 3), dtype=np.uint8)
        (photos / f"{number}.png").write_bytes(encoded(pixels))
        (photos / f"{number}.txt").write_text(f"dog {number}")

    # One step of the shipped fine-tuning, at the size of this model.
    size = model.run.experiment.text_tokenizer.vocab_size
    words = f"""experiment=sft_chameleon_7b
        data.path={photos} shards.tokenizers={base} training.start={base}
        model.layers=2 model.width=64 model.head_size=16 model.mlp_width=88 model.seq_len=128
        training.steps=1 training.batch_tokens=256 training.warmup_steps=0
        training.callback_every=1 training.compile=false
        text_tokenizer.vocab_size={size} run={tmp_path / "own"}""".split()
    words.append("split={validation: 0.2, held_out: 0.1}")
    assert main(words) == 0, capsys.readouterr().err

    tuned = CM3Leon.load(tmp_path / "own")
    documents = [tuned.run.tokens.document(row) for row in range(len(tuned.run.tokens))]
    grids = {tuned.run.vocab.layout.grid_of(each.segments[1].ids_T) for each in documents}
    assert grids == {(2, 8), (4, 4)}

    # What it retrieves may have another shape than what it draws.
    (again,) = tuned.generate("dog 1", retrieve=1, size=(8 * scale, 2 * scale))
    assert again.documents[0].image.size in {(8 * scale, 2 * scale), (4 * scale, 4 * scale)}

    # The commands take such sizes too.
    shown = tmp_path / "sample.html"
    assert main(["show", *words, "sample=0", f"out={shown}"]) == 0, capsys.readouterr().err
    assert shown.is_file()
    words = [f"run={tmp_path / 'own'}", "prompt=dog 1", "n=1", "retrieve=1"]
    words += [f"size=[{8 * scale},{2 * scale}]", f"out={tmp_path / 'drawn'}"]
    assert main(["generate", *words]) == 0, capsys.readouterr().err


def test_a_layout_is_a_part_of_what_stages_are_made_from(run: Path, tmp_path: Path) -> None:
    """Two families may share a tokenizer.json to the byte, and differ in the layout alone."""
    other = imported(tmp_path, family="lumina_mgpt")
    names = ("text_tokenizer/tokenizer.json", "text_tokenizer/layout.json")
    first = [(run / name).read_bytes() for name in names]
    second = [(other / name).read_bytes() for name in names]
    assert first[0] == second[0]
    assert first[1] != second[1]

    # Fingerprints tell them apart, as do the inputs of a stage that takes a tokenizer over.
    records = [json.loads((each / "pretraining/stage.json").read_text()) for each in (run, other)]
    assert records[0]["fingerprint"] != records[1]["fingerprint"]

    def wanted(tokenizers: Path | None) -> tuple[Any, Any]:
        experiment = CM3Leon.load(run).run.experiment
        experiment.shards.tokenizers = tokenizers
        fresh = RunFolder(experiment, tmp_path / "own", torch.device("cpu"))
        return text_tokenizer_inputs(fresh), fresh.vocab.layout

    (chameleon, theirs), (lumina, closed), (_, paper) = wanted(run), wanted(other), wanted(None)
    assert chameleon != lumina
    assert theirs.row_close is None
    assert closed.row_close is not None
    assert paper == Layout()

    own = tmp_path / "own"
    shutil.copytree(run, own)
    tuned = RunFolder(CM3Leon.load(run).run.experiment, own, torch.device("cpu"))
    check_tokenizers(tuned, run)
    with pytest.raises(UserError, match="was trained with another text tokenizer"):
        check_tokenizers(tuned, other)


def test_special_tokens_are_shown_by_their_names(run: Path) -> None:
    opened = CM3Leon.load(run).run
    names = _names(opened)
    assert names.token(opened.vocab.layout.begin) == "<s>"
    assert names.kind(opened.vocab.layout.begin) == "break"
    assert names.token(1) == "<eos>"


def test_an_imported_run_has_no_memory_bank(run: Path) -> None:
    with pytest.raises(UserError, match="has no memory bank, as its weights were made elsewhere"):
        CM3Leon.load(run).generate("a dog", retrieve=1)
