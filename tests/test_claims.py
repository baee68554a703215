"""claims.py and study.py: what is compared with what, the scores, and every command on a small dataset."""

import json
import math
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cdiffset import CDiffSET
from data import find_pairs, read_mask, read_pair
from experiments import claims, report, study
from experiments.study import ARMS, start
from metrics import psnr


def test_the_frechet_distance_of_shifted_and_stretched_latents():
    z = torch.randn(50, 4, 16, 16)
    assert claims.frechet(z, z) == 0
    assert claims.frechet(z, z + 0.5) == pytest.approx(4 * 0.25, rel=1e-4)
    deviations = z.std(dim=(0, 2, 3))
    assert claims.frechet(z, 3 * (z - z.mean(dim=(0, 2, 3), keepdim=True))) == pytest.approx(
        float((4 * deviations**2 + z.mean(dim=(0, 2, 3)) ** 2).sum()), rel=1e-4
    )


def test_the_correlation_knows_neither_shift_nor_scale_of_a_channel():
    z = torch.randn(5, 4, 8, 8)
    assert claims.correlation(z, z * torch.tensor([1, 2, 3, 4.0])[:, None, None] + 7) == pytest.approx(1, abs=1e-5)
    assert claims.correlation(z, -z) == pytest.approx(-1, abs=1e-5)
    assert abs(claims.correlation(z, torch.randn(5, 4, 8, 8))) < 0.2


# ----------------------------------------------------------------------------------------------------------
# What is compared


def test_the_pretrained_arms_start_from_the_base_and_the_scratch_arm_from_its_seed(base):
    theirs = CDiffSET.from_pretrained(base).unet.state_dict()
    ours = start(base, ARMS["cdiff"], 0).unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    scratch, again, other = (start(base, ARMS["scratch"], seed).unet.state_dict() for seed in (0, 0, 1))
    name = "mid_block.resnets.0.conv1.weight"
    assert scratch[name].shape == theirs[name].shape and not torch.equal(scratch[name], theirs[name])
    assert torch.equal(scratch[name], again[name]) and not torch.equal(scratch[name], other[name])


def test_all_arms_share_the_vae_and_have_the_channels_that_they_need(base):
    channels = {"cdiff": (8, 5), "scratch": (8, 5), "mse": (8, 4), "regression": (8, 4)}
    models = {name: start(base, arm, 0) for name, arm in ARMS.items()}
    for name, model in models.items():
        assert (model.unet.conv_in.in_channels, model.unet.conv_out.out_channels) == channels[name]
        assert torch.equal(model.vae.encoder.conv_in.weight, models["cdiff"].vae.encoder.conv_in.weight)


def test_a_trained_model_is_no_base(base, tmp_path):
    CDiffSET.from_pretrained(base).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="--base is a model to start from"):
        start(tmp_path / "model", ARMS["cdiff"], 0)


def test_the_regression_learns_the_eo_latent_from_the_sar_latent(base):
    model, images = start(base, ARMS["regression"], 0), torch.rand(2, 2, 3, 32, 32) * 2 - 1
    z_sar, z_eo = (model.encode(x) for x in images)
    expected = (model.unet(torch.cat([z_sar, z_sar], dim=1), 0, model.prompt_embedding) - z_eo).abs().mean()
    assert torch.isclose(study.regression_loss(model)(model.unet, list(images), [0, 1]), expected)


# ----------------------------------------------------------------------------------------------------------
# Scores


def test_the_error_is_told_apart_by_what_changed_over_the_pixels_of_all_images(dataset):
    pairs = [pair for pair in find_pairs(dataset).pairs if read_mask(pair, "change").any()][:2]
    truth = torch.stack([read_pair(pair)[1] for pair in pairs])
    change = np.stack([read_mask(pair, "change") for pair in pairs])
    error = np.choose(change, (0.1, 0.2, 0.3, 0.4)) * np.array([1, 1.5])[:, None, None]  # of a range of 2
    wrong = truth - torch.from_numpy(error)[:, None] * torch.where(truth > 0, 1, -1)
    args = Namespace(size=64, device="cpu", dtype="float32")
    scores = study.score(pairs, lambda _, numbers: wrong[list(numbers)], args)
    for name, kind in study.CHANGES.items():
        if (change == kind).any():
            assert scores[name] == pytest.approx(127.5 * np.sqrt(np.square(error[change == kind]).mean()), rel=1e-4)
        else:
            assert name not in scores
    assert scores["psnr"] == pytest.approx(float(psnr(wrong / 2 + 0.5, truth / 2 + 0.5).mean()), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
# The commands


def check(claim, dataset, base, tmp_path, *more):
    """Runs a command: -> its results, the table it wrote."""
    pytest.importorskip("matplotlib")
    arguments = [claim, "--base", str(base), "--out", str(tmp_path / "results"), "--seeds", "0", "1", "--limit", "2"]
    arguments += ["--size", "64", "--device", "cpu", "--data", str(dataset), *more]
    assert claims.main(arguments) == 0
    stem = tmp_path / "results" / f"claims-{claim}"
    assert 1000 < stem.with_suffix(".png").stat().st_size < 200_000
    result = json.loads(stem.with_suffix(".json").read_text())
    assert result["command"].startswith(f"python claims.py {claim} --base") and result["settings"]["seeds"] == [0, 1]
    table = stem.with_suffix(".md").read_text()
    assert result["command"] in table and result["machine"] in table
    for row in result["results"].values():
        for name, values in row.items():
            assert all(map(math.isfinite, values))
            assert claims.cell(values) in table or name not in claims.TITLES[claim]
    return result["results"]


def training(tmp_path):
    return "--train-steps", "2", "--batch-size", "2", "--runs", str(tmp_path / "runs")


def test_vae_measures_reconstruction_and_latents_by_looks(dataset, base, tmp_path):
    results = check("vae", dataset, base, tmp_path)
    assert list(results) == ["no speckle", "8 looks", "4 looks", "2 looks", "1 look", "floor"]
    assert results["1 look"]["psnr_speckled"][0] < results["8 looks"]["psnr_speckled"][0]
    assert results["1 look"]["correlation"][0] < results["8 looks"]["correlation"][0]


def test_trainings_are_compared_made_once_and_gone_on_with_unless_settings_differ(dataset, base, tmp_path):
    more = training(tmp_path)
    first = check("trainings", dataset, base, tmp_path, *more)
    titles = {name: arm.title for name, arm in ARMS.items()}
    assert set(first) == {*titles.values(), claims.MEAN_OF_SAMPLES, claims.LOOK_UP}
    assert {"rmse_unchanged", "prediction_error"} < set(first[titles["mse"]])
    # untrained, a sample is noise, and the mean of several is nearer to anything
    assert first[claims.MEAN_OF_SAMPLES]["psnr"][0] > first[titles["cdiff"]]["psnr"][0]
    assert len(first[claims.LOOK_UP]["psnr"]) == 1
    log = tmp_path / "runs" / "cdiff-0" / "log.csv"
    assert {path.name for path in log.parents[1].iterdir()} == {f"{name}-{seed}" for name in ARMS for seed in (0, 1)}
    before = log.read_text()
    assert check("trainings", dataset, base, tmp_path, *more) == first
    assert log.read_text() == before, "its speeds are those of the first time"
    with pytest.raises(ValueError, match="made with other settings"):
        check("trainings", dataset, base, tmp_path, *more, "--batch-size", "1")


def test_a_training_that_a_signal_stops_ends_the_command_with_its_code(dataset, base, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "fit", lambda *_, **__: 130)
    with pytest.raises(SystemExit) as stop:
        check("trainings", dataset, base, tmp_path, *training(tmp_path))
    assert stop.value.code == 130
    assert not (tmp_path / "results" / "claims-trainings.json").exists()


def test_steps_are_counted_for_both_spacings(dataset, base, tmp_path, monkeypatch):
    CDiffSET.from_pretrained(base).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(claims, "STEPS", (1, 3))
    results = check("steps", dataset, base, tmp_path, "--model", str(tmp_path / "model"))
    assert list(results) == ["leading, 1", "leading, 3", "trailing, 1", "trailing, 3"]
    assert all(row["seconds"][0] > 0 and row["psnr"][0] != row["psnr"][1] for row in results.values())


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        claims.main(["vae"])


def test_where_there_is_no_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.commit() is None
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="\n"))
    assert report.commit() is None


def test_one_value_has_no_spread():
    assert claims.cell([12.375]) == "12.38"
    assert claims.cell([0.1, 0.3]) == "0.200 ± 0.141"


def test_the_scores_of_several_seeds_stand_in_one_row():
    results = {}
    for value in (1.0, 2.0):
        claims.collect(results, "it", {"psnr": value, "ssim": value / 10})
    claims.collect(results, "it", {"scc": 0.5})
    assert results == {"it": {"psnr": [1, 2], "ssim": [0.1, 0.2], "scc": [0.5]}}
