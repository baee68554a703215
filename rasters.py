"""Reads image files: PNG, JPEG, TIFF or GeoTIFF -> `Raster`: the file's numbers, and where there is data.

A raster holds the numbers of the file; images.py decides what they mean. PNG, JPEG and simple TIFFs are read by
Pillow, all other TIFFs by rasterio, which can read a window without decoding the rest.

- Bands: the band names of a GeoTIFF say which polarisation a band is. A band whose name says that it is not an image
  (an angle, a mask) is left out. The scale and offset that the file declares are applied.
- No-data: what the file declares (a no-data value, a mask, alpha 0). In float and signed integer files also NaN,
  infinity, fill values (-9999, -32768, the least float ...), and 0 in all bands, even if the file declares nothing.
- Errors: every problem with a file is an `ImageError`.

EXIF orientation is ignored: to turn one image of a pair would misalign the pair. 16-bit colour PNGs lose their low
bytes, because Pillow cannot read them; TIFFs do not.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MIN_SIDE = 8  # pixels; one pixel of the latent
MAX_BYTES = 2**32  # of a raster in float32; a Sentinel-1 scene, 25,000 x 16,000 with two bands, takes 3.2e9
MAX_BANDS = 16  # Sentinel-2 images have 13
Image.MAX_IMAGE_PIXELS = MAX_BYTES // 8  # Pillow's own limit of 0.9e8 pixels is too low for a Sentinel-1 scene
warnings.filterwarnings("ignore", module="PIL")  # a damaged file gets one error message from this module instead
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, these two write to stderr
logging.getLogger("rasterio").addHandler(logging.NullHandler())

FORMATS = ("PNG", "JPEG", "TIFF")
CONVERTED = {"1": "L", "La": "LA", "P": "RGBA", "PA": "RGBA", "RGBa": "RGBA"}  # Pillow's mode: the mode to read
MODES = {"L", "LA", "RGB", "RGBA", "I", "I;16", "I;16L", "I;16B", "F", *CONVERTED}  # CMYK, YCbCr ... are refused
GEO_TAGS = {33550, 33922, 34264, 34735, 42112, 42113}  # TIFF tags: location, projection, GDAL's metadata, no-data
BITS, COMPRESSION, SAMPLE_FORMAT, SIGNED = 258, 259, 339, 2  # three TIFF tags, and a value of SAMPLE_FORMAT
FILL = {"f": -500, "i": -9000}  # numbers below are fill (-9999, -32768 ...); int16 may hold hundredths of dB
HUGE = 1e30  # numbers above are fill, too


class Raster(NamedTuple):
    """The numbers of an image file, or of a part of it."""

    bands: np.ndarray  # (C, H, W), the declared scale and offset applied
    valid: np.ndarray  # (H, W) bool; False is no-data
    source: str  # the file, for messages
    names: tuple[str, ...] = ()  # the polarisation of each band, if the file says so
    notes: tuple[str, ...] = ()  # remarks to print
    scaled: bool = False  # the file declares a scale or an offset


class ImageError(ValueError):
    """An image file cannot be used. The message names the file and the reason in one line."""


@contextmanager
def _image_errors(path: str | Path) -> Iterator[None]:
    """Turns every error inside the context into an ImageError: decoders raise almost any type on damaged files."""
    name = repr(str(path))
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name} has over {Image.MAX_IMAGE_PIXELS:,} pixels: cut it into parts") from None
    except Exception as error:
        if not Path(path).exists():  # for example removed since the folder was listed
            raise ImageError(f"{name} is missing") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read as PNG, JPEG or TIFF (damaged?): {reason}") from error


# ----------------------------------------------------------------------------------------------------------
# Any file


def read_raster(path: str | Path, window: tuple[slice, slice] | None = None) -> Raster:
    """Reads an image, or a window (rows, columns) of it. The content tells the format, not the name.

    ImageError: the file is missing, damaged or too large, holds several pictures, is CMYK, has a side below 8 pixels.
    """
    if needs_rasterio(path):
        with open_geotiff(path) as dataset:
            return read_window(dataset, window)
    return crop(_kept_picture(path), *window) if window else read_picture(path)


@lru_cache(maxsize=2)  # a SAR and an EO image: one decoding serves all windows of an image
def _kept_picture(path: str | Path) -> Raster:
    return read_picture(path)


def crop(raster: Raster, rows: slice, columns: slice) -> Raster:
    """Cuts a window out of a raster."""
    return raster._replace(bands=raster.bands[:, rows, columns], valid=raster.valid[rows, columns])


def image_size(path: str | Path) -> tuple[int, int]:
    """Returns (height, width) without decoding the image. ImageError: as `read_raster`."""
    if needs_rasterio(path):
        with open_geotiff(path) as dataset:
            return dataset.shape
    with _image_errors(path), Image.open(path, formats=FORMATS) as image:
        return image.height, image.width


def needs_rasterio(path: str | Path) -> bool:
    """Tells whether a file is a TIFF that Pillow does not read well.

    Such a TIFF has geographic tags, compression (Pillow's libtiff writes to stderr if the file is damaged), several
    bands of more than 8 bits (Pillow reads a part of them or fails), or more pixels than Pillow may read.
    ImageError: the file is missing or cannot be opened.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # to open a named pipe would block for ever
        raise ImageError(f"{str(path)!r} is not a file")
    with _image_errors(path):
        with path.open("rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return False
        try:
            with Image.open(path, formats=("TIFF",)) as image:
                tags, mode = image.tag_v2, image.mode
        except (Image.UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            return True
        eight_bits = max(tags.get(BITS, (1,))) <= 8 and SIGNED not in tags.get(SAMPLE_FORMAT, ())
        one_band = mode in ("I;16", "I;16B", "F") and tags[BITS][0] != 12  # Pillow reads 12 bits as if they were 16
        return bool(GEO_TAGS & set(tags)) or tags.get(COMPRESSION, 1) != 1 or not (eight_bits or one_band)


def _check_size(path: str | Path, width: int, height: int) -> None:
    """Raises ImageError if an image is too small, or much larger than its file can hold: a few bytes can claim GBs."""
    size = f"{str(path)!r} is {width}x{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{size}: each side needs at least {MIN_SIDE}")
    if width * height > max(2**24, 4000 * Path(path).stat().st_size):  # no usual compression reaches 4000 pixels a byte
        raise ImageError(f"{size}, but the file is too small for that: it is damaged or a decompression bomb")


def _check_memory(name: str, width: int, height: int, bands: int) -> None:
    """Raises ImageError if the numbers do not fit into MAX_BYTES."""
    if 4 * bands * width * height > MAX_BYTES:
        raise ImageError(f"{name} has {width}x{height} pixels in {bands} band(s), too many: cut it into parts")


# ----------------------------------------------------------------------------------------------------------
# PNG, JPEG, simple TIFF


def read_picture(path: str | Path) -> Raster:
    """Reads a PNG, a JPEG, or a TIFF for which `needs_rasterio` is False. ImageError: as `read_raster`."""
    name = repr(str(path))
    with _image_errors(path), Image.open(path, formats=FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ImageError(f"{name} holds {image.n_frames} pictures: save the right one as a file of its own")
        if image.mode not in MODES:
            raise ImageError(f"{name} is a picture of mode {image.mode}: save it as grey or RGB")
        _check_size(path, *image.size)
        _check_memory(name, *image.size, len(image.getbands()))
        one_colour_is_clear = image.mode in ("L", "RGB") and "transparency" in image.info
        if mode := "RGBA" if one_colour_is_clear else CONVERTED.get(image.mode):
            image = image.convert(mode)
        pixels, has_alpha = np.asarray(image), image.mode in ("LA", "RGBA")
    bands = np.moveaxis(np.atleast_3d(pixels), 2, 0)  # (H, W) or (H, W, C) -> (C, H, W)
    bands = bands.astype(bands.dtype.newbyteorder("="), copy=False)  # a big-endian TIFF
    valid = np.ones(pixels.shape[:2], bool)
    if has_alpha:
        bands, valid = bands[:-1], bands[-1] > 0
    _, polarisations, _ = _choose_bands([None] * len(bands), path)
    return Raster(bands, _without_fill(bands, valid), name, polarisations)


# ----------------------------------------------------------------------------------------------------------
# GeoTIFF


def open_geotiff(path: str | Path) -> Any:
    """Opens a TIFF as a rasterio dataset, for `read_window`. ImageError: no rasterio, or the file is damaged."""
    try:
        import rasterio
    except ImportError:
        kind = "a TIFF that is georeferenced, compressed, or of several bands of more than 8 bits"
        raise ImageError(f"{str(path)!r} is {kind}, which needs rasterio: pip install rasterio") from None
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    # Sidecar files (.ovr, .aux.xml ...) are ignored: they could make GDAL open other files or the network. The options
    # are set in the environment, because those of rasterio hold for one thread only. CPL_LOG: GDAL's warnings would go
    # to stderr; its errors are raised anyway.
    os.environ |= {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO", "CPL_LOG": os.devnull}
    with _image_errors(path):
        # only GTiff: GDAL's other drivers can open other files and the network
        dataset = rasterio.open(Path(path).absolute(), driver="GTiff")
        if dataset.subdatasets:
            raise ImageError(f"{str(path)!r} holds several pictures: save the right one as a file of its own")
        _check_size(path, dataset.width, dataset.height)
    if dataset.count > MAX_BANDS:  # a few bytes can claim 65,535 bands, which take an hour to read
        raise ImageError(f"{str(path)!r} has {dataset.count} bands: SAR images have one to four, EO images 13 at most")
    return dataset


def read_window(
    dataset: Any, window: tuple[slice, slice] | None = None, shape: tuple[int, int] | None = None
) -> Raster:
    """Reads a window (rows, columns; default: all) of an open GeoTIFF, resampled to `shape` (H, W) if given.

    In unsigned integer files, a pixel is no-data if all its bands are no-data, since a colour may contain a 0. In other
    files one band is enough.
    ImageError: complex numbers, a palette, other than 8 or 16 bits, too large, damaged, two bands of one polarisation.
    """
    from rasterio.enums import ColorInterp

    name, dtype = repr(dataset.name), np.dtype(dataset.dtypes[0])
    if dtype.kind == "c":
        raise ImageError(f"{name} holds complex numbers ({dtype}): save their intensity, |z|^2, as float32")
    with _image_errors(dataset.name):
        kinds, bits = dataset.colorinterp, dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
        if ColorInterp.palette in kinds:
            raise ImageError(f"{name} has a palette: save it as grey or RGB")
        if dtype.kind != "f" and bits:  # for example 12 bits stored in 16
            raise ImageError(f"{name} has neither 8 nor 16 bits a pixel: save it with either")
        names = dataset.descriptions
        indexes = [i for i, kind in enumerate(kinds) if kind != ColorInterp.alpha or polarisation(names[i])]
        chosen, polarisations, notes = _choose_bands([names[i] for i in indexes], dataset.name)
        indexes = [indexes[i] + 1 for i in chosen]
        height, width = shape or ([axis.stop - axis.start for axis in window] if window else dataset.shape)
        _check_memory(name, width, height, len(indexes))
        shape = (len(indexes), height, width)
        bands = dataset.read(indexes, window=window, out_shape=shape)
        masks = dataset.read_masks(indexes, window=window, out_shape=shape)
    valid = _without_fill(bands, masks.any(0) if dtype.kind == "u" else masks.all(0))
    scale, offset = (np.float32([v[i - 1] for i in indexes])[:, None, None] for v in (dataset.scales, dataset.offsets))
    if scaled := bool((scale != 1).any() or (offset != 0).any()):
        valid &= (bands != 0).any(0)
        bands = bands * scale + offset
        valid &= np.isfinite(bands).all(0)
    return Raster(bands, valid, name, polarisations, notes, scaled)


def _without_fill(bands: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Returns `valid` without the pixels of float and signed integer files that hold fill values or 0 in all bands."""
    if (kind := bands.dtype.kind) in FILL:
        for band in bands:
            valid = valid & (band > FILL[kind]) & (band < HUGE)  # both are False for NaN
        valid = valid & (bands != 0).any(0)
    return valid


# ----------------------------------------------------------------------------------------------------------
# Band names

POLARISATION = re.compile(r"(?<![a-z])(?:vv|vh|hh|hv)(?![a-z])", re.IGNORECASE)  # in Sigma0_VV_db, s0_vv, VH
ANCILLARY = re.compile(
    r"angle|incidence|mask(?![a-z])|layover|shadow|elevation|coherence|(?<![a-z])(dem|lia|coh|phase|noise|area)(?![a-z])",
    re.IGNORECASE,
)


def polarisation(name: str | None) -> str | None:
    """Finds the polarisation, "VV", "VH", "HH" or "HV", in the name of a band or of a file."""
    found = POLARISATION.findall(name or "")
    return found[0].upper() if len(found) == 1 and not ANCILLARY.search(name) else None


def is_cross(polarisation: str) -> bool:
    """Tells whether a polarisation is crossed: "VH" and "HV" are sent in one direction and received in the other."""
    return polarisation[0] != polarisation[1]


def polarisation_partner(path: Path) -> Path | None:
    """Finds the file of the other polarisation beside a file: NAME_VH.tif for NAME_VV.tif. None: there is none."""
    if not polarisation(path.stem):
        return None
    end = POLARISATION.search(path.name).end()
    receiver = path.name[end - 1].translate(str.maketrans("vhVH", "hvHV"))
    other = path.with_name(path.name[: end - 1] + receiver + path.name[end:])
    return other if other.is_file() else None


def _choose_bands(names: Sequence[str | None], path: str | Path) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    """Band names -> indexes of the bands to read, in order; their polarisations if known; notes about other bands."""
    # Sentinel-1 products have a file for each polarisation: the file name names a single band without a name
    known = [polarisation(name) for name in (names if len(names) > 1 else [names[0] or Path(path).stem])]
    polarisations = sorted(filter(None, known))  # HH, HV, VH, VV
    if len({*polarisations}) < len(polarisations):
        raise ImageError(f"{str(path)!r} has several bands of one polarisation {names}: save the right ones alone")
    if len(polarisations) == 2:
        polarisations.sort(key=is_cross)
    chosen = [known.index(name) for name in polarisations]
    if not chosen:
        chosen = [i for i, name in enumerate(names) if not ANCILLARY.search(name or "")] or list(range(len(names)))
    left = [repr(name or f"band {i}") for i, name in enumerate(names, 1) if i - 1 not in chosen]
    return chosen, tuple(polarisations), (f"bands left out: {', '.join(left)}",) if left else ()
