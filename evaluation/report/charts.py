"""Charts: lines on shared axes, drawn by matplotlib in the colours and fonts of the style sheet.

The drawing's only text is the numbers of its axes. Title, legend and axis labels are HTML around
it, where they wrap and screen readers find them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np
from markupsafe import Markup

from cm3leon.evaluation.report import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers: TypeAlias = "Sequence[float] | np.ndarray"

SIZE = (704, 290)
"""Width and height of a chart in its own units, which are CSS pixels at full width."""
MAX_POINTS = 500
"""A longer line is thinned to this many points."""
MARKED_POINTS = 24
"""A line of at most this many points shows each of them."""
COLOURS = 6
"""Colours of series in the style sheet."""
DASHES = ("solid", "dashed", "dotted")
"""Tell series apart once colours repeat."""
STEPS = (1, 2, 2.5, 5, 10)
"""Distances between numbers on an axis, up to powers of ten."""

# Colours that matplotlib draws in, each replaced by one of the style sheet's: see `_for_page`.
_INK = "#000001"
_SERIES_INKS = tuple(f"#0000{16 + index:02x}" for index in range(COLOURS))


@dataclass(frozen=True, eq=False)
class Series:
    """A line through `x` and `y`, of equal length; `y_low` and `y_high` shade a band."""

    name: str
    x: Numbers
    y: Numbers
    y_low: Numbers | None = None
    y_high: Numbers | None = None


@dataclass(frozen=True)
class ReferenceLine:
    """A horizontal line to read the curves against."""

    y: float
    name: str


@dataclass(frozen=True)
class Curves:
    """Lines on shared axes. `smooth` > 1 draws the moving mean over that many points, with the raw
    line lightly behind it.

    Points that are not finite are left out, as are those not above zero on a logarithmic axis.
    """

    kind: ClassVar[str] = "curves"

    series: Sequence[Series]
    x_label: str
    y_label: str
    title: str = ""
    log_y: bool = False
    log_x: bool = False
    smooth: int = 0
    references: Sequence[ReferenceLine] = ()


def logged(
    title: str,
    log: Sequence[Mapping[str, float]],
    names: Mapping[str, str],
    unit: str,
    *,
    is_noisy: bool = False,
) -> Curves:
    """Figures of a training by step, with a line for each of `names`, which map line names to keys.

    A noisy figure is drawn as its moving mean over a twentieth of its points.
    """
    series = []
    for name, key in names.items():
        # Some figures are logged at a few steps only, or never.
        steps, values = [], []
        for record in log:
            if key in record:
                steps.append(record["step"])
                values.append(record[key])
        if steps:
            series.append(Series(name, steps, values))

    smooth = 0
    if is_noisy:
        smooth = max((len(each.x) for each in series), default=0) // 20
    return Curves(series, "step", unit, title=title, smooth=smooth)


@dataclass(frozen=True)
class Stroke:
    """A line of the legend: the name of a series, the number of its colour, its dashes."""

    name: str
    colour: int
    dash: str
    has_points: bool


@dataclass(frozen=True)
class Chart:
    """What the template shows: the inside of an SVG element of `SIZE`, its description, and the
    legend."""

    drawing: Markup
    about: str
    strokes: Sequence[Stroke]
    size: tuple[int, int] = SIZE


def chart(curves: Curves, key: str) -> Chart:
    """Draw curves; `key` is unique in the page."""
    # A series without points that can be drawn stays in the legend, where it is said to have none.
    # A run's own model has no name to stand there.
    lines = [line_of(series, log_x=curves.log_x, log_y=curves.log_y) for series in curves.series]
    strokes = []
    for index, (series, line) in enumerate(zip(curves.series, lines, strict=True)):
        has_points = len(line.x) > 0
        if series.name:
            strokes.append(Stroke(series.name, index % COLOURS + 1, _dash(index), has_points))

    # What a screen reader says in place of the drawing.
    about = curves.title or f"{curves.y_label} by {curves.x_label}"
    if strokes:
        about += f": {', '.join(stroke.name for stroke in strokes)}"
    return Chart(_for_page(_drawn(curves, lines), f"chart-{key}-"), about, strokes)


def _dash(index: int) -> str:
    """The dashes of a series, others in each round through the colours."""
    return DASHES[index // COLOURS % len(DASHES)]


# ------------------------------------------------------------------------------------------- points


@dataclass(frozen=True, eq=False)
class Line:
    """The points of a series that can be drawn: float arrays of one length."""

    x: np.ndarray
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None

    def at(self, index: np.ndarray) -> Line:
        """The points chosen by a mask or by indices."""
        band = None
        if self.band is not None:
            band = (self.band[0][index], self.band[1][index])
        return Line(self.x[index], self.y[index], band)


def line_of(series: Series, *, log_x: bool, log_y: bool) -> Line:
    """The points of a series that can be drawn on the axes."""
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    band = None
    if series.y_low is not None and series.y_high is not None:
        band = (np.asarray(series.y_low, dtype=float), np.asarray(series.y_high, dtype=float))
    if len(set(map(len, (x, y, *(band or ()))))) > 1:
        raise ValueError(f"the arrays of series {series.name!r} differ in length")
    has_place = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
    return Line(x, y, band).at(has_place)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window of `window` points, fewer at the ends."""
    window = min(window, len(values))
    weights = np.ones(window)
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")


def thinned(line: Line) -> Line:
    """At most `MAX_POINTS` points: the lowest and the highest of each stretch, so that spikes
    survive."""
    if len(line.y) <= MAX_POINTS:
        return line
    extremes = []
    for stretch in np.array_split(np.arange(len(line.y)), MAX_POINTS // 2):
        y = line.y[stretch]
        extremes += [stretch[y.argmin()], stretch[y.argmax()]]
    return line.at(np.unique(extremes))


# ------------------------------------------------------------------------------------------ drawing


def _drawn(curves: Curves, lines: Sequence[Line]) -> str:
    """The chart as matplotlib writes it: lines, bands and the numbers of the axes, but no other
    text."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    # A fixed salt gives the same ids, and so the same bytes, each time. Text stays text, for the
    # page's own font.
    width, height = SIZE
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": "report", "svg.fonttype": "none", "font.size": 12.0}
    ):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        for index, line in enumerate(lines):
            _draw_line(axes, line, curves.smooth, _SERIES_INKS[index % COLOURS], _dash(index))
        for reference in curves.references:
            axes.axhline(reference.y, color=_INK, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)))

        # The limits of the axes are known only now that everything is drawn.
        axes.set_xscale("log" if curves.log_x else "linear")
        axes.set_yscale("log" if curves.log_y else "linear")
        for axis, is_log, count, (low, high) in (
            (axes.xaxis, curves.log_x, 6, axes.get_xlim()),
            (axes.yaxis, curves.log_y, 5, axes.get_ylim()),
        ):
            if is_log:
                # Within two decades, powers of ten alone would give one or two numbers.
                subs = (1, 2, 3, 5) if high < 100 * low else (1,)
                axis.set_major_locator(LogLocator(subs=subs))
            else:
                axis.set_major_locator(MaxNLocator(count, steps=STEPS))
            axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(FuncFormatter(lambda value, _: numbers.tick(value)))

        # Faint lines and no frame, so that the curves stand out.
        axes.tick_params(which="both", length=0, labelcolor=_INK)
        axes.grid(axis="y", color=_INK, alpha=0.14, linewidth=1)
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.spines["bottom"].set(color=_INK, alpha=0.5)
        axes.margins(x=0.01)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _draw_line(axes: Axes, line: Line, smooth: int, ink: str, dash: str) -> None:
    """Draw one series: the band, the raw line, the smoothed line over it."""
    marker = "o" if len(line.x) <= MARKED_POINTS else None
    thin = thinned(line)
    if thin.band is not None:
        axes.fill_between(thin.x, *thin.band, color=ink, alpha=0.15, linewidth=0)
    if smooth > 1 and len(line.x) > 1:
        axes.plot(thin.x, thin.y, color=ink, alpha=0.25, linewidth=1)
        thin = thinned(Line(line.x, moving_mean(line.y, smooth), None))
    axes.plot(
        thin.x, thin.y, color=ink, linewidth=1.75, linestyle=dash, marker=marker, markersize=4.5
    )


def _for_page(svg: str, prefix: str) -> Markup:
    """The inside of matplotlib's file for a page: colours and fonts from the style sheet, ids with
    `prefix`."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL
    )

    # A tenth of a pixel is fine enough for a path, and makes the page a good deal smaller.
    body = re.sub(r' d="[^"]*"', lambda match: re.sub(r"\.(\d)\d+", r".\1", match[0]), body)
    body = re.sub(r"font(-size|-family)?: [^;\"]*;? ?", "", body)

    # Several charts stand in one page, whose ids must differ.
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", body)
    body = re.sub(r"\s*\n\s*", "\n", body)

    # The colours of drawing stand for variables, which follow the reader's light or dark scheme.
    for index, ink in enumerate(_SERIES_INKS, start=1):
        body = body.replace(ink, f"var(--series-{index})")
    return Markup(body.replace(_INK, "currentColor"))
