"""Scores translations of the held-out pairs of a dataset, beside what simple means achieve.

    python evaluate.py --data sen12/ --model runs/mine/model

PSNR, SSIM and SCC as in torchmetrics, on images in [0, 1], for the model and for three yardsticks:

    mean image      every pixel is the training set's mean colour
    colour look-up  each pixel gets the mean colour of the training pixels with its local 7x7 SAR level
    VAE             the true EO image, encoded and decoded: no latent diffusion model can be better

Where the dataset has class maps (synth.py's have), also how much land cover the image shows as it is: the share of
pixels, outside the classes that SAR cannot tell, whose nearest class colour is that of the true class.

Which pairs are held out is read from split.json beside the model's folder, where train.py leaves it; without one,
it is the split of seed 0. Written to --out: metrics.json (each image too) and contact_sheet.png.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import synth
from cli import Parser, choose_device, positive, run
from data import Pair, PairDataset, describe, evenly, find_pairs, mask_path, read_pair, split_pairs
from images import confidence_picture, grid, save_image, to_uint8
from metrics import psnr, scc, ssim
from sample import load_model
from weights import write_json

METRICS = {"psnr": psnr, "ssim": ssim, "scc": scc}
LEVELS = 64  # of the colour look-up
FITTED_ON = 400  # training pairs that the two fitted yardsticks look at


def held_out_pairs(pairs: list[Pair], model: Path) -> tuple[list[Pair], list[Pair], str]:
    """(training pairs, held-out pairs, where the split comes from). Raises ValueError if split.json does not fit."""
    file = model.parent / "split.json"
    if not file.exists():
        return *split_pairs(pairs), "the split of seed 0"
    test = set(json.loads(file.read_text())["scenes"]["test"])
    sides = [p for p in pairs if p.scene not in test], [p for p in pairs if p.scene in test]
    if not all(sides):
        raise ValueError(f"{file} does not fit this dataset: it was made for another one; move it away to use seed 0")
    return *sides, str(file)


# ----------------------------------------------------------------------------------------------------------
# Yardsticks


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


def land_cover_agreement(eo: np.ndarray, classes: np.ndarray) -> float:
    """Share of pixels whose nearest class colour is the true class's; roofs, of any colour, are left out.

    eo uint8 (H, W, 3), classes uint8 (H, W), synth.py's class map.
    """
    distance = np.square(eo[:, :, None].astype(np.float32) - synth.COLOURS).sum(axis=-1)
    known = ~np.isin(classes, synth.AMBIGUOUS)
    return float((distance.argmin(axis=-1) == classes)[known].mean())


# ----------------------------------------------------------------------------------------------------------
# Scores


def score(images: Tensor, truth: Tensor, pairs: list[Pair]) -> Iterator[dict[str, float]]:
    """The metrics of each image: two (B, 3, H, W) in [-1, 1] -> B dictionaries."""
    columns = {name: metric(images / 2 + 0.5, truth / 2 + 0.5).tolist() for name, metric in METRICS.items()}
    for i, pair in enumerate(pairs):
        row = {name: values[i] for name, values in columns.items()}
        if path := mask_path(pair, "class"):
            with Image.open(path) as classes:
                row["land_cover"] = land_cover_agreement(to_uint8(images[i]), np.asarray(classes))
        yield row


def table(methods: dict[str, list[dict[str, float]]]) -> str:
    """Means over the images, a line a method."""
    names = list(next(iter(methods.values()))[0])
    lines = [f"{'':16}" + "".join(f"{name:>12}" for name in names)]
    for method, rows in methods.items():
        lines.append(f"{method:16}" + "".join(f"{np.mean([row[name] for row in rows]):12.4f}" for name in names))
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="a dataset in any layout that train.py knows")
    add("--model", required=True, type=Path, metavar="PATH", help="a C-DiffSET model folder")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--out", type=Path, metavar="DIR", help="where to write (default: results/ and the name of the model)")
    add("--size", type=positive, help="side of the central crop (default: the images as they are)")
    add("--limit", type=positive, metavar="N", help="score N held-out pairs, evenly chosen (default: all)")
    add("--steps", type=positive, default=50, help="denoising steps (default: %(default)s, as in the paper)")
    add("--spacing", choices=("leading", "trailing"), default="leading", help="of the steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="image i starts from the noise of seed + i (default: %(default)s)")
    add("--batch-size", type=positive, default=8, help="images at a time (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    # fmt: on
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Scores; returns the exit code."""
    args = parse(arguments)
    device = choose_device(args.device)
    model = load_model(args.model, args.unet, "float32", device)
    found = find_pairs(args.data)
    train, test, split = held_out_pairs(found.pairs, args.model)
    test = evenly(test, args.limit or len(test))
    print("\n".join(describe(found)))
    print(f"{len(test)} of the held-out pairs, by {split}")

    crop = PairDataset(test, args.size, train=False) if args.size else [read_pair(pair) for pair in test]
    mean, colours = fit_colours(read_pair(pair) for pair in train[:: max(1, len(train) // FITTED_ON)])
    methods: dict[str, list] = {"mean image": [], "colour look-up": [], "VAE": [], "model": []}

    def translate(numbers: Iterable[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        sar, eo = (torch.stack(images) for images in zip(*(crop[i] for i in numbers)))
        made, confidence = model.translate(sar.to(device), args.steps, [args.seed + i for i in numbers], args.spacing)
        return sar, eo, made.cpu(), confidence

    for start in tqdm(range(0, len(test), args.batch_size), unit="batch", desc="scoring"):
        numbers = range(start, min(start + args.batch_size, len(test)))
        sar, eo, made, _ = translate(numbers)
        with torch.inference_mode():
            ceiling = model.decode(model.encode(eo.to(device))).clamp(-1, 1)
        candidates = [mean[:, None, None].expand_as(eo), colours[sar_level(sar)].movedim(-1, 1), ceiling, made]
        for rows, images in zip(methods.values(), candidates):
            rows.extend(score(images.float().cpu(), eo, [test[i] for i in numbers]))

    print(table(methods))
    out = args.out or Path("results") / args.model.resolve().name
    order = np.argsort([-row["psnr"] for row in methods["model"]])
    middle = len(order) // 2
    shown = [*order[:3], *order[middle : middle + 3], *order[-3:]] if len(order) >= 9 else order
    pictures = []
    for i in shown:  # made again rather than kept: a test set may have 50,000 images
        *images, confidence = translate([int(i)])
        pictures.append([to_uint8(image[0]) for image in images])
        if confidence is not None:
            pictures[-1].append(confidence_picture(confidence[0]))
    titles = ["SAR", "EO", "generated", "confidence"][: len(pictures[0])]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    means = {m: {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} for m, rows in methods.items()}
    images = [{"file": str(pair.eo), **row} for pair, row in zip(test, methods["model"])]
    write_json(out / "metrics.json", {"settings": settings, "split": split, "mean": means, "images": images})
    save_image(out / "contact_sheet.png", grid(pictures, titles))
    print(f"wrote {out}/metrics.json and contact_sheet.png (the three best, middle and worst by PSNR)")
    return 0


if __name__ == "__main__":
    run(main)
