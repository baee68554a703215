"""Checks the paper's claims on the synthetic dataset. Each command writes a table with the mean over several seeds.

    python -m experiments.claims vae
    python -m experiments.claims trainings --data sen12-synthetic/ --dtype bfloat16 --train-steps 600
    python -m experiments.claims steps --data sen12-synthetic/ --limit 24

vae         SAR and EO images share one latent space, also under speckle: reconstruction and latent statistics by looks.
trainings   Pretrained U-Net against random weights, C-Diff against L2; beside them, the same network trained to give
            the EO latent in one pass (L1), the mean of several samples, and the colour look-up.
steps       Quality and time by the number of sampling steps and their spacing.

Trainings are kept in --runs; the same command continues them. All use the same pairs and start from --base, which
experiments.pretrain writes; the seed changes the order of the pairs, crops and noise. All are scored on the same
held-out pairs with the same noise. Writes claims-NAME.json (the values of each seed) and claims-NAME.md to --out, and a
plot of the trainings.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
import train
from cdiffset import CDiffSET, add_variance_channel, denoise
from checkpoint import read_table, run_folder
from common import DEVICE_HELP, Parser, choose_device, positive, run, seed_number
from data import Pair, PairDataset, dataset_name, decide_reading, evenly, find_pairs, read_batches, read_center
from experiments import synth
from experiments.land_cover import land_cover_agreement
from experiments.report import BLUE, GREEN, ORANGE, origin, plot, pyplot, write_results
from images import Reading, to_uint8
from metrics import look_up, psnr
from sample import load_model
from splits import held_out_pairs, split_pairs
from train import MEASURED_AT, fit, objective, precision
from unet import UNet
from weights import network_digest

LOOKS = {10_000: "no speckle", 8: "8 looks", 4: "4 looks", 2: "2 looks", 1: "1 look"}
ANOTHER_COUNTRY = 1_000_000  # added to the seed of scenes: no model was trained on these
STEPS = (1, 2, 4, 10, 25, 50)
SAMPLES = 4  # translations that are averaged
BATCH = 16  # pairs, in training and scoring
LR = 6e-4  # the highest learning rate
VALIDATIONS, VALIDATED = 10, 32  # of a training, and the pairs of each
CHANGES = {"RMSE, unchanged ↓": 0, "RMSE, only in SAR ↓": 1, "RMSE, only in EO ↓": 2}  # values of the change masks
METRICS = {"psnr": "PSNR, dB ↑", "ssim": "SSIM ↑", "scc": "SCC ↑"}
ARMS = {  # name: (title, starts from the pretrained U-Net, loss)
    "cdiff": ("C-Diff, pretrained", True, "cdiff"),
    "scratch": ("C-Diff, from scratch", False, "cdiff"),
    "mse": ("L2, pretrained", True, "mse"),
    "regression": ("direct regression (L1), pretrained", True, "l1"),
}

Scores = dict[str, dict[str, list[float]]]  # {row of the table: {column: the value of each seed}}
Make = Callable[[Tensor, range], Tensor]  # SAR images (B, 3, H, W) and their numbers -> EO images, both in [-1, 1]


def collect(results: Scores, row: str, scores: dict[str, float]) -> None:
    """Adds the scores of a seed to a row of the table."""
    for column, value in scores.items():
        results.setdefault(row, {}).setdefault(column, []).append(value)


# ----------------------------------------------------------------------------------------------------------
# The VAE


@torch.inference_mode()
def vae(args: argparse.Namespace) -> Scores:
    """Reconstructions and latents of --limit scenes a seed. "floor": the distance between two halves of EO images."""
    model, results = CDiffSET.from_pretrained(args.base).to(args.device), {}
    for seed in args.seeds:
        for looks, row in tqdm(LOOKS.items(), desc=f"seed {seed}", unit="level"):
            scenes = [synth.draw(ANOTHER_COUNTRY + seed, scene, 0, args.size, looks) for scene in range(args.limit)]
            sar = torch.from_numpy(np.stack([s.sar for s in scenes]))[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
            eo = torch.from_numpy(np.stack([s.eo for s in scenes])).movedim(-1, 1) / 127.5 - 1
            z_sar, z_eo = (torch.cat([model.encode(x).float() for x in images.split(BATCH)]) for images in (sar, eo))
            sar_again, eo_again = (
                torch.cat([model.decode(x).float().clamp(-1, 1).cpu() for x in z.split(BATCH)]) for z in (z_sar, z_eo)
            )
            scores = {"PSNR of EO, dB ↑": decibels(eo_again, eo), "PSNR of SAR, dB ↑": decibels(sar_again, sar)}
            if row == "no speckle":  # the first
                clean, z_clean = sar, z_sar
            else:
                scores["SAR to its clean image, dB ↑"] = decibels(sar_again, clean)
                scores["the same, before the VAE, dB"] = decibels(sar, clean)
                scores["correlation to clean SAR ↑"] = correlation(z_sar, z_clean)
            collect(results, row, scores | {"distance SAR-EO ↓": frechet(z_sar, z_eo)})
        collect(results, "floor", {"distance SAR-EO ↓": frechet(z_eo[::2], z_eo[1::2])})
    return results


def decibels(image: Tensor, truth: Tensor) -> float:
    """Mean PSNR of images (N, 3, H, W) in [-1, 1]."""
    return float(psnr(image / 2 + 0.5, truth / 2 + 0.5).mean())


def frechet(z: Tensor, other: Tensor) -> float:
    """Fréchet distance of two sets of latents (N, C, h, w), as Gaussians with independent channels:
    the sum over the channels of the squared differences of mean and standard deviation.
    """
    (m, s), (n, t) = ((x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3))) for x in (z, other))
    return float(((m - n) ** 2 + (s - t) ** 2).sum())


def correlation(z: Tensor, other: Tensor) -> float:
    """Pearson correlation of two sets of latents (N, C, h, w): the mean over the channels."""
    a, b = (x.movedim(1, 0).flatten(1) for x in (z, other))
    return float(F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean())


# ----------------------------------------------------------------------------------------------------------
# Scores of images


def in_batches(pairs: list[Pair], args: argparse.Namespace) -> Iterator[tuple[range, Tensor, Tensor]]:
    """The pairs' numbers, and central crops of their SAR and EO images (B, 3, size, size)."""
    return read_batches(lambda i: read_center(pairs[i], args.size, args.reading), len(pairs), BATCH)


@torch.inference_mode()
def score(pairs: list[Pair], make: Make, args: argparse.Namespace) -> dict[str, float]:
    """Mean metrics of the images that `make` makes of the pairs. With change masks, also the RMSE in levels of 0..255
    over the pixels of each kind, in all images together; with class masks, the land cover agreement. The seconds are
    those of the fastest batch, which other programs disturbed least.
    """
    rows, squares, took = [], defaultdict(list), []
    for numbers, sar, eo in in_batches(pairs, args):
        began = time.perf_counter()
        with precision(args.device, args.dtype):
            made = make(sar, numbers).float().clamp(-1, 1).cpu()
        took.append((time.perf_counter() - began) / len(sar))
        errors = np.square(127.5 * (made - eo).numpy()).mean(axis=1)
        for i, image, error, row in zip(numbers, made, errors, evaluate.score(made, eo)):
            rows.append({title: row[metric] for metric, title in METRICS.items()})
            if synth.mask_path(pairs[i], "class"):
                classes = synth.read_mask(pairs[i], "class", args.size)
                rows[-1]["land cover agreement ↑"] = land_cover_agreement(to_uint8(image), classes)
            if synth.mask_path(pairs[i], "change"):
                change = synth.read_mask(pairs[i], "change", args.size)
                for title, kind in CHANGES.items():
                    squares[title].append(error[change == kind])
    squares = {title: np.concatenate(values) for title, values in squares.items()}
    rmse = {title: float(np.sqrt(values.mean(dtype=np.float64))) for title, values in squares.items() if len(values)}
    return evaluate.means(rows) | rmse | {"seconds an image ↓": min(took)}


def translator(model: CDiffSET, steps: int = 10, spacing: str = "trailing", samples: int = 1, first: int = 0) -> Make:
    """Makes the mean of several translations. Each image and sample has its own seed, from `first` up."""

    def make(sar: Tensor, numbers: range) -> Tensor:
        seeds = [[first + i * samples + k for i in numbers] for k in range(samples)]
        return torch.stack([model.translate(sar, steps, seed, spacing)[0] for seed in seeds]).mean(dim=0)

    return make


# ----------------------------------------------------------------------------------------------------------
# Trainings


def start(name: str, seed: int, base: Path) -> CDiffSET:
    """The model that an arm starts from: the VAE of the base, and its U-Net or one with random weights of the seed."""
    _, pretrained, loss = ARMS[name]
    model = CDiffSET.from_pretrained(base, variance_channel=False)
    if not model.from_base:
        raise ValueError(f"{base} is a C-DiffSET model: --base must be a base model, which experiments.pretrain writes")
    if not pretrained:
        torch.manual_seed(seed)
        model.unet = UNet(**model.unet.config)
    if loss == "cdiff":
        add_variance_channel(model.unet)
    return model.eval()


def regress(unet: nn.Module, model: CDiffSET, sar: Tensor) -> Tensor:
    """The EO latent (B, 4, h, w) of SAR images (B, 3, H, W) in one pass at timestep 0, with the SAR latent as both
    inputs of the U-Net.
    """
    with torch.no_grad():
        z_sar = model.encode(sar).float()
    return denoise(unet, z_sar, z_sar, 0, model.prompt_embedding)[0].float()


def painter(model: CDiffSET) -> Make:
    """Makes the images of the regression."""
    return lambda sar, _: model.decode(regress(model.unet, model, sar))


def regression_loss(model: CDiffSET) -> train.Loss:
    """The mean absolute error of the EO latent, as `fit` expects it."""

    def loss(unet: nn.Module, batch: list[Tensor], _positions: list[int]) -> Tensor:
        sar, eo = (x.to(model.device) for x in batch)
        with torch.no_grad():
            z_eo = model.encode(eo).float()
        return F.l1_loss(regress(unet, model, sar), z_eo)

    return loss


@torch.inference_mode()
def prediction_error(model: CDiffSET, regression: bool, pairs: list[Pair], args: argparse.Namespace) -> float:
    """The mean squared error of the prediction at four timesteps, with the same noise for all models.

    Of the regression: the mean absolute error of the latent.
    """
    errors = []
    for numbers, sar, eo in in_batches(pairs, args):
        with precision(args.device, args.dtype):
            z_sar, z_eo = model.encode(torch.cat([sar, eo])).float().chunk(2)
            if regression:
                errors.append((regress(model.unet, model, sar) - z_eo).abs().mean(dim=(1, 2, 3)))
            else:
                squared = [model.noise_error(z_sar, z_eo, t, numbers)[0] for t in MEASURED_AT]
                errors.append(torch.stack(squared).mean(dim=(0, 2, 3, 4)))
    return float(torch.cat(errors).mean())


def trained(name: str, seed: int, training: list[Pair], held_out: list[Pair], args: argparse.Namespace) -> CDiffSET:
    """Trains an arm in --runs/NAME-SEED, or continues or reads its training there. Exits if a signal stops it."""
    *_, kind = ARMS[name]
    model = start(name, seed, args.base).to(args.device)
    model.vae.requires_grad_(False)
    options = vars(train.parse(["--data", args.data])) | {
        "out": args.runs / f"{name}-{seed}", "steps": args.train_steps, "batch_size": BATCH, "lr": LR,
        "dtype": args.dtype, "seed": seed, "workers": 0, "save_every": 250, "resume": True,
        "validate_every": max(1, args.train_steps // VALIDATIONS),
    }  # fmt: skip
    identity = {"data": args.data_name, "size": args.size, "limit": args.limit, "arm": name}
    identity |= {"vae": network_digest(model.vae), "first weights": network_digest(model.unet)}
    few = evenly(held_out, VALIDATED)

    def validate(_step: int) -> dict[str, float]:
        error = prediction_error(model, kind == "l1", few, args)
        return {"score": -error, "error": error}

    loss = regression_loss(model) if kind == "l1" else objective(model, kind, seed, cached=False)
    samples, options = PairDataset(training, args.size, seed, reading=args.reading), argparse.Namespace(**options)
    with run_folder(options, identity) as settings:
        code = fit(model.unet, loss, samples, options, settings, validate)
    if code:
        raise SystemExit(code)
    return model.eval()


def trainings(args: argparse.Namespace) -> Scores:
    """Trains and scores all arms with all seeds."""
    found, results = find_pairs(args.data), {}
    split = split_pairs(found.pairs)
    args.reading, _ = decide_reading(split.train, Reading())
    held_out, args.data_name = evenly(split.test, args.limit), dataset_name(found, args.data)
    for name, (title, _, kind) in ARMS.items():
        for seed in args.seeds:
            model = trained(name, seed, split.train, held_out, args)
            if kind == "l1":
                collect(results, title, score(held_out, painter(model), args))
                continue
            collect(results, title, score(held_out, translator(model), args))
            collect(results, title, {"prediction error ↓": prediction_error(model, False, held_out, args)})
            if name == "cdiff":
                averaged = score(held_out, translator(model, samples=SAMPLES), args)
                collect(results, f"{title}, mean of {SAMPLES} samples", averaged)
    _, colours = evaluate.training_colours(split.train, args.reading)
    collect(results, "colour look-up", score(held_out, lambda sar, _: look_up(colours, sar), args))
    with plot(args.out / "claims-trainings.png", "training step", "error of the prediction, held-out pairs") as axes:
        for name, colour in (("cdiff", BLUE), ("scratch", ORANGE), ("mse", GREEN)):
            logs = [read_table(args.runs / f"{name}-{seed}" / "validation.csv") for seed in args.seeds]
            errors = np.array([[row["error"] for row in log] for log in logs])
            spread = errors.std(axis=0, ddof=1) if len(errors) > 1 else None
            look = {"fmt": "-o", "markersize": 4, "capsize": 2, "color": colour, "label": ARMS[name][0]}
            axes.errorbar([row["step"] for row in logs[0]], errors.mean(axis=0), spread, **look)
    return results


# ----------------------------------------------------------------------------------------------------------
# Steps


def steps(args: argparse.Namespace) -> Scores:
    """Quality of the translations of --model by steps and spacing; the seeds are those of the noise."""
    model, results = load_model(args.model, args.device), {}
    split, _ = held_out_pairs(find_pairs(args.data).pairs, args.model)
    args.reading, _ = decide_reading(split.train, Reading(**model.trained_on))
    held_out = evenly(split.test, args.limit)
    for spacing in ("leading", "trailing"):
        for number in tqdm(STEPS, desc=spacing):
            for seed in args.seeds:
                make = translator(model, number, spacing, first=seed * len(held_out))
                collect(results, f"{spacing}, {number}", score(held_out, make, args))
    return results


# ----------------------------------------------------------------------------------------------------------
# The program


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("claim", choices=("vae", "trainings", "steps"), help="which claim, see above")
    add("--data", metavar="DIR", help="a dataset in any layout that train.py knows (not for vae, which draws scenes)")
    add("--base", type=Path, default="models/small-base", metavar="DIR",
        help="base model, for vae and trainings (default: %(default)s)")
    add("--model", type=Path, default="models/tiny", metavar="DIR",
        help="C-DiffSET model, for steps (default: %(default)s)")
    add("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--train-steps", type=positive, default=500, metavar="N", help="of each training (default: %(default)s)")
    add("--size", type=positive, metavar="N",
        help="side of the crops or scenes in pixels (default: 64 for trainings, else 128)")
    add("--limit", type=positive, metavar="N",
        help="held-out pairs to score, or scenes to draw for each seed (default: 256 for trainings, else 64)")
    add("--runs", type=Path, default="runs/claims", metavar="DIR", help="where trainings go (default: %(default)s)")
    add("--out", type=Path, default="results", metavar="DIR", help="where results go (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    args = parser.parse_args(arguments)
    if args.data is None and args.claim != "vae":
        parser.error("--data is needed")
    size, limit = (64, 256) if args.claim == "trainings" else (128, 64)
    args.size, args.limit = args.size or size, args.limit or limit
    return args


def main(arguments: list[str] | None = None) -> int:
    """Checks a claim; returns the exit code."""
    args = parse(arguments)
    args.device = choose_device(args.device)
    pyplot()  # now, rather than after an hour of training, if it is missing
    source = origin("experiments.claims", arguments, args)
    results = {"vae": vae, "trainings": trainings, "steps": steps}[args.claim](args)
    what = "scenes a seed" if args.claim == "vae" else "held-out pairs at most"
    note = f"{args.limit} {what} of {args.size} pixels; mean ± standard deviation over the seeds {args.seeds}"
    write_results(args.out / f"claims-{args.claim}", source, results, note)
    return 0


if __name__ == "__main__":
    run(main)
