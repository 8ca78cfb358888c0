"""What a pull will do, decided before anything large is downloaded.

The repository's description, ``config.json`` and the headers of the weights are small; from them it is judged whether
the model can be run, and whether it has room. The exporter is handed in: the runtime knows no checkpoints.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from localdepth.config import PLAIN_MODELS, plain_model
from localdepth.errors import (
    CheckpointError,
    MissingExtra,
    ModelFileError,
    RequestError,
    StorageError,
    install_line,
)
from localdepth.gguf import ARCHITECTURE
from localdepth.memory import as_size
from localdepth.store.checkpoint import CONFIG, existing, list_some, read_config, shapes_of, texts_of, weights_of
from localdepth.store.folder import HOME, Progress, Store, model_name
from localdepth.store.hub import Hub, Repository, parse_reference

__all__ = ["DEFAULT_QUANT", "Converter", "Plan", "plan"]

DEFAULT_QUANT = "Q8_0"  # what a checkpoint is converted to


class Converter(Protocol):
    """Turns a checkpoint into a model file."""

    def spell(self, quant: str) -> str:
        """A quant as the exporter writes it into files.

        Raises:
            ConfigError: there is no such quant.
        """

    def weigh(self, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, quant: str) -> int:
        """Bytes of the weights of the file that a checkpoint becomes, from its config.json and its tensors' shapes.

        Raises:
            CheckpointError: it is no model that can be read; ``where`` names it.
        """

    def weigh_folder(self, folder: Path, quant: str) -> int:
        """The same for a checkpoint that is on this machine."""

    def convert(
        self, folder: Path, out: Path, quant: str, source: str, license_name: str | None, progress: Progress
    ) -> None:
        """Write the checkpoint in ``folder``, which came from ``source``, as ``out``."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull will do.

    Attributes:
        name: of the model in the store.
        files: what is needed of the repository; the first is the model file, or lies in the checkpoint's folder.
        converter: for a checkpoint; None for a model file, which is taken as it is.
        quant: what a checkpoint is converted to.
        n_download: bytes that are not in the cache yet.
        n_result: bytes of the model, about.
    """

    name: str
    repository: Repository
    files: tuple[str, ...]
    converter: Converter | None
    quant: str
    n_download: int
    n_result: int


def plan(
    reference: str,
    store: Store,
    hub: Hub,
    *,
    file: str | None = None,
    quant: str | None = None,
    name: str | None = None,
    converter: Converter | None = None,
) -> Plan:
    """Decide what to pull, and refuse what will not do before anything large is downloaded.

    Args:
        reference: ``owner/name`` or ``owner/name@revision``.
        file: the GGUF file to take, where the repository has several.
        quant: picks one of several GGUF files by its name; what a checkpoint is converted to, Q8_0 if None.
        name: of the model in the store; None makes one from the repository's or the file's.
        converter: for checkpoints; None where the exporter is not installed.
    Raises:
        RequestError: the reference, the file or the name cannot be meant.
        ModelFileError, CheckpointError, ConfigError: nothing there that can be run.
        MissingExtra: it is a checkpoint, and there is no converter.
        MachineError, StorageError: no connection, or no room.
    """
    repository = hub.look(*parse_reference(reference))
    gguf = _choose_gguf(repository, file, quant)
    if gguf:
        made = _plan_file(repository, hub, gguf)
    else:
        made = _plan_checkpoint(repository, hub, converter, quant or DEFAULT_QUANT)
    if name is not None and model_name(name) != name:
        raise RequestError(f"name={name!r:.120} holds characters that files may not have; try {model_name(name)}")
    made = replace(made, name=name or model_name(made.name))
    _check_name(made, store)
    _check_room(made, store, hub)
    return made


def _choose_gguf(repository: Repository, file: str | None, quant: str | None) -> str | None:
    """The GGUF file to take; None where a checkpoint is to be converted."""
    there = sorted(name for name in repository.files if name.endswith(".gguf"))
    if file is not None:
        if file not in there:
            raise RequestError(f"{repository.repo} has no model file {file!r:.120}; it has {list_some(there)}")
        return file
    fitting = [name for name in there if quant is None or quant.lower() in re.split(r"[/.-]", name.lower())]
    if len(fitting) > 1:
        raise RequestError(f"{repository.repo} has several model files: {list_some(fitting)}; choose one with --file")
    if there and not fitting and CONFIG not in repository.files:
        raise RequestError(f"{repository.repo} has no model file of quant {quant!r:.40}; it has {list_some(there)}")
    return fitting[0] if fitting else None


def _plan_file(repository: Repository, hub: Hub, name: str) -> Plan:
    """Take a GGUF file, unless the Hub knows it to be of another kind; ``read`` judges it after the download."""
    kind = repository.architecture
    if kind is not None and kind.startswith(PLAIN_MODELS):
        raise ModelFileError(f"{repository.repo} holds a {plain_model(kind, 'BASE, its original checkpoint,')}")
    if kind not in (None, ARCHITECTURE):
        raise ModelFileError(
            f"{repository.repo} holds GGUF files of architecture {kind!r:.40}, not {ARCHITECTURE!r}; pull its "
            "checkpoint, or a file made by `localdepth export gguf`"
        )
    return Plan(
        name=Path(name).stem,
        repository=repository,
        files=(name,),
        converter=None,
        quant="",
        n_download=hub.n_missing(repository, name),
        n_result=repository.files[name].n_bytes,
    )


def _plan_checkpoint(repository: Repository, hub: Hub, converter: Converter | None, quant: str) -> Plan:
    repo, texts = repository.repo, texts_of(repository)
    record = read_config(repository, hub)
    kind = record.get("model_type")
    if isinstance(kind, str) and kind.startswith(PLAIN_MODELS):
        raise CheckpointError(f"{repo} holds a {plain_model(kind, 'BASE, this repository,')}")
    if converter is None:
        raise MissingExtra(f"{repo} is a checkpoint, to be converted; type: {install_line('export')}")
    quant = converter.spell(quant)
    weights = weights_of(repository, hub)
    if any(hub.n_missing(repository, name) for name in weights):
        n_weights = converter.weigh(record, shapes_of(repository, hub, weights), repo, quant)
    else:
        n_weights = converter.weigh_folder(hub.fetch(repository, CONFIG).parent, quant)
    files = (*texts, *weights)
    return Plan(
        name=f"{repo.rpartition('/')[2]}-{quant}",
        repository=repository,
        files=files,
        converter=converter,
        quant=quant,
        n_download=sum(hub.n_missing(repository, name) for name in files),
        n_result=n_weights + sum(repository.files[name].n_bytes for name in texts),
    )


def _check_name(planned: Plan, store: Store) -> None:
    """Refuse to replace a model that came from elsewhere."""
    for stored in store.models():
        known = stored.manifest and stored.manifest.repo
        if stored.name.casefold() == planned.name.casefold() and known != planned.repository.repo:
            raise RequestError(
                f"there is a model {planned.name} {f'from {known}' if known else 'without a manifest'} in "
                f"{store.folder}; choose another name with --name, or remove it"
            )


def _check_room(planned: Plan, store: Store, hub: Hub) -> None:
    """Refuse what does not fit on the disks of the cache and of the store."""
    cache, folder = existing(hub.cache), existing(store.folder)
    one_disk = cache.stat().st_dev == folder.stat().st_dev
    n_result = 0 if one_disk and planned.converter is None else planned.n_result  # a file is linked, not copied
    wanted = {cache: planned.n_download, folder: n_result}
    if one_disk:
        wanted = {folder: planned.n_download + n_result}
    for place, n_bytes in wanted.items():
        free = shutil.disk_usage(place).free
        if n_bytes > free:
            raise StorageError(
                f"{planned.repository.repo} needs {as_size(n_bytes)} in {place}, which has {as_size(free)} free "
                f"({as_size(planned.n_download)} to download, {as_size(n_result)} for the model); free space there, or "
                f"set HF_HOME for downloads and {HOME} for models"
            )
