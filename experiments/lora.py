"""Full fine-tuning against low-rank updates (`train.py --lora`), from the same base, at equal steps and at equal time.

    python -m experiments.lora --data sen12-synthetic/ --base models/small-base --train-steps 400
    python -m experiments.lora --data real/ --base models/tiny --train-steps 200

Each arm is trained by train.py with several seeds. "Equal time" gives an arm the seconds that full fine-tuning took:
its number of steps follows from the speed in its log. All are scored on the same held-out pairs with the same noise:
PSNR and SSIM of the translations, the squared error of the prediction, and its ratio to the predicted variance, which
is 1 where the confidence is calibrated. Trainings are kept in --runs; the same command continues them. Writes
lora-NAME.json and lora-NAME.md to --out, where NAME is that of the data folder.
"""

import argparse
from pathlib import Path

import torch

import evaluate
import train
from cdiffset import CDiffSET
from checkpoint import read_table
from common import DEVICE_HELP, Parser, choose_device, positive, run, seed_number
from data import decide_reading, evenly, find_pairs, read_batches, read_center
from experiments.report import origin, write_results
from images import Reading
from splits import split_pairs

BATCH = 16  # pairs, in training and scoring
FULL = "full fine-tuning"


def trained(args: argparse.Namespace, rank: int | None, seed: int, steps: int) -> Path:
    """Trains an arm, or continues or finds its training; returns its folder. Exits if a signal stops it."""
    out = args.runs / f"{'full' if rank is None else f'rank{rank}'}-{steps}-{seed}"
    options = {
        "data": args.data, "model": args.base, "out": out, "steps": steps, "seed": seed, "size": args.size,
        "batch-size": BATCH, "lr": args.lr if rank is None else args.lora_lr, "dtype": args.dtype, "workers": 0,
        "device": args.device, "ema": 0.99, "save-every": 100, "validate-every": max(1, steps // 2),
        "validate-images": 16,
    }  # fmt: skip
    if rank is not None:
        options["lora"] = rank
    if code := train.main([*(f"--{key}={value}" for key, value in options.items()), "--resume"]):
        raise SystemExit(code)
    return out


@torch.inference_mode()
def score(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The scores of a run's best model on the held-out pairs."""
    model = CDiffSET.from_pretrained(folder / "model").to(args.device)
    pairs = evenly(split_pairs(find_pairs(args.data).pairs).test, args.limit)
    reading, _ = decide_reading(pairs, Reading(**model.trained_on))
    rows, errors, ratios = [], [], []
    for numbers, sar, eo in read_batches(lambda i: read_center(pairs[i], args.size, reading), len(pairs), BATCH):
        sar, eo = sar.to(args.device), eo.to(args.device)
        made, _ = model.translate(sar, 10, numbers, "trailing")
        rows += evaluate.score(made.cpu(), eo.cpu())
        z_sar, z_eo = model.encode(torch.cat([sar, eo])).float().chunk(2)
        for t in train.MEASURED_AT:
            error, variance = model.noise_error(z_sar, z_eo, t, numbers)
            errors.append(float(error.mean()))
            ratios.append(float((error / variance).mean()))
    quality = evaluate.means(rows)
    return {
        "PSNR, dB ↑": quality["psnr"],
        "SSIM ↑": quality["ssim"],
        "prediction error ↓": sum(errors) / len(errors),
        "squared error / variance (1)": sum(ratios) / len(ratios),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="a dataset in any layout that train.py knows")
    add("--base", default="models/small-base", metavar="PATH", help="the model to start from (default: %(default)s)")
    add("--ranks", type=positive, nargs="+", default=[4, 16, 64], metavar="R", help="(default: 4 16 64)")
    add("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--train-steps", type=positive, default=400, metavar="N", help="of full fine-tuning (default: %(default)s)")
    add("--lr", type=float, default=6e-4, help="of full fine-tuning (default: %(default)s)")
    add("--lora-lr", type=float, default=6e-4, help="of the low-rank updates (default: %(default)s)")
    add("--size", type=positive, default=64, help="side of the crops in pixels (default: %(default)s)")
    add("--limit", type=positive, default=64, metavar="N", help="held-out pairs to score (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/lora"), metavar="DIR", help="for trainings (default: %(default)s)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="for results (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains and scores all arms; returns the exit code."""
    args = parse(arguments)
    args.device = choose_device(args.device)
    results: dict[str, dict[str, list[float]]] = {}

    def add(row: str, folder: Path) -> float:
        log = read_table(folder / "log.csv")
        speeds = sorted(row["images_per_second"] for row in log)
        seconds = len(log) * BATCH / speeds[len(speeds) // 2]
        for column, value in (score(args, folder) | {"steps": len(log), "seconds": seconds}).items():
            results.setdefault(row, {}).setdefault(column, []).append(value)
        return seconds

    for seed in args.seeds:
        allowed = add(FULL, trained(args, None, seed, args.train_steps))
        for rank in args.ranks:
            took = add(f"rank {rank}, equal steps", trained(args, rank, seed, args.train_steps))
            steps = round(args.train_steps * allowed / took)
            add(f"rank {rank}, equal time", trained(args, rank, seed, steps))

    note = f"mean ± standard deviation over the seeds {', '.join(map(str, args.seeds))}"
    stem = args.out / f"lora-{Path(args.data).resolve().name}"
    write_results(stem, origin("experiments.lora", arguments, args), results, note)
    return 0


if __name__ == "__main__":
    run(main)
