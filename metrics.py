"""Image quality: PSNR, SSIM and SCC, equal to torchmetrics' defaults; LPIPS and FID by their usual packages.

Images are (B, 3, H, W), in [0, 1] for all but LPIPS.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import one_line

# metric: (module, its weights, where PyTorch's packages fetch them from)
PACKAGES = {
    "lpips": ("lpips", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "fid": (
        "pytorch_fid.inception",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
}

# ----------------------------------------------------------------------------------------------------------
# Our own


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

    Correlation of the Laplacians in 8x8 windows; 0 where one of them is 0. As in torchmetrics, the Laplacian mirrors
    the border and the windows see zeros beyond it. Raises ValueError if a side is under 8 pixels.
    """
    if min(image.shape[2:]) < 8:
        raise ValueError(f"SCC needs sides of at least 8 pixels, not {tuple(image.shape[2:])}")
    shape = (-1, 1, *image.shape[2:])
    # in float64, in which Laplacians of float32 numbers have no rounding: else that of a flat area would be noise
    laplacian = torch.full((1, 1, 3, 3), -1.0, dtype=torch.float64, device=image.device)
    laplacian[0, 0, 1, 1] = 8
    # replicating the border is mirroring it with the border itself, for a 3x3 filter
    a, b = (F.conv2d(F.pad(x.double().reshape(shape), [1] * 4, mode="replicate"), laplacian) for x in (image, truth))

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (4, 3, 4, 3)), 8, stride=1)

    covariance = average(a * b) - average(a) * average(b)
    deviations = [(average(x * x) - average(x) ** 2).clamp(min=0).sqrt() for x in (a, b)]
    scale = deviations[0] * deviations[1]
    score = torch.where(scale == 0, 0, covariance / scale)
    return score.reshape(image.shape).mean(dim=(1, 2, 3)).to(image.dtype)


# ----------------------------------------------------------------------------------------------------------
# By other packages


def what_is_missing(metric: str) -> str | None:
    """What to do before "lpips" or "fid" can be computed, in a line; None: nothing. Downloads nothing."""
    module, url = PACKAGES[metric]
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return f"pip install {module.split('.')[0].replace('_', '-')} ({error})"
    except (ImportError, RuntimeError) as error:  # mostly a torchvision for another torch
        return f"{module} is installed but cannot be imported ({one_line(error)})"
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    return None if path.is_file() else f"its weights are not there: curl --create-dirs -Lo {path} {url}"


def load_lpips(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (Zhang et al., CVPR 2018) with VGG16: two (B, 3, H, W) in [-1, 1], sides from 16 pixels -> (B,)."""
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about the way in which lpips asks it for the weights
        network = LPIPS(net="vgg", verbose=False).to(device)
    return torch.inference_mode()(lambda image, truth: network(image.to(device), truth.to(device)).flatten().cpu())


def load_inception(device: str) -> Callable[[Tensor], np.ndarray]:
    """pytorch-fid's Inception, which resizes to 299x299: (B, 3, H, W) in [0, 1] -> features (B, 2048)."""
    from pytorch_fid.inception import InceptionV3

    network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).to(device).eval()
    return torch.inference_mode()(lambda image: network(image.to(device))[0].flatten(1).cpu().numpy())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of the normal distributions fitted to two sets of features, (N, D) and (M, D): FID (Heusel et al., 2017).

    |mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)) with the covariances A, B. pytorch-fid's own function does not run
    with SciPy from 1.18; here tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), whose eigenvalues are real.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
