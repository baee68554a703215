"""experiments/claims.py: its measures against hand-written numbers, and every command on a small dataset."""

import json
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from cdiffset import CDiffSET
from data import find_pairs, read_pair
from experiments import claims, report
from experiments.synth import read_mask
from images import Reading
from metrics import psnr


def test_the_frechet_distance_of_shifted_and_stretched_latents():
    z = torch.randn(50, 4, 16, 16)
    assert claims.frechet(z, z) == 0
    assert claims.frechet(z, z + 0.5) == pytest.approx(4 * 0.25, rel=1e-4)
    mean, deviation = z.mean(dim=(0, 2, 3), keepdim=True), z.std(dim=(0, 2, 3))
    expected = float((4 * deviation**2 + mean.flatten() ** 2).sum())
    assert claims.frechet(z, 3 * (z - mean)) == pytest.approx(expected, rel=1e-4)


def test_the_correlation_ignores_shift_and_scale_of_a_channel():
    z = torch.randn(5, 4, 8, 8)
    assert claims.correlation(z, z * torch.tensor([1, 2, 3, 4.0])[:, None, None] + 7) == pytest.approx(1, abs=1e-5)
    assert claims.correlation(z, -z) == pytest.approx(-1, abs=1e-5)
    assert abs(claims.correlation(z, torch.randn(5, 4, 8, 8))) < 0.2


def test_the_rmse_is_that_of_the_pixels_of_each_kind_of_change_in_all_images(dataset):
    pairs = [pair for pair in find_pairs(dataset).pairs if read_mask(pair, "change").any()][:2]
    truth = torch.stack([read_pair(pair)[1] for pair in pairs])
    change = np.stack([read_mask(pair, "change") for pair in pairs])
    error = np.choose(change, (0.1, 0.2, 0.3, 0.4)) * np.array([1, 1.5])[:, None, None]  # in a range of 2
    wrong = truth - torch.from_numpy(error)[:, None] * torch.where(truth > 0, 1, -1)
    args = Namespace(size=64, device="cpu", dtype="float32", reading=Reading())
    scores = claims.score(pairs, lambda _, numbers: wrong[list(numbers)], args)
    for name, kind in claims.CHANGES.items():
        expected = 127.5 * np.sqrt(np.square(error[change == kind]).mean()) if (change == kind).any() else None
        assert scores.get(name) == (expected and pytest.approx(expected, rel=1e-4))
    assert scores["PSNR, dB ↑"] == pytest.approx(float(psnr(wrong / 2 + 0.5, truth / 2 + 0.5).mean()), rel=1e-5)


def test_a_cell_is_the_mean_and_the_standard_deviation_over_the_seeds():
    assert report.cell([12.375]) == "12.38"
    assert report.cell([0.1, 0.3]) == "0.200 ± 0.141"


# ----------------------------------------------------------------------------------------------------------
# Trainings


def test_the_arms_share_the_vae_and_differ_in_weights_and_channels_as_stated(base, tmp_path):
    models = {name: claims.start(name, 0, base) for name in claims.ARMS}
    for name, outputs in {"cdiff": 5, "scratch": 5, "mse": 4, "regression": 4}.items():
        assert (models[name].unet.conv_in.in_channels, models[name].unet.conv_out.out_channels) == (8, outputs)
        assert torch.equal(models[name].vae.encoder.conv_in.weight, models["cdiff"].vae.encoder.conv_in.weight)
    loaded = CDiffSET.from_pretrained(base)
    theirs, ours = loaded.unet.state_dict(), models["cdiff"].unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    weights = [claims.start("scratch", seed, base).unet.mid_block.resnets[0].conv1.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    loaded.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="--base must be a base model"):
        claims.start("cdiff", 0, tmp_path / "model")


def test_the_regression_learns_the_eo_latent_from_the_sar_latent(base):
    model, images = claims.start("regression", 0, base), torch.rand(2, 2, 3, 32, 32) * 2 - 1
    z_sar, z_eo = (model.encode(x) for x in images)
    expected = (model.unet(torch.cat([z_sar, z_sar], dim=1), 0, model.prompt_embedding) - z_eo).abs().mean()
    assert torch.isclose(claims.regression_loss(model)(model.unet, list(images), [0, 1]), expected)


# ----------------------------------------------------------------------------------------------------------
# The commands


def check(claim, dataset, base, tmp_path, *more):
    """Runs a command; returns its results."""
    pytest.importorskip("matplotlib")
    arguments = [claim, "--base", str(base), "--out", str(tmp_path / "results"), "--seeds", "0", "1", "--limit", "2"]
    assert claims.main([*arguments, "--size", "64", "--device", "cpu", "--data", str(dataset), *more]) == 0
    result = json.loads((tmp_path / "results" / f"claims-{claim}.json").read_text())
    table = (tmp_path / "results" / f"claims-{claim}.md").read_text()
    assert result["command"].startswith(f"python -m experiments.claims {claim} --base") and result["command"] in table
    for row in result["results"].values():
        for values in row.values():
            assert all(map(math.isfinite, values)) and report.cell(values) in table
    return result["results"]


def test_vae_measures_reconstruction_and_latents_by_looks(dataset, base, tmp_path):
    results = check("vae", dataset, base, tmp_path)
    assert list(results) == ["no speckle", "8 looks", "4 looks", "2 looks", "1 look", "floor"]
    for column in ("the same, before the VAE, dB", "correlation to clean SAR ↑"):
        assert results["1 look"][column][0] < results["8 looks"][column][0]


def test_trainings_are_made_once_and_not_continued_with_other_settings(dataset, base, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BATCH", 2)
    more = "--train-steps", "2", "--runs", str(tmp_path / "runs")
    first = check("trainings", dataset, base, tmp_path, *more)
    assert set(first) == {
        *(a[0] for a in claims.ARMS.values()),
        "C-Diff, pretrained, mean of 4 samples",
        "colour look-up",
    }
    # untrained, a sample is noise, and the mean of several is nearer to any image
    assert first["C-Diff, pretrained, mean of 4 samples"]["SSIM ↑"][0] > first["C-Diff, pretrained"]["SSIM ↑"][0]
    assert (tmp_path / "results" / "claims-trainings.png").stat().st_size < 200_000
    log = tmp_path / "runs" / "cdiff-0" / "log.csv"
    before = log.read_text()
    again = check("trainings", dataset, base, tmp_path, *more)
    assert log.read_text() == before and again["L2, pretrained"]["SSIM ↑"] == first["L2, pretrained"]["SSIM ↑"]
    with pytest.raises(ValueError, match="made with other settings"):
        check("trainings", dataset, base, tmp_path, *more, "--train-steps", "3")


def test_steps_are_measured_with_both_spacings(dataset, base, tmp_path, monkeypatch):
    CDiffSET.from_pretrained(base).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(claims, "STEPS", (1, 3))
    results = check("steps", dataset, base, tmp_path, "--model", str(tmp_path / "model"))
    assert list(results) == ["leading, 1", "leading, 3", "trailing, 1", "trailing, 3"]
    assert all(row["seconds an image ↓"][0] > 0 and len(set(row["PSNR, dB ↑"])) == 2 for row in results.values())


def test_without_matplotlib_and_without_git(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        claims.main(["vae"])
    monkeypatch.setenv("PATH", "")
    assert report.commit() is None
