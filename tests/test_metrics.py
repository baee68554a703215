"""metrics.py: PSNR, SSIM and SCC equal torchmetrics'; LPIPS and FID by stand-ins for their packages; colours."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from record_golden import GOLDEN, metric_images, reference_metrics
from safetensors.torch import load_file

import metrics
from metrics import frechet_distance, missing_package, psnr, scc, ssim

OURS = {"psnr": psnr, "ssim": ssim, "scc": scc}


@pytest.mark.parametrize("name", OURS)
def test_the_metrics_are_the_recorded_numbers(name):
    recorded = load_file(GOLDEN / "metrics.safetensors")
    torch.testing.assert_close(OURS[name](*metric_images()), recorded[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(40, 33), (8, 8), (64, 65)])
@pytest.mark.parametrize("kind", ["pictures", "the paper's range", "patches of one colour"])
def test_the_metrics_equal_torchmetrics_where_that_is_installed(size, kind):
    pytest.importorskip("torchmetrics")
    image, truth = metric_images(*size)
    if kind == "the paper's range":
        image, truth = ((2 * x - 0.5).clamp(0, 1) for x in (image, truth))
    elif kind == "patches of one colour":
        truth = patches(truth)
    for name, expected in reference_metrics(image, truth).items():
        # in patches of one colour, torchmetrics' SCC correlates rounding errors, which differ between machines
        if (name, kind) != ("scc", "patches of one colour"):
            torch.testing.assert_close(OURS[name](image, truth), expected, atol=1e-4, rtol=0)


def patches(image):
    """Of 8x8 pixels and one colour each."""
    height, width = image.shape[2:]
    return image[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width]


def scc_in_whole_numbers(image, truth):
    """The definition, window by window: two (B, 3, H, W) of multiples of 1/255 -> (B,). Nothing is rounded away."""
    scores = []
    for planes in zip(*((255 * x).round().long().flatten(0, 1).numpy() for x in (image, truth))):
        padded = [np.pad(plane, 1, "edge") for plane in planes]
        (height, width), around = planes[0].shape, [(i, j) for i in range(3) for j in range(3)]
        a, b = (
            np.pad(9 * x - sum(wide[i : i + height, j : j + width] for i, j in around), (4, 3))
            for x, wide in zip(planes, padded)
        )
        correlation = []
        for y, x in np.ndindex(height, width):
            u, v = a[y : y + 8, x : x + 8], b[y : y + 8, x : x + 8]
            var_u, var_v = (64 * (w * w).sum() - w.sum() ** 2 for w in (u, v))
            covariance = 64 * (u * v).sum() - u.sum() * v.sum()
            correlation.append(covariance / np.sqrt(float(var_u) * float(var_v)) if var_u and var_v else 0.0)
        scores.append(np.mean(correlation))
    return torch.tensor(scores).reshape(-1, 3).mean(dim=1)


@pytest.mark.parametrize("size", [(40, 33), (8, 8)])
@pytest.mark.parametrize("flat", [False, True])
def test_scc_is_its_definition_also_where_an_image_has_one_colour(size, flat):
    image, truth = metric_images(*size)
    if flat:
        truth = patches(truth)
    torch.testing.assert_close(scc(image, truth).double(), scc_in_whole_numbers(image, truth), atol=1e-6, rtol=0)


def test_an_image_equals_itself():
    truth = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert psnr(truth, truth).isposinf().all()
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2))
    torch.testing.assert_close(scc(truth, truth), torch.ones(2))


def test_nothing_correlates_with_black():
    _, truth = metric_images()
    assert scc(torch.zeros_like(truth), truth).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("metric", "side"), [(ssim, 5), (scc, 7)])
def test_an_image_too_small_for_the_window_is_refused(metric, side):
    with pytest.raises(ValueError, match=f"sides of at least {side + 1} pixels"):
        metric(torch.zeros(1, 3, side, 64), torch.zeros(1, 3, side, 64))


def features(mean: list[float], scale: list[float], rotation: np.ndarray, seed: int) -> np.ndarray:
    """Points (1000, 3) of exactly these means, and standard deviations along the rotated axes."""
    x = np.random.RandomState(seed).standard_normal((1000, 3))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # unit covariance
    return x * scale @ rotation.T + mean


def test_frechet_distance_of_normals_with_common_axes_is_that_of_their_means_and_deviations():
    rotation = np.linalg.qr(np.random.RandomState(3).standard_normal((3, 3)))[0]
    a, b = features([1, 2, 3], [1, 2, 0], rotation, 0), features([1, 0, 3], [3, 1, 0], rotation, 1)
    assert frechet_distance(a, b) == pytest.approx(2**2 + (1 - 3) ** 2 + (2 - 1) ** 2, abs=1e-6)


def test_frechet_distance_equals_torchmetrics_where_that_is_installed():
    reference = pytest.importorskip("torchmetrics.image.fid")
    rng = np.random.RandomState(0)
    a, b = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((30, 6)) + 1
    statistics = [torch.from_numpy(s) for x in (a, b) for s in (x.mean(axis=0), np.cov(x, rowvar=False))]
    assert frechet_distance(a, b) == pytest.approx(float(reference._compute_fid(*statistics)), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------
# The optional packages, by the stand-ins of conftest.packages


@pytest.mark.parametrize("metric", ["lpips", "fid"])
def test_what_is_missing_is_one_line_with_the_command_that_gets_it(metric, packages, monkeypatch):
    assert missing_package(metric) is None
    module, url = metrics.PACKAGES[metric]
    weights = packages / Path(url).name
    weights.unlink()
    assert missing_package(metric) == f"its weights are not there: curl --create-dirs -Lo {weights} {url}"
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert missing_package(metric).startswith(f"pip install {'lpips' if metric == 'lpips' else 'pytorch-fid'} (")


def test_lpips_is_asked_for_vgg_and_gives_a_number_an_image(packages):
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(metrics.load_lpips("cpu")(a, b), (a - b).abs().mean(dim=(1, 2, 3)))


def test_inception_is_asked_for_its_2048_features_and_gives_a_row_an_image(packages):
    images = torch.rand(4, 3, 16, 16)
    np.testing.assert_allclose(metrics.load_inception("cpu")(images), images.mean(dim=(2, 3)).numpy())


# ----------------------------------------------------------------------------------------------------------
# Translations by simple means


def test_a_local_mean_is_the_mean_of_49_pixels():
    image = torch.rand(2, 3, 20, 30)
    expected = image[1, :, 5:12, 8:15].mean()
    assert torch.isclose(metrics.local_mean(image)[1, 8, 11], expected, atol=1e-6)


def test_the_look_up_recovers_colours_that_the_sar_level_determines():
    sar = torch.full((3, 16, 16), -0.5)
    sar[:, :, 8:] = 0.5
    right, left = torch.tensor([0.9, 0.1, -0.4]), torch.tensor([-1.0, 0.3, 0.2])
    eo = torch.where(sar > 0, right[:, None, None], left[:, None, None])
    mean, colours = metrics.fit_colours([(sar, eo)])
    assert torch.allclose(mean, torch.tensor([-0.05, 0.2, -0.1]), atol=1e-6)
    assert torch.allclose(colours[-1], mean), "a level that never occurs gets the mean colour"
    away = [0, 1, 2, 3, 12, 13, 14, 15]  # columns whose neighbourhood lies on one side
    assert torch.allclose(metrics.look_up(colours, sar[None])[0, :, :, away], eo[:, :, away], atol=1e-6)
