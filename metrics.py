"""Metrics of image quality, and simple translations that a model should beat.

PSNR, SSIM and SCC are computed here and equal torchmetrics' defaults. LPIPS and FID use the networks of the packages
lpips and pytorch-fid, which are optional.
"""

import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import one_line

PACKAGES = {  # metric: (module, address of its weights)
    "lpips": ("lpips", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "fid": (
        "pytorch_fid.inception",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
}
LEVELS = 64  # of SAR brightness, in the colour look-up

# ----------------------------------------------------------------------------------------------------------
# PSNR, SSIM, SCC. On 8-bit images they differ from torchmetrics by less than 1e-4 (tests/test_metrics.py).


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, with a peak of 1: two (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * (image - truth).square().mean(dim=(1, 2, 3)).log10()


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al., IEEE TIP 2004): two (B, 3, H, W) in [0, 1] -> (B,).

    The window is an 11x11 Gaussian with sigma 1.5. As in torchmetrics, the border is reflected and its pixels count.
    ValueError: a side is shorter than 6 pixels, too short to be reflected.
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

    The mean correlation of the two Laplacians in 8x8 windows; 0 for a window where one of them is constant. As in
    torchmetrics, the border is mirrored for the Laplacian and padded with zeros for the windows.
    ValueError: a side is shorter than 8 pixels.
    """
    if min(image.shape[2:]) < 8:
        raise ValueError(f"SCC needs sides of at least 8 pixels, not {tuple(image.shape[2:])}")
    shape = (-1, 1, *image.shape[2:])
    # float64, in which Laplacians of float32 numbers are exact: in float32, the score of a flat area would be the
    # correlation of rounding errors
    laplacian = torch.full((1, 1, 3, 3), -1.0, dtype=torch.float64, device=image.device)
    laplacian[0, 0, 1, 1] = 8
    # for a 3x3 filter, to repeat the border equals torchmetrics' mirroring
    a, b = (F.conv2d(F.pad(x.double().reshape(shape), [1] * 4, mode="replicate"), laplacian) for x in (image, truth))

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (4, 3, 4, 3)), 8, stride=1)

    covariance = average(a * b) - average(a) * average(b)
    deviations = [(average(x * x) - average(x) ** 2).clamp(min=0).sqrt() for x in (a, b)]
    scale = deviations[0] * deviations[1]
    score = torch.where(scale == 0, 0, covariance / scale)
    return score.reshape(image.shape).mean(dim=(1, 2, 3)).to(image.dtype)


# ----------------------------------------------------------------------------------------------------------
# LPIPS and FID, which need optional packages


def missing_package(metric: str) -> str | None:
    """Says in one line what is missing for "lpips" or "fid", and how to install it. None: nothing. No downloads."""
    module, url = PACKAGES[metric]
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return f"pip install {module.split('.')[0].replace('_', '-')} ({error})"
    except (ImportError, RuntimeError) as error:  # usually a torchvision for another torch
        return f"{module} is installed but cannot be imported ({one_line(error)})"
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    return None if path.is_file() else f"its weights are not there: curl --create-dirs -Lo {path} {url}"


def load_lpips(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Loads LPIPS (Zhang et al., CVPR 2018) with VGG16: two (B, 3, H, W) in [-1, 1], sides of 16 or more -> (B,)."""
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips uses an option that torchvision deprecates
        network = LPIPS(net="vgg", verbose=False).to(device)
    return torch.inference_mode()(lambda image, truth: network(image.to(device), truth.to(device)).flatten().cpu())


def load_inception(device: str) -> Callable[[Tensor], np.ndarray]:
    """Loads pytorch-fid's Inception network, which resizes to 299x299: (B, 3, H, W) in [0, 1] -> (B, 2048)."""
    from pytorch_fid.inception import InceptionV3

    network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).to(device).eval()
    return torch.inference_mode()(lambda image: network(image.to(device))[0].flatten(1).cpu().numpy())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FID (Heusel et al., NeurIPS 2017): the Fréchet distance of two sets of features, (N, D) and (M, D).

    It is |mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)) with the covariances A and B. tr sqrt(A B) is computed as
    tr sqrt(sqrt(A) B sqrt(A)), which has real eigenvalues. pytorch-fid's own function fails with SciPy 1.18.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


# ----------------------------------------------------------------------------------------------------------
# Simple translations: the mean colour, and a look-up of the mean colour at each SAR brightness


def local_mean(image: Tensor, size: int = 7) -> Tensor:
    """Averages each pixel's size x size neighbourhood in all channels: (B, 3, H, W) -> (B, H, W)."""
    padded = F.pad(image.mean(dim=1, keepdim=True), [size // 2] * 4, mode="reflect")
    return F.avg_pool2d(padded, size, stride=1)[:, 0]


def sar_level(sar: Tensor) -> Tensor:
    """Quantises the local mean of SAR images: (B, 3, H, W) in [-1, 1] -> (B, H, W) from 0 to LEVELS - 1."""
    return ((local_mean(sar) + 1) / 2 * LEVELS).long().clamp(0, LEVELS - 1)


def fit_colours(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Computes the mean EO colour of all pixels, (3,), and of the pixels at each SAR level, (LEVELS, 3).

    pairs: SAR and EO images, each (3, H, W) in [-1, 1]. A level without pixels gets the mean colour of all pixels.
    """
    total, number = torch.zeros(LEVELS, 3, dtype=torch.float64), torch.zeros(LEVELS, 1, dtype=torch.float64)
    for sar, eo in pairs:
        level = sar_level(sar[None])[0].flatten()
        total.index_add_(0, level, eo.flatten(1).T.double())
        number.index_add_(0, level, torch.ones(len(level), 1, dtype=torch.float64))
    mean = total.sum(dim=0) / number.sum()
    return mean.float(), torch.where(number > 0, total / number.clamp(min=1), mean).float()


def look_up(colours: Tensor, sar: Tensor) -> Tensor:
    """Gives each pixel the colour of its SAR level. colours: (LEVELS, 3); sar and result: (B, 3, H, W) in [-1, 1]."""
    return colours[sar_level(sar)].movedim(-1, 1)
