"""A training on disk: its settings, its folder, its checkpoints, its logs.

run_folder: one run at a time, the one it was  ->  State: load, update, save  ->  Log: a row a step
"""

import csv
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common import atomic, changed_settings, exclusive, out_of_memory, rank, require_file, world_size
from stored import check_names, open_tensors, save_tensors

# What may differ when a run is resumed, as the number of processes may. The other settings make it the run it is.
CHANGEABLE = {"out", "accumulate", "workers", "save_every", "validate_every", "keep", "resume", "about"}


@dataclass(frozen=True)
class Settings:
    """How to train. Raises ValueError on values that cannot be."""

    out: Path
    steps: int
    batch_size: int  # over all processes and accumulation steps
    lr: float = 3e-5
    warmup: int = 100  # steps
    clip: float = 1.0  # largest norm of the gradient
    accumulate: int = 1  # parts in which each process computes its share of a batch
    ema: float = 0.0  # decay of the moving average of the weights; 0: none
    dtype: str = "float32"  # or "bfloat16", of the arithmetic (autocast); weights and optimizer stay float32
    seed: int = 0
    workers: int = 0  # processes that read; 0: this one
    save_every: int = 1000
    validate_every: int = 1000
    keep: int = 2  # checkpoints
    resume: bool = False
    about: dict[str, str | int] = field(default_factory=dict)  # what else makes the run: dataset, model, loss ...

    def __post_init__(self):
        for name, value, good, wanted in (
            ("lr", self.lr, 0 < self.lr < math.inf, "a number above 0"),
            ("clip", self.clip, self.clip > 0, "a number above 0"),
            ("ema", self.ema, 0 <= self.ema < 1, "0 for none, or a number below 1 such as 0.9999"),
            ("workers", self.workers, self.workers >= 0, "0 or more"),
        ):
            if not good:
                raise ValueError(f"--{name} {value}: must be {wanted}")
        if self.batch_size % (world_size() * self.accumulate):
            parts = f"{world_size()} process(es) x {self.accumulate} accumulation step(s)"
            raise ValueError(f"--batch-size {self.batch_size}: cannot be shared evenly by {parts}")

    def identity(self) -> dict:
        """What must not change within a run."""
        return {key: value for key, value in asdict(self).items() if key not in CHANGEABLE} | self.about


# ----------------------------------------------------------------------------------------------------------
# The folder


UNFINISHED = re.compile(r"\.(tmp\w{6}|.+\.\d+\.\w+)")  # temporary names of safetensors and of files.atomic


@contextmanager
def run_folder(settings: Settings) -> Iterator[None]:
    """Holds settings.out for a run, which `check_run` allows, and says in one line what befalls it (ValueError)."""
    first = rank() == 0
    with explained(settings), exclusive(settings.out) if first else nullcontext():
        if first:
            check_run(settings)
            for pattern in (".*", "checkpoint/.*", "samples/.*", "model/.*", "model/*/.*"):  # what a killed run left
                for path in settings.out.glob(pattern):
                    if UNFINISHED.fullmatch(path.name) and path.is_file():
                        path.unlink()
        yield


def check_run(settings: Settings) -> None:
    """Raises ValueError if the folder holds a run that is not to be resumed, or one made with other settings."""
    out, kept = settings.out, checkpoints(settings.out)
    if not kept:
        if settings.resume:
            print(f"{out} holds no checkpoint: starting from the beginning")
        return
    if not settings.resume:
        raise ValueError(f"{out} holds a run already: go on with --resume, or choose another --out")
    if changed := changed_settings(read_header(kept[-1])["settings"], settings.identity()):
        raise ValueError(f"{out} was made with other settings ({changed}): resume with the same")


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """Turns what can befall a training into a ValueError of one line that says what to do."""
    try:
        yield
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        if out_of_memory(error):
            advice = f"--accumulate {2 * settings.accumulate}, --checkpointing or a smaller --batch-size"
            raise ValueError(f"out of memory: try {advice} ({what})") from error
        if "DataLoader worker" in what:
            advice = "go on with --resume; if it recurs, memory may be short: use fewer --workers"
            raise ValueError(f"a process that reads images died ({what}): {advice}") from error
        if world_size() > 1 and "closed by peer" in what:
            raise ValueError("another process of this run ended; its message says why") from error
        raise
    except OSError as error:
        kept = last_checkpoint(settings.out)
        raise ValueError(f"{settings.out}: {error}; {kept}; mend that and go on with --resume") from error


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((out / "checkpoint").glob("[0-9]*.safetensors"))


def last_checkpoint(out: Path) -> str:
    """The newest checkpoint, for messages."""
    return f"the last checkpoint is {next(reversed(checkpoints(out)), 'none')}"


def read_header(path: Path) -> dict:
    """The step and settings of a checkpoint. Raises ValueError if it cannot be read."""
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["training"])
        match header:
            case {"step": int(step), "settings": dict()} if step >= 0:
                return header
        raise ValueError("no step and settings in it")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"not a readable checkpoint ({error})"
        raise ValueError(f"{path}: {what}; delete it to resume from the one before") from error


# ----------------------------------------------------------------------------------------------------------
# The state


class State:
    """All that a checkpoint holds: weights, optimizer, moving average and the number of steps done.

    A checkpoint is one safetensors file, so that it is there whole or not at all.
    """

    def __init__(self, network: nn.Module, settings: Settings):
        self.network, self.settings = network, settings
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        weights = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(weights, settings.lr, weight_decay=0.01, fused=True)
        for p in weights:  # as AdamW does at its first step; so a checkpoint is restored by copying, nothing else
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | zeros
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema else {}
        self.step = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the checkpoint; the tensors themselves, not copies."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in self.optimizer.state[p].items()}
        return tensors

    def save(self) -> None:
        """Writes checkpoint/STEP.safetensors, then drops the oldest ones."""
        header = {"step": self.step, "settings": self.settings.identity()}
        path = self.settings.out / "checkpoint" / f"{self.step:08d}.safetensors"
        save_tensors(path, self.tensors(), {"training": json.dumps(header)})
        for old in checkpoints(self.settings.out)[: -self.settings.keep]:
            old.unlink()

    def load(self, path: Path) -> None:
        """Restores what `save` wrote, one tensor at a time. Raises ValueError if it does not fit."""
        header, stored, tensors = read_header(path), open_tensors(path), self.tensors()
        check_names(path, expected=set(tensors), found=set(stored))
        for name, tensor in tensors.items():
            if stored[name].shape != tensor.shape:
                raise ValueError(f"{path}: {name} is {stored[name].shape}, not {tuple(tensor.shape)}")
            tensor.copy_(stored[name].load(tensor.dtype))
        self.step = header["step"]

    def update(self, rate: float) -> None:
        """One step of the optimizer, with the gradients that are there; the average follows."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            # a mean of all weights at first, which else would long be those of the start
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            for name, average in self.average.items():
                average.lerp_(self.parameters[name], 1 - decay)
        self.step += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the network is in evaluation mode, with the averaged weights if there are any."""

        def exchange() -> None:
            for name, average in self.average.items():
                p = self.parameters[name]
                p.data, self.average[name] = average, p.data

        exchange()
        self.network.eval()
        try:
            yield
        finally:
            self.network.train()
            exchange()


# ----------------------------------------------------------------------------------------------------------
# The logs


DAMAGED = "not the table that this run writes; move it away and go on with --resume"


class Log:
    """A table that grows by a row a step: a CSV file, and TensorBoard where that is installed.

    When a run is resumed, the rows from step `start` on are forgotten. Raises ValueError if the file is no such table.
    last: the step of the last row; best: the highest of the numbers that follow the step.
    """

    def __init__(self, path: Path, start: int):
        rows = [row for row in read_table(path) if row["step"] < start]
        with atomic(path) as temporary:
            append(temporary, rows)
        self.path, self.columns = path, list(rows[0]) if rows else None
        self.last, self.best = 0, -math.inf
        for row in rows:
            self._look_at(row)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(path.parent / "tensorboard" / path.stem, purge_step=start)
        except ImportError:
            self.board = None

    def write(self, row: dict[str, float]) -> None:
        """Appends a row, of which the first number is the step."""
        if self.columns not in (None, list(row)):
            raise ValueError(f"{self.path}: {DAMAGED} (its columns are {', '.join(self.columns)})")
        append(self.path, [row])
        self._look_at(row)
        if self.board:
            (_, step), *values = row.items()
            for name, value in values:
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def _look_at(self, row: dict[str, float]) -> None:
        self.last, value, *_ = row.values()
        self.best = max(self.best, float(f"{value:.6g}"))  # as a resumed run will read it; a NaN is never the best


def read_table(path: Path) -> list[dict[str, float]]:
    """The rows of a log; none if it is not there. Raises ValueError if it is no such table."""
    if not path.exists():
        return []
    require_file(path)
    try:
        with path.open() as file:
            lines = [line for line in file if line.endswith("\n")]  # a full disk may have cut the last one
        rows = csv.DictReader(lines)
        if rows.fieldnames and len(rows.fieldnames) < 2:
            raise ValueError("nothing but steps")
        return [{name: float(text) for name, text in row.items()} | {"step": int(row["step"])} for row in rows]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{path}: {DAMAGED} ({error})") from error


def append(path: Path, rows: list[dict[str, float]]) -> None:
    """Adds rows to a table, and their names if it is empty."""
    with path.open("a", newline="") as file:
        if rows and not file.tell():
            csv.writer(file).writerow(rows[0])
        for row in rows:
            csv.writer(file).writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row.values())
