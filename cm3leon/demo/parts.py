"""Components and functions that the page's tabs share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from cm3leon.demo.asking import Result, sentence_of

Updates = tuple[Any, ...]
"""The new values of the components in a function's outputs, in their order."""


class Shown:
    """The components that show a result, and what makes it again.

    Args:
        folder: where the files are written that the page offers.
        name: what the components' ids begin with, for style and tests.
        pictures: whether results have images.
        text: label of the results' text; empty = they have none.
    """

    def __init__(self, folder: Path, name: str, *, pictures: bool = True, text: str = "") -> None:
        self._folder = folder
        self.status = gr.Markdown("", elem_classes="status", elem_id=f"{name}-status")
        self.gallery = gr.Gallery(
            label="Images",
            columns=3,
            format="png",
            object_fit="contain",
            height="auto",
            elem_classes="gallery",
            elem_id=f"{name}-images",
            visible=pictures,
            buttons=["download"],
            interactive=False,
        )
        self.text = gr.Textbox(
            label=text or "Text", interactive=False, visible=bool(text), elem_id=f"{name}-text"
        )

        # Closed at first: what makes the result again, with the files that it needs.
        with gr.Accordion("Make it again", open=False, elem_id=f"{name}-again"):
            self.command, self.python = (
                gr.Textbox(
                    label=label,
                    interactive=False,
                    lines=2,
                    buttons=["copy"],
                    elem_id=f"{name}-{label.lower()}",
                    elem_classes="code",
                )
                for label in ("Command", "Python")
            )
            self.files = gr.Files(
                label="Files that they read",
                interactive=False,
                visible=False,
                elem_id=f"{name}-files",
            )

    @property
    def outputs(self) -> list[Any]:
        """The components, in the order of `updates`."""
        return [self.status, self.gallery, self.text, self.command, self.python, self.files]

    def updates(self, result: Result) -> Updates:
        """The new values of the components for a result, which may still grow."""
        pictures = list(result.pictures)
        if result.again is None:
            return ("Working ...", pictures, "", "", "", gr.update(value=None, visible=False))

        # Each result has a folder of its own, since all have files of the same names.
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        files = []
        for name, content in result.files.items():
            if isinstance(content, str):
                (folder / name).write_text(content, encoding="utf-8")
            else:
                content.save(folder / name)
            files.append(str(folder / name))

        status = " ".join(plain(sentence) for sentence in result.told)
        again = result.again
        reading = gr.update(value=files or None, visible=bool(files))
        return (status, pictures, result.text, again.shell(), again.python(), reading)

    def growing(self, ask: Callable[[], Iterator[Result]]) -> Iterator[Updates]:
        """The updates while a result grows; for a mistake, a sentence."""
        try:
            for result in ask():
                yield self.updates(result)
        except Exception as error:
            yield self.failed(error)

    def failed(self, error: Exception) -> Updates:
        """The updates for a mistake: its sentence, everything else as it was."""
        return (told(error), *(gr.skip() for _ in self.outputs[1:]))


def on(
    events: list[Any], function: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> None:
    """Have a function answer events; of each kind, a browser asks one question at a time."""
    gr.on(
        events,
        function,
        inputs,
        outputs,
        trigger_mode="once",
        show_progress="hidden",
        api_visibility="private",
    )


def given_image(name: str, label: str = "Image") -> Any:
    """A field for an image: a file, a camera's picture, or the clipboard."""
    return gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        elem_id=name,
        height=260,
        buttons=[],
    )


def seed_field() -> Any:
    return gr.Textbox(label="Seed (empty: any)", max_length=20)


def brushed_pixels(value: dict[str, Any] | None) -> np.ndarray | None:
    """Where one of an editor's layers is not transparent (H, W); None without layers."""
    layers = (value or {}).get("layers") or []
    if not layers:
        return None
    return np.any([layer[..., 3] > 0 for layer in layers], axis=0)


def session_of(request: gr.Request) -> str:
    return str(request.session_hash)


def told(error: Exception) -> str:
    """An error as the status shows it."""
    return f"⚠ {plain(sentence_of(error))}"


def plain(text: str) -> str:
    """A text with escapes, so that Markdown shows it as it is."""
    return "".join(f"\\{each}" if each in "\\`*_{}[]<>()#+!|~$&-" else each for each in text)
