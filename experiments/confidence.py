"""Is the confidence right? Measures it on held-out pairs, beside what simple filters achieve.

    python -m experiments.confidence --data sen12-synthetic/ --model models/tiny --limit 96

1. Detection of changes, with the change masks of the synthetic dataset: does a score rank the changed pixels above the
   others? AUROC and average precision, for changes in SAR only and in EO only, each against unchanged pixels. Scores:
     1 / confidence    the variance at the middle step of `translate`, which sees the SAR image only
     pair: variance    of a real pair: its EO latent is noised to timestep t and predicted, DRAWS times
     pair: error       the squared error of that prediction; both as 7x7 means
   and of filters: 7x7 mean and standard deviation of SAR; 7x7 means of the gradients of the generated and the true EO
   image, and of the difference between the true EO image and the colour look-up.
2. Calibration: the predicted variance against the squared error of the prediction, by timestep (`calibration`).
3. Sparsification: does the error fall when the least confident pixels are dropped (`sparsification`, `ause`)?

Writes confidence.json, confidence.md (the tables), calibration.png and error.png to --out.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdiffset import CDiffSET, pad_to_multiple
from common import DEVICE_HELP, Parser, atomic, choose_device, positive, run, write_json
from data import Pair, decide_reading, evenly, find_pairs, read_batches, read_pair, seed_of
from evaluate import markdown, training_colours
from experiments.report import BLUE, GREEN, GREY, ORANGE, PURPLE, origin, plot, pyplot
from experiments.synth import mask_path, read_mask
from images import Reading
from metrics import local_mean, look_up
from sample import DEFAULT_SPACING, DEFAULT_STEPS, load_model
from splits import held_out_pairs

KINDS = {"only in SAR": 1, "only in EO": 2}  # values of the change masks
UNCERTAINTY = "1 / confidence"
ORDERS = (UNCERTAINTY, "SAR deviation", "gradient of generated")  # in which pixels are dropped
TIMESTEPS, DRAWS = (501, 801), 4  # at which real pairs are noised, and how often
BANDS, BINS = 10, 20  # of timesteps; of predicted variances
BATCH = 8  # images

# ----------------------------------------------------------------------------------------------------------
# Measures


def ranking(score: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision of scores (N,) that should be higher where `truth`, bool (N,), is true.

    AUROC is the probability that a true pixel has the higher score, where ties count half. Average precision is the sum
    of precision * increase of recall over all thresholds, as in scikit-learn. `truth` must have both values.
    """
    thresholds, ties = np.unique(score[truth], return_counts=True)
    false = np.sort(score[~truth])
    below, up_to = (np.searchsorted(false, thresholds, side) for side in ("left", "right"))
    share = ties / ties.sum()  # of the true pixels, by threshold
    found = np.cumsum(ties[::-1])[::-1]
    precision = found / (found + len(false) - below)
    return float(np.sum(share * (below + up_to) / (2 * len(false)))), float(np.sum(share * precision))


def detect(score: np.ndarray, change: np.ndarray) -> dict[str, float]:
    """AUROC and average precision (AP) of each kind of change that occurs in a mask (N,), against unchanged pixels."""
    results = {}
    for kind, value in KINDS.items():
        truth, same = change == value, change == 0
        if truth.any():
            auroc, precision = ranking(score[same | truth], truth[same | truth])
            results |= {f"{kind}: AUROC": auroc, f"{kind}: AP": precision}
    return results


def sparsification(squared_error: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """RMSE of the most certain 1, 2, ... 100 % of the pixels: two (N,) -> (100,), for N of at least 100."""
    total = np.cumsum(squared_error[np.argsort(uncertainty, kind="stable")], dtype=np.float64)
    kept = np.round(np.arange(1, 101) / 100 * len(total)).astype(int)
    return np.sqrt(total[kept - 1] / kept)


def ause(curve: np.ndarray, oracle: np.ndarray) -> float:
    """Area under the sparsification error (Ilg et al., ECCV 2018): between a curve of `sparsification` and that of the
    true errors, both divided by the RMSE of all pixels. 0: the uncertainty sorts the pixels as the errors do.
    """
    return float(np.trapezoid(curve - oracle, dx=0.01) / curve[-1])


def calibration(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float | list[float]]:
    """How well predicted variances (N,) agree with squared errors (N,).

    ratio: mean squared error / mean variance; 1 is right. bins: BINS equally filled ones by predicted variance, the
    means of both in each. error: mean over the bins of |squared error / variance - 1|. correlation: of the logarithms.
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
# Scores of pixels


def deviation(image: Tensor) -> Tensor:
    """Standard deviation in the 7x7 neighbourhood: (B, 3, H, W) -> (B, H, W)."""
    grey = image.mean(dim=1, keepdim=True)
    return (local_mean(grey**2) - local_mean(grey) ** 2).clamp(min=0).sqrt()


def gradient(image: Tensor) -> Tensor:
    """Length of the gradient of the brightness, 7x7 mean: (B, 3, H, W) -> (B, H, W)."""
    dy, dx = torch.gradient(image.mean(dim=1, keepdim=True), dim=(2, 3))
    return local_mean((dx**2 + dy**2).sqrt())


def pair_scores(model: CDiffSET, z_sar: Tensor, z_eo: Tensor, numbers: range) -> dict[str, Tensor]:
    """{name: (B, H, W)}: variance and error of real pairs with these numbers, latents (B, 4, h, w)."""
    scores = {}
    for t in TIMESTEPS:
        draws = [
            torch.cat(model.noise_error(z_sar, z_eo, t, [seed_of(0, "pair", t, k, i) for i in numbers]), dim=1)
            for k in range(DRAWS)
        ]
        maps = F.interpolate(torch.stack(draws).mean(dim=0), scale_factor=model.vae.factor, mode="bicubic").cpu()
        error, variance = (local_mean(maps[:, [channel]]) for channel in (0, 1))
        scores |= {f"pair: variance, t = {t}": variance, f"pair: error, t = {t}": error}
    return scores


def by_timestep(model: CDiffSET, z_sar: Tensor, z_eo: Tensor, numbers: range) -> np.ndarray:
    """(2, BANDS, N): predicted variance and squared error of all latent pixels, at one timestep in each band."""
    width, maps = model.scheduler.num_train_timesteps // BANDS, []
    for band in range(BANDS):
        seeds = [seed_of(0, "calibration", band, i) for i in numbers]
        t = torch.tensor([band * width + seed % width for seed in seeds], device=z_eo.device)
        error, variance = model.noise_error(z_sar, z_eo, t, seeds)
        maps.append(torch.stack([variance.flatten(), error.flatten()]))
    return torch.stack(maps, dim=1).cpu().numpy()


def measure(
    model: CDiffSET, pairs: list[Pair], reading: Reading, colours: Tensor
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{name: (N,)}: the scores of all pixels, the squared "error" and, if there are masks, the "change"; and the result
    of `by_timestep`.
    """
    masked = all(mask_path(pair, "change") for pair in pairs)
    columns, bands = defaultdict(list), []
    for numbers, sar, eo in read_batches(lambda i: read_pair(pairs[i], reading), len(pairs), BATCH, bar="measuring"):
        made, confidence = model.translate(sar, DEFAULT_STEPS, list(numbers), DEFAULT_SPACING)
        made, (height, width) = made.cpu(), sar.shape[2:]
        images = pad_to_multiple(torch.cat([sar, eo]), model.unit).to(model.device)
        with torch.inference_mode():
            z_sar, z_eo = model.encode(images).float().chunk(2)
        found = {UNCERTAINTY: 1 / confidence.cpu()[:, 0]}
        if masked:
            found |= pair_scores(model, z_sar, z_eo, numbers)
            found["change"] = torch.from_numpy(np.stack([read_mask(pairs[i], "change") for i in numbers]))
            found["gradient of EO"] = gradient(eo)
            found["EO - colour look-up"] = local_mean((eo - look_up(colours, sar)).abs())
        found |= {"SAR mean": local_mean(sar), "SAR deviation": deviation(sar), "gradient of generated": gradient(made)}
        found["error"] = ((made - eo) / 2).square().mean(dim=1)
        for name, values in found.items():
            columns[name].append(values[:, :height, :width].flatten().numpy())
        bands.append(by_timestep(model, z_sar, z_eo, numbers))
    return {name: np.concatenate(parts) for name, parts in columns.items()}, np.concatenate(bands, axis=2)


# ----------------------------------------------------------------------------------------------------------
# The program


def draw(out: Path, bands: list[dict], centres: list[int], curves: dict[str, np.ndarray]) -> None:
    """The two plots. centres: timesteps in the middle of the bands. curves: RMSE by the share of pixels kept."""
    shade = pyplot().get_cmap("viridis")
    with plot(out / "calibration.png", "predicted variance", f"squared error, mean of {BINS} equal bins") as axes:
        axes.set(xscale="log", yscale="log")
        for band, centre in reversed(list(zip(bands, centres))):
            look = {"color": shade(centre / (centres[-1] + 1)), "marker": "o", "markersize": 4}
            axes.plot(band["bins_predicted"], band["bins_actual"], label=f"t ≈ {centre}", **look)
        ends = min(b["bins_predicted"][0] for b in bands), max(b["bins_predicted"][-1] for b in bands)
        axes.plot(ends, ends, color=GREY, linestyle="--", label="equal")
    with plot(out / "error.png", "pixels kept, the most certain first, %", "RMSE (0..255)") as axes:
        for (name, curve), colour in zip(curves.items(), (GREEN, BLUE, ORANGE, PURPLE, GREY)):
            label = f"{name} (AUSE {ause(curve, curves['oracle']):.2f})"
            axes.plot(range(1, 101), 255 * curve, color=colour, label=label)


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns the exit code."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="a dataset in any layout that train.py knows")
    add("--model", required=True, type=Path, metavar="PATH", help="a C-DiffSET model folder, trained with C-Diff")
    add("--out", type=Path, default=Path("results/confidence"), metavar="DIR",
        help="where to write (default: %(default)s)")
    add("--limit", type=positive, default=256, metavar="N",
        help="held-out pairs to measure, evenly chosen; all numbers stay in memory (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    args = parser.parse_args(arguments)
    args.device = choose_device(args.device)
    pyplot()  # now, rather than after an hour, if it is missing
    model = load_model(args.model, args.device)
    if not model.has_variance:
        raise ValueError(f"{args.model} has no variance channel: train it further with train.py --loss cdiff")
    split, source = held_out_pairs(find_pairs(args.data).pairs, args.model)
    reading, remarks = decide_reading(split.train, Reading(**model.trained_on))
    pairs = evenly(split.test, args.limit)
    print("\n".join([*remarks, f"{len(pairs)} held-out pairs, by {source}"]))
    _, colours = training_colours(split.train, reading)
    pixels, bands = measure(model, pairs, reading, colours)
    error, change = pixels.pop("error"), pixels.pop("change", np.zeros(0))

    result, tables = origin("experiments.confidence", arguments, args) | {"split": source, "pairs": len(pairs)}, []
    if change.any():
        result["changed"] = {kind: float(np.mean(change == value)) for kind, value in KINDS.items()}
        result["detection"] = {name: detect(score, change) for name, score in pixels.items()}
        tables.append(markdown("score", result["detection"], list(next(iter(result["detection"].values())))))

    width = model.scheduler.num_train_timesteps // BANDS
    measured = [calibration(*band) for band in zip(*bands)]
    everything = calibration(*bands.reshape(2, -1))
    result["calibration"] = {"all": everything, "bands": measured}
    titles = {"ratio": "squared error / variance", "error": "calibration error", "correlation": "correlation of logs"}
    names = [f"t = {band * width} ... {(band + 1) * width - 1}" for band in range(BANDS)] + ["all"]
    rows = [{title: row[key] for key, title in titles.items()} for row in [*measured, everything]]
    tables.append(markdown("timesteps", dict(zip(names, rows)), list(titles.values())))

    curves = {"oracle": sparsification(error, error)}
    curves |= {name: sparsification(error, pixels[name]) for name in ORDERS}
    curves["random"] = np.full(100, curves["oracle"][-1])
    areas = {name: ause(curve, curves["oracle"]) for name, curve in curves.items()}
    result["error_curve"] = {name: {"rmse": curve.tolist(), "ause": areas[name]} for name, curve in curves.items()}
    rows = {
        name: {f"PSNR, best {k} %": -20 * float(np.log10(curve[k - 1])) for k in (100, 90, 75, 50, 25)}
        for name, curve in curves.items()
    }
    rows = {name: row | {"AUSE": areas[name]} for name, row in rows.items()}
    tables.append(markdown("order of pixels", rows, list(rows["oracle"])))

    write_json(args.out / "confidence.json", result)
    about = f"`{result['command']}`, commit {result['commit']}, {result['machine']}, {result['date']}.\n"
    with atomic(args.out / "confidence.md") as temporary:
        temporary.write_text("\n".join([*tables, about]), encoding="utf-8")
    draw(args.out, measured, [band * width + width // 2 for band in range(BANDS)], curves)
    print("\n".join(tables), end="")
    print(f"wrote confidence.json, confidence.md and two plots to {args.out}/")
    return 0


if __name__ == "__main__":
    run(main)
