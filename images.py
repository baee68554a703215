"""Images: numbers of files to [-1, 1], and back to pictures.

    file  -> read_raster -> sar_scale -> sar_image -> (3, H, W) in [-1, 1]     (`read_sar` is all three)
    scene -> open_geotiff -> overview -> sar_scale, then read_window -> sar_image, window by window

A `Reading` says how. Where it says "auto", the first rule that fits decides (`sar_kind`, `eo_kind`):

    SAR  8-bit                                 full         0..255
         16-bit, 99 % in the lowest twentieth  amplitude    20 log10, then 0.1st..99.99th percentile; 0 is no-data
         other 16-bit                          full         0..65535
         float, median below 0                 db           co-polarised -25..0, cross-polarised -32.5..0
         other float                           linear       1st..99th percentile
    EO   12 or 13 bands                        reflectance  Sentinel-2's bands 4, 3, 2; 0..3000, which is 0.3
         8-bit                                 full         0..255
         16-bit, 99 % up to 256..12000         reflectance  0..3000
         other 16-bit                          full         0..65535

Percentiles are those of each band of an image. Polarisations become channels after scaling: one is repeated;
(co, cross) become co, cross, their mean; three are taken as they are; (HH, HV, VH, VV) become HH, (HV + VH) / 2,
VV. No-data becomes -1, the darkest. Everything wrong with a file is a ValueError that names it.
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
from rasters import ImageError, Raster, is_cross, needs_rasterio, open_geotiff, picture_size, read_picture, read_window

SAR_KINDS, EO_KINDS = ("auto", "full", "db", "linear", "amplitude"), ("auto", "full", "reflectance")
HOW = {  # for messages
    "full": "8- or 16-bit numbers over their full range",
    "db": "dB, -25 (cross-polarised: -32.5) to 0",
    "linear": "linear numbers between two percentiles of each band",
    "amplitude": "amplitudes, 20 log10 between two percentiles of each band, 0 is no-data",
    "reflectance": "reflectances, 0 to 0.3",
}
CO, CROSS = (-25.0, 0.0), (-32.5, 0.0)  # dB, the range usual since DSen2-CR (Meraner et al. 2020)
POLARISATIONS = {1: ("VV",), 2: ("VV", "VH"), 3: ("HH", "HV", "VV"), 4: ("HH", "HV", "VH", "VV")}  # of unnamed bands
# linear: as the released code reads SpaceNet6; amplitude: comes near to the dB range on real Sentinel-1 tiles
PERCENTILES = {"linear": (1, 99), "amplitude": (0.1, 99.99)}
WHITE = 0.3  # reflectance, as usual in true-colour pictures of Sentinel-2; clouds saturate
OVERVIEW = 1024  # longest side of the reduced copy from which percentiles of a large image are taken
MIN_RANGE = 2.0**-10  # between -1 and 1, so that a constant image does not divide by zero

# ----------------------------------------------------------------------------------------------------------
# Reading


class Reading(NamedTuple):
    """How numbers are read."""

    sar: str = "auto"  # one of SAR_KINDS
    stretch: tuple[float, float] | None = None  # two percentiles of each band, to be the range instead
    eo: str = "auto"  # one of EO_KINDS


AUTO = Reading()


def read_raster(path: str | Path, window: tuple[slice, slice] | None = None) -> Raster:
    """A PNG, JPEG or TIFF, told by its content, or a window (rows, columns) of it.

    Plain TIFFs are read by Pillow, others by rasterio, which decodes no more than the window.
    ImageError: missing, unreadable, damaged, too large, several pictures, CMYK, a side below 8 pixels, ...
    """
    if needs_rasterio(path):
        with open_geotiff(path) as dataset:
            return read_window(dataset, window)
    return crop(_last_picture(path, _changed(path)), *window) if window else read_picture(path)


def _changed(path: str | Path) -> int:
    return Path(path).stat().st_mtime_ns


@lru_cache(maxsize=2)  # a SAR and an EO image, of which window after window is read
def _last_picture(path: str | Path, _changed: int) -> Raster:
    return read_picture(path)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width), without decoding the image."""
    if needs_rasterio(path):
        with open_geotiff(path) as dataset:
            return dataset.shape
    return picture_size(path)


def crop(raster: Raster, rows: slice, columns: slice) -> Raster:
    """A part of a raster."""
    return raster._replace(bands=raster.bands[:, rows, columns], valid=raster.valid[rows, columns])


def overview(image: Any) -> Raster:
    """The whole of an open GeoTIFF, or of a `Raster`, thinned out so that no side is longer than OVERVIEW."""
    height, width = image.valid.shape if isinstance(image, Raster) else image.shape
    shrink = max(1.0, max(height, width) / OVERVIEW)
    if not isinstance(image, Raster):
        return read_window(image, shape=(round(height / shrink) or 1, round(width / shrink) or 1))
    every = slice(None, None, math.ceil(shrink))
    return crop(image, every, every)


def read_overview(path: str | Path) -> Raster:
    """`overview` of a file."""
    if needs_rasterio(path):
        with open_geotiff(path) as dataset:
            return overview(dataset)
    return overview(_last_picture(path, _changed(path)))


# ----------------------------------------------------------------------------------------------------------
# Numbers to [-1, 1]


class SarScale(NamedTuple):
    kind: str  # one of SAR_KINDS, but not "auto"
    limits: np.ndarray  # (2, C): what becomes -1 and 1 in each band; of amplitudes in dB


def read_sar(path: str | Path, reading: Reading = AUTO, window: tuple[slice, slice] | None = None) -> Tensor:
    """A SAR image, or a window of it, as float32 (3, H, W) in [-1, 1]; for its no-data mask, take the steps singly."""
    raster = read_raster(path, window)
    fixed = reading.sar in ("full", "db") and not reading.stretch  # whatever the rest of the image holds
    whole = not window and max(raster.valid.shape) <= OVERVIEW
    scale = sar_scale(raster, reading) if fixed or whole else _scene_scale(path, reading, _changed(path))
    return sar_image(raster, scale)


@lru_cache(maxsize=64)
def _scene_scale(path: str | Path, reading: Reading, _changed: int) -> SarScale:
    return sar_scale(read_overview(path), reading)


def sar_scale(raster: Raster, reading: Reading = AUTO) -> SarScale:
    """How a SAR image is read. Of a huge scene, give the `overview`.

    ValueError: bands or numbers of no known meaning, or that cannot be what `reading` says; a wrong stretch.
    """
    bands, stretch, dtype = raster.bands, reading.stretch, raster.bands.dtype
    if stretch and not 0 <= stretch[0] < stretch[1] <= 100:
        raise ValueError(f"the stretch is {stretch}: it must be two rising percentiles, e.g. 1 and 99")
    if len(bands) not in POLARISATIONS:
        raise ImageError(f"{raster.source} has {len(bands)} bands: a SAR image has one to four polarisations")
    kind = sar_kind(raster) if reading.sar == "auto" and not stretch else reading.sar
    if stretch and kind != "amplitude":
        kind = "linear"
    elif not _can_be(kind, dtype):
        raise ImageError(f"{raster.source} holds {dtype}, which cannot be {kind}: convert it or give another --scale")
    if kind == "full":
        limits = [(0, np.iinfo(dtype).max)] * len(bands)
    elif kind == "db":
        limits = [CROSS if is_cross(name) else CO for name in raster.names or POLARISATIONS[len(bands)]]
    else:
        bands, valid = _numbers(raster, kind)
        limits = np.zeros((len(bands), 2))
        if valid.any():  # halved, so that no difference overflows
            limits = 2 * np.percentile(bands[:, valid] / 2, stretch or PERCENTILES[kind], axis=1).T
    return SarScale(kind, np.array(limits).T)


def _can_be(kind: str, dtype: np.dtype) -> bool:
    """Whether SAR numbers of this type can be of this kind."""
    if dtype == np.uint8:
        return kind == "full"
    if dtype == np.uint16:
        return kind != "db"
    return kind == "linear" or kind == "db" and dtype.kind == "f"


def sar_kind(raster: Raster) -> str:
    """What the numbers of a SAR image are. ImageError: of no known kind, or nothing valid."""
    values, dtype, name = raster.bands[:, raster.valid], raster.bands.dtype, raster.source
    if dtype == np.uint8:
        return "full"
    if dtype == np.uint16:  # amplitudes lie in the lowest twentieth of the range
        values = values[values > 0]
        return "amplitude" if values.size and np.percentile(values, 99) < 65535 / 20 else "full"
    if dtype.kind != "f":
        raise ImageError(f"{name} holds {dtype}: declare what it counts (gdal_edit.py -scale 0.01), or give a stretch")
    if not values.size:
        raise ImageError(f"{name} has no valid pixel: all is no-data")
    if (median := np.median(values)) < -100:
        raise ImageError(f"{name} holds numbers about {median:.0f}, neither dB nor intensities: give a stretch")
    return "db" if median < 0 else "linear"  # a few intensities may be negative, where a filter overshot


def sar_mask(raster: Raster, scale: SarScale) -> np.ndarray:
    """(H, W) bool: where there is data. Amplitudes are 0 outside of the swath."""
    return _numbers(raster, scale.kind)[1]


def _numbers(raster: Raster, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers to scale, of amplitudes in dB, and where they are valid."""
    if kind != "amplitude":
        return raster.bands, raster.valid
    decibels = 20 * np.log10(np.maximum(raster.bands, 1, dtype=np.float32))
    return decibels, raster.valid & (raster.bands != 0).any(0)


def sar_image(raster: Raster, scale: SarScale) -> Tensor:
    """A SAR raster, or a window of it, as float32 (3, H, W) in [-1, 1]."""
    x = _to_unit(*_numbers(raster, scale.kind), scale.limits)
    if len(x) == 2:
        x = np.stack((x[0], x[1], (x[0] + x[1]) / 2))
    elif len(x) == 4:
        x = np.stack((x[0], (x[1] + x[2]) / 2, x[3]))
    return torch.from_numpy(x).expand(3, -1, -1)


def describe_sar(raster: Raster, scale: SarScale) -> str:
    """One line: how an image is read, and how to overrule that."""
    ranges = " and ".join(dict.fromkeys(f"{low:.4g}..{high:.4g}" for low, high in scale.limits.T))
    seen = f" ({ranges})" if scale.kind in PERCENTILES else ""
    names = f", {' and '.join(raster.names)}" if raster.names else ""
    return f"read as {HOW[scale.kind]}{seen}{names}; --scale or --stretch overrules"


def read_eo(path: str | Path, reading: Reading = AUTO, window: tuple[slice, slice] | None = None) -> Tensor:
    """An EO image, or a window of it, as float32 (3, H, W) in [-1, 1]. Grey is repeated; only RGB of more is taken."""
    raster = read_raster(path, window)
    bands = raster.bands[[3, 2, 1] if len(raster.bands) in (12, 13) else slice(3)]
    kind = eo_kind(read_overview(path) if window and reading.eo == "auto" else raster, reading)
    white = np.iinfo(bands.dtype).max if kind == "full" else WHITE * (1 if raster.scaled else 10_000)
    x = _to_unit(bands, raster.valid, np.array([[0], [white]]))
    return torch.from_numpy(x).expand(3, -1, -1)


def eo_kind(raster: Raster, reading: Reading = AUTO) -> str:
    """How an EO image is read: "full" or "reflectance". ImageError: neither can be."""
    count, dtype, name = len(raster.bands), raster.bands.dtype.name, raster.source
    if count in (12, 13) or count in (1, 3, 4) and raster.scaled:
        return "reflectance"
    if count not in (1, 3, 4) or dtype not in ("uint8", "uint16"):
        what = f"{count} band(s) of {dtype}"
        raise ImageError(f"{name} has {what}: EO is 8- or 16-bit grey or RGB, or Sentinel-2's 12 or 13 bands")
    if dtype == "uint8" and reading.eo == "reflectance":
        raise ImageError(f"{name} holds 8-bit numbers, no reflectances x 10,000: convert it, or give --eo-scale full")
    values = raster.bands[:3, raster.valid]
    if dtype == "uint8" or reading.eo != "auto" or not values.any():
        return reading.eo if reading.eo != "auto" else "full"
    if (highest := np.percentile(values, 99)) < 256:
        raise ImageError(f"{name} holds 16-bit numbers up to {highest:.0f} only: save them as 8 bit")
    return "reflectance" if highest <= 12_000 else "full"


def _to_unit(bands: np.ndarray, valid: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(C, H, W) of anything, and what becomes -1 and 1 -> float32 in [-1, 1], -1 where there is no data."""
    kind = np.float64 if bands.dtype.itemsize > 4 else np.float32
    low, high = limits.astype(kind)[..., None, None]  # (2, C) -> two of (C, 1, 1)
    x = np.where(valid, bands, low).astype(kind, copy=False)
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
