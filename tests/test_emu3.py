"""Emu3 as a run: its layout, model and image tokenizer are those of transformers.

Of Emu3.5 only the layout is checked, as its decoder cannot be imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import encoded
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cm3leon import CM3Leon
from cm3leon.models.pretrained import load_model
from cm3leon.registry import TASKS
from cm3leon.run import main
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.families import FAMILIES, renumbered
from cm3leon.tokenizers.layout import LayoutTable
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment

pytestmark = pytest.mark.stack

transformers = pytest.importorskip("transformers")

OLD = int(transformers.__version__.split(".")[0]) < 5
CODES = 16
TEXTS = ["a red dog on a blue sofa", "two cats, 12 dogs", "What is it? It is a cow."] * 4
VQ: dict[str, Any] = {
    "codebook_size": CODES,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [3],
    "hidden_size": 32,
}
SIDE = 32
"""Pixels of a square image of 4 x 4 codes."""


def published_tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json, with Emu3's order of ids.

    First text, then the tokens of its base, reserved ones, those of images, and the codes.
    """
    # Text: BPE over bytes, with each digit a piece of its own.
    learner = Tokenizer(models.BPE())
    pattern = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(TEXTS, trainer)

    content = json.loads(learner.to_str())
    special = [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"),
        *(f"<|extra_{number}|>" for number in range(1, 205)),
        *("<|image token|>", "<|image start|>", "<|image end|>"),
        *(f"<|visual token {code:06d}|>" for code in range(CODES)),
    ]

    # The special tokens follow the text in this order.
    vocabulary = content["model"]["vocab"]
    first = len(vocabulary)
    vocabulary |= {name: first + number for number, name in enumerate(special)}
    content["added_tokens"] = [
        {"id": first + number, "content": name, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for number, name in enumerate(special)
    ]
    return content


def publish(parent: Path) -> Path:
    """Write a folder in parts, as the library writes an Emu3."""
    tokenizer = published_tokenizer()
    vocabulary = tokenizer["model"]["vocab"]
    torch.manual_seed(0)
    config = transformers.Emu3Config(
        vocabulary_map=vocabulary,
        vq_config=VQ,
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 64,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "pad_token_id": vocabulary["<|endoftext|>"],
            "bos_token_id": vocabulary["<|extra_203|>"],
            "eos_token_id": vocabulary["<|extra_204|>"],
        },
    )

    model = transformers.Emu3ForConditionalGeneration(config)

    # Otherwise these statistics would be zero, and a mistake with them would not show.
    with torch.no_grad():
        for name, buffer in model.model.vqmodel.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)

    folder = parent / "emu3"
    model.save_pretrained(folder, max_shard_size="300KB")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def imported(hf: Path, out: Path) -> Path:
    """Import a published folder into a run."""
    words = ["import", "from=emu3", f"hf={hf}", f"image_size={SIDE}", f"out={out}"]
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("emu3")
    return imported(publish(parent), parent / "run")


@pytest.fixture(scope="module")
def theirs(run: Path) -> Any:
    """The model as the library opens it."""
    folder = run.parent / "emu3"
    return transformers.Emu3ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(run: Path) -> Any:
    """The library's processor of texts and images."""
    # Before version 5, Emu3Processor insisted on the class of GPT-2's tokenizers.
    kind = transformers.GPT2TokenizerFast if OLD else transformers.PreTrainedTokenizerFast
    tokenizer = kind(
        tokenizer_file=str(run.parent / "emu3" / "tokenizer.json"),
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
    )

    # Pixels go from -1 to 1 and are not resized, as in the project.
    half = [0.5, 0.5, 0.5]
    images = transformers.Emu3ImageProcessor(do_resize=False, image_mean=half, image_std=half)
    return transformers.Emu3Processor(images, tokenizer)


def old_ids(run: Path) -> np.ndarray:
    return np.array(json.loads((run / "import.json").read_text())["ids"])


def allowed_tokens(names: dict[str, int], rows: int, columns: int) -> Callable[..., list[int]]:
    """What may come next in an image of this size, by the library's documentation of Emu3."""
    codes = [id_ for name, id_ in names.items() if name.startswith("<|visual token")]

    # An image's rows of codes are followed by these three.
    behind = {
        (columns + 1) * rows + 1: names["<|extra_201|>"],
        (columns + 1) * rows + 2: names["<|image end|>"],
        (columns + 1) * rows + 3: names["<|extra_204|>"],
    }

    def allowed(_: int, ids_T: torch.Tensor) -> list[int]:
        opened = int((ids_T == names["<|image token|>"]).nonzero()[0, 0])
        offset = len(ids_T) - opened
        if offset in behind:
            return [behind[offset]]
        if offset > (columns + 1) * rows + 3:
            return [names["<|endoftext|>"]]
        if offset % (columns + 1) == 0:
            return [names["<|extra_200|>"]]
        return codes

    return allowed


@torch.inference_mode()
def test_logits_are_those_of_transformers(run: Path, theirs: Any) -> None:
    model, old = load_model(run), torch.from_numpy(old_ids(run))
    ids_BT = torch.randint(len(old), (2, 30), generator=torch.Generator().manual_seed(1))

    expected_BTV = theirs(input_ids=old[ids_BT]).logits[..., old]
    found_BTV = model(ids_BT)[..., : len(old)]
    torch.testing.assert_close(found_BTV, expected_BTV, atol=2e-5, rtol=1e-5)
    assert found_BTV.std() > 0.5  # else the comparison would say nothing


@pytest.mark.parametrize("ratio", ["1:1", "4:1", "1:4"])
def test_prompts_are_those_of_its_processor(ratio: str, run: Path, processor: Any) -> None:
    model, old = CM3Leon.load(run), old_ids(run)
    asked = {"ratio": ratio, "image_area": SIDE**2}
    inputs = processor(text="a red dog, 12", return_for_image_generation=True, **asked)
    ((height, width),) = inputs["image_sizes"]
    task = TASKS.build("text_to_image", vocab=model.run.vocab, grid=(height, width))
    text = model._text("a red dog, 12")
    prompt = task.prompt(TokenDocument("", (text, task.fresh_image)))
    assert old[prompt.ids_T].tolist() == inputs["input_ids"][0]


@torch.inference_mode()
def test_greedy_codes_are_those_of_the_library_s_generate(
    run: Path, theirs: Any, processor: Any
) -> None:
    model = CM3Leon.load(run, precision="float32")
    names = published_tokenizer()["model"]["vocab"]
    first = names["<|visual token 000000|>"]
    for size, ratio, (rows, columns) in ((None, "1:1", (4, 4)), ((64, 16), "4:1", (2, 8))):
        (drawn,) = model.generate("a red dog", decoder="greedy", size=size)
        inputs = processor(
            text="a red dog",
            return_for_image_generation=True,
            ratio=ratio,
            image_area=SIDE**2,
            return_tensors="pt",
        )
        inputs.pop("image_sizes")
        answer_1T = theirs.generate(
            **inputs,
            max_new_tokens=rows * (columns + 1) + 3,
            prefix_allowed_tokens_fn=allowed_tokens(names, rows, columns),
            do_sample=False,
        )[:, inputs["input_ids"].shape[1] :]

        rows_RC = answer_1T[0, :-3].reshape(rows, columns + 1)
        assert (rows_RC[:, -1] == names["<|extra_200|>"]).all()
        assert (rows_RC[:, :-1].flatten() - first).tolist() == drawn.codes_N.tolist()

        # Training teaches what the library would have written, to the last token.
        vocab = model.run.vocab
        image = TokenSegment("image", vocab.image_ids(drawn.codes_N, (rows, columns)))
        sample = Sample(TokenDocument("", (model._text("a red dog"), image)))
        trained = old_ids(run)[lay_out(sample, vocab).ids_T].tolist()
        assert trained == [*inputs["input_ids"][0].tolist(), *answer_1T[0].tolist()]

        # The library's image decoder makes the same pixels of the codes.
        pixels_CHW = theirs.decode_image_tokens(image_tokens=answer_1T, height=rows, width=columns)
        expected_HWC = ((pixels_CHW[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
        assert np.array_equal(np.asarray(drawn.image), expected_HWC.numpy().astype(np.uint8))


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(32, 32), (16, 64)])
def test_images_are_read_as_its_processor_and_model_read_them(
    shape: tuple[int, int], run: Path, theirs: Any, processor: Any
) -> None:
    model, old = CM3Leon.load(run, precision="float32"), old_ids(run)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    inputs = processor(images=Image.fromarray(pixels), text="<image>a dog", return_tensors="pt")
    tokens = theirs.model.get_image_tokens(inputs["pixel_values"], inputs["image_sizes"])

    # The processor leaves a placeholder for each code in the text, which its model fills in.
    names = published_tokenizer()["model"]["vocab"]
    ids_T = inputs["input_ids"][0]
    ids_T[ids_T == names["<image>"]] = tokens.long()

    shown = model._image(model._pixels(pixels))
    sample = Sample(TokenDocument("", (shown, model._text("a dog"))))
    assert old[lay_out(sample, model.run.vocab).ids_T][:-1].tolist() == ids_T.tolist()
    # The random weights of older versions tell two codes apart here, those of newer ones three.
    assert len(set(shown.ids_T.tolist())) > (2 if OLD else 3)


def test_it_is_asked_like_any_other_run(run: Path) -> None:
    model = CM3Leon.load(run)
    pictures = model.generate("two cats", n=2, decoder={"name": "top_p", "cfg": 2.0})
    filled = model.infill(pictures[0].image, "two cats", box=(0, 0, 16, 32))
    assert filled.codes_N.shape == (16,)
    assert isinstance(model.caption(pictures[0].image, max_tokens=3), str)
    assert np.isfinite(model.score(texts=["a dog", "two cats"], image=pictures[0].image)).all()
    # The size in front of an image is text, and no part of what is written.
    parts = model.interleave(["a dog"], first="image", segments=2, max_tokens=2)
    assert isinstance(parts[0], Image.Image)
    assert len(parts) <= 2
    page = model.interleave(["a dog"], segments=3, max_tokens=2, seed=1)
    assert not any("*" in part and part[0].isdigit() for part in page if isinstance(part, str))


def test_tensors_are_read_by_their_present_names_too(run: Path, tmp_path: Path) -> None:
    """The library writes those that its first version gave them."""
    published, renamed = run.parent / "emu3", tmp_path / "renamed"
    renamed.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (renamed / name).write_bytes((published / name).read_bytes())

    tensors: dict[str, torch.Tensor] = {}
    for part in published.glob("*.safetensors"):
        tensors |= load_file(part)

    beginnings = {
        "text_model.model.": "model.text_model.",
        "text_model.lm_head.": "lm_head.",
        "vqmodel.": "model.vqmodel.",
    }
    present = {}
    for before, now in beginnings.items():
        for name, tensor in tensors.items():
            if name.startswith(before):
                present[now + name.removeprefix(before)] = tensor
    assert len(present) == len(tensors)

    save_file(present, renamed / "model.safetensors")
    again = imported(renamed, tmp_path / "run")
    for stage in ("pretraining", "image_tokenizer"):
        files = [each / stage / "model.safetensors" for each in (run, again)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.once
@pytest.mark.parametrize("lora", [0, 2])
def test_photographs_of_any_shape_are_trained_on(lora: int, run: Path, tmp_path: Path) -> None:
    """With retrieval, in its layout, whose sizes take unequal numbers of tokens."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        side = (20, 90) if number % 2 else (60, 60)
        pixels = np.random.default_rng(number).integers(0, 256, (*side, 3), dtype=np.uint8)
        (photos / f"{number}.png").write_bytes(encoded(pixels))
        (photos / f"{number}.txt").write_text(f"dog {number}")

    opened = CM3Leon.load(run).run
    size = opened.experiment.text_tokenizer.vocab_size
    own = tmp_path / "own"
    words = f"""experiment=sft_chameleon_7b data.path={photos} model=llama
        shards.tokenizers={run} training.start={run} model.layers=2 model.width=64
        model.head_size=16 model.kv_heads=2 model.mlp_width=88 model.seq_len=128
        model.rope_theta=1000000.0 model.qk_norm=false sentinels=199
        training.steps=1 training.batch_tokens=256 training.warmup_steps=0
        training.callback_every=1 training.compile=false
        training.lora_rank={lora} text_tokenizer.vocab_size={size} image_tokenizer=emu3
        image_tokenizer.image_size={SIDE} run={own}""".split()
    words.append("split={validation: 0.2, held_out: 0.1}")
    assert main(words) == 0
    tuned = CM3Leon.load(own)

    # Both shapes of the photographs were kept, and can be drawn.
    tokens, layout = tuned.run.tokens, tuned.run.vocab.layout
    documents = [tokens.document(row) for row in range(len(tokens))]
    grids = {layout.grid_of(each.segments[1].ids_T) for each in documents}
    assert grids == {(4, 4), (2, 8)}
    (drawn,) = tuned.generate("dog 1", retrieve=1, size=(64, 16))
    assert drawn.image.size == (64, 16)
    assert len(drawn.documents) == 1

    # What LoRA has learned is not exported either, as the names of an Emu3's layers are others.
    adapter = tmp_path / "adapter"
    assert main(["export", "to=peft", f"run={own}", f"out={adapter}"]) == 2
    assert not adapter.exists()


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["from=emu3_5", "hf=x"], "the decoder of Emu3.5 cannot be imported, as it normalises"),
        (["from=emu3", "hf=x", "vqgan=y"], "the folder of Emu3 holds the image tokenizer"),
        (["from=chameleon", "hf=x"], "needs the file of the image tokenizer with its decoder"),
        (["from=export", "hf=x", "image_size=8"], "image_size is given, which an export says"),
        (["from=emu", "hf=x"], "from is emu, which is not known"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", *words, f"out={tmp_path / 'run'}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_an_emu3_does_not_go_out(
    to: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"to={to}", f"run={run}", f"out={tmp_path / 'out'}"]) == 2
    assert "model.qk_norm is false" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ Emu3.5's layout


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (12, 10)])
def test_the_layout_of_emu3_5_is_that_of_its_publisher(grid: tuple[int, int]) -> None:
    """Rows are separated by what ends one in Emu3, and an image ends with its last code."""
    found = renumbered(published_tokenizer(), FAMILIES["emu3_5"], "tokenizer.json")
    table = LayoutTable.from_names(found.table, "layout.json")
    vocab = Vocab(
        found.text_size, found.image_size, found.sentinels, len(table.specials), table.layout
    )
    rows, columns = grid
    codes_RC = np.random.default_rng(0).integers(0, CODES, grid)

    # Spelled in the publisher's tokens and encoded by its tokenizer: the independent reference.
    spelled = []
    for row in codes_RC:
        spelled.append("".join(f"<|visual token {code:06d}|>" for code in row))
    whole = (
        f"<|extra_203|><|image start|>{rows}*{columns}<|image token|>"
        f"{'<|extra_200|>'.join(spelled)}<|image end|><|extra_204|>"
    )
    published = Tokenizer.from_str(json.dumps(published_tokenizer()))
    expected = published.encode(whole, add_special_tokens=False).ids

    ids_T = vocab.image_ids(codes_RC.ravel(), grid)
    sample = Sample(TokenDocument("", (TokenSegment("image", ids_T),)))
    assert found.old_id_V[lay_out(sample, vocab).ids_T].tolist() == expected
    assert vocab.layout.grid_of(ids_T) == grid
    assert vocab.image_codes(ids_T).tolist() == codes_RC.ravel().tolist()
    assert len(ids_T) == vocab.layout.image_length(grid)
    assert len(vocab.layout.row_ends(columns, 0, len(ids_T))) == rows - 1
