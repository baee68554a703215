"""Finds SAR/EO pairs on disk, reads and augments them for training, and caches their latents.

    folder -> find_pairs -> cut_large -> split_pairs -> PairDataset -> (sar, eo), each (3, size, size) in [-1, 1]
                            (both in splits.py)         build_cache -> CachedLatents -> (z_sar, z_eo)

docs/data.md describes layouts, splits and the reading of numbers for users.
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
from images import AUTO, HOW, PERCENTILES, Reading, eo_kind, read_eo, read_overview, read_sar, sar_scale
from rasters import ImageError, Raster, image_size, is_cross, polarisation, polarisation_partner
from weights import network_digest

# ----------------------------------------------------------------------------------------------------------
# Finding pairs

RESULTS = ("_eo", "_confidence", "_spread")  # sample.py's results are called NAME_eo.png, ...
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
LOOKED_AT = 64  # images of a dataset that are looked at, to decide for all


class Pair(NamedTuple):
    """A SAR image and the EO image of the same ground."""

    sar: Path
    eo: Path
    scene: str  # images of one scene may overlap: they never stand on both sides of a split
    split: str | None  # "train", "val" or "test" if the folders say so
    window: tuple[int, int, int, int] | None = None  # top, left, height, width: the part to read; None: all
    by_place: bool = False  # images of several scenes may overlap, so georeferenced ones are split by place


class Pairs(NamedTuple):
    """What `find_pairs` found in a folder."""

    layout: str
    pairs: list[Pair]  # sorted by the SAR image's path as a string: the same order on every system
    unpaired: list[Path]  # images of this layout without a partner, sorted


# A file belongs to a layout if the end of its path matches the pattern. Two files are a pair if their paths differ in
# the group "kind" alone, so every other part that varies is a named group. `(?P=kind)` repeats what kind matched.
SEN_NAME = r"(?P=season)_(?P=kind)_(?P=n)_(?P<patch>p\d+)"
SEN = r"(?P<season>ROIs\d+_\w+)/(?P<kind>s1|s2)_(?P<n>\d+)/" + SEN_NAME
TERRAIN = r"(?P<terrain>\w+)/(?P<kind>s1|s2)/(?P<season>ROIs\d+_\w+)_(?P=kind)_(?P<n>\d+)_(?P<patch>p\d+)"
QXS = r"(?P<kind>sar|opt)_256_oc_0\.2/(?P<name>\d+)\.png"
SAR2OPT = r"(?P<split>train|val|test)(?P<kind>A|B)/(?P<name>[^/]+)\.png"
SN6 = r"(?P<kind>SAR-Intensity|PS-RGB)/(?P<aoi>SN6_\w+)_(?P=kind)_(?P<strip>\d+_\d+)_(?P<tile>tile_\d+)\.tif"
FOLDERS = r"(?P<kind>(?i:sar|eo))/(?P<folder>(?:.*/)?)(?P<name>[^/]+)\.(?i:png|jpe?g|tiff?)"
LAYOUTS = (  # name, the kind of SAR images, the groups that make the scene, pattern
    ("SEN1-2", "s1", ("season", "n"), SEN + r"\.png"),
    ("SEN1-2 by terrain", "s1", ("season", "n"), TERRAIN + r"\.png"),  # a scene lies in several terrains
    ("SEN12MS", "s1", ("season", "n"), SEN + r"\.tif"),
    ("QXS-SAROPT", "sar", ("name",), QXS),  # its scenes are unknown: each image is one
    ("SAR2Opt", "A", ("split", "name"), SAR2OPT),
    ("SpaceNet6", "SAR-Intensity", ("strip",), SN6),  # a strip of flight
    ("sar/ and eo/", "sar", ("folder",), FOLDERS),  # an image outside of scene folders is a scene by itself
)
BY_PLACE = ("SpaceNet6", "sar/ and eo/")  # layouts in which images of several scenes may overlap


def find_pairs(root: str | Path) -> Pairs:
    """Recognises the layout of the dataset in a folder, or in folders below it, and pairs its images.

    Files of no known layout (labels, masks) are ignored. ValueError: the folder does not exist or cannot be listed,
    or holds no image, no known layout, no pair, pairs of several layouts, or two images of one name.
    """
    names, found = walk_images(root), []
    for layout, sar_kind, scene_groups, pattern in LAYOUTS:
        pattern = re.compile(r"(?P<at>(?:.*/)?)" + pattern, re.DOTALL)
        sars, eos, rest = {}, {}, []  # {the groups that both images of a pair have: path}
        for name in names:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                side = sars if groups.pop("kind").lower() == sar_kind.lower() else eos
                twin = side.setdefault(tuple(groups.items()), name)
                if twin != name:
                    raise ValueError(f"{twin!r} and {name!r} differ only in their endings: take one of them away")
            else:
                rest.append(name)
        names = rest
        if sars or eos:
            found.append((layout, scene_groups, sars, eos))

    if not found:
        known = ", ".join(layout for layout, *_ in LAYOUTS)
        what = "holds none of the known datasets" if names else "is empty or holds no PNG, JPEG or TIFF image"
        raise ValueError(f"{str(root)!r} {what} ({known}): the simplest is sar/NAME.png with eo/NAME.png")
    paired = [row for row in found if row[2].keys() & row[3].keys()]
    if not paired:
        layout, _, sars, eos = found[0]
        raise ValueError(
            f"{str(root)!r} looks like {layout}, but of its {len(sars)} SAR and {len(eos)} EO images "
            f"none has a partner, e.g. {min([*sars.values(), *eos.values()])!r}: put both kinds there, named alike"
            + "; ".join(["", *stacking(Path(root, name) for name in sorted(sars.values()))])
        )
    if len(paired) > 1:
        layouts = " and ".join(layout for layout, *_ in paired)
        raise ValueError(f"{str(root)!r} holds pairs of {layouts}: give the folder of one dataset")

    ((layout, scene_groups, sars, eos),) = paired
    pairs, both = [], sars.keys() & eos.keys()
    for key in sorted(both, key=sars.__getitem__):
        groups, sar = dict(key), Path(root, sars[key])
        scene = "_".join(groups[group] for group in scene_groups).strip("/") or groups["name"]
        splits = [SPLIT_FOLDERS.get(folder.lower()) for folder in PurePosixPath(sars[key]).parts[:-1]]
        split = groups.get("split") or next(filter(None, splits), None)
        pairs.append(Pair(sar, Path(root, eos[key]), scene, split, None, layout in BY_PLACE))
    unpaired = sorted(side[key] for side in (sars, eos) for key in side.keys() - both)
    return Pairs(layout, pairs, [Path(root, name) for name in unpaired])


def stacking(paths: Iterable[Path]) -> list[str]:
    """Advice, if a file lies beside that of its other polarisation: the command that joins the first two such files."""
    for path in paths:
        if partner := polarisation_partner(path):
            co, cross = sorted((path, partner), key=lambda file: is_cross(polarisation(file.stem)))
            command = f"rio stack {co.name} {cross.name} -o NAME.tif"
            return [f"{co.name!r} and {cross.name!r} are two polarisations of one image, make them one: {command}"]
    return []


def pair_folders(images: str | Path, truth: str | Path) -> list[Pair]:
    """Pairs (image, true image) of two folders by their paths below the folder, without the ending; sorted.

    Of results of sample.py, the EO images count: NAME_eo has the name NAME, and the others are skipped.
    ValueError: there are no images, one has no partner, or two differ only in their endings.
    """
    made, true = {}, {}  # {path below the folder without the ending: path}
    for root, paths in ((images, made), (truth, true)):
        for name in walk_images(root):
            path, stem = Path(root, name), PurePosixPath(name).with_suffix("").as_posix()
            if stem.endswith(RESULTS) and not stem.endswith("_eo"):
                continue
            twin = paths.setdefault(stem.removesuffix("_eo"), path)
            if twin != path:
                raise ValueError(f"{str(twin)!r} and {str(path)!r} differ only in their endings: rename one of them")
    if not made and not true:
        raise ValueError(f"neither {str(images)!r} nor {str(truth)!r} holds PNG, JPEG or TIFF images")
    if alone := [repr(str((made | true)[name])) for name in sorted(made.keys() ^ true.keys())]:
        raise ValueError(f"{len(alone)} image(s) without one of the same name in the other folder: {some(alone)}")
    return [Pair(made[name], true[name], name, None) for name in sorted(made)]


def walk_images(root: str | Path) -> list[str]:
    """Lists the PNG, JPEG and TIFF files in a folder and below, without hidden ones: POSIX paths relative to it.

    Links to folders are followed, but each real folder is listed once, so loops of links end. No file is opened, so
    that 600,000 files take seconds. ValueError: not a folder, or it cannot be listed.
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
            images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
            names += [below.removeprefix("./") + name for name in images]
    return names


def dataset_name(found: Pairs, root: str | Path) -> str:
    """Identifies a dataset wherever it lies: its layout, and the number and the names of its pairs."""
    names = seed_of(*(pair.sar.relative_to(root) for pair in found.pairs))
    return f"{found.layout} of {len(found.pairs)} pairs ({names:016x})"


def describe(found: Pairs) -> list[str]:
    """Says in lines to print what was found. Reads three pairs. ImageError: one cannot be read."""

    def about(path: Path) -> str:
        (height, width), raster = image_size(path), read_overview(path)
        values = raster.bands[:, raster.valid] if raster.valid.any() else raster.bands
        size = f"{width}x{height}, {len(raster.bands)} band(s)"
        return f"{path.name!r}: {size} of {raster.bands.dtype}, {values.min():g} to {values.max():g}"

    scenes = len({pair.scene for pair in found.pairs})
    lines = [f"{found.layout}: {len(found.pairs):,} pairs in {scenes:,} scenes"]
    lines += [f"  {about(pair.sar)}; {about(pair.eo)}" for pair in found.pairs[:3]]
    if found.unpaired:
        names = "; ".join([some(repr(str(path)) for path in found.unpaired), *stacking(found.unpaired)])
        lines.append(f"  {len(found.unpaired):,} image(s) without a partner are left out: {names}")
    return lines


def decide_reading(pairs: Sequence[Pair], reading: Reading = AUTO) -> tuple[Reading, list[str]]:
    """Decides how all images of a dataset are read, from at most LOOKED_AT of them.

    Returns a reading without "auto", and lines to print. ImageError: an image cannot be read, or not like the others,
    or no image tells what its numbers are.
    """
    stretch = tuple(reading.stretch) if reading.stretch else None
    files = {pair.sar: pair.eo for pair in pairs}  # blocks of an image are pairs of the same files
    looked_at = evenly(list(files), LOOKED_AT)
    sar, sar_notes, sar_odd = _common_kind(
        looked_at, reading.sar, lambda raster, kind: sar_scale(raster, Reading(kind, stretch)).kind
    )
    eo, eo_notes, eo_odd = _common_kind(
        [files[path] for path in looked_at], reading.eo, lambda raster, kind: eo_kind(raster, Reading(eo=kind))
    )
    range_of_sar = " ({:g} and {:g})".format(*(stretch or PERCENTILES[sar])) if sar in PERCENTILES else ""
    return Reading(sar, stretch, eo), [
        "; ".join([f"SAR images are read as {HOW[sar]}{range_of_sar}", *sar_notes, "--scale or --stretch overrules"]),
        *sar_odd,
        "; ".join([f"EO images are read as {HOW[eo]}", *eo_notes, "--eo-scale overrules"]),
        *eo_odd,
    ]


def _common_kind(
    paths: Sequence[Path], wanted: str, kind_of: Callable[[Raster, str], str]
) -> tuple[str, Iterable[str], list[str]]:
    """Returns the kind of most images, the notes of all, and a line that names the images that look different, if any.

    kind_of(raster, wanted) tells the kind of an image, and raises ImageError if it cannot be the wanted one.
    """
    kinds, looks, notes, error = {}, Counter(), {}, None
    for path in paths:
        raster = read_overview(path)
        notes |= dict.fromkeys(raster.notes)  # a note of several images appears once
        try:
            kinds[path] = kind_of(raster, wanted)
            if wanted != "auto":
                looks[kind_of(raster, "auto")] += 1
        except ImageError as caught:  # for example all is no-data; the other images may tell
            kinds.setdefault(path, None)
            error = caught
    counts = Counter(filter(None, kinds.values()))
    if not counts:
        raise error
    common = counts.most_common(1)[0][0]
    odd = [path for path in kinds if kinds[path] != common]
    for path in odd:
        kind_of(read_overview(path), common)  # raises if the image cannot be read like the others
    names = some(repr(str(path)) for path in odd)
    lines = [f"  {len(odd)} of {len(paths)} look different, and are read like the others: {names}"] if odd else []
    if (look := max(looks, key=looks.get, default=common)) != common:
        lines.append(f"  warning: they look like {HOW[look]}")
    return common, notes, lines


def evenly(pairs: Sequence[Pair], number: int) -> list[Pair]:
    """Chooses at most `number` of the pairs, at equal distances."""
    number = min(number, len(pairs))
    return [pairs[i * len(pairs) // number] for i in range(number)]


def seed_of(*parts: object) -> int:
    """Hashes the parts to 63 bits, the same on every machine and in every version of Python."""
    text = "\0".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# ----------------------------------------------------------------------------------------------------------
# Training samples


def room(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns how far a crop can move down and to the right. ValueError: the image is smaller than the crop."""
    if min(height, width) < size:
        raise ValueError(f"an image of {width}x{height} pixels is smaller than the crop of {size}x{size}: lower --size")
    return height - size, width - size


def draw_augmentation(height: int, width: int, size: int, generator: torch.Generator) -> tuple[int, int, int]:
    """Draws the paper's augmentation: a random crop, then two flips and a rotation, each with probability 0.5.

    Returns the crop's top and left, and the orientation 0..7 for `orient`. A rotation is by 0..3 quarter turns, as in
    the released code. ValueError: the image is smaller than the crop.
    """
    down, right = room(height, width, size)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    top, left = draw(down + 1), draw(right + 1)
    horizontal, vertical, rotate, turns = draw(2), draw(2), draw(2), draw(4)
    # a vertical flip equals a horizontal flip and half a turn
    return top, left, (horizontal ^ vertical) * 4 + (turns * rotate + 2 * vertical) % 4


def orient(image: Tensor, orientation: int) -> Tensor:
    """Mirrors (..., S, S) left to right if orientation >= 4, then turns it by orientation % 4 quarters."""
    if orientation >= 4:
        image = image.flip(-1)
    return image.rot90(orientation % 4, (-2, -1))


def center_crop(image: Tensor, size: int | None) -> Tensor:
    """Cuts the centre, (..., size, size), out of (..., H, W). None: all. ValueError: the image is smaller."""
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
    """Reads a pair, then crops it with cut(sar, eo): two float32 (3, H, W) in [-1, 1].

    ValueError, naming the file: it cannot be read, the sizes of the two images differ, or `cut` refuses them.
    """
    window = None
    if pair.window:
        top, left, height, width = pair.window
        window = slice(top, top + height), slice(left, left + width)
    sar, eo = read_sar(pair.sar, reading, window), read_eo(pair.eo, reading, window)
    require_equal_sizes(pair, sar, eo)
    try:
        return cut(sar, eo)
    except ValueError as error:
        raise ValueError(f"{str(pair.sar)!r}: {error}") from None


def require_equal_sizes(pair: Pair, sar: Tensor, eo: Tensor) -> None:
    """Raises ValueError if the images of a pair, (3, H, W) each, differ in size."""
    if sar.shape != eo.shape:
        sizes = [f"{str(p)!r} is {x.shape[2]}x{x.shape[1]}" for p, x in ((pair.sar, sar), (pair.eo, eo))]
        raise ValueError(f"{sizes[0]} but {sizes[1]} pixels: the images of a pair must have equal sizes")


def read_center(pair: Pair, size: int | None, reading: Reading = AUTO) -> tuple[Tensor, Tensor]:
    """Reads the centres of a pair: two float32 (3, size, size) in [-1, 1]; None: all. ValueError: as `read_pair`."""
    return read_pair(pair, reading, lambda sar, eo: (center_crop(sar, size), center_crop(eo, size)))


def read_batches(
    read: Callable[[int], tuple[Tensor, Tensor]], total: int, size: int, start: int = 0, bar: str | None = None
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Reads images in batches: yields their numbers, from `start` to total - 1, and two tensors (B, 3, H, W).

    read(i) returns image i of each of the two, (3, H, W). size: images in a batch. bar: title of a progress bar.
    ValueError: the images of a batch differ in size.
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
    """The samples of a training by their position in the whole run: 0, 1, 2, ... without end.

    Position p is entry p % n of the random order of epoch p // n. It has its own crop and orientation. All of these
    depend only on the seed and the position, so the samples are the same after resuming and with any number of workers
    and processes.

    flips: flip and rotate images, as in the paper. A radar looks to one side: shadows fall away from it, and buildings
    lean towards it. Without flips, a network learns this one side only.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int = 0, flips: bool = True, reading: Reading = AUTO):
        if not pairs:
            raise ValueError("there are no pairs to read")
        self.pairs, self.size, self.seed, self.flips, self.reading = list(pairs), size, seed, flips, reading
        self.epoch, self.order = -1, torch.empty(0)

    def __len__(self) -> int:
        """The number of pairs: the length of an epoch."""
        return len(self.pairs)

    def index(self, position: int) -> int:
        """Returns the index in `pairs` of the sample at a position."""
        epoch, index = divmod(position, len(self.pairs))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.pairs), generator=generator)
        return int(self.order[index])

    def pair(self, position: int) -> Pair:
        """Returns the pair of the sample at a position."""
        return self.pairs[self.index(position)]

    def augmentation(self, position: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns top, left and orientation of the sample at a position, for an image of this size."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "sample", position))
        top, left, orientation = draw_augmentation(height, width, self.size, generator)
        return top, left, orientation if self.flips else 0

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Reads the sample at a position: two float32 (3, size, size) in [-1, 1]. ValueError: as `read_pair`."""

        def cut(*images: Tensor) -> tuple[Tensor, ...]:
            top, left, orientation = self.augmentation(position, *images[0].shape[-2:])
            return tuple(orient(x[..., top : top + self.size, left : left + self.size], orientation) for x in images)

        return read_pair(self.pair(position), self.reading, cut)


def batch_positions(start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Yields, for steps start..stop - 1, the positions that this process reads of each global batch."""
    return (range(step * batch_size + rank, (step + 1) * batch_size, world) for step in range(start, stop))


# ----------------------------------------------------------------------------------------------------------
# Reading ahead

Batch = tuple[list[Tensor], list[int]]  # the tensors of the samples, and their positions


class Batches(Dataset):
    """Reads a batch, or returns the error that a sample raised: a DataLoader would turn it into a traceback."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, positions: range) -> Batch | Exception:
        try:
            return default_collate([self.samples[i] for i in positions]), list(positions)
        except (ValueError, OSError) as error:
            return error


def ignore_signals(_worker: int) -> None:
    """Makes a reading process live until the training process ends the step, even if both get the signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def read_ahead(samples: Dataset, positions: Iterator[range], workers: int, pin: bool) -> Iterator[Iterator[Batch]]:
    """Yields an iterator over the batches at these positions. Worker processes read ahead; they end with the context.

    pin: read into pinned memory, from which a GPU copies by itself.
    The iterator raises what a sample raised (ValueError, OSError), and RuntimeError if a worker dies.
    """
    options = {"num_workers": workers, "worker_init_fn": ignore_signals, "pin_memory": pin}
    loader = iter(DataLoader(Batches(samples), batch_size=None, sampler=positions, **options))

    def read() -> Iterator[Batch]:
        while True:
            try:
                batch = next(loader)
            except (OSError, EOFError) as error:  # the worker died while it sent a batch
                raise RuntimeError(f"DataLoader worker: {error}") from error
            if isinstance(batch, Exception):
                raise batch
            yield batch

    try:
        yield read()
    finally:
        if workers:  # Python would end them by SIGTERM, which they ignore, and then wait for ever
            try:
                loader._shutdown_workers()
            finally:  # also if a dead worker or a signal interrupts the shutdown
                for worker in loader._workers:
                    worker.kill()


# ----------------------------------------------------------------------------------------------------------
# Cached latents: the frozen VAE encodes each image once instead of in every step
#
# images of the training size -> all 8 orientations -> VAE encoder -> float16 -> one memory-mapped file
#
# A cached sample is the encoded sample of `PairDataset`, rounded to float16.


class CachedLatents(Dataset):
    """The samples of `pairs` as latents from `build_cache`: position -> (z_sar, z_eo), each float32 (C, h, w)."""

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
    """Hashes what cached latents depend on: VAE, size, reading, and the names, lengths and times of the files."""
    digest = hashlib.sha256(f"{network_digest(model.vae)} {pairs.size} {tuple(pairs.reading)}".encode())
    for pair in pairs.pairs:
        for path in (pair.sar, pair.eo):
            state = path.stat()
            about = (path.name, state.st_size, state.st_mtime_ns, *(pair.window or ()))
            digest.update("\0".join(map(str, ("", *about))).encode(errors="surrogateescape"))
    return digest.hexdigest()


@torch.no_grad()
def build_cache(model: CDiffSET, pairs: PairDataset, folder: Path) -> None:
    """Encodes the pairs into folder/latents.bin: float16 (pairs, orientations, 2, C, h, w), with 8 orientations or 1.

    An incomplete cache is continued. The model stays on its device.
    ValueError: another process writes there, the folder holds the cache of something else, an image is not of the
    training size (the crops of larger images differ in each epoch), or the disk is full.
    """
    side = pairs.size // model.vae.factor
    orientations = 8 if pairs.flips else 1
    shape = (orientations, 2, model.vae.config["latent_channels"], side, side)
    about = {"fingerprint": fingerprint(model, pairs), "shape": list(shape)}
    file, manifest = folder / "latents.bin", folder / "cache.json"
    with exclusive(folder):
        stored = read_json(manifest) if manifest.exists() else None
        length = file.stat().st_size if file.exists() else 0  # bytes
        if stored != about:
            if stored is not None and length:
                what = "model, dataset (or copied files), split (--seed), --size, --no-flips or --scale"
                raise ValueError(f"{folder} holds the cache of another {what}: delete it, or name another folder")
            file.unlink(missing_ok=True)
            length = 0
            write_json(manifest, about)
        record = 2 * prod(shape)  # bytes of a pair
        done = length // record
        needed, free = record * (len(pairs) - done), shutil.disk_usage(folder).free
        if needed > free:
            space = f"{needed / 1e9:.1f} GB for the cache, and {free / 1e9:.1f} GB are free"
            raise ValueError(f"{folder}: there is too little disk, it takes {space}; name another folder")
        try:
            with file.open("ab") as output:
                output.truncate(done * record)  # a record that was being written
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
