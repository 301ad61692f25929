"""Pictures back to scenes: which things an image shows, read without any model.

Every thing that could be there is rendered and compared with what is seen:

    image           -> blobs, connected pixels of one colour that differ from the background
    each blob       -> the candidate (shape, size, texture, word, pose) that leaves the smallest
                       error when it is drawn over the blob
    all things      -> sorted from back to front, by whose colour is seen where two overlap

So the parser knows exactly what `picture` draws, and nothing else. Its error on true pictures, and
on those that went through an image tokenizer, bounds what any figure made with it can say; the
figures are in `docs/scenes.md`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from .render import DARK, covered, picture, stamp_of
from .world import (
    ANGLES,
    BACKGROUNDS,
    CELLS,
    COLOURS,
    LIMBS,
    SIZES,
    WORDS,
    Scene,
    Thing,
    World,
    entity_look,
)

# scipy.ndimage is imported where it is used: half a second, which each command would pay, since all
# load the plugins.

FAR = 70.0
"""Distance in RGB from the background's colour at which a pixel belongs to a thing."""
SHARE = 0.06
"""Share of a blob's pixels at which a colour is that of another thing."""
LEAST = 0.18
"""A blob with fewer pixels than this share of the smallest thing's square is no thing."""

SPECK = 4
"""Fewer connected pixels than this are noise."""
GOOD = 0.1
"""A thing that leaves less than this share of a blob unexplained is accepted at once."""


def parse(image_HWC: np.ndarray, world: World) -> Scene:
    """Find the scene that an image (H, W, 3), uint8, with H = W, most likely shows."""
    side = len(image_HWC)
    pixels_HWC = image_HWC.astype(np.float32)
    background = _background(pixels_HWC, tuple(world.backgrounds))
    # An entity fills nearly the whole picture, other things never do.
    if world.entity_share and _coloured_share(pixels_HWC, background) > 0.6:
        return Scene(background, (_entity(pixels_HWC, background, world),))

    found: list[Thing] = []
    for blob in _blobs(pixels_HWC, background, world):
        found += _things(blob, pixels_HWC, background, world)
    return Scene(background, _from_back_to_front(found, pixels_HWC, side))


def _colours(names: tuple[str, ...], table: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """The colours of these names (K, 3)."""
    return np.array([table[name] for name in names], np.float32)


def _background(pixels_HWC: np.ndarray, names: tuple[str, ...]) -> str:
    """The background's colour: the one that most pixels are close to, or else nearest to."""
    which_HW, distance_HW = _which(pixels_HWC, _colours(names, BACKGROUNDS))
    close = np.bincount(which_HW[distance_HW < FAR], minlength=len(names))
    counts = close if close.any() else np.bincount(which_HW.ravel(), minlength=len(names))
    return names[int(counts.argmax())]


def _which(pixels_HWC: np.ndarray, colours_KC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each pixel's nearest colour (H, W), and the distance to it (H, W)."""
    distance_KHW = np.stack([np.linalg.norm(pixels_HWC - colour, axis=-1) for colour in colours_KC])
    return distance_KHW.argmin(0), distance_KHW.min(0)


def _coloured_share(pixels_HWC: np.ndarray, background: str) -> float:
    """The share of pixels that belong to things."""
    ground = np.array(BACKGROUNDS[background], np.float32)
    return float((np.linalg.norm(pixels_HWC - ground, axis=-1) > FAR).mean())


class _Blob(NamedTuple):
    """Pixels that may be one thing."""

    mask_HW: np.ndarray
    colour: str
    others_HW: np.ndarray
    """The pixels of other things."""


def _blobs(pixels_HWC: np.ndarray, background: str, world: World) -> list[_Blob]:
    """Find connected pixels that differ from the background, split by colour where things touch."""
    from scipy import ndimage

    side = len(pixels_HWC)
    ground = np.array(BACKGROUNDS[background], np.float32)
    # Pixels that differ from the background, without specks of noise.
    thing_HW = np.linalg.norm(pixels_HWC - ground, axis=-1) > FAR
    specks_HW, _ = ndimage.label(thing_HW, np.ones((3, 3)))
    thing_HW &= np.bincount(specks_HW.ravel())[specks_HW] >= SPECK

    # Pixels close to each other are connected, so that the letters of a word are one blob.
    near = max(1, round(side / 40))
    joined_HW = ndimage.binary_dilation(thing_HW, np.ones((2 * near + 1,) * 2))
    labels_HW, count = ndimage.label(joined_HW)

    # Each colour comes in two tones, of which textures use the darker one.
    names = tuple(world.colours)
    tones = np.concatenate([_colours(names, COLOURS), DARK * _colours(names, COLOURS)])
    tone_HW, distance_HW = _which(pixels_HWC, tones)
    colour_HW = tone_HW % len(names)

    least = _least(side)
    parts: list[tuple[np.ndarray, str]] = []
    for label in range(1, count + 1):
        blob_HW = thing_HW & (labels_HW == label)
        if blob_HW.sum() < least:
            continue
        # Blends at the rim look like other colours, so only pixels close to a tone vote.
        votes = np.bincount(colour_HW[blob_HW & (distance_HW < 45)], minlength=len(names))
        if not votes.sum():
            votes = np.bincount(colour_HW[blob_HW], minlength=len(names))

        # A colour with enough votes is a thing of its own; every pixel goes to the nearest of them.
        main: list[int] = np.flatnonzero(votes >= max(SHARE * votes.sum(), least)).tolist()
        if not main:
            main = [int(votes.argmax())]
        chosen = np.array([*main, *(number + len(names) for number in main)])
        part_HW = np.array(main)[_which(pixels_HWC, tones[chosen])[0] % len(main)]
        for number in main:
            parts.append((blob_HW & (part_HW == number), names[number]))

    everything_HW = np.zeros((side, side), bool)
    for mask_HW, _ in parts:
        everything_HW |= mask_HW
    return [_Blob(mask_HW, colour, everything_HW & ~mask_HW) for mask_HW, colour in parts]


def _least(side: int) -> float:
    """The fewest pixels of a thing."""
    return LEAST * (SIZES["small"] * side) ** 2


@lru_cache(maxsize=64)
def _candidates(
    shapes: tuple[str, ...],
    sizes: tuple[str, ...],
    textures: tuple[str, ...],
    words: bool,
    figures: bool,
) -> tuple[Thing, ...]:
    """Everything that a thing can be, apart from its colour and position."""
    base = Thing("shape", "", "", 0.5, 0.5)
    found = []
    for shape, size, texture in product(shapes, sizes, textures):
        found.append(replace(base, shape=shape, size=size, texture=texture))
    if words:
        for word, size in product(WORDS, sizes):
            found.append(replace(base, kind="word", word=word, size=size))
    if figures:
        # Figures are drawn in the largest size only, see `draw_thing`.
        largest = max(sizes, key=SIZES.__getitem__)
        for pose in product(ANGLES, repeat=len(LIMBS)):
            found.append(replace(base, kind="figure", size=largest, pose=pose))
    return tuple(found)


class _Stamps(NamedTuple):
    """Candidates of one size and colour, with their pictures."""

    things: tuple[Thing, ...]
    coloured_NSSC: np.ndarray
    rest_NSS1: np.ndarray
    box_N4: np.ndarray
    """(top, left, bottom, right) of the pixels that each candidate covers."""


@lru_cache(maxsize=4096)
def _stamps(candidates: tuple[Thing, ...], colour: str, side: int) -> tuple[_Stamps, ...]:
    """The pictures of candidates in a colour, grouped by size."""
    # Pictures of one size make one array, by which all of them are compared at once.
    by_size: dict[int, list[Thing]] = {}
    for thing in candidates:
        coloured = replace(thing, colour=colour)
        by_size.setdefault(len(covered(coloured, side)), []).append(coloured)

    result = []
    for things in by_size.values():
        pictures, rests, boxes = [], [], []
        for thing in things:
            coloured_SSC, rest_SS1 = stamp_of(thing, side)
            pictures.append(np.broadcast_to(coloured_SSC, (*rest_SS1.shape[:2], 3)))
            rests.append(rest_SS1)
            ys, xs = np.nonzero(covered(thing, side))
            boxes.append((ys.min(), xs.min(), ys.max() + 1, xs.max() + 1))
        result.append(_Stamps(tuple(things), np.stack(pictures), np.stack(rests), np.array(boxes)))
    return tuple(result)


def _things(blob: _Blob, pixels_HWC: np.ndarray, background: str, world: World) -> list[Thing]:
    """The thing that explains a blob, or one for each of its parts if that explains it better."""
    from scipy import ndimage

    if not blob.mask_HW.any():
        return []
    together = _thing(blob, pixels_HWC, background, world)

    # Letters apart from each other make one word, but may also be two things of the same colour.
    labels_HW, count = ndimage.label(blob.mask_HW, np.ones((3, 3)))
    masks = []
    for label in range(1, count + 1):
        mask_HW = labels_HW == label
        if mask_HW.sum() >= _least(len(pixels_HWC)):
            masks.append(mask_HW)
    if together.error < GOOD or len(masks) < 2:
        return [together.thing]

    # To each part, the rest of the blob is another thing.
    parts = []
    for mask_HW in masks:
        others_HW = blob.others_HW | (blob.mask_HW & ~mask_HW)
        part = _Blob(mask_HW, blob.colour, others_HW)
        parts.append(_thing(part, pixels_HWC, background, world))

    if max(part.error for part in parts) < together.error:
        return [part.thing for part in parts]
    return [together.thing]


class _Fit(NamedTuple):
    """A candidate at its position, and the share of the picture's difference from the background
    that it leaves unexplained."""

    thing: Thing
    error: float


def _thing(blob: _Blob, pixels_HWC: np.ndarray, background: str, world: World) -> _Fit:
    """Find the candidate that explains a blob best."""
    from scipy import ndimage

    side = len(pixels_HWC)
    ys, xs = np.nonzero(blob.mask_HW)
    candidates = _candidates(
        tuple(world.shapes),
        tuple(world.sizes),
        tuple(world.textures),
        world.words > 0,
        world.figures > 0,
    )

    centre_2 = np.array([ys.min() + ys.max() + 1, xs.min() + xs.max() + 1]) / 2
    ground = np.array(BACKGROUNDS[background], np.float32)
    # A thing that touches others may be hidden in part, and its blob off its centre.
    hidden = bool((ndimage.binary_dilation(blob.mask_HW, iterations=2) & blob.others_HW).any())

    best: tuple[float, Thing] | None = None
    for stamps in _stamps(candidates, blob.colour, side):
        size = stamps.coloured_NSSC.shape[1]
        # A candidate's box lies on that of the blob, or near it if other things hide a part.
        reach = max(2, size // 2) if hidden else 1
        middle_N2 = (stamps.box_N4[:, :2] + stamps.box_N4[:, 2:]) / 2
        corner_N2 = np.rint(centre_2 - middle_N2).astype(int)
        low_2, high_2 = corner_N2.min(0) - reach, corner_N2.max(0) + reach + 1
        score_NYX = _scores(stamps, pixels_HWC, blob.others_HW, ground, low_2, high_2)

        # All candidates are compared over a common range of corners, each within its own reach.
        at_2YX = low_2[:, None, None] + np.indices(score_NYX.shape[1:])
        beyond_NYX = (abs(at_2YX[None] - corner_N2[:, :, None, None]) > reach).any(1)
        score_NYX = np.where(beyond_NYX, np.inf, score_NYX)
        number, y, x = np.unravel_index(int(score_NYX.argmin()), score_NYX.shape)
        score = float(score_NYX[number, y, x])
        if best is None or score < best[0]:
            top, left = int(low_2[0]) + int(y), int(low_2[1]) + int(x)
            thing = stamps.things[int(number)]
            best = score, replace(thing, x=(left + size / 2) / side, y=(top + size / 2) / side)

    if best is None:
        raise ValueError("there is no candidate to compare with")
    seen = float((((pixels_HWC - ground) * ~blob.others_HW[..., None]) ** 2).sum())
    return _Fit(best[1], best[0] / seen)


def _scores(
    stamps: _Stamps,
    pixels_HWC: np.ndarray,
    others_HW: np.ndarray,
    ground_C: np.ndarray,
    low_2: np.ndarray,
    high_2: np.ndarray,
) -> np.ndarray:
    """Squared errors (N, Y, X) of the whole picture, other things left out, for each candidate at
    each corner."""
    side, size = len(pixels_HWC), stamps.coloured_NSSC.shape[1]
    before_2, after_2 = np.maximum(-low_2, 0), np.maximum(high_2 - 1 + size - side, 0)
    frame = tuple((int(b), int(a)) for b, a in zip(before_2, after_2, strict=True))

    # Everything is relative to the ground, which is what remains without a candidate. Pixels of
    # other things count for nothing.
    seen_HWC = np.pad((pixels_HWC - ground_C) * ~others_HW[..., None], (*frame, (0, 0)))
    counts_HW = np.pad((~others_HW).astype(np.float32), frame, constant_values=1)
    top, left = low_2 + before_2
    bottom, right = high_2 - 1 + size + before_2
    seen_YXSSC = _windows(seen_HWC[top:bottom, left:right], size)
    counts_YXSS = _windows(counts_HW[top:bottom, left:right], size)

    # The sum of (expected - seen)^2 is expanded, so that it takes two matrix products.
    Y, X = counts_YXSS.shape[:2]
    expected_NSSC = stamps.coloured_NSSC - (1 - stamps.rest_NSS1) * ground_C
    N = len(expected_NSSC)
    squared_NK = (expected_NSSC**2).sum(-1).reshape(N, -1) @ counts_YXSS.reshape(Y * X, -1).T
    product_NK = expected_NSSC.reshape(N, -1) @ seen_YXSSC.reshape(Y * X, -1).T
    return (squared_NK - 2 * product_NK).reshape(N, Y, X) + float((seen_HWC**2).sum())


def _windows(image_HWx: np.ndarray, size: int) -> np.ndarray:
    """Every square of an image: (Y, X, size, size, ...)."""
    windows = np.lib.stride_tricks.sliding_window_view(image_HWx, (size, size), axis=(0, 1))
    return np.moveaxis(windows, 2, -1) if image_HWx.ndim == 3 else windows


def _from_back_to_front(
    things: list[Thing], pixels_HWC: np.ndarray, side: int
) -> tuple[Thing, ...]:
    """Sort things in the order in which they hide each other."""
    # Noise has dozens of things and a thousand pairs, so what belongs to one thing or one colour
    # is computed once.
    masks_THW = [_mask(thing, side) for thing in things]
    distances = {thing.colour: _distances_to(thing.colour, pixels_HWC) for thing in things}

    order = list(things)
    for i, j in combinations(range(len(things)), 2):
        # Where both could be seen, the nearer one's colour is seen.
        both_HW = masks_THW[i] & masks_THW[j]
        if both_HW.sum() < 3:
            continue
        nearer, farther = things[j], things[i]
        of_first, of_second = (_closest(distances[things[n].colour], both_HW) for n in (i, j))
        if of_first < of_second:
            nearer, farther = farther, nearer
        if order.index(nearer) < order.index(farther):
            order.remove(nearer)
            order.insert(order.index(farther) + 1, nearer)
    return tuple(order)


def _distances_to(colour: str, pixels_HWC: np.ndarray) -> list[np.ndarray]:
    """The distances (H, W) of pixels to a colour's two tones and to their middle."""
    tone = np.array(COLOURS[colour], np.float32)
    shades = (1, (1 + DARK) / 2, DARK)
    return [np.linalg.norm(pixels_HWC - tone * shade, axis=-1) for shade in shades]


def _closest(distances_HW: list[np.ndarray], seen_HW: np.ndarray) -> float:
    """The mean of the distances where a mask is set, of the tone that is closest there."""
    return min(float(distance_HW[seen_HW].mean()) for distance_HW in distances_HW)


def _mask(thing: Thing, side: int) -> np.ndarray:
    """The pixels that a thing changes."""
    ground = Scene("white", ())
    blank_HWC, drawn_HWC = picture(ground, side), picture(Scene("white", (thing,)), side)
    return (blank_HWC != drawn_HWC).any(-1)


# --------------------------------------------------------------------------------------- entities


def _entity(pixels_HWC: np.ndarray, background: str, world: World) -> Thing:
    """The entity whose look is nearest to the colours of the cells."""
    look = cells_of(pixels_HWC, background)
    distance_N = (_looks(world.entities) != look).sum(1)
    return Thing("entity", "", "", 0.5, 0.5, entity=int(distance_N.argmin()))


def cells_of(pixels_HWC: np.ndarray, background: str) -> np.ndarray:
    """The index of the colour that each of an entity's cells shows, -1 for the background:
    (CELLS * CELLS,)."""
    side = len(pixels_HWC)
    edges = np.arange(CELLS + 1) * side // CELLS
    palette = np.concatenate(
        [_colours(tuple(COLOURS), COLOURS), _colours((background,), BACKGROUNDS)]
    )
    result = []
    for row, column in product(range(CELLS), repeat=2):
        cell_HWC = pixels_HWC[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        number = int(np.linalg.norm(palette - np.median(cell_HWC, axis=(0, 1)), axis=-1).argmin())
        result.append(-1 if number == len(COLOURS) else number)
    return np.array(result)


@lru_cache(maxsize=4)
def _looks(count: int) -> np.ndarray:
    """The looks of all entities, with indices as in `cells_of`: (count, CELLS * CELLS)."""
    numbers = {name: number for number, name in enumerate(COLOURS)}
    looks = []
    for entity in range(count):
        looks.append([numbers[name] if name else -1 for name in entity_look(entity)])
    return np.array(looks)
