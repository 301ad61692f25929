"""Instruction data from published files to prompts.

Sources make documents by the paper's templates, with a role for each segment; training and
prompts go by these roles.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_corpora import INSTRUCTIONS, dense_annotations

from cm3leon.config import from_mapping
from cm3leon.data.instructions.grounded import centred, location
from cm3leon.data.instructions.templates import FEATURES, ROLES, TABLE_5, fill
from cm3leon.data.instructions.write import in_reading_order
from cm3leon.data.shards import shard_path, write_plan
from cm3leon.data.source import Skipped
from cm3leon.data.token_shards import Tokenizers, finish_tokens, write_token_shard
from cm3leon.data.token_shards import TokenShards as Shards
from cm3leon.objectives.cm3 import rotate
from cm3leon.objectives.instruct import Instruct
from cm3leon.plugins.scenes.instructions import TASKS as SCENE_TASKS
from cm3leon.plugins.scenes.instructions import SceneInstructionsSource
from cm3leon.plugins.scenes.parse import parse
from cm3leon.plugins.scenes.world import World, draw_scene
from cm3leon.registry import SOURCES, TASKS, discover
from cm3leon.tasks.instruction import answer_index_of
from cm3leon.tokenizers.document import lay_out, token_count
from cm3leon.tokenizers.layout import PAPER
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import (
    Document,
    ImageSegment,
    Sample,
    TextSegment,
    TokenDocument,
    TokenSegment,
    UserError,
)

discover()
VOCAB = Vocab(text_size=60, image_size=20, sentinels=8)
CODES = 4


def read(name: str, folder: Path, **fields: Any) -> tuple[list[Document], list[Skipped]]:
    """The documents of a small corpus that is written into a folder, and what was left out."""
    items = list(SOURCES.build({"name": name, **INSTRUCTIONS[name](folder), **fields}).documents())
    documents = [item for item in items if isinstance(item, Document)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    return documents, skipped


def shown_all(documents: list[Document]) -> list[str]:
    return [shown(document) for document in documents]


def empty(folder: Path) -> Path:
    """A new folder."""
    folder.mkdir()
    return folder


def shown(document: Document) -> str:
    """A document in one line: `Q: what? A:[ red] | <image>`.

    Segments are separated by ` | `, an answer stands in brackets, an instruction begins with `!`,
    and an image is its role.
    """
    pieces: list[str] = []
    for segment in document.segments:
        if isinstance(segment, ImageSegment):
            pieces.append(f"<{segment.role or 'image'}>")
            continue

        text = segment.text
        if segment.role == "answer":
            text = f"[{text}]"
        if segment.role == "instruction":
            text = f"!{text}"
        if segment.joined:
            pieces[-1] += text
        else:
            pieces.append(text)
    return " | ".join(pieces)


# ---------------------------------------------------------------------------------------- templates


def test_the_paper_has_these_templates() -> None:
    assert {task: len(templates) for task, templates in TABLE_5.items()} == {
        "edit": 1,
        "write": 1,
        "grounded": 1,
        "features": 1,
        "caption": 2,
        "paragraph": 3,
        "narrative": 3,
        "vqa": 3,
        "reasoning": 2,
    }
    assert set(FEATURES) == {"canny", "segmentation", "hed", "pose", "depth", "normals", "scribble"}


def test_an_answer_is_a_segment_with_the_space_before_it() -> None:
    values = {"question": "what {color}?", "answer": "red", "image": np.zeros(1)}
    filled = [fill(template, values, ROLES["vqa"]) for template in TABLE_5["vqa"]]
    expected = [
        [("Question: what {color}? Answer:", "", False), (" red", "answer", True), (".", "", True)],
        [("Question: what {color}?", "", False), ("\nred", "answer", True)],
        [
            ("Question: what {color}? The answer is", "", False),
            (" red", "answer", True),
            (".", "", True),
        ],
    ]
    for segments, texts in zip(filled, expected, strict=True):
        assert [(s.text, s.role, s.joined) for s in segments if isinstance(s, TextSegment)] == texts
        assert not isinstance(segments[-1], TextSegment)

    # A caption that begins its text has no space before it.
    captioned = {"caption": "a dog", "image": np.zeros(1)}
    (only, _) = fill("{caption} | {image}", captioned, ROLES["caption"])
    assert only == TextSegment("a dog", "answer", joined=False)


def test_joined_texts_are_one_run() -> None:
    values = {"question": "q", "answer": "a", "image": np.zeros(1)}
    segments = fill(TABLE_5["vqa"][0], values, ROLES["vqa"])
    texts = tuple(segment for segment in segments if isinstance(segment, TextSegment))
    assert Document("d", (*texts, TextSegment("more"))).text == "Question: q Answer: a. more"


# ---------------------------------------------------------------------------------- published files


def test_vqa2(tmp_path: Path) -> None:
    documents, skipped = read("vqa", tmp_path, templates=[TABLE_5["vqa"][0]])
    answers = ["pâté", "two", "two", "two", "two", "two"]
    assert shown_all(documents) == [
        f"Question: What is {number}? Answer:[ {answer}]. | <image>"
        for number, answer in enumerate(answers)
    ]

    assert len(skipped) == 4
    said = " ".join(item.reason for item in skipped)
    reasons = ("COCO_train2014_000000000099", "no answers", "no annotation")
    assert all(reason in said for reason in reasons)


def test_vizwiz(tmp_path: Path) -> None:
    documents, skipped = read("vizwiz", tmp_path, templates=[TABLE_5["vqa"][1]])
    answers = ["soup", "soup", "unanswerable", "soup", "soup"]
    assert shown_all(documents) == [
        f"Question: What is this {number}?[\n{answer}] | <image>"
        for number, answer in enumerate(answers)
    ]
    assert len(skipped) == 2


def test_flickr30k(tmp_path: Path) -> None:
    templates = ["{caption} | {image}"]
    documents, skipped = read("karpathy", tmp_path, templates=templates)
    expected = []
    for number in range(3):
        expected += [f"[A picture {number}, take {take}.] | <image>" for take in range(2)]
    assert shown_all(documents) == expected
    assert len(skipped) == 2

    held_out, _ = read("karpathy", empty(tmp_path / "test"), templates=templates, split="test")
    assert len(held_out) == 2


def test_paragraphs_and_narratives(tmp_path: Path) -> None:
    for name, folder in (("image_paragraph", "a"), ("localized_narratives", "b")):
        empty(tmp_path / folder)
        documents, skipped = read(name, tmp_path / folder)
        text = "The picture {}. It is small." if folder == "a" else "In this picture we can see {}."
        for number, document in enumerate(documents):
            assert shown(document).endswith(f"[ {text.format(number)}] | <image>")
        assert (len(documents), len(skipped)) == (5, {"a": 1, "b": 2}[folder])


def test_scienceqa(tmp_path: Path) -> None:
    documents, skipped = read("scienceqa", tmp_path, templates=[TABLE_5["reasoning"][1]])
    assert shown(documents[1]) == (
        "Question: Which is 1?\nContext: Look closely.\nOptions: (A) this (B) that (C) none\n"
        "Answer: Let's think step-by-step:[ Because. So the answer is (B).] | <image>"
    )
    assert "Context: N/A" in shown(documents[0])
    assert "A lecture. So the answer is (A)." in shown(documents[0])
    assert len(documents) == 4
    assert [item.reason for item in skipped] == ["the answer is 3, of 3 choices"]


def test_visdial(tmp_path: Path) -> None:
    documents, skipped = read("visdial", tmp_path, templates=[TABLE_5["vqa"][0]])
    assert shown_all(documents) == [
        "Question: a dog by a tree. is it big? Answer:[ yes]. | <image>",
        "Question: a dog by a tree. is it big? yes. what colour is it? Answer:[ red]. | <image>",
        "Question: a dog by a tree. is it big? yes. what colour is it? red. é? "
        "Answer:[ can't tell]. | <image>",
        "Question: a cat. é? Answer:[ no]. | <image>",
    ]
    assert skipped[0].reason == "answer 77 is not listed"
    assert len(skipped) == 3

    # Where dense annotations are given, the rounds that they rate alone.
    rated, _ = read("visdial", empty(tmp_path / "rated"), relevance=dense_annotations(tmp_path))
    assert [document.id for document in rated] == ["visdial-1-2", "visdial-2-1"]


def test_instruct_pix2pix(tmp_path: Path) -> None:
    documents, skipped = read("instruct_pix2pix", tmp_path)
    assert shown_all(documents) == [
        f"Edit first image following the instruction | <condition> | !make it {n} | <image>"
        for n in range(4)
    ]

    # An edit is drawn by several seeds, of which one is taken: here either of two.
    seeds = {document.id.rsplit("-", 1)[1] for document in documents}
    assert len(seeds) == 2
    assert not np.array_equal(*documents[0].images)
    assert len(skipped) == 2


def file_of(folder: Path, pattern: str) -> set[str]:
    """SHA-256 of the files below a folder whose names match."""
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob(pattern)}


def split_keys(documents: list[Document]) -> set[str]:
    return {document.split_key for document in documents}


def test_splits_go_by_the_picture_that_an_example_is_about(tmp_path: Path) -> None:
    questions, _ = read("vqa", empty(tmp_path / "vqa"))
    assert len(questions) > len(split_keys(questions)) > 1
    assert split_keys(questions) <= file_of(tmp_path / "vqa", "*.jpg")
    for one, other in itertools.product(questions, repeat=2):
        same_picture = np.array_equal(one.images[0], other.images[0])
        assert (one.split_key == other.split_key) == same_picture

    # Of an edit it is the image before it, of features the photograph that they are features of.
    edits, _ = read("instruct_pix2pix", empty(tmp_path / "edits"))
    assert split_keys(edits) <= file_of(tmp_path / "edits", "*_0.jpg")
    maps, _ = read("features", empty(tmp_path / "features"))
    assert maps
    assert split_keys(maps) <= file_of(tmp_path / "features" / "images", "*")


@pytest.mark.parametrize("name", sorted(set(INSTRUCTIONS) - {"scene_instructions"}))
def test_every_published_source_names_its_pictures(name: str, tmp_path: Path) -> None:
    documents, _ = read(name, tmp_path)
    assert documents
    assert split_keys(documents) <= file_of(tmp_path, "*.*g")


def test_all_tasks_about_a_scene_fall_on_its_side() -> None:
    keys = set()
    for task in SCENE_TASKS:
        config = from_mapping(SceneInstructionsSource.Config, {"task": task, "side": 32})
        found = SceneInstructionsSource(config).document(7)
        if isinstance(found, Document):
            keys.add(found.split_key)

    scenes = SOURCES.build({"name": "scenes", "count": 8, "side": 32})
    assert keys == {scenes.document(7).split_key}


def test_boxes_of_coco(tmp_path: Path) -> None:
    """Of 40 x 20 pixels the middle 20 x 20 are kept, where x is from 10 to 30."""
    documents, skipped = read("coco_boxes", tmp_path)
    start = "!Generate high quality image of"
    assert shown_all(documents) == [
        f"{start} dog with segmentations dog at (0, 64) -> (128, 192) | <image>",
        f"{start} dog with segmentations dog at (0, 64) -> (128, 192) | <image>",
        f"{start} dog and person with segmentations dog at (0, 64) -> (128, 192), "
        "person at (128, 0) -> (256, 256) | <image>",
        f"{start} A good dog. with segmentations dog at (0, 64) -> (128, 192) | <image>",
    ]
    assert len(skipped) == 2
    alone, _ = read("coco_boxes", empty(tmp_path / "one"), most=1)
    assert "dog" not in shown(alone[2])


def test_boxes_of_openimages(tmp_path: Path) -> None:
    documents, skipped = read("openimages_boxes", tmp_path)
    expected = (
        "!Generate high quality image of dog with segmentations dog at (64, 26) -> (192, 154) "
        "| <image>"
    )
    assert shown_all(documents) == [expected] * 4
    assert len(skipped) == 1


def test_written_words(tmp_path: Path) -> None:
    documents, skipped = read("ocr", tmp_path)
    assert shown_all(documents) == ['!draw "OPEN CAFÉ late" | <image>'] * 4
    assert [item.reason for item in skipped] == [
        "12 readable words, from 1 to 8 are used",
        "0 readable words, from 1 to 8 are used",
    ]

    # Two words on a line, though one is 3 pixels lower, and one on the next line.
    boxes = [([50, 0, 9, 9], "b"), ([0, 3, 9, 9], "a"), ([0, 30, 9, 9], "c")]
    assert in_reading_order(boxes) == ["a", "b", "c"]


@given(
    box=st.lists(st.floats(0, 1), min_size=4, max_size=4).map(
        lambda b: (*map(min, b[:2], b[2:]), *map(max, b[:2], b[2:]))
    ),
    width=st.integers(8, 400),
    height=st.integers(8, 400),
)
@settings(max_examples=100)
def test_boxes_follow_the_cut_to_the_middle(box: Any, width: int, height: int) -> None:
    """A box of whole pixels is moved and clipped as a mask of it is, cut as images are."""
    sizes = (width, height) * 2
    left, top, right, bottom = (round(edge * size) for edge, size in zip(box, sizes, strict=True))
    mask_HW = np.zeros((height, width), bool)
    mask_HW[top:bottom, left:right] = True

    side = min(width, height)
    x0, y0 = (width - side) / 2, (height - side) / 2
    found = centred((left / width, top / height, right / width, bottom / height), width, height)
    expected = (max(left - x0, 0), max(top - y0, 0), min(right - x0, side), min(bottom - y0, side))
    if not mask_HW.any() or expected[0] >= expected[2] or expected[1] >= expected[3]:
        assert found is None
    else:
        assert found == pytest.approx([edge / side for edge in expected], abs=1e-9)
        assert location(found).count(",") == 2


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("vqa", {"annotations": "questions"}, "no list under annotations"),
        ("vqa", {"path": "annotations"}, "no list under questions"),
        ("vqa", {"image_name": "{id}.jpg"}, "its only slot is"),
        ("vqa", {"templates": ["Q: {question} | {image}"]}, "one slot for the answer"),
        (
            "vqa",
            {"templates": ["{question} {reply} | {image}"]},
            "{reply}, which vqa does not fill",
        ),
        ("vqa", {"templates": []}, "templates is empty|at least one"),
        ("vizwiz", {"path": "object"}, "is not a JSON list"),
        ("karpathy", {"split": "val"}, "split is val, which .* does not have; it has: test, train"),
        ("scienceqa", {"path": "list"}, "is not a JSON object"),
        ("visdial", {"path": "list"}, "no list under dialogs"),
        ("visdial", {"path": "version"}, "is of version 0.9"),
        ("visdial", {"relevance": "object"}, "give VisDial's dense annotations"),
        ("visdial", {"relevance": "numbers"}, "give VisDial's dense annotations"),
        ("visdial", {"relevance": "others"}, "rates none of the rounds"),
        ("instruct_pix2pix", {"path": "object"}, "is not a JSON list"),
        ("openimages_boxes", {"path": "classes"}, "no column ImageID"),
        ("ocr", {"path": "object"}, "no imgs and anns"),
        ("scene_instructions", {"task": "sing"}, "task is sing; it must be one of: "),
    ],
)
def test_files_of_another_kind_are_refused_in_a_sentence(
    name: str, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = INSTRUCTIONS[name](tmp_path)

    # Files of the wrong kind; the first three are written with the corpus.
    files = {
        "questions": tmp_path / "questions.json",
        "annotations": tmp_path / "annotations.json",
        "classes": tmp_path / "classes.csv",
        "version": tmp_path / "version.json",
        "numbers": tmp_path / "numbers.json",
        "others": tmp_path / "others.json",
        "object": tmp_path / "object.json",
        "list": tmp_path / "list.json",
    }
    files["object"].write_text("{}")
    files["list"].write_text("[]")
    files["version"].write_text(
        '{"version": "0.9", "data": {"dialogs": [], "questions": [], "answers": []}}'
    )
    files["numbers"].write_text("[1, 2]")
    files["others"].write_text('[{"image_id": 5, "round_id": 1, "gt_relevance": [1.0]}]')

    # A value of `wrong` that names one of these files stands for its path.
    for key, value in wrong.items():
        fields[key] = str(files.get(value, value)) if isinstance(value, str) else value
    with pytest.raises(UserError, match=message):
        list(SOURCES.build({"name": name, **fields}).documents())


def test_a_question_that_is_no_object_is_left_out(tmp_path: Path) -> None:
    fields = INSTRUCTIONS["vqa"](tmp_path)
    content = json.loads(Path(fields["path"]).read_text())
    content["questions"].insert(0, "what?")
    Path(fields["path"]).write_text(json.dumps(content))
    items = list(SOURCES.build({"name": "vqa", **fields}).documents())
    assert isinstance(items[0], Skipped)
    assert sum(isinstance(item, Document) for item in items) == 6


def test_a_corpus_changes_with_all_its_files(tmp_path: Path) -> None:
    fields = INSTRUCTIONS["vqa"](tmp_path)
    before = SOURCES.build({"name": "vqa", **fields}).fingerprint()
    annotations = Path(fields["annotations"])
    annotations.write_text(annotations.read_text() + "\n")
    assert SOURCES.build({"name": "vqa", **fields}).fingerprint() != before


def test_annotations_of_another_split_are_refused(tmp_path: Path) -> None:
    fields = INSTRUCTIONS["vqa"](tmp_path)
    others = {"annotations": [{"question_id": 999, "answers": []}]}
    Path(fields["annotations"]).write_text(json.dumps(others))
    with pytest.raises(UserError, match="answers none of the questions"):
        SOURCES.build({"name": "vqa", **fields}).parts()


# ------------------------------------------------------------------------------------------- scenes


QUESTIONS = ("vqa", "relation", "relation_steps")


@pytest.mark.parametrize("task", SCENE_TASKS)
def test_every_task_is_about_scenes_too(task: str) -> None:
    config = from_mapping(SceneInstructionsSource.Config, {"task": task, "count": 60, "side": 48})
    source = SceneInstructionsSource(config)
    documents = [item for item in source.documents() if isinstance(item, Document)]
    assert len(documents) >= 10

    for document in documents:
        assert document.images[-1].shape == (48, 48, 3)
        roles = {segment.role for segment in document.segments}
        is_answered = task in ("caption", "paragraph", "reasoning", *QUESTIONS)
        assert ("answer" in roles) == is_answered
        assert ("instruction" in roles) == (not is_answered and task != "text_to_image")
        assert ("condition" in roles) == (task == "edit" or task in FEATURES)

    # The words differ from scene to scene.
    texts = Counter(shown(document).split("[")[0] for document in documents)
    assert len(texts) > 1 or task in ("text_to_image",)


def test_the_image_of_an_edit_is_the_scene_after_it() -> None:
    """Scenes that can be read back from their pixels: no words, figures, textures or overlaps."""
    world = World(words=0, figures=0, textures=["plain"], overlap=0, things=[1, 2])
    config = SceneInstructionsSource.Config(task="edit", world=world, count=40)
    source = SceneInstructionsSource(config)
    for seed in range(40):
        document = source.document(seed)
        assert isinstance(document, Document)
        before, after = (parse(image, world) for image in document.images)
        assert len(before.things) == len(draw_scene(world, seed).things)
        text = shown(document)
        difference = len(after.things) - len(before.things)
        assert difference == ("!add" in text) - ("!remove" in text)
        assert (before.background != after.background) == ("!change the background" in text)


# -------------------------------------------------------------------------------- roles in training


def instruction(kind: str) -> TokenDocument:
    """A question about an image, or an edit of one, as ids."""
    image = TokenSegment("image", np.arange(VOCAB.image_start, VOCAB.image_start + CODES))
    if kind == "question":
        question = TokenSegment("text", np.array([10, 11]))
        answer = TokenSegment("text", np.array([12, 13]), "answer", True)
        stop = TokenSegment("text", np.array([14]), "", True)
        return TokenDocument("question", (question, answer, stop, image))
    template = TokenSegment("text", np.array([20, 21]))
    before = TokenSegment("image", image.ids_T[::-1], "condition")
    wish = TokenSegment("text", np.array([22, 23, 24]), "instruction")
    return TokenDocument("edit", (template, before, wish, image))


def test_no_break_stands_before_what_is_joined() -> None:
    laid_out = lay_out(Sample(instruction("question")), VOCAB)
    text, codes = [10, 11, 12, 13, 14], range(VOCAB.image_start, VOCAB.image_start + CODES)
    assert laid_out.ids_T.tolist() == [VOCAB.eos, *text, VOCAB.brk, *codes, VOCAB.eos]
    assert token_count(instruction("question"), PAPER) == len(laid_out.ids_T) - 2
    assert [segment.role for segment in laid_out.segments] == ["", "answer", "", ""]


def test_shards_keep_roles(tmp_path: Path) -> None:
    text = TokenDocument("text", (TokenSegment("text", np.array([9])),))
    documents = [instruction("question"), instruction("edit"), text]
    made_by = Tokenizers("a", "b", 60, 20, 8)
    write_plan(tmp_path, {"tokenizers": vars(made_by), "parts": 1})
    write_token_shard(shard_path(tmp_path, 0, 1), documents, made_by)
    finish_tokens(tmp_path, 1)

    def fields(document: TokenDocument) -> list[Any]:
        return [(s.modality, s.role, s.joined, s.ids_T.tolist()) for s in document.segments]

    shards = Shards(tmp_path)
    for number, document in enumerate(documents):
        assert fields(shards.document(number)) == fields(document)

    # Lengths can be had of documents in any order.
    counts = [token_count(document, PAPER) for document in documents]
    rows = [2, 0, 1, 0]
    assert shards.token_counts(np.array(rows)).tolist() == [counts[row] for row in rows]
    assert shards.longest == max(counts)


def drawn(kind: str, count: int = 4000, **fields: Any) -> Counter[tuple[str, ...]]:
    """How often an objective masks which roles together."""
    objective = Instruct(from_mapping(Instruct.Config, fields), vocab=VOCAB)
    laid_out = lay_out(Sample(instruction(kind)), VOCAB)
    of_span = {(segment.start, segment.end): segment.role for segment in laid_out.segments}

    rng = np.random.default_rng(0)
    counts: Counter[tuple[str, ...]] = Counter()
    for _ in range(count):
        spans = objective.draw_spans(laid_out, rng, 100)
        counts[tuple(of_span[span] for span in spans)] += 1
    return counts


def test_answers_are_rotated_whole_as_often_as_asked() -> None:
    counts = drawn("question")
    assert set(counts) == {("answer",), ()}
    assert counts["answer",] / 4000 == pytest.approx(0.8, abs=0.02)
    assert set(drawn("question", rotate_answer=1.0)) == {("answer",)}


def test_what_an_image_is_drawn_by_is_masked_at_times() -> None:
    counts = drawn("edit")
    assert set(counts) == {("condition", "instruction"), ("instruction",), ()}
    assert counts["instruction",] / 4000 == pytest.approx(0.1, abs=0.02)
    assert counts["condition", "instruction"] / 4000 == pytest.approx(0.05, abs=0.015)


def test_answers_of_retrieved_documents_stay() -> None:
    objective = Instruct(from_mapping(Instruct.Config, {"rotate_answer": 1.0}), vocab=VOCAB)
    laid_out = lay_out(Sample(instruction("question"), (instruction("question"),)), VOCAB)
    own = next(s for s in laid_out.segments if s.is_query and s.role == "answer")
    assert objective.draw_spans(laid_out, np.random.default_rng(0), 200) == [(own.start, own.end)]


def test_samples_without_roles_are_those_of_cm3() -> None:
    segments = [TokenSegment(s.modality, s.ids_T) for s in instruction("edit").segments]
    laid_out = lay_out(Sample(TokenDocument("plain", tuple(segments))), VOCAB)
    objective = Instruct(from_mapping(Instruct.Config, {"mean_spans": 2.0}), vocab=VOCAB)
    rng = np.random.default_rng(0)
    assert len({tuple(objective.draw_spans(laid_out, rng, 100)) for _ in range(200)}) > 20


def test_a_rotated_sample_fits_or_stays_as_it_is() -> None:
    objective = Instruct(
        from_mapping(Instruct.Config, {"rotate_answer": 1.0, "answer_weight": 3.0}), vocab=VOCAB
    )
    laid_out = lay_out(Sample(instruction("question")), VOCAB)
    length = len(laid_out.ids_T)

    # A rotation adds three tokens: two sentinels and the end of the span.
    for room, expected in ((length + 3, length + 3), (length + 2, length)):
        corrupted = objective.corrupt(laid_out, np.random.default_rng(0), room)
        assert len(corrupted.ids_T) == expected

    # Tokens 12 and 13 are the answer.
    corrupted = objective.corrupt(laid_out, np.random.default_rng(0), 99)
    weights = dict(zip(corrupted.ids_T.tolist(), corrupted.weight_T.tolist(), strict=True))
    assert (weights[12], weights[13]) == (3.0, 3.0)
    assert (weights[10], weights[VOCAB.end_of_span]) == (1.0, 1.0)
    assert weights[VOCAB.sentinel(0)] == 0


@pytest.mark.parametrize("kind", ["question", "edit"])
def test_pieces_of_a_sample_are_the_whole_of_it(kind: str) -> None:
    """As stream packing takes them: every token once, and no piece is longer than its room."""
    objective = Instruct(
        from_mapping(Instruct.Config, {"rotate_answer": 1.0, "mask_all": 1.0}), vocab=VOCAB
    )
    laid_out = lay_out(Sample(instruction(kind)), VOCAB)
    for room in (5, 8, 13, 40):
        start, seen = 0, []
        while start < len(laid_out.ids_T):
            piece, start = objective.take(laid_out, start, room, np.random.default_rng(0))
            assert len(piece.ids_T) <= room
            seen += [token for token in piece.ids_T.tolist() if token < VOCAB.sentinel_start]

        # Without the sentinels and the ends of spans, which rotation adds.
        rest = Counter(seen) - Counter({VOCAB.end_of_span: 9})
        assert rest == Counter(laid_out.ids_T.tolist())


# ------------------------------------------------------------------------------------------ prompts


def test_prompts_are_beginnings_of_what_is_trained() -> None:
    """A prompt, its answer and what closes it are a sample of training, for each stream."""
    task = TASKS.build("instruction", vocab=VOCAB, grid=(2, 2))
    question, edit = instruction("question"), instruction("edit")

    # The answer is tokens 3 and 4 of the sample.
    prompt = task.prompt(question)
    laid_out = lay_out(Sample(question), VOCAB)
    rotated_T, _ = rotate(laid_out.ids_T, [(3, 5)], VOCAB)
    assert [*prompt.ids_T, 12, 13, VOCAB.end_of_span] == rotated_T.tolist()
    assert (prompt.modality, prompt.end) == ("text", VOCAB.end_of_span)

    # An image is drawn by up to three streams; in the others, what it is drawn by is masked.
    prompt = task.prompt(edit)
    laid_out = lay_out(Sample(edit), VOCAB)
    spans = {segment.role: (segment.start, segment.end) for segment in laid_out.segments}
    image = edit.segments[-1].ids_T.tolist()
    assert [*prompt.ids_T, *image, VOCAB.eos] == laid_out.ids_T.tolist()
    for ids_T, masked in (
        (prompt.unconditional_T, ("condition", "instruction")),
        (prompt.partial_T, ("instruction",)),
    ):
        rotated_T, _ = rotate(laid_out.ids_T, [spans[role] for role in masked], VOCAB)
        assert [*ids_T, *image, VOCAB.eos] == rotated_T[: len(ids_T) + CODES + 1].tolist()


@pytest.mark.parametrize("kind", ["question", "edit"])
def test_answers_stand_where_they_belong(kind: str) -> None:
    task = TASKS.build("instruction", vocab=VOCAB, grid=(2, 2))
    query = instruction(kind)
    completed = task.complete(query, np.array([50, 51]))
    assert completed.segments[answer_index_of(query)].ids_T.tolist() == [50, 51]
    assert task.keeps_given(query, completed)
    assert not task.keeps_given(query, instruction("edit" if kind == "question" else "question"))

    with pytest.raises(UserError, match="asks for nothing"):
        answer_index_of(TokenDocument("text", (TokenSegment("text", np.array([5])),)))


def as_texts(value: Any) -> Any:
    """JSON whose ids are texts instead of numbers."""
    if isinstance(value, list):
        return [as_texts(each) for each in value]
    if not isinstance(value, dict):
        return value

    changed = {}
    for key, each in value.items():
        is_id = key in ("image_id", "question_id", "category_id")
        changed[key] = str(each) if is_id else as_texts(each)
    return changed


@pytest.mark.parametrize(
    "name",
    sorted(
        set(INSTRUCTIONS)
        & {"vqa", "vizwiz", "visdial", "coco_boxes", "features", "image_paragraph", "written_words"}
    ),
)
def test_ids_match_as_numbers_and_as_texts(name: str, tmp_path: Path) -> None:
    documents, _ = read(name, tmp_path)
    for file in tmp_path.rglob("*.json"):
        file.write_text(json.dumps(as_texts(json.loads(file.read_text()))))

    # The settings of the same corpus elsewhere, pointed at the files that were changed.
    settings = INSTRUCTIONS[name](empty(tmp_path / "other"))
    for key, value in settings.items():
        if isinstance(value, str):
            settings[key] = value.replace(str(tmp_path / "other"), str(tmp_path))
    found = SOURCES.build({"name": name, **settings}).documents()
    again = [item for item in found if isinstance(item, Document)]
    assert documents
    assert shown_all(again) == shown_all(documents)
