"""Importance: how strongly each input of each matrix is excited when a model reads text, over all its passes.

Quantising with it spends a block's accuracy on the columns that matter: an error in column j reaches the output times
the input j, so the mean square of that input is its weight (llama.cpp calls this an importance matrix). The core's
inputs change from pass to pass, so a model is run at every depth it will be used at.

A file of it is safetensors: one float32 vector for each matrix under the matrix's name, and where they come from in
the metadata. The format checks its own length, so half a file is never taken for a whole one.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.errors import ConfigError, ModelFileError
from localdepth.gguf import read
from localdepth.model import Model
from localdepth.prompt import PromptReader
from localdepth_export.sample import Sample, limits_for, windows
from localdepth_train.output import replacing

__all__ = ["Importance", "collect"]

_FORMAT = "localdepth importance 1"


@dataclass(frozen=True, slots=True)
class Importance:
    """Importance of the columns of a model's matrices.

    Attributes:
        columns: matrix name -> mean square of each of its inputs, [n_in] float32. Matrices it lacks, such as an
            embedding that is only looked up, are rounded plainly.
        origin: which text, model and depths it was collected from, in a line that tells it from others.
    Raises:
        ConfigError: numbers that no mean square can be.
    """

    columns: Mapping[str, F32]
    origin: str

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if values.dtype != np.float32 or values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
                raise ConfigError(f"the importance of {name} is no list of finite mean squares; collect it again")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a file.

        Raises:
            StorageError: the file cannot be written.
        """
        with replacing(Path(path), _is_importance) as output:
            output.append(save(dict(self.columns), {"format": _FORMAT, "origin": self.origin}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Importance":
        """Read such a file.

        Raises:
            ModelFileError: missing, damaged, of another kind, or with numbers no mean square can be.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise ModelFileError(f"cannot read importance from {path}: {error}; collect it again") from error
        if about.get("format") != _FORMAT or "origin" not in about:
            raise ModelFileError(f"{path} holds no importance; make it with: localdepth export importance")
        try:
            return cls(columns, about["origin"])
        except ConfigError as error:
            raise ModelFileError(f"{path}: {error}") from None

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if it cannot belong to such a model."""
        matrices = {name: shape[1] for name, shape in config.tensors().items() if len(shape) > 1}
        for name, values in self.columns.items():
            if len(values) != (n_in := matrices.get(name, 0)):
                raise ConfigError(
                    f"the importance is another model's: {len(values)} columns for {name}, which has {n_in} here; "
                    "collect it from a file of this model"
                )


def _is_importance(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (OSError, SafetensorError):
        return False


def collect(
    file: str | os.PathLike[str],
    sample: Sample,
    *,
    depths: Sequence[int] | None = None,
    max_tokens: int = 16_384,
    on_progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Run a model file over text and average the squares of what enters each matrix.

    Args:
        file: a model file, best one that is hardly quantised (F32, BF16 or Q8_0).
        sample: a text, cut into windows, or windows of token ids.
        depths: passes to run each window at; None is the model's default depth.
        max_tokens: positions to run at most.
        on_progress: told after each run of a window how many are done, and how many there are.
    Raises:
        ModelFileError: the file cannot be used.
        ConfigError: nothing to run, or a text for a file without tokenizer.
        DepthError: a depth outside the measuring range.
        MissingExtra: ggml's library is not installed.
    """
    with read(file) as opened:
        config = opened.config
        ran = sorted({config.check_depth(d, measure=True) for d in depths}) if depths else [config.default_depth]
        cut = windows(sample, opened, max_tokens)
        engine = GgmlEngine(opened, limits_for(cut, ran), importance=True)
    with Model(engine, PromptReader(None, config.n_vocab)) as model:
        runs = [(window, depth) for window in cut for depth in ran]
        for done, (window, depth) in enumerate(runs, 1):
            model.logits(window, depth=depth)
            if on_progress:
                on_progress(done, len(runs))
        columns = engine.importance()
    at = ", ".join(map(str, ran))
    return Importance(
        columns, f"{sum(map(len, cut))} positions of {opened.path.name} at depths {at}, sha256 {_digest(columns)}"
    )


def _digest(columns: Mapping[str, F32]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(columns.items()):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]
