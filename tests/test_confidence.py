"""experiments/confidence.py: its measures against closed forms, brute force and torchmetrics; the command."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from cdiffset import CDiffSET
from data import find_pairs
from experiments import confidence
from experiments.confidence import ause, calibration, detect, ranking, sparsification
from experiments.synth import write_dataset


def scores_with_ties(n=400, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    return (rng.integers(0, 12, n) + 3 * truth).astype(np.float32), truth


# ----------------------------------------------------------------------------------------------------------
# Detection


@pytest.mark.parametrize("seed", range(3))
def test_ranking_follows_the_definitions_and_torchmetrics(seed):
    """AUROC: the probability that a true pixel scores higher, ties count half; AP: precision over rises of recall."""
    score, truth = scores_with_ties(seed=seed)
    high, low = score[truth][:, None], score[~truth]
    auroc, precision, before = np.mean((high > low) + 0.5 * (high == low)), 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        taken = score >= threshold
        recall = (taken & truth).sum() / truth.sum()
        precision += (recall - before) * (taken & truth).sum() / taken.sum()
        before = recall
    assert ranking(score, truth) == pytest.approx((auroc, precision))
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    both = torch.from_numpy(score / 20), torch.from_numpy(truth.astype(int))  # torchmetrics expects probabilities
    expected = float(metrics.binary_auroc(*both)), float(metrics.binary_average_precision(*both))
    assert ranking(score, truth) == pytest.approx(expected, abs=1e-6)


def test_the_best_the_worst_and_a_constant_score():
    truth = np.array([False] * 6 + [True] * 2)
    assert ranking(truth.astype(float), truth) == (1, 1)
    assert ranking(-np.arange(8.0), truth)[0] == 0
    assert ranking(np.zeros(8), truth) == (0.5, 0.25)


def test_each_kind_of_change_is_compared_with_unchanged_pixels_only():
    change = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3])
    table = detect(np.array([0, 1, 2, 9, 8, 8, 5, -1, 99.0]), change)
    assert (table["only in SAR: AUROC"], table["only in EO: AUROC"]) == (6 / 8, 3 / 8)
    only_sar = detect(np.arange(4.0), np.array([0, 0, 1, 0]))
    assert only_sar == {"only in SAR: AUROC": pytest.approx(2 / 3), "only in SAR: AP": pytest.approx(0.5)}


# ----------------------------------------------------------------------------------------------------------
# Sparsification and calibration


def test_the_area_is_zero_for_the_true_errors_and_known_for_the_reverse_order():
    error = (np.random.default_rng(0).permutation(100_000) + 0.5) / 100_000  # squared errors, uniform in 0..1
    oracle, worst = sparsification(error, error), sparsification(error, -error)
    kept = np.arange(1, 101) / 100
    np.testing.assert_allclose(oracle, np.sqrt(kept / 2), rtol=1e-3)
    np.testing.assert_allclose(worst, np.sqrt(1 - kept / 2), rtol=1e-3)
    assert ause(oracle, oracle) == 0
    # the integral over the kept share k of sqrt(2 - k) - sqrt(k), from 0.01 on
    whole = 2 / 3 * (1.99**1.5 - 1) - 2 / 3 * (1 - 0.01**1.5)
    assert ause(worst, oracle) == pytest.approx(whole, abs=1e-3)


def test_right_variances_are_calibrated_and_others_not():
    rng = np.random.default_rng(0)
    predicted = np.exp(rng.normal(0, 1, 200_000))
    right = calibration(predicted, predicted * (rng.standard_normal((4, 200_000)) ** 2).mean(axis=0))
    assert right["ratio"] == pytest.approx(1, abs=0.02) and right["error"] < 0.03
    # the logarithm of a mean of four squares has the variance trigamma(2) = pi^2 / 6 - 1
    assert right["correlation"] == pytest.approx(1 / math.sqrt(math.pi**2 / 6), abs=0.01)
    half = calibration(predicted, 2 * predicted)
    assert (half["ratio"], half["error"], half["correlation"]) == pytest.approx((2, 1, 1))
    np.testing.assert_allclose(half["bins_actual"], 2 * np.array(half["bins_predicted"]))
    constant = calibration(np.ones(100), np.arange(100.0))
    assert (constant["ratio"], constant["correlation"]) == (pytest.approx(49.5), 0)


# ----------------------------------------------------------------------------------------------------------
# Scores of pixels, and the command


def test_deviation_and_gradient_in_the_7x7_neighbourhood():
    image = torch.rand(2, 3, 20, 30)
    expected = image[1].mean(dim=0)[5:12, 8:15].std(correction=0)
    assert torch.isclose(confidence.deviation(image)[1, 8, 11], expected, atol=1e-5)
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    ramp = (0.03 * x + 0.04 * y).expand(1, 3, -1, -1)
    assert torch.allclose(confidence.gradient(ramp), torch.tensor(0.05), atol=1e-5)


def measured(dataset, model, out):
    pytest.importorskip("matplotlib")
    options = ["--data", str(dataset), "--model", str(model), "--out", str(out), "--limit", "4", "--device", "cpu"]
    assert confidence.main(options) == 0
    return json.loads((out / "confidence.json").read_text())


def test_the_command_writes_the_tables_that_it_prints(base, tmp_path, capsys):
    write_dataset(tmp_path / "data", pairs=20, size=96, seed=5)  # the held-out pairs have both kinds of change
    CDiffSET.from_pretrained(base).save_pretrained(tmp_path / "model")
    result = measured(tmp_path / "data", tmp_path / "model", tmp_path)
    assert result["pairs"] == 4 and result["command"].startswith("python -m experiments.confidence --data")
    tables = (tmp_path / "confidence.md").read_text()
    assert tables.rsplit("\n\n", 1)[0] in capsys.readouterr().out
    assert len(result["detection"]) == 10 and set(result["changed"]) == set(confidence.KINDS)
    for name, row in result["detection"].items():
        assert name in tables and len(row) == 4 and all(0 <= x <= 1 and f"{x:.3f}" in tables for x in row.values())
    # before training the variance is 1, so the ratio is the squared error
    assert result["calibration"]["all"]["bins_predicted"] == pytest.approx([1] * 20, abs=1e-3)
    curves = result["error_curve"]
    assert curves["oracle"]["ause"] == 0 < curves["random"]["ause"]
    assert all((tmp_path / f"{name}.png").stat().st_size < 200_000 for name in ("calibration", "error"))


def test_data_without_masks_gets_calibration_and_the_error_curve(dataset, trained, tmp_path):
    data = tmp_path / "sar-eo"
    for number, pair in enumerate(find_pairs(dataset).pairs):
        for side, file in (("sar", pair.sar), ("eo", pair.eo)):
            (data / side).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, data / side / f"{number}.png")
    result = measured(data, trained, tmp_path / "out")
    assert "detection" not in result and result["error_curve"]["1 / confidence"]["ause"] > 0


def test_a_model_without_a_variance_is_refused(dataset, base, tmp_path):
    CDiffSET.from_pretrained(base, variance_channel=False).save_pretrained(tmp_path / "stage1")
    with pytest.raises(ValueError, match="no variance channel: train it further"):
        measured(dataset, tmp_path / "stage1", tmp_path)
