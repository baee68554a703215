"""Draws pairs of SAR and optical (EO) images of the invented country of `world.py`, of which the truth is known.

    (seed, scene, patch) -> plan -> World -> render -> Scene -> four PNG files in the layout of SEN1-2

What the EO image shows follows, with one exception, from what the SAR image shows: every kind of land has its own
level, texture or shape in both, and what varies within a kind (vigour of a field, furrows, crowns, season) varies
in both. The exception is `AMBIGUOUS`: roofs are red, grey or dark by a draw that leaves no trace in the SAR image.

Objects (houses, ships) are all that changes between the two images: a share `CHANGED` of them was there when only
one of the two was taken. A pixel is marked as changed exactly where the image that has the object differs from the
image without it - shadow, layover and sidelobes included - or where the object stands.

The radar flies in the west and looks east: houses lean to the west and hide what is east of them. The sun is in the
south-east: shadows fall to the north-west. (`world.py`: x runs east, y runs south, a pixel is some 3 metres.)

    python synth.py sen12-synthetic/ --pairs 1000 --size 256 --seed 0
"""

import math
import multiprocessing
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

CHANGED = 0.18  # fraction of the objects that only one of the two images shows
CHANGE_COLOURS = ((0, 0, 0), (255, 0, 80), (0, 200, 170), (255, 255, 255))  # none, SAR only, EO only, both
DB_RANGE = (-25.0, 0.0)  # backscatter that becomes 0 and 255 in the 8-bit SAR image
LAYOVER, RADAR_SHADOW, SUN_SHADOW = 0.9, 1.3, 0.6  # reach in pixels for every pixel of height
TREES = 2.2  # height, pixels
SHADE = np.array((0.50, 0.54, 0.62), dtype=np.float32)  # of a shadow, which the blue sky lights
SIDELOBES = (0.012, 0.003, 0.005, 0.0015, 0.0025, 0.001)  # power of a ship's echo 1, 2, ... pixels beside it


class Scene(NamedTuple):
    sar: np.ndarray  # (H, W) uint8, DB_RANGE -> 0..255
    eo: np.ndarray  # (H, W, 3) uint8
    change: np.ndarray  # (H, W) uint8: 1 where the SAR image shows what the EO image does not, 2 the reverse, 3 both
    classes: np.ndarray  # (H, W) uint8, index into CLASSES: what the EO image shows, since that is to be generated


# ----------------------------------------------------------------------------------------------------------
# The pictures


def shift(a: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The picture (H, W) moved by (dx, dy) pixels, zeros coming in."""
    (h, w), far = a.shape, max(abs(dx), abs(dy))
    return np.pad(a, far)[far - dy :, far - dx :][:h, :w]


def cast(height: np.ndarray, dx: int, dy: int, reach: float) -> np.ndarray:
    """Where things of this height (H, W) throw a shadow (or lean over) in direction (dx, dy): bool (H, W)."""
    shadow = np.zeros(height.shape, bool)
    for step in range(1, int(height.max() * reach) + 1):
        shadow |= shift(height, step * dx, step * dy) * reach >= step
    return shadow


def draw_objects(objects: Objects, which: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Adds the objects `which` (bool (N,)) to a picture (H, W) int32 of object numbers: 1, 2, ...; 0 is land."""
    picture = Image.fromarray(numbers)
    for i in np.flatnonzero(which):
        ImageDraw.Draw(picture).polygon(flat(objects.outline[i]), fill=int(i) + 1)
    return np.asarray(picture)


def by_number(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Looks a property of the objects (N,) up in the picture (H, W) of their numbers; land gets 0."""
    return np.append(values.dtype.type(0), values)[numbers]


def draw_texture(world: World, rng: np.random.Generator) -> np.ndarray:
    """What varies within a kind of land, (H, W) float32: x dB in the SAR image, x / 9 of the brightness in the EO."""
    classes, size = world.classes, len(world.classes)
    line = np.arange(size, dtype=np.float32)
    db = CROWNS[classes] * (0.8 * noise(rng, size, 3.5) + 0.5 * noise(rng, size, 11))
    db += FURROWS[classes] * np.sin(world.furrows.real * line + world.furrows.imag * line[:, None])
    db += VIGOUR[classes] * world.vigour
    db += 0.3 * noise(rng, size, 90)  # the lie of the land
    return np.where(classes == WATER, np.clip(noise(rng, size, 60), 0, 1.5), db)  # wind on water


def radar(world: World, texture: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Backscatter (H, W) in dB, without speckle, with the objects of these numbers (H, W).

    A house is, from west to east: its front, leaning over the ground before it; the corner of wall and ground, which
    sends the pulse straight back (the more so the better the wall faces the radar); its roof; its shadow.
    """
    classes, objects, free = world.classes, world.objects, numbers == 0
    _, plants, _ = SEASONS[world.season]
    forest = classes == FOREST
    trees = forest * TREES
    db = DB[classes] + SEASON[classes] * np.float32(plants) + texture
    db[cast(trees, 1, 0, RADAR_SHADOW) & ~forest] -= 5  # some light comes through
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
    """Multiplicative noise (size, size) of an intensity image that averages `looks` looks: gamma of mean 1."""
    return rng.standard_gamma(looks, (size, size), dtype=np.float32) / np.float32(looks)


def render(world: World, rng: np.random.Generator, looks: float) -> Scene:
    """Takes both pictures of a world. `rng` draws texture, speckle and grain, in this order, whatever the objects."""
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

    change = sar_only + np.uint8(2) * (blur(eo_only, 1) > 0)  # soft reaches one pixel far
    classes = np.where(eo_numbers > 0, by_number(objects.kind, eo_numbers), world.classes)
    return Scene(sar, eo, change, classes)


def draw(seed: int = 0, scene: int = 0, patch: int = 0, size: int = 256, looks: float = 4) -> Scene:
    """One pair and its truth. Follows from its arguments alone; the patches of a scene share season and style."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scene, patch, 1)))
    return render(plan(seed, scene, patch, size), rng, looks)


# ----------------------------------------------------------------------------------------------------------
# The files


def write_pair(index: int, out: Path, per_scene: int, seed: int, size: int, looks: float) -> None:
    """Draws pair number `index` and writes its four pictures; each appears under its name only when complete."""
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
    """Writes `pairs` pairs in the layout of SEN1-2; what is drawn does not depend on the number of workers."""
    if not 64 <= size <= 8192:
        raise ValueError(f"--size is {size}; it must be between 64 and 8192")
    if not 0 < looks < math.inf:
        raise ValueError(f"--looks is {looks}; it must be a number above 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and is not an empty folder; remove it or name another one")
    out.mkdir(parents=True, exist_ok=True)
    per_scene = min(max(pairs // 10, 1), 20)  # ten scenes or more, if there are pairs enough, so that they can be split
    write = partial(write_pair, out=out, per_scene=per_scene, seed=seed, size=size, looks=looks)
    # Ctrl-C is for this process, which then ends its workers.
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        list(tqdm(pool.map(write, range(pairs), chunksize=4), total=pairs, unit="pair"))
    except BrokenProcessPool as error:
        raise MemoryError("a process that draws was killed: use fewer --workers") from error
    finally:
        for worker in multiprocessing.active_children():  # at once: what it draws may take minutes
            worker.kill()
        pool.shutdown()
    about = {"pairs": pairs, "size": size, "seed": seed, "looks": looks, "patches in a scene": per_scene}
    about |= {"SAR 0 and 255, dB": DB_RANGE, "change": ["none", "only in SAR", "only in EO", "both"]}
    about |= {"class": NAMES, "colour not in SAR": [NAMES[kind] for kind in AMBIGUOUS]}
    write_json(out / "synth.json", about)  # last: where it is, all is there


def main(arguments: list[str] | None = None) -> int:
    """Writes a dataset; returns the exit code."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder to write: a new or an empty one")
    add("--pairs", type=positive, default=1000, help="how many pairs (default: %(default)s)")
    add("--size", type=int, default=256, help="pixels a side, 64 or more (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="another seed is another country (default: %(default)s)")
    add("--looks", type=float, default=4, help="1: strong speckle, 100: hardly any (default: %(default)s)")
    add("--workers", type=positive, default=1, help="processes that draw (default: %(default)s)")
    write_dataset(**vars(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    run(main)
