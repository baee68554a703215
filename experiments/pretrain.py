"""Makes a small stand-in for Stable Diffusion, from nothing: what `train.py --model` then starts from.

    1. a small VAE on SAR and EO images alike (the role of SD's VAE), and its scaling factor, measured;
    2. a small unconditional U-Net on the EO latents (the role of SD's U-Net: 4 channels in, 4 out), with a
       fixed random embedding in place of a text encoder's;
    3. both in a diffusers folder. From here everything goes as with the real weights, channel surgery included.

    python synth.py sen12-synthetic/ --pairs 20000 --size 128
    python pretrain.py --data sen12-synthetic/ --out models/small-base

For real data there is nothing to pretrain: fine-tune Stable Diffusion with `train.py`.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdiffset import CDiffSET
from checkpoint import run_folder
from common import DEVICE_HELP, Parser, choose_device, positive, run, seed_number
from data import PairDataset, dataset_name, describe, find_pairs, read_center, split_pairs
from train import fit, sample_noise
from scheduler import DDPMScheduler
from unet import UNet
from vae import AutoencoderKL

TOKENS, CONTEXT = 6, 64  # shape of the prompt embedding; 6 tokens as with SD
GROUPS = 8  # of the GroupNorms: SD's 32 would leave narrow layers a channel or less a group
KL_WEIGHT = 3e-4
HELD_OUT = 64  # pairs that validation looks at, and that the scaling factor is measured on

Images = list[Tensor]  # SAR and EO, (B, 3, size, size) each


def small_vae(widths: list[int]) -> AutoencoderKL:
    """A VAE of SD's kind with one residual block a level and no attention; its factor is 2^(levels - 1)."""
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def small_unet(widths: list[int]) -> UNet:
    """A U-Net of SD's kind, 4 channels in and out, with one residual block a level, and attention at the last one:
    elsewhere it costs a CPU more time than it is worth.
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
    """L1 on pixels and on their gradients (edges), and a slight pull of the latents to a standard normal."""
    loss = F.l1_loss(reconstruction, image)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(reconstruction.diff(dim=axis), image.diff(dim=axis))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return loss + KL_WEIGHT * kl


def train_vae(vae: AutoencoderKL, train: PairDataset, test: Images, settings) -> int:
    """Trains the VAE on both images of each pair; validation gives the PSNR of both. Returns the exit code."""
    device = next(vae.parameters()).device

    def loss(vae: nn.Module, batch: Images, positions: list[int]) -> Tensor:
        image = torch.cat(batch).to(device)  # SAR and EO images, one batch
        mean, logvar = vae.encode(image)
        noise, _ = sample_noise((2, *mean.shape[1:]), settings.seed, positions)
        z = mean + (0.5 * logvar).exp() * noise.transpose(0, 1).flatten(0, 1).to(mean)
        return vae_loss(image, vae.decode(z), mean, logvar)

    @torch.inference_mode()
    def validate(_step: int) -> dict[str, float]:
        metrics, (sar, eo) = {}, test
        for name, image in (("psnr_eo", eo), ("psnr_sar", sar)):
            decoded = vae.decode(vae.encode(image.to(device))[0]).clamp(-1, 1).cpu()
            metrics[name] = -10 * float(((decoded - image).square().mean() / 4).log10())
        return metrics

    with run_folder(settings):
        return fit(vae, loss, train, settings, validate)


def train_unet(model: CDiffSET, train: PairDataset, test: Images, settings) -> int:
    """Trains the unconditional U-Net on EO latents with plain L2; the score is minus the validation loss."""
    scheduler, context = model.scheduler, model.prompt_embedding

    def loss(unet: nn.Module, batch: Images, positions: list[int]) -> Tensor:
        _, eo = batch
        with torch.no_grad():
            z = model.encode(eo.to(context.device)).float()
        noise, t = (x.to(z.device) for x in sample_noise(z.shape[1:], settings.seed, positions))
        prediction = unet(scheduler.add_noise(z, noise, t), t, context)
        return F.mse_loss(prediction.float(), scheduler.target(z, noise, t))

    @torch.inference_mode()
    def validate(_step: int) -> dict[str, float]:
        value = float(loss(model.unet, test, list(range(len(test[0])))))
        return {"score": -value, "loss": value}

    with run_folder(settings):
        return fit(model.unet, loss, train, settings, validate)


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
        help="channels of the VAE's levels; 3 levels make a factor of 4, SD's 4 levels 8 (default: 16 48 96)")
    add("--unet-widths", type=positive, nargs="+", default=[64, 128, 192], metavar="N",
        help="channels of the U-Net's levels (default: 64 128 192)")
    add("--prediction-type", choices=("epsilon", "v_prediction"), default="v_prediction",
        help="what the U-Net predicts (default: %(default)s, which small networks learn faster than epsilon)")
    add("--batch-size", type=positive, default=16, help="pairs a step (default: %(default)s)")
    add("--save-every", type=positive, default=500, help="steps between checkpoints (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that read images (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    add("--seed", type=seed_number, default=0, help="of split, weights, data order and noise (default: %(default)s)")
    add("--resume", action="store_true", help="go on with an interrupted run")
    # fmt: on
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains both networks and writes the folder; returns the exit code."""
    args = parse(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("pretrain.py runs as one process: start it with python, not torchrun")
    device = choose_device(args.device)
    found = find_pairs(args.data)
    print("\n".join(describe(found)))
    train_pairs, test_pairs = split_pairs(found.pairs, args.seed)
    test = [torch.stack(images) for images in zip(*(read_center(pair, args.size) for pair in test_pairs[:HELD_OUT]))]

    torch.manual_seed(args.seed)  # of the initial weights; fit draws everything else by position
    vae, unet = small_vae(args.vae_widths), small_unet(args.unet_widths)
    embedding = torch.randn(1, TOKENS, CONTEXT)
    model = CDiffSET(vae, unet, embedding, DDPMScheduler(prediction_type=args.prediction_type))
    if args.size % model.unit or args.vae_size % vae.factor:
        raise ValueError(f"--size must be a multiple of {model.unit}, --vae-size of {vae.factor}, for these networks")
    if device.startswith("cuda"):
        model.to(memory_format=torch.channels_last)  # slower for narrow networks on a CPU
    model.to(device)

    common = {
        "batch_size": args.batch_size, "dtype": args.dtype, "seed": args.seed, "keep": 1, "resume": args.resume,
        "workers": args.workers, "save_every": args.save_every, "validate_every": 250,
    }  # fmt: skip
    about = {"data": dataset_name(found, args.data), "vae": repr(vae.config)}
    vae_about = about | {"size": args.vae_size}
    settings = Settings(args.out / ".pretrain" / "vae", args.vae_steps, lr=2e-3, about=vae_about, **common)
    if code := train_vae(vae, PairDataset(train_pairs, args.vae_size, args.seed), test, settings):
        return code
    vae.eval().requires_grad_(False)
    with torch.inference_mode():  # what 0.18215 is for SD's VAE: 1 / standard deviation of the EO latents
        factor = round(1 / float(vae.encode(test[1].to(device))[0].std()), 5)
    vae.scaling_factor = vae.config["scaling_factor"] = factor

    about |= {"size": args.size, "unet": repr(unet.config), "predicts": args.prediction_type, "scaling_factor": factor}
    settings = Settings(args.out / ".pretrain" / "unet", args.unet_steps, lr=6e-4, about=about, **common)
    if code := train_unet(model, PairDataset(train_pairs, args.size, args.seed), test, settings):
        return code
    model.save_pretrained(args.out)
    print(f"wrote {args.out} (scaling factor {factor}); next: python train.py --model {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
