"""Scenes: tiles that are denoised together leave no seams, and memory does not grow with the scene."""

import resource
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

import scene
import scene_files
from cdiffset import CDiffSET, add_variance_channel, initial_noise, widen_input
from experiments.pretrain import CONTEXT, TOKENS, small_unet, small_vae
from images import ImageError, read_sar
from scheduler import DDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore:Dataset has no geotransform")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    unet = small_unet([8, 16])
    model = CDiffSET(small_vae([8, 16, 16]), unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler())
    widen_input(unet)
    add_variance_channel(unet)
    for parameter in unet.parameters():  # the layers that begin at zero, too
        scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, std=scale)
    return model.eval()


def picture(height, width, seed=0):
    """Something like a SAR image: (3, height, width) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    speckle = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    return ((x / 23).sin() * (y / 31).cos() * 0.5 + speckle - 0.5).clamp(-1, 1).expand(3, -1, -1)


def reader(sar):
    return lambda top, bottom, left, right: sar[:, top:bottom, left:right]


def translate(model, sar, tile, **options):
    """All parts of a scene, put together."""
    samples = len(options.get("seeds", [0]))
    eo, confidence = (torch.full((samples, n, *sar.shape[1:]), torch.nan) for n in (3, 1))
    for top, left, *parts in scene.translate_scene(model, reader(sar), *sar.shape[1:], tile, **options):
        for whole, part in zip((eo, confidence), parts):
            place = whole[:, :, top : top + part.shape[2], left : left + part.shape[3]]
            assert place.isnan().all() and place.shape == part.shape
            place.copy_(part)
    assert not eo.isnan().any() and not confidence.isnan().any()
    return eo, confidence


# ----------------------------------------------------------------------------------------------------------
# Tiles


@pytest.mark.parametrize("size", [1, 7, 16, 17, 20, 28, 29, 100, 333])
def test_tiles_cover_the_axis_and_overlap_by_a_quarter_or_more(size):
    starts = scene.starts(size, 16)
    assert starts[0] == 0 and starts[-1] == max(0, size - 16)
    assert all(0 < b - a <= 12 for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("size", [7, 16, 20, 100, 333])
@pytest.mark.parametrize("scale", [1, 4])
def test_weights_sum_to_one_everywhere_and_vanish_towards_inner_borders(size, scale):
    total, starts, weights = torch.zeros(size * scale), scene.starts(size, 16), scene.tile_weights(size, 16, scale)
    for start, weight in zip(starts, weights):
        total[start * scale :][: len(weight)] += weight
    assert (total - 1).abs().max() < 1e-6
    assert all(weight[0] < 0.04 for weight in weights[1:]) and all(weight[-1] < 0.04 for weight in weights[:-1])
    steps = torch.cat([weight.diff().abs() for weight in weights])
    assert steps.max() < 0.45 / scale  # no jump: it takes several pixels from 0 to 1


@pytest.mark.parametrize("scale", [1, 2])
def test_blending_tiles_of_a_plane_gives_the_plane(scale):
    plane = torch.randn(2, 3, 50 * scale, 37 * scale)

    def cut(jobs):
        assert len(jobs) <= 3
        places = [(n, *(slice(axis.start * scale, axis.stop * scale) for axis in place)) for n, *place in jobs]
        return torch.stack([plane[n, :, rows, columns] for n, rows, columns in places])

    result = torch.full_like(plane, torch.nan)
    for rows, columns, values in scene.blend(50, 37, 16, cut, 2, scale, batch=3):
        place = [slice(axis.start * scale, axis.stop * scale) for axis in (rows, columns)]
        assert result[:, :, place[0], place[1]].isnan().all()
        result[:, :, place[0], place[1]] = values
    assert torch.allclose(result, plane, atol=1e-6)


@pytest.mark.parametrize("height, width", [(61, 50), (64, 64), (8, 30), (9, 64), (33, 17)])
def test_a_scene_of_one_tile_is_translated_exactly_as_an_image(model, height, width):
    sar = picture(height, width)
    for actual, expected in zip(translate(model, sar, 64, steps=3, seeds=[5]), model.translate(sar[None], 3, 5)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("height, width", [(100, 83), (65, 20), (20, 65)])
def test_every_pixel_comes_once_and_every_tile_is_counted(model, height, width):
    count = []
    eo, confidence = translate(model, picture(height, width), 32, steps=2, progress=count.append, batch=3)
    assert eo.shape == (1, 3, height, width) and confidence.shape == (1, 1, height, width)
    assert eo.abs().max() <= 1 and confidence.isfinite().all() and confidence.std() > 0
    assert sum(count) == scene.count_tiles(model, height, width, 32, 2, 1)


def test_samples_and_batches_change_nothing(model):
    sar = picture(70, 50)
    together = translate(model, sar, 32, steps=2, seeds=[3, 4], batch=5)
    for n, seed in enumerate([3, 4]):
        for actual, expected in zip(together, translate(model, sar, 32, steps=2, seeds=[seed])):
            assert torch.allclose(actual[n : n + 1], expected, atol=1e-4)
    assert (together[0][0] - together[0][1]).abs().mean() > 0.01


def test_a_model_without_variance_gives_no_confidence(model):
    unet = small_unet([8, 16])
    stage1 = CDiffSET(model.vae, unet, model.prompt_embedding, DDPMScheduler())
    widen_input(unet)
    sar = picture(40, 40)
    assert all(c is None for *_, c in scene.translate_scene(stage1, reader(sar), 40, 40, 16, 1))


def test_no_more_than_a_tile_is_read_and_nothing_is_left_on_disk(model, tmp_path):
    sar, windows = picture(120, 50), []

    def read(top, bottom, left, right):
        windows.append((bottom - top, right - left))
        return sar[:, top:bottom, left:right]

    with closing(scene.translate_scene(model, read, 120, 50, 32, 1, folder=tmp_path)) as parts:
        next(parts)
        assert not list(tmp_path.iterdir())  # not even while it works
    assert len(windows) == 10 and max(max(window) for window in windows) <= 32


@pytest.mark.parametrize("tile", [8, 20, 0])
def test_tiles_that_do_not_suit_the_model_are_refused(model, tile):
    with pytest.raises(ValueError, match="multiples of 8"):
        next(scene.translate_scene(model, reader(picture(40, 40)), 40, 40, tile))


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
    for result in translate(model, picture(256, 256), 64, steps=4):
        assert jumps(result, borders(256, 64)) < 1.1
        assert jumps(result.transpose(2, 3), borders(256, 64)) < 1.1


# ----------------------------------------------------------------------------------------------------------
# Numbers on disk


def test_numbers_come_back_as_they_were_written(tmp_path):
    values = torch.randn(2, 3, 20, 7)
    with closing(scene.OnDisk(tmp_path, 3, 20, 7)) as file:
        for n in (1, 0):
            for top in (12, 0, 5):
                for columns in (slice(3, 7), slice(0, 3)):
                    rows = slice(top, top + 8)
                    file.write(n, rows, columns, values[n, :, rows, columns])
        for n in (0, 1):
            for rows, columns in ((slice(0, 20), slice(0, 7)), (slice(4, 9), slice(0, 7)), (slice(7, 8), slice(2, 6))):
                assert torch.equal(file.read(n, rows, columns), values[n, :, rows, columns])


@pytest.mark.parametrize("height, width", [(33, 29), (64, 64), (61, 3)])
def test_noise_drawn_in_chunks_is_the_noise_of_the_contract(height, width, tmp_path, monkeypatch):
    monkeypatch.setattr(scene, "NOISE_CHUNK", 256)
    with closing(scene.OnDisk(tmp_path, 4, height, width)) as noise:
        for seed in (7, 8):
            noise.append_noise(seed)
        for sample, seed in enumerate((7, 8)):
            expected = initial_noise(seed, (4, height, width))[0]
            assert torch.equal(noise.read(sample, slice(0, height), slice(0, width)), expected)


# ----------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def geotiff(tmp_path):
    rasterio = pytest.importorskip("rasterio")

    def write(name="sar.tif", height=90, width=70, nodata=-9999.0, **options):
        rng = np.random.default_rng(0)
        values = rng.normal(-12, 4, (2, height, width)).astype(np.float32)
        values[:, :10, :15] = np.nan if nodata is None else nodata
        profile = {"crs": "EPSG:32737", "transform": rasterio.transform.from_origin(500000, 9e6, 10, 10)} | options
        with rasterio.open(
            tmp_path / name, "w", "GTiff", width, height, 2, dtype="float32", nodata=nodata, **profile
        ) as file:
            file.write(values)
        return tmp_path / name

    return write


def test_a_large_geotiff_is_read_by_windows_as_a_whole_one(geotiff, monkeypatch):
    path = geotiff()
    expected = read_sar(path)
    monkeypatch.setattr(scene_files, "OVERVIEW", 30)
    source = scene_files.Source(path)
    assert source.raster is None and source.placed and (source.height, source.width) == (90, 70)
    assert torch.equal(torch.cat([source.read(0, 40, 7, 70), source.read(40, 90, 7, 70)], dim=1), expected[:, :, 7:])
    assert source.overview(30).bands.shape == (2, 30, 23)
    assert not source.window(slice(0, 20), slice(0, 70)).valid[:10, :15].any()
    source.close()


def test_a_picture_is_no_geotiff(tmp_path):
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "a.png")
    source = scene_files.Source(tmp_path / "a.png")
    assert not source.placed and source.overview(10).bands.shape == (1, 7, 10)


def test_compressed_tiffs_without_a_place_become_pictures(geotiff):
    path = geotiff(nodata=None, crs=None, transform=None, compress="deflate")
    assert not scene_files.Source(path).placed


@pytest.mark.parametrize(
    "options, message",
    [({"height": 5}, "at least 8"), ({"height": 60000, "width": 60000, "SPARSE_OK": True, "empty": True}, "a trap")],
)
def test_geotiffs_of_impossible_size_are_refused(geotiff, tmp_path, options, message):
    rasterio = pytest.importorskip("rasterio")
    if options.pop("empty", False):
        path = tmp_path / "empty.tif"
        profile = {"crs": "EPSG:4326", "count": 1, "dtype": "uint8", "tiled": True}
        rasterio.open(path, "w", "GTiff", **options, **profile).close()
    else:
        path = geotiff(height=12, width=5)
    with pytest.raises(ImageError, match=message):
        scene_files.Source(path)


def results(height, width):
    rng = np.random.default_rng(1)
    eo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    numbers = {kind: rng.random((height, width), np.float32) for kind in ("confidence", "spread")}
    return {"eo": eo} | numbers


def in_windows(parts, rows=32):
    for top in range(0, len(parts["eo"]), rows):
        for left in (0, 25):
            yield (
                top,
                left,
                {kind: part[top : top + rows, left : left + rows * 2 if left else 25] for kind, part in parts.items()},
            )


@pytest.mark.parametrize("nodata, kept", [(-9999.0, (-9999.0, -9999.0)), (0.0, (0.0, np.nan)), (None, (np.nan, np.nan)),
                                          (1.0, (np.nan, np.nan)), (-1.7e308, (np.nan, np.nan))])  # fmt: skip
def test_geotiffs_keep_place_and_nodata(geotiff, tmp_path, nodata, kept):
    rasterio = pytest.importorskip("rasterio")
    path, parts = geotiff(nodata=None), results(90, 70)
    with rasterio.open(path, "r+") as file:
        if nodata is not None and abs(nodata) < 3e38:
            file.nodata = nodata
            file.write(np.where(np.isnan(file.read()), np.float32(nodata), file.read()))
    source = scene_files.Source(path)
    paths = {kind: tmp_path / f"{kind}.tif" for kind in parts}
    scene_files.write_geotiffs(source, in_windows(parts), paths, {"steps": "3"})
    valid = np.ones((90, 70), bool)
    valid[:10, :15] = False
    for kind, path in paths.items():
        with rasterio.open(path) as file:
            assert file.crs == source.dataset.crs and file.transform == source.dataset.transform
            assert file.profile["tiled"] and file.profile["compress"] == "deflate" and file.tags()["steps"] == "3"
            assert np.array_equal(file.dataset_mask() > 0, valid)
            expected = np.moveaxis(parts[kind], 2, 0) if kind == "eo" else parts[kind][None]
            assert file.read().dtype == parts[kind].dtype and np.array_equal(file.read()[:, valid], expected[:, valid])
            if kind != "eo":
                assert np.array_equal(file.nodata, kept[kind == "spread"], equal_nan=True)
    assert {path.name for path in tmp_path.iterdir()} == {"sar.tif", "eo.tif", "confidence.tif", "spread.tif"}


@pytest.mark.parametrize("limit", [1000, 10_000, 18_000])
def test_a_disk_that_fills_when_a_geotiff_is_closed_is_noticed(geotiff, tmp_path, limit):
    pytest.importorskip("rasterio")
    source, before = scene_files.Source(geotiff()), resource.getrlimit(resource.RLIMIT_FSIZE)
    paths = {kind: tmp_path / f"{kind}.tif" for kind in ("eo", "confidence")}
    parts = {kind: part for kind, part in results(90, 70).items() if kind in paths}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="is the disk full"):
            scene_files.write_geotiffs(source, in_windows(parts), paths, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"sar.tif"}


def test_ground_control_points_are_kept(geotiff, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path, parts = geotiff(crs=None, transform=None), {"eo": results(90, 70)["eo"]}
    points = [rasterio.control.GroundControlPoint(row, col, 30 + col / 100, 10 - row / 100)
              for row, col in ((0, 0), (0, 70), (90, 0), (90, 70))]  # fmt: skip
    with rasterio.open(path, "r+") as file:
        file.gcps = points, rasterio.crs.CRS.from_epsg(4326)
    scene_files.write_geotiffs(scene_files.Source(path), in_windows(parts), {"eo": tmp_path / "eo.tif"}, {})
    with rasterio.open(tmp_path / "eo.tif") as file:
        found, crs = file.gcps
        assert crs.to_epsg() == 4326 and [(p.row, p.col, p.x, p.y) for p in found] == [
            (p.row, p.col, p.x, p.y) for p in points
        ]


def test_pictures_are_transparent_only_where_there_is_no_data(tmp_path):
    sar = np.full((40, 30, 2), 200, np.uint8)
    sar[:10, :, 1] = 0
    Image.fromarray(sar).save(tmp_path / "holes.png")
    Image.fromarray(sar[:, :, 0]).save(tmp_path / "whole.png")
    parts = results(40, 30)
    parts["confidence"][:10] = 50  # outside the range of the rest
    for name, modes in (("holes", {"eo": "RGBA", "confidence": "LA"}), ("whole", {"eo": "RGB", "confidence": "L"})):
        paths = {kind: tmp_path / f"{name}_{kind}.png" for kind in modes}
        kept = {kind: parts[kind].copy() for kind in modes}
        scene_files.write_pictures(scene_files.Source(tmp_path / f"{name}.png"), in_windows(kept), paths, {})
        for kind, mode in modes.items():
            with Image.open(paths[kind]) as image:
                assert image.mode == mode
                pixels = np.asarray(image)
            if name == "holes":
                assert (pixels[:10, :, -1] == 0).all() and (pixels[10:, :, -1] == 255).all()
            if kind == "eo":
                assert np.array_equal(pixels[10:, :, :3], parts["eo"][10:])
            elif name == "holes":
                assert pixels[10:, :, 0].max() == 255 and pixels[10:, :, 0].min() == 0
