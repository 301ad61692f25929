"""Pages as single HTML files: figures, tables, galleries and curves, all inline, without scripts.

    samples = Gallery([Card([Picture(pixels_HWC)], caption="a seven")])
    write_report(
        "report.html",
        Report(
            title="Digits",
            facts=[Fact("text to image", "97.4 %", "[96.3, 98.2], n = 1,000; aim 97 %", "good")],
            sections=[Section("Samples", blocks=[samples])],
        ),
    )

Python hands over data; the templates make the HTML and escape every string, since captions come
from data sets and models and are not trusted. The same report always gives the same bytes. Colours
are CSS variables, so that images, tables and charts follow the reader's light or dark scheme;
printing is always light.

    page      the parts of a report, and its page
    charts    curves as drawings
    numbers   how figures are written
    sample    the page of one training sample
    templates/blocks.html has the parts of both pages, templates/page.html what stands around them
"""

from cm3leon.evaluation.report.charts import Curves, ReferenceLine, Series, logged
from cm3leon.evaluation.report.page import (
    Card,
    Cell,
    Code,
    Content,
    Fact,
    Folded,
    Gallery,
    Link,
    Picture,
    Report,
    Section,
    Status,
    Strip,
    Table,
    Text,
    render,
    write_page,
    write_report,
)

__all__ = [
    "Card",
    "Cell",
    "Code",
    "Content",
    "Curves",
    "Fact",
    "Folded",
    "Gallery",
    "Link",
    "Picture",
    "ReferenceLine",
    "Report",
    "Section",
    "Series",
    "Status",
    "Strip",
    "Table",
    "Text",
    "logged",
    "render",
    "write_page",
    "write_report",
]
