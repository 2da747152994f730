"""The embedded data set: little street scenes drawn from a seed, with every cause of a long tail as a knob.

A scene is one map of *parts* (H, W): each painted part knows its class, its object and its place in the
colour table, so labels, instance masks and the image are three look-ups of the same map. A pinhole camera
at `cam` metres above a flat ground gives everything its place: a point on the ground `d` pixels below the
horizon is `focal * cam / d` metres away, and one metre there is `d / cam` pixels long.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from ltseg_core.config import UserError, choose
from ltseg_core.data.base import SegmentationDataset
from ltseg_core.data.scene_kit import (
    ASPHALT,
    BUILDING,
    CELLS,
    CLOUDS,
    LEAVES,
    PALETTE,
    ROAD,
    SIDEWALK,
    SKY,
    SMOOTH,
    STUFF,
    TERRAIN,
    THINGS,
    TILE,
    VEGETATION,
    Stuff,
    Thing,
    disc,
    power,
    sprites,
    stream,
    tiles,
    tree_sprites,
)

IMAGES = {"train": 400, "val": 100, "test": 200}
MIN_IMAGES = 4
MIN_VISIBLE = 3  # pixels of each scheduled class that an image shows at the least
HEAD_SHARE = 0.25  # pixel share of the largest class that the layout gives, about
UNHIDDEN = 0.8  # share of a thing's pixels that nothing hides, about
MOST_OBJECTS = 6  # of one kind in an image
SHADOW = 4096  # bit of a part that lies in the shade
SLOTS = 8  # colours of one object; part = SLOTS * object + slot


class Scenes(SegmentationDataset):
    """Procedural street scenes: `len(scenes)` images with label maps and instance masks.

    split         "train", "val" or "test": disjoint streams of random numbers
    images        number of images, >= 4; None: 400, 100, 200 for train, val, test
    size          (height, width) in pixels, each in [48, 1024]; width / height in [0.75, 4]
    classes       8 to 24: six kinds of stuff, then things from common to rare
    seed          in [0, 2^32). The same arguments give the same bytes everywhere
    pixel_tail    wanted ratio of the pixels of the largest class to those of the rarest, [20, 5000]
    image_tail    ratio of the number of images to the number that show the rarest class, [1, 100]. When one
                  of the two moves, the other is kept by fewer and smaller, or more and larger objects
    object_scale  typical size of an object, 1: what it measures where the ground is a fifth of the image height
                  below the horizon, [0.3, 3]; the pixel share is kept, so the number of objects changes inversely
    shared_texture  how far a thing takes over colour and texture of its twin among the stuff: 0 is its own
                  look, 1 the twin's exactly (only shape and place tell them apart), [0, 1]
    context       probability that a thing stands on its home stuff (a person on the sidewalk, a car on the
                  road); otherwise it stands on any ground, [0, 1]
    border_noise  largest displacement of the label borders in pixels, [0, 8]. 0 by default: labels are exact,
                  and noise is something to study. Give it to the training split only for a clean evaluation
    style         "day" or "night". It changes colours and noise only; labels are those of the other style. Take
                  another seed for an unpaired second domain

    Each class is shown by at least min(3, ceil(images / 10)) images, with at least 3 pixels in each.
    Raises UserError for a value out of range, and for combinations that ask for objects of less than 4
    pixels or more than 30 % of an image.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        images: int | None = None,
        size: tuple[int, int] = (96, 128),
        classes: int = 12,
        seed: int = 0,
        pixel_tail: float = 800.0,
        image_tail: float = 25.0,
        object_scale: float = 1.0,
        shared_texture: float = 0.4,
        context: float = 0.8,
        border_noise: float = 0.0,
        style: str = "day",
    ) -> None:
        self.name = "scenes"
        self.split = choose("split", split, IMAGES)
        self.style = choose("style", style, ("day", "night"))
        count = IMAGES[self.split] if images is None else images
        self.height, self.width = (_in_range("size", v, 48, 1024, whole=True) for v in _pair(size))
        if not 0.75 <= self.width / self.height <= 4:
            raise UserError(f"size must have a width of 0.75 to 4 heights, got {self.height, self.width}")
        num_classes = _in_range("classes", classes, len(STUFF) + 2, len(STUFF) + len(THINGS), whole=True)
        self.seed = _in_range("seed", seed, 0, 2**32 - 1, whole=True)
        self.object_scale = _in_range("object_scale", object_scale, 0.3, 3)
        self.shared_texture = _in_range("shared_texture", shared_texture, 0, 1)
        self.context = _in_range("context", context, 0, 1)
        self.border_noise = _in_range("border_noise", border_noise, 0, 8)
        count = _in_range("images", count, MIN_IMAGES, 10**7, whole=True)
        self.things = THINGS[: num_classes - len(STUFF)]
        kinds: tuple[Stuff | Thing, ...] = (*STUFF, *self.things)
        self.classes = tuple(kind.name for kind in kinds)
        self.palette = np.array(PALETTE[:num_classes], np.uint8)
        self.names = [f"{self.split}_{i:05d}" for i in range(count)]
        self._stream = (self.seed, list(IMAGES).index(self.split))
        self.present, self.budget = self._schedule(
            _in_range("pixel_tail", pixel_tail, 20, 5000), _in_range("image_tail", image_tail, 1, 100)
        )

    def _schedule(self, pixel_tail: float, image_tail: float) -> tuple[np.ndarray, np.ndarray]:
        """Which classes each image shows, (N, C) bool, and the pixels of a thing in an image that shows it, (T,).

        Both frequencies of things fall geometrically: pixels from HEAD_SHARE / pixel_tail^(1/3) to HEAD_SHARE /
        pixel_tail in the order of the table, images from all to 1 / image_tail in the order of commonness.
        """
        n, kinds = len(self), len(self.things)
        order = sorted(range(kinds), key=lambda k: self.things[k].commonness)
        rank = [order.index(k) / (kinds - 1) for k in range(kinds)]
        shares = [kind.presence for kind in STUFF] + [1 / power(image_tail, 0.05 + 0.95 * r) for r in rank]
        least = min(3, -(-n // 10))
        counts = [max(least, math.floor(n * share + 0.5)) for share in shares]
        order_of = np.argsort(stream(*self._stream, 1).random((n, len(counts))), axis=0, kind="stable")
        present = np.zeros((n, len(counts)), bool)
        np.put_along_axis(present, order_of, np.arange(n)[:, None] < np.array(counts), axis=0)
        budget = np.zeros(kinds)
        for k, thing in enumerate(self.things):
            share = HEAD_SHARE / power(pixel_tail, 1 / 3 + 2 / 3 * k / (kinds - 1)) * n / counts[len(STUFF) + k]
            budget[k] = share * self.height * self.width
            if budget[k] < 4:
                raise UserError(
                    f"pixel_tail={pixel_tail:g} with image_tail={image_tail:g} leaves {budget[k]:.1f} pixels for "
                    f"{thing.name!r} in an image: lower pixel_tail, raise image_tail or enlarge "
                    f"size={self.height, self.width}"
                )
            if share > 0.3:
                raise UserError(
                    f"pixel_tail={pixel_tail:g} with image_tail={image_tail:g} makes {thing.name!r} fill {share:.0%} "
                    "of an image: raise pixel_tail or lower image_tail"
                )
        return present, budget

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and label map (H, W) uint8 in [0, C); every pixel has a label."""
        scene, labelled = self._scene(index)
        look = stream(*self._stream, 3, range(len(self))[index])
        return self._render(scene, look), scene.look_up(scene.classes, labelled)

    def label(self, index: int) -> np.ndarray:
        """Label map alone, (H, W) uint8; cheaper than `sample`."""
        scene, labelled = self._scene(index)
        return scene.look_up(scene.classes, labelled)

    def instances(self, index: int) -> np.ndarray:
        """Instance mask (H, W) uint16: 0 on stuff, things numbered 1, 2, … from far to near."""
        scene, labelled = self._scene(index)
        numbers = np.array(scene.instances, np.uint16)[(labelled & (SHADOW - 1)) // SLOTS]
        visible = np.bincount(numbers.ravel()) > 0
        visible[0] = False
        return (np.cumsum(visible) * visible).astype(np.uint16)[numbers]

    def _scene(self, index: int) -> tuple[_Scene, np.ndarray]:
        """The drawn scene and the map of parts that gives its labels, (H, W) uint16.

        A scene that hides a scheduled class behind others is drawn again from the next stream.
        """
        index = range(len(self))[index]
        wanted = self.present[index]
        for attempt in range(64):
            rng = stream(*self._stream, 2, index, attempt)
            scene = _Scene(rng, self.height, self.width, wanted)
            scene.draw(self._objects(scene, wanted))
            parts = scene.parts if self.border_noise == 0 else _displaced(scene.parts, self.border_noise, rng)
            counts = np.bincount(scene.look_up(scene.classes, parts).ravel(), minlength=len(wanted))
            if (counts[wanted] >= MIN_VISIBLE).all():
                return scene, parts
        hidden = ", ".join(np.array(self.classes)[wanted & (counts < MIN_VISIBLE)])
        raise UserError(f"image {index} has no room to show {hidden}: use fewer classes or a larger size")

    def _objects(self, scene: _Scene, wanted: np.ndarray) -> list[_Object]:
        """The things of one scene. Its pixel budget decides how many of a kind, and how far away they stand."""
        rng, objects = scene.rng, []
        grounds = (ROAD, TERRAIN, SIDEWALK) if scene.walk else (ROAD, TERRAIN)
        for k in np.flatnonzero(wanted[len(STUFF) :]):
            thing, views = self.things[k], sprites()[k]
            budget = self.budget[k] / UNHIDDEN
            usual = thing.metres * 0.2 * self.object_scale * self.height / 3
            number = budget / (usual * usual * views[0].aspect * views[0].fill)
            number = min(max(int(number + rng.random()), 1), MOST_OBJECTS)
            for _ in range(number):
                sprite = views[int(rng.random() * len(views))]
                aspect = sprite.aspect * (0.85 + 0.3 * rng.random())
                area = budget / number * (0.5 + rng.random())
                h = min(max(math.sqrt(area / (sprite.fill * aspect)), 2.0), 0.9 * self.height)
                w = max(area / (sprite.fill * h), 1.0)
                d = min(max(h * scene.cam / thing.metres, 2.0), self.height - 2 - scene.horizon)
                home = thing.home if rng.random() < self.context else grounds[int(rng.random() * len(grounds))]
                x = scene.place(home, d, w)
                foot = scene.horizon + d if home != SKY else h + rng.random() * max(scene.horizon - h, 0) * 0.8
                objects.append(_Object(d, len(STUFF) + int(k), sprite.slots, x, foot, w, h, home != SKY))
        return objects

    def _render(self, scene: _Scene, rng: Generator) -> np.ndarray:
        """Colour the parts: look of each object, texture, shade, light, blur of the lens, noise of the sensor."""
        night, h, w = self.style == "night", self.height, self.width
        colours, textures, amplitudes = self._look(scene, rng)
        plain = scene.parts & (SHADOW - 1)
        image = np.take(colours.reshape(-1, 3), plain, axis=0)  # (H, W, 3) float32
        of = plain // SLOTS
        light = _texture(textures[of], rng, scene)
        light *= amplitudes[of]
        image += light[:, :, None]
        left, right = 0.88 + 0.24 * rng.random(2)
        gain = np.linspace(left, right, w, dtype=np.float32) * np.linspace(0.95, 1.05, h, dtype=np.float32)[:, None]
        if night:  # the beam of the camera's own headlights
            beam = np.abs(np.arange(w, dtype=np.float32) - np.float32(scene.vx)) / np.float32(w)
            gain *= 0.8 + np.maximum(0.9 - 1.6 * beam, 0) * np.linspace(0, 1, h, dtype=np.float32)[:, None]
        gain *= np.array([1.0, 0.8 if night else 0.62], np.float32)[scene.parts // SHADOW]
        image *= gain[:, :, None]
        image[1:-1] = (image[:-2] + 6 * image[1:-1] + image[2:]) / 8
        image[:, 1:-1] = (image[:, :-2] + 6 * image[:, 1:-1] + image[:, 2:]) / 8
        noise = np.frombuffer(rng.bytes(h * w * 3), np.uint8).reshape(h, w, 3)
        image += noise * np.float32(0.09 if night else 0.05) - np.float32(11.5 if night else 6.4)
        return np.clip(image, 0, 255, out=image).astype(np.uint8)

    def _look(self, scene: _Scene, rng: Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours (O, SLOTS, 3) float32, textures (O,) and their amplitudes (O,) float32 of the O objects."""
        night = self.style == "night"
        kinds: tuple[Stuff | Thing, ...] = (*STUFF, *self.things)
        cls, depth = np.array(scene.classes), np.array(scene.depths, np.float32)
        base = np.array([kind.colours[int(rng.random() * len(kind.colours))] for kind in kinds], np.float32)
        base += _paint(rng, len(kinds), 28)
        own = base[cls]
        varied = [BUILDING, *range(len(STUFF), len(kinds))]  # each building and each thing has its own paint
        for i in np.flatnonzero(np.isin(cls, varied)):
            own[i] = kinds[cls[i]].colours[int(rng.random() * len(kinds[cls[i]].colours))]
        own += _paint(rng, len(own), 20)
        look = np.repeat(own[:, None], SLOTS, axis=1)  # (O, SLOTS, 3)
        haze = base[SKY] * np.float32(0.6) + np.float32(85)
        bands = np.linspace(0, 1, SLOTS, dtype=np.float32)[:, None]
        look[0] = base[SKY] * (1 - bands) + haze * bands  # sky: slots from zenith to horizon
        ground = np.maximum(0.34 - 0.08 * np.arange(SLOTS, dtype=np.float32), 0)[:, None]
        look[1:4] += (haze - look[1:4]) * ground  # ground: slots from far to near
        look[1, 7] = 225  # lane marks
        tree, house, thing = cls == VEGETATION, cls == BUILDING, cls >= len(STUFF)
        look[tree, 1] *= np.float32(0.66)
        look[tree, 2] = (84, 66, 50)
        look[house, 1::4] = look[house, 1::4] * np.float32(0.2) + (40, 46, 58)
        look[house, 2::4] = (225, 190, 110) if night else look[house, 2::4] * np.float32(0.2) + (92, 106, 124)
        look[house, 3::4] *= np.float32(0.7)
        look[house, 4:] *= np.float32(0.8)  # the wall that faces the camera
        textures = np.array([kind.texture for kind in STUFF] + [SMOOTH] * len(self.things))
        amplitudes = np.array([kind.amplitude for kind in STUFF] + [5] * len(self.things), np.float32)
        if thing.any():
            look[thing, 1] = (38, 40, 46)
            look[thing, 2] = (235, 230, 205)
            look[thing, 3] = np.array([kind.second for kind in self.things])[cls[thing] - len(STUFF)]
            twins = np.array([kind.twin for kind in self.things])
            mix = np.float32(self.shared_texture)
            look[thing] += (base[twins[cls[thing] - len(STUFF)]][:, None] - look[thing]) * mix
            if mix > 0:
                textures[len(STUFF) :] = textures[twins]
                amplitudes[len(STUFF) :] += (amplitudes[twins] - 5) * mix
        far = np.clip(0.4 - depth / np.float32(0.3 * self.height), 0, 1)
        far[:4] = 0
        look += (haze - look) * far[:, None, None]
        if night:
            lamp = np.zeros(look.shape, np.float32)
            lamp[thing, 2] = 1 - np.float32(self.shared_texture) / 2
            lamp[house, 2::4] = 1
            dark = look * np.array([0.38, 0.42, 0.55], np.float32) + np.array([4, 6, 14], np.float32)
            look = dark + (look - dark) * lamp
            amplitudes *= np.float32(0.4)
        return look, textures[cls], amplitudes[cls]


class _Object(NamedTuple):
    depth: float  # d of its foot, pixels below the horizon
    cls: int
    sprite: np.ndarray
    x: float  # of its middle, pixels
    foot: float  # y of its lowest row, pixels
    w: float
    h: float
    grounded: bool  # casts a shadow


class _Wall(NamedTuple):
    depth: float
    building: int
    left: float  # pixels
    right: float
    lateral: float  # metres from the camera's axis; 0 for a wall that faces the camera
    roof: float  # metres


class _Scene:
    """The geometry of one scene: camera, street, houses and trees, painted from far to near."""

    def __init__(self, rng: Generator, height: int, width: int, wanted: np.ndarray) -> None:
        self.rng, self.h, self.w = rng, height, width
        self.horizon = int(height * (0.36 + 0.14 * rng.random()))
        self.vx = width * (0.3 + 0.4 * rng.random())
        self.cam = 2.5 + 1.5 * rng.random()  # metres
        self.focal = 1.1 * height * self.cam  # pixels * metres: distance z = focal / d
        self.road = 2.2 + 2.2 * rng.random()  # half width, metres
        self.walk = 1.2 + 1.6 * rng.random() if wanted[SIDEWALK] else 0.0
        self.verge = 0.6 + 3 * rng.random()
        self.town = bool(wanted[BUILDING])
        self.offset = (rng.random() - 0.5) * 1.6 * self.road  # of the camera from the middle of the road, metres
        self.bend = 0.0 if self.town else (rng.random() - 0.5) * 0.004
        self.sun = 1.0 if rng.random() < 0.5 else -1.0
        self.parts = np.zeros((height, width), np.uint16)
        self.classes: list[int] = []
        self.instances: list[int] = []
        self.depths: list[float] = []

    def look_up(self, table: list[int], parts: np.ndarray) -> np.ndarray:
        return np.array(table, np.uint8)[(parts & (SHADOW - 1)) // SLOTS]

    def add(self, cls: int, depth: float, instance: int = 0) -> int:
        """Enter an object; returns its first part."""
        self.classes.append(cls)
        self.instances.append(instance)
        self.depths.append(depth)
        return (len(self.classes) - 1) * SLOTS

    def place(self, home: int, d: float, w: float) -> float:
        """x in pixels of an object of width w at depth d on the stuff `home` (anywhere where that is not ground)."""
        scale, kerb = d / self.cam, self.road + self.walk
        edge = kerb + (self.verge if self.town else 12)
        side = 1 if self.rng.random() < 0.5 else -1
        spans = {ROAD: (-self.road, self.road), SIDEWALK: (self.road, kerb or edge), TERRAIN: (kerb, edge)}
        for sign in (side, -side):
            a, b = spans.get(home, (-edge, edge))
            a, b = sorted(self.vx + sign * v * scale - self.offset * scale for v in (a, b))
            a, b = max(a, 0.5 * w), min(b, self.w - 0.5 * w)
            if a < b and home != SKY:
                return a + (b - a) * self.rng.random()
        return 0.5 * w + max(self.w - w, 0) * self.rng.random()

    def draw(self, objects: list[_Object]) -> None:
        self._ground()
        if self.town:  # the walls stand behind all that is in the street
            for wall in sorted(self._houses(), key=lambda wall: wall.depth):
                self._wall(wall)
        number = 0
        for item in sorted([*objects, *self._trees()], key=lambda item: item.depth):
            is_thing = item.cls >= len(STUFF)
            number += is_thing
            self._stamp(item, number if is_thing else 0)

    def _ground(self) -> None:
        """Sky, terrain, sidewalk, road with lane marks, and the ridge of trees on the horizon."""
        rng, top = self.rng, self.horizon
        dither = tiles()[LEAVES, np.arange(self.h)[:, None] % TILE, np.arange(self.w) % TILE]
        sky, road, terrain, walk = (self.add(c, 0.0) for c in (SKY, ROAD, TERRAIN, SIDEWALK))
        rows = np.arange(self.h, dtype=np.float32)[:, None]
        self.parts[:top] = sky + np.clip(rows[:top] * np.float32(SLOTS / top) + dither[:top], 0, SLOTS - 1)
        d = rows[top:] - np.float32(top - 0.5)  # (G, 1)
        z = np.float32(self.focal) / d
        x = (np.arange(self.w, dtype=np.float32) - np.float32(self.vx)) * (np.float32(self.cam) / d)
        x += np.float32(self.offset) + np.float32(self.bend) * z * z  # (G, W) metres from the middle of the road
        self.ground_x, self.ground_z = x, z
        across = np.abs(x)
        band = np.clip(d * np.float32(20 / self.h) + dither[top:], 0, 6).astype(np.uint16)
        ground = terrain + np.broadcast_to(band, x.shape)
        if self.walk:
            np.copyto(ground, walk + band, where=across < self.road + self.walk)
        np.copyto(ground, road + band, where=across < self.road)
        dash = z * np.float32(1 / 6)
        np.copyto(ground, road + 7, where=(across < 0.09) & (dash - np.floor(dash) < 0.5))
        if self.town and rng.random() < 0.5:  # the houses on one side shade the street
            ground[x * self.sun > self.road * (1.5 * rng.random() - 0.5)] |= SHADOW
        self.parts[top:] = ground
        ridge = self.add(VEGETATION, 1.0)
        profile = tiles()[CLOUDS, int(rng.random() * TILE), np.arange(self.w) % TILE]
        tall = self.h * (0.02 + 0.05 * rng.random() + 0.03 * profile)
        strip = slice(max(top - self.h // 8, 0), top + 1)
        np.copyto(self.parts[strip], ridge, where=rows[strip] > top - tall)

    def _trees(self) -> list[_Object]:
        rng, kerb, trees = self.rng, self.road + self.walk, []
        for _ in range(int((4 if self.town else 7) + 5 * rng.random())):
            u = rng.random()
            d = self.h * (0.03 + 0.32 * u * u)
            metres = 2.5 + 6.0 * rng.random()
            lateral = (kerb + 0.4 + (self.verge if self.town else 14) * rng.random()) * (
                1 if rng.random() < 0.5 else -1
            )
            tall = metres * d / self.cam
            sprite = tree_sprites()[int(rng.random() * len(tree_sprites()))]
            x = self.vx + (lateral - self.offset) * d / self.cam
            trees.append(
                _Object(d, VEGETATION, sprite, x, self.horizon + d, tall * (0.6 + 0.4 * rng.random()), tall, True)
            )
        return trees

    def _houses(self) -> list[_Wall]:
        """Rows of houses on both sides of the street; each shows its street wall and its near front."""
        rng, walls = self.rng, []
        for side in (-1, 1):
            z = 6 + 14 * rng.random()
            while z < 60:
                length, roof, deep = 7 + 9 * rng.random(), 4 + 7 * rng.random(), 6 + 8 * rng.random()
                lateral = side * (self.road + self.walk + self.verge + rng.random()) - self.offset
                near, far = self.focal / z, self.focal / (z + length)
                building = self.add(BUILDING, near)
                outer = lateral + side * deep
                back, corner, end = (self.vx + v / self.cam for v in (lateral * far, lateral * near, outer * near))
                walls.append(_Wall(near - 1e-3, building, min(back, corner), max(back, corner), lateral, roof))
                walls.append(_Wall(near, building + 4, min(corner, end), max(corner, end), 0.0, roof))
                z += length + (6 * rng.random() if rng.random() < 0.4 else 0)
        return walls

    def _wall(self, wall: _Wall) -> None:
        """A wall with windows. Each column has its own depth, so storeys and roofs run to the vanishing point."""
        a, b = max(int(wall.left + 0.5), 0), min(int(wall.right + 0.5), self.w)
        if a >= b:
            return
        columns = np.arange(a, b) + 0.5 - self.vx
        d = columns * self.cam / wall.lateral if wall.lateral else np.full(b - a, wall.depth)
        d = np.maximum(d, 0.5)
        along = self.focal / d if wall.lateral else columns * self.cam / d  # metres
        deepest = float(d.max())
        top = max(int(self.horizon - (wall.roof / self.cam - 1) * deepest), 0)
        bottom = min(int(self.horizon + deepest) + 1, self.h)
        up = self.cam - (np.arange(top, bottom) + 0.5 - self.horizon)[:, None] * (self.cam / d)  # metres, (h, w)
        storey, bay = up / 2.9, along / 2.4
        floor, axis = np.floor(storey), np.floor(bay)
        window = (np.abs(storey - floor - 0.52) < 0.24) & (np.abs(bay - axis - 0.5) < 0.27) & (up < wall.roof - 0.8)
        lit = (floor.astype(np.int64) * 5 + axis.astype(np.int64) * 3 + wall.building) % 7 < 3
        slot = np.where(window, np.where(lit, 2, 1), np.where(up > wall.roof - 0.5, 3, 0))
        np.copyto(
            self.parts[top:bottom, a:b], (wall.building + slot).astype(np.uint16), where=(up >= 0) & (up <= wall.roof)
        )

    def _stamp(self, item: _Object, instance: int) -> None:
        """Paint an object's sprite, stretched to its box, and its shadow on the ground under it."""
        first = self.add(item.cls, item.depth, instance)
        flip = self.rng.random() < 0.5
        if item.grounded:
            thick = max(0.12 * item.depth, 1.5)
            drift = self.sun * 0.3 * item.w
            box, s = self._window(disc(), item.x + drift, item.foot + thick / 2, item.w * 1.15, thick, False)
            np.bitwise_or(box, SHADOW, out=box, where=s > 0)
        box, s = self._window(item.sprite, item.x, item.foot, item.w, item.h, flip)
        np.copyto(box, s + np.uint16(first - 1), where=s > 0)

    def _window(
        self, sprite: np.ndarray, x: float, foot: float, w: float, h: float, flip: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The part of the canvas under a box of w x h pixels, and the sprite stretched over it."""
        w_px, h_px = max(int(w + 0.5), 1), max(int(h + 0.5), 1)
        x0, y0 = int(x - w_px / 2 + 0.5), int(foot + 0.5) - h_px
        left, right = min(max(x0, 0), self.w), min(max(x0 + w_px, 0), self.w)
        upper, lower = min(max(y0, 0), self.h), min(max(y0 + h_px, 0), self.h)
        columns = (2 * (np.arange(left, right) - x0) + 1) * CELLS // (2 * w_px)
        lines = (2 * (np.arange(upper, lower) - y0) + 1) * CELLS // (2 * h_px)
        stretched = sprite[lines[:, None], CELLS - 1 - columns if flip else columns]
        return self.parts[upper:lower, left:right], stretched


def _paint(rng: Generator, count: int, spread: float) -> np.ndarray:
    """Changes of colour, (count, 3) float32: `spread` grey levels of brightness and a quarter of that of hue."""
    levels = rng.random((count, 4)).astype(np.float32) - np.float32(0.5)
    return (levels[:, :1] + levels[:, 1:] / 4) * np.float32(spread)


def _texture(kinds: np.ndarray, rng: Generator, scene: _Scene) -> np.ndarray:
    """Texture of each pixel in [-1, 1], (H, W) float32; that of the ground lies flat and fades with distance."""
    y0, x0 = (int(v * TILE) for v in rng.random(2))
    ys = (np.arange(scene.h) + y0)[:, None] % TILE
    xs = (np.arange(scene.w) + x0) % TILE
    out = tiles()[kinds, ys, xs]
    top = scene.horizon
    flat = kinds[top:] >= ASPHALT
    across = (scene.ground_x * np.float32(10) + np.float32(1024)).astype(np.int32) % TILE
    away = (scene.ground_z * np.float32(10)).astype(np.int32) % TILE
    fade = np.minimum(np.arange(scene.h - top, dtype=np.float32) * np.float32(6 / scene.h), 1)[:, None]
    np.copyto(out[top:], tiles()[kinds[top:], away, across] * fade, where=flat)
    return out


def _displaced(parts: np.ndarray, reach: float, rng: Generator) -> np.ndarray:
    """`parts` read at places up to `reach` pixels away, which wander smoothly over the image."""
    h, w = parts.shape
    y0, x0 = (int(v * TILE) for v in rng.random(2))
    ys, xs = (np.arange(h) + y0)[:, None] % TILE, (np.arange(w) + x0) % TILE
    shift = [np.floor(tiles()[LEAVES, a, b] * reach + 0.5).astype(np.int64) for a, b in ((ys, xs), (ys - 91, xs - 57))]
    return parts[np.clip(np.arange(h)[:, None] + shift[0], 0, h - 1), np.clip(np.arange(w) + shift[1], 0, w - 1)]


def _pair(size: Any) -> tuple[Any, Any]:
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return size[0], size[1]
    raise UserError(f"size must be (height, width), got {size!r}")


def _in_range(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> Any:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high:
        return int(value) if whole else float(value)
    raise UserError(f"{name} must be {'a whole number' if whole else 'a number'} in [{low:g}, {high:g}], got {value!r}")
