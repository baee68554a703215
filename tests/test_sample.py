"""The program: what it reads, what it writes and where, what it refuses, how it stops."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import scene
from cdiffset import CDiffSET, add_variance_channel, widen_input
from experiments.pretrain import CONTEXT, TOKENS, small_unet, small_vae
from images import confidence_picture, read_sar, to_uint8
from scheduler import DDPMScheduler

REPO = Path(sample.__file__).resolve().parent
SENTINEL1 = REPO.parent / "shared" / "data" / "sentinel1"
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore:Dataset has no geotransform")


def make_model(folder, base=False, variance=True):
    torch.manual_seed(0)
    unet = small_unet([8, 16])
    model = CDiffSET(small_vae([8, 16, 16]), unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler())
    if not base:
        widen_input(unet)
    if variance and not base:
        add_variance_channel(unet)
    for parameter in unet.parameters():  # the layers that begin at zero, too
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def run(model_path, monkeypatch, tmp_path, capsys):
    """Runs the program in tmp_path: run("in.png", "--seed", 3) -> exit code, lines on stdout, lines on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=model_path):
        code = sample.main(
            [str(a) for a in (*arguments, "--model", model)] + ["--steps=2"] * ("--steps" not in arguments)
        )
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def save(path, height=30, width=40, dtype=np.uint8, channels=(), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    high = np.iinfo(dtype).max
    Image.fromarray(np.random.default_rng(seed).integers(0, high, (height, width, *channels), dtype)).save(path)
    return path


def save_geotiff(path, height=90, width=70, **options):
    rasterio = pytest.importorskip("rasterio")
    values = np.random.default_rng(0).normal(-12, 4, (2, height, width)).astype(np.float32)
    values[:, :10, :15] = -9999
    profile = {"crs": "EPSG:32737", "transform": rasterio.transform.from_origin(500000, 9e6, 10, 10), "nodata": -9999}
    with rasterio.open(path, "w", "GTiff", width, height, 2, dtype="float32", **profile, **options) as file:
        file.write(values)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------
# What it writes


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.png", {}),
        ("a b'ü.png", {"dtype": np.uint16}),
        ("a.tif", {"dtype": np.uint16}),
        ("a.JPG", {"channels": (3,)}),
        ("a.jpeg", {"height": 8, "width": 9}),
        ("a.tiff", {"channels": (3,), "height": 64, "width": 33}),
    ],
)
def test_a_file_gets_the_pixels_of_translate(run, model_path, tmp_path, name, options):
    path = save(tmp_path / name, **options)
    code, out, err = run(name, "--seed", 3)
    stem = Path(name).stem
    assert code == 0 and not err and names(tmp_path) == {name, f"{stem}_eo.png", f"{stem}_confidence.png"}
    assert out == [f"wrote {f'{stem}_eo.png'!r}, {f'{stem}_confidence.png'!r}"]
    eo, confidence = CDiffSET.from_pretrained(model_path).translate(read_sar(path)[None], 2, 3, sample.DEFAULT_SPACING)
    assert np.array_equal(pixels(tmp_path / f"{stem}_eo.png"), to_uint8(eo[0]))
    assert np.array_equal(pixels(tmp_path / f"{stem}_confidence.png"), confidence_picture(confidence[0]))


def test_a_compiled_model_gives_the_same(run, tmp_path, monkeypatch):
    """With torch's own compiler this takes a minute, and the pixels differ by one level at most."""
    traced, compile_with = [], torch.nn.Module.compile

    def backend(graph, _inputs):
        traced.append(graph)
        return graph.forward

    def broken(_function):
        raise RuntimeError("no compiler\n\nand advice to developers")

    save(tmp_path / "a.png", 64, 32)
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, **options) if options else f)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_with(module, backend=backend))
    assert run("a.png", "--out", "plain")[0] == 0 and not traced
    assert run("a.png", "--out", "compiled", "--compile")[0] == 0 and traced
    plain, compiled = (pixels(tmp_path / folder / "a_eo.png") for folder in ("plain", "compiled"))
    assert np.array_equal(plain, compiled) and plain.std() > 1
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="^--compile: torch.compile does not work here: no compiler$"):
        run("a.png", "--compile")


def test_a_folder_keeps_its_tree_and_results_are_no_inputs(run, tmp_path):
    for name in ("b.png", "deep/a.png", "deep/er/c.png", "x_eo.png", "x_confidence.png", ".hidden/d.png", ".e.png"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    code, out, err = run("in", "--out", "results/here")
    assert code == 0 and not err and out == ["translated 3 images; results in 'results/here'"]
    stems = {"b", "deep/a", "deep/er/c"}
    expected = {f"{stem}_{kind}.png" for stem in stems for kind in ("eo", "confidence")}
    assert names(tmp_path / "results" / "here") == expected
    before = names(tmp_path / "in")
    assert run("in")[0] == 0 and run("in")[0] == 0
    assert names(tmp_path / "in") == before | expected
    for name in expected:
        assert (tmp_path / "in" / name).read_bytes() == (tmp_path / "results" / "here" / name).read_bytes()


def test_batches_give_the_pixels_of_single_files(run, tmp_path):
    sizes = [(30, 40), (32, 40), (31, 33), (50, 40), (26, 40), (30, 40), (30, 40)]
    for i, (height, width) in enumerate(sizes):
        save(tmp_path / "in" / f"{i}.png", height, width, seed=i)
    for options in (["--out", "one"], ["--out", "three", "--batch-size", 3], ["--out", "nine", "--batch-size", 9]):
        assert run("in", *options)[0] == 0
    for name in names(tmp_path / "one"):
        for other in ("three", "nine"):
            difference = pixels(tmp_path / "one" / name).astype(int) - pixels(tmp_path / other / name)
            assert abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3  # of rounding


def test_results_do_not_depend_on_the_other_files(run, tmp_path):
    for name in ("in/a.png", "in/b.png"):
        save(tmp_path / name)
    run("in", "--out", "all")
    assert np.array_equal(pixels(tmp_path / "all/a_eo.png"), pixels(tmp_path / "all/b_eo.png"))


def test_a_large_picture_is_translated_as_a_scene(run, model_path, tmp_path):
    path = save(tmp_path / "a.png", 70, 50)
    assert run("a.png", "--tile", 32)[0] == 0
    sar, model = read_sar(path), CDiffSET.from_pretrained(model_path)
    result = pixels(tmp_path / "a_eo.png")
    for top, left, eo, _ in scene.translate_scene(
        model, lambda a, b, c, d: sar[:, a:b, c:d], 70, 50, 32, 2, spacing=sample.DEFAULT_SPACING
    ):
        part = to_uint8(eo[0])
        assert np.array_equal(result[top:, left:][: part.shape[0], : part.shape[1]], part)


def test_no_data_is_transparent(run, tmp_path):
    image = np.full((30, 40, 2), 90, np.uint8)
    image[:5, :, 1] = 0
    Image.fromarray(image).save(tmp_path / "a.png")
    assert run("a.png")[0] == 0
    for name, channels in (("a_eo.png", 4), ("a_confidence.png", 2)):
        result = pixels(tmp_path / name)
        assert result.shape == (30, 40, channels)
        assert (result[:5, :, -1] == 0).all() and (result[5:, :, -1] == 255).all()


def test_samples_are_reduced_and_their_spread_is_written(run, tmp_path):
    save(tmp_path / "a.png")
    singles = []
    for seed in (5, 6, 7):
        run("a.png", "--seed", seed, "--out", f"{seed}")
        singles.append(pixels(tmp_path / f"{seed}" / "a_eo.png").astype(float))
    for how in ("mean", "median"):
        assert run("a.png", "--seed", 5, "--samples", 3, "--reduce", how, "--out", how, "--batch-size", 2)[0] == 0
        expected = getattr(np, how)(singles, axis=0)
        assert abs(pixels(tmp_path / how / "a_eo.png") - expected).max() <= 1.1
        spread = np.std(singles, axis=0, ddof=1).mean(axis=2)
        assert abs(pixels(tmp_path / how / "a_spread.png") - spread).max() <= 1.6
        assert names(tmp_path / how) == {"a_eo.png", "a_confidence.png", "a_spread.png"}


def test_median_of_an_even_number_lies_between_the_middle_ones():
    eo = torch.tensor([-1.0, 0.0, 0.2, 1.0])[:, None, None, None].expand(4, 3, 2, 2)
    assert (sample.reduce(eo, None, "median")["eo"] == round(127.5 * 1.1)).all()


def test_a_picture_says_how_to_make_it_again(run, model_path, tmp_path):
    save(tmp_path / "a.png")
    run("a.png", "--steps", 3, "--seed", 9, "--spacing", "trailing", "--dtype", "bfloat16", "--samples", 2)
    with Image.open(tmp_path / "a_eo.png") as image:
        about = dict(image.text)
    assert about["Software"].startswith("C-DiffSET ") and about["input"] == "a.png"
    first = pixels(tmp_path / "a_eo.png")
    options = [f"--{key}={value}" for key, value in about.items() if key not in ("Software", "input", "model")]
    assert sample.main(["a.png", "--model", about["model"], *options]) == 0
    assert np.array_equal(pixels(tmp_path / "a_eo.png"), first)


def test_contact_sheet(run, tmp_path):
    save(tmp_path / "in/a.png", 30, 40)
    save(tmp_path / "in/b.png", 300, 20)
    save_geotiff(tmp_path / "in/c.tif")
    assert run("in", "--samples", 2, "--contact-sheet", "new/sheet.png", "--out", "o", "--tile", 64)[0] == 0
    sheet = pixels(tmp_path / "new/sheet.png")
    assert sheet.shape[0] > 3 * 256 and sheet.shape[1] > 4 * 256 and sheet.std() > 20


def test_a_stage_1_model_writes_no_confidence_and_says_so(run, tmp_path):
    save(tmp_path / "a.png")
    code, out, _ = run("a.png", model=make_model(tmp_path / "stage1", variance=False))
    assert code == 0 and "no variance channel" in out[0] and out[1] == "wrote 'a_eo.png'"
    assert not (tmp_path / "a_confidence.png").exists()


def test_the_default_model_is_found_and_named_from_anywhere(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "TINY", model_path)
    save(tmp_path / "a.png")
    assert sample.main(["a.png", "--steps", "1"]) == 0
    assert "demonstration model" in capsys.readouterr().out.splitlines()[0]
    assert Path(sample.__file__).parent == REPO and sample.TINY.is_absolute()


# ----------------------------------------------------------------------------------------------------------
# GeoTIFF


@pytest.mark.parametrize("tile", [32, 96])
def test_a_geotiff_keeps_its_place(run, tmp_path, tile):
    rasterio = pytest.importorskip("rasterio")
    save_geotiff(tmp_path / "s.tif")
    assert run("s.tif", "--tile", tile, "--samples", 2, "--batch-size", 3)[0] == 0
    kinds = {"eo": ("uint8", 3), "confidence": ("float32", 1), "spread": ("float32", 1)}
    assert names(tmp_path) == {"s.tif", *(f"s_{kind}.tif" for kind in kinds)}
    with rasterio.open(tmp_path / "s.tif") as file:
        place = file.crs, file.transform, file.shape
    for kind, (dtype, count) in kinds.items():
        with rasterio.open(tmp_path / f"s_{kind}.tif") as file:
            assert (file.crs, file.transform, file.shape) == place
            assert file.dtypes == (dtype,) * count and file.tags()["steps"] == "2" and file.tags()["seed"] == "0"
            mask = file.dataset_mask()
            assert not mask[:10, :15].any() and mask[10:].all() and mask[:, 15:].all()
            assert kind == "eo" or file.nodata == -9999


def test_confidence_is_absolute_in_geotiffs(run, model_path, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path = save_geotiff(tmp_path / "s.tif")
    assert run("s.tif")[0] == 0
    _, expected = CDiffSET.from_pretrained(model_path).translate(
        read_sar(path)[None], 2, spacing=sample.DEFAULT_SPACING
    )
    with rasterio.open(tmp_path / "s_confidence.tif") as file:
        assert np.allclose(file.read(1)[10:], expected[0, 0, 10:], atol=1e-5)


def test_scale_and_stretch_change_what_the_model_sees(run, tmp_path):
    save_geotiff(tmp_path / "s.tif")
    rasterio = pytest.importorskip("rasterio")
    seen = []
    for i, options in enumerate(([], ["--scale", "db"], ["--scale", "linear"], ["--stretch", 10, 90])):
        assert run("s.tif", "--out", f"{i}", *options)[0] == 0
        with rasterio.open(tmp_path / f"{i}" / "s_eo.tif") as file:
            seen.append(file.read())
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[2], seen[3])


def test_16_bit_amplitudes_get_a_warning_and_a_stretch_silences_it(run, tmp_path):
    amplitudes = np.random.default_rng(0).integers(0, 700, (30, 40)).astype("uint16")
    Image.fromarray(amplitudes).save(tmp_path / "a.png")
    Image.fromarray(amplitudes.astype(">u2")).save(tmp_path / "big endian.tif")
    save(tmp_path / "b.png", dtype=np.uint16)
    code, _, lines = run("a.png", "b.png", "big endian.tif")
    assert code == 0 and [line[:14] for line in lines] == ["warning: 'a.pn", "warning: 'big "]
    assert "--stretch 1 99" in lines[0]
    assert not run("a.png", "--stretch", "1", "99")[2]


@pytest.mark.skipif(not SENTINEL1.is_dir(), reason="the real tiles are not here")
def test_real_sentinel_1_tiles(run, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    code, _, err = run(SENTINEL1, "--out", "o", "--steps", 1)
    assert code == 0 and not err
    tiles = list(SENTINEL1.glob("*.tif"))
    assert len(names(tmp_path / "o")) == 2 * len(tiles) > 0
    with rasterio.open(tmp_path / "o" / f"{tiles[0].stem}_eo.tif") as file:
        assert file.crs.to_epsg() == 32737 and file.read().std() > 1


def test_a_picture_beside_a_geotiff_of_its_name(run, tmp_path):
    save(tmp_path / "in" / "s.png")
    save_geotiff(tmp_path / "in" / "s.tif")
    code, _, err = run("in", "--out", "o")
    assert code == 0 and not err
    assert names(tmp_path / "o") == {f"s_{kind}.{end}" for kind in ("eo", "confidence") for end in ("tif", "png")}


# ----------------------------------------------------------------------------------------------------------
# What it refuses


def test_bad_files_are_named_and_the_others_done(run, tmp_path):
    save(tmp_path / "in/a.png")
    save(tmp_path / "in/z.png")
    save(tmp_path / "in/small.png", 7, 30)
    (tmp_path / "in/empty.png").touch()
    (tmp_path / "in/new\nline.jpg").write_bytes(b"nonsense")
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:200])
    whole = save_geotiff(tmp_path / "in/cut.tif", 300, 300).read_bytes()
    (tmp_path / "in/cut.tif").write_bytes(whole[: len(whole) // 2])
    code, out, err = run("in", "missing.png", "--out", "o", "--tile", 128)
    assert code == 2 and out == ["translated 2 images; results in 'o'"] and err[-1] == "6 of 8 failed, see above"
    for name in ("small.png", "empty.png", r"new\nline.jpg", "cut.png", "cut.tif", "missing.png"):
        assert sum(name in line.split(":")[1] for line in err[:-1]) == 1, name
    assert len(err) == 7
    assert names(tmp_path / "o") == {f"{stem}_{kind}.png" for stem in "az" for kind in ("eo", "confidence")}


def test_inputs_are_never_overwritten(run, tmp_path):
    for name in ("a.png", "a_eo.png", "b.png"):
        save(tmp_path / name)
    before = (tmp_path / "a_eo.png").read_bytes()
    code, _, err = run("a.png", "a_eo.png", "b.png")
    assert code == 2 and len(err) == 2 and "'a.png': its result would overwrite" in err[0]
    assert (tmp_path / "a_eo.png").read_bytes() == before
    assert names(tmp_path) - {"a.png", "a_eo.png", "b.png"} == {
        f"{stem}_{kind}.png" for stem in ("a_eo", "b") for kind in ("eo", "confidence")
    }
    assert run("a.png", "a_eo.png", "--out", "o")[0] == 0


def test_two_inputs_never_share_a_result(run, tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "a.jpg", seed=1)
    code, _, err = run("a.png", "a.jpg", "./a.png")
    assert code == 2 and len(err) == 2 and "'a.jpg': its results would overwrite those of 'a.png'" in err[0]


def test_a_failed_write_does_not_stop_the_others(run, tmp_path, monkeypatch):
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        save(tmp_path / name)
    write = sample.write_pictures

    def full_disk(source, *rest):
        if source.path.name == "b.png":
            raise OSError(28, "No space left on device")
        write(source, *rest)

    monkeypatch.setattr(sample, "write_pictures", full_disk)
    code, _, err = run("in", "--out", "o", "--batch-size", 4)
    assert code == 2 and "'in/b.png': [Errno 28] No space left on device" in err[0] and len(names(tmp_path / "o")) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.png", "--tile", 20], "multiples of 8"),
        (["a.png", "--steps", 1001], "1000 timesteps"),
        (["a.png", "--device", "nonsense"], "--device nonsense"),
        (["a.png", "--out", "a.png"], "is a file"),
        (["a.png", "--contact-sheet", "sheet.jpg"], "PNG"),
        (["a.png", "--contact-sheet", "a.png"], "no input"),
    ],
)
def test_settings_that_cannot_be(run, tmp_path, arguments, message):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        run(*arguments)
    assert names(tmp_path) == {"a.png"}


def test_a_seed_that_cannot_be(run, capsys):
    for seed in (-1, 2**32):
        with pytest.raises(SystemExit):
            run("a.png", "--seed", seed)
        assert f"--seed: '{seed}' is no whole number from 0 to 2^32 - 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("a.png", "--seed", 2**32 - 1, "--samples", 2)
    assert "the last seed must be below 2^32" in capsys.readouterr().err


def test_models_that_cannot_translate(run, tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="fine-tune it first: python train.py"):
        run("a.png", model=make_model(tmp_path / "base", base=True))
    with pytest.raises(ValueError, match="is not there"):
        run("a.png", model=tmp_path / "none")


def test_an_empty_folder_is_an_error(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="'empty': no PNG, JPEG or TIFF"):
        run("empty")


def test_numbers_that_are_not_finite_are_never_written():
    with pytest.raises(ValueError, match="not finite"):
        sample.reduce(torch.full((1, 3, 8, 8), float("nan")), None, "mean")


# ----------------------------------------------------------------------------------------------------------
# Processes


def test_an_image_that_cannot_be_read_harms_no_other_of_its_batch(run, tmp_path, monkeypatch):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    read = sample.Source.read

    def damaged(source, *place):
        if source.path.name == "b.png":  # as a block of a GeoTIFF that the overview has not seen
            raise OSError("TIFFReadEncodedTile failed")
        return read(source, *place)

    monkeypatch.setattr(sample.Source, "read", damaged)
    code, _, err = run("a.png", "b.png", "c.png", "--batch-size", "3")
    assert code == 2 and "b.png': TIFFReadEncodedTile failed" in err[0]
    assert sorted(path.name for path in tmp_path.glob("*_eo.png")) == ["a_eo.png", "c_eo.png"]


def test_processes_share_the_files_and_end_together_though_one_file_is_damaged(run, model_path, tmp_path):
    for i in range(1, 6, 2):
        save(tmp_path / "in" / f"{i}.png", seed=i)
    run("in", "--out", "alone")
    (tmp_path / "in" / "0.png").write_bytes(b"damaged")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPO / "sample.py")]
    arguments = ["in", "--out", "shared", "--model", str(model_path), "--device", "cpu"]
    done = subprocess.run([sys.executable, *launcher, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("'in/0.png' cannot be read") == 1
    assert names(tmp_path / "shared") == names(tmp_path / "alone")


def test_images_that_ask_for_the_same_results_stay_together():
    stems = {Path(name): Path(name).with_suffix("") for name in ("a.png", "b.png", "a.jpg", "c.png", "d.png")}
    shares = [{str(path) for path in sample.share(stems, rank, 3)} for rank in range(3)]
    assert shares == [{"a.png", "a.jpg", "d.png"}, {"b.png"}, {"c.png"}]


def start(*arguments, cwd, before=None):
    command = [sys.executable, str(REPO / "sample.py"), *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": before}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_scene_leaves_nothing(model_path, tmp_path, number, code):
    save_geotiff(tmp_path / "s.tif", 200, 200)
    process = start("s.tif", "--model", model_path, "--steps", 1000, "--tile", 32, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == 3  # the input and two temporary files
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and not err
    assert names(tmp_path) == {"s.tif"}


@pytest.mark.parametrize("name", ["s.tif", "s.png"])
def test_a_full_disk_leaves_nothing(model_path, tmp_path, name):
    save_geotiff(tmp_path / name, 200, 200) if name == "s.tif" else save(tmp_path / name, 200, 200)

    def limit():  # the size of any file, which fails as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    process = start(name, "--model", model_path, "--steps", 1, cwd=tmp_path, before=limit)
    out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("_tiff")]  # libtiff's own
    assert process.returncode == 2 and not out and len(lines) == 2 and repr(name) in lines[0], err
    assert names(tmp_path) == {name}


def test_errors_are_one_line(model_path, tmp_path):
    process = start("a.png", "--model", tmp_path / "none", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and not out and len(err.splitlines()) == 1 and err.startswith("error: ")
