"""CM3Leon as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which finds it by entry point.

pip install "cm3leon[lmms]"
python -m lmms_eval --model cm3leon --model_args pretrained=runs/sft_7b --tasks vqav2_val

Questions about one image each are answered, or candidates for their answers scored, by a finished run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from cm3leon.api import CM3Leon
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
    """Arguments of `--model_args`: `pretrained`, the run folder; the others as `CM3Leon.load` takes them.

    `plugins` are separated by colons.

    Raises:
        UserError: for a folder that is no finished run, and for a question without an image or with several.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        precision: Any = "auto",
        plugins: str = "",
        trust: bool = False,
        verify: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        self._model = CM3Leon.load(
            pretrained,
            device=device,
            precision=precision,
            plugins=plugins.split(":") if plugins else (),
            trust=trust,
            verify=verify,
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        found = []
        for context, settings, doc_to_visual, doc_id, task, split in self._arguments(requests):
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

    # -------------------------------------------------------------------------------------------- parts

    def _arguments(self, requests: Sequence[Any]) -> Iterable[Any]:
        return (request.args for request in tqdm(requests, desc="cm3leon", disable=self.rank != 0))

    def _image(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Image.Image:
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if len(images) != 1 or not isinstance(images[0], Image.Image):
            raise UserError(
                f"item {doc_id} of {task} has {len(images)} images or videos; one image is taken"
            )
        return images[0]


def _until(text: str, ends: str | Sequence[str]) -> str:
    """The text before the first of some strings."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
