"""Scores translations of the held-out pairs of a dataset, beside what simple means achieve; or any two folders.

    python evaluate.py --data sen12/ --model runs/mine/model            translates the held-out pairs, and scores them
    python evaluate.py --data sen12/ --model ... --protocol paper       the same as the published numbers were made
    python evaluate.py --images made/ --truth eo/                       scores any other method's images

PSNR, SSIM and SCC as in torchmetrics; LPIPS (VGG) and FID (2048 features) where lpips and pytorch-fid and their
weights are installed. FID is of the translations alone; it says little about fewer than some thousand images. A model
stands beside three yardsticks:

    mean image      every pixel is the training set's mean colour
    colour look-up  each pixel gets the mean colour of the training pixels with its local 7x7 SAR level
    VAE             the true EO image, encoded and decoded: no latent diffusion model can be better

Where the dataset has class maps (synth.py's have), also how much land cover the image shows as it is: the share of
pixels, outside the classes that SAR cannot tell, whose nearest class colour is that of the true class.

Protocols: "standard" scores all held-out pairs on images in [0, 1] (LPIPS: [-1, 1], as it expects). "paper" does what
the released code does: images x in [-1, 1] become clamp(x + 0.5, 0, 1), which clips the darkest and the brightest
quarter of the range, for LPIPS too; the first 100 held-out pairs, one at a time, 50 leading steps. It sets
--limit, --batch-size, --steps and --spacing; other values for them are refused.

Which pairs are held out is read from split.json beside the model's folder, where train.py leaves it; without one,
it is the split of seed 0. In two folders, images are paired by their paths without the ending.

Written to --out: metrics.json (each image too), contact_sheet.png, eo/ and confidence/ (the translations), and
scores.jsonl, a line an image as they are made: the same command goes on where an interrupted one stopped.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cache import network_digest
from cdiffset import pad_to_multiple
from cli import DEVICE, Parser, choose_device, machine, positive, run, seed_number
from data import (
    Pair,
    PairDataset,
    by_name,
    center_crop,
    describe,
    evenly,
    find_pairs,
    held_out_pairs,
    mask_path,
    pair_folders,
    read_mask,
    read_pair,
    seed_of,
)
from files import atomic, exclusive, write_json
from images import confidence_picture, grid, read_eo, save_image, to_uint8
from metrics import frechet_distance, load_inception, load_lpips, psnr, scc, ssim, what_is_missing
from report import markdown
from sample import DEFAULT_SPACING, DEFAULT_STEPS, load_model
from scheduler import SPACINGS
from yardsticks import FITTED_ON, fit_colours, land_cover_agreement, look_up

METRICS = {"psnr": psnr, "ssim": ssim, "scc": scc}  # of images in [0, 1]
STANDARD = {"limit": None, "batch_size": 8, "steps": DEFAULT_STEPS, "spacing": DEFAULT_SPACING}
PAPER = {"limit": 100, "batch_size": 1, "steps": 50, "spacing": "leading"}
OF_MODELS = ("data", "model", "unet", "steps", "spacing", "seed", "size")  # options without meaning for two folders


class Work(NamedTuple):
    """What is to be scored: a model's translations, or the images in a folder."""

    pairs: list[Pair]  # (SAR, EO), or (image, truth)
    made: list[Path]  # the image files that are scored; those of a model are written by `candidates`
    read: Callable[[int], tuple[Tensor, Tensor]]  # a pair's number -> its two images, each (3, H, W) in [-1, 1]
    candidates: Callable[[range, Tensor, Tensor], dict[str, Tensor]]  # numbers, both images -> by method; scored: last
    about: dict[str, str | dict]  # what the result depends on, beside the options


# ----------------------------------------------------------------------------------------------------------
# What is scored


def chosen(pairs: list[Pair], args: argparse.Namespace) -> list[Pair]:
    """--limit pairs: the first ones in the paper's protocol, else spread over all."""
    return pairs[: args.limit] if args.protocol == "paper" else evenly(pairs, args.limit or len(pairs))


def training_colours(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """`fit_colours` of training pairs, of which FITTED_ON are looked at."""
    return fit_colours(read_pair(pair) for pair in evenly(pairs, FITTED_ON))


def of_model(args: argparse.Namespace, out: Path) -> Work:
    """The held-out pairs of a dataset, translated; what is made is written below `out`."""
    model = load_model(args.model, args.unet, "float32", args.device)
    found = find_pairs(args.data)
    train, test, split = held_out_pairs(found.pairs, args.model)
    test = chosen(test, args)
    print("\n".join([*describe(found), f"{len(test)} of the held-out pairs, by {split}"]))
    read = PairDataset(test, args.size, train=False).__getitem__ if args.size else lambda i: read_pair(test[i])
    mean, colours = training_colours(train)
    names = list(by_name((pair.eo for pair in test), args.data))

    @torch.inference_mode()
    def candidates(numbers: range, sar: Tensor, eo: Tensor) -> dict[str, Tensor]:
        """All methods' images; the model's are written to eo/ and confidence/ first."""
        made, confidence = model.translate(sar, args.steps, [args.seed + i for i in numbers], args.spacing)
        pictures = {"eo": made, "confidence": [] if confidence is None else map(confidence_picture, confidence)}
        for kind, images in pictures.items():
            for i, image in zip(numbers, images):
                path = out / kind / f"{names[i]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(path, image)
        decoded = model.decode(model.encode(pad_to_multiple(eo, model.unit).to(args.device))).float().clamp(-1, 1)
        return {
            "mean image": mean[:, None, None].expand_as(eo),
            "colour look-up": look_up(colours, sar),
            "VAE": decoded[:, :, : eo.shape[2], : eo.shape[3]].cpu(),
            "model": made.cpu(),
        }

    weights = " ".join(network_digest(network)[:16] for network in (model.vae, model.unet))
    about = {"split": split, "weights": weights, "schedule": model.scheduler.config}
    return Work(test, [out / "eo" / f"{name}.png" for name in names], read, candidates, about)


def of_folders(args: argparse.Namespace) -> Work:
    """The images in a folder, and what they should be."""
    pairs = chosen(pair_folders(args.images, args.truth), args)
    return Work(
        pairs,
        made=[pair.sar for pair in pairs],
        read=lambda i: read_pair(pairs[i], read_eo),
        candidates=lambda _numbers, image, _truth: {"images": image},
        about={"split": "all there are"},
    )


# ----------------------------------------------------------------------------------------------------------
# Scores


def in_batches(
    read: Callable[[int], tuple[Tensor, Tensor]], total: int, size: int, start: int = 0, bar: str | None = None
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """read(i), two images (3, H, W), for i from `start` to total - 1, `size` at a time: their numbers, and the batches
    of both, (B, 3, H, W). bar: the title of a progress bar. ValueError: the images of a batch have several sizes.
    """
    with tqdm(total=total, initial=start, unit="image", desc=bar, disable=bar is None) as progress:
        for first in range(start, total, size):
            numbers = range(first, min(first + size, total))
            both = list(zip(*map(read, numbers)))
            if len({image.shape for side in both for image in side}) > 1:
                raise ValueError("the images have several sizes: use --batch-size 1 (evaluate.py can also cut: --size)")
            yield numbers, *map(torch.stack, both)
            progress.update(len(numbers))


def score(
    images: Tensor, truth: Tensor, pairs: Sequence[Pair], protocol: str = "standard", lpips: Callable | None = None
) -> Iterator[dict[str, float]]:
    """The metrics of each image: two (B, 3, H, W) in [-1, 1] -> B dictionaries."""
    paper = protocol == "paper"  # the value range of the released code, for LPIPS too
    unit = [(x + 0.5).clamp(0, 1) if paper else x / 2 + 0.5 for x in (images, truth)]
    columns = {name: metric(*unit).tolist() for name, metric in METRICS.items()}
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


def resume(file: Path, settings: dict, total: int, batch_size: int) -> list[dict]:
    """The lines of an interrupted evaluation that are whole, by whole batches, which are then computed alike.

    The file is left with these alone, after a first line with the settings. ValueError: it is another evaluation's.
    """
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # the last one may have been cut by a crash
    try:
        old, rows = json.loads(lines[0]) if lines else {}, [json.loads(line) for line in lines[1:]]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, or give another --out") from error
    if rows and old != settings:
        changed = [f"{key} {old.get(key)}, not {value}" for key, value in settings.items() if old.get(key) != value]
        advice = f"give another --out, or delete {file.parent}"
        raise ValueError(f"{file} is of an evaluation with other settings ({'; '.join(changed)}): {advice}")
    if len(rows) < total:
        rows = rows[: len(rows) // batch_size * batch_size]
    with atomic(file) as temporary:
        temporary.write_text("".join([json.dumps(settings) + "\n", *lines[1 : 1 + len(rows)]]), encoding="utf-8")
    return rows


def score_all(work: Work, args: argparse.Namespace, lpips: Callable | None, file: Path, settings: dict) -> list[dict]:
    """{"file": the true image's, method: its scores ...} of each pair; a line each in `file`, where it goes on."""
    rows, total = resume(file, settings, len(work.pairs), args.batch_size), len(work.pairs)
    if rows:
        print(f"{len(rows)} of {total} images are scored already")
    with file.open("a", encoding="utf-8") as log:
        for numbers, first, truth in in_batches(work.read, total, args.batch_size, len(rows), "scoring"):
            pairs = [work.pairs[i] for i in numbers]
            batch = [{"file": str(pair.eo)} for pair in pairs]
            try:
                for method, images in work.candidates(numbers, first, truth).items():
                    for row, scores in zip(batch, score(images, truth, pairs, args.protocol, lpips)):
                        row[method] = scores
            except torch.OutOfMemoryError as error:
                raise ValueError("out of memory: try a smaller --batch-size") from error
            log.write("".join(json.dumps(row) + "\n" for row in batch))
            log.flush()
            os.fsync(log.fileno())
            rows += batch
    return rows


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric, over the images that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def fid(inception: Callable[[Tensor], np.ndarray], work: Work, batch_size: int) -> float:
    """FID of the image files that were made, as 8-bit pictures, whatever the protocol."""
    features = [], []

    def read(i: int) -> tuple[Tensor, Tensor]:
        return read_eo(work.made[i]), work.read(i)[1]

    for _, *images in in_batches(read, len(work.pairs), batch_size, bar="FID"):
        for kind, batch in zip(features, images):
            kind.append(inception(batch / 2 + 0.5))
    return frechet_distance(*map(np.concatenate, features))


def contact_sheet(work: Work, psnrs: list[float], out: Path) -> None:
    """The three best, middle and worst images by PSNR, beside what they should be."""
    order = np.argsort([-value for value in psnrs], kind="stable")
    middle, rows = len(order) // 2, []
    for i in [*order[:3], *order[middle - 1 : middle + 2], *order[-3:]] if len(order) >= 9 else order:
        row = list(work.read(i))
        if work.made[i] != work.pairs[i].sar:  # a model's
            confidence = out / "confidence" / work.made[i].relative_to(out / "eo")
            row += [read_eo(path) for path in (work.made[i], confidence) if path.exists()]
        rows.append([to_uint8(image) for image in row])
    titles = ["SAR", "EO", "generated", "confidence"] if len(rows[0]) > 2 else ["generated", "EO"]
    height, width = (min(row[0].shape[axis] for row in rows) for axis in (0, 1))
    pictures = [[picture[:height, :width] for picture in row] for row in rows]
    save_image(out / "contact_sheet.png", grid(pictures, titles[: len(rows[0])]))


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
    add("--device", help=DEVICE)
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
    name = scored.parent.name if scored.name == "model" else scored.stem
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
    work = of_folders(args) if args.images else of_model(args, out)
    lpips, inception = optional("lpips", load_lpips, args.device), optional("fid", load_inception, args.device)

    stats = [path.stat() for pair in work.pairs for path in pair[:2]]
    files = seed_of(*work.pairs, *((stat.st_size, stat.st_mtime_ns) for stat in stats))
    settings = {key: value for key, value in vars(args).items() if key != "out"} | work.about
    settings |= {"metrics": [*METRICS] + ["lpips"] * bool(lpips), "files": files}
    settings = json.loads(json.dumps(settings, default=str))  # as they are read again
    with exclusive(out):
        rows = score_all(work, args, lpips, out / "scores.jsonl", settings)
        _, *methods = rows[0]
        scored = methods[-1]
        mean = {method: means([row[method] for row in rows]) for method in methods}
        if inception and len(rows) > 1:
            mean[scored]["fid"] = fid(inception, work, args.batch_size)
        how = "x / 2 + 0.5" if args.protocol == "standard" else "clamp(x + 0.5, 0, 1), as the published numbers"
        print(f"protocol {args.protocol}: {len(rows)} images, compared as {how}")
        print(markdown("", mean), end="")
        result = {"protocol": args.protocol, "mean": mean, "settings": settings, "date": str(date.today())}
        result |= {"machine": f"{machine(args.device)}, {platform.platform()}", "torch": torch.__version__}
        write_json(out / "metrics.json", result | {"images": [{"file": row["file"], **row[scored]} for row in rows]})
        contact_sheet(work, [row[scored]["psnr"] for row in rows], out)
    print(f"wrote {out}/metrics.json and contact_sheet.png (the three best, middle and worst by PSNR)")
    return 0


if __name__ == "__main__":
    run(main)
