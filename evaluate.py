"""Scores translations against the true EO images.

    python evaluate.py --data sen12/ --model runs/mine/model                    translates the test pairs, scores them
    python evaluate.py --data sen12/ --model runs/mine/model --protocol paper   the same in the paper's way
    python evaluate.py --images made/ --truth eo/                               scores the images of any other method

    options -> pairs -> translations, a PNG each -> scores of each image -> table, metrics.json, contact_sheet.png

PSNR, SSIM and SCC equal those of torchmetrics. LPIPS (VGG) and FID (2048 features) need the packages lpips and
pytorch-fid. A model is compared with three yardsticks:

    mean image      every pixel has the mean colour of the training set
    colour look-up  every pixel has the mean colour of the training pixels with the same local SAR level
    VAE             the true EO image, encoded and decoded: about the best that a latent diffusion model can reach

The test pairs are those of the data set's own split. Without one, they are those of split.json beside the model, which
train.py writes; without that file, those of the split with seed 0. Images are read as in the training of the model,
unless --scale, --stretch or --eo-scale says otherwise.

--protocol paper follows the released code: it maps images x in [-1, 1] to clamp(x + 0.5, 0, 1) for all metrics except
FID, takes the first 100 pairs one at a time, and samples with 50 leading steps. See docs/evaluating.md.

The same command continues an interrupted evaluation. --images and --truth are paired by file names without endings.
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
    pair_folders,
    read_batches,
    read_center,
    read_pair,
    require_equal_sizes,
    seed_of,
)
from images import EO_KINDS, SAR_KINDS, Reading, confidence_picture, grid, read_eo, save_image, to_uint8
from metrics import fit_colours, frechet_distance, load_inception, load_lpips, look_up, missing_package, psnr, scc, ssim
from sample import DEFAULT_SPACING, DEFAULT_STEPS, load_model
from scheduler import PREDICTION_TYPES, SPACINGS
from splits import held_out_pairs
from weights import network_digest

METRICS = {"psnr": psnr, "ssim": ssim, "scc": scc}  # of images in [0, 1]
BEST = 100.0  # dB; the PSNR of equal images, since JSON has no infinity
FITTED_ON = 400  # training pairs that give the mean image and the colour look-up
STANDARD = {"limit": None, "batch_size": 8, "steps": DEFAULT_STEPS, "spacing": DEFAULT_SPACING}
PAPER = {"limit": 100, "batch_size": 1, "steps": 50, "spacing": "leading"}
# options that have no meaning for two folders
OF_MODELS = ("data", "model", "unet", "prediction_type", "steps", "spacing", "seed", "size", "scale", "stretch")

# ----------------------------------------------------------------------------------------------------------
# Options


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. The protocol gives the values of options that are left out."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="a data set in any layout that train.py reads")
    add("--model", type=Path, metavar="PATH", help="a C-DiffSET model folder")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--prediction-type", choices=PREDICTION_TYPES, help="what the U-Net predicts (default: as the model says)")
    add("--images", type=Path, metavar="DIR", help="score the images in this folder and below")
    add("--truth", type=Path, metavar="DIR", help="the true images for --images")
    add("--out", type=Path, metavar="DIR", help="where to write (default: results/NAME, the name of the run or folder)")
    add("--protocol", choices=("standard", "paper"), default="standard", help="see above (default: %(default)s)")
    add("--size", type=positive, help="side of the central crop (default: whole images)")
    add("--limit", type=positive, metavar="N", help="score N pairs, spread over all (default: all)")
    add("--steps", type=positive, help=f"denoising steps (default: {DEFAULT_STEPS})")
    add("--spacing", choices=SPACINGS, help=f"spacing of the steps (default: {DEFAULT_SPACING})")
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
    """Returns results/NAME: the run (runs/NAME/model), model or folder; results/NAME-paper for that protocol."""
    scored = (args.images or args.model).resolve()
    name = scored.parent.name if scored.name == "model" else scored.name if scored.is_dir() else scored.stem
    return Path("results") / (name + "-paper" * (args.protocol == "paper"))


def optional(metric: str, load: Callable, device: str) -> Callable | None:
    """Loads a metric of an optional package. Without the package, prints what is missing and returns None."""
    if missing := missing_package(metric):
        print(f"no {metric.upper()}: {missing}")
        return None
    return load(device)


# ----------------------------------------------------------------------------------------------------------
# Pairs


def chosen(pairs: list[Pair], args: argparse.Namespace) -> list[Pair]:
    """Takes --limit pairs: in the paper's protocol the first ones, else pairs spread over all."""
    return pairs[: args.limit] if args.protocol == "paper" else evenly(pairs, args.limit or len(pairs))


def wanted_reading(args: argparse.Namespace, trained_on: dict) -> Reading:
    """Returns how to read images: as the options say, else as in the model's training, else "auto"."""
    sar, stretch = trained_on.get("sar", "auto"), trained_on.get("stretch")
    if args.scale or args.stretch:
        sar, stretch = args.scale or "auto", args.stretch
    return Reading(sar, tuple(stretch) if stretch else None, args.eo_scale or trained_on.get("eo", "auto"))


def training_colours(pairs: list[Pair], reading: Reading) -> tuple[Tensor, Tensor]:
    """Fits the two colour yardsticks to FITTED_ON of the training pairs. Returns as `fit_colours`."""
    return fit_colours(read_pair(pair, reading) for pair in evenly(pairs, FITTED_ON))


def read_images(pair: Pair, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Reads a pair, or an image of --images and the true one: two (3, H, W) in [-1, 1]."""
    if args.data:
        return read_center(pair, args.size, args.reading)
    image, truth = (read_eo(path, args.reading) for path in (pair.sar, pair.eo))
    require_equal_sizes(pair, image, truth)
    return image, truth


# ----------------------------------------------------------------------------------------------------------
# Translations


def translation_file(pair: Pair, args: argparse.Namespace, kind: str = "eo") -> Path:
    """Names the file of a pair's translation, or of its confidence. The name of a window ends in _TOP_LEFT."""
    path = args.out / kind / pair.eo.relative_to(args.data)
    window = f"_{pair.window[0]}_{pair.window[1]}" if pair.window else ""
    return path.with_name(f"{path.stem}{window}.png")


def keep_settings(model: CDiffSET, pairs: list[Pair], args: argparse.Namespace) -> None:
    """Writes what the translations depend on to translations.json.

    ValueError: the folder holds translations that were made with other settings.
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
    """Writes the translations that do not exist yet, and their confidence if the model has it."""
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
            pictures["eo"] = images[k]  # written last: its file says that the pair is done
            for kind, picture in pictures.items():
                path = translation_file(pairs[i], args, kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(path, picture)


# ----------------------------------------------------------------------------------------------------------
# Scores


def score(
    images: Tensor, truth: Tensor, protocol: str = "standard", lpips: Callable | None = None
) -> list[dict[str, float]]:
    """Scores each image: two (B, 3, H, W) in [-1, 1] -> B dictionaries {metric: value}."""
    paper = protocol == "paper"
    unit = [(x + 0.5).clamp(0, 1) if paper else x / 2 + 0.5 for x in (images, truth)]
    columns = {name: metric(*unit).clamp(max=BEST).tolist() for name, metric in METRICS.items()}
    if lpips:  # LPIPS expects [-1, 1]; the released code passes [0, 1]
        columns["lpips"] = lpips(*(unit if paper else (images, truth))).tolist()
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Averages each metric over all images."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@torch.inference_mode()
def yardsticks(model: CDiffSET, colours: tuple[Tensor, Tensor], sar: Tensor, eo: Tensor) -> dict[str, Tensor]:
    """Makes {yardstick: images} for SAR and EO images, all (B, 3, H, W) in [-1, 1]. colours: `training_colours`."""
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
    """Formats {row: {column: text or number}} as a Markdown table that terminals show aligned, too.

    corner: the title of the first column. columns: the order of the others (default: as in the rows). A missing value
    stays empty.
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
    """Draws the three best, middle and worst images by PSNR beside the true ones: contact_sheet.png."""
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
    """Runs the evaluation; returns the exit code."""
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
            if model.trained_on:
                print("images are read as in the model's training; --scale, --stretch and --eo-scale overrule")
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
            else:  # a model's images are scored from their 8-bit files, like those of other methods
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
        rows = [{"file": str(pair.eo), "window": pair.window, **row} for pair, row in zip(pairs, scores[method])]
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
