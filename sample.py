"""Translates SAR images to optical ones (EO), with a map of the model's confidence.

    python sample.py sar.png                           a file -> sar_eo.png and sar_confidence.png beside it
    python sample.py patches/ --out results/           a folder and everything below it, in the same tree
    python sample.py sentinel1.tif --samples 8         a GeoTIFF -> GeoTIFFs, and how much 8 translations differ
    python sample.py sar.png --model runs/mine/model   with your own model

Input: PNG, JPEG, TIFF and GeoTIFF of any size from 8 pixels; 8 or 16 bit, or float in dB or linear; one to four
polarisations. Output, for NAME:

    NAME_eo          the EO image, 8-bit RGB
    NAME_confidence  1 / variance of the prediction at the middle step. PNG: from this image's lowest value, black, to
                     its highest, white, as in the paper; GeoTIFF: the value itself, float32
    NAME_spread      with --samples: standard deviation of the samples, in levels of 0..255, mean of the colours

These are PNGs; for a GeoTIFF they are GeoTIFFs with the same place and projection. Where the input has no data, PNGs
are transparent and GeoTIFFs masked. Each result stores how it was made (model, steps, seed ...).

Images larger than --tile are translated in overlapping tiles that are denoised together, without seams and in little
memory. Every image starts from the noise of the same seed: its result does not depend on the other images, nor, except
for rounding, on --batch-size. A bad file is reported; the rest are still translated. Inputs are never overwritten; in
folders, files that are named like results are skipped. A stopped run leaves only whole results.

On several GPUs: torchrun --nproc_per_node=4 sample.py patches/ --out results/
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cdiffset import CDiffSET, __version__, pad_to_multiple
from common import (
    DEVICE_HELP,
    Parser,
    choose_dtype,
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
from data import RESULTS, stacking, walk_images
from images import SAR_KINDS, Reading, to_uint8
from scene import (
    Source,
    check_tile,
    chunks,
    count_tiles,
    latent_size,
    translate_scene,
    write_geotiffs,
    write_pictures,
)
from scheduler import PREDICTION_TYPES, SPACINGS

TINY = Path(__file__).resolve().parent / "models" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_STEPS, DEFAULT_SPACING = 10, "trailing"  # chosen by docs/results.md; evaluate.py's, too

# Parts of a translation at (top, left): EO (N, 3, rows, columns), confidence (N, 1, rows, columns) or None
Translation = Iterable[tuple[int, int, Tensor, Tensor | None]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("input, output, model").add_argument
    add("sar", type=Path, nargs="+", metavar="SAR", help="image file, or folder of images")
    add("--out", type=Path, metavar="DIR", help="where the results go (default: beside each image)")
    add("--model", type=Path, metavar="PATH",
        help="a C-DiffSET model, folder or single file (default: models/tiny, a small demonstration model)")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--prediction-type", choices=PREDICTION_TYPES,
        help="what the U-Net predicts, which a single file does not say (default: what the model says, or epsilon)")
    add("--scale", choices=SAR_KINDS, default="auto",
        help="what the numbers of the images are (default: auto: decided by looking, and printed)")
    add("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="map these percentiles of each band to -1 and 1 instead, e.g. 1 99 (default: as the model was trained)")

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=positive, default=DEFAULT_STEPS, help="denoising steps (default: %(default)s; the paper: 50)")
    add("--spacing", choices=SPACINGS, default=DEFAULT_SPACING,
        help="of the timesteps; trailing is better for few steps (default: %(default)s; the paper: leading)")
    add("--seed", type=seed_number, default=0, help="of the noise, the same for every image (default: %(default)s)")
    add("--samples", type=positive, default=1, metavar="N",
        help="translate N times, with the seeds SEED .. SEED + N - 1, and write the mean and the spread (default: 1)")

    add = parser.add_argument_group("device and speed").add_argument
    add("--device", help=DEVICE_HELP)
    add("--dtype", choices=DTYPES,
        help="of the networks (default: bfloat16 where the device is fast in it, float16 on older GPUs, else float32)")
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
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {str(args.out)!r} is a file: give a folder")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Translates; returns the exit code: 0 all done, 2 some files failed."""
    args = parse(arguments)
    os.environ.setdefault("GDAL_CACHEMAX", "32")  # MB; GDAL would take a twentieth of the machine's memory
    device = start_processes(args.device)
    args.dtype = choose_dtype(args.dtype, device)
    stems = find_images(args.sar, args.out)
    inputs = set(map(os.path.realpath, stems))
    stems = share(stems, rank(), world_size())

    model = load_model(args.model or TINY, device, args.dtype, args.unet, args.prediction_type)
    args.tile = args.tile or max(512 // model.unit, 2) * model.unit
    args.batch_size = args.batch_size or (1 if device == "cpu" else 8)
    if args.stretch is None and model.trained_on.get("stretch"):
        args.stretch = model.trained_on["stretch"]
        args.scale = model.trained_on["sar"] if args.scale == "auto" else args.scale
    check_tile(model, args.tile)
    if args.steps > model.scheduler.num_train_timesteps:
        raise ValueError(f"--steps {args.steps}: this model has {model.scheduler.num_train_timesteps} timesteps")
    if args.compile:
        compile_unet(model)
    if rank() == 0:
        if not args.model:
            print(
                "using models/tiny, a demonstration model of synthetic scenes: on real radar its pictures mean nothing"
            )
        if not model.has_variance:
            print("this model has no variance channel (stage 1 of the training): no confidence is written")
        for line in [*model.assumptions, f"translating on {device} in {args.dtype}"]:
            print(line)

    total = len(stems) * args.samples * args.steps
    with tqdm(total=total, unit="step", disable=None if rank() == 0 else True) as bar:
        done, failed = translate_files(model, stems, inputs, args, bar)
    if len(done) == 1:
        print(f"wrote {', '.join(repr(str(path)) for path in done[0].values())}")
    elif done:
        print(f"translated {len(done)} images; results {f'in {str(args.out)!r}' if args.out else 'beside them'}")
    if failed:
        print(f"{failed} of {len(done) + failed} failed, see above", file=sys.stderr)
    end_processes()
    return 2 if failed else 0


# ----------------------------------------------------------------------------------------------------------
# Inputs


def find_images(arguments: list[Path], out: Path | None) -> dict[Path, Path]:
    """{image: path of its results, without _KIND and suffix}; of folders, all images below except hidden and results.

    Raises ValueError if a folder has none, or cannot be listed.
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
    """What one of several processes translates. Images with the same result paths stay together."""
    real = {path: os.path.realpath(stem) for path, stem in stems.items()}
    mine = set(list(dict.fromkeys(real.values()))[number::world])
    return {path: stem for path, stem in stems.items() if real[path] in mine}


def open_image(path, stem, inputs, taken, model: CDiffSET, args, say) -> tuple[Source, dict[str, Path]]:
    """Opens an image; returns it and the paths of its results by kind.

    Raises ValueError if it cannot be read, or if its results would overwrite one of `inputs` (real paths) or the
    results of another image, which `taken` remembers.
    """
    source = Source(path, Reading(args.scale, args.stretch and tuple(args.stretch)))
    suffix = ".tif" if source.placed else ".png"
    kinds = ["eo"] + ["confidence"] * model.has_variance + ["spread"] * (args.samples > 1)
    paths = {kind: stem.with_name(f"{stem.name}_{kind}{suffix}") for kind in kinds}
    if victims := inputs.intersection(map(os.path.realpath, paths.values())):
        raise ValueError(f"its result would overwrite the input {min(victims)!r}: give an --out")
    rival = taken.setdefault((os.path.realpath(stem), suffix), path)
    if os.path.realpath(rival) != os.path.realpath(path):
        raise ValueError(f"its results would overwrite those of {str(rival)!r}")
    for note in source.notes:
        say(path, note, topic=note)
    for advice in stacking([path]):
        say(path, advice, topic="two polarisations")
    kind, trained = source.scale.kind, model.trained_on.get("sar")
    say(path, source.description, topic=kind)
    if trained not in (None, kind):
        say(path, f"read as {kind}, but the model was trained on {trained}: expect a poor translation", f"not {kind}")
    return source, paths


def load_model(
    path: Path, device: str, dtype: str = "float32", unet: str | None = None, prediction_type: str | None = None
) -> CDiffSET:
    """The model to translate with. Raises ValueError if it cannot be loaded or is a base model."""
    if not path.exists():
        raise ValueError(f"{str(path)!r} is not there: give a C-DiffSET model, as train.py writes, with --model")
    model = CDiffSET.from_pretrained(path, unet, prediction_type=prediction_type, dtype=DTYPES[dtype])
    if model.from_base:
        command = f"python train.py --model {path} --data DATA"
        raise ValueError(f"{str(path)!r} is a base model, which cannot translate yet: fine-tune it first: {command}")
    return model.to(device, memory_format=torch.channels_last if device.startswith("cuda") else torch.preserve_format)


def compile_unet(model: CDiffSET) -> None:
    """Makes torch.compile compile the U-Net when it is first called. Raises ValueError if there is no compiler.

    The compiler is tried on a small function and not on the U-Net, which should meet only the shape in use: for a
    second shape, torch.compile compiles it again for all shapes, which is slower.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=model.device))
    except Exception as error:  # of many classes
        reason = one_line(str(error).split("\n\n")[0])  # without the advice to developers that follows
        raise ValueError(f"--compile: torch.compile does not work here: {reason}") from error
    model.unet.compile()


# ----------------------------------------------------------------------------------------------------------
# Translation


def translate_files(
    model: CDiffSET, stems: dict[Path, Path], inputs: set[str], args: argparse.Namespace, bar: tqdm
) -> tuple[list[dict[str, Path]], int]:
    """Translates images in order; returns the paths of the results of each, and the number of images that failed.

    stems: from `find_images`. inputs: the real paths of all images, which must not be overwritten.
    """
    done, failed, said, taken = [], 0, set(), {}

    def say(path: Path, line: str, topic: str) -> None:  # each topic once, not for every image
        if topic not in said:
            said.add(topic)
            bar.write(f"{one_line(repr(path.name))}: {line}")

    def fail(path: Path, error: BaseException) -> None:
        nonlocal failed
        if isinstance(error, RuntimeError) and not out_of_memory(error):  # a bug
            raise error
        name, text = repr(str(path)), one_line(error)
        text = "out of memory: try a smaller --batch-size or --tile" if out_of_memory(error) else text
        bar.write(f"error: {text if name in text else f'{name}: {text}'}", file=sys.stderr)
        failed += 1

    def opened() -> Iterator[tuple[Source, dict[str, Path], Tensor | None]]:
        for path, stem in stems.items():
            try:
                source, paths = open_image(path, stem, inputs, taken, model, args, say)
                large = max(source.height, source.width) > args.tile
                # read now, so that a damaged image fails alone and not with its batch
                image = None if large else source.read(0, source.height, 0, source.width)
            except (ValueError, OSError, MemoryError) as error:
                fail(path, error)
            else:
                yield source, paths, image

    # images of one padded size together, in batches; an image larger than a tile alone
    for size, same in groupby(opened(), lambda item: latent_size(model, item[0].height, item[0].width)):
        large = max(size) * model.vae.factor > args.tile
        while group := list(islice(same, 1 if large else max(1, args.batch_size // args.samples))):
            sources, paths, images = zip(*group)
            bar.set_description(repr(sources[0].path.name))
            try:
                if large:
                    translations = [translate_large(model, sources[0], paths[0]["eo"].parent, args, bar)]
                else:
                    translations = translate_small(model, images, args, bar)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                for source in sources:
                    fail(source.path, error)
                    source.close()
                continue
            for source, its_paths, translation in zip(sources, paths, translations):
                try:
                    write(source, its_paths, translation, args)
                    done.append(its_paths)
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    fail(source.path, error)
                source.close()
    return done, failed


def translate_small(
    model: CDiffSET, images: Sequence[Tensor], args: argparse.Namespace, bar: tqdm
) -> list[Translation]:
    """Translates images (3, H, W) of one padded size in batches; each gives one part."""

    def progress(timesteps: list[int]) -> Iterator[int]:
        for t in timesteps:
            yield t
            bar.update(len(batch))

    work = [(pad_to_multiple(image[None], model.unit), seed) for image in images for seed in args.seeds]
    made = []
    for batch in chunks(work, args.batch_size):
        sar, seeds = zip(*batch)
        eo, confidence = model.translate(torch.cat(sar), args.steps, seeds, args.spacing, progress)
        made += [(eo[i].cpu(), None if confidence is None else confidence[i].cpu()) for i in range(len(eo))]
    translations = []
    for image, samples in zip(images, chunks(made, args.samples)):
        height, width = image.shape[1:]
        eo, confidence = (None if x[0] is None else torch.stack(x)[:, :, :height, :width] for x in zip(*samples))
        translations.append([(0, 0, eo, confidence)])
    return translations


def translate_large(model: CDiffSET, source: Source, folder: Path, args: argparse.Namespace, bar: tqdm) -> Translation:
    """Translates an image larger than a tile, part by part, as the parts are taken.

    folder: of the results, where temporary files go, too: /tmp is often kept in memory.
    """
    size = source.height, source.width
    bar.total += count_tiles(model, *size, args.tile, args.steps, args.samples) - args.steps * args.samples
    return translate_scene(
        model, source.read, *size, args.tile, args.steps, args.seeds, args.spacing, args.batch_size, folder, bar.update
    )


# ----------------------------------------------------------------------------------------------------------
# Output


def write(source: Source, paths: dict[str, Path], translation: Translation, args: argparse.Namespace) -> None:
    """Reduces the samples of an image to their mean and spread, and writes them part by part.

    Raises ValueError if the model's output is not finite.
    """

    def results():
        for top, left, eo, confidence in translation:
            if eo.isnan().any():
                raise ValueError("the model's output is not finite: the weights are damaged, or try --dtype float32")
            parts = {"eo": to_uint8(eo.mean(dim=0))}
            if confidence is not None:
                parts["confidence"] = confidence.mean(dim=0)[0].cpu().numpy()
            if len(eo) > 1:
                parts["spread"] = (127.5 * eo.std(dim=0).mean(dim=0)).cpu().numpy()
            yield top, left, parts

    names = ("unet", "prediction_type", "steps", "spacing", "seed", "samples", "dtype", "tile")
    about = {"Software": f"C-DiffSET {__version__}", "input": source.path.name, "model": args.model or "models/tiny"}
    about |= {"scale": source.scale.kind}
    about |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stretch is not None:
        about["stretch"] = "{:g} {:g}".format(*args.stretch)
    # file names that are not UTF-8 lose their odd bytes
    about = {key: str(value).encode(errors="replace").decode() for key, value in about.items()}
    paths["eo"].parent.mkdir(parents=True, exist_ok=True)
    (write_geotiffs if source.placed else write_pictures)(source, results(), paths, about)


if __name__ == "__main__":
    run(main)
