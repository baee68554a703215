"""Is the confidence true? Measured on held-out pairs, always beside what a simple filter does.

    python confidence.py --data sen12-synthetic/ --model runs/mine/model

1. Finding what really changed, where there are change masks (synth.py's): does a score rank the pixels that only one of
   the two images shows above those that both show? AUROC (0.5: no better than chance; below: the other way round) and
   average precision, for what only SAR and what only EO shows, the other kind left out. Scores:
     1 / confidence    the variance with which `translate` generates EO from SAR, at the middle step
     pair: variance    of a REAL pair: the true EO latent is noised to timestep t and predicted, a few times;
     pair: error       the variance, and the squared error of that prediction, both as 7x7 means
   and of filters: the 7x7 mean and standard deviation of SAR, 7x7 means of the gradients of both EO images, and of the
   difference between the true EO image and the colour that goes with the SAR level (evaluate.py's look-up).
2. Calibration: the variance against the squared error of the prediction, by timestep. See `calibration`.
3. With any data: does dropping the least confident pixels lower the error? See `sparsification` and `ause`.

Written to --out: confidence.json, calibration.png, error.png, and examples.png with the pairs that have
most changes (SAR only: pink, EO only: green; of the confidence the logarithm, stretched).
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdiffset import CDiffSET, pad_to_multiple
from common import DEVICE_HELP, Parser, choose_device, positive, run, seed_number, write_json
from data import (
    Pair,
    describe,
    evenly,
    find_pairs,
    held_out_pairs,
    mask_path,
    read_batches,
    read_mask,
    read_pair,
    seed_of,
)
from evaluate import training_colours
from experiments import synth
from experiments.report import BLUE, GREEN, GREY, ORANGE, PURPLE, Series, lines, markdown, origin, plot, pyplot
from images import confidence_picture, grid, save_image, to_uint8
from sample import DEFAULT_SPACING, DEFAULT_STEPS, load_model
from scheduler import SPACINGS
from yardsticks import local_mean, look_up

KINDS = {"only in SAR": 1, "only in EO": 2}  # values of synth.py's change masks
UNCERTAINTY = "1 / confidence"
FILTERS = ("SAR mean", "SAR deviation", "gradient of generated", "gradient of EO", "EO - colour look-up")
ORDERS = (UNCERTAINTY, "SAR deviation", "gradient of generated")  # by which the least certain pixels are dropped
TIMESTEPS, DRAWS = (501, 801), 4  # at which real pairs are noised, and how often
BANDS, BINS = 10, 20  # of the timesteps, of the predicted variance
ROWS = 3  # of the examples

# ----------------------------------------------------------------------------------------------------------
# Measures


def ranking(score: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision of scores (N,) that should be higher where `truth`, bool (N,), holds.

    AUROC is the chance that a true one gets the higher score of the two, ties counting half; average precision is the
    sum of precision * gain of recall over all thresholds, as in scikit-learn. Raises ValueError unless truth has both.
    """
    thresholds, ties = np.unique(score[truth], return_counts=True)
    false = np.sort(score[~truth])
    if not len(thresholds) or not len(false):
        raise ValueError("there must be pixels of both kinds to rank")
    below, up_to = (np.searchsorted(false, thresholds, side) for side in ("left", "right"))
    share = ties / ties.sum()  # of the true ones, by threshold
    found = np.cumsum(ties[::-1])[::-1]
    precision = found / (found + len(false) - below)
    return float(np.sum(share * (below + up_to) / (2 * len(false)))), float(np.sum(share * precision))


def sparsification(squared_error: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """RMSE of the most certain 1, 2, ... 100 % of the pixels: two (N,) -> (100,). N at least 100."""
    total = np.cumsum(squared_error[np.argsort(uncertainty, kind="stable")], dtype=np.float64)
    kept = np.round(np.arange(1, 101) / 100 * len(total)).astype(int)
    return np.sqrt(total[kept - 1] / kept)


def ause(curve: np.ndarray, oracle: np.ndarray) -> float:
    """Area under the sparsification error (Ilg et al., ECCV 2018): between a curve of `sparsification` and that of the
    true errors themselves, both divided by the RMSE of all pixels. 0: the uncertainty sorts as the errors do.
    """
    return float(np.trapezoid(curve - oracle, dx=0.01) / curve[-1])


def calibration(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float | list[float]]:
    """How well variances (N,) predict squared errors (N,).

    ratio: mean squared error over mean variance, 1 if right on the whole. bins: BINS equally filled ones by predicted
    variance, the mean of both in each. error: the mean over them of |squared error / variance - 1|, the expected
    calibration error as a share. correlation: of the logarithms, pixel by pixel.
    """
    order = np.argsort(predicted, kind="stable")
    bins = [np.array_split(x[order].astype(np.float64), BINS) for x in (predicted, actual)]
    means = [np.array([part.mean() for part in parts]) for parts in bins]
    logs = [np.log(np.maximum(x, 1e-12)) for x in (predicted, actual)]
    return {
        "ratio": float(actual.mean(dtype=np.float64) / predicted.mean(dtype=np.float64)),
        "error": float(np.abs(means[1] / means[0] - 1).mean()),
        "correlation": float(np.corrcoef(*logs)[0, 1]) if min(x.std() for x in logs) > 0 else 0.0,
        "bins_predicted": means[0].tolist(),
        "bins_actual": means[1].tolist(),
    }


# ----------------------------------------------------------------------------------------------------------
# Scores


def deviation(image: Tensor) -> Tensor:
    """Standard deviation in each pixel's 7x7 neighbourhood: (B, 3, H, W) -> (B, H, W)."""
    grey = image.mean(dim=1, keepdim=True)
    return (local_mean(grey**2) - local_mean(grey) ** 2).clamp(min=0).sqrt()


def gradient(image: Tensor) -> Tensor:
    """Length of the gradient of the brightness, 7x7 mean: (B, 3, H, W) -> (B, H, W)."""
    dy, dx = torch.gradient(image.mean(dim=1, keepdim=True), dim=(2, 3))
    return local_mean((dx**2 + dy**2).sqrt())


def pair_scores(model: CDiffSET, z_sar: Tensor, z_eo: Tensor, numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Scores of real pairs, latents (B, 4, h, w) with their numbers -> {name: (B, H, W)}: where do they not go
    together?
    """
    scores = {}
    for t in TIMESTEPS:
        draws = [
            torch.cat(model.noise_error(z_sar, z_eo, t, [seed_of(seed, "pair", t, k, i) for i in numbers]), dim=1)
            for k in range(DRAWS)
        ]
        maps = F.interpolate(torch.stack(draws).mean(dim=0), scale_factor=model.vae.factor, mode="bicubic").cpu()
        error, var = (local_mean(maps[:, [channel]]) for channel in (0, 1))
        scores |= {f"pair: variance, t = {t}": var, f"pair: error, t = {t}": error}
    return scores


def by_timestep(model: CDiffSET, z_sar: Tensor, z_eo: Tensor, numbers: Sequence[int], seed: int) -> np.ndarray:
    """(2, BANDS, N): the predicted variance and the squared error of all latent pixels, in each band of timesteps."""
    width, maps = model.scheduler.num_train_timesteps // BANDS, []
    for band in range(BANDS):
        seeds = [seed_of(seed, "calibration", band, i) for i in numbers]
        t = torch.tensor([band * width + s % width for s in seeds], device=z_eo.device)
        error, var = model.noise_error(z_sar, z_eo, t, seeds)
        maps.append(torch.stack([var.flatten(), error.flatten()]))
    return torch.stack(maps, dim=1).cpu().numpy()


def detect(score: np.ndarray, change: np.ndarray) -> dict[str, dict[str, float]]:
    """{kind: auroc, ap} of scores (N,) and change masks (N,). A kind that does not occur is left out."""
    kinds = {}
    for kind, value in KINDS.items():
        truth, same = change == value, change == 0
        if truth.any():
            kinds[kind] = dict(zip(("auroc", "ap"), ranking(score[same | truth], truth[same | truth])))
    return kinds


# ----------------------------------------------------------------------------------------------------------
# The program


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="a dataset in any layout that train.py knows")
    add("--model", required=True, type=Path, metavar="PATH", help="a C-DiffSET model folder, trained with C-Diff")
    add("--out", type=Path, default="results/confidence", metavar="DIR", help="where to write (default: %(default)s)")
    add("--limit", type=positive, default=256, metavar="N",
        help="held-out pairs to look at, evenly chosen; all numbers are kept in memory (default: %(default)s)")
    add("--steps", type=positive, default=DEFAULT_STEPS, help="denoising steps (default: %(default)s)")
    add("--spacing", choices=SPACINGS, default=DEFAULT_SPACING, help="of the steps (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="of all noise (default: %(default)s)")
    add("--batch-size", type=positive, default=8, help="images at a time (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    return parser.parse_args(arguments)


def measure(
    model: CDiffSET, pairs: list[Pair], colours: Tensor, masked: bool, args: argparse.Namespace
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Everything that is measured: {name: (N,)} with the scores, the squared "error" and, if `masked`, the "change" of
    all pixels; and what `by_timestep` gives.
    """
    columns, bands = defaultdict(list), []
    for numbers, sar, eo in read_batches(lambda i: read_pair(pairs[i]), len(pairs), args.batch_size, bar="measuring"):
        made, confidence = model.translate(sar, args.steps, [args.seed + i for i in numbers], args.spacing)
        made, (height, width) = made.cpu(), sar.shape[2:]
        images = pad_to_multiple(torch.cat([sar, eo]), model.unit).to(model.device)
        with torch.inference_mode():
            z_sar, z_eo = model.encode(images).float().chunk(2)
        found = {UNCERTAINTY: 1 / confidence.cpu()[:, 0]}
        if masked:
            found |= pair_scores(model, z_sar, z_eo, numbers, args.seed)
            found["change"] = torch.from_numpy(np.stack([read_mask(pairs[i], "change") for i in numbers]))
            expected = look_up(colours, sar)
            found |= {"gradient of EO": gradient(eo), "EO - colour look-up": local_mean((eo - expected).abs())}
        found |= {"SAR mean": local_mean(sar), "SAR deviation": deviation(sar), "gradient of generated": gradient(made)}
        found |= {"error": ((made - eo) / 2).square().mean(dim=1)}
        for name, values in found.items():
            columns[name].append(values[:, :height, :width].flatten().numpy())
        bands.append(by_timestep(model, z_sar, z_eo, numbers, args.seed))
    return {name: np.concatenate(parts) for name, parts in columns.items()}, np.concatenate(bands, axis=2)


def examples(model: CDiffSET, pairs: list[Pair], numbers: Sequence[int], masked: bool, args) -> np.ndarray:
    """A picture of some pairs, a row each."""
    rows = []
    for i in numbers:
        sar, eo = read_pair(pairs[i])
        made, confidence = model.translate(sar[None], args.steps, args.seed + int(i), args.spacing)
        seen = confidence_picture(confidence[0].log())
        rows.append([to_uint8(sar), to_uint8(eo), to_uint8(made[0]), seen])
        if masked:
            rows[-1].append(np.array(synth.CHANGE_COLOURS, np.uint8)[read_mask(pairs[i], "change")])
    return grid(rows, ["SAR", "EO", "generated", "confidence", "change"][: len(rows[0])])


# ----------------------------------------------------------------------------------------------------------
# The three parts: each prints a table, writes a plot, and returns its numbers


def part_detection(scores: dict[str, np.ndarray], change: np.ndarray) -> dict:
    """Finding what changed, by each score."""
    share = {kind: float(np.mean(change == value)) for kind, value in KINDS.items() if (change == value).any()}
    if not share:
        print("nothing changed in these pairs: no score can find it; try a larger --limit\n")
        return {"share": {}, "scores": {}}
    found = {name: detect(score, change) for name, score in scores.items()}
    rows = {
        name: {f"{kind}: {metric}": value for kind, row in kinds.items() for metric, value in row.items()}
        for name, kinds in found.items()
    }
    print(markdown("score", rows))
    for kind in share:
        value = {name: row[kind]["auroc"] for name, row in found.items()}
        best = max((name for name in value if name not in FILTERS), key=value.get)
        rival = max(FILTERS, key=lambda name: abs(value[name] - 0.5))  # a filter may be turned round
        print(f"{kind} ({share[kind]:.2%} of the pixels): {best} {value[best]:.3f}, ", end="")
        print(f"the best of the filters, {rival}, {max(value[rival], 1 - value[rival]):.3f}")
    return {"share": share, "scores": found}


def part_calibration(out: Path, bands: np.ndarray, timesteps: int) -> dict:
    """Squared error against variance in each band of timesteps, and their ratio by timestep."""
    measured = [calibration(*band) for band in zip(*bands)]
    everything = calibration(*bands.reshape(2, -1))
    width = timesteps // BANDS
    names = [f"t = {band * width} ... {(band + 1) * width - 1}" for band in range(BANDS)] + ["all"]
    titles = {"ratio": "squared error / variance", "error": "calibration error", "correlation": "correlation of logs"}
    rows = [{title: b[key] for key, title in titles.items()} for b in [*measured, everything]]
    print(markdown("timesteps", dict(zip(names, rows))))

    shade, centres = pyplot().get_cmap("viridis"), [(band + 0.5) * width for band in range(BANDS)]
    ends = [min(b["bins_predicted"][0] for b in measured), max(b["bins_predicted"][-1] for b in measured)]
    series = {"equal": Series(ends, ends, GREY, "--")}
    for band in reversed(range(BANDS)):
        label = f"t ≈ {centres[band]:.0f}" if band in (0, BANDS // 2, BANDS - 1) else f"_{band}"
        series[label] = Series(measured[band]["bins_predicted"], measured[band]["bins_actual"], shade(band / BANDS))
    ratio = {"": Series(centres, [b["ratio"] for b in measured], BLUE), "_": Series(centres, [1] * BANDS, GREY, "--")}
    off = {"": Series(centres, [b["error"] for b in measured], ORANGE)}
    with plot(out / "calibration.png", 3) as (left, middle, right):
        lines(left, f"{BINS} equal bins", "predicted variance", "squared error", series, "xy", columns=2)
        lines(middle, "on the whole", "timestep", "squared error / variance", ratio)
        lines(right, "within the bins", "timestep", "mean |ratio − 1|", off)
    return {"all": everything, "bands": measured}


def part_errors(out: Path, error: np.ndarray, scores: dict[str, np.ndarray]) -> dict:
    """The error of the most certain pixels, by the confidence, by two filters, and by the errors themselves."""
    curves = {"oracle": sparsification(error, error)}
    curves |= {name: sparsification(error, scores[name]) for name in ORDERS}
    curves["random"] = np.full(100, curves["oracle"][-1])
    areas = {name: ause(curve, curves["oracle"]) for name, curve in curves.items()}
    rows = {}
    for name, curve in curves.items():
        rows[name] = {f"PSNR, best {k} %": -20 * np.log10(curve[k - 1]) for k in (100, 90, 75, 50, 25)}
        rows[name]["AUSE"] = areas[name]
    print(markdown("order of pixels", rows))

    percent, series = list(range(1, 101)), {}
    for (name, curve), colour in zip(curves.items(), (GREEN, BLUE, ORANGE, PURPLE, GREY)):
        style = "--" if name == "random" else "-"
        series[f"{name} ({areas[name]:.2f})"] = Series(percent, 255 * curve, colour, style)
    with plot(out / "error.png", 1, 3.2) as (axes,):
        x, y = "pixels kept, the most certain first, %", "RMSE (0..255)"
        lines(axes, "in brackets: AUSE", x, y, series, columns=3)
    return {name: {"rmse": curve.tolist(), "ause": areas[name]} for name, curve in curves.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns the exit code."""
    args = parse(arguments)
    args.device = choose_device(args.device)
    pyplot()  # now, rather than after an hour, if it is not there
    model = load_model(args.model, args.device)
    if not model.has_variance:
        raise ValueError(f"{args.model} has no variance channel: train it further with train.py --loss cdiff")
    found = find_pairs(args.data)
    train, test, split = held_out_pairs(found.pairs, args.model)
    test = evenly(test, args.limit)
    masked = all(mask_path(pair, "change") for pair in test)
    print("\n".join(describe(found)))
    print(f"{len(test)} of the held-out pairs, by {split}; {'with' if masked else 'no'} change masks\n")
    _, colours = training_colours(train)
    pixels, bands = measure(model, test, colours, masked, args)

    result = origin("confidence.py", arguments, args) | {"split": split, "pairs": len(test)}
    args.out.mkdir(parents=True, exist_ok=True)
    error, shown = pixels.pop("error"), range(min(ROWS, len(test)))
    if masked:
        change = pixels.pop("change")
        result["detection"] = part_detection(pixels, change)
        shown = np.argsort([-np.count_nonzero(read_mask(pair, "change")) for pair in test], kind="stable")[:ROWS]
    result["calibration"] = part_calibration(args.out, bands, model.scheduler.num_train_timesteps)
    result["error_curve"] = part_errors(args.out, error, pixels)
    write_json(args.out / "confidence.json", result)
    save_image(args.out / "examples.png", examples(model, test, shown, masked, args))
    print(f"everything is in {args.out}/")
    return 0


if __name__ == "__main__":
    run(main)
