"""Scenes of any size: tiles that are denoised together, and GeoTIFFs read and written by windows.

    Source.read -> encode -> z_sar ---------+
                                            +-> for each step, all tiles: predict, blend, step -> z_0 -> decode -> write
    noise of the whole scene -> z_t --------+

If every tile were translated on its own, neighbouring tiles would invent different fields and roofs, and no blending of
pixels could hide it. So all tiles take each step together, and where they overlap their predictions are averaged with
smooth weights before the step (Bar-Tal et al., "MultiDiffusion", ICML 2023): there is one latent image throughout, and
neighbours agree. Encoding and decoding are blended in the same way, since the VAE's norms look at a whole tile.

Latents are kept in temporary files (`OnDisk`), and every stage goes through the scene tile by tile (`blend`). So memory
depends on the tile and a little on the scene's width (a row of tiles keeps what it shares with the next), but not on
its height.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdiffset import CDiffSET, denoise, pad_to_multiple, resize_confidence, variance
from common import atomic
from images import Reading, confidence_picture, describe_sar, overview, sar_image, sar_mask, sar_scale, write_png
from rasters import Raster, crop, needs_rasterio, open_geotiff, read_picture, read_window
from scheduler import DDIMScheduler

NOISE_CHUNK = 2**20  # numbers drawn at a time
MARGIN = 4  # latent rows that bicubic resizing must see beyond a window; its kernel reaches 2
Tile = tuple[int, slice, slice]  # number of the sample, rows, columns


@torch.inference_mode()
def translate_scene(
    model: CDiffSET,
    read: Callable[[int, int, int, int], Tensor],
    height: int,
    width: int,
    tile: int = 512,
    steps: int = 50,
    seeds: Sequence[int] = (0,),
    spacing: str = "leading",
    batch: int = 1,
    folder: Path | None = None,
    progress: Callable[[int], object] = lambda tiles: None,
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """Translates a scene of height x width pixels, N = len(seeds) times, and yields it in rectangular parts.

    read(top, bottom, left, right) -> a part of the SAR image (3, bottom - top, right - left) in [-1, 1].
    Yields (top, left, EO (N, 3, rows, columns) in [-1, 1], confidence (N, 1, rows, columns)), as `CDiffSET.translate`
    returns them; each pixel once, from top to bottom. Sample i starts from the noise of seeds[i], drawn as in
    `translate`; a scene of one tile is the very same computation.
    batch: tiles (times samples) that the networks take at once. folder: for temporary files (default: the system's)
    of 4 * (4 + 5 N) bytes a latent pixel. progress: called with the number of tiles just done, of `count_tiles`.
    Raises ValueError if the tile is not a multiple of the model's unit, or shorter than two.
    """
    check_tile(model, tile)
    scheduler = DDIMScheduler(**model.scheduler.config | {"steps": steps, "spacing": spacing})
    context = model.prompt_embedding  # on the networks' device, in their precision
    factor, channels, samples = model.vae.factor, model.vae.config["latent_channels"], len(seeds)
    h, w = latent_size(model, height, width)
    side = tile // factor

    def read_pixels(rows: slice, columns: slice) -> Tensor:  # the SAR image at these latent pixels
        bottom, right = min(rows.stop * factor, height), min(columns.stop * factor, width)
        image = read(rows.start * factor, bottom, columns.start * factor, right)
        return pad_to_multiple(image[None].float(), model.unit)[0]

    # what the networks compute for several tiles at once: (B, C, ...)
    def encode(tiles: list[Tile]) -> Tensor:
        return model.encode(torch.stack([read_pixels(*place) for _, *place in tiles]))

    def predict(t: int, middle: bool, tiles: list[Tile]) -> Tensor:
        sar = torch.stack([z_sar.read(0, *place) for _, *place in tiles]).to(context)
        noisy = torch.stack([z_t.read(*place) for place in tiles]).to(context)
        prediction, raw = denoise(model.unet, sar, noisy, t, context)
        if middle and raw is not None:
            prediction = torch.cat([prediction.float(), 1 / variance(raw.float())], dim=1)
        return prediction

    def decode(tiles: list[Tile]) -> Tensor:
        return model.decode(torch.stack([z_t.read(*place) for place in tiles]))

    def read_confidence(rows: slice, columns: slice) -> Tensor:  # (N, 1, ...), resized, at these latent pixels
        above, before = max(rows.start - MARGIN, 0), max(columns.start - MARGIN, 0)
        place = slice(above, min(rows.stop + MARGIN, h)), slice(before, min(columns.stop + MARGIN, w))
        x = torch.stack([confidence.read(n, *place) for n in range(samples)])
        x = resize_confidence(x, [n * factor for n in x.shape[2:]])
        return x[:, :, (rows.start - above) * factor :, (columns.start - before) * factor :]

    blended = partial(blend, h, w, side, batch=batch)
    with (
        model.unet.keeping(context),
        closing(OnDisk(folder, channels, h, w)) as z_sar,
        closing(OnDisk(folder, channels, h, w)) as z_t,
        closing(OnDisk(folder, 1, h, w)) as confidence,
    ):
        for rows, columns, z in blended(encode):
            z_sar.write(0, rows, columns, z[0])
            progress(1)
        for seed in seeds:
            z_t.append_noise(seed)
        for i, t in enumerate(scheduler.timesteps.tolist()):
            for rows, columns, outputs in blended(partial(predict, t, i == steps // 2), samples):
                for n, output in enumerate(outputs):
                    # no later tile reads these pixels, so they may take their step
                    x = z_t.read(n, rows, columns).to(output.device)
                    z_t.write(n, rows, columns, scheduler.step(output[:channels], t, x))
                    if len(output) > channels:
                        confidence.write(n, rows, columns, output[channels:])
                progress(samples)
        for rows, columns, eo in blended(decode, samples, factor):
            top, left = rows.start * factor, columns.start * factor
            eo = eo[:, :, : height - top, : width - left].clamp(-1, 1)
            part = read_confidence(rows, columns)[:, :, : eo.shape[2], : eo.shape[3]] if model.has_variance else None
            progress(samples)
            yield top, left, eo, part


def chunks(items: list, size: int) -> Iterator[list]:
    """The items in runs of `size`; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def check_tile(model: CDiffSET, tile: int) -> None:
    """Raises ValueError unless tiles of this many pixels suit the model."""
    if tile % model.unit or tile < 2 * model.unit:
        raise ValueError(f"--tile {tile}: this model needs a multiple of {model.unit}, at least {2 * model.unit}")


def latent_size(model: CDiffSET, height: int, width: int) -> tuple[int, int]:
    """The size of a scene's latents, after padding to the model's unit."""
    return tuple((size + -size % model.unit) // model.vae.factor for size in (height, width))


def count_tiles(model: CDiffSET, height: int, width: int, tile: int, steps: int, samples: int) -> int:
    """How many tiles `translate_scene` reports to `progress`: encoded, in each step, and decoded."""
    rows, columns = (len(starts(size, tile // model.vae.factor)) for size in latent_size(model, height, width))
    return rows * columns * (1 + samples * (steps + 1))


# ----------------------------------------------------------------------------------------------------------
# Tiles and their weights


def starts(size: int, tile: int) -> list[int]:
    """Where tiles begin along an axis: evenly spread, overlapping by a quarter of a tile or more."""
    if size <= tile:
        return [0]
    gaps = math.ceil((size - tile) / (tile - tile // 4))
    return [round(i * (size - tile) / gaps) for i in range(gaps + 1)]


def tile_weights(size: int, tile: int, scale: int = 1) -> list[Tensor]:
    """The weight of each tile along an axis, (tile * scale,) each.

    It rises and falls as a sine squared over a quarter of the tile, and is divided by the sum of all tiles' weights
    there, so that the blend is an average.
    """
    begin, length = [start * scale for start in starts(size, tile)], min(tile, size) * scale
    ramp = max(1, tile // 4) * scale
    inward = torch.arange(length, dtype=torch.float64) + 0.5  # distance to the tile's near end
    bell = (torch.minimum(inward, inward.flip(0)) / ramp).clamp(max=1).mul(math.pi / 2).sin() ** 2
    total = torch.zeros(size * scale, dtype=torch.float64)
    for start in begin:
        total[start : start + length] += bell
    return [(bell / total[start : start + length]).float() for start in begin]


def blend(
    height: int,
    width: int,
    tile: int,
    compute: Callable[[list[Tile]], Tensor],
    samples: int = 1,
    scale: int = 1,
    batch: int = 1,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Computes the overlapping tiles of a (height, width) plane and averages them.

    compute([(sample, rows, columns), ...]) gives (B, C, rows * scale, columns * scale), for up to `batch` tiles.
    Yields (rows, columns, values (samples, C, rows * scale, columns * scale)): the parts of the plane, from top to
    bottom and left to right, as soon as no later tile reaches them. `below` keeps what tiles of the next row share
    with this row; `beside` keeps what the next tile to the right shares with this tile.
    """
    tops, lefts = starts(height, tile), starts(width, tile)
    down, across = tile_weights(height, tile, scale), tile_weights(width, tile, scale)
    below, carried = None, 0
    for top, bottom, weight in zip(tops, [*tops[1:], height], down):
        rows = slice(top, min(top + tile, height))
        tiles = [(n, rows, slice(left, min(left + tile, width))) for left in lefts for n in range(samples)]
        computed = chain.from_iterable(compute(group).float() for group in chunks(tiles, batch))
        done, beside = (bottom - top) * scale, None
        for left, right, weight_x in zip(lefts, [*lefts[1:], width], across):
            values = torch.stack(list(islice(computed, samples)))
            values *= (weight[:, None] * weight_x).to(values.device)
            if beside is not None:
                values[..., : beside.shape[3]] += beside
            values, beside = values.split([(right - left) * scale, values.shape[3] - (right - left) * scale], dim=3)
            if below is None:
                shared = values.shape[2] - min(b - a for a, b in zip(tops, [*tops[1:], height])) * scale
                below = values.new_empty(*values.shape[:2], shared, width * scale)
            here = below[..., left * scale : right * scale]
            values[:, :, :carried] += here[:, :, :carried]
            here[:, :, : values.shape[2] - done] = values[:, :, done:]
            yield slice(top, bottom), slice(left, right), values[:, :, :done]
        carried = values.shape[2] - done


class OnDisk:
    """Samples of float32 numbers (channels, height, width) in a temporary file without a name.

    The file vanishes with its process, however that ends. (A memory map would count as memory in use, and would crash
    the process when the disk is full.)
    """

    def __init__(self, folder: Path | None, channels: int, height: int, width: int):
        self.shape = channels, height, width
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)

    def close(self) -> None:
        """Frees the disk space."""
        self.file.close()

    def read(self, sample: int, rows: slice, columns: slice) -> Tensor:
        """A part of a sample, (channels, rows, columns)."""
        values = torch.empty(self.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        for line in self._lines(sample, rows, columns, values):
            self.file.readinto(line)
        return values

    def write(self, sample: int, rows: slice, columns: slice, values: Tensor) -> None:
        """values: (channels, rows, columns)."""
        for line in self._lines(sample, rows, columns, values.cpu()):
            self.file.write(line.tobytes())

    def append_noise(self, seed: int) -> None:
        """Writes one more sample: the numbers of `initial_noise(seed, (channels, height, width))`.

        Drawing them in chunks gives the same numbers, since torch draws in blocks of 16 (a test checks it).
        """
        generator, left = torch.Generator("cpu").manual_seed(seed), math.prod(self.shape)
        while left:
            count = NOISE_CHUNK if left >= 2 * NOISE_CHUNK else left  # none shorter than a block
            self.file.write(torch.randn(count, generator=generator).numpy().tobytes())
            left -= count

    def _lines(self, sample: int, rows: slice, columns: slice, values: Tensor) -> Iterator[np.ndarray]:
        """The lines of `values`, each with the file at its place."""
        channels, height, width = self.shape
        for channel, part in enumerate(values.numpy(), sample * channels):
            for row, line in enumerate(part, rows.start):
                self.file.seek(4 * ((channel * height + row) * width + columns.start))
                yield line


# ----------------------------------------------------------------------------------------------------------
# Files


class Source:
    """An opened SAR image: in memory, or read by windows if it is a GeoTIFF. Raises ImageError naming the file.

    placed: it has a place on earth or a no-data value, so that results should be GeoTIFFs, too.
    notes, description: lines to print, about the file and about how its numbers are read.
    """

    def __init__(self, path: Path, reading: Reading = Reading()):  # noqa: B008 (a constant)
        self.path, self.dataset, self.raster, self.placed = path, None, None, False
        if needs_rasterio(path):
            self.dataset = file = open_geotiff(path)
            self.height, self.width = file.shape
            self.placed = bool(file.crs or file.gcps[0] or file.rpcs or not file.transform.is_identity)
            self.placed |= file.nodata is not None
        else:
            self.raster = read_picture(path)
            self.height, self.width = self.raster.valid.shape
        reduced = overview(self.dataset or self.raster)
        self.scale = sar_scale(reduced, reading)
        self.notes, self.description = reduced.notes, describe_sar(reduced, self.scale)

    def window(self, rows: slice, columns: slice) -> Raster:
        """A part of the image, in the file's own numbers."""
        if self.raster is None:
            return read_window(self.dataset, (rows, columns))
        return crop(self.raster, rows, columns)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """A part of the image as float32 (3, bottom - top, right - left) in [-1, 1]; no-data is -1."""
        return sar_image(self.window(slice(top, bottom), slice(left, right)), self.scale)

    def mask(self, rows: slice, columns: slice) -> np.ndarray:
        """Where a part of the image has data: bool (rows, columns)."""
        return sar_mask(self.window(rows, columns), self.scale)

    def close(self) -> None:
        """Closes the file."""
        if self.dataset is not None:
            self.dataset.close()


# Parts of results at (top, left): "eo" uint8 (rows, columns, 3); "confidence" and "spread" float32 (rows, columns)
Results = Iterable[tuple[int, int, dict[str, np.ndarray]]]


def write_pictures(source: Source, results: Results, paths: dict[str, Path], about: dict[str, str]) -> None:
    """Writes PNGs, transparent where there is no data; confidence from lowest to highest, spread in whole levels."""
    whole, valid = {}, np.empty((source.height, source.width), bool)
    for top, left, parts in results:
        place = slice(top, top + parts["eo"].shape[0]), slice(left, left + parts["eo"].shape[1])
        valid[place] = source.mask(*place)
        for kind, part in parts.items():
            if kind not in whole:
                whole[kind] = np.empty((*valid.shape, *part.shape[2:]), part.dtype)
            whole[kind][place] = part
    with ExitStack() as names:  # all get their names in the end, or none
        for kind, picture in whole.items():
            if kind == "confidence":
                picture[~valid] = picture[valid].min() if valid.any() else 0  # its range is that of valid pixels
                picture = confidence_picture(torch.from_numpy(picture)[None])
            elif kind == "spread":
                picture = picture.round().clip(0, 255).astype(np.uint8)
            if not valid.all():
                picture = np.dstack([picture, np.where(valid, 255, 0).astype(np.uint8)])
            write_png(names.enter_context(atomic(paths[kind])), picture, about)


def write_geotiffs(source: Source, results: Results, paths: dict[str, Path], about: dict[str, str]) -> None:
    """Writes GeoTIFFs with the place of the input, part by part.

    No-data: the EO image has an internal mask, since 0 is a colour. The others keep the input's no-data value, or have
    NaN if it has none or if a result could have that value.
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
        nodata["spread"] = given.nodata or np.nan  # the spread is 0 where samples agree
    number = {"dtype": "float32", "count": 1, "predictor": 3}
    colour = {"dtype": "uint8", "count": 3, "predictor": 2, "photometric": "RGB"}
    # bytes; enough for the blocks that two rows of tiles share, which would be compressed twice otherwise
    cache = max(2**25, 2**12 * source.width)
    with ExitStack() as names, rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, GDAL_CACHEMAX=cache):
        temporary = {kind: names.enter_context(atomic(path)) for kind, path in paths.items()}
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
                    valid = source.mask(*place)
                    for kind, part in parts.items():
                        if kind != "eo":
                            part = np.where(valid, part, np.float32(nodata[kind]))
                        files[kind].write(np.moveaxis(np.atleast_3d(part), 2, 0), window=place)
                    files["eo"].write_mask(np.where(valid, 255, 0).astype(np.uint8), window=place)
            for path in temporary.values():  # GDAL reports no error if the disk fills up when it closes a file
                with rasterio.open(path) as file:
                    for _, window in file.block_windows(1):
                        file.read(window=window)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise OSError(f"cannot write {str(paths['eo'])!r} and the others (is the disk full?): {error}") from error
