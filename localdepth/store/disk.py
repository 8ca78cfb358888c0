"""Models as they lie on a disk: a GGUF file, or a folder of ONNX graphs. What differs between the two is told here.

A folder's files are those in it and below it, but for hidden ones, which file managers leave behind.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from localdepth import gguf
from localdepth.errors import StorageError
from localdepth.gguf import GgufFile
from localdepth.onnx_folder.folder import OnnxFolder
from localdepth.onnx_folder.folder import read as read_folder

__all__ = [
    "HOME",
    "Format",
    "Progress",
    "checksum",
    "digest",
    "files_of",
    "n_bytes_of",
    "n_bytes_owned",
    "open_model",
    "silent",
    "storage",
]

HOME = "LOCALDEPTH_HOME"  # environment variable: the folder that holds "models", in place of the platform's own
_CHUNK = 1 << 22

Progress = Callable[[str, int, int], None]  # what is being worked on, how much of it is done, how much there is


def silent(_what: str, _done: int, _total: int) -> None:
    """The ``Progress`` of those who do not look."""


class Format(StrEnum):
    """What a model is on the disk; after a dot, how its name ends there."""

    GGUF = "gguf"
    ONNX = "onnx"

    @property
    def in_words(self) -> str:
        """For people."""
        return {Format.GGUF: "GGUF file", Format.ONNX: "ONNX folder"}[self]

    def is_at(self, path: Path) -> bool:
        """Whether what lies there is of the right kind, as far as a look from outside tells."""
        return os.path.isfile(path) if self is Format.GGUF else os.path.isdir(path)


def open_model(path: Path) -> OnnxFolder | GgufFile:
    """Open a model file, or a folder of ONNX graphs.

    Raises:
        ModelFileError: missing, damaged, or no looped model.
    """
    return read_folder(path) if path.is_dir() else gguf.read(path)


def files_of(path: Path) -> list[Path]:
    """What a model consists of: the file itself, or the files of the folder by name."""
    if not path.is_dir():
        return [path]
    names = sorted(item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file())
    return [path / name for name in names if not name.startswith(".") and "/." not in name]


def n_bytes_of(path: Path) -> int:
    """Size of a model."""
    return sum(file.stat().st_size for file in files_of(path))


def n_bytes_owned(path: Path) -> int:
    """How many of its bytes nothing else holds: not what links point to, nor what has a second name."""
    found = [file.lstat() for file in ([path] if path.is_symlink() else files_of(path))]
    return sum(item.st_size for item in found if not stat.S_ISLNK(item.st_mode) and item.st_nlink == 1)


def checksum(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a model in hex; that of a folder is the SHA-256 of what ``sha256sum`` prints of its files by name.

    Raises:
        StorageError: it cannot be read.
    """
    if not path.is_dir():
        return digest(path, progress)
    lines = (f"{digest(file, progress)}  {file.relative_to(path).as_posix()}\n" for file in files_of(path))
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def digest(path: Path, progress: Progress = silent, name: str | None = None) -> str:
    """SHA-256 of a file, in hex; ``name`` is what to call it meanwhile.

    Raises:
        StorageError: it cannot be read.
    """
    state, done = hashlib.sha256(), 0
    with storage(path, "read"), open(path, "rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            done += len(chunk)
            progress(f"checking {name or path.name}", done, total)
    return state.hexdigest()


@contextmanager
def storage(path: Path, doing: str, setting: str = HOME) -> Iterator[None]:
    """Failures of the file system as ours.

    Args:
        doing: what was to be done with ``path``: "written", "read", "removed".
        setting: the environment variable that names another place.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space there" if full else f"check the place, or name another one in {setting}"
        raise StorageError(f"{path} cannot be {doing}: {error.strerror or error}; {remedy}") from error
