"""Checkpoint directories: the only place that knows the tensor names of Hugging Face files.

Reads the published Huginn and retrofit checkpoints (``model_type`` "huginn_raven") and our own layout
(``model_type`` "localdepth": ``config.json`` with the fields of ``ModelConfig`` and canonical tensor names),
sharded or not, in float32, float16 or bfloat16. Tensors are read one at a time and torch is not needed.

Source of the published names and semantics: seal-rg/recurrent-pretraining and
mcleish7/retrofitting-recurrence, both Apache-2.0.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs to read it
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from localdepth.config import ModelConfig
from localdepth.errors import CheckpointError, ConfigError, StorageError
from localdepth_train.layouts import FORMAT_VERSION, recognise, some

__all__ = ["Checkpoint", "save"]

_TEXTS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "README.md")
_TIE_ROWS = 4096  # rows compared at a time


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as it lies on disk; ``dtype`` in safetensors' words."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A checked checkpoint directory; reads one tensor at a time under our names.

    Attributes:
        path: the directory.
    Raises:
        CheckpointError: for a missing, incomplete, foreign or contradictory directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.path.isdir(self.path):
            raise CheckpointError(f"{self.path} is not a directory; pass the folder that holds config.json")
        record = _read_json(self.path / "config.json")
        self._tensors = {name: stored for file in _shards(self.path) for name, stored in _contents(file)}
        self._layout = recognise(record, {name: self.shape(name) for name in self._tensors}, self.path)
        self._check_shapes()
        self._check_tie()

    @property
    def kind(self) -> str:
        """What was recognised, for people: "Huginn", "retrofit OLMo-2", ..."""
        return self._layout.kind

    @property
    def config(self) -> ModelConfig:
        """The model it holds."""
        return self._layout.config

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor under our name, widened to float32 (exact for f16 and bf16), C-contiguous."""
        part = self._layout.parts[name]
        rows, cols = slice(*part.rows) if part.rows else slice(None), slice(*part.cols) if part.cols else ...
        with self._opened(part.name) as source:
            raw = source[part.index].reshape(-1) if part.index is not None else source[rows, cols]
        return np.ascontiguousarray(raw, dtype=np.float32)

    def text(self, name: str) -> str | None:
        """Contents of a text file that goes with the weights, or None where the directory has none of that name."""
        assert name in _TEXTS, f"one of {_TEXTS}"
        file = self.path / name
        return _read_text(file) if file.is_file() else None

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of all tensors in the directory, as stored."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, under its stored name."""
        return self._tensors[name].shape

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """A stored tensor, to be sliced. Its file is mapped only meanwhile: pages read do not pile up in memory."""
        file = self._tensors[name].file
        try:
            with safe_open(file, framework="numpy") as handle:
                yield handle.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} in {file}: {error}; download it again") from error

    def _check_shapes(self) -> None:
        for name, wanted in self._layout.stored_shapes().items():
            got, dtype = self.shape(name), self._tensors[name].dtype
            if dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(f"{name} in {self.path} is stored as {dtype}; we read F32, F16 and BF16")
            # a packed bias [2, 1, H, D] is compared as [2, H * D]
            flat = (got[0], math.prod(got[1:])) if len(got) > len(wanted) else got
            if flat != wanted:
                raise CheckpointError(
                    f"{name} in {self.path} has shape {list(got)} where config.json implies {list(wanted)}; "
                    "config and weights belong to different models"
                )

    def _check_tie(self) -> None:
        """A tied model may store its head again; a different head would be silently lost."""
        if not self.config.tied_head or "lm_head.weight" not in self._tensors:
            return
        embed_name, n = self._layout.parts["token_embd.weight"].name, self.config.n_vocab
        blocks = (slice(i, min(i + _TIE_ROWS, n)) for i in range(0, n, _TIE_ROWS))
        with self._opened("lm_head.weight") as head, self._opened(embed_name) as embed:
            same = self.shape("lm_head.weight") == self.shape(embed_name) and all(
                np.array_equal(head[rows], embed[rows]) for rows in blocks
            )
        if not same:
            raise CheckpointError(
                f"{self.path} says its head is tied, but lm_head.weight differs from the embedding; "
                "set tie_embeddings to false in config.json if the separate head is meant"
            )


def _shards(path: Path) -> list[Path]:
    """The files that hold the weights."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of file names; download it again")
        files = sorted(set(weight_map.values()))
        if outside := [name for name in files if Path(name).name != name]:
            raise CheckpointError(f"{index} points outside its folder: {outside[0]!r}")
    elif (path / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} has no model.safetensors or model.safetensors.index.json (found {found}); "
            "pickled .bin weights are not read, convert them to safetensors"
        )
    return [path / name for name in files]


def _contents(file: Path) -> list[tuple[str, _Stored]]:
    """Name, shape and element type of every tensor in a file."""
    try:
        with safe_open(file, framework="numpy") as handle:
            slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118  not a dict
            return [(name, _Stored(file, tuple(s.get_shape()), str(s.get_dtype()))) for name, s in slices]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; download it again") from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(record).__name__}")
    return record


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, npt.NDArray[Any]],
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint in our own layout; ``config.json`` comes last, so a partial folder never loads.

    Args:
        tensors: canonical name -> array of the shape in ``config.tensors()``, float32, float16 or bfloat16.
        files: further text files by name, such as ``tokenizer.json``.
    Raises:
        ConfigError: when names or shapes differ from the config.
        StorageError: when the folder cannot be written.
    """
    expected = config.tensors()
    got = {name: tuple(array.shape) for name, array in tensors.items()}
    if got != expected:
        wrong = sorted(name for name in set(got) | set(expected) if got.get(name) != expected.get(name))
        raise ConfigError(f"tensors do not fit the config: {some(wrong)}")
    folder = Path(path)
    record = {"model_type": "localdepth", "format_version": FORMAT_VERSION, **config.to_dict()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, folder / "model.safetensors")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {folder}: {error}") from error
    return folder
