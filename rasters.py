"""Image files to numbers: PNG, JPEG, TIFF and GeoTIFF, whole or by windows; which band is what, where there is data.

Numbers stay as the file has them; images.py says what they mean. No-data is: what the file declares (a no-data value, a
mask, alpha 0); and in float and signed numbers, whatever it declares, NaN, infinities, numbers that no image holds
(-9999, -32768, the least float ...), and 0 in all bands. The names of bands tell their polarisations; bands that are no
image by their names (an angle, a mask) are left out. The scale and offset that a file declares are applied.

Everything wrong with a file is an ImageError that names it. EXIF orientation is ignored: turning one image of
a pair would misalign it. 16-bit colour PNGs lose their low bytes, which Pillow cannot read; TIFFs do not.
"""

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
from PIL import Image

MIN_SIDE = 8  # one latent pixel
MAX_BYTES = 2**32  # of one raster in float32: a Sentinel-1 scene, 25,000 x 16,000 with two bands, is 3.2e9
MAX_BANDS = 16  # more than any image that is read here has
Image.MAX_IMAGE_PIXELS = MAX_BYTES // 8  # Pillow's own limit, 0.9e8 pixels, is below such a scene
warnings.filterwarnings("ignore", module="PIL")  # about damaged files, which get one message from here
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, these two write to stderr
logging.getLogger("rasterio").addHandler(logging.NullHandler())

FILL = {"f": -500, "i": -9000}  # numbers below are fill (-9999, -32768, ...); int16 may hold hundredths of dB
HUGE = 1e30


class Raster(NamedTuple):
    bands: np.ndarray  # (C, H, W), the file's numbers, after the scale and offset that it declares
    valid: np.ndarray  # (H, W) bool; False is no-data
    source: str  # the file, for messages
    names: tuple[str, ...] = ()  # polarisations of the bands, where the file says so
    notes: tuple[str, ...] = ()  # remarks to print
    scaled: bool = False  # the file declares a scale or an offset


GEO_TAGS = {33550, 33922, 34264, 34735, 42112, 42113}  # TIFF: place, projection, GDAL's own, no-data
BITS, COMPRESSION, SAMPLE_FORMAT, SIGNED = 258, 259, 339, 2  # three tags and a value of the last
# Pillow's modes that are data; CMYK, YCbCr and such are not.
CONVERTED = {"1": "L", "La": "LA", "P": "RGBA", "PA": "RGBA", "RGBa": "RGBA"}  # when they are read
MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "I", "I;16", "I;16L", "I;16B", "F"}

# All that decoders raise on damaged files; which one varies, so this list was found by fuzzing.
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, AttributeError)
DAMAGE += (ArithmeticError, MemoryError, struct.error, zlib.error)


class ImageError(ValueError):
    """A file that cannot be used: its name, and why, in one line."""


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    name = repr(str(path))
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name} has over {Image.MAX_IMAGE_PIXELS:,} pixels: cut it into parts") from None
    except Exception as error:
        if not isinstance(error, DAMAGE) and type(error).__module__ != "rasterio._err":  # GDAL's, which escape at times
            raise
        if not Path(path).exists():  # perhaps removed since it was listed
            raise ImageError(f"{name} is missing") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read as PNG, JPEG or TIFF (damaged?): {reason}") from None


# ----------------------------------------------------------------------------------------------------------
# PNG, JPEG, plain TIFF


def needs_rasterio(path: str | Path) -> bool:
    """True for a TIFF that rasterio must read: with geographic tags, compression (Pillow's libtiff would
    write to stderr if the file is damaged), several bands of more than 8 bits (Pillow reads them in part or not
    at all), or more pixels than Pillow may read. ImageError: no file, or it cannot be opened.
    """
    path, name = Path(path), repr(str(path))
    if path.exists() and not path.is_file():  # a named pipe would have us wait for ever
        raise ImageError(f"{name} is not a file")
    with _decoding(path):
        with path.open("rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return False
        try:
            with Image.open(path, formats=("TIFF",)) as image:
                tags, mode = image.tag_v2, image.mode
        except (Image.UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            return True
        eight_bits = max(tags.get(BITS, (1,))) <= 8 and SIGNED not in tags.get(SAMPLE_FORMAT, ())
        whole = eight_bits or mode in ("I;16", "I;16B", "F") and tags[BITS][0] != 12  # which Pillow takes for 16
        return bool(GEO_TAGS & set(tags)) or tags.get(COMPRESSION, 1) != 1 or not whole


def _check_size(path: str | Path, width: int, height: int) -> None:
    """Of a file, before anything of it is decoded: some bytes can claim to be gigabytes."""
    size = f"{str(path)!r} is {width}x{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{size}: each side needs at least {MIN_SIDE}")
    if width * height > max(2**24, 4000 * Path(path).stat().st_size):  # no usual compression exceeds 4000
        raise ImageError(f"{size} but too small a file for it: damaged or a trap")


def _check_memory(name: str, width: int, height: int, bands: int) -> None:
    """Of what is read at once."""
    if 4 * bands * width * height > MAX_BYTES:
        raise ImageError(f"{name} has {width}x{height} pixels in {bands} band(s), too many: cut it into parts")


def picture_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of what `read_picture` would read."""
    with _decoding(path), Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
        return image.height, image.width


def read_picture(path: str | Path) -> Raster:
    """A whole PNG, JPEG, or TIFF of which `needs_rasterio` is False; ImageError as from `read_raster`."""
    name = repr(str(path))
    with _decoding(path), Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
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
    bands = np.moveaxis(np.atleast_3d(pixels), 2, 0)
    valid = np.ones(pixels.shape[:2], bool)
    if has_alpha:  # which is no colour: it says where there is data
        bands, valid = bands[:-1], bands[-1] > 0
    return Raster(bands, _measured(bands, valid), name, _choose_bands([None] * len(bands), path)[1])


# ----------------------------------------------------------------------------------------------------------
# GeoTIFF


def open_geotiff(path: str | Path) -> Any:
    """An open rasterio dataset, for `read_window`. ImageError: rasterio is missing, or the file damaged."""
    try:
        import rasterio
    except ImportError:
        kind = "a TIFF that is georeferenced, compressed, or of several bands of more than 8 bits"
        raise ImageError(f"{str(path)!r} is {kind}, which needs rasterio: pip install rasterio") from None
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    # Files beside it (.ovr, .aux.xml, ...) are left alone: they can make GDAL read any file and the network. In the
    # environment, since rasterio's own settings hold for one thread. Its warnings would go to stderr; errors raise.
    os.environ |= {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO", "CPL_LOG": os.devnull}
    with _decoding(path):  # only GTiff: GDAL's other drivers can reach other files and the network
        dataset = rasterio.open(Path(path).absolute(), driver="GTiff")
        if dataset.subdatasets:
            raise ImageError(f"{str(path)!r} holds several pictures: save the right one as a file of its own")
        _check_size(path, dataset.width, dataset.height)
    if dataset.count > MAX_BANDS:  # a few bytes can claim 65,535, and reading them one by one takes an hour
        raise ImageError(f"{str(path)!r} has {dataset.count} bands: SAR images have one to four, EO images 13 at most")
    return dataset


def read_window(
    dataset: Any, window: tuple[slice, slice] | None = None, shape: tuple[int, int] | None = None
) -> Raster:
    """A window (rows, columns; default: all) of an open GeoTIFF, resampled to `shape` (H, W) if given.

    A pixel of unsigned integers is no-data if all bands are: 0 in one of three colours is a colour. One of others is if
    any band is. ImageError: complex numbers, palette, odd bits, too large, damaged, two bands of one polarisation.
    """
    from rasterio.enums import ColorInterp

    name, dtype = repr(dataset.name), np.dtype(dataset.dtypes[0])
    if dtype.kind == "c":
        raise ImageError(f"{name} holds complex numbers ({dtype}): save their intensity, |z|^2, as float32")
    with _decoding(dataset.name):
        kinds, bits = dataset.colorinterp, dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
        if ColorInterp.palette in kinds:
            raise ImageError(f"{name} has a palette: save it as grey or RGB")
        if dtype.kind != "f" and bits:  # 12 bits kept in 16, say
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
    valid = _measured(bands, masks.any(0) if dtype.kind == "u" else masks.all(0))
    scale, offset = (np.float32([v[i - 1] for i in indexes])[:, None, None] for v in (dataset.scales, dataset.offsets))
    if scaled := bool((scale != 1).any() or (offset != 0).any()):
        valid &= (bands != 0).any(0)
        bands = bands * scale + offset
        valid &= np.isfinite(bands).all(0)
    return Raster(bands, valid, name, polarisations, notes, scaled)


def _measured(bands: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """valid, without what is fill in float and signed numbers although the file does not declare it."""
    if (kind := bands.dtype.kind) in FILL:
        for band in bands:
            valid = valid & (band > FILL[kind]) & (band < HUGE)  # both are False for NaN
        valid = valid & (bands != 0).any(0)
    return valid


# ----------------------------------------------------------------------------------------------------------
# Names of bands

POLARISATION = re.compile(r"(?<![a-z])(?:vv|vh|hh|hv)(?![a-z])", re.IGNORECASE)  # in Sigma0_VV_db, s0_vv, VH
ANCILLARY = re.compile(
    r"angle|incidence|mask(?![a-z])|layover|shadow|elevation|coherence|(?<![a-z])(dem|lia|coh|phase|noise|area)(?![a-z])",
    re.IGNORECASE,
)


def polarisation(name: str | None) -> str | None:
    """The polarisation, "VV", "VH", "HH" or "HV", that the name of a band or of a file tells."""
    found = POLARISATION.findall(name or "")
    return found[0].upper() if len(found) == 1 and not ANCILLARY.search(name) else None


def is_cross(polarisation: str) -> bool:
    """Whether it is sent in one polarisation and received in the other."""
    return polarisation[0] != polarisation[1]


def polarisation_partner(path: Path) -> Path | None:
    """The file of the other polarisation of an acquisition, NAME_VH.tif for NAME_VV.tif, if it is there."""
    if not polarisation(path.stem):
        return None
    end = POLARISATION.search(path.name).end()
    receiver = path.name[end - 1].translate(str.maketrans("vhVH", "hvHV"))
    other = path.with_name(path.name[: end - 1] + receiver + path.name[end:])
    return other if other.is_file() else None


def _choose_bands(names: Sequence[str | None], path: str | Path) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    """Names of bands -> the indexes to take, in order; their polarisations, if known; a line about what is left out."""
    # a single band without a name may have that of its file: Sentinel-1 products have a file for each polarisation
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
