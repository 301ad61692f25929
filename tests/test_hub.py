"""Folders for the Hub: other people's libraries read from them what the run computes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from huggingface_hub import constants, errors
from PIL import Image
from records import finish
from safetensors import safe_open
from test_import import code_name, imported, published_tokenizer, theirs

from cm3leon import CM3Leon
from cm3leon.config import dump_yaml, to_mapping
from cm3leon.config.files import parse_yaml
from cm3leon.experiment import Experiment, load_experiment
from cm3leon.hub.export import Exported, write_hub_folder
from cm3leon.hub.image_tokenizer import diffusers_config, diffusers_state, why_not_diffusers
from cm3leon.hub.repository import model_folder
from cm3leon.models.lora import add_lora, is_adapter
from cm3leon.models.pretrained import load_model
from cm3leon.run import main
from cm3leon.stages.opening import open_run
from cm3leon.stages.run_folder import RunFolder
from cm3leon.tokenizers.families import FAMILIES
from cm3leon.tokenizers.image.vqgan import VQGAN
from cm3leon.tokenizers.text import TextTokenizer
from cm3leon.training.parallel import whole_state_and_adapter
from cm3leon.types import TokenDocument, UserError
from cm3leon.weights import save_weights

pytestmark = pytest.mark.stack

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

TINY = {"layers": 2, "width": 64, "head_size": 16, "seq_len": 96}
VQ = {
    "image_size": 16,
    "codebook_size": 16,
    "code_dim": 8,
    "channels": 32,
    "multipliers": [1, 2],
    "residual_blocks": 1,
    "attention_levels": [1],
    "z_channels": 32,
    "discriminator_layers": 1,
    "adversarial": 0,
}

TEXTS = ["a red dog", "a photo of 12 cats", "seven and nine"] * 3


def made(folder: Path, model: str, *, vq: bool = True, **settings: Any) -> Path:
    """A run folder as if it were finished, with random weights that are large enough to show."""
    words = ["text_tokenizer.vocab_size=300", "sentinels=4", "retriever=lexical"]
    words += [f"model={model}", "until=pretraining"]
    words += [f"model.{key}={value}" for key, value in {**TINY, **settings}.items()]
    if vq:
        words.append("image_tokenizer=vqgan")
        words += [f"image_tokenizer.{key}={value}" for key, value in VQ.items()]
    return write_run(folder, load_experiment("digits_smoke", words))


def write_run(folder: Path, experiment: Experiment) -> Path:
    """Write the stages of a run that its export reads, and their records."""
    run = RunFolder(experiment, folder, torch.device("cpu"))
    stages = [folder / name for name in ("text_tokenizer", "image_tokenizer", "pretraining")]
    for stage in stages:
        stage.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(to_mapping(experiment)))
    TextTokenizer.train(experiment.text_tokenizer, TEXTS).save(stages[0])

    # Large weights, so that every one of them shows in the logits; the scales of norms around 1.
    image_tokenizer, model = run.new_image_tokenizer(), run.empty_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        image_tokenizer.quantizer.codebook_VD.normal_(generator=generator)
        for name, weight in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            weight.normal_(mean=mean, std=0.3, generator=generator)

    save_weights(stages[1] / "model.safetensors", image_tokenizer)
    save_weights(stages[2] / "model.safetensors", model)
    made_of = {**run.settings_of("model"), "vocab_size": run.vocab.size}
    (stages[2] / "config.json").write_text(json.dumps(made_of))
    finish(*stages)
    return folder


def exported(run: Path, out: Path, *words: str) -> Path:
    assert main(["export", "to=hf", f"run={run}", f"out={out}", *words]) == 0
    return out


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("opt")
    run = made(folder / "run", "cm3leon_tiny")
    return {"run": run, "hf": exported(run, folder / "hf", "licence=mit", "prompt=a red dog")}


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    run = imported(tmp_path_factory.mktemp("chameleon"), family="anole")
    hf = exported(run, run.parent / "hf", "base_model=org/anole", "prompt=a dog")
    return {"run": run, "hf": hf}


def header_of(folder: Path) -> dict[str, Any]:
    """The YAML in front of a folder's model card."""
    _, header, _ = (folder / "README.md").read_text().split("---\n", 2)
    return parse_yaml(header)


# -------------------------------------------------------------------------------------- the decoder


@pytest.mark.parametrize(
    "fields", [{}, {"swin_norm": True, "num_key_value_heads": 2}, {"dtype": torch.bfloat16}]
)
@torch.inference_mode()
def test_public_weights_go_out_as_they_came_in(fields: Any, tmp_path: Path) -> None:
    """Published folder -> run -> export -> transformers: the same tensors, so the same logits.

    Both folders hold their weights in several files.
    """
    run = imported(tmp_path, **fields)
    folder = tmp_path / "hf"
    folder.mkdir()
    write_hub_folder(Exported(open_run(run)), folder, "", part_bytes=50_000)

    before = theirs(run)
    after, report = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=before.dtype
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3

    # All but the image tokenizer, whose weights come from another file.
    published = {name: tensor for name, tensor in before.state_dict().items() if "vqm" not in name}
    for name, tensor in published.items():
        assert torch.equal(after.state_dict()[name].to(tensor.dtype), tensor), name
        with safe_open(folder / index["weight_map"][name], "pt") as file:
            assert file.get_tensor(name).dtype == fields.get("dtype", torch.float32)

    ids_BT = torch.randint(500, (2, 30), generator=torch.Generator().manual_seed(0))
    after.eval()
    ours, theirs_BTD = (m.model(input_ids=ids_BT).last_hidden_state for m in (after, before))
    torch.testing.assert_close(after.lm_head(ours), before.lm_head(theirs_BTD), rtol=0, atol=0)
    assert json.loads((folder / "tokenizer.json").read_text()) == published_tokenizer()

    config = json.loads((folder / "config.json").read_text())
    assert config["vocabulary_map"] == published_tokenizer()["model"]["vocab"]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 2, 1)


@torch.inference_mode()
def test_a_chameleon_of_ones_own_keeps_its_ids(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "llama", mlp_width=88, kv_heads=2, norm="behind")
    folder = exported(run, tmp_path / "hf")
    other = transformers.ChameleonForConditionalGeneration.from_pretrained(folder).eval()

    ids_BT = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    # No code is named as public weights name theirs, so that its own forward pass closes none.
    expected_BTV = load_model(run)(ids_BT)
    torch.testing.assert_close(other(input_ids=ids_BT).logits, expected_BTV, atol=1e-5, rtol=1e-5)

    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    seen = CM3Leon.load(run).run.image_tokenizer.codes_of(pixels).flatten()
    found = other.model.vqmodel.encode(pixels)
    codes = found[2] if isinstance(found, tuple) else found.image_tokens  # transformers 4 and 5
    assert torch.equal(codes.flatten(), seen)


# ----------------------------------------------------------------------------------- the tokenizers


@pytest.mark.parametrize("which", ["opt", "chameleon"])
def test_the_tokenizer_pads_and_ends_and_knows_no_special_token_in_a_text(
    which: str, request: pytest.FixtureRequest
) -> None:
    folders = request.getfixturevalue(which)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["hf"])
    ours = Exported(open_run(folders["run"]))

    batch = tokenizer(["a red dog", "a"], padding=True, add_special_tokens=False)
    special = ours.special_ids()
    assert tokenizer.pad_token_id == special["pad_token_id"]
    assert tokenizer.bos_token_id == special["bos_token_id"]
    assert tokenizer.eos_token_id in special["eos_token_id"]
    assert batch.input_ids[1][-1] == special["pad_token_id"]
    assert sum(batch.attention_mask[1]) == 1

    # A text that spells special tokens is text like any other.
    text = f"a {tokenizer.eos_token}{tokenizer.pad_token} dog <eos><break>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == ours.ids(ours.run.text_tokenizer.encode(text))
    special_ids = {special["pad_token_id"], special["bos_token_id"], *special["eos_token_id"]}
    assert not special_ids & set(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("quantizer", ["cosine", "euclidean", "ema"])
@torch.inference_mode()
def test_image_tokenizers_are_diffusers_models(quantizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = VQGAN(VQGAN.Config(**VQ, quantizer=quantizer)).eval()  # type: ignore[arg-type]
    codebook_VD = ours.quantizer.state_dict()["codebook_VD"]
    codebook_VD.normal_()
    assert why_not_diffusers(ours) == ""

    model = diffusers.VQModel.from_config(diffusers_config(ours))
    model.load_state_dict(diffusers_state(ours))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1

    # The same codes of an image, and the same image of codes.
    codes_BHW = ours.codes_of(pixels)
    found = model.eval().quantize(model.encode(pixels).latents)[2][2]
    assert torch.equal(found.view(codes_BHW.shape), codes_BHW)
    drawn = model.decode(codes_BHW, force_not_quantize=True, shape=(2, 8, 8, 8)).sample
    torch.testing.assert_close(drawn, ours.signal_of(codes_BHW), atol=2e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize("which", ["opt", "chameleon"])
def test_the_code_of_the_card_runs_without_this_project(
    which: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(which)["hf"]
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == {"opt": 2, "chameleon": 3}[which]

    monkeypatch.chdir(tmp_path)
    for block in blocks:
        assert "cm3leon" not in block
        names: dict[str, Any] = {}
        exec(block.replace('folder = "."', f"folder = {str(folder)!r}"), names)

    size = CM3Leon.load(request.getfixturevalue(which)["run"]).run.image_tokenizer.image_size
    assert Image.open(tmp_path / "image.png").size == (size, size)

    # The last block reads a picture: with transformers' processor where there is one.
    reader = names["tokenizer" if which == "opt" else "processor"]
    assert isinstance(reader.decode(names["answer"][0]), str)


@torch.inference_mode()
def test_the_card_draws_what_this_project_draws(opt: dict[str, Path]) -> None:
    """The card's loop has our prompts and our codes, drawn greedily and with guidance."""
    block = re.findall(r"```python\n(.*?)```", (opt["hf"] / "README.md").read_text(), re.DOTALL)[0]

    # It reads this folder, takes the most probable code, not a random one, and saves nothing.
    block = block.replace('folder = "."', f"folder = {str(opt['hf'])!r}")
    block = block.replace("torch.multinomial(guided.softmax(-1), 1)", "guided.argmax()")
    block = block.replace('image.save("image.png")', "")
    names: dict[str, Any] = {}
    exec(block, names)

    model = CM3Leon.load(opt["run"], precision="float32")
    decoder = {"name": "top_p", "cfg": 3.0, "top_k": 1}
    (drawn,) = model.generate("a red dog", decoder=decoder)
    assert names["codes"] == drawn.codes_N.tolist()
    difference = np.asarray(names["image"]).astype(int) - np.asarray(drawn.image).astype(int)
    assert abs(difference).max() <= 1


def test_the_header_says_what_the_hub_asks_for(
    opt: dict[str, Path], chameleon: dict[str, Path]
) -> None:
    ours, made_from = header_of(opt["hf"]), header_of(chameleon["hf"])
    assert ours["license"] == "mit"
    assert "base_model" not in ours
    assert ours["pipeline_tag"] == "any-to-any"

    assert made_from["license"] == "other"
    assert "Chameleon Research License" in made_from["license_name"]
    assert made_from["base_model"] == "org/anole"

    # The card repeats the terms for people, and claims nothing that was not measured.
    card = (chameleon["hf"] / "README.md").read_text()
    assert "no commercial use" in card
    assert "No figures of its quality were measured." in card

    for folder in (opt["hf"], chameleon["hf"]):
        size = json.loads((folder / "cm3leon.json").read_text())["image_size"]
        assert Image.open(folder / "sample.png").size == (size, size)
    assert "Trained from random weights for 20 steps" in (opt["hf"] / "README.md").read_text()


def test_generation_settings_have_the_ids_of_each_modality(chameleon: dict[str, Path]) -> None:
    settings = transformers.GenerationConfig.from_pretrained(chameleon["hf"])
    names = published_tokenizer()["model"]["vocab"]
    assert settings.ids["image"] == [[names[code_name(0)], names[code_name(15)] + 1]]
    assert settings.eos_token_id == [names["<eoss>"], names["</s>"]]


@torch.inference_mode()
def test_the_library_s_processor_asks_as_this_project_does(chameleon: dict[str, Path]) -> None:
    """Its ids and pixels are those of a question here, and the model finds our codes in them."""
    # The names of special tokens in a text are these tokens where that is asked for alone.
    processor = transformers.ChameleonProcessor.from_pretrained(
        chameleon["hf"], split_special_tokens=False
    )
    model = CM3Leon.load(chameleon["run"], precision="float32")
    exported = Exported(open_run(chameleon["run"]))
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    asked = {"images": Image.fromarray(image), "text": "What is it?<image>"}
    inputs = processor(**asked, return_tensors="pt")

    shown = model._image(model._pixels(image))
    question = TokenDocument("", (model._text("What is it?"), shown))
    expected = exported.ids(model._task("chat").prompt(question).ids_T)
    codes = exported.ids(shown.ids_T)
    names = published_tokenizer()["model"]["vocab"]
    found = inputs.input_ids[0].tolist()
    assert found.count(names["<image>"]) == len(codes)
    start = found.index(names["<image>"])
    assert [*found[:start], *codes, *found[start + len(codes) :]] == expected
    plain = transformers.ChameleonProcessor.from_pretrained(chameleon["hf"])
    assert names["<eoss>"] not in plain(text="<eoss>").input_ids[0]

    other = transformers.ChameleonForConditionalGeneration.from_pretrained(chameleon["hf"]).eval()
    hidden_1TD = other.model(**inputs).last_hidden_state
    same_1TD = other.model(input_ids=torch.tensor([expected])).last_hidden_state
    torch.testing.assert_close(hidden_1TD, same_1TD, rtol=0, atol=0)


def test_a_processor_goes_out_where_it_lays_samples_out_so(
    opt: dict[str, Path], tmp_path: Path
) -> None:
    """There is none for an OPT, or where an image is laid out in rows."""
    rows = exported(imported(tmp_path, family="lumina_mgpt"), tmp_path / "rows", "samples=0")
    for folder in (opt["hf"], rows):
        assert not (folder / "processor_config.json").exists()


# ------------------------------------------------------------------------------------ whose weights


def test_whose_weights_they_are_is_recorded_and_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FAMILIES["chameleon"].models[48] == "facebook/chameleon-30b"
    small = replace(FAMILIES["anole"], models={2: "org/small"})
    monkeypatch.setitem(FAMILIES, "anole", small)
    run = imported(tmp_path, family="anole")
    assert json.loads((run / "import.json").read_text())["base_model"] == "org/small"
    header = header_of(exported(run, tmp_path / "hf", "samples=0"))
    assert header["base_model"] == "org/small"
    assert header["license_name"] == small.licence

    words = [f"hf={tmp_path / 'chameleon'}", f"vqgan={tmp_path / 'vqgan.ckpt'}", "image_size=8"]
    words += ["from=anole", "base_model=me/copy", f"out={tmp_path / 'own'}"]
    assert main(["import", *words]) == 0
    header = header_of(exported(tmp_path / "own", tmp_path / "own_hf", "samples=0"))
    assert header["base_model"] == "me/copy"


def test_a_start_from_an_exported_folder_says_how_it_becomes_a_run(
    opt: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=digits_smoke", f"training.start={opt['hf']}", f"run={tmp_path / 'run'}"]
    assert main(words) == 2
    hint = f"make a run of it with: import from=export hf={opt['hf']} out=DIR"
    assert hint in capsys.readouterr().err


def tuned_from(base: Path, folder: Path, *words: str) -> Path:
    """A run of two steps that begins with another run's weights, with that one's tokenizers."""
    config = open_run(base).experiment
    settings = [f"shards.tokenizers={base}", f"training.start={base}", f"run={folder}", *words]
    settings += ["until=pretraining", "retriever=lexical"]
    # A fifth of the digits is enough to train on and to retrieve from.
    settings += ["split.held_out=0.8", "augment.versions=1"]
    settings += ["training.steps=2", "training.warmup_steps=1"]

    # Sizes and ids have to be those of the other run.
    settings += [f"text_tokenizer.vocab_size={config.text_tokenizer.vocab_size}"]
    settings += [f"sentinels={config.sentinels}", "image_tokenizer=pretrained"]
    settings += [f"model={config.model.name}"]
    for key, value in vars(config.model.config).items():
        if value is not None:
            settings.append(f"model.{key}={value}")
    if (size := config.image_tokenizer.config.image_size) is not None:
        settings.append(f"image_tokenizer.image_size={size}")

    assert main(["experiment=digits_smoke", *settings]) == 0
    return folder


@pytest.mark.parametrize("which", ["opt", "chameleon"])
@torch.inference_mode()
def test_an_exported_folder_is_a_run_again(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It has the same logits, its origin is recorded, and it can be exported again as it came."""
    folders, back = request.getfixturevalue(which), tmp_path / "back"
    assert main(["import", "from=export", f"hf={folders['hf']}", f"out={back}"]) == 0
    before, after = load_model(folders["run"]), load_model(back)
    assert open_run(back).vocab == open_run(folders["run"]).vocab

    ids_BT = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(ids_BT), before(ids_BT), rtol=0, atol=0)

    drawn = [
        CM3Leon.load(run, precision="float32").generate("a red dog", seed=2)[0]
        for run in (folders["run"], back)
    ]
    assert np.array_equal(drawn[0].codes_N, drawn[1].codes_N)

    # Exported once more, it is the same to the byte.
    again = exported(back, tmp_path / "again", "samples=0")
    for key in ("license", "license_name", "base_model"):
        assert header_of(again).get(key) == header_of(folders["hf"]).get(key)
    files = [folder / "model.safetensors" for folder in (folders["hf"], again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (again / "tokenizer.json").read_text() == (folders["hf"] / "tokenizer.json").read_text()


def test_the_licence_of_an_export_is_said_and_its_image_tokenizer_counts(
    chameleon: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(chameleon["hf"], other)
    (other / "image_tokenizer" / "NOTES").write_text("made again")
    said = []
    for folder in (chameleon["hf"], other):
        back = tmp_path / f"back_{folder.name}"
        assert main(["import", "from=export", f"hf={folder}", f"out={back}"]) == 0
        family = FAMILIES["anole"]
        assert f"licence: {family.licence}; {family.conditions}" in capsys.readouterr().out
        said.append(json.loads((back / "import.json").read_text()))
    assert said[0]["licence"] == FAMILIES["anole"].licence
    assert said[0]["conditions"] == FAMILIES["anole"].conditions
    assert said[0]["weights"] != said[1]["weights"]


@pytest.mark.once
@pytest.mark.parametrize("lora", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", [pytest.param("opt", marks=pytest.mark.slow), "chameleon"])
def test_a_run_starts_from_an_exported_folder(
    which: str, lora: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """All weights are trained, or LoRA's alone.

    The new run still knows whose weights it began with when the folder is gone.
    """
    folders, back = request.getfixturevalue(which), tmp_path / "back"
    words = [f"hf={folders['hf']}", f"out={back}", "base_model=org/base"]
    assert main(["import", "from=export", *words]) == 0

    adapters = [f"training.lora_rank={lora}"] if lora else []
    tuned = tuned_from(back, tmp_path / "tuned", *adapters)

    # LoRA changes the layers alone, the whole training anything.
    base, learned = load_model(back).state_dict(), load_model(tuned).state_dict()
    changed = {name for name in base if not torch.equal(base[name], learned[name])}
    assert changed
    if lora:
        assert changed <= {name for name in base if name.startswith("blocks.")}

    shutil.rmtree(back)
    header = header_of(exported(tuned, tmp_path / "hf", "samples=0"))
    assert header["base_model"] == "org/base"
    assert header["license"] == header_of(folders["hf"])["license"]


# ---------------------------------------------------------------------------------------- read back


@pytest.mark.parametrize("which", ["opt", "chameleon"])
def test_an_exported_folder_is_asked_like_its_run(
    which: str, request: pytest.FixtureRequest
) -> None:
    folders = request.getfixturevalue(which)
    run, hub = (CM3Leon.load(folders[name], precision="float32") for name in ("run", "hf"))
    assert hub.run.vocab == run.run.vocab
    for name, weight in run.run.model.state_dict().items():
        assert torch.equal(hub.run.model.state_dict()[name], weight), name

    # The same codes, and the same pixels up to rounding.
    pictures = [model.generate("a red dog", seed=3)[0] for model in (run, hub)]
    assert pictures[0].codes_N.tolist() == pictures[1].codes_N.tolist()
    pixels = [np.asarray(picture.image).astype(int) for picture in pictures]
    assert abs(pixels[0] - pixels[1]).max() <= 1

    captions = []
    for model in (run, hub):
        captions.append(model.caption(pictures[0].image, decoder="greedy", max_tokens=5))
    assert captions[0] == captions[1]

    with pytest.raises(UserError, match="has no memory bank"):
        hub.generate("a red dog", retrieve=1)


def test_an_own_image_tokenizer_travels_in_its_own_form(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "cm3leon_tiny", vq=False)
    folder = exported(run, tmp_path / "hf", "samples=0")
    assert not (folder / "sample.png").exists()
    assert "`VQModel`: its networks are not those of a VQGAN" in (folder / "README.md").read_text()

    drawn = []
    for each in (run, folder):
        drawn.append(CM3Leon.load(each, precision="float32")("seven", seed=5).images[0])
    assert np.array_equal(*map(np.asarray, drawn))


def test_the_call_takes_the_words_of_diffusers(opt: dict[str, Path]) -> None:
    model = CM3Leon.load(opt["hf"], precision="float32")
    found = model(["a seven", "a nine"], num_images_per_prompt=2, seed=4)
    assert [image.size for image in found.images] == [(16, 16)] * 4

    expected = model.generate("a seven", n=2, seed=4)
    assert np.array_equal(found.images[1], expected[1].image)

    decoder = {"name": "top_p", **vars(model.run.experiment.decoder.config), "cfg": 1.5}
    guided = model("a seven", guidance_scale=1.5).images[0]
    assert np.array_equal(guided, model.generate("a seven", decoder=decoder)[0].image)

    # A generator of torch gives another seed with each call, and the same ones again.
    generator = torch.Generator().manual_seed(0)
    first, second = (np.asarray(model("a seven", generator=generator).images[0]) for _ in range(2))
    again = model("a seven", generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "cm3leon.json").unlink(), "has no cm3leon.json that `export"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (
            lambda folder: (folder / "image_tokenizer" / "config.json").unlink(),
            "image_tokenizer has no config.json",
        ),
    ],
)
def test_what_an_exported_folder_lacks_is_said(
    change: Any, sentence: str, opt: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(opt["hf"], tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=sentence):
        CM3Leon.load(tmp_path / "hf")


# ------------------------------------------------------------------------------------------ the Hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs.

    It keeps the requests that it is sent (`told`) and the tokens that they come with. Files whose
    paths are in `ignored` are not kept, as a .gitignore of the repository would have it.
    """

    told: ClassVar[list[tuple[str, str, bytes]]] = []
    tokens: ClassVar[list[str | None]] = []
    ignored: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.told.append(("POST", self.path, body))
        self.tokens.append(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{self.address}/org/name", "id": "org/name"})
        elif "/preupload/" in self.path:
            fields = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{**each, **fields} for each in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{self.address}/org/name/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({})

    def do_GET(self) -> None:
        if "/tree/" not in self.path:
            self.answer({"id": "org/name", "sha": "1" * 40, "siblings": [], "private": True})
            return

        # The files of the last commit.
        *_, commit = (body for _, path, body in self.told if "/commit/" in path)
        sent = [json.loads(line) for line in commit.decode().splitlines()]
        paths = [each["value"]["path"] for each in sent if each["key"] == "file"]
        kept = [path for path in paths if path not in self.ignored]
        self.answer([{"type": "file", "path": path, "oid": "1", "size": 1} for path in kept])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def answer(self, content: Any) -> None:
        sent = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        pass


def test_push_uploads_what_its_dry_run_shows(
    opt: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(opt["hf"], folder)
    shutil.copyfile(folder / "sample.png", folder / "sample-[1].png")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    # Files that no export wrote are not uploaded.
    (folder / ".private").mkdir()
    for name in ("notes.json", ".private/config.json"):
        (folder / name).write_text("{}")

    words = ["push", f"folder={folder}", "to=org/name"]

    assert main([*words, "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "left here, as no export wrote it: notes.json\n" in shown
    assert {line.split("bytes  ")[1] for line in shown.splitlines() if "bytes  " in line} == files
    assert Hub.told == []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("no_proxy", "*")

    try:
        assert main(words) == 0
        told, said = list(Hub.told), capsys.readouterr()

        # A second time, where the repository ignores a file of the folder.
        monkeypatch.setattr(Hub, "ignored", ["config.json"])
        assert main(words) == 2
    finally:
        server.shutdown()
        server.server_close()

    ending = f"has {len(files) - 1} of {len(files)} files after the upload; config.json is not"
    assert ending in capsys.readouterr().err
    assert "uploaded: http://" in said.out

    paths = [path for _, path, _ in told]
    new = json.loads(next(body for _, path, body in told if path == "/api/repos/create"))
    assert new.get("private") is True or new.get("visibility") == "private"
    (commit,) = (body for _, path, body in told if "/commit/" in path)
    sent = [json.loads(line) for line in commit.decode().splitlines()]
    assert {each["value"]["path"] for each in sent if each["key"] == "file"} == files, paths

    # The token reaches the Hub, and is in no output or file.
    assert set(Hub.tokens) == {"Bearer hf_secret"}
    assert "hf_secret" not in said.out + said.err + shown
    assert not any(b"hf_secret" in file.read_bytes() for file in files_below(opt["hf"], tmp_path))


def files_below(*folders: Path) -> list[Path]:
    files: list[Path] = []
    for folder in folders:
        files += [path for path in folder.rglob("*") if path.is_file()]
    return files


def test_a_model_on_the_hub_is_read_from_the_cache_where_there_is_no_network(
    opt: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One snapshot that two branches name, as the library lays its cache out.
    repository = tmp_path / "models--org--name"
    shutil.copytree(opt["hf"], repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    for branch in ("main", "second"):
        (repository / "refs" / branch).write_text("1" * 40)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    expected = CM3Leon.load(opt["run"]).run.vocab
    assert CM3Leon.load("org/name").run.vocab == expected
    assert CM3Leon.load("org/name", revision="second").run.vocab == expected

    missing = "there is no folder .* here, and no model of that name could be had from the Hub: "
    with pytest.raises(UserError, match=f"^run: {missing}"):
        CM3Leon.load("org/other")
    with pytest.raises(UserError, match=missing):
        CM3Leon.load("org/name", revision="third")
    with pytest.raises(UserError, match=f"^adapter: {missing}"):
        CM3Leon.load("org/name", adapter="org/adapter")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["to=name"], "to is name; it must be the name of a model on the Hub, as org/name"),
        (["to=org/name", "folder=."], "folder: . has no README.md; give a folder that"),
    ],
)
def test_what_cannot_be_pushed_is_said(
    words: list[str],
    sentence: str,
    opt: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = words if words[-1].startswith("folder") else [*words, f"folder={opt['hf']}"]
    assert main(["push", *given]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(), ValueError("\n\n"), errors.HTTPError("")])
def test_what_the_hub_says_becomes_a_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does an error without a message, and one of the network below the library."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=f"could be had from the Hub: {type(error).__name__}$"):
        model_folder("org/name")


def test_a_hub_without_its_library_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package huggingface_hub: pip install"):
        model_folder("org/name")


def test_a_path_is_never_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(
        UserError, match="runs/digts is not the folder of a run with a finished pretraining"
    ):
        CM3Leon.load("runs/digts")
    with pytest.raises(UserError, match="revision is given, which only a model on the Hub has"):
        CM3Leon.load("runs/digts", revision="main")


# ----------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("model", ["cm3leon_tiny", "llama"])
@torch.inference_mode()
def test_an_adapter_goes_to_peft_and_comes_back(model: str, tmp_path: Path) -> None:
    """The package peft, on the exported base, computes what the merged run computes."""
    peft = pytest.importorskip("peft")
    shape = {"mlp_width": 88, "kv_heads": 2} if model == "llama" else {}
    base, tuned = made(tmp_path / "base", model, **shape), tmp_path / "tuned"

    # A run that says it was trained by LoRA from `base`, with random adapters.
    shutil.copytree(base, tuned)
    experiment = open_run(base).experiment
    training = replace(experiment.training, start=base, lora_rank=3, lora_alpha=7.0)
    settings = to_mapping(replace(experiment, training=training))
    (tuned / "config.yaml").write_text(dump_yaml(settings))

    learned = load_model(base)
    add_lora(learned, 3, 7.0)
    for name, weight in learned.named_parameters():
        if is_adapter(name):
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))

    whole, adapters = whole_state_and_adapter(learned)
    save_weights(tuned / "pretraining" / "model.safetensors", whole)
    save_weights(tuned / "pretraining" / "lora.safetensors", adapters)
    finish(tuned / "pretraining")

    hf = exported(base, tmp_path / "hf", "samples=0")
    adapter = tmp_path / "adapter"
    words = ["export", "to=peft", f"run={tuned}", f"out={adapter}", f"base_model={hf}"]
    assert main(words) == 0

    # In the library: the base alone, and with the adapter.
    library = "OPTForCausalLM" if model != "llama" else "ChameleonForConditionalGeneration"
    plain = getattr(transformers, library).from_pretrained(hf).eval()

    merged = load_model(tuned)
    ids_BT = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    before_BTV = plain(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits

    adapted = peft.PeftModel.from_pretrained(plain, adapter).eval()
    found_BTV = adapted(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    expected_BTV = merged(ids_BT)
    torch.testing.assert_close(found_BTV, expected_BTV, atol=5e-5, rtol=1e-4)
    assert (before_BTV - expected_BTV).abs().max() > 1e-3

    back = CM3Leon.load(hf, adapter=adapter, precision="float32").run.model
    torch.testing.assert_close(back(ids_BT), expected_BTV, atol=5e-5, rtol=1e-4)
    words = ["export", "to=cm3leon", f"hf={hf}", f"adapter={adapter}", f"out={tmp_path / 'back'}"]
    assert main(words) == 0
    returned = load_model(tmp_path / "back").state_dict()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(returned[name], weight, atol=1e-6, rtol=1e-5)
    assert main(["export", "to=peft", f"run={base}", f"out={tmp_path / 'none'}"]) == 2
