"""Speed and memory: this implementation beside what one would run otherwise, and against the machine's own limits.

    python bench.py                     sampling, training, a scene and loading, a few steps each
    python bench.py sample --full       the paper's 50 steps, and compiled contenders on a CPU too
    python bench.py --model models/tiny --size 128       any model in place of one of SD 2.1's size

Each contender runs in a process of its own - a warm-up, then timed runs - and the contenders take turns, several
rounds of them, so that a machine that slows down slows all of them. Reported is the median over all runs; the peak
of memory (resident, of the GPU where there is one); the arithmetic that the method needs, over the time, as a share
of what a large matrix product and a 3x3 convolution reach here in the same number format; and the ratio to the first
line. With diffusers installed, that line is the released algorithm: float32, 50 leading steps, both images encoded
anew in each training step. Weights are random, which changes no time. Written to results/bench-MACHINE.json.
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
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cdiffset import CDiffSET, add_variance_channel, cdiff_loss, initial_noise, widen_input
from checkpoint import Settings, State
from cli import DEVICE, Parser, choose_device, keep_freed_memory, positive, run
from files import write_json
from loop import add_gradients
from metrics import psnr
from report import markdown, origin
from sample import compile_unet, load_model
from scene import translate_scene
from scheduler import DDPMScheduler
from train import objective
from unet import UNet
from vae import AutoencoderKL

SD21 = Path("cache/sd21-random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[], Any]  # what is timed; images that it returns, (B, 3, H, W), can be compared

# ----------------------------------------------------------------------------------------------------------
# Contenders: each prepares, and returns what is timed


def sar_images(args: Namespace, side: int) -> Tensor:
    """Random images (batch, 3, side, side) in [-1, 1], on the device."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(args.batch_size, 3, side, side, generator=generator) * 2 - 1).to(args.device)


def translating(args: Namespace, dtype: str, compiled: bool = False, sides: int = 1) -> Run:
    """`CDiffSET.translate`, of images `sides` times the size."""
    model, sar = load_model(args.model, None, dtype, args.device), sar_images(args, sides * args.size)
    if compiled:
        compile_unet(model)
    return lambda: model.translate(sar, args.steps)[0]


def in_tiles(args: Namespace, dtype: str) -> Run:
    """`translate_scene`: an image of twice the size, in tiles of the size."""
    model, sar = load_model(args.model, None, dtype, args.device), sar_images(args, 2 * args.size)[0]
    options = {"tile": args.size, "steps": args.steps, "batch": 8 if on_gpu(args) else 1}
    return lambda: list(translate_scene(model, lambda a, b, c, d: sar[:, a:b, c:d], *sar.shape[1:], **options))


def training(args: Namespace, dtype: str) -> Run:
    """Steps of train.py with --cache: the latents are there."""
    model = CDiffSET.from_pretrained(args.model).to(args.device)
    if on_gpu(args):
        model.to(memory_format=torch.channels_last)
    model.vae.requires_grad_(False)
    model.unet.train()
    settings = Settings(Path(), steps=1, batch_size=args.batch_size, dtype=dtype)
    state, loss = State(model.unet, settings), objective(model, "cdiff", 0, cached=True)
    side = args.size // model.vae.factor
    latents = [initial_noise(seed, (4, side, side)).expand(args.batch_size, -1, -1, -1) for seed in (0, 1)]

    def run() -> None:
        add_gradients(model.unet, loss, iter([(latents, list(range(args.batch_size)))]), settings).item()
        torch.nn.utils.clip_grad_norm_(state.parameters.values(), settings.clip)
        state.update(settings.lr)

    return run


def diffusers_networks(args: Namespace, dtype: str) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """VAE, U-Net and prompt embedding in diffusers' classes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file

    options = {"torch_dtype": DTYPES[dtype], "use_safetensors": True, "low_cpu_mem_usage": False}
    vae, unet = (
        kind.from_pretrained(args.model, subfolder=folder, **options).to(args.device)
        for kind, folder in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    if dtype == "bfloat16":
        vae.to(memory_format=torch.channels_last)
        unet.to(memory_format=torch.channels_last)
    context = load_file(args.model / "prompt_embedding.safetensors")["prompt_embedding"]
    return vae, unet, context.to(unet.conv_in.weight)


def diffusers_translating(args: Namespace, dtype: str, compiled: bool = False) -> Run:
    """The released sampler's algorithm, in diffusers."""
    from diffusers import DDIMScheduler

    vae, unet, context = diffusers_networks(args, dtype)
    if compiled:
        unet.compile()
    folder = args.model / "scheduler"
    options = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    sar, scheduler = sar_images(args, args.size).to(context), DDIMScheduler.from_pretrained(folder, **options)
    channels, context = vae.config.latent_channels, context.expand(len(sar), -1, -1)

    @torch.inference_mode()
    def run() -> Tensor:
        z_sar = vae.encode(sar).latent_dist.mode() * vae.config.scaling_factor
        z = torch.cat([initial_noise(seed, z_sar.shape[1:]) for seed in range(len(sar))]).to(z_sar)
        scheduler.set_timesteps(args.steps)
        for t in scheduler.timesteps:
            output = unet(torch.cat([z_sar, z], dim=1), t, context).sample
            z = scheduler.step(output[:, :channels], t, z).prev_sample
        return vae.decode(z / vae.config.scaling_factor).sample.float().clamp(-1, 1)

    return run


def diffusers_training(args: Namespace, dtype: str) -> Run:
    """The released training step's algorithm, in diffusers: both images are encoded each time."""
    vae, unet, context = diffusers_networks(args, dtype)
    vae.requires_grad_(False)
    optimizer, scheduler = torch.optim.AdamW(unet.train().parameters(), 3e-5), DDPMScheduler()
    images = sar_images(args, args.size)
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
    return lambda: diffusers_networks(args, "float32")


def ceiling(args: Namespace, dtype: str, kind: str) -> Run:
    """A matrix product or a convolution large enough to keep the machine busy: networks compute no faster."""
    make, n = partial(torch.randn, device=args.device, dtype=DTYPES[dtype]), 8192 if on_gpu(args) else 2048
    if kind == "matrix product":
        return partial(torch.mm, make(n, n), make(n, n))
    images, weight = make(n // 256, 320, 64, 64), make(320, 320, 3, 3)
    images, weight = (x.contiguous(memory_format=torch.channels_last) for x in (images, weight))
    return partial(torch.conv2d, images, weight, padding=1)


# the first of each task is what the others are compared with
RELEASED = "diffusers float32 (the released algorithm)"
CONTENDERS: dict[str, dict[str, Callable[[Namespace], Run]]] = {
    "sample": {
        RELEASED: partial(diffusers_translating, dtype="float32"),
        "diffusers bfloat16 compiled": partial(diffusers_translating, dtype="bfloat16", compiled=True),
        "float32": partial(translating, dtype="float32"),
        "bfloat16": partial(translating, dtype="bfloat16"),
        "bfloat16 compiled": partial(translating, dtype="bfloat16", compiled=True),
    },
    "train": {
        RELEASED: partial(diffusers_training, dtype="float32"),
        "float32, cached latents": partial(training, dtype="float32"),
        "bfloat16, cached latents": partial(training, dtype="bfloat16"),
    },
    "scene": {
        "bfloat16, one image": partial(translating, dtype="bfloat16", sides=2),
        "bfloat16, in tiles": partial(in_tiles, dtype="bfloat16"),
    },
    "load": {"reading the files": reading, "diffusers": diffusers_loading, "float32": loading},
}
KINDS = ("matrix product", "convolution")
CEILINGS = {f"{kind} {dtype}": partial(ceiling, dtype=dtype, kind=kind) for kind in KINDS for dtype in DTYPES}

# ----------------------------------------------------------------------------------------------------------
# Measuring


def on_gpu(args: Namespace) -> bool:
    """Whether it runs on an NVIDIA GPU."""
    return args.device.startswith("cuda")


def measure(prepare: Callable[[Namespace], Run], args: Namespace, compiled: bool) -> dict:
    """In a process of its own: seconds of each run, peak memory in bytes, FLOPs of a run, and its images."""
    keep_freed_memory()  # as all scripts do here; diffusers gains by it as well
    run, finish = prepare(args), torch.cuda.synchronize if on_gpu(args) else lambda: None
    counter = nullcontext() if compiled else FlopCounterMode(display=False)  # it would be compiled as well
    with counter:
        output = run()
    comparable = isinstance(output, Tensor) and output.shape[1] == 3
    output = output.float().cpu().numpy() if comparable else None  # and no model stays in memory, if that is loaded
    flops, seconds = None if compiled else counter.get_total_flops(), []
    for _ in range(args.runs):
        finish()
        began = time.perf_counter()
        made = run()
        finish()
        seconds.append(time.perf_counter() - began)
        del made  # a model takes some time to go, too
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu(args):
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "peak_bytes": peak, "flops": flops, "output": output}


def take_turns(contenders: dict[str, Callable], args: Namespace, bar: tqdm) -> dict[str, dict]:
    """{contender: its figures}; the seconds of all rounds. One that did not end well has an "error" instead."""
    results = {}
    for _ in range(args.rounds):
        for name, prepare in contenders.items():
            bar.set_description(name)
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    figures = process.submit(measure, prepare, args, "compiled" in name).result()
                seconds = results.get(name, {}).get("seconds", [])
                results[name] = figures | {"seconds": seconds + figures["seconds"]}
            except (MemoryError, torch.OutOfMemoryError, BrokenProcessPool):
                results[name] = {"error": "out of memory, or killed"}
            bar.update()
    return results


def compare(task: str, results: dict[str, dict], limits: dict[str, float], images: int) -> list[dict]:
    """The figures of each contender, beside those of the first. limits: FLOP/s reached by each of CEILINGS; images:
    in a run.
    """
    first, rows = next(iter(results.values())), []
    needed = min((r["flops"] for r in results.values() if r.get("flops")), default=0)
    reference = results.get("float32", {}).get("output")
    for name, result in results.items():
        row = {"task": task, "contender": name}
        rows.append(row)
        if "error" in result:
            row |= result
            continue
        seconds = median(result["seconds"])
        row |= {"seconds": seconds, "runs": result["seconds"]}
        row |= {"images_per_second": images / seconds if images else None, "peak_bytes": result["peak_bytes"]}
        if needed and task != "load":
            dtype = "bfloat16" if "bfloat16" in name else "float32"
            best = max(rate for limit, rate in limits.items() if limit.endswith(dtype))
            row |= {"flops": needed, "share_of_ceiling": needed / seconds / best}
        if "seconds" in first:
            row["speedup"] = median(first["seconds"]) / seconds
        if task == "sample" and reference is not None and name != "float32":
            a, b = (torch.from_numpy(x) / 2 + 0.5 for x in (result["output"], reference))
            row["psnr_to_float32"] = float(psnr(a, b).clamp(max=200).mean())  # JSON has no infinity
    return rows


def table(rows: list[dict]) -> str:
    """A Markdown table; what was not measured stays empty."""
    columns = {
        "seconds": ("seconds", "{:.3g}".format),
        "images/s": ("images_per_second", "{:.3g}".format),
        "peak, GB": ("peak_bytes", lambda peak: f"{peak / 1e9:.2f}"),
        "of the ceiling": ("share_of_ceiling", "{:.0%}".format),
        "times as fast": ("speedup", "{:.2f}".format),
        "PSNR to float32, dB": ("psnr_to_float32", "{:.1f}".format),
    }
    lines = {}
    for row in rows:
        cells = {title: text(row[key]) for title, (key, text) in columns.items() if row.get(key) is not None}
        if "error" in row:
            cells["seconds"] = row["error"]
        lines[f"{row['task']}: {row['contender']}"] = cells
    return markdown("", lines, columns)


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
    add("tasks", nargs="*", metavar="TASK", help="sample, train, scene, load (default: all)")
    add("--full", action="store_true", help="50 steps, and compiled contenders on a CPU too: an hour or more there")
    add("--model", type=Path, metavar="DIR", default=SD21,
        help="a C-DiffSET model folder (default: %(default)s, made if it is not there)")
    add("--size", type=positive, help="side of the images (default: 512 on GPUs, else 256)")
    add("--steps", type=positive, help="denoising steps (default: 4, with --full 50)")
    add("--batch-size", type=positive, help="images at once, in training (default: 8 on GPUs, else 1)")
    add("--runs", type=positive, default=2, help="timed runs of a contender a round (default: %(default)s)")
    add("--rounds", type=positive, default=2, help="turns of each contender (default: %(default)s)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="where to write (default: %(default)s)")
    add("--device", help=DEVICE)
    # fmt: on
    args = parser.parse_args(arguments)
    for task in args.tasks:
        if task not in CONTENDERS:
            parser.error(f"no task {task!r}: choose from {', '.join(CONTENDERS)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns the exit code."""
    args = parse(arguments)
    args.device = choose_device(args.device)
    args.size = args.size or (512 if on_gpu(args) else 256)
    args.steps = args.steps or (50 if args.full else 4)
    args.batch_size = args.batch_size or (8 if on_gpu(args) else 1)
    if not args.model.exists():
        if args.model != SD21:
            raise ValueError(f"{str(args.model)!r} is not there: give a C-DiffSET model folder, as train.py writes")
        print(f"making {SD21}: random weights, 3.8 GB, once")
        make_sd21(SD21)
    compiled, references = args.full or on_gpu(args), find_spec("diffusers") is not None
    if not references:
        print("diffusers is not installed (pip install diffusers): only this implementation is measured")

    def wanted(name: str) -> bool:
        return (compiled or "compiled" not in name) and (references or "diffusers" not in name)

    tasks = {task: [name for name in CONTENDERS[task] if wanted(name)] for task in args.tasks or CONTENDERS}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    with tqdm(total=args.rounds * (len(CEILINGS) + sum(map(len, tasks.values()))), unit="turn") as bar:
        reached = take_turns(CEILINGS, Namespace(**vars(args) | {"runs": 5}), bar)
        if any("error" in result for result in reached.values()):
            raise ValueError(
                "out of memory, or killed, while the machine's ceilings were measured: close other programs"
            )
        limits = {name: result["flops"] / min(result["seconds"]) for name, result in reached.items()}
        for task, names in tasks.items():
            images = args.batch_size if task == "train" else 1
            contenders = {name: CONTENDERS[task][name] for name in names}
            results = take_turns(contenders, Namespace(**vars(args) | {"batch_size": images}), bar)
            rows += compare(task, results, limits, 0 if task == "load" else images)

    about = origin("bench.py", arguments, args)
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.items())
    print(f"{about['machine']}, {args.size}x{args.size}, {args.steps} steps; ceilings in GFLOP/s: {peaks}\n")
    print(table(rows))
    path = args.out / f"bench-{re.sub('[^A-Za-z0-9]+', '-', about['machine']).strip('-')}.json"
    write_json(path, about | {"ceilings": limits, "rows": rows})
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    run(main)
