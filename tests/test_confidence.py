"""confidence.py: its measures against closed forms, brute force and torchmetrics; the command on a small dataset."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_base
from PIL import Image

from cdiffset import CDiffSET
from data import find_pairs
from evaluate import training_colours
from experiments import confidence
from experiments.confidence import ause, calibration, detect, ranking, sparsification
from experiments.synth import write_dataset

SAMPLING = {"steps": 2, "spacing": "trailing", "seed": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of an untrained C-DiffSET."""
    folder = tmp_path_factory.mktemp("model")
    CDiffSET.from_pretrained(write_base(folder / "base")).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """20 pairs whose held-out ones hold both kinds of change."""
    folder = tmp_path_factory.mktemp("data") / "changing"
    write_dataset(folder, pairs=20, size=96, seed=5)
    return folder


# ----------------------------------------------------------------------------------------------------------
# Ranking


def scores_with_ties(n=400, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    return (rng.integers(0, 12, n) + 3 * truth).astype(np.float32), truth


def test_auroc_is_the_chance_that_a_true_one_scores_higher_ties_counting_half():
    score, truth = scores_with_ties()
    high, low = score[truth][:, None], score[~truth]
    assert ranking(score, truth)[0] == pytest.approx(np.mean((high > low) + 0.5 * (high == low)))


def test_average_precision_is_precision_summed_over_the_gains_of_recall():
    score, truth = scores_with_ties()
    expected, before = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        taken = score >= threshold
        recall = (taken & truth).sum() / truth.sum()
        expected += (recall - before) * (taken & truth).sum() / taken.sum()
        before = recall
    assert ranking(score, truth)[1] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_ranking_equals_torchmetrics_where_that_is_installed(seed):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    score, truth = scores_with_ties(seed=seed)
    both = torch.from_numpy(score / 20), torch.from_numpy(truth.astype(int))  # torchmetrics wants probabilities
    auroc, ap = ranking(score, truth)
    assert auroc == pytest.approx(float(metrics.binary_auroc(*both)), abs=1e-6)
    assert ap == pytest.approx(float(metrics.binary_average_precision(*both)), abs=1e-6)


def test_the_best_the_worst_and_no_order_at_all():
    truth = np.array([False] * 6 + [True] * 2)
    assert ranking(truth.astype(float), truth) == (1, 1)
    assert ranking(-np.arange(8.0), truth)[0] == 0
    assert ranking(np.zeros(8), truth) == (0.5, 0.25)


def test_there_is_nothing_to_rank_in_one_kind():
    with pytest.raises(ValueError, match="both kinds"):
        ranking(np.arange(3.0), np.ones(3, bool))


def test_one_kind_of_change_is_scored_without_the_other():
    change = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3])
    table = detect(np.array([0, 1, 2, 9, 8, 8, 5, -1, 99.0]), change)
    assert table["only in SAR"]["auroc"] == 6 / 8
    assert table["only in EO"]["auroc"] == 3 / 8


def test_a_kind_of_change_that_does_not_occur_is_left_out():
    assert detect(np.arange(4.0), np.array([0, 0, 1, 0])) == {"only in SAR": {"auroc": 2 / 3, "ap": 0.5}}


# ----------------------------------------------------------------------------------------------------------
# Error against confidence


def test_the_area_is_zero_for_the_true_errors_and_known_for_their_opposite():
    error = (np.random.default_rng(0).permutation(100_000) + 0.5) / 100_000  # squared errors, uniform in 0..1
    oracle, worst = sparsification(error, error), sparsification(error, -error)
    kept = np.arange(1, 101) / 100
    np.testing.assert_allclose(oracle, np.sqrt(kept / 2), rtol=1e-3)
    np.testing.assert_allclose(worst, np.sqrt(1 - kept / 2), rtol=1e-3)
    assert ause(oracle, oracle) == 0
    # the integral over the kept share k of sqrt(2 - k) - sqrt(k), from 0.01 on
    whole = 2 / 3 * (1.99**1.5 - 1) - 2 / 3 * (1 - 0.01**1.5)
    assert ause(worst, oracle) == pytest.approx(whole, abs=1e-3)


def test_without_any_knowledge_the_error_stays_what_it_is():
    error = np.full(1000, 4.0)
    assert sparsification(error, np.random.default_rng(0).random(1000)) == pytest.approx(np.full(100, 2))


# ----------------------------------------------------------------------------------------------------------
# Calibration


def test_variances_that_are_right_are_calibrated():
    rng = np.random.default_rng(0)
    predicted = np.exp(rng.normal(0, 1, 200_000))
    actual = predicted * rng.standard_normal((4, 200_000)).__pow__(2).mean(axis=0)
    measured = calibration(predicted, actual)
    assert measured["ratio"] == pytest.approx(1, abs=0.02)
    assert measured["error"] < 0.03
    # the logarithm of a mean of four squares has the variance trigamma(2) = pi^2 / 6 - 1
    assert measured["correlation"] == pytest.approx(1 / math.sqrt(math.pi**2 / 6), abs=0.01)


def test_variances_half_as_large_as_the_errors_are_off_by_one():
    predicted = np.linspace(0.1, 2, 1000)
    measured = calibration(predicted, 2 * predicted)
    assert (measured["ratio"], measured["error"], measured["correlation"]) == pytest.approx((2, 1, 1))
    np.testing.assert_allclose(measured["bins_actual"], 2 * np.array(measured["bins_predicted"]))


def test_a_variance_that_never_varies_correlates_with_nothing():
    measured = calibration(np.ones(100), np.arange(100.0))
    assert measured["correlation"] == 0
    assert measured["ratio"] == pytest.approx(49.5)


# ----------------------------------------------------------------------------------------------------------
# Scores


def test_the_local_deviation_is_that_of_49_pixels():
    image = torch.rand(2, 3, 20, 30)
    expected = image[1].mean(dim=0)[5:12, 8:15].std(correction=0)
    assert torch.isclose(confidence.deviation(image)[1, 8, 11], expected, atol=1e-5)


def test_the_local_gradient_of_a_ramp_is_its_slope():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    ramp = (0.03 * x + 0.04 * y).expand(1, 3, -1, -1)
    assert torch.allclose(confidence.gradient(ramp), torch.tensor(0.05), atol=1e-5)


def test_a_network_that_finds_the_noise_has_no_error_and_a_blind_one_the_noise_itself(model):
    model = CDiffSET.from_pretrained(model)
    z = torch.zeros(2, 4, 16, 16)
    scale = (1 - model.scheduler.alphas_cumprod[501]).sqrt()
    model.unet.forward = lambda x, t, context: torch.cat([x[:, 4:] / scale, torch.zeros_like(x[:, :1])], dim=1)
    error, variance = model.noise_error(z, z, 501, seeds=[3, 4])
    assert error.shape == variance.shape == (2, 1, 16, 16)
    assert error.abs().max() < 1e-10
    assert torch.allclose(variance, torch.tensor(1.0))
    model.unet.forward = lambda x, t, context: torch.zeros_like(x[:, :5])
    error, _ = model.noise_error(z, z, 501, seeds=[3, 4])
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(4))
    assert torch.allclose(error[1, 0], noise[0].square().mean(dim=0))


# ----------------------------------------------------------------------------------------------------------
# The command


def measured(dataset, model, out, *more):
    pytest.importorskip("matplotlib")
    arguments = ["--data", str(dataset), "--model", str(model), "--out", str(out), "--steps", "1", "--device", "cpu"]
    assert confidence.main([*arguments, *more]) == 0
    return json.loads((out / "confidence.json").read_text())


def test_the_command_writes_what_it_prints(changing, model, tmp_path, capsys):
    result = measured(changing, model, tmp_path, "--limit", "4")
    assert result["pairs"] == 4 and result["command"].startswith("python confidence.py --data")
    printed = capsys.readouterr().out
    for name, kinds in result["detection"]["scores"].items():
        assert name in printed and set(kinds) == set(confidence.KINDS)
        assert all(0 <= row["auroc"] <= 1 for row in kinds.values())
        assert all(f"{row['auroc']:.3f}" in printed for row in kinds.values())
    assert set(confidence.FILTERS) < set(result["detection"]["scores"])
    assert len(result["calibration"]["bands"]) == 10
    # before training the variance is 1, so the ratio is the squared error itself
    assert result["calibration"]["all"]["bins_predicted"] == pytest.approx([1] * 20, abs=1e-3)
    curves = result["error_curve"]
    assert curves["oracle"]["ause"] == 0 < curves["random"]["ause"]
    assert f"{curves['SAR deviation']['ause']:.3f}" in printed
    for name in ("calibration", "error"):
        assert (tmp_path / f"{name}.png").stat().st_size < 200_000
    with Image.open(tmp_path / "examples.png") as picture:
        assert picture.width == 4 + 5 * (96 + 4), "five columns"


def test_results_do_not_depend_on_the_batch_size(changing, model):
    network, pairs = CDiffSET.from_pretrained(model), find_pairs(changing).pairs[:3]
    _, colours = training_colours(pairs)
    one, two = (
        confidence.measure(network, pairs, colours, True, SimpleNamespace(batch_size=size, **SAMPLING))
        for size in (1, 2)
    )
    for name, values in one[0].items():
        np.testing.assert_allclose(values, two[0][name], rtol=1e-3, atol=1e-4, err_msg=name)
    for band, other in zip(one[-1], two[-1]):
        np.testing.assert_allclose(band, other, rtol=1e-3, atol=1e-4)


def test_pairs_without_a_change_are_said_to_have_none(dataset, model, tmp_path, capsys):
    result = measured(dataset, model, tmp_path, "--limit", "2")
    assert result["detection"] == {"share": {}, "scores": {}}
    assert "nothing changed in these pairs" in capsys.readouterr().out


def test_data_without_masks_gets_calibration_and_the_error_curve(dataset, model, tmp_path):
    data = tmp_path / "sar-eo"
    for number, pair in enumerate(find_pairs(dataset).pairs):
        for side, file in (("sar", pair.sar), ("eo", pair.eo)):
            (data / side).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, data / side / f"{number}.png")
    result = measured(data, model, tmp_path / "out", "--limit", "3")
    assert "detection" not in result
    assert result["error_curve"]["1 / confidence"]["ause"] > 0


def test_a_model_without_a_variance_is_refused(dataset, model, tmp_path):
    pytest.importorskip("matplotlib")
    stage_1 = CDiffSET.from_pretrained(model.parent / "base", variance_channel=False)
    stage_1.save_pretrained(tmp_path / "stage1")
    with pytest.raises(ValueError, match="no variance channel: train it further"):
        confidence.main(["--data", str(dataset), "--model", str(tmp_path / "stage1"), "--device", "cpu"])
