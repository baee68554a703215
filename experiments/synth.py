"""Draws a synthetic dataset: pairs of SAR and optical (EO) images of the country that `world.py` invents.

    python -m experiments.synth sen12-synthetic/ --pairs 1000 --size 256 --seed 0

    (seed, scene, patch) -> plan -> World -> render -> Scene -> four PNG files in the layout of SEN1-2

Each pair comes with two masks: the class of each pixel, and what changed between the two images.

The EO image follows from the SAR image. Each class has its own level, texture or shape in both images, and what varies
within a class (vigour of a field, furrows, tree crowns, season) varies in both. There is one exception, `AMBIGUOUS`:
roofs are red, grey or dark, and the SAR image does not show which.

Only objects (houses, ships) change. A share `CHANGED` of them is in one of the two images only. A pixel counts as
changed where the image with the object differs from the image without it (shadow, layover and sidelobes included),
and where the object stands.

The radar is in the west and looks east: houses lean to the west, and their radar shadows fall to the east. The sun is
in the south-east: its shadows fall to the north-west.
"""

import math
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from common import Parser, atomic, positive, run, seed_number, write_json
from data import Pair, center_crop
from experiments.world import (
    AMBIGUOUS,
    COLOURS,
    CROWNS,
    DB,
    FOREST,
    FURROWS,
    NAMES,
    ROOF,
    SEASON,
    SEASONS,
    SHIP,
    VIGOUR,
    WATER,
    Objects,
    World,
    blur,
    flat,
    noise,
    plan,
)

CHANGED = 0.18  # share of the objects that are in one of the two images only
CHANGE_COLOURS = ((0, 0, 0), (255, 0, 80), (0, 200, 170), (255, 255, 255))  # none, SAR only, EO only, both
DB_RANGE = (-25.0, 0.0)  # backscatter that becomes 0 and 255 in the 8-bit SAR image
LAYOVER, RADAR_SHADOW, SUN_SHADOW = 0.9, 1.3, 0.6  # pixels of reach for each pixel of height
TREES = 2.2  # height, pixels
SHADE = np.array((0.50, 0.54, 0.62), dtype=np.float32)  # colour factors of a shadow, which the blue sky lights
SIDELOBES = (0.012, 0.003, 0.005, 0.0015, 0.0025, 0.001)  # share of a ship's echo 1, 2, ... pixels away


class Scene(NamedTuple):
    sar: np.ndarray  # (H, W) uint8, DB_RANGE mapped to 0..255
    eo: np.ndarray  # (H, W, 3) uint8
    change: np.ndarray  # (H, W) uint8: 1 changed in the SAR image only, 2 in the EO image only, 3 in both
    classes: np.ndarray  # (H, W) uint8, index into CLASSES: what the EO image shows


# ----------------------------------------------------------------------------------------------------------
# Drawing


def shift(a: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The image (H, W) moved by (dx, dy) pixels and filled up with zeros."""
    (h, w), far = a.shape, max(abs(dx), abs(dy))
    return np.pad(a, far)[far - dy :, far - dx :][:h, :w]


def cast(height: np.ndarray, dx: int, dy: int, reach: float) -> np.ndarray:
    """Where the shadow (or layover) of things of this height (H, W) falls in direction (dx, dy): bool (H, W)."""
    shadow = np.zeros(height.shape, bool)
    for step in range(1, int(height.max() * reach) + 1):
        shadow |= shift(height, step * dx, step * dy) * reach >= step
    return shadow


def draw_objects(objects: Objects, which: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Draws the objects `which` (bool (N,)) into an image (H, W) int32 of object numbers: 1, 2, ...; 0 is land."""
    picture = Image.fromarray(numbers)
    for i in np.flatnonzero(which):
        ImageDraw.Draw(picture).polygon(flat(objects.outline[i]), fill=int(i) + 1)
    return np.asarray(picture)


def by_number(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A property of the objects (N,) at each pixel, from the image of their numbers (H, W); land gets 0."""
    return np.append(values.dtype.type(0), values)[numbers]


def draw_texture(world: World, rng: np.random.Generator) -> np.ndarray:
    """The variation within a class, (H, W) float32: x means x dB in SAR and a factor of 1 + x / 9 in EO."""
    classes, size = world.classes, len(world.classes)
    line = np.arange(size, dtype=np.float32)
    db = CROWNS[classes] * (0.8 * noise(rng, size, 3.5) + 0.5 * noise(rng, size, 11))
    db += FURROWS[classes] * np.sin(world.furrows.real * line + world.furrows.imag * line[:, None])
    db += VIGOUR[classes] * world.vigour
    db += 0.3 * noise(rng, size, 90)  # relief
    return np.where(classes == WATER, np.clip(noise(rng, size, 60), 0, 1.5), db)  # wind on water


def radar(world: World, texture: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Backscatter (H, W) in dB without speckle, with the objects of these numbers (H, W).

    From west to east, a house consists of its front, which lies over the ground before it (layover), the corner between
    wall and ground (its echo depends on the angle between wall and radar), the roof, and the shadow.
    """
    classes, objects, free = world.classes, world.objects, numbers == 0
    _, plants, _ = SEASONS[world.season]
    forest = classes == FOREST
    trees = forest * TREES
    db = DB[classes] + SEASON[classes] * np.float32(plants) + texture
    db[cast(trees, 1, 0, RADAR_SHADOW) & ~forest] -= 5  # tree crowns let some of the pulse through
    db[cast(trees, -1, 0, LAYOVER) & ~forest] = -5
    db[world.bridge] = -4

    kind, height = by_number(objects.kind, numbers), by_number(objects.height, numbers)
    db[~free] = DB[kind[~free]]
    db[cast(height, 1, 0, RADAR_SHADOW) & free] = -24
    front = cast(height, -1, 0, LAYOVER) & free
    db[front] = np.maximum(db[front], -3.5)
    corner = (kind == ROOF) & (shift(numbers, 1, 0) != numbers)
    db[corner] = objects.corner[numbers[corner] - 1]
    ship = kind == SHIP
    if ship.any():
        power = np.zeros_like(db)
        for step, share in enumerate(SIDELOBES, 1):
            for dx, dy in ((step, 0), (-step, 0), (0, step), (0, -step)):
                power += np.float32(share) * shift(ship, dx, dy)
        sea = ~ship & (power > 0)
        db[sea] = 10 * np.log10(10 ** (db[sea] / 10) + power[sea] * 10 ** (DB[SHIP] / 10))
    return db


def camera(world: World, texture: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) float32 with the objects of these numbers (H, W), in 0..255 or a little outside."""
    classes, objects, there = world.classes, world.objects, numbers > 0
    _, _, gain = SEASONS[world.season]
    water, forest = classes == WATER, classes == FOREST
    rgb = (COLOURS * (1 + SEASON[:, None] * (np.float32(gain) - 1)))[classes]
    shallow = np.clip(1.8 - 1.6 * blur(water, 9), 0, 1) * water
    rgb += shallow[..., None] * np.array((14, 30, 22), dtype=np.float32)
    rgb *= (1 + texture / 9)[..., None]
    for height, solid in ((forest * TREES, forest), (by_number(objects.height, numbers), there)):
        rgb[cast(height, -1, -1, SUN_SHADOW) & ~solid] *= SHADE
    rgb[there] = objects.colour[numbers[there] - 1]
    return rgb


def speckle(rng: np.random.Generator, size: int, looks: float) -> np.ndarray:
    """Multiplicative noise (size, size) of an intensity image of `looks` looks: gamma distributed with mean 1."""
    return rng.standard_gamma(looks, (size, size), dtype=np.float32) / np.float32(looks)


def render(world: World, rng: np.random.Generator, looks: float) -> Scene:
    """Draws both images of a world. `rng` draws texture, speckle and grain in this order, whatever the objects."""
    size, objects, (low, high) = len(world.classes), world.objects, DB_RANGE
    in_sar, in_eo = objects.coin < 1 - CHANGED / 2, objects.coin >= CHANGED / 2
    always = draw_objects(objects, in_sar & in_eo, np.zeros((size, size), np.int32))
    sar_numbers, eo_numbers = draw_objects(objects, ~in_eo, always), draw_objects(objects, ~in_sar, always)
    texture = draw_texture(world, rng)

    db = radar(world, texture, sar_numbers)
    sar_only = (db != radar(world, texture, always)) | (sar_numbers != always)
    db += 10 * np.log10(speckle(rng, size, looks) + np.float32(1e-9))
    sar = np.clip((db - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8)

    rgb = camera(world, texture, eo_numbers)
    eo_only = (rgb != camera(world, texture, always)).any(2) | (eo_numbers != always)
    rgb += 2.5 * rng.standard_normal((size, size, 1), dtype=np.float32)
    soft = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 16, 2, 1, 2, 1))
    eo = np.asarray(Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).filter(soft))

    change = sar_only + np.uint8(2) * (blur(eo_only, 1) > 0)  # the filter `soft` reaches one pixel
    classes = np.where(eo_numbers > 0, by_number(objects.kind, eo_numbers), world.classes)
    return Scene(sar, eo, change, classes)


def draw(seed: int = 0, scene: int = 0, patch: int = 0, size: int = 256, looks: float = 4) -> Scene:
    """One pair with its masks, a function of the arguments alone. The patches of a scene share season and style."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scene, patch, 1)))
    return render(plan(seed, scene, patch, size), rng, looks)


# ----------------------------------------------------------------------------------------------------------
# Files


def write_pair(index: int, out: Path, per_scene: int, seed: int, size: int, looks: float) -> None:
    """Draws pair number `index` and writes its four images."""
    scene, patch = divmod(index, per_scene)
    season, palettes = SEASONS[scene % len(SEASONS)][0], {"change": CHANGE_COLOURS, "class": COLOURS}
    for kind, pixels in zip(("s1", "s2", "change", "class"), draw(seed, scene, patch, size, looks), strict=True):
        picture = Image.fromarray(pixels)
        if kind in palettes:
            picture.putpalette(np.array(palettes[kind], np.uint8).tobytes())
        path = out / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_p{patch}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            picture.save(temporary)


def write_dataset(out: Path, pairs: int, size: int = 256, seed: int = 0, looks: float = 4, workers: int = 1) -> None:
    """Writes a dataset in the layout of SEN1-2. The images do not depend on `workers`, the number of processes.

    Raises ValueError if an argument is out of range, or if `out` exists and is not an empty folder.
    """
    if not 64 <= size <= 8192:
        raise ValueError(f"--size is {size}; it must be between 64 and 8192")
    if not 0 < looks < math.inf:
        raise ValueError(f"--looks is {looks}; it must be a number above 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; remove it or choose another one")
    out.mkdir(parents=True, exist_ok=True)
    per_scene = min(max(pairs // 10, 1), 20)  # at least ten scenes, if there are ten pairs: a split needs several
    write = partial(write_pair, out=out, per_scene=per_scene, seed=seed, size=size, looks=looks)
    if workers == 1:
        for index in tqdm(range(pairs), unit="pair"):
            write(index)
    else:
        # The workers ignore Ctrl-C: this process catches it, and the pool ends after the pairs that are being drawn.
        with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                list(tqdm(pool.map(write, range(pairs)), total=pairs, unit="pair"))
            except BrokenProcessPool as error:
                raise MemoryError("a drawing process was killed: use fewer --workers") from error
    about = {"pairs": pairs, "size": size, "seed": seed, "looks": looks, "patches in a scene": per_scene}
    about |= {"SAR 0 and 255, dB": DB_RANGE, "change": ["none", "only in SAR", "only in EO", "both"]}
    about |= {"class": NAMES, "colour not in SAR": [NAMES[kind] for kind in AMBIGUOUS]}
    write_json(out / "synth.json", about)  # last, as the sign that the dataset is complete


def mask_path(pair: Pair, kind: str) -> Path | None:
    """The "change" or "class" mask beside a pair; None if there is none."""
    folder, name = pair.eo.parent.name.replace("s2_", f"{kind}_"), pair.eo.name.replace("_s2_", f"_{kind}_")
    path = pair.eo.parent.parent / folder / name
    return path if path != pair.eo and path.is_file() else None


def read_mask(pair: Pair, kind: str, size: int | None = None) -> np.ndarray:
    """The "change" or "class" mask of a pair, uint8 (H, W), or its central crop (size, size). It must exist."""
    with Image.open(mask_path(pair, kind)) as image:
        mask = np.asarray(image)
    if pair.window:
        top, left, height, width = pair.window
        mask = mask[top : top + height, left : left + width]
    return center_crop(mask, size)


def main(arguments: list[str] | None = None) -> int:
    """Writes a dataset; returns the exit code."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder to write, new or empty")
    add("--pairs", type=positive, default=1000, help="number of pairs (default: %(default)s)")
    add("--size", type=int, default=256, help="side of the images in pixels, at least 64 (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="another seed gives another country (default: %(default)s)")
    add("--looks", type=float, default=4, help="1: full speckle; 100: almost none (default: %(default)s)")
    add("--workers", type=positive, default=1, help="processes that draw (default: %(default)s)")
    write_dataset(**vars(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    run(main)
