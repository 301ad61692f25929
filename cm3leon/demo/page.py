"""The page: gradio's components around the functions of `asking.py`.

Each tab is a method of `_Blocks`. It makes the components, left to right, then the functions that
answer events, and at the end says which event calls which function with which components:

    on([go.click], editing, [image, instruction, n, seed], shown.outputs)
        events     function  components whose values it gets   components that it changes
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Gradio reads this when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image

from cm3leon.demo import asking, entered
from cm3leon.demo.asking import Asker
from cm3leon.demo.library import library_tab
from cm3leon.demo.parts import (
    Shown,
    Updates,
    brushed_pixels,
    given_image,
    on,
    plain,
    seed_field,
    session_of,
    told,
)
from cm3leon.serve.gate import Gate
from cm3leon.serve.service import is_tuned, takes_questions

USER = "cm3leon"
"""The user name of a page with a password."""
SHOWN_SIDE = 512
"""Height and width at which an image is shown for brushing, in pixels, about."""
KEPT_SECONDS = 3600
"""Seconds for which images of a session can be downloaded."""
CSS = """
.status { min-height: 1.5em; }
.status p { margin: 0; }
.gallery .thumbnail-lg { aspect-ratio: auto; height: auto; display: flex; flex-direction: column; }
.gallery .thumbnail-lg > img { height: auto; aspect-ratio: 1; }
.gallery .caption-label { position: static; white-space: normal; max-width: 100%; width: 100%; border: 0; }
.gallery .caption-label { font-size: 0.75rem; padding: 1px 4px; text-align: left; }
button[role=tab] { padding-left: 10px; padding-right: 10px; }
.code textarea { font-family: ui-monospace, monospace; font-size: 0.85rem; }
.gallery img { image-rendering: pixelated; }
.gallery .grid-wrap { min-height: 0 !important; max-height: none !important; padding-top: 2rem !important; }
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
"""


class Page:
    """The page as an application that `listen` serves.

    Args:
        key: password of the user cm3leon; None = none, and only browsers of this machine may ask.
        queue: questions that may wait.
        body_bytes: the most bytes of a file.
    """

    def __init__(self, asker: Asker, *, key: str | None, queue: int, body_bytes: int) -> None:
        self.asker, self.stopping = asker, False
        self._folder = tempfile.TemporaryDirectory(prefix="cm3leon-page-")
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name

        # Nothing of gradio's that talks to others: no API, no monitoring, no tools, no fonts.
        blocks = _Blocks(asker, Path(self._folder.name)).blocks
        blocks.queue(max_size=queue, default_concurrency_limit=queue, api_open=False)
        app = gr.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            blocks,
            path="/",
            footer_links=[],
            auth=None if key is None else (USER, key),
            max_file_size=body_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=CSS,
        )

        # A file is sent in a form, which is a little larger than the file.
        gate = Gate(app, key=None, body_bytes=body_bytes + 2**16)
        self.app = gate if key is None else app

    def described(self) -> str:
        """What is served, in a line."""
        return f"a page of {self.asker.model.run.folder.resolve().name}"

    def close(self, timeout: float) -> None:
        """Give up all questions at once, as nobody would see the answers."""
        self.stopping = True
        self.asker.close()
        self._folder.cleanup()


class _Blocks:
    """The tabs of the page.

    Args:
        folder: where files are written that the page offers.
    """

    def __init__(self, asker: Asker, folder: Path) -> None:
        self._asker, self._folder = asker, folder
        run = asker.model.run
        self._has_bank = run.has_retriever and run.has_bank
        with gr.Blocks(
            title=f"CM3Leon: {run.folder.resolve().name}",
            analytics_enabled=False,
            delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
        ) as self.blocks:
            gr.Markdown(f"# {plain(run.folder.resolve().name)}")

            # A phone shows all tabs, in two rows if need be.
            with gr.Tabs(overflow_behavior="wrap"):
                with gr.Tab("Draw", id="draw"):
                    self._draw()
                with gr.Tab("Look", id="look"):
                    self._look()
                with gr.Tab("Fill in", id="fill"):
                    self._fill_in()
                if is_tuned(asker.model):
                    with gr.Tab("Edit", id="edit"):
                        self._edit()
                if self._has_bank:
                    with gr.Tab("Library", id="library"):
                        library_tab(asker, self.blocks)
            self.blocks.unload(self._end)

    # ---------------------------------------------------------------------------------------- tabs

    def _draw(self) -> None:
        """Images for a prompt, with retrieved documents that can be left out one by one."""
        asker, most = self._asker, self._asker.limits
        with gr.Row():
            with gr.Column(min_width=300):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="a handwritten seven",
                    max_length=entered.LONGEST_TEXT,
                    autofocus=True,
                )
                with gr.Row():
                    go = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop")
                n = gr.Slider(1, most.samples, min(4, most.samples), step=1, label="Samples")
                count = gr.Slider(
                    0,
                    most.documents,
                    2 if self._has_bank else 0,
                    step=1,
                    label="Retrieved documents",
                    visible=self._has_bank,
                )
                decoder, guidance, seed = self._how_drawn()

                # What was retrieved, and which documents to use; both appear with the first ones.
                find = gr.Button("Find documents", visible=self._has_bank)
                used = gr.CheckboxGroup(
                    label="Documents that stand before the prompt",
                    visible=False,
                    elem_id="draw-used",
                )
                documents = gr.Gallery(
                    label="Documents, the closest last",
                    columns=3,
                    format="png",
                    visible=False,
                    height="auto",
                    elem_classes="gallery",
                    elem_id="draw-documents",
                    interactive=False,
                )
            with gr.Column(min_width=300):
                shown = Shown(self._folder, "draw")

        # The question that documents were retrieved for, and their rows; None before the first.
        found = gr.State(None)
        beside = [found, used, documents]

        def finding(text: str, wanted: int, request: gr.Request) -> Updates:
            try:
                return ("", *self._documents(text, wanted, request))
            except Exception as error:
                return (told(error), gr.skip(), gr.skip(), gr.skip())

        def drawing(
            text: str,
            samples: int,
            wanted: int,
            name: str | None,
            weight: float | None,
            number: str,
            before: Any,
            chosen: list[int],
            request: gr.Request,
        ) -> Iterator[Updates]:
            updates: Updates = (gr.skip(), gr.skip(), gr.skip())
            try:
                # Documents of another prompt are replaced, and then all of them are used.
                if before is None or before[0] != self._asked_for(text, wanted, request):
                    updates = self._documents(text, wanted, request)
                    before, chosen = updates[0], list(updates[0][1])

                decoding = entered.decoder_entered(asker.model, name, weight)
                growing = asking.draw(
                    asker,
                    session_of(request),
                    text,
                    n=int(samples),
                    decoder=decoding,
                    found=before[1],
                    used=chosen,
                    seed=entered.seed_of(number),
                )

                # The documents are updated once, with the first result.
                for result in growing:
                    yield (*shown.updates(result), *updates)
                    updates = (gr.skip(), gr.skip(), gr.skip())
            except Exception as error:
                yield (*shown.failed(error), *updates)

        inputs = [prompt, n, count, decoder, guidance, seed, found, used]
        on([go.click, prompt.submit], drawing, inputs, [*shown.outputs, *beside])
        on([find.click], finding, [prompt, count], [shown.status, *beside])
        stop.click(self._leave, api_visibility="private")

    def _documents(self, text: str, wanted: int, request: gr.Request) -> Updates:
        """Retrieve documents; returns the updates of `found`, of their switches and their
        images."""
        found = []
        if wanted:
            found = asking.documents_for(self._asker, session_of(request), text, int(wanted))
        rows = [each.row for each in found]
        choices = [(asking.document_line(each), each.row) for each in found]
        pictures = asking.found_pictures(found, self._asker.size)
        return (
            (self._asked_for(text, wanted, request), rows),
            gr.update(choices=choices, value=rows, visible=bool(found)),
            gr.update(value=pictures, visible=bool(found)),
        )

    def _asked_for(self, text: str, wanted: int, request: gr.Request) -> tuple[str, int, int]:
        """What retrieved documents depend on: the text, their number, and how many are own ones."""
        return text.strip(), int(wanted), self._asker.own.count(session_of(request))

    def _look(self) -> None:
        """A caption of an image, or the answer to a question about it."""
        asker = self._asker
        with gr.Row():
            with gr.Column(min_width=300):
                image = given_image("look-image")
                question = gr.Textbox(
                    label="Question (empty: a caption)",
                    max_length=entered.LONGEST_TEXT,
                    visible=takes_questions(asker.model),
                )
                go = gr.Button("Describe", variant="primary")
                count = gr.Slider(
                    0,
                    asker.limits.documents,
                    0,
                    step=1,
                    label="Retrieved documents of a caption",
                    visible=self._has_bank,
                )
                seed = seed_field()
            with gr.Column(min_width=300):
                shown = Shown(self._folder, "look", pictures=False, text="Answer")

        # Fields are read when the result is asked for, so that their mistakes are shown like
        # others.
        def looking(
            file: str | None, asked: str, wanted: int, number: str, request: gr.Request
        ) -> Iterator[Updates]:
            yield from shown.growing(
                lambda: asking.look(
                    asker,
                    session_of(request),
                    asker.pixels(file),
                    asked,
                    retrieve=int(wanted),
                    seed=entered.seed_of(number),
                )
            )

        on([go.click, question.submit], looking, [image, question, count, seed], shown.outputs)

    def _fill_in(self) -> None:
        """A part of an image filled in, by a brush or a box, or words of its caption."""
        # Small images are shown larger, by a whole factor, to be brushed over.
        asker = self._asker
        scale = max(1, SHOWN_SIDE // asker.size)
        with gr.Row():
            with gr.Column(min_width=300):
                image = given_image("fill-image")

                # The editor shows the square that the model sees; it appears with an image.
                brush = gr.Brush(default_size=32, colors=["#ff3b30"], color_mode="fixed")
                editor = gr.ImageEditor(
                    label="Brush over what is made anew",
                    sources=(),
                    transforms=(),
                    brush=brush,
                    layers=False,
                    type="numpy",
                    format="png",
                    visible=False,
                    canvas_size=(SHOWN_SIDE, SHOWN_SIDE),
                    elem_id="fill-editor",
                    buttons=[],
                )

                # A box can be entered by keyboard, in place of the brush.
                box = gr.Textbox(
                    label="Or a box: left, top, right, bottom",
                    info=f"pixels of the image as the model sees it, {asker.size} x {asker.size}",
                    placeholder=f"0, {asker.size // 2}, {asker.size}, {asker.size}",
                )
                caption = gr.Textbox(
                    label="Caption",
                    info="put [brackets] around words that are made anew",
                    placeholder="a handwritten seven",
                    max_length=entered.LONGEST_TEXT,
                )
                with gr.Row():
                    go = gr.Button("Fill in", variant="primary")
                    stop = gr.Button("Stop")
                decoder, guidance, seed = self._how_drawn()
            with gr.Column(min_width=300):
                shown = Shown(self._folder, "fill", text="Caption")

        def chosen(file: str | None) -> Updates:
            if not file:
                return ("", gr.update(value=None, visible=False))
            try:
                pixels_HWC = asker.pixels(file)
            except Exception as error:
                return (told(error), gr.update(value=None, visible=False))

            side = asker.size * scale
            large = Image.fromarray(pixels_HWC).resize((side, side), Image.Resampling.NEAREST)
            return ("", gr.update(value=np.asarray(large), visible=True))

        def filling(
            file: str | None,
            brushed: dict[str, Any] | None,
            corners: str,
            text: str,
            name: str | None,
            weight: float | None,
            number: str,
            request: gr.Request,
        ) -> Iterator[Updates]:
            yield from shown.growing(
                lambda: asking.fill_in(
                    asker,
                    session_of(request),
                    asker.pixels(file),
                    text,
                    brushed_HW=brushed_pixels(brushed),
                    box=entered.box_of(corners, asker.size),
                    decoder=entered.decoder_entered(asker.model, name, weight),
                    seed=entered.seed_of(number),
                )
            )

        inputs = [image, editor, box, caption, decoder, guidance, seed]
        image.change(chosen, image, [shown.status, editor], api_visibility="private")
        on([go.click], filling, inputs, shown.outputs)
        stop.click(self._leave, api_visibility="private")

    def _edit(self) -> None:
        """An image changed as an instruction says, for models that were tuned on instructions."""
        asker, most = self._asker, self._asker.limits
        with gr.Row():
            with gr.Column(min_width=300):
                image = given_image("edit-image")
                instruction = gr.Textbox(
                    label="Instruction", placeholder="make it bold", max_length=entered.LONGEST_TEXT
                )
                with gr.Row():
                    go = gr.Button("Edit", variant="primary")
                    stop = gr.Button("Stop")
                n = gr.Slider(1, most.samples, 1, step=1, label="Samples")
                seed = seed_field()
            with gr.Column(min_width=300):
                shown = Shown(self._folder, "edit")

        def editing(
            file: str | None, text: str, samples: int, number: str, request: gr.Request
        ) -> Iterator[Updates]:
            yield from shown.growing(
                lambda: asking.edit(
                    asker,
                    session_of(request),
                    asker.pixels(file),
                    text,
                    n=int(samples),
                    seed=entered.seed_of(number),
                )
            )

        on([go.click, instruction.submit], editing, [image, instruction, n, seed], shown.outputs)
        stop.click(self._leave, api_visibility="private")

    # --------------------------------------------------------------------------------------- parts

    def _how_drawn(self) -> tuple[Any, Any, Any]:
        """The fields decoder, guidance and seed."""
        with gr.Accordion("How it is drawn", open=False):
            usual = self._asker.model.run.experiment.decoder.name
            choices = [
                (f"as the run: {usual}", ""),
                *((each, each) for each in entered.decoder_choices()),
            ]
            decoder = gr.Dropdown(choices, value="", label="Decoder")
            guidance = gr.Number(
                None, label="Guidance by the text (empty: the decoder's own)", minimum=0
            )
            seed = seed_field()
        return decoder, guidance, seed

    def _leave(self, request: gr.Request) -> None:
        """The button Stop: give up the browser's questions."""
        self._asker.leave(session_of(request))

    def _end(self, request: gr.Request) -> None:
        """The browser has left: give up its questions and its documents."""
        self._asker.end(session_of(request))
