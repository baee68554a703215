"""SAR/EO pairs on disk: finds them, splits them without leaks, reads and augments them, writes images.

    folder -> find_pairs -> split_pairs -> PairDataset -> (sar, eo), each (3, size, size) in [-1, 1]
    file   -> read_raster -> sar_range -> sar_image    -> (3, H, W) in [-1, 1]     (`read_sar` is all three)
    scene  -> is_geotiff -> open_geotiff -> read_window -> the same two steps, window by window

How a file's numbers become [-1, 1]:

    8-bit, 16-bit      0..255 and 0..65535, linearly
    SAR, float, dB     co-polarised -25..0 dB, cross-polarised -32.5..0 dB, clipped: the range usual for these
                       data since DSen2-CR (Meraner et al. 2020)
    SAR, float, linear 1st..99th percentile of each band of the image, clipped (PAPER.md, SpaceNet6)
    EO, 12 or 13 bands Sentinel-2 reflectance * 10000: bands 4, 3, 2 and 0..3000, clipped (0.3 is white,
                       the usual true-colour picture; clouds saturate)

Float SAR is dB if any valid value is below 0, as intensity never is. Polarisations become channels after
scaling: one is repeated; (co, cross) -> co, cross, their mean; three are taken as they are;
(HH, HV, VH, VV) -> HH, (HV + VH) / 2, VV. No-data (declared no-data, NaN, alpha 0) becomes -1, the darkest.

Everything wrong with a file is a ValueError that names it. EXIF orientation is ignored: turning one image of
a pair would misalign it. 16-bit colour PNGs lose their low bytes, which Pillow cannot read; TIFFs do not.
"""

import hashlib
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

MIN_SIDE = 8  # one latent pixel
MAX_BYTES = 2**32  # of one raster in float32: a Sentinel-1 scene, 25,000 x 16,000 with two bands, is 3.2e9
Image.MAX_IMAGE_PIXELS = MAX_BYTES // 8  # Pillow's own limit, 0.9e8 pixels, is below such a scene
warnings.filterwarnings("ignore", module="PIL")  # about damaged files, which get one message from here
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, these two write to stderr
logging.getLogger("rasterio").addHandler(logging.NullHandler())

CO, CROSS = (-25.0, 0.0), (-32.5, 0.0)  # dB
DB_RANGES = {1: (CO,), 2: (CO, CROSS), 3: (CO, CROSS, CO), 4: (CO, CROSS, CROSS, CO)}  # by number of bands
SENTINEL2_WHITE = 3000  # reflectance 0.3
MIN_RANGE = 2.0**-10  # between -1 and 1, so that a constant image does not divide by zero (PAPER.md)


# ----------------------------------------------------------------------------------------------------------
# Finding pairs


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
FOLDERS = r"(?P<kind>sar|eo)/(?P<name>.+\.(?i:png|jpe?g|tiff?))"
LAYOUTS = (  # name, SAR's kind, scene, pattern
    ("SEN1-2", "s1", ("season", "n"), SEN + r"\.png"),
    ("SEN1-2 by terrain", "s1", ("season", "n"), TERRAIN + r"\.png"),  # scenes lie in several terrains
    ("SEN12MS", "s1", ("season", "n"), SEN + r"\.tif"),
    ("QXS-SAROPT", "sar", ("name",), QXS),  # no scenes known: each image is one
    ("SAR2Opt", "A", ("name",), SAR2OPT),
    ("SpaceNet6", "SAR-Intensity", ("strip",), SN6),  # a strip of flight; strips overlap a bit
    ("sar/ and eo/", "sar", ("name",), FOLDERS),
)


def find_pairs(root: str | Path) -> Pairs:
    """Recognises the dataset in a folder and pairs its images; the dataset may lie in folders below `root`.

    Files of no known layout (labels, masks, readmes) are ignored. ValueError: not a folder, unreadable,
    empty, no known layout, no image with a partner, or pairs of two layouts.
    """
    files, found = _walk(root), []
    for layout, sar_kind, scene, pattern in LAYOUTS:
        pattern = re.compile(r"(?P<at>(?:.*/)?)" + pattern, re.DOTALL)
        sars, eos, rest = {}, {}, []  # SAR and EO images: {what the paths of a pair share: path}
        for name in files:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                side = sars if groups.pop("kind") == sar_kind else eos
                side[tuple(groups.values())] = name
            else:
                rest.append(name)
        files = rest
        if sars or eos:
            names = [name for name in pattern.groupindex if name != "kind"]
            found.append((layout, sars, eos, names, scene))

    paired = [entry for entry in found if entry[1].keys() & entry[2].keys()]
    if not found:
        known = ", ".join(layout for layout, *_ in LAYOUTS)
        what = "holds none of the known datasets" if files else "is empty"
        raise ValueError(f"{str(root)!r} {what} ({known}): the simplest is sar/NAME.png with eo/NAME.png")
    if not paired:
        layout, sars, eos, *_ = found[0]
        first = min([*sars.values(), *eos.values()])
        raise ValueError(
            f"{str(root)!r} looks like {layout}, but of its {len(sars)} SAR and {len(eos)} EO images "
            f"none has a partner, e.g. {first!r}: put both kinds there, named alike"
        )
    if len(paired) > 1:
        names = " and ".join(layout for layout, *_ in paired)
        raise ValueError(f"{str(root)!r} holds pairs of {names}: give the folder of one dataset")

    ((layout, sars, eos, names, scene),) = paired
    root, both, pairs = Path(root), sars.keys() & eos.keys(), []
    for key in sorted(both, key=sars.__getitem__):
        groups = dict(zip(names, key, strict=True))
        scene_name = "_".join(groups[name] for name in scene)
        pairs.append(Pair(root / sars[key], root / eos[key], scene_name, groups.get("split")))
    unpaired = sorted(side[key] for side in (sars, eos) for key in side.keys() - both)
    return Pairs(layout, pairs, [root / name for name in unpaired])


def _walk(root: str | Path) -> list[str]:
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


def describe(found: Pairs, first: int = 3) -> list[str]:
    """What was found, in lines to print. Reads the first pairs, so it also says early what cannot be read."""
    scenes = len({pair.scene for pair in found.pairs})
    lines = [f"{found.layout}: {len(found.pairs):,} pairs in {scenes:,} scenes"]
    for pair in found.pairs[:first]:
        sar, eo = (read_raster(path).bands for path in (pair.sar, pair.eo))
        sizes = [f"{a.shape[2]}x{a.shape[1]}, {a.shape[0]} band(s) of {a.dtype}" for a in (sar, eo)]
        lines.append(f"  {pair.sar.name!r}: {sizes[0]}; {pair.eo.name!r}: {sizes[1]}")
    if found.unpaired:
        names = ", ".join(repr(str(path)) for path in found.unpaired[:first])
        more = ", ..." if len(found.unpaired) > first else ""
        lines.append(f"  {len(found.unpaired):,} image(s) without a partner are left out: {names}{more}")
    return lines


def mask_path(pair: Pair, kind: str) -> Path | None:
    """The "change" or "class" mask that synth.py writes beside a pair, or None."""
    folder, name = pair.eo.parent.name.replace("s2_", f"{kind}_"), pair.eo.name.replace("_s2_", f"_{kind}_")
    path = pair.eo.parents[1] / folder / name
    return path if path != pair.eo and path.is_file() else None


def split_pairs(pairs: Sequence[Pair], seed: int = 0, held_out: float = 0.2) -> tuple[list[Pair], list[Pair]]:
    """Train and test pairs, in the order given: the dataset's own split if it has both sides, else by scene.

    Scenes are taken in an order that depends on the seed and their names alone, and go to the test side where
    that brings it nearer to the fraction `held_out` of the pairs. A scene is never divided.
    ValueError: fewer than two scenes, or a fraction outside 0..1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the held-out fraction is {held_out}: it must lie between 0 and 1, e.g. 0.2")
    if {pair.split for pair in pairs} == {"train", "test"}:
        return [p for p in pairs if p.split == "train"], [p for p in pairs if p.split == "test"]

    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[pair.scene] = sizes.get(pair.scene, 0) + 1
    if len(sizes) < 2:
        raise ValueError(
            f"{len(pairs)} pair(s) from {len(sizes)} scene(s): too few scenes to split without a leak, "
            "add a second one to test on"
        )
    order = sorted(sizes, key=lambda scene: _hash(seed, scene))
    test, taken = set(), 0
    for scene in order[1:]:  # the first one always trains
        if taken + sizes[scene] / 2 <= held_out * len(pairs):
            test.add(scene)
            taken += sizes[scene]
    if not test:
        test.add(min(order[1:], key=sizes.__getitem__))
    return [p for p in pairs if p.scene not in test], [p for p in pairs if p.scene in test]


def _hash(*parts: object) -> int:
    """63 bits that depend on the parts alone, on every machine and in every version of Python."""
    text = "\0".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# ----------------------------------------------------------------------------------------------------------
# Reading


class Raster(NamedTuple):
    bands: np.ndarray  # (C, H, W), the file's own numbers
    valid: np.ndarray  # (H, W) bool; False is no-data
    source: str  # the file, for messages


GEO_TAGS = {33550, 33922, 34264, 34735, 42112, 42113}  # TIFF: place, projection, GDAL's own, no-data
BITS, COMPRESSION, SAMPLE_FORMAT, SIGNED = 258, 259, 339, 2  # three tags and a value of the last
# Pillow's modes that are data; CMYK, YCbCr and such are not.
MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "I", "I;16", "I;16L", "I;16B", "F"}

# All that decoders raise on damaged files; which one varies, so this list was found by fuzzing.
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, AttributeError)
DAMAGE += (ArithmeticError, MemoryError, struct.error, zlib.error)


class ImageError(ValueError):
    """A file that cannot be used: its name, and why, in one line."""


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name} has over {Image.MAX_IMAGE_PIXELS:,} pixels: cut it into parts") from None
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read as PNG, JPEG or TIFF (damaged?): {reason}") from None


def read_raster(path: str | Path) -> Raster:
    """A whole PNG, JPEG or TIFF, told by its content. Plain TIFFs are read by Pillow, others by rasterio.

    ImageError: missing, unreadable, damaged, too large, several pictures, CMYK, a side below 8 pixels, ...
    """
    path, name = Path(path), repr(str(path))
    if not path.is_file():  # a named pipe would have us wait for ever
        raise ImageError(f"{name} is {'not a file' if path.exists() else 'missing'}")
    if is_geotiff(path):
        with open_geotiff(path) as dataset:
            raster = read_window(dataset)
    else:
        with _decoding(name), Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            raster = _from_pillow(image, name)
    height, width = raster.valid.shape
    if min(height, width) < MIN_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels: each side needs at least {MIN_SIDE}")
    return raster


def is_geotiff(path: str | Path) -> bool:
    """True for a TIFF that rasterio must read: with geographic tags, compression (Pillow's libtiff would
    write to stderr if the file is damaged), several bands of more than 8 bits (Pillow reads them in part or not
    at all), or more pixels than Pillow may read. ImageError: the file cannot be opened."""
    with _decoding(repr(str(path))):
        with Path(path).open("rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return False
        try:
            with Image.open(path, formats=("TIFF",)) as image:
                tags, mode = image.tag_v2, image.mode
        except (Image.UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            return True
        eight_bits = max(tags.get(BITS, (1,))) <= 8 and SIGNED not in tags.get(SAMPLE_FORMAT, ())
        whole = eight_bits or mode in ("I;16", "I;16B", "F")
        return bool(GEO_TAGS & set(tags)) or tags.get(COMPRESSION, 1) != 1 or not whole


def _check_size(path: str, width: int, height: int, bands: int):
    """Before anything is decoded: some bytes can claim to be gigabytes. No usual compression exceeds 4000."""
    pixels = width * height
    if not 0 < 4 * bands * pixels <= MAX_BYTES:
        raise ImageError(f"{path!r} has {width}x{height} pixels in {bands} band(s), too many: cut it into parts")
    if pixels > max(2**24, 4000 * Path(path).stat().st_size):
        raise ImageError(f"{path!r} is too small a file for its {width}x{height} pixels: damaged or a trap")


def _from_pillow(image: Image.Image, name: str) -> Raster:
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{name} holds {image.n_frames} pictures: save the right one as a file of its own")
    if image.mode not in MODES:
        raise ImageError(f"{name} is a picture of mode {image.mode}: save it as grey or RGB")
    _check_size(image.filename, *image.size, len(image.getbands()))
    one_colour_is_clear = image.mode in ("L", "RGB") and "transparency" in image.info
    if image.mode in ("P", "PA", "La", "RGBa") or one_colour_is_clear:
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    pixels = np.asarray(image)
    bands = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    valid = np.ones(pixels.shape[:2], bool)
    if image.mode in ("LA", "RGBA"):  # alpha is no colour: it says where there is data
        bands, valid = bands[:-1], bands[-1] > 0
    return Raster(bands, _finite(bands, valid), name)


def open_geotiff(path: str | Path) -> Any:
    """An open rasterio dataset, for `read_window`. ImageError: rasterio is missing, or the file damaged."""
    try:
        import rasterio
    except ImportError:
        raise ImageError(f"{str(path)!r} is a GeoTIFF, which needs rasterio: pip install rasterio") from None
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    with _decoding(repr(str(path))):  # only GTiff: GDAL's other drivers can reach other files and the network
        return rasterio.open(Path(path).absolute(), driver="GTiff")


def read_window(dataset: Any, window: Any = None, shape: tuple[int, int] | None = None) -> Raster:
    """A window (rasterio's; default: all) of an open GeoTIFF, resampled to `shape` (H, W) if given.

    A pixel of float data is no-data if any of its bands is, one of integers if all are: 0 in one of three
    colours is a colour. ImageError: complex numbers, palette, odd bits, too large, damaged.
    """
    from rasterio.enums import ColorInterp

    name, dtype, kinds = repr(dataset.name), np.dtype(dataset.dtypes[0]), dataset.colorinterp
    if dtype.kind == "c":
        raise ImageError(f"{name} holds complex numbers ({dtype}): save their intensity, |z|^2, as float32")
    if ColorInterp.palette in kinds:
        raise ImageError(f"{name} has a palette: save it as grey or RGB")
    if dtype.kind != "f" and dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS"):  # 12 bits kept in 16, say
        raise ImageError(f"{name} has neither 8 nor 16 bits a pixel: save it with either")
    indexes = [i for i, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
    rows, columns = (window.height, window.width) if window else (dataset.height, dataset.width)
    rows, columns = shape or (rows, columns)
    _check_size(dataset.name, columns, rows, len(indexes))
    shape = shape and (len(indexes), *shape)
    with _decoding(name):
        bands = dataset.read(indexes, window=window, out_shape=shape)
        masks = dataset.read_masks(indexes, window=window, out_shape=shape)
    return Raster(bands, _finite(bands, masks.all(0) if dtype.kind == "f" else masks.any(0)), name)


def _finite(bands: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return valid & np.isfinite(bands).all(0) if bands.dtype.kind == "f" else valid


# ----------------------------------------------------------------------------------------------------------
# Numbers to [-1, 1]


def read_sar(path: str | Path, scale: str = "auto", stretch: tuple[float, float] | None = None) -> Tensor:
    """A SAR image as float32 (3, H, W) in [-1, 1]; for its no-data mask, take the steps singly."""
    raster = read_raster(path)
    return sar_image(raster, sar_range(raster, scale, stretch))


def sar_range(raster: Raster, scale: str = "auto", stretch: tuple[float, float] | None = None) -> np.ndarray:
    """The values of each band that become -1 and 1, as (2, C); the rules are at the top of this file.

    `scale` says what float numbers are: "db", "linear", or "auto" (looked at). `stretch` = (low, high) takes
    these percentiles of each band instead, whatever the numbers are. For a huge scene, take the range from a
    reduced copy. ValueError: bands or numbers of no known meaning, wrong options, nothing valid.
    """
    bands, name = raster.bands, raster.source
    if scale not in ("auto", "db", "linear"):
        raise ValueError(f"the scale is {scale!r}: it must be auto, db or linear")
    if stretch is not None and not 0 <= stretch[0] < stretch[1] <= 100:
        raise ValueError(f"the stretch is {stretch}: it must be two rising percentiles, e.g. 1 and 99")
    if len(bands) not in DB_RANGES:
        raise ImageError(f"{name} has {len(bands)} bands: a SAR image has one to four polarisations")
    if stretch is None and bands.dtype.name in ("uint8", "uint16"):
        return np.array([[0], [np.iinfo(bands.dtype).max]]).repeat(len(bands), axis=1)
    if stretch is None and scale == "auto" and bands.dtype.kind != "f":
        raise ImageError(f"{name} holds {bands.dtype}: give the scale (db or linear) or a stretch")

    values = bands[:, raster.valid]  # (C, number of valid pixels)
    if not values.size:
        raise ImageError(f"{name} has no valid pixel: all is no-data")
    if stretch is None and (scale == "db" or (scale == "auto" and values.min() < 0)):
        return np.array(DB_RANGES[len(bands)]).T
    return np.percentile(values, stretch or (1, 99), axis=1)


def sar_image(raster: Raster, limits: np.ndarray) -> Tensor:
    """A SAR raster, or a window of it, as float32 (3, H, W) in [-1, 1], with the limits of `sar_range`."""
    x = _to_unit(raster, limits)
    if len(x) == 2:
        x = np.stack((x[0], x[1], (x[0] + x[1]) / 2))
    elif len(x) == 4:
        x = np.stack((x[0], (x[1] + x[2]) / 2, x[3]))
    return torch.from_numpy(x).expand(3, -1, -1)


def read_eo(path: str | Path) -> Tensor:
    """An EO image as float32 (3, H, W) in [-1, 1]. Grey is repeated; a band after RGB is left out."""
    raster = read_raster(path)
    bands, name = raster.bands, raster.source
    if len(bands) in (12, 13):
        bands, white = bands[[3, 2, 1]], SENTINEL2_WHITE
    elif len(bands) in (1, 3, 4) and bands.dtype.name in ("uint8", "uint16"):
        bands, white = bands[:3], np.iinfo(bands.dtype).max
    else:
        what = f"{len(bands)} band(s) of {bands.dtype}"
        raise ImageError(f"{name} has {what}: EO is 8- or 16-bit grey or RGB, or Sentinel-2's 12 or 13 bands")
    x = _to_unit(raster._replace(bands=bands), np.array([[0], [white]]))
    return torch.from_numpy(x).expand(3, -1, -1)


def _to_unit(raster: Raster, limits: np.ndarray) -> np.ndarray:
    """(C, H, W) of anything, and what becomes -1 and 1 -> float32 in [-1, 1], -1 where there is no data."""
    kind = np.float64 if raster.bands.dtype.itemsize > 4 else np.float32
    low, high = limits.astype(kind)[..., None, None]  # (2, C) -> two of (C, 1, 1)
    x = np.where(raster.valid, raster.bands, low).astype(kind, copy=False)
    np.clip(x, low, high, out=x)
    x -= low
    x /= np.maximum(high - low, MIN_RANGE) / 2
    x -= 1
    return x.astype(np.float32, copy=False)


# ----------------------------------------------------------------------------------------------------------
# Training samples


def draw_augmentation(height: int, width: int, size: int, generator: torch.Generator) -> tuple[int, int, int]:
    """The paper's augmentation: a random crop, then flips and a rotation, each with probability 0.5.

    Returns the crop's top and left, and the orientation 0..7 for `orient`. A rotation is by 0..3 quarters, as
    in the released code. ValueError: the image is smaller than the crop.
    """
    _check_crop(height, width, size)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    top, left = draw(height - size + 1), draw(width - size + 1)
    horizontal, vertical, rotate, turns = draw(2), draw(2), draw(2), draw(4)
    # Both flips are half a turn; a vertical one alone is a horizontal one and half a turn.
    return top, left, (horizontal ^ vertical) * 4 + (turns * rotate + 2 * vertical) % 4


def orient(image: Tensor, orientation: int) -> Tensor:
    """(..., S, S) mirrored left to right if orientation >= 4, then turned by orientation % 4 quarters."""
    if orientation >= 4:
        image = image.flip(-1)
    return image.rot90(orientation % 4, (-2, -1))


def augment(sar: Tensor, eo: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two images (C, H, W) of one place -> (C, size, size), cropped, flipped and turned alike."""
    top, left, orientation = draw_augmentation(*sar.shape[-2:], size, generator)
    sar, eo = (orient(x[..., top : top + size, left : left + size], orientation) for x in (sar, eo))
    return sar, eo


def center_crop(image: Tensor, size: int) -> Tensor:
    """(..., H, W) -> (..., size, size). ValueError: the image is smaller."""
    height, width = image.shape[-2:]
    _check_crop(height, width, size)
    top, left = (height - size) // 2, (width - size) // 2
    return image[..., top : top + size, left : left + size]


def _check_crop(height: int, width: int, size: int):
    if min(height, width) < size:
        raise ValueError(f"an image of {width}x{height} pixels is smaller than the crop of {size}x{size}")


class PairDataset(torch.utils.data.Dataset):
    """The samples of a training, by their position in the whole run: 0, 1, 2, ... without end.

    Position p is entry p % n of the permutation of epoch p // n, augmented by a generator of its own. Both
    depend on the seed and these numbers alone, so that a resumed run, and any number of workers and ranks,
    see the same samples. With train=False, p is the pair's number, and the crop is central.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int = 0, train: bool = True):
        if not pairs:
            raise ValueError("there are no pairs to read")
        self.pairs, self.size, self.seed, self.train = list(pairs), size, seed, train
        self.epoch, self.order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Pairs, that is, the length of an epoch; positions go on beyond it."""
        return len(self.pairs)

    def pair(self, position: int) -> Pair:
        """The files behind a position."""
        if not self.train:
            return self.pairs[position]
        epoch, index = divmod(position, len(self.pairs))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(_hash(self.seed, "epoch", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.pairs), generator=generator)
        return self.pairs[self.order[index]]

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """SAR and EO, float32 (3, size, size) in [-1, 1]. ValueError names the file that is wrong."""
        pair = self.pair(position)
        sar, eo = read_sar(pair.sar), read_eo(pair.eo)
        if sar.shape != eo.shape:
            sizes = [f"{str(p)!r} is {x.shape[2]}x{x.shape[1]}" for p, x in ((pair.sar, sar), (pair.eo, eo))]
            raise ValueError(f"{sizes[0]} but {sizes[1]} pixels: the images of a pair must have equal sizes")
        try:
            if not self.train:
                return center_crop(sar, self.size), center_crop(eo, self.size)
            generator = torch.Generator().manual_seed(_hash(self.seed, "sample", position))
            return augment(sar, eo, self.size, generator)
        except ValueError as error:
            raise ValueError(f"{str(pair.sar)!r}: {error}") from None


def batches(start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> list[range]:
    """The positions of the global batches of steps start..stop - 1, of which every rank takes its slice.

    For DataLoader(PairDataset(...), batch_sampler=batches(...)). ValueError: the ranks cannot share a batch.
    """
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world} process(es)")
    return [range(step * batch_size + rank, (step + 1) * batch_size, world) for step in range(start, stop)]


# ----------------------------------------------------------------------------------------------------------
# Writing


def to_uint8(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1], clamped to it -> uint8 (H, W, 3)."""
    x = (image.detach().float().cpu() + 1) * 127.5
    return x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def save_image(path: str | Path, image: Tensor | np.ndarray, metadata: dict[str, str] | None = None):
    """Writes a PNG: a tensor (3, H, W) in [-1, 1] or a uint8 array (H, W) or (H, W, 3); and text entries.

    Under a temporary name first: the final name never holds half a picture. OSError: cannot be written.
    """
    path = Path(path)
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pixels = to_uint8(image) if isinstance(image, Tensor) else image
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
