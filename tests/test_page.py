"""The page: what is entered, how its commands make a result again, and its tabs in a browser."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs cm3leon[demo]")

import torch

from cm3leon import CM3Leon
from cm3leon.commands import load_command
from cm3leon.commands.words import read_options
from cm3leon.demo import asking
from cm3leon.demo.again import Recipe
from cm3leon.demo.asking import Asker, AskLimits, Result
from cm3leon.demo.entered import box_of, seed_of, words_of
from cm3leon.demo.page import Page
from cm3leon.run import main
from cm3leon.serve.listening import uvicorn_of
from cm3leon.serve.service import Service
from cm3leon.types import UserError

CHROMIUM = shutil.which("chromium")
SIZE = 32


@pytest.fixture(scope="module")
def asker(tuned_model: CM3Leon) -> Iterator[Asker]:
    before = torch.get_num_threads()
    # The page's own threads compute on one core each; on several, convolutions round otherwise.
    torch.set_num_threads(1)
    with Service(tuned_model, samples=2, precision="float32") as service:
        limits = AskLimits(pixels=250_000, samples=4, documents=2)
        found = Asker(service, tuned_model.run.folder, {"precision": "float32"}, limits, requests=4)
        yield found
        found.close()
    torch.set_num_threads(before)


@pytest.fixture
def loaded(asker: Asker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CM3Leon:
    """The model of the page; whatever loads its run gets this model.

    Its weights are not those of the run's folder, so a run that is really loaded shows.
    """

    def load(run: Any, **options: Any) -> CM3Leon:
        assert Path(run) == asker.model.run.folder
        assert options.get("precision") == "float32"
        return asker.model

    monkeypatch.setattr(CM3Leon, "load", load)
    monkeypatch.chdir(tmp_path)
    return asker.model


def noise(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def last(results: Iterator[Result]) -> Result:
    return list(results)[-1]


def picture_file(pixels_HWC: np.ndarray) -> str:
    """Write an image into the current folder, which is the test's own, and return its name."""
    Image.fromarray(pixels_HWC).save("given.png")
    return "given.png"


def made_by_python(result: Result) -> Any:
    assert result.again is not None
    # The page offers the files that its lines of Python read.
    for name, content in result.files.items():
        if isinstance(content, str):
            Path(name).write_text(content)
        else:
            content.save(name)

    names: dict[str, Any] = {}
    exec(result.again.python(), names)
    return names["result"]


def run_command(result: Result) -> None:
    assert result.again is not None
    assert main(shlex.split(result.again.shell())[3:]) == 0


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_what_is_entered_is_read_or_refused_with_a_sentence() -> None:
    assert words_of("a red [big] dog") == ("a red big dog", (6, 9))
    assert words_of("a dog") == ("a dog", None)
    assert box_of("0, 16 32,32", SIZE) == (0, 16, 32, 32)
    assert box_of(" ", SIZE) is None
    assert seed_of("7") == 7

    # What cannot be read is refused by the name of its field.
    for text in ("a [b", "[]", "[a] [b]", "]a["):
        with pytest.raises(UserError, match="brackets"):
            words_of(text)
    for text in ("1,2,3", "0,0,33,32", "5,5,5,9", "a,b,c,d"):
        with pytest.raises(UserError, match="left, top, right, bottom"):
            box_of(text, SIZE)

    with pytest.raises(UserError, match="seed"):
        seed_of("-1")


@pytest.mark.parametrize("text", ["5", "[a]", "'x'", '"', "a: b # c", "it's {k}", "é = 1"])
def test_a_command_reads_the_text_that_was_entered(text: str) -> None:
    again = Recipe(Path("a run"), {}, "generate", "generate", {"prompt": text}, {"n": 2, "seed": 0})
    words = shlex.split(again.shell())
    assert words[:4] == ["python", "-m", "cm3leon.run", "generate"]
    options = read_options(load_command("generate"), words[4:])
    assert (options.prompt, options.n, options.run) == (text, 2, Path("a run"))


def test_drawings_are_made_again_with_the_documents_that_were_left_on(
    asker: Asker, loaded: CM3Leon
) -> None:
    found = [each.row for each in asking.documents_for(asker, "me", "a seven", 2)]
    assert len(found) == 2

    # With both documents the command retrieves them anew; with one of them it names the row.
    for used, words in ((found, "retrieve=2"), (found[:1], f"'documents=[{found[0]}]'")):
        decoder = {"name": "top_p", "cfg": 2.0}
        drawing = asking.draw(
            asker, "me", "a seven", n=2, decoder=decoder, found=found, used=used, seed=3
        )
        states = list(drawing)
        assert states[-1].again is not None
        assert words in states[-1].again.shell()
        assert all(state.again is None for state in states[:-1])

        # Python and the command both draw the pictures that the page shows.
        pictures = [image for image, _ in states[-1].pictures]
        assert all(map(same, pictures, [each.image for each in made_by_python(states[-1])]))
        run_command(states[-1])
        written = [Image.open(each) for each in sorted(Path("generated").glob("*.png"))]
        assert len(written) == len(pictures) == 2
        assert all(map(same, pictures, written))
        shutil.rmtree("generated")


def test_a_brush_a_box_and_words_are_filled_in_again(asker: Asker, loaded: CM3Leon) -> None:
    brushed = np.zeros((512, 512), bool)
    brushed[300:310, 10:400] = True

    # Twice there is an image to fill in: by a brush, and by a box and a word in brackets.
    for given in (
        {"brushed_HW": brushed, "box": None, "caption": "a seven"},
        {"brushed_HW": None, "box": (0, 16, 32, 32), "caption": "a [big] seven"},
    ):
        filling = asking.fill_in(
            asker,
            "me",
            noise(),
            decoder=None,
            seed=4,
            **given,  # type: ignore[arg-type]
        )
        result = last(filling)

        # Python, and then the command, fill in the same.
        filled = made_by_python(result)
        assert same(filled.image, result.pictures[0][0])
        assert filled.text == result.text

        run_command(result)
        (file,) = Path("infilled").glob("*.png")
        assert same(Image.open(file), result.pictures[0][0])
        shutil.rmtree("infilled")


def test_texts_and_edits_are_made_again(
    asker: Asker, loaded: CM3Leon, capsys: pytest.CaptureFixture[str]
) -> None:
    for question in ("", "what is it?"):
        result = last(asking.look(asker, "me", noise(), question, retrieve=0, seed=5))
        assert result.text == made_by_python(result)
        capsys.readouterr()
        run_command(result)
        assert f'"{"answer" if question else "caption"}": ' in capsys.readouterr().out

    edited = last(asking.edit(asker, "me", noise(), "make it bold", n=2, seed=6))
    again = [each.image for each in made_by_python(edited)]
    assert all(map(same, [image for image, _ in edited.pictures], again))


def test_who_leaves_is_not_drawn_for(asker: Asker) -> None:
    growing = asking.draw(asker, "gone", "a", n=4, decoder=None, found=[], used=[], seed=0)
    next(growing)
    asker.leave("gone")
    with pytest.raises(Exception, match="gone") as caught:
        list(growing)
    assert asking.sentence_of(caught.value) == "the caller has gone"


def test_own_documents_are_retrieved_for_who_added_them_and_results_made_again(
    asker: Asker, loaded: CM3Leon
) -> None:
    size = len(asker.model.run.bank)
    text = "a very peculiar zebra of glass"
    said = asking.add(asker, "me", picture_file(noise(40)), text)
    document = f"Row {size} of the memory bank"
    assert said == f"{document}, in this browser alone, until its page is closed."
    asking.add(asker, "me", picture_file(255 - noise(40)), "another one")

    found = asking.search(asker, "me", text, None, 1)
    assert (found[0].row, found[0].text) == (size, text)
    shown, described = asking.browse(asker, "me", np.inf, size + 2)
    assert described == f"Page 1 of 1, {size + 2:,} documents."
    assert [line for _, line in shown[-2:]] == [f"{size}: {text}", f"{size + 1}: another one"]

    # Nobody else has it: neither another session nor the run.
    assert all(each.row < size for each in asking.search(asker, "you", text, None, 5))
    assert len(asker.model.run.bank) == size
    assert not asker.model.run.added_tokens_file.is_file()

    # Python and the command draw with it again, from the files that the page hands out.
    (row,) = [each.row for each in asking.documents_for(asker, "me", text, 1)]
    assert row == size
    for used in ([size], [size, size + 1]):
        drawing = asking.draw(
            asker, "me", "a seven", n=1, decoder=None, found=[size, 0, size + 1], used=used, seed=3
        )
        result = last(drawing)
        assert set(result.files) == {"own.jsonl", "own_0.png", "own_1.png"}
        (drawn,) = [image for image, _ in result.pictures]
        (again,) = made_by_python(result)
        assert same(drawn, again.image)
        assert [each.text for each in again.documents] == [text, "another one"][: len(used)]

        run_command(result)
        assert same(Image.open("generated/00000_0.png"), drawn)
        shutil.rmtree("generated")

    captioned = last(asking.look(asker, "me", noise(), "", retrieve=1, seed=5))
    assert captioned.text == made_by_python(captioned)

    with pytest.raises(UserError, match="the document's text is empty"):
        asking.add(asker, "me", picture_file(noise()), " ")
    with pytest.raises(UserError, match="image is missing"):
        asking.add(asker, "me", None, "a")

    # Once the page is closed, nobody has it.
    asker.end("me")
    assert all(each.row < size for each in asking.search(asker, "me", text, None, 5))


def test_files_of_own_documents_are_read_or_refused_with_a_sentence(
    asker: Asker, tmp_path: Path
) -> None:
    (tmp_path / "own.jsonl").write_text('{"image": "missing.png", "text": "a"}\n')
    with pytest.raises(UserError, match=r"own: own\.jsonl/1: unreadable"):
        asker.model.with_documents(tmp_path / "own.jsonl")
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"own: .*own\.jsonl has no documents"):
        asker.model.with_documents(tmp_path / "own.jsonl")


# ------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def url(asker: Asker) -> Iterator[str]:
    page = Page(asker, key=None, queue=8, body_bytes=2**20)
    listener = socket.create_server(("127.0.0.1", 0))
    inner = uvicorn_of(page, grace=1)
    thread = threading.Thread(target=inner.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 20

    # Wait until the server listens, for twenty seconds at most.
    while not inner.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"

    inner.should_exit = True
    thread.join(20)
    listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as drivers:
        found = drivers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Person:
    """Somebody who looks at the page in a window of their own."""

    def __init__(self, browser: Any, url: str, *, width: int, dark: bool) -> None:
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": 844}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.set_default_timeout(60_000)
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def fill(self, label: str, text: str) -> None:
        self.page.get_by_label(label).fill(text)

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def give(self, where: str, file: Path) -> None:
        self.page.locator(f"#{where} input[type=file]").set_input_files(file)
        self.page.locator(f"#{where} img").wait_for()

    def reads(self, tab: str, text: str) -> None:
        self.page.locator(f"#{tab}-status").get_by_text(text).first.wait_for()

    def command(self, tab: str) -> str:
        """The command that makes a result again, once its part of the tab is open."""
        return str(self.page.locator(f"#{tab}-command textarea").input_value())

    def file(self, tab: str, name: str) -> bytes:
        """A file that is offered beside a result."""
        links = self.page.locator(f"#{tab}-files a[href$='{name}']")
        links.first.wait_for()
        return bytes(self.page.request.get(links.first.get_attribute("href")).body())


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(noise(40)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_person_uses_each_tab_on_a_phone_in_the_dark_and_by_keyboard(
    browser: Any, url: str, picture: Path
) -> None:
    person = Person(browser, url, width=390, dark=True)
    page = person.page

    # An empty prompt is refused, a text is drawn.
    page.get_by_label("Prompt").press("Enter")
    person.reads("draw", "prompt is empty")
    person.fill("Prompt", "a seven")
    page.keyboard.press("Enter")
    person.reads("draw", "Seed")
    assert page.locator("#draw-images img").count() == 4

    # All five tabs are there, and a key opens one.
    names = ["Draw", "Look", "Fill in", "Edit", "Library"]
    tabs = page.get_by_role("tab")
    assert [tabs.nth(number).inner_text() for number in range(tabs.count())] == names
    for name in names:
        found = page.get_by_role("tab", name=name).bounding_box()
        assert 0 <= found["x"] <= 390 - found["width"]
    page.get_by_role("tab", name="Look").press("Enter")
    page.get_by_role("button", name="Describe").wait_for()

    # Nothing is wider than the phone, and the page is dark.
    for name in names:
        person.open_tab(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", colour)[:3])) < 3 * 128

    # An instruction edits an image.
    person.open_tab("Edit")
    person.give("edit-image", picture)
    person.fill("Instruction", "make it bold")
    page.keyboard.press("Enter")
    person.reads("edit", "Seed")
    page.close()


def test_a_person_switches_documents_brushes_and_adds_documents(
    browser: Any, url: str, picture: Path, tmp_path: Path
) -> None:
    person = Person(browser, url, width=1000, dark=False)
    page = person.page

    # Both documents that were found are used, until one is switched off.
    person.fill("Prompt", "a seven")
    person.press("Draw")
    person.reads("draw", "Seed")
    page.locator("#draw-again button").first.click()
    assert "retrieve=2" in person.command("draw")
    page.locator("#draw-used input").first.uncheck()
    person.press("Draw")
    page.wait_for_function(
        "document.querySelector('#draw-command textarea').value.includes('documents=[')"
    )

    # An image of too many pixels is refused.
    large = tmp_path / "large.png"
    Image.new("L", (600, 600)).save(large)
    person.open_tab("Look")
    person.give("look-image", large)
    person.press("Describe")
    person.reads("look", "pixels")

    # A box, and then a brush that is dragged through the middle of the image.
    person.open_tab("Fill in")
    person.give("fill-image", picture)
    canvas = page.locator("#fill-editor canvas").first
    canvas.wait_for()
    person.press("Fill in")
    person.reads("fill", "nothing is to be made anew")
    person.fill("Or a box", "0, 16, 32, 32")
    person.press("Fill in")
    person.reads("fill", "Seed")
    page.locator("#fill-again button").first.click()
    assert "'box=[0, 16, 32, 32]'" in person.command("fill")
    person.fill("Or a box", "")
    drag(page, canvas)
    person.press("Fill in")
    page.wait_for_function(
        "document.querySelector('#fill-command textarea').value.includes('mask=mask.png')"
    )
    mask = Image.open(io.BytesIO(person.file("fill", "mask.png")))
    transparent_HW = np.asarray(mask.getchannel("A")) == 0
    assert transparent_HW.shape == (SIZE, SIZE)
    assert transparent_HW[SIZE // 2, SIZE // 4 : SIZE * 3 // 4].all()
    assert not transparent_HW[: SIZE // 8].any()

    # A document that is added is found and drawn with; it is this browser's alone.
    person.open_tab("Library")
    person.reads("library", "Page 1 of")
    page.locator("#library-own button").first.click()
    person.give("library-own-image", picture)
    person.fill("Words of the document", "a zebra of glass")
    person.press("Add")
    person.reads("library", "in this browser alone")
    person.fill("Search for", "a zebra of glass")
    page.keyboard.press("Enter")
    person.reads("library", "the closest first")
    page.locator("#library-images").get_by_text("a zebra of glass").first.wait_for()

    person.open_tab("Draw")
    person.fill("Prompt", "a zebra of glass")
    person.press("Draw")
    page.wait_for_function(
        "document.querySelector('#draw-command textarea').value.includes('own=own.jsonl')"
    )
    assert b"a zebra of glass" in person.file("draw", "own.jsonl")

    # The page has asked no other server for anything.
    elsewhere = {each for each in person.asked if not each.startswith((url, "data:", "blob:"))}
    assert elsewhere == set()
    page.close()


def drag(page: Any, canvas: Any) -> None:
    """Drag the brush through the middle of the canvas, from a quarter to three quarters of it."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    height = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 4, height)
    page.mouse.down()
    for step in range(1, 11):
        page.mouse.move(box["x"] + box["width"] * (1 / 4 + step / 20), height)
    page.mouse.up()
