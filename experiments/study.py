"""Trainings that are compared, and how they are scored: what claims.py needs for `trainings` and `steps`.

name of an arm, seed -> start -> trained (kept in a folder; goes on where it was stopped) -> score
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluate
from cdiffset import CDiffSET, add_variance_channel, denoise
from checkpoint import Settings, run_folder
from data import Pair, PairDataset, evenly, mask_path, read_batches, read_center, read_mask
from experiments.report import BLUE, GREEN, GREY, ORANGE
from loop import Loss, fit, precision
from train import MEASURED_AT, objective
from unet import UNet
from weights import network_digest

BATCH = 16  # images at a time, where nothing is trained
VALIDATIONS, VALIDATED = 10, 32  # of a training, and the images of each
CHANGES = {"rmse_unchanged": 0, "rmse_sar_only": 1, "rmse_eo_only": 2}  # in synth.py's masks

Make = Callable[[Tensor, range], Tensor]  # SAR images (B, 3, H, W) and their numbers -> EO images, in [-1, 1]


class Arm(NamedTuple):
    """A way to train."""

    title: str
    colour: str
    pretrained: bool
    loss: str  # "cdiff", "mse", or "l1" for the regression


ARMS = {
    "cdiff": Arm("C-Diff, pretrained", BLUE, True, "cdiff"),
    "scratch": Arm("C-Diff, from scratch", ORANGE, False, "cdiff"),
    "mse": Arm("L2, pretrained", GREEN, True, "mse"),
    "regression": Arm("direct regression (L1), pretrained", GREY, True, "l1"),
}


def start(base: Path, arm: Arm, seed: int) -> CDiffSET:
    """The model to train: the base's VAE, and its U-Net or (not pretrained) one with random weights of the seed.

    Raises ValueError if `base` is no base model.
    """
    model = CDiffSET.from_pretrained(base, variance_channel=False)
    if not model.from_base:
        raise ValueError(f"{base} is a C-DiffSET model already: --base is a model to start from, as pretrain.py writes")
    if not arm.pretrained:
        torch.manual_seed(seed)
        model.unet = UNet(**model.unet.config)
    if arm.loss == "cdiff":
        add_variance_channel(model.unet)
    return model.eval()


def regress(unet: nn.Module, model: CDiffSET, sar: Tensor) -> Tensor:
    """The EO latent (B, 4, h, w) of SAR images (B, 3, H, W) in one pass: the SAR latent in both places, timestep 0."""
    with torch.no_grad():
        z_sar = model.encode(sar).float()
    return denoise(unet, z_sar, z_sar, 0, model.prompt_embedding)[0].float()


def regression_loss(model: CDiffSET) -> Loss:
    """Mean absolute error of the EO latent, as `fit` wants it."""

    def loss(unet: nn.Module, batch: list[Tensor], _positions: list[int]) -> Tensor:
        sar, eo = (x.to(model.device) for x in batch)
        with torch.no_grad():
            z_eo = model.encode(eo).float()
        return F.l1_loss(regress(unet, model, sar), z_eo)

    return loss


def trained(name: str, seed: int, train: list[Pair], held_out: list[Pair], args: argparse.Namespace) -> CDiffSET:
    """The model of an arm, in evaluation mode: trained now, or read if that was done. Its folder is --runs/NAME-SEED.

    SystemExit if a signal stops it; ValueError if the folder holds a training with other settings.
    """
    arm = ARMS[name]
    model = start(args.base, arm, seed).to(args.device)
    model.vae.requires_grad_(False)
    about = {"data": args.data_name, "size": args.size, "limit": args.limit, "arm": name}
    about |= {"vae": network_digest(model.vae), "first weights": network_digest(model.unet)}
    settings = Settings(
        args.runs / f"{name}-{seed}", args.train_steps, args.batch_size, args.lr, dtype=args.dtype, seed=seed,
        resume=True, keep=1, save_every=250, validate_every=max(1, args.train_steps // VALIDATIONS), about=about,
    )  # fmt: skip
    few = evenly(held_out, VALIDATED)

    def validate(_step: int) -> dict[str, float]:
        error = prediction_error(model, arm, few, args)
        return {"score": -error, "error": error}

    loss = regression_loss(model) if arm.loss == "l1" else objective(model, arm.loss, seed, cached=False)
    with run_folder(settings):
        code = fit(model.unet, loss, PairDataset(train, args.size, seed), settings, validate)
    if code:
        raise SystemExit(code)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------
# Scores


def in_batches(pairs: list[Pair], args: argparse.Namespace) -> Iterator[tuple[range, Tensor, Tensor]]:
    """The pairs' numbers, and their SAR and EO images (B, 3, size, size)."""
    return read_batches(lambda i: read_center(pairs[i], args.size), len(pairs), BATCH)


@torch.inference_mode()
def prediction_error(model: CDiffSET, arm: Arm, pairs: list[Pair], args: argparse.Namespace) -> float:
    """How wrong the network is: the mean squared error of its prediction at train.py's four timesteps, with the same
    noise for all models; of a regression, the mean absolute error of the latent.
    """
    errors = []
    for numbers, sar, eo in in_batches(pairs, args):
        with precision(args.device, args.dtype):
            z_sar, z_eo = model.encode(torch.cat([sar, eo])).float().chunk(2)
            if arm.loss == "l1":
                errors.append((regress(model.unet, model, sar) - z_eo).abs().mean(dim=(1, 2, 3)))
            else:
                squared = [model.noise_error(z_sar, z_eo, t, numbers)[0] for t in MEASURED_AT]
                errors.append(torch.stack(squared).mean(dim=(0, 2, 3, 4)))
    return float(torch.cat(errors).mean())


@torch.inference_mode()
def score(pairs: list[Pair], make: Make, args: argparse.Namespace) -> dict[str, float]:
    """The mean metrics of what is made of the pairs; and where there are change masks, the RMSE in levels of 0..255,
    over all pixels of each kind that occurs.
    """
    rows, squares, pixels = [], Counter(), Counter()
    for numbers, sar, eo in in_batches(pairs, args):
        with precision(args.device, args.dtype):
            made = make(sar, numbers).float().clamp(-1, 1).cpu()
        some = [pairs[i] for i in numbers]
        rows += evaluate.score(made, eo, some)
        for pair, error in zip(some, np.square(127.5 * (made - eo).numpy()).mean(axis=1)):
            if mask_path(pair, "change"):
                change = read_mask(pair, "change", args.size)
                for name, kind in CHANGES.items():
                    squares[name] += float(error[change == kind].sum())
                    pixels[name] += np.count_nonzero(change == kind)
    rmse = {name: math.sqrt(squares[name] / number) for name, number in pixels.items() if number}
    return evaluate.means(rows) | rmse


def translator(model: CDiffSET, steps: int = 10, spacing: str = "trailing", samples: int = 1, first: int = 0) -> Make:
    """The mean of so many translations, each from its own noise: no two images or samples share a seed, the lowest of
    which is `first`.
    """

    def make(sar: Tensor, numbers: range) -> Tensor:
        seeds = [[first + i * samples + k for i in numbers] for k in range(samples)]
        return torch.stack([model.translate(sar, steps, seed, spacing)[0] for seed in seeds]).mean(dim=0)

    return make


def painter(model: CDiffSET) -> Make:
    """The regression's images."""
    return lambda sar, _: model.decode(regress(model.unet, model, sar))
