"""The documentation builds as a site without a warning, and its links lead somewhere.

Nothing of it is fetched from another server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from cm3leon.registry import REGISTRIES, discover

ROOT = Path(__file__).resolve().parent.parent
FETCHED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src")}
"""What a browser loads by itself, in contrast to what a reader may follow."""


class Page(HTMLParser):
    """The names on a page that can be linked to, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, str]] = []
        """The tag of each link, and where it leads."""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("href", "src") and value is not None:
                self.links.append((tag, value))


def problems(site: Path) -> list[str]:
    """Return the links of a built site that lead nowhere, and what it loads from other servers."""
    pages = {file: Page(file.read_text("utf-8")) for file in sorted(site.rglob("*.html"))}
    found = []

    for file, page in pages.items():
        for tag, link in page.links:
            where = f"{file.relative_to(site)}: {link}"
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                loaded = (tag, "href") in FETCHED or (tag, "src") in FETCHED
                if loaded or parts.scheme not in ("http", "https", "mailto"):
                    found.append(f"{where} is loaded from elsewhere")
                continue

            # The page for a path that is not there is served at any depth: its links begin at
            # the root.
            base = site if file.name == "404.html" else file.parent
            target = file
            if parts.path:
                target = (base / unquote(parts.path).lstrip("/")).resolve()
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{where} leads to no file")
            elif parts.fragment and target in pages:
                anchor = unquote(parts.fragment)
                if anchor not in pages[target].ids and not anchor.startswith("__"):
                    found.append(f"{where} leads to no place on its page")
    return found


def missing(site: Path) -> list[str]:
    """Return what a built site lacks of pages, headings, packages and components.

    What is private has no place on it, and is returned as well.
    """
    front = (site / "index.html").read_text()
    # In a block of commands, such a line is a comment.
    readme = (ROOT / "README.md").read_text()
    prose = re.sub(r"^```.*?^```$", "", readme, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    found = [heading for heading in headings if f">{heading}<" not in front]

    # Every page of docs, and one for every package but the plugins.
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs/tutorials").glob("*.py")]
    names = {str(file.relative_to(ROOT / "docs").with_suffix(".html")) for file in pages}
    packages = {file.parent.name for file in (ROOT / "cm3leon").glob("*/__init__.py")}
    names |= {f"reference/{name}.html" for name in packages - {"plugins"}}
    found += [name for name in sorted(names) if not (site / name).is_file()]

    # The reference documents every component that a registry has, and nothing private.
    documented: set[str] = set()
    for file in (site / "reference").glob("*.html"):
        documented |= {name for name in Page(file.read_text()).ids if name.startswith("cm3leon.")}
    found += [name for name in documented if re.search(r"\._", name)]

    discover()
    for registry in REGISTRIES:
        for name in registry.names():
            component = registry.get(name)
            path = f"{component.__module__}.{component.__qualname__}"
            if path.startswith("cm3leon.") and path not in documented:
                found.append(path)
    return found


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#there">1</a><a href="b.html#gone">2</a>'
        '<a href="c.html">3</a><a href="#top">4</a><a href="https://example.org">5</a>'
        '<script src="https://example.org/a.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')

    assert problems(tmp_path) == [
        "index.html: b.html#gone leads to no place on its page",
        "index.html: c.html leads to no file",
        "index.html: https://example.org/a.js is loaded from elsewhere",
    ]


def test_the_site_builds_without_a_warning(tmp_path: Path, registries: None) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "jupytext"):
        pytest.importorskip(package, reason="pip install 'cm3leon[docs]' brings what builds it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    site = tmp_path / "site"
    assert problems(site) == []
    assert missing(site) == []
