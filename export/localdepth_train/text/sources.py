"""Where documents come from: files of three formats, and datasets of the hub.

A source consists of parts (files, or shards of a dataset). A part is read from front to back without ever being in
memory as a whole, and reading can begin after any number of its rows. A damaged file always stops the reading:
nobody could count what is lost.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from localdepth.errors import MissingExtra, TrainError, install_line
from localdepth_train.text.documents import BadRow, Document, document_from
from localdepth_train.text.readers import COMPRESSIONS, read_jsonl, read_parquet, read_text
from localdepth_train.text.settings import Format, SourceRecipe

__all__ = ["Source", "open_source"]

_READERS = {Format.JSONL: read_jsonl, Format.PARQUET: read_parquet, Format.TEXT: read_text}
_KINDS = {".jsonl": Format.JSONL, ".ndjson": Format.JSONL, ".parquet": Format.PARQUET, ".txt": Format.TEXT}
_ENDINGS = {ending + packed: kind for ending, kind in _KINDS.items() for packed in ("", *COMPRESSIONS)}
_SAVED = ("state.json", "dataset_dict.json")  # one of these lies in a folder that ``save_to_disk`` wrote


class Source(Protocol):
    """Documents in numbered parts.

    Attributes:
        n_parts: how many files or shards there are.
        identity: what must be equal for two readings to give the same rows, as JSON, by what to call it.
    """

    n_parts: int
    identity: dict[str, Any]

    def read(self, part: int, skip: int) -> Iterator[Document | BadRow]:
        """Rows of one part in order, without the first ``skip``.

        Raises:
            TrainError: when the part cannot be read to its end.
        """


def open_source(recipe: SourceRecipe) -> Source:
    """Find what a recipe names.

    Raises:
        TrainError: when there is nothing at that path, or it is of no kind we read.
        MissingExtra: when the library that reads it is not installed.
    """
    return _Dataset(recipe) if recipe.format is Format.DATASETS else _Files(recipe)


class _Files:
    """Files of one format, a part each."""

    def __init__(self, recipe: SourceRecipe) -> None:
        self._recipe = recipe
        self._format, self._paths = _find(recipe)
        self.n_parts = len(self._paths)
        self.identity = {
            "names of files": [path.name for path in self._paths],
            "sizes of files": [path.stat().st_size for path in self._paths],
        }

    def read(self, part: int, skip: int) -> Iterator[Document | BadRow]:
        return _READERS[self._format](self._paths[part], self._recipe, skip)


class _Dataset:
    """A dataset of the hub, or a folder the library ``datasets`` opens, streamed; a part is a shard."""

    def __init__(self, recipe: SourceRecipe) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtra(f"{recipe.path} needs the package datasets: {install_line('train')}") from error
        path = os.path.expanduser(recipe.path)
        self._recipe = recipe
        self._errors = (OSError, ValueError, datasets.exceptions.DatasetsError)
        try:
            if any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
                whole = _saved(path, recipe.split)
            else:
                whole = datasets.load_dataset(path, recipe.subset or None, split=recipe.split, streaming=True)
            self._rows = whole.select_columns(list(recipe.columns))
        except self._errors as error:
            raise TrainError(f"cannot open the dataset {recipe.path!r}: {error}") from error
        self.n_parts = self._rows.num_shards
        self.identity = {"dataset": [recipe.path, recipe.subset, recipe.split], "number of shards": self.n_parts}

    def read(self, part: int, skip: int) -> Iterator[Document | BadRow]:
        name = f"{self._recipe.path}, {self._recipe.split} shard {part + 1} of {self.n_parts}"
        rows = self._rows.shard(num_shards=self.n_parts, index=part).skip(skip)
        try:
            for number, record in enumerate(rows, skip + 1):
                yield document_from(record, self._recipe, f"{name}, row {number}")
        except self._errors as error:
            raise TrainError(f"cannot read {name}: {error}") from error


def _saved(folder: str, split: str) -> Any:
    """What ``save_to_disk`` wrote, as a stream."""
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(folder)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"it has no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset()


def _find(recipe: SourceRecipe) -> tuple[Format, Sequence[Path]]:
    """The files a path stands for, in the order of their names, and their format."""
    place = os.path.expanduser(recipe.path)
    folder = os.path.isdir(place)
    if folder:
        found = [path for path in Path(place).rglob("[!.]*") if path.is_file()]
    else:
        names = [place] if os.path.isfile(place) else glob.glob(place, recursive=True)
        found = [Path(name) for name in names if os.path.isfile(name)]
    formats = {path: _format(path) for path in sorted(found, key=Path.as_posix)}
    if folder:  # which may hold a README as well
        formats = {path: kind for path, kind in formats.items() if kind and recipe.format in (kind, Format.AUTO)}
    elif recipe.format is not Format.AUTO:
        formats = dict.fromkeys(formats, recipe.format)
    if not formats:
        raise TrainError(
            f"no text found at {recipe.path!r}; give a file, a glob or a folder of .jsonl, .txt or .parquet "
            'files, or for a dataset of the hub format = "datasets"'
        )
    if unknown := next((path for path, kind in formats.items() if kind is None), None):
        raise TrainError(
            f"the ending of {unknown} says nothing about its format; rename it to .jsonl, .txt or .parquet, or say "
            f"which in a recipe with format = {' or '.join(repr(str(kind)) for kind in _READERS)}"
        )
    kinds = sorted({kind for kind in formats.values() if kind})
    if len(kinds) > 1:
        base = os.path.join(recipe.path, "**") if folder else os.path.dirname(recipe.path)
        globs = {kind: repr(os.path.join(base, f"*{_ending(path)}")) for path, kind in formats.items()}
        raise TrainError(
            f"{recipe.path!r} holds files of several formats ({', '.join(kinds)}); name those of one: "
            f"{' or '.join(globs[kind] for kind in kinds)}"
        )
    return kinds[0], list(formats)


def _format(path: Path) -> Format | None:
    """What the ending says, compressed or not."""
    return _ENDINGS.get(_ending(path))


def _ending(path: Path) -> str:
    """The part of a name that says the format; empty where none does."""
    return next((ending for ending in _ENDINGS if path.name.endswith(ending)), "")
