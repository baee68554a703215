"""metrics.py: PSNR and SSIM are torchmetrics', image by image."""

import pytest
import torch

from metrics import psnr, ssim

GOLDEN_PSNR, GOLDEN_SSIM = [36.9809, 22.9611, 14.3359], [0.98504, 0.77725, 0.37468]  # of torchmetrics 1.9.0


def images(height=40, width=33):
    """Smooth pictures and noisy copies, (3, 3, H, W) in [0, 1]: by formula, so that the golden numbers stay true."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    phase = torch.arange(9.0).reshape(3, 3, 1, 1)
    truth = 0.5 + 0.4 * torch.sin(6 * x + 9 * y * y + phase)
    strength = torch.tensor([0.02, 0.1, 0.3]).reshape(3, 1, 1, 1)
    return (truth + strength * torch.cos(91 * x * y + 53 * x + 7 * phase)).clamp(0, 1), truth


def test_psnr_and_ssim_are_the_recorded_numbers():
    image, truth = images()
    assert psnr(image, truth).tolist() == pytest.approx(GOLDEN_PSNR, abs=1e-3)
    assert ssim(image, truth).tolist() == pytest.approx(GOLDEN_SSIM, abs=1e-4)


@pytest.mark.parametrize("size", [(40, 33), (6, 6), (64, 64)])
def test_psnr_and_ssim_equal_torchmetrics_where_that_is_installed(size):
    metrics = pytest.importorskip("torchmetrics.functional.image")
    image, truth = images(*size)
    for i, (one, two) in enumerate(zip(image.split(1), truth.split(1))):
        assert float(psnr(image, truth)[i]) == pytest.approx(
            float(metrics.peak_signal_noise_ratio(one, two, data_range=1.0)), abs=1e-4
        )
        assert float(ssim(image, truth)[i]) == pytest.approx(
            float(metrics.structural_similarity_index_measure(one, two, data_range=1.0)), abs=1e-4
        )


def test_an_image_equals_itself():
    _, truth = images()
    assert psnr(truth, truth).isposinf().all()
    torch.testing.assert_close(ssim(truth, truth), torch.ones(3))


def test_an_image_too_small_for_the_window_is_refused():
    with pytest.raises(ValueError, match="sides of at least 6 pixels"):
        ssim(torch.zeros(1, 3, 5, 64), torch.zeros(1, 3, 5, 64))
