"""The processes that read images for a training."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common import world_size

Batch = tuple[list[Tensor], list[int]]  # (of a part of a batch, too) the tensors, and the positions of the samples


def check_same(step: int) -> None:
    """Raises ValueError unless all processes are to go on from the same step."""
    steps = [step] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(steps, step)
    if min(steps) < max(steps):
        what = f"the machines found different checkpoints, of steps {min(steps)} and {max(steps)}"
        raise ValueError(f"{what}: --out must be on a disk that they share")


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
