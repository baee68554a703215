"""An invented country: decides what stands where, so that the truth about each pixel is known.

    (seed, scene, patch) -> plan -> World, from which synth.py draws a SAR and an EO image

x points east, y points south, and a pixel is about 3 metres. Points and directions are complex numbers x + iy.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = (
    # name; EO colour; backscatter in dB; texture in dB of tree crowns, furrows, vigour; how much the season changes it
    ("water", (26, 62, 92), -21.5, 0.0, 0.0, 0.0, 0.0),
    ("road", (122, 121, 126), -19.0, 0.0, 0.0, 0.0, 0.0),
    ("sand", (240, 228, 200), -18.0, 0.0, 0.0, 0.0, 0.0),
    ("bare soil", (146, 104, 78), -16.5, 0.1, 0.7, 0.7, 0.3),
    ("meadow", (130, 162, 88), -14.4, 0.3, 0.0, 0.7, 1.0),
    ("wheat", (210, 188, 122), -12.3, 0.1, 0.5, 0.7, 1.0),
    ("rapeseed", (190, 190, 66), -10.2, 0.2, 0.4, 0.7, 1.0),
    ("maize", (66, 124, 58), -8.2, 0.2, 0.6, 0.7, 1.0),
    ("forest", (34, 70, 44), -7.4, 1.5, 0.0, 0.0, 0.7),
    ("built-up ground", (186, 174, 156), -5.6, 0.5, 0.0, 0.0, 0.0),
    ("roof", (178, 92, 70), -9.0, 0.0, 0.0, 0.0, 0.0),
    ("ship", (240, 240, 236), 4.0, 0.0, 0.0, 0.0, 0.0),
)
WATER, ROAD, SAND, SOIL, MEADOW, WHEAT, RAPESEED, MAIZE, FOREST, GROUND, ROOF, SHIP = range(len(CLASSES))
NAMES, *COLUMNS = zip(*CLASSES, strict=True)
COLOURS, DB, CROWNS, FURROWS, VIGOUR, SEASON = (np.array(column, dtype=np.float32) for column in COLUMNS)
ROOFS = np.array(((178, 92, 70), (150, 152, 158), (84, 80, 84)), dtype=np.float32)  # possible colours of roofs
AMBIGUOUS = (ROOF,)  # classes whose EO colour does not follow from the SAR image

SEASONS = (  # name; change of the plants' backscatter in dB; factors of their red, green and blue
    ("ROIs1158_spring", 0.3, (0.94, 1.05, 0.94)),
    ("ROIs1868_summer", 0.6, (1.00, 1.00, 0.95)),
    ("ROIs1970_fall", -0.4, (1.08, 0.97, 0.92)),
    ("ROIs2017_winter", -0.9, (0.97, 0.94, 1.04)),
)


class Objects(NamedTuple):
    outline: np.ndarray  # (N, 5) complex, pixels
    kind: np.ndarray  # (N,) uint8, ROOF or SHIP
    height: np.ndarray  # (N,) float32, pixels
    corner: np.ndarray  # (N,) float32, echo of the corner between wall and ground, dB
    colour: np.ndarray  # (N, 3) float32, EO colour
    coin: np.ndarray  # (N,) in [0, 1): the lowest are in the SAR image only, the highest in the EO image only


class World(NamedTuple):  # what both images are drawn from
    season: int  # index into SEASONS
    classes: np.ndarray  # (H, W) uint8, index into CLASSES, without objects
    vigour: np.ndarray  # (H, W) float32 in [-1, 1], one value for each field
    furrows: np.ndarray  # (H, W) complex64, wave vector of the field's rows, radians a pixel
    bridge: np.ndarray  # (H, W) bool
    objects: Objects


# ----------------------------------------------------------------------------------------------------------
# Noise, masks, points, lines


def noise(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Smooth noise (size, size) float32 with a variance of about 1 and a grid spacing of `cell` pixels."""
    n = math.ceil(size / cell) + 3
    grid = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
    x, y = rng.uniform(1, 2, 2)
    box = (x, y, x + size / cell, y + size / cell)
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box)) * np.float32(1.3)


def blur(mask: np.ndarray, radius: int) -> np.ndarray:
    """Box blur: the mean of a mask (H, W) over squares of side 2 radius + 1, float32 in [0, 1]."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(radius))
    return np.asarray(picture, dtype=np.float32) / 255


def lattice(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Random points (N,) complex in and around the image: one in each cell, at least half a cell apart."""
    n = math.ceil(size / cell) + 1
    corner = np.arange(n) * cell - rng.uniform(0, cell)
    x, y = corner + rng.uniform(0.25, 0.75, (2, n, n)) * cell
    return (x + 1j * y.T).ravel()


def flat(points: np.ndarray | list[complex]) -> list[float]:
    """Complex points as the list x, y, x, y, ... that Pillow expects."""
    return np.array(points).view(float).tolist()


def curve(rng: np.random.Generator, size: int, bend: float, wavelength: float) -> list[float]:
    """A winding line across the image, as a `flat` list; it turns by about `bend` radians to each side."""
    t = np.arange(-1.5 * size, 1.5 * size, 4.0)
    sway = np.zeros(len(t))
    for length in (wavelength * rng.uniform(0.8, 1.25), wavelength * rng.uniform(0.3, 0.5)):
        sway += bend * length / (2 * math.pi) * np.sin(2 * math.pi * (t / length + rng.uniform()))
    middle = complex(*rng.uniform(0.2, 0.8, 2)) * size
    return flat(middle + np.exp(1j * rng.uniform(0, math.pi)) * (t + 1j * sway))


# ----------------------------------------------------------------------------------------------------------
# The plan


def draw_fields(rng: np.random.Generator, size: int, area: float, along: complex) -> np.ndarray:
    """Divides the image into fields by cuts along and across a direction: field numbers (H, W) int32, from 0."""
    picture, number = Image.new("I", (size, size)), 0
    parts = [[0j, complex(size), complex(size, size), complex(0, size)]]  # convex polygons
    while parts:
        part = parts.pop()
        shoelace = sum((a.conjugate() * b).imag for a, b in zip(part, part[1:] + part[:1], strict=True))
        if shoelace / 2 < area * rng.uniform(0.7, 2.2):
            ImageDraw.Draw(picture).polygon(flat(part), fill=number)
            number += 1
            continue
        turn = along * np.exp(1j * rng.normal(0, 0.1))
        reaches = [[(p * normal.conjugate()).real for p in part] for normal in (turn, 1j * turn)]
        reach = max(reaches, key=np.ptp)  # cut the longer side
        cut = min(reach) + np.ptp(reach) * rng.uniform(0.35, 0.65)
        sides = [r - cut for r in reach]
        below, above = [], []
        for a, b, side, next_side in zip(part, part[1:] + part[:1], sides, sides[1:] + sides[:1], strict=True):
            (below if side < 0 else above).append(a)
            if (side < 0) != (next_side < 0):
                crossing = a + (b - a) * side / (side - next_side)
                below.append(crossing)
                above.append(crossing)
        parts += [below, above]
    return np.asarray(picture)


def draw_water(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """The water mask, bool (size, size)."""
    if kind == "river":
        picture = Image.new("L", (size, size))
        for _ in range(1 + size // 600):
            line, width = curve(rng, size, 0.9, rng.uniform(120, 260)), int(rng.uniform(10, 30))
            ImageDraw.Draw(picture).line(line, 1, width, "curve")
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
    """Draws blocks and streets; a small radius leaves one block, a farm. Returns the houses, as `has_room` expects."""
    along = np.exp(1j * rng.uniform(0, math.pi / 2))
    deep, wide, tall, houses = rng.uniform(24, 32), rng.uniform(30, 56), rng.uniform(2.5, 5.5), []
    n, m = int(radius / deep) + 1, int(radius / wide) + 1
    for block in (complex(i * deep, j * wide) for i in range(-n, n + 1) for j in range(-m, m + 1)):
        far = abs(block) / radius
        if far > rng.uniform(0.75, 1.15):
            continue
        corners = (complex(a * deep, b * wide) / 2 for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)))
        shape = [centre + along * (block + corner) for corner in corners]
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


def has_room(found: list[tuple], free: np.ndarray, margin: float) -> np.ndarray:
    """The objects (N, 4) complex inside the image whose corners, edges and centre lie on `free`, bool (H, W).

    An object is (centre, direction, half the length along it + i half the width across it, height).
    """
    found = np.array(found).reshape(-1, 4)
    centre, along, half, _ = found.T[:, :, None]
    steps = np.array((-margin, 0, margin))
    spots = centre + along * (half.real * steps.repeat(3) + 1j * half.imag * np.tile(steps, 3))  # (N, 9)
    inside = ((spots.real >= 0) & (spots.real < len(free)) & (spots.imag >= 0) & (spots.imag < len(free))).any(1)
    x, y = (np.clip(c, 0, len(free) - 1).astype(int) for c in (spots.real, spots.imag))
    return found[inside & free[y, x].all(1)]


def plan(seed: int, scene: int, patch: int, size: int) -> World:
    """The world of one image pair: everything except texture, speckle and film grain."""
    shared = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scene,)))  # style of the scene
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scene, patch, 0)))

    # Fields, with hedges between some of them, and woods.
    field = draw_fields(rng, size, shared.uniform(900, 2200), np.exp(1j * shared.uniform(0, math.pi)))
    count = field.max() + 1
    crops = rng.choice(np.arange(SOIL, MAIZE + 1), count, p=shared.dirichlet(np.full(5, 4.0))).astype(np.uint8)
    border = (np.diff(field, axis=1, prepend=field[:, :1]) != 0) | (np.diff(field, axis=0, prepend=field[:1]) != 0)
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

    # Water with beaches, then roads; they cross narrow water on bridges.
    kind = shared.choice(["river", "lakes", "coast", "dry"], p=[0.35, 0.2, 0.3, 0.15])
    water = draw_water(rng, size, kind)
    if kind != "river":
        classes[(blur(water, 5) > 0.15) & (noise(rng, size, 40) > -0.3)] = SAND
    classes[water] = WATER
    roads = Image.new("L", (size, size))
    for _ in range(rng.integers(1, 3) + size // 400):
        ImageDraw.Draw(roads).line(curve(rng, size, 0.25, 300), 1, int(rng.integers(3, 5)), "curve")
    road = (np.asarray(roads) > 0) & (blur(water, 24) < 0.75)
    classes[road] = ROAD

    # Objects: houses with enough room, ships with enough water around them.
    houses = has_room(houses, blur(np.isin(classes, (WATER, ROAD)), 1) == 0, margin=1)
    berths = [at for at in lattice(rng, size, 34) if rng.uniform() < 0.3]
    ships = [(at, np.exp(1j * rng.uniform(0, 2 * math.pi)), rng.uniform(4.5, 9) * (1 + 0.3j), 0) for at in berths]
    ships = has_room(ships, classes == WATER, margin=1.7)
    kind = np.repeat(np.uint8((ROOF, SHIP)), (len(houses), len(ships)))
    centre, along, half, height = np.concatenate([houses, ships]).T[:, :, None]  # (N, 1) each
    x = np.where(kind[:, None] == SHIP, (-1, 0.5, 1, 0.5, -1), (-1, 1, 1, 1, -1))  # ships have a bow
    outline = centre + along * (half.real * x + 1j * half.imag * (-1, -1, 0, 1, 1))
    corner = (1 + 3 * (along[:, 0] ** 4).real).astype(np.float32)  # 4 dB head on, -2 dB at 45 degrees
    colour = ROOFS[rng.choice(len(ROOFS), len(kind), p=[0.5, 0.3, 0.2])]
    colour[kind == SHIP] = COLOURS[SHIP]
    coin = rng.uniform(size=len(kind))
    objects = Objects(outline, kind, height[:, 0].real.astype(np.float32), corner, colour, coin)

    vigour = rng.uniform(-1, 1, count).astype(np.float32)[field]
    furrows = 2 * math.pi / rng.uniform(4.5, 7, count) * np.exp(1j * rng.uniform(0, math.pi, count))
    furrows = furrows.astype(np.complex64)[field]
    return World(scene % len(SEASONS), classes, vigour, furrows, road & water, objects)
