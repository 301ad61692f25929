"""What models are asked about drawings, and how it is scored (docs/emoji.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from cm3leon.config import PositiveInt
from cm3leon.evaluation.images import FeatureStatistics, cell_features
from cm3leon.evaluation.metrics import Measured, proportion
from cm3leon.evaluation.protocols.base import Answer, Item, Protocol, ShownItem, clip_score
from cm3leon.evaluation.protocols.corpus import GREY
from cm3leon.registry import PROTOCOLS
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

from .catalogue import Emoji, catalogue, read_caption
from .drawings import drawings, made_with
from .edits import EditKind, edits
from .nearest import Drawings, all_drawings, by_caption, gender_met, meets, tone_met
from .source import DrawnInStyles, attributions_of, check_kinds, edit_document, styles_of
from .splits import Part, share, shown_once
from .styles import OPENMOJI, STYLES

CELLS = "Fréchet distance of cells"
TUNING = 0.25
"""Share of the items that settings are chosen by."""
LEAST = 110
"""Fewest images for which the covariance of the 108 colours of cells can have full rank."""


@PROTOCOLS.register("emoji")
class EmojiTask(Protocol):
    """Drawings that were held out, by task: whether the nearest of all drawings is the one that was
    asked for."""

    lowest_is_best = (CELLS,)
    explained: ClassVar[Mapping[str, str]] = {
        "right": (
            "Right: of all drawings that there are, the nearest by pixels is the one asked for, or "
            "differs from it only in what the prompt leaves open; a caption is one of the drawing's."
        ),
        "right_by_features": (
            "Right by features: the same by histograms of gradients and colours of cells "
            "(scikit-image)."
        ),
        "tone": (
            "Tone, gender, subject: what the nearest drawing by pixels, or the caption, has of them."
        ),
        "base_name": "Base name: the caption without its tone and its style.",
        "style": (
            "Style: whether the nearest drawing by pixels, or the caption, is of the style that is "
            "asked for."
        ),
    }

    @dataclass(kw_only=True)
    class Config(DrawnInStyles):
        """The task, and the drawings that it is about."""

        task: Literal["text_to_image", "caption", "infill_top", "infill_bottom", "edit"]
        """What is asked for."""
        part: Part = "compositions"
        """compositions = tone, gender and subject that were not seen together; objects = things
        that were not seen; train = what was seen. Edits always lead to a drawing that was not
        seen."""
        kinds: list[str] | None = None
        """Kinds of drawings, as in the source, or of edits: tone, gender, time; null = all."""
        fold: Literal["tuning", "test"] | None = None
        """Which of the items: tuning = a quarter of them, drawn by hash, to choose settings by;
        test = the others; null = all."""
        count: PositiveInt | None = None
        """Number of items, drawn by hash, evenly over the kinds of edits; null = all."""

        def check(self) -> None:
            super().check()
            if self.task == "edit":
                if tuple(self.styles) != OPENMOJI.names:
                    raise UserError(
                        f"styles is {self.styles}; edits are of OpenMoji's drawings only, so for "
                        "task=edit it must be [openmoji]"
                    )
                for kind in self.kinds or ():
                    if kind not in ("tone", "gender", "time"):
                        raise UserError(
                            f"kinds holds {kind}; for task=edit each must be tone, gender or time"
                        )
            else:
                check_kinds(self.kinds or [])

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.styles = styles_of(config)
        self.answers_in = "text" if config.task == "caption" else "image"
        self.max_tokens = 32

    @classmethod
    def attributions(cls, config: Any) -> Sequence[str]:
        return attributions_of(config)

    def items(self) -> list[Item]:
        return self._edits() if self.config.task == "edit" else self._drawings()

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        if self.answers_in == "text":
            return self._captions(items, answers)
        numbers = [item.truth for item in items]
        images_BHWC = np.stack([np.asarray(answer.image_HWC) for answer in answers])
        known = self._known()
        by_pixels = known.nearest_by_pixels(images_BHWC)
        by_features = known.nearest_by_features(images_BHWC)

        # The drawings that are nearest to the answers are compared with those asked for.
        right_B = self._right(known, numbers, by_pixels)
        figures = {
            "right": proportion(right_B),
            "right_by_features": proportion(self._right(known, numbers, by_features)),
            **self._aspects(known, numbers, by_pixels),
        }

        # Figures of each kind and each style, if there are several.
        styles = [STYLES[catalogue(self.styles)[number].style].name for number in numbers]
        for names in ([item.kind for item in items], styles):
            name_B = np.array(names)
            different = sorted(set(names))
            for name in different if len(different) > 1 else ():
                figures[name] = proportion(right_B[name_B == name])
        if len(items) >= LEAST:
            truths_BHWC = drawings(self.config.side, self.styles)[numbers]
            figures[CELLS] = _frechet(images_BHWC, truths_BHWC)
        return {**figures, **clip_score(answers)}

    def right(self, item: Item, answer: Answer) -> bool:
        if self.answers_in == "text":
            found = by_caption(self.styles).get(_read(answer.text))
            return found is not None and self._met(self._known(), item.truth, found)
        assert answer.image_HWC is not None
        known = self._known()
        nearest = known.nearest_by_pixels(np.asarray(answer.image_HWC)[None])
        return bool(self._right(known, [item.truth], nearest)[0])

    def shown(self, item: Item) -> ShownItem:
        """What a reader is shown of an item: the prompt, what is given, and what is asked for."""
        image_HWC, task = item.document.images[-1], self.config.task
        if task == "caption":
            return replace(super().shown(item), text=item.document.text)
        if task == "edit":
            return replace(super().shown(item), original_HWC=image_HWC)
        if task == "text_to_image":
            return ShownItem(item.document.text, None, image_HWC)

        # The half that is to be filled in is grey.
        given_HWC, middle = image_HWC.copy(), len(image_HWC) // 2
        if task == "infill_top":
            given_HWC[:middle] = GREY
        else:
            given_HWC[middle:] = GREY
        return ShownItem(item.document.text, given_HWC, image_HWC)

    def fingerprint(self) -> str:
        return made_with(self.styles)

    # ---------------------------------------------------------------------------------------- parts

    def _known(self) -> Drawings:
        """All drawings, with which answers are compared."""
        return all_drawings(self.config.side, self.styles)

    def _drawings(self) -> list[Item]:
        """Items that ask for a drawing or its caption.

        Raises:
            UserError: for kinds of which the part has no drawing. Edits of each kind always exist.
        """
        config = self.config
        numbers = {emoji.id: number for number, emoji in enumerate(catalogue(self.styles))}
        images_MHWC = drawings(config.side, self.styles)
        shown = shown_once(config.part, self.styles)
        chosen = [emoji for emoji in shown if not config.kinds or emoji.kind in config.kinds]
        if not chosen:
            raise UserError(
                f"protocol.kinds: the part {config.part} has no drawing of these kinds "
                f"({', '.join(config.kinds or ())}); choose others, or another protocol.part"
            )
        # An emoji is in the same fold in all styles.
        chosen = [emoji for emoji in chosen if self._in_fold(emoji.code)]
        if config.count is not None:
            chosen = sorted(chosen, key=lambda emoji: share(f"asked {emoji.id}"))[: config.count]
        items = []
        for emoji in chosen:
            number = numbers[emoji.id]
            segments = (TextSegment(emoji.caption), ImageSegment(images_MHWC[number]))
            document = Document(emoji.id, segments)
            items.append(Item(emoji.id, config.task, document, number, emoji.kind))
        return items

    def _edits(self) -> list[Item]:
        """Items that ask for an edit."""
        config = self.config
        kinds: tuple[EditKind, ...] = ("tone", "gender", "time")
        wanted = [kind for kind in kinds if not config.kinds or kind in config.kinds]
        items = []
        for kind in wanted:
            of_kind = []
            for edit in edits(held_out=True):
                if edit.kind == kind and self._in_fold(edit.id):
                    of_kind.append(edit)
            if config.count is not None:
                of_kind = of_kind[: -(-config.count // len(wanted))]
            for edit in of_kind:
                document = edit_document(edit, config.side)
                items.append(Item(edit.id, "instruction", document, edit.after, f"{kind}_edits"))
        return items

    def _in_fold(self, name: str) -> bool:
        """Whether the item of this name is one of the fold's."""
        if self.config.fold is None:
            return True
        is_tuning = share(f"fold {name}") < TUNING
        return is_tuning == (self.config.fold == "tuning")

    def _met(self, known: Drawings, asked: int, found: int) -> bool:
        """Whether a drawing is the one asked for, or one that the prompt may mean."""
        if known.same(asked, found):
            return True
        # What an edit should show is given by the drawing before it, and what a caption should say
        # by the drawing, so that neither leaves anything open.
        is_open = self.config.task not in ("edit", "caption")
        emoji = catalogue(self.styles)[asked]
        return is_open and any(meets(emoji, each) for each in known.named(found))

    def _right(self, known: Drawings, asked: Sequence[int], found: Sequence[int]) -> np.ndarray:
        """Whether the drawings found are those asked for, one by one."""
        return np.array([self._met(known, *pair) for pair in zip(asked, found, strict=True)])

    def _captions(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        """What captions say that is true of the drawings. Equal drawings may have each other's
        names."""
        known = self._known()
        right, base, tone, style = [], [], [], []
        for item, answer in zip(items, answers, strict=True):
            emoji, said = catalogue(self.styles)[item.truth], read_caption(answer.text)
            asked = read_caption(emoji.caption)
            right.append(self.right(item, answer))
            base.append(said.name in {each.name.lower() for each in known.named(item.truth)})
            # Tones count only where the drawing has one, and so does the style.
            if asked.tones:
                tone.append(said.tones == asked.tones)
            if asked.style:
                style.append(said.style == asked.style)

        figures = {
            "right": proportion(np.array(right)),
            "base_name": proportion(np.array(base)),
        }
        for name, hits in (("tone", tone), ("style", style)):
            if hits:
                figures[name] = proportion(np.array(hits))
        return figures

    def _aspects(
        self, known: Drawings, asked: Sequence[int], found: Sequence[int]
    ) -> dict[str, Measured]:
        """The share of nearest drawings that have what is asked for by name, of each aspect over
        the items that have it."""
        aspects: dict[str, tuple[Callable[[Emoji], Any], Callable[[Emoji, Emoji], bool]]] = {
            "tone": (lambda emoji: emoji.tones, tone_met),
            "gender": (lambda emoji: emoji.gender in ("woman", "man"), gender_met),
            "subject": (lambda emoji: True, lambda emoji, other: emoji.subject == other.subject),
            "style": (
                lambda emoji: emoji.style_is_said,
                lambda emoji, other: emoji.style == other.style,
            ),
        }
        figures = {}
        for name, (says, met) in aspects.items():
            hits = []
            for wanted, nearest in zip(asked, found, strict=True):
                emoji = catalogue(self.styles)[wanted]
                # The nearest drawing may be that of several emojis, of which one is enough.
                if says(emoji):
                    hits.append(any(met(emoji, twin) for twin in known.named(nearest)))
            if hits:
                figures[name] = proportion(np.array(hits))
        return figures


def _frechet(images_BHWC: np.ndarray, truths_BHWC: np.ndarray) -> Measured:
    """The Fréchet distance between the colours of cells of images and of true drawings. It is no
    FID, which takes Inception."""
    sides = FeatureStatistics(), FeatureStatistics()
    for statistics, pixels_BHWC in zip(sides, (images_BHWC, truths_BHWC), strict=True):
        statistics.add(cell_features(pixels_BHWC))
    value = sides[0].frechet(sides[1])
    return Measured(value, value, value, len(images_BHWC))


def _read(text: str) -> str:
    """A caption as captions are compared: in lower case, without surrounding spaces or tags."""
    return text.partition(" | ")[0].strip().lower()
