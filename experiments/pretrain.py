"""Trains a small stand-in for Stable Diffusion from random weights, as a model that train.py can start from.

    python -m experiments.synth sen12-synthetic/ --pairs 20000 --size 128
    python -m experiments.pretrain --data sen12-synthetic/ --out models/small-base
    python train.py --data sen12-synthetic/ --model models/small-base --size 128

1. A small VAE, trained on SAR and EO images; its scaling factor is measured.
2. A small unconditional U-Net, trained on EO latents, with 4 channels in and out as in Stable Diffusion. A fixed random
   embedding takes the place of the prompt's.

Both are written as a diffusers folder. Fine-tuning then works as with the real weights, channel surgery included.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from cdiffset import CDiffSET
from checkpoint import run_folder
from common import DEVICE_HELP, Parser, choose_device, positive, run, seed_number
from data import PairDataset, dataset_name, decide_reading, describe, find_pairs, read_center
from images import Reading
from scheduler import DDPMScheduler
from splits import split_pairs
from train import fit, sample_noise
from unet import UNet
from vae import AutoencoderKL

TOKENS, CONTEXT = 6, 64  # shape of the prompt embedding; 6 tokens as with Stable Diffusion
GROUPS = 8  # of GroupNorm: Stable Diffusion's 32 would leave narrow layers one channel in a group
KL_WEIGHT = 3e-4
VALIDATED = 64  # pairs; the scaling factor is measured on them, too


def small_vae(widths: list[int]) -> AutoencoderKL:
    """A VAE of Stable Diffusion's kind with one residual block a level and no attention; factor 2^(levels - 1)."""
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def small_unet(widths: list[int]) -> UNet:
    """A U-Net of Stable Diffusion's kind with 4 channels in and out and one residual block a level.

    Attention is at the lowest level only: at the others it costs a CPU too much time.
    """
    down = ["DownBlock2D"] * (len(widths) - 1) + ["CrossAttnDownBlock2D"]
    return UNet(
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        norm_num_groups=GROUPS,
    )


def vae_loss(image: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """L1 of the pixels and of their gradients, and a weak KL divergence from the standard normal distribution."""
    loss = F.l1_loss(reconstruction, image)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(reconstruction.diff(dim=axis), image.diff(dim=axis))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return loss + KL_WEIGHT * kl


def train_vae(
    vae: AutoencoderKL, samples: PairDataset, test: list[Tensor], args: argparse.Namespace, identity: dict
) -> int:
    """Trains the VAE on both images of each pair; validation measures the PSNR of both. Returns the exit code."""
    device = next(vae.parameters()).device

    def loss(vae: nn.Module, batch: list[Tensor], positions: list[int]) -> Tensor:
        image = torch.cat(batch).to(device)  # SAR and EO, (2 B, 3, size, size)
        mean, logvar = vae.encode(image)
        noise, _ = sample_noise((2, *mean.shape[1:]), args.seed, positions)
        z = mean + (0.5 * logvar).exp() * noise.transpose(0, 1).flatten(0, 1).to(mean)
        return vae_loss(image, vae.decode(z), mean, logvar)

    @torch.inference_mode()
    def validate(_step: int) -> dict[str, float]:
        sar, eo = (vae.decode(vae.encode(image.to(device))[0]).clamp(-1, 1).cpu() for image in test)
        mse = {"psnr_eo": (eo - test[1]) / 2, "psnr_sar": (sar - test[0]) / 2}
        return {name: -10 * float(error.square().mean().log10()) for name, error in mse.items()}

    with run_folder(args, identity) as settings:
        return fit(vae, loss, samples, args, settings, validate)


def train_unet(
    model: CDiffSET, samples: PairDataset, test: list[Tensor], args: argparse.Namespace, identity: dict
) -> int:
    """Trains the unconditional U-Net on EO latents with L2; the score is minus the loss. Returns the exit code."""
    scheduler, context = model.scheduler, model.prompt_embedding

    def loss(unet: nn.Module, batch: list[Tensor], positions: list[int]) -> Tensor:
        _, eo = batch
        with torch.no_grad():
            z = model.encode(eo.to(context.device)).float()
        noise, t = (x.to(z.device) for x in sample_noise(z.shape[1:], args.seed, positions))
        prediction = unet(scheduler.add_noise(z, noise, t), t, context)
        return F.mse_loss(prediction.float(), scheduler.target(z, noise, t))

    @torch.inference_mode()
    def validate(_step: int) -> dict[str, float]:
        value = float(loss(model.unet, test, list(range(len(test[0])))))
        return {"score": -value, "loss": value}

    with run_folder(args, identity) as settings:
        return fit(model.unet, loss, samples, args, settings, validate)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="a dataset in any layout that train.py knows")
    add("--out", required=True, type=Path, metavar="DIR",
        help="the model folder to write (checkpoints go to DIR/.pretrain)")
    add("--size", type=positive, default=128, help="side of the U-Net's training crops (default: %(default)s pixels)")
    add("--vae-size", type=positive, default=64, help="side of the VAE's training crops (default: %(default)s)")
    add("--vae-steps", type=positive, default=1600, help="training steps of the VAE (default: %(default)s)")
    add("--unet-steps", type=positive, default=1500, help="training steps of the U-Net (default: %(default)s)")
    add("--vae-widths", type=positive, nargs="+", default=[16, 48, 96], metavar="N",
        help="channels of the VAE's levels; 3 levels give a factor of 4 (default: 16 48 96)")
    add("--unet-widths", type=positive, nargs="+", default=[64, 128, 192], metavar="N",
        help="channels of the U-Net's levels (default: 64 128 192)")
    add("--batch-size", type=positive, default=16, help="pairs in a step (default: %(default)s)")
    add("--save-every", type=positive, default=500, help="steps between checkpoints (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that read images (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    add("--seed", type=seed_number, default=0, help="of split, weights, data order and noise (default: %(default)s)")
    add("--resume", action="store_true", help="continue an interrupted run")
    # fmt: on
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains both networks and writes the folder; returns the exit code."""
    args = parse(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("pretrain runs as one process: start it with python, not torchrun")
    device = choose_device(args.device)
    found = find_pairs(args.data)
    split = split_pairs(found.pairs, args.seed)
    reading, remarks = decide_reading(split.train, Reading())
    print("\n".join([*describe(found), *split.notes, *remarks]))
    test = [read_center(pair, args.size, reading) for pair in split.val[:VALIDATED]]
    test = [torch.stack(images) for images in zip(*test)]

    torch.manual_seed(args.seed)  # for the initial weights; `fit` draws everything else by position
    vae, unet = small_vae(args.vae_widths), small_unet(args.unet_widths)
    # small networks learn v_prediction faster than epsilon
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    model = CDiffSET(vae, unet, torch.randn(1, TOKENS, CONTEXT), scheduler)
    if args.size % model.unit or args.vae_size % vae.factor:
        raise ValueError(f"--size must be a multiple of {model.unit}, --vae-size of {vae.factor}, for these networks")
    model.to(device, memory_format=torch.channels_last if device.startswith("cuda") else torch.preserve_format)

    options = vars(train.parse(["--data", args.data])) | vars(args) | {"validate_every": 250}
    identity = {"data": dataset_name(found, args.data), "vae": repr(vae.config), "size": args.vae_size}
    stage = argparse.Namespace(**options | {"out": args.out / ".pretrain" / "vae", "steps": args.vae_steps, "lr": 2e-3})
    samples = PairDataset(split.train, args.vae_size, args.seed, reading=reading)
    if code := train_vae(vae, samples, test, stage, identity):
        return code
    vae.eval().requires_grad_(False)
    with torch.inference_mode():  # 1 / standard deviation of the EO latents; 0.18215 for Stable Diffusion
        factor = round(1 / float(vae.encode(test[1].to(device))[0].std()), 5)
    vae.scaling_factor = vae.config["scaling_factor"] = factor

    identity |= {"size": args.size, "unet": repr(unet.config), "scaling_factor": factor}
    stage = argparse.Namespace(
        **options | {"out": args.out / ".pretrain" / "unet", "steps": args.unet_steps, "lr": 6e-4}
    )
    samples = PairDataset(split.train, args.size, args.seed, reading=reading)
    if code := train_unet(model, samples, test, stage, identity):
        return code
    model.save_pretrained(args.out)
    print(f"wrote {args.out} (scaling factor {factor}); next: python train.py --data {args.data} --model {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
