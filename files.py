"""Writing files so that an interruption never leaves half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    The temporary name keeps the suffix, from which writers such as Pillow tell the format.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    temporary.unlink(missing_ok=True)  # a link that somebody laid there would be followed
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name too
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The permissions that new files are to go without; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
