"""images.py: what numbers become, every pixel format, every way a file can be wrong, pictures."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_images import bad_jpegs, bad_pngs, bad_tiffs, encoded
from hostile import png
from image_files import RNG, geotiff, noise, picture
from PIL import Image

import images

SENTINEL1 = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "sentinel1"

# ----------------------------------------------------------------------------------------------------------
# Pixels


def test_8_bit_is_divided_by_127_5(tmp_path):
    ramp = np.arange(256, dtype="uint8").reshape(16, 16)
    for name in ("a.png", "a.tif"):
        path = picture(tmp_path / name, ramp)
        for image in (images.read_sar(path), images.read_eo(path)):
            assert image.shape == (3, 16, 16) and image.dtype == torch.float32
            assert torch.equal(image[1], torch.from_numpy(ramp).float() / 127.5 - 1)


def test_16_bit_maps_its_full_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype("uint16").reshape(16, 16)
    paths = [picture(tmp_path / "a.png", ramp), picture(tmp_path / "a.tif", ramp)]
    for path in [*paths, geotiff(tmp_path / "geo.tif", ramp[None])]:
        for image in (images.read_sar(path), images.read_eo(path)):
            assert torch.allclose(image[2], torch.from_numpy(ramp.astype("float32")) / 32767.5 - 1, atol=1e-6)
            assert image.min() == -1 and image.max() == 1


def test_16_bit_rgb_tiff_keeps_its_low_bits(tmp_path):
    rgb = noise(3, 16, 16, dtype="uint16", high=200)  # high bytes are all 0
    image = images.read_eo(geotiff(tmp_path / "a.tif", rgb, crs=None, transform=None))
    assert torch.allclose(image, torch.from_numpy(rgb.astype("float32")) / 32767.5 - 1, atol=1e-6)


def test_one_channel_is_repeated_and_rgb_kept(tmp_path):
    rgb = noise(16, 16, 3)
    assert np.array_equal(images.to_uint8(images.read_sar(picture(tmp_path / "rgb.png", rgb))), rgb)
    grey = images.read_sar(picture(tmp_path / "grey.png", rgb[..., 0]))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_black_and_white_and_palettes_become_their_colours(tmp_path):
    white = np.zeros((16, 16), bool)
    white[:8] = True
    image = images.read_sar(picture(tmp_path / "bw.png", white))
    assert image[:, :8].unique() == 1 and image[:, 8:].unique() == -1
    colours = Image.fromarray(np.repeat(np.uint8([[[255, 0, 0], [0, 255, 0]]]), 16, 0).repeat(8, 1))
    for name in ("p.png", "p.tif"):
        colours.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / name)
        assert np.array_equal(images.to_uint8(images.read_eo(tmp_path / name)), np.asarray(colours))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_pixels_are_no_data_and_alpha_no_colour(tmp_path, channels):
    pixels = noise(16, 16, channels, high=255) + 1
    pixels[:4, :, -1] = 0
    raster = images.read_raster(picture(tmp_path / "a.png", pixels.astype("uint8")))
    assert len(raster.bands) == channels - 1
    assert not raster.valid[:4].any() and raster.valid[4:].all()
    image = images.sar_image(raster, images.sar_range(raster))
    assert (image[:, :4] == -1).all() and (image[:, 4:] > -1).all()


def test_a_stretch_is_by_percentiles_of_each_band_and_only_on_request(tmp_path):
    path = picture(tmp_path / "dark.png", np.arange(256, dtype="uint16").reshape(16, 16) + 100)
    assert images.read_sar(path).max() < -0.98
    image = images.read_sar(path, stretch=(0, 100))
    assert image.min() == -1 and image.max() == 1


def test_decibels_have_a_fixed_range_for_each_polarisation(tmp_path):
    db = np.full((2, 16, 16), -12.5, "float32")
    db[1] = -16.25
    db[:, 0, 0], db[:, 0, 1] = -99, 9
    image = images.read_sar(geotiff(tmp_path / "a.tif", db))
    assert image[:, 0, 0].eq(-1).all() and image[:, 0, 1].eq(1).all() and image[:, 1:].eq(0).all()


def test_two_polarisations_become_co_cross_and_their_mean(tmp_path):
    image = images.read_sar(geotiff(tmp_path / "a.tif", noise(2, 16, 16)))
    assert torch.allclose(image[2], (image[0] + image[1]) / 2) and not torch.equal(image[0], image[1])


def test_float_data_are_decibels_if_anything_is_negative_unless_told(tmp_path):
    linear = RNG.gamma(1, 0.1, (2, 16, 16)).astype("float32")
    db = 10 * np.log10(linear)
    linear_path, db_path = geotiff(tmp_path / "linear.tif", linear), geotiff(tmp_path / "db.tif", db)
    rasters = [images.read_raster(path) for path in (linear_path, db_path)]
    assert np.array_equal(images.sar_range(rasters[0]), np.percentile(linear, (1, 99), axis=(1, 2)))
    assert np.array_equal(images.sar_range(rasters[1]), [[-25, -32.5], [0, 0]])
    assert np.array_equal(images.sar_range(rasters[0], "db"), [[-25, -32.5], [0, 0]])
    assert np.array_equal(images.sar_range(rasters[1], "linear"), np.percentile(db, (1, 99), axis=(1, 2)))


@pytest.mark.parametrize("value", [0, 0.5, 60000])
def test_constant_intensity_is_dark_not_nan(tmp_path, value):
    image = images.read_sar(geotiff(tmp_path / "a.tif", np.full((1, 16, 16), value, "float32")))
    assert image.eq(-1).all()


def test_no_data_is_dark_masked_and_left_out_of_the_range(tmp_path):
    bands = RNG.uniform(1, 2, (2, 16, 16)).astype("float32")
    clean = images.sar_range(images.read_raster(geotiff(tmp_path / "clean.tif", bands[:, 4:])))
    bands[0, :2], bands[1, 2:4] = -9999, np.nan  # in one band each
    raster = images.read_raster(geotiff(tmp_path / "a.tif", bands, nodata=-9999))
    assert not raster.valid[:4].any() and raster.valid[4:].all()
    assert np.array_equal(images.sar_range(raster), clean)
    assert images.sar_image(raster, clean)[:, :4].eq(-1).all()


def test_zero_in_one_colour_is_no_missing_pixel(tmp_path):
    rgb = np.full((3, 16, 16), 9, "uint8")
    rgb[0, 0], rgb[:, 1] = 0, 0
    raster = images.read_raster(geotiff(tmp_path / "a.tif", rgb, nodata=0))
    assert raster.valid[0].all() and not raster.valid[1].any()


def test_a_window_is_part_of_the_whole(tmp_path):
    path = geotiff(tmp_path / "a.tif", RNG.uniform(-20, 0, (2, 40, 50)).astype("float32"), nodata=-1)
    with images.open_geotiff(path) as dataset:
        part = images.read_window(dataset, (slice(9, 19), slice(7, 27)))
        small = images.read_window(dataset, shape=(4, 5))
    assert small.bands.shape == (2, 4, 5) and small.valid.shape == (4, 5)
    whole = images.read_raster(path)
    limits = images.sar_range(whole)
    assert torch.equal(images.sar_image(part, limits), images.sar_image(whole, limits)[:, 9:19, 7:27])


@pytest.mark.skipif(not SENTINEL1.is_dir(), reason="the real Sentinel-1 tiles are not here")
def test_real_sentinel1_tiles_use_the_range_without_clipping():
    pytest.importorskip("rasterio")
    for path in sorted(SENTINEL1.glob("*.tif")):
        image = images.read_sar(path)
        assert image.shape == (3, 256, 256)
        assert image.abs().eq(1).float().mean() < 0.01 and 0.1 < image.std() < 0.5 and abs(image.mean()) < 0.2


# ----------------------------------------------------------------------------------------------------------
# Files that cannot be used


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "error::PIL.Image.DecompressionBombWarning")  # as images.py
@pytest.mark.parametrize("read", [images.read_sar, images.read_eo])
@pytest.mark.parametrize("kind", [bad_pngs, bad_jpegs, bad_tiffs])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, kind, read, capfd):
    path = tmp_path / "näme with 'quotes'\nand a newline.png"
    bad = {name: content for name, content in kind().items() if not name.startswith("maybe_")}
    bad.pop("long-chunk.png", None)  # refused where memory is limited, as in test_hostile_images.py
    bad["small.png"] = encoded(noise(7, 4097), "PNG")
    bad["small bomb.png"] = png(8192, 8192)
    for content in bad.values():
        path.write_bytes(content)
        with pytest.raises(images.ImageError) as caught:
            read(path)
        assert repr(str(path)) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


BAD_GEOTIFFS = {
    "complex": (np.zeros((1, 16, 16), "complex64"), {}, "complex"),
    "five bands": (np.zeros((5, 16, 16), "float32"), {}, "5 bands"),
    "signed integers": (np.zeros((1, 16, 16), "int16"), {}, "int16"),
    "all no-data": (np.full((1, 16, 16), np.nan, "float32"), {}, "no valid pixel"),
    "palette": (np.zeros((1, 16, 16), "uint8"), {"photometric": "palette"}, "palette"),
    "one bit": (np.zeros((1, 16, 16), "uint8"), {"nbits": 1}, "palette"),
    "twelve bits": (np.zeros((1, 16, 16), "uint16"), {"nbits": 12}, "neither 8 nor 16 bits"),
    "small": (np.zeros((1, 4, 16), "uint8"), {}, "16x4"),
}


@pytest.mark.parametrize("case", BAD_GEOTIFFS)
def test_a_geotiff_that_is_no_sar_image_is_refused(tmp_path, case):
    bands, profile, message = BAD_GEOTIFFS[case]
    path = geotiff(tmp_path / "bad.tif", bands, **profile)
    with pytest.raises(images.ImageError, match=message) as caught:
        images.read_sar(path)
    assert "bad.tif" in str(caught.value)


def test_a_truncated_geotiff_and_a_lying_header_are_named(tmp_path, capfd):
    path = geotiff(tmp_path / "a.tif", noise(2, 64, 64).astype("float32"), compress="deflate")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(images.ImageError, match=r"a\.tif"):
        images.read_sar(path)
    profile = {
        "sparse_ok": True,
        "width": 2**17,
        "height": 2**17,
        "count": 1,
        "dtype": "float32",
        "tiled": True,
    }
    rasterio = pytest.importorskip("rasterio")
    rasterio.open(tmp_path / "huge.tif", "w", driver="GTiff", crs="EPSG:32631", **profile).close()
    with pytest.raises(images.ImageError, match=r"huge\.tif.*131072x131072"):
        images.read_sar(tmp_path / "huge.tif")
    assert capfd.readouterr().err == ""


def test_a_tiff_of_several_pictures_is_refused_however_it_is_compressed(tmp_path):
    pytest.importorskip("rasterio")
    pages = [Image.fromarray(noise(16, 16)) for _ in range(3)]
    for compression in (None, "tiff_lzw"):
        pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=compression)
        with pytest.raises(images.ImageError, match=r"a\.tif.* pictures: save the right one"):
            images.read_sar(tmp_path / "a.tif")


def test_a_few_negative_intensities_make_no_decibels(tmp_path):
    linear = RNG.gamma(1, 0.1, (1, 16, 16)).astype("float32")
    linear[0, 3, 3] = -1e-6  # as resampling leaves them
    raster = images.read_raster(geotiff(tmp_path / "a.tif", linear))
    assert images.sar_range(raster)[1] < 1


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", tmp_path / "missing.png"):
        with pytest.raises(images.ImageError, match=path.name):
            images.read_sar(path)


def test_premultiplied_alpha_of_a_grey_tiff_says_where_there_is_data(tmp_path):
    pixels = np.full((16, 16, 2), 200, np.uint8)
    pixels[0, :, 1] = 0
    Image.fromarray(pixels, "LA").save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    plain, premultiplied = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))  # the tag ExtraSamples
    assert data.count(plain) == 1
    (tmp_path / "a.tif").write_bytes(data.replace(plain, premultiplied))
    raster = images.read_raster(tmp_path / "a.tif")
    assert raster.bands.shape == (1, 16, 16) and not raster.valid[0].any() and raster.valid[1:].all()


def test_a_sheet_has_room_for_the_largest_picture():
    small, large = (np.full((side, side + 4), 7, np.uint8) for side in (8, 20))
    sheet = images.grid([[small, large], [large, small]])
    assert sheet.shape == (4 + 2 * 24, 4 + 2 * 28, 3) and (sheet == 7).all(-1).sum() == 2 * (small.size + large.size)


@pytest.mark.parametrize("make", [picture, lambda path: geotiff(path, np.zeros((2, 16, 16), "float32"))])
def test_a_file_that_is_removed_while_it_is_opened_is_missing(tmp_path, make):
    path = make(tmp_path / "a.tif")
    plain = not images.needs_rasterio(path)
    path.unlink()
    with pytest.raises(images.ImageError, match=r"a\.tif' is missing"):
        images.read_picture(path) if plain else images.open_geotiff(path)


def test_a_geotiff_without_rasterio_says_what_to_install(tmp_path, monkeypatch):
    path = geotiff(tmp_path / "a.tif", np.zeros((2, 16, 16), "float32"))
    plain = picture(tmp_path / "plain.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(images.ImageError, match=r"a\.tif.*pip install rasterio"):
        images.read_sar(path)
    images.read_sar(plain)  # needs none


@pytest.mark.parametrize("options", [{"scale": "dB"}, {"stretch": (99, 1)}, {"stretch": (-1, 50)}])
def test_wrong_options_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must be"):
        images.read_sar(picture(tmp_path / "a.png"), **options)


def test_eo_must_be_colours(tmp_path):
    for bands in (np.zeros((2, 16, 16), "uint8"), np.zeros((3, 16, 16), "float32")):
        with pytest.raises(images.ImageError, match=r"a\.tif.* band"):
            images.read_eo(geotiff(tmp_path / "a.tif", bands))


# ----------------------------------------------------------------------------------------------------------
# Writing


def test_every_grey_value_survives_reading_and_writing(tmp_path):
    ramp = np.arange(256, dtype="uint8").reshape(16, 16)
    images.save_image(tmp_path / "a.png", images.read_sar(picture(tmp_path / "in.png", ramp)), {"seed": "7"})
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image)[..., 1], ramp) and image.text["seed"] == "7"


def test_values_beyond_the_range_are_clamped():
    image = torch.tensor([-9.0, -1, 0, 1, 9]).repeat(3, 1, 1)
    assert images.to_uint8(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = picture(tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        images.save_image(path, np.zeros((4, 4, 7), "uint8"))
    with pytest.raises(OSError):
        images.save_image(tmp_path / "nowhere" / "b.png", noise(8, 8))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]
