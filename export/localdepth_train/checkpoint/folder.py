"""Checkpoint directories, read and written: the only place where foreign tensor names are used.

Reads the published Huginn and retrofit checkpoints (``model_type`` "huginn_raven"), our own layout (``model_type``
"localdepth": ``config.json`` with the fields of ``ModelConfig`` and canonical tensor names) and, where asked to, plain
models, sharded or not, in float32, float16 or bfloat16. Writes our own layout and that of the published retrofits.
Tensors are read and written one at a time and torch is not needed.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from localdepth.config import ModelConfig
from localdepth.errors import CheckpointError, ConfigError
from localdepth_train.checkpoint.card import CARD
from localdepth_train.checkpoint.layouts import LayoutName, layout_of, recognise, record_of
from localdepth_train.checkpoint.parts import Layout, Part
from localdepth_train.checkpoint.records import one_of
from localdepth_train.checkpoint.safetensors_file import DTYPES, Pieces, write_safetensors
from localdepth_train.output import replacing, replacing_folder

__all__ = ["CARRIED", "Checkpoint", "Unread", "rewrite", "save"]

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CARRIED = (  # what goes with the weights wherever they go
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
_TIE_ROWS = 4096  # rows compared at a time


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor that is read, or made, when numpy asks for it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], npt.NDArray[Any]]

    def __array__(self, dtype: None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.read()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as it lies in a file; ``dtype`` in safetensors' words."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


Tensor = npt.NDArray[Any] | Unread
Recognise = Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]], Path], Layout]


class Checkpoint:
    """A checked checkpoint directory; reads one tensor at a time under our names.

    Attributes:
        path: the directory.
        record: its ``config.json``.
    Args:
        recognise: which kinds of models are meant; ``plain.recognise_plain`` for the bases of retrofits.
    Raises:
        CheckpointError: for a missing, incomplete, foreign or contradictory directory.
    """

    def __init__(self, path: str | os.PathLike[str], recognise: Recognise = recognise) -> None:
        self.path = Path(path)
        _check_folder(self.path)
        self.record = _read_json(self.path / _CONFIG)
        self._entries = _entries(self.path)
        self._layout = recognise(self.record, {name: self.shape(name) for name in self._entries}, self.path)
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
        return np.ascontiguousarray(self._raw(self._layout.parts[name]), dtype=np.float32)

    def unread(self, name: str) -> Unread:
        """One tensor under our name, to be read later, in the type it is stored in."""
        part = self._layout.parts[name]
        dtype = DTYPES[self._entries[part.name].dtype]
        return Unread(self.config.tensors()[name], dtype, lambda: self._raw(part))

    def _raw(self, part: Part) -> npt.NDArray[Any]:
        rows, cols = slice(*part.rows) if part.rows else slice(None), slice(*part.cols) if part.cols else ...
        with self._opened(part.name) as source:
            raw: npt.NDArray[Any] = source[part.index].reshape(-1) if part.index is not None else source[rows, cols]
        return raw

    def carried(self) -> dict[str, bytes]:
        """The files that go with the weights wherever they go: tokenizer, generation settings, licence."""
        return {name: content for name in CARRIED if (content := self._content(name)) is not None}

    def card(self) -> bytes:
        """The model card; empty where the directory has none."""
        return self._content(CARD) or b""

    def text(self, name: str) -> str | None:
        """Contents of a text file that goes with the weights, or None where the directory has none of that name."""
        assert name in CARRIED, f"{name} is none of {CARRIED}"
        file = self.path / name
        return _read_text(file) if file.is_file() else None

    def settings(self, name: str) -> dict[str, Any]:
        """The record in a JSON file that goes with the weights; empty where the directory has none of that name.

        Raises:
            CheckpointError: it holds something else.
        """
        assert name in CARRIED, f"{name} is none of {CARRIED}"
        file = self.path / name
        return _read_json(file) if file.is_file() else {}

    def _content(self, name: str) -> bytes | None:
        file = self.path / name
        return _read_bytes(file) if file.is_file() else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, under its stored name."""
        return self._entries[name].shape

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """A stored tensor, to be sliced. Its file is mapped only meanwhile: pages read do not pile up in memory."""
        file = self._entries[name].file
        try:
            with safe_open(file, framework="numpy") as handle:
                yield handle.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} in {file}: {error}; download it again") from error

    def _check_shapes(self) -> None:
        for name, wanted in self._layout.stored_shapes().items():
            got, dtype = self.shape(name), self._entries[name].dtype
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{name} in {self.path} is stored as {dtype}; convert it to one of {', '.join(DTYPES)}"
                )
            # a packed bias [2, 1, H, D] is compared as [2, H * D]
            flat = (got[0], math.prod(got[1:])) if len(got) > len(wanted) else got
            if flat != wanted:
                raise CheckpointError(
                    f"{name} in {self.path} has shape {list(got)} where config.json implies {list(wanted)}; "
                    "config and weights belong to different models"
                )

    def _check_tie(self) -> None:
        """A tied model may store its head again; a different head would be silently lost."""
        if not self.config.tied_head or "lm_head.weight" not in self._entries:
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
                "set tie_embeddings, or tie_word_embeddings, to false in config.json if the separate head is meant"
            )


def _check_folder(path: Path) -> None:
    """Refuse what is no checkpoint at first sight, and say where one is."""
    remedy = f"pass the folder that holds {_CONFIG}"
    if not os.path.isdir(path):
        fault = "is not a directory" if os.path.exists(path) else "does not exist"
        raise CheckpointError(f"{path} {fault}; {remedy}")
    if not (path / _CONFIG).exists():
        of_a_run = path / "checkpoint"
        where = of_a_run if (of_a_run / _CONFIG).exists() else "a training run has it in checkpoint/ once it ends"
        raise CheckpointError(f"{path} has no {_CONFIG}; {remedy}: {where}")


def _shards(path: Path) -> list[Path]:
    """The files that hold the weights."""
    index = path / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of file names; download it again")
        files = sorted(set(weight_map.values()))
        if outside := [name for name in files if Path(name).name != name]:
            raise CheckpointError(f"{index} points outside its folder: {outside[0]!r}")
    elif (path / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    else:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} has no {_WEIGHTS} or {_INDEX} (found {found}); "
            "pickled .bin weights are not read, convert them to safetensors"
        )
    return [path / name for name in files]


def _entries(path: Path) -> dict[str, _Entry]:
    """Every tensor in a directory, by the name it is stored under."""
    entries: dict[str, _Entry] = {}
    for file in _shards(path):
        for name, entry in _contents(file):
            if name in entries:
                raise CheckpointError(
                    f"{name} is in {entries[name].file} and in {file.name}; keep the one that {_INDEX} names"
                )
            entries[name] = entry
    return entries


def _contents(file: Path) -> list[tuple[str, _Entry]]:
    """Name, shape and element type of every tensor in a file."""
    try:
        with safe_open(file, framework="numpy") as handle:
            slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118  not a dict
            return [(name, _Entry(file, tuple(s.get_shape()), str(s.get_dtype()))) for name, s in slices]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; download it again") from error


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}; make it readable, or download it again") from error


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: {error}; download it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}; download it again") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(record).__name__}; download it again")
    return record


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str | bytes] | None = None,
    *,
    layout: str = LayoutName.OURS,
    judge: Callable[[Path], None] = lambda folder: None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint that appears whole or not at all; ``Unread`` tensors are read one at a time.

    A folder is replaced if it holds a checkpoint of the same layout and nothing else. The published layout has its own
    tensor for the head: that of a tied model is written as a copy of the embedding.

    Args:
        tensors: canonical name -> array of the shape in ``config.tensors()``, float32, float16 or bfloat16.
        files: further files by name, such as ``tokenizer.json``.
        layout: "ours" or "published".
        judge: is shown the checkpoint that would be replaced, and raises what it has against that.
        on_progress: told after each stored tensor how many bytes are written, and how many there are.
    Raises:
        ConfigError: names, shapes or types differ from the config, or the layout cannot hold this model.
        StorageError: the folder cannot be written, or holds something else; what ``judge`` raises passes.
    """
    written = one_of("layout", layout, LayoutName)
    _check_fit(config, tensors)
    if written is LayoutName.PUBLISHED and config.tied_head:
        config, tensors = replace(config, tied_head=False), {**tensors, "output.weight": tensors["token_embd.weight"]}
    record = record_of(config, written, str(tensors["token_embd.weight"].dtype))
    prepared = _prepared(layout_of(config, written), tensors)
    n_bytes, done = sum(pieces.n_bytes for pieces in prepared.values()), 0

    def count(name: str) -> None:
        nonlocal done
        done += prepared[name].n_bytes
        if on_progress:
            on_progress(done, n_bytes)

    def may_replace(folder: Path) -> bool:
        if is_alike := _is_checkpoint(folder, written):
            judge(folder)
        return is_alike

    with replacing_folder(Path(path), may_replace) as folder:
        write_safetensors(folder / _WEIGHTS, prepared, count)
        for name, content in {**(files or {}), _CONFIG: json.dumps(record, indent=2) + "\n"}.items():
            with replacing(folder / name) as output:
                output.append(content.encode() if isinstance(content, str) else content)
    return Path(path)


def rewrite(source: str | os.PathLike[str], out: str | os.PathLike[str], *, layout: str) -> Path:
    """Write a looped checkpoint in another layout, its weights bit for bit as they are.

    There and back is no exact round trip of the config. Ours keeps no leftovers of published files. The published
    layout has no place for these fields, which read back from it as follows:

    - ``tied_head``: False, the head is written out.
    - ``trained_mean_depth``: ``default_depth``, with which it shares one number.
    - ``max_depth``: twice ``default_depth``, and at least 64.
    - ``auto_min_depth``: 2, or 1 where ``default_depth`` is 1.
    - ``state_init``: normal where ``state_std`` is above 0, else zeros.

    Raises:
        CheckpointError: ``source`` cannot be used.
        ConfigError, StorageError: as ``save``.
    """
    opened = Checkpoint(source)
    tensors = {name: opened.unread(name) for name in opened.config.tensors()}
    files: dict[str, str | bytes] = {**opened.carried()}
    if card := opened.card():
        files[CARD] = card
    return save(out, opened.config, tensors, files, layout=layout)


def _check_fit(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    expected = config.tensors()
    got = {name: tuple(array.shape) for name, array in tensors.items()}
    for name in sorted({*got, *expected}):
        if got.get(name) != expected.get(name):
            given, implied = (str(list(shapes[name])) if name in shapes else "none" for shapes in (got, expected))
            raise ConfigError(
                f"{name} has shape {given} where the config implies {implied}; give the tensors that config.tensors() "
                "names"
            )


def _prepared(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Pieces]:
    """The tensors of a file, each of which waits for its parts to be read."""
    prepared, packed = {}, layout.packed()
    for name, shape in layout.stored_shapes().items():
        parts = packed[name]
        types = {np.dtype(tensors[part].dtype) for part in parts}
        if len(types) > 1:
            raise ConfigError(f"{', '.join(parts)} become one tensor and have different types; write our own layout")
        side_by_side = layout.parts[parts[0]].cols is not None
        prepared[name] = Pieces(shape, types.pop(), partial(_pieces, [tensors[part] for part in parts], side_by_side))
    return prepared


def _pieces(parts: Sequence[Tensor], side_by_side: bool) -> Iterator[npt.NDArray[Any]]:
    if side_by_side:
        yield np.concatenate([np.asarray(part) for part in parts], axis=1)
    else:
        yield from (np.asarray(part) for part in parts)


def _is_checkpoint(folder: Path, layout: LayoutName) -> bool:
    """Whether a folder holds a checkpoint of this layout and nothing else, as far as names tell."""
    try:
        record = _read_json(folder / _CONFIG)
    except CheckpointError:
        return False
    return record.get("model_type") == layout.model_type and {path.name for path in folder.iterdir()} <= {
        _CONFIG,
        _WEIGHTS,
        CARD,
        *CARRIED,
    }
