"""evaluate.py: on a small data set, after interruptions, on two folders, and in both protocols."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import noise, save
from PIL import Image

import evaluate
from cdiffset import CDiffSET
from data import Pair, find_pairs, pair_folders
from experiments import synth
from images import Reading, grid, read_eo, read_sar, save_image
from metrics import frechet_distance, psnr
from sample import DEFAULT_SPACING, DEFAULT_STEPS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """30 pairs, of which 6 are test pairs: three batches of two."""
    folder = tmp_path_factory.mktemp("scenes") / "synthetic"
    synth.write_dataset(folder, pairs=30, size=64)
    return folder


@pytest.fixture(scope="module")
def command(dataset, trained):
    return ["--data", str(dataset), "--model", str(trained), "--steps", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of an evaluation without interruption; what it printed is in printed.txt beside it."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(command, folder)
    (folder.parent / "printed.txt").write_text(printed.getvalue())
    return folder


def run(arguments: list[str], out: Path) -> dict:
    """Evaluates; returns what is in metrics.json."""
    assert evaluate.main([*arguments, "--out", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "metrics.json").read_text())


def scored(out: Path) -> list[Path]:
    """The true images of an evaluation."""
    return [Path(image["file"]) for image in json.loads((out / "metrics.json").read_text())["images"]]


def test_the_test_pairs_are_scored_and_the_files_hold_what_is_printed(dataset, trained, whole):
    result, printed = json.loads((whole / "metrics.json").read_text()), (whole.parent / "printed.txt").read_text()
    split, _ = evaluate.held_out_pairs(find_pairs(dataset).pairs, trained)
    truth = [pair.eo for pair in split.test]
    assert scored(whole) == truth and len(truth) == 6
    assert list(result["mean"]) == ["mean image", "colour look-up", "VAE", "model"]
    scores = [image["psnr"] for image in result["images"]]
    pairs = [(read_eo(whole / "eo" / eo.relative_to(dataset)), read_eo(eo)) for eo in truth]
    assert scores == pytest.approx([float(psnr(a[None] / 2 + 0.5, b[None] / 2 + 0.5)) for a, b in pairs], abs=1e-4)
    assert result["mean"]["model"]["psnr"] == pytest.approx(np.mean(scores))
    assert f"{np.mean(scores):.3f}" in printed and "protocol standard: 6 images" in printed
    assert {"command", "settings", "date", "torch"} <= result.keys()
    titles = ["SAR", "EO", "generated", "confidence"]
    sheet = grid([[np.zeros((64, 64), np.uint8)] * len(titles)] * len(truth), titles)
    assert read_eo(whole / "contact_sheet.png").shape[1:] == sheet.shape[:2]


def test_image_i_starts_from_the_noise_of_seed_plus_i_in_every_batch_size(dataset, trained, whole):
    eo = scored(whole)[3]
    pair = next(pair for pair in find_pairs(dataset).pairs if pair.eo == eo)
    made, _ = CDiffSET.from_pretrained(trained).translate(read_sar(pair.sar)[None], 2, seed=3, spacing=DEFAULT_SPACING)
    assert (read_eo(whole / "eo" / eo.relative_to(dataset)) - made[0]).abs().max() < 1.01 / 255


def test_split_and_reading_are_those_of_the_training(dataset, trained, command, tmp_path):
    pairs = find_pairs(dataset).pairs
    scenes = sorted({pair.scene for pair in pairs})
    split = {"train": scenes[2:], "val": scenes[1:2], "test": scenes[:1]}
    (tmp_path / "split.json").write_text(json.dumps({"scenes": split}))
    model = CDiffSET.from_pretrained(trained)
    model.trained_on = {"sar": "full", "stretch": [10, 90], "eo": "full"}
    model.save_pretrained(tmp_path / "model")
    result = run([*command, "--model", str(tmp_path / "model")], tmp_path / "out")
    expected = [pair for pair in pairs if pair.scene == scenes[0]]
    assert scored(tmp_path / "out") == [pair.eo for pair in expected]
    assert result["split"].endswith("split.json") and result["settings"]["reading"]["stretch"] == [10, 90]
    sar = read_sar(expected[0].sar, Reading("full", (10, 90), "full"))
    made, _ = model.translate(sar[None], 2, seed=0, spacing=DEFAULT_SPACING)
    written = read_eo(tmp_path / "out" / "eo" / expected[0].eo.relative_to(dataset))
    assert (written - made[0]).abs().max() < 1.01 / 255


@pytest.mark.parametrize(
    ("options", "trained_on", "expected"),
    [
        ([], {}, ("auto", None, "auto")),
        ([], {"sar": "linear", "stretch": [2, 98], "eo": "full"}, ("linear", (2, 98), "full")),
        (["--scale", "db"], {"sar": "linear", "stretch": [2, 98], "eo": "full"}, ("db", None, "full")),
        (["--stretch", "1", "99"], {"sar": "db", "stretch": None, "eo": "full"}, ("auto", (1, 99), "full")),
        (["--eo-scale", "full"], {"sar": "db", "stretch": None, "eo": "reflectance"}, ("db", None, "full")),
    ],
)
def test_options_overrule_the_reading_that_the_model_remembers(options, trained_on, expected):
    args = evaluate.parse(["--data", "d", "--model", "m", *options])
    assert evaluate.wanted_reading(args, trained_on) == expected


def test_blocks_of_a_large_image_get_files_of_their_own():
    args = evaluate.parse(["--data", "data", "--model", "m", "--out", "out"])
    pair = Pair(Path("data/sar/a.tif"), Path("data/eo/a.tif"), "a", None)
    assert evaluate.translation_file(pair, args) == Path("out/eo/eo/a.png")
    window = pair._replace(window=(256, 512, 128, 128))
    assert evaluate.translation_file(window, args, "confidence") == Path("out/confidence/eo/a_256_512.png")


# ----------------------------------------------------------------------------------------------------------
# Resuming


@pytest.fixture()
def translations(monkeypatch) -> list[int]:
    """A list that grows by an entry a translated batch."""
    translate, calls = CDiffSET.translate, []
    monkeypatch.setattr(CDiffSET, "translate", lambda *arguments: (calls.append(1), translate(*arguments))[1])
    return calls


def assert_same_results(folder: Path, other: Path) -> None:
    """The same scores and the same pictures, to the last bit, and no other files."""
    ours, theirs = ({str(p.relative_to(f)): p for p in f.rglob("*") if p.is_file()} for f in (folder, other))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 + 1 + 2 * 6  # metrics.json, contact_sheet.png, translations.json; the lock; eo/, confidence/
    for name in ours.keys() - {".lock", "metrics.json"}:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    ours, theirs = (json.loads(files["metrics.json"].read_text()) for files in (ours, theirs))
    assert ours["mean"] == theirs["mean"] and ours["images"] == theirs["images"]


def test_an_interrupted_evaluation_continues_to_the_same_results(
    command, whole, tmp_path, translations, monkeypatch, capsys
):
    def save(path, picture):
        if len(list(tmp_path.rglob("*.png"))) == 7:  # three pairs and the confidence of the fourth
            raise KeyboardInterrupt
        save_image(path, picture)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "save_image", save)
        run(command, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    translations.clear()
    run(command, tmp_path)
    assert len(translations) == 2, "the second batch is translated again"
    assert "3 of 6 images are translated already" in capsys.readouterr().out
    assert_same_results(tmp_path, whole)


@pytest.mark.parametrize(("lost", "batches"), [([], 0), (["eo"], 2), (["confidence", "eo"], 2)])
def test_only_batches_with_missing_images_and_those_after_are_translated(
    lost, batches, dataset, command, whole, tmp_path, translations
):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for kind in lost:
        (tmp_path / kind / scored(whole)[3].relative_to(dataset)).unlink()  # the second image of the second batch
    run(command, tmp_path)
    assert len(translations) == batches
    assert_same_results(tmp_path, whole)


def test_a_folder_of_another_evaluation_is_refused(command, whole, trained, tmp_path):
    with pytest.raises(ValueError, match=r"another evaluation \(seed 0 is now 1\): give another --out, or delete"):
        run([*command, "--seed", "1"], whole)
    with pytest.raises(ValueError, match=r"stretch \[\] is now \[1.0, 99.0\]"):
        run([*command, "--stretch", "1", "99"], whole)
    changed = CDiffSET.from_pretrained(trained)
    changed.unet.conv_out.bias.data += 0.1
    changed.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"another evaluation \(unet \w+ is now \w+\)"):
        run([*command, "--model", str(tmp_path / "small")], whole)


def test_settings_without_a_translation_do_not_block_the_folder(command, tmp_path):
    with pytest.raises(ValueError, match="2000 sampling steps"):
        run([*command, "--steps", "2000"], tmp_path)
    run([*command, "--limit", "1"], tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Two folders


@pytest.fixture()
def folders(dataset, whole, tmp_path):
    """The model's images and the true ones, in two folders with the same names."""
    made, truth = tmp_path / "made", tmp_path / "truth"
    shutil.copytree(whole / "eo", made)
    for eo in scored(whole):
        place = truth / eo.relative_to(dataset)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(eo, place)
    return made, truth


def run_folders(folders: tuple[Path, Path], tmp_path: Path, *options: str) -> dict:
    return run(["--images", str(folders[0]), "--truth", str(folders[1]), *options], tmp_path / "scored")


def test_results_of_sample_py_are_paired_without_their_suffix(tmp_path):
    for name in ("made/a_eo.png", "made/a_confidence.png", "made/a_spread.png", "true/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, noise(16, 16))
    (pair,) = pair_folders(tmp_path / "made", tmp_path / "true")
    assert (pair.sar.name, pair.eo.name) == ("a_eo.png", "a.png")


def test_two_folders_get_the_scores_that_the_model_had(folders, whole, tmp_path):
    for png in list(folders[1].rglob("*.png")):  # another ending
        Image.open(png).save(png.with_suffix(".tif"))
        png.unlink()
    result = run_folders(folders, tmp_path)["mean"]
    expected = json.loads((whole / "metrics.json").read_text())["mean"]["model"]
    assert list(result) == ["images"] and result["images"] == pytest.approx(expected, rel=1e-6)
    assert (tmp_path / "scored" / "contact_sheet.png").exists()


def copy_with_another_ending(image: Path) -> None:
    shutil.copy(image, image.with_suffix(".jpeg"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (copy_with_another_ending, r"differ only in their endings"),
        (Path.unlink, r"1 image\(s\) without one of the same name in the other folder: '{1}.png'"),
        (lambda image: Image.new("RGB", (32, 64)).save(image), r"'{0}.png' is 32x64 but '{1}.png' is 64x64 pixels"),
    ],
)
def test_images_that_cannot_be_compared_are_named(damage, message, folders, tmp_path):
    image = min(folders[0].rglob("*.png"))
    partner = folders[1] / image.relative_to(folders[0])
    damage(image)
    with pytest.raises(
        ValueError, match=message.format(*(re.escape(str(x.with_suffix(""))) for x in (image, partner)))
    ):
        run_folders(folders, tmp_path)


def test_pairs_of_several_sizes_are_scored_one_at_a_time(folders, tmp_path):
    for folder in folders:
        Image.new("RGB", (32, 48)).save(sorted(folder.rglob("*.png"))[1])
    with pytest.raises(ValueError, match="--batch-size 1"):
        run_folders(folders, tmp_path)
    scores = run_folders(folders, tmp_path, "--batch-size", "1")["images"]
    assert len(scores) == 6 and scores[1]["psnr"] == evaluate.BEST


MODEL = ["--data", "d", "--model", "m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "d"], "give --data and --model"),
        (["--images", "i"], "two folders are needed"),
        (["--images", "i", "--truth", "t", "--steps", "3"], "--steps has no meaning"),
        ([*MODEL, "--protocol", "paper", "--spacing", "trailing"], "--protocol paper has leading"),
        ([*MODEL, "--protocol", "paper", "--batch-size", "2"], "--protocol paper has 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.parse(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Protocols, and the metrics of other packages


def test_the_paper_takes_the_first_100_pairs_one_at_a_time_in_50_leading_steps():
    args = evaluate.parse([*MODEL, "--protocol", "paper"])
    assert (args.batch_size, args.steps, args.spacing, args.seed) == (1, 50, "leading", 0)
    assert evaluate.chosen(list(range(250)), args) == list(range(100))
    args = evaluate.parse(MODEL)
    assert (args.steps, args.spacing) == (DEFAULT_STEPS, DEFAULT_SPACING)
    assert evaluate.chosen(list(range(250)), args) == list(range(250))


def test_the_paper_does_not_see_what_lies_outside_half_of_the_range():
    truth = torch.rand(1, 3, 16, 16) * 2 - 1
    clipped = truth.clamp(-0.5, 0.5)
    (paper,), (standard,) = (evaluate.score(clipped, truth, protocol) for protocol in ("paper", "standard"))
    assert paper["psnr"] == evaluate.BEST and standard["psnr"] < 20
    inside, other = truth * 0.5, truth.flip(3) * 0.5
    (paper,), (standard,) = (evaluate.score(inside, other, protocol) for protocol in ("paper", "standard"))
    assert paper["psnr"] == pytest.approx(standard["psnr"] - 20 * np.log10(2), abs=1e-4), "errors count twice"


@pytest.mark.parametrize(("protocol", "low"), [("standard", -1), ("paper", 0)])
def test_lpips_gets_its_own_range_or_the_one_that_the_paper_gave_it(protocol, low, folders, packages, tmp_path):
    result = run_folders(folders, tmp_path, "--protocol", protocol)["mean"]["images"]
    seen = [torch.cat(images) for images in zip(*sys.modules["lpips"].LPIPS.seen)]
    pngs = [png.relative_to(folders[0]) for png in sorted(folders[0].rglob("*.png"))]
    images = [torch.stack([read_eo(folder / png) for png in pngs]) for folder in folders]
    expected = [(x + 0.5).clamp(0, 1) for x in images] if protocol == "paper" else images
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected, strict=True))
    assert seen[1].min() < low + 0.2, "the truth uses nearly the whole range"
    assert result["lpips"] == pytest.approx(float((expected[0] - expected[1]).abs().mean()), rel=1e-4)
    features = [(x / 2 + 0.5).mean(dim=(2, 3)).numpy() for x in images]  # of the stand-in for Inception
    assert result["fid"] == pytest.approx(frechet_distance(*features), rel=1e-4)


def test_without_the_packages_a_line_says_what_to_install(folders, tmp_path, monkeypatch, capsys):
    for name in ("lpips", "pytorch_fid.inception"):
        monkeypatch.setitem(sys.modules, name, None)
    assert list(run_folders(folders, tmp_path)["mean"]["images"]) == ["psnr", "ssim", "scc"]
    printed = capsys.readouterr().out
    assert "no LPIPS: pip install lpips" in printed and "no FID: pip install pytorch-fid" in printed
