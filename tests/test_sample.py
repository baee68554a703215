"""sample.py: what it reads, what it writes and where, what it refuses, how it stops."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import geotiff, names, noise, outcome, pixels, save
from PIL import Image
from test_scene import translate as in_tiles

import sample
import scene
from cdiffset import CDiffSET
from images import confidence_picture, read_sar, to_uint8

SCRIPT = Path(sample.__file__).resolve()
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore:Dataset has no geotransform")


@pytest.fixture
def run(trained, monkeypatch, tmp_path, capsys):
    """Runs the script in tmp_path: run("in.png", "--seed", 3) -> exit code, lines on stdout, lines on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=trained):
        options = ["--steps", "2", "--dtype", "float32", "--device", "cpu", "--model", str(model)]
        code = sample.main([*options, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def results(*stems, kinds=("eo", "confidence"), suffix="png"):
    return {f"{stem}_{kind}.{suffix}" for stem in stems for kind in kinds}


# ----------------------------------------------------------------------------------------------------------
# What it writes

PICTURES = {
    "a.png": noise(30, 40),
    "b c'ü.png": noise(32, 40, dtype=np.uint16, seed=1),
    "deep/a.tif": noise(31, 33, dtype=np.uint16, seed=2),
    "deep/er/a.JPG": noise(30, 40, (3,), seed=3),
    "d.jpeg": noise(8, 9, seed=4),
    "e.tiff": noise(64, 33, (3,), seed=5),
    "f.png": noise(70, 50, seed=6),  # larger than a tile
}


def test_files_and_folders_get_the_pixels_of_translate_whatever_else_is_in_the_call(run, trained, tmp_path):
    for name in (*PICTURES, "x_eo.png", "x_confidence.png", ".hidden/d.png", ".e.png"):
        save(tmp_path / "in" / name, PICTURES.get(name))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    code, out, err = run("in", "--out", "one", "--seed", 3, "--tile", 64)
    assert code == 0 and not err and out[-1] == "translated 7 images; results in 'one'"
    stems = [name.rsplit(".", 1)[0] for name in PICTURES]
    assert names(tmp_path / "one") == results(*stems)
    model = CDiffSET.from_pretrained(trained)
    for name, stem in zip(PICTURES, stems):
        sar, options = read_sar(tmp_path / "in" / name), {"steps": 2, "spacing": sample.DEFAULT_SPACING}
        small = name != "f.png"
        eo, confidence = (
            model.translate(sar[None], seed=3, **options) if small else in_tiles(model, sar, 64, seeds=[3], **options)
        )
        assert np.array_equal(pixels(tmp_path / f"one/{stem}_eo.png"), to_uint8(eo[0])), name
        assert np.array_equal(pixels(tmp_path / f"one/{stem}_confidence.png"), confidence_picture(confidence[0])), name
    run("in", "--out", "five", "--seed", 3, "--tile", 64, "--batch-size", 5)
    for name in names(tmp_path / "one"):
        difference = pixels(tmp_path / "one" / name) - pixels(tmp_path / "five" / name)
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3  # of rounding

    before = names(tmp_path / "in")
    for _ in range(2):  # results are no inputs
        assert run("in", "--seed", 3, "--tile", 64)[0] == 0
        assert names(tmp_path / "in") == before | results(*stems)


def test_samples_are_averaged_and_their_spread_is_written(run, tmp_path):
    save(tmp_path / "a.png", noise(30, 40))
    for seed in (5, 6, 7):
        assert (
            run("a.png", "--seed", seed, "--out", seed)[1][-1] == f"wrote '{seed}/a_eo.png', '{seed}/a_confidence.png'"
        )
    singles = [pixels(tmp_path / f"{seed}/a_eo.png") for seed in (5, 6, 7)]
    assert abs(singles[0] - singles[1]).mean() > 1
    assert run("a.png", "--seed", 5, "--samples", 3, "--batch-size", 2)[0] == 0
    assert names(tmp_path) >= results("a", kinds=("eo", "confidence", "spread"))
    assert abs(pixels(tmp_path / "a_eo.png") - np.mean(singles, axis=0)).max() <= 1.1
    spread = np.std(singles, axis=0, ddof=1).mean(axis=2)
    assert abs(pixels(tmp_path / "a_spread.png") - spread).max() <= 1.6


def test_a_picture_says_how_to_make_it_again(run, trained, tmp_path):
    path = geotiff(tmp_path / "a.tif", crs=None, transform=None, nodata=None)
    options = "--steps 3 --seed 9 --spacing leading --dtype bfloat16 --samples 2 --stretch 1 99.5 --prediction-type"
    assert run("a.tif", *options.split(), "v_prediction")[0] == 0
    with Image.open(tmp_path / "a_eo.png") as image:
        about, first = dict(image.text), np.asarray(image)
    assert about.pop("Software").startswith("C-DiffSET ") and about.pop("input") == path.name
    (tmp_path / "a_eo.png").unlink()
    assert (
        sample.main(["a.tif", *" ".join(f"--{key.replace('_', '-')} {value}" for key, value in about.items()).split()])
        == 0
    )
    assert about["model"] == str(trained) and np.array_equal(pixels(tmp_path / "a_eo.png"), first)


def test_a_compiled_model_gives_the_same(run, tmp_path, monkeypatch):
    """With torch's own compiler this takes a minute, and the pixels differ by one level at most."""
    traced, compile_with, compile_function = [], torch.nn.Module.compile, torch.compile

    def backend(graph, _inputs):
        traced.append(graph)
        return graph.forward

    def broken(_function):
        raise RuntimeError("no compiler\n\nand advice to developers")

    save(tmp_path / "a.png", noise(64, 32))
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_function(f, **options) if options else f)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_with(module, backend=backend))
    assert run("a.png", "--out", "plain")[0] == 0 and not traced
    assert run("a.png", "--out", "compiled", "--compile")[0] == 0 and traced
    plain, compiled = (pixels(tmp_path / folder / "a_eo.png") for folder in ("plain", "compiled"))
    assert np.array_equal(plain, compiled) and plain.std() > 1
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="^--compile: torch.compile does not work here: no compiler$"):
        run("a.png", "--compile")


def test_a_stage_1_model_writes_no_confidence_and_says_so(run, base, tmp_path):
    CDiffSET.from_pretrained(base, variance_channel=False).save_pretrained(tmp_path / "stage1")
    save(tmp_path / "in/a.png"), save(tmp_path / "in/large.png", noise(20, 60))
    code, out, _ = run("in", "--tile", 32, "--out", "o", model=tmp_path / "stage1")
    assert code == 0 and any("no variance channel" in line for line in out)
    assert names(tmp_path / "o") == {"a_eo.png", "large_eo.png"}


def test_the_default_model_is_found_from_anywhere_and_named(trained, tmp_path, monkeypatch, capsys):
    assert SCRIPT.parent / "models" / "tiny" == sample.TINY
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "TINY", trained)
    save(tmp_path / "a.png")
    assert sample.main(["a.png", "--steps", "1"]) == 0
    assert "models/tiny, a demonstration model" in capsys.readouterr().out.splitlines()[0]


# ----------------------------------------------------------------------------------------------------------
# GeoTIFFs, and how numbers are read


@pytest.mark.parametrize("tile, samples", [(32, 2), (96, 1)])
def test_a_geotiff_keeps_its_place_beside_a_picture_of_its_name(run, trained, tmp_path, tile, samples):
    rasterio = pytest.importorskip("rasterio")
    path = geotiff(tmp_path / "in/s.tif")
    save(tmp_path / "in/s.png")
    assert run("in", "--tile", tile, "--samples", samples, "--batch-size", 3, "--out", "o")[0] == 0
    kinds = {"eo": ("uint8", 3), "confidence": ("float32", 1)} | ({"spread": ("float32", 1)} if samples > 1 else {})
    assert names(tmp_path / "o") == results("s", kinds=kinds) | results("s", kinds=kinds, suffix="tif")
    found = {}
    for kind, (dtype, count) in kinds.items():
        with rasterio.open(path) as source, rasterio.open(tmp_path / f"o/s_{kind}.tif") as file:
            assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
            assert file.dtypes == (dtype,) * count and file.tags()["steps"] == "2"
            valid = file.dataset_mask() > 0
            assert not valid[:10, :15].any() and valid[10:].all() and valid[:, 15:].all()
            found[kind] = file.read()
    if tile == 96:  # the values of translate, confidence absolute
        eo, confidence = CDiffSET.from_pretrained(trained).translate(read_sar(path)[None], 2, spacing="trailing")
        assert abs(found["eo"][:, valid] - np.moveaxis(to_uint8(eo[0]), 2, 0)[:, valid].astype(int)).max() <= 1
        assert np.allclose(found["confidence"][:, valid], confidence[0][:, valid], atol=1e-5)


def test_numbers_are_read_as_the_options_or_the_model_say_and_that_is_printed_once(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        scene, "describe_sar", lambda raster, scale: f"read as {scale.kind}" + " in t" * ("t.tif" in raster.source)
    )
    geotiff(tmp_path / "in/s.tif"), geotiff(tmp_path / "in/t.tif"), save(tmp_path / "in/u.png")
    model = CDiffSET.from_pretrained(trained)
    model.trained_on = {"sar": "linear", "stretch": [10, 90], "eo": "full"}
    monkeypatch.setattr(CDiffSET, "from_pretrained", lambda *_, **__: model)
    seen, read = {}, scene.sar_scale

    def sar_scale(raster, reading):
        seen[Path(raster.source.strip("'")).name] = reading
        return read(raster, reading)

    monkeypatch.setattr(scene, "sar_scale", sar_scale)
    run("in", "--out", "o")
    assert set(seen.values()) == {("linear", (10, 90), "auto")}
    run("in/s.tif", "--stretch", 1, 99, "--out", "o")
    assert seen["s.tif"] == ("auto", (1, 99), "auto")

    model.trained_on = {"sar": "db", "stretch": None, "eo": "full"}
    model.assumptions = ["it predicts the noise"]
    _, out, _ = run("in", "--out", "o")
    assert model.assumptions[0] in out and seen["s.tif"] == ("auto", None, "auto")
    told = [line for line in out if "read as" in line]
    assert len(told) == 3 and told[:2] == ["'s.tif': read as db", "'u.png': read as full"]
    assert told[2] == "'u.png': read as full, but the model was trained on db: expect a poor translation"
    run("in/s.tif", "--scale", "linear", "--out", "o")
    assert seen["s.tif"] == ("linear", None, "auto")


# ----------------------------------------------------------------------------------------------------------
# What it refuses


def test_bad_files_are_named_in_one_line_each_and_the_others_done(run, tmp_path, monkeypatch):
    for name in "abz":
        save(tmp_path / f"in/{name}.png", noise(30, 40))
    save(tmp_path / "in/small.png", noise(7, 30))
    (tmp_path / "in/empty.png").touch()
    (tmp_path / "in/new\nline.jpg").write_bytes(b"nonsense")
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:200])
    whole = geotiff(tmp_path / "in/cut.tif", side=300).read_bytes()
    (tmp_path / "in/cut.tif").write_bytes(whole[: len(whole) // 2])
    geotiff(tmp_path / "in/block.tif"), geotiff(tmp_path / "in/block of large.tif", side=200)
    window, write = sample.Source.window, sample.write_pictures

    def damaged(source, rows, columns):  # in a block that the overview has not seen
        if source.path.name.startswith("block"):
            raise OSError("TIFFReadEncodedTile failed")
        return window(source, rows, columns)

    def full_disk(source, *rest):
        if source.path.name == "b.png":
            raise OSError(28, "No space left on device")
        write(source, *rest)

    monkeypatch.setattr(sample.Source, "window", damaged)
    monkeypatch.setattr(sample, "write_pictures", full_disk)
    code, out, err = run("in", "missing.png", "--out", "o", "--tile", 128, "--batch-size", 4)
    assert code == 2 and out[-1] == "translated 2 images; results in 'o'" and err[-1] == "9 of 11 failed, see above"
    bad = ("small.png", "empty.png", r"new\nline.jpg", "cut.png", "cut.tif", "missing.png", "block.tif",
           "block of large.tif", "b.png")  # fmt: skip
    for name in bad:
        assert sum(line.startswith("error: ") and name in line.split(":")[1] for line in err) == 1, name
    assert len(err) == len(bad) + 1 and names(tmp_path / "o") == results("a", "z")


def test_neither_inputs_nor_results_of_other_inputs_are_overwritten(run, tmp_path):
    inputs = {"a.png", "a_eo.png", "b.png", "b.jpg"}
    for name in inputs:
        save(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in inputs}
    code, _, err = run("a.png", "a_eo.png", "b.png", "b.jpg", "./b.png")
    assert code == 2 and len(err) == 3 and "'a.png': its result would overwrite the input" in err[0]
    assert "'b.jpg': its results would overwrite those of 'b.png'" in err[1]
    assert before == {name: (tmp_path / name).read_bytes() for name in inputs}
    assert names(tmp_path) == inputs | results("a_eo", "b")
    assert run("a.png", "a_eo.png", "--out", "o")[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ("a.png --tile 20", "--tile 20: this model needs a multiple of 8, at least 16"),
        ("a.png --tile 8", "--tile 8: this model needs a multiple of 8, at least 16"),
        ("a.png --steps 1001", "--steps 1001: this model has 1000 timesteps"),
        ("a.png --device nonsense", "--device nonsense"),
        ("a.png --out a.png", "--out 'a.png' is a file: give a folder"),
        ("a.png --seed 4294967295 --samples 2", "the last seed must be below 2^32"),
        ("a.png --model none", "'none' is not there"),
        ("a.png --model BASE", "fine-tune it first: python train.py"),
        ("empty", "'empty': no PNG, JPEG or TIFF images in it"),
    ],
)
def test_settings_that_cannot_be_are_errors_before_anything_is_written(run, base, tmp_path, capsys, options, message):
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, SystemExit)) as error:
        run(*options.replace("BASE", str(base)).split())
    assert re.search(re.escape(message), f"{error.value}{capsys.readouterr().err}")
    assert names(tmp_path) == {"a.png"}


@pytest.mark.parametrize("tile", [64, 16])
def test_numbers_that_are_not_finite_are_never_written(run, trained, tmp_path, tile):
    save(tmp_path / "a.png", noise(20, 40))
    model = CDiffSET.from_pretrained(trained)
    torch.nn.init.constant_(model.unet.conv_out.bias, 5e37)  # overflows
    model.save_pretrained(tmp_path / "model")
    code, _, err = run("a.png", "--out", "o", "--tile", tile, model=tmp_path / "model")
    assert code == 2 and "the model's output is not finite" in err[0] and not names(tmp_path / "o")


# ----------------------------------------------------------------------------------------------------------
# Processes


def test_processes_share_the_files_and_end_together_though_one_file_is_damaged(run, trained, tmp_path):
    for i in (1, 3, 5):
        save(tmp_path / "in" / f"{i}.png", noise(30, 40, seed=i))
    run("in", "--out", "alone")
    (tmp_path / "in" / "0.png").write_bytes(b"damaged")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    options = ["--out", "shared", "--model", trained, "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    done = subprocess.run([sys.executable, *launcher, "in", *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("'in/0.png' cannot be read") == 1
    assert names(tmp_path / "shared") == names(tmp_path / "alone") == results("1", "3", "5")
    for name in names(tmp_path / "alone"):
        assert np.array_equal(pixels(tmp_path / "shared" / name), pixels(tmp_path / "alone" / name))


def test_images_with_the_same_result_names_stay_in_one_process():
    stems = {Path(name): Path(name).with_suffix("") for name in ("a.png", "b.png", "a.jpg", "c.png", "d.png")}
    shares = [{str(path) for path in sample.share(stems, rank, 3)} for rank in range(3)]
    assert shares == [{"a.png", "a.jpg", "d.png"}, {"b.png"}, {"c.png"}]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_scene_leaves_nothing(trained, tmp_path, monkeypatch, number, code):
    def interrupt(*_):
        print(len(names(tmp_path)))
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(scene.OnDisk, "append_noise", interrupt)
    path = geotiff(tmp_path / "s.tif")
    done = outcome(sample.main, [str(path), "--model", str(trained), "--tile", "32"])
    assert done.code == code and not done.err and done.out[-1] == "3"  # the input and two temporary files
    assert names(tmp_path) == {"s.tif"}


@pytest.mark.parametrize("moment", [1, 2, 3, 6])
def test_kill_9_leaves_whole_results_alone_and_the_next_call_writes_the_rest(run, tmp_path, monkeypatch, moment):
    save(tmp_path / "in/a.png", noise(16, 24, seed=1)), save(tmp_path / "in/b.png", noise(16, 24, seed=2))
    run("in", "--out", "whole")
    calls, fsync = [], os.fsync

    def kill(file):  # when a result is written, before or after it gets its name
        calls.append(file)
        os.kill(os.getpid(), signal.SIGKILL) if len(calls) == moment else fsync(file)

    assert outcome(run, "in", "--out", "o", before=lambda: setattr(os, "fsync", kill)).code == -signal.SIGKILL
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "o").glob("[!.]*")}
    assert len(found) == moment // 2 and found.items() <= whole.items()
    assert run("in", "--out", "o")[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").glob("[!.]*")} == whole


@pytest.mark.parametrize(
    "name, side, limit",
    [("s.png", 90, 10_000), ("s.tif", 90, 1000), ("s.tif", 90, 10_000), ("s.tif", 90, 18_000), ("s.tif", 200, 70_000)],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, name, side, limit):
    """It fills while a file is written, or when GDAL closes the file, of which GDAL reports nothing."""
    path = save(tmp_path / name, noise(side, side)) if name == "s.png" else geotiff(tmp_path / name, side=side)
    options = ["--model", str(trained), "--steps", "1", "--tile", "96"]
    limit_files = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    done = outcome(sample.main, [str(path), *options], before=limit_files)
    lines = [line for line in done.err if not line.startswith("_tiff")]  # libtiff's own
    assert done.code == 2 and len(lines) == 2 and name in lines[0] and lines[1] == "1 of 1 failed, see above", done
    assert names(tmp_path) == {name}
