"""Images: files to numbers in [-1, 1], and back to pictures.

    file  -> read_raster -> sar_range -> sar_image -> (3, H, W) in [-1, 1]     (`read_sar` is all three)
    scene -> open_geotiff -> read_window -> the same two steps, window by window

How a file's numbers become [-1, 1]:

    8-bit, 16-bit      0..255 and 0..65535, linearly
    SAR, float, dB     co-polarised -25..0 dB, cross-polarised -32.5..0 dB, clipped: the range usual for these
                       data since DSen2-CR (Meraner et al. 2020)
    SAR, float, linear 1st..99th percentile of each band of the image, clipped (as the released code does for SpaceNet6)
    EO, 12 or 13 bands Sentinel-2 reflectance * 10000: bands 4, 3, 2 and 0..3000, clipped (0.3 is white,
                       the usual true-colour picture; clouds saturate)

Float SAR is dB if most valid values are below 0: of an intensity, at most a few are, where a filter or resampling
overshot. Polarisations become channels after scaling: one is repeated; (co, cross) -> co, cross, their mean; three are
taken as they are; (HH, HV, VH, VV) -> HH, (HV + VH) / 2, VV. No-data (declared no-data, NaN, alpha 0) becomes -1, the
darkest.

Everything wrong with a file is a ValueError that names it. EXIF orientation is ignored: turning one image of
a pair would misalign it. 16-bit colour PNGs lose their low bytes, which Pillow cannot read; TIFFs do not.
"""

import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from common import atomic

MIN_SIDE = 8  # one latent pixel
MAX_BYTES = 2**32  # of one raster in float32: a Sentinel-1 scene, 25,000 x 16,000 with two bands, is 3.2e9
MAX_BANDS = 16  # more than any image that is read here has
Image.MAX_IMAGE_PIXELS = MAX_BYTES // 8  # Pillow's own limit, 0.9e8 pixels, is below such a scene
warnings.filterwarnings("ignore", module="PIL")  # about damaged files, which get one message from here
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, these two write to stderr
logging.getLogger("rasterio").addHandler(logging.NullHandler())

CO, CROSS = (-25.0, 0.0), (-32.5, 0.0)  # dB
DB_RANGES = {1: (CO,), 2: (CO, CROSS), 3: (CO, CROSS, CO), 4: (CO, CROSS, CROSS, CO)}  # by number of bands
SENTINEL2_WHITE = 3000  # reflectance 0.3
MIN_RANGE = 2.0**-10  # between -1 and 1, so that a constant image does not divide by zero

# ----------------------------------------------------------------------------------------------------------
# Reading


class Raster(NamedTuple):
    bands: np.ndarray  # (C, H, W), the file's own numbers
    valid: np.ndarray  # (H, W) bool; False is no-data
    source: str  # the file, for messages


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


def read_raster(path: str | Path) -> Raster:
    """A whole PNG, JPEG or TIFF, told by its content. Plain TIFFs are read by Pillow, others by rasterio.

    ImageError: missing, unreadable, damaged, too large, several pictures, CMYK, a side below 8 pixels, ...
    """
    if needs_rasterio(path):
        with open_geotiff(path) as dataset:
            return read_window(dataset)
    return read_picture(path)


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
    return Raster(bands, _finite(bands, valid), name)


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

    A pixel of float data is no-data if any of its bands is, one of integers if all are: 0 in one of three
    colours is a colour. ImageError: complex numbers, palette, odd bits, too large, damaged.
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
        indexes = [i for i, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
        height, width = shape or ([axis.stop - axis.start for axis in window] if window else dataset.shape)
        _check_memory(name, width, height, len(indexes))
        shape = (len(indexes), height, width)
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
    bands, name, kind = raster.bands, raster.source, raster.bands.dtype
    if scale not in ("auto", "db", "linear"):
        raise ValueError(f"the scale is {scale!r}: it must be auto, db or linear")
    if stretch is not None and not 0 <= stretch[0] < stretch[1] <= 100:
        raise ValueError(f"the stretch is {stretch}: it must be two rising percentiles, e.g. 1 and 99")
    if len(bands) not in DB_RANGES:
        raise ImageError(f"{name} has {len(bands)} bands: a SAR image has one to four polarisations")
    if stretch is None and kind.name in ("uint8", "uint16"):
        return np.array([[0], [np.iinfo(kind).max]]).repeat(len(bands), axis=1)
    values = bands[:, raster.valid]  # (C, number of valid pixels)
    if not values.size:
        raise ImageError(f"{name} has no valid pixel: all is no-data")
    if stretch is None:
        if scale == "auto" and kind.kind != "f":
            raise ImageError(f"{name} holds {kind}: give the scale (db or linear) or a stretch")
        if scale == "db" or (scale == "auto" and np.median(values) < 0):
            return np.array(DB_RANGES[len(bands)]).T
    return 2 * np.percentile(values / 2, stretch or (1, 99), axis=1)  # halved, so that no difference overflows


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
    x /= 2  # halved, which is exact, so that no difference overflows
    x -= low / 2
    x /= np.maximum(high / 2 - low / 2, MIN_RANGE / 2) / 2
    x -= 1
    return x.astype(np.float32, copy=False)


# ----------------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1], clamped to it -> uint8 (H, W, 3)."""
    x = (image.detach().float().cpu() + 1) * 127.5
    return x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def save_image(path: str | Path, image: Tensor | np.ndarray, metadata: dict[str, str] | None = None):
    """Writes a PNG: a tensor (3, H, W) in [-1, 1] or a uint8 array (H, W) or (H, W, 3); and text entries.

    Under a temporary name first: the final name never holds half a picture. OSError: cannot be written.
    """
    with atomic(path) as temporary:
        write_png(temporary, image, metadata)


def write_png(path: Path, image: Tensor | np.ndarray, metadata: dict[str, str] | None = None):
    """As `save_image`, but under the final name at once."""
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, value)
    pixels = to_uint8(image) if isinstance(image, Tensor) else image
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=text)


def confidence_picture(confidence: Tensor) -> np.ndarray:
    """(1, H, W) -> uint8 (H, W), min-max normalised as in the paper: white is the most confident of this image."""
    x = confidence.float().cpu().numpy()[0]
    low, high = x.min(), x.max()
    return np.round(255 * (x - low) / (high - low)).astype(np.uint8) if high > low else np.full(x.shape, 255, np.uint8)


def grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), gap: int = 4) -> np.ndarray:
    """Lays out uint8 pictures, (H, W) or (H, W, 3), with a title over each column -> (H', W', 3)."""
    height, width = (max(picture.shape[axis] for row in rows for picture in row) for axis in (0, 1))
    font = ImageFont.load_default(size=max(12, height // 12))
    header = round(font.size * 1.6) if titles else gap
    size = (gap + len(rows[0]) * (width + gap), header + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((gap + x * (width + gap) + width // 2, header // 2), title, "black", font, anchor="mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (gap + x * (width + gap), header + y * (height + gap)))
    return np.asarray(sheet)


# --- temporary shim until branch data is merged ---
SAR_KINDS = ("auto", "full", "db", "linear", "amplitude")
EO_KINDS = ("auto", "full", "reflectance")


class Reading(NamedTuple):
    sar: str = "auto"
    stretch: tuple | None = None
    eo: str = "auto"


class SarScale(NamedTuple):
    kind: str
    limits: np.ndarray


_sar_image = sar_image


def sar_scale(raster, reading=Reading()):
    return SarScale(
        "db" if raster.bands.dtype.kind == "f" else "full",
        sar_range(raster, reading.sar if reading.sar != "full" else "auto", reading.stretch),
    )


def sar_mask(raster, scale):
    return raster.valid


def sar_image(raster, scale):
    return _sar_image(raster, scale.limits)


def describe_sar(raster, scale):
    return f"read as {scale.kind}"


def read_sar(path, reading=Reading()):
    r = read_raster(path)
    return sar_image(r, sar_scale(r, reading))


Raster.notes = ()
