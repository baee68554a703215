"""What a training keeps on disk: its folder, its checkpoints, its two tables.

    runs/NAME/checkpoint/00001000.safetensors   weights, optimizer, moving average; the step and settings in the header
    runs/NAME/log.csv, validation.csv           a row for each step, and for each validation

What a step computes depends on the seed and the step's number alone (see `train.py`), so no random state is saved: a
run that was killed and resumed equals one that was not.
"""

import argparse
import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common import atomic, changed_settings, exclusive, out_of_memory, rank, require_file, world_size
from weights import check_names, open_tensors, save_tensors

KEPT = 2  # checkpoints
# The options that a resumed run must share with the run that it continues. The others may change.
FIXED = ("steps", "batch_size", "lr", "clip", "ema", "dtype", "seed")

# ----------------------------------------------------------------------------------------------------------
# The state


class State:
    """Everything a training changes: the trainable weights, AdamW's moments, their moving average (EMA), the step.

    A checkpoint is one safetensors file, so that it is there as a whole or not at all.
    """

    def __init__(self, network: nn.Module, args: argparse.Namespace):
        self.network, self.step = network, 0
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), args.lr, weight_decay=0.01, fused=True)
        for p in self.parameters.values():  # AdamW would make these in its first step; made now, `load` just copies
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | zeros
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if args.ema else {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies, by their names in the checkpoint."""
        tensors = {f"network.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": average for name, average in self.average.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in self.optimizer.state[p].items()}
        return tensors

    def save(self, out: Path, settings: dict) -> None:
        """Writes checkpoint/STEP.safetensors, then deletes the oldest ones."""
        header = json.dumps({"step": self.step, "settings": settings})
        save_tensors(out / "checkpoint" / f"{self.step:08d}.safetensors", self.tensors(), {"training": header})
        for old in checkpoints(out)[:-KEPT]:
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

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the network is in evaluation mode and has the averaged weights, if there are any."""

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


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((out / "checkpoint").glob("[0-9]*.safetensors"))


def last_checkpoint(out: Path) -> str:
    """The newest checkpoint, for messages."""
    return f"the last checkpoint is {next(reversed(checkpoints(out)), 'none')}"


def read_header(path: Path) -> dict:
    """The step and the settings of a checkpoint. Raises ValueError if it cannot be read."""
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["training"])
        match header:
            case {"step": int(step), "settings": dict()} if step >= 0:
                return header
        raise ValueError("no step and settings in it")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = f"not a readable checkpoint ({error})"
        raise ValueError(f"{path}: {problem}; delete it to resume from the one before, if there is one") from error


# ----------------------------------------------------------------------------------------------------------
# The folder of a run

UNFINISHED = re.compile(r"\.(tmp\w{6}|.+\.\d+\.\w+)")  # temporary names of safetensors and of common.atomic


@contextmanager
def run_folder(args: argparse.Namespace, identity: dict) -> Iterator[dict]:
    """Locks args.out for a run and yields the settings that its checkpoints hold: FIXED options and `identity`.

    Raises ValueError if the folder holds a run that is not to be resumed, or one with other settings; also when the
    training within fails for a reason that the user can mend: one line with what to do.
    """
    settings = {key: getattr(args, key) for key in FIXED} | identity
    settings = json.loads(json.dumps(settings))  # as a checkpoint's header gives them back
    try:
        with exclusive(args.out) if rank() == 0 else nullcontext():
            if rank() == 0:
                check_folder(args.out, args.resume, settings)
            yield settings
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if out_of_memory(error):
            advice = f"--accumulate {2 * args.accumulate}, --checkpointing or a smaller --batch-size"
            raise ValueError(f"out of memory: try {advice} ({reason})") from error
        if "DataLoader worker" in reason:
            advice = "continue with --resume; if it happens again, memory may be short: use fewer --workers"
            raise ValueError(f"a process that reads images died ({reason}): {advice}") from error
        if world_size() > 1 and "by peer" in reason:  # gloo: closed by peer, reset by peer
            raise ValueError("another process of this run exited; its message says why") from error
        raise
    except OSError as error:
        raise ValueError(f"{error}; {last_checkpoint(args.out)}; continue with --resume") from error


def check_folder(out: Path, resume: bool, settings: dict) -> None:
    """Checks that a run may write here, and deletes the half-written files of a killed one."""
    kept = checkpoints(out)
    if kept and not resume:
        raise ValueError(f"{out} holds a run already: continue it with --resume, or choose another --out")
    if kept and (changed := changed_settings(read_header(kept[-1])["settings"], settings)):
        advice = f"resume with the same, or start another run with --model {out / 'model'} and another --out"
        raise ValueError(f"{out} was made with other settings ({changed}): {advice}")
    if resume and not kept:
        print(f"{out} holds no checkpoint: starting from the beginning")
    for pattern in (".*", "checkpoint/.*", "samples/.*", "model/.*", "model/*/.*"):
        for path in out.glob(pattern):
            if UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()


def check_same_step(step: int) -> None:
    """Raises ValueError unless all processes continue from the same step."""
    steps = [step] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(steps, step)
    if min(steps) < max(steps):
        found = f"the processes found different checkpoints, of steps {min(steps)} and {max(steps)}"
        raise ValueError(f"{found}: --out must be on a disk that they share")


# ----------------------------------------------------------------------------------------------------------
# The tables


def read_table(path: Path) -> list[dict[str, float]]:
    """The rows of log.csv or validation.csv; none if it does not exist. Raises ValueError if it is damaged."""
    if not path.exists():
        return []
    require_file(path)
    try:
        with path.open() as file:
            lines = [line for line in file if line.endswith("\n")]  # a full disk may have cut the last one
        return [
            {name: float(x) for name, x in row.items()} | {"step": int(row["step"])} for row in csv.DictReader(lines)
        ]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        problem = "not a table that train.py wrote: restore it, or start another run in another --out"
        raise ValueError(f"{path}: {problem} ({error})") from error


def rewind_table(path: Path, step: int) -> list[dict[str, float]]:
    """Deletes the rows after `step`, which a resumed run will write anew; returns the others."""
    rows = [row for row in read_table(path) if row["step"] <= step]
    with atomic(path) as temporary:
        append_rows(temporary, rows)
    return rows


def append_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Adds rows to a table, and the column names if the table is empty."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if rows and not file.tell():
            writer.writerow(rows[0])
        for row in rows:
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row.values())
