"""The training loop: any network, any loss; Ctrl-C costs nothing, a crash the steps since the last checkpoint.

    for each step:  batch -> loss -> gradients -> clipped AdamW step -> moving average -> log.csv
    now and then:   checkpoint -> everything that resuming needs;  validate -> keep the best

What a step computes depends on the step's number alone: the order of the data, the augmentation and the noise
are drawn from (seed, sample position), where sample j of step k has position k * batch_size + j. So no random
state needs saving; a run that was killed and resumed equals one that was not, and N processes see the data of one.

Where a step has both, its checkpoint comes before its validation, which may fail: a run that goes on from there begins
with it.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from checkpoint import Log, Settings, State, checkpoints, last_checkpoint
from common import caught_signals, rank, world_size
from data import batch_positions, seed_of
from processes import Batch, check_same, reading

# (network, batch, the samples' positions) -> the mean loss over the batch, which comes as it was read, on the CPU
Loss = Callable[[nn.Module, list[Tensor], list[int]], Tensor]


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine that reaches 0 after the last step."""
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


def precision(device: torch.device | str, dtype: str) -> torch.autocast:
    """The arithmetic of a step: bfloat16 where that is safe, or float32 throughout."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def fit(
    network: nn.Module,
    loss: Loss,
    dataset: Dataset,
    settings: Settings,
    validate: Callable[[int], dict[str, float]],
    keep_best: Callable[[], None] = lambda: None,
    name: Callable[[int], str] = str,
) -> int:
    """Trains `network` in place, on the device it is on, up to settings.steps: -> exit code (0, 130, 143).

    To be called within `run_folder`; goes on from the last checkpoint there.
    dataset: maps a sample position (any number from 0 up) to a tuple of tensors.
    validate: step -> metrics, the first of which is the score; called every validate_every steps and at the end,
        with the averaged weights if there are any. keep_best: called after it whenever the score is the best so far.
    name: what to call the sample at a position in error messages.
    Raises ValueError on a loss that is not finite, data that cannot be read, and files that cannot be written.
    """
    device = next(network.parameters()).device
    state = State(network, settings)
    if kept := checkpoints(settings.out):
        state.load(kept[-1])
    check_same(state.step)
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True) if world_size() > 1 else network
    first = rank() == 0
    if first:
        log = Log(settings.out / "log.csv", start=state.step + 1)
        validations = Log(settings.out / "validation.csv", start=state.step + 1)

    def due(every: int) -> bool:
        return state.step > 0 and state.step % every == 0 or state.step == settings.steps

    n = settings.accumulate
    positions = batch_positions(state.step * n, settings.steps * n, settings.batch_size // n, rank(), world_size())
    pin = device.type == "cuda"
    network.train()
    bar = tqdm(total=settings.steps, initial=state.step, unit="step", desc=settings.out.name, disable=not first)
    with bar, caught_signals() as caught, reading(dataset, positions, settings.workers, pin) as parts:
        stop = False
        while not stop:
            if first and due(settings.validate_every) and validations.last < state.step:
                with state.averaged():
                    metrics = validate(state.step)
                    if next(iter(metrics.values())) > validations.best:
                        keep_best()
                validations.write({"step": state.step} | metrics)
            if state.step >= settings.steps:
                break

            began, rate = time.perf_counter(), learning_rate(state.step, settings)
            value = add_gradients(parallel, loss, islice(parts, n), settings)
            norm = nn.utils.clip_grad_norm_(state.parameters.values(), settings.clip)

            # means over the processes, so that all stop if one got a signal; one transfer from the device a step
            facts = torch.stack([value, norm, torch.full_like(norm, len(caught))]) / world_size()
            if world_size() > 1:
                dist.all_reduce(facts)
            value, norm, stop = facts.tolist()
            if not math.isfinite(value + norm):
                names = [name(settings.batch_size * state.step + i) for i in range(settings.batch_size)]
                raise ValueError(
                    f"step {state.step + 1}: the loss is {value}, its gradient's norm {norm}; "
                    f"{last_checkpoint(settings.out)}; begin another run, from {settings.out}/model if that is good, "
                    f"with a lower --lr or --dtype float32; batch: {', '.join(names)}"
                )
            state.update(rate)

            if first:
                speed = settings.batch_size / (time.perf_counter() - began)
                row = {"step": state.step, "loss": value, "learning_rate": rate, "gradient_norm": norm}
                log.write(row | {"images_per_second": speed})
                bar.set_postfix_str(f"loss {value:.4f}, lr {rate:.1e}, {speed:.1f} images/s", refresh=False)
                bar.update()
                if due(settings.save_every) or stop:
                    state.save()
    if not stop:
        return 0
    return 128 + (caught[0] if caught else signal.SIGTERM)  # none was caught here: another process got one


def add_gradients(network: nn.Module, loss: Loss, batch: Iterator[Batch], settings: Settings) -> Tensor:
    """Adds up the gradients of a batch that comes in parts; -> its loss."""
    values = []
    for part, (tensors, positions) in enumerate(batch, 1):
        # processes average their gradients once a step, at its last part
        alone = isinstance(network, DistributedDataParallel) and part < settings.accumulate
        with network.no_sync() if alone else nullcontext():
            with precision(next(network.parameters()).device, settings.dtype):
                value = loss(network, tensors, positions) / settings.accumulate
            value.backward()
        values.append(value.detach())
    return torch.stack(values).sum()
