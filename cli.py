"""What every script does alike: one-line errors with exit code 2, clean stops, memory, the choice of the device."""

import argparse
import ctypes
import platform
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

DEVICE = "cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)"  # the help of --device
# 128 + signal number, as shells report it
INTERRUPTED, TERMINATED = 130, 143
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's main() and exits with its code.

    ValueError, OSError and too little memory are the user's to mend: one line on standard error, exit code 2.
    Ctrl-C and SIGTERM unwind, so that temporary files are removed: exit code 130 or 143. Anything else is a bug
    of ours and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that no encoding can print
        stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        print(f"error: {'out of memory: ' * out_of_memory(error)}{one_line(error)}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory() -> None:
    """Lets the process keep memory that tensors no longer need, for the next ones.

    glibc gives large blocks back to the system, which clears every page when they are asked for again: on a CPU this
    took a fifth of the time of sampling, and a third of that of training. Other C libraries have no such setting.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_MMAP_MAX, 0)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was too little: Python's, a GPU's, or (for which torch has no class) the CPU's."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def one_line(error: object) -> str:
    """The message of an error (or a text), of at most 1000 characters, without those that would move or colour the
    text of a terminal: names of files and tensors may hold line breaks and worse.
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps the line breaks of the script's docstring, and whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Exit code 2, without the usage that argparse would print first."""
        self.exit(2, f"error: {one_line(message)}; see --help\n")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def seed_number(text: str) -> int:
    """An argparse type: a whole number from 0 to 2^32 - 1, which is all that torch's generator distinguishes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2^32 - 1")
    return int(text)


def choose_device(name: str | None) -> str:
    """The device asked for, or "cuda" where there is one, else "cpu". Raises ValueError if it is not there."""
    import torch  # here, because scripts that need no torch start faster without

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # which "meta" cannot
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def machine(device: str) -> str:
    """The name of the GPU, or of the processor and its number of threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"
