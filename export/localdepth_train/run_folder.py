"""The folder of one training run.

``state.pt`` is all it takes to go on, ``state.previous.pt`` the one saved before it; ``log.jsonl`` has one record a
line; ``checkpoint/`` is the model in our own layout, written at the end. Whoever writes holds the lock on ``.lock``.
"""

import json
import logging
import os
import pickle
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile, ZipFile

import torch
from filelock import FileLock, Timeout

from localdepth.errors import StorageError, TrainError

__all__ = ["RunFolder"]

log = logging.getLogger(__name__)

_CLOCKS = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
_DAMAGED = (BadZipFile, zlib.error, EOFError, pickle.UnpicklingError)
_KEYS = {"settings", "step", "tokens", "flops", "loss", "model", "optimizers", "source", *_CLOCKS}


class RunFolder:
    """Reads and writes one run's folder, which is made if need be; as a context, no other run writes there meanwhile.

    Args:
        writes: this process does; others of the same run only read.
    Raises:
        StorageError: when it cannot be made, locked or written.
        TrainError: when another run has it, or what it holds cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path, self._writes = Path(path), writes
        self._state, self._previous = self.path / "state.pt", self.path / "state.previous.pt"
        self._log, self._lock = self.path / "log.jsonl", FileLock(self.path / ".lock")
        self._is_sound = False  # state.pt, as far as this object knows
        self._begun = {name: clock() for name, clock in _CLOCKS.items()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the run folder {self.path}: {_reason(error)}; give another place"
            ) from error

    def __enter__(self) -> Self:
        try:
            if self._writes:
                self._lock.acquire(blocking=False)
        except Timeout as error:
            raise TrainError(
                f"another run is going on in {self.path}; wait until it ends, or give a new folder"
            ) from error
        except OSError as error:
            raise StorageError(
                f"cannot lock the run folder {self.path}: {_reason(error)}; give another place"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def checkpoint(self) -> Path:
        """Where the finished model goes."""
        return self.path / "checkpoint"

    def read_state(self) -> dict[str, Any] | None:
        """What the last ``write_state`` was given, or None in a new folder.

        Where that cannot be read the one before it is taken, and the reader is told.
        """
        faults: list[str] = []
        for file in self._saved:
            try:
                state = _read(file)
            except TrainError as error:
                faults.append(str(error))
                continue
            if faults and self._writes:
                log.warning("%s; going on from the state saved before it", faults[0])
            self._is_sound = file == self._state
            self._begun = {name: clock() - state[name] for name, clock in _CLOCKS.items()}
            return state
        if faults:
            raise TrainError(f"{'; '.join(faults)}; give a new folder to start over")
        if self.checkpoint.exists():
            raise TrainError(
                f"{self.path} holds the checkpoint of a finished run, which a new one would replace, but no state to "
                "go on from; give a new folder"
            )
        return None

    @property
    def ways_on(self) -> str:
        """What a run that failed here can go on from, said after another remedy; empty where nothing is saved."""
        n_saved = len(self._saved)
        here = ", or go on here from the last saved state" if n_saved else ""
        before = f"; if that fails too, remove {self._state} to go on from the one before it" if n_saved > 1 else ""
        return here + before

    @property
    def _saved(self) -> list[Path]:
        """The states there are, the last first."""
        return [file for file in (self._state, self._previous) if file.exists()]

    @property
    def _kept(self) -> str:
        return "; the state saved before is kept" if self._saved else ""

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Save ``state`` as ``state.pt``; what was there becomes ``state.previous.pt`` if it is known to be sound.

        The new one is complete before either is moved, so a kill or a full disk leaves one that can be read.
        """
        if not self._writes:
            return
        partial = self.path / "state.pt.partial"
        try:
            with partial.open("wb") as file:
                torch.save({**state, **self._times()}, file)
                file.flush()
                os.fsync(file.fileno())
            if self._is_sound and self._state.exists():
                os.replace(self._state, self._previous)
            os.replace(partial, self._state)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            partial.unlink(missing_ok=True)
            raise StorageError(
                f"cannot save the run in {self.path}: {_reason(error)}{self._kept}; put that right, and give the "
                "same command again"
            ) from error
        self._is_sound = True

    def rewind_log(self, step: int) -> None:
        """Cut off what a killed run logged after ``step``."""
        if not self._writes:
            return
        try:
            written = self._log.read_bytes() if self._log.exists() else b""
            kept = sum(map(len, self._until(step, written)))
            if kept < len(written):
                os.truncate(self._log, kept)
        except OSError as error:
            raise StorageError(
                f"cannot rewind {self._log} to step {step}: {_reason(error)}{self._kept}; make it writable"
            ) from error

    def _until(self, step: int, written: bytes) -> Iterator[bytes]:
        """The lines of a log up to ``step``; a killed run may have left half a line at the end."""
        for number, line in enumerate(written.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            try:
                is_later = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError) as error:
                raise TrainError(
                    f"{self._log}, line {number} is no record: {error!r}; remove the line{self._kept}"
                ) from error
            if is_later:
                return
            yield line

    def log(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append a record; returns it with wall and processor time of all parts of the run together."""
        timed = {**record, **self._times()}
        if not self._writes:
            return timed
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(timed) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {self._log}: {_reason(error)}{self._kept}; put that right, and give the same command "
                "again"
            ) from error
        return timed

    def _times(self) -> dict[str, float]:
        return {name: round(clock() - self._begun[name], 1) for name, clock in _CLOCKS.items()}


def _read(file: Path) -> dict[str, Any]:
    """The state in a file, its checksums compared: torch itself takes a changed number for a number.

    Raises:
        TrainError: it holds none, or was damaged.
        StorageError: this user may not read it.
    """
    try:
        with ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise BadZipFile(f"{damaged} is not what was saved")
        state: dict[str, Any] = torch.load(file, weights_only=True)
    except PermissionError as error:
        raise StorageError(f"cannot read {file}: {_reason(error)}; make it readable for this user") from error
    except (*_DAMAGED, OSError, RuntimeError, ValueError, KeyError) as error:
        raise TrainError(f"cannot read {file}: {_reason(error)}") from error
    if not isinstance(state, dict) or not set(state) >= _KEYS:
        raise TrainError(f"{file} is not a state that this version saves")
    return state


def _reason(error: BaseException) -> str:
    """In the system's words where it said something: torch puts errors of its own on top of a full disk."""
    said: BaseException | None = error
    while said is not None:
        if isinstance(said, OSError) and said.strerror:
            return said.strerror
        said = said.__context__
    return str(error).partition("\n")[0] or f"{type(error).__name__}, as of a file that was cut off"
