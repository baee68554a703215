"""Tensors by name, in safetensors files: reading without loading, renaming, checking, writing.

A `Stored` tensor knows its file and its shape, but its data stay on disk until `load`. So renaming and checking
names and shapes costs nothing, and a network can be filled one tensor at a time.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import atomic, require_file, some

PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
CONVERTED_MAX = 2**28  # bytes


class File:
    """An opened safetensors file, mapped into memory, where pages that were read count as memory in use. It is mapped
    anew whenever `CONVERTED_MAX` bytes were read to be converted, so that the peak is that of the model alone.
    """

    def __init__(self, path: Path):
        self.path, self.number = path, path.stat().st_ino
        self.open()

    def open(self) -> None:
        """Maps the file (anew); nothing is read yet. OSError: it is another one by now."""
        self.safetensors, self.converted = safe_open(self.path, framework="pt"), 0
        if self.path.stat().st_ino != self.number:
            raise OSError("it was replaced in the meantime: load it again")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all its tensors, by name."""
        return {key: tuple(self.safetensors.get_slice(key).get_shape()) for key in self.safetensors.keys()}  # noqa: SIM118

    def read(self, key: str, rows: slice | None, dtype: torch.dtype) -> Tensor:
        """A tensor, or some rows of it, that lives in the mapped file. dtype: what it will be converted to."""
        if self.converted > CONVERTED_MAX:
            self.open()
        tensor = self.safetensors.get_tensor(key) if rows is None else self.safetensors.get_slice(key)[rows]
        self.converted += tensor.nbytes if tensor.dtype != dtype else 0
        return tensor


class Stored(NamedTuple):
    """A tensor on disk. rows: which rows of the stored one (None: all); shape: after selecting and reshaping."""

    file: File
    key: str
    shape: tuple[int, ...]
    rows: slice | None = None

    def load(self, dtype: torch.dtype) -> Tensor:
        """The tensor in the dtype asked for: where that is the stored one, it lives in the mapped file, and nothing is
        copied (writing to it changes memory alone). ValueError: unreadable, or no finite numbers.
        """
        try:
            tensor = self.file.read(self.key, self.rows, dtype).reshape(self.shape)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.file.path}: {self.key} cannot be read ({error})") from error
        if not tensor.is_floating_point():
            raise ValueError(f"{self.file.path}: {self.key} is {tensor.dtype}: weights are floating-point numbers")
        tensor = tensor.to(dtype)
        if not tensor.sum(dtype=torch.float32).isfinite():
            problem = f"has values that are not finite in {dtype}; is the file damaged?"
            raise ValueError(f"{self.file.path}: {self.key} {problem}")
        return tensor


Tensors = dict[str, Stored]
Rule = tuple[str, str | Callable[[re.Match], str]]  # pattern and replacement, as for re.sub

# ----------------------------------------------------------------------------------------------------------
# Reading


def open_tensors(path: Path) -> Tensors:
    """The tensors of one safetensors file, by their stored names. Raises ValueError if it cannot be read."""
    refuse_pickle(path)
    require_file(path)
    try:
        file = File(path)
        return {key: Stored(file, key, shape) for key, shape in file.shapes().items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or copy it again") from error


def refuse_pickle(path: Path) -> None:
    """Raises ValueError if the name is that of a pickled PyTorch file."""
    if path.suffix.lower() in PICKLES:
        what = "is a pickle, which can run code when loaded"
        raise ValueError(f"{path} {what}: convert it to safetensors first, or download the safetensors")


# ----------------------------------------------------------------------------------------------------------
# Names


def rename(tensors: Tensors, rules: list[Rule]) -> Tensors:
    """Applies every rule to every name, in order. Raises ValueError if two tensors get the same name."""
    renamed: Tensors = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"{tensor.file.path}: holds one tensor twice, as {renamed[new].key} and {tensor.key}")
        renamed[new] = tensor
    return renamed


def strip(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with `prefix`, without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def count(tensors: Tensors, prefix: str) -> int:
    """How many numbered items `prefix.0`, `prefix.1`, ... the names hold."""
    return len({m[1] for m in (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in tensors) if m})


def check_names(source: Path, expected: set[str], found: set[str]) -> None:
    """Raises ValueError unless both are equal, naming the file and the first missing and unknown tensors."""
    problems = [
        f"{word} tensors: {some(names)}"
        for word, names in (("missing", sorted(expected - found)), ("unknown", sorted(found - expected)))
        if names
    ]
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")


# ----------------------------------------------------------------------------------------------------------
# Writing


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; makes the folder. Tensors may be on any device, in any memory format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{path}: cannot be written ({error})") from error
