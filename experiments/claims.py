"""The paper's claims, and what to hold against them, each as a command that ends in a small table and a plot.

    vae         one VAE holds SAR and EO images in one latent space, also under speckle
    trainings   starting from the pretrained network beats starting from scratch; C-Diff beats plain L2, where the two
                images disagree and elsewhere; beside them the same network painting the EO image in one pass (L1)
    steps       how quality grows with the number of denoising steps, by their spacing; and the time

    python claims.py trainings --data sen12-synthetic/ --base models/small-base

Trainings are kept in --runs, and the same command goes on where it was stopped. All see the same pairs (the split of
seed 0, by which pretrain.py made the base model); seeds change their order, crops and noise. All are scored on the same
held-out pairs with the same noise. Written to --out: claims-NAME.json (each seed), claims-NAME.md (mean and standard
deviation over the seeds) and .png.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import evaluate
from cdiffset import CDiffSET
from checkpoint import read_table
from common import DEVICE_HELP, Parser, atomic, choose_device, positive, run, seed_number, write_json
from data import Pair, dataset_name, evenly, find_pairs, held_out_pairs, split_pairs
from experiments import synth
from experiments.report import BLUE, GREEN, GREY, ORANGE, Series, lines, markdown, origin, plot, pyplot
from experiments.study import ARMS, BATCH, painter, prediction_error, score, trained, translator
from metrics import psnr
from sample import load_model
from yardsticks import look_up

LOOKS = {8: "8 looks", 4: "4 looks", 2: "2 looks", 1: "1 look"}
CLEAN = 10_000  # looks: next to no speckle
ANOTHER_COUNTRY = 1_000_000  # added to the seed of scenes: none that the model was trained on
STEPS = (1, 2, 4, 10, 25, 50)
SAMPLES = 4  # translations whose mean stands beside one

QUALITY = {"psnr": "PSNR, dB ↑", "ssim": "SSIM ↑", "scc": "SCC ↑", "land_cover": "land cover agreement ↑"}
TITLES = {  # the columns of each table
    "vae": {
        "psnr_eo": "PSNR of EO, dB ↑",
        "psnr_sar": "PSNR of SAR, dB ↑",
        "psnr_clean": "SAR to its clean image, dB ↑",
        "psnr_speckled": "the same, before the VAE, dB",
        "distance": "distance SAR-EO ↓",
        "correlation": "correlation to clean SAR ↑",
    },
    "trainings": QUALITY
    | {
        "rmse_unchanged": "RMSE, unchanged ↓",
        "rmse_sar_only": "RMSE, only in SAR ↓",
        "rmse_eo_only": "RMSE, only in EO ↓",
        "prediction_error": "prediction error ↓",
    },
    "steps": QUALITY | {"seconds": "seconds an image ↓"},
}

Scores = dict[str, dict[str, list[float]]]  # {row of the table: {metric: a value for each seed}}


def collect(results: Scores, row: str, scores: dict[str, float]) -> None:
    """Adds the scores of a seed to a row of the table."""
    for metric, value in scores.items():
        results.setdefault(row, {}).setdefault(metric, []).append(value)


# ----------------------------------------------------------------------------------------------------------
# The VAE


def vae(args: argparse.Namespace) -> Scores:
    """Reconstructions and latents of scenes drawn with more or less speckle; --limit scenes a seed.

    The floor is the distance between two halves of the EO images.
    """
    model, results = CDiffSET.from_pretrained(args.base).to(args.device), {}
    for seed in args.seeds:
        for looks, name in tqdm({CLEAN: "no speckle", **LOOKS}.items(), desc=f"seed {seed}", unit="level"):
            scenes = [synth.draw(ANOTHER_COUNTRY + seed, scene, 0, args.size, looks) for scene in range(args.limit)]
            sar = torch.from_numpy(np.stack([s.sar for s in scenes]))[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
            eo = torch.from_numpy(np.stack([s.eo for s in scenes])).movedim(-1, 1) / 127.5 - 1
            (z_sar, again), (z_eo, again_eo) = reconstruct(model, sar), reconstruct(model, eo)
            collect(results, name, {"psnr_eo": decibels(again_eo, eo), "psnr_sar": decibels(again, sar)})
            if looks == CLEAN:  # the first
                clean, z_clean = sar, z_sar
            else:
                collect(results, name, {"psnr_clean": decibels(again, clean), "psnr_speckled": decibels(sar, clean)})
                collect(results, name, {"correlation": correlation(z_sar, z_clean)})
            collect(results, name, {"distance": frechet(z_sar, z_eo)})
        collect(results, "floor", {"distance": frechet(z_eo[::2], z_eo[1::2])})
    return results


def draw_vae(_args: argparse.Namespace, results: Scores, picture: Path) -> None:
    """Reconstruction, distance and correlation by the number of looks."""

    def line(metric: str, colour: str, style: str = "-") -> Series:
        return Series(list(LOOKS), [results[name][metric] for name in LOOKS.values()], colour, style)

    floor = Series(list(LOOKS), [float(np.mean(results["floor"]["distance"]))] * len(LOOKS), GREY, "--")
    quality = {"EO": line("psnr_eo", BLUE), "SAR": line("psnr_sar", ORANGE)}
    quality |= {"SAR to clean": line("psnr_clean", GREEN), "no VAE, to clean": line("psnr_speckled", GREY, "--")}
    distances = {"SAR to EO": line("distance", ORANGE), "EO to EO": floor}
    with plot(picture, 3) as (left, middle, right):
        lines(left, "reconstruction", "looks", "PSNR, dB", quality, "x", columns=2)
        lines(middle, "latent statistics", "looks", "Fréchet distance", distances, "x")
        lines(right, "latents of SAR", "looks", "correlation to clean", {"": line("correlation", ORANGE)}, "x")


@torch.inference_mode()
def reconstruct(model: CDiffSET, images: Tensor) -> tuple[Tensor, Tensor]:
    """The latents and the reconstructions of images (N, 3, H, W) in [-1, 1], both on the CPU."""
    z = [model.encode(x).float() for x in images.split(BATCH)]
    return torch.cat(z).cpu(), torch.cat([model.decode(x).float().clamp(-1, 1).cpu() for x in z])


def decibels(image: Tensor, truth: Tensor) -> float:
    """Mean PSNR of images (N, 3, H, W) in [-1, 1]."""
    return float(psnr(image / 2 + 0.5, truth / 2 + 0.5).mean())


def frechet(z: Tensor, other: Tensor) -> float:
    """Fréchet distance of two sets of latents (N, C, h, w), each channel taken as a Gaussian, independent of the
    others: the sum of the squared differences of their means and standard deviations.
    """
    (m, s), (n, t) = ((x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3))) for x in (z, other))
    return float(((m - n) ** 2 + (s - t) ** 2).sum())


def correlation(z: Tensor, other: Tensor) -> float:
    """Pearson's correlation of two sets of latents (N, C, h, w), channel by channel; the mean of the channels."""
    a, b = (x.movedim(1, 0).flatten(1) for x in (z, other))
    return float(F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean())


# ----------------------------------------------------------------------------------------------------------
# Trainings

MEAN_OF_SAMPLES, LOOK_UP = f"C-Diff, pretrained, mean of {SAMPLES} samples", "colour look-up"


def trainings(args: argparse.Namespace) -> Scores:
    """Trains and scores all arms, all seeds; beside them the mean of several samples, and the colour look-up."""
    found, results = find_pairs(args.data), {}
    train, test = split_pairs(found.pairs)
    held_out, args.data_name = evenly(test, args.limit), dataset_name(found, args.data)
    for name, arm in ARMS.items():
        for seed in args.seeds:
            model = trained(name, seed, train, held_out, args)
            if arm.loss == "l1":
                collect(results, arm.title, score(held_out, painter(model), args))
                continue
            collect(results, arm.title, score(held_out, translator(model), args))
            collect(results, arm.title, {"prediction_error": prediction_error(model, arm, held_out, args)})
            if name == "cdiff":
                collect(results, MEAN_OF_SAMPLES, score(held_out, translator(model, samples=SAMPLES), args))
    _, colours = evaluate.training_colours(train)
    collect(results, LOOK_UP, score(held_out, lambda sar, _: look_up(colours, sar), args))
    return results


def draw_trainings(args: argparse.Namespace, _results: Scores, picture: Path) -> None:
    """How the error of the prediction falls while they learn."""
    curves = {}
    for name, arm in ARMS.items():
        if arm.loss != "l1":  # whose error is another one
            logs = [read_table(args.runs / f"{name}-{seed}" / "validation.csv") for seed in args.seeds]
            errors = [[row["error"] for row in rows] for rows in zip(*logs)]
            curves[arm.title] = Series([row["step"] for row in logs[0]], errors, arm.colour)
    with plot(picture, 1) as (axes,):
        lines(axes, "", "training step", "error of the prediction", curves, columns=len(curves))


# ----------------------------------------------------------------------------------------------------------
# Steps


def steps(args: argparse.Namespace) -> Scores:
    """Quality of --model's translations by steps and spacing; the seeds are of the noise."""
    model, results = load_model(args.model, args.device), {}
    held_out = evenly(held_out_pairs(find_pairs(args.data).pairs, args.model)[1], args.limit)
    for spacing in ("leading", "trailing"):
        for number in tqdm(STEPS, desc=spacing):
            for seed in args.seeds:
                collect(results, f"{spacing}, {number}", score_steps(model, held_out, number, spacing, seed, args))
    return results


def score_steps(
    model: CDiffSET, pairs: list[Pair], number: int, spacing: str, seed: int, args: argparse.Namespace
) -> dict[str, float]:
    """The scores with one setting, and the seconds an image took in the fastest batch, the least disturbed."""
    translate, took = translator(model, number, spacing, first=seed * len(pairs)), []

    def make(sar: Tensor, numbers: range) -> Tensor:
        began = time.perf_counter()
        made = translate(sar, numbers).cpu()
        took.append((time.perf_counter() - began) / len(sar))
        return made

    return score(pairs, make, args) | {"seconds": min(took)}


def draw_steps(_args: argparse.Namespace, results: Scores, picture: Path) -> None:
    """Three metrics by the number of steps. One leading step is left out: it would flatten all that the rest says."""
    shown = {"leading": (STEPS[1:], BLUE), "trailing": (STEPS, ORANGE)}
    metrics = [metric for metric in ("psnr", "ssim", "land_cover") if metric in results[f"leading, {STEPS[0]}"]]
    with plot(picture, len(metrics)) as panels:
        for axes, metric in zip(panels, metrics):
            series = {
                spacing: Series(numbers, [results[f"{spacing}, {number}"][metric] for number in numbers], colour)
                for spacing, (numbers, colour) in shown.items()
            }
            lines(axes, "", "denoising steps", QUALITY[metric], series, "x", columns=2)


# ----------------------------------------------------------------------------------------------------------
# The program

CLAIMS = {"vae": (vae, draw_vae), "trainings": (trainings, draw_trainings), "steps": (steps, draw_steps)}


def cell(values: list[float]) -> str:
    """The mean, and the standard deviation over the seeds where there are several."""
    mean, digits = float(np.mean(values)), 2 if abs(np.mean(values)) >= 10 else 3
    return f"{mean:.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def table(results: Scores, titles: dict[str, str]) -> str:
    """Markdown, of the metrics in `titles` that were measured; what a row was not measured for stays empty."""
    rows = {name: {titles[m]: cell(row[m]) for m in titles if m in row} for name, row in results.items()}
    columns = [title for title in titles.values() if any(title in row for row in rows.values())]
    return markdown("", rows, columns)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("claim", choices=CLAIMS, help="which one, see above")
    add("--data", metavar="DIR", help="a dataset in any layout that train.py knows (not for vae, which draws scenes)")
    add("--base", type=Path, default="models/small-base", metavar="DIR",
        help="the base model, as pretrain.py writes (default: %(default)s)")
    add("--model", type=Path, default="models/tiny", metavar="DIR",
        help="the C-DiffSET model whose steps are counted (default: %(default)s)")
    add("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--train-steps", type=positive, default=500, metavar="N", help="of each training (default: %(default)s)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pairs a training step (default: %(default)s)")
    add("--lr", type=float, default=6e-4, help="peak learning rate (default: %(default)s)")
    add("--size", type=positive, metavar="N",
        help="side of the crops, or of the drawn scenes, in pixels (default: 64 where networks are trained, else 128)")
    add("--limit", type=positive, metavar="N",
        help="held-out pairs to score, or scenes to draw a seed (default: 256 where networks are trained, else 64)")
    add("--runs", type=Path, default="runs/claims", metavar="DIR", help="where trainings go (default: %(default)s)")
    add("--out", type=Path, default="results", metavar="DIR", help="where results go (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the arithmetic of trainings, and of what trainings and steps score (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    args = parser.parse_args(arguments)
    if args.data is None and args.claim != "vae":
        parser.error("--data is needed")
    if args.limit == 1 and args.claim == "vae":
        parser.error("--limit must be 2 or more: two halves of the scenes are compared")
    size, limit = (64, 256) if args.claim == "trainings" else (128, 64)
    args.size, args.limit = args.size or size, args.limit or limit
    return args


def main(arguments: list[str] | None = None) -> int:
    """Checks a claim; returns the exit code."""
    args = parse(arguments)
    args.device = choose_device(args.device)
    pyplot()  # now, rather than after an hour, if it is not there
    stem = args.out / f"claims-{args.claim}"
    source = origin("claims.py", arguments, args)
    measure, draw = CLAIMS[args.claim]
    results = measure(args)
    draw(args, results, stem.with_suffix(".png"))
    write_json(stem.with_suffix(".json"), source | {"results": results})
    what = "scenes a seed" if args.claim == "vae" else "held-out pairs at most"
    notes = f"{args.limit} {what} of {args.size} pixels"
    if len(args.seeds) > 1:
        notes += f"; mean ± standard deviation over the seeds {', '.join(map(str, args.seeds))}"
    about = f"`{source['command']}`, commit {source['commit']}, {source['machine']}, {source['date']}."
    rows = table(results, TITLES[args.claim])
    with atomic(stem.with_suffix(".md")) as temporary:
        temporary.write_text(f"{rows}\n{notes}. {about}\n", encoding="utf-8")
    print(rows, end="")
    print(f"wrote {stem}.json, .md and .png")
    return 0


if __name__ == "__main__":
    run(main)
