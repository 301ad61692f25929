"""Small files of instruction data in their published forms, with odd entries among the good ones.

The sources have to skip or count the odd entries, which each docstring lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpora import encoded, picture


def images(folder: Path, names: list[str]) -> str:
    """Write an image for each name, and return their folder."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        format_ = "png" if name.endswith("png") else "jpeg"
        (folder / name).write_bytes(encoded(picture(number), format_))
    return str(folder)


def written(path: Path, content: Any) -> str:
    """Write the content as JSON, and return the file's path."""
    path.write_text(json.dumps(content))
    return str(path)


def vqa(root: Path) -> dict[str, Any]:
    """VQA2: six good questions.

    The odd ones: a question about a missing image, one without answers, one without an annotation,
    and an empty one.
    """
    questions = [
        {"image_id": 1 + n // 2, "question": f"What is {n}?", "question_id": 10 + n}
        for n in range(6)
    ]
    questions += [
        # The odd ones, in the order of the docstring.
        {"image_id": 99, "question": "Where?", "question_id": 16},
        {"image_id": 1, "question": "Why?", "question_id": 17},
        {"image_id": 1, "question": "Who?", "question_id": 18},
        {"image_id": 1, "question": "  ", "question_id": 19},
    ]

    # Ten people answer each question; one of them says nothing.
    given = ["café", "two", "two", "café", "two", "", "no", "no", "2", "two"]
    answers = []
    for number, answer in enumerate(given, start=1):
        answers.append({"answer": answer, "answer_confidence": "yes", "answer_id": number})
    annotations: list[dict[str, Any]] = [
        {"question_id": 10 + n, "image_id": 1 + n // 2, "answers": answers} for n in range(7)
    ]

    # Where the official tools have chosen an answer it stands beside the people's.
    annotations[0]["multiple_choice_answer"] = "pâté"

    annotations += [
        {"question_id": 17, "answers": [{"answer": ""}]},
        {"question_id": 19, "answers": [{"answer": "x"}]},
    ]

    return {
        "path": written(
            root / "questions.json",
            {"info": {}, "task_type": "Open-Ended", "questions": questions},
        ),
        "annotations": written(root / "annotations.json", {"info": {}, "annotations": annotations}),
        "images": images(root / "images", [f"COCO_train2014_{n:012d}.jpg" for n in (1, 2, 3)]),
    }


def vizwiz(root: Path) -> dict[str, Any]:
    """VizWiz: an unanswerable question, an entry without an image, and one without answers."""
    entries: list[Any] = []
    for n in range(5):
        answer = "unanswerable" if n == 2 else "soup"
        entries.append(
            {
                "image": f"VizWiz_train_{n:08d}.jpg",
                "question": f"What is this {n}?",
                "answers": [{"answer": answer, "answer_confidence": "yes"}] * 10,
                "answer_type": "other",
                "answerable": int(n != 2),
            }
        )

    # The odd ones: no file of this question's image is named, and this image has no answers.
    entries.append({"question": "Who?", "answers": [{"answer": "x"}]})
    entries.append({"image": "x.jpg", "question": "What?", "answers": []})

    return {
        "path": written(root / "train.json", entries),
        "images": images(root / "images", [f"VizWiz_train_{n:08d}.jpg" for n in range(5)]),
    }


def karpathy(root: Path) -> dict[str, Any]:
    """Flickr30k: three images of the split.

    The odd ones: an image of another split, an empty sentence, and an image without sentences.
    """
    listed: list[dict[str, Any]] = []
    for n in range(4):
        sentences = [
            {"raw": f" A picture {n}, take {k}. ", "tokens": [], "sentid": 5 * n + k}
            for k in range(2)
        ]
        split = "test" if n == 3 else "train"
        listed.append({"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": sentences})

    # The odd ones: an empty sentence in the second image, and an image of which nothing is said.
    listed[1]["sentences"].append({"raw": ""})
    listed.append({"filename": "5.jpg", "split": "train", "sentences": []})

    return {
        "path": written(
            root / "dataset_flickr30k.json", {"images": listed, "dataset": "flickr30k"}
        ),
        "images": images(root / "images", [f"{n}.jpg" for n in range(4)]),
    }


def image_paragraph(root: Path) -> dict[str, Any]:
    """Image Paragraph: five of the split, one outside of it, and one without its text."""
    entries = [
        {"image_id": 100 + n, "url": "u", "paragraph": f" The picture {n}. It is small. "}
        for n in range(6)
    ]
    entries.append({"image_id": 107, "url": "u", "paragraph": ""})
    return {
        "path": written(root / "paragraphs_v1.json", entries),
        "ids": written(root / "train_split.json", [100, 101, 102, 103, 104, 107]),
        "images": images(root / "images", [f"{100 + n}.jpg" for n in range(6)]),
    }


def localized_narratives(root: Path) -> dict[str, Any]:
    """Localized Narratives: five good lines, one that is not JSON, and one without an image."""
    lines = []
    for n in range(5):
        record = {
            "dataset_id": "mscoco_train2017",
            "image_id": str(n),
            "annotator_id": 7,
            "caption": f"In this picture we can see {n}.",
            "timed_caption": [],
            "traces": [],
        }
        lines.append(json.dumps(record))

    # The odd lines: one cut off, an empty one, and one that names no image.
    (root / "narratives.jsonl").write_text(
        "\n".join([*lines, "{", "", json.dumps({"caption": "what?"})])
    )
    return {
        "path": str(root / "narratives.jsonl"),
        "images": images(root / "images", [f"{n:012d}.jpg" for n in range(5)]),
        "image_name": "{image_id:0>12}.jpg",
    }


def scienceqa(root: Path) -> dict[str, Any]:
    """ScienceQA: four problems with images.

    The odd ones: a problem without an image, one of another split, and one whose answer is the
    number of no choice.
    """
    problems: dict[str, Any] = {}
    for n in range(4):
        problems[str(n)] = {
            "question": f"Which is {n}?",
            "choices": ["this", "that", "none"],
            "answer": n % 3,
            "hint": "" if n == 0 else "Look closely.",
            "image": "image.png",
            "split": "train",
            "lecture": "A lecture.",
            "solution": "Because." if n else "",
            "task": "closed choice",
        }

    # The odd ones, in the order of the docstring.
    problems["4"] = {**problems["1"], "image": None}
    problems["5"] = {**problems["1"], "split": "test"}
    problems["6"] = {**problems["1"], "answer": 3}

    return {
        "path": written(root / "problems.json", problems),
        "images": images(root / "images", [f"train/{n}/image.png" for n in range(4)]),
    }


def instruct_pix2pix(root: Path) -> dict[str, Any]:
    """InstructPix2Pix: four folders of pairs, one without prompt.json, and one without seeds."""
    for n in range(4):
        names = [f"000{n}/{seed}_{side}.jpg" for seed in ("17", "23") for side in (0, 1)]
        images(root, names)
        written(
            root / f"000{n}/prompt.json",
            {"input": "a cat", "edit": f"make it {n}", "output": "a dog"},
        )

    # The odd ones: folder 0004 has no prompt.json, and 0005 no seeds.
    (root / "0004").mkdir()
    folders = [[f"000{n}", ["17", "23"]] for n in range(4)]

    return {
        "path": written(root / "seeds.json", [*folders, ["0004", ["1"]], ["0005", []]]),
        "images": str(root),
    }


def coco_boxes(root: Path) -> dict[str, Any]:
    """COCO's instances: four images with a good box each.

    The odd ones: a crowd's box, a box of no listed category, an image without any box, and one
    whose box the square cut removes.
    """
    listed = [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 20} for n in range(6)]
    boxes: list[dict[str, Any]] = [
        {"id": n, "image_id": n, "category_id": 18, "bbox": [10, 5, 10, 10], "iscrowd": 0}
        for n in range(4)
    ]
    # The odd ones, in the order of the docstring; the image without any box is the fifth.
    boxes += [
        {"id": 10, "image_id": 0, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
        {"id": 11, "image_id": 1, "category_id": 99, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        {"id": 12, "image_id": 2, "category_id": 1, "bbox": [20, 0, 20, 20], "iscrowd": 0},
        {"id": 13, "image_id": 5, "category_id": 1, "bbox": [0, 0, 5, 20], "iscrowd": 0},
    ]

    categories = [{"id": 1, "name": "Person"}, {"id": 18, "name": "dog"}]
    captions = [
        {"id": 1, "image_id": 3, "caption": "A good dog. "},
        {"id": 2, "image_id": 3, "caption": "Another."},
    ]

    return {
        "path": written(
            root / "instances.json",
            {"images": listed, "annotations": boxes, "categories": categories},
        ),
        "captions": written(root / "captions.json", {"images": listed, "annotations": captions}),
        "images": images(root / "images", [f"{n}.jpg" for n in range(6)]),
    }


def openimages_boxes(root: Path) -> dict[str, Any]:
    """OpenImages: five good boxes, one of a group, one of an unknown class, and one that is no
    box."""
    header = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
        "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    rows = [f"img{n},xclick,/m/0bt9lr,1,0.25,0.75,0.1,0.6,0,0,0,0" for n in range(4)]

    # The odd ones: a group, an unknown class, a left side right of the right one, a missing image.
    rows += [
        "img0,xclick,/m/01g317,1,0.3,0.5,0.3,0.9,0,0,1,0",
        "img1,xclick,/m/none,1,0.3,0.5,0.3,0.9,0,0,0,0",
        "img2,xclick,/m/01g317,1,0.5,0.3,0.3,0.9,0,0,0,0",
        "missing,xclick,/m/01g317,1,0.3,0.5,0.3,0.9,0,0,0,0",
    ]
    (root / "boxes.csv").write_text("\n".join([header, *rows]))
    (root / "classes.csv").write_text("/m/0bt9lr,Dog\n/m/01g317,Person\n")

    return {
        "path": str(root / "boxes.csv"),
        "classes": str(root / "classes.csv"),
        "images": images(root / "images", [f"img{n}.jpg" for n in range(4)]),
    }


def ocr(root: Path) -> dict[str, Any]:
    """TextOCR: two lines of words, small and unreadable ones, an image of too many, one of none."""
    listed = {
        f"i{n}": {"id": f"i{n}", "width": 100, "height": 100, "file_name": f"train/i{n}.jpg"}
        for n in range(6)
    }
    words: dict[str, Any] = {}

    def word(image: str, text: str, box: list[float]) -> None:
        words[f"{image}_{len(words)}"] = {
            "image_id": image,
            "utf8_string": text,
            "bbox": box,
            "points": [],
            "area": 1,
        }

    for n in range(4):
        word(f"i{n}", "CAFÉ", [50, 10, 40, 20])
        word(f"i{n}", "OPEN", [5, 12, 40, 20])
        word(f"i{n}", "late", [5, 60, 40, 20])
        word(f"i{n}", ".", [5, 80, 40, 20])
        word(f"i{n}", "tiny", [5, 80, 4, 2])

    # More words than the source takes from one image.
    for n in range(12):
        word("i4", f"w{n}", [5, 8 * n, 20, 6])

    return {
        "path": written(
            root / "TextOCR_train.json", {"imgs": listed, "anns": words, "imgToAnns": {}}
        ),
        "images": images(root, [f"train/i{n}.jpg" for n in range(6)]),
    }


def features(root: Path) -> dict[str, Any]:
    """COCO's captions: four good images, one whose file is missing, and one without a caption."""
    listed = [{"id": n, "file_name": f"{n}.jpg"} for n in range(6)]
    annotations = [{"id": n, "image_id": n, "caption": f" A picture {n}."} for n in range(5)]
    return {
        "path": written(root / "captions.json", {"images": listed, "annotations": annotations}),
        "images": images(root / "images", [f"{n}.jpg" for n in range(4)]),
        "extractor": "canny",
    }


def visdial(root: Path) -> dict[str, Any]:
    """VisDial 1.0: three dialogues of two or three rounds.

    The odd ones: an answer that is not listed in the second, and a missing image in the third.
    """
    questions = ["is it big", "what colour is it?", "é?"]
    answers = ["yes", "no", "red", "it is blue", "can't tell"]

    def turn(question: int, answer: int) -> dict[str, Any]:
        return {
            "question": question,
            "answer": answer,
            "answer_options": [0, 1, 2, 3, 4],
            "gt_index": answer,
        }

    dialogs = [
        {
            "image_id": 1,
            "caption": "a dog by a tree",
            "dialog": [turn(0, 0), turn(1, 2), turn(2, 4)],
        },
        {"image_id": 2, "caption": "a cat.", "dialog": [turn(2, 1), turn(1, 77)]},
        {"image_id": 9, "caption": "nothing", "dialog": [turn(0, 0), turn(1, 2)]},
    ]

    # Dialogues name questions and answers by their numbers in these lists, as the original does.
    data = {"dialogs": dialogs, "questions": questions, "answers": answers}

    return {
        "path": written(
            root / "visdial.json", {"version": "1.0", "split": "val2018", "data": data}
        ),
        "images": images(root / "images", [f"VisualDialog_val2018_{n:012d}.jpg" for n in (1, 2)]),
    }


def dense_annotations(root: Path) -> str:
    """Relevances of the five candidates at one round of each of the first two dialogues."""
    rated = [
        {"image_id": 1, "round_id": 2, "gt_relevance": [0.0, 0.0, 1.0, 0.5, 0.0]},
        {"image_id": 2, "round_id": 1, "gt_relevance": [0.2, 0.8, 0.0, 0.0, 0.4]},
    ]
    return written(root / "dense.json", rated)


INSTRUCTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "vqa": vqa,
    "vizwiz": vizwiz,
    "visdial": visdial,
    "karpathy": karpathy,
    "image_paragraph": image_paragraph,
    "localized_narratives": localized_narratives,
    "scienceqa": scienceqa,
    "instruct_pix2pix": instruct_pix2pix,
    "coco_boxes": coco_boxes,
    "openimages_boxes": openimages_boxes,
    "ocr": ocr,
    "features": features,
    "scene_instructions": lambda root: {"task": "edit", "count": 30, "side": 32},
}
