"""What the hostile tests share: a program run in a process of its own, with little memory, and what it left on disk."""

import os
import re
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import common

MEMORY = 2**30  # bytes that a program may take beyond what is there when it starts
SECONDS = 60  # that it may take


class Outcome(NamedTuple):
    code: int
    out: list[str]
    err: list[str]


def outcome(main: Callable, *arguments, before: Callable[[], object] = lambda: None, memory: int = MEMORY) -> Outcome:
    """Runs a script's main() in a forked process, as common.run does: -> exit code, lines on stdout and on stderr.

    Bars are left out of the lines. A process that takes too much memory fails, one that hangs is killed.
    """
    with tempfile.TemporaryFile("w+", newline="") as out, tempfile.TemporaryFile("w+", newline="") as err:
        if not (child := os.fork()):
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
                torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
                used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
                resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))
                signal.alarm(SECONDS)
                before()
                common.run(lambda: main(*arguments))
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        lines = [[line for line in file.read().split("\n") if line and "\r" not in line] for file in (out, err)]
    return Outcome(code, *lines)


def tree(*folders: Path) -> dict[str, tuple]:
    """All that is in the folders: kind, content and time of change by name."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            state = path.lstat()
            regular = path.is_file() and not path.is_symlink() and state.st_size < 2**24
            found[os.fsencode(path)] = (state.st_mode, state.st_size, path.read_bytes() if regular else None)
    return found


def assert_refused(result: Outcome, *words: str) -> None:
    """Exit code 2, and one line on standard error that begins with "error: " and holds the words."""
    assert result.code == 2, result
    assert len(result.err) == 1 and result.err[0].startswith("error: "), result.err
    assert result.err[0].isprintable() and all(word in result.err[0] for word in words), result.err


# ----------------------------------------------------------------------------------------------------------
# Files


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG that says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(entries: dict[int, tuple[int, int, int]], data: bytes = bytes(4096), magic: bytes = b"II*\0") -> bytes:
    """A TIFF with these tags, {tag: (type, count, value or offset)}; the pixels lie at byte 1024."""
    fields = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    head = magic + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)
    return head.ljust(1024, b"\0") + data


def gray(width: int, height: int, bits: int = 8) -> dict[int, tuple[int, int, int]]:
    """The tags of an uncompressed grey picture, for `tiff`."""
    size = width * height * bits // 8
    return {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, bits), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 1024),
        277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, size % 2**32),
    }  # fmt: skip


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file whose header may lie."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def noise(height: int, width: int, channels: tuple = (), dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    """A picture of noise."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, *channels), dtype)


def save(path: Path, array: np.ndarray | None = None, **options) -> Path:
    """A picture that can be used, unless another is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(16, 16) if array is None else array).save(path, **options)
    return path


def damaged(whole: bytes, how: str, seed: int) -> bytes:
    """Truncated, with flipped bits, or with a run of zeros, at a place that the seed draws."""
    random = np.random.default_rng(seed)
    at = int(random.integers(1, len(whole)))
    if how == "cut":
        return whole[:at]
    content = np.frombuffer(whole, np.uint8).copy()
    if how == "flipped":
        content[random.integers(0, len(content), 1 + len(content) // 200)] ^= 1 << int(random.integers(8))
    else:
        content[at : at + max(8, len(content) // 8)] = 0
    return content.tobytes()
