"""Files: written so that an interruption never leaves half of one, JSON, and folders that one process has alone."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

JSON_MAX = 2**24  # bytes; the index of a sharded model has some 100,000


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    The temporary name keeps the suffix, from which writers such as Pillow tell the format.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    temporary.unlink(missing_ok=True)  # a link that somebody laid there would be followed
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
            os.fsync(folder)  # the new name too
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a file system that cannot
                raise
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the folder for this process, making it if need be. Raises ValueError if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:  # which empties nothing, if it is a link
        try:
            # A POSIX lock dies with its process; one by flock would live on in the reading processes.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another run is writing there; wait for it, or name another folder") from None
        except OSError:  # a file system without locks, as on some clusters
            pass
        yield


def require_file(path: Path) -> None:
    """Raises ValueError on a folder, a device, or a named pipe, which would have us wait for ever."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ValueError if it is none."""
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


def differences(was: dict, wanted: dict) -> str:
    """What of `wanted` was otherwise, for messages: "steps 10 is now 50, ..."; empty if nothing."""
    return ", ".join(f"{key} {was.get(key)} is now {value}" for key, value in wanted.items() if was.get(key) != value)
