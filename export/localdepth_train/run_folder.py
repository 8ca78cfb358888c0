"""The folder of one training run.

``state.pt`` is all it takes to go on, replaced in one step, the one before it kept as ``state.previous.pt``;
``log.jsonl`` has one record a line; ``checkpoint/`` is the model in our own layout, written at the end.
"""

import json
import logging
import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from localdepth.errors import StorageError, TrainError

__all__ = ["RunFolder"]

log = logging.getLogger(__name__)

_KEYS = {"recipe", "step", "tokens", "flops", "loss", "model", "optimizers", "source"}


class RunFolder:
    """Reads and writes one run's folder, which is made if need be.

    Args:
        writes: this process does; others of the same run only read.
    Raises:
        StorageError: when it cannot be made or written.
        TrainError: when what it holds cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path, self._writes = Path(path), writes
        self._state, self._previous = self.path / "state.pt", self.path / "state.previous.pt"
        self._log = self.path / "log.jsonl"
        self._begun = time.monotonic(), time.process_time()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the run folder {self.path}: {error}") from error

    @property
    def checkpoint(self) -> Path:
        """Where the finished model goes."""
        return self.path / "checkpoint"

    def read_state(self) -> dict[str, Any] | None:
        """What the last ``write_state`` was given, or None in a new folder.

        Where that cannot be read the one before it is taken, and the reader is told.
        """
        saved = [file for file in (self._state, self._previous) if file.exists()]
        for file in saved:
            try:
                return _read(file)
            except TrainError as error:
                if file is saved[-1]:
                    raise
                log.warning("%s; going on from the state saved before it", error)
        return None

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state; a kill or a full disk leaves the old one or the new one."""
        if not self._writes:
            return
        partial = self.path / "state.pt.partial"
        try:
            with partial.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            if self._state.exists():
                os.replace(self._state, self._previous)
            os.replace(partial, self._state)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            partial.unlink(missing_ok=True)
            raise StorageError(
                f"cannot save the run in {self.path}: {error}; the state saved before is kept, make room and go on"
            ) from error

    def rewind_log(self, step: int) -> None:
        """Drop what a killed run logged after ``step``."""
        if not self._writes:
            return
        try:
            text = self._log.read_text(encoding="utf-8") if self._log.exists() else ""
            lines = text[: text.rfind("\n") + 1].splitlines()  # a killed run may leave a torn last line
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainError(f"{self._log} holds a line that is no record: {error}; remove the folder") from error
        self._log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record, with wall and processor time since this object was made."""
        if not self._writes:
            return
        wall, cpu = self._begun
        times = {"seconds": round(time.monotonic() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, **times}) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self._log}: {error}; the last saved state is kept") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise TrainError(f"cannot read {file}: {error}; remove the folder to start over") from error
    if not isinstance(state, dict) or not set(state) >= _KEYS:
        raise TrainError(f"{file} is not the state of a run; remove the folder to start over")
    return state
