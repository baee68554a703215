"""Scores translations of the held-out pairs of a dataset, beside what simple means achieve; or any two folders.

    python evaluate.py --data sen12/ --model runs/mine/model            translates the held-out pairs, and scores them
    python evaluate.py --data sen12/ --model ... --protocol paper       the same as the published numbers were made
    python evaluate.py --images made/ --truth eo/                       scores any other method's images

PSNR, SSIM and SCC as in torchmetrics; LPIPS (VGG) and FID (2048 features) where lpips and pytorch-fid and their
weights are installed. FID is of the translations alone; it says little about fewer than some thousand images. A model
stands beside three yardsticks:

    mean image      every pixel is the training set's mean colour
    colour look-up  each pixel gets the mean colour of the training pixels with its local 7x7 SAR level
    VAE             the true EO image, encoded and decoded: roughly what a latent diffusion model can reach

Where the dataset has class maps (synth.py's have), also how much land cover the image shows as it is: the share of
pixels, outside the classes that SAR cannot tell, whose nearest class colour is that of the true class.

Protocols: "standard" scores all held-out pairs on images in [0, 1] (LPIPS: [-1, 1], as it expects). "paper" does what
the released code does: images x in [-1, 1] become clamp(x + 0.5, 0, 1), which clips the darkest and the brightest
quarter of the range, for LPIPS too; the first 100 held-out pairs, one at a time, 50 leading steps. It sets
--limit, --batch-size, --steps and --spacing; other values for them are refused.

Which pairs are held out is read from split.json beside the model's folder, where train.py leaves it; without one,
it is the split of seed 0. In two folders, images are paired by their paths without the ending.

Written to --out: eo/ and confidence/, the translations (the same command goes on where an interrupted one stopped),
metrics.json (each image's too) and contact_sheet.png. A model's images are scored as they were written, with 8 bits,
like any other method's.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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
    center_crop,
    describe,
    evenly,
    find_pairs,
    held_out_pairs,
    mask_path,
    pair_folders,
    read_batches,
    read_center,
    read_mask,
    read_pair,
    seed_of,
)
from experiments.report import markdown, origin
from images import confidence_picture, grid, read_eo, save_image, to_uint8
from metrics import frechet_distance, load_inception, load_lpips, psnr, scc, ssim, what_is_missing
from sample import DEFAULT_SPACING, DEFAULT_STEPS, load_model
from scheduler import SPACINGS
from weights import network_digest
from yardsticks import FITTED_ON, fit_colours, land_cover_agreement, look_up

METRICS = {"psnr": psnr, "ssim": ssim, "scc": scc}  # of images in [0, 1]
BEST = 100.0  # what counts as the PSNR of equal images, dB: JSON has no infinity, nor a mean
STANDARD = {"limit": None, "batch_size": 8, "steps": DEFAULT_STEPS, "spacing": DEFAULT_SPACING}
PAPER = {"limit": 100, "batch_size": 1, "steps": 50, "spacing": "leading"}
OF_MODELS = ("data", "model", "unet", "steps", "spacing", "seed", "size")  # options without meaning for two folders


class Work(NamedTuple):
    """What is scored: image files, a model's or those of any other method."""

    method: str
    split: str  # where it is from
    files: list[Path]
    pairs: list[Pair]  # (SAR, EO), or (image file, truth)
    read: Callable[[int], tuple[Tensor, Tensor]]  # a pair's number -> its two images, each (3, H, W) in [-1, 1]
    yardsticks: Callable[[Tensor, Tensor], dict[str, Tensor]]  # batches of both -> images (B, 3, H, W) by method


# ----------------------------------------------------------------------------------------------------------
# What is scored


def chosen(pairs: list[Pair], args: argparse.Namespace) -> list[Pair]:
    """--limit pairs: the first ones in the paper's protocol, else spread over all."""
    return pairs[: args.limit] if args.protocol == "paper" else evenly(pairs, args.limit or len(pairs))


def training_colours(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """`fit_colours` of training pairs, of which FITTED_ON are looked at."""
    return fit_colours(read_pair(pair) for pair in evenly(pairs, FITTED_ON))


def of_folders(args: argparse.Namespace) -> Work:
    """The images in a folder, and what they should be."""
    pairs = chosen(pair_folders(args.images, args.truth), args)
    files, nothing = [image for image, *_ in pairs], lambda _image, _truth: {}
    return Work("images", "all there are", files, pairs, lambda i: read_pair(pairs[i], read=read_eo), nothing)


def of_model(args: argparse.Namespace, out: Path) -> Work:
    """The held-out pairs of a dataset, which are translated into `out`."""
    model = load_model(args.model, args.device, unet=args.unet)
    found = find_pairs(args.data)
    train, test, split = held_out_pairs(found.pairs, args.model)
    test = chosen(test, args)
    print("\n".join([*describe(found), f"{len(test)} of the held-out pairs, by {split}"]))
    files = [out / "eo" / pair.eo.relative_to(args.data).with_suffix(".png") for pair in test]
    mean, colours = training_colours(train)

    @torch.inference_mode()
    def yardsticks(sar: Tensor, eo: Tensor) -> dict[str, Tensor]:
        """What simple means make of these pairs."""
        decoded = model.decode(model.encode(pad_to_multiple(eo, model.unit))).float().clamp(-1, 1)
        return {
            "mean image": mean[:, None, None].expand_as(eo),
            "colour look-up": look_up(colours, sar),
            "VAE": decoded[:, :, : eo.shape[2], : eo.shape[3]].cpu(),
        }

    work = Work("model", split, files, test, lambda i: read_center(test[i], args.size), yardsticks)
    about = {"vae": network_digest(model.vae), "unet": network_digest(model.unet)} | model.scheduler.config
    keep_settings(work, about, out, args)
    translate(model, work, out, args)
    return work


def keep_settings(work: Work, about: dict, out: Path, args: argparse.Namespace) -> None:
    """Writes down what the translations depend on, `about` and more; ValueError if some are there, made otherwise."""
    files = [path for pair in work.pairs for path in (pair.sar, pair.eo)]
    about["pairs"] = seed_of(*((path.relative_to(args.data), path.stat().st_size) for path in files))
    about |= {key: getattr(args, key) for key in ("steps", "spacing", "seed", "size")}
    file = out / "translations.json"
    was = read_json(file) if file.exists() and work.files[0].exists() else about
    if changed := changed_settings(was, about):
        raise ValueError(f"{out} holds another evaluation ({changed}): give another --out, or delete it")
    write_json(file, about)


def translate(model: CDiffSET, work: Work, out: Path, args: argparse.Namespace) -> None:
    """Writes the translations that are not there yet, batch by batch; and their confidence, where the model has it."""
    total = len(work.files)
    done = next((i for i, file in enumerate(work.files) if not file.exists()), total)
    if done:
        print(f"{done} of {total} images are translated already")
    start = done // args.batch_size * args.batch_size  # so that a batch is what it would have been
    for numbers, sar, _ in read_batches(work.read, total, args.batch_size, start, bar="translating"):
        made, confidence = model.translate(sar, args.steps, [args.seed + i for i in numbers], args.spacing)
        for k, i in enumerate(numbers):
            pictures = {work.files[i]: made[k]}
            if confidence is not None:  # first, so that where the image is, both are
                pictures = {confidence_file(work.files[i], out): confidence_picture(confidence[k])} | pictures
            for path, picture in pictures.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(path, picture)


def confidence_file(image: Path, out: Path) -> Path:
    """Where the confidence of a translation is."""
    return out / "confidence" / image.relative_to(out / "eo")


# ----------------------------------------------------------------------------------------------------------
# Scores


def score(
    images: Tensor, truth: Tensor, pairs: Sequence[Pair], protocol: str = "standard", lpips: Callable | None = None
) -> Iterator[dict[str, float]]:
    """The metrics of each image: two (B, 3, H, W) in [-1, 1] -> B dictionaries."""
    paper = protocol == "paper"  # the value range of the released code, for LPIPS too
    unit = [(x + 0.5).clamp(0, 1) if paper else x / 2 + 0.5 for x in (images, truth)]
    columns = {name: metric(*unit).clamp(max=BEST).tolist() for name, metric in METRICS.items()}
    if lpips:
        columns["lpips"] = lpips(*(unit if paper else (images, truth))).tolist()
    for i, pair in enumerate(pairs):
        row = {name: values[i] for name, values in columns.items()}
        if mask_path(pair, "class"):
            known = read_mask(pair, "class")
            if known.shape != images.shape[2:]:
                known = center_crop(known, images.shape[3])
            row["land_cover"] = land_cover_agreement(to_uint8(images[i]), known)
        yield row


def score_all(
    work: Work, args: argparse.Namespace, lpips: Callable | None, inception: Callable | None
) -> tuple[list[dict], float | None]:
    """{"file": the true image's, method: its scores ...} of each pair; and the FID of the images, if it can be had."""
    rows, features = [], ([], [])
    for numbers, first, truth in read_batches(work.read, len(work.pairs), args.batch_size, bar="scoring"):
        images = torch.stack([read_eo(work.files[i]) for i in numbers])
        pairs = [work.pairs[i] for i in numbers]
        methods = {
            method: score(made, truth, pairs, args.protocol, lpips)
            for method, made in [*work.yardsticks(first, truth).items(), (work.method, images)]
        }
        for pair, *scores in zip(pairs, *methods.values()):
            rows.append({"file": str(pair.eo)} | dict(zip(methods, scores)))
        if inception:
            for kind, batch in zip(features, (images, truth)):
                kind.append(inception(batch / 2 + 0.5))
    fid = frechet_distance(*map(np.concatenate, features)) if inception and len(rows) > 1 else None
    return rows, fid


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric, over the images that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def contact_sheet(work: Work, psnrs: list[float], out: Path) -> None:
    """The three best, middle and worst images by PSNR, beside what they should be."""
    order = np.argsort([-value for value in psnrs], kind="stable")
    middle, rows = len(order) // 2, []
    for i in [*order[:3], *order[middle - 1 : middle + 2], *order[-3:]] if len(order) >= 9 else order:
        row = list(work.read(i))
        if work.method == "model":
            more = work.files[i], confidence_file(work.files[i], out)
            row += [read_eo(path) for path in more if path.exists()]
        rows.append([to_uint8(image) for image in row])
    titles = ["SAR", "EO", "generated", "confidence"] if len(rows[0]) > 2 else ["generated", "EO"]
    save_image(out / "contact_sheet.png", grid(rows, titles[: len(rows[0])]))


# ----------------------------------------------------------------------------------------------------------
# The program


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what the protocol sets filled in."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="a dataset in any layout that train.py knows")
    add("--model", type=Path, metavar="PATH", help="a C-DiffSET model folder")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--images", type=Path, metavar="DIR", help="score the images in this folder and below, of any other method")
    add("--truth", type=Path, metavar="DIR", help="and these are what they should be")
    add("--out", type=Path, metavar="DIR", help="where to write (default: results/ and the name of what is scored)")
    add("--protocol", choices=("standard", "paper"), default="standard", help="see above (default: %(default)s)")
    add("--size", type=positive, help="side of the central crop (default: the images as they are)")
    add("--limit", type=positive, metavar="N", help="score N pairs, evenly chosen (default: all)")
    add("--steps", type=positive, help=f"denoising steps (default: {DEFAULT_STEPS})")
    add("--spacing", choices=SPACINGS, help=f"of the steps (default: {DEFAULT_SPACING})")
    add("--seed", type=seed_number, help="image i starts from the noise of seed + i (default: 0)")
    add("--batch-size", type=positive, metavar="N", help=f"images at a time (default: {STANDARD['batch_size']})")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    args = parser.parse_args(arguments)
    if args.images or args.truth:
        if unused := [f"--{name}" for name in OF_MODELS if getattr(args, name) is not None]:
            parser.error(f"{unused[0]} has no meaning for two folders of images")
        if not (args.images and args.truth):
            parser.error("two folders are needed: --images, and --truth, what they should be")
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
    """results/NAME: of the run for runs/NAME/model, else of the model or folder; NAME-paper for that protocol."""
    scored = (args.images or args.model).resolve()
    name = scored.parent.name if scored.name == "model" else scored.name if scored.is_dir() else scored.stem
    return Path("results") / (name + "-paper" * (args.protocol == "paper"))


def optional(metric: str, load: Callable, device: str) -> Callable | None:
    """A metric of another package, or None after a line about what is missing."""
    if missing := what_is_missing(metric):
        print(f"no {metric.upper()}: {missing}")
        return None
    return load(device)


def main(arguments: list[str] | None = None) -> int:
    """Scores; returns the exit code."""
    args = parse(arguments)
    args.device, out = choose_device(args.device), args.out or default_out(args)
    lpips, inception = optional("lpips", load_lpips, args.device), optional("fid", load_inception, args.device)
    with exclusive(out):
        work = of_folders(args) if args.images else of_model(args, out)
        rows, fid = score_all(work, args, lpips, inception)
        _, *methods = rows[0]
        mean = {method: means([row[method] for row in rows]) for method in methods}
        if fid is not None:
            mean[work.method]["fid"] = fid
        how = "x / 2 + 0.5" if args.protocol == "standard" else "clamp(x + 0.5, 0, 1), as the published numbers"
        print(f"protocol {args.protocol}: {len(rows)} images, compared as {how}")
        print(markdown("", mean), end="")
        images = [{"file": row["file"], **row[work.method]} for row in rows]
        about = origin("evaluate.py", arguments, args) | {"split": work.split}
        write_json(out / "metrics.json", about | {"mean": mean, "images": images})
        contact_sheet(work, [image["psnr"] for image in images], out)
    print(f"wrote {out}/metrics.json and contact_sheet.png (the three best, middle and worst by PSNR)")
    return 0


if __name__ == "__main__":
    run(main)
