"""What tests share: a script in a process of its own with little memory, what it leaves on disk, files to give it."""

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
import pytest
import torch
from PIL import Image

import common

MEMORY = 2**30  # bytes that a script may take beyond those of the tests
SECONDS = 60


class Outcome(NamedTuple):
    code: int
    out: list[str]
    err: list[str]


def outcome(main: Callable, *arguments, before: Callable[[], object] = lambda: None, memory: int = MEMORY) -> Outcome:
    """Runs a script's main() with common.run in a forked process: -> exit code, lines on stdout and on stderr.

    Progress bars are left out. Allocating more than `memory` bytes fails in it; after a minute it is killed.
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
    """All that is in the folders: {name: (kind and permissions, size, content)}."""
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


def names(folder: Path) -> set[str]:
    """The files below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    """The pixels of a picture, (H, W) or (H, W, C), as signed integers."""
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# ----------------------------------------------------------------------------------------------------------
# Files


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG whose header may lie."""
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
    """Writes a picture, of noise if none is given, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(16, 16) if array is None else array).save(path, **options)
    return path


def geotiff(path: Path, bands: np.ndarray | None = None, side: int = 90, **profile) -> Path:
    """Writes a GeoTIFF, (C, H, W); by default VV and VH in dB with a corner of 10 x 15 pixels without data, -9999."""
    rasterio = pytest.importorskip("rasterio")
    if bands is None:
        bands = np.random.default_rng(0).normal(-12, 4, (2, side, side - side // 5)).astype(np.float32)
        bands[:, :10, :15] = -9999
        profile = {"nodata": -9999} | profile
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": "EPSG:32737", "transform": rasterio.transform.from_origin(500000, 9e6, 10, 10)}
    count, height, width = bands.shape
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=bands.dtype, **place | profile) as file:
        file.write(bands)
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
