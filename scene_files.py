"""SAR images opened and results written, by windows where they are GeoTIFFs: what `sample.py` has to do with files.

file -> Source.read -> a part of the SAR image        parts of the results -> write_geotiffs, write_pictures
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common import atomic
from images import (
    Raster,
    confidence_picture,
    grid,
    needs_rasterio,
    open_geotiff,
    read_picture,
    read_window,
    sar_image,
    sar_range,
    save_image,
    to_uint8,
    write_png,
)

OVERVIEW = 1024  # longest side of the reduced copy from which a scene's range of values is taken
SHEET_SIDE = 256  # pixels of a picture in a contact sheet


class Source:
    """An opened SAR image: in memory, or read by windows if it is a GeoTIFF.

    placed: it has a place on earth or a no-data value to keep, so that results should be GeoTIFFs. dark: 99 % of its
    16-bit numbers lie in the lowest twentieth of their range, as amplitudes do.
    ImageError names the file and what is wrong with it.
    """

    def __init__(self, path: Path, scale: str = "auto", stretch: tuple[float, float] | None = None):
        self.path, self.dataset, self.raster, self.placed = path, None, None, False
        if needs_rasterio(path):
            self.dataset = file = open_geotiff(path)
            self.height, self.width = file.shape
            self.placed = bool(file.crs or file.gcps[0] or file.rpcs or not file.transform.is_identity)
            self.placed |= file.nodata is not None
            reduced = self.overview(OVERVIEW)
        else:
            reduced = self.raster = read_picture(path)
            self.height, self.width = reduced.valid.shape
        self.limits = sar_range(reduced, scale, stretch)
        wide = reduced.bands.dtype.name == "uint16" and stretch is None and reduced.valid.any()
        self.dark = wide and np.percentile(reduced.bands[:, reduced.valid], 99) < self.limits.max() / 20

    def overview(self, side: int) -> Raster:
        """The whole image, thinned out so that no side is longer than this."""
        shrink = max(1.0, max(self.height, self.width) / side)
        if self.raster is None:
            return read_window(self.dataset, shape=tuple(round(n / shrink) or 1 for n in (self.height, self.width)))
        every = slice(None, None, math.ceil(shrink))
        return self.window(every, every)

    def window(self, rows: slice, columns: slice) -> Raster:
        """A part of the image."""
        if self.raster is None:
            return read_window(self.dataset, (rows, columns))
        bands, valid, source = self.raster
        return Raster(bands[:, rows, columns], valid[rows, columns], source)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """A part of the image as float32 (3, bottom - top, right - left) in [-1, 1], no-data darkest."""
        return sar_image(self.window(slice(top, bottom), slice(left, right)), self.limits)

    def close(self) -> None:
        """Lets go of the file."""
        if self.dataset is not None:
            self.dataset.close()


# Parts of results at (top, left): "eo" uint8 (rows, columns, 3); "confidence" and "spread" float32 (rows, columns)
Results = Iterable[tuple[int, int, dict[str, np.ndarray]]]


def write_pictures(source: Source, results: Results, paths: dict[str, Path], about: dict[str, str]) -> None:
    """Writes PNGs, transparent where there is no data; confidence from lowest to highest, spread in whole levels."""
    whole, valid = {}, np.empty((source.height, source.width), bool)
    for top, left, parts in results:
        place = slice(top, top + parts["eo"].shape[0]), slice(left, left + parts["eo"].shape[1])
        valid[place] = source.window(*place).valid
        for kind, part in parts.items():
            if kind not in whole:
                whole[kind] = np.empty((*valid.shape, *part.shape[2:]), part.dtype)
            whole[kind][place] = part
    mask = np.where(valid, 255, 0).astype(np.uint8)
    with ExitStack() as names:  # all get their names in the end, or none
        for kind, picture in whole.items():
            if kind == "confidence":
                picture[~valid] = picture[valid].min() if valid.any() else 0  # its range is that of the rest
                picture = confidence_picture(torch.from_numpy(picture)[None])
            elif kind == "spread":
                picture = picture.round().clip(0, 255).astype(np.uint8)
            if not valid.all():
                picture = np.dstack([picture, mask])
            write_png(names.enter_context(atomic(paths[kind])), picture, about)


def write_geotiffs(source: Source, results: Results, paths: dict[str, Path], about: dict[str, str]) -> None:
    """Writes GeoTIFFs with the place of the input, part by part. No-data: EO has an internal mask, since 0 is a colour;
    the others keep the input's no-data value, but have NaN where it is none or could be a result.
    """
    import rasterio

    given = source.dataset
    common = {
        "driver": "GTiff", "width": source.width, "height": source.height, "crs": given.crs, "tiled": True,
        "blockxsize": 128, "blockysize": 128, "compress": "deflate", "bigtiff": "if_safer",
        "transform": None if given.transform.is_identity else given.transform,
    }  # fmt: skip
    nodata = {"eo": None, "confidence": np.nan, "spread": np.nan}
    if given.nodata is not None and -3e38 < given.nodata <= 0:  # float32 ends at 3.4e38
        nodata["confidence"] = given.nodata
        nodata["spread"] = given.nodata or np.nan  # where samples agree, it is 0
    number = {"dtype": "float32", "count": 1, "predictor": 3}
    colour = {"dtype": "uint8", "count": 3, "predictor": 2, "photometric": "RGB"}
    # bytes; small, but enough for the blocks that two rows of tiles share, which else were compressed twice
    cache = max(2**25, 2**12 * source.width)
    with ExitStack() as names, rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, GDAL_CACHEMAX=cache):
        temporary = {kind: names.enter_context(atomic(path)) for kind, path in paths.items()}
        unread = 0  # checksum of what was written and not yet read back
        try:
            with ExitStack() as stack:
                files = {}
                for kind in paths:
                    profile = common | (colour if kind == "eo" else number) | {"nodata": nodata[kind]}
                    files[kind] = file = stack.enter_context(rasterio.open(temporary[kind], "w", **profile))
                    file.update_tags(**about)
                    if given.gcps[0]:
                        file.gcps = given.gcps
                    if given.rpcs:
                        file.rpcs = given.rpcs
                for top, left, parts in results:
                    rows, columns = parts["eo"].shape[:2]
                    place = slice(top, top + rows), slice(left, left + columns)
                    valid = source.window(*place).valid
                    for kind, part in parts.items():
                        if kind != "eo":
                            part = np.where(valid, part, np.float32(nodata[kind]))
                        part = np.moveaxis(np.atleast_3d(part), 2, 0)
                        files[kind].write(part, window=place)
                        unread += checksum(part)
                    mask = np.where(valid, 255, 0).astype(np.uint8)
                    files["eo"].write_mask(mask, window=place)
                    unread += checksum(mask)
            for kind, path in temporary.items():  # GDAL tells nobody if the disk is full when it closes a file
                with rasterio.open(path) as file:
                    for _, window in file.block_windows(1):
                        unread -= checksum(file.read(window=window))
                        if kind == "eo":
                            unread -= checksum(file.read_masks(1, window=window))
            if unread:
                raise OSError("it reads back otherwise than it was written")
        except (rasterio.errors.RasterioError, OSError) as error:
            raise OSError(f"cannot write {str(paths['eo'])!r} and its like (is the disk full?): {error}") from error


def checksum(values: np.ndarray) -> int:
    """A sum that does not depend on the order of the values."""
    return int(np.ascontiguousarray(values).view(np.uint8).sum(dtype=np.uint64))


def contact_sheet(
    path: Path, rows: list[dict[str, Path]], scale: str, stretch: tuple[float, float] | None, about: dict[str, str]
) -> None:
    """Writes a picture of SAR images, as `scale` and `stretch` read them, beside results. rows: files by title."""

    def small(title: str, path: Path) -> np.ndarray:
        try:
            source = Source(path, scale, stretch) if title == "SAR" else Source(path, "linear")  # confidence is no dB
            picture = Image.fromarray(to_uint8(sar_image(source.overview(OVERVIEW), source.limits)))
        except (ValueError, OSError, MemoryError):  # a confidence that is no-data everywhere, say
            picture = Image.new("RGB", (1, 1), "white")
        return np.asarray(ImageOps.pad(picture, (SHEET_SIDE, SHEET_SIDE), color="white"))

    pictures = [[small(*file) for file in row.items()] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path, grid(pictures, [title.replace("eo", "EO") for title in rows[0]]), about)
