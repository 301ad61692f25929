"""Pictures of scenes, and everything that can be seen in them, exactly: boxes, depth, edges ...

A thing is a stamp, made once for every kind, colour and size: its colours times its cover, and the
share of the ground that shows through. A picture is made of stamps from back to front:

    canvas = canvas * (1 - cover) + colours * cover
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .world import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    LIMBS,
    SIZES,
    Scene,
    Thing,
    entity_look,
)

DARK = 0.55
"""Brightness of the second tone of a texture, as a share of the first."""
FINE = 4
"""Points per pixel and direction at which shapes are sampled, which smooths their edges."""
_CACHED = 2**14

# Letters of three by five pixels, row by row.
_FONT = {
    "A": "010101111101101", "B": "110101110101110", "C": "011100100100011", "D": "110101101101110",
    "E": "111100110100111", "F": "111100110100100", "G": "011100101101011", "H": "101101111101101",
    "I": "111010010010111", "J": "001001001101010", "K": "101101110101101", "L": "100100100100111",
    "M": "101111111101101", "N": "110101101101101", "O": "010101101101010", "P": "110101110100100",
    "Q": "010101101111011", "R": "110101110101101", "S": "011100010001110", "T": "111010010010010",
    "U": "101101101101111", "V": "101101101101010", "W": "101101111111101", "X": "101101010101101",
    "Y": "101101010010010", "Z": "111001010100111",
}  # fmt: skip


def picture(scene: Scene, side: int) -> np.ndarray:
    """Draw a scene: pixels (side, side, 3), uint8."""
    canvas_HWC = np.empty((side, side, 3), np.float32)
    canvas_HWC[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        coloured_HWC, rest_HW1 = stamp_of(thing, side)
        rows, columns, part = _region(thing, coloured_HWC.shape[0], side)
        canvas_HWC[rows, columns] *= rest_HW1[part]
        canvas_HWC[rows, columns] += coloured_HWC[part]
    canvas_HWC += 0.5
    return canvas_HWC.astype(np.uint8)


def owners(scene: Scene, side: int) -> np.ndarray:
    """The index of the nearest thing at each pixel (side, side); -1 for the background."""
    owner_HW = np.full((side, side), -1, np.int64)
    for number, thing in enumerate(scene.things):
        mask_HW = covered(thing, side)
        rows, columns, part = _region(thing, len(mask_HW), side)
        owner_HW[rows, columns][mask_HW[part]] = number
    return owner_HW


def boxes(scene: Scene, side: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each whole thing, hidden parts included; right and bottom lie
    just outside."""
    result = []
    for thing in scene.things:
        mask_HW = covered(thing, side)
        rows, columns, part = _region(thing, len(mask_HW), side)
        ys, xs = np.nonzero(mask_HW[part])
        left, top = int(columns.start + xs.min()), int(rows.start + ys.min())
        right, bottom = int(columns.start + xs.max()) + 1, int(rows.start + ys.max()) + 1
        result.append((left, top, right, bottom))
    return result


def depth(scene: Scene, side: int) -> np.ndarray:
    """How near each pixel is, (side, side), float32: 0 is the background, 1 the highest point of
    the nearest thing."""
    layers = len(scene.things)
    depth_HW = np.zeros((side, side), np.float32)
    for number, thing in enumerate(scene.things):
        mask_HW = covered(thing, side)
        rows, columns, part = _region(thing, len(mask_HW), side)
        lifted_HW = (number + 0.7 + 0.3 * _dome(len(mask_HW))) / layers
        depth_HW[rows, columns][mask_HW[part]] = lifted_HW[part][mask_HW[part]]
    return depth_HW


def normals(scene: Scene, side: int) -> np.ndarray:
    """Unit normals (side, side, 3) of things that bulge like domes; x points to the right, y down,
    and z to the eye."""
    normal_HWC = np.zeros((side, side, 3), np.float32)
    normal_HWC[..., 2] = 1
    for thing in scene.things:
        mask_HW = covered(thing, side)
        rows, columns, part = _region(thing, len(mask_HW), side)
        normal_HWC[rows, columns][mask_HW[part]] = _dome_normals(len(mask_HW))[part][mask_HW[part]]
    return normal_HWC


def edges(scene: Scene, side: int) -> np.ndarray:
    """Pixels (side, side), bool, that border on another thing above or to the left."""
    owner_HW = owners(scene, side)
    edge_HW = np.zeros((side, side), bool)
    edge_HW[1:] |= owner_HW[1:] != owner_HW[:-1]
    edge_HW[:, 1:] |= owner_HW[:, 1:] != owner_HW[:, :-1]
    return edge_HW


def covered(thing: Thing, side: int) -> np.ndarray:
    """The pixels of a thing's square that it covers by half or more, bool (S, S)."""
    return stamp_of(thing, side)[1][..., 0] <= 0.5


def stamp_of(thing: Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A thing's colours times its cover (S, S, 3), and the share of the ground that shows through
    (S, S, 1)."""
    return _stamp(*_look(thing), side)


def _look(thing: Thing) -> tuple[str, str, str, str]:
    """(kind, what, colour, size): everything that a thing's stamp depends on."""
    what = {
        "shape": f"{thing.shape} {thing.texture}",
        "word": thing.word,
        "figure": " ".join(map(str, thing.pose)),
        "entity": str(thing.entity),
    }[thing.kind]
    return thing.kind, what, thing.colour, thing.size


def _region(thing: Thing, size: int, side: int) -> tuple[slice, slice, tuple[slice, slice]]:
    """The rows and columns of the picture that a thing's square takes, and the square's part that
    lies inside of the picture."""
    top, left = (round(middle * side - size / 2) for middle in (thing.y, thing.x))
    bottom, right = min(top + size, side), min(left + size, side)
    inside = (slice(max(-top, 0), bottom - top), slice(max(-left, 0), right - left))
    return slice(max(top, 0), bottom), slice(max(left, 0), right), inside


@lru_cache(maxsize=_CACHED)
def _stamp(
    kind: str, what: str, colour: str, size: str, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The stamp of a thing, see `stamp_of`."""
    if kind == "entity":
        return _entity_stamp(int(what), side)

    # Shapes and figures are sampled at several points of a pixel, whose mean is its cover.
    pixels = max(3, round(SIZES[size] * side))
    tone = np.array(COLOURS[colour], np.float32)
    colour_SSC: np.ndarray = np.broadcast_to(tone, (pixels, pixels, 3))
    if kind == "shape":
        shape, texture = what.split()
        cover_SS = _averaged(_inside(shape, pixels * FINE))
        second_SS = _averaged(_second_tone(texture, pixels * FINE))[..., None]
        colour_SSC = tone * (1 - second_SS * (1 - DARK))
    elif kind == "word":
        cover_SS = _written(what, pixels)
    else:
        cover_SS = _averaged(_figure(tuple(map(int, what.split())), pixels * FINE))

    cover_SS1 = cover_SS[..., None]
    return colour_SSC * cover_SS1, 1 - cover_SS1


def _entity_stamp(number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The stamp of an entity, which fills the picture."""
    colours_CC3 = np.zeros((CELLS, CELLS, 3), np.float32)
    cover_CC1 = np.zeros((CELLS, CELLS, 1), np.float32)
    for cell, name in enumerate(entity_look(number)):
        if name is not None:
            colours_CC3[divmod(cell, CELLS)] = COLOURS[name]
            cover_CC1[divmod(cell, CELLS)] = 1

    # Each pixel shows the cell that it lies in.
    of_pixel = np.arange(side) * CELLS // side
    within = np.ix_(of_pixel, of_pixel)
    return (colours_CC3 * cover_CC1)[within], (1 - cover_CC1)[within]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates x and y of the points of a square, from -1 to 1, y downwards."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    return line[None, :].repeat(size, 0), line[:, None].repeat(size, 1)


def _averaged(fine_SS: np.ndarray) -> np.ndarray:
    """The means of squares of FINE x FINE points, one per pixel."""
    size = len(fine_SS) // FINE
    return fine_SS.reshape(size, FINE, size, FINE).mean((1, 3), dtype=np.float32)


def _inside(shape: str, size: int) -> np.ndarray:
    """The points of a square, `size` a side, that a shape covers."""
    x, y = _grid(size)
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "triangle":
        return (abs(x) <= (y + 1) / 2) & (y <= 0.9)
    if shape == "diamond":
        return abs(x) + abs(y) <= 1
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) <= 0.34
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.52)
    if shape == "star":
        angle = np.arctan2(x, -y)
        # How far a point is turned from the nearest tip, 0 to 36 degrees.
        turn = abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        inner = 0.42
        # The line from a tip, at distance 1, to a notch at distance `inner`, 36 degrees further.
        reach = inner * np.sin(np.pi / 5) / (np.sin(turn) * (1 - inner * np.cos(np.pi / 5))
                                             + inner * np.sin(np.pi / 5) * np.cos(turn))  # fmt: skip
        return radius <= reach
    x, y = 1.18 * x, -1.18 * y + 0.12  # a heart
    return (x**2 + y**2 - 0.72) ** 3 <= 1.1 * x**2 * y**3


def _second_tone(texture: str, size: int) -> np.ndarray:
    """The points of a square that have a texture's second tone."""
    x, y = _grid(size)
    if texture == "striped":
        return np.floor((x + y) * 2.5) % 2 == 0
    if texture == "checked":
        return (np.floor(x * 2.5 + 0.5) + np.floor(y * 2.5 + 0.5)) % 2 == 0
    if texture == "dotted":
        return np.hypot((x * 1.75) % 1 - 0.5, (y * 1.75) % 1 - 0.5) < 0.3
    return np.zeros((size, size), bool)


def _written(word: str, size: int) -> np.ndarray:
    """Write a word across a square, as large as whole pixels of its letters allow."""
    gap = np.zeros((5, 1), np.float32)
    parts = []
    for letter in word:
        parts += [np.array(list(_FONT[letter]), np.float32).reshape(5, 3), gap]
    row = np.concatenate(parts[:-1], 1)  # without the last gap

    # Letters are scaled to the width of the square, and stand in the middle of its height.
    scale = size / row.shape[1]
    columns = np.minimum((np.arange(size) / scale).astype(int), row.shape[1] - 1)
    height = max(5, round(5 * scale))
    rows = np.arange(height) * 5 // height
    cover_SS = np.zeros((size, size), np.float32)
    top = (size - min(height, size)) // 2
    cover_SS[top : top + height] = row[rows][:, columns][: size - top]
    return cover_SS


def joints(pose: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """The positions of a figure's joints, in a square from -1 to 1, y downwards."""
    result = {"head": (0.0, -0.72), "neck": (0.0, -0.45), "hips": (0.0, 0.15)}
    for limb, angle in zip(LIMBS, pose, strict=True):
        # Legs are longer than arms, and spread a third as wide.
        if "arm" in limb:
            start, length, spread = result["neck"], 0.62, np.radians(angle)
        else:
            start, length, spread = result["hips"], 0.8, np.radians(angle / 3)
        sideways = -1 if "left" in limb else 1
        x = start[0] + sideways * length * float(np.sin(spread))
        y = start[1] + length * float(np.cos(spread))
        result[limb] = (x, y)
    return result


BONES = (("neck", "hips"), *(("neck" if "arm" in limb else "hips", limb) for limb in LIMBS))


def _figure(pose: tuple[int, ...], size: int) -> np.ndarray:
    """The points of a square that a figure covers."""
    x, y = _grid(size)
    at = joints(pose)
    cover = np.hypot(x - at["head"][0], y - at["head"][1]) <= 0.26
    for first, second in BONES:
        cover |= segment_distance(x, y, at[first], at[second]) <= 0.13
    return cover


def segment_distance(
    x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]
) -> np.ndarray:
    """The distance of points to a line segment."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


@lru_cache(maxsize=256)
def _dome(size: int) -> np.ndarray:
    """The height of a dome over a square, from 0 to 1."""
    x, y = _grid(size)
    return np.sqrt(np.maximum(0, 1 - np.minimum(1, np.hypot(x, y)) ** 2)).astype(np.float32)


@lru_cache(maxsize=256)
def _dome_normals(size: int) -> np.ndarray:
    """The unit normals of such a dome, which flattens towards its rim."""
    x, y = _grid(size)
    flat = np.stack([0.8 * x, 0.8 * y], -1)
    flat /= np.maximum(1, np.linalg.norm(flat, axis=-1, keepdims=True) / 0.95)
    return np.concatenate([flat, np.sqrt(1 - (flat**2).sum(-1, keepdims=True))], -1).astype(
        np.float32
    )
