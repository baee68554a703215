"""evaluate.py: the yardsticks, the land cover read-back, and the command on a small dataset."""

import json

import numpy as np
import pytest
import torch

import evaluate
import synth
from cdiffset import CDiffSET, add_variance_channel, widen_input
from data import find_pairs, split_pairs
from pretrain import CONTEXT, TOKENS, small_unet, small_vae
from scheduler import DDPMScheduler


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "synthetic"
    synth.write_dataset(folder, pairs=30, size=64)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    unet = small_unet([16, 16], layers=1)
    widen_input(unet)
    add_variance_channel(unet)
    folder = tmp_path_factory.mktemp("model") / "small"
    model = CDiffSET(small_vae([8, 8, 8]), unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler())
    model.save_pretrained(folder)
    return folder


def test_a_local_mean_is_the_mean_of_49_pixels():
    image = torch.rand(2, 3, 20, 30)
    expected = image[1, :, 5:12, 8:15].mean()
    assert torch.isclose(evaluate.local_mean(image)[1, 8, 11], expected, atol=1e-6)


def test_the_look_up_recovers_colours_that_the_sar_level_determines():
    sar = torch.full((3, 16, 16), -0.5)
    sar[:, :, 8:] = 0.5
    right, left = torch.tensor([0.9, 0.1, -0.4]), torch.tensor([-1.0, 0.3, 0.2])
    eo = torch.where(sar > 0, right[:, None, None], left[:, None, None])
    mean, colours = evaluate.fit_colours([(sar, eo)])
    assert torch.allclose(mean, torch.tensor([-0.05, 0.2, -0.1]), atol=1e-6)
    assert torch.allclose(colours[evaluate.LEVELS // 4], left, atol=1e-6)
    assert torch.allclose(colours[-1], mean), "a level that never occurs gets the mean colour"


def test_land_cover_of_the_pure_class_colours_agrees_wholly_and_of_black_hardly():
    scene = synth.draw(seed=3, size=64)
    pure = synth.COLOURS[scene.classes].round().astype(np.uint8)
    assert evaluate.land_cover_agreement(pure, scene.classes) == 1
    assert evaluate.land_cover_agreement(np.zeros_like(pure), scene.classes) < 0.7


def test_the_command_scores_the_held_out_pairs_and_writes_what_it_printed(dataset, model, tmp_path, capsys):
    arguments = ["--data", str(dataset), "--model", str(model), "--out", str(tmp_path / "results"), "--steps", "2"]
    assert evaluate.main([*arguments, "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "results" / "metrics.json").read_text())
    _, held_out = split_pairs(find_pairs(dataset).pairs)
    assert [image["file"] for image in result["images"]] == [str(pair.eo) for pair in held_out]
    assert set(result["mean"]) == {"mean image", "colour look-up", "VAE", "model"}
    mean = np.mean([image["psnr"] for image in result["images"]])
    assert result["mean"]["model"]["psnr"] == pytest.approx(mean)
    assert f"{mean:.4f}" in capsys.readouterr().out
    assert (tmp_path / "results" / "contact_sheet.png").exists()


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
