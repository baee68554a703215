"""Checks and times the project on a GPU: one command, one table, less than 7 minutes on an H100.

    python -m experiments.gpu --out results/gpu                             everything
    python -m experiments.gpu --out results/gpu --parts parity training     some parts
    python -m experiments.gpu --out tryout/gpu --device cpu --small         every line once, with small networks

The last command tests this script where there is no GPU: it compares the CPU with itself, and its times mean nothing.

Each part is a process of its own with a time limit. A crash, a CUDA error or the end of its time costs only the lines
of that part that are not there yet. --out receives gpu.json; gpu.md, the table; PART.log, what each part printed; the
slowest operations, profile-*.txt; and tiny/, the model that the last part trained.

Speed and memory are those of networks of Stable Diffusion 2.1's size with random weights, beside the released algorithm
as `experiments.bench` has it: in float32 with PyTorch's default of TF32 for convolutions; in diffusers, if that can be
imported, else with our networks. Images are compared with models/tiny, since random weights make grey ones. A relative
error is ||a - b|| / ||b||, over all numbers together.
"""

import argparse
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import sample
import train
from cdiffset import CDiffSET, add_variance_channel, widen_input
from checkpoint import read_table
from common import DEVICE_HELP, Parser, choose_device, one_line, out_of_memory, positive, run, write_json
from experiments import bench, synth
from experiments.pretrain import CONTEXT, TOKENS, small_unet, small_vae
from experiments.report import origin
from images import read_sar
from layers import add_lora
from metrics import psnr
from sample import TINY
from scheduler import DDIMScheduler, DDPMScheduler

ROOT = Path(__file__).resolve().parent.parent
SD = ROOT / train.SD_FOLDER
VARIANTS = ("all weights", "--checkpointing", "--lora 16", "--lora 16 --checkpointing")  # of training
RUNS, BUDGET = 4, 2.0  # timed calls: at most so many, and no further one after so many seconds

# ----------------------------------------------------------------------------------------------------------
# What the parts share


def row(what: str, figures: dict[str, float], at_least=None, at_most=None, note: str = "") -> dict:
    """A line of the table. at_least, at_most: {figure: limit}; "ok" is None without limits."""
    at_least, at_most = at_least or {}, at_most or {}
    # a figure that is missing or NaN meets no limit
    met = [figures.get(name, math.nan) >= limit for name, limit in at_least.items()]
    met += [figures.get(name, math.nan) <= limit for name, limit in at_most.items()]
    figures = {name: float(x) if math.isfinite(x) else str(x) for name, x in figures.items()}  # JSON has no infinity
    ok = all(met) if met else None
    return {"what": what, "figures": figures, "at least": at_least, "at most": at_most, "note": note, "ok": ok}


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """||found - expected|| / ||expected||, over all tensors of the lists together."""
    pairs = [(a.detach().cpu(), b.detach().cpu()) for a, b in zip(found, expected, strict=True)]
    return math.sqrt(sum(float((a - b).norm()) ** 2 for a, b in pairs) / sum(float(b.norm()) ** 2 for _, b in pairs))


def similarity(image: Tensor, truth: Tensor) -> float:
    """The lowest PSNR of a batch of images in [-1, 1], in dB; 200 for equal ones."""
    return float(psnr(image.cpu() / 2 + 0.5, truth.cpu() / 2 + 0.5).clamp(max=200).min())


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on a GPU may use TF32, which rounds their inputs to 11 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def random_model(args: argparse.Namespace, dtype: str = "float32") -> CDiffSET:
    """A C-DiffSET with random weights on the device: of Stable Diffusion 2.1's size, or with --small a small one."""
    if not args.small:
        return bench.random_sd21(args.device, dtype)
    torch.manual_seed(0)
    unet = small_unet([8, 16])
    widen_input(unet)
    add_variance_channel(unet)
    model = CDiffSET(small_vae([8, 8, 8, 8]), unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler())
    return model.to(args.device, sample.DTYPES[dtype])


def draw_sar(path: Path, size: int) -> Path:
    """Writes a synthetic SAR image (size, size)."""
    Image.fromarray(synth.draw(size=size).sar).save(path)
    return path


# ----------------------------------------------------------------------------------------------------------
# Do the results agree?


def compute(model: CDiffSET, images: Tensor, latents: Tensor) -> dict[str, list[Tensor]]:
    """All computations of the method on the device of `model`. images (2, 3, H, W), latents (2, 4, h, w)."""
    z = latents.to(model.device)
    with torch.no_grad():
        t, ddim = torch.tensor([1, 700]), DDIMScheduler(10, "trailing")
        results = {
            "VAE encoder": [model.encode(images)],
            "VAE decoder": [model.decode(z)],
            "U-Net": [model.unet(torch.cat([z, z.flip(0)], dim=1), t.to(z.device), model.prompt_embedding)],
            "scheduler": [model.scheduler.add_noise(z, z.flip(0), t), ddim.step(z.flip(0), 499, z)],
            "translate": list(model.translate(images, 2, spacing="trailing")),
        }
    loss = train.objective(model, "cdiff", seed=0, cached=True)(model.unet, [z, z.flip(0)], [0, 1])
    loss.backward()
    return results | {"loss": [loss], "gradients": [p.grad for p in model.unet.parameters()]}


def check_parity(args: argparse.Namespace) -> Iterator[dict]:
    """Float32 on the device against float32 on the CPU, without TF32."""
    allow_tf32(False)
    model = random_model(args)
    nn.init.normal_(model.unet.conv_out.weight[4:], std=0.01)  # of the variance, zero in a new model
    reference = deepcopy(model).to("cpu", memory_format=torch.contiguous_format)
    images = bench.random_images(2, args.training_size, "cpu")
    latents = reference.encode(images).detach()
    expected, found = (compute(network, images, latents) for network in (reference, model))
    # rounding errors of 6e-8 grow in a hundred layers; the scheduler has one
    limits = dict.fromkeys(found, 1e-4) | {"scheduler": 1e-6, "gradients": 1e-3, "translate": 1e-3}
    for name, limit in limits.items():
        error = {"relative error": relative_error(found[name], expected[name])}
        yield row(f"{name}: device against CPU", error, at_most={"relative error": limit})

    model.unet.zero_grad()
    model.unet.gradient_checkpointing = True
    error = {"relative error": relative_error(compute(model, images, latents)["gradients"], found["gradients"])}
    yield row("gradients: --checkpointing against plain", error, at_most={"relative error": 1e-4})

    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "cuda", "tests/test_cuda.py"], cwd=ROOT, check=False)
    yield row("pytest -m cuda tests/test_cuda.py", {"exit code": tests.returncode}, at_most={"exit code": 0})


def check_precision(args: argparse.Namespace) -> Iterator[dict]:
    """Translations by models/tiny in lower precisions and in channels-last; float16 at 512 pixels."""
    paths, steps = sorted((ROOT / "examples").glob("*.png")), 2 if args.small else 10
    sar = torch.stack([read_sar(path) for path in paths[: 1 if args.small else 5]])  # (B, 3, 128, 128)
    expected = sample.load_model(TINY, "cpu").translate(sar, steps, spacing="trailing")[0]
    for dtype, layout, tf32, limit in (
        ("float32", torch.contiguous_format, False, 60),
        ("float32", torch.channels_last, False, 60),
        ("float32", torch.channels_last, True, 30),
        ("bfloat16", torch.channels_last, True, 25),
        ("float16", torch.channels_last, True, 35),
    ):
        allow_tf32(tf32)
        model = sample.load_model(TINY, args.device, dtype).to(memory_format=layout)
        found = {"PSNR": similarity(model.translate(sar, steps, spacing="trailing")[0], expected)}
        what = dtype + ", channels-last" * (layout == torch.channels_last) + ", TF32" * (tf32 and dtype == "float32")
        yield row(f"{what}, against float32 on the CPU", found, {"PSNR": limit})

    size = 64 if args.small else 512
    extremes = [torch.full((3, size, size), x) for x in (-1.0, 1.0)]  # black and white
    drawn, noise = read_sar(draw_sar(args.scratch / "sar.png", size)), bench.random_images(1, size, "cpu")[0].round()
    sar = torch.stack([drawn, noise, *extremes])
    for path in [TINY] + [SD] * SD.exists():
        model, largest = CDiffSET.from_pretrained(path).to(args.device), []

        def look(_module: nn.Module, _inputs: tuple, output: object, largest: list[Tensor] = largest) -> None:
            largest.extend([output.abs().max()] if isinstance(output, Tensor) else [])

        hooks = [module.register_forward_hook(look) for module in model.modules()]
        expected = model.translate(sar, steps, spacing="trailing")[0]
        for hook in hooks:
            hook.remove()
        found = model.half().translate(sar, steps, spacing="trailing")[0]
        figures = {"largest activation": float(max(largest)), "PSNR": similarity(found, expected)}
        limit = {"largest activation": torch.finfo(torch.float16).max}
        yield row(f"float16 at {size} pixels, {path.name}", figures, {"PSNR": 25}, limit)
    if not SD.exists():
        note = f"not tried: {train.SD_FOLDER} is not there, and random weights lack the real range of values"
        yield row("float16, Stable Diffusion 2.1", {}, note=note)


# ----------------------------------------------------------------------------------------------------------
# Do the scripts work?


def check_training(args: argparse.Namespace) -> Iterator[dict]:
    """train.py on synthetic pairs: killed and resumed, and with each option that must not change the result."""
    size, steps = (64, 12) if args.small else (128, 60)
    synth.write_dataset(args.scratch / "sen12", pairs=20, size=size)
    command = f"--data {args.scratch}/sen12 --model models/tiny --size {size} --steps {steps} --batch-size 4 --lr 3e-4"
    command += f" --save-every {steps // 4} --validate-every {steps} --validate-images 2 --validate-steps 2 --ema 0.9"
    command += f" --device {args.device} --workers 2 --dtype float32 --out {args.scratch}/"

    def weights(path: Path) -> list[Tensor]:
        return [p.detach() for p in CDiffSET.from_pretrained(path).unet.parameters()]

    def fit(name: str, options: str = "") -> tuple[list[float], list[Tensor]]:
        """Trains: -> the loss of each step, the change of the weights."""
        train.main(f"{command}{name} {options}".split())
        losses = [step["loss"] for step in read_table(args.scratch / name / "log.csv")]
        return losses, [p - q for p, q in zip(weights(args.scratch / name / "model"), start)]

    def compare(losses: list[float], changes: list[Tensor]) -> dict[str, float]:
        """The figures of a run beside those of the first one."""
        worst = max(abs(a - b) for a, b in zip(losses, plain[0], strict=True))
        return {
            "loss, largest difference": worst,
            "change of the weights, relative error": relative_error(changes, plain[1]),
        }

    start = weights(TINY)
    plain = fit("plain")
    figures = {"first loss": plain[0][0], "last": plain[0][-1], "mean": sum(plain[0]) / steps}
    yield row("train.py, float32, --ema", figures, at_most={"mean": 10})
    # Not bit-equal on a GPU: some of its kernels add numbers in an order that varies from call to call.
    again = compare(*fit("again"))
    yield row("the same again", again, at_most={"loss, largest difference": 1e-2})

    log = args.scratch / "killed" / "log.csv"
    process = subprocess.Popen([sys.executable, "train.py", *f"{command}killed".split()], cwd=ROOT)
    while process.poll() is None and len(read_table(log)) < steps // 2 - 1:
        time.sleep(0.005)
    process.kill()
    process.wait()
    struck = {"after step": len(read_table(log))}
    yield row("killed", struck, {"after step": steps // 4}, {"after step": steps - 1})
    limits = {name: max(3 * value, 1e-3) for name, value in again.items()}
    yield row("killed and resumed", compare(*fit("killed", "--resume")), at_most=limits)
    for name, options, limit in (
        ("parts", "--accumulate 2", 1e-2),
        ("recomputed", "--checkpointing", 1e-2),
        ("latents", f"--cache {args.scratch}/cache", 1e-2),  # in float16
        ("bfloat16", "--dtype bfloat16", 5e-2),
    ):
        figures = compare(*fit(name, options))
        yield row(options.partition(" /")[0], figures, at_most={"loss, largest difference": limit})
    first = {"first loss, difference": abs(fit("lora", "--lora 16")[0][0] - plain[0][0])}  # the updates begin at zero
    yield row("--lora 16", first, at_most={"first loss, difference": 2e-3})


def check_scripts(args: argparse.Namespace) -> Iterator[dict]:
    """sample.py on a folder and on a scene in tiles; evaluate.py."""
    device = ["--device", args.device]

    def translate(source: Path, name: str, *options: str) -> tuple[int, list[Tensor]]:
        """-> exit code; the EO images (1, 3, H, W) in [-1, 1]."""
        out = args.scratch / name
        code = sample.main([str(source), "--out", str(out), *options, *device])
        images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(out.glob("*_eo.png"))]
        return code, [torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None] for image in images]

    code, images = translate(ROOT / "examples", "folder")
    figures = {"exit code": code, "images": len(images), "least spread": min(float(image.std()) for image in images)}
    yield row("sample.py: a folder", figures, {"images": 5, "least spread": 0.02}, {"exit code": 0})

    size, tile = (128, 64) if args.small else (1000, 512)
    scene = draw_sar(args.scratch / "scene.png", size)
    code, [tiled] = translate(scene, "tiles", "--tile", str(tile))
    _, [whole] = translate(scene, "whole", "--tile", str(2 * tile))
    # alike, not equal: at the edge of a tile, the networks see less of the surroundings
    figures = {"exit code": code, "PSNR": similarity(tiled, whole)}
    yield row("sample.py: a scene in tiles against one piece", figures, {"PSNR": 16}, {"exit code": 0})

    synth.write_dataset(args.scratch / "sen12", pairs=20, size=128)
    command = f"--data {args.scratch}/sen12 --model models/tiny --out {args.scratch}/scores --limit 2"
    yield row("evaluate.py", {"exit code": evaluate.main([*command.split(), *device])}, at_most={"exit code": 0})


# ----------------------------------------------------------------------------------------------------------
# Speed and memory


def measure(device: str, batch: int, make: Callable[..., Callable], *arguments) -> dict[str, float]:
    """Times the function make(*arguments), which works on a batch: seconds of the first call, median of some more,
    images (or pairs) a second, peak of the allocated memory. Only {"out of memory": 1} if that happens. Frees what was
    made.
    """
    gc.collect()
    on_gpu, times = device.startswith("cuda"), []
    try:
        if on_gpu:
            torch.cuda.empty_cache()
        function = make(*arguments)
        first = bench.seconds(function, device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        while len(times) < RUNS and sum(times) < BUDGET:
            times.append(bench.seconds(function, device))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return {"out of memory": 1}
    peak = {"peak, GB": torch.cuda.max_memory_allocated(device) / 1e9} if on_gpu else {}
    return {"first, s": first, "s": median(times), "a second": batch / median(times)} | peak


def relate(figures: dict[str, float], released: dict[str, float], work: float, ceiling: float) -> dict[str, float]:
    """Adds the speed relative to the released algorithm and to a matrix product. work: FLOP; ceiling: FLOP/s."""
    if "s" in figures:
        figures = figures | {"of the ceiling": work / figures["s"] / ceiling}
        if "s" in released:
            figures["times as fast"] = released["s"] / figures["s"]
    return figures


def count_flops(function: Callable[[], object]) -> int:
    """The FLOP of the convolutions, products and attentions of one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def write_profile(function: Callable[[], object], path: Path, device: str) -> None:
    """Writes a table of the operations in which the second call of the function spends most time."""
    function()
    on_gpu = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as result:
        function()
    order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    path.write_text(result.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80))


def released_with() -> str:
    """The networks with which bench computes the released algorithm: diffusers', or ours if that cannot be used."""
    try:
        from diffusers import AutoencoderKL, UNet2DConditionModel, __version__  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: a package that it needs is missing
        sys.modules["diffusers"] = None  # bench's import fails, too
        return "our networks"
    return f"diffusers {__version__}"


def translator(args: argparse.Namespace, batch: int, steps: int, spacing: str, compiled: bool = False) -> Callable:
    """Our sampling in bfloat16: returns a function that translates a batch."""
    model = random_model(args, "bfloat16")
    if compiled:
        sample.compile_unet(model)
    return bench.sampler(model, bench.random_images(batch, args.sampling_size, args.device), steps, spacing)


def released_translator(args: argparse.Namespace, batch: int, steps: int) -> Callable:
    """The released sampling: returns a function that translates a batch."""
    images = bench.random_images(batch, args.sampling_size, args.device)
    return bench.released_sampler(random_model(args), images, steps)


def trainer(args: argparse.Namespace, variant: str, size: int, batch: int) -> Callable:
    """Our training in bfloat16 from cached latents: returns a function that does one step."""
    model = random_model(args)
    model.unet.gradient_checkpointing = "--checkpointing" in variant
    if "--lora" in variant:
        add_lora(model.unet, 16, frozen_dtype=torch.bfloat16)
    if variant == "compiled":  # which train.py does not offer
        model.unet.compile()
    side = size // model.vae.factor
    return bench.train_step(model, list(torch.randn(2, batch, 4, side, side, device=args.device)), "bfloat16")


def released_trainer(args: argparse.Namespace, size: int, batch: int) -> Callable:
    """The released training, which encodes both images each time: returns a function that does one step."""
    images = bench.random_images(batch, size, args.device)
    return bench.released_train_step(random_model(args), images, images)


def time_sampling(args: argparse.Namespace) -> Iterator[dict]:
    """Sampling beside the released algorithm with as many steps, which are leading there."""
    ceiling = bench.matmul_ceiling(args.device, "bfloat16")
    yield row("matrix product in bfloat16", {"TFLOP/s": ceiling / 1e12}, note=f"released algorithm: {released_with()}")
    one, two = (count_flops(translator(args, 1, steps, "trailing")) for steps in (1, 2))
    yield row("an image", {"GFLOP of the VAE": (2 * one - two) / 1e9, "of each step": (two - one) / 1e9})
    write_profile(translator(args, 8, 2, "trailing"), args.out / "profile-sampling.txt", args.device)
    few, many = (2, 3) if args.small else (10, 50)
    for (steps, spacing), batch in product(((few, "trailing"), (many, "leading")), (1, 8)):
        what, work = f"{steps} steps, batch {batch}", batch * (one + (steps - 1) * (two - one))
        released = measure(args.device, batch, released_translator, args, batch, steps)
        yield row(f"released algorithm, {what}", released)
        ours = measure(args.device, batch, translator, args, batch, steps, spacing)
        goals = {"times as fast": 4} | ({"of the ceiling": 0.4} if batch == 8 else {})
        yield row(f"bfloat16, {what}", relate(ours, released, work, ceiling), {} if args.small else goals)


def time_training(args: argparse.Namespace) -> Iterator[dict]:
    """Training steps from cached latents in bfloat16, beside the released algorithm; memory."""
    ceiling = bench.matmul_ceiling(args.device, "bfloat16")
    yield row("matrix product in bfloat16", {"TFLOP/s": ceiling / 1e12}, note=f"released algorithm: {released_with()}")
    write_profile(trainer(args, VARIANTS[0], args.training_size, 8), args.out / "profile-training.txt", args.device)
    for size in (args.training_size, 2 * args.training_size):
        work = count_flops(trainer(args, VARIANTS[0], size, 1))
        yield row(f"a training step, {size} pixels", {"GFLOP a pair": work / 1e9})
        large = size > args.training_size  # only for the table of memory
        for batch in (1,) if args.small else (1, 4, 8) if large else (8, 64, 16, 32, 1, 4):
            released = {}
            if not large:
                released = measure(args.device, batch, released_trainer, args, size, batch)
                yield row(f"released algorithm, {size} pixels, batch {batch}", released)
            for name in VARIANTS:
                # the FLOP of --checkpointing's second forward pass do not count; --lora needs fewer than are counted
                figures = relate(
                    measure(args.device, batch, trainer, args, name, size, batch), released, batch * work, ceiling
                )
                goals, limits = {}, {}
                if not args.small and not large and name == VARIANTS[0] and batch >= 8:
                    goals = {"of the ceiling": 0.35} | ({"times as fast": 3} if "s" in released else {})
                    limits = {"peak, GB": 24} if batch == 8 else {}  # as docs/training.md counts
                yield row(f"{name}, {size} pixels, batch {batch}", figures, goals, limits)


def time_compile(args: argparse.Namespace) -> Iterator[dict]:
    """torch.compile: the same prediction; the speed, to be compared with the same lines of the parts before."""
    batch, steps = (1, 2) if args.small else (8, 10)
    model, side = random_model(args, "bfloat16"), args.sampling_size // 8
    z = torch.randn(batch, 8, side, side, device=args.device, dtype=torch.bfloat16)
    with torch.inference_mode(), model.unet.keeping(model.prompt_embedding):
        expected = model.unet(z, 500, model.prompt_embedding)
        sample.compile_unet(model)
        error = {"relative error": relative_error([model.unet(z, 500, model.prompt_embedding)], [expected])}
    yield row("U-Net in bfloat16, compiled against plain", error, at_most={"relative error": 0.03})
    del model
    figures = measure(args.device, batch, translator, args, batch, steps, "trailing", True)
    yield row(f"bfloat16, {steps} steps, batch {batch}, compiled", figures)
    batch = 2 if args.small else 32
    figures = measure(args.device, batch, trainer, args, "compiled", args.training_size, batch)
    yield row(f"all weights, {args.training_size} pixels, batch {batch}, compiled", figures)


def train_tiny(args: argparse.Namespace) -> Iterator[dict]:
    """Trains models/tiny on for the seconds that are left, and keeps the model in OUT/tiny."""
    began = time.monotonic()
    size, batch, pairs, first = (64, 4, 20, 5) if args.small else (128, 64, 5000, 40)
    synth.write_dataset(args.scratch / "sen12", pairs, size, seed=1, workers=os.cpu_count())  # unseen pairs
    command = f"--data {args.scratch}/sen12 --model models/tiny --size {size} --batch-size {batch} --lr 1e-4 --ema 0.99"
    command += f" --device {args.device} --dtype bfloat16 --validate-images {2 if args.small else 32}"

    def fit(name: str, steps: int) -> tuple[list[dict], list[dict]]:
        """Trains: -> the rows of log.csv and validation.csv."""
        out = args.scratch / name
        train.main(f"{command} --out {out} --steps {steps} --validate-every {-(-steps // 5)}".split())
        return read_table(out / "log.csv"), read_table(out / "validation.csv")

    log, validations = fit("speed", first)  # the learning rate of the warm-up hardly changes the model
    speed, before = median(step["images_per_second"] for step in log), validations[0]["psnr"]
    left = args.seconds - (time.monotonic() - began) - 25  # of starting, validating, saving
    steps = first if args.small else max(first, int(left * speed / batch))
    best = max(step["psnr"] for step in fit("run", steps)[1])
    shutil.copytree(args.scratch / "run" / "model", args.out / "tiny", dirs_exist_ok=True)
    yield row("models/tiny", {"steps": steps, "pairs/s": speed, "PSNR before": before, "PSNR, best": best})


# name: (function, time limit in seconds)
PARTS = {
    "parity": (check_parity, 80),
    "precision": (check_precision, 50),
    "training": (check_training, 90),
    "scripts": (check_scripts, 50),
    "sampling-speed": (time_sampling, 100),
    "training-speed": (time_training, 150),
    "compile": (time_compile, 150),
    "tiny": (train_tiny, 180),
}

# ----------------------------------------------------------------------------------------------------------
# Running the parts


def part_command(name: str, args: argparse.Namespace, limit: float) -> list[str]:
    """The command of the process that runs one part and writes its lines to OUT/NAME.jsonl."""
    command = [sys.executable, "-m", "experiments.gpu", "--part", name, "--out", str(args.out.resolve())]
    return [*command, "--device", args.device, "--seconds", f"{limit:.0f}"] + ["--small"] * args.small


def run_part(name: str, args: argparse.Namespace, limit: float) -> list[dict]:
    """Runs a part in a process of its own, for `limit` seconds at most: -> its lines, and one more if it failed."""
    log, lines = args.out / f"{name}.log", args.out / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    problem = ""
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch, log.open("w") as output:
        options = {"stdout": output, "stderr": output, "env": os.environ | {"TMPDIR": scratch}, "cwd": ROOT}
        process = subprocess.Popen(part_command(name, args, limit), start_new_session=True, **options)
        try:
            if code := process.wait(limit):
                printed = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
                errors = [line for line in printed if "rror: " in line]  # CUDA's have lines of advice after it
                problem = f"exit code {code}: {one_line((errors or printed)[-1])[:200]}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # the group: the processes that it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    written = lines.read_text().splitlines(keepends=True) if lines.exists() else []
    lines.unlink(missing_ok=True)
    rows = [json.loads(line) for line in written if line.endswith("\n")]  # the last one may be cut
    return rows + ([row("the rest of this part", {}, note=problem) | {"ok": False}] if problem else [])


def table(parts: dict[str, list[dict]]) -> str:
    """The lines of all parts as a Markdown table."""
    lines = {}
    for name, rows in parts.items():
        for line in rows:
            measured = [
                f"{what} {x:.4g}" if isinstance(x, float) else f"{what} {x}" for what, x in line["figures"].items()
            ]
            wanted = [f"{what} ≥ {x:g}" for what, x in line["at least"].items()]
            wanted += [f"{what} ≤ {x:g}" for what, x in line["at most"].items()]
            columns = {
                "measured": "; ".join(measured + [line["note"]] * bool(line["note"])),
                "wanted": "; ".join(wanted),
            }
            verdict = {True: "ok", False: "FAILED", None: ""}[line["ok"]]
            lines[f"{name}: {line['what']}"] = columns | {"verdict": verdict}
    return evaluate.markdown("part", lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and writes gpu.json; returns the exit code: 0 if all is well, 1 if a line failed."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    add("--minutes", type=float, help="time for all parts together (default: 7; --small: 30)")
    add("--small", action="store_true", help="small networks and images, to test this script")
    add("--device", help=DEVICE_HELP)
    add("--part", choices=PARTS, help=argparse.SUPPRESS)  # of the process that runs one part
    add("--seconds", type=positive, help=argparse.SUPPRESS)
    # fmt: on
    args = parser.parse_args(arguments)
    args.device = choose_device(args.device)
    if args.device == "cpu" and not args.small:
        parser.error("on a CPU, networks of Stable Diffusion's size take too long: add --small")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        args.scratch = Path(mkdtemp())
        args.sampling_size, args.training_size = (64, 64) if args.small else (512, 256)
        with (args.out / f"{args.part}.jsonl").open("w") as file:
            for line in PARTS[args.part][0](args):
                print(json.dumps(line), file=file, flush=True)
        return 0

    result = origin("gpu", arguments, args) | {"seconds": {}, "parts": {}}
    began, minutes = time.monotonic(), args.minutes or (30 if args.small else 7)
    for name in args.parts or PARTS:
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        left = began + 60 * minutes - started
        if left > 10:
            result["parts"][name] = run_part(name, args, min(left, PARTS[name][1] * (4 if args.small else 1)))
        else:
            result["parts"][name] = [row("not run", {}, note="no time left")]
        result["seconds"][name] = round(time.monotonic() - started, 1)
        write_json(args.out / "gpu.json", result)
    text = table(result["parts"])
    (args.out / "gpu.md").write_text(text, encoding="utf-8")
    failed = sum(line["ok"] is False for rows in result["parts"].values() for line in rows)
    print(f"\n{text}\n{failed} failed, {time.monotonic() - began:.0f} s; wrote {args.out / 'gpu.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
