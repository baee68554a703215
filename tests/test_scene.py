"""Scenes: tiles that are denoised together leave no seams, memory does not grow with the scene, GeoTIFFs keep their
place."""

from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hostile import geotiff, names, noise, outcome, pixels, save

import images
import scene
from cdiffset import CDiffSET, initial_noise
from images import confidence_picture, read_sar

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore:Dataset has no geotransform")


@pytest.fixture(scope="module")
def model(trained):
    return CDiffSET.from_pretrained(trained)


def picture(height, width):
    """Something like a SAR image: (3, height, width) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    speckle = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    return ((x / 23).sin() * (y / 31).cos() * 0.5 + speckle - 0.5).clamp(-1, 1).expand(3, -1, -1)


def reader(sar):
    return lambda top, bottom, left, right: sar[:, top:bottom, left:right]


def translate(model, sar, tile, read=None, **options):
    """All parts of a scene, put together; each pixel must come once."""
    samples = len(options.get("seeds", [0]))
    eo, confidence = (torch.full((samples, n, *sar.shape[1:]), torch.nan) for n in (3, 1))
    for top, left, *parts in scene.translate_scene(model, read or reader(sar), *sar.shape[1:], tile, **options):
        for whole, part in zip((eo, confidence), parts):
            place = whole[:, :, top : top + part.shape[2], left : left + part.shape[3]]
            assert place.isnan().all() and place.shape == part.shape
            place.copy_(part)
    assert not eo.isnan().any() and not confidence.isnan().any()
    return eo, confidence


# ----------------------------------------------------------------------------------------------------------
# Tiles


@pytest.mark.parametrize("size", [1, 7, 16, 17, 20, 28, 29, 100, 333])
@pytest.mark.parametrize("scale", [1, 4])
def test_tiles_cover_an_axis_and_their_weights_sum_to_one_and_fade_towards_inner_ends(size, scale):
    starts, weights = scene.starts(size, 16), scene.tile_weights(size, 16, scale)
    assert starts[0] == 0 and starts[-1] == max(0, size - 16)
    assert all(0 < b - a <= 12 for a, b in zip(starts, starts[1:]))  # they overlap by a quarter or more
    total = torch.zeros(size * scale)
    for start, weight in zip(starts, weights):
        total[start * scale :][: len(weight)] += weight
    assert (total - 1).abs().max() < 1e-6
    if size != 17:  # where two tiles nearly coincide
        assert all(weight[0] < 0.04 for weight in weights[1:]) and all(weight[-1] < 0.04 for weight in weights[:-1])
    assert torch.cat([weight.diff().abs() for weight in weights] + [torch.zeros(1)]).max() < 0.45 / scale  # no jump


@pytest.mark.parametrize("scale", [1, 2])
def test_blending_tiles_of_a_plane_gives_the_plane(scale):
    plane = torch.randn(2, 3, 50 * scale, 37 * scale)

    def scaled(*axes):
        return [slice(axis.start * scale, axis.stop * scale) for axis in axes]

    def cut(tiles):
        assert len(tiles) <= 3
        return torch.stack([plane[(n, slice(None), *scaled(*place))] for n, *place in tiles])

    result = torch.full_like(plane, torch.nan)
    for rows, columns, values in scene.blend(50, 37, 16, cut, 2, scale, batch=3):
        place = (..., *scaled(rows, columns))
        assert result[place].isnan().all()
        result[place] = values
    assert torch.allclose(result, plane, atol=1e-6)


@pytest.mark.parametrize("height, width", [(61, 50), (64, 64), (8, 30), (9, 64), (33, 17)])
def test_a_scene_of_one_tile_is_translated_exactly_as_an_image(model, height, width):
    sar = picture(height, width)
    for actual, expected in zip(translate(model, sar, 64, steps=3, seeds=[5]), model.translate(sar[None], 3, 5)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("height, width", [(100, 83), (65, 20), (20, 65)])
def test_samples_and_batches_change_nothing_and_no_more_than_a_tile_is_read(model, tmp_path, height, width):
    sar, sizes, counted = picture(height, width), [], []

    def read(top, bottom, left, right):
        assert not list(tmp_path.iterdir())  # temporary files have no names
        sizes.append(max(bottom - top, right - left))
        return sar[:, top:bottom, left:right]

    options = {"steps": 2, "folder": tmp_path, "progress": counted.append}
    eo, confidence = translate(model, sar, 32, read, seeds=[3, 4], batch=5, **options)
    assert max(sizes) <= 32 and sum(counted) == scene.count_tiles(model, height, width, 32, 2, 2)
    assert eo.abs().max() <= 1 and confidence.min() > 0 and confidence.std() > 0
    assert (eo[0] - eo[1]).abs().mean() > 0.01
    for n, seed in enumerate([3, 4]):
        for together, alone in zip((eo, confidence), translate(model, sar, 32, steps=2, seeds=[seed])):
            assert torch.allclose(together[n : n + 1], alone, atol=1e-4)


def test_memory_does_not_grow_with_the_height_of_a_scene(model, monkeypatch):
    """The EO image alone has 200 MB here, the latents in the temporary files 17 MB each. The networks are left out."""
    monkeypatch.setattr(model, "encode", lambda image: F.avg_pool2d(image, 4).repeat(1, 2, 1, 1)[:, :4])
    monkeypatch.setattr(model, "decode", lambda latent: F.interpolate(latent, scale_factor=4.0)[:, :3])
    monkeypatch.setattr(model.unet, "forward", lambda x, t, context: x[:, :5])

    def main(height):
        window = torch.zeros(3, 128, 128)
        for _ in scene.translate_scene(model, lambda a, b, c, d: window[:, : b - a], height, 128, 128, 1):
            pass

    result = outcome(main, 2**17, memory=2**24)
    assert result.code == 0, result


def jumps(image, columns):
    """Mean difference of neighbouring pixels across these columns, relative to that across the others.

    Only multiples of 4, the VAE's factor, are looked at: borders of tiles are such.
    """
    difference = (image[..., 1:] - image[..., :-1]).abs().mean(dim=(0, 1, 2))[3::4]
    at = torch.zeros(len(difference), dtype=torch.bool)
    at[[column // 4 - 1 for column in columns]] = True
    return (difference[at].mean() / difference[~at].mean()).item()


def borders(size, tile):
    starts = [4 * start for start in scene.starts(size // 4, tile // 4)]
    return starts[1:] + [start + tile for start in starts[:-1]]


def test_tiles_that_disagree_leave_no_seams(model, monkeypatch):
    """Each call of the U-Net here denoises to the SAR image, but brighter or darker at random."""
    a, generator = model.scheduler.alphas_cumprod, torch.Generator().manual_seed(0)

    def unet(x, t, context):
        offset = 2 * torch.randn(len(x), 1, 1, 1, generator=generator)
        x0 = x[:, :4] + offset
        return torch.cat([(x[:, 4:] - a[t].sqrt() * x0) / (1 - a[t]).sqrt(), offset.expand_as(x[:, :1])], dim=1)

    monkeypatch.setattr(model.unet, "forward", unet)
    sar = picture(128, 512)
    singles = [model.translate(sar[None, :, :, left : left + 128], 4) for left in range(0, 512, 128)]
    for result, single in zip(translate(model, sar, 128, steps=4), zip(*singles)):
        assert jumps(torch.cat(single, dim=3), [128, 256, 384]) > 1.5  # side by side: seams
        assert jumps(result, borders(512, 128)) < 1.05


def test_no_seams_with_random_weights(model):
    for result in translate(model, picture(256, 256), 64, steps=4, batch=4):
        assert jumps(result, borders(256, 64)) < 1.1
        assert jumps(result.transpose(2, 3), borders(256, 64)) < 1.1


# ----------------------------------------------------------------------------------------------------------
# Numbers on disk


def test_numbers_come_back_as_they_were_written(tmp_path):
    values = torch.randn(2, 3, 20, 7)
    with closing(scene.OnDisk(tmp_path, 3, 20, 7)) as file:
        for n, top, columns in [(n, top, c) for n in (1, 0) for top in (12, 0, 5) for c in (slice(3, 7), slice(0, 3))]:
            rows = slice(top, top + 8)
            file.write(n, rows, columns, values[n, :, rows, columns])
        for n in (0, 1):
            for rows, columns in ((slice(0, 20), slice(0, 7)), (slice(4, 9), slice(0, 7)), (slice(7, 8), slice(2, 6))):
                assert torch.equal(file.read(n, rows, columns), values[n, :, rows, columns])


@pytest.mark.parametrize("height, width", [(33, 29), (64, 64), (43, 3)])
def test_noise_drawn_in_chunks_is_the_noise_of_translate(height, width, tmp_path, monkeypatch):
    monkeypatch.setattr(scene, "NOISE_CHUNK", 256)
    with closing(scene.OnDisk(tmp_path, 4, height, width)) as file:
        for seed in (7, 8):
            file.append_noise(seed)
        for sample, seed in enumerate((7, 8)):
            expected = initial_noise(seed, (4, height, width))[0]
            assert torch.equal(file.read(sample, slice(0, height), slice(0, width)), expected)


# ----------------------------------------------------------------------------------------------------------
# Files


def results(height, width):
    """A whole result: EO image, confidence and spread."""
    rng = np.random.default_rng(1)
    numbers = {kind: rng.random((height, width), np.float32) for kind in ("confidence", "spread")}
    return {"eo": rng.integers(0, 256, (height, width, 3), dtype=np.uint8)} | numbers


def in_parts(whole):
    """As translate_scene yields a result: in rectangles."""
    for top in range(0, len(whole["eo"]), 32):
        for columns in (slice(0, 25), slice(25, None)):
            yield top, columns.start, {kind: x[top : top + 32, columns].copy() for kind, x in whole.items()}


def test_a_geotiff_is_read_by_windows_like_a_whole_one(tmp_path):
    path = geotiff(tmp_path / "sar.tif", crs=None, transform=None, nodata=-9999)
    source, expected = scene.Source(path), read_sar(path)
    assert source.raster is None and source.placed and (source.height, source.width) == (90, 72)
    assert torch.equal(torch.cat([source.read(0, 40, 7, 72), source.read(40, 90, 7, 72)], dim=1), expected[:, :, 7:])
    valid = source.mask(slice(0, 20), slice(5, 70))
    assert not valid[:10, :10].any() and valid[10:].all() and valid[:, 10:].all()


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_the_range_of_a_large_image_is_taken_from_a_reduced_copy(tmp_path, monkeypatch, kind):
    path = geotiff(tmp_path / "sar.tif") if kind == "tif" else save(tmp_path / "sar.png", noise(90, 72))
    shapes, sar_scale = [], scene.sar_scale
    monkeypatch.setattr(images, "OVERVIEW", 30)
    monkeypatch.setattr(
        scene, "sar_scale", lambda raster, *a: shapes.append(raster.valid.shape) or sar_scale(raster, *a)
    )
    scene.Source(path)
    assert shapes == [(30, 24)]


@pytest.mark.parametrize("nodata, kept", [(-9999.0, (-9999.0, -9999.0)), (0.0, (0.0, np.nan)), (None, (np.nan, np.nan)),
                                          (1.0, (np.nan, np.nan)), (-1.7e308, (np.nan, np.nan))])  # fmt: skip
def test_geotiffs_keep_place_and_nodata(tmp_path, nodata, kept):
    rasterio = pytest.importorskip("rasterio")
    bands = np.random.default_rng(0).normal(-12, 4, (2, 90, 70))
    bands[:, :10, :15] = np.nan if nodata is None else nodata
    bands = bands if nodata == -1.7e308 else bands.astype(np.float32)
    source, whole = scene.Source(geotiff(tmp_path / "sar.tif", bands, nodata=nodata)), results(90, 70)
    paths = {kind: tmp_path / f"{kind}.tif" for kind in whole}
    scene.write_geotiffs(source, in_parts(whole), paths, {"steps": "3"})
    valid = np.ones((90, 70), bool)
    valid[:10, :15] = False
    for kind, path in paths.items():
        with rasterio.open(path) as file:
            assert file.crs == source.dataset.crs and file.transform == source.dataset.transform
            assert file.profile["tiled"] and file.profile["compress"] == "deflate" and file.tags()["steps"] == "3"
            assert np.array_equal(file.dataset_mask() > 0, valid)
            expected = np.moveaxis(np.atleast_3d(whole[kind]), 2, 0)
            assert file.read().dtype == expected.dtype and np.array_equal(file.read()[:, valid], expected[:, valid])
            if kind != "eo":
                assert np.array_equal(file.nodata, kept[kind == "spread"], equal_nan=True)
    assert names(tmp_path) == {"sar.tif", "eo.tif", "confidence.tif", "spread.tif"}


def test_ground_control_points_and_rational_polynomials_are_kept(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path, whole = geotiff(tmp_path / "sar.tif", crs=None, transform=None), results(90, 72)
    corners = [rasterio.control.GroundControlPoint(row, col, 30 + col / 100, 10 - row / 100)
               for row, col in ((0, 0), (0, 72), (90, 0), (90, 72))]  # fmt: skip
    one = [1.0] + [0.0] * 19
    with rasterio.open(path, "r+") as file:
        file.gcps = corners, rasterio.crs.CRS.from_epsg(4326)
        file.rpcs = rasterio.rpc.RPC(5, 6, 10, 1, one, one, 45, 45, 30, 1, one, one, 36, 36)
    source = scene.Source(path)
    assert source.placed
    scene.write_geotiffs(source, in_parts(whole), {kind: tmp_path / f"{kind}.tif" for kind in whole}, {})
    for kind in whole:
        with rasterio.open(tmp_path / f"{kind}.tif") as file:
            found, crs = file.gcps
            assert crs.to_epsg() == 4326 and file.rpcs == source.dataset.rpcs is not None
            assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in corners]


def test_pictures_are_transparent_where_there_is_no_data(tmp_path):
    sar, whole = np.full((40, 30, 2), 200, np.uint8), results(40, 30)
    sar[:10, :, 1] = 0
    save(tmp_path / "holes.png", sar), save(tmp_path / "whole.png", sar[:, :, 0])
    whole["confidence"][:10] = 50  # outside the range of the rest
    for name, channels in (("holes", {"eo": 4, "confidence": 2, "spread": 2}), ("whole", {"eo": 3, "confidence": 1})):
        paths = {kind: tmp_path / f"{name}_{kind}.png" for kind in channels}
        parts = in_parts({kind: whole[kind] for kind in channels})
        scene.write_pictures(scene.Source(tmp_path / f"{name}.png"), parts, paths, {})
        found = {kind: np.atleast_3d(pixels(path)) for kind, path in paths.items()}
        assert {kind: picture.shape[2] for kind, picture in found.items()} == channels
        assert np.array_equal(found["eo"][10:, :, :3], whole["eo"][10:])
        if name == "holes":
            for picture in found.values():
                assert (picture[:10, :, -1] == 0).all() and (picture[10:, :, -1] == 255).all()
            expected = confidence_picture(torch.from_numpy(whole["confidence"][None, 10:]))
            assert np.array_equal(found["confidence"][10:, :, 0], expected)
            assert np.array_equal(found["spread"][10:, :, 0], whole["spread"][10:].round())
