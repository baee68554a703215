"""SAR/EO pairs on disk: finds them, splits them without leaks, reads and augments them for training.

    folder -> find_pairs -> split_pairs -> PairDataset -> (sar, eo), each (3, size, size) in [-1, 1]

Order, crops and noise of a training are drawn from (seed, sample position) alone: see `PairDataset`.
"""

import hashlib
import signal
from contextlib import contextmanager
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from common import read_json, some
from images import read_eo, read_raster, read_sar

# ----------------------------------------------------------------------------------------------------------
# Finding pairs


SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
TEST_SHARE = 0.2  # of the pairs, where a dataset has no split of its own


class Pair(NamedTuple):
    sar: Path
    eo: Path
    scene: str  # images of one scene overlap or adjoin: they never stand on both sides of a split
    split: str | None  # "train" or "test" where the dataset says so


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
SAR2OPT = r"(?P<split>train|test)(?P<kind>A|B)/(?P<name>[^/]+)\.png"
SN6 = r"(?P<kind>SAR-Intensity|PS-RGB)/(?P<aoi>SN6_\w+)_(?P=kind)_(?P<strip>\d+_\d+)_(?P<tile>tile_\d+)\.tif"
FOLDERS = r"(?P<kind>sar|eo)/(?P<folder>(?:.*/)?)(?P<name>[^/]+)\.(?i:png|jpe?g|tiff?)"
LAYOUTS = (  # name, SAR's kind, scene, pattern
    ("SEN1-2", "s1", ("season", "n"), SEN + r"\.png"),
    ("SEN1-2 by terrain", "s1", ("season", "n"), TERRAIN + r"\.png"),  # scenes lie in several terrains
    ("SEN12MS", "s1", ("season", "n"), SEN + r"\.tif"),
    ("QXS-SAROPT", "sar", ("name",), QXS),  # no scenes known: each image is one
    ("SAR2Opt", "A", ("split", "name"), SAR2OPT),
    ("SpaceNet6", "SAR-Intensity", ("strip",), SN6),  # a strip of flight; strips overlap a bit
    ("sar/ and eo/", "sar", ("folder",), FOLDERS),  # without folders in it, each image is a scene
)


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
        )
    if len(paired) > 1:
        names = " and ".join(layout for layout, *_ in paired)
        raise ValueError(f"{str(root)!r} holds pairs of {names}: give the folder of one dataset")

    ((layout, sars, eos, scene, pattern),) = paired
    pairs, both = [], sars.keys() & eos.keys()
    for key in sorted(both, key=sars.__getitem__):
        groups = pattern.fullmatch(sars[key]).groupdict()
        scene_name = "_".join(groups[name] for name in scene).strip("/") or groups["name"]
        pairs.append(Pair(Path(root, sars[key]), Path(root, eos[key]), scene_name, groups.get("split")))
    unpaired = sorted(side[key] for side in (sars, eos) for key in side.keys() - both)
    return Pairs(layout, pairs, [Path(root, name) for name in unpaired])


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

    def raster(path: Path) -> str:
        bands, valid, _ = read_raster(path)
        values = bands[:, valid] if valid.any() else bands
        size = f"{bands.shape[2]}x{bands.shape[1]}, {len(bands)} band(s)"
        return f"{path.name!r}: {size} of {bands.dtype}, {values.min():g} to {values.max():g}"

    scenes = len({pair.scene for pair in found.pairs})
    lines = [f"{found.layout}: {len(found.pairs):,} pairs in {scenes:,} scenes"]
    lines += [f"  {raster(pair.sar)}; {raster(pair.eo)}" for pair in found.pairs[:3]]
    if found.unpaired:
        names = some(repr(str(path)) for path in found.unpaired)
        lines.append(f"  {len(found.unpaired):,} image(s) without a partner are left out: {names}")
    return lines


def mask_path(pair: Pair, kind: str) -> Path | None:
    """The "change" or "class" mask that synth.py writes beside a pair, or None."""
    folder, name = pair.eo.parent.name.replace("s2_", f"{kind}_"), pair.eo.name.replace("_s2_", f"_{kind}_")
    path = pair.eo.parent.parent / folder / name
    return path if path != pair.eo and path.is_file() else None


def read_mask(pair: Pair, kind: str, size: int | None = None) -> np.ndarray:
    """synth.py's "change" or "class" mask of a pair, uint8 (H, W), or its central crop. It must be there."""
    with Image.open(mask_path(pair, kind)) as image:
        return center_crop(np.asarray(image), size)


def split_pairs(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Train and test pairs, in the order given: the dataset's own split if it has both sides, else by scene.

    Scenes are taken in an order that depends on the seed and their names alone, and go to the test side where
    that brings it nearer to the fraction TEST_SHARE of the pairs. A scene is never divided.
    ValueError: fewer than two scenes.
    """
    if {pair.split for pair in pairs} == {"train", "test"}:
        return [p for p in pairs if p.split == "train"], [p for p in pairs if p.split == "test"]

    sizes = Counter(pair.scene for pair in pairs)
    if len(sizes) < 2:
        raise ValueError(
            f"{len(pairs)} pair(s) from {len(sizes)} scene(s): too few scenes to split without a leak, "
            "add a second one to test on"
        )
    order = sorted(sizes, key=lambda scene: seed_of(seed, scene))
    test, taken = set(), 0
    for scene in order[1:]:  # the first one always trains
        if taken + sizes[scene] / 2 <= TEST_SHARE * len(pairs):
            test.add(scene)
            taken += sizes[scene]
    if not test:
        test.add(min(order[1:], key=sizes.__getitem__))
    return [p for p in pairs if p.scene not in test], [p for p in pairs if p.scene in test]


def held_out_pairs(pairs: list[Pair], model: Path) -> tuple[list[Pair], list[Pair], str]:
    """(training pairs, held-out pairs, where the split comes from). Raises ValueError if split.json does not fit."""
    file = model.resolve().parent / "split.json"
    if not file.is_file():
        return *split_pairs(pairs), "the split of seed 0"
    try:
        test = set(read_json(file)["scenes"]["test"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is no split that train.py wrote ({error}): move it away to use seed 0") from error
    sides = [p for p in pairs if p.scene not in test], [p for p in pairs if p.scene in test]
    if not all(sides):
        raise ValueError(f"{file} does not fit this dataset: it was made for another one; move it away to use seed 0")
    return *sides, str(file)


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
    cut: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda sar, eo: (sar, eo),
    read: Callable[[Path], Tensor] = read_sar,
) -> tuple[Tensor, Tensor]:
    """SAR (or what `read` reads) and EO, float32 (3, H, W) in [-1, 1], both `cut`. ValueError names the file that is
    wrong.
    """
    sar, eo = read(pair.sar), read_eo(pair.eo)
    if sar.shape != eo.shape:
        sizes = [f"{str(p)!r} is {x.shape[2]}x{x.shape[1]}" for p, x in ((pair.sar, sar), (pair.eo, eo))]
        raise ValueError(f"{sizes[0]} but {sizes[1]} pixels: the images of a pair must have equal sizes")
    try:
        return cut(sar, eo)
    except ValueError as error:
        raise ValueError(f"{str(pair.sar)!r}: {error}") from None


def read_center(pair: Pair, size: int | None) -> tuple[Tensor, Tensor]:
    """`read_pair`, of both images the central (3, size, size); all if the size is None."""
    return read_pair(pair, lambda sar, eo: (center_crop(sar, size), center_crop(eo, size)))


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


class PairDataset(torch.utils.data.Dataset):
    """The samples of a training, by their position in the whole run: 0, 1, 2, ... without end.

    Position p is entry p % n of the permutation of epoch p // n, augmented by a generator of its own. Both
    depend on the seed and these numbers alone, so that a resumed run, and any number of workers and ranks,
    see the same samples.
    flips: whether images are flipped and turned, as in the paper. A radar looks to one side, where all shadows
    fall and from which all houses lean: without flips, a network learns that side, and no other.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int = 0, flips: bool = True):
        if not pairs:
            raise ValueError("there are no pairs to read")
        self.pairs, self.size, self.seed, self.flips = list(pairs), size, seed, flips
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

        return read_pair(self.pair(position), cut)


def batch_positions(start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """The positions of the global batches of steps start..stop - 1, of which every rank takes its slice."""
    return (range(step * batch_size + rank, (step + 1) * batch_size, world) for step in range(start, stop))


# ----------------------------------------------------------------------------------------------------------
# Reading ahead

Batch = tuple[list[Tensor], list[int]]  # tensors, and the positions of the samples


class Batches(torch.utils.data.Dataset):
    """Positions -> a batch, or the error that a sample raised, which a DataLoader would turn into a traceback's text."""

    def __init__(self, samples: torch.utils.data.Dataset):
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
def read_ahead(
    samples: torch.utils.data.Dataset, positions: Iterator[range], workers: int, pin: bool
) -> Iterator[Iterator[Batch]]:
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


# --- shim ---
class Split(NamedTuple):
    train: list
    val: list
    test: list
    notes: list = []


_split = split_pairs


def split_pairs(pairs, seed=0):
    a, b = _split(pairs, seed)
    return Split(a, b, b, [])


def cut_large(pairs, size, cached):
    return pairs


from images import Reading


def decide_reading(pairs, reading):
    return reading._replace(sar="full", eo="full"), []


_rp = read_pair


def read_pair(pair, reading=None, cut=lambda a, b: (a, b)):
    return _rp(pair, cut)


def read_center(pair, size, reading=None):
    return _rp(pair, lambda sar, eo: (center_crop(sar, size), center_crop(eo, size)))


class PairDataset(PairDataset):
    def __init__(self, pairs, size, seed=0, flips=True, reading=None):
        super().__init__(pairs, size, seed, flips)

    def __getitem__(self, position):
        def cut(*images):
            top, left, orientation = self.augmentation(position, *images[0].shape[-2:])
            return tuple(orient(x[..., top : top + self.size, left : left + self.size], orientation) for x in images)

        return _rp(self.pair(position), cut)


import shutil
from math import prod
from cdiffset import CDiffSET
from common import exclusive, write_json
from weights import network_digest


class CachedLatents(torch.utils.data.Dataset):
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
    """What the cached numbers depend on: the VAE, the files (name, length, time of change), the size."""
    digest = hashlib.sha256(f"{network_digest(model.vae)} {pairs.size}".encode())
    for pair in pairs.pairs:
        for path in (pair.sar, pair.eo):
            state = path.stat()
            digest.update(f"\0{path.name}\0{state.st_size}\0{state.st_mtime_ns}".encode(errors="surrogateescape"))
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
                what = "the cache of another model, dataset (or copied files), split (--seed), --size or --no-flips"
                raise ValueError(f"{folder} holds {what}: delete it, or name another folder")
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
                    images = torch.stack(_rp(pair))  # (2, 3, H, W)
                    if images.shape[2:] != (pairs.size, pairs.size):
                        size = f"{images.shape[3]}x{images.shape[2]} pixels, not --size {pairs.size}"
                        advice = "train without --cache, or cut the images first"
                        raise ValueError(f"{pair.sar}: {size}; random crops cannot be cached: {advice}")
                    turned = torch.cat([orient(images, i) for i in range(orientations)])
                    latents = model.encode(turned).cpu().numpy().astype(np.float16)
                    output.write(latents.tobytes())
        except OSError as error:
            raise ValueError(f"{file}: {error}; the same command goes on where it stopped") from error
