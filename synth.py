"""Draws pairs of SAR and optical (EO) images of a small invented country, of which the truth is known.

A pair is made in three steps:

    plan    (seed, scene, patch) -> World: land cover, fields, objects and when they are there
    render  World -> Scene: the SAR image (backscatter, then speckle, then dB in 8 bits), the EO image (colour, then
            shadows, then a slight blur), the land cover, and where the two images disagree
    write   Scene -> four PNG files in the layout of SEN1-2

What the EO image shows follows, with one exception, from what the SAR image shows: every kind of land has its own
level, texture or shape in both, and what varies within a kind (vigour of a field, furrows, crowns, season) varies
in both. The exception is `AMBIGUOUS`: roofs are red, grey or dark by a draw that leaves no trace in the SAR image.

Objects (houses, ships) are all that changes between the two images: a share `CHANGED` of them was there when only
one of the two was taken. A pixel is marked as changed exactly where the image that has the object differs from the
image without it - shadow, layover and sidelobes included - or where the object stands.

Geometry: x runs east, y runs south, a pixel is some 3 metres. The radar flies in the west and looks east: houses
lean to the west and hide what is east of them. The sun is in the south-east: shadows fall to the north-west.

    python synth.py sen12-synthetic/ --pairs 1000 --size 256 --seed 0
"""

import json
import math
import multiprocessing
import signal
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from cli import Parser, run
from files import atomic


class Kind(NamedTuple):
    name: str
    colour: tuple[int, int, int]  # EO, before season and texture
    db: float  # mean backscatter (sigma nought), dB
    crowns: float  # strength of the crown-like texture: x dB in SAR, x / 9 of the brightness in EO
    furrows: float  # the same for the rows of a field
    season: float  # how much of the season's change it takes part in


CLASSES = (
    Kind("water", (26, 62, 92), -21.5, 0.0, 0.0, 0.0),
    Kind("road", (122, 121, 126), -19.0, 0.0, 0.0, 0.0),
    Kind("sand", (240, 228, 200), -18.0, 0.0, 0.0, 0.0),
    Kind("bare soil", (146, 104, 78), -16.5, 0.1, 0.7, 0.3),
    Kind("meadow", (130, 162, 88), -14.4, 0.3, 0.0, 1.0),
    Kind("wheat", (210, 188, 122), -12.3, 0.1, 0.5, 1.0),
    Kind("rapeseed", (190, 190, 66), -10.2, 0.2, 0.4, 1.0),
    Kind("maize", (66, 124, 58), -8.2, 0.2, 0.6, 1.0),
    Kind("forest", (34, 70, 44), -7.4, 1.5, 0.0, 0.7),
    Kind("built-up ground", (186, 174, 156), -5.6, 0.5, 0.0, 0.0),
    Kind("roof", (178, 92, 70), -9.0, 0.0, 0.0, 0.0),
    Kind("ship", (240, 240, 236), 4.0, 0.0, 0.0, 0.0),
)
WATER, ROAD, SAND, SOIL, MEADOW, WHEAT, RAPESEED, MAIZE, FOREST, GROUND, ROOF, SHIP = range(len(CLASSES))
AMBIGUOUS = (ROOF,)  # classes whose EO colour no SAR image can tell
ROOFS = ((178, 92, 70), (150, 152, 158), (84, 80, 84))  # the colours a roof may have

SEASONS = {  # backscatter of plants (dB) and gain of their (red, green, blue), relative to the table above
    "ROIs1158_spring": (0.3, (0.94, 1.05, 0.94)),
    "ROIs1868_summer": (0.6, (1.00, 1.00, 0.95)),
    "ROIs1970_fall": (-0.4, (1.08, 0.97, 0.92)),
    "ROIs2017_winter": (-0.9, (0.97, 0.94, 1.04)),
}
CHANGED = 0.18  # fraction of the objects that only one of the two images shows
DB_RANGE = (-25.0, 0.0)  # backscatter that becomes 0 and 255 in the 8-bit SAR image
MIN_SIZE, MAX_SIZE = 64, 8192
PATCHES = 20  # of one scene, at most
CHANGE_COLOURS = ((0, 0, 0), (255, 0, 80), (0, 200, 170), (255, 255, 255))  # none, SAR only, EO only, both

LAYOVER, RADAR_SHADOW, SUN_SHADOW = 0.9, 1.3, 0.6  # reach in pixels for every pixel of height
LAYOVER_DB, SHADOW_DB, BRIDGE_DB, TREE_EDGE_DB = -3.5, -24.0, -4.0, -5.0
TREES = 2.2  # height, pixels
SIDELOBES = (0.012, 0.003, 0.005, 0.0015, 0.0025, 0.001)  # power of a ship's echo 1, 2, ... pixels beside it

COLOURS = np.array([kind.colour for kind in CLASSES], dtype=np.float32)
DB, CROWNS, FURROWS, SEASON = (
    np.array([getattr(kind, name) for kind in CLASSES], dtype=np.float32)
    for name in ("db", "crowns", "furrows", "season")
)
CROPS = np.isin(np.arange(len(CLASSES)), (SOIL, MEADOW, WHEAT, RAPESEED, MAIZE)).astype(np.float32)
SHADE = np.array((0.50, 0.54, 0.62), dtype=np.float32)  # shadows are lit by the blue sky
SOFT = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 16, 2, 1, 2, 1))  # blur of the optical image


class Scene(NamedTuple):
    sar: np.ndarray  # (H, W) uint8, DB_RANGE -> 0..255
    eo: np.ndarray  # (H, W, 3) uint8
    sar_only: np.ndarray  # (H, W) bool, marks what only the SAR image shows
    eo_only: np.ndarray  # (H, W) bool, marks what only the EO image shows
    classes: np.ndarray  # (H, W) uint8, index into CLASSES: what the EO image shows, since that is to be generated


class Objects(NamedTuple):
    """N buildings and ships. Points and directions are complex numbers x + iy; lengths are in pixels."""

    centre: np.ndarray  # (N,) complex
    along: np.ndarray  # (N,) complex, unit vector
    half: np.ndarray  # (N,) complex, half the length (along) + i half the width (across)
    height: np.ndarray  # (N,) float32
    kind: np.ndarray  # (N,) ROOF or SHIP
    colour: np.ndarray  # (N, 3) float32, in the EO image
    coin: np.ndarray  # (N,) in [0, 1): the highest exist only in the EO image, the lowest only in the SAR image


class World(NamedTuple):
    """All that both images are drawn from; arrays are (H, W) where nothing else is said."""

    season: str
    classes: np.ndarray  # uint8, land without objects
    field: np.ndarray  # int32, which field a pixel belongs to
    vigour: np.ndarray  # (fields,) float32 in [-1, 1]
    furrows: np.ndarray  # (fields,) complex64, wave vector of the rows
    bridge: np.ndarray  # bool
    objects: Objects


# ---------------------------------------------------------------- tools: noise, masks, shadows, lines


def noise(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Smooth noise (size, size) float32 of about unit variance, whose bumps are `cell` pixels apart."""
    n = math.ceil(size / cell) + 3
    grid = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
    x, y = rng.uniform(1, 2, 2)
    box = (x, y, x + size / cell, y + size / cell)
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box)) * np.float32(1.3)


def blur(mask: np.ndarray, radius: int) -> np.ndarray:
    """Share of a pixel's neighbourhood (a square) that a mask (H, W) covers, float32 in [0, 1]."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(radius))
    return np.asarray(picture, dtype=np.float32) / 255


def shift(a: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The picture (H, W) moved by (dx, dy) pixels, zeros coming in."""
    (h, w), moved = a.shape, np.zeros_like(a)
    source = a[max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)]
    moved[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = source
    return moved


def cast(height: np.ndarray, dx: int, dy: int, reach: float) -> np.ndarray:
    """Where things of this height (H, W) throw a shadow (or lean over) in direction (dx, dy): bool (H, W)."""
    shadow = np.zeros(height.shape, bool)
    for step in range(1, int(height.max() * reach) + 1):
        shadow |= shift(height, step * dx, step * dy) * reach >= step
    return shadow


def lattice(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Scattered points (N,) complex in and around the picture, one a cell, no two closer than half a cell."""
    n = math.ceil(size / cell) + 1
    corner = np.arange(n) * cell - rng.uniform(0, cell)
    x, y = corner + rng.uniform(0.25, 0.75, (2, n, n)) * cell
    return (x + 1j * y.T).ravel()


def curve(rng: np.random.Generator, size: int, bend: float, wavelength: float) -> np.ndarray:
    """Points (N,) complex of a line that crosses the picture and sways to both sides, `bend` radians or so."""
    t = np.arange(-1.5 * size, 1.5 * size, 4.0)
    sway = np.zeros(len(t))
    for length in (wavelength * rng.uniform(0.8, 1.25), wavelength * rng.uniform(0.3, 0.5)):
        sway += bend * length / (2 * math.pi) * np.sin(2 * math.pi * (t / length + rng.uniform()))
    middle = complex(*rng.uniform(0.2, 0.8, 2)) * size
    return middle + np.exp(1j * rng.uniform(0, math.pi)) * (t + 1j * sway)


def flat(points) -> list[float]:
    """Complex points as the flat list x, y, x, y, ... that Pillow draws from."""
    return [c for p in points for c in (p.real, p.imag)]


def halves(polygon: list[complex], normal: complex, offset: float) -> tuple[list[complex], list[complex]]:
    """The two parts of a convex polygon on either side of the line  p . normal = offset."""
    below, above = [], []
    for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        da, db = ((p * normal.conjugate()).real - offset for p in (a, b))
        (below if da < 0 else above).append(a)
        if (da < 0) != (db < 0):
            crossing = a + (b - a) * da / (da - db)
            below.append(crossing)
            above.append(crossing)
    return below, above


# ---------------------------------------------------------------- the plan: what stands where


def draw_fields(rng: np.random.Generator, size: int, area: float, along: complex) -> tuple[np.ndarray, int]:
    """Cuts the picture, along and across a direction, into fields: their numbers (H, W) int32, and how many."""
    picture = Image.new("I", (size, size))
    parts, count = [[0j, complex(size), complex(size, size), complex(0, size)]], 0
    while parts:
        part = parts.pop()
        shoelace = sum((a.conjugate() * b).imag for a, b in zip(part, part[1:] + part[:1], strict=True))
        if shoelace / 2 < area * rng.uniform(0.7, 2.2):
            ImageDraw.Draw(picture).polygon(flat(part), fill=count)
            count += 1
            continue
        turn, sides = along * np.exp(1j * rng.normal(0, 0.1)), []
        for normal in (turn, 1j * turn):
            reach = [(p * normal.conjugate()).real for p in part]
            sides.append((max(reach) - min(reach), min(reach), normal))
        length, start, normal = max(sides, key=lambda side: side[0])  # cut the long side
        parts += halves(part, normal, start + length * rng.uniform(0.35, 0.65))
    return np.asarray(picture), count


def draw_water(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """Where the picture is water: bool (size, size)."""
    if kind == "river":
        picture = Image.new("L", (size, size))
        for _ in range(1 + size // 600):
            line, width = curve(rng, size, 0.9, rng.uniform(120, 260)), int(rng.uniform(10, 30))
            ImageDraw.Draw(picture).line(flat(line), 1, width, "curve")
        return blur(np.asarray(picture) > 0, 5) + 0.12 * noise(rng, size, 14) > 0.5
    if kind == "lakes":
        return noise(rng, size, 80) + 0.15 * noise(rng, size, 16) > rng.uniform(0.6, 1.1)
    if kind == "coast":
        line = np.arange(size, dtype=np.float32) - size / 2
        angle, inland = rng.uniform(0, 2 * math.pi), rng.uniform(-0.3, 0.4) * size
        sea = (line * math.cos(angle) + line[:, None] * math.sin(angle)).astype(np.float32) + inland
        return sea + 16 * noise(rng, size, 70) + 4 * noise(rng, size, 14) > 0
    return np.zeros((size, size), bool)


def draw_town(rng: np.random.Generator, centre: complex, radius: float, pen: ImageDraw.ImageDraw) -> list[tuple]:
    """Draws blocks and streets with `pen`; returns the houses as (centre, along, half, height).

    Of a small radius nothing is left but one block: a farm.
    """
    along = np.exp(1j * rng.uniform(0, math.pi / 2))
    deep, wide, tall, houses = rng.uniform(24, 32), rng.uniform(30, 56), rng.uniform(2.5, 5.5), []
    n, m = int(radius / deep) + 1, int(radius / wide) + 1
    for block in (complex(i * deep, j * wide) for i in range(-n, n + 1) for j in range(-m, m + 1)):
        far = abs(block) / radius
        if far > rng.uniform(0.75, 1.15):
            continue
        shape = [block + complex(a * deep, b * wide) / 2 for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        shape = [centre + along * corner for corner in shape]
        park = rng.uniform() < 0.12
        pen.polygon(flat(shape), fill=MEADOW if park else GROUND)
        pen.line(flat(shape + shape[:2]), ROAD, 3)
        lots = 0 if park else 1 if rng.uniform() < 0.08 else int(wide / rng.uniform(10, 15))
        for side in (-1, 1) if lots > 1 else (0,):  # two rows of houses, or one hall
            for lot in range(lots):
                at = block + complex(side * deep * 0.21, ((lot + 0.5) / lots - 0.5) * (wide - 6))
                half = complex(deep * (0.14 if side else 0.3), (wide - 6) / lots * rng.uniform(0.28, 0.4))
                height = rng.uniform(0.7, 1.2) * max(1.8, tall * (1.1 - far))
                if rng.uniform() < 0.9:
                    houses.append((centre + along * at, along, half, height))
    return houses


def has_room(found: list[tuple], free: np.ndarray, margin: float) -> list[tuple]:
    """Those of the objects (centre, along, half, height) in the picture that stand on free ground, bool (H, W)."""
    centre, along, half, _ = np.array(found).reshape(-1, 4).T[:, :, None]
    steps = np.array((-margin, 0, margin))
    spots = centre + along * (half.real * steps.repeat(3) + 1j * half.imag * np.tile(steps, 3))  # (N, 9)
    inside = ((spots.real >= 0) & (spots.real < len(free)) & (spots.imag >= 0) & (spots.imag < len(free))).any(1)
    x, y = (np.clip(c, 0, len(free) - 1).astype(int) for c in (spots.real, spots.imag))
    return [thing for thing, fits in zip(found, inside & free[y, x].all(1), strict=True) if fits]


def season_of(scene: int) -> str:
    """The seasons take turns."""
    return list(SEASONS)[scene % len(SEASONS)]


def plan(seed: int, scene: int, patch: int, size: int) -> World:
    """Decides everything but texture, speckle and film grain."""
    shared = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scene,)))  # same for the whole scene
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scene, patch, 0)))

    # Fields, with hedges between some of them, and woods.
    field, count = draw_fields(rng, size, shared.uniform(900, 2200), np.exp(1j * shared.uniform(0, math.pi)))
    crops = rng.choice(np.arange(SOIL, MAIZE + 1), count, p=shared.dirichlet(np.full(5, 4.0))).astype(np.uint8)
    border = np.zeros(field.shape, bool)
    border[:, 1:] = field[:, 1:] != field[:, :-1]
    border[1:] |= field[1:] != field[:-1]
    hedges = (blur(border, 1) > 0) & (noise(rng, size, 12) > shared.uniform(-0.5, 2))
    woods = noise(rng, size, 70) + 0.35 * noise(rng, size, 18) + 0.12 * noise(rng, size, 6)
    classes = np.where(hedges | (woods > shared.uniform(0.5, 1.6)), np.uint8(FOREST), crops[field])

    # Farms, towns and single trees.
    land, houses = Image.fromarray(classes), []
    pen = ImageDraw.Draw(land)
    for cell, share, radii in ((56, 0.16, (8, 16)), (190, shared.uniform(0.1, 0.9), (36, 80))):
        for centre in lattice(rng, size, cell):
            radius, beyond = rng.uniform(*radii), centre - complex(size, size) / 2
            if rng.uniform() < share and max(abs(beyond.real), abs(beyond.imag)) < size / 2 + radius + 40:
                houses += draw_town(rng, centre, radius, pen)
    green = np.isin(np.asarray(land), (GROUND, MEADOW))
    trees = lattice(rng, size, 11)
    trees = trees[rng.uniform(size=len(trees)) < 0.3]
    for tree, r in zip(trees, rng.uniform(1.2, 2.4, len(trees)), strict=True):
        x, y = int(tree.real), int(tree.imag)
        if 0 <= x < size and 0 <= y < size and green[y, x]:
            pen.ellipse((tree.real - r, tree.imag - r, tree.real + r, tree.imag + r), fill=FOREST)
    classes = np.array(land)

    # Water with beaches, then roads, which cross narrow water on bridges.
    kind = shared.choice(["river", "lakes", "coast", "dry"], p=[0.35, 0.2, 0.3, 0.15])
    water = draw_water(rng, size, kind)
    if kind != "river":
        classes[(blur(water, 5) > 0.15) & (noise(rng, size, 40) > -0.3)] = SAND
    classes[water] = WATER
    roads = Image.new("L", (size, size))
    for _ in range(rng.integers(1, 3) + size // 400):
        ImageDraw.Draw(roads).line(flat(curve(rng, size, 0.25, 300)), 1, int(rng.integers(3, 5)), "curve")
    road = (np.asarray(roads) > 0) & (blur(water, 24) < 0.75)
    classes[road] = ROAD

    # Objects: houses that found a place, ships that have water enough around them.
    houses = has_room(houses, blur(np.isin(classes, (WATER, ROAD)), 1) == 0, margin=1)
    berths = [at for at in lattice(rng, size, 34) if rng.uniform() < 0.3]
    ships = [(at, np.exp(1j * rng.uniform(0, 2 * math.pi)), rng.uniform(4.5, 9) * (1 + 0.3j), 0) for at in berths]
    found = houses + has_room(ships, classes == WATER, margin=1.7)
    centre, along, half, height = np.array(found).reshape(-1, 4).T
    kind = np.where(np.arange(len(found)) < len(houses), ROOF, SHIP)
    colour = np.array(ROOFS, dtype=np.float32)[rng.choice(len(ROOFS), len(found), p=[0.5, 0.3, 0.2])]
    colour[kind == SHIP] = CLASSES[SHIP].colour
    height, coin = height.real.astype(np.float32), rng.uniform(size=len(found))
    objects = Objects(centre, along, half, height, kind, colour, coin)

    vigour = rng.uniform(-1, 1, count).astype(np.float32)
    furrows = 2 * math.pi / rng.uniform(4.5, 7, count) * np.exp(1j * rng.uniform(0, math.pi, count))
    return World(season_of(scene), classes, field, vigour, furrows.astype(np.complex64), road & water, objects)


# ---------------------------------------------------------------- the pictures


def presence(objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Which objects are there when the SAR image is taken, and which when the EO image is: two bool (N,)."""
    return objects.coin < 1 - CHANGED / 2, objects.coin >= CHANGED / 2


def draw_objects(objects: Objects, which: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Adds the objects `which` (bool (N,)) to a picture (H, W) int32 of object numbers: 1, 2, ...; 0 is land."""
    picture = Image.fromarray(numbers)
    pen = ImageDraw.Draw(picture)
    for i in np.flatnonzero(which):
        half, bow = objects.half[i], 0.5 if objects.kind[i] == SHIP else 1  # houses are rectangles, ships have a bow
        shape = [complex(a * half.real, b * half.imag) for a, b in ((-1, -1), (bow, -1), (1, 0), (bow, 1), (-1, 1))]
        pen.polygon(flat(objects.centre[i] + objects.along[i] * np.array(shape)), fill=int(i) + 1)
    return np.asarray(picture)


def by_number(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Looks a property of the objects (N, ...) up in the picture (H, W) of their numbers; land gets 0."""
    return np.concatenate([np.zeros((1, *values.shape[1:]), values.dtype), values])[numbers]


def draw_texture(world: World, rng: np.random.Generator) -> np.ndarray:
    """What varies within a kind of land, (H, W) float32 in dB: crowns, furrows, vigour of fields, wind on water."""
    size = len(world.classes)
    line = np.arange(size, dtype=np.float32)
    waves = world.furrows[world.field]
    db = CROWNS[world.classes] * (0.8 * noise(rng, size, 3.5) + 0.5 * noise(rng, size, 11))
    db += FURROWS[world.classes] * np.sin(waves.real * line + waves.imag * line[:, None])
    db += 0.7 * CROPS[world.classes] * world.vigour[world.field]
    db += 0.3 * noise(rng, size, 90)  # the lie of the land
    return np.where(world.classes == WATER, np.clip(noise(rng, size, 60), 0, 1.5), db)


def sar_land(world: World, texture: np.ndarray) -> np.ndarray:
    """Backscatter (H, W) in dB of the land without objects and without speckle."""
    db = DB[world.classes] + SEASON[world.classes] * np.float32(SEASONS[world.season][0]) + texture
    forest = world.classes == FOREST
    trees = forest * np.float32(TREES)
    db[cast(trees, 1, 0, RADAR_SHADOW) & ~forest] -= 5  # some light comes through
    db[cast(trees, -1, 0, LAYOVER) & ~forest] = TREE_EDGE_DB
    db[world.bridge] = BRIDGE_DB
    return db


def sar_objects(land: np.ndarray, objects: Objects, numbers: np.ndarray) -> np.ndarray:
    """Puts the objects of these numbers (H, W) on the land: backscatter (H, W) in dB.

    A house is, from west to east: its front, leaning over the ground before it; the corner of wall and ground, which
    sends the pulse straight back (the more so the better the wall faces the radar); its roof; its shadow.
    """
    free, kind = numbers == 0, by_number(objects.kind, numbers)
    height = by_number(objects.height, numbers)
    db = np.where(free, land, DB[kind])
    db[cast(height, 1, 0, RADAR_SHADOW) & free] = SHADOW_DB
    front = cast(height, -1, 0, LAYOVER) & free
    db[front] = np.maximum(db[front], LAYOVER_DB)
    corner = (kind == ROOF) & (shift(numbers, 1, 0) != numbers)
    facing = by_number((1 + 3 * (objects.along**4).real).astype(np.float32), numbers)  # dB: 4 head on, -2 at 45 degrees
    db[corner] = facing[corner]
    ship = kind == SHIP
    if ship.any():
        power, sea = np.zeros_like(db), ~ship
        for step, share in enumerate(SIDELOBES, 1):
            for dx, dy in ((step, 0), (-step, 0), (0, step), (0, -step)):
                power += np.float32(share) * shift(ship, dx, dy)
        sea &= power > 0
        db[sea] = 10 * np.log10(10 ** (db[sea] / 10) + power[sea] * 10 ** (DB[SHIP] / 10))
    return db


def eo_land(world: World, texture: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) float32 of the land without objects, in 0..255 or a little outside."""
    classes, gain = world.classes, np.array(SEASONS[world.season][1], dtype=np.float32)
    rgb = (COLOURS * (1 + SEASON[:, None] * (gain - 1)))[classes]
    water, forest = classes == WATER, classes == FOREST
    shallow = np.clip(1.8 - 1.6 * blur(water, 9), 0, 1) * water
    rgb += shallow[..., None] * np.array((14, 30, 22), dtype=np.float32)
    rgb *= (1 + texture / 9)[..., None]
    rgb[cast(forest * np.float32(TREES), -1, -1, SUN_SHADOW) & ~forest] *= SHADE
    return rgb


def eo_objects(land: np.ndarray, objects: Objects, numbers: np.ndarray) -> np.ndarray:
    """Puts the objects of these numbers (H, W) on the land: colours (H, W, 3) float32."""
    rgb, there = land.copy(), numbers > 0
    rgb[cast(by_number(objects.height, numbers), -1, -1, SUN_SHADOW) & ~there] *= SHADE
    rgb[there] = objects.colour[numbers[there] - 1]
    return rgb


def speckle(rng: np.random.Generator, size: int, looks: float) -> np.ndarray:
    """Multiplicative noise (size, size) of an intensity image that averages `looks` looks: gamma of mean 1."""
    return rng.standard_gamma(looks, (size, size), dtype=np.float32) / np.float32(looks)


def render(world: World, rng: np.random.Generator, looks: float) -> Scene:
    """Takes both pictures of a world. `rng` draws texture, speckle and grain, in this order, whatever the objects."""
    size, objects, (low, high) = len(world.classes), world.objects, DB_RANGE
    in_sar, in_eo = presence(objects)
    always = draw_objects(objects, in_sar & in_eo, np.zeros((size, size), np.int32))
    sar_numbers, eo_numbers = draw_objects(objects, ~in_eo, always), draw_objects(objects, ~in_sar, always)
    texture = draw_texture(world, rng)

    land = sar_land(world, texture)
    db = sar_objects(land, objects, sar_numbers)
    sar_only = (db != sar_objects(land, objects, always)) | (sar_numbers != always)
    db += 10 * np.log10(speckle(rng, size, looks) + np.float32(1e-9))
    sar = np.clip((db - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8)

    land = eo_land(world, texture)
    rgb = eo_objects(land, objects, eo_numbers)
    eo_only = (rgb != eo_objects(land, objects, always)).any(2) | (eo_numbers != always)
    rgb += 2.5 * rng.standard_normal((size, size, 1), dtype=np.float32)
    eo = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).filter(SOFT)
    classes = np.where(eo_numbers > 0, by_number(objects.kind, eo_numbers), world.classes).astype(np.uint8)
    return Scene(sar, np.asarray(eo), sar_only, blur(eo_only, 1) > 0, classes)  # SOFT reaches one pixel far


def draw(seed: int = 0, scene: int = 0, patch: int = 0, size: int = 256, looks: float = 4) -> Scene:
    """One pair and its truth. Follows from its arguments alone; the patches of a scene share season and style."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scene, patch, 1)))
    return render(plan(seed, scene, patch, size), rng, looks)


# ---------------------------------------------------------------- the files


def write_pair(index: int, out: Path, per_scene: int, seed: int, size: int, looks: float) -> None:
    """Draws pair number `index` and writes its four pictures; each appears under its name only when complete."""
    scene, patch = divmod(index, per_scene)
    season, pair = season_of(scene), draw(seed, scene, patch, size, looks)
    change = pair.sar_only + 2 * pair.eo_only.astype(np.uint8)
    pictures = {"s1": pair.sar, "s2": pair.eo, "change": change, "class": pair.classes}
    palettes = {"change": CHANGE_COLOURS, "class": [kind.colour for kind in CLASSES]}
    for kind, pixels in pictures.items():
        picture = Image.fromarray(pixels)
        if kind in palettes:
            picture.putpalette([c for colour in palettes[kind] for c in colour])
        folder = out / season / f"{kind}_{scene}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{season}_{kind}_{scene}_p{patch}.png"
        with atomic(path) as temporary:
            picture.save(temporary)


def write_dataset(out: Path, pairs: int, size: int = 256, seed: int = 0, looks: float = 4, workers: int = 1) -> None:
    """Writes `pairs` pairs in the layout of SEN1-2; what is drawn does not depend on the number of workers."""
    for name, value, least in (("pairs", pairs, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be {least} or more")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"--size is {size}; it must be between {MIN_SIZE} and {MAX_SIZE}")
    if not 0 < looks < math.inf:
        raise ValueError(f"--looks is {looks}; it must be a number above 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and is not an empty folder; remove it or name another one")
    out.mkdir(parents=True, exist_ok=True)
    per_scene = min(max(pairs // 10, 1), PATCHES)  # ten scenes at least, so that they can be split by scene
    write = partial(write_pair, out=out, per_scene=per_scene, seed=seed, size=size, looks=looks)
    # Ctrl-C is for this process, which then ends its workers.
    with multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        list(tqdm(pool.imap_unordered(write, range(pairs), chunksize=4), total=pairs, unit="pair"))
    about = {"pairs": pairs, "size": size, "seed": seed, "looks": looks, "patches in a scene": per_scene}
    about |= {"SAR 0 and 255, dB": DB_RANGE, "change": ["none", "only in SAR", "only in EO", "both"]}
    about |= {"class": [kind.name for kind in CLASSES], "colour not in SAR": [CLASSES[k].name for k in AMBIGUOUS]}
    with atomic(out / "synth.json") as temporary:  # last: where it is, all is there
        temporary.write_text(json.dumps(about, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Writes a dataset; returns the exit code."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder to write: a new or an empty one")
    add("--pairs", type=int, default=1000, help="how many pairs (default: %(default)s)")
    add("--size", type=int, default=256, help="pixels a side, 64 or more (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed is another country (default: %(default)s)")
    add("--looks", type=float, default=4, help="1: strong speckle, 100: hardly any (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that draw (default: %(default)s)")
    write_dataset(**vars(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    run(main)
