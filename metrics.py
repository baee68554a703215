"""Image quality: PSNR and SSIM, equal to torchmetrics' defaults. Images are (B, 3, H, W) in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, for a peak of 1: two (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * (image - truth).square().mean(dim=(1, 2, 3)).log10()


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al., IEEE TIP 2004): two (B, 3, H, W) in [0, 1] -> (B,).

    11x11 Gaussian window with sigma 1.5; borders are reflected and count, as in torchmetrics.
    Raises ValueError if a side is under 6 pixels, too short to reflect.
    """
    if min(image.shape[2:]) < 6:
        raise ValueError(f"SSIM needs sides of at least 6 pixels, not {tuple(image.shape[2:])}")
    offsets = torch.arange(-5, 6, dtype=image.dtype, device=image.device)
    window = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    window = (window / window.sum()).expand(image.shape[1], 1, 1, 11)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window, groups=x.shape[1])
        return F.conv2d(x, window.transpose(2, 3), groups=x.shape[1])

    a, b = blur(image), blur(truth)
    variance_a = (blur(image * image) - a * a).clamp(min=0)
    variance_b = (blur(truth * truth) - b * b).clamp(min=0)
    covariance = blur(image * truth) - a * b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (variance_a + variance_b + c2))
    return score.mean(dim=(1, 2, 3))
