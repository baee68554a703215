"""Translates SAR images to optical ones (EO), with a map of the model's confidence.

    python sample.py sar.png                           a file -> sar_eo.png and sar_confidence.png beside it
    python sample.py patches/ --out results/           a folder and all below it; its tree is kept
    python sample.py sentinel1.tif --samples 8         a GeoTIFF -> GeoTIFFs, and how much 8 translations differ
    python sample.py sar.png --model runs/mine/model   with your own model

In: PNG, JPEG, TIFF and GeoTIFF of any size from 8 pixels; 8 or 16 bit, or float in dB or linear; one to four
polarisations. Out, for NAME:

    NAME_eo          the EO image, 8-bit RGB
    NAME_confidence  1 / variance of the prediction at the middle step. PNG: from this image's lowest, black, to its
                     highest, white, as in the paper; GeoTIFF: the number itself, float32
    NAME_spread      with --samples: standard deviation of the samples, in levels of 0..255, mean of the colours

They are PNGs; for a GeoTIFF they are GeoTIFFs of the same place and projection. Where the input has no data, PNGs
are transparent and GeoTIFFs masked. They hold how they were made (model, steps, seed ...).

Images larger than --tile are translated in overlapping tiles that are denoised together, without seams and in
little memory. All files start from the noise of the same seed: results do not depend on what else is translated,
nor, but for rounding, on --batch-size. Files that cannot be used are named, and the others are done. Inputs are
never overwritten; in folders, files named like results are left alone. A stopped run leaves whole results only.

On several GPUs: torchrun --nproc_per_node=4 sample.py patches/ --out results/
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cdiffset import CDiffSET, __version__, pad_to_multiple
from common import (
    DEVICE_HELP,
    Parser,
    end_processes,
    one_line,
    out_of_memory,
    positive,
    rank,
    run,
    seed_number,
    start_processes,
    world_size,
)
from data import walk_images
from images import to_uint8
from scene import check_tile, chunks, count_tiles, latent_size, translate_scene
from scene_files import Source, contact_sheet, write_geotiffs, write_pictures
from scheduler import SPACINGS

TINY = Path(__file__).resolve().parent / "models" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = ("_eo", "_confidence", "_spread")  # are called NAME_eo.png, ...
EXPECTED = (ValueError, OSError, MemoryError, RuntimeError)  # may go wrong with a file; others are bugs
SHEET_ROWS = 8
DEFAULT_STEPS, DEFAULT_SPACING = 10, "trailing"  # chosen by results/claims-steps.md; evaluate.py's too

# Parts of a translation at (top, left): EO (N, 3, rows, columns), confidence (N, 1, rows, columns) or None
Translation = Iterable[tuple[int, int, Tensor, Tensor | None]]
Fail = Callable[[Path, Exception], None]  # is told what is wrong with an image


class Job(NamedTuple):
    """What is to be translated."""

    source: Source
    image: Tensor | None  # (3, H, W) in [-1, 1]; None if it is larger than a tile, and read part by part
    paths: dict[str, Path]  # of the results, by kind


# ----------------------------------------------------------------------------------------------------------
# Which files


def find_images(arguments: list[Path], out: Path | None) -> dict[Path, Path]:
    """{image: path of its results, without _KIND and ending}; of folders, all images below but hidden ones and results.

    ValueError: a folder without any, or that cannot be listed.
    """
    stems = {}
    for argument in arguments:
        folder, names = argument.parent, [argument.name]
        if argument.is_dir():
            folder, names = argument, sorted(walk_images(argument))
            names = [name for name in names if not Path(name).stem.endswith(RESULTS)]
            if not names:
                raise ValueError(f"{str(argument)!r}: no PNG, JPEG or TIFF images in it")
        for name in names:
            stems.setdefault(folder / name, (out or folder).joinpath(name).with_suffix(""))
    return stems


def share(stems: dict[Path, Path], number: int, world: int) -> dict[Path, Path]:
    """What one of several processes translates. Images that ask for the same results stay together."""
    real = {path: os.path.realpath(stem) for path, stem in stems.items()}
    mine = set(list(dict.fromkeys(real.values()))[number::world])
    return {path: stem for path, stem in stems.items() if real[path] in mine}


def open_images(
    stems: dict[Path, Path], inputs: set[str], kinds: list[str], args: argparse.Namespace, bar: tqdm, fail: Fail
) -> Iterator[Job]:
    """Opens images in order. Those that cannot be read, or whose results would overwrite the `inputs` (real paths) or
    the results of others, fail.
    """
    taken = {}
    for path, stem in stems.items():
        try:
            source = Source(path, args.scale, args.stretch)
            suffix = ".tif" if source.placed else ".png"
            paths = {kind: stem.with_name(f"{stem.name}_{kind}{suffix}") for kind in kinds}
            if victims := inputs.intersection(map(os.path.realpath, paths.values())):
                raise ValueError(f"its result would overwrite the input {min(victims)!r}: give an --out")
            rival = taken.setdefault((os.path.realpath(stem), suffix), path)
            if os.path.realpath(rival) != os.path.realpath(path):
                raise ValueError(f"its results would overwrite those of {str(rival)!r}")
            large = max(source.height, source.width) > args.tile
            image = None if large else source.read(0, source.height, 0, source.width)
            if source.dark:
                what = "will be all but black: its 16-bit numbers are low; for amplitudes, --stretch 1 99"
                bar.write(f"warning: {str(path)!r} {what}", file=sys.stderr)
        except EXPECTED as error:
            fail(path, error)
        else:
            yield Job(source, image, paths)


# ----------------------------------------------------------------------------------------------------------
# Translating


def load_model(path: Path, device: str, dtype: str = "float32", unet: str | None = None) -> CDiffSET:
    """The model to translate with. ValueError: it does not load, or is a base model."""
    if not path.exists():
        raise ValueError(f"{str(path)!r} is not there: give a C-DiffSET model, as train.py writes, with --model")
    model = CDiffSET.from_pretrained(path, unet, dtype=DTYPES[dtype])
    if model.from_base:
        command = f"python train.py --model {path} --data DATA"
        raise ValueError(f"{str(path)!r} is a base model, which translates nothing yet: fine-tune it first: {command}")
    return model.to(device, memory_format=torch.channels_last if device.startswith("cuda") else torch.preserve_format)


def compile_unet(model: CDiffSET) -> None:
    """Has the U-Net compiled, when it is first called. ValueError: no compiler here that torch.compile can use.

    That is tried with a function of one addition, since the U-Net itself is to meet no other shape than that in use:
    at a second one, torch.compile compiles it again for shapes of all kinds, which is slower.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=model.device))
    except Exception as error:  # of many classes
        reason = one_line(str(error).split("\n\n")[0])  # and not the advice to developers that follows
        raise ValueError(f"torch.compile does not work here: {reason}") from error
    model.unet.compile()


def translate_images(model: CDiffSET, images: list[Tensor], args: argparse.Namespace, bar: tqdm) -> list[Translation]:
    """Translates images (3, H, W) of one padded size in batches; each gives one part."""

    def progress(timesteps: list[int]) -> Iterator[int]:
        for t in timesteps:
            yield t
            bar.update(len(batch))

    padded, made = [pad_to_multiple(image[None], model.unit) for image in images], []
    for batch in chunks(list(product(padded, args.seeds)), args.batch_size):
        sar, seeds = zip(*batch)
        results = model.translate(torch.cat(sar), args.steps, seeds, args.spacing, progress)
        made.append(torch.cat([x.cpu() for x in results if x is not None], dim=1))  # EO, and confidence if there is
    translations = []
    for image, samples in zip(images, torch.cat(made).split(args.samples)):
        samples = samples[:, :, : image.shape[1], : image.shape[2]]
        translations.append([(0, 0, samples[:, :3], samples[:, 3:] if model.has_variance else None)])
    return translations


def translate_large(model: CDiffSET, source: Source, folder: Path, args: argparse.Namespace, bar: tqdm) -> Translation:
    """Translates an image larger than a tile, part by part, as they are taken. folder: for temporary files, with the
    results: /tmp is often kept in memory.
    """
    size = source.height, source.width
    bar.total += count_tiles(model, *size, args.tile, args.steps, args.samples) - args.steps * args.samples
    return translate_scene(
        model, source.read, *size, args.tile, args.steps, args.seeds, args.spacing, args.batch_size, folder, bar.update
    )


def translate_all(
    model: CDiffSET, jobs: Iterable[Job], args: argparse.Namespace, bar: tqdm, fail: Fail
) -> Iterator[tuple[Job, Translation]]:
    """Translates images in order, those of one padded size together."""
    for size, same in groupby(jobs, lambda job: latent_size(model, job.source.height, job.source.width)):
        large = max(size) * model.vae.factor > args.tile
        while group := list(islice(same, 1 if large else max(1, args.batch_size // args.samples))):
            source, _, paths = group[0]
            bar.set_description(repr(source.path.name))
            try:
                if large:
                    made = [translate_large(model, source, paths["eo"].parent, args, bar)]
                else:
                    made = translate_images(model, [job.image for job in group], args, bar)
            except EXPECTED as error:
                for job in group:
                    fail(job.source.path, error)
            else:
                yield from zip(group, made)


def reduce(eo: Tensor, confidence: Tensor | None, how: str) -> dict[str, np.ndarray]:
    """N samples -> their mean or median: eo (H, W, 3) uint8, confidence (H, W) float32; if N > 1, spread (H, W)
    float32: the standard deviation in levels of 0..255, mean of the colours. ValueError: not a number.
    """
    if eo.isnan().any():
        raise ValueError("the model's numbers are not finite: the weights are damaged, or try --dtype float32")

    def middle(x: Tensor) -> Tensor:
        if how == "median":
            x = x.sort(dim=0).values[[(len(x) - 1) // 2, len(x) // 2]]
        return x.mean(dim=0)

    parts = {"eo": to_uint8(middle(eo))}
    if confidence is not None:
        parts["confidence"] = middle(confidence)[0].cpu().numpy()
    if len(eo) > 1:
        parts["spread"] = (127.5 * eo.std(dim=0).mean(dim=0)).cpu().numpy()
    return parts


# ----------------------------------------------------------------------------------------------------------
# The program


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("sar", type=Path, nargs="+", metavar="SAR", help="image file, or folder of images")
    add("--out", type=Path, metavar="DIR", help="where the results go (default: beside each image)")
    add("--model", type=Path, metavar="PATH",
        help="a C-DiffSET model, folder or single file (default: models/tiny, a small demonstration model)")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--contact-sheet", type=Path, metavar="FILE.png",
        help=f"picture of the first {SHEET_ROWS} images (of the first process, on several GPUs) beside their results")

    add = parser.add_argument_group("how").add_argument
    add("--steps", type=positive, default=DEFAULT_STEPS, help="denoising steps (default: %(default)s; the paper: 50)")
    add("--spacing", choices=SPACINGS, default=DEFAULT_SPACING,
        help="of the timesteps; trailing is better for few steps (default: %(default)s; the paper: leading)")
    add("--seed", type=seed_number, default=0, help="of the noise (default: %(default)s)")
    add("--samples", type=positive, default=1, metavar="N",
        help="translate N times, with the seeds SEED .. SEED + N - 1, and write one result and the spread (default: 1)")
    add("--reduce", choices=("mean", "median"), default="mean", help="of the samples (default: %(default)s)")
    add("--scale", choices=("auto", "db", "linear"), default="auto",
        help="what numbers that are not 8 or 16 bit mean (default: auto: dB if most are negative); dB are taken from "
        "-25 (co-polarised) or -32.5 (cross-polarised) to 0, linear ones from the 1st to the 99th percentile")
    add("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="take the numbers from one percentile to another instead, e.g. 1 99")

    add = parser.add_argument_group("where and how fast").add_argument
    add("--device", help=DEVICE_HELP)
    add("--dtype", choices=DTYPES, default="float32",
        help="of the networks; bfloat16 is the fast one on GPUs (default: %(default)s)")
    add("--batch-size", type=positive, metavar="N",
        help="images or tiles that are computed at once (default: 8 on GPUs, else 1)")
    add("--compile", action="store_true",
        help="compile the U-Net first (minutes for a large one): for many images or a large scene")
    add("--tile", type=positive, metavar="PIXELS",
        help="larger images are translated in tiles of this size (default: 512, or what suits the model)")
    # fmt: on
    args = parser.parse_args(arguments)
    args.seeds = range(args.seed, args.seed + args.samples)
    if args.seeds[-1] >= 2**32:
        parser.error(f"--seed {args.seed} with --samples {args.samples}: the last seed must be below 2^32")
    return args


def check_paths(args: argparse.Namespace, inputs: set[str]) -> None:
    """ValueError on files to write that cannot be, before anything is loaded. inputs: real paths."""
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file: give a folder")
    sheet = args.contact_sheet
    if sheet and (sheet.suffix.lower() != ".png" or sheet.is_dir() or os.path.realpath(sheet) in inputs):
        raise ValueError(f"--contact-sheet {str(sheet)!r}: give the name of a PNG file that is no input")


def check(args: argparse.Namespace, model: CDiffSET) -> None:
    """Fills in the settings that depend on the model; ValueError on those that cannot be."""
    args.tile = args.tile or max(512 // model.unit, 2) * model.unit
    args.batch_size = args.batch_size or (1 if model.device.type == "cpu" else 8)
    check_tile(model, args.tile)
    if args.steps > model.scheduler.num_train_timesteps:
        raise ValueError(f"--steps {args.steps}: this model has {model.scheduler.num_train_timesteps} timesteps")


def describe(args: argparse.Namespace, **more: str) -> dict[str, str]:
    """What to write into the results, so that they can be made again."""
    names = ("unet", "steps", "spacing", "seed", "samples", "reduce", "scale", "stretch", "dtype", "tile")
    about = {"Software": f"C-DiffSET {__version__}", "model": args.model or "models/tiny"}
    about |= {name: getattr(args, name) for name in names if getattr(args, name) is not None} | more
    # without the bytes in names of files that are not UTF-8
    return {key: str(value).encode(errors="replace").decode() for key, value in about.items()}


def save(job: Job, translation: Translation, args: argparse.Namespace) -> None:
    """Reduces the samples of an image and writes them, as they come."""
    job.paths["eo"].parent.mkdir(parents=True, exist_ok=True)
    results = ((*place, reduce(eo, confidence, args.reduce)) for *place, eo, confidence in translation)
    write = write_geotiffs if job.source.placed else write_pictures
    write(job.source, results, job.paths, describe(args, input=job.source.path.name))


def main(arguments: list[str] | None = None) -> int:
    """Translates; returns the exit code: 0 all done, 2 some files failed."""
    args = parse(arguments)
    os.environ.setdefault("GDAL_CACHEMAX", "32")  # MB; GDAL would take a twentieth of the machine's memory
    device = start_processes(args.device)
    stems = find_images(args.sar, args.out)
    inputs = set(map(os.path.realpath, stems))
    check_paths(args, inputs)
    model = load_model(args.model or TINY, device, args.dtype, args.unet)
    check(args, model)
    if args.compile:
        try:
            compile_unet(model)
        except ValueError as error:
            raise ValueError(f"--compile: {error}") from error
    kinds = ["eo"] + ["confidence"] * model.has_variance + ["spread"] * (args.samples > 1)
    first = rank() == 0
    if first:
        if not args.model:
            print("using models/tiny, a demonstration model trained on synthetic scenes: not for real work")
        if not model.has_variance:
            print("this model has no variance channel (stage 1 of the training): no confidence is written")

    def fail(path: Path, error: Exception) -> None:
        name, text = repr(str(path)), one_line(error)
        if out_of_memory(error):
            text = "out of memory: try a smaller --batch-size or --tile"
        elif isinstance(error, RuntimeError):  # a bug
            raise error
        errors.append(text if name in text else f"{name}: {text}")
        bar.write(f"error: {errors[-1]}", file=sys.stderr)

    stems, done, errors = share(stems, rank(), world_size()), {}, []
    total = len(stems) * args.samples * args.steps
    with tqdm(total=total, unit="step", disable=None if first else True) as bar:
        jobs = open_images(stems, inputs, kinds, args, bar, fail)
        for job, translation in translate_all(model, jobs, args, bar, fail):
            try:
                save(job, translation, args)
            except EXPECTED as error:
                fail(job.source.path, error)
            else:
                done[job.source.path] = job.paths
            job.source.close()
    if args.contact_sheet and done and first:
        rows = [{"SAR": path} | paths for path, paths in islice(done.items(), SHEET_ROWS)]
        contact_sheet(args.contact_sheet, rows, args.scale, args.stretch, describe(args))
    if len(done) == 1:
        print(f"wrote {', '.join(repr(str(path)) for paths in done.values() for path in paths.values())}")
    elif done:
        print(f"translated {len(done)} images; results {f'in {str(args.out)!r}' if args.out else 'beside them'}")
    if errors:
        print(f"{len(errors)} of {len(done) + len(errors)} failed, see above", file=sys.stderr)
    end_processes()
    return 2 if errors else 0


if __name__ == "__main__":
    run(main)
