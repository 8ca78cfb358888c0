"""Files and folders that appear whole or not at all.

A file grows under a hidden name beside its place and takes it when complete; whatever goes wrong before, an existing
file is untouched and nothing is left behind. Only a process that is killed leaves its hidden file, for the next writer
in that folder to remove: a living one holds a lock on its own, which the system releases whatever ends it. The same
holds for folders, which take one step more: an old folder is moved aside, under a name that the next writer of the
same folder finds again, until the new one is in its place.
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

__all__ = ["Output", "replacing", "replacing_folder"]

_PREFIX, _FILE, _FOLDER, _ASIDE = ".localdepth-", ".tmp", ".tmp.d", ".old"


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


@contextmanager
def replacing_folder(path: Path, is_of_this_kind: Callable[[Path], bool]) -> Iterator[Path]:
    """The folder that the block is given to fill takes the place of ``path``, and its mode, when the block ends well.

    Folders on the way to it are made. Between moving an old folder aside and the new one in there is a moment with
    neither; after a process that was killed in it, the next writer of ``path`` begins by putting the old one back.

    Args:
        is_of_this_kind: whether an existing folder with something in it may be replaced; what it raises passes.
    Raises:
        StorageError: the folder cannot be made, and what was there is as it was; what the block raises passes.
    """
    target = Path(os.path.realpath(path))
    with _storage(path):
        _settle(target)
        if target.exists() and not target.is_dir():
            raise StorageError(f"{path} is a file; name the folder to write")
        if target.exists() and target.samefile(os.curdir):
            raise StorageError(f"{path} is the current folder, which cannot be replaced; name another one")
        if target.exists() and any(target.iterdir()) and not is_of_this_kind(target):
            raise StorageError(f"{path} holds something else and would be lost; name another folder, or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        temporary, lock = _create_folder(target.parent)
    try:
        with _storage(path):
            if target.exists():
                shutil.copymode(target, temporary)
        try:
            yield temporary
        except StorageError as error:  # of a file in it, whose hidden place means nothing to people
            raise StorageError(str(error).replace(str(temporary), str(path))) from error
        with _storage(path):
            _swap(temporary, target)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target`` and remove what was there."""
    if target.exists():
        target.rename(_aside(target))
    try:
        new.rename(target)
    finally:
        _settle(target)


def _settle(target: Path) -> None:
    """Remove what was moved aside for ``target``; where nothing has taken its place, put it back."""
    aside = _aside(target)
    if not aside.is_dir():
        return
    if not target.exists():
        aside.rename(target)
        return
    abandoned = _hidden(target.parent, _FOLDER)  # so that what lies aside is always whole
    aside.rename(abandoned)
    shutil.rmtree(abandoned, ignore_errors=True)


def _aside(target: Path) -> Path:
    """Where a folder waits while its place is taken."""
    return target.parent / f"{_PREFIX}{target.name}{_ASIDE}"


def _hidden(folder: Path, suffix: str) -> Path:
    return folder / f"{_PREFIX}{secrets.token_hex(6)}{suffix}"


def _create(folder: Path) -> tuple[io.FileIO, Path]:
    while True:
        path = _hidden(folder, _FILE)
        file = io.FileIO(path, "xb")
        if sys.platform == "win32":
            return file, path
        with suppress(OSError):  # a file system without locks, where nobody can lock and so nobody removes it
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else somebody took it for abandoned before it was locked
            return file, path
        file.close()


def _create_folder(folder: Path) -> tuple[Path, int | None]:
    """An empty hidden folder and its lock, None where folders cannot be locked."""
    while True:
        path = _hidden(folder, _FOLDER)
        path.mkdir()
        if sys.platform == "win32":
            return path, None
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # somebody took it for abandoned before it was locked
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*{_FILE}"):
        with suppress(OSError):  # its owner lives, or it is not ours to remove
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            if sys.platform == "win32":
                path.unlink()
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
    for path in folder.glob(f"{_PREFIX}*{_FOLDER}") if sys.platform != "win32" else ():
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Failures of the file system as ours."""
    try:
        yield
    except OSError as error:
        full = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there")
        remedy = {**full, errno.ENOENT: "make its folder first"}.get(error.errno or 0, "name another place")
        raise StorageError(f"{path} cannot be written: {error.strerror or error}; {remedy}") from error
