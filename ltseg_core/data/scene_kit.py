"""What the embedded scenes are made of: the table of classes, their sprites and textures, exact arithmetic.

Everything here is the same on every machine: random numbers are PCG64 doubles, and the arithmetic is
+ - * / and square roots, which IEEE 754 rounds exactly (no pow, exp or sin, no sums over floats).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

SKY, ROAD, BUILDING, VEGETATION, TERRAIN, SIDEWALK = range(6)
SMOOTH, CLOUDS, LEAVES, BRICK, ASPHALT, GRASS, PAVING = range(7)  # textures; from ASPHALT on they lie flat
CELLS = 48  # side of a sprite
TILE = 256  # side of a texture
POWER_TOLERANCE = 1e-7
RGB = tuple[int, int, int]


class Sprite(NamedTuple):
    """A small picture of an object."""

    slots: np.ndarray  # (CELLS, CELLS) uint16: slot 1 to 4 of the colour table, 0 outside
    aspect: float  # width / height
    fill: float  # share of the box that is not 0


class Stuff(NamedTuple):
    """A class without instances, e.g. road."""

    name: str
    presence: float  # share of the images
    colours: tuple[RGB, ...]  # one is drawn for each image, or each building
    texture: int
    amplitude: float  # of the texture, in grey levels


class Thing(NamedTuple):
    """A class of countable objects, e.g. car."""

    name: str
    commonness: int  # order by image frequency; the order of the table is that by pixel frequency
    metres: float  # height of the object
    home: int  # the stuff it stands on
    twin: int  # the stuff whose colour and texture it takes over with `shared_texture`
    colours: tuple[RGB, ...]  # of slot 1
    second: RGB  # of slot 4; slot 2 is dark, slot 3 bright
    views: tuple[str, ...]  # "width/height: shape; shape; …", see `_sprite`


STUFF = (
    Stuff("sky", 1.0, ((96, 156, 228), (130, 175, 228), (168, 186, 208), (205, 165, 150)), CLOUDS, 16),
    Stuff("road", 1.0, ((92, 92, 98), (108, 104, 102), (78, 80, 88)), ASPHALT, 16),
    Stuff("building", 0.85, ((158, 92, 70), (186, 166, 138), (136, 136, 142), (206, 182, 132), (120, 88, 80)),
          BRICK, 15),
    Stuff("vegetation", 1.0, ((58, 102, 40), (78, 118, 44), (40, 84, 46), (124, 104, 36)), LEAVES, 30),
    Stuff("terrain", 1.0, ((110, 148, 58), (140, 146, 70), (160, 138, 92), (92, 134, 54)), GRASS, 22),
    Stuff("sidewalk", 0.75, ((164, 160, 154), (178, 166, 148), (150, 150, 156)), PAVING, 20),
)  # fmt: skip
THINGS = (
    Thing("car", 0, 1.5, ROAD, ROAD,
          ((190, 30, 30), (30, 70, 160), (205, 205, 210), (50, 52, 58), (210, 170, 40)), (60, 60, 66),
          ("2.2: r1 0 42 100 82; e1 48 42 34 38; e2 48 42 28 30; r1 0 42 100 72; r1 45 8 51 50; e2 20 82 12 18; "
           "e2 80 82 12 18; r3 94 48 100 60; r3 0 48 5 58",
           "1.2: r2 8 80 26 100; r2 74 80 92 100; r1 2 40 98 88; e1 50 40 40 38; e2 50 40 32 28; r1 2 42 98 70; "
           "r3 6 48 24 60; r3 76 48 94 60; r4 30 66 70 76")),
    Thing("person", 1, 1.75, SIDEWALK, BUILDING, ((200, 50, 50), (50, 80, 170), (225, 200, 70), (70, 50, 80)),
          (215, 165, 135),
          ("0.4: l2 38 55 32 98 19; l2 62 55 68 98 19; r1 24 20 76 58; l1 20 25 10 54 13; l1 80 25 90 54 13; "
           "e4 50 10 26 11",
           "0.46: l2 48 55 18 98 17; l2 52 55 84 98 17; r1 30 20 70 58; l1 40 25 14 50 11; l1 60 25 86 48 11; "
           "e4 52 10 23 11")),
    Thing("fence", 3, 1.3, TERRAIN, VEGETATION, ((140, 92, 52), (205, 200, 190), (96, 84, 74)), (90, 70, 50),
          ("4: r1 0 20 100 34; r1 0 62 100 76; " + "; ".join(f"r1 {x} 0 {x + 8} 100" for x in range(2, 100, 13)),)),
    Thing("pole", 2, 6.0, SIDEWALK, BUILDING, ((96, 98, 104), (60, 70, 66), (150, 146, 138)), (60, 60, 64),
          ("0.09: r1 32 5 72 100; r2 15 90 85 100; r3 0 0 100 5",
           "0.2: r1 40 2 58 100; r1 40 2 100 6; r3 74 4 100 10")),
    Thing("sign", 4, 2.6, SIDEWALK, BUILDING, ((205, 30, 36), (30, 90, 190), (235, 190, 30)), (120, 120, 124),
          ("0.36: r4 42 30 58 100; e3 50 20 50 20; e1 50 20 40 15; r3 24 17 76 23",
           "0.42: r4 43 30 57 100; t3 50 0 50 38; t1 50 8 36 34")),
    Thing("bicycle", 5, 1.1, SIDEWALK, ROAD, ((190, 50, 40), (30, 120, 130), (50, 50, 56)), (60, 60, 66),
          ("1.6: e2 22 68 22 32; e0 22 68 14 21; e2 78 68 22 32; e0 78 68 14 21; l1 22 68 42 30 8; l1 42 30 70 30 8; "
           "l1 78 68 70 14 8; l1 50 68 70 30 8; l1 22 68 50 68 8; l1 42 30 50 68 8; l2 34 22 48 22 10; "
           "l2 64 12 80 12 10",)),
    Thing("bus", 6, 3.1, ROAD, BUILDING, ((205, 50, 40), (225, 150, 30), (50, 100, 170)), (60, 60, 66),
          ("1.9: r1 0 0 100 88; r2 5 16 30 46; r2 34 16 62 46; r2 66 16 95 46; e2 22 88 9 12; e2 78 88 9 12; "
           "r3 0 58 100 64",
           "0.85: r2 6 84 24 100; r2 76 84 94 100; r1 0 0 100 92; r2 8 14 92 54; r3 6 72 24 80; r3 76 72 94 80")),
    Thing("bench", 8, 0.9, TERRAIN, BUILDING, ((150, 90, 44), (110, 76, 52)), (70, 70, 72),
          ("1.9: r1 0 0 100 14; r1 0 22 100 36; r1 0 52 100 66; r4 8 30 16 100; r4 84 30 92 100",)),
    Thing("dog", 9, 0.7, TERRAIN, TERRAIN, ((124, 80, 44), (50, 44, 42), (215, 190, 150)), (50, 42, 40),
          ("1.4: e1 46 45 34 20; e1 84 26 16 18; r1 16 50 26 100; r1 66 50 76 100; l1 14 40 4 12 8; r4 78 4 86 20",)),
    Thing("bin", 7, 1.0, SIDEWALK, VEGETATION, ((40, 100, 64), (50, 80, 130), (70, 70, 74)), (50, 50, 54),
          ("0.6: r1 10 16 90 100; r2 0 4 100 18; r4 10 50 90 56",)),
    Thing("bird", 11, 1.2, SKY, BUILDING, ((50, 48, 54), (235, 235, 235), (96, 86, 80)), (215, 150, 40),
          ("2.2: e1 50 62 16 20; l1 50 62 12 20 16; l1 50 62 88 20 16; l1 12 20 2 34 12; l1 88 20 98 34 12; "
           "e4 66 66 8 8",)),
    Thing("cone", 10, 0.8, ROAD, BUILDING, ((235, 95, 25), (240, 125, 40)), (60, 60, 64),
          ("0.8: t1 50 0 42 92; r3 22 44 78 60; t0 0 -50 50 130; t0 100 -50 50 130; r4 0 88 100 100",)),
    Thing("hydrant", 12, 0.9, SIDEWALK, BUILDING, ((205, 40, 36), (225, 175, 30)), (120, 40, 40),
          ("0.6: r1 24 24 76 100; e1 50 22 30 20; r4 0 44 100 60; r4 12 92 88 100",)),
    Thing("mailbox", 13, 1.2, SIDEWALK, SKY, ((40, 76, 165), (225, 175, 30)), (80, 80, 84),
          ("0.55: e1 50 22 50 22; r1 0 22 100 68; r4 40 68 60 100; r2 16 32 84 40",)),
    Thing("tent", 15, 2.0, TERRAIN, TERRAIN, ((215, 105, 35), (40, 110, 150), (180, 50, 80)), (60, 50, 50),
          ("1.5: t1 50 0 50 100; t2 50 45 16 100",)),
    Thing("balloon", 14, 3.0, SKY, BUILDING, ((215, 45, 45), (230, 185, 40), (50, 110, 195)), (120, 80, 50),
          ("0.75: e1 50 36 50 36; e3 50 36 16 36; l4 34 66 42 88 4; l4 66 66 58 88 4; r4 36 84 64 100",)),
    Thing("barrel", 16, 1.0, TERRAIN, ROAD, ((160, 90, 40), (55, 100, 140)), (50, 48, 50),
          ("0.7: r1 8 10 92 92; e1 50 90 42 10; e4 50 10 42 10; r2 8 36 92 42; r2 8 64 92 70",)),
    Thing("kite", 17, 1.6, SKY, VEGETATION, ((230, 50, 80), (240, 195, 40), (90, 50, 165)), (230, 230, 230),
          ("0.8: t1 50 0 50 34; t1 50 72 50 34; l4 50 72 40 100 5; r3 47 0 53 72",)),
)  # fmt: skip
PALETTE = (
    (86, 180, 233), (78, 78, 90), (204, 121, 167), (0, 110, 70), (178, 212, 106), (205, 205, 210),
    (0, 80, 178), (213, 94, 0), (122, 74, 40), (250, 236, 80), (240, 165, 0), (120, 10, 70),
    (160, 20, 20), (0, 190, 190), (255, 170, 170), (70, 130, 20), (30, 20, 120), (255, 120, 60),
    (230, 30, 130), (130, 110, 230), (0, 60, 60), (190, 60, 230), (150, 140, 60), (255, 215, 180),
)  # fmt: skip


@functools.cache
def tiles() -> np.ndarray:
    """The textures, (7, TILE, TILE) float32 in [-1, 1], without seams."""
    rng = stream(0)
    y, x = np.arange(TILE)[:, None], np.arange(TILE)
    tiles = np.empty((7, TILE, TILE), np.float32)
    tiles[SMOOTH] = 0.5 * _noise(rng, 2, 2) + 0.5 * _noise(rng, 1, 1)
    tiles[CLOUDS] = 0.55 * _noise(rng, 16, 64) + 0.3 * _noise(rng, 8, 32) + 0.15 * _noise(rng, 4, 8)
    tiles[LEAVES] = 0.6 * _noise(rng, 8, 8) + 0.4 * _noise(rng, 2, 2)
    tiles[BRICK] = 0.5 * _noise(rng, 4, 8) + np.where((y % 4 == 0) | ((x + (y // 4 % 2) * 4) % 8 == 0), -0.5, 0.3)
    tiles[ASPHALT] = 0.7 * _noise(rng, 1, 1) + 0.3 * _noise(rng, 32, 8)
    tiles[GRASS] = 0.5 * _noise(rng, 4, 2) + 0.5 * _noise(rng, 16, 16)
    tiles[PAVING] = 0.4 * _noise(rng, 2, 2) + np.where((y % 8 == 0) | (x % 8 == 0), -0.6, 0.2)
    return tiles


def _noise(rng: Generator, dy: int, dx: int) -> np.ndarray:
    """Random values in [-1, 1] on a lattice of dy x dx pixels, bilinear in between, (TILE, TILE) float32."""
    grid = 2 * rng.random((TILE // dy, TILE // dx)) - 1
    for axis, step in ((0, dy), (1, dx)):
        t = (np.arange(step) / step).reshape((-1, 1) if axis == 0 else (-1,))
        a, b = np.expand_dims(grid, axis + 1), np.expand_dims(np.roll(grid, -1, axis), axis + 1)
        grid = (a * (1 - t) + b * t).reshape((TILE, -1) if axis == 0 else (TILE, TILE))
    return grid.astype(np.float32)


@functools.cache
def sprites() -> tuple[tuple[Sprite, ...], ...]:
    """The views of each thing."""
    return tuple(tuple(_sprite(view) for view in thing.views) for thing in THINGS)


@functools.cache
def disc() -> np.ndarray:
    """A filled circle, (CELLS, CELLS) uint16."""
    return _sprite("1: e1 50 50 50 50").slots


@functools.cache
def tree_sprites() -> tuple[np.ndarray, ...]:
    """Crowns (slot 1, in the shade 2) on trunks (slot 3): broad-leaved trees, conifers and a bush."""
    rng, trees = stream(1), []
    y, x = (np.arange(CELLS)[:, None] + 0.5) / CELLS, (np.arange(CELLS) + 0.5) / CELLS
    for kind in range(9):
        rough = _noise(rng, 8, 8)[:CELLS, :CELLS] + 0.5 * _noise(rng, 4, 4)[:CELLS, :CELLS]
        if kind < 5:  # broad-leaved
            crown = ((x - 0.5) / 0.46) ** 2 + ((y - 0.36) / 0.37) ** 2 + 0.4 * rough < 1
        elif kind < 7:  # conifer
            tier = 0.7 + 0.3 * (y * 5 - np.floor(y * 5))
            crown = (np.abs(x - 0.5) < 0.06 + 0.42 * y * tier + 0.04 * rough) & (y < 0.88)
        else:  # bush
            crown = ((x - 0.5) / 0.5) ** 2 + ((y - 1) / 0.95) ** 2 + 0.4 * rough < 1
        trunk = (np.abs(x - 0.5) < 0.05) & (y > 0.5)
        shade = (x - 0.45) + 0.8 * (y - 0.4) + 0.25 * rough > 0.12
        trees.append(np.where(crown, np.where(shade, 2, 1), np.where(trunk, 3, 0)).astype(np.uint16))
    return tuple(trees)


def _sprite(view: str) -> Sprite:
    """Rasterise "width/height: shape; shape; …". A shape is a letter, the slot it paints (0 erases) and numbers
    in percent of the box: r x0 y0 x1 y1 (rectangle), e x y rx ry (ellipse), l x0 y0 x1 y1 width (line),
    t x y half base (triangle with its tip at x, y and 2 * half wide at the height `base`).
    """
    y, x = (np.arange(CELLS)[:, None] + 0.5) * (100 / CELLS), (np.arange(CELLS) + 0.5) * (100 / CELLS)
    slots = np.zeros((CELLS, CELLS), np.uint16)
    aspect, shapes = view.split(": ")
    for shape in shapes.split("; "):
        head, *numbers = shape.split()
        v = [float(number) for number in numbers]
        if head[0] == "r":
            inside = (x >= v[0]) & (x < v[2]) & (y >= v[1]) & (y < v[3])
        elif head[0] == "e":
            inside = ((x - v[0]) / v[2]) ** 2 + ((y - v[1]) / v[3]) ** 2 <= 1
        elif head[0] == "t":
            down = (y - v[1]) / (v[3] - v[1])
            inside = (down >= 0) & (down < 1) & (np.abs(x - v[0]) <= v[2] * down)
        else:
            ex, ey = v[2] - v[0], v[3] - v[1]
            t = np.clip(((x - v[0]) * ex + (y - v[1]) * ey) / (ex * ex + ey * ey), 0, 1)
            inside = (x - v[0] - t * ex) ** 2 + (y - v[1] - t * ey) ** 2 <= v[4] * v[4] / 4
        slots[inside] = int(head[1])
    return Sprite(slots, float(aspect), np.count_nonzero(slots) / slots.size)


def stream(*key: int) -> Generator:
    """The random numbers that belong to a key, such as (seed, split, purpose, image, attempt)."""
    return Generator(PCG64(SeedSequence(key)))


def power(base: float, exponent: float) -> float:
    """base ** exponent for 0 <= exponent <= 1 to POWER_TOLERANCE, by square roots alone (equal on every machine)."""
    result, root = (base, 1.0) if exponent >= 1 else (1.0, base)
    for _ in range(30):
        root, exponent = math.sqrt(root), 2 * exponent
        if exponent >= 1:
            result, exponent = result * root, exponent - 1
    return result
