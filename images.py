"""Turns the numbers of image files into [-1, 1], and [-1, 1] into pictures.

    file  -> read_raster -> sar_scale -> sar_image -> (3, H, W) in [-1, 1]                (`read_sar` does all three)
    scene -> open_geotiff -> overview -> sar_scale; then read_window -> sar_image for each window

A `Reading` says what the numbers are. Where it says "auto", the first row that fits decides (`sar_kind`, `eo_kind`):

    SAR  8-bit                                 full         0..255
         16-bit, 99 % in the lowest twentieth  amplitude    20 log10, then 0.1st..99.99th percentile; 0 is no-data
         other 16-bit                          full         0..65535
         float, median below 0                 db           co-polarised -25..0, cross-polarised -32.5..0
         other float                           linear       1st..99th percentile
    EO   12 or 13 bands                        reflectance  Sentinel-2's bands 4, 3, 2; 0..3000, which is 0.3
         8-bit                                 full         0..255
         16-bit, 99 % up to 256..12000         reflectance  0..3000
         other 16-bit                          full         0..65535

Percentiles are taken of each band of an image. After scaling, polarisations become three channels: one is repeated;
(co, cross) becomes (co, cross, their mean); three are kept; (HH, HV, VH, VV) becomes (HH, (HV + VH) / 2, VV).
No-data becomes -1, the darkest. A problem with a file is an `ImageError`, a ValueError that names the file.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from common import atomic
from rasters import (
    ImageError,
    Raster,
    crop,
    is_cross,
    needs_rasterio,
    open_geotiff,
    read_picture,
    read_raster,
    read_window,
)

SAR_KINDS, EO_KINDS = ("auto", "full", "db", "linear", "amplitude"), ("auto", "full", "reflectance")
HOW = {  # each kind in words, for messages
    "full": "8- or 16-bit numbers over their full range",
    "db": "dB, -25 (cross-polarised: -32.5) to 0",
    "linear": "linear numbers between two percentiles of each band",
    "amplitude": "amplitudes, 20 log10 between two percentiles of each band, 0 is no-data",
    "reflectance": "reflectances, 0 to 0.3",
}
# what SAR numbers of a type can be; numbers of other types can only be linear
POSSIBLE = {"uint8": ("full",), "uint16": ("full", "linear", "amplitude"), "float": ("db", "linear")}
CO, CROSS = (-25.0, 0.0), (-32.5, 0.0)  # dB; the usual range since DSen2-CR (Meraner et al. 2020)
POLARISATIONS = {1: ("VV",), 2: ("VV", "VH"), 3: ("HH", "HV", "VV"), 4: ("HH", "HV", "VH", "VV")}  # of unnamed bands
# linear: as the released code reads SpaceNet6; amplitude: closest to the dB range on real Sentinel-1 tiles
PERCENTILES = {"linear": (1, 99), "amplitude": (0.1, 99.99)}
WHITE = 0.3  # reflectance; usual in true-colour pictures of Sentinel-2, where clouds saturate
OVERVIEW = 1024  # pixels; longest side of the reduced copy that gives the percentiles of a large image
MIN_RANGE = 2.0**-10  # of the numbers of a band, so that a constant image does not divide by zero

# ----------------------------------------------------------------------------------------------------------
# Reading


class Reading(NamedTuple):
    """What the numbers of SAR and EO images are."""

    sar: str = "auto"  # one of SAR_KINDS
    stretch: tuple[float, float] | None = None  # two percentiles: they replace the range of `sar` in each band
    eo: str = "auto"  # one of EO_KINDS


AUTO = Reading()


def overview(image: Any) -> Raster:
    """Reduces a whole image, an open GeoTIFF or a `Raster`, so that no side is longer than OVERVIEW."""
    height, width = image.valid.shape if isinstance(image, Raster) else image.shape
    shrink = max(1.0, max(height, width) / OVERVIEW)
    if not isinstance(image, Raster):
        return read_window(image, shape=(round(height / shrink) or 1, round(width / shrink) or 1))
    every = slice(None, None, math.ceil(shrink))
    return crop(image, every, every)


def read_overview(path: str | Path) -> Raster:
    """Reads the `overview` of a file. ImageError: as `read_raster`."""
    if needs_rasterio(path):
        with open_geotiff(path) as dataset:
            return overview(dataset)
    return overview(read_picture(path))


# ----------------------------------------------------------------------------------------------------------
# SAR


class SarScale(NamedTuple):
    """How the numbers of a SAR image become [-1, 1]."""

    kind: str  # one of SAR_KINDS, never "auto"
    limits: np.ndarray  # (2, C): the numbers of each band that become -1 and 1; for amplitudes 20 log10 of them


def read_sar(path: str | Path, reading: Reading = AUTO, window: tuple[slice, slice] | None = None) -> Tensor:
    """Reads a SAR image, or a window (rows, columns) of it: float32 (3, H, W) in [-1, 1].

    A window is scaled like the whole image. ImageError: as `read_raster` and `sar_scale`.
    """
    raster = read_raster(path, window)
    if reading.sar in ("full", "db") and not reading.stretch:  # any part of an image tells the range
        scale = sar_scale(raster, reading)
    elif window:
        scale = _whole_scale(path, reading)
    else:
        scale = sar_scale(raster if max(raster.valid.shape) <= OVERVIEW else read_overview(path), reading)
    return sar_image(raster, scale)


@lru_cache(maxsize=64)  # one decision serves all windows of an image
def _whole_scale(path: str | Path, reading: Reading) -> SarScale:
    return sar_scale(read_overview(path), reading)


def sar_scale(raster: Raster, reading: Reading = AUTO) -> SarScale:
    """Decides how a SAR image is scaled. raster: the whole image, or the `overview` of a large one.

    ImageError: the number of bands or the numbers are of no known kind, or cannot be what `reading` says.
    ValueError: the stretch is not two rising percentiles.
    """
    bands, stretch, dtype = raster.bands, reading.stretch, raster.bands.dtype
    if stretch and not 0 <= stretch[0] < stretch[1] <= 100:
        raise ValueError(f"the stretch is {stretch}: it must be two rising percentiles, e.g. 1 and 99")
    if len(bands) not in POLARISATIONS:
        raise ImageError(f"{raster.source} has {len(bands)} bands: a SAR image has one to four polarisations")
    kind = sar_kind(raster) if reading.sar == "auto" and not stretch else reading.sar
    if stretch and kind != "amplitude":
        kind = "linear"
    elif kind not in POSSIBLE.get("float" if dtype.kind == "f" else dtype.name, ("linear",)):
        raise ImageError(
            f"{raster.source} holds {dtype}, which cannot be {kind}: give another --scale, or convert it to float32"
        )
    if kind == "full":
        limits = [(0, np.iinfo(dtype).max)] * len(bands)
    elif kind == "db":
        limits = [CROSS if is_cross(name) else CO for name in raster.names or POLARISATIONS[len(bands)]]
    else:
        bands, valid = _numbers(raster, kind)
        limits = np.zeros((len(bands), 2))
        if valid.any():  # halved, so that the differences inside np.percentile do not overflow
            limits = 2 * np.percentile(bands[:, valid] / 2, stretch or PERCENTILES[kind], axis=1).T
    return SarScale(kind, np.array(limits).T)


def sar_kind(raster: Raster) -> str:
    """Finds out what the numbers of a SAR image are: one of SAR_KINDS, never "auto".

    ImageError: signed integers, no valid pixel, or numbers that are neither dB nor intensities.
    """
    values, dtype, name = raster.bands[:, raster.valid], raster.bands.dtype, raster.source
    if dtype == np.uint8:
        return "full"
    if dtype == np.uint16:  # amplitudes of Sentinel-1 lie in the lowest twentieth of the range
        values = values[values > 0]
        return "amplitude" if values.size and np.percentile(values, 99) < 65535 / 20 else "full"
    if dtype.kind != "f":
        raise ImageError(f"{name} holds {dtype}: declare what it counts (gdal_edit.py -scale 0.01), or give a stretch")
    if not values.size:
        raise ImageError(f"{name} has no valid pixel: all is no-data")
    if (median := np.median(values)) < -100:
        raise ImageError(f"{name} holds numbers about {median:.0f}, neither dB nor intensities: give a stretch")
    return "db" if median < 0 else "linear"  # the median, since a filter can make a few intensities negative


def sar_mask(raster: Raster, scale: SarScale) -> np.ndarray:
    """Returns (H, W) bool: True where the image has data."""
    return _numbers(raster, scale.kind)[1]


def _numbers(raster: Raster, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers to scale, (C, H, W), and where they are valid, (H, W). Amplitudes become 20 log10 of them."""
    if kind != "amplitude":
        return raster.bands, raster.valid
    decibels = 20 * np.log10(np.maximum(raster.bands, 1, dtype=np.float32))
    return decibels, raster.valid & (raster.bands != 0).any(0)  # amplitudes are 0 outside of the swath


def sar_image(raster: Raster, scale: SarScale) -> Tensor:
    """Scales a SAR raster, or a window of it: float32 (3, H, W) in [-1, 1]."""
    x = _to_unit(*_numbers(raster, scale.kind), scale.limits)
    if len(x) == 2:
        x = np.stack((x[0], x[1], (x[0] + x[1]) / 2))
    elif len(x) == 4:
        x = np.stack((x[0], (x[1] + x[2]) / 2, x[3]))
    return torch.from_numpy(x).expand(3, -1, -1)


def describe_sar(raster: Raster, scale: SarScale) -> str:
    """Says in one line how an image is read, and which options overrule that."""
    ranges = " and ".join(dict.fromkeys(f"{low:.4g}..{high:.4g}" for low, high in scale.limits.T))
    seen = f" ({ranges})" if scale.kind != "db" else ""
    names = f", {' and '.join(raster.names)}" if raster.names else ""
    warning = ""
    if scale.kind == "db" and raster.valid.any() and np.median(raster.bands[:, raster.valid]) >= 0:
        warning = "; warning: most numbers are above 0, which is no dB"
    return f"read as {HOW[scale.kind]}{seen}{names}{warning}; --scale or --stretch overrules"


# ----------------------------------------------------------------------------------------------------------
# EO


def read_eo(path: str | Path, reading: Reading = AUTO, window: tuple[slice, slice] | None = None) -> Tensor:
    """Reads an EO image, or a window (rows, columns) of it: float32 (3, H, W) in [-1, 1].

    A single band is repeated; of more than three bands only red, green and blue are read.
    ImageError: as `read_raster` and `eo_kind`.
    """
    raster = read_raster(path, window)
    bands = raster.bands[[3, 2, 1] if len(raster.bands) in (12, 13) else slice(3)]
    kind = eo_kind(read_overview(path) if window and reading.eo == "auto" else raster, reading)
    white = np.iinfo(bands.dtype).max if kind == "full" else WHITE * (1 if raster.scaled else 10_000)
    x = _to_unit(bands, raster.valid, np.array([[0], [white]]))
    return torch.from_numpy(x).expand(3, -1, -1)


def eo_kind(raster: Raster, reading: Reading = AUTO) -> str:
    """Decides how an EO image is read: "full" or "reflectance".

    ImageError: the bands or their type are not those of an EO image, or cannot be what `reading` says.
    """
    count, dtype, name = len(raster.bands), raster.bands.dtype.name, raster.source
    if count in (12, 13) or count in (1, 3, 4) and raster.scaled:
        return "reflectance"
    if count not in (1, 3, 4) or dtype not in ("uint8", "uint16"):
        what = f"{count} band(s) of {dtype}"
        raise ImageError(f"{name} has {what}: EO is 8- or 16-bit grey or RGB, or Sentinel-2's 12 or 13 bands")
    if dtype == "uint8" and reading.eo == "reflectance":
        raise ImageError(f"{name} holds 8-bit numbers, no reflectances x 10,000: convert it, or give --eo-scale full")
    if reading.eo != "auto":
        return reading.eo
    values = raster.bands[:3, raster.valid]
    if dtype == "uint8" or not values.any():
        return "full"
    if (highest := np.percentile(values, 99)) < 256:
        raise ImageError(f"{name} holds 16-bit numbers up to {highest:.0f} only: save them as 8 bit")
    return "reflectance" if highest <= 12_000 else "full"


def _to_unit(bands: np.ndarray, valid: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Scales (C, H, W) of any type to float32 in [-1, 1], clipped. limits: (2, C). Where `valid` is False: -1."""
    kind = np.float64 if bands.dtype.itemsize > 4 else np.float32
    low, high = limits.astype(kind)[..., None, None]  # (2, C) -> two of (C, 1, 1)
    x = np.where(valid, bands, low).astype(kind, copy=False)
    np.clip(x, low, high, out=x)
    x /= 2  # halving is exact, and the difference of two halves cannot overflow
    x -= low / 2
    x /= np.maximum(high / 2 - low / 2, MIN_RANGE / 2) / 2
    x -= 1
    return x.astype(np.float32, copy=False)


# ----------------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(image: Tensor) -> np.ndarray:
    """Turns (3, H, W) in [-1, 1] into uint8 (H, W, 3). Values outside the range are clamped."""
    x = (image.detach().float().cpu() + 1) * 127.5
    return x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def save_image(path: str | Path, image: Tensor | np.ndarray, metadata: dict[str, str] | None = None):
    """Writes a PNG under a temporary name and renames it: no reader ever sees half a picture.

    image: a tensor (3, H, W) in [-1, 1], or a uint8 array (H, W) or (H, W, 3). metadata: text entries of the PNG.
    OSError: the file cannot be written.
    """
    with atomic(path) as temporary:
        write_png(temporary, image, metadata)


def write_png(path: Path, image: Tensor | np.ndarray, metadata: dict[str, str] | None = None):
    """Writes a PNG like `save_image`, but directly."""
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, value)
    pixels = to_uint8(image) if isinstance(image, Tensor) else image
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=text)


def confidence_picture(confidence: Tensor) -> np.ndarray:
    """Draws (1, H, W) as uint8 (H, W), min-max normalised as in the paper: the most confident pixel is white."""
    x = confidence.float().cpu().numpy()[0]
    low, high = x.min(), x.max()
    return np.round(255 * (x - low) / (high - low)).astype(np.uint8) if high > low else np.full(x.shape, 255, np.uint8)


def grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), gap: int = 4) -> np.ndarray:
    """Lays out uint8 pictures, (H, W) or (H, W, 3), in rows, with a title over each column: uint8 (H', W', 3)."""
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
