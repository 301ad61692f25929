"""Pages as single HTML files: figures, tables, galleries and curves, all inline, nothing fetched,
no script.

    write_report(
        "report.html",
        Report(
            title="Digits",
            facts=[Fact("text to image, no documents", "97.4 %", "[96.3, 98.2], n = 1,000; aim 97
            %", "good")], sections=[Section("Samples", blocks=[Gallery([Card([Picture(pixels_HWC)],
            caption="a seven")])])],
        ),
    )

Python hands over data, the templates make the HTML and escape every string: captions come from data
sets and from models, and are trusted with nothing. The same report renders to the same bytes.
Colours are CSS variables, so that pictures, tables and charts follow the reader's light or dark
scheme; printing is always light.

    page      what a report is made of, and its page
    charts    curves as drawings
    numbers   how figures are written
    sample    the page of one training sample
    templates/blocks.html is what both pages are made of, templates/page.html what stands around
    them
"""

from cm3leon.evaluation.report.charts import Curves, Reference, Series, logged
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
    "Reference",
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
