"""Image quality: PSNR, SSIM and SCC, equal to torchmetrics' defaults. Images are (B, 3, H, W) in [0, 1]."""

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


def scc(image: Tensor, truth: Tensor) -> Tensor:
    """Spatial correlation coefficient (Zhou et al., IJRS 1998): two (B, 3, H, W) in [0, 1] -> (B,).

    Correlation of the Laplacians in 8x8 windows; 0 where one of them is constant. As in torchmetrics, the
    Laplacian mirrors the border and the windows see zeros beyond it. Raises ValueError if a side is under 8 pixels.
    """
    if min(image.shape[2:]) < 8:
        raise ValueError(f"SCC needs sides of at least 8 pixels, not {tuple(image.shape[2:])}")
    shape = (-1, 1, *image.shape[2:])
    laplacian = torch.full((1, 1, 3, 3), -1.0, dtype=image.dtype, device=image.device)
    laplacian[0, 0, 1, 1] = 8
    # replicating the border is mirroring it with the border itself, for a 3x3 filter
    a, b = (2 * F.conv2d(F.pad(x.reshape(shape), (1, 1, 1, 1), mode="replicate"), laplacian) for x in (image, truth))

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (4, 3, 4, 3)), 8, stride=1)

    covariance = average(a * b) - average(a) * average(b)
    deviations = [(average(x * x) - average(x) ** 2).clamp(min=0).sqrt() for x in (a, b)]
    scale = deviations[0] * deviations[1]
    score = torch.where(scale == 0, 0, covariance / scale)
    return score.reshape(image.shape).mean(dim=(1, 2, 3))
