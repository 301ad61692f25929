"""How fast scenes are drawn, and how often the parser reads true pictures wrong.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/scenes.py

A scene is read right if the parser finds its background and all of its things with all that they
are made of. Mistakes in true pictures bound what the scores of generated ones can say.
"""

from __future__ import annotations

import time

from cm3leon.plugins.scenes.parse import parse
from cm3leon.plugins.scenes.render import picture
from cm3leon.plugins.scenes.scores import Field, counted
from cm3leon.plugins.scenes.source import ScenesSource
from cm3leon.plugins.scenes.world import World, draw_scene

# All that a thing is made of.
FIELDS: tuple[Field, ...] = (
    "kind",
    "shape",
    "colour",
    "size",
    "texture",
    "word",
    "pose",
    "entity",
    "place",
)
SMALL = World(
    colours=["red", "green", "blue", "yellow", "purple", "cyan"],
    shapes=["circle", "square", "triangle", "cross"],
    sizes=["small", "large"],
    textures=["plain"],
    things=[1, 2],
    jitter=0.3,
    overlap=0,
    words=0,
    figures=0,
)
WORLDS = {
    "small: one or two plain shapes": (SMALL, (32, 48, 64)),
    "everything": (World(), (48, 64, 96, 128)),
    "3,000 entities": (World(entities=3000, entity_share=1.0), (32, 64)),
}
SCENES = 1000
"""Scenes that are read in each world and size."""
DRAWN = 10_000
"""Scenes that are drawn, with their captions, to measure the speed."""


def main() -> None:
    print("| world | side | scenes with caption/s | scenes read right ", end="")
    print("| things read right | of | scenes read/s |\n|---|---|---|---|---|---|---|")
    for name, (world, sides) in WORLDS.items():
        for side in sides:
            print(f"| {name} | {side} | {measure(world, side)} |", flush=True)


def measure(world: World, side: int) -> str:
    """The figures of a row, for pictures of `side` pixels."""
    source = ScenesSource(ScenesSource.Config(world=world, side=side))
    start = time.perf_counter()
    for seed in range(DRAWN):
        source.document(seed)
    drawn = DRAWN / (time.perf_counter() - start)

    # Reading is timed without drawing.
    scenes = [draw_scene(world, seed) for seed in range(SCENES)]
    pictures = [picture(scene, side) for scene in scenes]
    start = time.perf_counter()
    found = [parse(pixels_HWC, world) for pixels_HWC in pictures]
    read = SCENES / (time.perf_counter() - start)

    # Equal things of a scene are counted, so that each of them must be found.
    right = things = things_right = 0
    for scene, seen in zip(scenes, found, strict=True):
        expected, there = counted(scene, FIELDS), counted(seen, FIELDS)
        right += expected == there and scene.background == seen.background
        things += len(scene.things)
        things_right += sum((expected & there).values())
    return (
        f"{drawn:,.0f} | {right / SCENES:.1%} | {things_right / things:.2%} "
        f"| {things:,} | {read:,.0f}"
    )


if __name__ == "__main__":
    main()
