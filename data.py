"""SAR/EO pairs on disk: finds them, splits them without leaks, reads and augments them, keeps their latents.

    folder -> find_pairs -> cut_large -> split_pairs -> PairDataset -> (sar, eo), each (3, size, size) in [-1, 1]
                                                        build_cache -> CachedLatents -> their latents

Order, crops and noise of a training are drawn from (seed, sample position) alone: see `PairDataset`.
docs/data.md describes all of it for users.
"""

import hashlib
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from cdiffset import CDiffSET
from common import exclusive, read_json, some, write_json
from images import (
    AUTO,
    HOW,
    PERCENTILES,
    ImageError,
    Reading,
    eo_kind,
    image_size,
    read_eo,
    read_overview,
    read_sar,
    sar_scale,
)
from rasters import is_cross, polarisation, polarisation_partner
from weights import network_digest

# ----------------------------------------------------------------------------------------------------------
# Finding pairs


SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class Pair(NamedTuple):
    sar: Path
    eo: Path
    scene: str  # images of one scene overlap or adjoin: they never stand on both sides of a split
    split: str | None  # "train", "val" or "test" where the dataset says so
    window: tuple[int, int, int, int] | None = None  # top, left, height, width of a block of larger images
    by_place: bool = False  # where the images are georeferenced, that tells better than the scene what adjoins


class Pairs(NamedTuple):
    layout: str
    pairs: list[Pair]  # sorted by the SAR image's path, as plain strings: the same on every system
    unpaired: list[Path]  # images of this layout without a partner, sorted


# A file belongs to a layout if its path ends in the pattern; two files are a pair if their paths differ in
# nothing but "kind" (of which the row's second entry is SAR): so every variable part is a named group.
# `(?P=kind)` is what kind was before. The third entry names the groups that make the scene.
SEN_NAME = r"(?P=season)_(?P=kind)_(?P=n)_(?P<patch>p\d+)"
SEN = r"(?P<season>ROIs\d+_\w+)/(?P<kind>s1|s2)_(?P<n>\d+)/" + SEN_NAME
TERRAIN = r"(?P<terrain>\w+)/(?P<kind>s1|s2)/(?P<season>ROIs\d+_\w+)_(?P=kind)_(?P<n>\d+)_(?P<patch>p\d+)"
QXS = r"(?P<kind>sar|opt)_256_oc_0\.2/(?P<name>\d+)\.png"
SAR2OPT = r"(?P<split>train|val|test)(?P<kind>A|B)/(?P<name>[^/]+)\.png"
SN6 = r"(?P<kind>SAR-Intensity|PS-RGB)/(?P<aoi>SN6_\w+)_(?P=kind)_(?P<strip>\d+_\d+)_(?P<tile>tile_\d+)\.tif"
FOLDERS = r"(?P<kind>sar|eo)/(?P<folder>(?:.*/)?)(?P<name>[^/]+)\.(?i:png|jpe?g|tiff?)"
LAYOUTS = (  # name, SAR's kind, scene, pattern
    ("SEN1-2", "s1", ("season", "n"), SEN + r"\.png"),
    ("SEN1-2 by terrain", "s1", ("season", "n"), TERRAIN + r"\.png"),  # scenes lie in several terrains
    ("SEN12MS", "s1", ("season", "n"), SEN + r"\.tif"),
    ("QXS-SAROPT", "sar", ("name",), QXS),  # no scenes known: each image is one
    ("SAR2Opt", "A", ("split", "name"), SAR2OPT),
    ("SpaceNet6", "SAR-Intensity", ("strip",), SN6),  # a strip of flight
    ("sar/ and eo/", "sar", ("folder",), FOLDERS),  # without folders in it, each image is a scene
)


LOOKED_AT = 64  # pairs, spread over the dataset, that stand for all
BY_PLACE = ("SpaceNet6", "sar/ and eo/")  # layouts whose images may overlap although their scenes differ


def find_pairs(root: str | Path) -> Pairs:
    """Recognises the dataset in a folder and pairs its images; the dataset may lie in folders below `root`.

    Files of no known layout (labels, masks, readmes) are ignored. ValueError: not a folder, unreadable,
    empty, no known layout, no image with a partner, two of one name, or pairs of two layouts.
    """
    files, found = walk_files(root), []
    for layout, sar_kind, scene, pattern in LAYOUTS:
        pattern = re.compile(r"(?P<at>(?:.*/)?)" + pattern, re.DOTALL)
        sars, eos, rest = {}, {}, []  # SAR and EO images: {what the paths of a pair share: path}
        for name in files:
            if match := pattern.fullmatch(name):
                shared = match.groupdict()
                side = sars if shared.pop("kind") == sar_kind else eos
                twin = side.setdefault(tuple(shared.values()), name)
                if twin != name:
                    raise ValueError(f"{twin!r} and {name!r} differ only in their endings: take one of them away")
            else:
                rest.append(name)
        files = rest
        if sars or eos:
            found.append((layout, sars, eos, scene, pattern))

    paired = [row for row in found if row[1].keys() & row[2].keys()]
    if not found:
        known = ", ".join(layout for layout, *_ in LAYOUTS)
        what = "holds none of the known datasets" if files else "is empty"
        raise ValueError(f"{str(root)!r} {what} ({known}): the simplest is sar/NAME.png with eo/NAME.png")
    if not paired:
        layout, sars, eos, *_ = found[0]
        raise ValueError(
            f"{str(root)!r} looks like {layout}, but of its {len(sars)} SAR and {len(eos)} EO images "
            f"none has a partner, e.g. {min([*sars.values(), *eos.values()])!r}: put both kinds there, named alike"
            + stacking(Path(root, name) for name in sorted(sars.values()))
        )
    if len(paired) > 1:
        names = " and ".join(layout for layout, *_ in paired)
        raise ValueError(f"{str(root)!r} holds pairs of {names}: give the folder of one dataset")

    ((layout, sars, eos, scene, pattern),) = paired
    pairs, both = [], sars.keys() & eos.keys()
    for key in sorted(both, key=sars.__getitem__):
        name = sars[key]
        groups = pattern.fullmatch(name).groupdict()
        scene_name = "_".join(groups[part] for part in scene).strip("/") or groups["name"]
        folders = map(str.lower, PurePosixPath(name).parts[:-1])
        split = groups.get("split") or next((SPLITS[folder] for folder in folders if folder in SPLITS), None)
        pairs.append(Pair(Path(root, name), Path(root, eos[key]), scene_name, split, None, layout in BY_PLACE))
    unpaired = sorted(side[key] for side in (sars, eos) for key in side.keys() - both)
    return Pairs(layout, pairs, [Path(root, name) for name in unpaired])


def stacking(paths: Iterable[Path]) -> str:
    """What to do if one of the files is a polarisation of an image whose other one lies beside it; else nothing."""
    for path in paths:
        if partner := polarisation_partner(path):
            co, cross = sorted((path, partner), key=lambda file: is_cross(polarisation(file.stem)))
            command = f"rio stack {co.name} {cross.name} -o NAME.tif"
            return f"; {co.name!r} and {cross.name!r} are two polarisations of one image, make them one: {command}"
    return ""


def pair_folders(images: str | Path, truth: str | Path) -> list[Pair]:
    """(image, what it should be) of two folders and all below, paired by their paths without the ending, sorted.

    ValueError: no images, or some without a partner.
    """
    made, true = (by_name((Path(root, name) for name in walk_images(root)), root) for root in (images, truth))
    if not made and not true:
        raise ValueError(f"neither {str(images)!r} nor {str(truth)!r} holds PNG, JPEG or TIFF images")
    if alone := [repr(str((made | true)[name])) for name in sorted(made.keys() ^ true.keys())]:
        raise ValueError(f"{len(alone)} image(s) without one of the same name in the other folder: {some(alone)}")
    return [Pair(made[name], true[name], name, None) for name in sorted(made)]


def by_name(paths: Iterable[Path], root: str | Path) -> dict[str, Path]:
    """{path below the root without its ending: path}. ValueError: two have the same."""
    found: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{str(found[name])!r} and {str(path)!r} differ only in their endings: rename one of them")
        found[name] = path
    return found


def walk_images(root: str | Path) -> list[str]:
    """The PNG, JPEG and TIFF images of `walk_files`."""
    return [name for name in walk_files(root) if name.lower().endswith(SUFFIXES)]


def walk_files(root: str | Path) -> list[str]:
    """The files below `root` but hidden ones, as POSIX paths relative to it.

    Linked folders are followed, but each real folder is entered once, so that loops of links end. No file is
    looked at: 600,000 of them take seconds.
    """
    if not Path(root).is_dir():
        raise ValueError(f"{str(root)!r} is not a folder: give the folder of a dataset")

    def stop(error: OSError):
        raise ValueError(f"{error.filename!r} cannot be listed: {error.strerror}")

    seen, names = set(), []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=stop):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
        if real not in seen:
            seen.add(real)
            below = Path(os.path.relpath(folder, root)).as_posix() + "/"  # "./" for the root itself
            names += [below.removeprefix("./") + name for name in files if not name.startswith(".")]
    return names


def dataset_name(found: Pairs, root: str | Path) -> str:
    """What tells a dataset from others, wherever it lies: its layout, and the number and names of its pairs."""
    names = seed_of(*(pair.sar.relative_to(root) for pair in found.pairs))
    return f"{found.layout} of {len(found.pairs)} pairs ({names:016x})"


def describe(found: Pairs) -> list[str]:
    """What was found, in lines to print. Reads the first pairs, so it also says early what cannot be read."""

    def about(path: Path) -> str:
        (height, width), raster = image_size(path), read_overview(path)
        values = raster.bands[:, raster.valid] if raster.valid.any() else raster.bands
        size = f"{width}x{height}, {len(raster.bands)} band(s)"
        return f"{path.name!r}: {size} of {raster.bands.dtype}, {values.min():g} to {values.max():g}"

    scenes = len({pair.scene for pair in found.pairs})
    lines = [f"{found.layout}: {len(found.pairs):,} pairs in {scenes:,} scenes"]
    lines += [f"  {about(pair.sar)}; {about(pair.eo)}" for pair in found.pairs[:3]]
    if found.unpaired:
        names = some(repr(str(path)) for path in found.unpaired) + stacking(found.unpaired)
        lines.append(f"  {len(found.unpaired):,} image(s) without a partner are left out: {names}")
    return lines


def decide_reading(pairs: Sequence[Pair], reading: Reading = AUTO) -> tuple[Reading, list[str]]:
    """How all images of a dataset are read, and lines to print: where `reading` is "auto", as most images look.

    At LOOKED_AT images at most. ValueError: one cannot be read, or not like the others; or none tells what it is.
    """
    reading = reading._replace(stretch=tuple(reading.stretch) if reading.stretch else None)
    chosen, lines = evenly(list({pair.sar: pair for pair in pairs}.values()), LOOKED_AT), []  # blocks share a file
    for side, look, options in (
        ("sar", lambda raster, reading: sar_scale(raster, reading).kind, "--scale or --stretch"),
        ("eo", eo_kind, "--eo-scale"),
    ):
        kinds, notes, wrong = {}, {}, None
        for path in (getattr(pair, side) for pair in chosen):
            raster = read_overview(path)
            notes |= dict.fromkeys(raster.notes)
            try:
                kinds[path] = look(raster, reading)
            except ImageError as error:  # all is no-data, say, which does not matter if others tell
                kinds[path], wrong = None, error
        if not (counts := Counter(filter(None, kinds.values()))):
            raise wrong
        kind = counts.most_common(1)[0][0]
        reading = reading._replace(**{side: kind})
        others = [path for path in kinds if kinds[path] != kind]
        for path in others:
            look(read_overview(path), reading)  # raises if it cannot be read like the others
        how = HOW[kind]
        if kind in PERCENTILES:
            how += " ({:g} and {:g})".format(*(reading.stretch or PERCENTILES[kind]))
        lines.append("; ".join([f"{side.upper()} images are read as {how}", *notes, f"{options} overrules"]))
        if others:
            names = some(repr(str(path)) for path in others)
            lines.append(f"  {len(others)} of {len(chosen)} look otherwise, and are read like the others: {names}")
    return reading, lines


def evenly(pairs: Sequence[Pair], number: int) -> list[Pair]:
    """At most `number` of the pairs, spread over all of them."""
    number = min(number, len(pairs))
    return [pairs[i * len(pairs) // number] for i in range(number)]


def seed_of(*parts: object) -> int:
    """63 bits that depend on the parts alone, on every machine and in every version of Python."""
    text = "\0".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# ----------------------------------------------------------------------------------------------------------
# Training samples


def room(height: int, width: int, size: int) -> tuple[int, int]:
    """How far a crop can move, down and to the right. ValueError: the image is smaller."""
    if min(height, width) < size:
        raise ValueError(f"an image of {width}x{height} pixels is smaller than the crop of {size}x{size}")
    return height - size, width - size


def draw_augmentation(height: int, width: int, size: int, generator: torch.Generator) -> tuple[int, int, int]:
    """The paper's augmentation: a random crop, then flips and a rotation, each with probability 0.5.

    Returns the crop's top and left, and the orientation 0..7 for `orient`. A rotation is by 0..3 quarters, as
    in the released code. ValueError: the image is smaller than the crop.
    """
    down, right = room(height, width, size)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    top, left = draw(down + 1), draw(right + 1)
    horizontal, vertical, rotate, turns = draw(2), draw(2), draw(2), draw(4)
    # Both flips are half a turn; a vertical one alone is a horizontal one and half a turn.
    return top, left, (horizontal ^ vertical) * 4 + (turns * rotate + 2 * vertical) % 4


def orient(image: Tensor, orientation: int) -> Tensor:
    """(..., S, S) mirrored left to right if orientation >= 4, then turned by orientation % 4 quarters."""
    if orientation >= 4:
        image = image.flip(-1)
    return image.rot90(orientation % 4, (-2, -1))


def center_crop(image: Tensor, size: int | None) -> Tensor:
    """(..., H, W) -> (..., size, size), or all if that is None. ValueError: the image is smaller."""
    if size is None:
        return image
    down, right = room(*image.shape[-2:], size)
    top, left = down // 2, right // 2
    return image[..., top : top + size, left : left + size]


def read_pair(
    pair: Pair,
    reading: Reading = AUTO,
    cut: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda sar, eo: (sar, eo),
) -> tuple[Tensor, Tensor]:
    """SAR and EO, float32 (3, H, W) in [-1, 1], both `cut`. ValueError names the file that is wrong."""
    window = None
    if pair.window:
        top, left, height, width = pair.window
        window = slice(top, top + height), slice(left, left + width)
    sar, eo = read_sar(pair.sar, reading, window), read_eo(pair.eo, reading, window)
    if sar.shape != eo.shape:
        sizes = [f"{str(p)!r} is {x.shape[2]}x{x.shape[1]}" for p, x in ((pair.sar, sar), (pair.eo, eo))]
        raise ValueError(f"{sizes[0]} but {sizes[1]} pixels: the images of a pair must have equal sizes")
    try:
        return cut(sar, eo)
    except ValueError as error:
        raise ValueError(f"{str(pair.sar)!r}: {error}") from None


def read_center(pair: Pair, size: int | None, reading: Reading = AUTO) -> tuple[Tensor, Tensor]:
    """`read_pair`, of both images the central (3, size, size); all if the size is None."""
    return read_pair(pair, reading, lambda sar, eo: (center_crop(sar, size), center_crop(eo, size)))


def read_batches(
    read: Callable[[int], tuple[Tensor, Tensor]], total: int, size: int, start: int = 0, bar: str | None = None
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """read(i), two images (3, H, W), for i from `start` to total - 1, `size` at a time: their numbers, and the batches
    of both, (B, 3, H, W). bar: the title of a progress bar. ValueError: the images of a batch have several sizes.
    """
    with tqdm(total=total, initial=start, unit="image", desc=bar, disable=bar is None) as progress:
        for first in range(start, total, size):
            numbers = range(first, min(first + size, total))
            both = list(zip(*map(read, numbers)))
            if len({image.shape for side in both for image in side}) > 1:
                raise ValueError("the images have several sizes: use --batch-size 1, or cut them to one size")
            yield numbers, *map(torch.stack, both)
            progress.update(len(numbers))


class PairDataset(Dataset):
    """The samples of a training, by their position in the whole run: 0, 1, 2, ... without end.

    Position p is entry p % n of the permutation of epoch p // n, augmented by a generator of its own. Both
    depend on the seed and these numbers alone, so that a resumed run, and any number of workers and ranks,
    see the same samples.
    flips: whether images are flipped and turned, as in the paper. A radar looks to one side, where all shadows
    fall and from which all houses lean: without flips, a network learns that side, and no other.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int = 0, flips: bool = True, reading: Reading = AUTO):
        if not pairs:
            raise ValueError("there are no pairs to read")
        self.pairs, self.size, self.seed, self.flips, self.reading = list(pairs), size, seed, flips, reading
        self.epoch, self.order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Pairs, that is, the length of an epoch; positions go on beyond it."""
        return len(self.pairs)

    def index(self, position: int) -> int:
        """The number of the pair behind a position."""
        epoch, index = divmod(position, len(self.pairs))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.pairs), generator=generator)
        return int(self.order[index])

    def pair(self, position: int) -> Pair:
        """The files behind a position."""
        return self.pairs[self.index(position)]

    def augmentation(self, position: int, height: int, width: int) -> tuple[int, int, int]:
        """Top and left of the crop at a position, from an image of this size, and its orientation."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "sample", position))
        top, left, orientation = draw_augmentation(height, width, self.size, generator)
        return top, left, orientation if self.flips else 0

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """SAR and EO, float32 (3, size, size) in [-1, 1]. ValueError names the file that is wrong."""

        def cut(*images: Tensor) -> tuple[Tensor, ...]:
            top, left, orientation = self.augmentation(position, *images[0].shape[-2:])
            return tuple(orient(x[..., top : top + self.size, left : left + self.size], orientation) for x in images)

        return read_pair(self.pair(position), self.reading, cut)


def batch_positions(start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """The positions of the global batches of steps start..stop - 1, of which every rank takes its slice."""
    return (range(step * batch_size + rank, (step + 1) * batch_size, world) for step in range(start, stop))


# ----------------------------------------------------------------------------------------------------------
# Reading ahead

Batch = tuple[list[Tensor], list[int]]  # tensors, and the positions of the samples


class Batches(Dataset):
    """Positions -> a batch, or the error that a sample raised, which a DataLoader would turn into a traceback."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, positions: range) -> Batch | Exception:
        try:
            return default_collate([self.samples[i] for i in positions]), list(positions)
        except (ValueError, OSError) as error:
            return error


def ignore_signals(_worker: int) -> None:
    """For reading processes: they live until the step is finished, even if the whole group is signalled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def read_ahead(samples: Dataset, positions: Iterator[range], workers: int, pin: bool) -> Iterator[Iterator[Batch]]:
    """Yields the batches at these positions, read ahead by processes that end with the context.

    pin: into memory from which a GPU can copy by itself. Raises what a sample raised (ValueError, OSError), and
    RuntimeError if a reading process dies.
    """
    options = {"num_workers": workers, "worker_init_fn": ignore_signals, "pin_memory": pin}
    loader = iter(DataLoader(Batches(samples), batch_size=None, sampler=positions, **options))

    def read() -> Iterator[Batch]:
        while True:
            try:
                batch = next(loader)
            except (OSError, EOFError) as error:  # the process died while it handed over a batch
                raise RuntimeError(f"DataLoader worker: {error}") from error
            if isinstance(batch, Exception):
                raise batch
            yield batch

    try:
        yield read()
    finally:
        if workers:  # they ignore SIGTERM, by which Python would end its children and then wait for ever
            try:
                loader._shutdown_workers()
            finally:  # a dead worker or a signal may have interrupted it
                for worker in loader._workers:
                    worker.kill()


# ----------------------------------------------------------------------------------------------------------
# The latents of a training set, encoded once: the frozen VAE need not run in every step
#
# images of the training size -> all 8 flips and rotations -> VAE encoder -> float16 -> one memory-mapped file
#
# A sample from the cache is the sample that `PairDataset` would have read and the model encoded in float32, up to the
# rounding to float16. The cache is bound to the VAE, the files and the size by a fingerprint.


class CachedLatents(Dataset):
    """The samples of `pairs` as latents: position -> (z_sar, z_eo), each float32 (C, h, w). See `build_cache`."""

    def __init__(self, folder: Path, pairs: PairDataset):
        self.file, self.shape = folder / "latents.bin", read_json(folder / "cache.json")["shape"]
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        _, _, orientation = self.pairs.augmentation(position, self.pairs.size, self.pairs.size)
        latents = np.memmap(self.file, np.float16, "r", shape=(len(self), *self.shape))  # nothing is read yet
        return tuple(torch.from_numpy(latents[self.pairs.index(position), orientation].astype(np.float32)))


def fingerprint(model: CDiffSET, pairs: PairDataset) -> str:
    """What the cached numbers depend on: VAE, size, reading, and the files' names, lengths and times of change."""
    digest = hashlib.sha256(f"{network_digest(model.vae)} {pairs.size} {tuple(pairs.reading)}".encode())
    for pair in pairs.pairs:
        for path in (pair.sar, pair.eo):
            state = path.stat()
            about = (path.name, state.st_size, state.st_mtime_ns, *(pair.window or ()))
            digest.update("\0".join(map(str, ("", *about))).encode(errors="surrogateescape"))
    return digest.hexdigest()


@torch.no_grad()
def build_cache(model: CDiffSET, pairs: PairDataset, folder: Path) -> None:
    """Encodes what is not encoded yet into folder/latents.bin, a record a pair: float16 (8 or 1, 2, C, h, w).

    The model runs on the device it is on. Raises ValueError if another process fills the folder, if it holds the
    cache of something else, if an image is not of the training size (random crops of larger ones cannot be
    cached), or if the disk is too small.
    """
    side = pairs.size // model.vae.factor
    orientations = 8 if pairs.flips else 1
    shape = (orientations, 2, model.vae.config["latent_channels"], side, side)
    about = {"fingerprint": fingerprint(model, pairs), "shape": list(shape)}
    file, manifest = folder / "latents.bin", folder / "cache.json"
    with exclusive(folder):
        was = read_json(manifest) if manifest.exists() else None
        held = file.stat().st_size if file.exists() else 0
        if was != about:
            if was is not None and held:
                what = "model, dataset (or copied files), split (--seed), --size, --no-flips or --scale"
                raise ValueError(f"{folder} holds the cache of another {what}: delete it, or name another folder")
            file.unlink(missing_ok=True)
            held = 0
            write_json(manifest, about)
        record = 2 * prod(shape)  # bytes
        done = held // record
        needed, free = record * (len(pairs) - done), shutil.disk_usage(folder).free
        if needed > free:
            space = f"{needed / 1e9:.1f} GB for the cache, and {free / 1e9:.1f} GB are free"
            raise ValueError(f"{folder}: there is too little disk, it takes {space}; name another folder")
        try:
            with file.open("ab") as output:
                output.truncate(done * record)
                for pair in tqdm(pairs.pairs[done:], initial=done, total=len(pairs), unit="pair", desc="encoding"):
                    images = torch.stack(read_pair(pair, pairs.reading))  # (2, 3, H, W)
                    if images.shape[2:] != (pairs.size, pairs.size):
                        size = f"{images.shape[3]}x{images.shape[2]} pixels, not --size {pairs.size}"
                        raise ValueError(f"{pair.sar}: {size}")
                    turned = torch.cat([orient(images, i) for i in range(orientations)])
                    latents = model.encode(turned).cpu().numpy().astype(np.float16)
                    output.write(latents.tobytes())
        except OSError as error:
            raise ValueError(f"{file}: {error}; the same command goes on where it stopped") from error
