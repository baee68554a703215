"""Malformed images, odd images and hostile names, through sample.py and train.py: each is named in one line, the
others are done, nothing else changes, and memory stays small. Odd but valid ones are translated.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_images import bad_geotiffs, bad_jpegs, bad_pngs, bad_tiffs, encoded, encoded_by_gdal, rasterio, special_files
from hostile import Outcome, assert_refused, noise, outcome, save, tree
from PIL import Image, PngImagePlugin

import sample
import train
from images import ImageError, read_raster, read_sar

RESULTS = ("eo", "confidence")
needs_rasterio = pytest.mark.skipif(rasterio is None, reason="rasterio is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PendingDeprecationWarning")
BATCHES = {"png": bad_pngs, "jpeg": bad_jpegs, "tiff": bad_tiffs}


def check_batch(result: Outcome, folder: Path, names: list[str]) -> None:
    """Each is done or named, once; "maybe_..." either, others named; "good..." are done; no more is written."""
    done = {name for name in names if (folder / "out" / f"{Path(name).stem}_eo.png").exists()}
    done |= {name for name in names if (folder / "out" / f"{Path(name).stem}_eo.tif").exists()}
    expected = {f"{Path(name).stem}_{kind}" for name in done for kind in RESULTS}
    assert {path.stem for path in (folder / "out").rglob("*")} == expected
    *lines, last = result.err
    for name in names:
        named = sum(line.startswith(f"error: {str(folder / 'in' / name)!r}") for line in lines)
        assert named + (name in done) == 1, (name, result.err)
        assert name.startswith("maybe_") or (name in done) == name.startswith("good"), (name, result)
    assert len(lines) == len(names) - len(done) and all(line.isprintable() for line in lines), result.err
    assert last == f"{len(lines)} of {len(names)} failed, see above" and result.code == 2


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "geotiff", "special"])
def test_bad_images_are_named_in_one_line_each_and_the_good_ones_done(trained, tmp_path, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    if kind == "geotiff" and rasterio is None:
        pytest.skip("rasterio is not installed")
    if kind == "special":
        names = special_files(folder)
    else:
        cases = bad_geotiffs(tmp_path) if kind == "geotiff" else BATCHES[kind]()
        assert len(cases) >= 30
        for name, content in cases.items():
            (folder / name).write_bytes(content)
        names = list(cases)
    names += [save(folder / f"good{i}.{end}").name for i, end in enumerate(("png", "tif"))]
    before = tree(folder)
    arguments = [str(folder), "--model", str(trained), "--steps", "1", "--out", str(tmp_path / "out")]
    check_batch(outcome(sample.main, arguments), tmp_path, names)
    assert tree(folder) == before


def test_a_bad_image_in_a_shell_is_one_line_and_exit_code_2(trained, tmp_path):
    name = "bomb.png"
    (tmp_path / name).write_bytes(bad_pngs()[name])
    before = tree(tmp_path)
    command = [sys.executable, Path(sample.__file__), name, "--model", trained, "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    first, last = done.stderr.splitlines()
    assert done.returncode == 2 and "wrote" not in done.stdout and first.startswith(f"error: '{name}'"), done
    assert last == "1 of 1 failed, see above" and tree(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------
# Odd, but fine

ODD = {
    "1-bit": lambda: Image.fromarray(noise(20, 30) > 99),
    "palette": lambda: Image.fromarray(noise(20, 30, (3,))).quantize(17),
    "palette-4-bit": lambda: Image.fromarray(noise(20, 30, (3,))).quantize(9),
    "16-bit": lambda: Image.fromarray(noise(20, 30, dtype=np.uint16)),
    "alpha": lambda: Image.fromarray(noise(20, 30, (4,))),
    "grey-alpha": lambda: Image.fromarray(noise(20, 30, (2,))),
    "rgb": lambda: Image.fromarray(noise(20, 30, (3,))),
    "constant": lambda: Image.new("L", (30, 20), 7),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_but_valid_pictures_are_translated(trained, tmp_path, kind):
    ODD[kind]().save(tmp_path / "a.png")
    result = outcome(sample.main, [str(tmp_path / "a.png"), "--model", str(trained), "--steps", "1"])
    assert result.code == 0 and not result.err
    with Image.open(tmp_path / "a_eo.png") as eo:
        assert eo.size == (30, 20) and eo.mode == ("RGBA" if "alpha" in kind else "RGB")


SIDES = (1, 7, 8, 9, 33, 4097)


def test_every_size_from_8_pixels_is_translated_and_smaller_ones_are_named(trained, tmp_path):
    sizes = [(h, w) for h, w in itertools.product(SIDES, SIDES) if min(h, w) < 33 or h == w == 33]
    for height, width in sizes:
        save(tmp_path / "in" / f"{height}x{width}.png", noise(height, width))
    out = tmp_path / "out"
    result = outcome(sample.main, [str(tmp_path / "in"), "--model", str(trained), "--steps", "1", "--out", str(out)])
    small = [size for size in sizes if min(size) < 8]
    assert result.code == 2 and len(result.err) == len(small) + 1
    for height, width in sizes:
        name = f"{height}x{width}"
        if (height, width) in small:
            assert sum(f"{name}.png' is {width}x{height} pixels" in line for line in result.err) == 1
        else:
            for kind in RESULTS:
                with Image.open(out / f"{name}_{kind}.png") as image:
                    assert image.size == (width, height)
    assert len(list(out.iterdir())) == 2 * (len(sizes) - len(small))


NAMES = [
    b"a b.png", b"quo'te.png", b'dou"ble.png', "\u00fc\u4e2d\U0001f6f0.png".encode(), b"new\nline.png", b"\xff\xfe.png",
    b"tab\t.png", b"\x1b[31mred.png", b"$(touch owned).png", b"`touch owned`.png", b"; touch owned.png", b"%s%n{0}.png",
    b"*.png", b"-rf.png", b"--out.png", b"back\\slash.png", b"a.b..png", b"~.png", b"\r.png", b"x" * 230 + b".png",
]  # fmt: skip


def test_no_name_is_too_odd_and_bad_files_of_such_names_are_one_line(trained, tmp_path):
    good, bad, out = (tmp_path / name for name in ("good", "bad", "o\udcff\n ut"))
    names = [os.fsdecode(name) for name in NAMES]
    for folder, content in ((good, encoded(noise(16, 16), "PNG")), (bad, b"")):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(content)
    options = ["--model", str(trained), "--steps", "1"]
    result = outcome(sample.main, [str(good), *options, "--out", str(out)])
    assert result.code == 0 and not result.err, result.err
    expected = {f"{name[:-4]}_{kind}.png" for name in names for kind in RESULTS}
    assert {path.name for path in out.iterdir()} == expected and set(tmp_path.iterdir()) == {good, bad, out}
    before = tree(tmp_path)
    result = outcome(sample.main, [str(bad), *options])
    assert result.code == 2 and len(result.err) == len(NAMES) + 1 and all(map(str.isprintable, result.err))
    assert tree(tmp_path) == before


def test_a_name_too_long_for_its_results_is_named_and_leaves_nothing(trained, tmp_path):
    for length in (238, 245, 251):
        save(tmp_path / ("x" * length + ".png"))
    before = tree(tmp_path)
    result = outcome(sample.main, [str(tmp_path), "--model", str(trained), "--steps", "1"])
    assert result.code == 2 and len(result.err) == 4 and tree(tmp_path) == before


@needs_rasterio
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_at_the_end_of_their_range_neither_warn_nor_spoil(trained, tmp_path, dtype):
    edge = np.finfo(dtype).max
    rows = [-edge, edge, 0, np.finfo(dtype).tiny, np.inf, -np.inf, np.nan, 1e-40]
    for i, scale in enumerate((1, 0.5, 1e-30)):
        values = np.repeat(np.array(rows, dtype) * scale, 32).reshape(1, 16, 16)
        (tmp_path / f"{i}.tif").write_bytes(encoded_by_gdal(tmp_path, values))
        assert read_sar(tmp_path / f"{i}.tif").isfinite().all()
        for options in (["--scale", "linear"], ["--scale", "db"], ["--stretch", "0", "100"]):
            out = tmp_path / f"{i}{options[1]}"
            result = outcome(
                sample.main,
                [str(tmp_path / f"{i}.tif"), "--model", str(trained), "--steps", "1", "--out", str(out), *options],
            )
            assert result.code == 0 and not result.err, result


# ----------------------------------------------------------------------------------------------------------
# Pairs


def pairs(folder: Path, change: str) -> Path:
    """Three pairs of a dataset, one of which is wrong."""
    for i in range(3):
        save(folder / "sar" / f"{i}.png", noise(32, 32, seed=i))
        save(folder / "eo" / f"{i}.png", noise(32, 32, (3,), seed=i))
    sar, eo = folder / "sar" / "1.png", folder / "eo" / "1.png"
    if change == "unequal":
        save(eo, noise(32, 33, (3,)))
    elif change == "small":
        save(sar, noise(9, 31)), save(eo, noise(9, 31))
    elif change == "cmyk":
        eo.write_bytes(encoded(Image.fromarray(noise(32, 32, (3,))).convert("CMYK"), "JPEG"))
    elif change == "unpaired":
        shutil.rmtree(folder / "eo")
        save(folder / "eo" / "other.png")
    elif change == "empty file":
        sar.write_bytes(b"")
    elif change == "animated":
        sar.write_bytes(bad_pngs()["animated.png"])
    elif change == "bomb":
        sar.write_bytes(bad_pngs()["bomb.png"])
    elif change == "pipe":
        eo.unlink(), os.mkfifo(eo)
    elif change == "loop":
        eo.unlink(), eo.symlink_to("1.png")
    elif change == "loop of folders":
        shutil.rmtree(folder / "eo"), (folder / "eo").symlink_to("..")
    elif change == "float":
        eo.write_bytes(encoded(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"))
    return folder


CHANGES = (
    "unequal", "small", "cmyk", "unpaired", "empty file", "animated", "bomb", "pipe", "loop", "loop of folders",
    "float",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_dataset_with_a_bad_pair_is_one_line_and_trains_nothing(base, tmp_path, change):
    data, out = pairs(tmp_path / "data", change), tmp_path / "run"
    before = tree(data)
    options = f"--data {data} --out {out} --model {base} --size 32 --steps 4 --batch-size 3 --workers 0 --device cpu"
    result = outcome(train.main, options.split())
    assert_refused(result, *{"unequal": ("sar/1.png", "32x32", "eo/1.png", "33x32")}.get(change, ()))
    assert tree(data) == before and not any((out / name).exists() for name in ("model", "checkpoint", "samples"))


# ----------------------------------------------------------------------------------------------------------
# Properties


def check_raster(path: Path) -> None:
    """It is read as numbers of one size, or refused by an error that names it."""
    try:
        raster = read_raster(path)
    except ImageError as error:
        assert repr(str(path)) in str(error)
    else:
        assert raster.bands.ndim == 3 and raster.bands.shape[1:] == raster.valid.shape and min(raster.valid.shape) >= 8


def test_any_damage_to_an_image_is_an_image_or_an_error_that_names_it(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 40, zip=True)
    wholes = [
        encoded(noise(16, 16, (4,)), "PNG", pnginfo=text),
        encoded(ODD["palette"](), "PNG"),
        encoded(noise(16, 16), "JPEG"),
        encoded(noise(16, 16, dtype=np.uint16), "TIFF"),
    ]
    path = tmp_path / "a.png"

    @hypothesis.settings(derandomize=True, deadline=None, max_examples=300, database=None)
    @hypothesis.given(
        st.sampled_from(wholes),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=4),
        st.floats(0.05, 1),
    )
    def property_of_damage(whole, changes, share):
        content = bytearray(whole)
        for place, new in changes:
            at = int(place * len(content))
            content[at : at + len(new)] = new
        path.write_bytes(content[: int(len(content) * share)])
        check_raster(path)

    property_of_damage()
