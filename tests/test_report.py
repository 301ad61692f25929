"""The report is one inert, self-contained and reproducible file, whatever strings it holds."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from cm3leon.evaluation.report import (
    Card,
    Code,
    Curves,
    Fact,
    Folded,
    Gallery,
    Link,
    Picture,
    ReferenceLine,
    Report,
    Section,
    Series,
    Strip,
    Table,
    Text,
    logged,
    numbers,
    render,
    write_report,
)
from cm3leon.evaluation.report.charts import line_of, moving_mean, thinned
from cm3leon.evaluation.report.page import TEMPLATES

VOID = {"meta", "img", "br"}
HOSTILE = (
    "</p></style></svg>\"'><script>alert(1)</script>"
    "<img src=http://evil.test/x onerror=alert(1)> $\\frac{1$ &amp;"
)


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text.

    A tag that is closed out of order is an error.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def noise(seed: int = 0, size: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)


def curves(*series: Series, **settings) -> Curves:
    return Curves(series=series, x_label="step", y_label="loss", **settings)


def example(text: str = "a handwritten seven") -> Report:
    """A report with every kind of block, and `text` wherever a string can stand."""
    picture = Picture(noise(), text)
    ramp = np.linspace(1, 2, 1500)
    lines = (Series(text, ramp, ramp, ramp - 0.1, ramp + 0.1), Series(text, ramp, 3 - ramp))
    aim = ReferenceLine(1.5, text)
    chart = Curves(lines, text, text, text, log_y=True, smooth=9, references=[aim])
    cards = [Card([picture, picture], text, text, [picture], "bad"), Card([Picture(noise(1))])]

    # All kinds, some of them twice with other settings.
    blocks = [
        Table([text, "n"], [[text, 1000], ["none", None]], text, frozenset({1})),
        Gallery(cards, 3, text),
        Strip([(text, [picture]), ("reconstruction", [picture, picture])], text),
        chart,
        replace(chart, log_y=False, smooth=0),
        Text(text),
        Code(text),
    ]
    fact = Fact(text, text, text, "good")
    return Report(text, text, [fact, fact], [Section(text, text, blocks), Section(text)], text)


def page_with(*blocks) -> Page:
    return Page(render(Report("title", sections=[Section("section", blocks=blocks)])))


@pytest.mark.parametrize("text", ["a handwritten seven", HOSTILE])
def test_page_is_well_formed_and_asks_for_nothing(text):
    page = Page(render(example(text)))
    assert all(
        image["src"].startswith("data:image/png;base64,") and image["alt"]
        for image in page.all("img")
    )

    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))

    # No element runs code or loads anything: links lead into the page, and images are inside it.
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "src"):
            value = attributes.get(name) or "#"
            assert (
                value.startswith("data:")
                if tag == "img" and name == "src"
                else value == "#" or value[1:] in ids
            )
        values = " ".join(value or "" for value in attributes.values())
        for target in re.findall(r"url\((.*?)\)", values):
            assert target.startswith("#")
            assert target[1:] in ids


def test_hostile_text_changes_no_element():
    tame, hostile = Page(render(example())), Page(render(example(HOSTILE)))
    assert [tag for tag, _ in tame.elements] == [tag for tag, _ in hostile.elements]
    assert HOSTILE in hostile.words
    assert {image["alt"] for image in hostile.all("img")} >= {HOSTILE}


def test_style_asks_for_nothing():
    sheets = list(TEMPLATES.glob("*.css"))
    assert len(sheets) == 2
    assert not any(re.search(r"url\(|@import|//", sheet.read_text()) for sheet in sheets)


def test_headings_are_in_order_and_contents_lead_to_sections():
    page = Page(render(example()))
    assert [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)] == ["h1", "h2", "h2"]
    assert [link["href"] for link in page.all("a")] == ["#section-1", "#section-2"]
    assert page.all("html") == [{"lang": "en"}]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_survive(channels):
    pixels_HWC = noise(channels=channels)[:, :20]
    (image,) = page_with(Gallery([Card([Picture(pixels_HWC)])])).all("img")
    decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(decoded).reshape(pixels_HWC.shape), pixels_HWC)
    assert (image["width"], image["height"]) == ("60", "96")


@pytest.mark.parametrize(
    ("size", "height", "drawn", "classes"),
    [
        (32, 96, "96", "pixelated"),
        (28, 96, "84", "pixelated"),
        (64, 96, "96", None),
        (256, 96, "96", None),
    ],
)
def test_enlarged_pixels_are_squares_of_one_size(size, height, drawn, classes):
    (image,) = page_with(Strip([("row", [Picture(noise(size=size), height=height)])])).all("img")
    assert (image["height"], image.get("class")) == (drawn, classes)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)]
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match="uint8"):
        page_with(Gallery([Card([Picture(pixels)])]))


def test_numbers_stand_right_and_line_up():
    rows = [
        ["none", 95.0, 1000, "[96.3, 98.2]", "low"],
        ["one", 97.25, -3, "\u2013", "1"],
        ["two", None, 0, "", "2"],
    ]
    page = page_with(Table(["documents", "accuracy", "n", "interval", "note"], rows))
    heads = [cell.get("class") for cell in page.all("th") if cell["scope"] == "col"]
    assert heads == [None, "number", "number", "number", None]
    for text in ("95.00", "97.25", "1,000", "\u22123", "\u2013"):
        assert text in page.words


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 0.9123], ["1.0000", "0.9123"]),
        ([12345.6, 0.5, 0.001234], ["12,346", "0.5000", "0.001234"]),
        ([1e-6, float("nan"), np.float32(0.25), 0.0], ["1e\u221206", "nan", "0.25", "0.00"]),
    ],
)
def test_floats_keep_four_digits(values, expected):
    assert numbers.column(values) == expected


def test_columns_without_names_have_no_line_of_names():
    rows = [["experiment", "digits"]]
    assert page_with(Table(("", ""), rows)).all("thead") == []
    assert len(page_with(Table(("what", ""), rows)).all("thead")) == 1


def test_rows_must_fit_the_columns():
    with pytest.raises(ValueError, match="3 cells, for 2 columns"):
        page_with(Table(["a", "b"], [[1, 2, 3]]))


NAN = float("nan")


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("smooth", [0, 5])
@pytest.mark.parametrize(
    ("y", "is_drawn"),
    [
        ([], False),
        ([NAN, NAN], False),
        ([2.0], True),
        ([1, NAN, 3], True),
        ([float("inf"), 1.0], True),
        ([7, 7], True),
    ],
)
def test_curves_of_few_or_no_points(y, is_drawn, smooth, log_y):
    page = page_with(curves(Series("run", range(len(y)), y), smooth=smooth, log_y=log_y))
    assert ("no points" in page.words) != is_drawn


def test_a_single_series_without_a_name_needs_no_legend():
    def legends(name):
        page = page_with(curves(Series(name, [1, 2], [3, 4])))
        return [of_ul for of_ul in page.all("ul") if of_ul.get("class") == "legend"]

    assert len(legends("run")) == 1
    assert not legends("")


def test_curves_without_series_and_below_zero():
    page_with(curves(references=[ReferenceLine(1.0, "aim")]))
    page_with(curves(Series("run", [0, 1], [-1.0, 0.0]), log_y=True))


def test_rates_stand_apart_by_their_factor():
    """On a logarithmic axis, three rates that each are ten times the last one are equally far."""
    rates = Series("run", [1e-4, 1e-3, 1e-2, 0.0], [1, 2, 3, 9])
    html = render(Report("title", sections=[Section("s", blocks=[curves(rates, log_x=True)])]))

    places = [float(x) for x in re.findall(r'<use xlink:href="#[^"]+" x="([\d.]+)" y=', html)]
    marks = sorted(set(places[-3:]))
    assert len(marks) == 3
    assert marks[1] - marks[0] == pytest.approx(marks[2] - marks[1], abs=0.2)
    assert {"0.0001", "0.001", "0.01"} <= set(re.findall(r">([\d.]+)</text>", html))


@pytest.mark.parametrize(
    "path", ["javascript:alert(1)", "//evil.test/x", 'a="b",c/r 1%?#.html', HOSTILE]
)
def test_links_lead_to_files_beside_the_page(path):
    page = page_with(Table(["point", "n"], [[Link(HOSTILE, Path(path) / "report.html"), 1]]))
    (link,) = page.all("a")
    assert HOSTILE in page.words
    assert re.fullmatch(r"\./[\w./~%-]+", link["href"])
    assert unquote(link["href"]) == f"./{Path(path) / 'report.html'}"


def test_series_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="'run' differ in length"):
        page_with(curves(Series("run", [0, 1], [1.0])))


def test_thinning_keeps_spikes():
    y = np.zeros(100_000)
    y[31_415] = 9.0
    line = line_of(Series("run", np.arange(len(y)), y), log_x=False, log_y=False)
    thin = thinned(line)
    assert len(thin.y) <= 500
    assert thin.x[thin.y == 9.0].tolist() == [31_415]


def test_moving_mean():
    np.testing.assert_allclose(moving_mean(np.array([1.0, 2, 6, 4, 5]), 3), [1.5, 3, 4, 5, 4.5])
    np.testing.assert_allclose(moving_mean(np.full(7, 2.0), 100), 2.0)


def test_charts_take_their_colours_from_the_page():
    blocks = [curves(Series("run", [0, 1], [1, 2]))]
    html = render(Report("title", sections=[Section("s", blocks=blocks)]))
    chart = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--series-1)" in chart
    assert "currentColor" in chart
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<metadata|http", chart)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00025, "0.00025"), (-2, "\u22122"), (1500, "1,500"), (2.5e6, "2.5M"), (0, "0")],
)
def test_ticks(value, text):
    assert numbers.tick(value) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "code", "1 code"), (0, "code", "0 codes"), (1024, "code", "1,024 codes")],
)
def test_what_is_counted_has_its_number(count, noun, text):
    assert numbers.counted(count, noun) == text


def test_an_interval_is_written_as_its_figure_is():
    assert numbers.interval(0.88, 12.345) == "[0.880, 12.3]"
    assert numbers.interval(0.88, 0.94, "{:.1%}".format) == "[88.0%, 94.0%]"


def test_a_figure_breaks_into_lines_only_before_its_brackets():
    text = "0.912 ± 0.012 (0.880 to 0.940) [0.871, 0.953]"
    lines = ["0.912 ± 0.012", "(0.880 to 0.940)", "[0.871, 0.953]"]
    assert numbers.unbroken(text) == " ".join(line.replace(" ", "\u00a0") for line in lines)


def test_rows_that_name_their_cells_have_dashes_for_those_of_others():
    table = Table.of([{"run": "a", "loss": 0.5}, {"run": "b", "accuracy": 1}], highlight={1})
    assert table.columns == ["run", "loss", "accuracy"]
    assert table.rows == [["a", 0.5, None], ["b", None, 1]]
    assert table.highlight == {1}


def test_figures_of_training_are_drawn_where_they_were_written():
    log = [{"step": step, "loss": 1 / step} for step in range(1, 41)]
    curves = logged("Loss", log, {"batch": "loss", "none": "psnr"}, "nats", is_noisy=True)
    assert [(each.name, len(each.x)) for each in curves.series] == [("batch", 40)]
    assert curves.smooth == 2


def test_same_report_same_bytes():
    assert render(example()) == render(example())


def test_what_is_looked_up_is_folded_under_its_title():
    folded = Folded("<long>", [Code("a: 1"), Text("t")])
    html = render(Report("title", sections=[Section("s", blocks=[folded])]))
    details = html[html.index("<details>") : html.index("</details>")]
    assert details.startswith("<details><summary>&lt;long&gt;</summary>")
    assert "a: 1" in details
    assert "<p>t</p>" in details


def test_captions_stand_above_what_they_name():
    strip = Strip([("row", [Picture(noise())])], caption="of these")
    for block in (strip, Gallery([Card([Picture(noise())])], caption="of these")):
        html = render(Report("title", sections=[Section("s", blocks=[block])]))
        assert html.index("of these</figcaption>") < html.index("<img")


def test_many_pictures_stay_small():
    cards = [Card([Picture(noise(seed))], caption="a seven") for seed in range(300)]
    report = Report("title", sections=[Section("samples", blocks=[Gallery(cards)])])
    assert len(render(report)) < 1_500_000


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    write_report(path, Report("first \ud800"))
    before = path.read_bytes()
    assert b"first" in before

    # The second write fails before it replaces the first report.
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, Report("second"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_import_is_light():
    code = "import sys, cm3leon.evaluation.report; print(*sys.modules)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert not {"matplotlib", "PIL", "torch"} & set(modules)
