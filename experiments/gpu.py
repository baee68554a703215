"""Checks and times the whole project on a GPU: one command, one table, less than 7 minutes on an H100.

    python -m experiments.gpu --out results/gpu                             everything
    python -m experiments.gpu --out results/gpu --parts parity memory       some parts
    python -m experiments.gpu --out tryout/gpu --device cpu --small         every line once, with small networks

The last command tests this script where there is no GPU: its comparisons of the device with the CPU compare the CPU
with itself, and its times and memory mean nothing.

Each part is a process of its own with a time limit. A crash, a CUDA error or the end of its time costs only the lines
of that part that are not there yet. --out receives gpu.json; PART.log, what a part printed; profile-*.txt, the slowest
operations; and the model that the last part trained.

The speed is that of networks of Stable Diffusion 2.1's size with random weights, beside the released algorithm as
`experiments.bench` has it: in float32 with PyTorch's default of TF32 for convolutions, in diffusers where that imports,
else with our networks. Checks of images use models/tiny, since images of random weights show little. A relative error is
||a - b|| / ||b||, over all numbers together.
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
from tempfile import TemporaryDirectory

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
from experiments import synth
from experiments.bench import (
    diffusers_classes,
    matmul_ceiling,
    random_images,
    random_sd21,
    released_sampler,
    released_train_step,
    sampler,
    seconds,
    train_step,
)
from experiments.pretrain import CONTEXT, TOKENS, small_unet, small_vae
from experiments.report import origin
from images import read_picture, read_sar
from layers import add_lora
from metrics import psnr
from sample import TINY, compile_unet, load_model
from scheduler import DDIMScheduler, DDPMScheduler
from train import SD_FOLDER, objective

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {"all weights": (False, 0), "--checkpointing": (True, 0), "--lora 16": (False, 16)}  # of training
VARIANTS |= {"--lora 16 --checkpointing": (True, 16)}

# ----------------------------------------------------------------------------------------------------------
# What the parts share


def row(
    what: str,
    figures: dict[str, float],
    at_least: dict[str, float] | None = None,
    at_most: dict[str, float] | None = None,
    note: str = "",
) -> dict:
    """A line of the table. at_least, at_most: limits of some figures; "ok" is None if there are none."""
    at_least, at_most = at_least or {}, at_most or {}
    low = [figures.get(name, math.nan) >= limit for name, limit in at_least.items()]  # False for NaN, too
    high = [figures.get(name, math.nan) <= limit for name, limit in at_most.items()]
    finite = {name: float(x) if math.isfinite(x) else str(x) for name, x in figures.items()}  # JSON has no infinity
    limits = {"at least": at_least, "at most": at_most}
    return {"what": what, "figures": finite, **limits, "ok": all(low + high) if low + high else None, "note": note}


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||b||, over all tensors of the lists together."""
    difference = sum(float((x.cpu() - y.cpu()).double().square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(difference / sum(float(y.cpu().double().square().sum()) for y in b))


def similarity(image: Tensor, truth: Tensor) -> float:
    """The lowest PSNR of a batch of images in [-1, 1], in dB; 200 for equal ones."""
    return float(psnr(image.cpu() / 2 + 0.5, truth.cpu() / 2 + 0.5).clamp(max=200).min())


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on a GPU may use TF32, which rounds their inputs to 11 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def random_model(args: argparse.Namespace, dtype: str = "float32") -> CDiffSET:
    """A C-DiffSET with random weights on the device: of Stable Diffusion 2.1's size, or with --small a small one."""
    if not args.small:
        return random_sd21(args.device, dtype)
    torch.manual_seed(0)
    unet = small_unet([8, 16])
    widen_input(unet)
    add_variance_channel(unet)
    model = CDiffSET(small_vae([8, 8, 8]), unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler())
    return model.to(args.device, sample.DTYPES[dtype])


def examples() -> Tensor:
    """The SAR images in examples/, (5, 3, 128, 128)."""
    return torch.stack([read_sar(path) for path in sorted((ROOT / "examples").glob("*.png"))])


def draw_sar(path: Path, size: int) -> None:
    """Writes a synthetic SAR image (size, size)."""
    Image.fromarray(synth.draw(size=size).sar).save(path)


def free_memory(device: str) -> None:
    """Returns unused memory to the device."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def measure(make: Callable[[], Callable], device: str, runs: int = 5, budget: float = 6.0) -> dict[str, float]:
    """The median time of up to `runs` calls of make(), as many as `budget` seconds allow, after one call to warm up;
    and the peak of the allocated memory in these calls. Empty if memory runs out. Frees what make() made.
    """
    free_memory(device)
    on_gpu, times = device.startswith("cuda"), []
    try:
        function = make()
        function()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        while len(times) < runs and sum(times) < budget:
            times.append(seconds(function, device))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return {}
    return {"s": median(times)} | ({"peak, GB": torch.cuda.max_memory_allocated(device) / 1e9} if on_gpu else {})


def count_flops(function: Callable[[], object]) -> int:
    """The FLOP of the convolutions, products and attentions of one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def write_profile(function: Callable[[], object], path: Path, device: str) -> None:
    """Writes a table of the operations in which one call of the function spends most time."""
    on_gpu = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as result:
        function()
    order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    path.write_text(result.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80))


# ----------------------------------------------------------------------------------------------------------
# Parts: do the results agree?


def compute(model: CDiffSET, images: Tensor, latents: Tensor) -> dict[str, list[Tensor]]:
    """All computations of the method on the device of `model`. images (2, 3, H, W), latents (2, 4, h, w)."""
    z = latents.to(model.device)
    ddim = DDIMScheduler(10, "trailing")
    with torch.no_grad():
        t = torch.tensor([1, 700], device=z.device)
        results = {
            "VAE encoder": [model.encode(images)],
            "VAE decoder": [model.decode(z)],
            "U-Net": [model.unet(torch.cat([z, z.flip(0)], dim=1), t, model.prompt_embedding)],
            "scheduler": [model.scheduler.add_noise(z, z.flip(0), t.cpu()), ddim.step(z.flip(0), 499, z)],
            "translate, 2 steps": list(model.translate(images, 2, spacing="trailing")),
        }
    loss = objective(model, "cdiff", seed=0, cached=True)(model.unet, [z, z.flip(0)], [0, 1])
    loss.backward()
    return results | {"loss": [loss.detach()], "gradients": [p.grad for p in model.unet.parameters()]}


def check_parity(args: argparse.Namespace) -> Iterator[dict]:
    """Float32 on the device against float32 on the CPU, without TF32."""
    allow_tf32(False)
    model = random_model(args)
    nn.init.normal_(model.unet.conv_out.weight[4:], std=0.01)  # of the variance, which is zero in a new model
    reference = deepcopy(model).to("cpu", memory_format=torch.contiguous_format)
    images = random_images(2, 64 if args.small else 256, "cpu")
    latents = reference.encode(images).detach()
    expected, found = (compute(m, images, latents) for m in (reference, model))
    # rounding errors of 6e-8 grow in a hundred layers; the scheduler has one
    limits = dict.fromkeys(found, 1e-4) | {"scheduler": 1e-6, "gradients": 1e-3, "translate, 2 steps": 1e-3}
    for name, limit in limits.items():
        error = relative_error(found[name], expected[name])
        yield row(f"{name}: device against CPU", {"relative error": error}, at_most={"relative error": limit})

    model.unet.zero_grad()
    model.unet.gradient_checkpointing = True
    error = relative_error(compute(model, images, latents)["gradients"], found["gradients"])
    yield row("gradients: --checkpointing against plain", {"relative error": error}, at_most={"relative error": 1e-4})

    model = load_model(TINY, "cpu")
    sar = examples()
    expected = model.translate(sar, 10, spacing="trailing")[0]
    found = model.to(args.device).translate(sar, 10, spacing="trailing")[0]
    yield row("models/tiny: device against CPU", {"PSNR": similarity(found, expected)}, at_least={"PSNR": 60})


def check_precision(args: argparse.Namespace) -> Iterator[dict]:
    """Translations by models/tiny in lower precisions and in channels-last, against float32 on the same device."""
    sar = examples()

    def translate(dtype: str, layout: torch.memory_format, tf32: bool) -> Tensor:
        allow_tf32(tf32)
        model = load_model(TINY, args.device, dtype).to(memory_format=layout)
        return model.translate(sar, 10, spacing="trailing")[0]

    plain, channels_last = torch.contiguous_format, torch.channels_last
    expected = translate("float32", plain, False)
    for name, options, limit in (
        ("float32, channels-last", ("float32", channels_last, False), 60),
        ("float32 with TF32", ("float32", channels_last, True), 30),
        ("bfloat16", ("bfloat16", channels_last, True), 25),
        ("float16", ("float16", channels_last, True), 35),
    ):
        yield row(f"{name} against float32", {"PSNR": similarity(translate(*options), expected)}, {"PSNR": limit})


# ----------------------------------------------------------------------------------------------------------
# Parts: do the scripts work?


def check_training(args: argparse.Namespace) -> Iterator[dict]:
    """train.py on synthetic pairs: killed and resumed, and with each option that must not change the result."""
    size, steps = (64, 12) if args.small else (128, 60)
    synth.write_dataset(args.scratch / "sen12", pairs=20, size=size)
    command = f"--model {TINY} --size {size} --steps {steps} --batch-size 4 --save-every {steps // 4} --ema 0.99"
    command += f" --validate-every {steps} --validate-images 2 --validate-steps 2 --workers 2 --device {args.device}"
    command = ["--data", str(args.scratch / "sen12"), *command.split()]

    def train_once(name: str, *options: str) -> list[float]:
        """Trains, and returns the loss of each step."""
        out = args.scratch / name
        train.main([*command, "--dtype", "float32", "--out", str(out), *options])
        return [step["loss"] for step in read_table(out / "log.csv")]

    def weights(name: str) -> list[Tensor]:
        return list(CDiffSET.from_pretrained(args.scratch / name / "model").unet.parameters())

    plain = train_once("plain")
    finite = {"steps with a finite loss": sum(map(math.isfinite, plain))}
    yield row("train.py in float32 with --ema", finite | {"first loss": plain[0], "last loss": plain[-1]}, finite)

    killed = args.scratch / "killed"
    process = subprocess.Popen(
        [sys.executable, "train.py", *command, "--dtype", "float32", "--out", str(killed)], cwd=ROOT
    )
    while process.poll() is None and len(read_table(killed / "log.csv")) < steps // 2 - 1:
        time.sleep(0.005)
    process.kill()
    process.wait()
    died = len(read_table(killed / "log.csv"))
    resumed = train_once("killed", "--resume")
    again = train_once("again")

    # Not bit-equal on a GPU: some of its kernels add numbers in an order that varies from call to call.
    def compare(what: str, losses: list[float], limit: float, **more: float) -> dict:
        worst = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
        return row(
            what, {"largest difference of a loss": worst} | more, at_most={"largest difference of a loss": limit}
        )

    error = relative_error(weights("again"), weights("plain"))
    yield compare("the same run again", again, 2e-3, **{"relative error of the weights": error})
    error = relative_error(weights("killed"), weights("plain"))
    yield compare("killed and resumed", resumed, 2e-3, **{"relative error of the weights": error})
    yield row("steps before the kill", {"steps": died}, {"steps": steps // 4}, {"steps": steps - 1})
    yield compare("--accumulate 2", train_once("accumulate", "--accumulate", "2"), 2e-3)
    yield compare("--checkpointing", train_once("checkpointing", "--checkpointing"), 2e-3)
    # the cache rounds latents to float16
    yield compare("--cache", train_once("cache", "--cache", str(args.scratch / "cache")), 2e-2)
    yield compare("--dtype bfloat16", train_once("bfloat16", "--dtype", "bfloat16"), 0.1)
    first = abs(train_once("lora", "--lora", "16")[0] - plain[0])  # its updates begin at zero
    yield row("--lora 16", {"difference of the first loss": first}, at_most={"difference of the first loss": 2e-3})


def check_sampling(args: argparse.Namespace) -> Iterator[dict]:
    """sample.py on a folder and on a scene in tiles; evaluate.py; the range of numbers in float16."""
    made, device = args.scratch / "made", ["--device", args.device]

    def read(path: Path) -> Tensor:
        return torch.from_numpy(read_picture(path).bands / 127.5 - 1).float()[None]

    code = sample.main([str(ROOT / "examples"), "--out", str(made), *device])
    images = sorted(made.glob("*_eo.png"))
    figures = {"exit code": code, "images": len(images), "least spread": min(float(read(i).std()) for i in images)}
    yield row("sample.py: a folder", figures, {"images": 5, "least spread": 0.02}, {"exit code": 0})

    size, tile = (128, 64) if args.small else (1000, 512)
    scene = args.scratch / "scene.png"
    draw_sar(scene, size)
    for name, side in (("tiles", tile), ("whole", 1024)):
        code |= sample.main([str(scene), "--out", str(args.scratch / name), "--tile", str(side), *device])
    tiles, whole = (read(args.scratch / name / "scene_eo.png") for name in ("tiles", "whole"))
    # A tile's edge sees less of its surroundings than the same place in one piece: alike, not equal.
    figures = {"exit code": code, "PSNR": similarity(tiles, whole)}
    yield row("sample.py: a scene in tiles against one piece", figures, {"PSNR": 20}, {"exit code": 0})

    data = args.scratch / "sen12"
    synth.write_dataset(data, pairs=20, size=128)
    out = ["--out", str(args.scratch / "scores"), "--limit", "2"]
    code = evaluate.main(["--data", str(data), "--model", str(TINY), *out, *device])
    yield row("evaluate.py", {"exit code": code}, at_most={"exit code": 0})

    size, steps = (128, 2) if args.small else (512, 10)
    draw_sar(args.scratch / "sar.png", size)
    extremes = [torch.full((3, size, size), x) for x in (-1.0, 1.0)]  # black and white
    noise = random_images(1, size, "cpu")[0]
    sar = torch.stack([read_sar(args.scratch / "sar.png"), *extremes, noise.round()])
    for path in [TINY] + [ROOT / SD_FOLDER] * (ROOT / SD_FOLDER).exists():
        model = CDiffSET.from_pretrained(path).to(args.device)
        largest = 0.0

        def look(_module: nn.Module, _inputs: tuple, output: object) -> None:
            nonlocal largest
            if isinstance(output, Tensor):
                largest = max(largest, float(output.abs().max()))

        hooks = [module.register_forward_hook(look) for module in model.modules()]
        expected = model.translate(sar, steps, spacing="trailing")[0]
        for hook in hooks:
            hook.remove()
        found = model.half().translate(sar, steps, spacing="trailing")[0]
        figures = {"largest activation": largest, "PSNR": similarity(found, expected)}
        limit = {"largest activation": torch.finfo(torch.float16).max}
        yield row(f"float16 at {size} pixels: {path.name}", figures, {"PSNR": 25}, limit)
    if not (ROOT / SD_FOLDER).exists():
        note = f"not tried: {SD_FOLDER} is not there, and random weights do not have the real range of values"
        yield row("float16: Stable Diffusion 2.1", {}, note=note)


# ----------------------------------------------------------------------------------------------------------
# Parts: speed and memory


def time_sampling(args: argparse.Namespace) -> Iterator[dict]:
    """Sampling: ours in bfloat16 beside the released algorithm with as many steps."""
    device, size = args.device, 64 if args.small else 512
    ceiling = matmul_ceiling(device, "bfloat16")
    yield row("matrix product in bfloat16", {"TFLOP/s": ceiling / 1e12})
    model = random_model(args, "bfloat16")
    one, two = (count_flops(sampler(model, random_images(1, size, device), steps)) for steps in (1, 2))
    yield row("one U-Net call; VAE encoder and decoder", {"GFLOP": (two - one) / 1e9, "VAE": (2 * one - two) / 1e9})
    write_profile(sampler(model, random_images(8, size, device), 2), args.out / "profile-sampling.txt", device)
    del model

    for (steps, spacing), batch in product(((10, "trailing"), (50, "leading")), (1, 8)):
        steps, sar = 2 if args.small else steps, random_images(batch, size, device)
        released = measure(lambda: released_sampler(random_model(args), sar, steps), device)  # noqa: B023 (used now)
        ours = measure(lambda: sampler(random_model(args, "bfloat16"), sar, steps, spacing), device)  # noqa: B023
        name = f"{size}x{size}, {steps} steps, batch {batch}"
        yield row(f"released, {name}", released, note="" if released else "out of memory")
        goals = {}
        if ours:
            ours["of the ceiling"] = batch * (one + (steps - 1) * (two - one)) / ours["s"] / ceiling
            goals = {"of the ceiling": 0.4} if batch == 8 else {}
        if ours and released:
            ours["times as fast"] = released["s"] / ours["s"]
            goals["times as fast"] = 4
        yield row(
            f"bfloat16, {name}, {spacing}", ours, {} if args.small else goals, note="" if ours else "out of memory"
        )


def trainer(args: argparse.Namespace, variant: str, size: int, batch: int) -> Callable[[], None]:
    """Training in bfloat16 from cached latents: returns a function that does one step."""
    model = random_model(args)
    model.unet.gradient_checkpointing, rank = VARIANTS[variant]
    if rank:
        add_lora(model.unet, rank, frozen_dtype=torch.bfloat16)
    latents = torch.randn(2, batch, 4, size // model.vae.factor, size // model.vae.factor, device=args.device)
    return train_step(model, list(latents), "bfloat16")


def time_training(args: argparse.Namespace) -> Iterator[dict]:
    """Training steps from cached latents in bfloat16, beside the released algorithm, which encodes the images."""
    device, size = args.device, 64 if args.small else 256
    ceiling = matmul_ceiling(device, "bfloat16")
    step = trainer(args, "all weights", size, 8)
    flops = count_flops(step) / 8
    yield row("a training step", {"GFLOP a pair": flops / 1e9})
    write_profile(step, args.out / "profile-training.txt", device)
    del step
    for batch in (2, 4) if args.small else (8, 16, 32, 64):
        images = random_images(batch, size, device)
        released = measure(lambda: released_train_step(random_model(args), images, images), device, budget=2)  # noqa: B023
        rows = {"released": released}
        rows |= {name: measure(lambda: trainer(args, name, size, batch), device, budget=2) for name in VARIANTS}  # noqa: B023
        for name, figures in rows.items():
            goals = {}
            if figures:
                figures["pairs/s"] = batch / figures.pop("s")
            if figures and name != "released":
                # with --checkpointing, the FLOP of recomputing do not count; with --lora it is less work
                figures["of the ceiling"] = flops * figures["pairs/s"] / ceiling
                if released:
                    figures["times as fast"] = figures["pairs/s"] / released["pairs/s"]
                if name == "all weights" and not args.small:
                    goals = {"of the ceiling": 0.35} | ({"times as fast": 3} if released else {})
            yield row(f"{name}, batch {batch}", figures, goals, note="" if figures else "out of memory")


def measure_memory(args: argparse.Namespace) -> Iterator[dict]:
    """The peak of the allocated memory in training from cached latents in bfloat16."""
    for name, size, batch in product(VARIANTS, (64, 128) if args.small else (256, 512), (1, 4, 8)):
        figures = measure(lambda: trainer(args, name, size, batch), args.device, runs=1)  # noqa: B023 (used now)
        figures.pop("s", None)
        counted = name == "all weights" and size == 256 and batch == 8  # by docs/training.md
        limit = {"peak, GB": 24} if counted and not args.small else {}
        note = "" if figures or args.device == "cpu" else "out of memory"
        yield row(f"{name}, {size}x{size}, batch {batch}", figures, at_most=limit, note=note)


def time_compile(args: argparse.Namespace) -> Iterator[dict]:
    """--compile: the same images, and what it brings; also in training, where there is no such option yet."""
    sar, device = random_images(1, 64, "cpu") if args.small else examples()[:1], args.device
    model = random_model(args) if args.small else load_model(TINY, device)
    allow_tf32(False)
    expected = model.translate(sar, 2)[0]
    compile_unet(model)
    yield row(
        "float32, compiled against plain", {"PSNR": similarity(model.translate(sar, 2)[0], expected)}, {"PSNR": 60}
    )
    allow_tf32(True)

    size, batch = (64, 2) if args.small else (512, 8)

    def sample_compiled() -> Callable[[], Tensor]:
        model = random_model(args, "bfloat16")
        compile_unet(model)
        return sampler(model, random_images(batch, size, device), steps, "trailing")

    def train_compiled() -> Callable[[], None]:
        model = random_model(args)
        model.unet.compile()
        latents = torch.randn(2, batch, 4, size // 8, size // 8, device=device)
        return train_step(model, list(latents), "bfloat16")

    steps = 2 if args.small else 10
    plain = measure(lambda: sampler(random_model(args, "bfloat16"), random_images(batch, size, device), steps), device)
    began = time.perf_counter()
    compiled = measure(sample_compiled, device)
    figures = compiled | {"times as fast": plain["s"] / compiled["s"], "with compiling, s": time.perf_counter() - began}
    yield row(f"sampling {size}x{size}, {steps} steps, batch {batch}, compiled", figures)
    batch, size = (2, 64) if args.small else (32, 256)
    plain = measure(lambda: trainer(args, "all weights", size, batch), device)
    began = time.perf_counter()
    compiled = measure(train_compiled, device)
    figures = compiled | {"times as fast": plain["s"] / compiled["s"], "with compiling, s": time.perf_counter() - began}
    yield row(f"training {size}x{size}, batch {batch}, compiled", figures)


def train_tiny(args: argparse.Namespace) -> Iterator[dict]:
    """Trains models/tiny on for the seconds that are left, and keeps the model in OUT/tiny."""
    began, data = time.monotonic(), args.scratch / "sen12"
    size, batch, pairs = (64, 4, 20) if args.small else (128, 64, 5000)
    synth.write_dataset(data, pairs, size, seed=1, workers=os.cpu_count())  # another country than the bundled model's
    command = f"--data {data} --model {TINY} --size {size} --batch-size {batch} --lr 1e-4 --ema 0.99"
    command += f" --device {args.device} --dtype bfloat16 --validate-images {4 if args.small else 32}"
    first = 5 if args.small else 40
    train.main([*command.split(), "--out", str(args.scratch / "speed"), "--steps", str(first)])
    rates = [step["images_per_second"] for step in read_table(args.scratch / "speed" / "log.csv")]
    before = read_table(args.scratch / "speed" / "validation.csv")[-1]["psnr"]  # the warm-up changed little
    left = args.seconds - (time.monotonic() - began) - 25  # of starting, validating, saving
    steps = first if args.small else max(first, int(left * median(rates) / batch))
    out = args.scratch / "run"
    train.main([*command.split(), "--out", str(out), "--steps", str(steps), "--validate-every", str(-(-steps // 5))])
    best = max(step["psnr"] for step in read_table(out / "validation.csv"))
    shutil.copytree(out / "model", args.out / "tiny", dirs_exist_ok=True)
    figures = {"steps": steps, "pairs/s": median(rates), "PSNR before": before, "PSNR": best}
    yield row(f"models/tiny, {steps * batch} pairs more", figures)


# name: (function, time limit in seconds)
PARTS = {
    "parity": (check_parity, 60),
    "precision": (check_precision, 40),
    "training": (check_training, 90),
    "sampling": (check_sampling, 60),
    "training-speed": (time_training, 90),
    "sampling-speed": (time_sampling, 100),
    "memory": (measure_memory, 60),
    "compile": (time_compile, 120),
    "tiny": (train_tiny, 180),
}

# ----------------------------------------------------------------------------------------------------------
# Running the parts


def part_command(name: str, args: argparse.Namespace, scratch: str, limit: float) -> list[str]:
    """The command of the process that runs one part and writes its lines to OUT/NAME.jsonl."""
    command = [sys.executable, "-m", "experiments.gpu", "--part", name, "--out", str(args.out.resolve())]
    command += ["--device", args.device, "--scratch", scratch, "--seconds", f"{limit:.0f}"]
    return command + ["--small"] * args.small


def run_part(name: str, args: argparse.Namespace, limit: float) -> list[dict]:
    """Runs a part in a process of its own, for `limit` seconds at most: -> its lines, and one more if it failed."""
    log, lines = args.out / f"{name}.log", args.out / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    problem = ""
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch, log.open("w") as output:
        command = part_command(name, args, scratch, limit)
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            if code := process.wait(limit):
                printed = log.read_text(errors="replace").strip().splitlines() or ["nothing printed"]
                problem = f"exit code {code}: {one_line(printed[-1])}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # its group: the processes that it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    written = lines.read_text().splitlines(keepends=True) if lines.exists() else []
    rows = [json.loads(line) for line in written if line.endswith("\n")]  # the last one may be cut
    lines.unlink(missing_ok=True)
    return rows + ([row("the rest of this part", {}, note=problem) | {"ok": False}] if problem else [])


def table(parts: dict[str, list[dict]]) -> str:
    """A Markdown table of the lines of all parts."""
    lines = ["| part | what | measured | wanted | |", "|---|---|---|---|---|"]
    for name, rows in parts.items():
        for line in rows:
            figures = [
                f"{what} {x:.4g}" if isinstance(x, float) else f"{what} {x}" for what, x in line["figures"].items()
            ]
            wanted = [f"{what} ≥ {x:g}" for what, x in line["at least"].items()]
            wanted += [f"{what} ≤ {x:g}" for what, x in line["at most"].items()]
            verdict = {True: "ok", False: "FAILED", None: ""}[line["ok"]]
            measured = "; ".join(figures + [line["note"]] * bool(line["note"]))
            lines.append(f"| {name} | {line['what']} | {measured} | {'; '.join(wanted)} | {verdict} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and writes gpu.json; returns the exit code: 0 if all is well, 1 if a line failed."""
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    add("--minutes", type=float, default=7, help="time for all parts together (default: %(default)g)")
    add("--small", action="store_true", help="small networks and images, to test this script")
    add("--device", help=DEVICE_HELP)
    add("--part", choices=PARTS, help=argparse.SUPPRESS)  # of the process that runs one part, with the next two
    add("--scratch", type=Path, help=argparse.SUPPRESS)
    add("--seconds", type=positive, help=argparse.SUPPRESS)
    # fmt: on
    args = parser.parse_args(arguments)
    args.device = choose_device(args.device)
    if args.device == "cpu" and not args.small:
        parser.error("networks of Stable Diffusion's size would take hours on a CPU: add --small, or use a GPU")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        with (args.out / f"{args.part}.jsonl").open("w") as file:
            for line in PARTS[args.part][0](args):
                print(json.dumps(line), file=file, flush=True)
        return 0

    result = origin("gpu", arguments, args) | {"seconds": {}, "parts": {}}
    result["released algorithm with"] = "our networks" if diffusers_classes() is None else "diffusers"
    began = time.monotonic()
    for name in args.parts or PARTS:
        started = time.monotonic()
        left = 60 * args.minutes - (started - began)
        print(f"{name} ...", flush=True)
        if left < 10:
            rows = [row("all of this part", {}, note="not run: no time left") | {"ok": False}]
        else:
            rows = run_part(name, args, min(left, PARTS[name][1]))
        result["parts"][name], result["seconds"][name] = rows, round(time.monotonic() - started, 1)
        write_json(args.out / "gpu.json", result)
    text = table(result["parts"])
    (args.out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{time.monotonic() - began:.0f} s; wrote {args.out / 'gpu.json'}")
    return 0 if all(line["ok"] is not False for rows in result["parts"].values() for line in rows) else 1


if __name__ == "__main__":
    run(main)
