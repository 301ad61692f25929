"""What mkdocs adds to the pages in docs/: files of the repository's root, the tutorials, and a page
of reference for each package, made of its docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
}
"""Files of the root that belong to the site, and what they are called there."""


def packages() -> list[str]:
    """Return what has a page of reference: every package, and every plugin that ships."""
    folder = ROOT / "cm3leon"
    names = {file.parent.name for file in folder.glob("*/__init__.py")} - {"plugins"}
    plugins = sorted(file.parent.name for file in folder.glob("plugins/*/__init__.py"))
    return [*sorted(names), *(f"plugins.{name}" for name in plugins)]


def tutorials() -> list[Path]:
    """Return the notebooks, as the Python files that they are kept as."""
    return sorted((ROOT / "docs/tutorials").glob("*.py"))


def reference(name: str) -> str:
    """Return the page of a package; the page `cm3leon` has the modules that are in none."""
    if name != "cm3leon":
        return f"# {name}\n\n::: cm3leon.{name}\n    options: {{show_root_heading: false}}\n"
    alone = sorted(file.stem for file in (ROOT / "cm3leon").glob("*.py") if file.stem[0] != "_")
    return "# cm3leon\n\n" + "\n".join(f"::: cm3leon.{module}\n" for module in alone)


def as_page(notebook: Path) -> str:
    """Return a notebook as Markdown: its texts, and its code in blocks."""
    parts = []
    for cell in jupytext.read(notebook, fmt="py:percent").cells:
        block = cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        parts.append(block)
    parts.append(f"[This page as a notebook's source]({notebook.name}), for jupytext or Jupyter.")
    return "\n\n".join(parts) + "\n"


def moved(text: str) -> str:
    """Return a page of the root with its links as they are from inside docs/."""
    text = re.sub(r"\]\(docs/tutorials/(\w+)\.py\)", r"](tutorials/\1.md)", text)
    text = re.sub(r"\]\(docs/", "](", text)
    for file, page in BESIDE.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the two parts of the navigation that go by files."""
    for part in config.nav or []:
        if "Tutorials" in part:
            part["Tutorials"] = [f"tutorials/{file.stem}.md" for file in tutorials()]
        if "Reference" in part:
            part["Reference"] = [
                {name: f"reference/{name}.md"} for name in ["cm3leon", *packages()]
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {page: moved((ROOT / file).read_text("utf-8")) for file, page in BESIDE.items()}
    pages |= {f"reference/{name}.md": reference(name) for name in ["cm3leon", *packages()]}
    for notebook in tutorials():
        pages[f"tutorials/{notebook.stem}.md"] = as_page(notebook)

    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files
