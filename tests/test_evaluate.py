"""evaluate.py and yardsticks.py: the yardsticks, the command on a small dataset and on two folders, going on."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Forked
from PIL import Image

import evaluate
import yardsticks
from cdiffset import CDiffSET, add_variance_channel, widen_input
from data import Pair, find_pairs, split_pairs
from experiments import synth
from experiments.pretrain import CONTEXT, TOKENS, small_unet, small_vae
from experiments.world import COLOURS
from images import grid, read_eo, read_sar
from metrics import frechet_distance, psnr
from sample import DEFAULT_SPACING, DEFAULT_STEPS
from scheduler import DDPMScheduler


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "synthetic"
    synth.write_dataset(folder, pairs=30, size=64)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    unet = small_unet([16, 16])
    widen_input(unet)
    add_variance_channel(unet)
    folder = tmp_path_factory.mktemp("model") / "small"
    model = CDiffSET(small_vae([8, 8, 8]), unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler())
    model.save_pretrained(folder)
    return folder


def test_a_local_mean_is_the_mean_of_49_pixels():
    image = torch.rand(2, 3, 20, 30)
    expected = image[1, :, 5:12, 8:15].mean()
    assert torch.isclose(yardsticks.local_mean(image)[1, 8, 11], expected, atol=1e-6)


def test_the_look_up_recovers_colours_that_the_sar_level_determines():
    sar = torch.full((3, 16, 16), -0.5)
    sar[:, :, 8:] = 0.5
    right, left = torch.tensor([0.9, 0.1, -0.4]), torch.tensor([-1.0, 0.3, 0.2])
    eo = torch.where(sar > 0, right[:, None, None], left[:, None, None])
    mean, colours = evaluate.fit_colours([(sar, eo)])
    assert torch.allclose(mean, torch.tensor([-0.05, 0.2, -0.1]), atol=1e-6)
    assert torch.allclose(colours[yardsticks.LEVELS // 4], left, atol=1e-6)
    assert torch.allclose(colours[-1], mean), "a level that never occurs gets the mean colour"


def test_land_cover_of_the_pure_class_colours_agrees_wholly_and_of_black_hardly():
    scene = synth.draw(seed=3, size=64)
    pure = COLOURS[scene.classes].round().astype(np.uint8)
    assert evaluate.land_cover_agreement(pure, scene.classes) == 1
    assert evaluate.land_cover_agreement(np.zeros_like(pure), scene.classes) < 0.7


def test_the_command_scores_the_held_out_pairs_and_writes_what_it_printed(dataset, model, tmp_path, capsys):
    result = run(["--data", str(dataset), "--model", str(model), "--steps", "2"], tmp_path)
    _, held_out = split_pairs(find_pairs(dataset).pairs)
    assert [image["file"] for image in result["images"]] == [str(pair.eo) for pair in held_out]
    assert set(result["mean"]) == {"mean image", "colour look-up", "VAE", "model"}
    mean = np.mean([image["psnr"] for image in result["images"]])
    assert result["mean"]["model"]["psnr"] == pytest.approx(mean)
    printed = capsys.readouterr().out
    assert f"{mean:.3f}" in printed and "protocol standard" in printed
    assert {"command", "commit", "settings", "date", "machine", "torch"} <= set(result)
    made = [tmp_path / "eo" / pair.eo.relative_to(dataset) for pair in held_out]
    scores = [psnr(read_eo(png)[None] / 2 + 0.5, read_eo(pair.eo)[None] / 2 + 0.5) for png, pair in zip(made, held_out)]
    assert [image["psnr"] for image in result["images"]] == pytest.approx(torch.cat(scores).tolist(), abs=0.01)
    titles = ["SAR", "EO", "generated", "confidence"]
    sheet = grid([[np.zeros((64, 64), np.uint8)] * len(titles)] * len(held_out), titles)
    assert read_eo(tmp_path / "contact_sheet.png").shape[1:] == sheet.shape[:2]


def test_the_split_is_the_one_that_training_wrote(dataset, tmp_path):
    pairs = find_pairs(dataset).pairs
    scenes = sorted({pair.scene for pair in pairs})
    split = {"scenes": {"train": scenes[1:], "test": scenes[:1]}}
    (tmp_path / "split.json").write_text(json.dumps(split))
    train, test, source = evaluate.held_out_pairs(pairs, tmp_path / "model")
    assert {pair.scene for pair in test} == {scenes[0]} and len(train) + len(test) == len(pairs)
    assert source.endswith("split.json")


def test_a_split_of_another_dataset_is_refused(dataset, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"scenes": {"train": [], "test": ["elsewhere"]}}))
    with pytest.raises(ValueError, match="split.json does not fit"):
        evaluate.held_out_pairs(find_pairs(dataset).pairs, tmp_path / "model")


def test_image_i_starts_from_the_noise_of_seed_plus_i_whatever_the_batch(dataset, model, tmp_path):
    arguments = ["--data", str(dataset), "--model", str(model), "--steps", "2", "--seed", "7", "--batch-size", "4"]
    files = [Path(image["file"]) for image in run(arguments, tmp_path)["images"]]
    pair = next(pair for pair in find_pairs(dataset).pairs if pair.eo == files[5])
    eo, _ = CDiffSET.from_pretrained(model).translate(
        read_sar(pair.sar)[None], steps=2, seed=7 + 5, spacing=evaluate.DEFAULT_SPACING
    )
    written = read_eo(tmp_path / "eo" / files[5].relative_to(dataset))
    assert (written - eo[0]).abs().max() < 1.01 / 255


# ----------------------------------------------------------------------------------------------------------
# Going on


@pytest.fixture()
def command(dataset, model):
    return ["--data", str(dataset), "--model", str(model), "--steps", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def whole(dataset, model, tmp_path_factory):
    """The folder of an evaluation in three batches of two that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(["--data", str(dataset), "--model", str(model), "--steps", "2", "--batch-size", "2"], folder)
    return folder


def run(arguments: list[str], out: Path) -> dict:
    """-> metrics.json"""
    assert evaluate.main([*arguments, "--out", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "metrics.json").read_text())


def interrupt(monkeypatch, batch: int) -> list[int]:
    """Has the translation of a batch end in Ctrl-C; -> a list that grows by an entry a translation."""
    translate, calls = CDiffSET.translate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return translate(*arguments)

    monkeypatch.setattr(CDiffSET, "translate", interrupted)
    return calls


def assert_same_results(folder: Path, other: Path) -> None:
    """The same scores, the same pictures, to the last bit; and nothing half-written beside them."""
    ours, theirs = ({str(p.relative_to(f)): p for p in f.rglob("*") if p.is_file()} for f in (folder, other))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 + 1 + 2 * 6  # metrics.json, contact_sheet.png, translations.json; the lock; eo/, confidence/
    for name in ours.keys() - {".lock", "metrics.json"}:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    ours, theirs = (json.loads(files["metrics.json"].read_text()) for files in (ours, theirs))
    assert ours["mean"] == theirs["mean"] and ours["images"] == theirs["images"]


def test_an_interrupted_evaluation_goes_on_to_the_same_results(command, whole, tmp_path, monkeypatch, capsys):
    calls = interrupt(monkeypatch, batch=3)
    with pytest.raises(KeyboardInterrupt):
        run(command, tmp_path)
    assert len(list((tmp_path / "eo").rglob("*.png"))) == 4
    run(command, tmp_path)
    assert len(calls) == 3 + 1, "only the third batch is translated again"
    assert "4 of 6 images are translated already" in capsys.readouterr().out
    assert_same_results(tmp_path, whole)


def test_a_finished_translation_is_not_done_again_and_is_scored_as_it_is(command, whole, monkeypatch):
    before = json.loads((whole / "metrics.json").read_text())
    interrupt(monkeypatch, batch=1)
    assert run(command, whole)["mean"] == before["mean"]


@pytest.mark.parametrize("kinds", [["eo"], ["confidence", "eo"]])
def test_a_batch_that_a_crash_cut_is_made_again_as_a_whole(kinds, dataset, command, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    fourth = Path(json.loads((whole / "metrics.json").read_text())["images"][3]["file"])  # the second of its batch
    for kind in kinds:
        (tmp_path / kind / fourth.relative_to(dataset)).unlink()
    calls = interrupt(monkeypatch, batch=-1)
    run(command, tmp_path)
    assert len(calls) == 2, "its batch, and the one after it"
    assert_same_results(tmp_path, whole)


def test_a_signal_leaves_whole_files_and_a_resumable_folder(command, whole, tmp_path):
    arguments = [*command, "--out", str(tmp_path), "--device", "cpu"]
    process = Forked(evaluate.main, arguments, before=lambda: slow_down(0.2))
    while len(list((tmp_path / "eo").rglob("ROIs*_p*.png"))) < 2:  # whole ones; temporary names begin with a dot
        assert process.process.is_alive()
        time.sleep(0.01)
    process.signal(signal.SIGINT)
    assert process.wait()[0] == 130
    made = [path for path in (tmp_path / "eo").rglob("*") if path.is_file()]
    assert 2 <= len(made) < 6, "the signal came too late to interrupt anything"
    assert not (tmp_path / "metrics.json").exists()
    for png in made:
        assert read_eo(png).shape == (3, 64, 64)
    run(command, tmp_path)
    assert_same_results(tmp_path, whole)


def slow_down(seconds: float) -> None:
    """Has each translation of this process take longer."""
    translate = CDiffSET.translate
    CDiffSET.translate = lambda *arguments: (time.sleep(seconds), translate(*arguments))[1]


def test_a_folder_of_another_evaluation_is_refused(command, whole, model, tmp_path):
    with pytest.raises(ValueError, match=r"another evaluation \(seed 0 is now 1\): give another --out, or delete"):
        run([*command, "--seed", "1"], whole)
    shutil.copytree(model, tmp_path / "small")
    changed = CDiffSET.from_pretrained(model)
    changed.unet.conv_out.bias.data += 0.1
    changed.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"another evaluation \(unet \w+ is now \w+\)"):
        run([*command, "--model", str(tmp_path / "small")], whole)


def test_settings_that_made_nothing_bind_nobody(command, tmp_path):
    with pytest.raises(ValueError, match="2000 sampling steps"):
        run([*command, "--steps", "2000"], tmp_path)
    run(command, tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Two folders


@pytest.fixture()
def folders(dataset, whole, tmp_path):
    """What the model made, and the truth, in folders alike."""
    made, truth = tmp_path / "made", tmp_path / "truth"
    shutil.copytree(whole / "eo", made)
    for png in made.rglob("*.png"):
        place = truth / png.relative_to(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dataset / png.relative_to(made), place)
    return made, truth


def test_two_folders_get_the_scores_that_the_model_had(folders, whole, tmp_path, capsys):
    made, truth = folders
    result = run(["--images", str(made), "--truth", str(truth)], tmp_path / "scored")
    expected = json.loads((whole / "metrics.json").read_text())["mean"]["model"]
    assert list(result["mean"]) == ["images"] and len(result["images"]) == 6
    for name in evaluate.METRICS:
        assert result["mean"]["images"][name] == pytest.approx(expected[name], rel=1e-6)
    assert "images" in capsys.readouterr().out
    assert (tmp_path / "scored" / "contact_sheet.png").exists()


def test_images_are_paired_by_their_paths_without_the_ending(folders, tmp_path):
    made, truth = folders
    for png in list(truth.rglob("*.png")):
        Image.open(png).save(png.with_suffix(".tif"))
        png.unlink()
    assert len(run(["--images", str(made), "--truth", str(truth)], tmp_path / "scored")["images"]) == 6
    first = next(made.rglob("*.png"))
    shutil.copy(first, first.with_suffix(".jpeg"))
    with pytest.raises(ValueError, match="differ only in their endings"):
        run(["--images", str(made), "--truth", str(truth)], tmp_path / "scored")


@pytest.mark.parametrize("side", [0, 1])
def test_images_without_a_partner_are_named(side, folders, tmp_path):
    missing, *_ = sorted(folders[side].rglob("*.png"))
    missing.unlink()
    partner = folders[1 - side] / missing.relative_to(folders[side])
    with pytest.raises(
        ValueError, match=re.escape(f"1 image(s) without one of the same name in the other folder: '{partner}'")
    ):
        run(["--images", str(folders[0]), "--truth", str(folders[1])], tmp_path / "scored")


def test_images_of_unequal_sizes_are_named(folders, tmp_path):
    made, truth = folders
    image = sorted(made.rglob("*.png"))[1]
    Image.new("RGB", (32, 64)).save(image)
    with pytest.raises(ValueError, match=f"{re.escape(str(image))}' is 32x64 but .* is 64x64 pixels"):
        run(["--images", str(made), "--truth", str(truth)], tmp_path / "scored")


def test_pairs_of_several_sizes_are_scored_one_at_a_time(folders, tmp_path):
    arguments = ["--images", str(folders[0]), "--truth", str(folders[1])]
    for folder in folders:
        Image.new("RGB", (32, 48)).save(sorted(folder.rglob("*.png"))[1])
    with pytest.raises(ValueError, match="--batch-size 1"):
        run(arguments, tmp_path / "scored")
    scores = run([*arguments, "--batch-size", "1"], tmp_path / "scored")["images"]
    assert len(scores) == 6 and scores[1]["psnr"] == evaluate.BEST


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "d"], "give --data and --model"),
        (["--images", "i"], "two folders are needed"),
        (["--images", "i", "--truth", "t", "--steps", "3"], "--steps has no meaning"),
        (
            ["--data", "d", "--model", "m", "--protocol", "paper", "--spacing", "trailing"],
            "--protocol paper has leading",
        ),
        (["--data", "d", "--model", "m", "--protocol", "paper", "--batch-size", "2"], "--protocol paper has 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.parse(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Protocols, and the metrics of other packages


def test_the_paper_takes_the_first_100_pairs_one_at_a_time_in_50_leading_steps():
    args = evaluate.parse(["--data", "d", "--model", "m", "--protocol", "paper"])
    assert (args.batch_size, args.steps, args.spacing, args.seed) == (1, 50, "leading", 0)
    assert evaluate.chosen(list(range(250)), args) == list(range(100))
    args = evaluate.parse(["--data", "d", "--model", "m"])
    assert (args.steps, args.spacing) == (DEFAULT_STEPS, DEFAULT_SPACING)
    assert evaluate.chosen(list(range(250)), args) == list(range(250))


def test_the_paper_does_not_see_what_lies_outside_half_of_the_range():
    truth = torch.rand(1, 3, 16, 16) * 2 - 1
    clipped = truth.clamp(-0.5, 0.5)
    pair = [Pair(Path("sar"), Path("eo"), "", None)]
    (paper,), (standard,) = (list(evaluate.score(clipped, truth, pair, p)) for p in ("paper", "standard"))
    assert paper["psnr"] == evaluate.BEST and standard["psnr"] < 20
    inside, other = truth * 0.5, truth.flip(3) * 0.5
    (paper,), (standard,) = (list(evaluate.score(inside, other, pair, p)) for p in ("paper", "standard"))
    assert paper["psnr"] == pytest.approx(standard["psnr"] - 20 * np.log10(2), abs=1e-4), "errors count twice"


@pytest.mark.parametrize(("protocol", "low"), [("standard", -1), ("paper", 0)])
def test_lpips_gets_what_it_expects_and_in_the_papers_protocol_what_the_paper_gave_it(
    protocol, low, folders, packages, tmp_path
):
    made, truth = folders
    result = run(["--images", str(made), "--truth", str(truth), "--protocol", protocol], tmp_path / "scored")
    seen = [torch.cat(images) for images in zip(*sys.modules["lpips"].LPIPS.seen)]
    pngs = sorted(made.rglob("*.png"))
    expected = [torch.stack([read_eo(folder / png.relative_to(made)) for png in pngs]) for folder in folders]
    if protocol == "paper":
        expected = [(x + 0.5).clamp(0, 1) for x in expected]
    for ours, theirs in zip(seen, expected):
        assert torch.equal(ours, theirs) and ours.shape[1:] == (3, 64, 64)
    assert seen[1].min() < low + 0.2, "the truth uses nearly the whole range"
    assert result["mean"]["images"]["lpips"] == pytest.approx(float((expected[0] - expected[1]).abs().mean()), rel=1e-4)


def test_fid_is_of_the_translations_that_were_written(command, dataset, packages, tmp_path, capsys):
    result = run(command, tmp_path)
    made = [tmp_path / "eo" / Path(image["file"]).relative_to(dataset) for image in result["images"]]
    pictures = ([read_eo(path) / 2 + 0.5 for path in paths] for paths in (made, [i["file"] for i in result["images"]]))
    features = [torch.stack(images).mean(dim=(2, 3)).numpy() for images in pictures]
    assert result["mean"]["model"]["fid"] == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert "lpips" in result["mean"]["VAE"] and "fid" not in result["mean"]["VAE"]
    assert "no LPIPS" not in capsys.readouterr().out


def test_without_the_packages_a_line_says_what_to_install(folders, tmp_path, monkeypatch, capsys):
    for name in ("lpips", "pytorch_fid.inception"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run(["--images", str(folders[0]), "--truth", str(folders[1])], tmp_path / "scored")
    assert list(result["mean"]["images"]) == ["psnr", "ssim", "scc"]
    printed = capsys.readouterr().out
    assert "no LPIPS: pip install lpips" in printed and "no FID: pip install pytorch-fid" in printed
