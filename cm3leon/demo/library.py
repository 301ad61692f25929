"""The tab of the memory bank: browse it, search it by a text or an image, add own documents."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr

from cm3leon.demo import asking, entered
from cm3leon.demo.asking import Asker
from cm3leon.demo.parts import Updates, given_image, on, session_of, told

PER_PAGE = 24
"""Documents of a page of the memory bank."""


def library_tab(asker: Asker, blocks: gr.Blocks) -> None:
    """Make the tab. The first documents are shown as soon as the page is opened."""
    # The fields stand on the left, what was found on the right; on a phone, below.
    with gr.Row():
        with gr.Column(min_width=300):
            text = gr.Textbox(
                label="Search for", placeholder="a seven", max_length=entered.LONGEST_TEXT
            )
            image = given_image("library-image", "Image to search by")
            go = gr.Button("Search", variant="primary")
            page = gr.Number(1, label="Page of the memory bank", precision=0, minimum=1)
            turn = gr.Button("Browse")
            with gr.Accordion("Add own documents", open=False, elem_id="library-own"):
                gr.Markdown(
                    "They are retrieved for what this browser asks, until its page is closed or "
                    "loaded anew. The run and other browsers do not get them."
                )
                own_image = given_image("library-own-image")
                own_text = gr.Textbox(
                    label="Words of the document", max_length=entered.LONGEST_TEXT
                )
                add = gr.Button("Add")
        with gr.Column(min_width=300, scale=2):
            status = gr.Markdown("", elem_classes="status", elem_id="library-status")
            gallery = gr.Gallery(
                label="Documents",
                columns=3,
                format="png",
                height="auto",
                interactive=False,
                object_fit="contain",
                elem_classes="gallery",
                elem_id="library-images",
            )

    # Each function answers an event. It returns what becomes of the components in its outputs.
    def searching(words: str, file: str | None, request: gr.Request) -> Updates:
        try:
            found = asking.search(asker, session_of(request), words, file, PER_PAGE)
            return (
                f"{len(found)} documents, the closest first.",
                asking.found_pictures(found, asker.size),
            )
        except Exception as error:
            return (told(error), gr.skip())

    def browsing(number: float | None, request: gr.Request) -> Updates:
        try:
            return _page(asker, session_of(request), number or 1)
        except Exception as error:
            return (told(error), gr.skip())

    # A new document is the last of the bank, so that the last page is shown; the fields are
    # emptied.
    def adding(file: str | None, words: str, request: gr.Request) -> Updates:
        try:
            session = session_of(request)
            said = asking.add(asker, session, file, words)
            _, pictures = _page(asker, session, math.inf)
            return (said, pictures, None, "")
        except Exception as error:
            return (told(error), gr.skip(), gr.skip(), gr.skip())

    shown = [status, gallery]
    on([go.click, text.submit], searching, [text, image], shown)
    on([turn.click, page.submit, blocks.load], browsing, [page], shown)
    on(
        [add.click, own_text.submit],
        adding,
        [own_image, own_text],
        [*shown, own_image, own_text],
    )


def _page(asker: Asker, session: str, number: float) -> tuple[str, Any]:
    """A sentence about a page of the memory bank, and its documents; infinity = the last page."""
    pictures, said = asking.browse(asker, session, number, PER_PAGE)
    return said, pictures
