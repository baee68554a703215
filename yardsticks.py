"""What a translation is to be measured by beside its distance from the truth: what simple means of the training set
achieve, and how much of the land cover is recognisable. See evaluate.py.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.world import AMBIGUOUS, COLOURS

LEVELS = 64  # of the colour look-up
FITTED_ON = 400  # training pairs that are looked at to fit it


def local_mean(image: Tensor, size: int = 7) -> Tensor:
    """Mean of each pixel's neighbourhood, over the channels too: (B, 3, H, W) -> (B, H, W)."""
    padded = F.pad(image.mean(dim=1, keepdim=True), [size // 2] * 4, mode="reflect")
    return F.avg_pool2d(padded, size, stride=1)[:, 0]


def sar_level(sar: Tensor) -> Tensor:
    """SAR images (B, 3, H, W) in [-1, 1] -> (B, H, W) int64 in 0..LEVELS - 1, the local mean in equal steps."""
    return ((local_mean(sar) + 1) / 2 * LEVELS).long().clamp(0, LEVELS - 1)


def fit_colours(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean EO colour of all pixels, (3,), and of those at each SAR level, (LEVELS, 3); empty levels: of all."""
    total, number = torch.zeros(LEVELS, 3, dtype=torch.float64), torch.zeros(LEVELS, 1, dtype=torch.float64)
    for sar, eo in pairs:
        level = sar_level(sar[None])[0].flatten()
        total.index_add_(0, level, eo.flatten(1).T.double())
        number.index_add_(0, level, torch.ones(len(level), 1, dtype=torch.float64))
    mean = total.sum(dim=0) / number.sum()
    return mean.float(), torch.where(number > 0, total / number.clamp(min=1), mean).float()


def look_up(colours: Tensor, sar: Tensor) -> Tensor:
    """The colour (LEVELS, 3) of each pixel's level: SAR images (B, 3, H, W) in [-1, 1] -> (B, 3, H, W)."""
    return colours[sar_level(sar)].movedim(-1, 1)


def land_cover_agreement(eo: np.ndarray, classes: np.ndarray) -> float:
    """Share of pixels whose nearest class colour is the true class's; roofs, of any colour, are left out.

    eo uint8 (H, W, 3), classes uint8 (H, W), synth.py's class map.
    """
    distance = np.square(eo[:, :, None].astype(np.float32) - COLOURS).sum(axis=-1)
    known = ~np.isin(classes, AMBIGUOUS)
    return float((distance.argmin(axis=-1) == classes)[known].mean())
