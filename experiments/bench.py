"""Speed and memory: this implementation beside what one would run otherwise, and against the machine's own limits.

    python bench.py                     sampling, training, a scene and loading, a few steps each
    python bench.py sample --full       the paper's 50 steps, and compiled contenders on a CPU too

Each contender runs in a process of its own - a warm-up, then timed runs - and the contenders take turns, several
rounds of them, so that a machine that slows down slows all of them. Weights are random, which changes no time.

The first line of `sample` and `train` is the released algorithm in diffusers (if installed): float32, leading steps, as
many as the others take, both images encoded anew in each training step; of `scene` the whole image at once; of `load`
reading the files. Reported are the median over all runs; the peak of memory (resident, of the GPU where there is one);
"of the ceiling", the arithmetic that the task needs - the least that any contender does - over the time, as a share
of what a large matrix product or a 3x3 convolution reaches here in the same number format; and the ratio to the first
line. results/bench-MACHINE.json keeps the latest figures of each task.
"""

import os
import re
import resource
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cdiffset import CDiffSET, add_variance_channel, cdiff_loss, initial_noise, widen_input
from checkpoint import Settings, State
from common import DEVICE_HELP, Parser, choose_device, keep_freed_memory, one_line, positive, read_json, run, write_json
from experiments.report import markdown, origin
from loop import add_gradients
from metrics import psnr
from sample import DTYPES, compile_unet, load_model
from scene import translate_scene
from scheduler import DDPMScheduler
from train import objective
from unet import UNet
from vae import AutoencoderKL

SD21 = Path("cache/sd21-random")
COLUMNS = ("seconds", "peak, GB", "of the ceiling", "times as fast", "PSNR to float32")
Run = Callable[[], Any]  # what is timed; in `sample` it returns the image (1, 3, H, W) in [-1, 1]


class Contender(NamedTuple):
    """What is measured. It is prepared with the settings of the command line and its own."""

    prepare: Callable[[Namespace], Run]
    dtype: str = "float32"
    compiled: bool = False


# ----------------------------------------------------------------------------------------------------------
# Contenders: how each prepares what is timed


def sar_images(args: Namespace, side: int, number: int = 1) -> Tensor:
    """Random images (number, 3, side, side) in [-1, 1], on the device."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(number, 3, side, side, generator=generator) * 2 - 1).to(args.device)


def translating(args: Namespace, sides: int = 1) -> Run:
    """`CDiffSET.translate`, of an image `sides` times the size."""
    model, sar = load_model(args.model, args.device, args.dtype), sar_images(args, sides * args.size)
    if args.compiled:
        compile_unet(model)
    return lambda: model.translate(sar, args.steps)[0]


def in_tiles(args: Namespace) -> Run:
    """`translate_scene`: an image of twice the size, in tiles of the size."""
    model, sar = load_model(args.model, args.device, args.dtype), sar_images(args, 2 * args.size)[0]
    options = {"tile": args.size, "steps": args.steps, "batch": 8 if on_gpu(args) else 1}
    return lambda: list(translate_scene(model, lambda a, b, c, d: sar[:, a:b, c:d], *sar.shape[1:], **options))


def training(args: Namespace) -> Run:
    """Steps of train.py with --cache: the latents are there."""
    model = load_model(args.model, args.device)
    model.vae.requires_grad_(False)
    model.unet.train()
    settings = Settings(Path(), steps=1, batch_size=args.batch_size, dtype=args.dtype)
    state, loss = State(model.unet, settings), objective(model, "cdiff", 0, cached=True)
    side = args.size // model.vae.factor
    latents = [initial_noise(seed, (4, side, side)).expand(args.batch_size, -1, -1, -1) for seed in (0, 1)]

    def run() -> None:
        add_gradients(model.unet, loss, iter([(latents, list(range(args.batch_size)))]), settings).item()
        torch.nn.utils.clip_grad_norm_(state.parameters.values(), settings.clip)
        state.update(settings.lr)

    return run


def diffusers_networks(args: Namespace) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """VAE, U-Net and prompt embedding in diffusers' classes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file

    options = {"torch_dtype": DTYPES[args.dtype], "use_safetensors": True, "low_cpu_mem_usage": False}
    vae, unet = (
        kind.from_pretrained(args.model, subfolder=folder, **options).to(args.device)
        for kind, folder in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    if args.dtype == "bfloat16":
        vae.to(memory_format=torch.channels_last)
        unet.to(memory_format=torch.channels_last)
    context = load_file(args.model / "prompt_embedding.safetensors")["prompt_embedding"]
    return vae, unet, context.to(unet.conv_in.weight)


def diffusers_translating(args: Namespace) -> Run:
    """The released sampler's algorithm, in diffusers."""
    from diffusers import DDIMScheduler

    vae, unet, context = diffusers_networks(args)
    if args.compiled:
        unet.compile()
    folder = args.model / "scheduler"
    options = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    sar, scheduler = sar_images(args, args.size).to(context), DDIMScheduler.from_pretrained(folder, **options)
    channels = vae.config.latent_channels

    @torch.inference_mode()
    def run() -> Tensor:
        z_sar = vae.encode(sar).latent_dist.mode() * vae.config.scaling_factor
        z = initial_noise(0, z_sar.shape[1:]).to(z_sar)
        scheduler.set_timesteps(args.steps)
        for t in scheduler.timesteps:
            output = unet(torch.cat([z_sar, z], dim=1), t, context).sample
            z = scheduler.step(output[:, :channels], t, z).prev_sample
        return vae.decode(z / vae.config.scaling_factor).sample.float().clamp(-1, 1)

    return run


def diffusers_training(args: Namespace) -> Run:
    """The released training step's algorithm, in diffusers: both images are encoded each time."""
    vae, unet, context = diffusers_networks(args)
    vae.requires_grad_(False)
    optimizer, scheduler = torch.optim.AdamW(unet.train().parameters(), 3e-5), DDPMScheduler()
    images = sar_images(args, args.size, args.batch_size)
    channels, context = vae.config.latent_channels, context.expand(len(images), -1, -1)

    def run() -> None:
        with torch.no_grad():
            z_sar, z = (vae.encode(images).latent_dist.mode() * vae.config.scaling_factor for _ in range(2))
        noise, t = torch.randn_like(z), torch.randint(1000, (len(z),), device=z.device)
        z_t = scheduler.add_noise(z, noise, t.cpu())
        output = unet(torch.cat([z_sar, z_t], dim=1), t, context).sample
        alphas = scheduler.alphas_cumprod.to(z)[t]
        cdiff_loss(output[:, :channels], output[:, channels:], noise, alphas).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def reading(args: Namespace) -> Run:
    """The bytes of the model's files, read one after the other into the same megabytes."""
    buffer = bytearray(2**24)

    def run() -> None:
        for path in args.model.rglob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return run


def loading(args: Namespace) -> Run:
    """`CDiffSET.from_pretrained`."""
    return lambda: CDiffSET.from_pretrained(args.model).to(args.device)


def diffusers_loading(args: Namespace) -> Run:
    """The same networks by diffusers."""
    return lambda: diffusers_networks(args)


def matrix_product(args: Namespace) -> Run:
    """One large enough to keep the machine busy: networks compute no faster."""
    side = 8192 if on_gpu(args) else 2048
    a, b = torch.randn(2, side, side, device=args.device, dtype=DTYPES[args.dtype])
    return lambda: a @ b


def convolution(args: Namespace) -> Run:
    """One of 3x3, as large."""
    make = partial(torch.randn, device=args.device, dtype=DTYPES[args.dtype])
    images, weight = make(32 if on_gpu(args) else 8, 320, 64, 64), make(320, 320, 3, 3)
    images, weight = (x.contiguous(memory_format=torch.channels_last) for x in (images, weight))
    return lambda: torch.conv2d(images, weight, padding=1)


# the first of each task is what the others are compared with
RELEASED = "diffusers float32 (the released algorithm)"
CONTENDERS = {
    "sample": {
        RELEASED: Contender(diffusers_translating),
        "diffusers bfloat16 compiled": Contender(diffusers_translating, "bfloat16", compiled=True),
        "float32": Contender(translating),
        "bfloat16": Contender(translating, "bfloat16"),
        "bfloat16 compiled": Contender(translating, "bfloat16", compiled=True),
    },
    "train": {
        RELEASED: Contender(diffusers_training),
        "float32, cached latents": Contender(training),
        "bfloat16, cached latents": Contender(training, "bfloat16"),
    },
    "scene": {
        "bfloat16, one image": Contender(partial(translating, sides=2), "bfloat16"),
        "bfloat16, in tiles": Contender(in_tiles, "bfloat16"),
    },
    "load": {
        "reading the files": Contender(reading),
        "diffusers": Contender(diffusers_loading),
        "float32": Contender(loading),
    },
}
KINDS = {"matrix product": matrix_product, "convolution": convolution}
CEILINGS = {f"{kind} {dtype}": Contender(KINDS[kind], dtype) for kind in KINDS for dtype in ("float32", "bfloat16")}

# ----------------------------------------------------------------------------------------------------------
# Measuring


def on_gpu(args: Namespace) -> bool:
    """Whether it runs on an NVIDIA GPU."""
    return args.device.startswith("cuda")


def measure(contender: Contender, args: Namespace, keep: bool = False) -> dict[str, Any]:
    """The "seconds" of each run, the "peak" of the memory in bytes, the "flops" of a run (None if compiled) and, where
    it is to be kept, the "image", as an array (else None). For a process of its own, whose peak it is.
    """
    keep_freed_memory()  # as all scripts do here; diffusers gains by it as well
    run = contender.prepare(Namespace(**vars(args), dtype=contender.dtype, compiled=contender.compiled))
    finish = partial(torch.cuda.synchronize, args.device) if on_gpu(args) else lambda: None
    counter = nullcontext() if contender.compiled else FlopCounterMode(display=False)  # it would be compiled as well
    with counter:
        made = run()
    flops = None if contender.compiled else counter.get_total_flops()
    image, seconds = made.float().cpu().numpy() if keep else None, []
    for _ in range(args.runs):
        made = None  # a model takes some time to go, too
        finish()
        began = time.perf_counter()
        made = run()
        finish()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu(args):
        peak = torch.cuda.max_memory_allocated(args.device)
    return {"seconds": seconds, "peak": peak, "flops": flops, "image": image}


def attempt(*arguments: Any) -> dict[str, Any]:
    """What `measure` gives, or an "error" of one line: torch's exceptions cannot all be sent to another process."""
    try:
        return measure(*arguments)
    except Exception as error:
        return {"error": one_line(f"{type(error).__name__}: {error}")}


def alone(function: Callable, *arguments: Any) -> Any:
    """What the function returns, called in a process of its own. Raises MemoryError if that was killed."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return process.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise MemoryError("killed, as happens when memory runs out") from error


def take_turns(contenders: dict[str, Contender], args: Namespace, bar: tqdm, keep: bool = False) -> dict[str, dict]:
    """{contender: what `measure` gives, with the seconds of all rounds}; of one that failed, an "error" instead."""
    results = {name: {"seconds": []} for name in contenders}
    for name, contender in list(contenders.items()) * args.rounds:
        bar.set_description(name)
        if "error" not in results[name]:
            try:
                result = alone(attempt, contender, args, keep)
            except MemoryError as error:
                result = {"error": str(error)}
            if "error" in result:
                bar.write(f"{name}: {result['error']}")
            else:
                result["seconds"] += results[name]["seconds"]
            results[name] = result
        bar.update()
    return results


def compare(contenders: dict[str, Contender], results: dict[str, dict], limits: dict[str, float]) -> dict[str, dict]:
    """{contender: what the table shows, and its "runs"; or an "error"}. limits: FLOP/s by each of CEILINGS."""
    good = {name: result for name, result in results.items() if "error" not in result}
    seconds = {name: median(result["seconds"]) for name, result in good.items()}
    needed = min((result["flops"] for result in good.values() if result["flops"]), default=0)
    reference, rows = good.get("float32", {}).get("image"), dict(results)
    for name, result in good.items():
        row = {"seconds": seconds[name], "runs": result["seconds"], "peak, GB": result["peak"] / 1e9}
        rates = [rate for limit, rate in limits.items() if CEILINGS[limit].dtype == contenders[name].dtype]
        if needed and rates:
            row |= {"flops": needed, "of the ceiling": needed / seconds[name] / max(rates)}
        row["times as fast"] = next(iter(seconds.values())) / seconds[name]
        if reference is not None and name != "float32":
            a, b = (torch.from_numpy(x) / 2 + 0.5 for x in (result["image"], reference))
            row["PSNR to float32"] = psnr(a, b).clamp(max=200).item()  # JSON has no infinity
        rows[name] = row
    return rows


# ----------------------------------------------------------------------------------------------------------
# The program


def make_sd21(folder: Path) -> None:
    """Writes a C-DiffSET of Stable Diffusion 2.1's size with random weights (3.8 GB)."""
    torch.manual_seed(0)
    unet = UNet(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
    widen_input(unet)
    add_variance_channel(unet)
    CDiffSET(AutoencoderKL(), unet, torch.randn(1, 6, 1024), DDPMScheduler()).save_pretrained(folder)


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help=f"{', '.join(CONTENDERS)} (default: all)")
    add("--full", action="store_true", help="50 steps, and compiled contenders on a CPU too: an hour or more there")
    add("--model", type=Path, metavar="DIR", default=SD21,
        help="a C-DiffSET model folder (default: %(default)s, made if it is not there)")
    add("--size", type=positive, help="side of the images (default: 512 on GPUs, else 256)")
    add("--steps", type=positive, help="denoising steps (default: 4, with --full 50)")
    add("--batch-size", type=positive, help="images at once, in training (default: 8 on GPUs, else 1)")
    add("--runs", type=positive, default=2, help="timed runs of a contender a round (default: %(default)s)")
    add("--rounds", type=positive, default=2, help="turns of each contender (default: %(default)s)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="where to write (default: %(default)s)")
    add("--device", help=DEVICE_HELP)
    # fmt: on
    args = parser.parse_args(arguments)
    if unknown := [task for task in args.tasks if task not in CONTENDERS]:  # choices=... would refuse none at all
        parser.error(f"no task {unknown[0]!r}: choose from {', '.join(CONTENDERS)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns the exit code."""
    args = parse(arguments)
    args.device = choose_device(args.device)
    args.size = args.size or (512 if on_gpu(args) else 256)
    args.steps = args.steps or (50 if args.full else 4)
    args.batch_size = args.batch_size or (8 if on_gpu(args) else 1)
    about = origin("bench.py", arguments, args)
    path = args.out / f"bench-{re.sub('[^A-Za-z0-9]+', '-', about['machine']).strip('-')}.json"
    report = read_json(path) if path.exists() else {}  # of other runs; those tasks that this one measures are replaced
    if not (args.model / "model_index.json").exists():  # what is written last
        if args.model != SD21:
            raise ValueError(f"{str(args.model)!r} is not there: give a C-DiffSET model folder, as train.py writes")
        print(f"making {SD21}: random weights, 3.8 GB, once")
        alone(make_sd21, SD21)  # Linux counts the peak of this process as one of those that it starts
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    compiled = args.full or on_gpu(args)
    tasks = {
        task: {name: contender for name, contender in CONTENDERS[task].items() if compiled or not contender.compiled}
        for task in args.tasks or CONTENDERS
    }
    with tqdm(total=args.rounds * (len(CEILINGS) + sum(map(len, tasks.values()))), unit="turn") as bar:
        reached = take_turns(CEILINGS, Namespace(**vars(args) | {"runs": 5}), bar)
        limits = {name: r["flops"] / min(r["seconds"]) for name, r in reached.items() if "error" not in r}
        peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.items())
        bar.write(f"{about['machine']}, {args.size}x{args.size}, {args.steps} steps; ceilings in GFLOP/s: {peaks}")
        for task, contenders in tasks.items():
            rows = compare(contenders, take_turns(contenders, args, bar, task == "sample"), limits)
            report[task] = about | {"ceilings": limits, "rows": rows}
            write_json(path, report)
            shown = [column for column in COLUMNS if any(column in row for row in rows.values())]
            bar.write(f"\n{markdown(task, rows, shown)}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    run(main)
