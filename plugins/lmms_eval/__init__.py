"""CM3Leon as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which finds it
by its entry point.

    pip install "cm3leon[lmms]"
    python -m lmms_eval --model cm3leon --model_args pretrained=runs/sft_7b --tasks vqav2_val

A finished run answers questions about one image each, or scores candidates for their answers.

With a folder for images, it draws images for texts and edits images as instructions say, which
lmms-eval's tasks of generation and editing score:

    python -m lmms_eval --model cm3leon --tasks gedit_bench \\
        --model_args pretrained=runs/sft_7b,images=drawn
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from cm3leon.types import UserError

try:
    from lmms_eval.api.model import lmms as Base
except ModuleNotFoundError:  # plugins are imported whether or not what they adapt to is installed
    Base: Any = object  # type: ignore[no-redef]  # where lmms-eval is not there


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("cm3leon", simple_class_path=f"{__name__}.CM3LeonModel")


class CM3LeonModel(Base):
    """A run under lmms-eval. `--model_args` takes `pretrained`, the run folder, and the arguments
    of `CM3Leon.load`.

    `plugins` are separated by colons. `images` is a folder: requests are then answered by images
    written into it, drawn for a text alone, or edited if the request has an image. Of each
    request's `samples`, whose seeds count up from `seed`, the best by CLIP is used. A drawing has
    `retrieve` documents before its text.

    Raises:
        UserError: for a folder that is not a finished run, and for a request with more or fewer
            images than are accepted.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        precision: Any = "auto",
        plugins: str = "",
        trust: bool = False,
        verify: bool = True,
        images: str = "",
        samples: int = 1,
        seed: int = 0,
        retrieve: int = 0,
        **_: Any,
    ) -> None:
        from cm3leon.api import CM3Leon  # every command imports this plugin, few need a model

        super().__init__()
        self._model = CM3Leon.load(
            pretrained,
            device=device,
            precision=precision,
            plugins=plugins.split(":") if plugins else (),
            trust=trust,
            verify=verify,
        )
        self._images = Path(images) if images else None
        self._drawing: dict[str, Any] = {"n": samples, "seed": seed}
        self._retrieve = retrieve

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        found = []
        for context, settings, doc_to_visual, doc_id, task, split in self._arguments(requests):
            # With a folder for images, every request is answered by an image.
            if self._images is not None:
                given = self._given(doc_to_visual, doc_id, task, split, (0, 1))
                found.append(self._drawn(context, given, self._images / _file_name(task, doc_id)))
                continue

            image = self._image(doc_to_visual, doc_id, task, split)
            max_tokens = int(settings.get("max_new_tokens", 64))
            found.append(
                _until(
                    self._model.answer(image, context, max_tokens=max_tokens),
                    settings.get("until") or (),
                )
            )
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found = []
        for context, target, doc_to_visual, doc_id, task, split in self._arguments(requests):
            text = (
                target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            )
            image = self._image(doc_to_visual, doc_id, task, split)
            (score,) = self._model.score(texts=[text.strip()], image=image, question=context)
            # Greedy decoding ends in this text exactly if it answers with it.
            found.append((score, self._model.answer(image, context) == text.strip()))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError(
            "tasks of several rounds are not supported: the paper's templates have one question"
        )

    # ---------------------------------------------------------------------------------------- parts

    def _arguments(self, requests: Sequence[Any]) -> Iterable[Any]:
        """The arguments of the requests, with a progress bar on the first rank."""
        return (request.args for request in tqdm(requests, desc="cm3leon", disable=self.rank != 0))

    def _image(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Image.Image:
        """The image of a request that has exactly one."""
        return self._given(doc_to_visual, doc_id, task, split, (1,))[0]

    def _given(
        self, doc_to_visual: Any, doc_id: Any, task: str, split: str, counts: tuple[int, ...]
    ) -> list[Image.Image]:
        """The images of a request. Raises UserError unless their number is one of `counts`."""
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if len(images) not in counts or not all(isinstance(each, Image.Image) for each in images):
            wanted = "one image is" if counts == (1,) else "no image or one is"
            raise UserError(
                f"item {doc_id} of {task} has {len(images)} images or videos; {wanted} taken"
            )
        return images

    def _drawn(self, text: str, given: list[Image.Image], file: Path) -> str:
        """Draw or edit an image, and answer in the form that lmms-eval's tasks read: JSON with the
        paths of images."""
        if given:
            best = self._model.edit(given[0], text.strip(), **self._drawing)[0]
        else:
            best = self._model.generate(text.strip(), retrieve=self._retrieve, **self._drawing)[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        best.image.save(file)
        return json.dumps({"text": "", "images": [str(file)]})


def _file_name(task: str, doc_id: Any) -> str:
    """The name of an item's image, which cannot lead to another folder."""
    return re.sub(r"[^\w.-]", "_", f"{task}_{doc_id}") + ".png"


def _until(text: str, ends: str | Sequence[str]) -> str:
    """The text before the first of some strings, whichever comes first."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
