"""What all scripts share: one-line errors, clean stops, devices, torchrun, atomic files, JSON."""

import argparse
import ctypes
import errno
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------------
# Scripts

DEVICE_HELP = "cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's main() and exits with its code.

    ValueError, OSError and lack of memory are for the user to mend: one line on standard error, exit code 2.
    Ctrl-C and SIGTERM unwind the stack, so that temporary files are removed: exit code 130 or 143. Any other
    exception is a bug of ours and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # file names may hold bytes that no encoding can print
        stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        print(f"error: {'out of memory: ' * out_of_memory(error)}{one_line(error)}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory() -> None:
    """Makes the process keep freed memory for the next tensors instead of returning it to the system.

    glibc returns large blocks at once, and the system clears every page when they are allocated again: on a CPU
    this took a fifth of the time of sampling and a third of that of training. Other C libraries lack the setting.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never return memory
        libc.mallopt(M_MMAP_MAX, 0)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU or (for which torch has no class of its own) the CPU ran out of memory."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def one_line(error: object) -> str:
    """An error's message in one line of at most 1000 characters, without characters that control a terminal.

    Names of files and tensors may hold line breaks and escape sequences.
    """
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}"


def some(items: Iterable[str]) -> str:
    """The first three items, and how many more there are."""
    items = list(items)
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps the line breaks of the script's docstring, and whose errors are one line."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Exits with code 2, without the usage that argparse would print first."""
        self.exit(2, f"error: {one_line(message)}; see --help\n")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed_number(text: str) -> int:
    """An argparse type: a whole number from 0 to 2^32 - 1, the seeds that torch's generator distinguishes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^32 - 1")
    return int(text)


# ----------------------------------------------------------------------------------------------------------
# Devices, torchrun, signals


def choose_device(name: str | None) -> str:
    """The named device, or "cuda" where there is one, else "cpu". Raises ValueError if it cannot be used."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # fails for "meta", too
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def choose_dtype(name: str | None, device: str, training: bool = False) -> str:
    """The named dtype, or the fast one of the device: bfloat16 on GPUs from compute capability 8.0 (Ampere) and on
    CPUs with AMX or AVX512-BF16; on older GPUs float16, but float32 in training; else float32.
    """
    if name is not None:
        return name
    if device.startswith("cuda"):
        older = "float32" if training else "float16"
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else older
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if device == "cpu" and cpuinfo.exists() else ""
    return "bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"


def start_processes(device: str | None) -> str:
    """Joins the processes that torchrun started, if any; returns this process's device.

    Raises ValueError if the device cannot be used.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return choose_device(device)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device}: torchrun gives each process its own GPU; use cuda, or leave it out")
    if device == "cuda" or device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(device)
    if device != "cpu":
        torch.cuda.set_device(device)
    # The others wait while rank 0 validates or fills the cache, which may take hours.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=1))
    wait_for_all()  # before any process can exit with an error about the options
    return device


def rank() -> int:
    """The number of this process. Rank 0 writes the files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Returns when every process has arrived here."""
    if dist.is_initialized():
        dist.barrier()


def end_processes() -> None:
    """Leaves the process group when all have arrived: torchrun may end the others when one exits."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Yields a list that receives the first SIGINT or SIGTERM. A second one, more than a second later, acts as usual.

    Not earlier: whatever ends a job often signals the whole group, and torchrun passes on the signal it got.
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


# ----------------------------------------------------------------------------------------------------------
# Files

JSON_MAX = 2**24  # bytes; the index of a sharded model has about 100,000


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    The temporary name keeps the suffix, from which writers such as Pillow choose the format.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    temporary.unlink(missing_ok=True)  # a symbolic link there would be followed
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system cannot sync folders
                raise
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks the folder for this process; makes it if needed. Raises ValueError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:  # "a" truncates nothing if it is a link
        try:
            # A POSIX lock dies with its process; flock's would live on in the reading processes.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another run is writing there; wait for it, or choose another folder") from None
        except OSError:  # a file system without locks, as on some clusters
            pass
        yield


def require_file(path: Path) -> None:
    """Raises ValueError if the path is a folder, a device or a named pipe, which would block for ever."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises ValueError if the file does not hold one."""
    require_file(path)
    try:
        if path.stat().st_size > JSON_MAX:
            raise ValueError(f"larger than {JSON_MAX} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file atomically; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def changed_settings(was: dict, wanted: dict) -> str:
    """The settings that differ, for messages: "steps 10 is now 50, ..."; empty if none does."""
    return ", ".join(f"{key} {was.get(key)} is now {value}" for key, value in wanted.items() if was.get(key) != value)
