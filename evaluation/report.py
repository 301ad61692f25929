"""A report as one HTML file: figures, tables, galleries and curves, all inline, nothing fetched, no script.

    write_report(
        "report.html",
        Report(
            title="Digits",
            facts=[Fact("text to image, no documents", "97.4 %", "[96.3, 98.2], n = 1,000; aim 97 %", "good")],
            sections=[Section("Samples", blocks=[Gallery([Card([Picture(pixels_HWC)], caption="a seven")])])],
        ),
    )

Every string is escaped: captions come from data sets and from models, and are trusted with nothing. The same report
renders to the same bytes. Colours are CSS variables, so that pictures, tables and charts follow the reader's light or
dark scheme; printing is always light.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal, TypeAlias, assert_never
from urllib.parse import quote

import numpy as np

from cm3leon.io import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Status = Literal["good", "bad", "plain"]
Numbers: TypeAlias = "Sequence[float] | np.ndarray"


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file beside the page, or in a folder below it: `path` is relative to the page's folder."""

    text: str
    path: PurePath

    @property
    def address(self) -> str:
        """The path as an address that no letter in it turns into a protocol, a query or a place in a page."""
        return f"./{quote(self.path.as_posix())}"


Cell = str | int | float | Link | None


@dataclass(frozen=True)
class Fact:
    """One large figure at the top: `value` is what is read first, `label` what it measures, `note` its context."""

    label: str
    value: str
    note: str = ""
    status: Status = "plain"


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of uint8 with 1, 3 or 4 channels, drawn `height` CSS pixels tall.

    Enlarged twice or more, a `pixelated` picture is drawn at the largest whole multiple of its size within `height`,
    so that its pixels stay squares of one size. `label` stands under it and is its text for those who cannot see it.
    """

    pixels_HWC: np.ndarray
    label: str = ""
    pixelated: bool = True
    height: int = 96


@dataclass(frozen=True)
class Card:
    """One sample: its images, the title and caption under them, the retrieved documents at half the size beside."""

    images: Sequence[Picture]
    title: str = ""
    caption: str = ""
    retrieved: Sequence[Picture] = ()
    status: Literal["good", "bad"] | None = None


@dataclass(frozen=True)
class Gallery:
    """Cards in a grid of at most `columns` columns; as many as fit without it."""

    cards: Sequence[Card]
    columns: int | None = None
    caption: str = ""


@dataclass(frozen=True)
class Strip:
    """Titled rows of pictures aligned in columns, such as originals over their reconstructions."""

    rows: Sequence[tuple[str, Sequence[Picture]]]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column; the first cell of a row names it. `highlight` holds indices of rows.

    Columns that are all called "" have no line of names above them.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Series:
    """A line through `x` and `y`, both of one length; `y_low` and `y_high` of the same length shade a band."""

    name: str
    x: Numbers
    y: Numbers
    y_low: Numbers | None = None
    y_high: Numbers | None = None


@dataclass(frozen=True)
class Reference:
    """A horizontal line to read the curves against."""

    y: float
    name: str


@dataclass(frozen=True)
class Curves:
    """Lines on shared axes. `smooth` > 1 draws the moving mean over that many points, the raw line light behind it.

    Points that are not finite are left out, as are those not above zero on a logarithmic axis.
    """

    series: Sequence[Series]
    x_label: str
    y_label: str
    title: str = ""
    log_y: bool = False
    log_x: bool = False
    smooth: int = 0
    references: Sequence[Reference] = ()


@dataclass(frozen=True)
class Text:
    """Prose; a blank line starts a new paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text kept as it is, line by line: a command, a configuration."""

    text: str


Content: TypeAlias = "Table | Gallery | Strip | Curves | Text | Code | Folded"


@dataclass(frozen=True)
class Folded:
    """Blocks that are seen when their title is clicked: what a reader looks up rather than reads."""

    title: str
    blocks: Sequence[Content]


@dataclass(frozen=True)
class Section:
    """A heading, an introduction, and what there is to see."""

    title: str
    text: str = ""
    blocks: Sequence[Content] = ()


@dataclass(frozen=True)
class Report:
    """A page: title, the figures that matter, sections."""

    title: str
    subtitle: str = ""
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


def write_report(path: str | Path, report: Report) -> None:
    """Write the page to `path`, in one step: a reader sees the old file or the new one, never half of either."""
    write_page(path, render(report))


def write_page(path: str | Path, page: str) -> None:
    """Writes HTML as a file, in one step."""
    content = page.encode("utf-8", errors="xmlcharrefreplace")  # captions may hold lone surrogates
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, shared=True) as partial:
        partial.write_bytes(content)


def render(report: Report) -> str:
    """The page as HTML."""
    sections = "\n".join(
        _section(number, section) for number, section in enumerate(report.sections, start=1)
    )
    return html_page(
        report.title,
        f"""<header>
<h1>{escape(report.title)}</h1>
{_optional("p", "subtitle", report.subtitle)}
{_facts(report.facts)}
</header>
{_contents(report.sections)}
<main>
{sections}
</main>
{_footer(report.footer)}""",
    )


def html_page(title: str, body: str, style: str = "") -> str:
    """A page that may load nothing and run nothing; `style` is added to the report's."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _optional(tag: str, name: str, text: str) -> str:
    """An element of class `name` around the text, nothing without text."""
    return f'<{tag} class="{name}">{escape(text)}</{tag}>' if text else ""


def _paragraphs(text: str) -> str:
    """One `<p>` for each run of text between blank lines."""
    return "\n".join(
        f"<p>{escape(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip()
    )


def _mark(status: Status | None) -> str:
    """A tick or a cross, so that a status can be told without its colour."""
    if status not in ("good", "bad"):
        return ""
    return f'<span class="mark {status}" role="img" aria-label="{status}">{"✓" if status == "good" else "✗"}</span>'


def _facts(facts: Sequence[Fact]) -> str:
    if not facts:
        return ""
    items = "\n".join(
        f'<div class="fact"><dt>{escape(fact.label)}</dt>'
        f'<dd class="value {fact.status}">{escape(fact.value)}{_mark(fact.status)}</dd>'
        f"{_optional('dd', 'note', fact.note)}</div>"
        for fact in facts
    )
    return f'<dl class="facts">\n{items}\n</dl>'


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections, where there is more than one."""
    if len(sections) < 2:
        return ""
    items = "".join(
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections, start=1)
    )
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>'


def _footer(text: str) -> str:
    return f"<footer>{_paragraphs(text)}</footer>" if text else ""


def _section(number: int, section: Section) -> str:
    blocks = "\n".join(
        _block(block, f"{number}-{index}") for index, block in enumerate(section.blocks, start=1)
    )
    return f"""<section id="section-{number}" aria-labelledby="heading-{number}">
<h2 id="heading-{number}">{escape(section.title)}</h2>
{_paragraphs(section.text)}
{blocks}
</section>"""


def _block(block: Content, key: str) -> str:
    """One block; `key` is unique in the page."""
    match block:
        case Table():
            return _table(block)
        case Gallery():
            return _gallery(block)
        case Strip():
            return _strip(block)
        case Curves():
            return _curves(block, key)
        case Text():
            return _paragraphs(block.text)
        case Code():
            return f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>'
        case Folded():
            inner = "\n".join(
                _block(each, f"{key}-{index}") for index, each in enumerate(block.blocks, start=1)
            )
            return f"<details><summary>{escape(block.title)}</summary>\n{inner}\n</details>"
        case _:
            assert_never(block)


def _scroll(label: str, content: str) -> str:
    """A box that scrolls sideways when its content is wider than the page, also from the keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'


# Tables

_DASH, _MINUS = "\u2013", "\u2212"
_NUMERIC = re.compile(r"nan|\u2212?inf|[\d\s.,%e/()\[\]+\-\u00b1\u00d7\u2013\u2212]+")


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"a row of the table has {len(row)} cells, for {len(table.columns)} columns: {row!r}"
            )
    columns = [_column([row[index] for row in table.rows]) for index in range(len(table.columns))]
    numeric = [_is_numeric(column) for column in columns]
    head = "".join(
        f'<th scope="col"{_number_class(is_number)}>{escape(name)}</th>'
        for name, is_number in zip(table.columns, numeric, strict=True)
    )
    body = "\n".join(
        _table_row(
            [
                _linked(cell, column[index])
                for cell, column in zip(table.rows[index], columns, strict=True)
            ],
            numeric,
            index in table.highlight,
        )
        for index in range(len(table.rows))
    )
    named = f"<thead><tr>{head}</tr></thead>\n" if any(table.columns) else ""
    content = f"<table>{named}<tbody>\n{body}\n</tbody></table>"
    caption = _optional("figcaption", "caption", table.caption)
    return f'<figure class="table">{caption}{_scroll(table.caption or "Table", content)}</figure>'


def _table_row(cells: Sequence[str], numeric: Sequence[bool], is_highlighted: bool) -> str:
    """A row of cells in HTML, the first of which is its heading."""
    parts = []
    for column, (cell, is_number) in enumerate(zip(cells, numeric, strict=True)):
        tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
        parts.append(f"<{tag}{scope}{_number_class(is_number)}>{cell}</{tag}>")
    row = '<tr class="highlight">' if is_highlighted else "<tr>"
    return f"{row}{''.join(parts)}</tr>"


def _linked(cell: Cell, text: str) -> str:
    """The text of a cell as HTML, in an `<a>` if the cell is a link."""
    if isinstance(cell, Link):
        return f'<a href="{escape(cell.address)}">{escape(text)}</a>'
    return escape(text)


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _column(cells: Sequence[Cell]) -> list[str]:
    """A column as text, its floats lined up at the decimal point."""
    decimals = max(
        (_decimals(cell) for cell in cells if isinstance(cell, float | np.floating)), default=0
    )
    return [_cell(cell, decimals) for cell in cells]


def _decimals(value: float) -> int:
    """Decimals that four digits of the value take."""
    text = f"{value:.4g}"
    return 0 if "e" in text else len(text.partition(".")[2])


def _cell(cell: Cell, decimals: int) -> str:
    """A cell as text: a string as it is, a dash for nothing, a float with `decimals`, but not beyond five digits."""
    if cell is None:
        return _DASH
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Link):
        return cell.text
    if not isinstance(cell, float | np.floating):
        text = f"{cell:,}"
    elif cell == 0 or 1e-4 <= abs(cell) < 1e15:
        text = f"{cell:,.{min(decimals, max(_decimals(cell), 5 - len(f'{abs(cell):.0f}')))}f}"
    else:
        text = f"{cell:.4g}"
    return text.replace("-", _MINUS)


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column reads as numbers: digits with signs, units of per cent, intervals; dashes and gaps aside."""
    filled = [cell for cell in cells if cell.strip(f" -{_DASH}")]
    return bool(filled) and all(_NUMERIC.fullmatch(cell) for cell in filled)


# Pictures


def _picture(picture: Picture, height: int, alt: str) -> str:
    """An `<img>` at most `height` pixels tall (see `Picture`)."""
    width, height = _drawn_size(picture, height)
    style = (
        ' class="pixelated"' if picture.pixelated and height % len(picture.pixels_HWC) == 0 else ""
    )
    return (
        f'<img{style} src="{png_uri(picture.pixels_HWC)}" width="{width}" height="{height}" '
        f'alt="{escape(picture.label or alt)}">'
    )


def _drawn_size(picture: Picture, height: int) -> tuple[int, int]:
    """Width and height in CSS pixels of a picture given `height` pixels."""
    native_height, native_width = picture.pixels_HWC.shape[:2]
    if picture.pixelated and height >= 2 * native_height:
        height -= height % native_height
    return max(1, round(native_width * height / native_height)), height


def png_uri(pixels_HWC: np.ndarray) -> str:
    """The image as a data URI, one PNG pixel for each of its own."""
    from PIL import Image

    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"a picture is uint8 (H, W, 1, 3 or 4), not {pixels_HWC.dtype} {pixels_HWC.shape}"
        )
    pixels = pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _labelled(picture: Picture, height: int, alt: str) -> str:
    """A picture with its label under it."""
    return f"<figure>{_picture(picture, height, alt)}{_optional('figcaption', 'label', picture.label)}</figure>"


def _captioned(name: str, content: str, caption: str) -> str:
    """A figure of class `name` under its caption."""
    return f'<figure class="{name}">{_optional("figcaption", "caption", caption)}{content}</figure>'


def _gallery(gallery: Gallery) -> str:
    narrowest = max((_card_width(card) for card in gallery.cards), default=0)
    columns = f";--columns:{gallery.columns}" if gallery.columns else ""
    cards = "\n".join(_card(card) for card in gallery.cards)
    content = f'<ul class="cards" style="--card:{narrowest}px{columns}">\n{cards}\n</ul>'
    return _captioned("gallery", content, gallery.caption)


def _card_width(card: Card) -> int:
    """Pixels a card needs: its images side by side, and room for retrieved documents with their captions."""
    gap, words = 12, 104
    width = sum(_drawn_size(picture, picture.height)[0] + gap for picture in card.images)
    thumbnails = [_drawn_size(picture, picture.height // 2)[0] for picture in card.retrieved]
    return max(width + (max(thumbnails) + gap + words if thumbnails else 0), 128)


def _card(card: Card) -> str:
    alt = card.caption or card.title or "sample"
    images = "".join(_labelled(picture, picture.height, alt) for picture in card.images)
    return (
        f'<li class="card {card.status or "plain"}"><div class="pictures"><div class="images">{images}</div>'
        f"{_retrieved(card.retrieved)}</div>{_card_text(card)}</li>"
    )


def _card_text(card: Card) -> str:
    """Title and caption, the mark of the status before whichever comes first."""
    lines = [
        (name, text) for name, text in (("title", card.title), ("prompt", card.caption)) if text
    ]
    if not lines:
        return f"<p>{_mark(card.status)}</p>" if card.status else ""
    return "".join(
        f'<p class="{name}">{_mark(card.status) if index == 0 else ""}{escape(text)}</p>'
        for index, (name, text) in enumerate(lines)
    )


def _retrieved(pictures: Sequence[Picture]) -> str:
    """The retrieved documents of a card, each a small image beside its caption."""
    if not pictures:
        return ""
    items = "".join(
        f"<li>{_picture(picture, picture.height // 2, 'retrieved document')}"
        f"{_optional('span', 'label', picture.label)}</li>"
        for picture in pictures
    )
    return f'<ul class="retrieved" aria-label="Retrieved documents">{items}</ul>'


def _strip(strip: Strip) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(title)}</th>'
        + "".join(
            f"<td>{_labelled(picture, picture.height, title or 'image')}</td>"
            for picture in pictures
        )
        + "</tr>"
        for title, pictures in strip.rows
    )
    content = _scroll(
        strip.caption or "Pictures in rows", f"<table><tbody>\n{rows}\n</tbody></table>"
    )
    return _captioned("strip", content, strip.caption)


# Curves

_CHART_SIZE = (
    704,
    290,
)  # width and height of a chart in units of its own, which are CSS pixels at full width
_MAX_POINTS = 500
_MARKED_POINTS = 24  # a line of at most this many points shows each of them
_SERIES_COLOURS = 6
_DASHES = ("solid", "dashed", "dotted")  # tells series apart once colours repeat
_STEPS = (1, 2, 2.5, 5, 10)  # between numbers on an axis, up to powers of ten
_INK = "#000001"  # colours the chart is drawn in, each replaced by the style sheet's: see `_inline_svg`
_SERIES_INKS = tuple(f"#0000{16 + index:02x}" for index in range(_SERIES_COLOURS))


@dataclass(frozen=True, eq=False)
class _Line:
    """The points of a series that can be drawn: float arrays of one length."""

    x: np.ndarray
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None

    def at(self, index: np.ndarray) -> _Line:
        """The points chosen by a mask or by indices."""
        band = None if self.band is None else (self.band[0][index], self.band[1][index])
        return _Line(self.x[index], self.y[index], band)


def _curves(curves: Curves, key: str) -> str:
    lines = [_line(series, log_x=curves.log_x, log_y=curves.log_y) for series in curves.series]
    title = curves.title or f"{curves.y_label} by {curves.x_label}"
    names = ", ".join(series.name for series in curves.series)
    chart = _inline_svg(
        _draw(curves, lines), f"chart-{key}-", f"{title}: {names}" if names else title
    )
    return (
        f'<figure class="chart">{_optional("p", "title", curves.title)}{_legend(curves, lines)}'
        f'<p class="axis">{escape(curves.y_label)}</p>{chart}<p class="axis x">{escape(curves.x_label)}</p></figure>'
    )


def _legend(curves: Curves, lines: Sequence[_Line]) -> str:
    """Names of series and reference lines beside a stroke of theirs, outside the chart, where they can wrap."""
    items = [
        f'<li><span class="stroke" style="border-top:2px {_dash(index)} var(--series-{index % _SERIES_COLOURS + 1})">'
        f"</span>{escape(series.name)}{'' if len(line.x) else ' (no points)'}</li>"
        for index, (series, line) in enumerate(zip(curves.series, lines, strict=True))
    ]
    items += [
        f'<li><span class="stroke reference"></span>{escape(line.name)}</li>'
        for line in curves.references
    ]
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _dash(index: int) -> str:
    return _DASHES[index // _SERIES_COLOURS % len(_DASHES)]


def _line(series: Series, *, log_x: bool, log_y: bool) -> _Line:
    """The points of a series that have a place on the axes."""
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    band = None
    if series.y_low is not None and series.y_high is not None:
        band = (np.asarray(series.y_low, dtype=float), np.asarray(series.y_high, dtype=float))
    if len({len(values) for values in (x, y, *(band or ()))}) > 1:
        raise ValueError(f"the arrays of series {series.name!r} differ in length")
    has_place = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
    return _Line(x, y, band).at(has_place)


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window of `window` points, fewer at the ends."""
    window = min(window, len(values))
    weights = np.ones(window)
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")


def _thinned(line: _Line) -> _Line:
    """At most `_MAX_POINTS` points: the lowest and the highest of each stretch, so that spikes survive."""
    if len(line.y) <= _MAX_POINTS:
        return line
    stretches = np.array_split(np.arange(len(line.y)), _MAX_POINTS // 2)
    extremes = [
        stretch[pick(line.y[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)
    ]
    return line.at(np.unique(extremes))


def _draw(curves: Curves, lines: Sequence[_Line]) -> str:
    """The chart as matplotlib writes it: lines, bands and the numbers of the axes, no other text."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    width, height = _CHART_SIZE
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": "report", "svg.fonttype": "none", "font.size": 12.0}
    ):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        for index, line in enumerate(lines):
            _draw_line(
                axes, line, curves.smooth, _SERIES_INKS[index % _SERIES_COLOURS], _dash(index)
            )
        for reference in curves.references:
            axes.axhline(reference.y, color=_INK, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xscale("log" if curves.log_x else "linear")
        axes.set_yscale("log" if curves.log_y else "linear")
        for axis, is_log, count, (low, high) in (
            (axes.xaxis, curves.log_x, 6, axes.get_xlim()),
            (axes.yaxis, curves.log_y, 5, axes.get_ylim()),
        ):
            subs = (1, 2, 3, 5) if high < 100 * low else (1,)
            axis.set_major_locator(
                LogLocator(subs=subs) if is_log else MaxNLocator(count, steps=_STEPS)
            )
            axis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_tick))
        axes.tick_params(which="both", length=0, labelcolor=_INK)
        axes.grid(axis="y", color=_INK, alpha=0.14, linewidth=1)
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.spines["bottom"].set(color=_INK, alpha=0.5)
        axes.margins(x=0.01)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _draw_line(axes: Axes, line: _Line, smooth: int, ink: str, dash: str) -> None:
    """One series on matplotlib's axes: the band, the raw line, the smoothed one over it."""
    marker = "o" if len(line.x) <= _MARKED_POINTS else None
    thin = _thinned(line)
    if thin.band is not None:
        axes.fill_between(thin.x, *thin.band, color=ink, alpha=0.15, linewidth=0)
    if smooth > 1 and len(line.x) > 1:
        axes.plot(thin.x, thin.y, color=ink, alpha=0.25, linewidth=1)
        thin = _thinned(_Line(line.x, _moving_mean(line.y, smooth), None))
    axes.plot(
        thin.x, thin.y, color=ink, linewidth=1.75, linestyle=dash, marker=marker, markersize=4.5
    )


def _tick(value: float, _: int | None = None) -> str:
    """A number on an axis: 0.05, 2, 1,500, 2.5M."""
    size = abs(value)
    text = f"{value / 1e6:g}M" if size >= 1e6 else f"{value:,.0f}" if size >= 1e3 else f"{value:g}"
    return text.replace("-", _MINUS)


def _inline_svg(svg: str, prefix: str, label: str) -> str:
    """Matplotlib's file as an element of the page: colours and fonts from the style sheet, ids under `prefix`."""
    width, height = _CHART_SIZE
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL
    )
    body = re.sub(r' d="[^"]*"', lambda match: re.sub(r"\.(\d)\d+", r".\1", match[0]), body)
    body = re.sub(r"font(-size|-family)?: [^;\"]*;? ?", "", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    for index, ink in enumerate(_SERIES_INKS, start=1):
        body = body.replace(ink, f"var(--series-{index})")
    body = body.replace(_INK, "currentColor")
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )


_STYLE = """
:root {
  color-scheme: light;
  --paper: #fdfcfa; --ink: #1f2123; --quiet: #65655f; --rule: #dfdcd3; --tint: #f2efe7;
  --good: #17685c; --bad: #a8401f;
  --series-1: #17685c; --series-2: #c05a2e; --series-3: #3f639c;
  --series-4: #a98412; --series-5: #8b4a7d; --series-6: #6d726e;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "URW Palladio L", P052, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --paper: #16181a; --ink: #e3e1db; --quiet: #a09e96; --rule: #34373a; --tint: #24292c;
    --good: #6cbfae; --bad: #e58a66;
    --series-1: #5fb8a6; --series-2: #e08a5f; --series-3: #86a9dd;
    --series-4: #d3b04a; --series-5: #c78dba; --series-6: #a3a8a4;
  }
}
* { box-sizing: border-box; }
html { font: 17px/1.6 var(--serif); background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { max-width: 68rem; margin: 0 auto; padding: 4.5rem 2rem 4rem; overflow-wrap: anywhere; }
h1, h2 { font-weight: 500; line-height: 1.15; letter-spacing: -0.01em; text-wrap: balance; margin: 0; }
h1 { font-size: 2.7rem; max-width: 44rem; }
h2 { font-size: 1.6rem; margin-bottom: 1rem; }
p { margin: 0 0 1rem; max-width: 42rem; text-wrap: pretty; }
ul, ol, dl, dd, figure { margin: 0; padding: 0; list-style: none; }
img { display: block; max-width: 100%; height: auto; border-radius: 2px; }
img { outline: 1px solid color-mix(in srgb, var(--ink) 12%, transparent); outline-offset: -1px; }
.pixelated { image-rendering: pixelated; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: 0.2em; }
a:hover { color: var(--good); text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--good); outline-offset: 3px; border-radius: 2px; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.subtitle { font-size: 1.2rem; line-height: 1.5; color: var(--quiet); margin: 1rem 0 0; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.facts { gap: 2.25rem 2.5rem; margin-top: 3.25rem; }
.fact { display: flex; flex-direction: column; border-top: 1px solid var(--ink); padding-top: 0.7rem; }
.fact .value { order: -1; font-size: 2.6rem; line-height: 1.15; letter-spacing: -0.02em; }
.fact .value, .number { font-variant-numeric: tabular-nums lining-nums; }
.fact dt { font: 500 0.88rem/1.4 var(--sans); margin-top: 0.35rem; text-wrap: balance; }
.fact .note { font: 0.8rem/1.45 var(--sans); color: var(--quiet); margin-top: 0.25rem; }
.mark { font: 600 0.85em/1 var(--sans); margin-right: 0.4em; }
.value .mark { font-size: 1rem; margin: 0 0 0 0.45rem; vertical-align: 0.55em; }

nav { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--rule); }
nav { margin-top: 3.5rem; overflow-x: auto; scrollbar-width: none; }
nav ol { display: flex; gap: 1.75rem; padding: 0.8rem 0; font: 0.86rem/1.4 var(--sans); white-space: nowrap; }
nav a { color: var(--quiet); text-decoration: none; }

section { padding-top: 4rem; }
section > figure, details > figure, pre { margin: 1.75rem 0 2.5rem; }
.caption { font: 0.86rem/1.5 var(--sans); color: var(--quiet); max-width: 42rem; }
.caption { margin-bottom: 1rem; }
.label { font: 0.74rem/1.35 var(--sans); color: var(--quiet); }
figcaption.label { margin-top: 0.3rem; max-width: 9rem; }
.label, .prompt, .title, th, td { unicode-bidi: isolate; }

.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; overflow-wrap: break-word; }
.table table { font: 0.9rem/1.4 var(--sans); border-block: 1.5px solid var(--ink); }
.table .caption { margin: 0 0 0.7rem; }
.table th, .table td { padding: 0.5rem 1.1rem; text-align: left; font-weight: 400; vertical-align: baseline; }
.table thead th { border-bottom: 1px solid var(--ink); font-weight: 600; white-space: nowrap; }
.table tbody tr + tr > * { border-top: 1px solid var(--rule); }
.table .number { text-align: right; white-space: nowrap; }
.table .highlight > * { background: var(--tint); font-weight: 600; }

.cards { --columns: 12; --gap: 2rem; display: grid; gap: 2.25rem var(--gap); }
.cards { grid-template-columns: repeat(auto-fill, minmax(max(min(100%, var(--card)),
  (100% - (var(--columns) - 1) * var(--gap)) / var(--columns)), 1fr)); }
.card { border-top: 1px solid var(--rule); padding-top: 0.9rem; break-inside: avoid; min-width: 0; }
.card.bad { color: inherit; border-top-color: var(--bad); }
.card.good { color: inherit; }
.card p { margin: 0; }
.card .title { font: 600 0.82rem/1.4 var(--sans); }
.card .prompt { font-size: 0.95rem; line-height: 1.4; }
.pictures { display: flex; flex-wrap: wrap; gap: 0.75rem; margin-bottom: 0.6rem; }
.images { display: flex; flex-wrap: wrap; gap: 0.75rem; flex: 0 0 auto; max-width: 100%; }
.retrieved { display: flex; flex-direction: column; gap: 0.35rem; flex: 1 1 8rem; min-width: 0; }
.retrieved li { display: flex; gap: 0.5rem; align-items: center; }
.retrieved img { flex: none; max-width: 60%; }
.retrieved .label { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }

.strip th { position: sticky; left: 0; z-index: 1; background: var(--paper); text-align: left; vertical-align: middle; }
.strip th { font: 0.84rem/1.35 var(--sans); color: var(--quiet); padding: 0 1.1rem 0 0; }
.strip th { min-width: 5.5rem; max-width: 9rem; }
.strip td { padding: 0 0.6rem 0.6rem 0; vertical-align: top; }
.strip img { max-width: none; }

.chart { max-width: 44rem; break-inside: avoid; }
.chart p { margin: 0; max-width: none; }
.chart .title { font-size: 1.1rem; line-height: 1.4; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; margin: 0.3rem 0 0.9rem; font: 0.84rem/1.5 var(--sans); }
.stroke { display: inline-block; width: 1.4rem; margin-right: 0.5rem; vertical-align: 0.28em; }
.stroke.reference { border-top: 1px dashed var(--quiet); }
.axis { font: 0.76rem/1.4 var(--sans); color: var(--quiet); }
.axis.x { text-align: right; }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; color: var(--quiet); }
.chart svg * { stroke-linejoin: round; }
.chart text { font: 12px var(--sans); font-variant-numeric: tabular-nums; }

pre { font: 0.82rem/1.55 var(--mono); background: var(--tint); padding: 1rem 1.2rem; border-radius: 3px; }
pre { overflow-x: auto; overflow-wrap: normal; max-width: 52rem; }
code { font: inherit; }
details { border-top: 1px solid var(--rule); padding: 0.7rem 0; }
summary { font: 0.9rem/1.5 var(--sans); cursor: pointer; max-width: 42rem; }
footer { border-top: 1px solid var(--rule); margin-top: 5rem; padding-top: 1.2rem; }
footer p { font: 0.82rem/1.5 var(--sans); color: var(--quiet); }

@media (max-width: 40rem) {
  html { font-size: 16px; }
  body { padding: 2.5rem 1.25rem 3rem; }
  h1 { font-size: 2rem; }
  section { padding-top: 3rem; }
  .facts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: 1.75rem 1.25rem; }
  .fact .value { font-size: 2.1rem; }
  .table th, .table td { padding-inline: 0.7rem; }
  .chart text { font-size: 20px; }
}
@media print {
  :root { --paper: white; }
  html { font-size: 10.5pt; background: none; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  section { padding-top: 2rem; }
  h2 { break-after: avoid; }
  .fact, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  pre { white-space: pre-wrap; }
}
"""
