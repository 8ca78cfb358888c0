"""The folder of one training run.

``state.pt`` is all it takes to go on, replaced in one step; ``log.jsonl`` has one record a line; ``checkpoint/`` is
the model in our own layout, written at the end.
"""

import json
import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from localdepth.errors import StorageError, TrainError

__all__ = ["RunFolder"]


class RunFolder:
    """Reads and writes one run's folder, which is made if need be.

    Raises:
        StorageError: when it cannot be made or written.
        TrainError: when what it holds cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
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
        """What the last ``write_state`` was given, or None in a new folder."""
        file = self.path / "state.pt"
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise TrainError(f"cannot read {file}: {error}; remove the folder to start over") from error
        if not isinstance(state, dict) or not {"recipe", "step", "model", "optimizers", "curriculum"} <= set(state):
            raise TrainError(f"{file} is not the state of a run; remove the folder to start over")
        return state

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state; a kill leaves the old one or the new one."""
        partial = self.path / "state.pt.partial"
        try:
            torch.save(dict(state), partial)
            os.replace(partial, self.path / "state.pt")
        except OSError as error:
            raise StorageError(f"cannot save the run in {self.path}: {error}") from error

    def rewind_log(self, step: int) -> None:
        """Drop what a killed run logged after ``step``."""
        try:
            text = self._log.read_text(encoding="utf-8") if self._log.exists() else ""
            lines = text[: text.rfind("\n") + 1].splitlines()  # a killed run may leave a torn last line
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainError(f"{self._log} holds a line that is no record: {error}; remove the folder") from error
        self._log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record, with wall and processor time since this object was made."""
        wall, cpu = self._begun
        times = {"seconds": round(time.monotonic() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, **times}) + "\n")
