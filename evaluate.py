"""Scores translations against the true EO images.

    python evaluate.py --data sen12/ --model runs/mine/model                    translates the test pairs, scores them
    python evaluate.py --data sen12/ --model runs/mine/model --protocol paper   as the published numbers were made
    python evaluate.py --images made/ --truth eo/                               scores the images of any other method

    options -> pairs -> translations, a PNG each -> scores of each image -> table, metrics.json, contact_sheet.png

PSNR, SSIM and SCC are torchmetrics'. LPIPS (VGG) and FID (2048 features) need the packages lpips and pytorch-fid. A
model is scored beside three yardsticks:

    mean image      every pixel has the mean colour of the training set
    colour look-up  every pixel has the mean colour of the training pixels with the same local SAR level
    VAE             the true EO image, encoded and decoded: about the best that a latent diffusion model can reach

The test pairs are those of split.json beside the model, which train.py writes; without it, those of seed 0. SAR
images are read as in the model's training, unless --scale or --stretch says otherwise.

--protocol paper does what the released code does: images x in [-1, 1] become clamp(x + 0.5, 0, 1) before all metrics
but FID; the first 100 pairs, one at a time; 50 leading steps. See docs/evaluating.md.

The same command continues an interrupted evaluation. Two folders are paired by file names without the ending.
"""

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdiffset import CDiffSET, pad_to_multiple
from common import (
    DEVICE_HELP,
    Parser,
    changed_settings,
    choose_device,
    exclusive,
    positive,
    read_json,
    run,
    seed_number,
    write_json,
)
from data import (
    Pair,
    decide_reading,
    describe,
    evenly,
    find_pairs,
    held_out_pairs,
    pair_folders,
    read_batches,
    read_center,
    read_pair,
    seed_of,
)
from images import EO_KINDS, SAR_KINDS, Reading, confidence_picture, grid, read_eo, save_image, to_uint8
from metrics import fit_colours, frechet_distance, load_inception, load_lpips, look_up, missing_package, psnr, scc, ssim
from sample import DEFAULT_SPACING, DEFAULT_STEPS, load_model
from scheduler import PREDICTION_TYPES, SPACINGS
from weights import network_digest

METRICS = {"psnr": psnr, "ssim": ssim, "scc": scc}  # of images in [0, 1]
BEST = 100.0  # the PSNR of equal images, dB: JSON has no infinity
FITTED_ON = 400  # training pairs for the mean image and the colour look-up
STANDARD = {"limit": None, "batch_size": 8, "steps": DEFAULT_STEPS, "spacing": DEFAULT_SPACING}
PAPER = {"limit": 100, "batch_size": 1, "steps": 50, "spacing": "leading"}
# options without meaning for two folders
OF_MODELS = ("data", "model", "unet", "prediction_type", "steps", "spacing", "seed", "size", "scale", "stretch")

# ----------------------------------------------------------------------------------------------------------
# Options


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, completed by the values of the protocol."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="a data set in any layout that train.py reads")
    add("--model", type=Path, metavar="PATH", help="a C-DiffSET model folder")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--prediction-type", choices=PREDICTION_TYPES, help="what the U-Net predicts (default: as the model says)")
    add("--images", type=Path, metavar="DIR", help="score the images in this folder and below")
    add("--truth", type=Path, metavar="DIR", help="the true images for --images")
    add("--out", type=Path, metavar="DIR", help="where to write (default: results/ and the name of the run or folder)")
    add("--protocol", choices=("standard", "paper"), default="standard", help="see above (default: %(default)s)")
    add("--size", type=positive, help="side of the central crop (default: whole images)")
    add("--limit", type=positive, metavar="N", help="score N pairs, spread over all (default: all)")
    add("--steps", type=positive, help=f"denoising steps (default: {DEFAULT_STEPS})")
    add("--spacing", choices=SPACINGS, help=f"of the steps (default: {DEFAULT_SPACING})")
    add("--seed", type=seed_number, help="image i starts from the noise of seed + i (default: 0)")
    add("--scale", choices=SAR_KINDS,
        help="what SAR numbers are (default: as in the model's training, else auto)")
    add("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"), help="percentiles of SAR that become -1 and 1")
    add("--eo-scale", choices=EO_KINDS, help="what EO numbers are (default: as for --scale)")
    add("--batch-size", type=positive, metavar="N", help=f"images at a time (default: {STANDARD['batch_size']})")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    args = parser.parse_args(arguments)
    if args.images or args.truth:
        if unused := [f"--{name}" for name in OF_MODELS if getattr(args, name) is not None]:
            parser.error(f"{unused[0].replace('_', '-')} has no meaning for two folders of images")
        if not (args.images and args.truth):
            parser.error("two folders are needed: --images, and --truth with the true images")
    elif not (args.data and args.model):
        parser.error("give --data and --model, or two folders of images with --images and --truth")
    for name, value in (PAPER if args.protocol == "paper" else STANDARD).items():
        given, option = getattr(args, name), "--" + name.replace("_", "-")
        if args.protocol == "paper" and given not in (None, value):
            parser.error(f"{option} {given}: --protocol paper has {value}; leave one of the two out")
        if given is None and not (args.images and name in OF_MODELS):
            setattr(args, name, value)
    if args.model and args.seed is None:
        args.seed = 0
    return args


def default_out(args: argparse.Namespace) -> Path:
    """results/NAME, with NAME of the run (runs/NAME/model), model or folder; results/NAME-paper for that protocol."""
    scored = (args.images or args.model).resolve()
    name = scored.parent.name if scored.name == "model" else scored.name if scored.is_dir() else scored.stem
    return Path("results") / (name + "-paper" * (args.protocol == "paper"))


def optional(metric: str, load: Callable, device: str) -> Callable | None:
    """A metric of an optional package; or None, after printing what is missing."""
    if missing := missing_package(metric):
        print(f"no {metric.upper()}: {missing}")
        return None
    return load(device)


# ----------------------------------------------------------------------------------------------------------
# Pairs


def chosen(pairs: list[Pair], args: argparse.Namespace) -> list[Pair]:
    """--limit pairs: the first ones in the paper's protocol, else spread over all."""
    return pairs[: args.limit] if args.protocol == "paper" else evenly(pairs, args.limit or len(pairs))


def wanted_reading(args: argparse.Namespace, trained_on: dict) -> Reading:
    """How to read images: as the options say, else as in the model's training, else "auto"."""
    sar, stretch = trained_on.get("sar", "auto"), trained_on.get("stretch")
    if args.scale or args.stretch:
        sar, stretch = args.scale or "auto", args.stretch
    return Reading(sar, tuple(stretch) if stretch else None, args.eo_scale or trained_on.get("eo", "auto"))


def training_colours(pairs: list[Pair], reading: Reading) -> tuple[Tensor, Tensor]:
    """`fit_colours` of FITTED_ON of the training pairs."""
    return fit_colours(read_pair(pair, reading) for pair in evenly(pairs, FITTED_ON))


def read_images(pair: Pair, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """SAR and EO, or an image of --images and the true one: (3, H, W) in [-1, 1] each."""
    if args.data:
        return read_center(pair, args.size, args.reading)
    image, truth = (read_eo(path, args.reading) for path in (pair.sar, pair.eo))
    if image.shape != truth.shape:
        sizes = [f"{str(p)!r} is {x.shape[2]}x{x.shape[1]}" for p, x in ((pair.sar, image), (pair.eo, truth))]
        raise ValueError(f"{sizes[0]} but {sizes[1]} pixels: an image and its truth must have equal sizes")
    return image, truth


# ----------------------------------------------------------------------------------------------------------
# Translations


def translation_file(pair: Pair, args: argparse.Namespace, kind: str = "eo") -> Path:
    """Where the translation of a pair is written, or its confidence. A window's name ends in _TOP_LEFT."""
    path = args.out / kind / pair.eo.relative_to(args.data)
    window = f"_{pair.window[0]}_{pair.window[1]}" if pair.window else ""
    return path.with_name(f"{path.stem}{window}.png")


def keep_settings(model: CDiffSET, pairs: list[Pair], args: argparse.Namespace) -> None:
    """Writes translations.json: what the translations depend on.

    Raises ValueError if there are translations that were made with other settings.
    """
    names = ((p.relative_to(args.data), p.stat().st_size, pair.window) for pair in pairs for p in (pair.sar, pair.eo))
    settings = {"vae": network_digest(model.vae), "unet": network_digest(model.unet), **model.scheduler.config}
    settings |= {"pairs": seed_of(*names), "sar": args.reading.sar, "stretch": list(args.reading.stretch or [])}
    settings |= {key: getattr(args, key) for key in ("steps", "spacing", "seed", "size")}
    file = args.out / "translations.json"
    was = read_json(file) if file.exists() and translation_file(pairs[0], args).exists() else settings
    if changed := changed_settings(was, settings):
        raise ValueError(f"{args.out} holds another evaluation ({changed}): give another --out, or delete it")
    write_json(file, settings)


def translate(model: CDiffSET, pairs: list[Pair], args: argparse.Namespace) -> None:
    """Writes the translations that are missing, batch by batch, and their confidence if the model has it."""
    files = [translation_file(pair, args) for pair in pairs]
    done = next((i for i, file in enumerate(files) if not file.exists()), len(files))
    if done:
        print(f"{done} of {len(files)} images are translated already")
    start = done // args.batch_size * args.batch_size  # the same batches as without the interruption
    batches = read_batches(lambda i: read_images(pairs[i], args), len(pairs), args.batch_size, start, bar="translating")
    for numbers, sar, _ in batches:
        images, confidence = model.translate(sar, args.steps, [args.seed + i for i in numbers], args.spacing)
        for k, i in enumerate(numbers):
            pictures = {} if confidence is None else {"confidence": confidence_picture(confidence[k])}
            pictures["eo"] = images[k]  # last: where the image is, the pair is done
            for kind, picture in pictures.items():
                path = translation_file(pairs[i], args, kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(path, picture)


# ----------------------------------------------------------------------------------------------------------
# Scores


def score(
    images: Tensor, truth: Tensor, protocol: str = "standard", lpips: Callable | None = None
) -> list[dict[str, float]]:
    """The metrics of each image: two (B, 3, H, W) in [-1, 1] -> B dictionaries."""
    paper = protocol == "paper"
    unit = [(x + 0.5).clamp(0, 1) if paper else x / 2 + 0.5 for x in (images, truth)]
    columns = {name: metric(*unit).clamp(max=BEST).tolist() for name, metric in METRICS.items()}
    if lpips:  # expects [-1, 1], but the released code gives it [0, 1]
        columns["lpips"] = lpips(*(unit if paper else (images, truth))).tolist()
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over all images."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@torch.inference_mode()
def yardsticks(model: CDiffSET, colours: tuple[Tensor, Tensor], sar: Tensor, eo: Tensor) -> dict[str, Tensor]:
    """{yardstick: its images} for SAR and EO images, (B, 3, H, W) in [-1, 1]. colours: of `training_colours`."""
    mean, by_level = colours
    decoded = model.decode(model.encode(pad_to_multiple(eo, model.unit))).float().clamp(-1, 1).cpu()
    return {
        "mean image": mean[:, None, None].expand_as(eo),
        "colour look-up": look_up(by_level, sar),
        "VAE": decoded[:, :, : eo.shape[2], : eo.shape[3]],
    }


# ----------------------------------------------------------------------------------------------------------
# Results


def markdown(corner: str, rows: dict[str, dict[str, str | float | None]], columns: Iterable[str] = ()) -> str:
    """A Markdown table of {row: {column: text or number}}, aligned for terminals too. A missing value stays empty.

    columns: their order, if it is not that of the rows.
    """
    columns = list(columns) or list(dict.fromkeys(name for row in rows.values() for name in row))
    table = [[corner, *columns]]
    for name, row in rows.items():
        values = [row.get(column) for column in columns]
        table.append([name, *(f"{x:.3f}" if isinstance(x, float) else x or "" for x in values)])
    first, *others = (max(3, *map(len, column)) for column in zip(*table))
    lines = [" | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in table]
    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"


def contact_sheet(pairs: list[Pair], psnrs: list[float], args: argparse.Namespace) -> None:
    """Writes a picture of the three best, middle and worst images by PSNR, beside the true ones."""
    order = np.argsort([-value for value in psnrs], kind="stable")
    middle, rows = len(order) // 2, []
    for i in [*order[:3], *order[middle - 1 : middle + 2], *order[-3:]] if len(order) >= 9 else order:
        row = dict(zip(("SAR" if args.data else "generated", "EO"), read_images(pairs[i], args)))
        if args.data:
            row["generated"] = read_eo(translation_file(pairs[i], args))
            if (confidence := translation_file(pairs[i], args, "confidence")).exists():
                row["confidence"] = read_eo(confidence)
        rows.append(row)
    pictures = [[to_uint8(image) for image in row.values()] for row in rows]
    save_image(args.out / "contact_sheet.png", grid(pictures, list(rows[0])))


def main(arguments: list[str] | None = None) -> int:
    """Scores; returns the exit code."""
    args = parse(arguments)
    args.device, args.out = choose_device(args.device), args.out or default_out(args)
    lpips, inception = optional("lpips", load_lpips, args.device), optional("fid", load_inception, args.device)
    with exclusive(args.out):
        # the pairs, and a model's translations of them
        if args.images:
            method, source = "images", "all images"
            pairs = chosen(pair_folders(args.images, args.truth), args)
            args.reading = Reading(eo=args.eo_scale or "auto")
        else:
            method, model = "model", load_model(args.model, args.device, "float32", args.unet, args.prediction_type)
            found = find_pairs(args.data)
            split, source = held_out_pairs(found.pairs, args.model)
            pairs = chosen(split.test, args)
            args.reading, remarks = decide_reading([*split.train, *pairs], wanted_reading(args, model.trained_on))
            print(*model.assumptions, *describe(found), *split.notes, *remarks, sep="\n")
            print(f"{len(pairs)} of {len(split.test)} test pairs, by {source}")
            keep_settings(model, pairs, args)
            translate(model, pairs, args)
            colours = training_colours(split.train, args.reading)

        # their scores
        scores, features = defaultdict(list), ([], [])
        batches = read_batches(lambda i: read_images(pairs[i], args), len(pairs), args.batch_size, bar="scoring")
        for numbers, first, truth in batches:
            if args.images:
                images = {"images": first}
            else:  # a model's images are scored as written, with 8 bits, like those of other methods
                images = yardsticks(model, colours, first, truth)
                images["model"] = torch.stack([read_eo(translation_file(pairs[i], args)) for i in numbers])
            for name, made in images.items():
                scores[name] += score(made, truth, args.protocol, lpips)
            if inception:
                for collected, batch in zip(features, (images[method], truth)):
                    collected.append(inception(batch / 2 + 0.5))
        mean = {name: means(rows) for name, rows in scores.items()}
        if inception and len(pairs) > 1:  # a covariance needs two images
            mean[method]["fid"] = frechet_distance(*map(np.concatenate, features))

        # the table and the files
        how = "x / 2 + 0.5" if args.protocol == "standard" else "clamp(x + 0.5, 0, 1), like the published numbers"
        print(f"protocol {args.protocol}: {len(pairs)} images, compared as {how}")
        print(markdown("", mean), end="")
        rows = [{"file": str(pair.eo), **row} for pair, row in zip(pairs, scores[method])]
        command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if arguments is None else arguments)])
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        settings["reading"] = args.reading._asdict()
        about = {"command": command, "date": str(date.today()), "torch": torch.__version__, "settings": settings}
        write_json(args.out / "metrics.json", about | {"split": source, "mean": mean, "images": rows})
        contact_sheet(pairs, [row["psnr"] for row in rows], args)
    print(f"wrote {args.out}/metrics.json and contact_sheet.png (the three best, middle and worst by PSNR)")
    return 0


if __name__ == "__main__":
    run(main)
