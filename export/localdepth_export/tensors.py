"""Tensors on their way from a checkpoint into a file: read one by one, checked, counted."""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.errors import CheckpointError
from localdepth_train.checkpoint import Checkpoint

__all__ = ["Progress", "counted", "read_finite"]

Progress = Callable[[int, int], None]  # is told how many of the model's numbers are done, and how many there are
_T = TypeVar("_T")


def read_finite(source: Checkpoint, name: str) -> F32:
    """One tensor of a checkpoint.

    Raises:
        CheckpointError: it holds values that are not finite, or cannot be read.
    """
    tensor = source.read(name)
    if not (np.isfinite(tensor.max()) and np.isfinite(tensor.min())):  # without a copy
        raise CheckpointError(f"{name} in {source.path} has values that are not finite; download it again")
    return tensor


def counted(work: Callable[[str], _T], config: ModelConfig, on_progress: Progress | None) -> Callable[[str], _T]:
    """The same work on tensors by name; after each ``on_progress`` is told."""
    done, shapes = 0, config.tensors()

    def count(name: str) -> _T:
        nonlocal done
        result = work(name)
        done += math.prod(shapes[name])
        if on_progress:
            on_progress(done, config.n_params)
        return result

    return count
