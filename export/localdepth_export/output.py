"""Files that appear whole or not at all.

A file grows under a hidden name beside its place and takes it when complete; whatever goes wrong before, an existing
file is untouched and nothing is left behind. Only a process that is killed leaves its hidden file, for the next writer
in that folder to remove: a living one holds a lock on its own, which the system releases whatever ends it.
"""

import errno
import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from localdepth.errors import StorageError

if sys.platform != "win32":  # there a file that somebody has open cannot be removed, which does as well
    import fcntl

__all__ = ["Output", "replacing"]

_PREFIX, _SUFFIX = ".localdepth-", ".tmp"


class Output:
    """A file in the making. Unbuffered, so that an error is raised by the write that caused it."""

    def __init__(self, file: io.FileIO, path: Path) -> None:
        self._file = file
        self._path = path

    def append(self, data: bytes | memoryview) -> None:
        """Write at the end."""
        left = memoryview(data).cast("B")
        with _storage(self._path):
            while left:
                left = left[self._file.write(left) :]

    def pad(self, alignment: int) -> None:
        """Write zeros up to a multiple of ``alignment``."""
        self.append(bytes(-self._file.tell() % alignment))

    def overwrite(self, start: int, data: bytes) -> None:
        """Write over what has been written from byte ``start`` on."""
        end = self._file.tell()
        self._file.seek(start)
        self.append(data)
        self._file.seek(end)

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        with _storage(self._path):
            os.fsync(self._file.fileno())


@contextmanager
def replacing(path: Path, is_of_this_kind: Callable[[Path], bool] = lambda path: True) -> Iterator[Output]:
    """What the block writes takes the place of ``path``, and its mode, when the block ends well.

    Args:
        is_of_this_kind: whether an existing file may be replaced; anything else there is somebody's only copy.
    Raises:
        StorageError: the file cannot be written, and is as it was.
    """
    target = Path(os.path.realpath(path))
    with _storage(path):
        if target.exists() and not target.is_file():
            raise StorageError(f"{path} is a directory or a device; name the file to write")
        if target.exists() and target.stat().st_size and not is_of_this_kind(target):
            raise StorageError(f"{path} holds something else and would be lost; name another file, or remove it first")
        _remove_abandoned(target.parent)
        file, temporary = _create(target.parent)
    try:
        with _storage(path):
            if target.exists():
                shutil.copymode(target, temporary)
        output = Output(file, path)
        yield output
        output.sync()
        if sys.platform == "win32":
            file.close()  # an open file cannot be moved there; elsewhere it stays locked until it has its name
        with _storage(path):
            temporary.replace(target)
    finally:
        file.close()
        temporary.unlink(missing_ok=True)


def _create(folder: Path) -> tuple[io.FileIO, Path]:
    while True:
        path = folder / f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}"
        file = io.FileIO(path, "xb")
        if sys.platform == "win32":
            return file, path
        with suppress(OSError):  # a file system without locks, where nobody can lock and so nobody removes it
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else somebody took it for abandoned before it was locked
            return file, path
        file.close()


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # its owner lives, or it is not ours to remove
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            if sys.platform == "win32":
                path.unlink()
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Failures of the file system as ours."""
    try:
        yield
    except OSError as error:
        full = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there")
        remedy = {**full, errno.ENOENT: "make its folder first"}.get(error.errno or 0, "name another place")
        raise StorageError(f"{path} cannot be written: {error.strerror or error}; {remedy}") from error
