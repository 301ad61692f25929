"""The server: OpenAI's own client works, mistakes are refused, rows are freed and shared fairly.

Whatever else the server is doing, a request with a seed gets the bytes that the model gives alone.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="needs cm3leon[serve]")
pytest.importorskip("openai", reason="needs OpenAI's client")

import httpx
import openai
import uvicorn

from cm3leon import CM3Leon
from cm3leon.run import main
from cm3leon.serve.app import Server
from cm3leon.serve.chat import GrowingText
from cm3leon.serve.gate import Gate, read_key
from cm3leon.serve.listening import listen, uvicorn_of
from cm3leon.serve.pictures import given_mask
from cm3leon.serve.service import Service, rows_of
from cm3leon.serve.setting import Limits
from cm3leon.types import UserError

DOCS = Path(__file__).parent.parent / "docs" / "serving.md"
LIMITS = Limits(body_bytes=2**20, pixels=250_000, samples=8, requests=32)
CODE_PIXELS = 8


class Served:
    """A server that runs in a thread, and clients that speak to it."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url
        self.model = server.service.model
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        self.http = httpx.Client(base_url=url, timeout=30)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json=body)

    @property
    def stats(self) -> Any:
        return self.server.service.engine.stats


@contextmanager
def serving(
    model: CM3Leon, *, key: str | None = None, limits: Limits = LIMITS, **fields: Any
) -> Iterator[Served]:
    """Run a server in a thread, on a free port, until the block ends."""
    with Service(model, precision="float32", **fields) as service:
        # The listener is made beforehand, so that its port, any free one, is known.
        server = Server(service, limits=limits, key=key)
        listener = socket.create_server(("127.0.0.1", 0))
        inner = uvicorn_of(server, grace=10)
        thread = threading.Thread(target=inner.run, kwargs={"sockets": [listener]})
        thread.start()
        served = Served(server, f"http://127.0.0.1:{listener.getsockname()[1]}")

        try:
            until(lambda: inner.started)
            yield served
        finally:
            served.http.close()
            inner.should_exit = True
            thread.join(20)
            listener.close()
            server.close(10)


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Convolve by one thread, as a server's request does: several threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def served(tuned_model: CM3Leon) -> Iterator[Served]:
    with serving(tuned_model, samples=3, waiting=32) as found:
        yield found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def picture(number: int = 0, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def image_part(number: int = 0) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture(number))}}


def pixels(b64: str | None) -> np.ndarray:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


# ------------------------------------------------------------------------------------------- images


def test_openais_client_draws_what_the_model_draws(served: Served) -> None:
    drawn = served.openai.images.generate(
        model=served.server.setting.name,
        prompt="a seven",
        n=3,
        size="32x32",  # type: ignore[call-overload]
        extra_body={"seed": 5, "retrieve": 1, "guidance": 2, "decoder": "top_p"},
    )

    # The weight of guidance is a field of the request, and one of the decoder.
    decoder = {"name": "top_p", "cfg": 2}
    expected = served.model.generate("a seven", n=3, seed=5, retrieve=1, decoder=decoder)

    assert [each.seed for each in drawn.data] == [each.seed for each in expected]
    for one, other in zip(drawn.data, expected, strict=True):
        assert np.array_equal(pixels(one.b64_json), np.asarray(other.image))
        assert one.score == pytest.approx(other.score)
        assert [each["id"] for each in one.documents] == [each.id for each in other.documents]
    assert drawn.size == "32x32"
    assert drawn.usage.output_tokens == 3 * 16
    assert drawn.usage.total_tokens == drawn.usage.input_tokens + 3 * 16


def test_an_image_is_shown_row_by_row(served: Served) -> None:
    asked: Any = {"prompt": "a seven", "extra_body": {"seed": 6}}
    (whole,) = served.openai.images.generate(**asked).data
    for wanted in (None, 1, 0):
        more = {} if wanted is None else {"partial_images": wanted}
        events = list(served.openai.images.generate(**asked, **more, stream=True))
        *partial, last = events
        assert last.type == "image_generation.completed"
        assert last.b64_json == whole.b64_json
        assert {each.type for each in partial} <= {"image_generation.partial_image"}

        # States that come faster than they can be drawn are left out: there may be fewer images
        # than the three rows of codes that come before the last one.
        least = 1 if wanted != 0 else 0
        most = 3 if wanted is None else wanted
        assert least <= len(partial) <= most
        assert [each.partial_image_index for each in partial] == list(range(len(partial)))

        # Pixels whose code is not there yet are grey, 128; the others make up whole rows of codes.
        rows = [
            int((pixels(each.b64_json) != 128).any(axis=(1, 2)).sum()) // CODE_PIXELS
            for each in partial
        ]
        assert rows == sorted(set(rows))
        assert all(1 <= count <= 3 for count in rows)


def masked(*boxes: tuple[int, int, int, int], size: int = 32) -> Image.Image:
    """An image that is transparent in the given boxes: left, top, right, bottom in pixels."""
    alpha = np.full((size, size), 255, np.uint8)
    for left, top, right, bottom in boxes:
        alpha[top:bottom, left:right] = 0
    image = picture(1, size)
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("stream", [False, True])
def test_a_mask_is_filled_in(served: Served, stream: bool) -> None:
    boxes = ((8, 8, 20, 12), (24, 24, 25, 25))
    asked: Any = {
        "image": ("image.png", png(picture(3))),
        "mask": ("mask.png", png(masked(*boxes))),
        "prompt": "a seven",
        "n": 2,
        "extra_body": {"seed": 4, "decoder": {"name": "top_p", "cfg": 1}},
    }
    mask_HW = np.zeros((32, 32), bool)
    for left, top, right, bottom in boxes:
        mask_HW[top:bottom, left:right] = True

    expected = served.model.infills(
        picture(3), "a seven", n=2, mask=mask_HW, seed=4, decoder={"name": "top_p", "cfg": 1}
    )

    if stream:
        events = list(served.openai.images.edit(**asked, stream=True))
        found = [each for each in events if each.type == "image_edit.completed"]
        assert {each.type for each in events} <= {
            "image_edit.completed",
            "image_edit.partial_image",
        }

        # The boxes touch codes 5, 6 and 15 of the image's 4 x 4. What lies around these is known
        # from the start, so that a partial image does not show it as grey.
        partial = [pixels(e.b64_json) for e in events if e.type == "image_edit.partial_image"]
        is_redrawn = np.isin(np.arange(16), [5, 6, 15]).reshape(4, 4)
        redrawn_HW = np.kron(is_redrawn, np.ones((8, 8), bool))
        for shown in partial:
            assert not (shown[~redrawn_HW] == 128).all(axis=-1).all()
    else:
        found = served.openai.images.edit(**asked).data

    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(pixels(one.b64_json), np.asarray(other.image))


def test_a_box_is_a_mask_and_an_instruction_is_an_edit(served: Served) -> None:
    files = {"image": ("image.png", png(picture(3)))}
    fields = {"prompt": "make it red", "seed": "4", "n": "2"}
    boxed = served.http.post(
        "/v1/images/edits", files=files, data={**fields, "box": "[0, 16, 32, 32]", "n": "1"}
    ).json()
    (expected,) = served.model.infills(picture(3), "make it red", box=(0, 16, 32, 32), seed=4)
    assert np.array_equal(pixels(boxed["data"][0]["b64_json"]), np.asarray(expected.image))

    edited = served.http.post("/v1/images/edits", files=files, data=fields).json()
    expected_images = served.model.edit(picture(3), "make it red", n=2, seed=4)
    for one, other in zip(edited["data"], expected_images, strict=True):
        assert np.array_equal(pixels(one["b64_json"]), np.asarray(other.image))


def test_formats_of_files(served: Served) -> None:
    for kind in ("jpeg", "webp", "png"):
        found = served.post("images/generations", prompt="a", seed=1, output_format=kind).json()
        assert found["output_format"] == kind
        content = base64.b64decode(found["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(content)).format == kind.upper()


# ------------------------------------------------------------------------------------ conversations


def conversation(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": list(parts)}]


def test_images_are_described_asked_about_and_gone_on_with(served: Served) -> None:
    text = {"type": "text", "text": "What is it?"}
    model, drawn = served.model, {"seed": 3, "max_tokens": 5}
    expected = {
        "caption": ([image_part()], model.caption(picture(), retrieve=1, **drawn)),
        "answer": ([image_part(), text], model.answer(picture(), "What is it?", **drawn)),
        "page": (
            [image_part(), text, image_part(1)],
            model.page_text([picture(), "What is it?", picture(1)], **drawn),
        ),
    }
    for name, (parts, answer) in expected.items():
        more = {"retrieve": 1} if name == "caption" else {}
        asked: Any = {"model": served.server.setting.name, "messages": conversation(*parts)}
        asked |= {"max_completion_tokens": 5, "seed": 3, "extra_body": more}

        found = served.openai.chat.completions.create(**asked)
        assert found.choices[0].message.content == answer.strip()
        assert found.choices[0].finish_reason in ("stop", "length")
        assert found.usage.completion_tokens >= 1

        # Streamed, the same text comes piece by piece.
        chunks = list(served.openai.chat.completions.create(**asked, stream=True))
        streamed = "".join(each.choices[0].delta.content or "" for each in chunks)
        assert streamed == answer.strip()
        assert chunks[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_a_growing_text_is_decoded_once_and_sent_once() -> None:
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return bytes(ids).decode(errors="replace")

    # Characters of one to four bytes, bytes that are no UTF-8, and a character that is cut off.
    content = "  Grüße,\n \N{CAT FACE} und 猫 ".encode() + b"\xff; weiter. " * 50 + b"\xe7\n"
    text = content.decode(errors="replace").strip()

    growing = GrowingText(decode)
    pieces = [growing.grown(content[:count]) for count in range(1, len(content) + 1)]

    assert all(piece in text for piece in pieces)
    assert "".join(pieces) + growing.rest(text) == text

    # A new piece is decoded with a few ids before it, not with the whole text.
    assert len(text) - len(growing.shown) <= 1
    assert decoded < 12 * len(content)

    # A text that ends otherwise than it began is not sent twice.
    growing = GrowingText(decode)
    assert growing.grown(b"a cat") == "a cat"
    assert growing.rest("a car in") == "r in"


def test_a_text_that_is_cut_says_so(served: Served) -> None:
    found = served.post("chat/completions", messages=conversation(image_part()), max_tokens=1)
    assert found.json()["choices"][0]["finish_reason"] == "length"
    assert "cut at 1 pieces" in found.json()["warnings"][0]


def test_temperature_and_top_p_are_those_of_texts(served: Served) -> None:
    top_p = {"name": "top_p", "temperature": 1.5, "top_p": 0.7, "cfg": 1}
    for fields, decoder in (
        ({"temperature": 0}, "greedy"),
        ({"temperature": 1.5, "top_p": 0.7}, top_p),
    ):
        asked = {"messages": conversation(image_part()), "seed": 8, "max_tokens": 6, **fields}
        found = served.post("chat/completions", **asked).json()
        expected = served.model.caption(
            picture(),
            decoder=decoder,  # type: ignore[arg-type]
            seed=8,
            max_tokens=6,
        )
        assert found["choices"][0]["message"]["content"] == expected.strip()


@pytest.mark.parametrize("stream", [False, True])
def test_texts_and_images_in_turn(served: Served, stream: bool) -> None:
    asked = {
        "messages": conversation({"type": "text", "text": "a seven"}),
        "modalities": ["text", "image"],
        "segments": 3,
        "max_tokens": 4,
        "seed": 2,
    }
    expected = served.model.interleave(["a seven"], first="image", segments=3, max_tokens=4, seed=2)

    if stream:
        # Each event brings fields of the message; the last value of a field is the finished one.
        message: dict[str, Any] = {}
        lines = served.post("chat/completions", **asked, stream=True).text.splitlines()
        assert lines[-2] == "data: [DONE]"
        for line in lines:
            if line.startswith("data: {"):
                message |= json.loads(line[6:])["choices"][0]["delta"]
    else:
        found = served.post("chat/completions", **asked)
        message = found.json()["choices"][0]["message"]

    assert len(message["parts"]) == len(expected)
    for part, other in zip(message["parts"], expected, strict=True):
        if isinstance(other, str):
            assert part["text"] == other
        else:
            url = part["image_url"]["url"]
            assert np.array_equal(pixels(url.partition(",")[2]), np.asarray(other))
            assert part in message["images"]


def test_documents_of_the_memory_bank_are_found(served: Served) -> None:
    by_text = served.post("retrieve", text="a seven", count=3).json()["data"]
    expected = served.model.search("a seven", count=3)
    assert [(each["id"], each["text"]) for each in by_text] == [
        (each.id, each.text) for each in expected
    ]
    assert [each["score"] for each in by_text] == pytest.approx([each.score for each in expected])
    assert expected[0].image is not None
    assert np.array_equal(pixels(by_text[0]["b64_json"]), np.asarray(expected[0].image))

    by_image = served.post("retrieve", image=data_url(picture()), count=2, images=False).json()
    assert [each["id"] for each in by_image["data"]] == [
        each.id for each in served.model.search(image=picture(), count=2)
    ]
    assert {each["b64_json"] for each in by_image["data"]} == {None}


def test_models_health_and_metrics(served: Served) -> None:
    name = served.server.setting.name
    (model,) = served.openai.models.list().data
    assert model.id == name
    assert served.openai.models.retrieve(name).image_size == "32x32"
    assert served.http.get("/health").json() == {"status": "ok"}

    served.post("images/generations", prompt="a", seed=1)
    lines = served.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    engine = served.server.service.engine.engine
    assert float(values["cm3leon_cache_bytes"]) == engine.cache_bytes > 0
    assert float(values["cm3leon_running_samples_limit"]) == 3
    ok = 'cm3leon_requests_total{endpoint="/v1/images/generations",status="200"}'
    assert float(values[ok]) >= 1
    assert float(values["cm3leon_tokens_total"]) >= 16


# ---------------------------------------------------------------------------------- what is refused


def bomb(width: int = 5000, height: int = 5000) -> bytes:
    """A small PNG file that decodes to many pixels, each of them 0."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes((width + 1) * height))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "no prompt": ("images/generations", {}, 400, "prompt is missing"),
    "empty": ("images/generations", {"prompt": " "}, 400, "prompt is empty"),
    "long": ("images/generations", {"prompt": "a" * 40_000}, 400, "at most 32000"),
    "too long for the model": ("images/generations", {"prompt": "a b " * 400}, 400, "do not fit"),
    "url": (
        "images/generations", {"prompt": "a", "response_format": "url"}, 400, "keeps no images"
    ),
    "size": ("images/generations", {"prompt": "a", "size": "1024x1024"}, 400, "must be 32x32"),
    "n": ("images/generations", {"prompt": "a", "n": 9}, 400, "n is 9; it must be at most 8"),
    "n of another type": ("images/generations", {"prompt": "a", "n": "two"}, 400, "n is"),
    "unknown": ("images/generations", {"prompt": "a", "promt": 1}, 400, "did you mean prompt"),
    "model": ("images/generations", {"prompt": "a", "model": "dall-e-3"}, 404, "this server has"),
    "decoder": ("images/generations", {"prompt": "a", "decoder": "topp"}, 400, "topp"),
    "beams": (
        "images/generations",
        {"prompt": "a", "decoder": {"name": "beam", "beams": 30}},
        400,
        "does not fit the engine",
    ),
    "no weight": (
        "images/generations",
        {"prompt": "a", "decoder": "greedy", "guidance": 2},
        400,
        "the decoder greedy has no weight of guidance",
    ),
    "documents": ("images/generations", {"prompt": "a", "retrieve": 99}, 400, "at most 16"),
    "messages": ("chat/completions", {"messages": [3]}, 400, "messages.0 must be"),
    "no image": (
        "chat/completions",
        {"messages": conversation({"type": "text", "text": "a"})},
        400,
        "no image",
    ),
    "fetching": (
        "chat/completions",
        {"messages": conversation(
            {"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}}
        )},
        400,
        "fetches nothing",
    ),
    "no base64": (
        "chat/completions",
        {"messages": conversation(
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}
        )},
        400,
        "it must be an image file in base64",
    ),
    "no file": ("retrieve", {"image": base64.b64encode(b"GIF89a").decode()}, 400, "cannot be used"),
    "bomb": ("retrieve", {"image": base64.b64encode(bomb()).decode()}, 400, "too large: 5000x5000"),
    "nothing": ("retrieve", {}, 400, "text and image are missing"),
    "tokens": (
        "chat/completions",
        {"messages": conversation(image_part()), "max_tokens": 9999},
        400,
        "at most",
    ),
    "a list": ("images/generations", [1], 400, "must be a JSON object"),
}  # fmt: skip


def refused(response: httpx.Response, status: int, words: str) -> None:
    """Check that a response is an error of one line in the form of OpenAI's API."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert "Traceback" not in response.text
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_sentences_in_openais_form(served: Served, name: str) -> None:
    path, body, status, words = REFUSED[name]
    refused(served.http.post(f"/v1/{path}", json=body), status, words)


def test_openais_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is empty"):
        served.openai.images.generate(prompt=" ")
    with pytest.raises(openai.NotFoundError, match="this server has"):
        served.openai.images.generate(prompt="a", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="do not fit"):
        list(served.openai.images.generate(prompt="a b " * 400, stream=True))


EDITS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no image": ({}, {}, "image is missing"),
    "opaque": ({"mask": png(picture())}, {}, "it has no transparency"),
    "other size": ({"mask": png(masked((0, 0, 9, 9), size=16))}, {}, "16 x 16 pixels"),
    "untouched": ({"mask": png(masked())}, {}, "nothing is to be made anew"),
    "both": ({"mask": png(masked((0, 0, 9, 9)))}, {"box": "[0,0,9,9]"}, "both given"),
    "outside": ({}, {"box": "[0,0,99,9]"}, "inside the image of 32 x 32"),
    "bomb": ({"image": bomb()}, {}, "too large"),
    "mask bomb": ({"mask": bomb()}, {}, "too large"),
    "another file": ({"video": b"a"}, {}, "video is not a known file"),
}


@pytest.mark.parametrize("name", EDITS)
def test_mistakes_of_edits(served: Served, name: str) -> None:
    files, fields, words = EDITS[name]
    if name == "no image":
        # The client sends a form with files only if there is one: this one has an unknown file.
        files, words = {"x": b""}, "not a known file"
    else:
        files = {"image": png(picture()), **files}
    data = {"prompt": "a", **fields}
    refused(served.http.post("/v1/images/edits", files=files, data=data), 400, words)


@pytest.mark.parametrize("unusable", ["image", "mask"])
def test_of_an_image_and_its_mask_the_one_that_cannot_be_used_is_named(unusable: str) -> None:
    files = {"image": png(picture()), "mask": png(masked((0, 0, 9, 9)))}
    files[unusable] = b"not an image"
    with pytest.raises(UserError, match=f"^{unusable} cannot be used: .*; give "):
        given_mask(files["image"], files["mask"], None, grid=4, max_pixels=10_000)


def test_an_untuned_model_takes_no_instructions(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("drawing.is_tuned", "chat.takes_questions"):
        monkeypatch.setattr(f"cm3leon.serve.{name}", lambda model: False)
    files = {"image": png(picture())}
    found = served.http.post("/v1/images/edits", files=files, data={"prompt": "make it red"})
    refused(found, 400, "give a mask")

    text = {"type": "text", "text": "What is it?"}
    found = served.post("chat/completions", messages=conversation(image_part(), text))
    refused(found, 400, "not fine-tuned on questions")


def test_what_is_no_request_is_refused(served: Served) -> None:
    post = served.http.post
    json_type = {"content-type": "application/json"}
    path = "/v1/images/generations"
    refused(post(path, content=b"{", headers=json_type), 400, "is not JSON")
    refused(post(path, content=b"[" * 200_000, headers=json_type), 400, "is not JSON")
    refused(post(path, content=b'{"seed": NaN}', headers=json_type), 400, "NaN is not a number")
    refused(post(path, content=b"\xff", headers=json_type), 400, "is not JSON")
    refused(post(path, content=b"{}", headers={"content-type": "text/plain"}), 415, "text/plain")
    refused(
        post(path, content=b"{}", headers={**json_type, "content-encoding": "gzip"}),
        415,
        "compressed",
    )

    refused(served.http.get("/v1/nowhere"), 404, "/v1/nowhere is not an endpoint")
    refused(served.http.get(path), 405, "does not take GET")
    refused(served.http.get("/v1/models/other"), 404, "this server has")


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
def test_a_body_is_bounded_also_without_its_length(served: Served, path: str) -> None:
    headers = {"content-type": "application/json"}
    if path.endswith("edits"):
        headers = {"content-type": "multipart/form-data; boundary=x"}
    # Of a thousand pieces, most are never sent: the server refuses the body before.
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(1000):
            sent += 1
            yield bytes(2**16)

    refused(served.http.post(path, content=bytes(2**20 + 1), headers=headers), 413, "too large")
    try:
        found = served.http.post(path, content=pieces(), headers=headers)
        refused(found, 413, "too large")
    except (httpx.WriteError, httpx.ReadError):
        pass  # the connection was closed while the client was still sending
    assert sent < 1000


def test_the_bytes_of_all_requests_are_bounded(
    tuned_model: CM3Leon, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The memory holds the body of one request of the largest size, and no second one.
    monkeypatch.setattr("cm3leon.serve.gate.BODIES", 1)
    with serving(tuned_model, samples=1) as served, held(served) as go:
        spaces = b" " * (2**20 - 100)
        body = spaces + b'{"prompt": "a", "seed": 1}'
        headers = {"content-type": "application/json"}

        def ask() -> httpx.Response:
            return served.http.post("/v1/images/generations", content=body, headers=headers)

        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask)
            until(lambda: served.server.service.engine.running == 1)
            refused(ask(), 429, "as many requests as it can")
            assert served.http.get("/health").status_code == 200
            go.set()
            assert first.result().status_code == 200

        assert ask().status_code == 200


def test_a_request_that_is_sent_too_slowly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cm3leon.serve.gate.BODY_SECONDS", 0.05)
    monkeypatch.setattr("cm3leon.serve.gate.DRAIN_SECONDS", 0.05)

    # The client sends nothing, longer than the server waits.
    async def never() -> Any:
        await asyncio.sleep(20)

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"host", b"localhost"), (b"content-length", b"5")]
    scope = {"type": "http", "path": "/", "headers": headers}
    asyncio.run(Gate(reads, key=None, body_bytes=9)(scope, never, send))
    assert said[0]["status"] == 408


def test_a_bug_is_a_sentence_and_its_traceback_stays_here(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(CM3Leon, "search", broken)
    found = served.post("retrieve", text="a")
    refused(found, 500, "the server failed")
    assert "secret" not in found.text
    until(lambda: "a secret of the house" in caplog.text)


# -------------------------------------------------------------------------------------- who may ask


def test_a_key_is_needed_where_there_is_one(
    tuned_model: CM3Leon, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "sk-of-the-house"
    with serving(tuned_model, key=key, samples=1) as served:
        for headers in ({}, {"authorization": "Bearer sk-of-others"}, {"authorization": key}):
            found = served.http.post("/v1/retrieve", json={"text": "a"}, headers=headers)
            refused(found, 401, "the API key is missing or wrong")
            assert found.headers["www-authenticate"] == "Bearer"

        refused(served.http.get("/metrics"), 401, "API key")
        assert served.http.get("/health").status_code == 200
        right = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
        assert right.models.list().data
        with pytest.raises(openai.AuthenticationError):
            served.openai.models.list()

        # Where a key is needed, a page of another site may ask: its visitor has to know the key.
        headers = {"authorization": f"Bearer {key}", "origin": "https://elsewhere.org", "host": "a"}
        assert served.http.get("/v1/models", headers=headers).status_code == 200
    assert key not in caplog.text
    assert key not in "".join(capfd.readouterr())


def test_without_a_key_no_page_of_elsewhere_may_ask(served: Served) -> None:
    for headers in (
        {"origin": "https://elsewhere.org"},
        {"host": "elsewhere.org"},
        {"host": "elsewhere.org", "origin": "http://elsewhere.org"},
    ):
        refused(served.http.get("/v1/models", headers=headers), 403, "without an API key")
    assert served.http.get("/v1/models", headers={"origin": served.url}).status_code == 200
    for headers in ({"host": "[::1"}, {"origin": "http://["}):
        refused(served.http.get("/v1/models", headers=headers), 400, "names no address")


def test_a_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CM3LEON_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("CM3LEON_API_KEY", "one")
    assert read_key(None) == "one"
    (tmp_path / "key").write_text("two\n")
    assert read_key(tmp_path / "key") == "two"
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_key(tmp_path / "key")
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none")


# ----------------------------------------------------------------------------------- many at a time


@contextmanager
def held(served: Served) -> Iterator[threading.Event]:
    """Make the engine wait before each step until the event is set or the block ends."""
    engine, go = served.server.service.engine.engine, threading.Event()
    step = engine.step

    def waiting() -> Any:
        assert go.wait(20)
        return step()

    engine.step = waiting  # type: ignore[method-assign]
    try:
        yield go
    finally:
        go.set()
        engine.step = step  # type: ignore[method-assign]


def test_a_seed_gives_the_same_bytes_beside_any_neighbours(served: Served) -> None:
    """Images, streamed and whole, captions and fillings: each alone, and eight at a time."""
    files = {"image": png(picture(3)), "mask": png(masked((3, 3, 20, 12)))}

    # A request of one of four kinds: images, a caption, a filling, and an image that is streamed.
    def ask(number: int) -> Any:
        kind = number % 4
        if kind == 0:
            body = {
                "prompt": f"a {number}",
                "seed": number,
                "n": 1 + number % 3,
                "retrieve": number % 2,
            }
            return served.post("images/generations", **body).json()["data"]

        if kind == 1:
            messages = conversation(image_part(number))
            found = served.post(
                "chat/completions", messages=messages, seed=number, max_tokens=9, temperature=1
            )
            return found.json()["choices"]

        if kind == 2:
            data = {"prompt": "a", "seed": str(number)}
            return served.http.post("/v1/images/edits", files=files, data=data).json()["data"]

        body = {"prompt": f"a {number}", "seed": number, "stream": True, "decoder": "cd_k"}
        lines = served.post("images/generations", **body).text.splitlines()
        last = [line for line in lines if "image_generation.completed" in line][-1]
        if "{" not in last:
            return None
        return json.loads(last.removeprefix("data: "))["b64_json"]

    alone = [ask(number) for number in range(16)]

    order = np.random.default_rng(0).permutation(16).tolist()
    with ThreadPoolExecutor(8) as pool:
        among = dict(zip(order, pool.map(ask, order), strict=True))
    assert all(among[number] == alone[number] for number in order)


def test_the_server_is_full_and_says_when_to_come_again(tuned_model: CM3Leon) -> None:
    with serving(tuned_model, samples=1, waiting=3) as served, held(served) as go:
        shared = served.server.service.engine
        # One sample runs and three wait: there is no room for a fourth.
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(served.post, "images/generations", prompt="a", seed=1)
            until(lambda: shared.running == 1)
            second = pool.submit(served.post, "images/generations", prompt="a", seed=1, n=3)
            until(lambda: shared.waiting == 3)

            found = served.post("images/generations", prompt="a", seed=1)
            refused(found, 429, "the server is full; try again in")
            assert 1 <= int(found.headers["retry-after"]) <= 600
            with pytest.raises(openai.RateLimitError):
                served.openai.images.generate(prompt="a", stream=True)

            go.set()
            assert first.result().status_code == second.result().status_code == 200

        refused(served.post("images/generations", prompt="a", n=4), 400, "must be at most 3")

    # Where one request is allowed at a time, one that needs no engine is refused as well.
    limits = Limits(requests=1)
    with (
        serving(tuned_model, samples=1, limits=limits) as served,
        held(served) as go,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(served.post, "images/generations", prompt="a", seed=1)
        until(lambda: served.server.service.engine.running == 1)
        refused(served.post("retrieve", text="a"), 429, "try again")

        # An edit is counted before its files are decoded: this one's would be refused with 400.
        edit: Any = {"files": {"image": bomb()}, "data": {"prompt": "a"}}
        refused(served.http.post("/v1/images/edits", **edit), 429, "try again")
        go.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_rows(
    tuned_model: CM3Leon, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tuned_model, samples=2, waiting=32) as served, held(served) as go:
        shared = served.server.service.engine
        body = json.dumps({"prompt": "a", "n": 5, "seed": 1, "stream": stream}).encode()
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\n"
            f"content-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
        )
        address = served.http.base_url.host, served.http.base_url.port

        # Five samples are asked for, two of which run; then the connection is closed.
        with socket.create_connection(address) as leaving:  # type: ignore[arg-type]
            leaving.sendall(head.encode() + body)
            until(lambda: shared.running + shared.waiting == 5)
        until(lambda: shared.running + shared.waiting == 0)

        go.set()
        until(lambda: shared.engine.free == 2 and served.server.desk.open == 0)
        assert served.stats.cancelled == 5

        gc.collect()  # an exception that nobody asked for is logged when its task is collected
        assert caplog.text == ""
        assert served.post("images/generations", prompt="a", seed=1).status_code == 200


def test_who_leaves_while_sending_is_no_failure(
    tuned_model: CM3Leon, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tuned_model, samples=1) as served:
        address = served.http.base_url.host, served.http.base_url.port
        head = b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"
        with socket.create_connection(address) as leaving:  # type: ignore[arg-type]
            leaving.sendall(head)
        until(lambda: 'status="499"' in served.http.get("/metrics").text)
    assert "Traceback" not in caplog.text


def test_what_was_accepted_is_finished_and_the_rest_refused(tuned_model: CM3Leon) -> None:
    with (
        serving(tuned_model, samples=1) as served,
        held(served) as go,
        ThreadPoolExecutor(1) as pool,
    ):
        accepted = pool.submit(served.post, "images/generations", prompt="a", seed=1, n=2)
        until(lambda: served.server.service.engine.running == 1)
        served.server.stopping = True
        refused(served.post("images/generations", prompt="a"), 503, "being stopped")
        assert served.http.get("/health").status_code == 503

        go.set()
        assert len(accepted.result().json()["data"]) == 2


def test_users_take_turns(tuned_model: CM3Leon) -> None:
    with (
        serving(tuned_model, key="sk", samples=1, waiting=32) as served,
        held(served) as go,
    ):
        served.http.headers["authorization"] = "Bearer sk"
        shared = served.server.service.engine
        finished: list[str] = []

        def ask(user: str, n: int) -> None:
            served.post("images/generations", prompt="a", n=n, user=user, seed=1).raise_for_status()
            finished.append(user)

        with ThreadPoolExecutor(2) as pool:
            many = pool.submit(ask, "many", 8)
            # The second user comes when seven samples of the first one wait already.
            until(lambda: shared.waiting == 7)
            few = pool.submit(ask, "few", 1)
            until(lambda: shared.waiting == 8)
            go.set()
            few.result()
            many.result()
        assert finished == ["few", "many"]


def test_without_a_key_a_new_name_is_no_new_turn(tuned_model: CM3Leon) -> None:
    with (
        serving(tuned_model, samples=1, waiting=32) as served,
        held(served) as go,
        ThreadPoolExecutor(3) as pool,
    ):
        shared = served.server.service.engine
        for user in ("one", "two", "three"):
            pool.submit(served.post, "images/generations", prompt="a", user=user, seed=1)
        until(lambda: shared.waiting == 2)
        assert list(shared._queues) == ["address 127.0.0.1"]
        go.set()


# -------------------------------------------------------------------------------------- the command


def test_the_room_is_counted_before_it_is_taken(
    tuned_model: CM3Leon, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows_of(tuned_model) == 3
    monkeypatch.setattr("cm3leon.serve.service.free_memory", lambda device: 10_000)
    with pytest.raises(UserError, match=r"8 samples of 3 rows .* serve fewer samples"):
        Service(tuned_model)


def test_mistakes_on_the_command_line(
    tuned_model: CM3Leon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CM3LEON_API_KEY", raising=False)
    run = f"run={tuned_model.run.folder}"
    assert main(["serve", run, "host=0.0.0.0"]) == 2
    assert (
        "no API key is set; set CM3LEON_API_KEY, give key_file=FILE, or take"
        in capsys.readouterr().err
    )

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", run, f"port={taken.getsockname()[1]}"]) == 2
    assert "the server cannot listen at host=127.0.0.1 port=" in capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "cm3leon.serve.listening")
    assert main(["serve", run]) == 2
    said = capsys.readouterr().err
    assert "`serve` needs the package uvicorn: pip install 'cm3leon[serve]'" in said


def test_a_signal_ends_it_when_what_runs_is_finished(tuned_model: CM3Leon) -> None:
    """The process prints what memory it takes, answers the request that runs, and exits with 0."""
    command = [
        sys.executable,
        "-m",
        "cm3leon.run",
        "serve",
        f"run={tuned_model.run.folder}",
        "port=0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert re.search(r"8 samples at a time, each with 3 rows .* MB are reserved", said)
            url = process.stdout.readline().split()[0]
            health, metrics = url.replace("/v1", "/health"), url.replace("/v1", "/metrics")

            # Of 16 samples, 8 run and 8 wait when the signal comes.
            asked = {"prompt": "a", "n": 16, "seed": 1}
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(
                    httpx.post, f"{url}/images/generations", json=asked, timeout=60
                )
                until(lambda: "cm3leon_running_samples 0.0" not in httpx.get(metrics).text)
                process.send_signal(signal.SIGTERM)
                assert len(running.result().json()["data"]) == 16

            assert process.wait(60) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(health)
        finally:
            process.kill()


def test_connections_and_samples_share_one_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the connections takes 7 seconds: of 10, 3 are left for the samples; of 5, none."""
    now, left = 100.0, list[float]()

    async def shutdown(*_: object) -> None:
        nonlocal now
        now += 7

    class Closed:
        app, stopping = None, False

        def described(self) -> str:
            return "nothing"

        def close(self, timeout: float) -> None:
            left.append(timeout)

    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("cm3leon.serve.listening.time", clock)
    monkeypatch.setattr(uvicorn.Server, "shutdown", shutdown)
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: asyncio.run(self.shutdown(sockets))
    )

    for grace in (10, 5):
        listen(Closed(), host="127.0.0.1", port=0, grace=grace)
    assert left == [3, 0]


# -------------------------------------------------------------------------------- the page about it


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples name."""
    picture().save(tmp_path / "seven.png")
    masked((8, 8, 20, 20)).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(examples("python"))))
def test_examples_in_python(served: Served, beside: Path, number: int) -> None:
    code = examples("python")[number].replace("http://127.0.0.1:8000", served.url)
    exec(compile(code, "example", "exec"), {})


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_examples_of_curl(served: Served, beside: Path) -> None:
    found = [block for block in examples("bash") if "curl" in block]
    assert len(found) >= 4

    for block in found:
        # Without --fail-with-body, curl would exit with 0 whatever the server answered.
        script = block.replace("http://127.0.0.1:8000", served.url)
        script = script.replace("curl ", "curl --fail-with-body -sS ")
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "KEY": "any"},
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert '"error"' not in run.stdout
