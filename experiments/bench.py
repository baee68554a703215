"""Times sampling and training beside the released algorithm, on networks of Stable Diffusion 2.1's size.

    python -m experiments.bench                      4 sampling steps and single training steps, 256x256 pixels
    python -m experiments.bench --steps 50 --batch-size 4

The weights are random, which does not change the time. The released algorithm, the first line of both tables, computes
in float32 and encodes both images in each training step. It uses diffusers if that is installed, else our networks.
The contenders take turns for several rounds, so that a machine that slows down slows all of them.

Columns: the median of the seconds; the speed relative to the first line; FLOP/s of the task as a share of what a large
matrix product reaches in the same dtype; PSNR of the image to ours in float32; on GPUs, the peak memory. The FLOP are
those of the contender that needs the fewest. Results go to results/bench-MACHINE.json.
"""

import argparse
import re
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cdiffset import CDiffSET, add_variance_channel, cdiff_loss, initial_noise, widen_input
from common import DEVICE_HELP, Parser, choose_device, positive, run, write_json
from evaluate import markdown
from experiments.report import machine, origin
from metrics import psnr
from sample import DTYPES, load_model
from scheduler import DDIMScheduler, DDPMScheduler
from train import objective, precision
from unet import UNet
from vae import AutoencoderKL

LR, CLIP = 3e-5, 1.0  # of the training steps

# ----------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device: str) -> None:
    """Waits until a GPU has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(function: Callable, device: str) -> float:
    """The time of one call."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def median_seconds(function: Callable, rounds: int, device: str) -> float:
    """The median time of `rounds` calls, after one call to warm up."""
    function()
    return median(seconds(function, device) for _ in range(rounds))


def matmul_ceiling(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of ten: an upper limit for networks in this dtype."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=DTYPES[dtype])
    a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


# ----------------------------------------------------------------------------------------------------------
# What is measured


def random_sd21(device: str, dtype: str = "float32") -> CDiffSET:
    """A C-DiffSET of Stable Diffusion 2.1's size with random weights, always the same ones on a device."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
        widen_input(unet)
        add_variance_channel(unet)
        model = CDiffSET(AutoencoderKL(), unet, torch.randn(1, 6, 1024), DDPMScheduler())
    channels_last = device.startswith("cuda")
    return model.to(DTYPES[dtype], memory_format=torch.channels_last if channels_last else torch.preserve_format)


def random_images(number: int, size: int, device: str) -> Tensor:
    """(number, 3, size, size), uniform in [-1, 1]."""
    images = torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(device)


def sampler(model: CDiffSET, sar: Tensor, steps: int, spacing: str = "leading") -> Callable[[], Tensor]:
    """Our sampling: returns a function that translates the SAR images (B, 3, H, W)."""
    return lambda: model.translate(sar, steps, spacing=spacing)[0]


def train_step(model: CDiffSET, latents: list[Tensor], dtype: str) -> Callable[[], None]:
    """Our training from cached latents, (B, 4, h, w) of SAR and EO: returns a function that does one step."""
    model.vae.requires_grad_(False)
    model.unet.train()
    loss = objective(model, "cdiff", seed=0, cached=True)
    optimizer = torch.optim.AdamW(model.unet.parameters(), LR, weight_decay=0.01, fused=True)

    def step() -> None:
        with precision(model.device, dtype):
            value = loss(model.unet, latents, list(range(len(latents[0]))))
        value.backward()
        nn.utils.clip_grad_norm_(model.unet.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def released_networks(model: CDiffSET) -> tuple[nn.Module, nn.Module]:
    """VAE and U-Net with the weights of `model` in float32: diffusers' classes if installed, else copies of ours."""
    try:
        import diffusers
    except ImportError:
        plain = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
        return deepcopy(model.vae).to(**plain), deepcopy(model.unet).to(**plain)
    copies = []
    for network, kind in ((model.vae, diffusers.AutoencoderKL), (model.unet, diffusers.UNet2DConditionModel)):
        with torch.device(model.device):
            copies.append(kind(**network.config).eval())
        copies[-1].load_state_dict(network.state_dict())
    return tuple(copies)


def only_tensor(output: object) -> Tensor:
    """The tensor in a network's output: ours, or one of diffusers' classes. Of a VAE's encoder, the posterior mean."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):  # our encoder: mean, log-variance
        return output[0]
    return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.sample


def released_sampler(model: CDiffSET, sar: Tensor, steps: int = 50) -> Callable[[], Tensor]:
    """The released sampling: returns a function that translates the SAR images (B, 3, H, W), sides multiples of 64."""
    vae, unet = released_networks(model)
    factor, scheduler = vae.config["scaling_factor"], model.scheduler.config | {"steps": steps, "spacing": "leading"}
    context = model.prompt_embedding.float().expand(len(sar), -1, -1)

    @torch.inference_mode()
    def translate() -> Tensor:
        ddim = DDIMScheduler(**scheduler)
        z_sar = only_tensor(vae.encode(sar)) * factor
        z = torch.cat([initial_noise(i, z_sar.shape[1:]) for i in range(len(sar))]).to(z_sar)
        for t in ddim.timesteps.tolist():
            output = only_tensor(unet(torch.cat([z_sar, z], dim=1), t, context))
            z = ddim.step(output[:, : z.shape[1]], t, z)
        return only_tensor(vae.decode(z / factor)).clamp(-1, 1)

    return translate


def released_train_step(model: CDiffSET, sar: Tensor, eo: Tensor) -> Callable[[], None]:
    """The released training, which encodes both images each time: returns a function that does one step."""
    vae, unet = released_networks(model)
    vae.requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.train().parameters(), LR, weight_decay=0.01)
    factor, scheduler = vae.config["scaling_factor"], model.scheduler
    context = model.prompt_embedding.float().expand(len(sar), -1, -1)

    def step() -> None:
        with torch.no_grad():
            z_sar, z_eo = (only_tensor(vae.encode(image)) * factor for image in (sar, eo))
        noise, t = torch.randn_like(z_eo), torch.randint(1000, (len(z_eo),))
        z_t = scheduler.add_noise(z_eo, noise, t)
        output = only_tensor(unet(torch.cat([z_sar, z_t], dim=1), t.to(z_t.device), context))
        target = scheduler.target(z_eo, noise, t)
        alphas = scheduler.alphas_cumprod[t].to(target)
        cdiff_loss(output[:, : z_t.shape[1]], output[:, z_t.shape[1] :], target, alphas).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


# ----------------------------------------------------------------------------------------------------------
# The comparison


def prepare(task: str, dtype: str, args: argparse.Namespace) -> Callable:
    """The function to time. dtype: "released" or that of our arithmetic."""
    weights = dtype if task == "sample" and dtype != "released" else "float32"
    model = load_model(args.model, args.device, weights) if args.model else random_sd21(args.device, weights)
    images = random_images(1 if task == "sample" else args.batch_size, args.size, args.device)
    if task == "sample":
        return (released_sampler if dtype == "released" else sampler)(model, images, args.steps)
    if dtype == "released":
        return released_train_step(model, images, images)
    with torch.inference_mode():
        latents = model.encode(images)
    return train_step(model, [latents.clone(), latents.clone()], dtype)


def compare(task: str, args: argparse.Namespace, ceilings: dict[str, float]) -> dict[str, dict]:
    """{contender: its row of the table}. ceilings: of `matmul_ceiling`, by dtype."""
    contenders = {"released": "released algorithm", "float32": "float32", "bfloat16": "bfloat16"}
    times, flops, images, peaks = {dtype: [] for dtype in contenders}, {}, {}, {}
    for dtype in tqdm(list(contenders) * args.rounds, desc=task, unit="turn"):
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(args.device)
        function = prepare(task, dtype, args)
        with FlopCounterMode(display=False) as counter:
            images[dtype] = function()
        flops[dtype] = counter.get_total_flops()
        times[dtype] += [seconds(function, args.device) for _ in range(args.runs)]
        if args.device.startswith("cuda"):
            peaks[dtype] = torch.cuda.max_memory_allocated(args.device) / 1e9
        del function  # one model at a time is in memory
    rows = {}
    for dtype, name in contenders.items():
        time, ceiling = median(times[dtype]), ceilings["float32" if dtype == "released" else dtype]
        rows[name] = {"seconds": time, "times as fast": median(times["released"]) / time}
        rows[name]["of the ceiling"] = min(flops.values()) / time / ceiling
        if task == "sample" and dtype != "float32":
            similarity = psnr(images[dtype].float() / 2 + 0.5, images["float32"] / 2 + 0.5)
            rows[name]["PSNR to float32"] = float(similarity.clamp(max=200).mean())  # JSON has no infinity
        if peaks:
            rows[name]["peak, GB"] = peaks[dtype]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints both tables and writes the JSON file; returns the exit code."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a C-DiffSET model (default: random weights of SD 2.1's size)")
    add("--size", type=positive, default=256, help="side of the images in pixels (default: %(default)s)")
    add("--steps", type=positive, default=4, help="sampling steps, leading (default: %(default)s)")
    add("--batch-size", type=positive, default=1, help="pairs in a training step (default: %(default)s)")
    add("--runs", type=positive, default=2, help="timed runs in a turn (default: %(default)s)")
    add("--rounds", type=positive, default=3, help="turns of each contender (default: %(default)s)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="where to write (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    args = parser.parse_args(arguments)
    args.device = choose_device(args.device)
    result = origin("bench", arguments, args)
    ceilings = {dtype: matmul_ceiling(args.device, dtype) for dtype in ("float32", "bfloat16")}
    result["ceilings, FLOP/s"] = ceilings
    path = args.out / f"bench-{re.sub('[^A-Za-z0-9]+', '-', machine(args.device)).strip('-')}.json"
    for task in ("sample", "train"):
        result[task] = compare(task, args, ceilings)
        print(f"\n{markdown(task, result[task], list(result[task]['released algorithm']))}", end="")
        write_json(path, result)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    run(main)
