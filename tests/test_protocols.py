"""Protocols count true answers as right, and answers to other items as wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import emoji, page_corpus
from instruction_corpora import INSTRUCTIONS, dense_annotations
from PIL import Image

from cm3leon.config import from_mapping
from cm3leon.data.images import square
from cm3leon.evaluate import Evaluation, Row
from cm3leon.evaluate import evaluation as evaluating
from cm3leon.evaluation.answers import vqa_accuracy
from cm3leon.evaluation.config import AskConfig
from cm3leon.evaluation.images import cell_features, precision_recall
from cm3leon.evaluation.protocols import images as captioning
from cm3leon.evaluation.protocols.base import Answer, Protocol, asked, given_image, true_answer
from cm3leon.evaluation.protocols.corpus import UNKNOWN, CorpusTask, OwnCorpus
from cm3leon.plugins.scenes.protocols import SceneCompositions, SceneEntities, SceneTask
from cm3leon.plugins.scenes.world import World
from cm3leon.registry import PROTOCOLS, SOURCES, discover
from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

discover()

SMALL = {
    "colours": ["red", "green", "blue", "yellow"],
    "shapes": ["circle", "square", "triangle", "cross"],
    "sizes": ["large"],
    "textures": ["plain"],
    "backgrounds": ["white", "black"],
    "things": [1, 2],
    "jitter": 0.0,
    "overlap": 0.0,
    "words": 0.0,
    "figures": 0.0,
}
TASKS = (
    "text_to_image",
    "caption",
    "vqa",
    "reasoning",
    "edit",
    "grounded",
    "segmentation",
    "canny",
    "depth",
)


def protocol(task: str, count: int = 60, **world: object) -> SceneTask:
    config = {"task": task, "count": count, "side": 48, "world": {**SMALL, **world}}
    return SceneTask(from_mapping(SceneTask.Config, config))


@pytest.mark.parametrize("task", TASKS)
def test_true_answers_are_right_and_those_to_other_items_hardly_ever(task):
    asking = protocol(task)
    items = asking.items()
    truths = [true_answer(item, asking.answers_in) for item in items]
    figures = asking.score(items, truths)
    right = {name: measured.value for name, measured in figures.items()}
    assert right == dict.fromkeys(figures, 1.0)

    # Questions have few answers, so that some of another item are right.
    others = asking.score(items, [*truths[1:], truths[0]])
    assert others["right"].value < (0.7 if task in ("vqa", "reasoning") else 0.2)
    assert others["right"].n == len(items) == 60


def test_written_words_are_read_in_their_order():
    asking = protocol("write", 20, words=1.0, things=[1, 2])
    items = asking.items()
    assert asking.score(items, [true_answer(item, "image") for item in items])["right"].value >= 0.9


def test_items_are_the_same_again_and_those_of_a_longer_list_begin_with_them():
    short, long = protocol("edit", 10).items(), protocol("edit", 25).items()
    assert [item.id for item in short] == [item.id for item in long[:10]]
    for one, other in zip(short, long, strict=False):
        assert asked(one) == asked(other)
        assert (one.document.images[1] == other.document.images[1]).all()


def test_what_is_asked_is_shown_without_its_answer():
    question = protocol("vqa", 5).items()[0]
    assert question.truth.values["question"] in asked(question)
    assert "…" in asked(question)
    assert given_image(question) is question.document.images[0]

    edit = protocol("edit", 5).items()[0]
    assert edit.truth.values["instruction"] in asked(edit)
    assert given_image(edit) is edit.document.images[0]
    assert given_image(protocol("text_to_image", 5).items()[0]) is None


def test_figures_of_each_kind_add_up_to_those_of_all():
    asking = protocol("edit")
    items = asking.items()
    figures = asking.score(items, [true_answer(item, "image") for item in items])
    kinds = {name: measured for name, measured in figures.items() if name != "right"}
    assert set(kinds) == {item.kind for item in items}
    assert sum(measured.n for measured in kinds.values()) == figures["right"].n


def test_a_task_that_a_world_has_no_scenes_for_is_refused():
    refusal = "protocol.task is write, but almost no scene of this world fits it; change"
    with pytest.raises(UserError, match=refusal):
        protocol("write", 2).items()


def test_entities_are_recognised_among_all():
    config = {"first": 40, "count": 30, "known": 100, "backgrounds": ["white", "black"]}
    asking = SceneEntities(from_mapping(SceneEntities.Config, config))
    items = asking.items()

    truths = [true_answer(item, "image") for item in items]
    right = asking.score(items, truths)
    found = (right["recognised"].value, right["background"].value, right["recognised"].n)
    assert found == (1, 1, 30)

    shifted = asking.score(items, [*truths[1:], truths[0]])
    assert (shifted["recognised"].value, shifted["background"].value) == (0, 0)


def test_entities_beyond_the_world_are_refused():
    with pytest.raises(UserError, match="known is 100; it must be at least first"):
        PROTOCOLS.build({"name": "scene_entities", "first": 90, "count": 30, "known": 100})


def test_compositions_have_six_kinds_and_their_mean():
    asking = SceneCompositions(SceneCompositions.Config(world=from_mapping(World, SMALL), count=8))
    items = asking.items()

    picture = true_answer(protocol("text_to_image", 1).items()[0], "image")
    figures = asking.score(items, [picture for _ in items])
    assert len(items) == 48
    assert len(figures) == 7

    kinds = [measured for name, measured in figures.items() if name != "mean of six kinds"]
    mean = sum(measured.value for measured in kinds) / 6
    assert figures["mean of six kinds"].value == pytest.approx(mean)
    assert figures["mean of six kinds"].low <= mean <= figures["mean of six kinds"].high


def test_a_caption_is_right_by_its_things():
    asking = protocol("caption", 10)
    item = asking.items()[0]
    thing = item.truth.shows.things[0]
    assert not asking.right(item, Answer(text=""))
    only = f"a {thing.colour} {thing.shape}"
    assert asking.right(item, Answer(text=only)) == (len(item.truth.shows.things) == 1)


# ----------------------------------------------------------------------------- images and data sets


def captioned(count: int, **data: object) -> Any:
    return PROTOCOLS.build(
        {
            "name": "captioned_images",
            "data": {"name": "scenes", "count": 150, "side": 48, "world": SMALL, **data},
            "count": count,
            "size": 48,
        }
    )


def test_images_are_compared_with_those_that_were_captioned():
    asking = captioned(130)
    items = asking.items()
    source = SOURCES.build(asking.config.data)
    images = {found.id: found.image for found in source.documents()}
    answers = [Answer(image_HWC=images[item.id], clip=0.25) for item in items]

    # The captioned images themselves.
    same = asking.score(items, answers)
    assert same["Fréchet distance of cells"].value == pytest.approx(0, abs=1e-3)
    assert (same["precision"].value, same["recall"].value) == (1, 1)
    assert same["CLIP score"].value == pytest.approx(0.25)

    # Grey ones.
    grey_HWC = np.full((48, 48, 3), 90, np.uint8)
    grey = asking.score(items, [Answer(image_HWC=grey_HWC, clip=0.0) for _ in items])
    assert grey["Fréchet distance of cells"].value > 1000
    assert grey["recall"].value == 0


def kept_score(place: Path, **settings: Any) -> tuple[dict[str, Any], Any]:
    """The figures and notes of grey answers, and the protocol, whose folder keeps its reference."""
    asking = captioned(112, **settings)
    asking.folder = place
    items = asking.items()
    answers = [Answer(image_HWC=np.full((48, 48, 3), n, np.uint8)) for n in range(len(items))]
    return {"figures": asking.score(items, answers), "notes": asking.notes(items)}, asking


def test_a_reference_is_made_once_for_all_that_are_asked(tmp_path, monkeypatch):
    first, asking = kept_score(tmp_path)
    (file,) = (tmp_path / "references").iterdir()

    # The second protocol reads no image.
    with monkeypatch.context() as patch:
        patch.setattr(type(asking), "_reference_images", None)
        assert kept_score(tmp_path)[0] == first

    # Other images, and other features of the same ones, have their own references.
    other, _ = kept_score(tmp_path, first=7)
    assert other["notes"]["reference"] != first["notes"]["reference"]
    assert len(list((tmp_path / "references").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(type(asking), "scored_by", "cells 7")
        patch.setattr(captioning, "cell_features", lambda images: cell_features(images)[:, ::-1])
        kept_score(tmp_path)
    assert len(list((tmp_path / "references").iterdir())) == 3
    assert file.is_file()


def test_a_damaged_reference_is_noticed_and_made_again(tmp_path, capsys):
    first, _ = kept_score(tmp_path)
    (file,) = (tmp_path / "references").iterdir()

    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    assert kept_score(tmp_path)[0] == first
    assert f"{file} is damaged" in capsys.readouterr().out
    assert bytes(content) != file.read_bytes()
    kept_score(tmp_path)
    assert capsys.readouterr().out == ""


def test_prompts_are_fixed_whatever_the_order_of_the_corpus_and_named_by_a_hash():
    one, other = captioned(120), captioned(120)
    for asking in (one, other):
        if isinstance(asking, CorpusTask):
            asking.ask_about(three_documents())

    items = one.items()
    assert [item.id for item in items] == [item.id for item in other.items()]
    assert all(item.document.images == [] for item in items)

    # Other prompts and other reference images have other hashes.
    notes = one.notes(items)
    assert notes == other.notes(other.items())
    longer, later = captioned(121), captioned(120, first=7)
    assert notes["prompts"] != longer.notes(longer.items())["prompts"]
    assert notes["reference"] != later.notes(later.items())["reference"]


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (
            10,
            "protocol.count is 10; it must be at least 110, as the covariance of 108 features "
            "needs as many images",
        ),
        (
            151,
            "protocol.count is 151, but the corpus has only 150 images with captions; lower it, "
            "or give a larger corpus",
        ),
    ],
)
def test_too_few_images_for_a_covariance_are_refused(count, sentence):
    with pytest.raises(UserError) as refusal:
        captioned(count).items()
    assert str(refusal.value) == sentence


def test_precision_and_recall_are_their_definition():
    rng = np.random.default_rng(3)
    real_MD, made_ND = rng.normal(size=(40, 5)), rng.normal(0.4, 1.2, size=(33, 5))

    def inside(points: np.ndarray, of: np.ndarray) -> float:
        """Share of points within the ball of any centre, whose radius is its third neighbour's."""
        hits = 0
        for point in points:
            for centre in of:
                radius = sorted(np.linalg.norm(centre - other) for other in of)[3]
                if np.linalg.norm(point - centre) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    # Precision is the share of made images within the real ones, recall the reverse.
    expected = (inside(made_ND, real_MD), inside(real_MD, made_ND))
    assert precision_recall(real_MD, made_ND) == pytest.approx(expected)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(real_MD[:3], made_ND)


def test_cells_are_mean_colours():
    images = np.random.default_rng(0).integers(0, 256, (3, 13, 20, 3), dtype=np.uint8)
    found = cell_features(images, cells=3).reshape(3, 3, 3, 3)
    assert found[1, 2, 0] == pytest.approx(images[1, 8:13, 0:6].reshape(-1, 3).mean(0))
    assert found[2, 1, 2] == pytest.approx(images[2, 4:8, 13:20].reshape(-1, 3).mean(0))


def answering(name: str, place: Path, measure: str, missing: float = 0.9, **more: object) -> Any:
    return PROTOCOLS.build(
        {
            "name": "answers",
            "data": {"name": name, **INSTRUCTIONS[name](place), **more},
            "measure": measure,
            "missing": missing,
        }
    )


def test_questions_are_measured_against_all_that_people_answered(tmp_path):
    asking = answering("vqa", tmp_path, "vqa")
    items = asking.items()
    assert len(items) == 6
    assert items[0].truth.count("two") == 4

    figures = asking.score(items, [Answer(text="two"), *[Answer(text="no") for _ in items[1:]]])
    expected = [vqa_accuracy("two", items[0].truth)]
    expected += [vqa_accuracy("no", item.truth) for item in items[1:]]
    assert figures["VQA accuracy"].value == pytest.approx(np.mean(expected))
    assert asking.right(items[0], Answer(text="Two."))


def test_an_image_is_captioned_once_and_measured_against_all_its_captions(tmp_path, monkeypatch):
    # Without METEOR, a program in Java that takes seconds to start and loads its own tables.
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def cider(figures: dict[str, Any]) -> float:
        return next(each.value for name, each in figures.items() if name.startswith("CIDEr"))

    asking = answering("karpathy", tmp_path, "captions")
    items = asking.items()
    assert len(items) == 3
    assert all(len(item.truth) == 2 for item in items)

    right = asking.score(items, [Answer(text=item.truth[0]) for item in items])
    wrong = asking.score(items, [Answer(text="nothing at all here") for _ in items])
    assert cider(right) > cider(wrong)


@pytest.mark.parametrize(
    ("name", "measure", "max_tokens"),
    [
        ("vqa", "vqa", 32),
        ("karpathy", "captions", 64),
        ("image_paragraph", "captions", 256),
        ("scienceqa", "options", 384),
    ],
)
def test_answers_may_be_as_long_as_those_of_their_data_set(name, measure, max_tokens, tmp_path):
    assert answering(name, tmp_path, measure).max_tokens == max_tokens


@pytest.mark.parametrize("task", ["caption", "paragraph", "vqa", "reasoning"])
def test_true_answers_about_scenes_are_not_cut(task):
    """The tokenizer has as many pieces as in the studies of scenes."""
    asking = SceneTask(SceneTask.Config(world=World(), side=48, task=task, count=60))
    answers = [true_answer(item, "text").text for item in asking.items()]
    captions = SceneTask(SceneTask.Config(world=World(), side=48, task="caption", count=60))
    texts = [true_answer(item, "text").text for item in captions.items()]
    tokenizer = TextTokenizer.train(TextTokenizerConfig(vocab_size=512), texts)
    assert max(len(tokenizer.encode(answer)) for answer in answers) < asking.max_tokens


def test_options_are_told_by_letter_or_text(tmp_path):
    asking = answering("scienceqa", tmp_path, "options")
    items = asking.items()

    letters = []
    for item in items:
        chosen, *options = item.truth
        letters.append(Answer(text=f"({'ABCDE'[options.index(chosen)]})"))

    texts = [Answer(text=item.truth[0]) for item in items]
    assert asking.score(items, letters)["accuracy"].value == 1
    assert asking.score(items, texts)["accuracy"].value == 1
    assert asking.score(items, [Answer(text="no idea") for _ in items])["accuracy"].value == 0


@pytest.mark.parametrize(
    ("name", "source"), [("answers", "vqa"), ("answers", "karpathy"), ("ranked_answers", "visdial")]
)
def test_items_are_squared_as_they_are_read(name, source, tmp_path, monkeypatch):
    if name == "ranked_answers":
        asking = PROTOCOLS.build({"name": name, **ranking(tmp_path)})
    elif source == "karpathy":
        asking = answering(source, tmp_path, "captions")
    else:
        asking = answering(source, tmp_path, "vqa")
    whole = asking.items()

    # The general way is not taken: it would hold all images at their full size first.
    monkeypatch.setattr(Protocol, "items_squared", None)
    small = asking.items_squared(16)
    facts_of_whole = [(item.id, item.truth, item.options) for item in whole]
    assert [(item.id, item.truth, item.options) for item in small] == facts_of_whole
    for one, other in zip(whole, small, strict=True):
        assert asked(one) == asked(other)
        assert np.array_equal(square(one.document.image, 16), other.document.image)


def test_items_have_the_size_of_the_model_that_is_asked(tmp_path, monkeypatch):
    sizes = {"small": 16, "large": 24}

    def opened(folder, **_):
        return SimpleNamespace(image_tokenizer_shape=SimpleNamespace(image_size=sizes[folder.name]))

    monkeypatch.setattr(evaluating, "open_run", opened)
    section = {"name": "scene_task", "task": "vqa", "count": 3, "side": 48, "world": SMALL}

    asking = Evaluation(PROTOCOLS.check(section, "protocol"), tmp_path)
    for name in ("small", "large", "small"):
        row = Row(name, name, Path(name), AskConfig(), {})
        side = sizes[name]
        assert [item.document.image.shape for item in asking.items(row)] == [(side, side, 3)] * 3
        assert asking.shards(row) == 1


@pytest.mark.parametrize("task", ["vqa", "relation", "relation_steps", "reasoning"])
def test_an_answer_in_steps_counts_by_its_end(task):
    section = {"name": "scene_task", "task": task, "count": 20, "side": 48, "world": SMALL}
    asking = PROTOCOLS.build(section)
    for item in asking.items():
        true = str(item.truth.values["answer"])
        end = true.split(" ")[-1]
        other = {"yes": "no", "no": "yes", "(A)": "(B)", "(B)": "(A)"}.get(end, "neither")
        assert asking.right(item, Answer(text=f" {true}."))
        assert not asking.right(item, Answer(text=true.removesuffix(end) + other))
        assert not asking.right(item, Answer(text=""))

        # Only where steps may come first, words before the end do not matter.
        in_steps = task in ("relation_steps", "reasoning")
        assert asking.right(item, Answer(text=f"something else, so {end}.")) == in_steps


def test_the_steps_of_an_answer_are_figures_of_their_own():
    section = {"name": "scene_task", "task": "relation_steps", "count": 4, "side": 48}
    asking = PROTOCOLS.build({**section, "world": SMALL})
    items = asking.items()
    true = [str(item.truth.values["answer"]) for item in items]

    # One answer is whole, one has a wrong end, one wrong places, and one says only yes or no.
    end = {"yes": "no", "no": "yes"}[true[1].split(" ")[-1]]
    wrong_end = f"{true[1].rsplit(' ', 1)[0]} {end}"
    wrong_places = true[2].replace(" at the ", " at the very ")
    texts = [true[0], wrong_end, wrong_places, true[3].split(" ")[-1]]
    figures = asking.score(items, [Answer(text=text) for text in texts])
    shares = {name: figure.value for name, figure in figures.items()}
    assert shares == {"right": 0.75, "places": 0.5, "relation": 0.75}


def test_too_many_missing_images_are_fatal(tmp_path):
    refusal = r"items cannot be used .* more than protocol.missing=0.01 allows"
    with pytest.raises(UserError, match=refusal):
        answering("vqa", tmp_path, "vqa", missing=0.01).items()


def test_a_source_without_known_answers_is_refused():
    with pytest.raises(UserError, match=r"data\.name is scenes, which has no instructions"):
        PROTOCOLS.build({"name": "answers", "data": {"name": "scenes"}, "measure": "vqa"})


def ranking(place: Path) -> dict[str, Any]:
    data = {
        "name": "visdial",
        **INSTRUCTIONS["visdial"](place),
        "relevance": dense_annotations(place),
    }
    return {"data": data, "missing": 0.5}


def test_candidates_are_measured_by_their_ranks(tmp_path):
    asking = PROTOCOLS.build({"name": "ranked_answers", **ranking(tmp_path)})
    items = asking.items()
    assert items[0].options == ("yes", "no", "red", "it is blue", "can't tell")
    best = [Answer(scores_K=np.array(item.truth)) for item in items]
    assert asking.score(items, best)["NDCG"].value == pytest.approx(1)

    # Of the first item, red and blue are relevant (1 and 0.5). With blue first, DCG is
    # 0.5 + 1 / log2(3); at best it is 1 + 0.5 / log2(3).
    swapped = [Answer(scores_K=np.array([0.0, 0.0, 1.0, 2.0, 0.0])), best[1]]
    expected = (0.5 + 1 / np.log2(3)) / (1 + 0.5 / np.log2(3))
    assert asking.score(items, swapped)["NDCG"].value == pytest.approx((expected + 1) / 2)


def test_candidates_without_ratings_are_refused(tmp_path):
    data = {"name": "visdial", **INSTRUCTIONS["visdial"](tmp_path)}
    section = {"name": "ranked_answers", "data": data}
    with pytest.raises(UserError, match=r"visdial with its dense annotations"):
        PROTOCOLS.build(section)


# ----------------------------------------------------------------------------------------- showcase


def picture_file(place: Path) -> str:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(place / "red.png")
    return str(place / "red.png")


@pytest.mark.parametrize(
    ("task", "prompt", "shown", "gives"),
    [
        ("text_to_image", {"text": "a red circle"}, "a red circle", False),
        ("edit", {"image1": "FILE", "instruction": "make it blue"}, "make it blue", True),
        (
            "grounded",
            {"caption": "a cat", "objects": "cat at 1 2 3 4"},
            "a cat with segmentations cat at 1 2 3 4",
            False,
        ),
        (
            "features",
            {"feature": "depth", "feature_image": "FILE", "caption": "a cat"},
            "from depth features",
            True,
        ),
        ("write", {"text": "SUN"}, 'draw "SUN"', False),
        ("caption", {"image": "FILE"}, "…", True),
        (
            "vqa",
            {"image": "FILE", "question": "What colour?"},
            "Question: What colour? Answer: …",
            True,
        ),
    ],
)
def test_a_showcase_asks_each_task_with_what_is_given(task, prompt, shown, gives, tmp_path):
    filled = {}
    for slot, value in prompt.items():
        filled[slot] = picture_file(tmp_path) if value == "FILE" else value

    built = PROTOCOLS.build({"name": "showcase", "task": task, "prompts": [filled]})
    (item,) = built.items()
    assert shown in asked(item)

    # An image that is given is shown as it is.
    given = given_image(item)
    assert (given is not None) == gives
    if given is not None:
        assert given.shape == (30, 40, 3)
        assert tuple(given[0, 0]) == (200, 30, 30)

    texts = ("caption", "paragraph", "vqa")
    assert built.answers_in == ("text" if task in texts else "image")


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"task": "dance", "prompts": [{"text": "a"}]}, "task is dance"),
        ({"task": "edit", "prompts": []}, "prompts is empty"),
        (
            {"task": "edit", "prompts": [{"text": "a"}]},
            "prompts.0 has text; edit takes image1, instruction",
        ),
        (
            {
                "task": "features",
                "prompts": [{"feature": "heat", "feature_image": "a.png", "caption": "a"}],
            },
            "prompts.0.feature",
        ),
    ],
)
def test_a_showcase_without_what_its_task_takes_is_refused(section, sentence):
    with pytest.raises(UserError, match=sentence):
        PROTOCOLS.build({"name": "showcase", **section})


def test_a_showcase_names_images_that_are_not_there_or_broken(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name, sentence in (
        ("none.png", "does not exist"),
        ("text.png", "cannot be read as an image"),
    ):
        prompts = [{"image": str(tmp_path / name)}]
        section = {"name": "showcase", "task": "caption", "prompts": prompts}
        with pytest.raises(UserError, match=sentence):
            PROTOCOLS.build(section).items()


# ----------------------------------------------------------------------------------------- contract


def contract(name: str, place: Path) -> dict[str, Any]:
    """The settings of a small protocol of each registered name."""
    # Its data need files, which a function writes.
    if name == "emoji":
        return emoji({"task": "text_to_image", "count": 3})
    return {
        "scene_task": {"task": "edit", "count": 12, "side": 48, "world": SMALL},
        "scene_compositions": {"world": SMALL, "count": 2},
        "scene_entities": {"count": 12, "known": 40},
        "captioned_images": {
            "data": {"name": "scenes", "count": 120, "side": 48},
            "count": 112,
            "size": 48,
        },
        "answers": {
            "data": {"name": "vqa", **INSTRUCTIONS["vqa"](place)},
            "measure": "vqa",
            "missing": 0.5,
        },
        "ranked_answers": ranking(place),
        "pages": {
            "data": {"name": "jsonl", **page_corpus(place, 3)},
            "asks": "image",
            "split": "all",
        },
        "showcase": {
            "task": "text_to_image",
            "prompts": [{"text": "a red circle"}, {"text": "a blue cross"}],
        },
        "corpus": {"task": "text_to_image", "at_least": 5},
    }[name]


def three_documents() -> OwnCorpus:
    """The corpus of a run that kept three documents from training."""
    image_HWC = np.zeros((48, 48, 3), np.uint8)
    documents = [Document(id_, (TextSegment(id_), ImageSegment(image_HWC)), 1) for id_ in "abc"]
    return OwnCorpus(
        documents=lambda split: documents,
        training_images_BHWC=np.stack([image_HWC] * 3),
        training_labels_B=np.array([1, UNKNOWN, 1]),
        training_codes_MN=np.zeros((3, 4), np.int64),
        class_in=lambda text: None,
    )


@pytest.mark.parametrize("name", sorted(PROTOCOLS.names()))
def test_every_protocol_keeps_the_contract(name, tmp_path):
    section = {"name": name, **contract(name, tmp_path)}
    one, other = PROTOCOLS.build(section), PROTOCOLS.build(section)

    # A protocol on the corpus of a run is told which corpus that is.
    for asking in (one, other):
        if isinstance(asking, CorpusTask):
            asking.ask_about(three_documents())

    # Items and the fingerprint depend on the settings alone.
    items = one.items()
    assert [item.id for item in items] == [item.id for item in other.items()]
    assert len({item.id for item in items}) == len(items) > 0
    assert one.fingerprint() == other.fingerprint()

    # Any answer of the right kind is scored.
    side = section.get("side", 48)
    picture_HWC = np.full((side, side, 3), 200, np.uint8)
    answers = []
    for item in items:
        if one.answers_in == "text":
            answers.append(Answer(text="two", scores_K=np.arange(len(item.options))))
        else:
            codes_N = np.zeros(4, np.int64)
            answers.append(Answer(image_HWC=picture_HWC, clip=0.1, codes_N=codes_N))
    for figure in one.score(items, answers).values():
        assert figure.low - 1e-9 <= figure.value <= figure.high + 1e-9
        assert 0 < figure.n <= len(items)
    assert one.right(items[0], answers[0]) in (True, False, None)
    assert all(isinstance(asked(item), str) for item in items)
