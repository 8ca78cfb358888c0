"""The models folder: whole models with a manifest each, and nothing half.

    <name>.gguf         a model; one dropped in by hand is listed too, as having no manifest
    <name>.onnx/        so is a model that is a folder; of two with the same name each is called by its whole file name
    <name>.gguf.json    the manifest of the model beside it: where it came from, and its checksum
    .pull/<name>/       a pull or a removal under way; what a killed one left there goes with the next
    .locks/             so that one process at a time pulls a name

A name that somebody gives is compared with the names in the folder and never joined to a path: none leads outside.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from localdepth.errors import ModelFileError, RequestError
from localdepth.store.disk import (
    HOME,
    Format,
    Progress,
    checksum,
    n_bytes_of,
    n_bytes_owned,
    open_model,
    silent,
    storage,
)

__all__ = ["DEFAULT_NAME", "Manifest", "Store", "Stored", "Verdict", "default_folder", "find", "model_name"]

DEFAULT_NAME = "default"  # what the model that comes with the package is called
_PULLS, _LOCKS = ".pull", ".locks"
_LONGEST_NAME = 100
_LARGEST_MANIFEST = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Where a stored model came from.

    Attributes:
        sha256: its ``checksum``.
        file: the file or folder of the repository it is, "." for all of it; None when it was converted from a
            checkpoint.
        quant: how its matrices are stored, as it says.
        license: of the weights; None when neither repository nor file names one.
        pulled: date and time, UTC, ISO 8601.
    """

    sha256: str
    n_bytes: int
    repo: str
    revision: str
    commit: str
    file: str | None
    quant: str
    license: str | None
    pulled: str

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """The manifest at ``path``; None where there is none that can be believed."""
        try:
            if not path.is_file() or path.stat().st_size > _LARGEST_MANIFEST:
                return None
            record = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        kinds: dict[str, Any] = {item.name: item.type for item in fields(cls)}
        if not isinstance(record, dict) or set(record) != set(kinds):
            return None
        return cls(**record) if all(isinstance(record[name], kind) for name, kind in kinds.items()) else None

    def write(self, path: Path) -> None:
        """Put it at ``path``, whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class Verdict(StrEnum):
    """What comparing a stored model with its manifest gave."""

    SOUND = "sound"
    DAMAGED = "damaged"
    NO_MANIFEST = "no manifest"  # nothing to compare with


@dataclass(frozen=True, slots=True)
class Stored:
    """A model in the folder.

    Attributes:
        name: what to call it on the command line and in ``load``.
        path: of the file, or the folder.
    """

    name: str
    path: Path
    n_bytes: int
    manifest: Manifest | None

    def verify(self, progress: Progress = silent) -> Verdict:
        """Compare size and checksum with the manifest; without one, the weights with the checksum in the model.

        Raises:
            StorageError: it cannot be read.
        """
        if self.manifest is None:
            return self._verify_weights()
        same = self.n_bytes == self.manifest.n_bytes and checksum(self.path, progress) == self.manifest.sha256
        return Verdict.SOUND if same else Verdict.DAMAGED

    def _verify_weights(self) -> Verdict:
        try:
            with open_model(self.path) as opened:
                intact = opened.is_intact()
        except ModelFileError:
            return Verdict.DAMAGED
        return {None: Verdict.NO_MANIFEST, True: Verdict.SOUND, False: Verdict.DAMAGED}[intact]


class Store:
    """A models folder; it need not exist yet.

    Args:
        folder: None is ``default_folder()``.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)

    def models(self) -> list[Stored]:
        """All models, by name; whether each can be used is for ``open_model`` to say."""
        paths = sorted(path for kind in Format for path in self.folder.glob(f"[!.]*.{kind}") if kind.is_at(path))
        n_named = Counter(path.stem for path in paths)
        found = []
        for path in paths:
            name = path.stem if n_named[path.stem] == 1 else path.name
            try:
                found.append(Stored(name, path, n_bytes_of(path), Manifest.read(_manifest_of(path))))
            except OSError:  # gone meanwhile
                continue
        return found

    def get(self, name: str) -> Stored:
        """The model of that name.

        Raises:
            ModelFileError: there is none.
        """
        for stored in self.models():
            if stored.name == name:
                return stored
        raise ModelFileError(
            f"there is no model {name!r:.120} in {self.folder}; `localdepth models list` shows which there are"
        )

    def remove(self, name: str) -> int:
        """Remove a model and its manifest; a link goes, what it points to stays. Returns the bytes freed.

        Raises:
            ModelFileError: there is none of that name.
            StorageError: it cannot be removed.
        """
        path = self.get(name).path
        with self.staging(path.stem) as aside, storage(path, "removed"):
            freed = n_bytes_owned(path)
            path.rename(aside / path.name)  # so that no part of a folder is left in its place
            _manifest_of(path).unlink(missing_ok=True)
        return freed

    @contextmanager
    def staging(self, name: str, progress: Progress = silent) -> Iterator[Path]:
        """An empty folder on the store's file system to make a model in, removed afterwards.

        Nobody else has that of the same name meanwhile: a second process waits here for the first.

        Raises:
            StorageError: the folder cannot be made.
        """
        pulls = self.folder / _PULLS
        with storage(self.folder, "written"):
            pulls.mkdir(parents=True, exist_ok=True)
        with self._lock(name, on_wait=lambda: progress(f"waiting for another pull of {name}", 0, 0)):
            self._sweep(pulls, besides=name)
            place = pulls / name
            try:
                with storage(place, "written"):
                    shutil.rmtree(place, ignore_errors=True)
                    place.mkdir()
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)

    def put(self, made: Path, manifest: Manifest) -> Stored:
        """Give a model from ``staging`` its place, in that of an older one of the same name.

        Raises:
            StorageError: the folder cannot be written; an older model stays.
        """
        path, aside = self.folder / made.name, made.with_name("replaced")
        beside = _manifest_of(path)
        before = beside.read_bytes() if beside.is_file() else None
        with storage(path, "written"):
            manifest.write(beside)  # first: without its model it is not listed
            try:
                if made.is_dir() and path.is_dir():  # no call exchanges folders
                    path.rename(aside)
                made.replace(path)
            except OSError:
                if aside.exists():
                    aside.rename(path)
                beside.unlink() if before is None else beside.write_bytes(before)
                raise
        return Stored(path.stem, path, manifest.n_bytes, manifest)

    @contextmanager
    def _lock(self, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
        """Hold the lock of a name. Where another process has it: say so and wait; without ``on_wait`` yield False."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / _LOCKS / f"{name}.lock")
        with storage(self.folder, "locked"):
            (self.folder / _LOCKS).mkdir(exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                if on_wait:
                    on_wait()
                    lock.acquire()
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def _sweep(self, pulls: Path, *, besides: str) -> None:
        """Remove what killed pulls of other names left: those whose lock nobody holds."""
        for place in pulls.iterdir():
            if place.name != besides:
                with self._lock(place.name) as free:
                    if free:
                        shutil.rmtree(place, ignore_errors=True)


def default_folder() -> Path:
    """``models`` in the folder that LOCALDEPTH_HOME names, else in the platform's folder for user data."""
    from platformdirs import user_data_path

    home = os.environ.get(HOME)
    return (Path(home) if home else user_data_path("localdepth", appauthor=False)) / "models"


def find(name: str, folder: str | os.PathLike[str] | None = None) -> Path | None:
    """The file or folder of the stored model called ``name``, or None."""
    return next((stored.path for stored in Store(folder).models() if stored.name == name), None)


def model_name(text: str) -> str:
    """``text`` as the name of a model: letters, digits, ".", "_" and "-", at most 100 of them.

    Raises:
        RequestError: nothing is left, or the name is that of the default model.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:_LONGEST_NAME].strip("-.")
    if name in ("", DEFAULT_NAME):
        raise RequestError(f"{text!r:.120} cannot be the name of a stored model; choose another")
    return name


def _manifest_of(path: Path) -> Path:
    """Where the manifest of a model lies."""
    return path.with_name(f"{path.name}.json")
