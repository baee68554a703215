"""rasters.py and images.py: what a file holds, what its numbers become, files that cannot be used, pictures."""

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
import rasters
from images import Reading, read_eo, read_sar

SENTINEL1 = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "sentinel1"
LINEAR = RNG.gamma(4, 0.02, (2, 32, 32)).astype("float32") + 1e-3  # intensities as calibrated SAR images have them
DB = 10 * np.log10(LINEAR)
CONSTANT = np.ones((32, 32))


def scale_of(path, reading=images.AUTO):
    """How a file is read: its raster and its SarScale."""
    raster = images.read_raster(path)
    return raster, images.sar_scale(raster, reading)


# ----------------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("high", [255, 65535])
def test_integers_map_their_full_range(tmp_path, high):
    ramp = np.linspace(0, high, 256).astype("uint8" if high == 255 else "uint16").reshape(16, 16)
    paths = [picture(tmp_path / "a.png", ramp), picture(tmp_path / "a.tif", ramp)]
    for path in [*paths, geotiff(tmp_path / "geo.tif", ramp[None])]:
        for image in (read_sar(path), read_eo(path)):
            assert image.shape == (3, 16, 16) and image.dtype == torch.float32
            assert torch.equal(image[1], torch.from_numpy(ramp.astype("float32")) / (high / 2) - 1)


def test_the_byte_order_of_a_tiff_does_not_matter(tmp_path):
    values = noise(16, 16, dtype="uint16", high=65536)
    Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    little = picture(tmp_path / "little.tif", values)
    assert (tmp_path / "big.tif").read_bytes()[:2] != little.read_bytes()[:2]
    for read in (read_sar, read_eo):
        assert torch.equal(read(tmp_path / "big.tif"), read(little))


def test_one_channel_is_repeated_and_rgb_kept(tmp_path):
    rgb = noise(16, 16, 3)
    assert np.array_equal(images.to_uint8(read_sar(picture(tmp_path / "rgb.png", rgb))), rgb)
    grey = read_sar(picture(tmp_path / "grey.png", rgb[..., 0]))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    wide = noise(3, 16, 16, dtype="uint16", high=65536)  # Pillow would lose the low bytes
    image = read_eo(geotiff(tmp_path / "a.tif", wide, crs=None, transform=None))
    assert torch.allclose(image, torch.from_numpy(wide.astype("float32")) / 32767.5 - 1, atol=1e-6)


def test_black_and_white_and_palettes_become_their_colours(tmp_path):
    white = np.zeros((16, 16), bool)
    white[:8] = True
    image = read_sar(picture(tmp_path / "bw.png", white))
    assert image[:, :8].unique() == 1 and image[:, 8:].unique() == -1
    colours = Image.fromarray(np.repeat(np.uint8([[[255, 0, 0], [0, 255, 0]]]), 16, 0).repeat(8, 1))
    for name in ("p.png", "p.tif"):
        colours.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / name)
        assert np.array_equal(images.to_uint8(read_eo(tmp_path / name)), np.asarray(colours))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_pixels_are_no_data_and_alpha_no_colour(tmp_path, channels):
    pixels = noise(16, 16, channels, high=255) + 1
    pixels[:4, :, -1] = 0
    raster, scale = scale_of(picture(tmp_path / "a.png", pixels.astype("uint8")))
    assert len(raster.bands) == channels - 1
    assert not raster.valid[:4].any() and raster.valid[4:].all()
    image = images.sar_image(raster, scale)
    assert (image[:, :4] == -1).all() and (image[:, 4:] > -1).all()


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


def test_zero_in_one_colour_is_no_missing_pixel(tmp_path):
    rgb = np.full((3, 16, 16), 9, "uint8")
    rgb[0, 0], rgb[:, 1] = 0, 0
    raster = images.read_raster(geotiff(tmp_path / "a.tif", rgb, nodata=0))
    assert raster.valid[0].all() and not raster.valid[1].any()


# ----------------------------------------------------------------------------------------------------------
# What a band is

NAMED = {  # names of bands: what is read, as indexes of (VV, VH, other)
    ("VV", "VH", "angle"): [0, 1, 2],
    ("angle", "VH", "VV"): [2, 1, 0],
    ("Sigma0_VV_db", "Sigma0_VH_db"): [0, 1],
    ("Gamma0_VH_masked", "Gamma0_VV_denoised", "VV_noise"): [1, 0, 2],
    ("localIncidenceAngle", "s0_vv", "mask", "s0_vh"): [2, 0, 2, 1],
    ("VV", "VH", "VH/VV", None): [0, 1, 2, 2],
    ("VH", "VV", "dem", "layover_shadow_mask", "incidence_angle_VV"): [1, 0, 2, 2, 2],
    ("Intensity_HV", "Intensity_HH"): [1, 0],
}


@pytest.mark.parametrize("names", NAMED)
def test_names_of_bands_decide_and_what_is_no_polarisation_is_left_out_with_a_word(tmp_path, names):
    bands = np.stack([DB[0], DB[1] - 7, 38.2 * CONSTANT])[NAMED[names]]
    path = geotiff(tmp_path / "a.tif", bands.astype("float64"), names=names)
    plain = geotiff(tmp_path / "plain.tif", np.stack([DB[0], DB[1] - 7]))
    assert torch.allclose(read_sar(path), read_sar(plain), atol=1e-6)
    raster = images.read_raster(path)
    assert raster.names in (("VV", "VH"), ("HH", "HV"))
    left_out = [name for name, index in zip(names, NAMED[names]) if index == 2]
    assert len(raster.notes) == bool(left_out) and all((name or "band 4") in raster.notes[0] for name in left_out)


def test_four_polarisations_are_hh_the_mean_of_hv_and_vh_and_vv(tmp_path):
    db = np.array([-5, -25, -15, -10.0], "float32")[:, None, None] * CONSTANT.astype("float32")  # VV, HV, VH, HH
    image = read_sar(geotiff(tmp_path / "a.tif", db, names=("VV", "HV", "VH", "HH")))
    expected = [-10 / 12.5 + 1, -20 / 16.25 + 1, -5 / 12.5 + 1]
    assert np.allclose(image[:, 0, 0], expected, atol=1e-6)
    eight_bits = noise(4, 16, 16)  # the fourth of which GDAL takes for alpha
    raster = images.read_raster(geotiff(tmp_path / "b.tif", eight_bits, names=("HH", "HV", "VH", "VV")))
    assert np.array_equal(raster.bands, eight_bits)


@pytest.mark.parametrize(
    ("file", "name", "zero"),
    [("a.tif", None, -12.5), ("a.tif", "VH", -16.25), ("S1A_IW_VH.tif", None, -16.25), ("s1-vv-1.tif", None, -12.5)],
)
def test_a_cross_polarisation_alone_has_its_own_range(tmp_path, file, name, zero):
    path = geotiff(tmp_path / file, (zero * CONSTANT)[None].astype("float32"), names=(name,))
    assert read_sar(path).eq(0).all()


def test_two_bands_of_one_polarisation_are_refused(tmp_path):
    path = geotiff(tmp_path / "a.tif", LINEAR, names=("Amplitude_VV", "Intensity_VV"))
    with pytest.raises(images.ImageError, match=r"a\.tif.*Amplitude_VV.*Intensity_VV.*alone"):
        read_sar(path)


def test_the_other_polarisation_of_an_acquisition_is_found(tmp_path):
    names = ("S1_VV_2.tif", "S1_VH_2.tif", "x_hh.tif", "vv_vh_VV.tif")
    one, two, alone, unclear = (picture(tmp_path / name) for name in names)
    found = [rasters.polarisation_partner(path) for path in (one, two, alone, unclear)]
    assert found == [two, one, None, None]


# ----------------------------------------------------------------------------------------------------------
# What a number is


def test_decibels_have_a_fixed_range_for_each_polarisation(tmp_path):
    db = np.full((2, 16, 16), -12.5, "float32")
    db[1] = -16.25
    db[:, 0, 0], db[:, 0, 1] = -99, 9
    image = read_sar(geotiff(tmp_path / "a.tif", db))
    assert image[:, 0, 0].eq(-1).all() and image[:, 0, 1].eq(1).all() and image[:, 1:].eq(0).all()
    two = read_sar(geotiff(tmp_path / "b.tif", DB))
    assert torch.allclose(two[2], (two[0] + two[1]) / 2) and not torch.equal(two[0], two[1])


def test_float_numbers_are_decibels_if_most_are_negative_unless_told(tmp_path):
    few_negative = LINEAR.copy()
    few_negative[0, 3, 3] = -1e-6  # as resampling leaves them
    linear, db, odd = (geotiff(tmp_path / f"{i}.tif", x) for i, x in enumerate((LINEAR, DB, few_negative)))
    fixed = [[-25, -32.5], [0, 0]]
    assert np.array_equal(scale_of(linear)[1].limits, np.percentile(LINEAR, (1, 99), axis=(1, 2)))
    assert scale_of(odd)[1].kind == "linear"
    assert np.array_equal(scale_of(db)[1].limits, fixed)
    assert np.array_equal(scale_of(linear, Reading("db"))[1].limits, fixed)
    assert np.array_equal(scale_of(db, Reading("linear"))[1].limits, np.percentile(DB, (1, 99), axis=(1, 2)))


FILLS = [-9999, -32768, -99999, np.finfo("float32").min, np.finfo("float32").max, np.nan, np.inf, -np.inf, 0]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", ["linear", "db"])
def test_fill_is_no_data_and_what_is_left_decides(tmp_path, kind, fill, declared):
    values = (LINEAR if kind == "linear" else DB).copy()
    clean = scale_of(geotiff(tmp_path / "clean.tif", values[:, 24:]))[1]
    values[:, :24] = fill  # three quarters of it
    raster, scale = scale_of(geotiff(tmp_path / "a.tif", values, nodata=fill if declared else None))
    assert scale.kind == kind and np.array_equal(scale.limits, clean.limits)
    assert not images.sar_mask(raster, scale)[:24].any() and images.sar_mask(raster, scale)[24:].all()
    assert images.sar_image(raster, scale)[:, :24].eq(-1).all()


def test_fill_in_one_band_is_no_data_but_zero_in_one_band_is_a_number(tmp_path):
    values = LINEAR.copy()
    values[0, 0], values[1, 1], values[0, 2] = -9999, np.nan, 0
    valid = images.read_raster(geotiff(tmp_path / "a.tif", values)).valid
    assert not valid[:2].any() and valid[2:].all()


@pytest.mark.parametrize("value", [0.5, 60000])
def test_constant_intensity_is_dark_not_nan(tmp_path, value):
    assert read_sar(geotiff(tmp_path / "a.tif", np.full((1, 16, 16), value, "float32"))).eq(-1).all()


def test_a_declared_scale_and_offset_are_applied(tmp_path):
    hundredths = np.round(100 * DB).astype("int16")
    hundredths[:, 0] = -32768  # undeclared fill, of the file's own numbers
    path = geotiff(tmp_path / "a.tif", hundredths, scales=(0.01, 0.01))
    expected = read_sar(geotiff(tmp_path / "db.tif", hundredths.astype("float32") / 100))
    assert expected[:, 0].eq(-1).all() and torch.allclose(read_sar(path), expected, atol=1e-5)
    shifted = np.where(hundredths == -32768, 0, hundredths + np.int32(5000)).astype("uint16")
    path = geotiff(tmp_path / "b.tif", shifted, scales=(0.01, 0.01), offsets=(-50, -50))
    assert torch.allclose(read_sar(path), expected, atol=1e-5)
    assert not images.read_raster(path).valid[0].any()  # 0 in all bands


@pytest.mark.parametrize("bands", [1, 2])
def test_16_bit_amplitudes_are_read_like_decibels_with_zero_as_no_data(tmp_path, bands):
    """Their picture is the one of the calibrated dB but for brightness and contrast."""
    amplitudes = np.round(600 * np.sqrt(LINEAR[:bands])).astype("uint16")
    amplitudes[:, :4] = 0
    raster, scale = scale_of(geotiff(tmp_path / "a.tif", amplitudes))
    assert scale.kind == "amplitude" and "amplitudes" in images.describe_sar(raster, scale)
    assert not images.sar_mask(raster, scale)[:4].any() and images.sar_mask(raster, scale)[4:].all()
    image = images.sar_image(raster, scale)
    assert image[:, :4].eq(-1).all() and 0.2 < image[:, 4:].std() < 0.6 and abs(image[:, 4:].mean()) < 0.5
    db = torch.from_numpy(DB[0, 4:])
    assert torch.corrcoef(torch.stack([image[0, 4:].flatten(), db.flatten()]))[0, 1] > 0.999
    plain = picture(tmp_path / "a.png", amplitudes[0])
    assert scale_of(plain)[1].kind == "amplitude" and scale_of(plain, Reading("full"))[1].kind == "full"


def test_a_stretch_is_by_percentiles_of_each_band_whatever_the_numbers_are(tmp_path):
    ramp = np.arange(256).reshape(16, 16)
    for path in (
        picture(tmp_path / "a.png", ramp.astype("uint8")),
        picture(tmp_path / "b.tif", ramp.astype("float32")),
    ):
        image = read_sar(path, Reading(stretch=(25, 75)))
        assert image.min() == -1 and image.max() == 1 and 0.45 < image.abs().eq(1).float().mean() < 0.55
    for stretch in ((99, 1), (-1, 50)):
        with pytest.raises(ValueError, match="must be two rising percentiles"):
            read_sar(path, Reading(stretch=stretch))


def test_real_sentinel1_tiles_use_the_range_without_clipping_and_their_amplitudes_come_near(tmp_path):
    if not SENTINEL1.is_dir():
        pytest.skip("the real Sentinel-1 tiles are not here")
    for path in sorted(SENTINEL1.glob("*.tif")):
        image = read_sar(path)
        assert image.shape == (3, 256, 256)
        assert image.abs().eq(1).float().mean() < 0.01 and 0.1 < image.std() < 0.5 and abs(image.mean()) < 0.2
        amplitudes = np.round(600 * 10 ** (images.read_raster(path).bands / 20)).astype("uint16")
        near = read_sar(geotiff(tmp_path / path.name, amplitudes))
        assert (near - image).square().mean().sqrt() < 0.3


def test_a_window_is_part_of_the_whole(tmp_path):
    path = geotiff(tmp_path / "a.tif", RNG.uniform(-20, 0, (2, 40, 50)).astype("float32"), nodata=-1)
    with images.open_geotiff(path) as dataset:
        small = images.read_window(dataset, shape=(4, 5))
    assert small.bands.shape == (2, 4, 5) and small.valid.shape == (4, 5)
    window = slice(9, 19), slice(7, 27)
    rgb = picture(tmp_path / "a.png", noise(40, 50, 3))
    for read, file in ((read_sar, path), (read_sar, rgb), (read_eo, rgb)):
        assert torch.equal(read(file, window=window), read(file)[:, 9:19, 7:27])


@pytest.mark.parametrize("kind", ["geotiff", "plain"])
def test_windows_of_a_large_image_are_scaled_like_the_whole(tmp_path, kind):
    values = RNG.gamma(1, 0.1, (1100, 24)).astype("float32")
    values[:550] *= 100
    path = tmp_path / "a.tif"
    geotiff(path, values[None]) if kind == "geotiff" else picture(path, values)
    whole = read_sar(path)
    for top in (0, 1000):
        assert torch.equal(read_sar(path, window=(slice(top, top + 100), slice(0, 24))), whole[:, top : top + 100])


# ----------------------------------------------------------------------------------------------------------
# EO


def test_sentinel2_is_red_green_blue_up_to_reflectance_0_3(tmp_path):
    bands = np.zeros((13, 16, 16), "uint16")
    bands[3], bands[2], bands[1] = 3000, 1500, 0
    assert [float(c.unique()) for c in read_eo(geotiff(tmp_path / "a.tif", bands))] == [1, 0, -1]


@pytest.mark.parametrize("count", [3, 4])
def test_reflectances_in_16_bits_are_read_like_sentinel2(tmp_path, count):
    values = noise(count, 32, 32, dtype="uint16", high=4200)
    expected = torch.from_numpy(values[:3].astype("float32") / 1500 - 1).clamp(-1, 1)
    assert torch.allclose(read_eo(geotiff(tmp_path / "a.tif", values)), expected, atol=1e-6)
    path = geotiff(tmp_path / "b.tif", values, scales=[1e-4] * count)
    assert torch.allclose(read_eo(path), expected, atol=1e-5)  # float reflectances, after the declared scale
    full = read_eo(tmp_path / "a.tif", Reading(eo="full"))
    assert torch.allclose(full, torch.from_numpy(values[:3].astype("float32")) / 32767.5 - 1, atol=1e-6)


def test_eo_must_be_colours(tmp_path):
    cases = [(np.zeros((2, 16, 16), "uint8"), "2 band"), (np.zeros((3, 16, 16), "float32"), "3 band")]
    for bands, message in [*cases, (noise(3, 16, 16, dtype="uint16"), "up to 25")]:  # 8 bits kept in 16
        with pytest.raises(images.ImageError, match=rf"a\.tif.* {message}"):
            read_eo(geotiff(tmp_path / "a.tif", bands))
    with pytest.raises(images.ImageError, match=r"a\.png.*8-bit"):
        read_eo(picture(tmp_path / "a.png"), Reading(eo="reflectance"))


# ----------------------------------------------------------------------------------------------------------
# Files that cannot be used


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "error::PIL.Image.DecompressionBombWarning")  # as rasters.py
@pytest.mark.parametrize("read", [read_sar, read_eo])
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
    "five bands": (np.ones((5, 16, 16), "float32"), {}, "5 bands"),
    "signed integers": (np.ones((1, 16, 16), "int16"), {}, "int16: declare"),
    "hundredths of dB": (np.full((1, 16, 16), -250, "float32"), {}, "about -250, neither dB nor intensities"),
    "NaN everywhere": (np.full((1, 16, 16), np.nan, "float32"), {}, "no valid pixel"),
    "zero everywhere": (np.zeros((1, 16, 16), "float32"), {}, "no valid pixel"),
    "palette": (np.zeros((1, 16, 16), "uint8"), {"photometric": "palette"}, "palette"),
    "one bit": (np.zeros((1, 16, 16), "uint8"), {"nbits": 1}, "palette"),
    "twelve bits": (np.zeros((1, 16, 16), "uint16"), {"nbits": 12}, "neither 8 nor 16 bits"),
    "small": (np.zeros((1, 4, 16), "uint8"), {}, "16x4"),
}


@pytest.mark.parametrize("case", BAD_GEOTIFFS)
def test_a_geotiff_that_is_no_sar_image_is_refused(tmp_path, case):
    bands, profile, message = BAD_GEOTIFFS[case]
    path = geotiff(tmp_path / "bad.tif", bands, **profile)
    with pytest.raises(images.ImageError, match=rf"bad\.tif.*{message}"):
        read_sar(path)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("uint8", "db"), ("uint8", "linear"), ("uint8", "amplitude"), ("uint16", "db"), ("float32", "full"),
     ("float32", "amplitude"), ("int16", "db")],
)  # fmt: skip
def test_numbers_that_cannot_be_what_they_should_be_are_refused(tmp_path, dtype, kind):
    with pytest.raises(images.ImageError, match=rf"a\.tif.*{dtype}, which cannot be {kind}"):
        read_sar(geotiff(tmp_path / "a.tif", np.ones((1, 16, 16), dtype)), Reading(kind))


def test_a_truncated_geotiff_and_a_lying_header_are_named(tmp_path, capfd):
    path = geotiff(tmp_path / "a.tif", noise(2, 64, 64).astype("float32"), compress="deflate")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(images.ImageError, match=r"a\.tif"):
        read_sar(path)
    rasterio = pytest.importorskip("rasterio")
    profile = {"sparse_ok": True, "width": 2**17, "height": 2**17, "count": 1, "dtype": "float32", "tiled": True}
    rasterio.open(tmp_path / "huge.tif", "w", driver="GTiff", crs="EPSG:32631", **profile).close()
    with pytest.raises(images.ImageError, match=r"huge\.tif.*131072x131072"):
        read_sar(tmp_path / "huge.tif")
    assert capfd.readouterr().err == ""


def test_a_tiff_of_several_pictures_is_refused_however_it_is_compressed(tmp_path):
    pytest.importorskip("rasterio")
    pages = [Image.fromarray(noise(16, 16)) for _ in range(3)]
    for compression in (None, "tiff_lzw"):
        pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=compression)
        with pytest.raises(images.ImageError, match=r"a\.tif.* pictures: save the right one"):
            read_sar(tmp_path / "a.tif")


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", tmp_path / "missing.png"):
        for read in (read_sar, rasters.image_size):
            with pytest.raises(images.ImageError, match=path.name):
                read(path)


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
        read_sar(path)
    read_sar(plain)  # needs none


# ----------------------------------------------------------------------------------------------------------
# Writing


def test_every_grey_value_survives_reading_and_writing(tmp_path):
    ramp = np.arange(256, dtype="uint8").reshape(16, 16)
    images.save_image(tmp_path / "a.png", read_sar(picture(tmp_path / "in.png", ramp)), {"seed": "7"})
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image)[..., 1], ramp) and image.text["seed"] == "7"
    beyond = torch.tensor([-9.0, -1, 0, 1, 9]).repeat(3, 1, 1)
    assert images.to_uint8(beyond)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = picture(tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        images.save_image(path, np.zeros((4, 4, 7), "uint8"))
    with pytest.raises(OSError):
        images.save_image(tmp_path / "nowhere" / "b.png", noise(8, 8))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_sheet_has_room_for_the_largest_picture():
    small, large = (np.full((side, side + 4), 7, np.uint8) for side in (8, 20))
    sheet = images.grid([[small, large], [large, small]])
    assert sheet.shape == (4 + 2 * 24, 4 + 2 * 28, 3) and (sheet == 7).all(-1).sum() == 2 * (small.size + large.size)
