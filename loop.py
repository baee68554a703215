"""The training loop: any network, any loss; never loses work.

    for each step:  batch -> loss -> gradients -> clipped AdamW step -> EMA -> log.csv
    now and then:   validate -> keep the best;  checkpoint -> everything that resuming needs

What a step computes depends on the step's number alone: the order of the data, the augmentation and the noise
are drawn from (seed, sample position), where sample j of step k has position k * batch_size + j. So no random
state needs saving; a run that was killed and resumed equals one that was not, and N processes see the data of one.
"""

import csv
import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import batches, seed_of
from files import atomic
from weights import save_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Settings:
    """How to train. Those in RESUMABLE may change when a run is resumed; the rest make it the run it is."""

    out: Path
    steps: int
    batch_size: int  # over all processes and accumulation steps
    lr: float = 3e-5
    weight_decay: float = 0.01
    warmup: int = 100
    clip: float = 1.0  # largest norm of the gradient
    accumulate: int = 1  # micro-batches a step
    ema: float = 0.0  # decay of the moving average of the weights; 0: none
    dtype: str = "float32"  # of the arithmetic (autocast); weights and optimizer stay float32
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    save_every: int = 1000
    validate_every: int = 1000
    keep: int = 2  # checkpoints
    resume: bool = False


RESUMABLE = {"out", "device", "workers", "save_every", "validate_every", "keep", "resume"}


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to 0 at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def sample_noise(
    shape: tuple[int, ...], seed: int, positions: list[int], timesteps: int = 1000
) -> tuple[Tensor, Tensor]:
    """Standard normal noise (B, *shape) and uniform timesteps (B,), each sample's from (seed, its position)."""
    noise, t = [], []
    for position in positions:
        generator = torch.Generator().manual_seed(seed_of(seed, "noise", position))
        noise.append(torch.randn(shape, generator=generator))
        t.append(torch.randint(timesteps, (), generator=generator))
    return torch.stack(noise), torch.stack(t)


# ----------------------------------------------------------------------------------------------------------
# Processes, signals, locks


def start_processes(device: str) -> tuple[str, int, int]:
    """Joins the processes that torchrun started, if it did: -> this one's device, its rank, how many there are."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device, 0, 1
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # the others wait while the first one validates or fills the cache, which may take hours
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    return device, dist.get_rank(), world


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the folder for this process. Raises ValueError if another one has it. The lock dies with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is writing there; wait for it or choose another --out") from None
        yield


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The list that is given fills with the first SIGINT or SIGTERM; a second one acts as usual, at once."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number, _frame) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def _start_worker(_worker: int) -> None:
    # signals reach the workers too (Ctrl-C in a terminal, a cluster that ends a job): they must live until the
    # step is finished; they end when the loop does, or when it dies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file each, so that writing one is atomic


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((out / "checkpoint").glob("[0-9]*.safetensors"))


def save_checkpoint(
    network: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    step: int,
    best: float,
) -> None:
    """Writes checkpoint/STEP.safetensors: weights, EMA, optimizer, and a JSON header. Drops the oldest."""
    names = [name for name, _ in network.named_parameters()]
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{names[i]}.{field}": value for field, value in state.items()}
    header = {"step": step, "best": best, "settings": comparable(settings)}
    path = settings.out / "checkpoint" / f"{step:08d}.safetensors"
    try:
        save_tensors(path, tensors, {"training": json.dumps(header)})
    except (OSError, SafetensorError) as error:
        kept = checkpoints(settings.out)
        raise ValueError(
            f"cannot write {path} ({error}); the last checkpoint is {kept[-1] if kept else 'none'}"
        ) from error
    for old in checkpoints(settings.out)[: -settings.keep]:
        old.unlink()


def comparable(settings: Settings) -> dict:
    """The settings that must not change within a run."""
    return {key: value for key, value in asdict(settings).items() if key not in RESUMABLE}


def load_checkpoint(
    path: Path, network: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, settings: Settings
) -> tuple[int, float]:
    """Restores what `save_checkpoint` wrote: -> steps done, best score. Raises ValueError if it is not of this run."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["training"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a readable checkpoint ({error}); delete it to resume from the one before"
        ) from error
    changed = {k: v for k, v in comparable(settings).items() if header["settings"].get(k) != v}
    if changed:
        was = ", ".join(f"{k} {header['settings'].get(k)} is now {v}" for k, v in changed.items())
        raise ValueError(f"{path}: made with other settings ({was}); resume with the same, or choose another --out")
    network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
    for name, average in ema.items():
        average.copy_(tensors[f"ema.{name}"])
    state = {}
    for i, (name, parameter) in enumerate(network.named_parameters()):
        prefix = f"optimizer.{name}."
        state[i] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for field in ("exp_avg", "exp_avg_sq"):  # in the parameter's own memory format, which the fused kernel needs
            state[i][field] = torch.empty_like(parameter).copy_(state[i][field])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return header["step"], header["best"]


# ----------------------------------------------------------------------------------------------------------
# Logs


class Log:
    """A CSV file that grows a row at a time and, when a run is resumed, forgets the rows after its step."""

    def __init__(self, path: Path, done: int):
        self.path = path
        if path.exists():
            with path.open(newline="") as file:
                header, *rows = list(csv.reader(file)) or [[]]
            with atomic(path) as temporary, temporary.open("w", newline="") as file:
                whole = (row for row in rows if len(row) == len(header) and int(row[0]) <= done)
                csv.writer(file).writerows([header, *whole] if done else [])

    def write(self, row: dict[str, float]) -> None:
        """Appends a row; the first one also writes the header."""
        with self.path.open("a", newline="") as file:
            if not file.tell():
                csv.writer(file).writerow(row)
            csv.writer(file).writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row.values())


# ----------------------------------------------------------------------------------------------------------
# The loop


def fit(
    network: nn.Module,
    loss: Callable[[nn.Module, list[Tensor], list[int]], Tensor],
    dataset: Dataset,
    settings: Settings,
    validate: Callable[[int], dict[str, float]] | None = None,
    keep_best: Callable[[], None] | None = None,
    name: Callable[[int], str] = str,
) -> int:
    """Trains `network` in place, on the device it is on, up to settings.steps; returns the exit code (0, 130, 143).

    loss: (network, batch, positions) -> scalar, the mean over the batch, which may be on the CPU.
    dataset: maps a sample position (any number from 0 up) to a tuple of tensors.
    validate: step -> metrics, the first of which is the score; called every validate_every steps and at the end,
        with the EMA weights where there is an EMA. keep_best: called after it whenever the score is the best so far.
    name: what to call the sample at a position in error messages.
    Raises ValueError on settings that do not fit, on a loss that is not finite, and if a checkpoint cannot be
    written (the one before stays).
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    if settings.batch_size % (world * settings.accumulate):
        parts = f"{world} processes x {settings.accumulate} accumulation steps"
        raise ValueError(f"batch size {settings.batch_size} is not divisible by {parts}")
    with exclusive(settings.out) if rank == 0 else nullcontext():
        kept = checkpoints(settings.out)
        if kept and not settings.resume:
            raise ValueError(f"{settings.out} holds a run already: go on with --resume, or choose another --out")
        return _fit(network, loss, dataset, settings, validate, keep_best, name, rank, world)


def _fit(network, loss, dataset, settings, validate, keep_best, name, rank, world) -> int:
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    ema = {n: p.detach().clone() for n, p in network.named_parameters()} if settings.ema else {}
    done, best = 0, -math.inf
    if kept := checkpoints(settings.out):
        done, best = load_checkpoint(kept[-1], network, ema, optimizer, settings)

    micro = settings.accumulate  # micro-batches a step
    positions = batches(done * micro, settings.steps * micro, settings.batch_size // micro, rank, world)
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=positions,
            num_workers=settings.workers,
            worker_init_fn=_start_worker,
            pin_memory=parameters[0].is_cuda,
        )
    )
    parallel = DistributedDataParallel(network) if world > 1 else network
    autocast = torch.autocast(parameters[0].device.type, DTYPES[settings.dtype], enabled=settings.dtype != "float32")
    log = Log(settings.out / "log.csv", done) if rank == 0 else None
    validation_log = Log(settings.out / "validation.csv", done) if rank == 0 else None

    network.train()
    bar = tqdm(
        total=settings.steps, initial=done, unit="step", desc=settings.out.name, disable=rank > 0, smoothing=0.05
    )
    with caught_signals() as caught, bar:
        for step in range(done, settings.steps):
            began = time.perf_counter()
            lr = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            total = torch.zeros(2, device=parameters[0].device)  # loss, whether to stop
            of_step = positions[(step - done) * micro :][:micro]
            for part in of_step:
                wait = world > 1 and part is not of_step[-1]  # gradients are averaged once a step
                with autocast, parallel.no_sync() if wait else nullcontext():
                    value = loss(parallel, next_batch(loader), list(part)) / micro
                value.backward()
                total[0] += value.detach() / world
            total[1] = len(caught)
            if world > 1:  # all processes see the same loss, and stop at the same step
                dist.all_reduce(total)
            value, stop = total.tolist()
            if not math.isfinite(value):
                names = [
                    name(p) for b in batches[(step - done) * settings.accumulate :][: settings.accumulate] for p in b
                ]
                raise ValueError(
                    f"step {step + 1}: the loss is {value}; batch: {', '.join(names)}; last good checkpoint: "
                    f"{(checkpoints(settings.out) or ['none'])[-1]}; try a lower --lr or --dtype float32"
                )
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                torch._foreach_lerp_(list(ema.values()), parameters, 1 - settings.ema)

            now = step + 1
            speed = settings.batch_size / (time.perf_counter() - began)
            if rank == 0:
                log.write({"step": now, "loss": value, "learning_rate": lr, "images_per_second": speed})
                bar.set_postfix_str(f"loss {value:.4f}, lr {lr:.1e}, {speed:.1f} images/s", refresh=False)
                bar.update()
                if validate and (now % settings.validate_every == 0 or now == settings.steps):
                    with using(ema, network):
                        metrics = validate(now)
                        validation_log.write({"step": now} | metrics)
                        if (score := next(iter(metrics.values()))) > best:
                            best = score
                            keep_best()
                    network.train()
                if now % settings.save_every == 0 or now == settings.steps or stop:
                    save_checkpoint(network, ema, optimizer, settings, now, best)
            wait_for_all()
            if stop and now < settings.steps:
                return 128 + (caught[0] if caught else signal.SIGTERM)
    return 0


def next_batch(loader: Iterator[list[Tensor]]) -> list[Tensor]:
    """The next batch. Raises ValueError with the message alone where a worker failed."""
    try:
        return next(loader)
    except ValueError as error:  # of a worker: the message comes last, after the worker's traceback as text
        raise ValueError(str(error).strip().splitlines()[-1].rpartition("Error: ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a process that reads images died ({error}); go on with --resume, fewer --workers") from error


@contextmanager
def using(ema: dict[str, Tensor], network: nn.Module) -> Iterator[None]:
    """The network holds the averaged weights within; its own come back after. Nothing changes without an EMA."""
    own = {name: p.detach().clone() for name, p in network.named_parameters() if name in ema}
    network.load_state_dict(ema, strict=False)
    network.eval()
    try:
        yield
    finally:
        network.load_state_dict(own, strict=False)
