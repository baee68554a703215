"""The processes that work together: those that torchrun starts, those that read images, and the signals all may get."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cli import choose_device

Batch = tuple[list[Tensor], list[int]]  # (of a part of a batch, too) the tensors, and the positions of the samples


def start_processes(device: str | None) -> str:
    """Joins the processes that torchrun started, if it did; -> this process's device, the one asked for if alone.

    Raises ValueError if the device cannot be used.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return choose_device(device)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device}: torchrun gives each process a GPU of its own; say cuda, or nothing")
    if device == "cuda" or device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(device)
    if device != "cpu":
        torch.cuda.set_device(device)
    # the others wait while the first one validates or fills the cache, which may take hours
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=1))
    wait_for_all()  # so that none is left alone on its way here when another finds fault with the options
    return device


def rank() -> int:
    """The number of this process; 0 is the one that writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def end_processes() -> None:
    """Takes leave of the other processes when all have come here: where one ends, torchrun may end the others."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_same(step: int) -> None:
    """Raises ValueError unless all processes are to go on from the same step."""
    steps = [step] * processes()
    if dist.is_initialized():
        dist.all_gather_object(steps, step)
    if min(steps) < max(steps):
        what = f"the machines found different checkpoints, of steps {min(steps)} and {max(steps)}"
        raise ValueError(f"{what}: --out must be on a disk that they share")


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The list that is given gets the first SIGINT or SIGTERM. Another one more than a second later acts as usual.

    Not sooner: what ends a job often signals the whole group, and torchrun passes on what it got itself.
    """
    caught: list[int] = []
    since = 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(number, _frame) -> None:
        nonlocal since
        if not caught:
            caught.append(number)
            since = time.monotonic()
        elif time.monotonic() > since + 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_worker(_number: int) -> None:
    """What a reading process does first: it lives until the step is finished, whoever is signalled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Batches(Dataset):
    """Positions -> these samples, or the error that one met: raised here, it would come as the text of a traceback."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, positions: range) -> Batch | Exception:
        try:
            return default_collate([self.samples[i] for i in positions]), list(positions)
        except (ValueError, OSError) as error:
            return error


@contextmanager
def reading(dataset: Dataset, positions: Iterator[range], workers: int, pin: bool) -> Iterator[Iterator[Batch]]:
    """The samples at these positions, read ahead by processes that are gone in the end.

    pin: put them where a GPU can fetch them by itself.
    """
    options = {"num_workers": workers, "worker_init_fn": start_worker, "pin_memory": pin}
    loader = iter(DataLoader(Batches(dataset), batch_size=None, sampler=positions, **options))

    def read() -> Iterator[Batch]:
        while True:
            try:
                batch = next(loader)
            except (OSError, EOFError) as error:  # of a process that died while it handed over what it had read
                raise RuntimeError(f"DataLoader worker: {error}") from error
            if isinstance(batch, Exception):
                raise batch
            yield batch

    try:
        yield read()
    finally:
        if workers:  # they ignore the signal by which Python ends its children, and it would wait for ever
            try:
                loader._shutdown_workers()
            finally:  # that one died, or a signal, may have broken it off
                for worker in loader._workers:
                    worker.kill()
